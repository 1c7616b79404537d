"""What the service needs of a model's folder: the tokenizer, the model's limits and special ids, the chat templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from holdfast.errors import ConfigurationError

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
"""What configs of different families call the context's length."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""What tokenizer_config.json calls the tokens that chat templates may name."""

_SAMPLING: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 100,
    "top_k": lambda value: value == int(value) and 1 <= value < 1 << 31,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: 0 < value <= 10,
}
"""What of generation_config.json is a default of requests, and what it may be: SamplingParams of the contract. The same
fields as vLLM takes (`--generation-config auto`), and as there `do_sample` is not one of them."""


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A model's tokenizer and what is known about it."""

    backend: Tokenizer = field(repr=False)
    """Neither truncates nor pads, whatever its file says."""
    decoder: dict[str, Any]
    """The decoder part of tokenizer.json, as the library writes it today."""
    special_ids: frozenset[int] = field(repr=False)
    """Added tokens that have no text unless one asks for it."""
    special_texts: tuple[str, ...] = field(repr=False)
    """How these tokens are written."""
    vocab_size: int
    """What the model's config says: rows of the embedding. Ids between the tokenizer's last and this one exist in the
    model, were never trained, and have no text."""
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """All tokens that the model's files say end a sequence; what generation_config.json names stands first."""
    digest: str
    """SHA-256 of tokenizer.json, hexadecimal."""
    special_tokens: dict[str, str]
    """`bos_token` and the like, for templates; a name without a token is absent."""
    sampling: dict[str, Any]
    """How the model's makers say to sample, named as in SamplingParams; what they do not say is absent."""
    chat_templates: dict[str, str] = field(repr=False)
    """By name; "default" is the usual one, "tool_use" the one for conversations with tools. Empty for a base model."""


def load(folder: Path) -> ModelTokenizer:
    """Reads config.json and tokenizer.json, and of tokenizer_config.json, generation_config.json and the templates'
    files those that are there.

    Raises:
        ConfigurationError: a file is missing or does not say what it must.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigurationError(f"{folder} has no tokenizer.json; other forms of tokenizers are not supported")
    content = file.read_bytes()
    try:
        backend = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigurationError(f"{file} is not a tokenizer that this version can read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config, names = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    generation = _json(folder / "generation_config.json")
    text_config = config.get("text_config", config)  # of models that also see or hear
    special_tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token(names.get(name)))}
    added: dict[int, Any] = backend.get_added_tokens_decoder()
    return ModelTokenizer(
        backend=backend,
        decoder=json.loads(backend.decoder.__getstate__()) if backend.decoder else {},
        special_ids=frozenset(id for id, token in added.items() if token.special),
        special_texts=tuple(token.content for token in added.values() if token.special),
        vocab_size=int(text_config.get("vocab_size") or backend.get_vocab_size()),
        context_length=_context_length(text_config, folder),
        bos_token_id=_id_of(backend, special_tokens.get("bos_token")),
        eos_token_ids=_eos_ids(backend, special_tokens.get("eos_token"), generation, text_config),
        digest=hashlib.sha256(content).hexdigest(),
        special_tokens=special_tokens,
        sampling=_sampling(generation, folder / "generation_config.json"),
        chat_templates=_chat_templates(folder, names),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} must hold a JSON object")
    return value


def _token(value: str | dict[str, Any] | None) -> str | None:
    """A token's text, which is written as a string or as an object that describes the token."""
    return value["content"] if isinstance(value, dict) else value


def _id_of(backend: Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _context_length(config: dict[str, Any], folder: Path) -> int:
    for key in _CONTEXT_KEYS:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ConfigurationError(f"{folder / 'config.json'} does not say how long the context is ({_CONTEXT_KEYS[0]})")


def _eos_ids(backend: Tokenizer, token: str | None, *configs: dict[str, Any]) -> tuple[int, ...]:
    ids: dict[int, None] = {}  # a set that keeps the order
    for config in configs:
        named = config.get("eos_token_id")
        ids.update(dict.fromkeys(named if isinstance(named, list) else [] if named is None else [named]))
    if (id := _id_of(backend, token)) is not None:
        ids[id] = None
    return tuple(ids)


def _sampling(generation: dict[str, Any], file: Path) -> dict[str, Any]:
    given = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
    if given.get("top_k") in (0, -1):  # all, as without it
        del given["top_k"]
    for name, value in given.items():
        if type(value) not in (int, float) or not _SAMPLING[name](value):
            raise ConfigurationError(f"{file} names the {name} {value!r}, with which no model can be sampled")
    return given


def _chat_templates(folder: Path, names: dict[str, Any]) -> dict[str, str]:
    """The templates that the files name, files of their own before tokenizer_config.json, as transformers reads
    them."""
    file = folder / "chat_template.jinja"
    named = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if file.is_file() or named:
        paths = ({"default": file} if file.is_file() else {}) | named
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    inline = names.get("chat_template")
    if isinstance(inline, list):
        return {entry["name"]: entry["template"] for entry in inline}
    return {"default": inline} if inline else {}
