"""The `openai` package, as its users use it, on the HTTP face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from holdfast.ids import of_client
from tests.gateway.doubles import EOS, LENGTH, MODEL, STOP, Mesh, ids, open_mesh


@asynccontextmanager
async def connected(mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{mesh.addresses.http}/v1", api_key="none", max_retries=0) as client:
        yield client


async def answering(mesh: Mesh, text: str = "Good day") -> None:
    """An engine that gives this answer to the next request, in two steps."""
    job = await mesh.engine.job()
    await mesh.engine.say(job, text[:5])
    await mesh.engine.say(job, [*ids(text[5:]), EOS], finish=STOP, cached=1)


async def test_a_chat_streams_with_usage() -> None:
    """The async client streams a chat: text, the reason of the end, and the usage."""
    async with open_mesh() as mesh, connected(mesh) as client, asyncio.TaskGroup() as group:
        group.create_task(answering(mesh))
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            user="somebody",
            extra_body={"top_k": 5},
        )
        text, reason, usage = "", None, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
        assert (text, reason) == ("Good day", "stop")
        assert usage is not None
        assert usage.completion_tokens == 9
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == 1


async def test_a_chat_in_one_piece() -> None:
    """The async client gets a whole chat with log-probabilities asked for, and the request's id."""
    async with open_mesh() as mesh, connected(mesh) as client, asyncio.TaskGroup() as group:
        group.create_task(answering(mesh))
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "Good day"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9
        assert answer._request_id == answer.id


async def test_a_completion_streams_with_usage() -> None:
    """The async client streams a completion."""
    async with open_mesh() as mesh, connected(mesh) as client, asyncio.TaskGroup() as group:
        group.create_task(answering(mesh))
        stream = await client.completions.create(
            model=MODEL, prompt="hi", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Good day"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 9


async def test_the_synchronous_client() -> None:
    """The sync client streams and gets whole chats and completions, with usage, and lists the model."""

    def use(address: str) -> list[str]:
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
            (model,) = client.models.list().data
            texts = [model.id, client.models.retrieve(MODEL).id]
            stream = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
            chat = list(stream)
            texts.append("".join(choice.delta.content or "" for chunk in chat for choice in chunk.choices))
            assert chat[-1].usage is not None
            completion = client.completions.create(model=MODEL, prompt="hi", max_tokens=9)
            assert completion.usage is not None
            texts.append(completion.choices[0].text)
            return texts

    async def engine(mesh: Mesh) -> None:
        await answering(mesh)
        await answering(mesh)

    async with open_mesh() as mesh, asyncio.TaskGroup() as group:
        group.create_task(engine(mesh))
        assert await asyncio.to_thread(use, mesh.addresses.http) == [MODEL, MODEL, "Good day", "Good day"]


async def test_log_probabilities_are_understood() -> None:
    """The client's types take the form in which log-probabilities come."""
    async with open_mesh() as mesh, connected(mesh) as client, asyncio.TaskGroup() as group:

        async def engine() -> None:
            job = await mesh.engine.job()
            part = mesh.engine.part(job, ids("a"), finish=LENGTH)
            part.logprobs.add(logprob=-0.5).top.add(token_id=98, logprob=-1.5)
            await mesh.engine.write(job, part)

        group.create_task(engine())
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        (token,) = logprobs.content
        assert (token.token, token.logprob, token.top_logprobs[0].token) == ("a", -0.5, "b")


async def test_refusals_are_the_clients_errors() -> None:
    """Each refusal is the exception that the client has for it."""
    async with open_mesh() as mesh, connected(mesh) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL, prompt="hi", temperature=101)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            await client.completions.create(model="gpt-9", prompt="hi")


async def test_an_error_in_a_stream_is_raised() -> None:
    """A stream that breaks raises, rather than to end as if it was complete."""
    async with open_mesh() as mesh, connected(mesh) as client, asyncio.TaskGroup() as group:

        async def engine() -> None:
            await mesh.engine.say(await mesh.engine.job(), [5000])

        group.create_task(engine())
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="token 5000"):
            async for _ in stream:
                pass


async def test_leaving_a_stream_ends_the_request() -> None:
    """Closing the stream cancels the request."""
    async with open_mesh() as mesh, connected(mesh) as client:
        async with await client.completions.create(model=MODEL, prompt="hi", stream=True) as stream:
            job = await mesh.engine.job()
            await mesh.engine.say(job, "so far")
            async for chunk in stream:
                assert chunk.choices[0].text == "so far"
                break
        assert of_client((await mesh.engine.cancelled()).request_id) == of_client(job.request.request_id)
