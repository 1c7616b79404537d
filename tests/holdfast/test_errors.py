"""Errors: one table, two directions."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import code_pb2
from grpc_status import rpc_status

from holdfast import errors


def all_errors() -> list[type[errors.HoldfastError]]:
    found: list[type[errors.HoldfastError]] = []
    unseen = [errors.HoldfastError]
    while unseen:
        kind = unseen.pop()
        found.append(kind)
        unseen.extend(each for each in kind.__subclasses__() if each.__module__ == errors.__name__)
    return found


class Ended(grpc.RpcError):
    """An ended call, as grpc gives it to a client."""

    def __init__(self, error: errors.HoldfastError) -> None:
        status = rpc_status.to_status(errors.to_status(error))
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return tuple(self._status.trailing_metadata)


@pytest.mark.parametrize("kind", list(errors.WIRE), ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_the_class_it_left_as(kind: type[errors.HoldfastError]) -> None:
    """A client meets the error that the service raised."""
    arrived = errors.from_rpc_error(Ended(kind("too many trains")))
    assert type(arrived) is kind
    assert str(arrived) == "too many trains"


def test_details_survive_the_wire() -> None:
    """The field of a bad argument and the time to wait come along."""
    bad = errors.from_rpc_error(Ended(errors.InvalidRequest("must be finite", field="sampling.temperature")))
    assert isinstance(bad, errors.InvalidRequest)
    assert bad.field == "sampling.temperature"
    busy = errors.from_rpc_error(Ended(errors.Overloaded("64 of 64 streams are open", retry_after=2.5)))
    assert isinstance(busy, errors.Overloaded)
    assert busy.retry_after == 2.5


def test_a_subclass_stands_before_its_parent_in_the_table() -> None:
    """The first match decides, so the more special class must come first."""
    rows = list(errors.WIRE)
    for index, kind in enumerate(rows):
        assert not any(issubclass(later, kind) for later in rows[index + 1 :]), kind


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Every class is drawn at the top of the file."""
    assert errors.__doc__ is not None
    for kind in all_errors():
        assert kind.__name__ in errors.__doc__


def test_a_stream_error_becomes_the_class_of_its_code() -> None:
    """What an engine wrote into the log is what the client meets."""
    assert isinstance(errors.from_code(code_pb2.INVALID_ARGUMENT, "x"), errors.InvalidRequest)
    assert isinstance(errors.from_code(code_pb2.ABORTED, "x"), errors.StreamFailed)
    assert isinstance(errors.from_code(12345, "x"), errors.InternalError)
