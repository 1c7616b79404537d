"""Eight-bit floating point against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops.activation import silu_mul, silu_mul_as
from services.engine.ops.forms import Quantized
from services.engine.ops.norm import rms_norm, rms_norm_as
from services.engine.ops.quantize import quantize
from services.engine.quant.fp8 import Fp8
from services.engine.quant.matrix import nearest

FORM = Fp8.takes
ROUNDING = 2.0**-4
"""Most that e4m3, with three bits behind the first, is off by, as a part of the value; values too small for it apart."""


def drawn(*shape: int, outliers: bool, dtype: torch.dtype) -> Tensor:
    """Noise; with outliers, one column in fifty is as much as a hundred times as large."""
    random = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=random)
    if outliers:
        x[:, ::50] *= 100 * torch.rand(x[:, ::50].shape[1], generator=random)
    return x.to(dtype)


def dequantized(x: Quantized) -> Tensor:
    return x.values_NI.double() * x.scales_N.double()[:, None]


@pytest.mark.parametrize("outliers", [False, True])
def test_a_value_is_off_by_a_sixteenth_at_most(outliers: bool) -> None:
    """Or, where it is small beside its row's largest, by half of the smallest step: 2^-10 of what is scaled to 448."""
    x = drawn(50, 300, outliers=outliers, dtype=torch.bfloat16)
    found = quantize(x, FORM)
    bound = torch.maximum(x.double().abs() * ROUNDING, x.double().abs().amax(1, keepdim=True) / 448 * 2**-10)
    assert ((dequantized(found) - x.double()).abs() <= bound * (1 + 1e-6)).all()
    assert (found.values_NI.float().abs().amax(1) == 448).all()


def test_rows_that_hold_nothing_or_no_number() -> None:
    """Zeros stay zeros; what is not finite is not hidden, and harms no other row."""
    x = torch.ones(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, -torch.inf
    out = Linear(torch.ones(16, 8), format=Fp8())(x)
    assert (out[0] == 0).all() and not out[1:3].isfinite().any()
    torch.testing.assert_close(out[3], torch.full((16,), 8.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("with_terms", [False, True])
def test_products_are_those_of_the_rounded_values(
    dtype: torch.dtype, outliers: bool, rows: int, with_terms: bool
) -> None:
    """To a few roundings of the result's dtype: nothing is lost but what the eight bits cost."""
    weight, x = drawn(96, 256, outliers=False, dtype=dtype), drawn(rows, 256, outliers=outliers, dtype=dtype)
    bias, add = (drawn(96, 1, outliers=False, dtype=dtype)[:, 0], drawn(rows, 96, outliers=False, dtype=dtype))
    kept = add.clone()
    linear = Linear(weight, bias if with_terms else None, format=Fp8())
    out = linear(x, add=add if with_terms else None)
    product = dequantized(quantize(x, FORM)) @ nearest(weight, Fp8.scheme).dequant().double().T
    expected = product + bias.double() + add.double() if with_terms else product
    assert out.dtype is dtype and torch.equal(add, kept)
    error = (out.double() - expected).abs()
    assert (error <= 2 * torch.finfo(dtype).eps * (product.abs() + expected.abs()) + 1e-5 * product.abs().max()).all()


@pytest.mark.parametrize("outliers", [False, True])
def test_the_error_of_products_is_that_of_independent_roundings(outliers: bool) -> None:
    """Beside the products of unrounded values: some 2.7 % for each of the two factors, outliers or not, where a scale for all
    rows would give some rows up."""
    weight = drawn(128, 1024, outliers=outliers, dtype=torch.float32)
    x = drawn(64, 1024, outliers=outliers, dtype=torch.float32) * torch.logspace(-3, 3, 64)[:, None]
    expected = x.double() @ weight.double().T
    error = (Linear(weight, format=Fp8())(x).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0.02 < error.median() < 0.045
    assert error.max() < 0.07


def test_rows_that_come_rounded_are_multiplied_as_they_are() -> None:
    """What stands before may round: the result is bit for bit the same."""
    x, weight = drawn(5, 64, outliers=True, dtype=torch.bfloat16), drawn(64, dtype=torch.bfloat16, outliers=False)
    linear = Linear(drawn(32, 64, outliers=False, dtype=torch.bfloat16), format=Fp8())
    assert linear.takes == FORM
    assert torch.equal(linear(rms_norm_as(x, weight, 1e-5, FORM)), linear(rms_norm(x, weight, 1e-5)))
    gate_up = drawn(5, 128, outliers=True, dtype=torch.bfloat16)
    assert torch.equal(linear(silu_mul_as(gate_up, FORM)), linear(silu_mul(gate_up)))


def test_a_row_counts_for_itself_alone() -> None:
    """Whatever stands beside it in a step."""
    x = drawn(9, 256, outliers=True, dtype=torch.bfloat16)
    linear = Linear(drawn(64, 256, outliers=False, dtype=torch.bfloat16), format=Fp8())
    assert torch.equal(linear(torch.cat((x[4:], x[:4] * 1000)))[:5], linear(x[4:]))


def test_logits_can_be_wanted_in_float32() -> None:
    """Of a model in 16 bits."""
    x = drawn(3, 64, outliers=False, dtype=torch.bfloat16)
    linear = Linear(drawn(32, 64, outliers=False, dtype=torch.bfloat16), format=Fp8())
    out = linear(x, dtype=torch.float32)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.bfloat16(), linear(x))
