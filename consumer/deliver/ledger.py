"""The account of stage 2 per meter: everything that was read is in exactly one other column."""

from collections.abc import Iterator
from typing import Final

import msgspec

from consumer.deliver.entries import BILLED, Entry, EntryError, How, Outcome, Reason
from consumer.totals import Total, for_stripe, plain, scaled

PREFIX: Final = b"ledger/"
"""Of the keys of the ledger's entries; what follows is the meter. Identifiers never begin so."""

FLOWS: Final = ("read", "delivered", "unbilled", "zero", "refused", "discarded", "shadowed", "rounded")


class Column:
    """A number of totals, of the usage events in them, and their exact value."""

    __slots__ = ("events", "totals", "value")

    def __init__(self, totals: int = 0, events: int = 0, value: int = 0) -> None:
        self.totals = totals
        self.events = events
        self.value = value

    def add(self, events: int, value: int) -> None:
        """One more total."""
        self.totals += 1
        self.events += events
        self.value += value

    def take(self, events: int, value: int) -> None:
        """One less."""
        self.totals -= 1
        self.events -= events
        self.value -= value


class Book:
    """One meter's account.

    What has passed (``read`` and what became of it) is an entry, so that crashes do not falsify it. What is here
    (``parked``, ``pending``) is counted from the entries of the totals: the two can disagree, and so the balance is
    a check and no tautology.
    """

    def __init__(self) -> None:
        self.read = Column()
        self.delivered = Column()
        """With the value that Stripe was told; what was rounded off stands in ``rounded``."""
        self.unbilled = Column()
        self.zero = Column()
        self.refused = Column()
        self.discarded = Column()
        self.shadowed = Column()
        """Not sent, because somebody else bills it."""
        self.rounded = Column()
        self.pending = Column()
        """Set aside, sending or to be retried."""
        self.parked: dict[Reason, Column] = {reason: Column() for reason in Reason}

    @property
    def missing(self) -> int:
        """The exact value that was read and is nowhere: 0, or money is lost (negative: doubled)."""
        out = (self.delivered, self.unbilled, self.refused, self.discarded, self.shadowed, self.rounded)
        return self.read.value - sum(column.value for column in (*out, self.pending, *self.parked.values()))

    @property
    def astray(self) -> int:
        """The number of totals that were read and are nowhere, like ``missing``."""
        out = (self.delivered, self.unbilled, self.zero, self.refused, self.discarded, self.shadowed)
        return self.read.totals - sum(column.totals for column in (*out, self.pending, *self.parked.values()))


class _Stored(msgspec.Struct):
    """Values as text: they are longer than the integers of other languages."""

    version: int
    columns: dict[str, tuple[int, int, str]]


_decoder = msgspec.json.Decoder(_Stored)


class Ledger:
    """The books of all meters."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self._changed: set[str] = set()

    def read(self, total: Total) -> None:
        """It came out of the log, and is pending."""
        self._changed.add(total.meter)
        value = scaled(total.value)
        self._book(total.meter).read.add(total.events, value)
        self._book(total.meter).pending.add(total.events, value)

    def restored(self, entry: Entry) -> None:
        """It is here."""
        total, book = entry.total, self._book(entry.total.meter)
        column = book.parked[entry.reason] if entry.reason else book.pending
        column.add(total.events, scaled(total.value))

    def park(self, total: Total, reason: Reason) -> None:
        """From pending to parked."""
        value = scaled(total.value)
        self._book(total.meter).pending.take(total.events, value)
        self._book(total.meter).parked[reason].add(total.events, value)

    def unpark(self, total: Total, reason: Reason) -> None:
        """Back to pending."""
        value = scaled(total.value)
        self._book(total.meter).parked[reason].take(total.events, value)
        self._book(total.meter).pending.add(total.events, value)

    def finish(self, total: Total, how: How) -> None:
        """From pending to where it ends."""
        self._changed.add(total.meter)
        value = scaled(total.value)
        book = self._book(total.meter)
        book.pending.take(total.events, value)
        if how in BILLED:
            billed = for_stripe(value)
            book.delivered.add(total.events, billed)
            if billed != value:
                book.rounded.add(total.events, value - billed)
        else:
            column: Column = getattr(book, how)
            column.add(total.events, value)

    def reject(self, refused: Outcome) -> None:
        """From delivered to refused: Stripe took it, and rejected it later. What was rounded off goes with it."""
        self._changed.add(refused.meter)
        value = scaled(refused.value)
        billed = for_stripe(value)
        book = self._book(refused.meter)
        book.delivered.take(refused.events, billed)
        if billed != value:
            book.rounded.take(refused.events, value - billed)
        book.refused.add(refused.events, value)

    def _book(self, meter: str) -> Book:
        book = self.books.get(meter)
        if book is None:
            book = self.books[meter] = Book()
        return book

    def load(self, key: bytes, value: bytes) -> None:
        """Take over a restored entry; raises ``EntryError``."""
        try:
            stored = _decoder.decode(value)
        except msgspec.DecodeError as error:
            raise EntryError(f"{key!r} cannot be read: {error}") from error
        if stored.version != 1 or not stored.columns.keys() <= set(FLOWS):
            raise EntryError(f"version {stored.version} of {key!r} is unknown: use the newer tallyman")
        book = self.books.setdefault(key.removeprefix(PREFIX).decode(), Book())
        for name, (count, events, exact) in stored.columns.items():
            setattr(book, name, Column(count, events, scaled(exact)))

    def changes(self) -> Iterator[tuple[bytes, bytes]]:
        """The entries of the books in which something has passed since the last call."""
        changed, self._changed = self._changed, set()
        for meter in sorted(changed):
            book = self.books[meter]
            columns = {name: getattr(book, name) for name in FLOWS}
            stored = {name: (column.totals, column.events, plain(column.value)) for name, column in columns.items()}
            yield PREFIX + meter.encode(), msgspec.json.encode(_Stored(1, stored))
