"""Stage 1 on one partition: records in, totals out, and nothing else decides.

The same log with the same recorded clock advances yields the same totals, byte for byte, wherever it is cut into
batches and commits: whether a bucket is open is told by the log clock, and no decision looks at what is in memory, at
the time of day or at who is reading. (The one exception is a record dated ahead of the reader's clock on a topic whose
producers date the records: see ``step``.)
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from xxhash import xxh64_intdigest

from consumer import deadletters, events, times, totals
from consumer.aggregate import buckets, ledger
from consumer.aggregate.buckets import Buckets
from consumer.aggregate.clock import AGREEMENT
from consumer.aggregate.counting import FUTURE, Counting, read_by_all
from consumer.aggregate.duplicates import PREFIXES, Chunk, Name, Remembered
from consumer.aggregate.ledger import MeterBook, PartitionBook
from consumer.aggregate.meters import Meter, Source, identifier
from consumer.aggregate.readers import Uncountable, paths_of
from consumer.deadletters import LARGEST_LETTER, LARGEST_VALUE, DeadLetter
from consumer.events import Decoder, Event, Headers, Malformed
from consumer.storage import Append, Changes, Log
from consumer.totals import Advance, Total

Record = tuple[int, tuple[int, int], bytes | None, Headers, bytes | None]
"""Offset, (timestamp type, timestamp in milliseconds), key, headers, value; as the Kafka client gives them."""

LOG_APPEND_TIME: Final = 2
"""The type of a timestamp that the broker gave."""

CLOSINGS_PER_COMMIT: Final = 10_000
"""So that a backlog's many windows make no commit that takes long or grows without bound."""

_ROW_BYTES: Final = 150
"""About what a customer in an open bucket takes in a commit, key and all."""

_LONGEST_DETAIL: Final = 500
"""Characters of what is said about a dead letter: it quotes the event, which may be of any size."""

_SECOND: Final = slice(19)
_AFTER: Final = slice(19, None)
_NOT_PLAIN: Final = (msgspec.DecodeError, KeyError, RecursionError, TypeError, ValueError)

_PARTITION_BOOK: Final = b"p"
_METER_BOOK: Final = b"m"
_CHUNK: Final = b"i"
_CHUNK_KEY: Final = struct.Struct(">IQI")


@dataclass(frozen=True, slots=True)
class Rules:
    """What all partitions of a pipeline have in common. Times in milliseconds."""

    meters: tuple[Meter, ...]
    bill_from: int
    settle: int
    deduplicate_for: int


