"""Every format of few bits against float64, by the weights that it says it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.layers.linear import Linear
from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.quantize import quantize
from services.engine.quant import Format
from services.engine.quant.int4 import Int4
from services.engine.quant.matrix import QuantizedMatrix, Scheme, joined, nearest
from services.engine.quant.rules import FORMATS
from services.engine.weight_format import WeightFormat

QUANTIZED = [name for name in WeightFormat if name is not WeightFormat.NONE]
TABLES = [WeightFormat.INT8, WeightFormat.INT8_WEIGHT, WeightFormat.INT4_G32, WeightFormat.INT4_G64_ASYM]
OUTPUTS, INPUTS = 96, 256
INPUT_SCALE = torch.tensor([0.03])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def linear(name: WeightFormat, weight: Tensor | QuantizedMatrix, bias: Tensor | None = None, **more: object) -> Linear:
    format = FORMATS[name]
    scale = INPUT_SCALE if format.needs_input_scale else None
    return Linear(weight, bias, format=format, input_scale=scale, **more)  # type: ignore[arg-type]


def kept(format: Format, weight: Tensor) -> Tensor:
    """What the plain weight is rounded to, in float64; of four bits with scales and offsets in the dtype of the weight."""
    assert format.scheme is not None
    if not isinstance(format, Int4):
        return nearest(weight, format.scheme).dequant().double()
    found = nearest(weight, format.scheme, scale_dtype=weight.dtype)
    offsets = found.offsets_TU.to(weight.dtype).float()
    return QuantizedMatrix(found.values_OI, found.scales_TU, found.tile, 4, None, offsets).dequant().double()


def seen(name: WeightFormat, x: Tensor) -> Tensor:
    """The activations as the format rounds them, in float64: by formulas of their own."""
    x = x.double()
    if name in (WeightFormat.FP8, WeightFormat.FP8_TENSOR):
        scales = x.abs().amax(1, keepdim=True) / 448
        return (x / scales).float().to(torch.float8_e4m3fn).double() * scales
    if name is WeightFormat.FP8_BLOCK:
        scales = x.view(len(x), -1, 128).abs().amax(2, keepdim=True) / 448
        return ((x.view(len(x), -1, 128) / scales).float().to(torch.float8_e4m3fn).double() * scales).view(x.shape)
    if name is WeightFormat.INT8:
        scales = x.abs().amax(1, keepdim=True) / 127
        return (x / scales).round() * scales
    if name is WeightFormat.INT8_STATIC:
        return (x / INPUT_SCALE).round().clamp(-128, 127) * INPUT_SCALE.double()
    return x


@pytest.mark.parametrize("name", WeightFormat)
def test_a_format_says_whether_it_rounds_activations(name: WeightFormat) -> None:
    x = drawn(3, INPUTS)
    assert FORMATS[name].rounds_activations == (not torch.equal(seen(name, x), x.double()))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("with_terms", [False, True])
def test_products_are_those_of_the_kept_weights(
    name: WeightFormat, dtype: torch.dtype, rows: int, with_terms: bool
) -> None:
    """And of the activations as the format rounds them, to a few roundings of the result. A value of activations that lies
    between two levels may be rounded to either: one in some thousands, by one step."""
    weight, x = drawn(OUTPUTS, INPUTS, dtype=dtype), drawn(rows, INPUTS, dtype=dtype, seed=1)
    bias, add = drawn(OUTPUTS, dtype=dtype), drawn(rows, OUTPUTS, dtype=dtype, seed=2)
    expected = seen(name, x) @ kept(FORMATS[name], weight).T
    size = expected.abs().max()
    if with_terms:
        expected = expected + bias.double() + add.double()
    out = linear(name, weight, bias if with_terms else None)(x, add=add.clone() if with_terms else None)
    assert out.dtype is dtype
    error = (out.double() - expected).abs() / size
    few = 3 * torch.finfo(dtype).eps + (1e-4 if name is WeightFormat.INT8_WEIGHT else 1e-5)
    assert error.median() < few
    assert error.max() < 3 * few + (0.02 if seen(name, x) is not x else 0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_packed_can_be_read_back(name: WeightFormat) -> None:
    """As float32 weights, by the kernel that multiplies them."""
    format, weight = FORMATS[name], drawn(OUTPUTS, INPUTS)
    scale = INPUT_SCALE if format.needs_input_scale else None
    buffers = format.pack(weight, dtype=torch.float32, input_scale=scale)
    torch.testing.assert_close(
        format.dequant(buffers, inputs=INPUTS).double(), kept(format, weight), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", WeightFormat)
def test_fake_quantization_passes_gradients_through(name: WeightFormat) -> None:
    """The values are those that are kept, the gradient that of the weights themselves."""
    weight = drawn(OUTPUTS, INPUTS).requires_grad_()
    found = FORMATS[name].fake_quant(weight, dtype=torch.float32)
    if name is not WeightFormat.NONE:
        torch.testing.assert_close(found.double(), kept(FORMATS[name], weight.detach()), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, weight)
    slope = drawn(OUTPUTS, INPUTS, seed=5)
    (found * slope).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, slope)


@pytest.mark.parametrize("name", [WeightFormat.INT8, WeightFormat.INT8_STATIC, WeightFormat.INT8_WEIGHT])
def test_rows_that_hold_no_number_spoil_no_other(name: WeightFormat) -> None:
    """Whole numbers cannot say that there is none: their scale does."""
    weight, x = drawn(OUTPUTS, INPUTS), drawn(4, INPUTS)
    clean = linear(name, weight)(x)
    x[0, 3], x[2, 5], x[3] = torch.nan, torch.inf, 0
    out = linear(name, weight)(x)
    assert not out[0].isfinite().any() and not out[2].isfinite().any()
    assert torch.equal(out[1], clean[1]) and (out[3] == 0).all()


def test_rows_that_come_in_int8_are_multiplied_as_they_are() -> None:
    """What stands before may round."""
    x, matrix = drawn(5, INPUTS), linear(WeightFormat.INT8, drawn(OUTPUTS, INPUTS))
    rows = quantize(x, RowScaled(torch.int8))
    assert matrix.takes == RowScaled(torch.int8) and isinstance(rows, Quantized)
    assert torch.equal(matrix(rows), matrix(x))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("outputs", [97, 128, 320])
def test_a_table_gives_single_rows(name: WeightFormat, outputs: int) -> None:
    """The same that are multiplied with, for any shape of indices."""
    weight = drawn(outputs, INPUTS)
    table = linear(name, weight)
    indices = torch.tensor([[0, 1, outputs - 1], [63, 64, 96]])
    expected = kept(FORMATS[name], weight)[indices]
    torch.testing.assert_close(table.rows(indices).double(), expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 150),
    st.sampled_from([32, 64, 96, 192, 576]),
    st.sampled_from([32, 64, 96, 576]),
    st.sampled_from(["plain", "zeros", "minimums"]),
    st.integers(2, 4),
    st.integers(1, 5),
)
def test_four_bits_of_others_are_kept_as_they_are(
    outputs: int, inputs: int, group: int, kind: str, bits: int, rows: int
) -> None:
    """With zero points that are no whole numbers, with minimums, with fewer bits, with any number of outputs, with groups that are
    cut into some that the kernel knows."""
    group = min(group, inputs)
    draw = torch.Generator().manual_seed(outputs)
    tiles = (outputs, -(-inputs // group))
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), generator=draw).to(torch.int8)
    scales, offsets = torch.rand(tiles, generator=draw) + 0.5, torch.randn(tiles, generator=draw)
    matrix = QuantizedMatrix(
        values,
        scales,
        (1, group),
        bits,
        offsets if kind == "zeros" else None,
        offsets if kind == "minimums" else None,
    )
    if inputs % group:
        with pytest.raises(ValueError, match="come in groups of"):
            linear(WeightFormat.INT4_G32, matrix, dtype=torch.float32)
        return
    x = drawn(rows, inputs)
    found = linear(WeightFormat.INT4_G32, matrix, dtype=torch.float32)(x)
    torch.testing.assert_close(found.double(), x.double() @ matrix.dequant().double().T, rtol=1e-4, atol=1e-3)


def test_sorted_inputs_are_sorted_in_every_step() -> None:
    """As GPTQ's act-order wants it. Rows that are looked up, as a head does, are in their own order."""
    order = torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    plain = nearest(drawn(OUTPUTS, INPUTS), Scheme(4, tile=(1, 32)))
    matrix = QuantizedMatrix(plain.values_OI, plain.scales_TU, plain.tile, 4, order_I=order)
    x = drawn(3, INPUTS)
    sorted_inputs = linear(WeightFormat.INT4_G32, matrix, dtype=torch.float32)
    torch.testing.assert_close(sorted_inputs(x), x @ matrix.dequant().T, rtol=1e-4, atol=1e-4)
    indices = torch.tensor([[5, 0], [5, OUTPUTS - 1]])
    torch.testing.assert_close(sorted_inputs.rows(indices), matrix.dequant()[indices], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="inputs are sorted"):
        linear(WeightFormat.INT8, matrix, dtype=torch.float32)


