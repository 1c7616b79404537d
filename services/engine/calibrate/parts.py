"""The matrices of a layer, as calibration sees them: which share their inputs, and what stands before these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.engine.models.spec import ModelSpec
from services.engine.weight_format import GATE_UP, QKV


@dataclass(frozen=True, slots=True)
class Sharing:
    """Matrices that see the same inputs. Names are those within a layer."""

    names: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    norm: str | None = None
    """Whose products with its weight these inputs are, and that nobody else sees;"""
    rows_of: str | None = None
    """or the matrix of whose outputs they are multiples."""
    by_heads: bool = False
    """Whether several heads' inputs may come from one output."""


def sharings(spec: ModelSpec, layer: int) -> Iterator[Sharing]:
    """Those of a layer; of a mixture neither experts nor their router, which stay as they are."""
    attention, hidden = "self_attn", spec.hidden
    heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield Sharing(
        tuple(f"{attention}.{name}" for name in QKV),
        (heads, kv_heads, kv_heads),
        hidden,
        norm="input_layernorm",
    )
    yield Sharing((f"{attention}.o_proj",), (hidden,), heads, rows_of=f"{attention}.v_proj", by_heads=True)
    if spec.moe is not None and layer in spec.moe.layers:
        return
    size = spec.intermediate
    gate_up = tuple(f"mlp.{name}" for name in GATE_UP)
    yield Sharing(gate_up, (size, size), hidden, norm="post_attention_layernorm")
    yield Sharing(("mlp.down_proj",), (hidden,), size, rows_of="mlp.up_proj")


def experts(spec: ModelSpec, layer: int) -> Iterator[str]:
    """The names of a layer's experts' matrices."""
    if spec.moe is None or layer not in spec.moe.layers:
        return
    for index in range(spec.moe.num_experts):
        yield from (f"{spec.moe.name}.experts.{index}.{name}" for name in spec.moe.expert_names)
