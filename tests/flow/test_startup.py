"""A service that cannot start says in its last line why, and ends with a code that means it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.mesh import ANYWHERE, command, environment


@pytest.fixture
def taken() -> Iterator[str]:
    """An address on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def refusal(*arguments: str) -> tuple[int, str]:
    """The exit code and the last line of a start that fails."""
    process = await asyncio.create_subprocess_exec(
        *arguments, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, env=environment()
    )
    _, err = await asyncio.wait_for(process.communicate(), 100)
    text = err.decode()
    assert process.returncode is not None
    assert "Traceback" not in text
    return process.returncode, text.splitlines()[-1]


@pytest.fixture
def without_weights(stories260k: Path, tmp_path: Path) -> Path:
    for file in stories260k.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


async def test_an_engine_without_a_broker_names_it(closed: str, stories260k: Path) -> None:
    """1: it may work another time."""
    code, line = await refusal(*command("engine", model=stories260k, kafka=closed, address=ANYWHERE))
    assert (code, closed in line, line.startswith("engine: ")) == (1, True, True), line


async def test_a_gateway_without_a_broker_names_it(closed: str) -> None:
    """1: it may work another time."""
    code, line = await refusal(*command("gateway", kafka=closed, address=ANYWHERE, http_address=ANYWHERE))
    assert (code, closed in line, line.startswith("gateway: ")) == (1, True, True), line


async def test_an_engine_without_weights_names_the_folder(without_weights: Path) -> None:
    """2: the user must change something."""
    settings = ["--model", str(without_weights), *_ANYWHERE_IN_ONE_PROCESS]
    code, line = await refusal(*command(), *settings)
    assert (code, str(without_weights) in line, "safetensors" in line) == (2, True, True), line


async def test_a_model_that_is_none_is_named(tmp_path: Path) -> None:
    """2, by the tokenizer as by the engine."""
    for service in ("tokenizer", "engine"):
        code, line = await refusal(*command(service, model=tmp_path, address=ANYWHERE))
        assert (code, str(tmp_path) in line) == (2, True), line


@pytest.mark.parametrize("flag", ["--gateway.address", "--gateway.http-address"])
async def test_a_taken_address_is_named_with_its_flag(taken: str, stories260k: Path, flag: str) -> None:
    """2, and the flag that chooses another."""
    addresses = dict.fromkeys(("--gateway.address", "--gateway.http-address"), ANYWHERE) | {flag: taken}
    flags = [f"{name}={address}" for name, address in addresses.items()]
    code, line = await refusal(*command(), "--model", str(stories260k), *flags)
    assert code == 2, line
    assert line.startswith(f"holdfast: cannot listen on {taken}")
    assert line.endswith(f"choose another by {flag}")


async def test_a_taken_address_is_known_before_the_model(taken: str, tmp_path: Path) -> None:
    """There is none here, and yet it is the address that is named, by us alone: no library says a word."""
    for service in ("tokenizer", "engine"):
        process = await asyncio.create_subprocess_exec(
            *command(service, model=tmp_path, address=taken), stderr=asyncio.subprocess.PIPE, env=environment()
        )
        _, err = await asyncio.wait_for(process.communicate(), 100)
        assert err.decode() == (
            f"{service}: cannot listen on {taken}: somebody else listens there; choose another by --address\n"
        )


async def test_what_one_process_decides_cannot_be_set() -> None:
    """A broker's address means nothing to a log in memory."""
    code, line = await refusal(*command(), "--gateway.kafka", "somewhere:9092")
    assert (code, "gateway.kafka" in line) == (2, True), line


_ANYWHERE_IN_ONE_PROCESS = [f"--gateway.address={ANYWHERE}", f"--gateway.http-address={ANYWHERE}"]
