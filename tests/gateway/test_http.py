"""The HTTP face."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import pytest

from holdfast.errors import InvalidRequest
from holdfast.ids import of_client
from holdfast.v1 import generation_pb2
from tests.conftest import complaints
from tests.gateway.doubles import CONTEXT, CURSORS, EOS, LENGTH, MODEL, STOP, ByteTokenizer, Mesh, ids, open_mesh

T = TypeVar("T")

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
PROMPT = "user: hi\nassistant:"


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Does something while the block runs; the block's end waits for its end."""
    async with asyncio.TaskGroup() as group:
        yield group.create_task(work)


def logprobs(*tokens: tuple[int, float, list[tuple[int, float]]]) -> list[generation_pb2.TokenLogprobs]:
    return [
        generation_pb2.TokenLogprobs(
            logprob=logprob,
            top=[generation_pb2.TopLogprob(token_id=top, logprob=each) for top, each in likeliest],
        )
        for _, logprob, likeliest in tokens
    ]


def events(text: str) -> list[tuple[str, Any]]:
    """The events of a stream: id, and data as JSON unless it is the end."""
    result = []
    for block in text.strip("\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if data := lines.get("data"):
            result.append((lines.get("id", ""), data if data == "[DONE]" else json.loads(data)))
    return result


async def refused(mesh: Mesh, path: str, body: Any, status: int, **options: Any) -> dict[str, Any]:
    """The error of a call that is refused with this status."""
    response = await mesh.http.post(path, json=body, **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


async def test_a_chat_completes_in_one_piece() -> None:
    """The answer, why it ended and what it cost, as the API has it; the request's id is in body and header."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"model": MODEL, "messages": HI, "max_tokens": 9})) as call:
            job = await mesh.engine.job()
            await mesh.engine.say(job, "Good ")
            await mesh.engine.say(job, [*ids("day"), EOS], finish=STOP, cached=3)
        response = call.result()
        body = response.json()
        assert body.pop("created") > 1_700_000_000
        assert bytes(job.request.prompt_token_ids).decode() == PROMPT
        assert body == {
            "id": of_client(job.request.request_id),
            "object": "chat.completion",
            "model": MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Good day", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": len(PROMPT),
                "completion_tokens": 9,
                "total_tokens": len(PROMPT) + 9,
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        }
        assert response.headers["x-request-id"] == of_client(job.request.request_id)
        assert of_client(job.request.request_id).startswith("chatcmpl-")


async def test_a_chat_streams_as_it_comes() -> None:
    """A chunk that opens the choice, text as it comes, the end, the usage where it was asked for, and [DONE]; each event
    that has a cursor says it."""
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    async with open_mesh() as mesh, mesh.http.stream("POST", CHAT, json=body) as response:
        lines = response.aiter_lines()
        job = await mesh.engine.job()
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"] == of_client(job.request.request_id)
        opening = [await anext(lines) for _ in range(3)]
        assert json.loads(opening[1].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        await mesh.engine.say(job, 'one "')
        first = [await anext(lines) for _ in range(3)]
        chunk = json.loads(first[1].removeprefix("data: "))
        assert chunk["choices"] == [
            {"index": 0, "delta": {"content": 'one "'}, "logprobs": None, "finish_reason": None}
        ]
        assert (chunk["object"], chunk["usage"]) == ("chat.completion.chunk", None)
        now = CURSORS.decode(first[0].removeprefix("id: "))
        assert (now.request_id, now.places[0].prefix.count) == (job.request.request_id, 5)
        await mesh.engine.say(job, "two", finish=LENGTH)
        rest = events("\n".join([line async for line in lines]))
        (_, text), (_, last), (no_id, usage), (_, done) = rest
        assert text["choices"][0]["delta"] == {"content": "two"}
        assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
        assert (usage["choices"], usage["usage"]["completion_tokens"], no_id) == ([], 8, "")
        assert done == "[DONE]"


async def test_a_stream_without_usage_does_not_tell_it() -> None:
    """Unless asked no chunk has a member usage."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(COMPLETION, json={"prompt": "hi", "stream": True})) as call:
            await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
        (_, text), (_, last), (_, done) = events(call.result().text)
        assert text["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
        assert last["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
        assert (text["object"], "usage" in text, done) == ("text_completion", False, "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_and_choices_are_numbered_in_order(stream: bool) -> None:
    """Two prompts with two choices each are four choices, the first prompt's before the second's, each its own request."""
    body = {
        "prompt": ["a", "b"],
        "n": 2,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(COMPLETION, json=body)) as call:
            jobs = [await mesh.engine.job(), await mesh.engine.job()]
            for job in jobs:
                prompt = bytes(job.request.prompt_token_ids).decode()
                for choice in range(2):
                    await mesh.engine.say(job, f"{prompt}{choice}", choice=choice, finish=LENGTH, cached=1)
        names = sorted(job.request.request_id for job in jobs)
        if stream:
            texts, ends = dict[int, str](), dict[int, str]()
            for cursor_, event in events(call.result().text)[:-1]:
                assert cursor_ == "", "a cursor is of one request"
                for choice in event["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                    ends[choice["index"]] = choice["finish_reason"]
            usage, mesh_id = event["usage"], event["id"]
        else:
            answer = call.result().json()
            mesh_id = answer["id"]
            texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
            ends = {choice["index"]: choice["finish_reason"] for choice in answer["choices"]}
            usage = answer["usage"]
        assert [of_client(name) for name in names] == [f"{mesh_id}-0", f"{mesh_id}-1"]
        assert texts == {0: "a0", 1: "a1", 2: "b0", 3: "b1"}
        assert ends == dict.fromkeys(range(4), "length")
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 8)
        assert usage["prompt_tokens_details"] == {"cached_tokens": 2}, "of each prompt once"


A, B = ids("ab")
NAMED = logprobs((A, -0.5, [(A, -0.5), (B, -1.0)]), (B, -2.0, [(A, -math.inf)]), (EOS, -0.1, [(EOS, -0.1)]))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chats_log_probabilities(stream: bool) -> None:
    """Each token of the text with its bytes and its likeliest alternatives; the stop token is none of them."""
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "stream": stream}
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json=body)) as call:
            await mesh.engine.say(await mesh.engine.job(), [A, B, EOS], finish=STOP, logprobs=NAMED)
        if stream:
            choice = events(call.result().text)[1][1]["choices"][0]
        else:
            choice = call.result().json()["choices"][0]
        assert choice["logprobs"] == {
            "content": [
                {
                    "token": "a",
                    "logprob": -0.5,
                    "bytes": [97],
                    "top_logprobs": [
                        {"token": "a", "logprob": -0.5, "bytes": [97]},
                        {"token": "b", "logprob": -1.0, "bytes": [98]},
                    ],
                },
                {
                    "token": "b",
                    "logprob": -2.0,
                    "bytes": [98],
                    "top_logprobs": [{"token": "a", "logprob": -9999.0, "bytes": [97]}],
                },
            ],
            "refusal": None,
        }


async def test_a_completions_log_probabilities() -> None:
    """Tokens, their log-probabilities, their alternatives by text, and where in the text each begins."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(COMPLETION, json={"prompt": "hi", "logprobs": 2})) as call:
            job = await mesh.engine.job()
            await mesh.engine.say(job, [A], logprobs=NAMED[:1])
            await mesh.engine.say(job, [B, EOS], finish=STOP, logprobs=NAMED[1:])
        assert job.request.sampling.logprobs == 2
        assert call.result().json()["choices"][0]["logprobs"] == {
            "tokens": ["a", "b"],
            "token_logprobs": [-0.5, -2.0],
            "top_logprobs": [{"a": -0.5, "b": -1.0}, {"a": -9999.0}],
            "text_offset": [0, 1],
        }


async def test_a_token_that_is_no_character_has_no_bytes() -> None:
    """What a tokenizer cannot spell alone has no bytes, rather than wrong ones."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI, "logprobs": True})) as call:
            named = logprobs((0, -1, []), (0, -2, []))
            await mesh.engine.say(await mesh.engine.job(), "é", finish=LENGTH, logprobs=named)
        choice = call.result().json()["choices"][0]
        assert choice["message"]["content"] == "é"
        assert [each["bytes"] for each in choice["logprobs"]["content"]] == [None, None]


async def test_stop_strings_end_the_text() -> None:
    """The text ends before the stop string, for the reason stop."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI, "stop": "END"})) as call:
            await mesh.engine.say(await mesh.engine.job(), "one END two")
        choice = call.result().json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
        assert (await mesh.engine.cancelled()).choice == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_two_calls_of_one_x_request_id_are_two_requests(stream: bool) -> None:
    """x-request-id comes back, and names nothing in the mesh: calls that share it are each answered, under ids of their
    own, which the bodies tell."""
    body, headers = {"messages": HI, "stream": stream}, {"x-request-id": "trace=1/7"}
    async with open_mesh() as mesh:
        async with (
            meanwhile(mesh.http.post(CHAT, json=body, headers=headers)) as one,
            meanwhile(mesh.http.post(CHAT, json=body, headers=headers)) as other,
        ):
            jobs = [await mesh.engine.job(), await mesh.engine.job()]
            for job in jobs:
                await mesh.engine.say(job, of_client(job.request.request_id), finish=LENGTH)
        for response in (one.result(), other.result()):
            assert response.headers["x-request-id"] == "trace=1/7"
            if stream:
                chunks = [chunk for _, chunk in events(response.text)[:-1]]
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
                assert {chunk["id"] for chunk in chunks} == {text}
            else:
                assert response.json()["choices"][0]["message"]["content"] == response.json()["id"]


async def test_a_request_over_http_is_cancelled_by_the_id_in_its_body() -> None:
    """What a stream calls itself is what `Cancel` takes."""
    async with (
        open_mesh() as mesh,
        mesh.http.stream(
            "POST", CHAT, json={"messages": HI, "stream": True}, headers={"x-request-id": "a"}
        ) as response,
    ):
        lines = response.aiter_lines()
        job = await mesh.engine.job()
        told = [await anext(lines) for _ in range(2)][1]
        await mesh.client.cancel(json.loads(told.removeprefix("data: "))["id"])
        assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)
        await mesh.engine.say(job, finish=generation_pb2.FINISH_REASON_CANCELLED)
        assert "data: [DONE]" in [line async for line in lines]


@pytest.mark.parametrize("given", ["two words", "x" * 129, "\xe9"])
async def test_an_x_request_id_that_cannot_be_told_on_is_refused(given: str) -> None:
    """It would stand in headers and logs."""
    async with open_mesh() as mesh:
        headers = {"x-request-id": given.encode("latin-1")}
        error = await refused(mesh, CHAT, {"messages": HI}, 400, headers=headers)
        assert error["param"] == "x-request-id"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": HI, "temperature": 101}, "temperature"),
        ({"messages": HI, "top_p": 0}, "top_p"),
        ({"messages": HI, "stop": [""]}, "stop"),
        ({"messages": HI, "logit_bias": {"9999": 1}}, "logit_bias"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HI, "max_tokens": CONTEXT}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": HI, "timeout": 1e8}, "timeout"),
        ({"messages": HI, "tools": [{}]}, "tools"),
        ({}, "messages"),
    ],
)
async def test_bad_parameters_are_refused_by_the_apis_names(body: dict[str, Any], field: str) -> None:
    """400, the parameter's name in the API, and what would be right."""
    async with open_mesh() as mesh:
        error = await refused(mesh, CHAT, body, 400)
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, "invalid_request")


async def test_json_may_spell_numbers_that_are_none() -> None:
    """NaN, which Python's JSON allows, is refused like any other wrong number."""
    async with open_mesh() as mesh:
        response = await mesh.http.post(CHAT, content=b'{"messages": [{"role": "user"}], "temperature": NaN}')
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "temperature must be from 0 to 100, not nan"


async def test_a_broken_body_is_refused() -> None:
    """What is no JSON, or no UTF-8, gets 400."""
    async with open_mesh() as mesh:
        for body in (b"{", b'{"prompt": "\xff"}', b""):
            response = await mesh.http.post(COMPLETION, content=body)
            assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_refused(announced: bool) -> None:
    """More than 4 MiB get 413, whether the length was announced or not."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 20)

    async with open_mesh() as mesh:
        body = b" " * (5 << 20) if announced else parts()
        response = await mesh.http.post(COMPLETION, content=body)
        assert response.status_code == 413
        assert "4,194,304 bytes" in response.json()["error"]["message"]


async def test_a_body_that_does_not_come_is_408() -> None:
    """A client that does not send what it announced is told so, and its connection closed."""
    async with open_mesh(read_seconds=0.05) as mesh:
        host, _, port = mesh.addresses.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {COMPLETION} HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n".encode() + b'{"prompt"')
        response = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in response
        assert b"within 0.05 seconds" in response


async def test_a_completion_has_16_tokens_or_what_the_context_leaves() -> None:
    """Where it does not say itself how many; what it says is held to the context."""
    async with open_mesh() as mesh:
        for room, expected in ((CONTEXT - 2, 16), (5, 5), (1, 1)):
            prompt = "x" * (CONTEXT - room)
            async with meanwhile(mesh.http.post(COMPLETION, json={"prompt": prompt})) as call:
                job = await mesh.engine.job()
                await mesh.engine.say(job, "y", finish=LENGTH)
            assert (call.result().status_code, job.request.stop.max_tokens) == (200, expected)
        error = await refused(mesh, COMPLETION, {"prompt": "x" * (CONTEXT - 5), "max_tokens": 16}, 400)
        assert error["param"] == "max_tokens"


async def test_an_unknown_model_is_404() -> None:
    """404 names the model there is."""
    async with open_mesh() as mesh:
        error = await refused(mesh, CHAT, {"messages": HI, "model": "gpt-9"}, 404)
        assert (error["type"], error["param"], error["code"]) == ("not_found_error", "model", "not_found")
        assert MODEL in error["message"]


async def test_too_many_requests_are_429_with_retry_after() -> None:
    """Beyond max_streams a call is told when to come back."""
    async with open_mesh(max_streams=1) as mesh, meanwhile(mesh.http.post(CHAT, json={"messages": HI})):
        job = await mesh.engine.job()
        response = await mesh.http.post(CHAT, json={"messages": HI})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "rate_limit_error"
        await mesh.engine.say(job, "x", finish=LENGTH)


async def test_an_engines_error_is_the_responses_status() -> None:
    """Where the engine refuses a request a call in one piece gets the error's status."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI})) as call:
            job = await mesh.engine.job()
            part = mesh.engine.part(job, ())
            part.finish.reason = generation_pb2.FINISH_REASON_ERROR
            part.finish.error.code, part.finish.error.message = 10, "given up"
            await mesh.engine.write(job, part)
        assert call.result().status_code == 502
        assert call.result().json()["error"]["message"] == "given up"


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (generation_pb2.FINISH_REASON_DEADLINE, 504, "deadline_exceeded"),
        (generation_pb2.FINISH_REASON_CANCELLED, 499, "cancelled"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_end_that_the_api_has_no_word_for_is_an_error(
    stream: bool, reason: generation_pb2.FinishReason.ValueType, status: int, code: str
) -> None:
    """A deadline and a cancellation are errors: the response's status, or in a stream its last event."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI, "stream": stream})) as call:
            job = await mesh.engine.job()
            await mesh.engine.say(job, "so far")
            await mesh.engine.say(job, finish=reason)
        response = call.result()
        if stream:
            assert response.status_code == 200
            *_, (_, error), (_, done) = events(response.text)
            assert done == "[DONE]"
        else:
            assert response.status_code == status
            error = response.json()
        assert error["error"]["code"] == code


async def test_the_timeout_is_the_requests() -> None:
    """A call whose timeout passes gets 504, and the log is told."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI, "timeout": 0.2})) as call:
            job = await mesh.engine.job()
        assert call.result().status_code == 504
        assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)


async def test_a_call_in_one_piece_does_not_wait_for_ever() -> None:
    """Without a timeout it has http_timeout_seconds, with one its own; 0 is never, and a stream shows that it lives."""
    async with open_mesh(http_timeout_seconds=0.2) as mesh:
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI})) as call:
            job = await mesh.engine.job()
        assert call.result().status_code == 504
        assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)
        for more in ({"stream": True}, {"timeout": 50}):
            async with meanwhile(mesh.http.post(CHAT, json={"messages": HI} | more)) as call:
                job = await mesh.engine.job()
                assert job.request.HasField("deadline") == ("timeout" in more)
                await mesh.engine.say(job, "x", finish=LENGTH)
            assert call.result().status_code == 200
    async with open_mesh(http_timeout_seconds=0) as mesh, meanwhile(mesh.http.post(CHAT, json={"messages": HI})):
        job = await mesh.engine.job()
        assert not job.request.HasField("deadline")
        await mesh.engine.say(job, "x", finish=LENGTH)


