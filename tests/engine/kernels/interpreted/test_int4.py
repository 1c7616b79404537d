"""Rows times a matrix in four bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import RowScaled, Unnormed
from services.engine.ops.kernels import gemv, int4, widen
from services.engine.ops.quantize import by_torch
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest

GROUPS = [32, 64, 128]


def drawn(outputs: int, inputs: int, group: int, *, symmetric: bool) -> QuantizedMatrix:
    weight = (torch.randn(outputs, inputs) + (0 if symmetric else 0.7)) / 20
    return nearest(weight, Scheme(4, tile=(1, group), symmetric=symmetric))


def packed(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float32) -> int4.Packed:
    offsets = None if matrix.is_symmetric else matrix.offsets_TU
    return int4.packed(matrix.values_OI, matrix.scales_TU, offsets, dtype=dtype)


def check(num_rows: int, matrix: QuantizedMatrix, tiling: int4.Tiling | None = None) -> None:
    """In float32 alone, and with a bias and something to add."""
    outputs, inputs = matrix.shape
    four = packed(matrix)
    x = torch.randn(num_rows, inputs)
    rows = by_torch(x, RowScaled(torch.int8, parts=2, group=None if matrix.is_symmetric else four.group))
    expected = x.double() @ matrix.dequant().double().T
    bias, add = torch.randn(outputs), torch.randn(num_rows, outputs).bfloat16()
    close = {"atol": 1e-3 * float(expected.std()), "rtol": 1e-4}
    got = int4.matmul(rows, four, dtype=torch.float32, tiling=tiling)
    torch.testing.assert_close(got.double(), expected, **close)
    got = int4.matmul(rows, four, bias_O=bias, add=add, dtype=torch.bfloat16, tiling=tiling)
    torch.testing.assert_close(got, (expected + bias + add).bfloat16(), atol=1e-2, rtol=1e-2)
    assert not four.counters.any()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num_rows", [1, 9, 40, 70])
def test_rows_times_a_matrix(num_rows: int, group: int, symmetric: bool) -> None:
    """For sizes of the tile and on both sides of each: one program, several that share a tile, and blocks of rows."""
    check(num_rows, drawn(64, 512, group, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(97, 576, 64), (100, 96, 32), (1, 32, 32), (70, 288, 32), (65, 384, 128)]
)
def test_neither_outputs_nor_spans_need_be_whole(outputs: int, inputs: int, group: int, symmetric: bool) -> None:
    """What is missing weighs nothing."""
    check(3, drawn(outputs, inputs, group, symmetric=symmetric))


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("spans", [1, 2])
def test_a_matrix_is_shared_and_taken_in_as_one_likes(split: int, spans: int) -> None:
    """Each way to cut it computes the same."""
    check(5, drawn(128, 1024, 128, symmetric=False), int4.Tiling(16, 64, spans, split, 4, 4))


def test_extreme_values_are_exact() -> None:
    """Rows and numbers as large as there can be, of a scale of one: whole sums, whatever the sign."""
    values = torch.tensor([-8, 7]).repeat(64, 256).to(torch.int8)
    values[3] = -8
    matrix = QuantizedMatrix(values, torch.ones(64, 4), (1, 128), 4)
    x = torch.full((2, 512), -127.0)
    x[1, ::2] = 127
    rows = by_torch(x, RowScaled(torch.int8, parts=2))
    got = int4.matmul(rows, packed(matrix), dtype=torch.float32)
    torch.testing.assert_close(got, x @ values.float().T, rtol=1e-6, atol=0)


def test_offsets_far_from_zero_are_added_as_they_are() -> None:
    """Zero points that are no whole numbers and lie outside of the levels, and minimums: a sum of inputs brings them."""
    draw = torch.randint(-8, 8, (64, 256)).to(torch.int8)
    for which in ("zeros_TU", "minimums_TU"):
        matrix = QuantizedMatrix(draw, torch.rand(64, 4) + 0.5, (1, 64), 4, **{which: 40 * torch.randn(64, 4)})
        check(4, matrix)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    """And is not finite still."""
    four = packed(drawn(64, 256, 64, symmetric=False))
    x, form = torch.randn(3, 256), RowScaled(torch.int8, parts=2, group=64)
    clean = int4.matmul(by_torch(x, form), four, dtype=torch.float32)
    x[1, 7] = torch.nan
    got = int4.matmul(by_torch(x, form), four, dtype=torch.float32)
    assert not got[1].isfinite().any() and torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "inputs"), [(32, 512), (64, 1536), (128, 4096)])
def test_one_row_times_a_matrix(group: int, inputs: int, symmetric: bool) -> None:
    """The row as it is, normed and gated on the way or not, in one pass over the columns and in several."""
    matrix = drawn(8, inputs, group, symmetric=symmetric)
    four, exact = packed(matrix), matrix.dequant().double()
    x, norm_weight, bias, add = (torch.randn(*shape).half() for shape in ((1, inputs), (inputs,), (8,), (1, 8)))
    assert gemv.is_supported(four.weight_OB)
    expected = x.double() @ exact.T + bias + add
    got = gemv.gemv(x, four, bias_O=bias, add=add, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)
    normed = F.rms_norm(x.double(), (inputs,), norm_weight.double(), 1e-5)
    gate, up = F.linear(normed, exact, bias.double()).chunk(2, -1)
    got = gemv.gemv(Unnormed(x, norm_weight, 1e-5), four, bias_O=bias, dtype=torch.float32, gated=True)
    torch.testing.assert_close(got.double(), F.silu(gate) * up, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "inputs"), [(32, 96), (64, 576), (128, 1280)])
def test_a_matrix_is_widened_to_what_it_stands_for(group: int, inputs: int, symmetric: bool) -> None:
    """All of it, or some of its rows."""
    matrix = drawn(20, inputs, group, symmetric=symmetric)
    four, exact = packed(matrix), matrix.dequant()
    torch.testing.assert_close(widen.int4(four, dtype=torch.float32), exact, atol=1e-6, rtol=1e-6)
    chosen = torch.tensor([19, 0, 0, 7])
    torch.testing.assert_close(
        widen.int4(four, chosen, dtype=torch.float16), exact[chosen].half(), atol=1e-3, rtol=1e-3
    )
    assert widen.int4(four, chosen[:0], dtype=torch.float16).shape == (0, inputs)


def test_eight_bits_are_widened_too() -> None:
    """By a scale for each row."""
    values, scales = torch.randint(-128, 128, (5, 1100)).to(torch.int8), torch.rand(5)
    expected: Tensor = values * scales[:, None]
    assert torch.equal(widen.int8(values, scales, dtype=torch.float32), expected)


@pytest.mark.parametrize("group", GROUPS)
def test_bytes_are_what_the_format_promises(group: int) -> None:
    """Half a byte a weight, and two for the scale of a group; as many for an offset, where there is one."""
    for symmetric, terms in ((True, 1), (False, 2)):
        four = packed(drawn(256, 512, group, symmetric=symmetric), torch.bfloat16)
        kept = sum(each.nbytes for each in (four.weight_OB, four.scales_GO, four.offsets_GO) if each is not None)
        assert kept == 256 * 512 // 2 + 2 * terms * 256 * 512 // group
