"""What became of every total, and what waits for a person: read from the store, beside a service that is running.

A total that was closed is in exactly one of three places: in the outcomes log if it is finished, among the entries of
stage 2 if it is not, or in the part of the totals log that stage 2 has not read yet. They are read one after the
other, never joined, so that memory does not grow with the number of totals.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from consumer import totals
from consumer.deliver.entries import BILLED, Entry, Outcome, Reason, State, decode_outcome, unpack
from consumer.deliver.ledger import PREFIX
from consumer.storage import Append, Log, Restored, Stage
from consumer.storage.sqlite import Logged, SqliteStore
from consumer.totals import Command, Total

PARTITION: Final = 0
"""One process has one log of totals."""
READ_AT_ONCE: Final = 1_000
LOOK_AGAIN_S: Final = 0.2


class Standing(StrEnum):
    """Where a total stands."""

    PENDING = "pending"
    """Not finished, and nobody is needed: unread, set aside, sending or to be retried."""
    PARKED = "parked"
    DELIVERED = "delivered"
    UNBILLED = "unbilled"
    """The customer is mapped to null."""
    ZERO = "zero"
    DISCARDED = "discarded"
    REFUSED = "refused"
    """By Stripe, after it was delivered."""


UNFINISHED: Final = frozenset({Standing.PENDING, Standing.PARKED})

MAY_BE_THERE: Final = (
    "an event with this identifier may be at Stripe, and releasing it could bill it twice. Look for the identifier in "
    "Stripe's dashboard (the customer's meter events, around {at}): if the event is there, discard the total; if it is "
    "not, leave it parked, for this version cannot send it again safely"
)


class DecisionRefused(Exception):
    """A decision about parked totals that cannot be carried out; the message says why and what to do instead."""


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One total and where it stands; as JSON, a line of `tallyman totals --json`."""

    identifier: str
    state: Standing
    meter: str
    customer: str
    window_start: int
    """Seconds since the epoch."""
    window: str
    revision: int
    value: str
    events: int
    timestamp: int
    event_name: str
    billed: str | None = None
    """What Stripe was told, where it was."""
    stripe_customer: str | None = None
    at: int | None = None
    """When it was finished, in milliseconds since the epoch."""
    by: str | None = None
    reason: str | None = None
    """Why it is parked, or was discarded."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which totals are asked for. ``since`` and ``until`` bound the start of the window, in milliseconds."""

    meter: str | None = None
    customer: str | None = None
    since: int | None = None
    until: int | None = None
    states: frozenset[Standing] = frozenset()
    """Empty: all of them."""

    def __contains__(self, line: Line) -> bool:
        start = line.window_start * 1000
        return (
            (self.meter is None or line.meter == self.meter)
            and (self.customer is None or self.customer in {line.customer, line.stripe_customer})
            and (self.since is None or start >= self.since)
            and (self.until is None or start < self.until)
            and (not self.states or line.state in self.states)
        )


def read(store: SqliteStore, log: Log, after: int = 0, below: int | None = None) -> Iterator[Logged]:
    """A log's records above one offset and below another, a few at a time."""
    while records := store.read(log, after, READ_AT_ONCE):
        for each in records:
            if below is not None and each.offset >= below:
                return
            yield each
        after = records[-1].offset


def lines(store: SqliteStore, wanted: Wanted) -> Iterator[Line]:
    """The totals that are wanted, each once: what is finished in the order in which it was, then the others."""
    end, unread, entries = _moment(store)
    if not wanted.states or wanted.states - UNFINISHED:
        for each in read(store, Log.OUTCOMES, below=end):
            line = _finished(decode_outcome(each.value))
            if line in wanted:
                yield line
    if wanted.states and not wanted.states & UNFINISHED:
        return
    for packed in entries:
        entry = unpack(packed)
        line = _line(entry.total, entry)
        if line in wanted:
            yield line
    for each in read(store, Log.TOTALS, unread - 1, store.end(Log.TOTALS)):
        record = totals.decode(each.value)
        if isinstance(record, Total) and (line := _line(record)) in wanted:
            yield line


def _moment(store: SqliteStore) -> tuple[int, int, list[bytes]]:
    """Of one and the same moment, so that no total is in between: the end of the outcomes log, the first offset of the
    totals log that is unread, and the entries. These are taken at once: the store must not be kept waiting by a pager.
    """
    while True:
        end = store.end(Log.OUTCOMES)
        restored = store.restore(Stage.DELIVER, PARTITION)
        if store.end(Log.OUTCOMES) == end:
            entries = [value for key, value in restored.entries if not key.startswith(PREFIX)] if restored else []
            return end, restored.offset if restored else 1, entries


