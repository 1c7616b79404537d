"""Rows in eight bits, and what they are multiplied with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.kernels import activation, norm, quantize, scaled, skinny
from services.engine.ops.quantize import quantize as specified

E4M3 = RowScaled(torch.float8_e4m3fn)


def assert_same(got: Quantized, expected: Quantized) -> None:
    """Bit for bit."""
    bits = expected.values_NI.view(torch.uint8)
    # One NaN is as good as another.
    same = (got.values_NI.view(torch.uint8) == bits) | (got.values_NI.float().isnan() & (bits & 0x7F == 0x7F))
    assert same.all()
    torch.testing.assert_close(got.scales_N, expected.scales_N, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [33, 576, 3000])
def test_rows_are_rounded_as_specified(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: large rows, small ones, one of zeros, and one that is wider than a program holds at once."""
    monkeypatch.setattr(quantize, "MOST_COLUMNS", 1024)
    magnitudes = torch.tensor([1e-30, 1e-4, 1.0, 0.0, 3e4])[:, None]
    x = (torch.randn(5, size) * magnitudes * torch.rand(size).exp2()).bfloat16()
    assert_same(quantize.quantize(x, E4M3), specified(x, E4M3))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_remains_so(value: float) -> None:
    """In its row, and in no other."""
    x, (weight, scales) = torch.randn(3, 512), eight_bits(64, 512)
    counters = skinny.counters_of(weight)
    clean = scaled.matmul(specified(x, E4M3), weight, scales, counters, dtype=torch.float32)
    x[1, 3] = value
    rows = quantize.quantize(x, E4M3)
    assert_same(rows, specified(x, E4M3))
    got = scaled.matmul(rows, weight, scales, counters, dtype=torch.float32)
    assert got[1].isnan().all() and torch.equal(got[::2], clean[::2])


def test_a_norm_and_a_gate_round_what_they_would_have_written() -> None:
    """Bit for bit: nothing changes by rounding in the same kernel, a row wider than a program's included."""
    x, weight = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16()
    expected = quantize.quantize(norm.rms_norm(x, weight, 1e-5), E4M3)
    assert_same(norm.rms_norm_quantized(x, weight, 1e-5, E4M3), expected)
    gate_up = torch.randn(3, 2 * 1500).bfloat16()
    expected = quantize.quantize(activation.silu_mul(gate_up), E4M3)
    assert_same(activation.silu_mul_quantized(gate_up, E4M3), expected)


def test_a_gate_wider_than_a_program_is_rounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result."""
    gate_up = torch.randn(3, 2 * 1500).bfloat16()
    expected = activation.silu_mul_quantized(gate_up, E4M3)
    monkeypatch.setattr(quantize, "MOST_COLUMNS", 1024)
    assert_same(activation.silu_mul_quantized(gate_up, E4M3), expected)


def eight_bits(rows: int, columns: int) -> Quantized:
    return specified(torch.randn(rows, columns), E4M3)


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 32, 33, 64, 65, 128, 129, 255, 256])
def test_rows_times_a_matrix(num_rows: int) -> None:
    """For every size of the tile and on both sides of each, alone in float32, and with a bias and something to add."""
    check(num_rows, outputs=128, inputs=1024)


@pytest.mark.parametrize(
    ("outputs", "inputs", "columns", "split"),
    [(64 * 70, 256, 256, 1), (64 * 40, 512, 256, 2), (960, 576, 64, 1), (64, 2048, 256, 4), (576, 1536, 128, 4)],
)
def test_a_matrix_is_cut_into_tiles_that_it_falls_into(outputs: int, inputs: int, columns: int, split: int) -> None:
    """Wide ones where they fit, and shared by several programs where there are few."""
    assert scaled.tiling(outputs, inputs, 16)[:2] == (columns, split)
    check(5, outputs=outputs, inputs=inputs)


def check(num_rows: int, *, outputs: int, inputs: int) -> None:
    x, (weight, scales) = eight_bits(num_rows, inputs), eight_bits(outputs, inputs)
    bias, add, counters = torch.randn(outputs), torch.randn(num_rows, outputs).bfloat16(), skinny.counters_of(weight)
    expected = product(x, weight, scales)
    got = scaled.matmul(x, weight, scales, counters, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-5)
    got = scaled.matmul(x, weight, scales, counters, bias_O=bias, add=add, dtype=torch.bfloat16)
    torch.testing.assert_close(got, (expected + bias + add).bfloat16(), atol=1e-2, rtol=1e-2)
    assert not counters.any()


def product(x: Quantized, weight_OI: Tensor, scales_O: Tensor) -> Tensor:
    return (x.values_NI.double() * x.scales_N[:, None]) @ (weight_OI.double() * scales_O[:, None]).T
