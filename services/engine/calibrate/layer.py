"""One layer: what is chosen for its matrices is done to them.

All scales are found and taken up before anything is rounded, for rounding wants the matrices as they will be. Rounding after SmoothQuant is by
absmax; after AWQ by the least error, inputs counting by their squares; so are GPTQ's tiles, which rounds in its own way.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.engine.calibrate import smoothing
from services.engine.calibrate.choice import Choice, Options
from services.engine.calibrate.gptq import Factor, gptq
from services.engine.calibrate.parts import Sharing
from services.engine.calibrate.scales import Search
from services.engine.calibrate.statistics import Moments
from services.engine.layers.linear import named
from services.engine.models.spec import ModelSpec
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.weight_format import Method

Tensors = dict[str, Tensor]
"""By the names of the checkpoint."""


@dataclass(frozen=True, slots=True)
class LayerWork:
    """A layer's tensors, in float32, and what is to be done to them."""

    prefix: str
    """Of its names in the checkpoint."""
    spec: ModelSpec
    tensors: Tensors
    choices: Sequence[Choice]
    moments: Mapping[Sharing, Moments]
    """Of all whose method goes by them; they are changed as inputs are."""
    options: Options
    dtype: torch.dtype
    """In what scales and all that is not quantized are written."""

    def quantized(self) -> dict[str, QuantizedMatrix]:
        """The matrices in few bits, by name. What takes scales up is changed among `tensors`, and these matrices are what they stand
        for. Raises `ConfigurationError`, with the names, for what cannot be done."""
        done = [choice for choice in self.choices if choice.quantizes]
        for choice in done:
            if choice.needs_moments:
                self.moments[choice.sharing].check(*self._full(choice.sharing.names))
        for choice in done:
            if choice.scales_inputs:
                with named(*self._full(choice.sharing.names)):
                    self._smooth(choice)
        matrices: dict[str, QuantizedMatrix] = {}
        for choice in done:
            matrices |= self._rounded(choice)
        for name, matrix in matrices.items():
            self.tensors[f"{name}.weight"] = matrix.dequant()
        return matrices

    def _smooth(self, choice: Choice) -> None:
        sharing, moments = choice.sharing, self.moments[choice.sharing]
        weights = [self.tensors[f"{name}.weight"] for name in self._full(sharing.names)]
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        if choice.method is Method.AWQ:
            search = Search(Method.ABSMAX, choice.scheme, self.dtype)
            among = partial(smoothing.shared_by_heads, heads=heads, kv_heads=kv_heads) if sharing.by_heads else _apart
            scales_I = smoothing.awq(
                weights, moments, lambda weight_OI: search.rounded(weight_OI).dequant(), among=among
            )
        else:
            scales_I = smoothing.smoothquant(weights, moments.largest_I, strength=self.options.strength)
        scales_I = self._take_up(sharing, scales_I)
        for name in self._full(sharing.names):
            self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"] * scales_I
        moments.divide(scales_I)

    def _take_up(self, sharing: Sharing, scales_I: Tensor) -> Tensor:
        """Divides what stands before, and returns by what: a norm is written in fewer bits than it has here, and what its rounding
        adds is left to the matrices."""
        if sharing.norm is not None:
            name = f"{self.prefix}.{sharing.norm}.weight"
            before_I = self.tensors[name]
            self.tensors[name] = (before_I / scales_I).to(self.dtype).float()
            usable_I = (self.tensors[name] != 0) & self.tensors[name].isfinite()
            self.tensors[name] = torch.where(usable_I, self.tensors[name], before_I)
            return torch.where(usable_I, before_I / self.tensors[name], 1.0)
        assert sharing.rows_of is not None
        scales_O = scales_I
        if sharing.by_heads:
            scales_O = smoothing.per_value(scales_I, heads=self.spec.heads, kv_heads=self.spec.kv_heads)
        name = f"{self.prefix}.{sharing.rows_of}"
        self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"] / scales_O[:, None]
        if f"{name}.bias" in self.tensors:
            self.tensors[f"{name}.bias"] = self.tensors[f"{name}.bias"] / scales_O
        return scales_I

    def _rounded(self, choice: Choice) -> dict[str, QuantizedMatrix]:
        names = self._full(choice.sharing.names)
        with named(*names):
            rounding = self._rounding(choice)
        found = {}
        for name in names:
            with named(name):
                found[name] = rounding(self.tensors[f"{name}.weight"])
        return found

    def _rounding(self, choice: Choice) -> Callable[[Tensor], QuantizedMatrix]:
        """What makes few bits of a matrix."""
        moments = self.moments.get(choice.sharing)
        method, importance_I = choice.method, None
        if method is Method.SMOOTHQUANT:
            method = Method.ABSMAX
        elif method in (Method.AWQ, Method.GPTQ):
            assert moments is not None
            method, importance_I = Method.MSE, moments.squares_I
        search = Search(method, choice.scheme, self.dtype, self.options.percentile, importance_I)
        if choice.method is not Method.GPTQ:
            return search.rounded
        assert moments is not None
        options = self.options
        factor = Factor.of(moments.products_II, act_order=options.act_order, damping=options.damping)
        return lambda weight_OI: gptq(weight_OI, factor, search)

    def _full(self, names: Sequence[str]) -> list[str]:
        return [f"{self.prefix}.{name}" for name in names]


def _apart(each_I: Tensor) -> Tensor:
    return each_I
