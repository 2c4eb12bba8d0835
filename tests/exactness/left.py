"""What a run has left in its store: the logs, and the state of both stages, read once nobody writes any more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from consumer.storage import Facts, Log, Restored, Stage
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_reading import log_sizes, logged
from consumer.storage.kafka_start import recorded
from consumer.storage.kafka_topics import Topics
from consumer.storage.sqlite import SqliteStore

T = TypeVar("T")

_PAGE = 5_000


class NothingLeftError(Exception):
    """There is no state where some has to be."""


class Kept(NamedTuple):
    """A record of a log."""

    partition: int
    offset: int
    value: bytes


class Left(Protocol):
    """The end of a run, whatever kept it."""

    @property
    def facts(self) -> Facts:
        """What the state belongs to."""

    @property
    def spread(self) -> int:
        """The number of partitions of the totals log."""

    def log(self, log: Log) -> Iterator[Kept]:
        """All of a log; the records of one partition in their order."""

    def restored(self, stage: Stage, partition: int) -> Restored:
        """The last commit of a processor. Raises ``NothingLeftError``."""


class InSqlite:
    """What the embedded store has kept."""

    spread = 1

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.facts = _there(store.facts(), "facts")

    @classmethod
    @contextmanager
    def open(cls, database: Path) -> Iterator[InSqlite]:
        """Of a service that has ended: another one must not run meanwhile."""
        with SqliteStore.open(database, now=lambda: time.time_ns() // 10**6, create=False, lock=True) as store:
            yield cls(store)

    def log(self, log: Log) -> Iterator[Kept]:
        """All of a log, in its order."""
        after = 0
        while page := self._store.read(log, after, _PAGE):
            yield from (Kept(0, each.offset, each.value) for each in page)
            after = page[-1].offset

    def restored(self, stage: Stage, partition: int) -> Restored:
        """The last commit of a processor. Raises ``NothingLeftError``."""
        return _there(self._store.restore(stage, partition), f"state of {stage}, partition {partition}")


class InKafka:
    """What the distributed store has kept."""

    def __init__(self, store: KafkaStore, client: Mapping[str, Any], facts: Facts) -> None:
        self._store = store
        self._client = client
        self.facts = facts
        self.spread = log_sizes(client, store.topics)[Log.TOTALS]

    @classmethod
    @contextmanager
    def open(cls, client: Mapping[str, Any], pipeline: str) -> Iterator[InKafka]:
        """Of a pipeline whose processes have ended; ``client`` are the settings of any librdkafka client."""
        facts = _there(recorded(client, Topics.of(pipeline)), "facts")
        # A member of no group: it restores, and cannot commit.
        with closing(KafkaStore(client, facts, {})) as store:
            yield cls(store, client, facts)

    def log(self, log: Log) -> Iterator[Kept]:
        """All of a log; the records of one partition in their order."""
        for each in logged(self._client, self._store.topics, log):
            yield Kept(each.partition, each.offset, each.value)

    def restored(self, stage: Stage, partition: int) -> Restored:
        """The last commit of a processor. Raises ``NothingLeftError``."""
        return _there(self._store.restore(stage, partition), f"state of {stage}, partition {partition}")


def _there(found: T | None, what: str) -> T:
    if found is None:
        raise NothingLeftError(f"there is no {what}")
    return found
