"""A meter at work on one partition: what it makes of an event, and the bucket that it goes to."""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from consumer.aggregate.buckets import CHANGED, NEW, SAVED, Bucket, Buckets, Header
from consumer.aggregate.ledger import MeterBook, PartitionBook
from consumer.aggregate.meters import Meter
from consumer.aggregate.readers import (
    SURELY_SHORT,
    Quantity,
    Uncountable,
    customer_getter,
    customer_reader,
    filter_of,
    quantity_reader,
)
from consumer.aggregate.windows import HOUR, MINUTE, due, revision_at, window_start
from consumer.events import Decoder, Event
from consumer.totals import SCALE

FUTURE: Final = 5 * MINUTE
"""An event dated more than this ahead of its arrival is a dead letter: Stripe would refuse it too."""


class Count(Protocol):
    """Counts an event in the window of its event time and the first revision that is still open.

    Given the event, it reads for whom and how much itself; where that is not plain it counts nothing and says False.
    Given None, it counts what it is told.
    """

    def __call__(
        self, at: int, offset: int, event: Event | None, customer: str | None = None, value: int = SCALE, /
    ) -> bool:
        """``at`` is in milliseconds, ``value`` in units of 10⁻¹²."""


class Counting:
    """One meter, compiled; its buckets and books are the partition's."""

    __slots__ = (
        "_accept_late", "_book", "_buckets", "_customer", "_edition", "_grace", "_known_from", "_meter", "_partition",
        "_quantity", "_settle", "book", "count", "matches",
    )  # fmt: skip

    def __init__(
        self,
        meter: Meter,
        *,
        edition: bytes,
        settle: int,
        known_from: int,
        decoder: Decoder,
        buckets: Buckets,
        book: MeterBook,
        partition: PartitionBook,
    ) -> None:
        self._meter = meter
        self._edition = edition
        self._grace = meter.size + meter.lateness
        self._accept_late = meter.accept_late
        self._known_from = known_from
        self._settle = settle
        self._buckets = buckets
        self._book = book
        self._partition = partition
        self.matches = filter_of(meter, decoder)
        self._customer = customer_reader(meter, decoder)
        quantity = quantity_reader(meter, decoder, self._lose_decimals)
        self._quantity = quantity.read
        self.count, self.book = self._compiled(customer_getter(meter, decoder), quantity)

    def read(self, event: Event, at: int, age: int) -> tuple[str, int]:
        """For whom this meter would count how much; the event took place then, ``age`` before its arrival.

        Raises ``Uncountable``. Nothing is counted yet: an event is counted by all its meters or by none.
        """
        if age > self._accept_late:
            raise Uncountable("late", f"it arrived {age / HOUR:.1f} h after its event time, beyond accept_late")
        if at < self._known_from:
            raise Uncountable("late", "it may have been counted before: deduplicate_for was shorter when it was new")
        if age < -FUTURE:
            raise Uncountable("future", f"its event time is {-age / MINUTE:.0f} minutes after its arrival")
        return self._customer(event), self._quantity(event)

    @property
    def rounded(self) -> int:
        """Events of which decimals were lost."""
        return self._book.rounded

    @rounded.setter
    def rounded(self, events: int) -> None:
        self._book.rounded = events

    def _lose_decimals(self) -> None:
        self._book.rounded += 1

    def _compiled(  # noqa: C901, PLR0915 - the hot path, in one piece
        self, named: Callable[[Event], str | None], quantity: Quantity
    ) -> tuple[Count, Callable[[], None]]:
        """The function that counts, and the one that books what it has counted.

        It is called for each event, and the variables of a closure cost the least.
        """
        book, partition, buckets = self._book, self._partition, self._buckets
        on_time, touched = buckets.on_time(self._edition), buckets.touched
        raw, known, parse = quantity.raw, quantity.known, quantity.parse
        size, grace = self._meter.size, self._grace
        opened, late = self._open, self._late
        joined = b"".join  # the fastest way to the bytes of one buffer
        events = total = 0
        # The window that the last event was in, until its deadline.
        start = end = deadline = 0
        current: Bucket

        def count(  # noqa: PLR0912
            at: int, offset: int, event: Event | None, customer: str | None = None, value: int = SCALE
        ) -> bool:
            nonlocal events, total, start, end, deadline, current
            try:
                if event is not None:
                    customer = named(event)
                if start <= at < end and partition.clock < deadline:
                    bucket = current
                elif partition.clock < (window := window_start(at, size)) + grace:
                    found = on_time.get(window)
                    if found is None and event is not None:
                        return False  # opened for an event that proves uncountable, it would stay empty
                    bucket = current = found or opened(window, 0)
                    start, end, deadline = window, window + size, window + grace
                elif event is None:
                    bucket = late(window)
                else:
                    return False
                row = bucket.rows.get(customer)  # type: ignore[arg-type]  # None is nobody's name
                if event is not None:
                    if row is None and (not customer or len(customer) > SURELY_SHORT):
                        return False
                    if raw is not None:
                        text = joined((raw(event),))  # type: ignore[arg-type]  # a TypeError where there is none
                        value = known.get(text) or parse(text)
            except (TypeError, Uncountable):
                if event is None:
                    raise
                return False
            events += 1
            total += value
            if row is None:
                bucket.rows[customer] = row = [value, 1, at, offset, offset, NEW]  # type: ignore[index]
                buckets.keys += 1
                touched.append((bucket, customer, row))  # type: ignore[arg-type]
                return True
            row[0] += value
            row[1] += 1
            if at < row[2]:
                row[2] = at
            row[4] = offset
            if row[5] == SAVED:
                row[5] = CHANGED
                touched.append((bucket, customer, row))  # type: ignore[arg-type]
            return True

        def enter() -> None:
            nonlocal events, total
            book.events += events
            book.value += total
            events = total = 0

        return count, enter

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


def read_by_all(meters: Sequence[Counting], event: Event, at: int, age: int) -> list[tuple[Counting, str, int]]:
    """What each of several meters would count. Raises ``Uncountable`` where one of them cannot, and then none does."""
    rounded = [meter.rounded for meter in meters]
    try:
        return [(meter, *meter.read(event, at, age)) for meter in meters]
    except Uncountable:
        for meter, before in zip(meters, rounded, strict=True):
            meter.rounded = before
        raise
