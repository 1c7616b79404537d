"""The processes of a mesh, each of which may die, freeze, and come back where it was: same settings, same address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from asyncio import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mesh import ROOT, START_SECONDS, STOP_SECONDS, environment, ready_event
from holdfast.probe import probe

TRIES = 20
"""How often a process that ends before it is ready is started again: one without its broker or tokenizer does."""

PAUSE = 0.5
"""Seconds between these, as a supervisor would wait."""

REFUSES = 2
"""The exit code of a service that cannot start as it is configured: again it would be the same."""

ENGINE_FLAGS = ["--device=cpu", "--dtype=float32", "--threads=1", "--cache-bytes=268435456"]
"""Greedy texts are then the same, whatever is computed beside them."""


class FleetError(Exception):
    """A process does not start, or ended by itself; the text has where its log is."""


class Part:
    """One process, and its supervisor."""

    def __init__(self, name: str, command: Sequence[str], *, is_ready: Callable[[bytes], bool], log: Path) -> None:
        """`is_ready`: whether a line of its output says so."""
        self.name = name
        self.log = log
        self.exits: list[int] = []
        """Codes of those ends that nobody asked for."""
        self._command = command
        self._is_ready = is_ready
        self._process: subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_meant = False

    def __str__(self) -> str:
        return self.name

    async def start(self) -> None:
        """Returns when it is ready.

        Raises:
            FleetError: it ends again and again before it is.
        """
        for _ in range(TRIES):
            await self._spawn()
            async with asyncio.timeout(START_SECONDS):
                await _first(self._ready, self._ended)
            if self._ready.is_set() and not self._ended.is_set():
                return
            if self._process is not None and self._process.returncode == REFUSES:
                break
            await asyncio.sleep(PAUSE)
        raise FleetError(f"{self.name} does not start; see {self.log}")

    async def kill(self) -> None:
        """As a machine dies: at once, without a word to anybody. One that never was started is dead."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """As an orchestrator stops it.

        Raises:
            FleetError: it does not stop, or says that it failed.
        """
        if code := await self._end(signal.SIGTERM):
            raise FleetError(f"{self.name} ended with {code} when it was told to stop; see {self.log}")

    def freeze(self) -> None:
        """As a machine that is starved: it does nothing, and knows nothing of it."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """It goes on where it was."""
        self._signal(signal.SIGCONT)

    async def _spawn(self) -> None:
        self._ready.clear()
        self._ended.clear()
        self._is_meant = False
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=ROOT,
            env=environment() | {"OMP_NUM_THREADS": "1"},
            limit=1 << 20,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a broker's Java dies with it
        )
        self._reading = asyncio.create_task(self._read(self._process))

    async def _read(self, process: subprocess.Process) -> None:
        assert process.stdout is not None
        with self.log.open("ab", buffering=0) as log:
            while line := await process.stdout.readline():
                log.write(line)
                if self._is_ready(line):
                    self._ready.set()
        code = await process.wait()
        if self._ready.is_set() and not self._is_meant:
            self.exits.append(code)
        self._ended.set()

    async def _end(self, by: signal.Signals) -> int:
        if self._process is None or self._reading is None:
            return 0
        self._is_meant = True
        if self._process.returncode is None:
            if by is signal.SIGKILL:
                self._signal(by)
            else:
                self._process.send_signal(by)
            try:
                await asyncio.wait_for(asyncio.shield(self._reading), STOP_SECONDS)
            except TimeoutError as error:
                self._signal(signal.SIGKILL)
                await self._reading
                raise FleetError(f"{self.name} did not stop within {STOP_SECONDS:g} s; see {self.log}") from error
        return self._process.returncode or 0

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            os.killpg(self._process.pid, number)


async def _first(*events: asyncio.Event) -> None:
    """Returns when one of them is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()


@dataclass(frozen=True, slots=True)
class Shape:
    """How many there are of each."""

    brokers: int = 1
    tokenizers: int = 2
    engines: int = 3
    gateways: int = 2


