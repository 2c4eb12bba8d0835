"""The source topic: arrivals dated by the broker, transactions that stay open, and what each record means."""

from typing import NamedTuple

from consumer.aggregate.aggregator import LOG_APPEND_TIME, Record
from tests.unit.stage1 import event

AMOUNTS = (
    ("1", 10**12),
    ("2.5", 25 * 10**11),
    ("0.1", 10**11),
    ("0", 0),
    ("999999999999999", 999_999_999_999_999 * 10**12),
    ("0.000000000001", 1),
)
"""As events write them, and in units of 10⁻¹²."""


class Usage(NamedTuple):
    """One event, as its producer meant it."""

    id: str
    at: int | None
    """Milliseconds; None where the event names no time."""
    customer: str
    kind: str
    """``used`` (has an amount), ``called`` (has none), ``garbage`` or ``tombstone``."""
    amount: int

    def written(self) -> bytes | None:
        """The bytes that say it."""
        if self.kind == "tombstone":
            return None
        if self.kind == "garbage":
            return b"{" + self.id.encode()
        absent = {"time": ...} if self.at is None else {}
        return event(
            self.id, self.at, "RAW", raw=AMOUNTS[self.amount][0], type=self.kind, subject=self.customer, **absent
        )


class SourceLog:
    """One partition. A transaction's records are read when it has been committed, and nothing behind it before that."""

    def __init__(self) -> None:
        self.records: list[Record | None] = []
        """None is the mark at the end of a transaction."""
        self.said: list[Usage | None] = []
        self.skew = 0
        """Of the leader's clock, in milliseconds."""
        self._transactions: list[int] = []
        self._open: dict[int, int] = {}
        self._aborted: set[int] = set()
        self._names = 0

    def begin(self) -> int:
        """A new transaction; 0 stands for none."""
        self._names += 1
        return self._names

    def append(self, usage: Usage, time: int, transaction: int = 0) -> None:
        """Date a record and keep it."""
        offset = len(self.records)
        self.records.append((offset, (LOG_APPEND_TIME, time + self.skew), b"k", None, usage.written()))
        self.said.append(usage)
        self._transactions.append(transaction)
        if transaction:
            self._open.setdefault(transaction, offset)

    def decide(self, transaction: int, *, commit: bool) -> None:
        """End a transaction."""
        del self._open[transaction]
        if not commit:
            self._aborted.add(transaction)
        self.records.append(None)
        self.said.append(None)
        self._transactions.append(0)

    @property
    def undecided(self) -> list[int]:
        """The transactions that are open."""
        return list(self._open)

    @property
    def end(self) -> int:
        """The uncommitted end."""
        return len(self.records)

    @property
    def stable_end(self) -> int:
        """What a read_committed reader is told: nothing behind an open transaction."""
        return min(self._open.values(), default=len(self.records))

    def fetch(self, offset: int, most: int, *, until: int | None = None) -> tuple[list[Record], int]:
        """Committed records from an offset on, and the position behind them, marks included."""
        found: list[Record] = []
        end = self.stable_end if until is None else until
        while offset < end and len(found) < most:
            record = self.records[offset]
            if record is not None and self._transactions[offset] not in self._aborted:
                found.append(record)
            offset += 1
        return found, offset

    def behind(self, offset: int) -> list[Record]:
        """All from an offset on that is readable, or may become so."""
        return [
            record
            for record, transaction in zip(self.records[offset:], self._transactions[offset:], strict=True)
            if record is not None and transaction not in self._aborted
        ]

    def committed(self) -> list[tuple[Record, Usage]]:
        """All that can ever be read, with its meaning."""
        return [
            (record, usage)
            for record, usage, transaction in zip(self.records, self.said, self._transactions, strict=True)
            if record is not None and usage is not None and transaction not in self._aborted
        ]
