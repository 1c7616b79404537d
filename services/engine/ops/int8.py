"""Products of activations as they are with an int8 matrix.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.forms import FINER, Form, Quantized, RowScaled, rounds
from services.engine.ops.linear import in_dtype
from services.engine.ops.quantize import by_torch, quantize
from services.engine.ops.scaled import scaled, scaled_linear, whole_products

_FORM = RowScaled(torch.int8, parts=2, most_rows=256)
"""With more rows on a GPU a matrix that is widened once for all of them is multiplied sooner (not measured yet)."""


def form_for(values_OI: Tensor) -> Form:
    """In what `linear` takes activations beside plain ones."""
    return _FORM if values_OI.is_cuda else None


def linear(
    x: Tensor | Quantized,
    values_OI: Tensor,
    scales_O: Tensor,
    *counters: Tensor,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(x @ values.T) * scales + bias + add, in `dtype`, rounded once. A row of x is taken in two parts of eight bits: whole numbers are
    multiplied several times as fast as torch's kernels for unlike types multiply, and their sums are exact. A GPU multiplies many rows
    in 16 bits."""
    if values_OI.is_cuda:
        if isinstance(x, Tensor):
            if not rounds(_FORM, len(x)):
                from services.engine.ops.kernels import widen

                weight_OI = widen.int8(values_OI, scales_O, dtype=x.dtype)
                return in_dtype(x, weight_OI, bias_O=bias_O, add=add, dtype=dtype)
            x = quantize(x, _FORM)
        return scaled_linear(x, values_OI, scales_O, *counters, bias_O=bias_O, add=add, dtype=dtype)
    assert isinstance(x, Tensor)
    rows = by_torch(x, _FORM)
    coarse, fine = whole_products(rows.values_NI, values_OI).float().chunk(2)
    sums_NO = torch.add(coarse, fine, alpha=1 / FINER)
    return scaled(sums_NO, rows.scales_N, scales_O, bias_O=bias_O, add=add, dtype=dtype)
