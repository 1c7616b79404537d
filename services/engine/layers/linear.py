"""A matrix that activations are multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.ops.forms import Activations, Form, Terms, Unsummed
from services.engine.quant import Format, Weight
from services.engine.quant.matrix import QuantizedMatrix, joined, nearest, plain
from services.engine.shard import Part, Shard
from services.engine.weights import Weights


class Linear:
    """x @ weight.T + bias, the weight kept as a `Format` likes it."""

    def __init__(
        self,
        weight_OI: Weight,
        bias_O: Tensor | None = None,
        *,
        format: Format,
        dtype: torch.dtype | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        """`dtype`: of activations; by default that of the weight, which says it unless it comes in few bits. Raises ValueError where
        the format cannot keep the weight."""
        if dtype is None:
            assert isinstance(weight_OI, Tensor)
            dtype = weight_OI.dtype
        self._format = format
        self._buffers = format.pack(weight_OI, dtype=dtype, input_scale=input_scale)
        self._bias_O = bias_O
        self._dtype = dtype

    @property
    def takes(self) -> Form:
        """The form of activations that what stands before may hand over; None for plain ones alone."""
        return self._format.form(self._buffers)

    @property
    def rounds_products(self) -> bool:
        """Whether products that are wanted in float32 are still rounded to the dtype of activations."""
        on_gpu = self._buffers[0].is_cuda
        return self._format.rounds_products and not on_gpu and self._dtype is not torch.float32

    def is_in(self, format: Format) -> bool:
        """Whether a table in this format would be the same."""
        return format.table is not None and format.table.name == self._format.name

    @classmethod
    def load(
        cls, weights: Weights, *names: str, inputs: int | Part, outputs: tuple[int | Part, ...], bias: bool = False
    ) -> Linear:
        """One matrix from as many as there are names: they see the same input, and their outputs stand side by side.
        With a `Part` of the inputs its products are parts of a sum, to which the bias is added once. Raises
        `ConfigurationError`, with the names, where they cannot be kept as they should be."""
        parts = [weights.matrix(name, size, inputs) for name, size in zip(names, outputs, strict=True)]
        biases = [weights.take(f"{name}.bias", size) for name, size in zip(names, outputs, strict=True)] if bias else []
        bias_O = None
        if bias:
            bias_O = biases[0] if len(biases) == 1 else torch.cat(biases)
        if isinstance(inputs, Part):
            bias_O = weights.shard.once(bias_O)
        format = weights.format(*names)
        scale = weights.input_scale(*names) if format.needs_input_scale else None
        with named(*map(weights.full_name, names)):
            matrix = _side_by_side(parts, format, dtype=weights.dtype)
            return cls(matrix, bias_O, format=format, dtype=weights.dtype, input_scale=scale)

    def __call__(self, x: Activations, *, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The product, plus `add` where there is one: in the dtype of activations, or another one where the format can."""
        return self._format.apply(x, self._buffers, bias_O=self._bias_O, add=add, dtype=dtype or self._dtype)

    def terms(self, x: Activations, add: Tensor, shard: Shard) -> Terms:
        """The product, summed over the ranks, and `add`: their sum where that costs no kernel of its own."""
        if shard.is_alone and not self._format.adds(self._buffers, num_rows=len(add)):
            return Unsummed(self(x), add)
        return shard.all_reduce(self(x, add=shard.once(add)))

    def gated(self, x: Activations, form: Form) -> Activations:
        """silu(gate) * up, where the product is gate and then up, in this form if it is rows in eight bits."""
        return self._format.gated(x, self._buffers, bias_O=self._bias_O, dtype=self._dtype, form=form)

    def rows(self, indices: Tensor) -> Tensor:
        """These rows of the matrix, [..., I], if its format can be a table."""
        assert self._format.table is self._format
        return self._format.table.rows(self._buffers, indices, dtype=self._dtype)


@contextmanager
def named(*names: str) -> Iterator[None]:
    """Raises the block's ValueErrors as `ConfigurationError`s that name the matrices which it packs."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(f"quantization: {', '.join(names)}: {error}") from error


def _side_by_side(parts: Sequence[Weight], format: Format, *, dtype: torch.dtype) -> Weight:
    """One matrix of all; one in few bits where any is, or where a scale for outputs of several of them would differ from their own."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    scheme = format.scheme
    if len(tensors) == len(parts) and (scheme is None or scheme.tile[0] == 1):
        return torch.cat(tensors)
    if scheme is None:
        return torch.cat([plain(part, dtype) for part in parts])
    return joined([part if isinstance(part, QuantizedMatrix) else nearest(part, scheme) for part in parts])
