"""Keys and values in 8 bits, as kernels make and read them (`ops.kv_quant` is the specification).

What is multiplied is widened to 16 bits and not scaled: every 8-bit number is one of float16, which has both more places
than bfloat16 and an instruction that widens fp8. Its range is small, so queries are divided by the largest of their row,
and a key's weight is taken with the scale of its value: as a power of two that is a term of the score. The softmax then keeps the largest
of these products at one, and its sum counts each of them without the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from services.engine.ops.kernels import softmax
from services.engine.ops.kernels.bits import widened
from services.engine.ops.kv_quant import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
_ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added to a number of few places, it leaves no room for a fraction."""


@triton.jit
def scale_of(x, y, PEAK: tl.constexpr):
    """The scales of rows that come in two halves, and whether all of a row is finite; both [rows, 1]."""
    x, y = tl.abs(x), tl.abs(y)
    is_finite = tl.min(((x < float("inf")) & (y < float("inf"))).to(tl.int32), 1) > 0
    return tl.maximum(tl.max(tl.maximum(x, y), 1), _SMALLEST)[:, None] / PEAK, is_finite[:, None]


@triton.jit
def quantized(x, scale, is_finite, DTYPE: tl.constexpr):
    """float32 numbers as the nearest 8-bit ones, 0 where not all of a row is finite."""
    x = tl.where(is_finite, x / scale, 0.0)
    if DTYPE == tl.int8:
        x = (x + _ROUNDING) - _ROUNDING
    return x.to(DTYPE)


@triton.jit
def normed(queries):
    """The queries divided by the largest of each row, in what they are multiplied in, and those divisors."""
    WIDE: tl.constexpr = tl.float32 if queries.dtype == tl.float32 else tl.float16
    queries = queries.to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(queries), 1), _SMALLEST)
    return (queries / largest[:, None]).to(WIDE), largest


@triton.jit
def _log2(x):
    """The logarithm to base 2, of 0 one below all others."""
    if _IS_COMPILED:  # within 2^-22, by one instruction instead of twenty
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.where(x == 0, -1e30, tl.log2(tl.where(x == 0, 1.0, x)))


@triton.jit
def load_tile(
    kv, scales, block, inside, seen, head, place, block_stride, v_stride, head_stride, scale_stride,
    K: tl.constexpr, D: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys, [tokens, dims], and values, [dims, tokens], of the tokens `inside` a page, and their scales: 0 where they are not `seen`
    (None: all are). What a page holds behind a sequence's end are numbers at least, so values need no mask."""
    of_keys = kv + block.to(tl.int64) * block_stride + head * head_stride + inside[:, None] * D + place[None, :]
    # Tokens lie side by side, so that two of them come as one operand of the matrix units.
    of_values = kv + block.to(tl.int64) * block_stride + head * head_stride + v_stride
    of_values = of_values + place[:, None] * T + inside[None, :]
    if WIDTH == D:
        keys, values = tl.load(of_keys), tl.load(of_values)
    else:
        keys = tl.load(of_keys, mask=place[None, :] < D, other=0.0)
        values = tl.load(of_values, mask=place[:, None] < D, other=0.0)
    of_scales = scales + block.to(tl.int64) * scale_stride + head * T + inside
    if seen is None:
        key_scales, value_scales = tl.load(of_scales), tl.load(of_scales + K * T)
    else:
        key_scales = tl.load(of_scales, mask=seen, other=0.0)
        value_scales = tl.load(of_scales + K * T, mask=seen, other=0.0)
    return keys, values, key_scales, value_scales


@triton.jit
def take_in(
    queries, keys, values, key_scales, value_scales, seen, peak, total, found, scale,
    SOME_HIDDEN: tl.constexpr, PRECISION: tl.constexpr, AXIS: tl.constexpr = 1,
):  # fmt: skip
    """One more tile of keys and values: the highest score of each query so far, with the scale of its value in it; the sum of
    its weights; and what it found by them. `scale` is of a query. Keys with a scale of 0 weigh nothing; `seen` is looked at where
    others are hidden. Queries are rows where keys are along axis 1, and columns where they are along axis 0, as is what is found."""
    keys = widened(keys, queries.dtype)
    if AXIS == 1:
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
    else:
        values = widened(values, queries.dtype)
        scores = tl.dot(keys, queries, input_precision=PRECISION)
    powers = _log2(value_scales)
    scores = scores * tl.expand_dims(scale, AXIS) * tl.expand_dims(key_scales, 1 - AXIS) + tl.expand_dims(
        powers, 1 - AXIS
    )
    counts = tl.exp2(tl.minimum(-powers, 126.0))
    peak, total, weights, fade = softmax.take_in(scores, seen, peak, total, SOME_HIDDEN, counts, AXIS)
    found, weights = found * tl.expand_dims(fade, AXIS), weights.to(queries.dtype)
    if AXIS == 1:
        # Values of a large tile are not widened before: where powers of two are taken there is room for that.
        found = tl.dot(weights, widened(values, queries.dtype).T, found, input_precision=PRECISION)
    else:
        found = tl.dot(values, weights, found, input_precision=PRECISION)
    return peak, total, found
