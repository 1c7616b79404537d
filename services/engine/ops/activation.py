"""The gate of a gated MLP (Shazeer 2020, "GLU Variants Improve Transformer")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import Form, Quantized, rounds
from services.engine.ops.quantize import quantize


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds gate and then up: half as wide as what came in."""
    if gate_up.is_cuda:
        from services.engine.ops.kernels import activation

        return activation.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_as(gate_up: Tensor, form: Form) -> Tensor | Quantized:
    """`silu_mul`, and of what that gives `quantize` where rows are wanted so."""
    if not rounds(form, len(gate_up)):
        return silu_mul(gate_up)
    if gate_up.is_cuda:
        from services.engine.ops.kernels import activation

        return activation.silu_mul_quantized(gate_up, form)
    return quantize(silu_mul(gate_up), form)
