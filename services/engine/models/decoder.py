"""The decoder that most families are variants of: norm, attention, norm, MLP or experts, each added to what came in.

Shapes: N tokens of the step, I features, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.engine.kv_cache import KVCache, KVShape
from services.engine.layers.attention import Attention
from services.engine.layers.embedding import Embedding
from services.engine.layers.head import Head
from services.engine.layers.mlp import GatedMLP
from services.engine.layers.moe import MoE
from services.engine.layers.norm import RMSNorm
from services.engine.layers.rotary import Rotary
from services.engine.loading import build_layers
from services.engine.models.spec import ModelSpec
from services.engine.ops import attention
from services.engine.ops.forms import Terms, summed
from services.engine.ops.rotary import Angles
from services.engine.weight_format import EMBEDDING, HEAD
from services.engine.weights import INV_FREQ, Weights

if TYPE_CHECKING:
    from services.engine.state import Batch


class Layer:
    """One layer of a decoder."""

    def __init__(self, weights: Weights, spec: ModelSpec, *, layer: int) -> None:
        self._attention_norm = RMSNorm(weights, "input_layernorm", size=spec.hidden, eps=spec.norm_eps)
        self._attention = Attention(weights.under("self_attn"), spec, layer=layer)
        self._mlp_norm = RMSNorm(weights, "post_attention_layernorm", size=spec.hidden, eps=spec.norm_eps)
        self._mlp: GatedMLP | MoE
        if spec.moe is not None and layer in spec.moe.layers:
            experts = weights.shard.part(spec.moe.num_experts, "experts")
            block = weights.under(spec.moe.name)
            for index in experts.others:
                block.leave(f"experts.{index}")
            self._mlp = MoE(block, spec.moe, hidden=spec.hidden, first=experts.start, count=experts.count)
        else:
            self._mlp = GatedMLP(
                weights.under("mlp"), hidden=spec.hidden, intermediate=spec.intermediate, bias=spec.mlp_bias
            )

    def __call__(self, x_NI: Tensor, angles: Angles, plan: attention.AttentionPlan, cache: KVCache) -> Tensor:
        return summed(self.terms(x_NI, angles, plan, cache))

    def terms(self, terms: Terms, angles: Angles, plan: attention.AttentionPlan, cache: KVCache) -> Terms:
        """What it gives, before the last sum where the next layer's norm may take it."""
        normed, x_NI = self._attention_norm.of_sum(terms, self._attention.takes)
        terms = self._attention(normed, angles, plan, cache, add=x_NI)
        normed, x_NI = self._mlp_norm.of_sum(terms, self._mlp.takes)
        return self._mlp(normed, add=x_NI)


def ignored(spec: ModelSpec) -> tuple[str, ...]:
    """Globs of what a checkpoint may hold and a decoder does without."""
    return (f"*{INV_FREQ}", *((f"{HEAD}.weight",) if spec.tied else ()))


class Decoder:
    """A decoder of any family that a `ModelSpec` describes."""

    def __init__(self, weights: Weights, spec: ModelSpec) -> None:
        self.spec = spec
        kv_heads = weights.shard.shared_part(spec.kv_heads, "key-value heads")
        self.kv_shape = KVShape(spec.layers, kv_heads.count, spec.head_dim, weights.dtype)
        self.vocab_size = spec.vocab_size
        self.max_positions = spec.max_positions
        self._invariant = weights.invariant
        self._embedding = Embedding(weights, EMBEDDING, vocab_size=spec.vocab_size, size=spec.hidden)
        self._rotary = Rotary(spec.rotary, device=weights.device)
        self.layers = build_layers(
            lambda index: Layer(weights.under(f"model.layers.{index}"), spec, layer=index),
            spec.layers,
            device=weights.device,
        )
        self._norm = RMSNorm(weights, "model.norm", size=spec.hidden, eps=spec.norm_eps)
        self._head = Head.load(weights, self._embedding, hidden=spec.hidden, tied=spec.tied)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, out_RV: Tensor | None = None) -> Tensor:
        """The float32 logits of the rows to sample, [R, V], in `out_RV` where there is one. Writes the keys and values of
        the batch's tokens."""
        shared = self.prepare(batch, cache)
        terms: Terms = self.embed(batch)
        for layer in self.layers:
            terms = layer.terms(terms, *shared)
        return self.logits(summed(terms), batch, out_RV)

    def parts(self) -> dict[str, object]:
        """What holds weights, by the names of the checkpoint; norms beside the layers apart. What is kept once is in both the
        first and the last where these are one matrix."""
        layers = {f"model.layers.{index}": layer for index, layer in enumerate(self.layers)}
        return {EMBEDDING: self._embedding, **layers, HEAD: self._head}

    def prepare(self, batch: Batch, cache: KVCache) -> tuple[Angles, attention.AttentionPlan, KVCache]:
        """What the layers share in this step."""
        plan = attention.plan(batch, cache, invariant=self._invariant)
        return self._rotary(batch.positions_N), plan, cache

    def embed(self, batch: Batch) -> Tensor:
        """What the first layer takes, [N, I]."""
        return self._embedding(batch.token_ids_N)

    def logits(self, x_NI: Tensor, batch: Batch, out_RV: Tensor | None = None) -> Tensor:
        """The logits of `forward`, from what the last layer gave."""
        x_RI = x_NI if batch.sample_rows_R is None else x_NI[batch.sample_rows_R]
        return self._head(self._norm(x_RI, self._head.takes), out_RV)
