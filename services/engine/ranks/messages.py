"""What the front and its ranks say to each other, beside steps; plain data, pickled."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from services.engine.batch import Step, StepResult
from services.engine.build import Facts
from services.engine.sequence import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReadBlock:
    """To every rank: send your part of this block."""

    block: int


@dataclass(frozen=True, slots=True)
class WriteBlock:
    """To every rank: fill this block with your part of the content, which has that of each rank in order."""

    block: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Stop:
    """To every rank: end."""


Order = Step | ReadBlock | WriteBlock | Stop


@dataclass(frozen=True, slots=True)
class Ready:
    """From a rank, first of all: it waits for steps."""

    facts: Facts


@dataclass(frozen=True, slots=True)
class Refused:
    """From a rank, last of all: it cannot start as configured."""

    why: str


@dataclass(frozen=True, slots=True)
class Failed:
    """From a rank, last of all: a fault of ours, or the end of another rank."""

    why: str
    traceback: str


Report = Ready | Refused | Failed


def packed(order: Order) -> bytes:
    """An order as a ring carries it."""
    return pickle.dumps(order, protocol=5)


def unpacked(message: bytearray) -> Order:
    """The order that a ring carried."""
    order: Order = pickle.loads(message)
    return order


def packed_result(result: StepResult) -> bytes:
    """A result without its step, which the front has."""
    return pickle.dumps((result.step.number, result.token_ids, result.logprobs, result.failed), protocol=5)


def unpacked_result(message: bytearray, step: Step) -> StepResult:
    """The result of this step."""
    number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]
    failed: frozenset[int]
    number, token_ids, logprobs, failed = pickle.loads(message)
    assert number == step.number, "results come in the order of their steps"
    return StepResult(step, token_ids, logprobs, failed)
