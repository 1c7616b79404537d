"""JSON that users and other packages write. An object that has a key twice is refused: Python takes the last, others the first, and
nobody would hear that the two differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def parsed(text: str) -> Any:
    """What the text says. Raises ValueError where it is no JSON, or an object in it has a key twice, with that key."""
    return json.loads(text, object_pairs_hook=_object)


def object_of(text: str) -> dict[str, Any]:
    """The object that the text says. Raises ValueError as `parsed` does, and where it is something else."""
    match parsed(text):
        case dict() as content:
            return content
        case other:
            raise ValueError(f"it is {json.dumps(other)[:40]}")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key!r} twice")
        found[key] = value
    return found