async def test_a_silent_stream_gets_comments() -> None:
    """A stream that has nothing to say for keepalive_seconds gets a comment, so that nobody in between ends it."""
    async with (
        open_mesh(keepalive_seconds=0.05) as mesh,
        mesh.http.stream("POST", COMPLETION, json={"prompt": "hi", "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
        assert "data: [DONE]" in [line async for line in lines]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["while tokenizing", "before the first token", "in the middle"])
async def test_a_client_that_leaves_ends_its_request(stream: bool, when: str) -> None:
    """A closed connection cancels the request at once, whatever it waits for, streamed or not."""
    tokenizer = ByteTokenizer()
    async with open_mesh(tokenizer=tokenizer) as mesh:
        if when == "while tokenizing":
            tokenizer.open.clear()
        async with asyncio.TaskGroup() as group:
            body = {"messages": HI, "stream": stream}
            call = group.create_task(mesh.http.post(CHAT, json=body))
            if when == "while tokenizing":
                await tokenizer.asked.wait()
            else:
                job = await mesh.engine.job()
            if when == "in the middle":
                await mesh.engine.say(job, "so far")
            call.cancel()
        if when == "while tokenizing":
            await open_requests(mesh, 0)
            tokenizer.open.set()
            await mesh.client.submit("hi", request_id="next")
            assert of_client((await mesh.engine.job()).request.request_id) == "next", "it was never published"
        else:
            assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)


async def open_requests(mesh: Mesh, count: int) -> None:
    """Returns once the gateway says that so many requests are open."""
    while f"holdfast_gateway_open_requests {float(count)}" not in (await mesh.http.get("/metrics")).text:
        pass


async def test_a_request_may_outlive_its_connection() -> None:
    """With cancel_on_disconnect false a stream whose connection closes cancels nobody."""
    async with open_mesh() as mesh:
        async with asyncio.TaskGroup() as group:
            body = {"messages": HI, "cancel_on_disconnect": False, "stream": True}
            call = group.create_task(mesh.http.post(CHAT, json=body))
            await mesh.engine.job()
            call.cancel()
        await open_requests(mesh, 0)
        await mesh.client.cancel("a-probe")
        assert of_client((await mesh.engine.cancelled()).request_id) == "a-probe"


@pytest.mark.parametrize("body", [{"prompt": "hi"}, {"prompt": ["hi", "ho"], "stream": True}])
async def test_what_nobody_could_go_on_with_ends_with_its_connection(body: dict[str, Any]) -> None:
    """A response in one piece, or of several prompts, has no cursors: to let it run on is refused, by name."""
    async with open_mesh() as mesh:
        error = await refused(mesh, COMPLETION, body | {"cancel_on_disconnect": False}, 400)
        assert error["param"] == "cancel_on_disconnect"


async def test_one_bad_prompt_ends_the_others() -> None:
    """Where one of several prompts is refused the call is, and what was accepted before is cancelled."""
    async with open_mesh() as mesh:
        error = await refused(mesh, COMPLETION, {"prompt": ["ok", "x" * CONTEXT]}, 400)
        assert error["param"] == "prompt"
        assert of_client((await mesh.engine.cancelled()).request_id) == of_client(
            (await mesh.engine.job()).request.request_id
        )


async def test_one_failed_prompt_ends_the_others() -> None:
    """Where the engine fails one of several prompts the call fails, and the others are cancelled."""
    async with open_mesh() as mesh:
        async with meanwhile(mesh.http.post(COMPLETION, json={"prompt": ["a", "b"]})) as call:
            job, other = await mesh.engine.job(), await mesh.engine.job()
            await mesh.engine.say(job, [5000])
        assert call.result().status_code == 502
        cancelled = {of_client((await mesh.engine.cancelled()).request_id) for _ in range(2)}
        assert cancelled == {of_client(job.request.request_id), of_client(other.request.request_id)}


async def test_the_tokenizers_refusal_is_400() -> None:
    """What the chat template refuses is the client's fault."""
    async with open_mesh(tokenizer=ByteTokenizer(refuse=InvalidRequest("no such role"))) as mesh:
        error = await refused(mesh, CHAT, {"messages": HI}, 400)
        assert (error["message"], error["param"]) == ("no such role", "messages")


async def test_models_are_listed() -> None:
    """/v1/models lists what is served, /v1/models/{id} tells one, and another is 404."""
    async with open_mesh() as mesh:
        (model,) = (await mesh.http.get("/v1/models")).json()["data"]
        assert model == {
            "id": MODEL,
            "object": "model",
            "created": model["created"],
            "owned_by": "holdfast",
            "max_model_len": CONTEXT,
        }
        assert (await mesh.http.get(f"/v1/models/{MODEL}")).json() == model
        missing = await mesh.http.get("/v1/models/org/other")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


async def test_routes_that_there_are_not() -> None:
    """A wrong path is 404, a wrong method 405 with those that are right; both in the API's form."""
    async with open_mesh() as mesh:
        nowhere = await mesh.http.get("/v1/embeddings")
        assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "no_such_route")
        get = await mesh.http.get(CHAT)
        assert (get.status_code, get.headers["allow"]) == (405, "POST")
        assert get.json()["error"]["message"] == f"GET {CHAT}: Method Not Allowed"


