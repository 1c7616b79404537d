"""Rounding that makes up for itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.calibrate.gptq import Factor, gptq
from services.engine.calibrate.scales import Search
from services.engine.quant.matrix import QuantizedMatrix, Scheme, nearest, rounded
from services.engine.weight_format import Method

OUTPUTS, INPUTS, DAMPING = 24, 96, 0.01
SCHEMES = {
    "int4 group": Scheme(4, tile=(1, 32)),
    "int4 group asymmetric": Scheme(4, tile=(1, 16), symmetric=False),
    "int3 channel": Scheme(3),
    "int4 tensor": Scheme(4, tile=(None, None)),
    "fp8 block": Scheme(is_float=True, tile=(16, 64)),
}


def drawn() -> tuple[Tensor, Tensor]:
    """Weights, and inputs that go together, some much more than others."""
    draw = torch.Generator().manual_seed(0)
    common_NI = torch.randn(400, 24, generator=draw) @ torch.randn(24, INPUTS, generator=draw) / 5
    sizes_I = torch.logspace(-0.7, 0.7, INPUTS)[torch.randperm(INPUTS, generator=draw)]
    x_NI = (common_NI + torch.randn(400, INPUTS, generator=draw) / 2) * sizes_I
    return torch.randn(OUTPUTS, INPUTS, generator=draw), x_NI


def reference(weight: Tensor, x_NI: Tensor, scheme: Scheme, *, act_order: bool) -> Tensor:
    """The same by its definition, in float64: an input is rounded, and the others that are not yet are those of the least squares."""
    hessian = x_NI.double().t() @ x_NI.double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(INPUTS)
    weight = weight.double().clone()
    width = scheme.tile_of(weight.shape)[1]
    as_reached = not act_order and scheme.tile[0] == 1 and width < INPUTS
    first = nearest(weight.float(), scheme)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(INPUTS))
    for step, each in enumerate(order):
        if as_reached and each % width == 0:
            group = slice(each, each + width)
            reached = nearest(weight[:, group].float(), scheme)
        if as_reached:
            tile, grid = slice(each - each % width, each - each % width + width), reached
            whole = weight[:, tile]
        else:
            whole, grid = weight, first
        back = rounded(whole.float(), scheme, grid.scales_TU, grid.zeros_TU).dequant().double()
        change = back[:, each % width if as_reached else each] - weight[:, each]
        weight[:, each] += change
        rest = order[step + 1 :]
        if rest:
            answer = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, each])
            weight[:, rest] -= change[:, None] * answer
    return weight


def made(weight: Tensor, x_NI: Tensor, scheme: Scheme, *, act_order: bool) -> QuantizedMatrix:
    factor = Factor.of(x_NI.t() @ x_NI, act_order=act_order, damping=DAMPING)
    return gptq(weight, factor, Search(Method.ABSMAX, scheme))


def error(weight: Tensor, other: Tensor, x_NI: Tensor) -> float:
    return float(((other - weight) @ x_NI.t()).norm() / (weight @ x_NI.t()).norm())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_it_solves_the_least_squares_of_every_input(name: str, act_order: bool) -> None:
    """As solving them one by one does, which takes O(n^3) for each. Where a weight lies between two levels to within float32 the two may part:
    in a row of a few at the most."""
    scheme, (weight, x_NI) = SCHEMES[name], drawn()
    found = made(weight, x_NI, scheme, act_order=act_order).dequant()
    expected = reference(weight, x_NI, scheme, act_order=act_order).float()
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(1)
    assert same.float().mean() > 0.9
    assert error(weight, found, x_NI) == pytest.approx(error(weight, expected, x_NI), rel=0.01)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_nearer_than_of_weights_rounded_to_the_nearest(name: str, act_order: bool) -> None:
    """Clearly, for inputs that go together."""
    scheme, (weight, x_NI) = SCHEMES[name], drawn()
    found = made(weight, x_NI, scheme, act_order=act_order)
    assert error(weight, found.dequant(), x_NI) < 0.8 * error(weight, nearest(weight, scheme).dequant(), x_NI)
    assert found.order_I is None


def test_inputs_that_were_never_seen_are_rounded_to_the_nearest() -> None:
    """Nothing is known of them; their weights stay."""
    weight, x_NI = drawn()
    x_NI[:, 7] = 0
    scheme = Scheme(8)
    found = made(weight, x_NI, scheme, act_order=True)
    assert torch.equal(found.values_OI[:, 7], nearest(weight, scheme).values_OI[:, 7])


def test_squares_that_cannot_be_inverted_are_refused() -> None:
    """With what would help."""
    products = torch.full((8, 8), float("inf"))
    with pytest.raises(ValueError, match=r"cannot be inverted; give more calibration text, or more damping than 0\.01"):
        Factor.of(products, act_order=False, damping=0.01)
