"""What Kafka knows of a pipeline, asked beside its processes: who owns what, how far they are, what is undecided."""

from __future__ import annotations

import struct
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from confluent_kafka import Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from consumer import totals
from consumer.sandbox.kafka import Kafka
from consumer.storage import Log, Stage
from consumer.storage.kafka_client import asked, offsets
from consumer.storage.kafka_topics import Topics

ASK_S = 5.0
GROUPS_S = 2.0
STABLE_S = 0.5
MOVED_S = 30.0
"""For so long somebody may look for the broker that leads a partition now."""


class _Group(NamedTuple):
    state: str
    members: dict[str, bytes]
    """By worker, what each has been given."""


class Observer:
    """Of one pipeline."""

    def __init__(self, kafka: Kafka, topic: str, pipeline: str, partitions: int) -> None:
        self.topics = Topics.of(pipeline)
        self._client: dict[str, str | int | float | bool] = {
            "bootstrap.servers": kafka.bootstrap_servers,
            "log_level": 0,
        }
        self._topic = topic
        self._partitions = partitions
        self._admin = AdminClient(self._client)
        self._consumed = 0
        self._asking = self._consumer(self.topics.group(Stage.AGGREGATE), committed=False)

    def close(self) -> None:
        """End its client."""
        self._asking.close()

    @property
    def consumed(self) -> int:
        """How many records of the source stage 1 has read and committed, as the group's offsets say."""
        try:
            found = self._asking.committed(self._places(self._topic), timeout=ASK_S)
        except KafkaException:
            return self._consumed  # a broker is away; asked again soon
        self._consumed = sum(max(0, each.offset) for each in found)
        return self._consumed

    def owned(self, stage: Stage) -> dict[str, set[int]]:
        """The partitions of each worker in the stage's group; nothing while that is being decided."""
        group = self._group(stage)
        if group is None or group.state != "Stable":
            return {}
        return {worker: _partitions(assignment) for worker, assignment in group.members.items()}

    def taken_over(self, stage: Stage, worker: str) -> bool:
        """Whether others own everything, and this worker is a member no more."""
        owned = self.owned(stage)
        return worker not in owned and sum(map(len, owned.values())) == self._partitions

    def expelled(self, stage: Stage, worker: str) -> bool:
        """Whether the group has given this worker up, whoever is going to own what it had."""
        group = self._group(stage)
        return group is not None and worker not in group.members

    def _group(self, stage: Stage) -> _Group | None:
        # Deprecated in favour of ``describe_consumer_groups``, in which the client aborts this process where a broker
        # goes away meanwhile.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            try:
                found: list[Any] = self._admin.list_groups(self.topics.group(stage), timeout=GROUPS_S)
            except KafkaException:
                return None
        return next((_Group(g.state, {m.client_id: m.assignment for m in g.members}) for g in found), None)

    @contextmanager
    def commits(self, stage: Stage, partitions: Collection[int]) -> Iterator[Callable[[float], int | None]]:
        """Inside, a function that waits for the first record of a commit of these partitions, for so many seconds.

        It tells the partition in the very moment, while the commit is being made.
        """
        state = self.topics.state(stage)
        with closing(self._consumer("tallyman-chaos", committed=False)) as consumer:
            places = self._ends(state, partitions, IsolationLevel.READ_UNCOMMITTED)
            consumer.assign([TopicPartition(state, partition, end) for partition, end in places.items()])

            def following(seconds: float) -> int | None:
                while consumer.poll(0) is not None:
                    pass  # of a commit that is over, most likely
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    message = consumer.poll(0.05)
                    if message is not None and message.error() is None:
                        return message.partition()
                return None

            yield following

    def undecided(self, stage: Stage, partition: int) -> bool:
        """Whether a commit of this partition is open: neither made nor given up."""
        state = self.topics.state(stage)
        stable = self._ends(state, [partition], IsolationLevel.READ_COMMITTED)
        return stable[partition] < self._ends(state, [partition], IsolationLevel.READ_UNCOMMITTED)[partition]

    def offsets_wait(self, stage: Stage, partition: int) -> bool:
        """Whether an open commit has already told the group its offset: then nobody can refuse it any more."""
        topic = self._topic if stage is Stage.AGGREGATE else self.topics.totals
        with closing(self._consumer(self.topics.group(stage), committed=True)) as consumer:
            try:
                consumer.committed([TopicPartition(topic, partition)], timeout=STABLE_S)
            except KafkaException:
                return True
        return False

    @contextmanager
    def counting(self, log: Log) -> Iterator[Callable[[], int]]:
        """Inside, a function that says how many totals or outcomes a log holds by now."""
        topic = self.topics.log(log)
        with closing(self._consumer("tallyman-chaos", committed=True)) as consumer:
            consumer.assign([TopicPartition(topic, partition, 0) for partition in range(self._partitions)])
            number = 0

            def count() -> int:
                nonlocal number
                while found := consumer.consume(10_000, 0.2):
                    number += sum(each.error() is None and _counts(log, each.value() or b"") for each in found)
                return number

            yield count

    def _places(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, partition) for partition in range(self._partitions)]

    def _ends(self, topic: str, partitions: Collection[int], isolation: IsolationLevel) -> dict[int, int]:
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # the client has no type for it
        wanted = {TopicPartition(topic, partition): latest for partition in partitions}

        def ask(within: float) -> dict[int, int]:
            return offsets(self._admin, wanted, isolation, min(within, ASK_S))

        return asked(ask, f"the ends of {topic}", within=MOVED_S, refresh=self._admin)

    def _consumer(self, group: str, *, committed: bool) -> Consumer:
        return Consumer(
            {
                **self._client,
                "group.id": group,
                "enable.auto.commit": False,
                "isolation.level": "read_committed" if committed else "read_uncommitted",
                "fetch.queue.backoff.ms": 5,
            }
        )


def _counts(log: Log, value: bytes) -> bool:
    return log is not Log.TOTALS or isinstance(totals.decode(value), totals.Total)


def _partitions(assignment: bytes) -> set[int]:
    """What a member of a group on one topic has been given, as the protocol of groups writes it."""
    topics, name = struct.unpack_from(">2xih", assignment) if assignment else (0, 0)
    if not topics:
        return set()
    at = 8 + name
    (number,) = struct.unpack_from(">i", assignment, at)
    return set(struct.unpack_from(f">{number}i", assignment, at + 4))
