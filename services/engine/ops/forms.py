"""What activations may look like on their way to a matrix.

A format of weights says which form it takes; what stands before the matrix hands over that, if it can do so for nothing.

Shapes: N rows, I features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

FINER = 254.0
"""The second part of a row lies between halves of a step of the first: so many of its own steps make one."""


@dataclass(frozen=True, slots=True)
class RowScaled:
    """A row is scaled so that its largest value becomes the largest of `dtype`, and then rounded."""

    dtype: torch.dtype
    by: Tensor | None = None
    """One scale for all rows instead, float32, [1]; of whole numbers what is beyond them counts as the last of them."""
    parts: int = 1
    """With two, what the first has rounded away of whole numbers, in steps `FINER` times as small: together they leave out less
    than 2^-15 of the largest value."""
    share: int | None = None
    """So many values of a row have a scale, instead of all."""
    most_rows: int = sys.maxsize
    """More are wanted as they are."""

    @property
    def largest(self) -> float:
        return float((torch.finfo if self.dtype.is_floating_point else torch.iinfo)(self.dtype).max)


class Quantized(NamedTuple):
    """Rows as values_NI * scales_N[:, None]. A row that held a value which is not finite holds one still."""

    values_NI: Tensor
    """Of rows in two parts first all that are coarse, then all that are fine: [2 * N, I]."""
    scales_N: Tensor
    """float32. Where groups of values have one each: [G, N]."""


class Unnormed(NamedTuple):
    """One row whose norm is left to whoever multiplies it: a kernel less."""

    x_1I: Tensor
    weight_I: Tensor
    eps: float


class Unsummed(NamedTuple):
    """Rows whose sum with `add_NI` is left to the norm that reads it: a kernel less."""

    x_NI: Tensor
    add_NI: Tensor


Terms = Tensor | Unsummed
"""What a part of a layer gives: the sum with what came in, or both."""

Activations = Tensor | Quantized | Unnormed
"""What a matrix is multiplied with."""


Form = RowScaled | type[Unnormed] | None
"""What a matrix takes beside plain activations: rows in eight bits, a row before its norm, or nothing else."""


def summed(terms: Terms) -> Tensor:
    """The sum, which may take the place of what is added."""
    return terms.add_NI.add_(terms.x_NI) if isinstance(terms, Unsummed) else terms


def single_row(x: Activations) -> Tensor | None:
    """The row, where there is one alone, on a GPU, and not in eight bits: kernels of its own multiply it."""
    if isinstance(x, Quantized):
        return None
    row = x.x_1I if isinstance(x, Unnormed) else x
    return row if row.is_cuda and len(row) == 1 else None


def rounds(form: Form, num_rows: int) -> TypeGuard[RowScaled]:
    """Whether so many rows are wanted in eight bits."""
    return isinstance(form, RowScaled) and num_rows <= form.most_rows
