"""What goes wrong, how it is put right, and when."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.chaos.fleet import Fleet, Part

SESSION = 6.0
"""Seconds after which a group throws a silent engine out (`holdfast.kafka.KafkaBus`)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way in which things go wrong."""

    name: str
    weight: float
    """How often it is chosen, against the others."""
    act: Callable[[Fleet, random.Random], Awaitable[list[Part]]]
    """Breaks and mends; what it touched."""
    may_refuse: bool = False
    """Whether new requests may be refused meanwhile, for nothing is left to take them. What was accepted holds all the same."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One that happened. Times are of `time.monotonic`."""

    kind: Kind
    what: str
    at: float
    mended: float
    """When all that it broke was ready again, and all gateways took requests."""


async def _engine_dies(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(draw.choice(fleet.engines))


async def _engine_freezes(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _freeze(draw.choice(fleet.engines), SESSION + draw.uniform(1.0, 4.0))


async def _gateway_freezes(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _freeze(draw.choice(fleet.gateways), draw.uniform(5.0, 30.0))


async def _gateway_dies(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(draw.choice(fleet.gateways))


async def _gateway_and_engine_die(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(draw.choice(fleet.gateways), draw.choice(fleet.engines))


async def _tokenizer_dies(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(draw.choice(fleet.tokenizers))


async def _all_tokenizers_die(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(*fleet.tokenizers)


async def _broker_dies(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _die(draw.choice(fleet.brokers))


async def _broker_restarts(fleet: Fleet, draw: random.Random) -> list[Part]:
    return await _restart(draw.choice(fleet.brokers))


async def _services_restart(fleet: Fleet, draw: random.Random) -> list[Part]:
    restarted = []
    for part in draw.sample(fleet.services, len(fleet.services)):
        restarted += await _restart(part)
    return restarted


async def _freeze(part: Part, seconds: float) -> list[Part]:
    part.freeze()
    await asyncio.sleep(seconds)
    part.wake()
    return [part]


async def _die(*parts: Part) -> list[Part]:
    """All at once; each is started again, as a supervisor would."""
    await asyncio.gather(*(part.kill() for part in parts))
    await asyncio.gather(*(part.start() for part in parts))
    return list(parts)


async def _restart(part: Part) -> list[Part]:
    await part.stop()
    await part.start()
    return [part]


KINDS = [
    Kind("engine dies", 6, _engine_dies),
    Kind("engine freezes and wakes", 2, _engine_freezes),
    Kind("gateway dies", 5, _gateway_dies),
    Kind("gateway freezes and wakes", 1, _gateway_freezes),
    Kind("gateway and engine die together", 3, _gateway_and_engine_die),
    Kind("tokenizer dies", 3, _tokenizer_dies),
    Kind("all tokenizers die", 2, _all_tokenizers_die, may_refuse=True),
    Kind("broker dies", 1, _broker_dies, may_refuse=True),
    Kind("broker restarts", 1, _broker_restarts, may_refuse=True),
    Kind("every service restarts, one by one", 0.5, _services_restart),
]


def plan(count: int, only: list[str], *, seed: int) -> list[Kind]:
    """So many, every kind at least once where there is room, in any order. `only`: the names of those that may be.

    Raises:
        ValueError: there is no kind of such a name.
    """
    kinds = [kind for kind in KINDS if kind.name in only] if only else KINDS
    if unknown := set(only) - {kind.name for kind in KINDS}:
        raise ValueError(f"no fault is called {', '.join(unknown)}; there are: {', '.join(k.name for k in KINDS)}")
    draw = random.Random(seed)
    chosen = kinds[:count] + draw.choices(kinds, [kind.weight for kind in kinds], k=max(0, count - len(kinds)))
    draw.shuffle(chosen)
    return chosen


async def inject(kind: Kind, fleet: Fleet, draw: random.Random) -> Fault:
    """Has it happen; returns when it is mended."""
    at = time.monotonic()
    parts = await kind.act(fleet, draw)
    await fleet.until_ready()
    return Fault(kind, ", ".join(map(str, parts)), at, time.monotonic())
