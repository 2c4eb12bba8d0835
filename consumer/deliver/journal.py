"""What the next commit will make durable."""

from collections.abc import Callable
from typing import Generic, TypeVar

from consumer.deliver.entries import Outcome, encode_outcome
from consumer.storage import Append, Changes, Log

T = TypeVar("T")


class Journal(Generic[T]):
    """The changes since the last commit. What is in flight is encoded when the commit is made, and once."""

    def __init__(self, encode: Callable[[T], bytes]) -> None:
        self.offset = 0
        self._encode = encode
        self._moved = False
        self._reached = False
        self._puts: dict[str, T | bytes] = {}
        self._deletes: dict[str, None] = {}
        self._appends: list[Append] = []
        self._new: set[str] = set()

    def __len__(self) -> int:
        """How many totals have changed; that the offset has moved is a reason to commit only where it is at the end."""
        return len(self._puts) + len(self._appends) + self._reached

    def move(self, offset: int) -> None:
        """The offset of the next record to read."""
        self.offset = offset
        self._moved = True

    def reach(self, offset: int) -> None:
        """Nothing is left to read below this offset, where the next record will lie at the least."""
        self.move(offset)
        self._reached = True

    def begin(self, identifier: str) -> None:
        """A total is here that has no entry yet: if it finishes before the commit, it never gets one."""
        if identifier not in self._deletes:
            self._new.add(identifier)

    def put(self, identifier: str, entry: T | bytes) -> None:
        """The total's entry has changed; bytes are packed already."""
        self._puts[identifier] = entry
        self._deletes.pop(identifier, None)

    def remove(self, identifier: str) -> None:
        """The entry is not needed any more."""
        self._puts.pop(identifier, None)
        if identifier in self._new:
            self._new.discard(identifier)
        else:
            self._deletes[identifier] = None

    def finish(self, outcome: Outcome) -> None:
        """The total has come to its end."""
        self.remove(outcome.identifier)
        self.append(outcome)

    def append(self, outcome: Outcome) -> None:
        """More has become of a total that is finished."""
        identifier = outcome.identifier
        self._appends.append(Append(Log.OUTCOMES, identifier.encode(), encode_outcome(outcome)))

    def take(self) -> Changes | None:
        """All of it, and begin anew; None where there is nothing."""
        if not (self._moved or self._puts or self._appends):
            return None
        puts = {
            identifier.encode(): entry if isinstance(entry, bytes) else self._encode(entry)
            for identifier, entry in self._puts.items()
        }
        changes = Changes(self.offset, puts, [identifier.encode() for identifier in self._deletes], self._appends)
        self.forget()
        return changes

    def forget(self) -> None:
        """What was noted is durable."""
        self._moved = self._reached = False
        self._puts, self._deletes, self._appends = {}, {}, []
        self._new.clear()