class Aggregator:
    """The processor of one partition of the source topic. After an exception it has to be dropped and restored."""

    def __init__(
        self, rules: Rules, source: Source, offset: int, entries: Iterable[tuple[bytes, bytes]] = (), *, clock: int = 0
    ) -> None:
        """Take up work at ``offset`` with the entries of the last commit; ``clock`` is for a partition without any."""
        self.source = source
        self.offset = offset
        self.settle = rules.settle
        self._bill_from = rules.bill_from
        self._buckets = Buckets()
        self.book = PartitionBook(clock=clock)
        self._meter_books: dict[str, MeterBook] = {}
        self._saved_books: dict[str, bytes] = {}
        """As the last commit wrote them."""
        self._appends: list[Append] = []
        self._buried = 0
        """Bytes of dead letters since the last commit."""
        self._changed = False
        self._restore(entries, rules.deduplicate_for)
        self._interval_end = self._remembered.enter(self.book.arrival)
        # What is accepted although nobody would remember it is accepted whenever it was.
        known_from = {m.name: self.book.known_from for m in rules.meters if m.accept_late <= rules.deduplicate_for}
        self._decoder = Decoder(
            {path for meter in rules.meters for path in paths_of(meter)},
            {meter.customer for meter in rules.meters if isinstance(meter.customer, str)},
        )
        self._by_type: dict[str, tuple[Counting, ...]] = {}
        for meter in rules.meters:
            counting = Counting(
                meter,
                edition=meter.edition(settle=rules.settle, deduplicate_for=rules.deduplicate_for),
                settle=rules.settle,
                known_from=known_from.get(meter.name, 0),
                decoder=self._decoder,
                buckets=self._buckets,
                book=self._meter_books.setdefault(meter.name, MeterBook()),
                partition=self.book,
            )
            for event_type in meter.event_types:
                self._by_type[event_type] = (*self._by_type.get(event_type, ()), counting)
        self._meters = {each for several in self._by_type.values() for each in several}
        self._only = {
            kind: all_[0].count for kind, all_ in self._by_type.items() if len(all_) == 1 and not all_[0].matches
        }
        """Per type of which every event counts in one meter, how it is counted there."""
        self._accept_late = min((meter.accept_late for meter in rules.meters), default=0)
        self._earliest = max((self._bill_from, *known_from.values()))
        """The event time before which nothing is plain."""

    # Reading

    def step(self, records: Sequence[Record], now: int) -> int:
        """Read records in the order of their offsets, and return how many of them were taken.

        Raises ``ValueError`` for some that were read before: whoever gives them does not know where reading has got to.

        ``now`` is the reader's clock. A record that the broker dates more than five minutes ahead of it is not taken,
        nor what follows: one of the clocks is wrong, and the partition waits until they agree. One that its producer
        dates so is a dead letter and moves nothing.

        This is the hot path. What is plain (an ASCII JSON event of a type that one meter counts whole, on time, well
        formed and new) is counted here; everything else goes to ``_take``, where the rules are.
        """
        if records and records[0][0] < self.offset:
            raise ValueError(f"offset {records[0][0]} was read before: the next one is {self.offset}")
        ahead = now + AGREEMENT
        book, remembered = self.book, self._remembered
        typed, only, seconds, rests = self._decoder.typed, self._only, times.SECONDS, times.RESTS
        seen, fresh, prefixes, in_value = remembered.seen, remembered.fresh, PREFIXES, events.in_value
        arrival, interval = book.arrival, remembered.interval
        earliest, latest = max(self._earliest, arrival - self._accept_late), arrival + FUTURE
        taken = general = 0
        for record in records:
            offset, (stamp_type, stamp), key, headers, value = record
            if stamp > arrival:
                if stamp <= ahead:
                    self._arrived(stamp)
                    arrival, interval = stamp, remembered.interval
                    earliest, latest = max(self._earliest, arrival - self._accept_late), arrival + FUTURE
                elif stamp_type == LOG_APPEND_TIME:
                    break
            taken += 1
            plain = not headers or in_value(headers)
            if plain and key is not None and value is not None and stamp <= arrival and value.isascii():
                try:
                    event = typed(value)
                    count = only[event.type]
                    time = event.time
                    at = seconds[time[_SECOND]] + rests[time[_AFTER]]  # type: ignore[index]  # None is not plain
                    digest = xxh64_intdigest((prefixes[event.source] + event.id).encode())
                except _NOT_PLAIN:
                    pass
                else:
                    if earliest <= at <= latest and digest not in seen and count(at, offset, event):
                        seen[digest] = interval
                        fresh.append(digest)
                        continue
            general += 1
            self._take(record)
        if taken:
            self._changed = True
            self.offset = records[taken - 1][0] + 1
            for meter in self._meters:
                meter.book()
            book.consumed += taken
            book.counted += taken - general
        return taken

    def _take(self, record: Record) -> None:
        """Read one record by all the rules."""
        offset, (_, stamp), key, headers, value = record
        if key is None:
            self.book.unkeyed += 1
        if value is None and not events.in_headers(headers):
            self._ignore("tombstone")
        elif stamp > self.book.arrival:
            self._bury(record, "arrival_in_future", "its record is dated more than 5 minutes ahead")
        else:
            try:
                self._count(self._decoder.decode(headers, value or b""), offset, stamp)
            except (Malformed, Uncountable) as refused:
                self._bury(record, refused.reason, refused.detail)

    def _count(self, event: Event, offset: int, stamp: int) -> None:
        """Count an event once: in all meters that it matches or, if one of them cannot read it, in none."""
        meters = [m for m in self._by_type.get(event.type, ()) if m.matches is None or m.matches(event)]
        if not meters:
            return self._ignore("unmatched")
        try:
            at = stamp if event.time is None else times.parse_time(event.time)
        except ValueError as wrong:
            raise Uncountable("time_invalid", str(wrong)) from None
        if at < self._bill_from:
            return self._ignore("before_bill_from")
        remembered = self._remembered
        digest = xxh64_intdigest((PREFIXES[event.source] + event.id).encode())
        if remembered.has(digest):
            self.book.duplicate += 1
        else:
            for meter, customer, quantity in read_by_all(meters, event, at, self.book.arrival - at):
                meter.count(at, offset, None, customer, quantity)
            self.book.counted += 1
        return remembered.remember(digest)

    def _arrived(self, arrival: int) -> None:
        """The largest arrival so far moves the clock, and with it what is remembered."""
        book = self.book
        book.arrival = arrival
        if arrival > book.clock:
            book.clock = arrival
        if arrival >= self._interval_end:
            self._interval_end = self._remembered.enter(arrival)

    def reach(self, offset: int) -> None:
        """Nothing below this offset is left to read: behind the last record lie transactions' markers.

        Who takes up work begins behind them too: once all of it is deleted, they would seem to be lost records.
        """
        if offset > self.offset:
            self.offset = offset
            self._changed = True

    def advance(self, clock: int) -> None:
        """Move the clock of a quiet partition: all that its log holds has been read, and it is this late by evidence.

        The advance is appended to the totals log, for it decides which bucket a later arrival goes to.
        """
        if clock > self.book.clock:
            self.book.clock = clock
            self._changed = True
            advance = Advance(self.source.partition, self.offset, clock)
            self._appends.append(Append(Log.TOTALS, b"%d" % self.source.partition, totals.encode(advance)))

    @property
    def next_close(self) -> int | None:
        """The clock at which the next bucket closes."""
        return self._buckets.next_close

    def closes_by(self, clock: int) -> bool:
        """Whether a bucket would close if the clock were this far."""
        next_close = self.next_close
        return next_close is not None and next_close <= clock

    @property
    def closing(self) -> bool:
        """Whether buckets wait to be closed by the next commit."""
        return self.closes_by(self.book.clock)

    @property
    def open_keys(self) -> int:
        """(Bucket, customer) pairs in memory."""
        return self._buckets.keys

    @property
    def open_buckets(self) -> int:
        """Windows that are still counted, each revision by itself."""
        return len(self._buckets.open)

    @property
    def remembered(self) -> int:
        """Event ids in memory."""
        return len(self._remembered)

    @property
    def meter_books(self) -> dict[str, MeterBook]:
        """The books of all meters that ever counted here."""
        return self._meter_books

    @property
    def moved(self) -> bool:
        """Whether there is anything to commit besides buckets that are due."""
        return self._changed

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return self._changed or self.closing

    @property
    def unsaved(self) -> int:
        """About how many bytes the next commit would write, if nothing closed."""
        return len(self._buckets.touched) * _ROW_BYTES + self._buried

    # Committing

    def commit(self, most: int = CLOSINGS_PER_COMMIT) -> Changes:
        """Close what is due, at most so many totals of it, and say what has to be made durable."""
        closings = self._buckets.close(self.book.clock, most)
        appends, self._appends, self._buried = self._appends, [], 0
        for closing in closings:
            total = self._total(closing)
            book = self._meter_books[total.meter]
            book.total_events += closing.row[1]
            book.total_value += closing.row[0]
            book.totals += 1
            appends.append(Append(Log.TOTALS, closing.customer.encode(), totals.encode(total)))
        puts, deletes = self._buckets.changes()
        chunks, dropped = self._remembered.changes()
        for chunk in chunks:
            puts[_CHUNK + _CHUNK_KEY.pack(*chunk.name)] = chunk.digests
        deletes.extend(_CHUNK + _CHUNK_KEY.pack(*name) for name in dropped)
        puts[_PARTITION_BOOK] = ledger.encode(self.book)
        for name, book in self._meter_books.items():
            encoded = ledger.encode(book)
            if self._saved_books.get(name) != encoded:
                puts[_METER_BOOK + name.encode()] = self._saved_books[name] = encoded
        self._changed = False
        return Changes(self.offset, puts, deletes, appends)

    def _total(self, closing: buckets.Closing) -> Total:
        bucket, customer, row = closing
        header = bucket.header
        return Total(
            identifier=identifier(
                self.source,
                meter=header.meter,
                edition=bucket.edition,
                customer=customer,
                start=bucket.start,
                window=header.window,
                revision=bucket.revision,
            ),
            pipeline=self.source.pipeline,
            meter=header.meter,
            edition=bucket.edition.hex(),
            partition=self.source.partition,
            window_start=bucket.start // 1000,
            window=header.window,
            revision=bucket.revision,
            due=header.due,
            customer=customer,
            value=totals.plain(row[0]),
            events=row[1],
            timestamp=row[2] // 1000,
            first_offset=row[3],
            last_offset=row[4],
            stripe=header.stripe,
        )

    def _ignore(self, reason: str) -> None:
        self.book.ignored[reason] = self.book.ignored.get(reason, 0) + 1

    def _bury(self, record: Record, reason: str, detail: str) -> None:
        offset, (_, stamp), key, headers, value = record
        value = value or b""  # in a letter None would mean that it is too large
        self.book.dead[reason] = self.book.dead.get(reason, 0) + 1
        traceparent, tracestate = deadletters.trace_of(headers, value)
        letter = DeadLetter(
            self.source.partition,
            offset,
            stamp,
            reason,
            detail[:_LONGEST_DETAIL],
            traceparent=traceparent,
            tracestate=tracestate,
        )
        encoded = deadletters.encode(letter)
        parts = (key, value, *(text for header in headers or () for text in header))
        if sum(len(part) for part in parts if part is not None) <= LARGEST_VALUE:
            letter = msgspec.structs.replace(letter, key=key, headers=list(headers or ()), value=value)
            whole = deadletters.encode(letter)
            # Thousands of tiny headers are small here and large as JSON: no commit may outgrow what a broker takes.
            if len(whole) <= LARGEST_LETTER:
                encoded = whole
        self._appends.append(Append(Log.DEAD_LETTERS, b"%d" % self.source.partition, encoded))
        self._buried += len(encoded)

    def _restore(self, entries: Iterable[tuple[bytes, bytes]], deduplicate_for: int) -> None:
        rows: list[tuple[bytes, bytes]] = []
        chunks: list[Chunk] = []
        for key, value in entries:
            if buckets.owns(key):
                rows.append((key, value))
            elif key[:1] == _CHUNK:
                chunks.append(Chunk(Name(*_CHUNK_KEY.unpack(key[1:])), value))
            elif key[:1] == _METER_BOOK:
                self._meter_books[key[1:].decode()] = ledger.decode(value, MeterBook)
            elif key == _PARTITION_BOOK:
                self.book = ledger.decode(value, PartitionBook)
            else:
                raise UnknownEntryError(f"partition {self.source.partition} has an entry of unknown kind: {key[:40]!r}")
        self._buckets.restore(rows)
        # An event may be dated ahead of its arrival, and is accepted that much longer: longer than deduplicate_for.
        self._remembered = Remembered(deduplicate_for + FUTURE, chunks)
        if 0 < self.book.deduplicate_for < deduplicate_for:
            self.book.known_from = max(self.book.known_from, self.book.arrival - self.book.deduplicate_for)
        self.book.deduplicate_for = deduplicate_for
        self.check()

    def check(self) -> None:
        """Conservation: every event read is accounted for. Raises ``UnbalancedError``, naming what does not add up."""
        book = self.book
        if not book.balanced():
            raise self._unbalanced(
                f"{book.consumed} records were read, but {book.counted} counted, {book.duplicate} repeated, "
                f"{sum(book.dead.values())} dead letters and {sum(book.ignored.values())} ignored"
            )
        held = self._buckets.sums()
        for name, meter in self._meter_books.items():
            events, value = held.pop(name, (0, 0))
            if (meter.events, meter.value) != (events + meter.total_events, value + meter.total_value):
                raise self._unbalanced(
                    f"meter {name} counted {meter.events} events worth {totals.plain(meter.value)}, but open windows "
                    f"hold {events} worth {totals.plain(value)} and totals {meter.total_events} worth "
                    f"{totals.plain(meter.total_value)}"
                )
        if held:
            raise self._unbalanced(f"there are open windows of meters that never counted: {', '.join(sorted(held))}")

    def _unbalanced(self, what: str) -> "UnbalancedError":
        return UnbalancedError(
            f"partition {self.source.partition}: {what}. The state is not to be trusted, and nothing is billed on it: "
            "keep a copy, report this, and go on from a backup or with `tallyman reset`"
        )


class UnknownEntryError(Exception):
    """The state was written by something newer, or is not this service's."""


class UnbalancedError(Exception):
    """Conservation is broken: the state cannot be trusted."""
