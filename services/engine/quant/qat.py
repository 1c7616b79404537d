"""Training with the weights that will be served: they are rounded in every step, and the gradient passes as if they were not (the
straight-through estimator: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; as quantization-aware
training: Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3).

The rules, the formats and the rounding are those of an engine in a given dtype, scales in it where the format keeps them so: what was trained
is what such an engine rounds to the nearest when it loads the model. The model is any `torch.nn.Module` whose matrices are named as in its checkpoint.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from holdfast.errors import ConfigurationError
from services.engine.ops.forms import RowScaled
from services.engine.ops.quantize import by_torch, dequantize
from services.engine.quant import Format
from services.engine.quant.rules import Rules
from services.engine.weight_format import GATE_UP, QKV


class FakeQuantized(nn.Module):
    """What `torch.nn.utils.parametrize` puts between a parameter and its use: the weight as its format rounds it."""

    def __init__(self, format: Format, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.dtype = format, dtype

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The weight as served, in its own dtype. Raises ValueError where the format cannot keep it."""
        return self.format.fake_quant(weight_OI, dtype=self.dtype)


def prepare(model: nn.Module, rules: Rules, *, dtype: torch.dtype) -> dict[str, Format]:
    """Has the model compute with weights, and where their format rounds activations with activations, as an engine in `dtype` will serve
    them; trained are the weights themselves. Returns the formats of those that are rounded, by name.

    Raises:
        ConfigurationError: a rule decides about no matrix, would keep matrices differently that are kept as one, or names a format
            that cannot keep one of them, or cannot be trained.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    for name in modules:
        rules.format(*_kept_with(name, modules))
    formats = {name: rules.format(name) for name in modules}
    rules.finish()
    rounded = {name: format for name, format in formats.items() if format.scheme is not None}
    for name, format in rounded.items():
        _check(name, format, modules[name], dtype)
        parametrize.register_parametrization(modules[name], "weight", FakeQuantized(format, dtype), unsafe=True)
        if isinstance(format.takes, RowScaled) and isinstance(modules[name], nn.Linear):
            modules[name].register_forward_pre_hook(_Rows(format.takes))
    return rounded


def release(model: nn.Module) -> None:
    """Leaves the model with the weights that were trained, as it was before `prepare`."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Rows):
                del module._forward_pre_hooks[key]


class _Rows:
    """Hands a module its rows as eight bits hold them."""

    def __init__(self, form: RowScaled) -> None:
        self.form = form

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        with torch.no_grad():
            rows = by_torch(x.reshape(-1, x.shape[-1]), self.form)
            change = dequantize(rows, self.form).view(x.shape).to(x.dtype) - x
        return x + change, *rest


def _check(name: str, format: Format, module: nn.Module, dtype: torch.dtype) -> None:
    if format.needs_input_scale:
        raise ConfigurationError(
            f"quantization: {format.name} of {name} needs a scale that calibration finds; train with int8, and calibrate afterwards"
        )
    if isinstance(module, nn.Embedding) and format.table is None:
        raise ConfigurationError(f"quantization: rows of {name} are looked up, which {format.name} cannot")
    try:
        format.fake_quant(module.weight.detach(), dtype=dtype)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigurationError(f"quantization: {name}: {error}") from error


def _kept_with(name: str, names: dict[str, Any]) -> list[str]:
    """The matrices that the engine keeps as one with this one, itself among them."""
    own = name.rpartition(".")[2]
    for together in (QKV, GATE_UP):
        if own in together:
            return [each for sibling in together if (each := name.removesuffix(own) + sibling) in names]
    return [name]
