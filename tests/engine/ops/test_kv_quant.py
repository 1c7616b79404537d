"""Keys and values in 8 bits."""

from __future__ import annotations

import pytest
import torch

from services.engine.kv_format import KVFormat
from services.engine.ops.kv_quant import PEAKS, dequantize, quantize

FORMATS = [KVFormat.FP8_E4M3, KVFormat.INT8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_the_error_is_what_the_format_rounds(format: KVFormat, dtype: torch.dtype) -> None:
    """For tokens from tiny to huge, in float64: half a step of the format at the number's place, and no more."""
    sizes = torch.logspace(-4, 4, 200, dtype=torch.float64)[:, None, None]
    x = (torch.randn(200, 3, 64, dtype=torch.float64) * sizes).to(dtype)
    back = dequantize(*quantize(x, format), torch.float64)
    unit = x.double().abs().amax(-1, keepdim=True) / PEAKS[format]
    if format is KVFormat.INT8:
        step = unit
    else:
        _, exponent = torch.frexp((x.double() / unit).abs().clamp(min=2.0**-6))
        step = unit * torch.exp2(exponent - 4.0)
    assert ((back - x.double()).abs() <= step / 2 * (1 + 1e-4)).all()  # float32 rounds before the format does


@pytest.mark.parametrize("format", FORMATS)
def test_each_token_and_head_has_its_own_scale(format: KVFormat) -> None:
    """Its largest number is the format's largest, whatever stands beside it."""
    x = torch.randn(5, 2, 3, 16) * torch.logspace(-6, 6, 5)[:, None, None, None]
    values, scales = quantize(x, format)
    assert scales.shape == x.shape[:-1] and scales.dtype is torch.float32
    assert torch.equal(values.float().abs().amax(-1), torch.full(scales.shape, PEAKS[format]))
    alone, alone_scales = quantize(x[2, 1, 0], format)
    assert dequantize(values.mT, scales[..., :1].expand(5, 2, 16), torch.float32).is_contiguous()
    assert torch.equal(alone.float(), values[2, 1, 0].float()) and torch.equal(alone_scales, scales[2, 1, 0])


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: KVFormat) -> None:
    """Exactly, and what is all but nothing becomes no more than it was."""
    x = torch.stack((torch.zeros(8), torch.full((8,), 1e-38), -torch.full((8,), 1e-45)))
    back = dequantize(*quantize(x, format), torch.float32)
    assert torch.equal(back[0], torch.zeros(8))
    assert (back.abs() <= 2 * x.abs()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_number_is_not_hidden(format: KVFormat, bad: float) -> None:
    """It is read as NaN, by its scale: the 8-bit values themselves are all numbers. Others are as without it."""
    x = torch.randn(4, 8)
    x[1, 3] = bad
    values, scales = quantize(x, format)
    assert values.float().isfinite().all()
    back = dequantize(values, scales, torch.float32)
    assert back[1].isnan().all()
    assert back[[0, 2, 3]].isfinite().all()
