"""Rows times a matrix in four bits. In float16, as the interpreter multiplies no bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.ops.forms import Unnormed
from services.engine.ops.kernels import gemv4, int4, widen
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest

GROUPS = [32, 64, 128]

both_kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def drawn(outputs: int, inputs: int, group: int, *, symmetric: bool) -> QuantizedMatrix:
    weight = (torch.randn(outputs, inputs) + (0 if symmetric else 0.7)) / 20
    return nearest(weight, Scheme(4, tile=(1, group), symmetric=symmetric))


def packed(matrix: QuantizedMatrix, dtype: torch.dtype = torch.float16) -> int4.Packed:
    offsets = None if matrix.is_symmetric else matrix.offsets_TU
    return int4.packed(matrix.values_OI, matrix.scales_TU, offsets, dtype=dtype)


def kept(matrix: QuantizedMatrix) -> Tensor:
    """What the weights are in 16 bits, by terms that are in them too: rounded once."""
    spread = matrix.tile[1]
    scales, offsets = (
        each.half().double().repeat_interleave(spread, 1) for each in (matrix.scales_TU, matrix.offsets_TU)
    )
    weight_OI: Tensor = (matrix.values_OI.double() * scales + offsets).half().double()
    return weight_OI


def check(num_rows: int, matrix: QuantizedMatrix, tiling: int4.Tiling | None = None) -> None:
    """In float32 alone, and with a bias and something to add."""
    outputs, inputs = matrix.shape
    four = packed(matrix)
    x = torch.randn(num_rows, inputs).half()
    expected = x.double() @ kept(matrix).T
    bias, add = torch.randn(outputs), torch.randn(num_rows, outputs).bfloat16()
    got = int4.matmul(x, four, dtype=torch.float32, tiling=tiling)
    torch.testing.assert_close(got.double(), expected, atol=1e-5 * float(x.double().norm()), rtol=1e-5)
    got = int4.matmul(x, four, bias_O=bias, add=add, dtype=torch.bfloat16, tiling=tiling)
    torch.testing.assert_close(got, (expected + bias + add).bfloat16(), atol=1e-2, rtol=1e-2)
    assert not four.counters.any()


@both_kinds
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num_rows", [1, 40, 150])
def test_rows_times_a_matrix(num_rows: int, group: int, symmetric: bool) -> None:
    """Of one program, of several that share a tile, and in blocks of rows."""
    check(num_rows, drawn(64, 512, group, symmetric=symmetric))


@both_kinds
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(97, 576, 64), (1, 32, 32), (70, 288, 32), (130, 384, 128), (257, 128, 128)]
)
def test_neither_outputs_nor_spans_need_be_whole(outputs: int, inputs: int, group: int, symmetric: bool) -> None:
    """What is missing weighs nothing; nor need groups come in pairs."""
    check(3, drawn(outputs, inputs, group, symmetric=symmetric))


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("spans", [1, 2])
def test_a_matrix_is_shared_and_taken_in_as_one_likes(split: int, spans: int) -> None:
    """Each way to cut it computes the same."""
    check(5, drawn(128, 1024, 64, symmetric=split > 1), int4.Tiling(16, 64, spans, split, 4, 4))


@both_kinds
@pytest.mark.parametrize("group", GROUPS)
def test_one_row(group: int, symmetric: bool) -> None:
    """As it is, with a bias and something to add, or normed and gated on the way; by terms in 16 bits, and rounded no further."""
    matrix = drawn(32, 3072, group, symmetric=symmetric)
    four, spread = packed(matrix), matrix.tile[1]
    scales, offsets = (
        each.half().double().repeat_interleave(spread, 1) for each in (matrix.scales_TU, matrix.offsets_TU)
    )
    plain = matrix.values_OI.double() * scales + offsets
    x, norm_weight, bias, add = (torch.randn(*shape).half() for shape in ((1, 3072), (3072,), (32,), (1, 32)))
    assert gemv4.is_supported(four, x.dtype) and not gemv4.is_supported(four, torch.float32)
    near = {"atol": 1e-5 * float(x.double().norm()), "rtol": 1e-5}
    got = gemv4.gemv(x, four, dtype=torch.float32)
    torch.testing.assert_close(got.double(), x.double() @ plain.T, **near)
    got = gemv4.gemv(x, four, bias_O=bias, add=add, dtype=torch.float32)
    torch.testing.assert_close(got.double(), x.double() @ plain.T + bias + add, **near)
    normed = F.rms_norm(x.double(), (3072,), norm_weight.double(), 1e-5)
    gate, up = F.linear(normed, plain, bias.double()).chunk(2, -1)
    got = gemv4.gemv(Unnormed(x, norm_weight, 1e-5), four, bias_O=bias, dtype=torch.float32, gated=True)
    torch.testing.assert_close(got.double(), F.silu(gate) * up, **near)


def test_offsets_far_from_zero_are_added_as_they_are() -> None:
    """Zero points that are no whole numbers and lie outside of the levels, and minimums."""
    draw = torch.randint(-8, 8, (64, 256)).to(torch.int8)
    for which in ("zeros_TU", "minimums_TU"):
        matrix = QuantizedMatrix(draw, torch.rand(64, 4) + 0.5, (1, 64), 4, **{which: 40 * torch.randn(64, 4)})
        check(4, matrix)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    """And is not finite still."""
    four = packed(drawn(64, 256, 64, symmetric=False))
    x = torch.randn(3, 256).half()
    clean = int4.matmul(x, four, dtype=torch.float32)
    x[1, 7] = torch.nan
    got = int4.matmul(x, four, dtype=torch.float32)
    assert not got[1].isfinite().any() and torch.equal(got[::2], clean[::2])


@both_kinds
@pytest.mark.parametrize(("group", "inputs"), [(32, 96), (64, 576), (128, 1280)])
def test_a_matrix_is_widened_to_what_it_stands_for(group: int, inputs: int, symmetric: bool) -> None:
    """All of it, or some of its rows."""
    matrix = drawn(20, inputs, group, symmetric=symmetric)
    four, exact = packed(matrix, torch.float32), matrix.dequant()
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
    """Half a byte a weight, and two for the scale of a group; as many for an offset, where there is one or a span is a group."""
    for symmetric, terms in ((True, 1 if group < 128 else 2), (False, 2)):
        four = packed(drawn(256, 512, group, symmetric=symmetric))
        assert four.weight_OW.nbytes + four.terms_TO2.nbytes == 256 * 512 // 2 + 2 * terms * 256 * 512 // group
