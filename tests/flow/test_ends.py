"""What ends a request early frees the engine at once: its slot and its blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from holdfast.client import Client
from holdfast.errors import AlreadyExists
from holdfast.events import Finished, FinishReason, Tokens
from tests.conftest import OpenBus
from tests.flow.mesh import Running, is_idle, running

ENDLESS: dict[str, Any] = {"token_ids": [1], "ignore_eos": True, "temperature": 1.0, "seed": 3}
"""A request that would run for minutes."""

MANY = 20_000
"""Tokens that none of these requests comes near."""


@pytest.fixture
async def mesh(open_memory: OpenBus, endless_stories: Path) -> AsyncIterator[Running]:
    async with running(open_memory, endless_stories, engine={"cache_bytes": 256 << 20}) as running_mesh:
        yield running_mesh


async def tokens_until_idle(mesh: Running) -> int:
    """How many tokens were generated until the engine was free, all blocks given back."""
    load = await mesh.engine.until(is_idle)
    info = await mesh.engine.info()
    assert load.num_free_blocks + load.num_cached_blocks == info.num_blocks
    return load.num_generated_tokens


async def test_cancel_ends_the_stream_and_frees_the_engine(mesh: Running) -> None:
    """The client that listens is told; when it is, slot and blocks are free already."""
    reasons, seen = [], 0
    async with mesh.client.generate(**ENDLESS) as answer:
        async for event in answer:
            if isinstance(event, Tokens):
                if not seen:
                    await mesh.client.cancel(answer.request_id)
                seen += event.num_tokens
            if isinstance(event, Finished):
                reasons.append(event.reason)
    assert reasons == [FinishReason.CANCELLED]
    assert is_idle(await mesh.engine.load())
    # Within one step: what was computed beyond what was shown is at most what was on its way.
    assert await tokens_until_idle(mesh) <= seen + 1


async def test_the_deadline_ends_the_stream_and_frees_the_engine(mesh: Running) -> None:
    """With its own reason, and no error."""
    async with mesh.client.generate(**ENDLESS, timeout=0.5) as answer:
        events = [event async for event in answer]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.DEADLINE
    assert 0 < await tokens_until_idle(mesh) < MANY


async def test_leaving_a_grpc_stream_cancels_the_request(mesh: Running) -> None:
    """As the client asks by default."""
    async for event in mesh.client.generate(**ENDLESS):
        if isinstance(event, Tokens):
            break
    assert await tokens_until_idle(mesh) < MANY


async def test_leaving_a_grpc_stream_lets_the_request_run_where_that_was_asked(mesh: Running) -> None:
    """Until its end, which `cancel` by its id brings."""
    answer = mesh.client.generate(**ENDLESS, cancel_on_exit=False)
    async for event in answer:
        if isinstance(event, Tokens):
            break
    await answer.aclose()
    before = (await mesh.engine.load()).num_generated_tokens
    load = await mesh.engine.until(lambda load: load.num_generated_tokens > before + 50)
    assert load.num_running == 1
    await mesh.client.cancel(answer.request_id)
    assert await tokens_until_idle(mesh) < MANY


async def test_losing_the_whole_client_cancels_its_requests(mesh: Running) -> None:
    """A connection that ends without a word is as good as leaving."""
    async with Client(mesh.grpc) as other:
        answers = [other.generate(**ENDLESS) for _ in range(3)]
        for answer in answers:
            await anext(answer)
    assert await tokens_until_idle(mesh) < MANY
    del answers


async def test_leaving_an_http_stream_cancels_the_request(mesh: Running) -> None:
    """The other face of the same gateway."""
    body = {"prompt": "Once", "stream": True, "max_tokens": MANY, "seed": 3}
    async with (
        httpx.AsyncClient(base_url=f"http://{mesh.http}", timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                break
    assert await tokens_until_idle(mesh) < MANY


async def test_leaving_an_http_call_without_a_stream_cancels_the_request(mesh: Running) -> None:
    """Nobody is left to read the answer."""
    body = {"prompt": "Once", "max_tokens": MANY, "seed": 3}
    async with httpx.AsyncClient(base_url=f"http://{mesh.http}", timeout=60) as http:
        call = asyncio.ensure_future(http.post("/v1/completions", json=body))
        await mesh.engine.until(lambda load: load.num_running == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert await tokens_until_idle(mesh) < MANY


async def test_a_submitted_request_runs_without_a_listener(mesh: Running) -> None:
    """To its end, or until it is cancelled."""
    await mesh.client.submit(token_ids=[1], max_tokens=100, ignore_eos=True, temperature=0)
    load = await mesh.engine.until(lambda load: load.num_generated_tokens == 100)
    submitted = await mesh.client.submit(**ENDLESS)
    await mesh.engine.until(lambda later: later.num_generated_tokens > load.num_generated_tokens)
    await mesh.client.cancel(submitted.request_id)
    assert await tokens_until_idle(mesh) < MANY


async def test_the_deadline_holds_without_a_listener(mesh: Running) -> None:
    """The engine itself ends what nobody waits for any more."""
    await mesh.client.submit(**ENDLESS, timeout=0.5)
    await mesh.engine.until(lambda load: load.num_running == 1)
    assert 0 < await tokens_until_idle(mesh) < MANY


async def test_a_request_id_can_be_chosen_once(mesh: Running) -> None:
    """While a request runs, its id is taken."""
    async with mesh.client.generate(**ENDLESS, request_id="mine") as answer:
        await anext(answer)
        with pytest.raises(AlreadyExists):
            await mesh.client.generate(**ENDLESS, request_id="mine").read()
    await mesh.engine.until(is_idle)
