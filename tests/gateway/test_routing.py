"""Where requests go."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from holdfast.topics import REQUESTS_INTERACTIVE
from holdfast.v1.generation_pb2 import REQUEST_CLASS_INTERACTIVE
from services.gateway.routing import Routing, first_with_room, ranking

PARTITIONS = REQUESTS_INTERACTIVE.num_partitions
PREFIX = list(range(1000, 1128))


class Line:
    """Requests of one class through a routing, and what is open of them."""

    def __init__(self, *, affinity_tokens: int = 128) -> None:
        self.routing = Routing(affinity_tokens=affinity_tokens)
        self.loads = [0] * PARTITIONS

    def send(self, prompt_ids: list[int] | None = None) -> int:
        """The partition of a request that is open from now on."""
        partition = self.routing.choose(REQUEST_CLASS_INTERACTIVE, prompt_ids or [1], self.loads)
        self.loads[partition] += 1
        return partition

    def end(self, partition: int) -> None:
        self.loads[partition] -= 1


def test_open_requests_are_spread_over_all_partitions() -> None:
    """As many as there are partitions: one for each."""
    line = Line()
    assert sorted(line.send() for _ in range(PARTITIONS)) == list(range(PARTITIONS))


def test_a_partition_that_became_free_is_next() -> None:
    """The least load decides."""
    line = Line()
    for _ in range(PARTITIONS - 1):
        line.send()
    last = line.send()
    line.end(last)
    assert line.send() == last


@pytest.mark.parametrize("num_engines", [2, 4])
@pytest.mark.parametrize("owner", ["neighbours", "turns"])
@pytest.mark.parametrize("num_requests", [8, 16])
def test_few_requests_meet_every_engine(num_engines: int, owner: str, num_requests: int) -> None:
    """Whether an engine owns neighbouring partitions or every second one, none gets twice its share."""
    line = Line()
    counts = [0] * num_engines
    for _ in range(num_requests):
        partition = line.send()
        engine = partition * num_engines // PARTITIONS if owner == "neighbours" else partition % num_engines
        counts[engine] += 1
    assert 0 < min(counts)
    assert max(counts) <= 2 * num_requests / num_engines


def test_prompts_with_the_same_prefix_go_to_the_same_partition() -> None:
    """One after the other they do, whatever follows the prefix and whoever else was routed in between."""
    line = Line()
    chosen = set()
    for number in range(50):
        partition = line.send([*PREFIX, number])
        chosen.add(partition)
        line.end(partition)
        line.end(line.send([number] * 200))
        line.end(line.send())
    assert len(chosen) == 1


@pytest.mark.parametrize("prompt", [PREFIX[:127], [*PREFIX[:127], 7]])
def test_prompts_that_share_less_have_no_affinity(prompt: list[int]) -> None:
    """The last token of the prefix counts, and a prompt without it goes where its turn is."""
    line = Line()
    same = 0
    for _ in range(64):
        one, other = line.send(PREFIX), line.send(prompt)
        line.end(one)
        line.end(other)
        same += one == other
    assert same <= 4


def test_without_affinity_every_prompt_goes_where_its_turn_is() -> None:
    """Zero tokens are no prefix."""
    line = Line(affinity_tokens=0)
    assert sorted(line.send(PREFIX) for _ in range(PARTITIONS)) == list(range(PARTITIONS))


def test_a_prefix_that_many_ask_for_spreads_and_comes_back() -> None:
    """No partition gets more than 1.25 times its share, rounded up; first come those that the prefix ranks first; and once
    the load is gone it is where it was."""
    line, order = Line(), ranking(PREFIX, PARTITIONS)
    sent = []
    for number in range(1, 1001):
        partition = line.send(PREFIX)
        sent.append(partition)
        assert line.loads[partition] <= -(-5 * number // (4 * PARTITIONS))
    assert sent[:25] == order[:25]
    assert max(line.loads) == 40, "1.25 x 1000 / 32, rounded up"
    for partition in sent:
        line.end(partition)
    assert line.send(PREFIX) == order[0]


def test_a_hot_prefix_leaves_others_where_they_are() -> None:
    """Its load makes everybody's share larger: few of the others have to move."""
    line = Line()
    others = [[number] * 128 for number in range(1, 33)]
    for _ in range(640):
        line.send(PREFIX)
    full = {partition for partition, load in enumerate(line.loads) if load >= 25}
    moved = [prompt for prompt in others if line.send(prompt) != ranking(prompt, PARTITIONS)[0]]
    assert len(moved) <= sum(ranking(prompt, PARTITIONS)[0] in full for prompt in others)


def test_a_partition_over_its_share_is_passed_over() -> None:
    """For the next in the prefix's order that has room."""
    assert first_with_room([2, 0, 1, 3], [3, 0, 4, 0]) == 1
    assert first_with_room([2, 0, 1, 3], [1, 1, 9, 1]) == 0


@pytest.mark.parametrize("prompt", [[1], PREFIX])
def test_full_engines_are_passed_over_while_others_have_room(prompt: list[int]) -> None:
    """Even where nothing is open in their partitions; but no other gets twice its share and more for that."""
    routing, loads = Routing(affinity_tokens=128), [0] * PARTITIONS
    order = ranking(PREFIX, PARTITIONS)
    full = set(order[: PARTITIONS // 2])
    for _ in range(320):
        loads[routing.choose(REQUEST_CLASS_INTERACTIVE, prompt, loads, full)] += 1
    assert not any(loads[partition] for partition in full)
    full = set(order[:-4])
    for _ in range(320):
        loads[routing.choose(REQUEST_CLASS_INTERACTIVE, prompt, loads, full)] += 1
    assert max(loads) <= 2 * 640 / PARTITIONS


def test_where_all_are_full_all_have_their_share() -> None:
    """As where none is."""
    routing, loads = Routing(affinity_tokens=128), [0] * PARTITIONS
    for _ in range(PARTITIONS):
        loads[routing.choose(REQUEST_CLASS_INTERACTIVE, [1], loads, range(PARTITIONS))] += 1
    assert set(loads) == {1}


def test_prefixes_are_spread_evenly() -> None:
    """Of 3,200 random ones each partition is the first of about 100."""
    draw = random.Random(1)
    firsts = Counter(ranking([draw.randrange(50_000) for _ in range(128)], PARTITIONS)[0] for _ in range(3200))
    assert len(firsts) == PARTITIONS
    assert 60 < min(firsts.values()) <= max(firsts.values()) < 145


def test_every_process_ranks_alike() -> None:
    """Gateways agree without a word: nothing depends on the process, as Python's own hashes do."""
    program = f"from services.gateway.routing import ranking; print(ranking({PREFIX}, {PARTITIONS}))"
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == str(ranking(PREFIX, PARTITIONS))


def test_fewer_partitions_keep_the_order() -> None:
    """A partition that is not there any more moves only those that it was first for."""
    assert ranking(PREFIX, 16) == [partition for partition in ranking(PREFIX, PARTITIONS) if partition < 16]
