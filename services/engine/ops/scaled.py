"""Products of eight-bit activations and weights that carry a scale for each row.

Shapes: O outputs, I inputs, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeGuard

import torch
from torch import Tensor

from services.engine.ops import linear
from services.engine.ops.forms import Activations, Quantized, Unnormed, single_row

ROWS, COLUMNS = 64, 64
"""A matrix in fp8 must fall into tiles of that to be multiplied on a GPU."""


def packed(values_OI: Tensor, *, dtype: torch.dtype) -> Tensor:
    """An eight-bit matrix as `scaled_linear` wants it for results in `dtype`. A CPU that multiplies eight-bit floating point
    takes a hundred times as long as one that widens it: there the values, all of which bfloat16 has, are kept in
    bfloat16, or in float32 where the results are wanted finer. Whole numbers stay as they are."""
    if values_OI.is_cuda or values_OI.dtype is torch.int8:
        return values_OI
    return linear.packed(values_OI.to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32))


def scaled_linear(
    x: Quantized,
    weight_OI: Tensor,
    scales_O: Tensor,
    *counters: Tensor,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(x.values @ weight.T) * x.scales * scales + bias + add, in `dtype`: the weight as `packed` returned it, the counters
    as `linear.counters_for` did. On a GPU also with scales of blocks, as `blocks` gives them, and x in groups. The result may take the
    place of `add`.

    Sums are taken in float32, and rounded once; but to bfloat16 before they are scaled on a CPU that multiplies in it, and
    before bias and `add` where torch's own kernel takes the many rows of a GPU.
    """
    if weight_OI.is_cuda:
        return _on_gpu(x, weight_OI, scales_O, *counters, bias_O=bias_O, add=add, dtype=dtype)
    if weight_OI.dtype is torch.int8:
        sums_NO = whole_products(x.values_NI, weight_OI)
    else:
        sums_NO = linear.linear(_widened(x.values_NI, weight_OI.dtype), weight_OI)
    return scaled(sums_NO.float(), x.scales_N, scales_O, bias_O=bias_O, add=add, dtype=dtype)


def scaled(
    sums_NO: Tensor,
    scales_N: Tensor,
    scales_O: Tensor,
    *,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """sums * scales of rows * scales of outputs + bias + add, in `dtype`, rounded once, by as few operations as torch has. Overwrites the
    float32 sums; the result may take the place of `add`."""
    sums_NO.mul_(scales_O)
    scales_N1 = scales_N.unsqueeze(1)
    if bias_O is not None:
        return linear.plus(sums_NO.mul_(scales_N1), bias_O, add).to(dtype)
    if add is not None:
        out_NO = add if add.dtype is dtype else torch.empty_like(add, dtype=dtype)
        return torch.addcmul(add, sums_NO, scales_N1, out=out_NO)
    if dtype is torch.float32:
        return sums_NO.mul_(scales_N1)
    return torch.mul(sums_NO, scales_N1, out=torch.empty_like(sums_NO, dtype=dtype))


def adds(weight_OI: Tensor, scales_O: Tensor, *, num_rows: int) -> bool:
    """Whether `scaled_linear` of so many rows adds `add` in the kernel that multiplies; on a CPU there is nothing to gain otherwise."""
    return not weight_OI.is_cuda or not _is_for_torch(weight_OI, scales_O, num_rows)


def blocks(scales_TU: Tensor, tile: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """The scales of a matrix of this shape in such tiles as a GPU wants them: of each block of 64 x 128, [I / 128, O / 64]. Raises
    ValueError where a block lies in several tiles."""
    from services.engine.ops.kernels.skinny import BLOCK

    places = []
    for size, step, block in zip(shape, tile, BLOCK, strict=True):
        if step < size and step % block:
            raise ValueError(
                f"a GPU multiplies blocks of {BLOCK[0]} x {BLOCK[1]} weights with a scale, and it comes in {tile}"
            )
        places.append(torch.arange(0, size, block, device=scales_TU.device) // step)
    return scales_TU[places[0]][:, places[1]].t().contiguous()


def takes_row(x: Activations, weight: Tensor) -> TypeGuard[Tensor | Unnormed]:
    """Whether `row_linear` multiplies these activations: a single row on a GPU that is not in eight bits."""
    if single_row(x) is None:
        return False
    from services.engine.ops.kernels import gemv

    return gemv.is_supported(weight)


def row_linear(
    x: Tensor | Unnormed,
    weight_OI: Tensor,
    scales_O: Tensor,
    *,
    bias_O: Tensor | None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    gated: bool = False,
) -> Tensor:
    """(x @ weight.T) * scales + bias + add, [1, O], in `dtype`; gated, silu of the first half of that times the second. Rounded once."""
    from services.engine.ops.kernels import gemv

    return gemv.gemv(x, weight_OI, scales=scales_O, bias_O=bias_O, add=add, dtype=dtype, gated=gated)


def whole_products(values_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """Of int8 values on a CPU: int32, exact; or float32 where the CPU has no instruction for them, without which oneDNN's sums
    overflow in 16 bits. On one that has, oneDNN is as fast with the matrix as it lies as with a layout of its own, and with signed
    activations in that layout torch 2.11 is hundreds of times slower."""
    if torch.cpu._is_vnni_supported():
        return torch._int_mm(values_NI, weight_OI.t())
    return values_NI.float() @ weight_OI.float().t()


def _widened(values_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in this dtype: looked up, which takes a third of the time of torch's own conversion."""
    return _all_values(values_NI.dtype, dtype).take(values_NI.view(torch.uint8).long())


@cache
def _all_values(narrow: torch.dtype, wide: torch.dtype) -> Tensor:
    """What each of the 256 bytes stands for."""
    return torch.arange(256, dtype=torch.uint8).view(narrow).to(wide)


def _on_gpu(
    x: Quantized,
    weight_OI: Tensor,
    scales_O: Tensor,
    counters: Tensor,
    *,
    bias_O: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from services.engine.ops.kernels import scaled

    if not _is_for_torch(weight_OI, scales_O, x.values_NI.shape[0]):
        return scaled.matmul(x, weight_OI, scales_O, counters, bias_O=bias_O, add=add, dtype=dtype)
    out_NO = torch._scaled_mm(
        x.values_NI,
        weight_OI.t(),
        scale_a=x.scales_N[:, None],
        scale_b=scales_O[None],
        out_dtype=torch.bfloat16,  # the only one that it knows for scales of rows
        use_fast_accum=True,
    ).to(dtype)
    if bias_O is not None:
        out_NO.add_(bias_O)
    return out_NO if add is None else out_NO.add_(add)


def _is_for_torch(weight_OI: Tensor, scales_O: Tensor, num_rows: int) -> bool:
    """Whether a GPU multiplies so many rows by torch's own kernel: many of them, of fp8 with a scale for each output."""
    from services.engine.ops.kernels import scaled

    return weight_OI.dtype is not torch.int8 and scales_O.dim() == 1 and num_rows > scaled.most_rows(weight_OI.shape[0])
