"""One gateway: `python -m services.gateway`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry

from holdfast import rpc
from holdfast.bus import Bus
from holdfast.client import NEEDS
from holdfast.errors import ConfigurationError
from holdfast.service import run
from holdfast.telemetry import tracing
from holdfast.topics import REQUESTS_BATCH, REQUESTS_INTERACTIVE, TOPICS, Topic
from holdfast.v1.generation_pb2 import REQUEST_CLASS_BATCH, REQUEST_CLASS_INTERACTIVE, RequestClass
from services.gateway import http, web
from services.gateway.admission import Admission
from services.gateway.backlog import Backlog
from services.gateway.cancel import Canceller
from services.gateway.claim import Claims
from services.gateway.cursor import Cursors
from services.gateway.detokenize import Detokenizer
from services.gateway.generate import Gateway
from services.gateway.handover import Handover
from services.gateway.home import NEED, Home
from services.gateway.metrics import Metrics
from services.gateway.observation import Observer
from services.gateway.opening import Opening
from services.gateway.readiness import Readiness
from services.gateway.resume import Resumer
from services.gateway.servicer import servicer
from services.gateway.settings import GatewaySettings
from services.gateway.streams import Streams
from services.gateway.tails import Tails
from services.gateway.tasks import running, together
from services.gateway.tokenizer import Tokenizer
from services.gateway.watch import Watch

logger = structlog.get_logger(__name__)

LAST_WORDS_SECONDS = 1.0
"""How long calls may take beyond the drain: their answers have ended, or end now."""


@dataclass(frozen=True, slots=True)
class GatewayAddresses:
    """Where a running gateway listens, each as `host:port`."""

    grpc: str
    http: str
    """The OpenAI API, health, and `/metrics`."""


@asynccontextmanager
async def serve(
    settings: GatewaySettings, *, bus: Bus | None = None, registry: CollectorRegistry | None = None
) -> AsyncIterator[GatewayAddresses]:
    """A gateway that can take requests: the log was reached, a reply partition claimed, the tokenizer answered, and engines
    were looked for; without one requests wait in the log. Until all were seen, and whenever one is gone, its health is NOT_SERVING and
    `/readyz` says what is missing. Leaving the block hands streams over whose clients go on elsewhere by themselves, lets
    the others end for `drain_seconds`, while what feeds them still runs, and then hands over what can be; until then
    whoever comes is told that it stops.

    Raises:
        ConfigurationError: an address cannot be bound, the log has other topics, the tokenizer has become another, or other
            gateways have the reply partition.
        Unavailable: the log cannot be reached at the start.
    """
    metrics, readiness = Metrics(registry), Readiness(["log", "tokenizer", "engine", NEED])
    admission = Admission(settings, refused=metrics.refused)
    backlogs = make_backlogs(settings, metrics)
    metrics.watch_open(lambda: admission.num_open)
    async with AsyncExitStack() as parts:
        log = bus if bus is not None else await parts.enter_async_context(_kafka(settings))
        await log.create_topics(TOPICS)
        channel = await parts.enter_async_context(rpc.channel(settings.tokenizer))
        tokenizer = Tokenizer(channel, seconds=settings.tokenize_seconds)
        detokenizer = Detokenizer(tokenizer, readiness)
        canceller = Canceller(log)
        make_streams = functools.partial(
            Streams, log, tokenizer=tokenizer, detokenizer=detokenizer, readiness=readiness, metrics=metrics
        )
        tails = Tails(log, lambda partition: make_streams(reply_partition=partition))
        claims = Claims(log, named=settings.reply_partition, seconds=settings.claim_seconds)
        home = Home(claims, tails, readiness)
        cursors = Cursors(keys := cursor_keys(settings, kept=bus is None))
        opening = Opening(settings, cursors=cursors, tails=tails, canceller=canceller)
        handover = Handover(possible=bool(keys))
        await parts.enter_async_context(running(tails.run(), home.run(), detokenizer.run()))
        await parts.enter_async_context(canceller.publishing())
        gateway = Gateway(
            settings,
            bus=log,
            tokenizer=tokenizer,
            home=home,
            canceller=canceller,
            cursors=cursors,
            opening=opening,
            resumer=Resumer(settings, bus=log, tokenizer=tokenizer, tails=tails, opening=opening, cursors=cursors),
            admission=admission,
            backlogs=backlogs,
            handover=handover,
            readiness=readiness,
            observer=Observer(metrics, parts.enter_context(tracing("gateway"))),
        )
        app = http.application(gateway, readiness, metrics, settings)
        last = min(LAST_WORDS_SECONDS, settings.drain_seconds)
        server, site = await parts.enter_async_context(
            together(
                rpc.serving(settings.address, [servicer(gateway, settings)], drain=last),
                web.serving(settings.http_address, app, drain=last, write_seconds=settings.write_seconds),
            )
        )

        async def tell(ready: bool) -> None:
            await server.health.needs({need: need not in readiness.missing for need in NEEDS})
            await (server.health.ready() if ready else server.health.not_ready())

        await readiness.tell(tell)
        await readiness.wait("log", "tokenizer", NEED)
        watch = Watch(log, readiness, backlogs, every=settings.watch_seconds, seconds=settings.log_seconds)
        await watch.look()
        await parts.enter_async_context(running(watch.run()))
        try:
            yield GatewayAddresses(grpc=server.address, http=site.address)
        finally:
            admission.close()
            await readiness.lost("draining", "this gateway is being stopped")
            handover.begin()
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_seconds):
                    await admission.empty()
            site.take_no_more()  # first: a browser that came back and was refused would stay away
            handover.end()


@asynccontextmanager
async def _kafka(settings: GatewaySettings) -> AsyncIterator[Bus]:
    from holdfast.kafka import KafkaBus  # the embedded mesh runs without it

    async with KafkaBus(settings.kafka, client_id="gateway", namespace=settings.kafka_namespace) as bus:
        yield bus


def make_backlogs(settings: GatewaySettings, metrics: Metrics) -> dict[RequestClass.ValueType, Backlog]:
    """That of each class, shown by the metrics."""

    def make(name: str, topic: Topic, max_wait: float) -> Backlog:
        backlog = Backlog(
            name,
            topic.num_partitions,
            max_wait=max_wait,
            max_waiting=settings.max_waiting,
            refused=metrics.refused,
        )
        metrics.watch_backlog(name, waiting=lambda: backlog.num_waiting, wait=lambda: backlog.wait)
        return backlog

    return {
        REQUEST_CLASS_INTERACTIVE: make("interactive", REQUESTS_INTERACTIVE, settings.max_wait_seconds),
        REQUEST_CLASS_BATCH: make("batch", REQUESTS_BATCH, settings.max_batch_wait_seconds),
    }


def cursor_keys(settings: GatewaySettings, *, kept: bool) -> list[bytes]:
    """The keys that sign cursors, the first one first; `kept`: whether the log, and so what cursors point to, outlives this process.
    Raises ConfigurationError where one of several is empty, as of a template whose secret is missing."""
    said = settings.cursor_keys.get_secret_value()
    keys = [key.strip().encode() for key in said.split(",")] if said.strip() else []
    if not all(keys):
        raise ConfigurationError("cursor_keys: one of the keys is empty; leave out the comma beside it, or say the key")
    if kept and not keys:
        logger.warning(
            "cursor_keys is not set: no other gateway can resume the streams of this one, nor this one after a restart"
        )
    return keys


def main() -> None:
    """`python -m services.gateway`."""
    run("gateway", GatewaySettings, serve)


if __name__ == "__main__":
    main()
