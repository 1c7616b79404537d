"""A gateway between what plays the rest of the mesh: the log in memory, an engine that writes what a test says, and a
tokenizer whose ids are bytes."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from holdfast import rpc
from holdfast.accept import Prefix
from holdfast.bus import Bus, Reader, Record
from holdfast.client import Client
from holdfast.errors import InvalidRequest
from holdfast.memory import MemoryBus
from holdfast.topics import CONTROL, ENGINES, REQUESTS, REQUESTS_INTERACTIVE, TOKENS, TOPICS
from holdfast.v1 import gateway_pb2_grpc, generation_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.gateway.__main__ import GatewayAddresses, serve
from services.gateway.cursor import Cursors
from services.gateway.settings import GatewaySettings
from tests.conftest import OpenBus

MODEL = "bytes"
KEY = "the key of the mesh of the tests"
CURSORS = Cursors([KEY.encode()])
EOS = 256
VOCABULARY = 258
CONTEXT = 512

STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def ids(text: str) -> list[int]:
    """A text's tokens: its bytes."""
    return list(text.encode())


@dataclass
class ByteTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Ids below 256 are bytes, 256 is the end of a sequence, shown as <eos> where special tokens are."""

    digest: str = "d1"
    chat: bool = True
    refuse: InvalidRequest | None = None
    """What every encoding ends with."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set encodings wait."""
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by every encoding."""
    sampling: generation_pb2.SamplingParams = field(default_factory=generation_pb2.SamplingParams)
    """What the model's makers say."""
    decode_messages: list[tokenizer_pb2.DecodeRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open.set()

    async def _encode(self) -> None:
        self.asked.set()
        await self.open.wait()
        if self.refuse is not None:
            raise self.refuse

    @rpc.unary
    async def GetTokenizerInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: Any
    ) -> tokenizer_pb2.GetTokenizerInfoResponse:
        return tokenizer_pb2.GetTokenizerInfoResponse(
            model=MODEL,
            vocab_size=VOCABULARY,
            context_length=CONTEXT,
            eos_token_ids=[EOS],
            chat=self.chat,
            digest=self.digest,
            default_sampling=self.sampling,
        )

    @rpc.unary
    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: Any) -> tokenizer_pb2.EncodeResponse:
        await self._encode()
        return tokenizer_pb2.EncodeResponse(ids=[tokenizer_pb2.TokenIds(ids=ids(text)) for text in request.texts])

    @rpc.unary
    async def EncodeChat(
        self, request: tokenizer_pb2.EncodeChatRequest, context: Any
    ) -> tokenizer_pb2.EncodeChatResponse:
        """`system: Be kind.\\nuser: Hi\\nassistant:`, with the template's variables in front where there are some."""
        await self._encode()
        chat = request.chat
        lines = [f"{message.role}: {message.content}" for message in chat.messages]
        if not chat.continue_final_message:
            lines.append("assistant:")
        if chat.template_args_json:
            lines.insert(0, json.dumps(json.loads(chat.template_args_json)))
        return tokenizer_pb2.EncodeChatResponse(ids=tokenizer_pb2.TokenIds(ids=ids("\n".join(lines))))

    @rpc.stream
    async def Decode(
        self, requests: AsyncIterator[tokenizer_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.DecodeResponse]:
        async for request in requests:
            self.decode_messages.append(request)
            yield tokenizer_pb2.DecodeResponse(items=[self._decoded(item) for item in request.items])

    def _decoded(self, item: tokenizer_pb2.DecodeItem) -> tokenizer_pb2.DecodedItem:
        text, count, decoder = "", 0, codecs.getincrementaldecoder("utf-8")("replace")
        for index, token in enumerate(item.ids):
            text += decoder.decode(bytes([token])) if token < 256 else "<eos>" * item.show_special_tokens
            if not decoder.getstate()[0]:
                count = index + 1
        return tokenizer_pb2.DecodedItem(text=text, num_consumed=len(item.ids) if item.last else count)


@asynccontextmanager
async def tokenizing(
    tokenizer: ByteTokenizer, *, address: str = "127.0.0.1:0", drain: float = 0
) -> AsyncIterator[rpc.Server]:
    """The tokenizer as a service."""
    add = tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server
    servicer = rpc.Servicer("holdfast.v1.TokenizerService", lambda server: add(tokenizer, server))
    async with rpc.serving(address, [servicer], drain=drain) as server:
        yield server


@dataclass
class Job:
    """A request as the engine got it, and what it wrote of each choice."""

    request: generation_pb2.GenerationRequest
    record: Record
    written: dict[int, Prefix] = field(default_factory=dict)


class FakeEngine:
    """Takes requests and cancellations off the log, and writes tokens to it as told."""

    def __init__(self, bus: Bus, requests: Reader, control: Reader) -> None:
        self.bus = bus
        self._requests = requests
        self._control = control

    async def job(self) -> Job:
        """The next request."""
        (record,) = await self._requests.read(max_records=1)
        return Job(generation_pb2.GenerationRequest.FromString(record.value), record)

    async def cancelled(self) -> generation_pb2.Cancel:
        """The next cancellation."""
        (record,) = await self._control.read(max_records=1)
        return generation_pb2.Cancel.FromString(record.value)

    async def write(self, job: Job, *parts: generation_pb2.StreamTokens, epoch: int = 1) -> None:
        """A record for a request's reply partition, of these parts."""
        source = generation_pb2.SourcePartition(request_class=job.request.request_class, partition=job.record.partition)
        batch = generation_pb2.TokenBatch(source=source, epoch=epoch, streams=parts, engine="fake")
        await self.bus.publish(TOKENS.partition(job.request.reply_partition), batch.SerializeToString())

    async def say(
        self,
        job: Job,
        tokens: str | Sequence[int] = (),
        *,
        choice: int = 0,
        finish: generation_pb2.FinishReason.ValueType | None = None,
        cached: int = 0,
        logprobs: Sequence[generation_pb2.TokenLogprobs] = (),
        epoch: int = 1,
    ) -> None:
        """The next tokens of a choice, as an engine writes them; a text stands for its bytes."""
        new = ids(tokens) if isinstance(tokens, str) else list(tokens)
        await self.write(
            job, self.part(job, new, choice=choice, finish=finish, cached=cached, logprobs=logprobs), epoch=epoch
        )

    def part(
        self,
        job: Job,
        new: Sequence[int],
        *,
        choice: int = 0,
        finish: generation_pb2.FinishReason.ValueType | None = None,
        cached: int = 0,
        logprobs: Sequence[generation_pb2.TokenLogprobs] = (),
    ) -> generation_pb2.StreamTokens:
        """The next tokens of a choice, for a record."""
        before = job.written.get(choice, Prefix())
        job.written[choice] = before.extended(new)
        part = generation_pb2.StreamTokens(
            request_id=job.request.request_id,
            choice=choice,
            first_index=before.count,
            token_ids=new,
            logprobs=logprobs,
            prefix_hash=before.hash,
        )
        if finish is not None:
            usage = generation_pb2.Usage(
                prompt_tokens=len(job.request.prompt_token_ids),
                cached_tokens=cached,
                completion_tokens=job.written[choice].count,
            )
            part.finish.CopyFrom(generation_pb2.Finish(reason=finish, usage=usage))
        return part


@asynccontextmanager
async def playing_engine(bus: Bus) -> AsyncIterator[FakeEngine]:
    """An engine that is told all requests and cancellations from now on."""
    await bus.create_topics(TOPICS)
    requests = {partition: None for topic in REQUESTS.values() for partition in topic.partitions}
    async with (
        bus.join(ENGINES, [REQUESTS_INTERACTIVE]),
        bus.reader(requests) as jobs,
        bus.reader({CONTROL.partition(0): None}) as control,
    ):
        yield FakeEngine(bus, jobs, control)


@dataclass
class Face:
    """A gateway beside others."""

    addresses: GatewayAddresses
    client: Client
    http: httpx.AsyncClient
    life: AsyncExitStack
    """Closing it stops the gateway."""


@asynccontextmanager
async def open_face(bus: Bus, tokenizer: str, **settings: Any) -> AsyncIterator[Face]:
    """A gateway that is ready, on this log and with the tokenizer there; it can be stopped early."""
    given: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "http_address": "127.0.0.1:0",
        "cursor_keys": KEY,
        "flush_ms": 0,
        "drain_seconds": 0,
    } | settings
    async with AsyncExitStack() as parts:
        life = await parts.enter_async_context(AsyncExitStack())
        addresses = await life.enter_async_context(serve(GatewaySettings(tokenizer=tokenizer, **given), bus=bus))
        client = await parts.enter_async_context(Client(addresses.grpc))
        http = await parts.enter_async_context(httpx.AsyncClient(base_url=f"http://{addresses.http}", timeout=30))
        yield Face(addresses, client, http, life)


