"""Products with a weight matrix that is laid out once and multiplied in every step.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def packed(weight_OI: Tensor) -> Tensor:
    """The matrix as `linear` wants it. On a CPU with oneDNN that is a layout of its own, which saves the kernel from
    rearranging the matrix in each call; such a tensor has no strides and serves `linear` alone."""
    if not _is_packable(weight_OI):
        return weight_OI
    tensor: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
    return tensor


def linear(x: Tensor, weight_OI: Tensor, *, bias_O: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias + add, the weight as `packed` returned it."""
    if weight_OI.is_mkldnn:
        if add is None:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
        else:
            out = torch.ops.mkldnn._linear_pointwise(x, add, weight_OI, bias_O, "add")
        return out
    out = F.linear(x, weight_OI, bias_O)
    return out if add is None else out.add_(add)


def _is_packable(weight_OI: Tensor) -> bool:
    return weight_OI.device.type == "cpu" and weight_OI.dtype is torch.bfloat16 and torch.backends.mkldnn.is_available()