async def test_the_clients_trace_travels_with_the_request() -> None:
    """traceparent of the call goes on in the record."""
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with open_mesh() as mesh:
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        async with meanwhile(mesh.http.post(CHAT, json={"messages": HI}, headers=headers)):
            job = await mesh.engine.job()
            await mesh.engine.say(job, "x", finish=LENGTH)
        assert trace_id.encode() in dict(job.record.headers)["traceparent"]


async def test_a_client_that_reads_slowly_gets_it_all_from_the_log() -> None:
    """However much waits for it, of which little waits here."""
    small_window = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)])
    async with open_mesh(max_buffered_tokens=512) as mesh, httpx.AsyncClient(transport=small_window) as client:
        body = {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 20}
        named = logprobs((A, -0.5, [(A, -0.5)] * 20)) * 200
        async with client.stream("POST", f"http://{mesh.addresses.http}{CHAT}", json=body) as response:
            job = await mesh.engine.job()
            for _ in range(12):  # some 3 megabytes: more than is ever under way
                await mesh.engine.say(job, [A] * 200, logprobs=named)
            await mesh.engine.say(job, [A], logprobs=named[:1], finish=LENGTH)
            *found, (_, last), (_, done) = events("\n".join([line async for line in response.aiter_lines()]))
        text = "".join(chunk["choices"][0]["delta"]["content"] for _, chunk in found)
        assert (text, last["choices"][0]["finish_reason"], done) == (chr(A) * 2401, "length", "[DONE]")