@dataclass
class Two:
    """Two gateways of one mesh, each with a reply partition and a connection to the log of its own."""

    first: Face
    second: Face
    engine: FakeEngine
    bus: Bus


@asynccontextmanager
async def two_gateways(open_bus: OpenBus, *, second_key: str = KEY, **settings: Any) -> AsyncIterator[Two]:
    """Both are ready."""
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        bus = await enter(open_bus())
        engine = await enter(playing_engine(bus))
        tokenizer = (await enter(tokenizing(ByteTokenizer()))).address
        first = await enter(open_face(await enter(open_bus()), tokenizer, reply_partition=3, **settings))
        second = await enter(
            open_face(await enter(open_bus()), tokenizer, reply_partition=4, cursor_keys=second_key, **settings)
        )
        yield Two(first, second, engine, bus)


@dataclass
class Mesh:
    """A gateway and its surroundings."""

    bus: MemoryBus
    tokenizer: ByteTokenizer
    tokenizer_life: AsyncExitStack
    """Closing it stops the tokenizer."""
    tokenizer_address: str
    engine: FakeEngine
    addresses: GatewayAddresses
    client: Client
    stub: gateway_pb2_grpc.GatewayServiceAsyncStub
    http: httpx.AsyncClient


@asynccontextmanager
async def open_mesh(
    *, log: MemoryBus | None = None, tokenizer: ByteTokenizer | None = None, **settings: Any
) -> AsyncIterator[Mesh]:
    """A gateway that is ready, with these settings; tokens are sent as they come unless these say otherwise."""
    tokenizer = tokenizer or ByteTokenizer()
    async with AsyncExitStack() as parts:
        bus = await parts.enter_async_context(log or MemoryBus())
        engine = await parts.enter_async_context(playing_engine(bus))
        tokenizer_life = await parts.enter_async_context(AsyncExitStack())
        server = await tokenizer_life.enter_async_context(tokenizing(tokenizer))
        given: dict[str, Any] = {
            "address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "cursor_keys": KEY,
            "flush_ms": 0,
            "reply_partition": 0,
            "drain_seconds": 0,
        } | settings
        addresses = await parts.enter_async_context(serve(GatewaySettings(tokenizer=server.address, **given), bus=bus))
        channel = await parts.enter_async_context(rpc.channel(addresses.grpc))
        yield Mesh(
            bus=bus,
            tokenizer=tokenizer,
            tokenizer_life=tokenizer_life,
            tokenizer_address=server.address,
            engine=engine,
            addresses=addresses,
            client=await parts.enter_async_context(Client(addresses.grpc)),
            stub=gateway_pb2_grpc.GatewayServiceStub(channel),
            http=await parts.enter_async_context(httpx.AsyncClient(base_url=f"http://{addresses.http}", timeout=30)),
        )
