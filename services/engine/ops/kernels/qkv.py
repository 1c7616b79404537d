"""From the projection to attention: norm and turn queries and keys, put keys and values into the cache. One pass over
what the projection wrote."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kv_cache import KVCache
from services.engine.ops.kernels.kv_quant import quantized, scale_of
from services.engine.ops.kernels.overlap import overlapped, wait
from services.engine.ops.kv_quant import PEAKS
from services.engine.ops.rotary import Angles

_HEADS = 8
"""Heads a program."""

_MANY = 1024
"""From so many tokens on values in 8 bits go into the cache some tokens at a time: in a page, tokens lie side by side."""

_TOKENS = 32
"""Those that a program takes then."""


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
    kept = cache.layers[layer]
    kv, scales = kept.kv, kept.scales
    apart = scales is not None and num_tokens >= _MANY
    most = heads + kv_heads if apart else num_all
    _prepare[(num_tokens, triton.cdiv(most, _HEADS))](
        qkv_NHD,
        q_NHD,
        kv,
        scales,
        angles.cos_N1D,
        angles.sin_N1D,
        q_weight,
        k_weight,
        write_slots_N,
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        None if scales is None else scales.stride(0),
        eps,
        H=heads,
        K=kv_heads,
        MOST=most,
        D=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        T=cache.block_size,
        PEAK=PEAKS.get(kept.format, 0.0),
        NORM=norm_weights is not None,
        HEADS=_HEADS,
        num_warps=2,
        **overlapped(q_NHD),
    )
    if apart:
        assert scales is not None
        _keep_values[(triton.cdiv(num_tokens, _TOKENS), kv_heads)](
            qkv_NHD, kv, scales, write_slots_N, num_tokens,
            kv.stride(0), kv.stride(1), kv.stride(2), scales.stride(0),
            H=heads, K=kv_heads, D=head_dim, WIDTH=triton.next_power_of_2(head_dim), T=cache.block_size,
            PEAK=PEAKS[kept.format], TOKENS=_TOKENS, num_warps=4, **overlapped(q_NHD),
        )  # fmt: skip
    return q_NHD


@triton.jit
def _prepare(
    qkv,
    q_out,
    kv,
    scales,
    cosines,
    sines,
    q_weight,
    k_weight,
    write_slots,
    block_stride,
    v_stride,
    head_stride,
    scale_stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    MOST: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    T: tl.constexpr,
    PEAK: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some heads of one token, of the first MOST, in two halves: the two coordinates that are turned."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    place = tl.arange(0, HALF)[None, :]
    inside = (place < D // 2) & (head < MOST)
    turned = head < H + K
    source = qkv + (token * (H + 2 * K) + head) * D + place
    # Where tokens stand is older than the kernel before this one.
    cos = tl.load(cosines + token * D + place, mask=place < D // 2, other=0.0)
    sin = tl.load(sines + token * D + D // 2 + place, mask=place < D // 2, other=0.0)
    slot = tl.load(write_slots + token)
    wait(OVERLAP)
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + D // 2, mask=inside, other=0.0)
    x, y = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
        wide = place < D // 2
        q_low = tl.load(q_weight + place, mask=wide, other=0.0).to(tl.float32)
        q_high = tl.load(q_weight + D // 2 + place, mask=wide, other=0.0).to(tl.float32)
        k_low = tl.load(k_weight + place, mask=wide, other=0.0).to(tl.float32)
        k_high = tl.load(k_weight + D // 2 + place, mask=wide, other=0.0).to(tl.float32)
        # Rounded as the norm alone would leave it.
        x = (x * scale * tl.where(head < H, q_low, k_low)).to(low.dtype).to(tl.float32)
        y = (y * scale * tl.where(head < H, q_high, k_high)).to(low.dtype).to(tl.float32)
    low = tl.where(turned, (x * cos - y * sin).to(low.dtype), low)
    high = tl.where(turned, (y * cos + x * sin).to(high.dtype), high)
    is_query = inside & (head < H)
    target = q_out + (token * H + head) * D + place
    tl.store(target, low, mask=is_query)
    tl.store(target + D // 2, high, mask=is_query)
    if (tl.program_id(1) + 1) * HEADS <= H:
        return
    kept = inside & (head >= H)
    kv_head = tl.where(turned, head - H, head - H - K)
    if scales is None:
        start = (slot // T) * block_stride + (slot % T) * D
        target = kv + start + tl.where(turned, 0, v_stride) + kv_head * head_stride + place
        tl.store(target, low, mask=kept)
        tl.store(target + D // 2, high, mask=kept)
    else:
        x, y = low.to(tl.float32), high.to(tl.float32)
        scale, is_finite = scale_of(x, y, PEAK)
        start = (slot // T) * block_stride + tl.where(turned, 0, v_stride) + kv_head * head_stride
        # Keys by token, values by dimension.
        target = kv + start + tl.where(turned, (slot % T) * D + place, place * T + slot % T)
        tl.store(target, quantized(x, scale, is_finite, kv.dtype.element_ty), mask=kept)
        target += tl.where(turned, D // 2, D // 2 * T)
        tl.store(target, quantized(y, scale, is_finite, kv.dtype.element_ty), mask=kept)
        target = scales + (slot // T) * scale_stride + (tl.where(turned, 0, K) + kv_head) * T + slot % T
        tl.store(target, tl.where(is_finite, scale, float("nan")), mask=(head >= H) & (head < MOST))


@triton.jit
def _keep_values(
    qkv, kv, scales, write_slots, num_tokens, block_stride, v_stride, head_stride, scale_stride,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr, PEAK: tl.constexpr,
    TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The values of one head of some tokens, in 8 bits."""
    token, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    place = tl.arange(0, WIDTH)
    there = token < num_tokens
    inside = there[:, None] & (place < D)[None, :]
    slot = tl.load(write_slots + token, mask=there, other=0)
    wait(OVERLAP)
    source = qkv + (token.to(tl.int64) * (H + 2 * K) + H + K + head)[:, None] * D + place[None, :]
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    scale, is_finite = scale_of(x, x, PEAK)
    values = quantized(x, scale, is_finite, kv.dtype.element_ty)
    start = (slot // T) * block_stride + v_stride + head * head_stride + slot % T
    # By dimension and then by token: so a warp writes tokens that lie side by side.
    tl.store(kv + start[None, :] + place[:, None] * T, values.T, mask=inside.T)
    target = scales + (slot // T) * scale_stride + (K + head) * T + slot % T
    tl.store(target[:, None], tl.where(is_finite, scale, float("nan")), mask=there[:, None])
