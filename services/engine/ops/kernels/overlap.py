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


def overlapped(x: Tensor) -> dict[str, Any]:
    """How to launch a kernel on the device of x so that it overlaps with the one before. For a kernel whose argument
    OVERLAP says whether to `wait`."""
    return {"OVERLAP": True, "launch_pdl": True} if x.is_cuda and _is_able(x.device) else {"OVERLAP": False}


@cache
def _is_able(device: torch.device) -> bool:
    """Hopper is the first that is."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Until the kernels before are done; then the one behind may be set up."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
