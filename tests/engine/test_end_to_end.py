"""A whole engine with a trained model: from a request in the log to the published text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import NoOpTracer
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from holdfast import rpc, topics
from holdfast.errors import ConfigurationError, DeadlineExceeded, from_rpc_error
from holdfast.memory import MemoryBus
from holdfast.v1 import engine_pb2, engine_pb2_grpc
from holdfast.v1 import generation_pb2 as pb
from services.engine.__main__ import EngineAddresses, serve
from services.engine.blocks import BlockPool
from services.engine.build import build
from services.engine.engine import Engine
from services.engine.metrics import EngineMetrics
from services.engine.scheduler import Limits, Scheduler
from services.engine.settings import EngineSettings
from services.engine.validation import Served
from tests.engine.records import answers, cancel, publish, request

BOS = 1


@pytest.fixture(scope="module")
def published(stories260k: Path) -> list[int]:
    """The ids of the text that stories260k writes greedily from nothing, as llama2.c publishes it."""
    text = (stories260k / "expected_greedy_200.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    async with MemoryBus() as opened:
        await opened.create_topics(topics.TOPICS)
        yield opened


@asynccontextmanager
async def engine(bus: MemoryBus, folder: Path, **more: Any) -> AsyncIterator[EngineAddresses]:
    settings: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": "stories",
        "address": "127.0.0.1:0",
        "device": "cpu",
        "threads": 1,
        "cache_bytes": 16 << 20,
        "block_size": 16,
        "max_sequences": 4,
        "drain_seconds": 5.0,
    }
    async with serve(EngineSettings(**(settings | more)), bus=bus) as addresses:
        yield addresses


def story(request_id: str, prompt_ids: list[int], *, max_tokens: int, **fields: Any) -> pb.GenerationRequest:
    return request(request_id, prompt_ids, model="stories", max_tokens=max_tokens, **fields)


@asynccontextmanager
async def control(addresses: EngineAddresses) -> AsyncIterator[engine_pb2_grpc.EngineServiceAsyncStub]:
    async with rpc.channel(addresses.address) as channel:
        yield engine_pb2_grpc.EngineServiceStub(channel)


async def load(addresses: EngineAddresses) -> engine_pb2.GetLoadResponse:
    async with control(addresses) as stub:
        return await stub.GetLoad(engine_pb2.GetLoadRequest())


async def test_the_published_text_is_what_comes(bus: MemoryBus, stories260k: Path, published: list[int]) -> None:
    """Greedily from nothing, token by token."""
    async with answers(bus) as heard, engine(bus, stories260k):
        await publish(bus, story("a", [BOS], max_tokens=len(published)))
        await heard.finished("a")
        assert heard["a"].token_ids == published


async def test_a_prompt_in_pieces_gives_the_same(bus: MemoryBus, stories260k: Path, published: list[int]) -> None:
    """A prompt computed in chunks of a few tokens goes on as one computed at once."""
    prompt_ids = [BOS, *published[:100]]
    async with answers(bus) as heard, engine(bus, stories260k, max_sequences=2, max_step_tokens=7):
        await publish(bus, story("a", prompt_ids, max_tokens=40))
        await publish(bus, story("b", prompt_ids[:50], max_tokens=40))
        await heard.finished("a", "b")
        assert heard["a"].token_ids == published[100:140]
        assert heard["b"].token_ids == published[49:89]


async def test_a_prefix_found_in_the_cache_gives_the_same(
    bus: MemoryBus, stories260k: Path, published: list[int]
) -> None:
    """The second request with a prompt finds its full blocks, says so in its usage, and goes on alike."""
    prompt_ids = [BOS, *published[:100]]
    async with answers(bus) as heard, engine(bus, stories260k) as addresses:
        for request_id in ("a", "b"):
            await publish(bus, story(request_id, prompt_ids, max_tokens=40))
            await heard.finished(request_id)
            assert heard[request_id].token_ids == published[100:140]
        assert heard["a"].finish is not None
        assert heard["b"].finish is not None
        assert heard["a"].finish.usage.cached_tokens == 0
        assert heard["b"].finish.usage.cached_tokens == 96
        assert (await load(addresses)).num_cached_tokens == 96


async def test_preempted_sequences_give_the_same(bus: MemoryBus, stories260k: Path, published: list[int]) -> None:
    """In a cache too small for all of them some are thrown out and computed again; nobody can tell from the tokens."""
    small = {"cache_blocks": 16, "max_model_len": 200, "max_sequences": 4}
    async with answers(bus) as heard, engine(bus, stories260k, **small) as addresses:
        ids = [f"r{number}" for number in range(4)]
        for number, request_id in enumerate(ids):
            await publish(bus, story(request_id, [BOS, *published[:number]], max_tokens=120), partition=number)
        await heard.finished(*ids)
        for number, request_id in enumerate(ids):
            assert heard[request_id].token_ids == published[number : number + 120]
        assert heard.num_repeated == 0
        assert (await load(addresses)).num_preemptions > 0


@pytest.mark.parametrize("lookahead", range(4))
async def test_steps_planned_ahead_give_the_same(
    bus: MemoryBus, stories260k: Path, published: list[int], lookahead: int
) -> None:
    """However many steps are launched before the first one's result is known, in chunks and with preemptions."""
    settings = EngineSettings(
        model=str(stories260k), device="cpu", threads=1, block_size=16, cache_blocks=16, max_model_len=200,
        max_sequences=4, max_step_tokens=16,
    )  # fmt: skip
    computer = build(settings, stories260k)
    limits = Limits(max_sequences=4, max_step_tokens=16, lookahead=lookahead)
    made = Engine(
        bus,
        Scheduler(BlockPool(16, block_size=16), limits),
        computer.runner,
        name="ahead",
        served=Served("stories", 200, 512, frozenset({2})),
        metrics=EngineMetrics(CollectorRegistry()),
        tracer=NoOpTracer(),
    )
    async with answers(bus) as heard, made.running():
        ids = [f"r{number}" for number in range(4)]
        for number, request_id in enumerate(ids):
            prompt_ids = [BOS, *published[: 10 * number]]
            await publish(bus, story(request_id, prompt_ids, max_tokens=100), partition=number)
        await heard.finished(*ids)
        for number, request_id in enumerate(ids):
            assert heard[request_id].token_ids == published[10 * number : 10 * number + 100]
        assert made.steps.load.num_preemptions > 0


