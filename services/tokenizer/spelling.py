"""What tokens stand for: the bytes that a tokenizer's decoder makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Spelling:
    """What tokens stand for."""

    token: Callable[[str], bytes]
    first_token: Callable[[str], bytes]
    """The same for the first token of a text."""


def spelling(decoder: dict[str, Any]) -> Spelling:
    """How the decoder of a tokenizer.json spells tokens. Known are the byte-level one and the parts from which the
    decoders of the SentencePiece family are made (huggingface/tokenizers, `decoders`).

    Raises:
        ConfigurationError: another decoder.
    """
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    if {"type": "ByteLevel"}.items() <= steps[0].items() and all(step.get("type") == "Fuse" for step in steps[1:]):
        return Spelling(_byte_level, _byte_level)
    replaced: list[tuple[str, str]] = []
    byte_fallback = False
    dropped_first = stripped_first = ""
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": content, "start": 0 | 1 as start, "stop": 0}:
                stripped_first = content if start else ""
            case {"type": "Metaspace", "replacement": mark}:
                replaced.append((mark, " "))
                dropped_first = mark if step.get("prepend_scheme", "always") != "never" else ""
            case _:
                raise ConfigurationError(f"cannot decode with {step or 'no decoder'}: not a decoder known here")

    def token(text: str) -> bytes:
        if byte_fallback and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)):
            return bytes.fromhex(byte[1])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    def first_token(text: str) -> bytes:
        return token(text.replace(dropped_first, "")).removeprefix(stripped_first.encode())

    return Spelling(token, first_token)


def _byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level BPE; a token that is not made of its letters is taken as it is written."""
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _letters() -> dict[str, int]:
    """The letter for each byte in byte-level BPE: printable bytes of Latin-1 are themselves, the others, in order, the
    code points from 256 on (openai/gpt-2, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters()
