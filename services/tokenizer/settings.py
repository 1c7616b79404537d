"""What a tokenizer can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from holdfast.settings import Settings


class TokenizerSettings(Settings, env_prefix="HOLDFAST_TOKENIZER_"):
    """One tokenizer."""

    model: str = "smollm2-135m-instruct"
    """Whose tokenizer: a folder, a GGUF file, a name known to `holdfast pull`, or a hub id."""
    served_model_name: str = ""
    """The name that requests use; empty for the last part of `model`."""
    address: str = "127.0.0.1:50052"
    """Where the service listens, `host:port`; port 0 for any."""
    metrics_address: str = ""
    """Where `/metrics` is served, `host:port`; empty for nowhere."""
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long running calls may go on after the stop signal."""

    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads that encode; by default one for each core."""
    max_waiting: Annotated[int, Field(ge=1)] = 256
    """Most calls that encode or wait for a thread; more are refused as overloaded."""
    max_text_bytes: Annotated[int, Field(ge=1, le=4 << 20)] = 4 << 20
    """Most bytes of text in a call, or of a rendered conversation. The ids of 4 MiB still fit into one answer."""
    max_texts: Annotated[int, Field(ge=1)] = 1024
    """Most texts in a call."""
    special_tokens_in_chat: Literal["text", "special"] = "text"
    """What `<|im_start|>` and the like are that a conversation's own strings hold: text like any other, so that no message
    can pretend to be another's, or the special tokens. Those of a prompt always count: it is all its sender's."""
    template_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Longest time that a chat template may run."""
