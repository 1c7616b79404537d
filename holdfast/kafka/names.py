"""What this project and Kafka's clients call the same things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiokafka
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment

from holdfast.bus import Record, TopicPartition


@dataclass(frozen=True, slots=True)
class Names:
    """What topics are called in the cluster, and the translation of what carries their names."""

    prefix: str

    def theirs(self, partition: TopicPartition) -> aiokafka.TopicPartition:
        return aiokafka.TopicPartition(self.prefix + partition.topic, partition.partition)

    def ours(self, partition: aiokafka.TopicPartition) -> TopicPartition:
        return TopicPartition(partition.topic.removeprefix(self.prefix), partition.partition)

    def assigned(self, assignment: bytes) -> frozenset[TopicPartition]:
        """The partitions that a coordinator says it gave a member; it says nothing while its group rebalances."""
        if not assignment:
            return frozenset()
        return frozenset(map(self.ours, ConsumerProtocolMemberAssignment.decode(assignment).partitions()))

    def records(self, batches: Mapping[aiokafka.TopicPartition, Sequence[aiokafka.ConsumerRecord]]) -> list[Record]:
        return [
            Record(
                topic=record.topic.removeprefix(self.prefix),
                partition=record.partition,
                offset=record.offset,
                timestamp_ms=record.timestamp,
                value=record.value or b"",
                key=record.key,
                headers=tuple(record.headers),
            )
            for batch in batches.values()
            for record in batch
        ]
