"""Rows in eight bits, and what they are multiplied with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.engine.ops.forms import FINER, Quantized, RowScaled
from services.engine.ops.kernels import activation, bulk, gemv, norm, quantize, scaled, skinny
from services.engine.ops.quantize import quantize as specified
from services.engine.ops.scaled import blocks
from services.engine.quant.matrix import Scheme, nearest

E4M3, INT8 = RowScaled(torch.float8_e4m3fn), RowScaled(torch.int8)
STATIC = RowScaled(torch.int8, by=torch.tensor([0.02]))
PARTS = RowScaled(torch.int8, parts=2)
SHARED = RowScaled(torch.float8_e4m3fn, share=128)
FORMS = {"e4m3": E4M3, "int8": INT8, "static": STATIC, "parts": PARTS, "shared": SHARED}

# Triton's interpreter takes the number out of an array of one.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def assert_same(got: Quantized, expected: Quantized) -> None:
    """Bit for bit; but whole numbers of a row that holds none, of which its scale says so."""
    bits = expected.values_NI.view(torch.uint8)
    same = got.values_NI.view(torch.uint8) == bits
    if expected.values_NI.dtype is torch.int8:
        same |= ~expected.scales_N.isfinite().repeat(len(bits) // len(expected.scales_N))[:, None]
    else:
        same |= got.values_NI.float().isnan() & (bits & 0x7F == 0x7F)  # one NaN is as good as another
    assert same.all()
    torch.testing.assert_close(got.scales_N, expected.scales_N, rtol=0, atol=0, equal_nan=True)


def plain(x: Quantized) -> Tensor:
    """What the rows stand for, in float64."""
    coarse, *fine = x.values_NI.double().split(len(x.scales_N))
    return (coarse + sum(fine) / FINER) * x.scales_N[:, None]


@every_form
@pytest.mark.parametrize("size", [33, 576, 3008])
def test_rows_are_rounded_as_specified(size: int, form: RowScaled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: large rows, small ones, one of zeros, and one that is wider than a program holds at once."""
    monkeypatch.setattr(quantize, "MOST_COLUMNS", 1024)
    magnitudes = torch.tensor([1e-30, 1e-4, 1.0, 0.0, 3e4])[:, None]
    x = (torch.randn(5, size) * magnitudes * torch.rand(size).exp2()).bfloat16()
    assert_same(quantize.quantize(x, form), specified(x, form))


def test_two_parts_leave_out_less_than_15_bits() -> None:
    """Of the largest value of a row."""
    x = torch.randn(7, 640) * torch.logspace(-20, 20, 7)[:, None]
    error = (plain(quantize.quantize(x, PARTS)) - x.double()).abs() / x.abs().amax(1, keepdim=True)
    assert 2**-17 < error.max() < 2**-15


