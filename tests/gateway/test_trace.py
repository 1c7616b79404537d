"""`holdfast trace`, of what a real gateway wrote to a log."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest

from holdfast.cli import main
from holdfast.errors import InvalidRequest, NotFound
from holdfast.ids import of_client
from holdfast.kafka import KafkaBus
from holdfast.memory import MemoryBus
from holdfast.timeline import Kind
from holdfast.trace import trace
from holdfast.v1 import generation_pb2
from tests.gateway.doubles import LENGTH, ByteTokenizer, open_face, open_mesh, playing_engine, tokenizing


async def test_a_request_is_found_by_its_id_and_by_any_cursor() -> None:
    """Among others, in either class; of an id that was used again it is the newest, and the log's own ids tell
    them apart."""
    async with open_mesh() as mesh:
        in_log = []
        for prompt in ("first", "second"):
            async with mesh.client.generate(prompt, request_id="mine", request_class="batch") as answer:
                await anext(answer)
                job = await mesh.engine.job()
                in_log.append(job.request.request_id)
                await mesh.engine.say(job, prompt, finish=LENGTH)
                assert await answer.read() == prompt
        async with mesh.client.generate("other") as answer:
            await anext(answer)
            other = await mesh.engine.job()
            await mesh.engine.say(other, "one ", epoch=3)
            cursor = (await anext(answer)).cursor
            await mesh.engine.say(other, "two", epoch=4, finish=LENGTH)
            await answer.read()
        lines: list[str] = []
        accepted, owner, tokens, end = await trace(mesh.bus, "mine", tell=lines.append)
        assert [event.kind for event in (owner, tokens, end)] == [Kind.OWNER, Kind.TOKENS, Kind.ENDED]
        assert (accepted.facts["class"], accepted.facts["prompt_tokens"]) == ("batch", len("second"))
        assert "2 requests had that id" in " ".join(lines)
        assert (await trace(mesh.bus, in_log[0]))[0].facts["prompt_tokens"] == len("first")
        events = await trace(mesh.bus, cursor=cursor)
        assert events[0].facts["request_id"] == of_client(other.request.request_id)
        assert [event.facts["epoch"] for event in events if event.kind is Kind.OWNER] == [3, 4]


async def test_what_cannot_be_found_is_said() -> None:
    """Neither by a name that the log does not have, nor by what is no cursor."""
    async with open_mesh() as mesh:
        with pytest.raises(NotFound, match="no request nobody"):
            await trace(mesh.bus, "nobody")
        with pytest.raises(InvalidRequest, match="1 to 128 characters of .*, not 'two words'"):
            await trace(mesh.bus, "two words")
        for cursor in ("AAAA", "!"):
            with pytest.raises(InvalidRequest, match="not a cursor"):
                await trace(mesh.bus, cursor=cursor)


async def test_an_answer_whose_beginning_is_gone_is_not_judged() -> None:
    """The log says from where on it has records; the request itself is there still. Nobody can say whether it has ended."""
    async with MemoryBus(max_topic_bytes=1_000_000) as bus, open_mesh(log=bus) as mesh:
        await mesh.client.submit("hi", request_id="mine")
        job = await mesh.engine.job()
        await mesh.engine.say(job, "x")
        for _ in range(2):
            await mesh.engine.write(job, generation_pb2.StreamTokens(request_id="x" * 600_000))
        accepted, missing = await trace(bus, "mine")
        assert (accepted.kind, missing.kind) == (Kind.ACCEPTED, Kind.MISSING)
        assert "no longer holds holdfast.tokens[0] before offset 2" in missing.what


@pytest.mark.kafka
async def test_the_command_reads_a_broker(kafka: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each event, for people or as JSON; an id that is unknown fails."""
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    async with (
        KafkaBus(kafka, namespace=namespace) as bus,
        playing_engine(bus) as engine,
        tokenizing(ByteTokenizer()) as tokenizer,
        open_face(bus, tokenizer.address) as face,
    ):
        submitted = await face.client.submit("hi", request_id="mine")
        job = await engine.job()
        for text in ("one ", "two"):
            await engine.say(job, text)
        await face.client.cancel("mine")
        await engine.say(job, finish=generation_pb2.FINISH_REASON_CANCELLED)
        await face.client.result(submitted.cursor)
        log = ["--kafka", kafka, "--kafka-namespace", namespace]
        assert await asyncio.to_thread(main, ["trace", "mine", *log]) == 0
        out, err = capsys.readouterr()
        assert [line.split(" s  ")[1].split()[0] for line in out.splitlines() if " s  " in line] == [
            "accepted",
            "owner",
            "tokens",
            "cancel",
            "ended",
        ]
        assert "tokens 0 to 6 in 2 records" in out
        assert "looking through 1 requests of 64 partitions" in err
        assert await asyncio.to_thread(main, ["trace", "--cursor", submitted.cursor, "--json", *log]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert [event["event"] for event in events] == ["accepted", "owner", "tokens", "cancel", "ended"]
        assert (events[2]["num_tokens"], events[4]["reason"]) == (7, "CANCELLED")
        assert await asyncio.to_thread(main, ["trace", "nobody", *log]) == 1
        assert "holds no request nobody" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["trace", *log]) == 2
