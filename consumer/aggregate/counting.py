"""A meter at work on one partition: what it makes of an event, and the bucket that it goes to."""

from collections.abc import Sequence
from typing import Final

from consumer.aggregate.buckets import CHANGED, NEW, SAVED, Bucket, Buckets, Header
from consumer.aggregate.ledger import MeterBook, PartitionBook
from consumer.aggregate.meters import Meter
from consumer.aggregate.readers import Uncountable, customer_getter, customer_reader, filter_of, quantity_reader
from consumer.aggregate.windows import HOUR, MINUTE, due, revision_at
from consumer.events import Decoder, Event

FUTURE: Final = 5 * MINUTE
"""An event dated more than this ahead of its arrival is a dead letter: Stripe would refuse it too."""


class Counting:
    """One meter, compiled; its buckets and books are the partition's."""

    __slots__ = (
        "_accept_late", "_book", "_buckets", "_customer", "_edition", "_grace", "_meter", "_on_time", "_partition",
        "_settle", "_size", "matches", "named", "quantity",
    )  # fmt: skip

    def __init__(
        self,
        meter: Meter,
        *,
        edition: bytes,
        settle: int,
        decoder: Decoder,
        buckets: Buckets,
        book: MeterBook,
        partition: PartitionBook,
    ) -> None:
        def rounded() -> None:
            book.rounded += 1

        self.matches = filter_of(meter, decoder)
        self.named = customer_getter(meter, decoder)
        self._customer = customer_reader(meter, decoder)
        self.quantity = quantity_reader(meter, decoder, rounded)
        self._meter = meter
        self._edition = edition
        self._size = meter.size
        self._grace = meter.size + meter.lateness
        self._accept_late = meter.accept_late
        self._settle = settle
        self._buckets = buckets
        self._book = book
        self._partition = partition
        self._on_time = buckets.on_time(edition)

    def read(self, event: Event, age: int) -> tuple[str, int]:
        """For whom this meter would count how much; ``age`` is how long before its arrival the event took place.

        Raises ``Uncountable``. Nothing is counted yet: an event is counted by all its meters or by none.
        """
        if age > self._accept_late:
            raise Uncountable("late", f"it arrived {age / HOUR:.1f} h after its event time, beyond accept_late")
        if age < -FUTURE:
            raise Uncountable("future", f"its event time is {-age / MINUTE:.0f} minutes after its arrival")
        return self._customer(event), self.quantity(event)

    @property
    def rounded(self) -> int:
        """Events of which decimals were lost."""
        return self._book.rounded

    @rounded.setter
    def rounded(self, events: int) -> None:
        self._book.rounded = events

    def add(self, at: int, customer: str, quantity: int, offset: int) -> None:
        """Count it, in the window of its event time and the first revision that is still open."""
        book = self._book
        book.events += 1
        book.value += quantity
        start = at - at % self._size
        if self._partition.clock < start + self._grace:
            bucket = self._on_time.get(start) or self._open(start, 0)
        else:
            bucket = self._late(start)
        row = bucket.rows.get(customer)
        if row is None:
            bucket.rows[customer] = row = [quantity, 1, at, offset, offset, NEW]
            self._buckets.keys += 1
            self._buckets.touched.append((bucket, customer, row))
            return
        row[0] += quantity
        row[1] += 1
        if at < row[2]:
            row[2] = at
        row[4] = offset
        if row[5] == SAVED:
            row[5] = CHANGED
            self._buckets.touched.append((bucket, customer, row))

    def _late(self, start: int) -> Bucket:
        """An arrival after the deadline goes to its revision or, if that has closed, to the next that has not."""
        revision = revision_at(start + self._grace, max(self._partition.arrival, self._partition.clock - self._settle))
        if revision:
            self._book.late[revision] = self._book.late.get(revision, 0) + 1
        return self._open(start, revision)

    def _open(self, start: int, revision: int) -> Bucket:
        meter = self._meter
        due_at = due(start + self._grace, revision)
        header = Header(meter.name, meter.window, due_at, due_at + self._settle, meter.stripe)
        return self._buckets.bucket(self._edition, start, revision, header)


def read_by_all(meters: Sequence[Counting], event: Event, age: int) -> list[tuple[Counting, str, int]]:
    """What each of several meters would count. Raises ``Uncountable`` where one of them cannot, and then none does."""
    rounded = [meter.rounded for meter in meters]
    try:
        return [(meter, *meter.read(event, age)) for meter in meters]
    except Uncountable:
        for meter, before in zip(meters, rounded, strict=True):
            meter.rounded = before
        raise
