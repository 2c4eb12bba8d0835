"""What became of every total, and what waits for a person: read from the store, beside a service that is running.

A total that was closed is in exactly one of three places: in the outcomes log if it is finished, among the entries of
stage 2 if it is not, or in the part of the totals log that stage 2 has not read yet. They are read one after the
other, never joined, so that memory does not grow with the number of totals.

Meanwhile totals move from one place to the next. So it is asked in this order: how far the outcomes log is settled, the
state of stage 2, the end of the outcomes log, the end of the totals log. What is settled was written by commits that
the state contains: such a total is nowhere else. What lies between there and the end may be in the state or not, and is
remembered until the other places have been read: the outcome counts. What comes later is left out, for the state still
has these totals. None is missed, for a total leaves a place in the same commit that brings it to the next one, and each
place is read up to an end that was asked for after those before it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Final, Literal, NamedTuple

import msgspec

from consumer import totals
from consumer.deliver.entries import BILLED, Entry, Outcome, Reason, State, decode_outcome, is_total, unpack
from consumer.deliver.reports import REJECTED
from consumer.storage import Append, Archive, Facts, Log, Restored, Stage
from consumer.totals import Command, Total

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
    SHADOWED = "shadowed"
    """Not sent, because somebody else bills it."""


UNFINISHED: Final = frozenset({Standing.PENDING, Standing.PARKED})


class DecisionRefused(Exception):
    """A decision about parked totals that cannot be carried out; the message says why and what to do instead."""


class Particulars(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is said of a total wherever one is shown."""

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
    """Seconds since the epoch."""
    event_name: str
    billed: str | None = None
    """What Stripe was told, where it was."""


class Line(Particulars, frozen=True, omit_defaults=True):
    """One total and where it stands; as JSON, a line of `tallyman totals --json`."""

    billed_as: str | None = None
    """Under which identifier, where it was not its own: it had been in doubt, and was released."""
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


def lines(store: Archive, wanted: Wanted) -> Iterator[Line]:
    """The totals that are wanted, each once: what is finished, partition by partition in its order, then the others."""
    states = wanted.states or frozenset(Standing)
    for each in everything(store, finished=bool(states - UNFINISHED), unfinished=bool(states & UNFINISHED)):
        if (line := line_of(each)) in wanted:
            yield line


def everything(
    store: Archive, *, finished: bool = True, unfinished: bool = True, since: Mapping[int, int] | None = None
) -> Iterator[Outcome | Entry | Total]:
    """Every total once: its outcome where it is finished, its entry where it is not, itself where it is unread.

    ``since``: only outcomes from these places on.
    """
    settled = store.settled(Log.OUTCOMES)
    facts = cache(store.facts)
    starts, entries, rejected = _state(store)
    ends, below = store.ends(Log.OUTCOMES), store.ends(Log.TOTALS)
    since = since or {}
    late: dict[str, Outcome] = {}
    wanted: set[str] = set()
    for each in store.logged(Log.OUTCOMES, settled, ends):
        outcome = decode_outcome(each.value)
        late[outcome.identifier] = outcome
        if each.offset >= since.get(each.partition, 0):
            wanted.add(outcome.identifier)
    if finished:
        begin = {partition: min(since.get(partition, 0), end) for partition, end in settled.items()}
        for each in store.logged(Log.OUTCOMES, begin, settled):
            outcome = decode_outcome(each.value)
            # What was delivered, and was rejected later, has two outcomes: the last one counts.
            superseded = outcome.how in BILLED and outcome.identifier in rejected
            anew = outcome.how == "shadowed" and _is_anew(outcome, facts())
            if not (superseded or anew or outcome.identifier in late):
                yield outcome
        yield from (outcome for identifier, outcome in late.items() if identifier in wanted)
    if not unfinished:
        return
    for entry in map(unpack, entries):
        if entry.total.identifier not in late:
            yield entry
    for each in store.logged(Log.TOTALS, starts, below):
        record = totals.decode(each.value)
        if isinstance(record, Total) and record.identifier not in late:
            yield record


def _is_anew(shadowed: Outcome, facts: Facts | None) -> bool:
    """Whether it was shadowed before the pipeline began anew, and its usage is counted once more since."""
    return facts is not None and shadowed.at < facts.created_at and shadowed.timestamp * 1000 >= facts.bill_from


def unread(store: Archive) -> dict[int, int]:
    """From where on each partition of the totals log is unread; what lies below has been carried out, or refused."""
    return _state(store)[0]


def _state(store: Archive) -> tuple[dict[int, int], list[bytes], set[str]]:
    """From where on each partition of the totals log is unread, the entries of totals, and which totals Stripe has
    rejected since they were delivered. All is taken at once: the store must not be kept waiting by a pager."""
    starts: dict[int, int] = {}
    entries: list[bytes] = []
    rejected: set[str] = set()
    for partition in store.ends(Log.TOTALS):
        restored = store.restore(Stage.DELIVER, partition)
        if restored is not None:
            starts[partition] = restored.offset
            for key, value in restored.entries:
                if is_total(key):
                    entries.append(value)
                elif key.startswith(REJECTED):
                    rejected.add(key.removeprefix(REJECTED).decode())
    return starts, entries, rejected


