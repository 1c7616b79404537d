"""Rows in eight bits times a matrix in eight bits; of fp8 up to where torch's own kernel is as fast.

The kernel is that of `skinny`, and of many rows that of `bulk`: the matrix units take eight bits as they are. Of floating point they add up within a dot of 32
columns and from one to the next with some 14 bits, as torch's kernel does when it is told to be fast; sums of whole numbers are exact.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from services.engine.ops.forms import Quantized
from services.engine.ops.kernels import bulk, bulk_hopper, skinny

MOST_ROWS = 256
"""Of x, where the matrix has few rows."""
_MANY_OUTPUTS, _MOST_ROWS_OF_MANY = 16384, 64
"""With more rows torch's own kernel fills the GPU with a matrix of so many, and multiplies it sooner."""


def most_rows(outputs: int) -> int:
    """Of x in fp8, up to which a matrix of so many rows is multiplied here (measured on an H200)."""
    return _MOST_ROWS_OF_MANY if outputs >= _MANY_OUTPUTS else MOST_ROWS


class Tiling(NamedTuple):
    """How a product is cut: the rows of x that a program takes, with their parts, the rows and columns of a tile of the matrix, and
    how many programs share a tile."""

    block: int
    rows: int
    columns: int
    split: int
    warps: int
    stages: int


WIDE = Tiling(256, rows=128, columns=128, split=1, warps=8, stages=3)
"""Of more rows than `MOST_ROWS`, in two parts or where `bulk` does not take them."""


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
    """(x.values @ weight.T) * x.scales * scales + bias + add, [N, O]; or with scales of blocks as `skinny.matmul` takes them. The
    counters: `skinny.counters_of` this matrix."""
    lines = x.values_NI.shape[0]
    parts = lines // x.scales_N.shape[-1]
    by_row = scales_O.dim() == 1 and parts == 1
    if lines > MOST_ROWS and by_row and bulk.takes(x.values_NI, weight_OI, add, dtype):
        many = bulk_hopper if bulk_hopper.is_able(weight_OI.device) else bulk
        return many.matmul(x.values_NI, weight_OI, x.scales_N, scales_O, bias_O=bias_O, add=add, dtype=dtype)
    cut = (tiling if scales_O.dim() == 1 else tiling_of_blocks)(*weight_OI.shape, skinny.padded(lines))
    return skinny.matmul(
        x.values_NI,
        weight_OI,
        counters=counters,
        bias_O=bias_O,
        add=add,
        dtype=dtype,
        scales=(x.scales_N, scales_O),
        parts=parts,
        **cut._asdict(),
    )


@cache
def tiling(outputs: int, inputs: int, padded_rows: int) -> Tiling:
    """For so many rows of x, with their parts: the most programs and then the widest tile that the columns fall into (measured on an
    H200 with the matrices of Llama-3.1-8B in fp8). Of 256 rows the shares are as large as the matrix: programs share it where each has
    many columns. Columns that fall into no tile are filled up."""
    if padded_rows > MOST_ROWS:
        return WIDE
    many = padded_rows > 128
    if padded_rows > _MOST_ROWS_OF_MANY and outputs >= _MANY_OUTPUTS and inputs % 128 == 0:
        # Whole numbers alone: in fp8 torch's own kernel serves there.
        return Tiling(padded_rows, 128 if many else 64, 128, 1, warps=8, stages=4)
    most_split = min(skinny.programs_for(outputs), 4 if padded_rows <= 64 else 2)
    columns, split = next(
        (
            (columns, split)
            for split in (4, 2, 1)
            for columns in (256, 128, 64)
            if split <= most_split
            and not (many and (columns > 128 or (split > 1 and inputs // split < 4096)))
            and inputs % (columns * split) == 0
        ),
        (64, 1),
    )
    stages = 6 if split > 1 and padded_rows <= 32 else 4
    return Tiling(padded_rows, 64, columns, split, warps=8 if many else 4, stages=stages)


@cache
def tiling_of_blocks(outputs: int, inputs: int, padded_rows: int) -> Tiling:
    """The same for a matrix that has scales of blocks, which fix the tile (not measured yet)."""
    rows, columns = skinny.BLOCK
    most_split = min(skinny.programs_for(outputs), 4 if padded_rows <= 64 else 1)
    split = next(
        split for split in (4, 2, 1) if split <= most_split and (split == 1 or inputs % (columns * split) == 0)
    )
    return Tiling(min(padded_rows, 128), rows, columns, split, warps=4, stages=4)
