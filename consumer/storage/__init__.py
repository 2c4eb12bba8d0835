"""Durable state of the two stages: restore and commit, one small interface for every store.

A processor is one stage at work on one partition. Its state is a set of entries (a key and a value, both bytes) and the
offset of the next record it has to read. A commit makes the offset, the changed entries and the appended records of
any number of processors durable in one atomic step, or nothing of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, NamedTuple, Protocol


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


Progress = Callable[[int, int], None]
"""Told, many times a second, how far a restore has read and to which end, as offsets. What it raises ends it."""


class Store(Protocol):
    """Restore and commit."""

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit, or None where it never made one."""

    def commit(self, stage: Stage, changes: Mapping[int, Changes]) -> None:
        """Make the changes of these partitions' processors durable, all or none.

        Raises:
            CommitFailed: the caller drops the state of these partitions, restores those that are still its own, and
                goes on. Sending or counting anything before that bills twice.
            StorageError: a person has to look; the caller ends.
        """


class Logged(NamedTuple):
    """A record of a log."""

    partition: int
    offset: int
    """Given once in the partition; SQLite's one partition begins with 1."""
    key: bytes
    appended_at: int
    """Milliseconds since the epoch, by the store's clock."""
    value: bytes
    redriven_at: int | None = None
    """When this dead letter was produced again, in milliseconds since the epoch; None in the other logs."""


class Archive(Protocol):
    """A store as operators' commands need it, beside a service that may be running: to read, and to append decisions.

    A log lies in partitions, and its records have an order within their partition alone. A partition of the totals log
    is what a processor of stage 2 reads. Places in a log are offsets by partition.
    """

    @property
    def place(self) -> str:
        """Where the state is, as messages say it."""

    def facts(self) -> Facts | None:
        """What the state belongs to, or None before the first start."""

    def holder(self) -> str | None:
        """Who delivers totals at this moment, as messages say it; None where no service does."""

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit, or None where it never made one. Nobody is kept from making the next one."""

    def ends(self, log: Log) -> dict[int, int]:
        """Where the log ends now, for each partition: all that was appended before lies below."""

    def settled(self, log: Log) -> dict[int, int]:
        """How far the log is settled, for each partition: the commits that wrote what lies below are made, or never
        will be. Not above ``ends``, and below it while a commit is being made."""

    def shortened(self, log: Log) -> set[int]:
        """The partitions whose first records are not kept any more."""

    def since(self, log: Log, time: int) -> dict[int, int]:
        """From where on to read what was appended at a time (in milliseconds) or later, for each partition: all of it
        lies there or behind, as far as the store's clock has never been set back. The end, where there is none."""

    def logged(
        self, log: Log, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None
    ) -> Iterator[Logged]:
        """The records of a log from some places on and below others, a few at a time.

        Without ``starts`` from its beginning, without ``ends`` to where it ends now; a partition that ``starts`` does
        not name is read from its beginning, one that ``ends`` does not name is left out.
        """

    def number(self, letter: Logged) -> int:
        """What people call a dead letter by. It stays, and no other one has it."""

    def letter(self, number: int) -> Logged | None:
        """The dead letter of this number, if it is there."""

    def append(self, appends: Iterable[Append]) -> None:
        """Append records that belong to no commit, all or none."""

    def mark_redriven(self, letters: Iterable[Logged]) -> None:
        """Record that these dead letters have been produced again, now; who reads them is told."""


class StorageError(Exception):
    """The store cannot be used; the message names the place and the cure."""


class Unreachable(StorageError):
    """The store does not answer, or what is asked for is held up there. Nothing is wrong: try again later.

    An outage is for metrics and readiness, never for a restart.
    """


class CommitFailed(StorageError):
    """A commit that came to nothing, or of which nobody knows what came; its state is to be restored."""

    how: ClassVar[str]
    """In one word, for metrics and logs."""


class Abandoned(CommitFailed):
    """The commit was aborted: nothing of it is there, or ever will be."""

    how = "abandoned"


class Refused(Abandoned):
    """The group says that this process is no member, or not any more: others own its partitions now.

    ``reason`` is the broker's, or ``not_a_member`` where the process knows it by itself.
    """

    how = "refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class OutcomeUnknown(CommitFailed):
    """Whether the commit was made is not known: as a whole or not at all. What is restored tells."""

    how = "unknown"


class Fenced(OutcomeUnknown):
    """The store has given up the writer: it was silent for too long, or another one has taken its place."""

    how = "fenced"


FAILURES: Final = tuple(each.how for each in (Abandoned, Refused, OutcomeUnknown, Fenced))
"""How commits fail."""
