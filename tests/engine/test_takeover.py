"""Engines come and go in the middle of everything, and every request is answered as if nothing had happened."""

from __future__ import annotations

import asyncio
import random

import pytest

from holdfast import topics
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2 as pb
from services.engine.sequence import StopRules
from tests.engine.engines import Running, engine, until
from tests.engine.fake_runner import EOS, expected_output
from tests.engine.records import answers, cancel, publish, request


async def live(bus: MemoryBus, name: str, dice: random.Random, leaves: asyncio.Event | None) -> None:
    """An engine that leaves without draining, in the middle of a step or between two."""
    async with engine(
        bus, name=name, max_sequences=3, num_blocks=24, drain_seconds=0, lookahead=dice.randrange(3)
    ) as e:
        if leaves is None:
            await asyncio.Event().wait()
        assert leaves is not None
        await _work_a_little(e, dice)
        leaves.set()


async def _work_a_little(running: Running, dice: random.Random) -> None:
    """Until a random number of tokens was generated, or there is nothing to do."""
    enough = running.engine.steps.load.num_generated_tokens + dice.randrange(60)
    turns = 0

    def tired() -> bool:
        nonlocal turns
        turns += 1
        return turns > 300 or running.engine.steps.load.num_generated_tokens >= enough

    await until(tired)


@pytest.mark.parametrize("seed", range(8))
async def test_whoever_comes_and_goes_every_request_is_answered_once(seed: int) -> None:
    """Short-lived engines join, freeze, wake and leave while requests arrive and some are cancelled; in the end one
    stays. By the readers' rule every stream has no hole, no doubled token and the text of one undisturbed engine."""
    dice = random.Random(seed)
    prompts: dict[str, list[int]] = {}
    texts: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    async with MemoryBus() as bus:
        await bus.create_topics(topics.TOPICS)
        async with answers(bus) as heard, asyncio.TaskGroup() as tasks:
            for generation in range(6):
                leaves = asyncio.Event()
                tasks.create_task(live(bus, f"engine-{generation}", dice, leaves))
                for _ in range(dice.randrange(6)):
                    request_id = f"r{len(prompts)}"
                    prompts[request_id] = [dice.randrange(1, 4) for _ in range(dice.randrange(1, 12))]
                    max_tokens = dice.randrange(1, 40)
                    stop = StopRules(max_tokens, stop_token_ids=frozenset({EOS}))
                    texts[request_id] = expected_output(prompts[request_id], stop)
                    message = request(request_id, prompts[request_id], max_tokens=max_tokens)
                    await publish(bus, message, partition=dice.randrange(4), batch=dice.random() < 0.3)
                    if dice.random() < 0.15:
                        cancelled.add(request_id)
                        await cancel(bus, request_id)
                if dice.random() < 0.4 and (members := bus.members("holdfast-engines-interactive")):
                    with bus.frozen(dice.choice(members)):
                        for _ in range(dice.randrange(50)):
                            await asyncio.sleep(0)
                if dice.random() < 0.6:
                    await leaves.wait()
            last = tasks.create_task(live(bus, "last", dice, None))
            await heard.finished(*prompts)
            last.cancel()
    for request_id, text in texts.items():
        answer = heard[request_id]
        assert answer.finish is not None
        if answer.finish.reason == pb.FINISH_REASON_CANCELLED:
            assert request_id in cancelled
            assert answer.token_ids == text[: len(answer.token_ids)]
        else:
            assert answer.token_ids == text
