"""Streams that go on over HTTP: in the API that they began in, and in the contract's own words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from holdfast.ids import of_client
from holdfast.memory import MemoryBus
from holdfast.v1 import generation_pb2
from tests.gateway.doubles import CURSORS, EOS, LENGTH, STOP, Two, ids, two_gateways

CHAT, COMPLETIONS, RESUME = "/v1/chat/completions", "/v1/completions", "/v1/resume"
HI = [{"role": "user", "content": "hi"}]

Line = tuple[str, str, Any]
"""An event's id, its name, and its data."""


@pytest.fixture
async def mesh() -> AsyncIterator[Two]:
    async with (
        MemoryBus() as bus,
        two_gateways(lambda: contextlib.nullcontext(bus)) as mesh,
    ):
        yield mesh


def events(text: str) -> list[Line]:
    """The events of a body."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        data = fields["data"]
        found.append((fields.get("id", ""), fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


async def until(lines: AsyncIterator[str], text: str) -> str:
    """Reads a stream until this is in it; the id that stood before."""
    cursor = ""
    async for line in lines:
        if line.startswith("id: "):
            cursor = line.removeprefix("id: ")
        if text in line:
            return cursor
    raise AssertionError(f"no {text}")


@contextlib.asynccontextmanager
async def streaming(mesh: Two, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
    """A stream of the first gateway, whose request outlives it."""
    whole = body | {"stream": True, "cancel_on_disconnect": False}
    async with mesh.first.http.stream("POST", path, json=whole) as response:
        yield response.aiter_lines()


async def test_a_chat_goes_on_at_another_gateway(mesh: Two) -> None:
    """The same call with the last id: the rest of the same chat, with the usage of all of it."""
    body = {"messages": HI, "stream_options": {"include_usage": True}}
    async with streaming(mesh, CHAT, body) as lines:
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one ")
        cursor = await until(lines, "one ")
        await mesh.first.life.aclose()
    await mesh.engine.say(job, [*ids("two"), EOS], finish=STOP, cached=3)
    response = await mesh.second.http.post(CHAT, json=body | {"stream": True}, headers={"last-event-id": cursor})
    (text_id, _, text), (_, _, last), (_, _, usage), (_, _, done) = events(response.text)
    assert text["choices"][0]["delta"] == {"content": "two"}
    assert {text["id"], last["id"], response.headers["x-request-id"]} == {of_client(job.request.request_id)}
    assert CURSORS.decode(text_id).places[0].prefix.count == 8
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 8
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert done == "[DONE]"


async def test_choices_that_ended_before_count_in_the_usage(mesh: Two) -> None:
    """Nothing else comes of them."""
    body = {"messages": HI, "n": 2, "stream_options": {"include_usage": True}}
    async with streaming(mesh, CHAT, body) as lines:
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one", finish=LENGTH, cached=2)
        cursor = await until(lines, '"length"')
        await mesh.engine.say(job, "four", choice=1, finish=LENGTH)
        await until(lines, "[DONE]")
    response = await mesh.second.http.post(CHAT, json=body | {"stream": True}, headers={"last-event-id": cursor})
    *chunks, (_, _, usage), _ = events(response.text)
    assert {chunk["choices"][0]["index"] for _, _, chunk in chunks} == {1}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for _, _, chunk in chunks) == "four"
    assert usage["usage"]["completion_tokens"] == 7
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_log_probabilities_count_their_characters_on(mesh: Two) -> None:
    """text_offset of the first token after the break follows that of the last one before it."""
    body = {"prompt": "hi", "logprobs": 0}
    named = [generation_pb2.TokenLogprobs(logprob=-0.5)]
    async with streaming(mesh, COMPLETIONS, body) as lines:
        job = await mesh.engine.job()
        await mesh.engine.say(job, "ab", logprobs=named * 2)
        cursor = await until(lines, "text_offset")
    await mesh.engine.say(job, "c", logprobs=named, finish=LENGTH)
    response = await mesh.second.http.post(COMPLETIONS, json=body | {"stream": True}, headers={"last-event-id": cursor})
    logprobs = events(response.text)[0][2]["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["text_offset"], logprobs["token_logprobs"]) == (["c"], [2], [-0.5])


async def test_only_a_stream_of_one_prompt_goes_on(mesh: Two) -> None:
    """What asks for something else is refused, by name; so is what is no cursor."""
    submitted = await mesh.first.client.submit("hi")
    for body, cursor, param in (
        ({"prompt": "hi"}, submitted.cursor, "last-event-id"),
        ({"prompt": ["hi", "ho"], "stream": True}, submitted.cursor, "last-event-id"),
        ({"prompt": "hi", "stream": True}, "AAAA", "cursor"),
    ):
        response = await mesh.second.http.post(COMPLETIONS, json=body, headers={"last-event-id": cursor})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("began", "other"),
    [((COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": HI})), ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"}))],
    ids=["completion", "chat"],
)  # fmt: skip
async def test_a_stream_does_not_go_on_in_the_other_api(
    mesh: Two, began: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    """It is refused, with where it would; and nothing has become of it."""
    async with streaming(mesh, *began) as lines:
        job = await mesh.engine.job()
        await mesh.engine.say(job, "one ")
        cursor = await until(lines, "one ")
    last = {"last-event-id": cursor}
    path, body = other
    response = await mesh.second.http.post(path, json=body | {"stream": True}, headers=last)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "last-event-id")
    assert f"a stream of {began[0]}, and cannot go on as one of {path}" in response.json()["error"]["message"]
    await mesh.engine.say(job, [*ids("two"), EOS], finish=STOP)
    response = await mesh.second.http.post(began[0], json=began[1] | {"stream": True}, headers=last)
    assert (response.status_code, '"two"' in response.text) == (200, True)


@pytest.mark.parametrize("how", ["header", "query"])
async def test_any_stream_goes_on_in_the_contracts_words(mesh: Two, how: str) -> None:
    """Each event by its name, with its cursor; who comes back after the end is told that there is no more."""
    submitted = await mesh.first.client.submit("hi", return_token_ids=True)
    job = await mesh.engine.job()
    await mesh.engine.say(job, "é", finish=LENGTH, cached=1)

    async def get(cursor: str) -> httpx.Response:
        if how == "header":
            return await mesh.second.http.get(RESUME, headers={"last-event-id": cursor})
        return await mesh.second.http.get(RESUME, params={"cursor": cursor})

    response = await get(submitted.cursor)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    (_, _, resumed), (cursor, _, tokens), (last, _, finished) = found = events(response.text)
    assert [name for _, name, _ in found] == ["resumed", "tokens", "finished"]
    assert (resumed["request_id"], resumed["prompt_tokens"], resumed["next_index"]) == (submitted.request_id, 2, [0])
    assert (tokens["text"], tokens["token_ids"], tokens["first_index"]) == ("é", ids("é"), 0)
    assert (finished["reason"], finished["usage"]["completion_tokens"]) == ("FINISH_REASON_LENGTH", 2)
    assert [name for _, name, _ in events((await get(cursor)).text)] == ["resumed", "finished"]
    assert ((await get(last)).status_code, (await get(last)).content) == (204, b"")


async def test_a_browser_that_comes_back_goes_on_from_its_last_event(mesh: Two) -> None:
    """Its address has the first cursor still, its header the newest."""
    submitted = await mesh.first.client.submit("hi")
    await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
    *_, (last, _, _) = events((await mesh.second.http.get(RESUME, params={"cursor": submitted.cursor})).text)
    again = await mesh.second.http.get(RESUME, params={"cursor": submitted.cursor}, headers={"last-event-id": last})
    assert again.status_code == 204


async def test_what_is_no_cursor_is_refused(mesh: Two) -> None:
    """Before anything is streamed."""
    for params in ({}, {"cursor": "AAAA"}):
        response = await mesh.second.http.get(RESUME, params=params)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "cursor")
        assert "x-request-id" not in response.headers, "nobody knows which request is meant"


async def test_an_error_of_the_engine_is_an_event(mesh: Two) -> None:
    """With a name of its own, and nothing after it."""
    submitted = await mesh.first.client.submit("hi")
    job = await mesh.engine.job()
    part = mesh.engine.part(job, ids("x"), finish=generation_pb2.FINISH_REASON_ERROR)
    part.finish.error.CopyFrom(generation_pb2.StreamError(code=10, message="no memory left"))
    await mesh.engine.write(job, part)
    *_, (_, name, error) = events((await mesh.second.http.get(RESUME, params={"cursor": submitted.cursor})).text)
    assert (name, error["error"]["code"], error["error"]["message"]) == ("error", "stream_failed", "no memory left")
