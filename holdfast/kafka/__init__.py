"""The log in Kafka: the bus of the mesh, and the only package that knows aiokafka.

`bus` is the bus, made of what sends (`sender`), what reads (`reader`) and what reads as a member of a group (`member`);
`clients` starts and stops aiokafka's clients, and mends them. What aiokafka 0.14 does beside what `holdfast.bus` promises
is told where something is done about it.
"""

from holdfast.kafka.bus import KafkaBus

__all__ = ["KafkaBus"]
