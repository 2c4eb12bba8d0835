"""Totals that nothing is done about: set aside until their customer's turn, or parked.

There may be 100,000 of them, so they are kept as they are stored.
"""

from collections import Counter, deque
from collections.abc import Iterator

from consumer.deliver.entries import Entry, Reason, pack, unpack


class Seats:
    """Bounds how many totals are in flight, and how many of one customer; the others are set aside, in order."""

    def __init__(self, in_flight: int) -> None:
        """How many totals may be in flight."""
        self.in_flight = in_flight
        self.share = max(1, in_flight // 20)
        """Of one customer: twenty customers that are stuck or flooded at once before anybody else has to wait."""
        self._taken: Counter[str] = Counter()
        self._total = 0
        self._aside: dict[str, bytes] = {}
        self._queues: dict[str, deque[str]] = {}
        self._turns: dict[str, None] = {}

    @property
    def left(self) -> int:
        """How many totals may still come in."""
        return max(0, self.in_flight - self._total)

    @property
    def aside(self) -> int:
        """How many totals are set aside."""
        return len(self._aside)

    def __contains__(self, identifier: str) -> bool:
        """Whether this total is set aside."""
        return identifier in self._aside

    def free(self, customer: str) -> bool:
        """Whether one more total of the customer may come in."""
        return self._total < self.in_flight and self._taken[customer] < self.share

    def sit(self, customer: str) -> None:
        """One more total of the customer is in flight."""
        self._taken[customer] += 1
        self._total += 1

    def leave(self, customer: str) -> None:
        """One less."""
        self._total -= 1
        self._taken[customer] -= 1
        if not self._taken[customer]:
            del self._taken[customer]
        if customer in self._queues:
            self._turns[customer] = None

    def set_aside(self, customer: str, entry: Entry) -> bytes:
        """Keep it until ``call`` gives it back; returns it packed."""
        identifier = entry.total.identifier
        packed = self._aside[identifier] = pack(entry)
        self._queues.setdefault(customer, deque()).append(identifier)
        if self._taken[customer] < self.share:
            self._turns[customer] = None
        return packed

    def call(self) -> Entry | None:
        """One that may come in now, customers taking turns, and no more set aside; None where there is none."""
        while self._turns and self._total < self.in_flight:
            customer = next(iter(self._turns))
            del self._turns[customer]
            if self._taken[customer] >= self.share:
                continue
            queue = self._queues[customer]
            identifier = queue.popleft()
            if queue:
                self._turns[customer] = None
            else:
                del self._queues[customer]
            return unpack(self._aside.pop(identifier))
        return None


class Parked:
    """The totals that wait for a person or for a mapping, by identifier."""

    def __init__(self) -> None:
        self.reasons: Counter[Reason] = Counter()
        self._packed: dict[str, bytes] = {}
        self._unmapped: dict[str, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._packed

    def __iter__(self) -> Iterator[Entry]:
        return map(unpack, list(self._packed.values()))

    def get(self, identifier: str) -> Entry | None:
        """The entry, to look at; it stays parked."""
        packed = self._packed.get(identifier)
        return None if packed is None else unpack(packed)

    def add(self, entry: Entry) -> bytes:
        """Keep it; returns it packed."""
        reason, total = entry.reason, entry.total
        if reason is None:
            raise ValueError(f"{total.identifier} cannot be parked without a reason")
        packed = self._packed[total.identifier] = pack(entry)
        self.reasons[reason] += 1
        if reason is Reason.UNMAPPED:
            self._unmapped.setdefault(total.customer, {})[total.identifier] = None
        return packed

    def pop(self, identifier: str) -> tuple[Entry, Reason]:
        """The entry, not parked any more, and why it was."""
        entry = unpack(self._packed.pop(identifier))
        reason, customer = entry.reason, entry.total.customer
        if reason is None:
            raise ValueError(f"{identifier} was parked without a reason")
        self.reasons[reason] -= 1
        if reason is Reason.UNMAPPED:
            del self._unmapped[customer][identifier]
            if not self._unmapped[customer]:
                del self._unmapped[customer]
        return entry, reason

    def unmapped(self) -> dict[str, list[str]]:
        """The customers that are waited for, and their totals."""
        return {customer: list(identifiers) for customer, identifiers in self._unmapped.items()}