def _unfinished(restored: Restored | None) -> Iterator[Entry]:
    for key, value in restored.entries if restored else ():
        if not key.startswith(PREFIX):
            yield unpack(value)


def _finished(outcome: Outcome) -> Line:
    billed = outcome.how in BILLED
    return Line(
        identifier=outcome.identifier,
        state=Standing("delivered" if outcome.how == "duplicate" else outcome.how),
        meter=outcome.meter,
        customer=outcome.customer,
        window_start=outcome.window_start,
        window=outcome.window,
        revision=outcome.revision,
        value=outcome.value,
        events=outcome.events,
        timestamp=outcome.timestamp,
        event_name=outcome.event_name,
        billed=outcome.billed if billed else None,
        stripe_customer=outcome.stripe_customer,
        at=outcome.at,
        by=outcome.by,
        reason=outcome.reason,
    )


def _line(total: Total, entry: Entry | None = None) -> Line:
    return Line(
        identifier=total.identifier,
        state=Standing.PARKED if entry and entry.state is State.PARKED else Standing.PENDING,
        meter=total.meter,
        customer=total.customer,
        window_start=total.window_start,
        window=total.window,
        revision=total.revision,
        value=total.value,
        events=total.events,
        timestamp=total.timestamp,
        event_name=total.stripe.event_name,
        stripe_customer=entry.customer if entry else None,
        reason=entry.reason if entry else None,
    )


# What is parked


def parked(
    store: SqliteStore, *, reason: Reason | None = None, meter: str | None = None, customer: str | None = None
) -> Iterator[Entry]:
    """The parked totals, in the order of their identifiers."""
    for entry in _unfinished(store.restore(Stage.DELIVER, PARTITION)):
        if (
            entry.state is State.PARKED
            and (reason is None or entry.reason is reason)
            and (meter is None or entry.total.meter == meter)
            and (customer is None or customer in {entry.total.customer, entry.customer})
        ):
            yield entry


def named(store: SqliteStore, identifiers: Sequence[str]) -> list[Entry]:
    """These parked totals; raises ``DecisionRefused`` where one of them is not parked."""
    asked = set(identifiers)
    found = [entry for entry in parked(store) if entry.total.identifier in asked]
    missing = asked - {entry.total.identifier for entry in found}
    if missing:
        raise DecisionRefused(
            f"not parked: {', '.join(sorted(missing))}. `tallyman parked list` shows what is, `tallyman totals` what "
            "became of the others. Nothing was changed."
        )
    return found


def is_doubtful(entry: Entry) -> bool:
    """Whether an event with its identifier may be at Stripe: then it must not be released."""
    return entry.first_unproven is not None


def decide(store: SqliteStore, commands: Sequence[Command]) -> int:
    """Append decisions to the totals log, for the service to apply; returns the offset that they all lie below."""
    store.append(Append(Log.TOTALS, each.identifier.encode(), totals.encode(each)) for each in commands)
    return store.end(Log.TOTALS)


def follow(
    store: SqliteStore, identifiers: Sequence[str], *, below: int, outcomes_from: int, patience_s: float
) -> dict[str, Line]:
    """What became of decisions: waits until all these totals are finished, or parked anew, or patience has run out.

    A total that is missing from the answer is where it was: nobody has applied the decision yet.
    """
    deadline = time.monotonic() + patience_s
    asked, found = set(identifiers), dict[str, Line]()
    while True:
        for each in read(store, Log.OUTCOMES, outcomes_from - 1):
            outcomes_from = each.offset + 1
            if (identifier := each.key.decode()) in asked:
                found[identifier] = _finished(decode_outcome(each.value))
        left = asked - {identifier for identifier, line in found.items() if line.state not in UNFINISHED}
        settled = not left
        if left:
            restored = store.restore(Stage.DELIVER, PARTITION)
            read_all = restored is not None and restored.offset >= below
            standing = {
                entry.total.identifier: _line(entry.total, entry)
                for entry in _unfinished(restored)
                if entry.total.identifier in left
            }
            applied = {name: line for name, line in standing.items() if read_all or line.state is not Standing.PARKED}
            found |= applied
            settled = len(applied) == len(left) and all(line.state is Standing.PARKED for line in applied.values())
        if settled or time.monotonic() >= deadline:
            return found
        time.sleep(LOOK_AGAIN_S)
