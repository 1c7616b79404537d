"""Cursors: where a client stands in its stream, as one opaque string that any gateway of the mesh can go on from.

What a client gets is the base64url form, without padding, of a `Cursor` message and a signature: whoever holds it may
read that one stream from there on, and nothing else. The signature is HMAC-SHA-256, cut to 16 bytes.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from holdfast.accept import Prefix, Source
from holdfast.errors import ConfigurationError, InvalidRequest
from holdfast.events import FinishReason, Usage
from holdfast.records import source_from_wire, source_to_wire
from holdfast.topics import REQUESTS, TOKENS
from holdfast.v1 import generation_pb2 as pb
from services.gateway.choice import ChoiceEnd, Mark, Place

MAC_BYTES = 16
MIN_KEY_BYTES = 16
MAX_LENGTH = 1 << 18
"""Characters of the longest string that is looked at: a cursor of 128 choices has about 10,000."""

TO_WIRE = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
FROM_WIRE = {wire: reason for reason, wire in TO_WIRE.items()}


@dataclass(frozen=True, slots=True)
class Cursor:
    """A stream, and where its client stands."""

    request_id: str
    source: Source
    """Where the request lies: the topic and partition,"""
    request_offset: int
    """and the offset there."""
    reply_partition: int
    mark: Mark
    """Where to read on in the reply partition: no unread token of the stream lies before it. The epoch is the highest
    one of `source` there."""
    places: tuple[Place, ...]
    """One for each choice."""


class Cursors:
    """Signs cursors with the first of some keys, and accepts what was signed with any of them."""

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        """Without keys one is drawn: then a cursor is good at this gateway alone, and as long as it runs.

        Raises:
            ConfigurationError: a key is so short that it could be guessed.
        """
        if any(len(key) < MIN_KEY_BYTES for key in keys):
            raise ConfigurationError(f"cursor_keys: a key that signs cursors has at least {MIN_KEY_BYTES} bytes")
        self._keys = tuple(keys) or (secrets.token_bytes(32),)

    def encode(self, cursor: Cursor) -> str:
        """The cursor as a client gets it."""
        return self.encoder(cursor)(cursor.mark, cursor.places)

    def encoder(self, start: Cursor) -> Callable[[Mark, Sequence[Place]], str]:
        """Encodes where a client stands in the stream of this cursor. What all cursors of the stream have in common is
        made once: there is one for each event."""
        head, key = _head(start), self._keys[0]
        known: list[tuple[Place, bytes]] = [(place, _choice_to_wire(place)) for place in start.places]

        def encode(mark: Mark, places: Sequence[Place]) -> str:
            for index, place in enumerate(places):  # of many choices one event moves one
                if place is not known[index][0]:
                    known[index] = (place, _choice_to_wire(place))
            # One message: those that follow each other are read as merged.
            content = b"".join((head, _mark_to_wire(mark, places), *(choice for _, choice in known)))
            return base64.urlsafe_b64encode(content + _mac(key, content)).rstrip(b"=").decode()

        return encode

    def decode(self, text: str) -> Cursor:
        """The cursor that a client gave back.

        Raises:
            InvalidRequest: no gateway that shares a key with this one gave out such a cursor.
        """
        if not text:
            raise InvalidRequest("an empty cursor; give one back as it came", field="cursor")
        if len(text) > MAX_LENGTH:
            raise InvalidRequest("not a cursor: it is too long", field="cursor")
        try:
            signed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest("not a cursor; give one back as it came", field="cursor") from error
        content, mac = signed[:-MAC_BYTES], signed[-MAC_BYTES:]
        if not any([hmac.compare_digest(mac, _mac(key, content)) for key in self._keys]):  # noqa: C419 - all, always
            raise InvalidRequest(
                "the cursor was altered, or is of another mesh, or of a gateway that has stopped and had no key of the "
                "mesh: none of the keys here has signed it",
                field="cursor",
            )
        try:
            return _from_wire(pb.Cursor.FromString(content))
        except (DecodeError, KeyError, ValueError) as error:
            raise InvalidRequest("the cursor is of another version of the mesh", field="cursor") from error


def _mac(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")[:MAC_BYTES]


def _head(cursor: Cursor) -> bytes:
    return pb.Cursor(
        reply_partition=cursor.reply_partition,
        request_id=cursor.request_id,
        source=source_to_wire(cursor.source),
        request_offset=cursor.request_offset,
    ).SerializeToString()


def _mark_to_wire(mark: Mark, places: Sequence[Place]) -> bytes:
    return pb.Cursor(
        offset=mark.offset,
        epoch=mark.epoch,
        next_index=[place.prefix.count for place in places],
        prefix_hash=[place.prefix.hash for place in places],
    ).SerializeToString()


def _choice_to_wire(place: Place) -> bytes:
    choice = pb.CursorChoice(
        context=place.context,
        held=place.held,
        num_characters=place.num_characters,
        end=None if place.end is None else _end_to_wire(place.end, delivered=place.end_taken),
    )
    return pb.Cursor(choices=[choice]).SerializeToString()


def _end_to_wire(end: ChoiceEnd, *, delivered: bool) -> pb.CursorEnd:
    usage = pb.Usage(
        prompt_tokens=end.usage.prompt_tokens,
        cached_tokens=end.usage.cached_tokens,
        completion_tokens=end.usage.completion_tokens,
    )
    return pb.CursorEnd(reason=TO_WIRE[end.reason], usage=usage, stop=end.stop, delivered=delivered)


def _from_wire(cursor: pb.Cursor) -> Cursor:
    """Raises KeyError or ValueError where it names partitions that there are not, or choices that do not fit together."""
    REQUESTS[pb.RequestClass.ValueType(cursor.source.request_class)].partition(cursor.source.partition)
    TOKENS.partition(cursor.reply_partition)
    places = zip(cursor.next_index, cursor.prefix_hash, cursor.choices, strict=True)
    return Cursor(
        request_id=cursor.request_id,
        source=source_from_wire(cursor.source),
        request_offset=cursor.request_offset,
        reply_partition=cursor.reply_partition,
        mark=Mark(cursor.offset, cursor.epoch),
        places=tuple(_place(Prefix(count, hashed), choice) for count, hashed, choice in places),
    )


def _place(prefix: Prefix, choice: pb.CursorChoice) -> Place:
    end = None
    if choice.HasField("end"):
        usage = choice.end.usage
        end = ChoiceEnd(
            FROM_WIRE[choice.end.reason],
            Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
            choice.end.stop,
        )
    return Place(
        prefix=prefix,
        context=tuple(choice.context),
        held=choice.held,
        num_characters=choice.num_characters,
        end=end,
        end_taken=choice.end.delivered,
    )
