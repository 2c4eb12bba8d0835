"""The embedded broker: Kafka's protocol without Kafka, so that the sandbox needs nothing but this package."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from confluent_kafka import Producer

PARTITIONS = 4
"""Of every topic: the broker offers no choice."""
_DEADLINE_S = 10.0


class EmbeddedBroker:
    """One Kafka broker inside this process, in memory, on a port that other processes can reach.

    It is the client library's own test broker. It serves groups, plain commits and CreateTime records, and that is all
    that may be asked of it. It has no transactions to speak of, no topic ids and no LogAppendTime, it cannot look up an
    offset by time, and it drops a partition's oldest records, silently, beyond 5 MiB as stored or 100,000 batches:
    producers must compress and write large batches.

    A context manager; outside it the broker and all records are gone.
    """

    def __init__(self) -> None:
        # The broker lives as long as the client that it is started with.
        self._host: Producer | None = Producer(
            {"bootstrap.servers": "embedded", "test.mock.num.brokers": 1, "log_level": 4}
        )
        brokers = self._host.list_topics(timeout=_DEADLINE_S).brokers.values()
        self.bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host = None

    def create_topic(self, name: str) -> None:
        """Create the topic, with four partitions, by asking for it; return once all of them can be used."""
        if self._host is None:
            raise RuntimeError("the embedded broker has been closed")
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            found = self._host.list_topics(name, timeout=_DEADLINE_S).topics[name].partitions.values()
            if len(found) == PARTITIONS and all(partition.leader != -1 for partition in found):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"topic {name} has {len(found)} usable partitions after {_DEADLINE_S:.0f} s")
            time.sleep(0.01)
