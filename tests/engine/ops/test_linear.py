"""Products with packed weights against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.ops.linear import linear, packed


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 70])
@pytest.mark.parametrize("outputs", [48, 9000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_add", [False, True])
def test_packed_weights_multiply_as_they_were(
    dtype: torch.dtype, rows: int, outputs: int, with_bias: bool, with_add: bool
) -> None:
    """Whether a matrix is laid out anew or not, x @ weight.T + bias + add comes out, for any number of rows."""
    x, weight = noise(rows, 32, dtype=dtype), noise(outputs, 32, dtype=dtype)
    bias = noise(outputs, dtype=dtype) if with_bias else None
    add = noise(rows, outputs, dtype=dtype) if with_add else None
    kept = None if add is None else add.clone()
    out = linear(x, packed(weight), bias_O=bias, add=add)
    expected = x.double() @ weight.double().T
    for term in (bias, add):
        expected = expected if term is None else expected + term.double()
    assert out.dtype is dtype
    # A few roundings of terms as large as the largest product.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=128 * torch.finfo(dtype).eps)
    assert kept is None or torch.equal(kept, add), "add is read only"
