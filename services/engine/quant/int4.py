"""Weights in four bits, as whole numbers with a scale for each group of inputs, and an offset where they are not symmetric; activations as
they are (W4A16; Frantar et al. 2023, "GPTQ", section 4, for the groups).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from services.engine.ops import int4
from services.engine.ops.forms import Activations, Form, Quantized, Unnormed
from services.engine.quant import Buffers, Format
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest
from services.engine.quant.rounding import Rounding


class Int4(Rounding):
    """A quarter of the bytes of 16 bits to read, and a little for scales: with groups of 64, 4.5 bits a weight. Values of three bits
    are kept in four."""

    takes: Form = Unnormed
    rounds_products = True

    def __init__(self, group: int, *, bits: int = 4, symmetric: bool = True) -> None:
        self.name = f"int{bits}-g{group}" + ("" if symmetric else "-asym")
        self.scheme = Scheme(bits, tile=(1, group), symmetric=symmetric)

    @property
    def table(self) -> Int4:  # type: ignore[override]
        return self

    def rounded(self, weight_OI: Tensor, *, dtype: torch.dtype) -> QuantizedMatrix:
        """By scales as they are kept, which is in `dtype`."""
        require_groups(self, weight_OI.shape[1])
        return nearest(weight_OI, self.scheme, scale_dtype=dtype)

    def _kept(self, weight_OI: Tensor, *, dtype: torch.dtype) -> QuantizedMatrix:
        """With offsets in `dtype` in the place of zeros."""
        matrix = self.rounded(weight_OI, dtype=dtype)
        if matrix.is_symmetric:
            return matrix
        return replace(matrix, zeros_TU=None, minimums_TU=matrix.offsets_TU.to(dtype).float())

    def _packed(self, matrix: QuantizedMatrix, *, dtype: torch.dtype, input_scale: Tensor | None) -> Buffers:
        if matrix.is_float or matrix.bits > 4:
            raise ValueError(f"{self.name} cannot keep values of {matrix.bits} bits; its own have four")
        inputs, groups = matrix.shape[1], int4.groups_for(matrix.values_OI)
        width = min(matrix.tile[1], inputs)
        size = next((size for size in groups if width % size == 0), None)
        if size is None or inputs % size:
            device, sizes = "GPU" if matrix.values_OI.is_cuda else "CPU", ", ".join(map(str, reversed(groups)))
            raise ValueError(
                f"a {device} multiplies four bits in groups of {sizes} inputs, and its {inputs} inputs come in groups of {width}"
            )
        matrix = matrix.in_tiles(1, size)
        offsets_TU = None if matrix.is_symmetric else matrix.offsets_TU
        return *int4.packed(matrix.values_OI, matrix.scales_TU, offsets_TU, dtype=dtype), matrix.order_I

    def _products(
        self,
        x: Tensor | Quantized,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        *matrix, order_I = buffers
        assert isinstance(x, Tensor)
        if order_I is not None:
            x = x.index_select(1, order_I)
        return int4.linear(x, tuple(matrix), bias_O=bias_O, add=add, dtype=dtype)

    def form(self, buffers: Buffers) -> Form:
        """Inputs that are sorted are sorted behind the norm."""
        return None if buffers[-1] is not None else self.takes

    def _takes_row(self, x: Activations, buffers: Buffers) -> TypeGuard[Tensor | Unnormed]:
        *matrix, order_I = buffers
        return order_I is None and int4.takes_row(x, tuple(matrix))

    def _row(
        self,
        x: Tensor | Unnormed,
        buffers: Buffers,
        *,
        bias_O: Tensor | None,
        add: Tensor | None = None,
        dtype: torch.dtype,
        gated: bool = False,
    ) -> Tensor:
        return int4.row_linear(x, tuple(buffers[:-1]), bias_O=bias_O, add=add, dtype=dtype, gated=gated)

    def rows(self, buffers: Buffers, indices: Tensor, *, dtype: torch.dtype) -> Tensor:
        *matrix, order_I = buffers
        rows = int4.rows(tuple(matrix), indices).to(dtype)
        return rows if order_I is None else torch.empty_like(rows).index_copy_(-1, order_I, rows)


def require_groups(format: Format, inputs: int) -> None:
    """Raises ValueError, with what fits, if so many inputs do not fall into the groups in which the format rounds plain matrices."""
    if format.scheme is None or format.scheme.fits(inputs):
        return
    group = format.scheme.tile[1]
    fits = " or ".join(format.name.replace(f"g{group}", f"g{size}") for size in (64, 32) if inputs % size == 0)
    raise ValueError(
        f"{format.name} keeps {group} inputs in a group, and there are {inputs}; say {fits or 'int8-weight'}"
    )
