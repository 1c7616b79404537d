"""Every topic of the log: its name, how many partitions, what travels in it and for how long it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from holdfast.bus import TopicPartition
from holdfast.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic and its partitions."""

    name: str
    num_partitions: int
    retention: timedelta
    """How long a record is kept at least."""

    def partition(self, index: int) -> TopicPartition:
        """The partition of this number.

        Raises:
            ValueError: the topic has no such partition.
        """
        if not 0 <= index < self.num_partitions:
            raise ValueError(f"{self.name} has partitions 0 to {self.num_partitions - 1}, not {index}")
        return TopicPartition(self.name, index)

    @property
    def partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self.name, index) for index in range(self.num_partitions)]


REQUESTS_INTERACTIVE = Topic("holdfast.requests.interactive", 32, timedelta(hours=24))
"""`GenerationRequest`, key = request id; the partition is chosen by the gateway."""

REQUESTS_BATCH = Topic("holdfast.requests.batch", 32, timedelta(hours=24))
"""The same, for requests that nobody waits for."""

TOKENS = Topic("holdfast.tokens", 32, timedelta(hours=6))
"""`TokenBatch`, no key; the partition is the reply partition that the request names."""

CONTROL = Topic("holdfast.control", 1, REQUESTS_BATCH.retention)
"""`Cancel`, key = request id. Every engine reads all of it. Kept for as long as what it may be meant for waits."""

DEAD = Topic("holdfast.dead", 1, timedelta(days=7))
"""`DeadLetter`, key = request id: requests that were given up. For people; nothing in the mesh reads it."""

ENGINES = "holdfast-engines-interactive"
"""The group in which engines share `REQUESTS_INTERACTIVE`."""

ENGINES_BATCH = "holdfast-engines-batch"
"""The group in which the same engines share `REQUESTS_BATCH`."""


def gateways_of(reply_partition: int) -> str:
    """The group, over `CONTROL`, in which gateways claim a reply partition: whoever owns something there has it."""
    return f"holdfast-gateway-{reply_partition}"


TOPICS = (REQUESTS_INTERACTIVE, REQUESTS_BATCH, TOKENS, CONTROL, DEAD)

REQUESTS = {
    pb.REQUEST_CLASS_INTERACTIVE: REQUESTS_INTERACTIVE,
    pb.REQUEST_CLASS_BATCH: REQUESTS_BATCH,
}
"""The request topic of each class."""

GROUPS = {
    pb.REQUEST_CLASS_INTERACTIVE: ENGINES,
    pb.REQUEST_CLASS_BATCH: ENGINES_BATCH,
}
"""The group in which engines share it."""

CLASSES = {topic.name: request_class for request_class, topic in REQUESTS.items()}
"""The class of the requests in each topic."""
