"""Durable state of the two stages: restore and commit, one small interface for every store.

A processor is one stage at work on one partition. Its state is a set of entries (a key and a value, both bytes) and the
offset of the next record it has to read. A commit makes the offset, the changed entries and the appended records of
any number of processors durable in one atomic step, or nothing of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol


class Stage(StrEnum):
    """The two stages; each has its own processors."""

    AGGREGATE = "aggregate"
    DELIVER = "deliver"


class Log(StrEnum):
    """The logs that commits append to."""

    TOTALS = "totals"
    OUTCOMES = "outcomes"
    DEAD_LETTERS = "dead_letters"


class Append(NamedTuple):
    """A record for the end of a log. The key is what the record is about; stores partition by it."""

    log: Log
    key: bytes
    value: bytes


@dataclass(slots=True)
class Changes:
    """What one processor wants made durable: its next offset, and what has changed since its last commit.

    A key stands in ``puts`` or in ``deletes``, never in both.
    """

    offset: int
    puts: dict[bytes, bytes] = field(default_factory=dict)
    deletes: list[bytes] = field(default_factory=list)
    appends: list[Append] = field(default_factory=list)


class Restored(NamedTuple):
    """A processor's last commit: the offset of the next record to read, and all of its entries."""

    offset: int
    entries: Iterator[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a pipeline's state belongs to, recorded at its first start; only the number of partitions ever changes."""

    pipeline: str
    cluster_id: str
    topic: str
    topic_id: str
    bill_from: int
    """Milliseconds since the epoch."""
    partitions: int
    created_at: int
    """Milliseconds since the epoch."""


class Store(Protocol):
    """Restore and commit."""

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit, or None where it never made one."""

    def commit(self, stage: Stage, changes: Mapping[int, Changes]) -> None:
        """Make the changes of these partitions' processors durable, all or none.

        After any exception the outcome is unknown to the caller, who has to drop its state and restore it.
        """


class StorageError(Exception):
    """The store cannot be used; the message names the place and the cure."""
