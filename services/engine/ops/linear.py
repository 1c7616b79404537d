"""Products with a weight matrix that is laid out once and multiplied in every step.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.activation import silu_mul
from services.engine.ops.forms import Unnormed, single_row
from services.engine.ops.norm import rms_norm

# Outputs from which on a float32 matrix is packed.
_WIDE = 8192


def packed(weight_OI: Tensor) -> Tensor:
    """The matrix as `linear` wants it. On a CPU with oneDNN that is a layout of its own, which saves the kernel from
    rearranging the matrix in each call; such a tensor has no strides and serves `linear` alone."""
    if not _is_packable(weight_OI):
        return weight_OI
    tensor: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
    return tensor


def counters_for(weight_OI: Tensor) -> tuple[Tensor, ...]:
    """What `linear` needs beside a matrix on a GPU, made once with it; nothing elsewhere."""
    if not weight_OI.is_cuda:
        return ()
    from services.engine.ops.kernels import skinny

    return (skinny.counters_of(weight_OI),)


def linear(
    x: Tensor | Unnormed,
    weight_OI: Tensor,
    *counters: Tensor,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + add, the weight as `packed` and the counters as `counters_for` returned them; without these a
    GPU is slower where rows are few. The result may take the place of `add`."""
    if isinstance(x, Unnormed):
        from services.engine.ops.kernels import gemv

        if gemv.is_supported(weight_OI):
            return gemv.gemv(x, weight_OI, bias_O=bias_O, add=add)
        x = rms_norm(*x)
    if weight_OI.is_mkldnn:
        # The overloads by name: choosing among them costs 14 us a call.
        pointwise = torch.ops.mkldnn._linear_pointwise
        out: Tensor
        if add is None:
            out = pointwise.default(x, weight_OI, bias_O, "none", [], "")
        else:
            out = pointwise.binary(x, add, weight_OI, bias_O, "add")
        return out
    if x.is_cuda:
        few = _of_few_rows(x, weight_OI, counters[0] if counters else None, bias_O=bias_O, add=add, dtype=x.dtype)
        if few is not None:
            return few
        if add is not None and bias_O is None:
            return add.addmm_(x, weight_OI.t())
    out = F.linear(x, weight_OI, bias_O)
    return out if add is None else out.add_(add)


def plus(out_NO: Tensor, bias_O: Tensor | None, add: Tensor | None) -> Tensor:
    """The products, to which what there is of the two is added in place."""
    for term in (bias_O, add):
        if term is not None:
            out_NO.add_(term)
    return out_NO


def gated_linear(x: Tensor | Unnormed, weight_OI: Tensor, *counters: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """silu(gate) * up, [N, O / 2], where `linear` gives gate and then up."""
    if single_row(x) is not None:
        from services.engine.ops.kernels import gemv

        if gemv.is_supported(weight_OI):
            return gemv.gemv(x, weight_OI, bias_O=bias_O, gated=True)
    return silu_mul(linear(x, weight_OI, *counters, bias_O=bias_O))


def products(x: Tensor, weight_OI: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T in float32, of 16-bit matrices; in `out` where there is one. Only a GPU's kernels give what they added
    up in float32."""
    assert x.is_cuda
    few = _of_few_rows(x, weight_OI, None, bias_O=None, add=None, dtype=torch.float32)
    if few is not None:
        return few if out is None else out.copy_(few)
    return torch.mm(x, weight_OI.t(), out_dtype=torch.float32, out=out)


def in_dtype(x: Tensor, weight_OI: Tensor, *, bias_O: Tensor | None, add: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear` on a GPU, in the dtype of x or in float32."""
    if dtype is x.dtype:
        return linear(x, weight_OI, bias_O=bias_O, add=add)
    return plus(products(x, weight_OI), bias_O, add)


def _of_few_rows(
    x: Tensor,
    weight_OI: Tensor,
    counters: Tensor | None,
    *,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """The product by a kernel of ours; None where cuBLAS is as fast."""
    from services.engine.ops.kernels import gemv, skinny

    num_rows = x.shape[0]
    if num_rows == 1 and gemv.is_supported(weight_OI):
        return gemv.gemv(x, weight_OI, bias_O=bias_O, add=add, dtype=dtype)
    if num_rows <= skinny.MOST_ROWS:
        split = skinny.split_of(weight_OI)
        if split is not None and (split == 1 or counters is not None):
            return skinny.matmul(x, weight_OI, split, counters=counters, bias_O=bias_O, add=add, dtype=dtype)
    return None


def _is_packable(weight_OI: Tensor) -> bool:
    """Whether the layout pays. In float32 it does for wide matrices alone: a narrow one times one row is a tenth slower."""
    if not weight_OI.is_cpu or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight_OI.dtype is torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight_OI.dtype is torch.float32 and weight_OI.shape[0] >= _WIDE
