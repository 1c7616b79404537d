"""What a gateway can be told."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr

from holdfast.settings import Settings
from holdfast.topics import TOKENS
from services.gateway.bodies import MAX_BODY_BYTES


class GatewaySettings(Settings, env_prefix="HOLDFAST_GATEWAY_"):
    """One gateway."""

    address: str = "127.0.0.1:50051"
    """Where gRPC is served, `host:port`; port 0 for any."""
    http_address: str = "127.0.0.1:8000"
    """Where HTTP is served (the OpenAI API, health, metrics), `host:port`; port 0 for any."""
    tokenizer: str = "127.0.0.1:50052"
    """`host:port` of the tokenizer. Several are used in turns: a name that has them all, or numbers with commas between, as in
    10.0.0.1:50052,10.0.0.2:50052."""
    kafka: str = "127.0.0.1:9092"
    """Bootstrap servers of the log, `host:port,host:port`."""
    kafka_namespace: str = ""
    """Stands before the names of all topics and groups, so that several meshes can share a cluster."""
    reply_partition: Annotated[int, Field(ge=0, lt=TOKENS.num_partitions)] | None = None
    """The partition of the token topic that answers come to, which no other gateway of the mesh may have; by default one that
    is free."""
    claim_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long another gateway may keep the `reply_partition` that was named: one that died is known to be dead after 6."""
    cursor_keys: SecretStr = SecretStr("")
    """Secrets that sign cursors, of at least 16 bytes, with commas between: the first one signs, all are accepted.
    The same at all gateways of a mesh, so that a stream can be resumed at any of them; better in the environment or the
    file than as a flag. Empty: one is drawn, and cursors are good at this gateway alone, until it stops."""
    drain_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long open streams may go on after the stop signal."""

    max_streams: Annotated[int, Field(ge=1)] = 1024
    """Most requests between call and last token at once; what comes beyond is refused with RESOURCE_EXHAUSTED. As many streams
    again may be read from a cursor: who was accepted at a gateway that went finds a place at one that is full."""
    max_wait_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longest that an interactive request may have to wait for an engine, as far as can be estimated; what would wait longer
    is refused with RESOURCE_EXHAUSTED, and told when to come back."""
    max_batch_wait_seconds: Annotated[float, Field(gt=0, le=TOKENS.retention.total_seconds())] = 10_800.0
    """The same for a batch request. A cursor to its start is good for 6 hours, as long as tokens are kept: half of that leaves
    room for an estimate that was wrong, and for the answer."""
    max_waiting: Annotated[int, Field(ge=1)] = 10_000
    """Most requests of a class that may wait for an engine, in the whole mesh, whatever is known of how long: as many are
    accepted while no engine is there."""
    affinity_tokens: Annotated[int, Field(ge=0)] = 128
    """How many first tokens two prompts must share to go to the same engine, so that it computes them once. Engines keep
    prefixes in blocks of 32 or 64 tokens: less than two is not worth a detour. Where all prompts begin with the same long
    instructions, a number beyond these tells conversations apart. The same at all gateways of a mesh; 0 for no affinity."""
    max_choices: Annotated[int, Field(ge=1, le=128)] = 128
    """Most continuations of one request."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of a prompt; by default what the model's context leaves."""
    max_prompt_bytes: Annotated[int, Field(ge=1, le=15 << 20)] = 4 << 20
    """Most bytes of a prompt's text: what the tokenizer is given at all."""
    max_timeout_seconds: Annotated[float, Field(gt=0)] = 86_400.0
    """Longest `timeout` that a request may ask for."""
    http_timeout_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long an HTTP call that does not stream may take where its `timeout` says nothing: its client sees no sign of life
    meanwhile. 0 for as long as it takes."""
    tokenize_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the tokenizer may take for a prompt."""

    log_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long the log may take for a request's record, and for the question whether it is there. A request whose record
    takes longer is refused with UNAVAILABLE; a log that does not answer is missing, and until it does every request is."""
    watch_seconds: Annotated[float, Field(gt=0)] = 2.0
    """How often the log is asked whether it is there, and engines behind it."""

    flush_ms: Annotated[float, Field(ge=0)] = 20.0
    """Least time between two messages of a stream, except its first and last ones; 0 sends tokens as they come."""
    max_buffered_tokens: Annotated[int, Field(ge=512)] = 4096
    """About how many tokens of a choice wait here for a client that reads slowly; what more there is waits in the log."""
    max_reading_bytes: Annotated[int, Field(ge=MAX_BODY_BYTES)] = 64 << 20
    """Most bytes of HTTP bodies that have not come to their end; what comes beyond is refused with 429."""
    read_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long a client may take to send the body of an HTTP call; after that it is refused with 408."""
    write_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a client may leave unread what is written for it; after that it is as one that left."""
    keepalive_seconds: Annotated[float, Field(gt=0)] = 15.0
    """An HTTP stream that has been silent for so long gets a comment."""
