"""What is kept of inputs."""

from __future__ import annotations

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.calibrate.statistics import Magnitudes, Moments
from services.engine.weight_format import Method


def drawn() -> torch.Tensor:
    """Noise with a few values far out."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=draw)
    x[torch.rand(x.shape, generator=draw) < 1e-4] *= 30
    return x


def scale(x: torch.Tensor, method: Method, *, percentile: float = 99.0) -> float:
    seen = Magnitudes(torch.ones(x.shape[1]))
    for part in x.split(300):
        seen.add(part)
    return seen.scale(method, percentile=percentile, names=("a",))


def squared_error(x: torch.Tensor, scale: float) -> float:
    return float(((x / scale).round().clamp(-127, 127) * scale - x).square().sum())


def test_moments_tell_the_error_of_products() -> None:
    """Of any change of the weights, without the inputs; after inputs were divided too."""
    x = drawn()
    moments = Moments(16)
    for part in x.split(300):
        moments.add(part)
    change = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(16) + 0.5
    for divided in (x, x / scales):
        found = ((change @ moments.products_II) * change).sum()
        torch.testing.assert_close(found, (change @ divided.t()).square().sum(), rtol=1e-4, atol=0)
        torch.testing.assert_close(moments.largest_I, divided.abs().amax(0))
        torch.testing.assert_close(moments.mean_I, divided.abs().mean(0))
        torch.testing.assert_close(moments.squares_I, divided.square().sum(0), rtol=1e-4, atol=0)
        moments.divide(scales)


def test_absmax_cuts_nothing_off_and_a_percentile_what_it_says() -> None:
    """To the width of a bin, 1.1 %."""
    x = drawn()
    assert scale(x, Method.ABSMAX) * 127 == pytest.approx(float(x.abs().max()))
    assert scale(x, Method.PERCENTILE) * 127 == pytest.approx(float(x.abs().flatten().quantile(0.99)), rel=0.012)


def test_the_search_finds_about_the_least_squared_error() -> None:
    """Of all limits, by trying them on the values themselves."""
    x = drawn()
    found = squared_error(x, scale(x, Method.MSE))
    best = min(squared_error(x, float(x.abs().max()) * ratio / 127) for ratio in torch.linspace(0.02, 1, 200).tolist())
    assert found < 1.05 * best
    assert found < 0.9 * squared_error(x, scale(x, Method.ABSMAX))


@pytest.mark.parametrize(
    ("value", "what"), [(float("nan"), "other than finite"), (float("inf"), "other than finite"), (0.0, "all zero")]
)
def test_activations_that_say_nothing_are_refused(value: float, what: str) -> None:
    """With the matrices that are given them."""
    x = torch.full((4, 4), value)
    with pytest.raises(ConfigurationError, match=f"a: activations cannot be given a static scale.*{what}"):
        scale(x, Method.MSE)
    if value:
        moments = Moments(4)
        moments.add(x)
        with pytest.raises(ConfigurationError, match="a, b: the calibration text makes inputs that are not finite"):
            moments.check("a", "b")
