"""Totals that nothing is done about: set aside until their customer's turn, or parked.

There may be 100,000 of them, so they are kept as they are stored.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Final, Generic, TypeVar

from consumer.deliver.entries import Entry, Reason, pack, unpack

G = TypeVar("G")

_SPARE: Final = 100
"""So many that have gone are not worth the trouble of leaving them out."""


class Oldest(Generic[G]):
    """The earliest timestamp in each group of totals, while totals come and go; another thread may look."""

    def __init__(self) -> None:
        self._group: dict[str, G] = {}
        self._number: Counter[G] = Counter()
        self._heaps: dict[G, list[tuple[int, str]]] = {}
        """With those that have gone, until they come first or are as many as the others."""

    def add(self, identifier: str, group: G, timestamp: int) -> None:
        """One more total."""
        self._group[identifier] = group
        self._number[group] += 1
        heapq.heappush(self._heaps.setdefault(group, []), (timestamp, identifier))

    def remove(self, identifier: str) -> None:
        """One less."""
        group = self._group.pop(identifier)
        self._number[group] -= 1
        if not self._number[group]:
            del self._number[group], self._heaps[group]
            return
        heap = self._heaps[group]
        while self._group.get(heap[0][1]) != group:
            heapq.heappop(heap)
        if len(heap) > 2 * self._number[group] + _SPARE:
            # Who has come back is in it twice.
            there = list({each for each in heap if self._group.get(each[1]) == group})
            heapq.heapify(there)
            self._heaps[group] = there

    def by_group(self) -> dict[G, int]:
        """The earliest timestamp of each group, in seconds since the epoch."""
        # A slice, for the owner may have just taken the last one away.
        heads = [(group, heap[:1]) for group, heap in list(self._heaps.items())]
        return {group: head[0][0] for group, head in heads if head}


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
        self.oldest: Oldest[str] = Oldest()
        """Of those set aside, by meter."""

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
        self.oldest.add(identifier, entry.total.meter, entry.total.timestamp)
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
            self.oldest.remove(identifier)
            return unpack(self._aside.pop(identifier))
        return None


class Parked:
    """The totals that wait for a person or for a mapping, by identifier."""

    def __init__(self) -> None:
        self.reasons: Counter[Reason] = Counter()
        self._packed: dict[str, bytes] = {}
        self._unmapped: dict[str, dict[str, None]] = {}
        self._stopped: dict[str, dict[str, None]] = {}
        self.oldest: Oldest[tuple[str, Reason]] = Oldest()
        """By meter, and why they are parked."""

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
        self.oldest.add(total.identifier, (total.meter, reason), total.timestamp)
        if reason is Reason.UNMAPPED:
            self._unmapped.setdefault(total.customer, {})[total.identifier] = None
        elif reason is Reason.METER:
            self._stopped.setdefault(total.stripe.event_name, {})[total.identifier] = None
        return packed

    def replace(self, entry: Entry) -> bytes:
        """More is known of it; it stays parked, and for the same reason. Returns it packed."""
        packed = self._packed[entry.total.identifier] = pack(entry)
        return packed

    def pop(self, identifier: str) -> tuple[Entry, Reason]:
        """The entry, not parked any more, and why it was."""
        entry = unpack(self._packed.pop(identifier))
        reason = entry.reason
        if reason is None:
            raise ValueError(f"{identifier} was parked without a reason")
        self.reasons[reason] -= 1
        self.oldest.remove(identifier)
        if reason is Reason.UNMAPPED:
            _leave(self._unmapped, entry.total.customer, identifier)
        elif reason is Reason.METER:
            _leave(self._stopped, entry.total.stripe.event_name, identifier)
        return entry, reason

    def unmapped(self) -> dict[str, list[str]]:
        """The customers that are waited for, and their totals."""
        return {customer: list(identifiers) for customer, identifiers in self._unmapped.items()}

    def stopped(self) -> list[str]:
        """The event names whose meter is waited for."""
        return list(self._stopped)

    def of_meter(self, event_name: str) -> Iterable[str]:
        """The totals that wait for this event name's meter, in the order in which they were parked."""
        return self._stopped.get(event_name, {}).keys()


def _leave(groups: dict[str, dict[str, None]], group: str, identifier: str) -> None:
    del groups[group][identifier]
    if not groups[group]:
        del groups[group]