@pytest.mark.parametrize("when", ["in the middle", "at the end"])
async def test_a_client_that_stops_reading_loses_its_connection(when: str) -> None:
    """What is not read within write_seconds ends the call as a client that leaves does, long before too much waits: its
    place is free for others, and its request is cancelled where it has not ended."""
    small_window = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)])
    async with (
        open_mesh(max_buffered_tokens=1 << 20, max_streams=1, write_seconds=0.05) as mesh,
        httpx.AsyncClient(transport=small_window) as client,
    ):
        body = {"messages": HI, "stream": when == "in the middle", "logprobs": True, "top_logprobs": 20}
        named = logprobs((A, -0.5, [(A, -0.5)] * 20)) * 200
        request = client.build_request("POST", f"http://{mesh.addresses.http}{CHAT}", json=body)
        async with meanwhile(client.send(request, stream=True)) as call:
            job = await mesh.engine.job()
            for _ in range(12):  # some 3 megabytes: more than is ever under way
                await mesh.engine.say(job, [A] * 200, logprobs=named)
            if when == "at the end":
                await mesh.engine.say(job, [A], logprobs=named[:1], finish=LENGTH)
            else:
                assert (await mesh.engine.cancelled()).reason == "the client left"
        await open_requests(mesh, 0)
        with pytest.raises(httpx.RemoteProtocolError):
            await call.result().aread()


