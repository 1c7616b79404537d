"""Which partition of its topic a request is published to."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b

from holdfast.topics import REQUESTS
from holdfast.v1.generation_pb2 import RequestClass

_STRIDE = 19
"""From one turn to the next. An engine often owns neighbouring partitions, or every second one; steps of about 0.6 of
the number of partitions meet all engines in turns either way (multiplicative hashing, Knuth, TAOCP 3, 6.4)."""

_BALANCE = 1.25
"""How much more than its share of the requests a partition may have, before those of its prefixes go elsewhere."""


class Routing:
    """Spreads requests over the partitions, and so over the engines that own them.

    Prompts that begin with the same `affinity_tokens` tokens go to the same partition, so that the engine behind it has
    their keys and values already. Each prefix has an order of its own over all partitions (rendezvous hashing), the same
    in every process, and takes the first that has no more than 1.25 times its share of what is open. So a prefix that many
    ask for at once spreads, over the same partitions each time, and comes back when fewer do (consistent hashing with
    bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2016).

    Shorter prompts go to a partition with the least load, in turns where several have as little.
    """

    def __init__(self, *, affinity_tokens: int) -> None:
        """`affinity_tokens`: 0 for no affinity."""
        self._affinity_tokens = affinity_tokens
        self._turn = dict.fromkeys(REQUESTS, 0)

    def choose(self, request_class: RequestClass.ValueType, prompt_ids: Sequence[int], loads: Sequence[int]) -> int:
        """The partition for a request. `loads`: how many requests wait or run in each."""
        if 0 < self._affinity_tokens <= len(prompt_ids):
            return first_with_room(ranking(prompt_ids[: self._affinity_tokens], len(loads)), loads)
        return self._in_turns(request_class, loads)

    def _in_turns(self, request_class: RequestClass.ValueType, loads: Sequence[int]) -> int:
        turn, num = self._turn[request_class], len(loads)
        back = pow(_STRIDE, -1, num)
        chosen = min(range(num), key=lambda p: (loads[p], (p - turn) * back % num))
        self._turn[request_class] = (chosen + _STRIDE) % num
        return chosen


def ranking(prefix: Sequence[int], num_partitions: int) -> list[int]:
    """The partitions in the order in which a prefix would have them."""
    key = blake2b(struct.pack(f"<{len(prefix)}I", *prefix), digest_size=32).digest()
    return sorted(
        range(num_partitions),
        key=lambda partition: blake2b(partition.to_bytes(4, "little"), key=key, digest_size=8).digest(),
    )


def first_with_room(order: Sequence[int], loads: Sequence[int]) -> int:
    """The first that has less than 1.25 times its share, rounded up, of what is open with the request that comes. There
    is one: not all have more than the mean."""
    most = math.ceil(_BALANCE * (sum(loads) + 1) / len(loads))
    return next(partition for partition in order if loads[partition] < most)