def _unfinished(restored: Restored | None) -> Iterator[Entry]:
    # All is taken at once: the store must not be kept waiting by a pager.
    packed = [value for key, value in (restored.entries if restored else ()) if is_total(key)]
    return map(unpack, packed)


def line_of(each: Outcome | Entry | Total) -> Line:
    """Where a total stands."""
    outcome = each if isinstance(each, Outcome) else None
    entry = each if isinstance(each, Entry) else None
    of = each.total if isinstance(each, Entry) else each
    return Line(
        identifier=of.identifier,
        state=_standing(each),
        meter=of.meter,
        customer=of.customer,
        window_start=of.window_start,
        window=of.window,
        revision=of.revision,
        value=of.value,
        events=of.events,
        timestamp=of.timestamp,
        event_name=of.event_name if isinstance(of, Outcome) else of.stripe.event_name,
        billed=outcome.billed if outcome and outcome.how in BILLED else None,
        billed_as=outcome.billed_as if outcome else None,
        stripe_customer=outcome.stripe_customer if outcome else entry.customer if entry else None,
        at=outcome.at if outcome else None,
        by=outcome.by if outcome else None,
        reason=outcome.reason if outcome else entry.reason if entry else None,
    )


def _standing(each: Outcome | Entry | Total) -> Standing:
    if isinstance(each, Outcome):
        return Standing("delivered" if each.how == "duplicate" else each.how)
    return Standing.PARKED if isinstance(each, Entry) and each.state is State.PARKED else Standing.PENDING


# What is parked


def parked(
    store: Archive, *, reason: Reason | None = None, meter: str | None = None, customer: str | None = None
) -> Iterator[Entry]:
    """The parked totals, one partition of the totals log after the other."""
    for partition in store.ends(Log.TOTALS):
        for entry in _unfinished(store.restore(Stage.DELIVER, partition)):
            if (
                entry.state is State.PARKED
                and (reason is None or entry.reason is reason)
                and (meter is None or entry.total.meter == meter)
                and (customer is None or customer in {entry.total.customer, entry.customer})
            ):
                yield entry


def named(store: Archive, identifiers: Sequence[str]) -> list[Entry]:
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


class Place(NamedTuple):
    """Where a decision lies in the totals log."""

    partition: int
    offset: int


def decide(
    store: Archive,
    action: Literal["release", "discard"],
    chosen: Sequence[Entry],
    *,
    by: str,
    reason: str,
    at: int,
    found: Mapping[str, str | None],
) -> dict[str, Place]:
    """Append decisions to the totals log, for the service to apply; returns where they are, by identifier.

    Each has the key that its total has: it lies behind it in the same partition, and who owns the one reads the other.
    Each is about the total as it is parked in ``chosen``: of one that has been parked anew since, nothing is decided.
    ``found`` tells of those to be discarded under which identifier they are at Stripe: these count as delivered.
    """
    decisions = {
        Command(
            action, name := each.total.identifier, by, reason, at, each.parking, found.get(name)
        ): each.total.customer
        for each in chosen
    }
    before = store.ends(Log.TOTALS)
    store.append(Append(Log.TOTALS, customer.encode(), totals.encode(each)) for each, customer in decisions.items())
    places: dict[str, Place] = {}
    for each in store.logged(Log.TOTALS, before):
        record = totals.decode(each.value) if totals.is_command(each.value) else None
        if isinstance(record, Command) and record in decisions:
            places[record.identifier] = Place(each.partition, each.offset)
    return {command.identifier: places[command.identifier] for command in decisions}


def follow(
    store: Archive, decided: Mapping[str, Place], *, outcomes_from: Mapping[int, int], patience_s: float
) -> dict[str, Line]:
    """What became of decisions: waits until all these totals are finished, or parked anew, or patience has run out.

    A total that is missing from the answer is where it was: nobody has applied the decision yet.
    """
    deadline = time.monotonic() + patience_s
    finished, read = dict[str, Line](), dict(outcomes_from)
    while True:
        for each in store.logged(Log.OUTCOMES, read):
            read[each.partition] = each.offset + 1
            if (identifier := each.key.decode()) in decided:
                finished[identifier] = line_of(decode_outcome(each.value))
        left = {name: place for name, place in decided.items() if name not in finished}
        applied = _applied(store, left) if left else {}
        settled = len(applied) == len(left) and all(line.state is Standing.PARKED for line in applied.values())
        if settled or time.monotonic() >= deadline:
            return applied | finished
        time.sleep(LOOK_AGAIN_S)


def _applied(store: Archive, decided: Mapping[str, Place]) -> dict[str, Line]:
    """How those stand whose decision has been applied, of totals that are not finished."""
    applied: dict[str, Line] = {}
    for partition in {place.partition for place in decided.values()}:
        restored = store.restore(Stage.DELIVER, partition)
        for entry in _unfinished(restored):
            place = decided.get(entry.total.identifier)
            if place is None or restored is None:
                continue
            # A decision may be applied before what lies before it is read; then the total is not parked any more.
            if restored.offset > place.offset or entry.state is not State.PARKED:
                applied[entry.total.identifier] = line_of(entry)
    return applied
