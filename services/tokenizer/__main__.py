"""One tokenizer: `python -m services.tokenizer`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from prometheus_client import CollectorRegistry

from holdfast import models, rpc
from holdfast.errors import ConfigurationError
from holdfast.service import run
from holdfast.telemetry import metrics_server
from services.tokenizer.chat import TemplateError
from services.tokenizer.decode import Detokenizer
from services.tokenizer.encode import encoding
from services.tokenizer.loading import ModelTokenizer, load
from services.tokenizer.metrics import TokenizerMetrics
from services.tokenizer.renderer import Renderer, rendering
from services.tokenizer.servicer import TokenizerServicer, servicer
from services.tokenizer.settings import TokenizerSettings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerAddresses:
    """Where a running tokenizer listens."""

    address: str
    """`host:port` of the service."""
    metrics_port: int
    """Port of `/metrics`; 0 where it is not served."""


@asynccontextmanager
async def serve(
    settings: TokenizerSettings, *, registry: CollectorRegistry | None = None
) -> AsyncIterator[TokenizerAddresses]:
    """A tokenizer that is ready. Leaving the block lets running calls end.

    Raises:
        ConfigurationError: the model cannot be had or read, or an address cannot be bound.
    """
    folder = await asyncio.to_thread(models.resolve, settings.model, weights=False, progress=log.info)
    tokenizer = await asyncio.to_thread(load, folder)
    detokenizer = await asyncio.to_thread(Detokenizer, tokenizer)
    registry = registry or CollectorRegistry()
    async with (
        encoding(tokenizer, threads=settings.threads) as encoder,
        chat_rendering(settings, tokenizer) as renderer,
    ):
        implementation = TokenizerServicer(
            settings,
            tokenizer,
            model=settings.served_model_name or models.served_name(settings.model),
            encoder=encoder,
            renderer=renderer,
            detokenizer=detokenizer,
            metrics=TokenizerMetrics(registry),
        )
        async with (
            metrics_server(settings.metrics_address, registry) as metrics_port,
            rpc.serving(settings.address, [servicer(implementation)], drain=settings.drain_seconds) as server,
        ):
            await server.health.ready()
            yield TokenizerAddresses(address=server.address, metrics_port=metrics_port)


@asynccontextmanager
async def chat_rendering(settings: TokenizerSettings, tokenizer: ModelTokenizer) -> AsyncIterator[Renderer | None]:
    """What renders the model's chat templates; nothing for a model without one."""
    if not tokenizer.chat_templates:
        yield None
        return
    texts = tokenizer.special_texts if settings.special_tokens_in_chat == "text" else ()
    try:
        async with rendering(
            tokenizer.chat_templates,
            tokenizer.special_tokens,
            limit_seconds=settings.template_seconds,
            unsayable=texts,
        ) as renderer:
            yield renderer
    except TemplateError as error:
        raise ConfigurationError(f"{settings.model}: {error}") from error


def main() -> None:
    """`python -m services.tokenizer`."""
    run("tokenizer", TokenizerSettings, serve)


if __name__ == "__main__":
    main()