@pytest.mark.parametrize("form", [E4M3, INT8, STATIC, PARTS], ids=["e4m3", "int8", "static", "parts"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_remains_so(value: float, form: RowScaled) -> None:
    """In its row, and in no other."""
    x, (weight, scales) = torch.randn(3, 512), eight_bits(64, 512, form.dtype)
    counters = skinny.counters_of(weight)
    clean = scaled.matmul(specified(x, form), weight, scales, counters, dtype=torch.float32)
    x[1, 3] = value
    rows = quantize.quantize(x, form)
    assert_same(rows, specified(x, form))
    got = scaled.matmul(rows, weight, scales, counters, dtype=torch.float32)
    assert not got[1].isfinite().any() and torch.equal(got[::2], clean[::2])


@every_form
def test_a_norm_and_a_gate_round_what_they_would_have_written(form: RowScaled) -> None:
    """Bit for bit: nothing changes by rounding in the same kernel, a row wider than a program's included."""
    x, weight = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16()
    expected = quantize.quantize(norm.rms_norm(x, weight, 1e-5), form)
    assert_same(norm.rms_norm_quantized(x, weight, 1e-5, form), expected)
    gate_up = torch.randn(3, 2 * 1504).bfloat16()
    expected = quantize.quantize(activation.silu_mul(gate_up), form)
    assert_same(activation.silu_mul_quantized(gate_up, form), expected)


def test_a_gate_wider_than_a_program_is_rounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result."""
    gate_up = torch.randn(3, 2 * 1500).bfloat16()
    expected = activation.silu_mul_quantized(gate_up, E4M3)
    monkeypatch.setattr(quantize, "MOST_COLUMNS", 1024)
    assert_same(activation.silu_mul_quantized(gate_up, E4M3), expected)


def eight_bits(rows: int, columns: int, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """A matrix, and a scale for each of its rows."""
    return specified(torch.randn(rows, columns), RowScaled(dtype))[:2]


@pytest.mark.parametrize("form", [E4M3, INT8, PARTS], ids=["e4m3", "int8", "parts"])
@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 32, 33, 65, 128, 129, 256])
def test_rows_times_a_matrix(num_rows: int, form: RowScaled) -> None:
    """For every size of the tile and on both sides of each, alone in float32, and with a bias and something to add."""
    check(num_rows, form, outputs=64, inputs=512)


@pytest.mark.parametrize(
    ("outputs", "inputs", "columns", "split"),
    [(64 * 70, 256, 256, 1), (64 * 40, 512, 256, 2), (960, 576, 64, 1), (64, 2048, 256, 4), (576, 1536, 128, 4)],
)
def test_a_matrix_is_cut_into_tiles_that_it_falls_into(outputs: int, inputs: int, columns: int, split: int) -> None:
    """Wide ones where they fit, and shared by several programs where there are few."""
    tiling = scaled.tiling(outputs, inputs, 16)
    assert (tiling.columns, tiling.split) == (columns, split)
    check(5, E4M3, outputs=outputs, inputs=inputs)


@pytest.mark.parametrize("form", [INT8, PARTS], ids=["int8", "parts"])
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 200), (1, 33), (97, 64), (64, 160)])
@pytest.mark.parametrize("num_rows", [3, 70])
def test_whole_numbers_need_not_fall_into_tiles(outputs: int, inputs: int, num_rows: int, form: RowScaled) -> None:
    """Neither outputs nor inputs."""
    check(num_rows, form, outputs=outputs, inputs=inputs)


@pytest.mark.parametrize("form", [INT8, STATIC, PARTS], ids=["int8", "static", "parts"])
@pytest.mark.parametrize(("outputs", "inputs"), [(130, 256), (136, 272), (136, 200)])
def test_many_rows_are_multiplied_in_blocks(outputs: int, inputs: int, form: RowScaled) -> None:
    """The last of which is not full; where descriptors fit and where they do not."""
    check(300, form, outputs=outputs, inputs=inputs)


@pytest.mark.parametrize("form", [INT8, E4M3], ids=["int8", "e4m3"])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("num_rows", "outputs", "inputs"), [(1, 8, 16), (32, 64, 64), (77, 136, 208), (150, 96, 48)])
def test_many_rows_are_as_right_as_few(
    num_rows: int, outputs: int, inputs: int, persistent: bool, form: RowScaled
) -> None:
    """Whether or not they fall into tiles, with programs that have several and with such that have one, in groups the last of which is not
    full: where sums are exact, bit for bit what the kernel for few rows computes."""
    x, (weight, scales) = specified(torch.randn(num_rows, inputs), form), eight_bits(outputs, inputs, form.dtype)
    bias, add = torch.randn(outputs), torch.randn(num_rows, outputs).bfloat16()
    cut = bulk.Tiling(rows=16, columns=64, depth=32, group=2, persistent=persistent, warps=4, stages=2)
    for options in ({"dtype": torch.float32}, {"dtype": torch.bfloat16, "bias_O": bias, "add": add}):
        got = bulk.matmul(x.values_NI, weight, x.scales_N, scales, cut=cut, **options)  # type: ignore[arg-type]
        few = skinny.matmul(x.values_NI, weight, 1, scales=(x.scales_N, scales), block=64, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(got, few, **({"atol": 0, "rtol": 0} if form is INT8 else {}))
    expected = product(x, weight, scales) + bias + add
    torch.testing.assert_close(got, expected.bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("parts", [1, 2])
def test_blocks_take_turns_and_none_is_left_out(parts: int) -> None:
    """More of them than are multiplied with a tile before the next one's turn, and a number that these do not divide."""
    x = specified(torch.randn(19 * 16 // parts - 3, 64), replace(INT8, parts=parts))
    weight, scales = eight_bits(150, 64, torch.int8)
    got = skinny.matmul(
        x.values_NI, weight, 1, dtype=torch.float32, scales=(x.scales_N, scales), parts=parts, block=16, columns=64
    )
    torch.testing.assert_close(got.double(), product(x, weight, scales), atol=1e-3, rtol=1e-5)


def test_sums_of_the_largest_whole_numbers_are_exact() -> None:
    """Of the second matrix of Llama-3.1-8B's MLPs: nothing overflows, and nothing is rounded but the result."""
    x = Quantized(torch.full((2, 14336), -128, dtype=torch.int8), torch.ones(2))
    weight = torch.full((64, 14336), -128, dtype=torch.int8)
    weight[1] = 127
    counters = skinny.counters_of(weight)
    got = scaled.matmul(x, weight, torch.ones(64), counters, dtype=torch.float32)
    assert (got[:, 0] == 14336 * 128 * 128).all() and (got[:, 1] == -14336 * 128 * 127).all()


@pytest.mark.parametrize(
    ("num_rows", "outputs", "inputs"), [(1, 64, 512), (17, 200, 300), (5, 64, 100), (33, 128, 1024), (300, 130, 256)]
)
def test_blocks_of_a_matrix_have_scales(num_rows: int, outputs: int, inputs: int) -> None:
    """And as many inputs of a row, whether or not they fall into blocks."""
    matrix = nearest(torch.randn(outputs, inputs), Scheme(is_float=True, tile=(128, 128)))
    scales, x = blocks(matrix.scales_TU, matrix.tile, matrix.shape), torch.randn(num_rows, inputs)
    rows, bias, counters = specified(x, SHARED), torch.randn(outputs), skinny.counters_of(matrix.values_OI)
    spread = rows.scales_N.t().repeat_interleave(128, 1)[:, :inputs]
    expected = (rows.values_NI.double() * spread) @ matrix.dequant().double().T + bias
    got = scaled.matmul(rows, matrix.values_OI, scales, counters, bias_O=bias, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)
    if num_rows == 1:
        got = gemv.gemv(x, matrix.values_OI, scales=scales, bias_O=bias, dtype=torch.float32)
        expected = x.double() @ matrix.dequant().double().T + bias
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)


def test_scales_that_blocks_do_not_share_are_refused() -> None:
    """With what would do."""
    with pytest.raises(ValueError, match="blocks of 64 x 128 weights with a scale, and it comes in \\(32, 128\\)"):
        blocks(torch.ones(4, 2), (32, 128), (128, 256))


def check(num_rows: int, form: RowScaled, *, outputs: int, inputs: int) -> None:
    x, (weight, scales) = specified(torch.randn(num_rows, inputs), form), eight_bits(outputs, inputs, form.dtype)
    bias, add, counters = torch.randn(outputs), torch.randn(num_rows, outputs).bfloat16(), skinny.counters_of(weight)
    expected = product(x, weight, scales)
    got = scaled.matmul(x, weight, scales, counters, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-5)
    got = scaled.matmul(x, weight, scales, counters, bias_O=bias, add=add, dtype=torch.bfloat16)
    torch.testing.assert_close(got, (expected + bias + add).bfloat16(), atol=1e-2, rtol=1e-2)
    assert not counters.any()


def product(x: Quantized, weight_OI: Tensor, scales_O: Tensor) -> Tensor:
    return plain(x) @ (weight_OI.double() * scales_O[:, None]).T
