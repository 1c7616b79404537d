"""Self-attention over the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.layers.linear import Linear
from services.engine.layers.norm import RMSNorm
from services.engine.layers.rotary import Angles
from services.engine.ops.attention import AttentionPlan, paged_attention
from services.engine.ops.rotary import rotate_
from services.engine.weights import Weights

if TYPE_CHECKING:
    from services.engine.models.spec import ModelSpec


class Attention:
    """Projects to queries, keys and values in one matrix, turns queries and keys, keeps keys and values in the cache,
    attends and projects back."""

    def __init__(self, weights: Weights, spec: ModelSpec, *, layer: int) -> None:
        self._layer = layer
        self._heads, self._kv_heads, self._head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self._window = spec.windows[layer]
        self._scale = spec.head_dim**-0.5
        sizes = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
        self._qkv = Linear.load(
            weights, "q_proj", "k_proj", "v_proj", inputs=spec.hidden, outputs=sizes, bias=spec.qkv_bias
        )
        self._o = Linear.load(weights, "o_proj", inputs=sizes[0], outputs=(spec.hidden,), bias=spec.o_bias)
        self._norms: tuple[RMSNorm, RMSNorm] | None = None
        if spec.qk_norm:
            q_norm, k_norm = (
                RMSNorm(weights, name, size=spec.head_dim, eps=spec.norm_eps) for name in ("q_norm", "k_norm")
            )
            self._norms = (q_norm, k_norm)

    def __call__(self, x_NI: Tensor, angles: Angles, plan: AttentionPlan, cache: KVCache, *, add: Tensor) -> Tensor:
        num_tokens, heads, kv_heads = x_NI.shape[0], self._heads, self._kv_heads
        qkv = self._qkv(x_NI).view(num_tokens, heads + 2 * kv_heads, self._head_dim)
        q_NHD, qk = qkv[:, :heads], qkv[:, : heads + kv_heads]
        if self._norms is not None:
            q_norm, k_norm = self._norms
            q_NHD.copy_(q_norm(q_NHD))
            k_NKD = qkv[:, heads : heads + kv_heads]
            k_NKD.copy_(k_norm(k_NKD))
        rotate_(qk, *angles)
        cache.write(self._layer, qkv[:, heads:].view(num_tokens, 2, kv_heads, self._head_dim), plan.slots)
        out_NHD = paged_attention(q_NHD, cache, self._layer, plan, scale=self._scale, window=self._window)
        return self._o(out_NHD.view(num_tokens, -1), add=add)
