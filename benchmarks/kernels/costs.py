"""What a kernel must move and compute at least, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.engine.kv_cache import KVShape
from services.engine.kv_format import KVFormat
from services.engine.models.spec import ModelSpec, MoESpec

DTYPE = torch.bfloat16
"""Of the model."""
PROMPT = 2048
"""Tokens of each prompt, as in `offline`."""


@dataclass(frozen=True, slots=True)
class Load:
    """A step: sequences that compute as many tokens each."""

    sequences: int
    queries: int
    context: int
    """Keys that the last token of each sequence sees."""

    @property
    def is_decode(self) -> bool:
        return self.queries == 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.queries

    def __str__(self) -> str:
        return f"batch {self.sequences}" if self.is_decode else f"prefill {self.tokens:,}"

    @classmethod
    def decode(cls, sequences: int, context: int) -> Load:
        """One token of each."""
        return cls(sequences, 1, context)

    @classmethod
    def prefill(cls, tokens: int) -> Load:
        """So many tokens in prompts of `PROMPT`, or in one where there are fewer."""
        sequences = max(1, tokens // PROMPT)
        return cls(sequences, tokens // sequences, tokens // sequences)


@dataclass(frozen=True, slots=True)
class Cost:
    """What must move and be computed at least."""

    bytes_: float
    flops: float = 0.0
    unit: str = "bf16"
    """Which matrix unit computes."""


def rows_bytes(rows: int, width: int, form: str) -> int:
    """Of activations in this form, with their scales."""
    return rows * (width + 4) if form in ("fp8", "w8a8") else 2 * rows * width


def matrix_bytes(outputs: int, inputs: int, form: str) -> float:
    """With its scales, of four bits one of 16 bits for each group of 128."""
    if form == "w4a16":
        return outputs * inputs * (0.5 + 2 / 128)
    return outputs * (inputs + 4) if form in ("fp8", "w8a8") else 2 * outputs * inputs


def product_cost(rows: int, outputs: int, inputs: int, *, form: str, adds: bool = False, out: int = 2) -> Cost:
    """`out`: bytes of a number of the result."""
    matrix = matrix_bytes(outputs, inputs, form)
    moved = rows_bytes(rows, inputs, form) + rows * outputs * (out + (2 if adds else 0))
    return Cost(matrix + moved, 2.0 * rows * outputs * inputs, form)


def attention_cost(spec: ModelSpec, load: Load, format: KVFormat) -> Cost:
    """By the first layer's window."""
    width, window = spec.heads * spec.head_dim, spec.windows[0] or load.context
    seen = [min(keys, window) for keys in range(load.context - load.queries + 1, load.context + 1)]
    read = min(load.context, window + load.queries - 1) * _kept(spec).token_bytes(format)
    return Cost(load.sequences * read + 4 * load.tokens * width, 4.0 * width * load.sequences * sum(seen))


def prepare_cost(spec: ModelSpec, load: Load, format: KVFormat) -> Cost:
    """Angles are two float32 a feature."""
    width, all_ = spec.heads * spec.head_dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return Cost(load.tokens * (2 * all_ + 2 * width + 8 * spec.head_dim + _kept(spec).token_bytes(format)))


def _kept(spec: ModelSpec) -> KVShape:
    return KVShape(1, spec.kv_heads, spec.head_dim, DTYPE)


def experts_cost(spec: MoESpec, hidden: int, tokens: int, *, wanted: int) -> Cost:
    """Of so many different experts."""
    matrices = 3 * hidden * spec.intermediate
    moved = 2 * matrices * wanted + tokens * 2 * (3 * hidden + spec.num_experts)
    return Cost(moved, 2.0 * tokens * spec.top_k * matrices)
