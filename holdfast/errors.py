"""Every error of Holdfast, and the one table that says what each is on the wire.

    HoldfastError
    ├── RequestError              the caller must change something
    │   ├── InvalidRequest          an argument is wrong; `field` names it
    │   │   └── RequestTooLarge       more bytes than one message may have
    │   ├── RequestTooSlow          it did not come to its end in time
    │   ├── NotFound                no such model, request, cursor
    │   └── AlreadyExists           the request id is taken
    ├── RetryableError            the same call may succeed later; `retry_after` says when
    │   ├── Overloaded              too much is running or waiting
    │   └── Unavailable             a part of the mesh, or the log, cannot be reached
    │       ├── NotAccepted           a gateway that starts, stops or is away: it has taken nothing of the call
    │       ├── NotOwner              a rebalance took the partition away
    │       └── Interrupted           a stream broke, and no gateway went on with it; `cursor` says from where one can
    ├── FinalError                trying again is no use
    │   ├── Cancelled               somebody cancelled the request
    │   ├── DeadlineExceeded        its time is over
    │   ├── StreamFailed            accepted, but an engine could not serve it
    │   └── InternalError           a fault of ours
    └── ConfigurationError        the process cannot start: a setting, a model folder, a topic
        └── CannotListen            an address is in use, or not one of this host

`to_status` and `from_rpc_error` translate at the edges and nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


class HoldfastError(Exception):
    """Any error that Holdfast raises on purpose. Its text says what is wrong and what would be right."""


class RequestError(HoldfastError):
    """The caller must change something."""


class InvalidRequest(RequestError):
    """An argument is wrong. `field` is its path in the request message, such as `sampling.temperature`."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class RequestTooLarge(InvalidRequest):
    """More bytes than one message may have."""


class RequestTooSlow(RequestError):
    """It did not come to its end in time."""


class NotFound(RequestError):
    """No such model, request or cursor."""


class AlreadyExists(RequestError):
    """The request id is taken."""


class RetryableError(HoldfastError):
    """The same call may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(RetryableError):
    """Too much is running or waiting."""


class Unavailable(RetryableError):
    """A part of the mesh, or the log, cannot be reached."""


class NotAccepted(Unavailable):
    """The gateway starts, is being stopped, has no tokenizer, or cannot be connected to, and has taken nothing of the call: it
    can be made again as it is, at another gateway or in a moment."""


class NotOwner(Unavailable):
    """A rebalance took the partition away."""


class Interrupted(Unavailable):
    """A stream broke, and no gateway went on with it in time. `cursor` is the last one that came: from there it can be
    resumed later."""

    def __init__(self, message: str, *, cursor: str) -> None:
        super().__init__(message)
        self.cursor = cursor


class FinalError(HoldfastError):
    """Trying again is no use."""


class Cancelled(FinalError):
    """Somebody cancelled the request."""


class DeadlineExceeded(FinalError):
    """The request's time is over."""


class StreamFailed(FinalError):
    """The request was accepted, but an engine could not serve it."""


class InternalError(FinalError):
    """A fault of ours."""


class ConfigurationError(HoldfastError):
    """The process cannot start as configured."""


class CannotListen(ConfigurationError):
    """A server's address is in use, or not one of this host. `address` is what the settings say."""

    def __init__(self, address: str, why: object = "it is in use, or not an address of this host") -> None:
        super().__init__(f"cannot listen on {address}: {why}")
        self.address = address


class Wire(NamedTuple):
    """What an error is on the wire."""

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    """The `type` of an OpenAI-style error body."""


# The first class that an error is an instance of decides, so subclasses stand before their parents.
WIRE: dict[type[HoldfastError], Wire] = {
    RequestTooLarge: Wire(grpc.StatusCode.RESOURCE_EXHAUSTED, 413, "invalid_request_error"),
    InvalidRequest: Wire(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    NotFound: Wire(grpc.StatusCode.NOT_FOUND, 404, "not_found_error"),
    AlreadyExists: Wire(grpc.StatusCode.ALREADY_EXISTS, 409, "invalid_request_error"),
    Overloaded: Wire(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    NotAccepted: Wire(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error"),
    Unavailable: Wire(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable_error"),
    Cancelled: Wire(grpc.StatusCode.CANCELLED, 499, "cancelled_error"),
    DeadlineExceeded: Wire(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error"),
    RequestTooSlow: Wire(grpc.StatusCode.DEADLINE_EXCEEDED, 408, "timeout_error"),
    StreamFailed: Wire(grpc.StatusCode.ABORTED, 502, "server_error"),
    ConfigurationError: Wire(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    InternalError: Wire(grpc.StatusCode.INTERNAL, 500, "server_error"),
}

_SAID = (RequestTooLarge, NotAccepted)
"""What no code alone means."""


def wire(error: HoldfastError) -> Wire:
    """What this error is on the wire."""
    return next((row for kind, row in WIRE.items() if isinstance(error, kind)), WIRE[InternalError])


def to_status(error: HoldfastError) -> status_pb2.Status:
    """The gRPC status of an error, with google.rpc details: BadRequest naming the field, RetryInfo, ErrorInfo."""
    status = status_pb2.Status(code=wire(error).grpc.value[0], message=str(error))
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain="holdfast")
    details: list[any_pb2.Any] = [_packed(info)]
    if isinstance(error, InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, RetryableError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status.details.extend(details)
    return status


def from_rpc_error(error: grpc.RpcError) -> HoldfastError:
    """The error that a call ended with: the one that `to_status` was given on the other side, or for a status that
    did not come from us the class whose code it is."""
    code, text = error.code(), error.details() or ""
    field, retry_after, reason = "", 1.0, ""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        bad_request, retry, info = (
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.ErrorInfo(),
        )
        if detail.Unpack(bad_request) and bad_request.field_violations:
            field = bad_request.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
        elif detail.Unpack(info) and info.domain == "holdfast":
            reason = info.reason
    kind = next((k for k in WIRE if k.__name__ == reason), None) or next(
        (k for k, row in WIRE.items() if row.grpc is code and k not in _SAID), InternalError
    )
    if issubclass(kind, InvalidRequest):
        return kind(text, field=field)
    if issubclass(kind, RetryableError):
        return kind(text, retry_after=retry_after)
    return kind(text if kind in WIRE and code is WIRE[kind].grpc else f"{code.name}: {text}")


def from_code(code: int, message: str) -> HoldfastError:
    """The error for a google.rpc.Code, as `StreamError` carries it."""
    name = code_pb2.Code.Name(code) if code in code_pb2.Code.values() else "INTERNAL"
    kind = next((k for k, row in WIRE.items() if row.grpc.name == name and k not in _SAID), InternalError)
    return kind(message)


def _packed(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
