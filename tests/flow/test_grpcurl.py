"""Any gRPC client can use the mesh with nothing but its address: grpcurl, by reflection."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import OpenBus
from tests.flow.mesh import running


@pytest.fixture
def grpcurl() -> str:
    """The program; a tool of its own, written in Go, that no test needs to have."""
    program = shutil.which("grpcurl")
    if program is None:
        pytest.skip("no grpcurl on PATH (github.com/fullstorydev/grpcurl)")
    return program


async def output(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err.decode()) == (0, "")
    return out.decode()


async def test_grpcurl_lists_describes_and_streams(
    grpcurl: str, open_memory: OpenBus, stories260k: Path, published: str
) -> None:
    """Without a .proto file at hand."""
    async with running(open_memory, stories260k) as mesh:
        services = await output(grpcurl, "-plaintext", mesh.grpc, "list")
        assert "holdfast.v1.GatewayService" in services.splitlines()
        assert "grpc.health.v1.Health" in services.splitlines()
        described = await output(grpcurl, "-plaintext", mesh.grpc, "describe", "holdfast.v1.GatewayService")
        assert "returns ( stream .holdfast.v1.GenerateResponse )" in described
        request = {"tokenIds": {"ids": [1]}, "sampling": {"temperature": 0}, "stop": {"maxTokens": 199}}
        streamed = await output(
            grpcurl, "-plaintext", "-d", json.dumps(request), mesh.grpc, "holdfast.v1.GatewayService/Generate"
        )
    assert "".join(event["tokens"].get("text", "") for event in parsed(streamed) if "tokens" in event) == published


def parsed(text: str) -> list[dict[str, dict[str, str]]]:
    """The JSON objects that stand in a text one after the other."""
    decoder, events = json.JSONDecoder(), []
    text = text.strip()
    while text:
        event, end = decoder.raw_decode(text)
        events.append(event)
        text = text[end:].strip()
    return events
