"""Numbers on their way to the device and back, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(values: object, device: torch.device, *, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of these numbers. The host does not wait for the copy to a GPU, as it would from ordinary memory."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def on_host(tensor: Tensor) -> Tensor:
    """A GPU's tensor in pinned memory, as soon as what the GPU has to do until now is done."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
