"""Norm, rotation and gate against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.ops.activation import silu_mul
from services.engine.ops.norm import rms_norm
from services.engine.ops.rotary import rotate_

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, roundings: int) -> None:
    """So many roundings of the dtype apart at most."""
    assert actual.dtype is dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=roundings * eps, atol=roundings * eps)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (200, 24), (5, 3, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    """For few rows and many, of two dimensions or three, and where eps decides."""
    x, weight, eps = noise(*shape, dtype=dtype) * scale, 1 + 0.1 * noise(24, dtype=dtype), 1e-5
    x64 = x.double()
    expected = x64 / (x64.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    check(rms_norm(x, weight, eps), expected, dtype, roundings=8)


@DTYPES
@pytest.mark.parametrize("rows", [1, 33])
def test_silu_mul_gates_the_second_half(dtype: torch.dtype, rows: int) -> None:
    """silu(gate) * up, for contiguous halves of the last dimension."""
    gate_up = noise(rows, 40, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    check(silu_mul(gate_up), expected, dtype, roundings=4)


@DTYPES
def test_rotation_turns_pairs_in_place(dtype: torch.dtype) -> None:
    """Feature i and i + D/2 of every head are turned by their angle, in the memory they lie in, beside others."""
    qkv = noise(5, 6, 16, dtype=dtype)
    before, angles = qkv.double(), noise(5, 1, 8).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    rotate_(qkv[:, :4], torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    first, second = before[:, :4].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    check(qkv[:, :4], turned, dtype, roundings=2)
    assert torch.equal(qkv[:, 4:].double(), before[:, 4:])
