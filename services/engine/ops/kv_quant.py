"""Keys and values in 8 bits, and back. One scale for each token, kv head, and key or value (see `kv_format`).

Shapes: D head size, any number of dimensions before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.kv_format import KVFormat

DTYPES = {KVFormat.FP8_E4M3: torch.float8_e4m3fn, KVFormat.INT8: torch.int8}

PEAKS = {KVFormat.FP8_E4M3: 448.0, KVFormat.INT8: 127.0}
"""The largest number of each format."""

SMALLEST = 1e-30
"""What is nowhere larger than this is kept as if it were this large: its scale would leave float32."""


def quantize(x_D: Tensor, format: KVFormat) -> tuple[Tensor, Tensor]:
    """The nearest values of the format, ties to even, and the float32 scales [...] that they are multiples of. Zero stays
    zero. Where anything is not finite all values are 0 and the scale is NaN: then no 8-bit value is ever NaN, but what
    is read is."""
    x_D = x_D.float()
    largest = x_D.abs().amax(-1)
    is_finite = largest < torch.inf
    scales = largest.clamp(min=SMALLEST) / PEAKS[format]
    values_D = torch.where(is_finite[..., None], x_D / scales[..., None], 0)
    if format is KVFormat.INT8:
        values_D = values_D.round()
    return values_D.to(DTYPES[format]), torch.where(is_finite, scales, torch.nan)


def dequantize(values_D: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What the values stand for; dense, however they lie."""
    return values_D.to(torch.float32, memory_format=torch.contiguous_format).mul_(scales[..., None]).to(dtype)
