"""The health check of the images."""

from __future__ import annotations

import asyncio
import sys

from holdfast.rpc import serving


async def probe(address: str) -> tuple[int, str]:
    """Runs the program as a container does: its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "holdfast.probe", address, "--timeout", "10"), stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_service_is_ready_when_it_says_so() -> None:
    """The probe fails while a service starts, naming its state, and succeeds once it is ready."""
    async with serving("127.0.0.1:0", [], drain=0) as server:
        code, said = await probe(server.address)
        assert code == 1
        assert "NOT_SERVING" in said
        await server.health.ready()
        assert await probe(server.address) == (0, "")


async def test_a_service_that_is_not_there_is_not_ready() -> None:
    """The probe fails where nobody listens, and says so."""
    async with serving("127.0.0.1:0", [], drain=0) as server:
        address = server.address
    code, said = await probe(address)
    assert code == 1
    assert said.startswith(f"{address} is not ready: UNAVAILABLE")
