"""The oracle: a small trained model must stream its published text, byte for byte, whatever happens on the way.

The model is stories260k in float32; greedy from its beginning-of-sequence token it writes what llama2.c publishes: 200
tokens, that first one among them. Exactness under batching, chunking, caching and preemption is the engine's promise.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from holdfast.client import Client
from holdfast.events import Event, Finished, FinishReason, Tokens
from services.__main__ import serve as serve_mesh
from services.settings import EnginePart, GatewayPart, MeshSettings
from tests.conftest import OpenBus
from tests.flow.mesh import ANYWHERE, is_idle, running

BOS = 1
LENGTH = 199
"""Tokens of the published text, which the model adds to its beginning-of-sequence token."""


async def story(client: Client, **options: Any) -> list[Event]:
    """All events of the story from nothing, or from the ids given."""
    options.setdefault("token_ids", [BOS])
    options.setdefault("max_tokens", LENGTH)
    async with client.generate(temperature=0, return_token_ids=True, **options) as answer:
        return [event async for event in answer]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def ids_of(events: list[Event]) -> list[int]:
    return [id for event in events if isinstance(event, Tokens) for id in event.token_ids]


def end_of(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


async def test_the_mesh_in_one_process_streams_the_published_text(stories260k: Path, published: str) -> None:
    """As `python -m services` composes it; the gateway shows the metrics of all parts."""
    settings = MeshSettings(
        model=str(stories260k),
        gateway=GatewayPart(address=ANYWHERE, http_address=ANYWHERE, flush_ms=0),
        engine=EnginePart(threads=1, cache_bytes=64 << 20),
    )
    async with serve_mesh(settings) as mesh, Client(mesh.grpc) as client:
        events = await story(client)
        assert [model.name for model in await client.models()] == ["stories260k"]
        assert await client.health()
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"http://{mesh.http}/metrics")).text
    assert text_of(events) == published
    for name in ("gateway_requests", "tokenizer_tokens", "generation_tokens", "kvstore_bytes"):
        assert f"# TYPE holdfast_{name}_total counter" in metrics or f"# TYPE holdfast_{name} counter" in metrics
    assert end_of(events).reason is FinishReason.LENGTH
    assert end_of(events).usage.completion_tokens == LENGTH


async def test_the_published_text_comes_over_either_log(open_bus: OpenBus, stories260k: Path, published: str) -> None:
    """In memory and on Kafka."""
    async with running(open_bus, stories260k) as mesh:
        assert text_of(await story(mesh.client)) == published


async def test_many_streams_at_once_do_not_disturb_each_other(
    open_bus: OpenBus, stories260k: Path, published: str
) -> None:
    """Eight in one batch."""
    async with running(open_bus, stories260k, engine={"prefix_cache": False}) as mesh:
        stories = await asyncio.gather(*(story(mesh.client) for _ in range(8)))
        load = await mesh.engine.until(is_idle)
    assert [text_of(events) for events in stories] == [published] * 8
    assert load.num_generated_tokens == 8 * LENGTH


async def test_a_prompt_in_chunks_gives_the_same_continuation(
    open_memory: OpenBus, stories260k: Path, published: str
) -> None:
    """A prompt of 151 tokens, computed 16 at a time beside a running stream, goes on where the text goes on."""
    chunked = {"max_step_tokens": 17, "max_sequences": 2, "block_size": 16, "prefix_cache": False}
    async with running(open_memory, stories260k, engine=chunked) as mesh:
        whole = await story(mesh.client)
        begun = [BOS, *ids_of(whole)[:150]]
        beside, rest = await asyncio.gather(
            story(mesh.client), story(mesh.client, token_ids=begun, max_tokens=LENGTH - 150)
        )
    assert text_of(whole) == text_of(beside) == published
    assert ids_of(rest) == ids_of(whole)[150:]
    assert published.endswith(text_of(rest))


async def test_a_prefix_found_in_the_cache_gives_the_same_continuation(
    open_memory: OpenBus, stories260k: Path, published: str
) -> None:
    """What an earlier request left behind is used, and changes nothing."""
    async with running(open_memory, stories260k, engine={"block_size": 16}) as mesh:
        whole = await story(mesh.client)
        begun = [BOS, *ids_of(whole)[:150]]
        rest = await story(mesh.client, token_ids=begun, max_tokens=LENGTH - 150)
        load = await mesh.engine.until(is_idle)
    assert end_of(whole).usage.cached_tokens == 0
    assert end_of(rest).usage.cached_tokens == 144  # nine whole blocks of the 151 tokens
    assert ids_of(rest) == ids_of(whole)[150:]
    assert published.endswith(text_of(rest))
    assert load.num_cached_tokens == 144


async def test_preemption_changes_no_text(open_memory: OpenBus, stories260k: Path, published: str) -> None:
    """Four streams that need 13 blocks each share 20: some are thrown out, computed again, and lose nothing."""
    tiny = {"block_size": 16, "cache_blocks": 20}
    async with running(open_memory, stories260k, engine=tiny) as mesh:
        stories = await asyncio.gather(*(story(mesh.client) for _ in range(4)))
        load = await mesh.engine.until(is_idle)
        info = await mesh.engine.info()
    assert [text_of(events) for events in stories] == [published] * 4
    assert load.num_preemptions > 0
    assert load.num_free_blocks + load.num_cached_blocks == info.num_blocks


async def test_choices_of_one_request_share_its_prompt(open_memory: OpenBus, stories260k: Path, published: str) -> None:
    """Greedy choices are all the published text."""
    async with running(open_memory, stories260k) as mesh:
        events = await story(mesh.client, num_choices=3)
    for choice in range(3):
        text = "".join(event.text for event in events if isinstance(event, Tokens) and event.choice == choice)
        assert text == published


@pytest.mark.parametrize("flush_ms", [0, 20, 10_000])
async def test_the_pace_of_messages_changes_no_text(
    open_memory: OpenBus, stories260k: Path, published: str, flush_ms: int
) -> None:
    """Whether tokens travel one by one or all in the last message."""
    async with running(open_memory, stories260k, gateway={"flush_ms": flush_ms}) as mesh:
        assert text_of(await story(mesh.client)) == published


async def test_a_stop_string_ends_the_text_before_it(open_memory: OpenBus, stories260k: Path, published: str) -> None:
    """And frees the engine, which knows no text, soon after."""
    async with running(open_memory, stories260k) as mesh:
        events = await story(mesh.client, stop=["park"])
        load = await mesh.engine.until(is_idle)
    assert text_of(events) == published[: published.index("park")]
    assert (end_of(events).reason, end_of(events).stop) == (FinishReason.STOP, "park")
    assert load.num_generated_tokens < LENGTH


async def test_a_seed_gives_the_same_text_again(open_memory: OpenBus, stories260k: Path) -> None:
    """Alone and in a batch of others; another seed gives another text."""
    async with running(open_memory, stories260k) as mesh:

        async def sampled(seed: int) -> str:
            return await mesh.client.generate(token_ids=[BOS], max_tokens=60, temperature=1, seed=seed).read()

        alone = await sampled(7)
        together = await asyncio.gather(*(sampled(seed) for seed in (5, 6, 7, 8)))
    assert together[2] == alone
    assert len(set(together)) == 4
