"""The softmax over keys that come a tile at a time (Milakov and Gimelshein 2018, "Online normalizer calculation for
softmax"), to base 2."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_in(scores, seen, peak, total, SOME_HIDDEN: tl.constexpr, counts=None, AXIS: tl.constexpr = 1):
    """One more tile of scores, its keys along this axis: the highest of each query so far, the sum of its weights, the tile's weights,
    and what those before are to be multiplied with. `seen` is looked at where some keys are hidden; `counts`, how much of a key's
    weight goes into the sum, where that is not all of it once."""
    if SOME_HIDDEN:
        scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(peak, tl.max(scores, AXIS))
    weights = tl.exp2(scores - tl.expand_dims(higher, AXIS))
    if SOME_HIDDEN:
        weights = tl.where(seen, weights, 0.0)
    fade = tl.exp2(peak - higher)
    counted = weights if counts is None else weights * tl.expand_dims(counts, 1 - AXIS)
    total = total * fade + tl.sum(counted, AXIS)
    return higher, total, weights, fade
