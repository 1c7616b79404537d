"""Which partition of its topic a request is published to."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Sequence
from hashlib import blake2b

from holdfast.topics import REQUESTS
from holdfast.v1.generation_pb2 import RequestClass

_STRIDE = 19
"""From one turn to the next. An engine often owns neighbouring partitions, or every second one; steps of about 0.6 of
the number of partitions meet all engines in turns either way (multiplicative hashing, Knuth, TAOCP 3, 6.4)."""

_BALANCE = 1.25
"""How much more than its share of the requests a partition may have, before those of its prefixes go elsewhere."""

_PREFERENCE = 2
"""How much more than its share the partition of an engine with room may have, before full engines get requests again. Those
with room are known a look late: without a bound all that comes meanwhile would meet at one."""


class Routing:
    """Spreads requests over the partitions, and so over the engines that own them.

    Prompts that begin with the same `affinity_tokens` tokens go to the same partition, so that the engine behind it has
    their keys and values already. Each prefix has an order of its own over all partitions (rendezvous hashing), the same
    in every process, and takes the first that has no more than 1.25 times its share of what is open. So a prefix that many
    ask for at once spreads, over the same partitions each time, and comes back when fewer do (consistent hashing with
    bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2016).

    Shorter prompts go to a partition with the least load, in turns where several have as little.

    The partitions of engines that have enough to do are passed over, in both cases, while others have room.
    """

    def __init__(self, *, affinity_tokens: int) -> None:
        """`affinity_tokens`: 0 for no affinity."""
        self._affinity_tokens = affinity_tokens
        self._turn = dict.fromkeys(REQUESTS, 0)

    def choose(
        self,
        request_class: RequestClass.ValueType,
        prompt_ids: Sequence[int],
        loads: Sequence[int],
        full: Collection[int] = (),
    ) -> int:
        """The partition for a request. `loads`: how many requests wait or run in each. `full`: the partitions of engines
        that have enough to do."""
        among = preferred(loads, full)
        if 0 < self._affinity_tokens <= len(prompt_ids):
            order = ranking(prompt_ids[: self._affinity_tokens], len(loads))
            return first_with_room([partition for partition in order if partition in among], loads)
        return self._in_turns(request_class, loads, among)

    def _in_turns(self, request_class: RequestClass.ValueType, loads: Sequence[int], among: Collection[int]) -> int:
        turn, num = self._turn[request_class], len(loads)
        back = pow(_STRIDE, -1, num)
        chosen = min(among, key=lambda p: (loads[p], (p - turn) * back % num))
        self._turn[request_class] = (chosen + _STRIDE) % num
        return chosen


def ranking(prefix: Sequence[int], num_partitions: int) -> list[int]:
    """The partitions in the order in which a prefix would have them."""
    key = blake2b(struct.pack(f"<{len(prefix)}I", *prefix), digest_size=32).digest()
    return sorted(
        range(num_partitions),
        key=lambda partition: blake2b(partition.to_bytes(4, "little"), key=key, digest_size=8).digest(),
    )


def preferred(loads: Sequence[int], full: Collection[int]) -> Collection[int]:
    """Those not full with less than twice their share, rounded up, of what is open with the request that comes; all where
    there is none, or none is full. So a few engines that hang get nothing more while the others have room."""
    most = math.ceil(_PREFERENCE * (sum(loads) + 1) / len(loads))
    rest = {partition for partition, load in enumerate(loads) if partition not in full and load < most}
    return rest if full and rest else range(len(loads))


def first_with_room(order: Sequence[int], loads: Sequence[int]) -> int:
    """The first that has less than 1.25 times its share, rounded up, of what is open in all of these with the request that
    comes. There is one: not all have more than the mean."""
    most = math.ceil(_BALANCE * (sum(loads[partition] for partition in order) + 1) / len(order))
    return next(partition for partition in order if loads[partition] < most)
