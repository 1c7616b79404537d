"""What the whole mesh in one process can be told: what each part can, but for what follows from being in one process."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import CLI_SUPPRESS, CliSuppress

from holdfast.errors import ConfigurationError
from holdfast.settings import Settings
from services.engine.settings import EngineSettings
from services.gateway.settings import GatewaySettings
from services.kvstore.settings import KVStoreSettings
from services.tokenizer.settings import TokenizerSettings

ANY_PORT = "127.0.0.1:0"


class GatewayPart(GatewaySettings):
    """The gateway of one process."""

    kafka: CliSuppress[str] = ""
    kafka_namespace: CliSuppress[str] = ""
    tokenizer: CliSuppress[str] = ""


class TokenizerPart(TokenizerSettings):
    """The tokenizer of one process."""

    model: CliSuppress[str] = ""
    served_model_name: CliSuppress[str] = ""
    address: str = ANY_PORT
    """Where the service listens, `host:port`; port 0 for any."""


class EnginePart(EngineSettings):
    """The engine of one process."""

    model: CliSuppress[str] = ""
    served_model_name: CliSuppress[str] = ""
    kafka: CliSuppress[str] = ""
    kafka_namespace: CliSuppress[str] = ""
    kvstore: str = ""
    """`host:port` of a KV store for prefixes that this engine no longer holds; empty for the one in this process."""


class KVStorePart(KVStoreSettings):
    """The KV store of one process."""

    address: str = ANY_PORT
    """Where the service listens, `host:port`; port 0 for any."""
    capacity_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Memory for blocks."""


class MeshSettings(Settings, env_prefix="HOLDFAST_"):
    """All services in one process."""

    model: str = "smollm2-135m-instruct"
    """What tokenizer and engine serve: a folder, a GGUF file, a name known to `holdfast pull`, or a hub id."""
    served_model_name: str = ""
    """The name that requests use; empty for the last part of `model`."""
    ask: str = ""
    """A question to ask once all is ready; empty for none."""
    exit: bool | None = None
    """Whether to end after the answer to `ask`, or once all is ready where nothing is asked; by default only after an
    answer, where standard input is no terminal."""

    gateway: GatewayPart = Field(default_factory=GatewayPart)
    """The gateway."""
    tokenizer: TokenizerPart = Field(default_factory=TokenizerPart)
    """The tokenizer."""
    engine: EnginePart = Field(default_factory=EnginePart)
    """The engine."""
    kvstore: KVStorePart = Field(default_factory=KVStorePart)
    """The KV store."""


def refuse_what_is_decided_here(settings: MeshSettings) -> None:
    """Raises ConfigurationError: a setting of a part was given that follows from being in one process, one that `--help`
    does not show."""
    for part, given in settings:
        if not isinstance(given, Settings):
            continue
        for name, field in type(given).model_fields.items():
            if CLI_SUPPRESS in field.metadata and name in given.model_fields_set:
                what = "set it without the part's name" if "model" in name else "it means nothing in one process"
                raise ConfigurationError(f"{part}.{name} cannot be set here: {what}")
