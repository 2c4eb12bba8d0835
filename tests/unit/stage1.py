"""Stage 1 on one partition with a log and a store of its own, for tests: what a shell and a broker would do to it."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from consumer import deadletters, totals
from consumer.aggregate.aggregator import Aggregator, Record, Rules
from consumer.aggregate.ledger import MeterBook
from consumer.aggregate.meters import Meter, Source
from consumer.deadletters import DeadLetter
from consumer.storage import Changes, Log
from consumer.totals import Advance, Destination, Total

SECOND: Final = 1_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

T0: Final = 1_793_491_200_000
"""2026-11-01T00:00:00Z, in milliseconds like all times here."""

SOURCE: Final = Source("cluster-1", "topic-1", "prod", 0)
MESSAGE_LIMIT: Final = 64 * 1024
CLOSINGS_LIMIT: Final = 10_000

Headers = list[tuple[str, bytes | None]]


def meter(name: str = "tokens", **changes: Any) -> Meter:
    """A meter that sums `$.n` of events of type `used` for their subject in windows of a minute, with changes."""
    usual: dict[str, Any] = {
        "name": name,
        "event_types": ("used",),
        "where": (),
        "aggregation": "sum",
        "value": ("n",),
        "decimals": 12,
        "allow_negative": False,
        "customer": "subject",
        "window": "1m",
        "lateness": 2 * MINUTE,
        "accept_late": DAY,
        "stripe": Destination(name),
    }
    return Meter(**(usual | changes))


def rules(*meters: Meter, settle: int = 5 * SECOND, deduplicate_for: int = DAY, bill_from: int = 0) -> Rules:
    """The rules of a pipeline with these meters, or with the usual one."""
    return Rules(meters or (meter(),), bill_from, settle, deduplicate_for)


def time_text(at: int) -> str:
    """A time as events write it."""
    return datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{at % 1000:03d}Z"


def event(id_: str, at: int | str | None = T0, n: object = 1, **changes: Any) -> bytes:
    """A usage event; `n` is its value, and `...` takes an attribute out. Text in `raw` goes into the JSON as it is."""
    data = changes.pop("data", {})
    raw = changes.pop("raw", None)
    attributes = {
        "specversion": "1.0",
        "id": id_,
        "source": "/svc",
        "type": "used",
        "subject": "acme",
        "time": time_text(at) if isinstance(at, int) else at,
        "data": {"n": n} | data,
    } | changes
    text = json.dumps({name: value for name, value in attributes.items() if value is not ...})
    return (text if raw is None else text.replace('"RAW"', raw)).encode()


class Stage1:
    """A partition's log, the processor that reads it, and what its commits made durable.

    Conservation is checked after every step and commit, and so is what every commit owes to the store.
    """

    def __init__(self, rules: Rules, *, source: Source = SOURCE, now: int | None = None, clock: int = 0) -> None:
        """``now`` is the reader's clock; by default it shows the arrival of whatever is read."""
        self.rules = rules
        self.source = source
        self.now = now
        self.log: list[Record] = []
        self.entries: dict[bytes, bytes] = {}
        self.offset = 0
        self.appended: list[bytes] = []
        """The records of the totals log."""
        self.letters: list[DeadLetter] = []
        self.aggregator = Aggregator(rules, source, 0, clock=clock)

    # The log

    def write(
        self,
        value: bytes | None,
        arrival: int,
        *,
        key: bytes | None = b"k",
        headers: Headers | None = None,
        stamp_type: int = 2,
    ) -> None:
        """A record for the end of the log, not yet read."""
        self.log.append((len(self.log), (stamp_type, arrival), key, headers, value))

    def read(self, most: int | None = None) -> int:
        """Read what is there, and return how many records were taken."""
        unread = self.log[self.aggregator.offset :][:most]
        if not unread:
            return 0
        now = max(stamp for _, (_, stamp), *_ in unread) if self.now is None else self.now
        before = self.aggregator.book.consumed
        taken = self.aggregator.step(unread, now)
        assert self.aggregator.book.consumed == before + taken
        self.aggregator.check()
        return taken

    def send(self, value: bytes | None, arrival: int, **record: Any) -> None:
        """Write a record and read it."""
        self.write(value, arrival, **record)
        assert self.read() == 1

    # The store

    def commit(self) -> Changes:
        """One commit, made durable."""
        changes = self.aggregator.commit()
        self.aggregator.check()
        written = [append.value for append in changes.appends if append.log is Log.TOTALS]
        assert not changes.puts.keys() & set(changes.deletes), "a key is put or deleted, never both"
        assert all(len(key) + len(value) <= MESSAGE_LIMIT for key, value in changes.puts.items())
        assert all(len(value) <= MESSAGE_LIMIT for value in written)
        assert sum(isinstance(totals.decode(value), Total) for value in written) <= CLOSINGS_LIMIT
        for key in changes.deletes:
            self.entries.pop(key, None)
        self.entries.update(changes.puts)
        self.offset = changes.offset
        self.appended += written
        self.letters += [
            deadletters.decode(append.value) for append in changes.appends if append.log is Log.DEAD_LETTERS
        ]
        return changes

    def drain(self) -> None:
        """Commit until nothing is left to commit."""
        while self.aggregator.changed:
            before = self.aggregator.open_keys
            self.commit()
            assert self.aggregator.open_keys < before or not self.aggregator.changed, "a commit gets on"

    def crash(self, rules: Rules | None = None) -> None:
        """Lose what was not committed, and take up work again, perhaps with another configuration."""
        self.rules = rules or self.rules
        self.aggregator = Aggregator(self.rules, self.source, self.offset, self.entries.items())

    def configure(self, rules: Rules) -> None:
        """A restart with another configuration."""
        self.drain()
        self.crash(rules)

    def advance(self, clock: int) -> None:
        """Move the clock of the quiet partition, and close what is due."""
        self.aggregator.advance(clock)
        self.drain()

    def close_all(self) -> list[Total]:
        """Let the clock pass everything, and return all totals that were ever closed."""
        while (closes := self.aggregator.next_close) is not None:
            self.advance(max(closes, self.aggregator.book.clock))
            assert self.aggregator.next_close != closes, "what is to close by now has closed"
        self.drain()
        return self.totals

    # What came of it

    @property
    def totals(self) -> list[Total]:
        """All totals that commits made durable, in order."""
        return [record for record in map(totals.decode, self.appended) if isinstance(record, Total)]

    @property
    def advances(self) -> list[Advance]:
        """All advances that commits made durable, in order."""
        return [record for record in map(totals.decode, self.appended) if isinstance(record, Advance)]

    @property
    def dead(self) -> dict[str, int]:
        """How many dead letters there are, by reason, committed or not."""
        return self.aggregator.book.dead

    def book(self, name: str = "tokens") -> MeterBook:
        """The book of a meter."""
        return self.aggregator.meter_books[name]

    @property
    def billed(self) -> str:
        """What all meters have counted, in open buckets or in totals."""
        return totals.plain(sum(book.value for book in self.aggregator.meter_books.values()))


def values(found: Iterable[Total]) -> list[str]:
    """The values of totals, in order."""
    return [total.value for total in found]


def revisions(found: Sequence[Total]) -> list[tuple[int, str]]:
    """Revision and value of totals, in order."""
    return [(total.revision, total.value) for total in found]
