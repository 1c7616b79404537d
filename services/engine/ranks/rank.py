"""One rank: a process that computes its shard of every step, and asks nobody why."""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections import deque
from pathlib import Path

import structlog
import torch

from holdfast.errors import ConfigurationError
from holdfast.telemetry import configure_logs
from services.engine.batch import Step
from services.engine.build import Computer, build, device_of
from services.engine.model_runner import Launched
from services.engine.ranks.child import Links
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
from services.engine.ranks.ring import Reader, Writer
from services.engine.settings import EngineSettings
from services.engine.shard import Shard

log = structlog.stdlib.get_logger(__name__)


def run(shard: Shard, settings: EngineSettings, folder: Path, links: Links, *, service: str, log_level: str) -> None:
    """The rest of a rank's life. It ends by an order or with an error."""
    configure_logs(service, level=log_level)
    structlog.contextvars.bind_contextvars(rank=shard.rank)
    try:
        _live(shard, settings, folder, links)
    except ConfigurationError as error:
        _report(links, Refused(str(error)))
    except BaseException as error:  # noqa: BLE001 - the front must hear why
        why = f"{type(error).__name__}: {error}"
        log.error("the rank failed", why=why)  # perhaps only as another did: the front knows whose traceback helps
        _report(links, Failed(why, traceback.format_exc()))
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
