"""A service's life, in real processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
from contextlib import asynccontextmanager
from typing import Annotated
from pydantic import Field
from holdfast.errors import CannotListen, ConfigurationError, Unavailable
from holdfast.service import run
from holdfast.settings import Settings
import asyncio

class BellSettings(Settings, env_prefix="HOLDFAST_BELL_"):
    rings: Annotated[int, Field(ge=1)] = 1
    fault: str = ""
    tower: str = "tower:1"
    address: str = ""
    bells_address: str = ""

@asynccontextmanager
async def serve(settings):
    async with asyncio.TaskGroup() as tasks:
        if settings.fault == "configuration":
            raise ConfigurationError("the bell has no clapper")
        if settings.fault == "address":
            raise CannotListen(settings.tower)
        if settings.fault == "log":
            raise Unavailable("the tower cannot be reached")
        if settings.fault == "never ready":
            print("waiting", flush=True)
            await asyncio.Event().wait()
        print("open", flush=True)
        try:
            yield
        finally:
            print("closed", flush=True)
            if settings.fault == "never drained":
                await asyncio.Event().wait()

run("bell", BellSettings, serve)
"""


def bell(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_signal_drains_and_ends_with_success() -> None:
    """SIGTERM leaves the service's block, then the process."""
    with bell() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "closed\n"), err


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_drain_that_would_never_end(second: signal.Signals) -> None:
    """At once, and whoever started the process sees by which signal."""
    with bell("--fault", "never drained") as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "open\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "closed\n"
            process.send_signal(second)
            assert process.wait(timeout=30) == -second
        finally:
            process.kill()


def test_a_service_that_cannot_start_says_why_in_its_last_line() -> None:
    """2 for what the user must change, 1 for what failed; no traceback."""
    for flags, code, text in (
        (["--rings", "0"], 2, "--rings"),
        (["--fault", "configuration"], 2, "the bell has no clapper"),
        (["--fault", "address"], 2, "cannot listen on tower:1: it is in use, or not an address of this host; "),
        (["--fault", "address"], 2, "choose another by --tower"),
        (["--fault", "log"], 1, "the tower cannot be reached"),
    ):
        with bell(*flags) as process:
            _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert err.splitlines()[-1].startswith("bell: ")
        assert text in err.splitlines()[-1]
        assert "Traceback" not in err


def test_an_address_is_looked_at_before_the_start() -> None:
    """Every setting that is one; what is wrong with it is said with the flag that chooses another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        for flags, why in (
            (
                ["--address", taken],
                f"cannot listen on {taken}: somebody else listens there; choose another by --address",
            ),
            (["--address=127.0.0.1:0", f"--bells-address={taken}"], "choose another by --bells-address"),
            (["--address", "192.0.2.1:80"], "it is no address of this host"),
            (["--address", "127.0.0.1"], "cannot listen on 127.0.0.1: it must be host:port"),
            (["--address", "127.0.0.1:many"], "it must be host:port"),
            (["--address", "127.0.0.1:70000"], "the port at most 65535"),
        ):
            with bell(*flags, "--fault", "never ready") as process:
                try:
                    out, err = process.communicate(timeout=30)
                finally:
                    process.kill()
            assert (process.returncode, out) == (2, ""), err
            (line,) = err.splitlines()
            assert why in line


def test_a_signal_before_a_service_is_ready_ends_its_start() -> None:
    """One that waits for another part of the mesh can be stopped like any other."""
    with bell("--fault", "never ready") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
