"""The distributed store, as the contract of a Kafka transaction has it.

A commit is one atomic step: entries, appended records, the offset and the group's offset. It is opened, the group is
told the offsets and looks whose they are, and it is finished. In between nobody restores what it concerns.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from consumer.deliver.entries import Outcome, decode_outcome
from consumer.storage import Append, Changes, Log, Restored, Stage, StorageError
from consumer.totals import Record, decode
from tests.simulation.groups import Client, Group, Metadata

TRANSACTION_MS = 15_000
"""After so long the broker aborts what nobody ends."""


class NotDoneError(StorageError):
    """The commit was not made, or nobody knows: drop the state and restore."""


class UnstableError(StorageError):
    """A commit of this partition is pending: wait."""


@dataclass(slots=True)
class State:
    """What is durable of one processor."""

    offset: int = 0
    entries: dict[bytes, bytes] = field(default_factory=dict)
    number: int = 0
    """Of the last commit."""
    torn: bool = False
    """A number has come twice: two have written it."""


@dataclass(eq=False, slots=True)
class Transaction:
    """A commit that has begun."""

    stage: Stage
    author: Client
    changes: dict[int, Changes]
    numbers: dict[int, int]
    """Of each partition's commits, which one this is."""
    began: int
    asked: bool = False
    """Whether the broker has been asked to commit it, and will do so."""


class SimulatedStore:
    """States, logs and witnesses; ``applied`` is told of every commit that becomes durable."""

    def __init__(
        self,
        groups: Mapping[Stage, Group],
        spread: int,
        clock: Callable[[], int],
        applied: Callable[[Stage, int, Changes], None],
    ) -> None:
        self.groups = groups
        self.states: dict[tuple[Stage, int], State] = {}
        self.witness: dict[tuple[Stage, int], int] = {}
        """The groups' offsets; they can expire."""
        self.totals: list[list[Record]] = [[] for _ in range(spread)]
        self.outcomes: list[Outcome] = []
        self.letters = 0
        self.commits = 0
        self.pending: list[Transaction] = []
        self._clock = clock
        self._applied = applied

    def restore(self, stage: Stage, partition: int, reader: Client) -> tuple[Restored | None, int]:
        """The processor's last commit and its number; raises ``UnstableError`` while another may still become it."""
        self.settle(reader)
        if self.unstable(stage, partition):
            raise UnstableError
        state = self.states.get((stage, partition))
        seen = self.witness.get((stage, partition))
        if seen is not None and (state is None or state.offset < seen):
            raise StorageError(f"{stage} {partition}: the state is older than what the group has read")
        if state is None:
            return None, 0
        if state.torn:
            raise StorageError(f"{stage} {partition}: two processes have written it")
        return Restored(state.offset, iter(list(state.entries.items()))), state.number

    def unstable(self, stage: Stage, partition: int) -> bool:
        """Whether a commit that concerns the partition is not decided."""
        return any(each.stage is stage and partition in each.changes for each in self.pending)

    def settle(self, author: Client) -> None:
        """Decide what its own process has left open: the successor of a producer ends what that began."""
        for transaction in [each for each in self.pending if each.author is author]:
            if transaction.asked:
                self.finish(transaction)
            else:
                self.abort(transaction)

    def open(
        self, stage: Stage, author: Client, changes: Mapping[int, Changes], numbers: Mapping[int, int]
    ) -> Transaction:
        """Write everything but the offsets, and leave it to be decided."""
        self.settle(author)
        transaction = Transaction(stage, author, dict(changes), dict(numbers), self._clock())
        self.pending.append(transaction)
        return transaction

    def send_offsets(self, transaction: Transaction, member: Metadata) -> None:
        """Tell the group; it takes them from members of its generation alone."""
        if transaction not in self.pending:
            raise NotDoneError("the broker aborted it")
        if not self.current(transaction.stage, member):
            self.abort(transaction)
            raise NotDoneError(f"{member.id} of generation {member.generation} is no member any more")

    def current(self, stage: Stage, member: Metadata) -> bool:
        """Whether the group takes offsets from this member."""
        return self.groups[stage].belongs(member)

    def finish(self, transaction: Transaction) -> None:
        """Make it durable; nothing of one that the broker has aborted."""
        if transaction not in self.pending:
            raise NotDoneError("the broker aborted it")
        self.pending.remove(transaction)
        self.commits += 1
        for partition, changes in transaction.changes.items():
            self.apply(transaction.stage, partition, changes)
            state = self.states[transaction.stage, partition]
            state.torn = state.torn or transaction.numbers[partition] != state.number + 1
            state.number = transaction.numbers[partition]

    def abort(self, transaction: Transaction) -> None:
        """Nothing of it is there."""
        if transaction in self.pending:
            self.pending.remove(transaction)

    def expire(self) -> None:
        """Abort what nobody has ended in time."""
        for transaction in [each for each in self.pending if self._clock() - each.began > TRANSACTION_MS]:
            self.abort(transaction)

    def apply(self, stage: Stage, partition: int, changes: Changes) -> None:
        """All of one processor's changes."""
        self.put(stage, partition, changes)
        for each in changes.appends:
            self.append(each)
        self._applied(stage, partition, changes)

    def put(self, stage: Stage, partition: int, changes: Changes) -> None:
        """Entries and offsets."""
        state = self.states.setdefault((stage, partition), State())
        state.offset = self.witness[stage, partition] = changes.offset
        state.entries.update(changes.puts)
        for key in changes.deletes:
            state.entries.pop(key, None)

    def append(self, record: Append) -> None:
        """One more record of a log."""
        if record.log is Log.TOTALS:
            self.totals[zlib.crc32(record.key) % len(self.totals)].append(decode(record.value))
        elif record.log is Log.OUTCOMES:
            self.outcomes.append(decode_outcome(record.value))
        else:
            self.letters += 1