@dataclass(frozen=True, slots=True)
class Fleet:
    """All processes of a mesh."""

    brokers: list[Part]
    tokenizers: list[Part]
    engines: list[Part]
    gateways: list[Part]
    addresses: list[str]
    """Of the gateways."""

    @property
    def parts(self) -> list[Part]:
        return [*self.brokers, *self.tokenizers, *self.engines, *self.gateways]

    @property
    def services(self) -> list[Part]:
        """All but the brokers."""
        return [*self.tokenizers, *self.engines, *self.gateways]

    async def until_ready(self) -> None:
        """Returns when every gateway takes requests: has found the log, a tokenizer and an engine.

        Raises:
            FleetError: one of them does not.
        """
        for address in self.addresses:
            why: str | None = "it does not answer"
            try:
                async with asyncio.timeout(START_SECONDS):
                    while why := await asyncio.to_thread(probe, address, timeout=1.0):  # noqa: ASYNC110 - it tells nobody
                        await asyncio.sleep(PAUSE)
            except TimeoutError as error:
                raise FleetError(f"the gateway at {address} is not ready again: {why}") from error


@asynccontextmanager
async def running(
    model: Path, shape: Shape, *, engine: Sequence[str], gateway: Sequence[str] = (), folder: Path
) -> AsyncIterator[Fleet]:
    """A mesh whose parts are all ready, with its logs and records in `folder`. `engine`, `gateway`: further flags of these."""
    fleet = _fleet(model, shape, engine=engine, gateway=gateway, folder=folder)
    try:
        await asyncio.gather(*(part.start() for part in fleet.brokers))
        await asyncio.gather(*(part.start() for part in fleet.tokenizers))
        await asyncio.gather(*(part.start() for part in [*fleet.engines, *fleet.gateways]))
        yield fleet
    finally:
        await asyncio.gather(*(part.kill() for part in fleet.parts))


def _fleet(model: Path, shape: Shape, *, engine: Sequence[str], gateway: Sequence[str], folder: Path) -> Fleet:
    folder.mkdir(parents=True, exist_ok=True)
    ports = iter(_free_ports(2 * shape.brokers + shape.tokenizers + 2 * shape.gateways))

    def address() -> str:
        return f"127.0.0.1:{next(ports)}"

    def service(name: str, number: int, *flags: str) -> Part:
        command = [sys.executable, "-m", f"services.{name}", *flags]
        return Part(
            f"{name}-{number}",
            command,
            is_ready=lambda line: ready_event(line) is not None,
            log=folder / f"{name}-{number}.log",
        )

    brokers, bootstrap = _brokers(shape.brokers, [next(ports) for _ in range(2 * shape.brokers)], folder)
    spellers = [address() for _ in range(shape.tokenizers)]
    doors = [(address(), address()) for _ in range(shape.gateways)]
    return Fleet(
        brokers,
        [
            service("tokenizer", number, f"--model={model}", f"--address={at}", "--threads=1")
            for number, at in enumerate(spellers)
        ],
        [
            service("engine", number, f"--model={model}", f"--kafka={bootstrap}", f"--name=engine-{number}", *engine)
            for number in range(shape.engines)
        ],
        [
            service(
                "gateway",
                number,
                f"--address={grpc}",
                f"--http-address={http}",
                f"--kafka={bootstrap}",
                f"--tokenizer={','.join(spellers)}",
                "--cursor-keys=sixteen bytes or more",
                *gateway,
            )
            for number, (grpc, http) in enumerate(doors)
        ],
        [grpc for grpc, _ in doors],
    )


def _brokers(count: int, ports: Sequence[int], folder: Path) -> tuple[list[Part], str]:
    """Their processes, and where clients find them."""
    listeners, controllers = ports[:count], ports[count:]
    quorum = ",".join(f"127.0.0.1:{port}" for port in controllers)
    program = str(ROOT / "deploy" / "kafka" / "broker.py")
    brokers = []
    for node, port in enumerate(listeners):
        home = folder / f"broker-{node}"
        flags = [f"--folder={home}", f"--port={port}", f"--quorum={quorum}", f"--node={node}"]
        command = [sys.executable, program, "run", *flags]
        brokers.append(Part(home.name, command, is_ready=_says_address, log=folder / f"{home.name}.log"))
    return brokers, ",".join(f"127.0.0.1:{port}" for port in listeners)


def _says_address(line: bytes) -> bool:
    return line.startswith(b"127.0.0.1:")


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to whoever asks for any: a process that is away for a while finds its own free."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found
