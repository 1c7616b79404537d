"""A matrix that activations are multiplied with."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.ops.forms import Activations, Form
from services.engine.quant import Format
from services.engine.shard import Part
from services.engine.weights import Weights


class Linear:
    """x @ weight.T + bias, the weight kept as a `Format` likes it."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, format: Format) -> None:
        self._format = format
        self._buffers = format.pack(weight_OI)
        self._bias_O = bias_O
        self._dtype = weight_OI.dtype

    @property
    def takes(self) -> Form:
        """The form of activations that what stands before may hand over; None for plain ones alone."""
        return self._format.takes

    @classmethod
    def load(
        cls, weights: Weights, *names: str, inputs: int | Part, outputs: tuple[int | Part, ...], bias: bool = False
    ) -> Linear:
        """One matrix from as many as there are names: they see the same input, and their outputs stand side by side.
        With a `Part` of the inputs its products are parts of a sum, to which the bias is added once."""
        parts = [weights.take(f"{name}.weight", size, inputs) for name, size in zip(names, outputs, strict=True)]
        biases = [weights.take(f"{name}.bias", size) for name, size in zip(names, outputs, strict=True)] if bias else []
        bias_O = _joined(biases) if bias else None
        if isinstance(inputs, Part):
            bias_O = weights.shard.once(bias_O)
        return cls(_joined(parts), bias_O, format=weights.format(*names))

    def __call__(self, x: Activations, *, add: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The product, plus `add` where there is one: in the dtype of the weight as it was given, or another one where the
        format can."""
        return self._format.apply(x, self._buffers, bias_O=self._bias_O, add=add, dtype=dtype or self._dtype)

    def gated(self, x: Activations, form: Form) -> Activations:
        """silu(gate) * up, where the product is gate and then up, in this form if it is rows in eight bits."""
        return self._format.gated(x, self._buffers, bias_O=self._bias_O, dtype=self._dtype, form=form)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