async def test_weights_in_fp8_give_the_same_however_they_are_scheduled(
    bus: MemoryBus, stories260k: Path, published: list[int]
) -> None:
    """Alone, beside others, in chunks, from the cache and after preemption an answer is one and the same."""
    prompt_ids = [BOS, *published[:40]]
    async with answers(bus) as heard, engine(bus, stories260k, quantization="fp8"):
        await publish(bus, story("alone", prompt_ids, max_tokens=60))
        await heard.finished("alone")
        await publish(bus, story("cached", prompt_ids, max_tokens=60))
        await heard.finished("cached")
    small = {"cache_blocks": 16, "max_model_len": 200, "max_step_tokens": 7, "quantization": "fp8"}
    async with answers(bus) as heard_again, engine(bus, stories260k, **small):
        ids = [f"r{number}" for number in range(4)]
        for number, request_id in enumerate(ids):
            await publish(bus, story(request_id, prompt_ids, max_tokens=60), partition=number)
        await heard_again.finished(*ids)
        for found in (heard["cached"], *(heard_again[request_id] for request_id in ids)):
            assert found.token_ids == heard["alone"].token_ids
    assert heard["alone"].token_ids != published[40:100]


async def test_several_choices_of_one_request(bus: MemoryBus, stories260k: Path, published: list[int]) -> None:
    """Greedy choices are alike; drawn ones differ, and come again the same for the same seed."""
    drawn = pb.SamplingParams(temperature=1.0, seed=7)
    async with answers(bus) as heard, engine(bus, stories260k):
        await publish(bus, story("greedy", [BOS], max_tokens=20, num_choices=3))
        await publish(bus, story("drawn", [BOS], max_tokens=20, num_choices=3, sampling=drawn))
        await publish(bus, story("again", [BOS], max_tokens=20, num_choices=3, sampling=drawn))
        await heard.finished(*((each, choice) for each in ("greedy", "drawn", "again") for choice in range(3)))
        assert [heard["greedy", choice].token_ids for choice in range(3)] == [published[:20]] * 3
        texts = [tuple(heard["drawn", choice].token_ids) for choice in range(3)]
        assert len(set(texts)) == 3
        assert texts == [tuple(heard["again", choice].token_ids) for choice in range(3)]


