"""Formats of weights as a GPU multiplies them: each finds its kernels, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops import int4, int8
from services.engine.ops.forms import Quantized, RowScaled, Unnormed
from services.engine.ops.kernels import overlap
from services.engine.ops.norm import rms_norm, rms_norm_as
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest
from services.engine.quant.rules import FORMATS
from services.engine.weight_format import WeightFormat
from tests.engine.quant.test_formats import TABLES, kept, linear, seen

OUTPUTS, INPUTS = 64, 512
ONE_OF_EACH = [
    *map(WeightFormat, ("fp8", "fp8-block", "int8", "int8-static", "int8-weight", "int4-g128", "int4-g32-asym"))
]


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is taken for one of a GPU, whose kernels are interpreted."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    monkeypatch.setattr(overlap, "_is_able", lambda _: False)


def as_rounded(name: WeightFormat, x: Tensor) -> Tensor:
    """A single row keeps its 16 bits."""
    return x.double() if len(x) == 1 else seen(name, x)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_products_are_those_of_the_kept_weights(name: WeightFormat, num_rows: int) -> None:
    """Plain, with a bias and something to add; and gated."""
    dtype = torch.float16 if name.startswith("int4") else torch.float32  # in which its kernel multiplies
    weight, x = (torch.randn(OUTPUTS, INPUTS) / 20).to(dtype), torch.randn(num_rows, INPUTS).to(dtype)
    bias, add = torch.randn(OUTPUTS).to(dtype), torch.randn(num_rows, OUTPUTS).to(dtype)
    matrix = linear(name, weight, bias)
    expected = as_rounded(name, x) @ kept(FORMATS[name], weight).T + bias
    torch.testing.assert_close(matrix(x, add=add.clone()).double(), expected + add, rtol=1e-2, atol=1e-2)
    gate, up = expected.chunk(2, -1)
    found = matrix.gated(x, RowScaled(torch.int8, most_rows=0))
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.double(), F.silu(gate) * up, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if not name.startswith("int4")])
def test_a_norm_hands_over_what_a_format_takes(name: WeightFormat) -> None:
    """And the product is that of plain rows, which the format rounds itself; of a single row nearly."""
    matrix, norm_weight = linear(name, torch.randn(OUTPUTS, INPUTS)), torch.randn(INPUTS)
    x = torch.randn(3, INPUTS)
    rows = rms_norm_as(x, norm_weight, 1e-5, matrix.takes)
    assert isinstance(rows, Quantized)
    assert torch.equal(matrix(rows), matrix(rms_norm(x, norm_weight, 1e-5)))
    found = matrix(Unnormed(x[:1], norm_weight, 1e-5))
    torch.testing.assert_close(found, matrix(rms_norm(x[:1], norm_weight, 1e-5)), rtol=1e-4, atol=1e-3)


def test_four_bits_take_a_row_before_its_norm() -> None:
    """Several rows are normed first."""
    matrix, norm_weight = linear(WeightFormat.INT4_G32, torch.randn(OUTPUTS, INPUTS).half()), torch.randn(INPUTS).half()
    assert matrix.takes is Unnormed
    for x in (torch.randn(1, INPUTS).half(), torch.randn(3, INPUTS).half()):
        expected = matrix(rms_norm(x, norm_weight, 1e-5))
        torch.testing.assert_close(matrix(Unnormed(x, norm_weight, 1e-5)), expected, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("name", [WeightFormat.INT8_WEIGHT, WeightFormat.INT4_G32_ASYM])
def test_many_rows_are_multiplied_with_a_matrix_that_is_widened(
    name: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before leaves them as they are."""
    monkeypatch.setattr(int4, "MOST_ROWS", 2)
    monkeypatch.setattr(int8, "_FORM", RowScaled(torch.int8, parts=2, most_rows=2))
    weight, x = torch.randn(OUTPUTS, INPUTS), torch.randn(3, INPUTS)
    matrix = linear(name, weight)
    assert isinstance(rms_norm_as(x, x[0], 1e-5, matrix.takes), Tensor)
    expected = x.double() @ kept(FORMATS[name], weight).T
    torch.testing.assert_close(matrix(x).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [WeightFormat.FP8_BLOCK, WeightFormat.INT8_STATIC, WeightFormat.INT4_G32_ASYM])
def test_what_is_packed_can_be_read_back(name: WeightFormat) -> None:
    """By the kernel that multiplies it."""
    format, weight = FORMATS[name], torch.randn(40, 128)
    scale = torch.ones(1) if format.needs_input_scale else None
    buffers = format.pack(weight, dtype=torch.float32, input_scale=scale)
    found = format.dequant(buffers, inputs=128)
    torch.testing.assert_close(found.double(), kept(format, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_single_rows(name: WeightFormat) -> None:
    """The same that are multiplied with."""
    weight = torch.randn(97, 256)
    indices = torch.tensor([[0, 1, 96], [63, 64, 96]])
    found = linear(name, weight).rows(indices)
    torch.testing.assert_close(found.double(), kept(FORMATS[name], weight)[indices], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_sorted_inputs_are_sorted_in_every_step(num_rows: int) -> None:
    """As GPTQ's act-order wants it; so nobody rounds them before."""
    plain = nearest(torch.randn(OUTPUTS, INPUTS) + 0.5, Scheme(4, tile=(1, 128), symmetric=False))
    order = torch.randperm(INPUTS)
    matrix = QuantizedMatrix(plain.values_OI, plain.scales_TU, plain.tile, 4, plain.zeros_TU, order_I=order)
    x, packed = (
        torch.randn(num_rows, INPUTS),
        Linear(matrix, format=FORMATS[WeightFormat.INT4_G32], dtype=torch.float32),
    )
    assert packed.takes is None
    torch.testing.assert_close(packed(x), x @ matrix.dequant().T, rtol=1e-3, atol=1e-2)


def test_a_single_row_of_half_a_span_is_no_row_of_whole_ones() -> None:
    """Though as many bytes lie there."""
    weight, x = torch.randn(8, 480), torch.randn(1, 480)
    matrix = linear(WeightFormat.INT4_G32, weight)
    expected = x.double() @ kept(FORMATS[WeightFormat.INT4_G32], weight).T
    torch.testing.assert_close(matrix(x).double(), expected, rtol=1e-3, atol=1e-2)


def test_groups_that_no_kernel_knows_are_refused() -> None:
    """With those that one does."""
    matrix = nearest(torch.randn(64, 256), Scheme(4, tile=(1, 16)))
    with pytest.raises(
        ValueError, match="a GPU multiplies four bits in groups of 32, 64, 128 inputs, and its 256 inputs"
    ):
        linear(WeightFormat.INT4_G32, matrix, dtype=torch.float32)
