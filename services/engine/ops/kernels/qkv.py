"""From the projection to attention: norm and turn queries and keys, put keys and values into the cache. One pass over
what the projection wrote."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.rotary import Angles


def prepare(
    qkv_NHD: Tensor,
    angles: Angles,
    cache: KVCache,
    layer: int,
    write_slots_N: Tensor,
    *,
    heads: int,
    norm_weights: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """As `ops.qkv.prepare`: the queries, [N, H, D]; `qkv_NHD` is dense, heads then 2 * K kv heads."""
    num_tokens, num_all, head_dim = qkv_NHD.shape
    kv_heads = cache.shape.kv_heads
    q_NHD = torch.empty((num_tokens, heads, head_dim), dtype=qkv_NHD.dtype, device=qkv_NHD.device)
    q_weight, k_weight = norm_weights if norm_weights is not None else (qkv_NHD, qkv_NHD)
    data = cache.data
    _prepare[(num_tokens, num_all)](
        qkv_NHD,
        q_NHD,
        data[:, layer],
        angles.cos_N1D,
        angles.sin_N1D,
        q_weight,
        k_weight,
        write_slots_N,
        data.stride(0),
        data.stride(2),
        data.stride(3),
        eps,
        H=heads,
        K=kv_heads,
        D=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        T=cache.block_size,
        NORM=norm_weights is not None,
        num_warps=1,
    )
    return q_NHD


@triton.jit
def _prepare(
    qkv,
    q_out,
    kv,
    cosines,
    sines,
    q_weight,
    k_weight,
    write_slots,
    block_stride,
    v_stride,
    head_stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    T: tl.constexpr,
    NORM: tl.constexpr,
):
    """One head of one token; its two halves are the two coordinates that are turned."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, HALF)
    inside = place < D // 2
    source = qkv + (token * (H + 2 * K) + head) * D + place
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + D // 2, mask=inside, other=0.0)
    if head < H + K:
        x, y = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            weight = q_weight if head < H else k_weight
            scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / D + eps)
            # Rounded as the norm alone would leave it.
            x = (x * scale * tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)).to(low.dtype)
            y = (y * scale * tl.load(weight + D // 2 + place, mask=inside, other=0.0).to(tl.float32)).to(low.dtype)
            x, y = x.to(tl.float32), y.to(tl.float32)
        cos = tl.load(cosines + token * D + place, mask=inside, other=0.0)
        sin = tl.load(sines + token * D + D // 2 + place, mask=inside, other=0.0)
        low = (x * cos - y * sin).to(low.dtype)
        high = (y * cos + x * sin).to(high.dtype)
    if head < H:
        target = q_out + (token * H + head) * D + place
    else:
        slot = tl.load(write_slots + token)
        is_value = head >= H + K
        kv_head = (head - H - K) if is_value else (head - H)
        start = (slot // T) * block_stride + kv_head * head_stride + (slot % T) * D
        target = kv + start + (v_stride if is_value else 0) + place
    tl.store(target, low, mask=inside)
    tl.store(target + D // 2, high, mask=inside)
