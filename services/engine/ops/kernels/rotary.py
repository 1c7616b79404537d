"""The angles by which positions turn queries and keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def angles(positions_N: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `ops.rotary.angles`: cosine and signed sine, [N, 1, D] each."""
    num_tokens, half = len(positions_N), frequencies.shape[-1]
    cos = torch.empty((num_tokens, 1, 2 * half), dtype=torch.float32, device=positions_N.device)
    sin = torch.empty_like(cos)
    width = triton.next_power_of_2(half)
    _angles[(num_tokens,)](positions_N, frequencies, cos, sin, scale, HALF=half, WIDTH=width, num_warps=1)
    return cos, sin


@triton.jit
def _angles(positions, frequencies, cos, sin, scale, HALF: tl.constexpr, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < HALF
    turn = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + place, mask=inside, other=0.0)
    c, s = tl.cos(turn) * scale, tl.sin(turn) * scale
    at = token * 2 * HALF + place
    tl.store(cos + at, c, mask=inside)
    tl.store(cos + at + HALF, c, mask=inside)
    tl.store(sin + at, -s, mask=inside)
    tl.store(sin + at + HALF, s, mask=inside)
