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
"""Of x. A step of Llama-3.1-8B on an H200 takes 3.48 ms of products with 256 rows, and 3.82 by torch's own kernel."""


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
    """For so many rows of x, the most programs and then the widest tile that the columns fall into."""
    widest, stages, most_split = _TILES[padded_rows]
    most_split = min(most_split, skinny.programs_for(outputs))
    columns, split = next(
        (columns, split)
        for split in (4, 2, 1)
        for columns in (256, 128, 64)
        if split <= most_split and columns <= widest and inputs % (columns * split) == 0
    )
    # The sums of 64 x 256 leave four warps no registers to add up those of others.
    return _Tiling(columns, split, 8 if padded_rows == 256 and split > 1 else 4, stages)


_TILES = {16: (256, 6, 4), 32: (256, 6, 4), 64: (256, 4, 4), 128: (128, 4, 2), 256: (128, 4, 2)}
"""For so many rows of x: the most columns of a tile of 64 rows of the matrix, the stages of the pipeline, and the most
programs that share a tile of rows.

Measured on an H200: tiles of 64 x 256 up to 64 rows and of 64 x 128 above, with 4 warps and 4 to 6 stages, were the fastest.
Not yet measured: how many of those stages each size wants, which matrices want how many programs (as many as in 16 bits now),
and whether sharing still pays above 64 rows, where
the parts that are added up are as large as the matrix.
"""
