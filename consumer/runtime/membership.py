"""Membership in a stage's consumer group: which partitions are ours, told as it changes.

A member reads nothing. It is subscribed, so that the group counts on it and hands it partitions, and it keeps all of
them paused; what is read is read by another client, with the offsets of the state. So nothing that the group does to
its member disturbs what is being read, or brings records that nobody expects. Why so: docs/decisions/0014.
"""

from collections.abc import Collection, Mapping
from threading import Thread
from typing import Any, Final, Protocol

import structlog
from confluent_kafka import OFFSET_END, Consumer, Message, TopicPartition

from consumer.runtime.source import SourceError
from consumer.storage.kafka_client import made

log = structlog.get_logger()

CLOSE_S: Final = 5.0

_MEMBER: Final = {
    "partition.assignment.strategy": "cooperative-sticky",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "latest",
    "allow.auto.create.topics": False,
    # A source that grows is noticed by its metadata.
    "topic.metadata.refresh.interval.ms": 30_000,
    # Who is killed is replaced after this; who is only slow is not.
    "session.timeout.ms": 20_000,
    # Longer than any commit takes: whose loop stands still for so long has nothing to keep.
    "max.poll.interval.ms": 60_000,
}
_LASTING: Final = frozenset({"TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED"})


class Owner(Protocol):
    """Who works on the partitions that the group gives us. Called by ``poll``, in its thread."""

    def assigned(self, partitions: Collection[int]) -> None:
        """These are ours from now on."""

    def revoked(self, partitions: Collection[int]) -> None:
        """These are ours until this returns: the last chance to commit them."""

    def lost(self, partitions: Collection[int]) -> None:
        """These have not been ours for a while: nothing of them can be committed any more."""


class Membership(Protocol):
    """How a process comes to own partitions."""

    def join(self, owner: Owner) -> None:
        """From now on ``poll`` tells this owner."""

    def poll(self) -> None:
        """Tell the owner what has changed. To be called several times a second, always by one thread."""

    def grown(self, partitions: int) -> None:
        """The topic has so many partitions now."""

    def close(self) -> None:
        """Leave. The owner has let go of everything, and is told nothing more."""


class Alone:
    """In place of a group, where one process has all partitions."""

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self._owner: Owner | None = None

    def join(self, owner: Owner) -> None:
        """All of them are the owner's, for good."""
        self._owner = owner
        owner.assigned(range(self._partitions))

    def poll(self) -> None:
        """Nothing ever changes by itself."""

    def grown(self, partitions: int) -> None:
        """The new ones are the owner's too."""
        new, self._partitions = range(self._partitions, partitions), max(partitions, self._partitions)
        if new and self._owner is not None:
            self._owner.assigned(new)

    def close(self) -> None:
        """There is nothing to leave."""


class Member:
    """A member of a stage's group on its topic."""

    def __init__(self, client: Mapping[str, Any], topic: str, group: str) -> None:
        """``client`` are the settings of any librdkafka client."""
        self._topic = topic
        self._consumer = made(Consumer, _MEMBER | dict(client) | {"group.id": group})
        self._owner: Owner | None = None
        self._failure: BaseException | None = None
        self.metadata: bytes = self._consumer.consumer_group_metadata()
        """As which member, of which generation, we own what the owner was told of. As of the last poll: taken later,
        it could be of a generation in which partitions have gone to others already."""

    def join(self, owner: Owner) -> None:
        """Ask the group for a share of the topic."""
        self._owner = owner
        self._consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def poll(self) -> None:
        """Tell the owner of what the group has decided. Raises what the owner raised, or ``SourceError``."""
        while (message := self._consumer.poll(0)) is not None:
            self._hear(message)
        self._look()
        if self._failure is not None:
            raise self._failure

    def grown(self, partitions: int) -> None:
        """The group finds out by itself."""

    def close(self) -> None:
        """Leave the group, so that others need not wait for the session to end."""
        self._owner = None
        # It waits for brokers that may be gone; by now nothing depends on it.
        closing = Thread(target=self._consumer.close, daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _look(self) -> None:
        self.metadata = self._consumer.consumer_group_metadata()

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._owner is None:
            # We are leaving: to pause what is given now waits, with all of the process, for an answer that never comes.
            return
        ours = [TopicPartition(self._topic, each.partition, OFFSET_END) for each in partitions]
        consumer.incremental_assign(ours)
        consumer.pause(ours)
        log.info("partitions_assigned", topic=self._topic, partitions=_numbers(partitions))
        self._tell("assigned", partitions)

    def _revoked(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        log.info("partitions_revoked", topic=self._topic, partitions=_numbers(partitions))
        self._tell("revoked", partitions)

    def _lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        log.warning("partitions_lost", topic=self._topic, partitions=_numbers(partitions))
        self._tell("lost", partitions)

    def _tell(self, what: str, partitions: list[TopicPartition]) -> None:
        # What is raised in a callback costs the client what it holds; it is raised again by ``poll``.
        try:
            self._look()
            if self._owner is not None:
                getattr(self._owner, what)(_numbers(partitions))
        except BaseException as failure:  # noqa: BLE001
            self._failure = failure

    def _hear(self, message: Message) -> None:
        error = message.error()
        if error is None:
            return  # a record that came before the partition was paused; others read it
        if error.fatal() or error.name() in _LASTING:
            raise SourceError(f"{self._topic}: the group cannot be joined: {error.name()}, {error.str()}")
        log.warning("kafka_error", topic=self._topic, error=error.name(), reason=error.str())


def _numbers(partitions: list[TopicPartition]) -> list[int]:
    return sorted(each.partition for each in partitions)
