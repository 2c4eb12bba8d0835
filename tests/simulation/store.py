"""The distributed store, as the contract of a Kafka transaction has it, and the groups that own its partitions.

A commit is one atomic step: entries, appended records, the offset and the group's offset. It is begun (here the group
looks whose it is) and later finished; in between it is pending, and nobody restores what it concerns.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from consumer.deliver.entries import Outcome, decode_outcome
from consumer.storage import Append, Changes, Log, Restored, Stage, StorageError
from consumer.totals import Record, decode

TRANSACTION_MS = 15_000
"""After so long the broker aborts what nobody ends."""
SESSION_MS = 30_000
PATIENCE_MS = 20_000
"""How long a rebalance waits for members to give back what they have."""


class NotDoneError(StorageError):
    """The commit was not made, or nobody knows: drop the state and restore."""


class UnstableError(StorageError):
    """A commit of this partition is pending: wait."""


@dataclass(frozen=True, slots=True)
class Member:
    """Whom the group knows, as of the generation in which it was told its partitions."""

    name: str
    generation: int
    partitions: tuple[int, ...]


class Group:
    """Members give everything back in a rebalance; who does not in time is not asked any more."""

    def __init__(self, partitions: int, random: Random) -> None:
        self.generation = 0
        self.rebalances = 0
        self._partitions = list(range(partitions))
        self._random = random
        self._members: dict[str, Member] = {}
        self._waiting: dict[str, None] = {}
        self._since: int | None = None

    def join(self, name: str, now: int) -> None:
        """Ask for partitions; ``member`` tells when there are some."""
        self._waiting[name] = None
        self.rebalance(now)

    def leave(self, name: str, now: int) -> None:
        """Go away in good order."""
        self._waiting.pop(name, None)
        if self._members.pop(name, None):
            self.rebalance(now)

    def rebalance(self, now: int) -> None:
        """Everybody has to give back what they have."""
        if self._since is None:
            self._since = now

    def member(self, name: str) -> Member | None:
        """What a member was given, once that is decided."""
        return None if self._since is not None else self._members.get(name)

    def calls_back(self, member: Member) -> bool:
        """Whether a member has to give back its partitions."""
        return self._since is not None or self._members.get(member.name) is not member

    def belongs(self, member: Member) -> bool:
        """Whether a commit in this member's name is taken."""
        return self._members.get(member.name) is member

    def settle(self, now: int, silent: Callable[[str], int]) -> None:
        """Strike off whoever has been silent for too long; end the rebalance when all have joined, or time is up."""
        for name in [*self._members, *self._waiting]:
            if silent(name) > SESSION_MS:
                self._waiting.pop(name, None)
                if self._members.pop(name, None):
                    self.rebalance(now)
        if self._since is None or not self._waiting:
            return
        if self._members.keys() <= self._waiting.keys() or now - self._since > PATIENCE_MS:
            self.generation += 1
            names = list(self._waiting)
            self._random.shuffle(names)
            self._random.shuffle(self._partitions)
            share = len(names)
            self._members = {
                name: Member(name, self.generation, tuple(sorted(self._partitions[place::share])))
                for place, name in enumerate(names)
            }
            self._waiting.clear()
            self._since = None
            self.rebalances += 1


@dataclass(slots=True)
class State:
    """What is durable of one processor."""

    offset: int = 0
    entries: dict[bytes, bytes] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Transaction:
    """A commit that has begun."""

    stage: Stage
    changes: dict[int, Changes]
    began: int


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

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit; raises ``UnstableError`` while another may still become it."""
        if self.unstable(stage, partition):
            raise UnstableError
        state = self.states.get((stage, partition))
        seen = self.witness.get((stage, partition))
        if seen is not None and (state is None or state.offset < seen):
            raise StorageError(f"{stage} {partition}: the state is older than what the group has read")
        return Restored(state.offset, iter(list(state.entries.items()))) if state else None

    def unstable(self, stage: Stage, partition: int) -> bool:
        """Whether a commit that concerns the partition is not decided."""
        return any(each.stage is stage and partition in each.changes for each in self.pending)

    def begin(self, stage: Stage, member: Member, changes: Mapping[int, Changes]) -> Transaction:
        """Write everything, offsets included, and leave it to be decided."""
        if not self.current(stage, member):
            raise NotDoneError(f"{member.name} of generation {member.generation} is no member any more")
        transaction = Transaction(stage, dict(changes), self._clock())
        self.pending.append(transaction)
        return transaction

    def current(self, stage: Stage, member: Member) -> bool:
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
