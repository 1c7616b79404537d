"""What the chaos benchmark finds, what it does not miss, and a short run of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos.clients import Clients, Stream, Task, Text, check, variants
from benchmarks.chaos.faults import KINDS, Fault, plan
from benchmarks.chaos.findings import broken, effects
from benchmarks.mesh import ROOT
from deploy.kafka import broker
from holdfast.events import Finished, FinishReason, Tokens, Usage
from tests.conftest import missing
from tests.holdfast.fake_gateway import FakeGateway, accepted, serving

TASK = Task("Once", 3)
EXPECTED = Text("a b c", (1, 2, 3), FinishReason.LENGTH)
KIND = {kind.name: kind for kind in KINDS}
END = Finished(0, FinishReason.LENGTH, Usage(1, 0, 3), "", "")


def tokens(first: int, *token_ids: int, text: str) -> Tokens:
    return Tokens(0, first, len(token_ids), text, token_ids, (), "")


WHOLE = tokens(0, 1, 2, 3, text="a b c")


def test_the_whole_text_passes() -> None:
    """However it is cut."""
    assert check([tokens(0, 1, text="a"), tokens(1, 2, 3, text=" b c"), END], EXPECTED) == ""


@pytest.mark.parametrize(
    ("events", "wrong"),
    [
        ([tokens(0, 1, text="a"), tokens(2, 3, text=" c"), END], "token 2 came where 1 was due"),
        ([tokens(0, 1, 2, text="a b"), tokens(1, 2, 3, text=" b c"), END], "token 1 came where 2 was due"),
        ([tokens(0, 1, 2, 4, text="a b d"), END], "another text from token 2 on: it has 3, and 3 were due"),
        ([tokens(0, 1, 2, text="a b"), END], "another text from token 2 on: it has 2, and 3 were due"),
        ([tokens(0, 1, 2, 3, text="a b d"), END], "another text of the same tokens"),
        ([tokens(0, 1, 2, 3, text="a b c")], "it has not one end"),
        ([WHOLE, replace(END, reason=FinishReason.STOP)], "it ended with STOP '', and LENGTH '' was due"),
        ([WHOLE, replace(END, usage=Usage(1, 0, 2))], "it ended with a count of 2 tokens of 3"),
    ],
)
def test_every_other_text_is_found(events: list[Tokens | Finished], wrong: str) -> None:
    """Lost, doubled, another, cut off, decoded otherwise, without an end."""
    assert check(events, EXPECTED) == wrong


def test_each_choice_is_checked_alone() -> None:
    """However they come among each other; one that lacks its end, or never came, is found."""
    first = [tokens(0, 1, 2, text="a b"), tokens(2, 3, text=" c"), END]
    second = [replace(event, choice=1) for event in first]
    mixed = [event for pair in zip(second, first, strict=True) for event in pair]
    assert check(mixed, EXPECTED, num_choices=2) == ""
    assert check(mixed[:-2] + mixed[-1:], EXPECTED, num_choices=2) == "it has not one end"
    assert check(first, EXPECTED, num_choices=2) == "it has not one end"


def test_variants_stop_within_the_text() -> None:
    """In its second half, so that there is something before it to lose."""
    text = "Once upon a time there was a girl who went to the park."
    stopped, penalized, two = variants({TASK: Text(text, (), FinishReason.LENGTH)})
    assert text.index(stopped.stop) > len(text) // 2
    assert (penalized.frequency_penalty > 0, two.num_choices) == (True, 2)


def test_a_silence_is_counted_from_the_fault() -> None:
    """From its own beginning where that is later; and what happens before the first fault belongs to none."""
    first, second = (
        Fault(KIND["engine dies"], "engine-0", 10.0, 12.0),
        Fault(KIND["gateway dies"], "gateway-0", 20.0, 22.0),
    )
    stream = Stream(TASK, 1.0, accepted=2.0, ended=40.0, silences=[(3.0, 5.0), (9.0, 16.0), (23.0, 25.0)])
    refused = Stream(TASK, 20.5, ended=21.0, refusal="Unavailable: gone")
    failed = Stream(TASK, 11.0, accepted=11.5, ended=19.0, failure="it has not one end")
    one, two = effects([stream, refused, failed], [first, second])
    assert (one.recoveries, one.num_refused, one.num_failed) == ([6.0], 0, 1)
    assert (two.recoveries, two.num_refused, two.num_failed) == ([2.0], 1, 0)


def test_a_silence_that_outlasts_the_next_fault_is_counted_from_the_one_that_began_it() -> None:
    """Else long recoveries would look short where faults follow one another."""
    first, second = (
        Fault(KIND["engine dies"], "engine-0", 10.0, 12.0),
        Fault(KIND["gateway dies"], "gateway-0", 20.0, 22.0),
    )
    stream = Stream(TASK, 1.0, accepted=2.0, ended=40.0, silences=[(9.0, 21.0), (10.5, 20.5), (12.0, 22.0)])
    one, two = effects([stream], [first, second])
    assert (one.recoveries, two.recoveries) == ([11.0, 10.0], [2.0])


def test_what_does_not_hold_is_said() -> None:
    """A stream with a failure, one without an end, a process that ended by itself; not a refusal."""
    streams = [
        Stream(TASK, 1.0, accepted=2.0, ended=3.0),
        Stream(TASK, 1.0, accepted=2.0, ended=3.0, failure="it has not one end"),
        Stream(TASK, 1.0, accepted=2.0),
        Stream(TASK, 1.0, ended=2.0, refusal="Unavailable: gone"),
    ]
    assert broken(streams, [], {"engine-1": [1]}) == [
        "3 tokens: it has not one end",
        "a stream has no end",
        "engine-1 ended by itself, with [1]",
    ]
    assert broken(streams[:1], [], {}) == []
    assert broken(streams[3:], [], {}) == ["no stream was accepted"]
    assert broken([Stream(TASK, 1.0)], [], {})[1:] == ["a request was neither accepted nor refused"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("every service restarts, one by one", ["every service restarts, one by one: 1 requests were refused"]),
        ("broker dies", []),
    ],
)
def test_refusals_are_found_where_something_is_left_to_take_requests(kind: str, said: list[str]) -> None:
    """While the only broker is away, nothing is."""
    fault = Fault(KIND[kind], "", 10.0, 20.0)
    streams = [Stream(TASK, 1.0, accepted=2.0, ended=3.0), Stream(TASK, 11.0, ended=12.0, refusal="Unavailable: gone")]
    assert broken(streams, [fault], {}) == said


def test_a_takeover_that_takes_too_long_is_found() -> None:
    """Where a limit is given."""
    fault = Fault(KIND["engine dies"], "engine-0", 10.0, 20.0)
    streams = [Stream(TASK, 1.0, accepted=2.0, ended=30.0, silences=[(9.9, 17.5)])]
    assert broken(streams, [fault], {}) == broken(streams, [fault], {}, takeover=7.5) == []
    assert broken(streams, [fault], {}, takeover=7.4) == [
        "engine dies: streams were silent for 7.50 s (p99), and 7.4 s is the limit"
    ]


async def test_a_stream_that_hangs_has_no_end() -> None:
    """When the run gives up on it, it has not held."""
    gateway = FakeGateway([accepted()], hold=True)
    async with serving(gateway) as server:
        clients = Clients([server.address], {TASK: EXPECTED}, seed=0, leaves=0.0)
        asking = asyncio.create_task(clients.ask())
        while not (clients.streams and clients.streams[0].accepted):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    (stream,) = clients.streams
    assert not stream.has_held
    assert broken(clients.streams, [], {}) == ["a stream has no end"]


def test_every_kind_of_fault_is_in_a_plan_with_room_for_it() -> None:
    """The same seed plans the same; kinds may be named, and a wrong name is told with the right ones."""
    chosen = plan(40, [], seed=3)
    assert {kind.name for kind in chosen} == {kind.name for kind in KINDS}
    assert chosen == plan(40, [], seed=3)
    assert {kind.name for kind in plan(5, ["engine dies"], seed=0)} == {"engine dies"}
    with pytest.raises(ValueError, match="no fault is called fire; there are: engine dies, "):
        plan(5, ["fire"], seed=0)


@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_streams_hold_while_processes_die(stories260k: Path, tmp_path: Path) -> None:
    """A mesh of processes on a broker of its own: a frozen engine, a gateway that dies with an engine, a tokenizer, the
    broker."""
    try:
        broker.fetch()
    except broker.BrokerError as error:
        missing(f"no Kafka broker: {error}")
    kinds = ["engine freezes and wakes", "gateway and engine die together", "tokenizer dies", "broker dies"]
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "benchmarks.chaos", f"--model={stories260k}", "--faults=4", "--only", *kinds]
    command += ["--engines=2", "--clients=8", f"--folder={tmp_path / 'mesh'}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    streams, faults = json.loads(out.read_text())["tables"][:2]
    counts = dict(streams["rows"])
    assert counts["accepted"] == counts["with the whole text, every token once"] > 0
    assert {row[0]: row[1] for row in faults["rows"]} == dict.fromkeys(kinds, 1)
