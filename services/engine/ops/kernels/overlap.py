"""Programmatic dependent launch: a kernel is set up while the one before it ends.

A kernel that is launched so must wait before it touches anything that the kernel before it writes; weights it may read
earlier. Since every kernel waits, one that has waited knows that all before it are done, not only the last. And since none lets
the next be set up before it has waited itself, one that is set up finds all done but the last: what is two kernels old - where
tokens stand, the angles of a step - may be read early as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_IS_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
_BYTES_AHEAD = 512
"""Of each row of a matrix: with them a step of 128 or 256 sequences in fp8 takes 1.2 % less time on an H200, one of 32 0.3 %."""


def overlapped(x: Tensor) -> dict[str, Any]:
    """How to launch a kernel on the device of x so that it overlaps with the one before. For a kernel whose argument
    OVERLAP says whether to `wait`."""
    return {"OVERLAP": True, "launch_pdl": True} if x.is_cuda and _is_able(x.device) else {"OVERLAP": False}


@cache
def _is_able(device: torch.device) -> bool:
    """Hopper is the first that is."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def bytes_ahead(most: int) -> int:
    """How much of a row of a matrix, of which a program reads so much, is worth to `prefetch`: a power of two."""
    return 1 << min(_BYTES_AHEAD, most).bit_length() - 1


@triton.jit
def prefetch(at, NUM_BYTES: tl.constexpr):
    """Has so many bytes, a power of two, from each of these addresses on brought into the L2 cache."""
    LINES: tl.constexpr = (NUM_BYTES + 127) // 128
    if _IS_COMPILED:
        lines = at.to(tl.int64)[:, None] + tl.arange(0, LINES)[None, :] * 128
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until the kernels before are done; then the one behind may be set up."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
