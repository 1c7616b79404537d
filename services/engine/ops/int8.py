"""Products of activations as they are with an int8 matrix, on a CPU.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.forms import RowScaled
from services.engine.ops.linear import plus
from services.engine.ops.quantize import by_torch
from services.engine.ops.scaled import whole_products

_FORM = RowScaled(torch.int8)
_FINER = 254.0
"""The second part of a row lies between halves of a step of the first: so many of its own steps make one."""


def linear(
    x_NI: Tensor, values_OI: Tensor, scales_O: Tensor, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x @ values.T) * scales + bias + add, in `dtype`, rounded once. A row of x is taken in two parts of eight bits, which leaves
    out less than 2^-15 of its largest value: whole numbers are multiplied several times as fast as torch's kernels for unlike types
    multiply, and their sums are exact."""
    coarse = by_torch(x_NI, _FORM)
    steps_NI = x_NI.float() / coarse.scales_N[:, None]
    fine_NI = (steps_NI - coarse.values_NI).mul_(_FINER).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-127, 127)
    sums = whole_products(torch.cat((coarse.values_NI, fine_NI.to(torch.int8))), values_OI).float()
    num_rows = len(x_NI)
    out_NO = torch.add(sums[:num_rows], sums[num_rows:], alpha=1 / _FINER)
    out_NO.mul_(scales_O).mul_(coarse.scales_N[:, None])
    return plus(out_NO, bias_O, add).to(dtype)