@pytest.mark.parametrize("name", [WeightFormat.INT8, WeightFormat.FP8_TENSOR])
def test_one_scale_for_a_tensor_is_as_good_as_one_for_each_output(name: WeightFormat) -> None:
    """Also of several tensors that stand side by side, each with its own."""
    scheme = Scheme(is_float=name is WeightFormat.FP8_TENSOR, tile=(None, None))
    parts = [nearest(drawn(size, INPUTS, seed=size) * size, scheme) for size in (48, 16)]
    matrix, x = joined(parts), drawn(4, INPUTS)
    found = linear(name, matrix, dtype=torch.float32)(x)
    expected = seen(name, x) @ matrix.dequant().double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("int8", Scheme(tile=(1, 64)), "int8 keeps a scale for each output and no zero point, and it comes with a scale for each 64"),
        ("int8-weight", Scheme(symmetric=False), "comes with zero points"),
        ("int8", Scheme(is_float=True), "int8 cannot keep it: its values are float8"),
        ("fp8", Scheme(), "fp8 cannot keep it: its values are int8"),
        ("fp8", Scheme(is_float=True, tile=(128, 128)), "fp8 keeps a scale for each output, and it comes with one for each 128 inputs; say fp8-block"),
        ("int4-g32", Scheme(), "int4-g32 cannot keep values of 8 bits"),
        ("int4-g32", Scheme(4, tile=(1, 16)), "groups of 32, 64, 128, 256 inputs, and its 256 inputs come in groups of 16"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_keep_is_refused(name: str, scheme: Scheme, message: str) -> None:
    """With what it can."""
    with pytest.raises(ValueError, match=message):
        linear(WeightFormat(name), nearest(drawn(128, 256), scheme), dtype=torch.float32)


def test_groups_that_do_not_divide_the_inputs_are_refused_with_those_that_do() -> None:
    """SmolLM2 has 576 inputs, which are four and a half groups of 128."""
    with pytest.raises(
        ValueError, match="128 inputs in a group, and there are 576; say int4-g64-asym or int4-g32-asym"
    ):
        linear(WeightFormat.INT4_G128_ASYM, drawn(8, 576))
    with pytest.raises(ValueError, match="and there are 40; say int8-weight"):
        linear(WeightFormat.INT4_G32, drawn(8, 40))


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.nan])
def test_a_static_scale_is_above_zero(scale: float) -> None:
    """Or the checkpoint is broken."""
    with pytest.raises(ValueError, match="int8-static needs an input_scale above zero"):
        Linear(drawn(8, 64), format=FORMATS[WeightFormat.INT8_STATIC], input_scale=torch.tensor([scale]))


def test_bytes_a_weight() -> None:
    """What is kept for SmolLM2's second matrix of an MLP, beside 32 bits a weight."""
    weight = drawn(576, 1536)
    for name, most in (("int8-weight", 0.252), ("int4-g64", 0.141), ("int4-g32-asym", 0.1565)):
        buffers = FORMATS[WeightFormat(name)].pack(weight.bfloat16(), dtype=torch.bfloat16)
        assert sum(each.nbytes for each in buffers if isinstance(each, Tensor)) / weight.nbytes < most