async def test_a_client_that_does_not_read_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """A gateway that is left cuts its connection soon after drain_seconds."""
    small_window = httpx.AsyncHTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)])
    async with httpx.AsyncClient(transport=small_window) as client:
        async with open_mesh(max_buffered_tokens=512) as mesh:
            body = {"messages": HI, "stream": True, "logprobs": True, "top_logprobs": 20}
            named = logprobs((A, -0.5, [(A, -0.5)] * 20)) * 200
            request = client.build_request("POST", f"http://{mesh.addresses.http}{CHAT}", json=body)
            response = await client.send(request, stream=True)
            job = await mesh.engine.job()
            for _ in range(12):  # some 3 megabytes: more than is ever under way
                await mesh.engine.say(job, [A] * 200, logprobs=named)
            while len(mesh.tokenizer.decode_messages) < 3:  # each has 256 tokens at most
                await mesh.client.models()
        with pytest.raises(httpx.RemoteProtocolError):
            await response.aread()
    assert not complaints(caplog)


async def test_httpx_is_not_alone() -> None:
    """A client that sends its request byte by byte, and asks for the connection to be closed, is served, too."""
    async with open_mesh() as mesh:
        host, _, port = mesh.addresses.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"prompt": "hi"}'
        head = f"POST {COMPLETION} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        for byte in head.encode() + body:
            writer.write(bytes([byte]))
            await writer.drain()
        await mesh.engine.say(await mesh.engine.job(), "x", finish=LENGTH)
        response = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert response.startswith(b"HTTP/1.1 200 OK")
        assert b'"text":"x"' in response


def test_a_stream_of_events_is_read_as_browsers_do() -> None:
    """The reader of events used here gives ids and data."""
    assert events(': note\n\nid: c\ndata: {"a": 1}\n\ndata: [DONE]\n\n') == [("c", {"a": 1}), ("", "[DONE]")]
