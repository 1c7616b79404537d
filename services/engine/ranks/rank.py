"""One rank: a process that computes its shard of every step, and asks nobody why."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import structlog
import torch

from holdfast.errors import ConfigurationError
from holdfast.telemetry import configure_logs
from services.engine.batch import Step
from services.engine.build import Computer, build, device_of
from services.engine.model_runner import Launched
from services.engine.ranks.messages import (
    Failed,
    ReadBlock,
    Ready,
    Refused,
    Report,
    Stop,
    WriteBlock,
    packed_result,
    unpacked,
)
from services.engine.ranks.ring import Reader, Ring, Writer
from services.engine.settings import EngineSettings
from services.engine.shard import Shard

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Links:
    """What a rank has in common with the front."""

    orders: Ring
    """To all ranks."""
    results: Ring
    """From the first rank."""
    parts: Ring
    """Of blocks, from this one."""
    reports: Connection
    """From this one: that it is ready, and why it ends."""
    port: int
    """Where the ranks meet."""


def run(shard: Shard, settings: EngineSettings, folder: Path, links: Links, *, service: str, log_level: str) -> None:
    """The whole life of a rank's process. It ends by an order, with an error, or with the front, whatever it does then."""
    threading.Thread(target=_end_with_the_front, daemon=True).start()
    configure_logs(service, level=log_level)
    structlog.contextvars.bind_contextvars(rank=shard.rank)
    try:
        _live(shard, settings, folder, links)
    except ConfigurationError as error:
        _report(links, Refused(str(error)))
    except BaseException as error:
        log.exception("the rank failed")
        _report(links, Failed(f"{type(error).__name__}: {error}"))
    else:
        _leave(code=0)
    _leave(code=1)


def _live(shard: Shard, settings: EngineSettings, folder: Path, links: Links) -> None:
    device = device_of(settings, shard)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shard.join(links.port, device)
    computer = build(settings, folder, shard)
    links.reports.send(Ready(computer.facts))
    _obey(shard, computer, links)


def _obey(shard: Shard, computer: Computer, links: Links) -> None:
    """Does what is ordered, in order. Steps are launched before older ones are collected: as far ahead as the front sends
    them."""
    orders, results, parts = Reader(links.orders, shard.rank), Writer(links.results), Writer(links.parts)
    in_flight: deque[Launched] = deque()
    while True:
        if in_flight and not orders.has_message:
            results.send(packed_result(computer.runner.collect(in_flight.popleft())))
            continue
        match unpacked(orders.receive()):
            case Step() as step:
                launched = computer.runner.launch(step)
                if shard.rank == 0:  # the others would say the same
                    in_flight.append(launched)
            case ReadBlock(block):
                parts.send(computer.cache.read_block(block))
            case WriteBlock(block, content):
                size = computer.cache.block_bytes
                computer.cache.write_block(block, memoryview(content)[shard.rank * size :][:size])
            case Stop():
                return


def _report(links: Links, last: Report) -> None:
    with contextlib.suppress(OSError):  # the front may be gone
        links.reports.send(last)


def _leave(*, code: int) -> None:
    """Ends the process, and takes nothing down (see `Shard.join`)."""
    logging.shutdown()
    os._exit(code)


def _end_with_the_front() -> None:
    """However it ended, and even where this process waits for a device or another rank."""
    front = multiprocessing.parent_process()
    assert front is not None
    wait([front.sentinel])
    os._exit(1)
