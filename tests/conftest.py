"""Fixtures that every part uses."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from xdist.scheduler import LoadFileScheduling

from deploy.kafka import broker
from holdfast.bus import Bus
from holdfast.kafka import KafkaBus
from holdfast.memory import MemoryBus

ROOT = Path(__file__).parents[1]

OpenBus = Callable[[], AbstractAsyncContextManager[Bus]]
"""Opens one more connection to the same log, as one more process would."""


class ByFile(LoadFileScheduling):
    """Where several processes share the tests: a file is one's, with the models and the broker that it has made, and so is all that needs
    the GPU."""

    def _split_scope(self, nodeid: str) -> str:
        return "gpu" if nodeid.startswith("tests/gpu/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    """For `--dist loadfile` alone: a large GPU's tests may well be shared out, by another way."""
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def missing(what: str) -> None:
    """Skips the test on a laptop and fails it on CI, where nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and CI is set")
    pytest.skip(what)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged in this test. Not what grpc's poller, one for the whole process, says where it delivers something to
    the event loop of an earlier test, which is closed."""
    return [record.getMessage() for record in caplog.records if not _is_late(record)]


def _is_late(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "PollerCompletionQueue" in record.getMessage() and str(error) == "Event loop is closed"


@pytest.fixture(autouse=True)
def numbers_are_drawn_anew() -> None:
    """What a test draws from torch's own generator is the same in every run, whichever tests ran before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout, or where `HOLDFAST_SHARED` says it is."""
    folder = Path(os.environ.get("HOLDFAST_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        missing(f"no shared data at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A tiny trained Llama whose greedy text is published."""
    return shared / "data" / "checkpoints" / "stories260k"


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers draws progress bars and says which kernels it lacks."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So that sums are those of every machine, and threads do not wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """The address of a real broker: the one that `HOLDFAST_TEST_KAFKA` names, or one of our own."""
    if address := os.environ.get("HOLDFAST_TEST_KAFKA"):
        yield address
        return
    with ExitStack() as stack:
        try:
            address = stack.enter_context(broker.running())
        except broker.BrokerError as error:
            missing(f"no Kafka broker: {error}")
        yield address


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def open_bus(request: pytest.FixtureRequest) -> AsyncIterator[OpenBus]:
    """Opens connections to one log that is empty at first and this test's alone. The test runs once for each kind of
    log. In memory all connections are one object, as they are when all services share a process."""
    if request.param == "memory":
        async with MemoryBus() as shared_bus:
            yield lambda: _shared(shared_bus)
    else:
        async with _namespace(request.getfixturevalue("kafka")) as (address, namespace):
            yield lambda: KafkaBus(address, namespace=namespace, heartbeat=0.1)


@pytest.fixture
async def bus(open_bus: OpenBus) -> AsyncIterator[Bus]:
    """An open connection to the log of `open_bus`."""
    async with open_bus() as opened:
        yield opened


@asynccontextmanager
async def _shared(bus: MemoryBus) -> AsyncIterator[Bus]:
    yield bus


@asynccontextmanager
async def _namespace(address: str) -> AsyncIterator[tuple[str, str]]:
    """A broker's address and a prefix for topics, deleted afterwards."""
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    yield address, namespace
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    try:
        if names := [name for name in await admin.list_topics() if name.startswith(namespace)]:
            await admin.delete_topics(names)
    finally:
        await admin.close()
