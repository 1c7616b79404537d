"""Self-attention over the paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.layers.linear import Linear
from services.engine.layers.norm import RMSNorm
from services.engine.ops import qkv
from services.engine.ops.attention import AttentionPlan, paged_attention
from services.engine.ops.forms import Activations, Form, Terms
from services.engine.ops.rotary import Angles
from services.engine.weight_format import QKV
from services.engine.weights import Weights

if TYPE_CHECKING:
    from services.engine.models.spec import ModelSpec


class Attention:
    """Projects to queries, keys and values in one matrix, turns queries and keys, keeps keys and values in the cache,
    attends and projects back."""

    def __init__(self, weights: Weights, spec: ModelSpec, *, layer: int) -> None:
        self._layer = layer
        self._shard = weights.shard
        heads = weights.shard.even_part(spec.heads, "attention heads")
        kv_heads = weights.shard.shared_part(spec.kv_heads, "key-value heads")
        self._heads, self._head_dim = heads.count, spec.head_dim
        self._window = spec.windows[layer]
        self._scale = spec.head_dim**-0.5
        sizes = (heads.times(spec.head_dim), kv_heads.times(spec.head_dim), kv_heads.times(spec.head_dim))
        self._qkv = Linear.load(weights, *QKV, inputs=spec.hidden, outputs=sizes, bias=spec.qkv_bias)
        self._o = Linear.load(weights, "o_proj", inputs=sizes[0], outputs=(spec.hidden,), bias=spec.o_bias)
        self._eps = spec.norm_eps
        self._norm_weights: tuple[Tensor, Tensor] | None = None
        if spec.qk_norm:
            names = ("q_norm", "k_norm")
            q_norm, k_norm = (RMSNorm(weights, name, size=spec.head_dim, eps=spec.norm_eps) for name in names)
            self._norm_weights = (q_norm.weight, k_norm.weight)

    @property
    def takes(self) -> Form:
        return self._qkv.takes

    def __call__(self, x_NI: Activations, angles: Angles, plan: AttentionPlan, cache: KVCache, *, add: Tensor) -> Terms:
        num_tokens = add.shape[0]
        q_NHD = qkv.prepare(
            self._qkv(x_NI).view(num_tokens, -1, self._head_dim),
            angles,
            cache,
            self._layer,
            plan,
            heads=self._heads,
            norm_weights=self._norm_weights,
            eps=self._eps,
        )
        out_NHD = paged_attention(q_NHD, cache, self._layer, plan, scale=self._scale, window=self._window)
        return self._o.terms(out_NHD.view(num_tokens, -1), add, self._shard)
