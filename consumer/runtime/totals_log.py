"""The totals log, as stage 2 reads it: in order from any offset on, and never faster than there is room for."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from typing import Any, Final, NamedTuple, Protocol

import structlog
from confluent_kafka import Consumer, KafkaError, TopicPartition

from consumer.storage import Log, StorageError
from consumer.storage.kafka_client import PASSING, made
from consumer.storage.sqlite import SqliteStore

log = structlog.get_logger()

FETCHED: Final = 2_000
"""Records of a partition that wait here for room; the others lie in the log."""
BATCH: Final = 1_000

_READING: Final = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    # Brokers send what is on their disks: a changed digit would be billed.
    "check.crcs": True,
    "allow.auto.create.topics": False,
    "fetch.queue.backoff.ms": 10,
    "queued.min.messages": 10_000,
    "queued.max.messages.kbytes": 8_192,
}


class Unread(NamedTuple):
    """A record of the totals log."""

    offset: int
    value: bytes


class TotalsLog(Protocol):
    """The totals log. Its methods may be called from any thread."""

    def read(self, partition: int, offset: int, limit: int) -> list[Unread]:
        """The first records from this offset on, as far as they are at hand; to be asked for again until there are any.

        What is below the offset is not asked for any more, but for a partition that has been let go of.
        """

    def reached(self, partition: int, offset: int) -> int:
        """Where the next record will lie at the least, if from this offset on there has been none.

        Behind the last one lie the markers of transactions. When retention has deleted all of the log, it begins behind
        them, and who begins before them finds totals lost.
        """

    def let_go(self, partition: int) -> None:
        """The partition is not read any more, or from elsewhere."""


class SqliteTotals:
    """The one partition in the embedded store."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    def read(self, partition: int, offset: int, limit: int) -> list[Unread]:
        """The first records from this offset on."""
        del partition
        return [Unread(each.offset, each.value) for each in self._store.read(Log.TOTALS, offset - 1, limit)]

    def reached(self, partition: int, offset: int) -> int:
        """There are no markers."""
        del partition
        return offset

    def let_go(self, partition: int) -> None:
        """There is nothing to let go of."""


@dataclass(slots=True)
class _Fetched:
    start: int
    records: deque[Unread] = field(default_factory=deque)
    paused: bool = False
    end: int = 0
    """Where the log ended when all of it had been fetched."""


class KafkaTotals:
    """The partitions in Kafka: those that are asked for are fetched ahead."""

    def __init__(self, client: Mapping[str, Any], topic: str, group: str) -> None:
        """``client`` are the settings of any librdkafka client. Of the group nothing is asked: it is a name in logs."""
        self._topic = topic
        self._consumer = made(Consumer, _READING | dict(client) | {"group.id": group})
        self._fetched: dict[int, _Fetched] = {}
        self._lock = Lock()

    def read(self, partition: int, offset: int, limit: int) -> list[Unread]:
        """The first records from this offset on, as far as they have come."""
        with self._lock:
            fetched = self._fetched.get(partition)
            if fetched is None or offset < fetched.start:
                self._drop(partition)
                fetched = self._fetched[partition] = _Fetched(offset)
                begin = [TopicPartition(self._topic, partition, offset)]
                self._consumer.incremental_assign(begin)
                self._consumer.resume(begin)
            fetched.start = offset
            while fetched.records and fetched.records[0].offset < offset:
                fetched.records.popleft()
            self._fetch()
            self._hold_back(partition, fetched)
            return list(islice(fetched.records, limit))

    def reached(self, partition: int, offset: int) -> int:
        """The end of the log, as soon as all below it has been fetched and taken."""
        with self._lock:
            fetched = self._fetched.get(partition)
            return offset if fetched is None or fetched.records else max(offset, fetched.end)

    def let_go(self, partition: int) -> None:
        """Fetch nothing of it any more."""
        with self._lock:
            self._drop(partition)

    def close(self) -> None:
        """Read nothing any more."""
        with self._lock:
            self._consumer.close()

    def _drop(self, partition: int) -> None:
        if self._fetched.pop(partition, None) is not None:
            self._consumer.incremental_unassign([TopicPartition(self._topic, partition)])

    def _fetch(self) -> None:
        for message in self._consumer.consume(BATCH, 0.0):
            number, offset, error = message.partition(), message.offset(), message.error()
            if error is not None:
                self._hear(error, number, offset)
            elif number is not None and offset is not None and (fetched := self._fetched.get(number)) is not None:
                fetched.records.append(Unread(offset, message.value() or b""))

    def _hold_back(self, partition: int, fetched: _Fetched) -> None:
        if len(fetched.records) >= FETCHED and not fetched.paused:
            self._consumer.pause([TopicPartition(self._topic, partition)])
            fetched.paused = True
        elif len(fetched.records) < FETCHED // 2 and fetched.paused:
            self._consumer.resume([TopicPartition(self._topic, partition)])
            fetched.paused = False

    def _hear(self, error: KafkaError, partition: int | None, offset: int | None) -> None:
        if error.name() == "_PARTITION_EOF":
            fetched = self._fetched.get(-1 if partition is None else partition)
            if fetched is not None:
                fetched.end = max(fetched.end, offset or 0)
        elif error.name() in PASSING or (error.retriable() and not error.fatal()):
            log.warning("kafka_error", topic=self._topic, error=error.name(), reason=error.str())
        elif error.name() in {"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE"}:
            raise StorageError(
                f"{self._topic}, partition {partition} does not have offset {offset} any more: totals were deleted "
                "before they were read, so they have not been delivered. Bring the topic back from a backup, or "
                f"`tallyman reset --bill-from T` starts over with events from T on ({error.str()})."
            )
        else:
            raise StorageError(f"{self._topic}, partition {partition} cannot be read: {error.name()}, {error.str()}")
