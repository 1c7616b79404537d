"""To which weights the levels reach."""

from __future__ import annotations

import pytest
import torch

from services.engine.calibrate.scales import Search
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest, rounded, tiles_of
from services.engine.weight_format import Method

SCHEMES = {
    "int8": Scheme(),
    "int8 tensor": Scheme(tile=(None, None)),
    "int4 group": Scheme(4, tile=(1, 32)),
    "int4 group asymmetric": Scheme(4, tile=(1, 32), symmetric=False),
    "fp8": Scheme(is_float=True),
    "fp8 block": Scheme(is_float=True, tile=(128, 128)),
}


def drawn() -> torch.Tensor:
    """Noise with a few weights that stand out."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 160, generator=draw) + 0.1
    weight[torch.rand(weight.shape, generator=draw) < 0.005] *= 8
    return weight


def made(search: Search, weight: torch.Tensor) -> QuantizedMatrix:
    return rounded(weight, search.scheme, *search(weight))


@pytest.mark.parametrize("name", SCHEMES)
def test_absmax_is_rounding_to_the_nearest(name: str) -> None:
    """Bit for bit what the engine does itself."""
    weight, scheme = drawn(), SCHEMES[name]
    expected = nearest(weight, scheme)
    found = made(Search(Method.ABSMAX, scheme), weight)
    assert torch.equal(found.dequant(), expected.dequant())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_search_leaves_no_tile_worse(name: str) -> None:
    """And makes most tiles of four bits better; each by itself, inputs counting by their importance."""
    weight, scheme = drawn(), SCHEMES[name]
    importance = torch.logspace(-2, 1, 160)

    def errors(matrix: QuantizedMatrix) -> torch.Tensor:
        return tiles_of((matrix.dequant() - weight).square() * importance, scheme).sum((1, 3))

    before = errors(nearest(weight, scheme))
    after = errors(made(Search(Method.MSE, scheme, importance_I=importance), weight))
    assert (after <= before * (1 + 1e-5)).all()
    if scheme.bits == 4:
        assert (after < before).float().mean() > 0.5
        assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_cuts_off_so_many(symmetric: bool) -> None:
    """Of the weights of each row, one in twenty; all of the others lie within half a step."""
    weight, scheme = drawn(), Scheme(8, symmetric=symmetric)
    found = made(Search(Method.PERCENTILE, scheme, percentile=95), weight)
    beyond = (found.dequant() - weight).abs() > found.scales_TU * 0.51
    assert beyond.float().mean() == pytest.approx(0.05, abs=0.012)
    assert torch.equal(
        made(Search(Method.PERCENTILE, scheme, percentile=100), weight).scales_TU, nearest(weight, scheme).scales_TU
    )


def test_scales_are_rounded_before_they_are_used() -> None:
    """So that what is written in 16 bits is what was meant."""
    for method in (Method.ABSMAX, Method.PERCENTILE, Method.MSE):
        scales, _ = Search(method, SCHEMES["int4 group"], torch.bfloat16)(drawn())
        assert torch.equal(scales.bfloat16().float(), scales)


def test_weights_that_are_not_finite_are_refused() -> None:
    """By every method."""
    weight = drawn()
    weight[3, 4] = float("nan")
    for method in (Method.ABSMAX, Method.PERCENTILE, Method.MSE):
        with pytest.raises(ValueError, match="weights that are not finite"):
            Search(method, SCHEMES["int8"])(weight)
