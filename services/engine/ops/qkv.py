"""Between the projection to queries, keys and values and attention itself."""

from __future__ import annotations

from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.attention import AttentionPlan
from services.engine.ops.norm import rms_norm
from services.engine.ops.rotary import Angles, rotate_


def prepare(
    qkv_NHD: Tensor,
    angles: Angles,
    cache: KVCache,
    layer: int,
    plan: AttentionPlan,
    *,
    heads: int,
    norm_weights: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """Norms the heads of queries and keys (where there are weights for that), turns them by their positions, and puts
    keys and values into the cache. Returns the queries, [N, H, D]. `qkv_NHD` has H heads of queries, K of keys and K of
    values, and is overwritten."""
    if qkv_NHD.is_cuda:
        from services.engine.ops.kernels import qkv

        return qkv.prepare(
            qkv_NHD, angles, cache, layer, plan.write_slots_N, heads=heads, norm_weights=norm_weights, eps=eps
        )
    num_tokens, _, head_dim = qkv_NHD.shape
    kv_heads = cache.shape.kv_heads
    q_NHD, k_NKD = qkv_NHD[:, :heads], qkv_NHD[:, heads : heads + kv_heads]
    if norm_weights is not None:
        q_weight, k_weight = norm_weights
        q_NHD.copy_(rms_norm(q_NHD, q_weight, eps))
        k_NKD.copy_(rms_norm(k_NKD, k_weight, eps))
    rotate_(qkv_NHD[:, : heads + kv_heads], *angles)
    cache.write(layer, qkv_NHD[:, heads:].view(num_tokens, 2, kv_heads, head_dim), plan.slots)
    return q_NHD
