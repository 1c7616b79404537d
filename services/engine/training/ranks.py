"""Several processes that train one model, each on its share of every step: `torchrun --nproc-per-node N -m services.engine.training ...`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from holdfast.errors import ConfigurationError
from services.engine.training.plan import Gradients

POWERSGD_RANK = 4
"""Columns of the thin matrices; Vogels et al. use 2 or 4."""

POWERSGD_AFTER = 100
"""Steps whose gradients are exchanged whole: those of the beginning have no low rank yet (torch's own advice is a tenth of all)."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it writes files and talks."""
        return self.rank == 0

    def share(self, batch: int) -> range:
        """Which windows of a step are its own. Raises `ConfigurationError` where they do not divide."""
        if batch % self.count:
            raise ConfigurationError(
                f"batch is {batch}, and {self.count} ranks cannot share that equally; give a multiple of {self.count}"
            )
        size = batch // self.count
        return range(self.rank * size, (self.rank + 1) * size)

    def wrapped(self, model: nn.Module, gradients: Gradients) -> nn.Module:
        """The model whose gradients are means over all ranks, exchanged in this form; alone, the model itself."""
        if self.count == 1:
            return model
        shared = DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        if gradients == "bfloat16":
            shared.register_comm_hook(None, default_hooks.bf16_compress_hook)
        elif gradients == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_AFTER
            )
            shared.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return shared

    def mean(self, value: Tensor) -> Tensor:
        """Over all ranks."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Those that `torchrun` started, or this process alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count == 1:
        yield Ranks(place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(place, dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
