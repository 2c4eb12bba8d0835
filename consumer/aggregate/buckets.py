"""Open buckets: running sums per customer, until the log clock has passed their due time.

A bucket closes by what it carries itself (its time, its place at Stripe), also when its meter is gone from the
configuration. Closing takes rows out in one fixed order: by time, meter, window, revision, edition and customer.
"""

import heapq
import struct
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple

import msgspec

from consumer.totals import Destination

NEW: Final = 2
CHANGED: Final = 1
SAVED: Final = 0
CLOSED: Final = -1

Row = list[int]
"""Of one customer: sum in units of 10⁻¹², events, earliest event time in milliseconds, first offset, last offset, and
whether the store has it so (``NEW``, ``CHANGED``, ``SAVED``, ``CLOSED``). A list, for the hot path changes it in place.
"""

_KEY: Final = struct.Struct(">8sQI")
_HEADER: Final = b"b"
_ROW: Final = b"r"


class Header(msgspec.Struct, frozen=True):
    """What a bucket carries so that it can close without its meter."""

    meter: str
    window: Literal["1m", "1h"]
    due: int
    closes: int
    """The clock at which it closes: by the configuration that opened it, so that it can never be opened again."""
    stripe: Destination


class Bucket:
    """One (edition, window, revision) with its customers."""

    __slots__ = ("edition", "header", "revision", "rows", "saved", "start")

    def __init__(self, edition: bytes, start: int, revision: int, header: Header) -> None:
        self.edition = edition
        self.start = start
        self.revision = revision
        self.header = header
        self.rows: dict[str, Row] = {}
        self.saved = False

    @property
    def key(self) -> bytes:
        """Its part of the keys of its entries."""
        return _KEY.pack(self.edition, self.start, self.revision)


class Closing(NamedTuple):
    """One row that leaves its bucket to become a total."""

    bucket: Bucket
    customer: str
    row: Row


class Buckets:
    """The open buckets of one partition, and what of them has changed since the last commit.

    The hot path adds to rows itself; it counts new ones in ``keys`` and appends each row that it makes or first changes
    to ``touched``, as (bucket, customer, row).
    """

    __slots__ = ("_deletes", "_draining", "_on_time", "_order", "keys", "open", "touched")

    def __init__(self) -> None:
        self.open: dict[tuple[bytes, int, int], Bucket] = {}
        self.keys = 0
        self.touched: list[tuple[Bucket, str, Row]] = []
        self._on_time: dict[bytes, dict[int, Bucket]] = {}
        self._order: list[tuple[int, str, int, int, bytes]] = []
        self._draining: tuple[Bucket, list[str]] | None = None
        self._deletes: list[bytes] = []

    @property
    def next_close(self) -> int | None:
        """The clock at which the first of the open buckets closes."""
        return self._order[0][0] if self._order else None

    def on_time(self, edition: bytes) -> dict[int, Bucket]:
        """The open buckets of revision 0 of an edition, by window; kept current, for the hot path."""
        return self._on_time.setdefault(edition, {})

    def bucket(self, edition: bytes, start: int, revision: int, header: Header) -> Bucket:
        """The open bucket, made if there is none."""
        bucket = self.open.get((edition, start, revision))
        if bucket is None:
            bucket = Bucket(edition, start, revision, header)
            self._add(bucket)
        return bucket

    def close(self, clock: int, limit: int) -> Iterator[Closing]:
        """Take out at most ``limit`` rows of the buckets that close at ``clock`` or before."""
        while limit and self._order and self._order[0][0] <= clock:
            _, _, start, revision, edition = self._order[0]
            bucket = self.open[edition, start, revision]
            if self._draining is None or self._draining[0] is not bucket:
                self._draining = bucket, sorted(bucket.rows, reverse=True)
            customers = self._draining[1]
            while limit and customers:
                customer = customers.pop()
                row = bucket.rows.pop(customer)
                if row[5] != NEW:
                    self._deletes.append(_row_key(bucket, customer))
                row[5] = CLOSED
                self.keys -= 1
                limit -= 1
                yield Closing(bucket, customer, row)
            if not customers:
                heapq.heappop(self._order)
                del self.open[edition, start, revision]
                if revision == 0:
                    del self._on_time[edition][start]
                self._draining = None
                if bucket.saved:
                    self._deletes.append(_HEADER + bucket.key)

    def changes(self) -> tuple[dict[bytes, bytes], list[bytes]]:
        """The entries that a commit has to put and to delete."""
        puts: dict[bytes, bytes] = {}
        for bucket, customer, row in self.touched:
            if row[5] == CLOSED:
                continue
            if not bucket.saved:
                puts[_HEADER + bucket.key] = msgspec.json.encode(bucket.header)
                bucket.saved = True
            puts[_row_key(bucket, customer)] = b"%d %d %d %d %d" % tuple(row[:5])
            row[5] = SAVED
        self.touched.clear()
        deletes, self._deletes = self._deletes, []
        return puts, deletes

    def restore(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Take back the entries of :func:`owns`, in any order."""
        rows: dict[bytes, dict[str, Row]] = {}
        for key, value in entries:
            name = key[1 : 1 + _KEY.size]
            if key[:1] == _HEADER:
                edition, start, revision = _KEY.unpack(name)
                bucket = Bucket(edition, start, revision, msgspec.json.decode(value, type=Header))
                bucket.saved = True
                bucket.rows = rows.setdefault(name, {})
                self._add(bucket)
            else:
                rows.setdefault(name, {})[key[1 + _KEY.size :].decode()] = [*map(int, value.split()), SAVED]
        self.keys = sum(len(bucket.rows) for bucket in self.open.values())

    def sums(self) -> dict[str, tuple[int, int]]:
        """Per meter, events and value in the open buckets, added up anew."""
        found: dict[str, tuple[int, int]] = {}
        for bucket in self.open.values():
            events, value = found.get(bucket.header.meter, (0, 0))
            events += sum(row[1] for row in bucket.rows.values())
            value += sum(row[0] for row in bucket.rows.values())
            found[bucket.header.meter] = events, value
        return found

    def _add(self, bucket: Bucket) -> None:
        self.open[bucket.edition, bucket.start, bucket.revision] = bucket
        if bucket.revision == 0:
            self.on_time(bucket.edition)[bucket.start] = bucket
        header = bucket.header
        heapq.heappush(self._order, (header.closes, header.meter, bucket.start, bucket.revision, bucket.edition))


def owns(key: bytes) -> bool:
    """Whether an entry is one of a bucket's."""
    return key[:1] in (_HEADER, _ROW)


def _row_key(bucket: Bucket, customer: str) -> bytes:
    return _ROW + bucket.key + customer.encode()
