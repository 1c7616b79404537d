"""One rank's part of a model that several ranks compute together.

The ranks hold the same activations between layers. Of a layer each holds some heads, some features of the MLP or some
experts, and of the vocabulary some rows; what it computes with them is a part of a sum, which `all_reduce` completes, or
a part of a row, which `all_gather` completes (Shoeybi et al. 2019, "Megatron-LM", section 3). What enters a sum as a
whole - the residual, the bias of a product that is summed - is added on one rank, which `once` chooses.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.settings import MOST_RANKS

T = TypeVar("T")

_COUNTS = range(1, MOST_RANKS + 1)


@dataclass(frozen=True, slots=True)
class Part:
    """The places [start, start + count) of `of`."""

    start: int
    count: int
    of: int

    @property
    def is_whole(self) -> bool:
        """Whether they are all there are."""
        return self.count == self.of

    @property
    def others(self) -> tuple[int, ...]:
        """The places that are not among them."""
        return (*range(self.start), *range(self.start + self.count, self.of))

    def times(self, width: int) -> Part:
        """The same where each place is so many wide."""
        return Part(self.start * width, self.count * width, self.of * width)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of how many ranks this is. The only one holds everything, and has nobody to ask.

    With several, the process must have joined their process group, and every rank must call the collectives in the same
    order."""

    rank: int = 0
    count: int = 1

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def part(self, of: int, what: str) -> Part:
        """Its part where all but the last are equally large. Raises `ConfigurationError` if it would be empty."""
        size = -(-of // self.count)
        start = min(self.rank * size, of)
        if start == of:
            fit = [count for count in _COUNTS if (count - 1) * -(-of // count) < of]
            raise ConfigurationError(
                f"tensor_parallel is {self.count}: too many for the model's {of} {what}, which can be shared by {_listed(fit)}"
            )
        return Part(start, min(size, of - start), of)

    def even_part(self, of: int, what: str) -> Part:
        """Its part where all are equally large. Raises `ConfigurationError` if they cannot be."""
        if of % self.count:
            raise self._uneven(of, what, fit=[count for count in _COUNTS if of % count == 0])
        return self.part(of, what)

    def shared_part(self, of: int, what: str) -> Part:
        """As `even_part`; but where there are fewer than ranks, neighbours hold the same one."""
        if self.count % of == 0:
            return Part(self.rank * of // self.count, 1, of)
        if of % self.count:
            raise self._uneven(of, what, fit=[count for count in _COUNTS if of % count == 0 or count % of == 0])
        return self.part(of, what)

    def _uneven(self, of: int, what: str, *, fit: Sequence[int]) -> ConfigurationError:
        return ConfigurationError(
            f"tensor_parallel is {self.count}, but the model's {of} {what} cannot be shared evenly by so many, only by {_listed(fit)}"
        )

    def once(self, value: T) -> T | None:
        """The value on the first rank, None on the others: what enters a sum a single time."""
        return value if self.rank == 0 else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in the place of `x`."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x_RV: Tensor, part: Part) -> Tensor:
        """The columns of all ranks side by side, [R, part.of]. `x_RV` holds those of this rank, its `part` of them."""
        if self.count == 1:
            return x_RV
        size = -(-part.of // self.count)
        own_RS = F.pad(x_RV, (0, size - part.count)).contiguous()
        all_CRS = own_RS.new_empty((self.count * len(own_RS), size))
        dist.all_gather_into_tensor(all_CRS, own_RS)
        all_RCS = all_CRS.view(self.count, -1, size).transpose(0, 1)
        return all_RCS.reshape(len(x_RV), -1)[:, : part.of].contiguous()

    def least(self, number: int, device: torch.device) -> int:
        """The smallest number that any rank gave."""
        if self.count == 1:
            return number
        numbers = torch.tensor([number], device=device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MIN)
        return int(numbers)

    def join(self, port: int, device: torch.device) -> None:
        """Joins the others, who meet at the `TCPStore` on this port of the machine; returns when all are there. There is no
        way to leave but the process's end: NCCL would wait for others that may be gone, and for steps that are captured."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on one machine, whose name may mean nothing
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast wants a fabric manager that virtual machines lack
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.TCPStore("127.0.0.1", port, is_master=False),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.count,
            device_id=device if device.type == "cuda" else None,
        )


def _listed(counts: Sequence[int]) -> str:
    *others, last = map(str, counts)
    return f"{', '.join(others)} or {last}" if others else last


@contextmanager
def meeting_point() -> Iterator[int]:
    """Where ranks of this machine find each other: the port of a store that this process keeps, for this machine alone."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        # The store closes what it listens on; by itself it would listen to the whole network.
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listening.fileno())
        )
        yield port
        del store


ALONE = Shard()
"""The only rank."""
