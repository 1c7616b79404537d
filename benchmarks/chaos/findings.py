"""What clients saw of the faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos.clients import SILENCE, Stream
from benchmarks.chaos.faults import Fault
from benchmarks.report import Cell, Report, percentile

BUCKETS = (1.5, 2, 3, 4, 5, 6, 6.5, 7, 8, 10, 15, 20, 30, 60)
"""Upper ends of the histogram of recovery times, in seconds."""

TAKEOVER = "engine dies"
"""The kind of fault in which nothing but a takeover is awaited."""


@dataclass(slots=True)
class Effect:
    """What followed one fault."""

    fault: Fault
    recoveries: list[float] = field(default_factory=list)
    """Seconds from the fault to the next event of each stream that fell silent; from the beginning of the silence, where
    that is later."""
    num_refused: int = 0
    """Requests that were not accepted."""
    num_failed: int = 0
    """Streams that were, and did not hold."""


def effects(streams: Sequence[Stream], faults: Sequence[Fault]) -> list[Effect]:
    """A silence is put down to the first fault that came in it, or in the second before it, when tokens were still on their
    way; where none did to the last one before it. Whatever else happens is put down to the last fault before it."""
    found = [Effect(fault) for fault in faults]
    for stream in streams:
        for since, until in stream.silences:
            if effect := _first(found, since - SILENCE, until) or _before(found, since):
                effect.recoveries.append(until - max(since, effect.fault.at))
        if effect := _before(found, stream.ended):
            effect.num_refused += bool(stream.refusal)
            effect.num_failed += bool(stream.failure)
    return found


def _first(found: Sequence[Effect], since: float, until: float) -> Effect | None:
    return next((effect for effect in found if since <= effect.fault.at <= until), None)


def _before(found: Sequence[Effect], moment: float) -> Effect | None:
    return next((effect for effect in reversed(found) if effect.fault.at <= moment), None)


def broken(
    streams: Sequence[Stream],
    faults: Sequence[Fault],
    exits: Mapping[str, Sequence[int]],
    *,
    takeover: float | None = None,
) -> list[str]:
    """What did not hold, in words. `takeover`: seconds that 99 of 100 streams may be silent when an engine died."""
    found = effects(streams, faults)
    said = [] if any(stream.accepted for stream in streams) else ["no stream was accepted"]
    said += [f"{stream.task.max_tokens} tokens: {stream.failure}" for stream in streams if stream.failure]
    said += ["a stream has no end" for stream in streams if stream.accepted and not stream.ended]
    said += [
        "a request was neither accepted nor refused" for stream in streams if not (stream.accepted or stream.ended)
    ]
    said += [f"{name} ended by itself, with {list(codes)}" for name, codes in exits.items()]
    said += [
        f"{effect.fault.kind.name}: {effect.num_refused} requests were refused"
        for effect in found
        if effect.num_refused and not effect.fault.kind.may_refuse
    ]
    silences = [each for effect in found if effect.fault.kind.name == TAKEOVER for each in effect.recoveries]
    if takeover is not None and silences and (seconds := percentile(silences, 0.99)) > takeover:
        said.append(f"{TAKEOVER}: streams were silent for {seconds:.2f} s (p99), and {takeover:g} s is the limit")
    return said


def describe(
    report: Report, streams: Sequence[Stream], faults: Sequence[Fault], exits: Mapping[str, Sequence[int]]
) -> None:
    """Adds the run's tables to the report."""
    accepted = [stream for stream in streams if stream.accepted]
    report.table(
        "Streams",
        ["", "number"],
        [
            ["accepted", len(accepted)],
            ["with the whole text, every token once", sum(stream.has_held for stream in accepted)],
            ["with a failure", sum(bool(stream.failure) for stream in accepted)],
            ["without an end", sum(not stream.ended for stream in accepted)],
            ["with a stop string", sum(bool(stream.task.stop) for stream in accepted)],
            ["with a penalty", sum(bool(stream.task.frequency_penalty) for stream in accepted)],
            ["of two choices", sum(stream.task.num_choices > 1 for stream in accepted)],
            ["left by their client, which came back", sum(bool(stream.num_returns) for stream in accepted)],
            ["refused before they were accepted", sum(bool(stream.refusal) for stream in streams)],
            ["processes that ended by themselves", sum(map(len, exits.values()))],
        ],
    )
    found = effects(streams, faults)
    kinds = list(dict.fromkeys(fault.kind.name for fault in faults))
    report.table(
        f"Faults, what was refused and failed, and the streams that were silent for {SILENCE:g} s or more: "
        "seconds from the fault to their next token",
        ["", "faults", "refused", "failed", "silent", "p50", "p90", "p99", "max", "longest repair"],
        [_row(kind, [effect for effect in found if effect.fault.kind.name == kind]) for kind in kinds],
    )
    every = [each for effect in found for each in effect.recoveries]
    ends = (*BUCKETS, float("inf"))
    report.table(
        "Recovery times, all faults",
        ["up to, s", "streams"],
        [
            [f"{end:g}", sum(start < each <= end for each in every)]
            for start, end in zip((0.0, *BUCKETS), ends, strict=True)
        ],
    )
    _count(report, "Refusals", [stream.refusal for stream in streams if stream.refusal])
    _count(report, "Failures", [stream.failure for stream in streams if stream.failure])


def _row(kind: str, found: Sequence[Effect]) -> list[Cell]:
    seconds = [each for effect in found for each in effect.recoveries]
    spread = [percentile(seconds, share) if seconds else None for share in (0.5, 0.9, 0.99, 1.0)]
    refused, failed = sum(effect.num_refused for effect in found), sum(effect.num_failed for effect in found)
    repair = max(effect.fault.mended - effect.fault.at for effect in found)
    return [kind, len(found), refused, failed, len(seconds), *spread, repair]


def _count(report: Report, title: str, said: Sequence[str]) -> None:
    if said:
        report.table(title, ["", "streams"], [[text[:150], count] for text, count in Counter(said).most_common(12)])
