"""Rows in eight bits times a matrix in eight bits, up to where torch's own kernel is as fast.

The kernel is that of `skinny`: the matrix units take eight-bit floating point as it is. They add up within a dot of 32
columns and from one to the next with some 14 bits, as torch's kernel does when it is told to be fast.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from services.engine.ops.forms import Quantized
from services.engine.ops.kernels import skinny

MOST_ROWS = 256
"""Of x, where the matrix has few rows."""
_MANY_OUTPUTS, _MOST_ROWS_OF_MANY = 16384, 64
"""With more rows torch's own kernel fills the GPU with a matrix of so many, and multiplies it sooner."""


def most_rows(outputs: int) -> int:
    """Of x, up to which a matrix of so many rows is multiplied here (measured on an H200)."""
    return _MOST_ROWS_OF_MANY if outputs >= _MANY_OUTPUTS else MOST_ROWS


class _Tiling(NamedTuple):
    """How a matrix is cut: the columns of a tile, and how many programs share a tile of rows."""

    columns: int
    split: int
    warps: int
    stages: int


def matmul(
    x: Quantized,
    weight_OI: Tensor,
    scales_O: Tensor,
    counters: Tensor,
    *,
    bias_O: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """(x.values @ weight.T) * x.scales * scales + bias + add, [N, O]. The counters: `skinny.counters_of` this matrix."""
    cut = tiling(*weight_OI.shape, max(16, triton.next_power_of_2(x.values_NI.shape[0])))
    return skinny.matmul(
        x.values_NI,
        weight_OI,
        cut.split,
        counters=counters,
        bias_O=bias_O,
        add=add,
        dtype=dtype,
        scales=(x.scales_N, scales_O),
        columns=cut.columns,
        warps=cut.warps,
        stages=cut.stages,
    )


@cache
def tiling(outputs: int, inputs: int, padded_rows: int) -> _Tiling:
    """For so many rows of x, the most programs and then the widest tile that the columns fall into (measured on an H200 with the
    matrices of Llama-3.1-8B). Of 256 rows the parts are as large as the matrix: programs share it where each has many columns."""
    many = padded_rows > 128
    most_split = min(skinny.programs_for(outputs), 4 if padded_rows <= 64 else 2)
    columns, split = next(
        (columns, split)
        for split in (4, 2, 1)
        for columns in (256, 128, 64)
        if split <= most_split
        and not (many and (columns > 128 or (split > 1 and inputs // split < 4096)))
        and inputs % (columns * split) == 0
    )
    return _Tiling(columns, split, warps=8 if many else 4, stages=6 if split > 1 and padded_rows <= 32 else 4)
