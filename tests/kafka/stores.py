"""A pipeline's topics on a real Kafka, and the processes that share its state."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from consumer.sandbox.kafka import Kafka
from consumer.storage import Changes, Facts, Log, Logged, Stage
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_reading import logged
from consumer.storage.kafka_start import begin
from consumer.storage.kafka_topics import Topics, ensure
from tests.kafka.harness import DAY, until

PARTITIONS = 3
BILL_FROM = 1_790_000_000_000


class Member:
    """A consumer that has joined its group; alone in it unless the test lets others join."""

    def __init__(self, client: Mapping[str, Any], topic: str, group: str, **settings: Any) -> None:
        self.owned: set[int] = set()
        usual = {"enable.auto.commit": False, "auto.offset.reset": "earliest", "partition.assignment.strategy": "range"}
        self.consumer = Consumer({**client, **usual, "group.id": group, **settings})
        self.consumer.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)

    def metadata(self) -> bytes:
        found = self.consumer.consumer_group_metadata()
        assert isinstance(found, bytes)
        return found

    def until_owns(self, partitions: int) -> None:
        """Wait until it has so many partitions."""

        def holds() -> bool:
            self.consumer.poll(0.05)
            return len(self.owned) == partitions

        until(holds, f"{partitions} partitions are assigned", within=60.0)

    def until_shares(self, other: Member, partitions: int) -> None:
        """Wait until the two of them have so many partitions, and each has some; members move only if both poll."""

        def holds() -> bool:
            for each in (self, other):
                each.consumer.poll(0.05)
            return bool(self.owned and other.owned) and len(self.owned | other.owned) == partitions

        until(holds, f"{partitions} partitions are shared", within=60.0)

    def close(self) -> None:
        self.consumer.close()

    def _assigned(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self.owned.update(each.partition for each in partitions)

    def _revoked(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        self.owned.difference_update(each.partition for each in partitions)


class Pipeline:
    """Its topics, made by ``ensure``, and what its stores need."""

    def __init__(self, kafka: Kafka, *, partitions: int = PARTITIONS) -> None:
        self.kafka = kafka
        self.client = {"bootstrap.servers": kafka.bootstrap_servers, "log_level": 2}
        name = f"s-{uuid.uuid4().hex[:12]}"
        self.source = f"usage-{name}"
        self.topics = Topics.of(name)
        kafka.create_topic(self.source, partitions)
        ensure(self.client, self.topics, partitions=partitions, keep_ms=90 * DAY)
        self.facts = Facts(name, "cluster", self.source, "topic", BILL_FROM, partitions, BILL_FROM)
        self._members: dict[Stage, Member] = {}
        self._opened = ExitStack()

    def member(self, stage: Stage, **settings: Any) -> Member:
        """A further member of the stage's group, which has yet to be given partitions."""
        topic = self.source if stage is Stage.AGGREGATE else self.topics.totals
        return self._opened.enter_context(closing(Member(self.client, topic, self.topics.group(stage), **settings)))

    def metadata(self, stage: Stage) -> bytes:
        """Of the one member that the stage has where a test is not about membership."""
        if stage not in self._members:
            self._members[stage] = self.member(stage)
            self._members[stage].until_owns(self.facts.partitions)
        return self._members[stage].metadata()

    @contextmanager
    def store(self, facts: Facts | None = None, **members: Member) -> Iterator[KafkaStore]:
        """As a process opens it; members by the names of their stages."""
        metadata = {
            stage: members[stage].metadata if stage in members else partial(self.metadata, stage) for stage in Stage
        }
        with closing(KafkaStore(self.client, facts or self.facts, metadata)) as store:
            yield store

    def begin(self) -> Facts:
        """The first start, with nothing counted yet."""
        return begin(self.client, self.facts, {p: Changes(0) for p in range(self.facts.partitions)})

    def logged(self, log: Log) -> list[Logged]:
        return list(logged(self.client, self.topics, log))

    def close(self) -> None:
        self._opened.close()