async def test_log_probabilities_come_with_their_tokens(
    bus: MemoryBus, stories260k: Path, published: list[int]
) -> None:
    """Asked for, each token carries its own and those of the likeliest; greedily the likeliest is the token."""
    sampling = pb.SamplingParams(temperature=0, logprobs=2)
    async with answers(bus) as heard, engine(bus, stories260k):
        await publish(bus, story("a", [BOS], max_tokens=5, sampling=sampling))
        await heard.finished("a")
    streams = [stream for record in heard.records for stream in record.streams]
    assert [each.top[0].token_id for stream in streams for each in stream.logprobs] == published[:5]
    for stream in streams:
        assert len(stream.logprobs) == len(stream.token_ids)
        assert all(len(each.top) == 2 and each.logprob == each.top[0].logprob for each in stream.logprobs)


async def test_an_engine_says_what_it_runs(bus: MemoryBus, stories260k: Path) -> None:
    """GetInfo names the model and its limits, as they really are."""
    async with engine(bus, stories260k, name="one") as addresses, control(addresses) as stub:
        info = await stub.GetInfo(engine_pb2.GetInfoRequest())
        assert (info.engine, info.model, info.device, info.dtype) == ("one", "stories", "cpu", "float32")
        assert (info.context_length, info.max_sequences, info.block_size) == (512, 4, 16)
        assert 250_000 < info.num_parameters < 300_000
        assert (info.kv_cache_dtype, info.quantization, info.tensor_parallel) == ("auto", "none", 1)
        now = await stub.GetLoad(engine_pb2.GetLoadRequest())
        assert now.num_free_blocks == info.num_blocks > 0
        assert not now.draining


async def test_draining_waits_for_what_runs(bus: MemoryBus, stories260k: Path) -> None:
    """Drain ends with DEADLINE_EXCEEDED while something runs, and without an error once nothing does."""
    async with answers(bus) as heard, engine(bus, stories260k) as addresses, control(addresses) as stub:
        await publish(bus, story("a", [BOS], max_tokens=500, ignore_eos=True))
        await heard.until(lambda: len(heard["a"].token_ids) > 0)
        too_short = engine_pb2.DrainRequest()
        too_short.timeout.FromMilliseconds(1)
        with pytest.raises(DeadlineExceeded, match="still draining"):
            try:
                await stub.Drain(too_short)
            except Exception as error:
                raise from_rpc_error(error) from error  # type: ignore[arg-type]
        assert (await stub.GetLoad(engine_pb2.GetLoadRequest())).draining
        await cancel(bus, "a")
        await stub.Drain(engine_pb2.DrainRequest(), timeout=30)
        await heard.finished("a")


def test_a_step_has_room_for_every_slot_that_is_asked_for() -> None:
    """Where only slots are said."""
    assert EngineSettings(max_sequences=4000).capacity("cpu").max_step_tokens == 4000
    assert EngineSettings(max_sequences=4).capacity("cuda").max_step_tokens == 8192


async def test_settings_that_cannot_work_stop_the_start(bus: MemoryBus, stories260k: Path) -> None:
    """Fewer tokens in a step than sequences are refused in words."""
    with pytest.raises(ConfigurationError, match="max_step_tokens must be at least max_sequences"):
        async with engine(bus, stories260k, max_sequences=4, max_step_tokens=3):
            pass
