"""Weights in few bits: rounding, and what is done to them before a format packs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.quant.matrix import (
    FLOAT,
    QuantizedMatrix,
    Scheme,
    all_finite,
    extremes,
    joined,
    nearest,
    parameters,
    rounded,
)

INT8, INT4, INT3, ASYMMETRIC = (
    Scheme(),
    Scheme(4, tile=(1, 32)),
    Scheme(3, tile=(1, 16)),
    Scheme(4, tile=(1, 32), symmetric=False),
)
FP8_TENSOR, FP8, FP8_BLOCK = (Scheme(is_float=True, tile=tile) for tile in ((None, None), (1, None), (128, 128)))
SCHEMES = {
    "int8": INT8,
    "int8 tensor": Scheme(tile=(None, None)),
    "int8 asymmetric": Scheme(symmetric=False),
    "int4 group": INT4,
    "int4 group asymmetric": ASYMMETRIC,
    "int3 group": INT3,
    "fp8 tensor": FP8_TENSOR,
    "fp8": FP8,
    "fp8 block": FP8_BLOCK,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Noise that lies not quite around zero, with a large column and a row of zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    weight[:, 3] *= 20
    weight[1] = 0
    return weight


def arguments_of(scheme: Scheme) -> QuantizationArgs:
    """The scheme in the words of compressed-tensors."""
    rows, size = scheme.tile
    more: dict[str, Any] = {"strategy": "channel"}
    if rows is None:
        more = {"strategy": "tensor"}
    elif rows > 1:
        more = {"strategy": "block", "block_structure": [rows, size]}
    elif size is not None:
        more = {"strategy": "group", "group_size": size}
    kind = "float" if scheme.is_float else "int"
    return QuantizationArgs(num_bits=scheme.bits, type=kind, symmetric=scheme.symmetric, **more)


@pytest.mark.parametrize("name", SCHEMES)
def test_values_and_scales_are_those_of_compressed_tensors(name: str) -> None:
    """Bit for bit, so that what we write says what we meant; but that a zero of a tile without weights lies at zero."""
    scheme, arguments, weight = SCHEMES[name], arguments_of(SCHEMES[name]), drawn(200, 256)
    weight[1] += 0.5
    found = nearest(weight, scheme)
    scales, zeros = calculate_qparams(*extremes(weight, scheme), arguments)
    assert torch.equal(found.scales_TU, scales.view_as(found.scales_TU))
    if found.zeros_TU is not None:
        assert torch.equal(found.zeros_TU, zeros.to(torch.int8))
    assert (found.zeros_TU is None) == scheme.symmetric
    theirs = quantize(weight, scales, zeros, arguments, dtype=FLOAT if scheme.is_float else torch.int8)
    assert torch.equal(found.values_OI.float(), theirs.float())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_off_by_half_a_step_at_most(name: str, dtype: torch.dtype) -> None:
    """Or, of floats, by a sixteenth of itself; the highest of symmetric levels, one short of the lowest, by a whole step at
    most, and every one by another half where the zero is rounded. Zeros stay zeros."""
    scheme, weight = SCHEMES[name], drawn(200, 256).to(dtype)
    found = nearest(weight, scheme)
    steps = torch.ones(200, 256) * found.in_tiles(*map(min, found.tile, (200, 256)))._spread(found.scales_TU)
    if scheme.is_float:
        bound = torch.maximum(weight.float().abs() / 16, steps * 2.0**-10)
    else:
        bound = torch.where(found.values_OI == scheme.levels[1], 0.5001 if scheme.symmetric else 1.0, 0.5001) * steps
        bound += 0.5 * steps * (not scheme.symmetric)
    assert ((found.dequant() - weight.float()).abs() <= bound * (1 + 1e-5)).all()
    assert (found.dequant()[1] == 0).all()


def test_levels_take_all_there_are() -> None:
    """The value that is largest either way is rounded from half a step beyond the last level."""
    found = nearest(torch.tensor([[-7.5, 7.5, 1.0, 0.4, 0.5, 1.5]]), Scheme(4))
    assert found.scales_TU.item() == 1
    assert found.values_OI.tolist() == [[-8, 7, 1, 0, 0, 2]]
    found = nearest(torch.tensor([[3.5, 18.0, 10.0]]), Scheme(4, symmetric=False))
    assert found.dequant().tolist() == [[pytest.approx(3.6), pytest.approx(18.0), pytest.approx(9.6)]]


def test_scales_can_be_rounded_first() -> None:
    """Values are then the nearest by the scales that are kept."""
    weight = drawn(64, 256)
    found = nearest(weight, INT4, scale_dtype=torch.bfloat16)
    assert torch.equal(found.scales_TU, nearest(weight, INT4).scales_TU.bfloat16().float())
    assert torch.equal(found.values_OI, rounded(weight, INT4, found.scales_TU).values_OI)


def test_calibration_can_choose_the_range() -> None:
    """What lies beyond it becomes the last level."""
    weight = drawn(64, 256)
    low, high = extremes(weight, ASYMMETRIC)
    found = rounded(weight, ASYMMETRIC, *parameters(low / 2, high / 2, ASYMMETRIC))
    assert found.values_OI.aminmax() == (-8, 7)
    assert (found.dequant() - weight).abs().max() > (nearest(weight, ASYMMETRIC).dequant() - weight).abs().max()


@pytest.mark.parametrize("dtype", [FLOAT, torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.float32])
def test_every_value_that_is_no_finite_number_is_found(dtype: torch.dtype) -> None:
    """Of all that have this many bits, or of those that two bytes begin; one among finite ones."""
    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.arange(1 << 8 * min(dtype.itemsize, 2)) << (16 if dtype.itemsize == 4 else 0)
    values = patterns.to(kind).view(dtype)
    finite = values.float().isfinite()
    assert all_finite(values[finite]) and all_finite(values[:0]) and 0 < finite.sum() < len(values)
    among = torch.ones(3, 37).to(dtype)
    for value in values[~finite][:: max(1, int((~finite).sum()) // 64)]:
        among[1, 5] = value
        assert not all_finite(among)


@pytest.mark.parametrize(("weight", "message"), [
    (torch.ones(4, 48), "48 inputs do not fall into groups of 32"),
    (torch.full((4, 64), torch.nan), "not finite"),
    (torch.full((4, 64), -torch.inf), "not finite"),
])  # fmt: skip
def test_what_cannot_be_rounded_is_refused(weight: Tensor, message: str) -> None:
    """Groups are whole, and weights are numbers."""
    with pytest.raises(ValueError, match=message):
        nearest(weight, INT4)


def matrix(outputs: int, inputs: int, tile: tuple[int, int], kind: str, *, seed: int = 0) -> QuantizedMatrix:
    """Any values, with zeros, minimums or neither."""
    draw = torch.Generator().manual_seed(seed)
    tiles = (-(-outputs // tile[0]), -(-inputs // tile[1]))
    values = torch.randint(-8, 8, (outputs, inputs), generator=draw).to(torch.int8)
    scales, offsets = torch.rand(tiles, generator=draw) + 0.5, torch.randn(tiles, generator=draw)
    return QuantizedMatrix(
        values, scales, tile, 4, offsets if kind == "zeros" else None, offsets if kind == "minimums" else None
    )


SIZES, TILES = st.integers(1, 40), st.tuples(st.integers(1, 24), st.integers(1, 24))
KINDS = st.sampled_from(["plain", "zeros", "minimums"])


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, TILES, KINDS, st.data())
def test_a_part_stands_for_the_same_weights(
    outputs: int, inputs: int, tile: tuple[int, int], kind: str, data: st.DataObject
) -> None:
    """Wherever the cut goes through tiles, and of a part again."""
    whole = matrix(outputs, inputs, tile, kind)
    cuts = []
    for size in (outputs, inputs):
        start = data.draw(st.integers(0, size - 1))
        cuts.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert torch.equal(whole.part(*cuts).dequant(), whole.dequant()[cuts[0], cuts[1]])
    rest = whole.part(*cuts).part(slice(0, 1), slice(None))
    assert torch.equal(rest.dequant(), whole.dequant()[cuts[0], cuts[1]][:1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SIZES, TILES, KINDS), min_size=1, max_size=3), SIZES)
def test_joined_they_stand_for_the_same_weights(parts: list[tuple[int, tuple[int, int], str]], inputs: int) -> None:
    """Whatever tiles and offsets each has; to a rounding where zeros become minimums."""
    matrices = [matrix(size, inputs, tile, kind, seed=seed) for seed, (size, tile, kind) in enumerate(parts)]
    expected = torch.cat([each.dequant() for each in matrices])
    torch.testing.assert_close(joined(matrices).dequant(), expected, rtol=1e-6, atol=1e-5)


def test_a_shard_keeps_whole_groups_whole() -> None:
    """Two halves of 256 inputs in groups of 64, three of 576 in groups of 128, a row of a scale for all."""
    assert matrix(4, 256, (1, 64), "plain").part(slice(None), slice(128, 256)).tile == (1, 64)
    assert matrix(4, 1536, (1, 128), "plain").part(slice(None), slice(768, 1536)).tile == (1, 128)
    assert matrix(4, 960, (1, 128), "plain").part(slice(None), slice(480, 960)).tile == (1, 32)
    assert matrix(4, 256, (1, 256), "plain").part(slice(None), slice(128, 256)).tile == (1, 128)
    assert matrix(256, 256, (128, 128), "plain").part(slice(128, 256), slice(None)).tile == (128, 128)


def test_a_scale_for_each_of_several_tensors_becomes_one_for_some_rows() -> None:
    """As many as the tensors have in common."""
    parts = [matrix(size, 64, (size, 64), "plain") for size in (48, 16, 16)]
    assert joined(parts).tile == (16, 64)
    assert joined(parts).scales_TU.shape == (5, 1)


def test_sorted_inputs_are_put_back() -> None:
    """And stay together where outputs are cut or joined."""
    plain = matrix(6, 32, (1, 8), "zeros")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    ordered = QuantizedMatrix(plain.values_OI, plain.scales_TU, plain.tile, 4, plain.zeros_TU, order_I=order)
    assert torch.equal(ordered.dequant()[:, order], plain.dequant())
    assert torch.equal(ordered.part(slice(2, 5), slice(None)).dequant(), ordered.dequant()[2:5])
    assert torch.equal(joined([ordered, ordered]).dequant(), ordered.dequant().repeat(2, 1))
    with pytest.raises(ValueError, match="different orders"):
        joined([ordered, plain])


def test_kinds_do_not_mix() -> None:
    """No matrix has values of 4 and of 8 bits."""
    with pytest.raises(ValueError, match=r"different kinds \(int4, float8\)"):
        joined([nearest(drawn(8, 32), INT4), nearest(drawn(8, 32), FP8)])
