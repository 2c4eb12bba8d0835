"""What is known of totals that may be at Stripe: what we delivered beside them, and what Stripe's sums say.

Our own records are read before Stripe is asked, and once more after it: where something has moved meanwhile, the two
do not belong together, and nothing is told.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

import msgspec

from consumer.config import Config
from consumer.config import CustomerFile as CustomerFileConfig
from consumer.deliver.customers import Customers, LookupFailedError, UnmappedError
from consumer.deliver.doubt import (
    Advice,
    Piece,
    Place,
    Recommendation,
    Seen,
    Sight,
    finished,
    may_come,
    own,
    place_of,
    recommend,
)
from consumer.deliver.entries import Entry, Outcome, Reason, State
from consumer.runtime.audit import everything
from consumer.runtime.customers import CustomerFile, CustomerFileError, Passthrough
from consumer.runtime.start import shown
from consumer.runtime.stripe_reads import BudgetSpent, KeyRefused, Meter, NotThere, ReadFailed, Silent, StripeReads
from consumer.storage import Archive, Log
from consumer.totals import Total, scaled

BUDGET: Final = 1_000
"""Calls to Stripe for one command: one for each customer, meter and minute that it is about."""


class Judged(msgspec.Struct, frozen=True):
    """A parked total, what is known of it, and what to do."""

    entry: Entry
    sights: tuple[Sight, ...]
    recommendation: Recommendation


@dataclass(slots=True)
class _Known:
    """What our records say of some places."""

    sure: dict[Place, list[Piece]] = field(default_factory=dict)
    maybe: dict[Place, list[tuple[str, Piece]]] = field(default_factory=dict)
    """With the identifier of the total."""
    parked: set[tuple[str, int]] = field(default_factory=set)
    """Totals that are parked, and which time."""


def is_doubtful(entry: Entry) -> bool:
    """Whether something of it may be at Stripe, in whatever generation."""
    return bool(own(entry))


def last_sent_as(entry: Entry) -> str | None:
    """Under which identifier something of it may be at Stripe; of several the last one, None where nothing may be."""
    pieces = [piece for several in own(entry).values() for piece in several]
    return pieces[-1].identifier if pieces else None


def names(config: Config) -> Customers | None:
    """Who customers are at Stripe, as the service is told now; None where that cannot be read."""
    if not isinstance(config.customers, CustomerFileConfig):
        return Passthrough()
    try:
        return CustomerFile(config.customers.path).customers
    except CustomerFileError:
        return None


def judge(
    store: Archive, entries: Sequence[Entry], customers: Customers | None, reads: StripeReads | str
) -> list[Judged]:
    """What to do about these parked totals. ``reads`` may be why Stripe is not asked; the end of a sentence."""
    doubts = {entry.total.identifier: own(entry) for entry in entries}
    places = {place for pieces in doubts.values() for place in pieces}
    if not places:
        return [Judged(each, (), recommend(_reason(each), ())) for each in entries]
    ends = store.ends(Log.OUTCOMES)
    known = _known(store, places, customers)
    seen = dict.fromkeys(places, reads) if isinstance(reads, str) else _ask(reads, places)
    later = _known(store, places, customers, since=ends)
    missing = _missing(store, min(place.minute for place in places))
    judged = []
    for entry in entries:
        identifier = entry.total.identifier
        mine = doubts[identifier]
        sights = tuple(_sight(identifier, place, tuple(pieces), known, seen[place]) for place, pieces in mine.items())
        advised = recommend(_reason(entry), sights, incomplete=missing)
        if (identifier, entry.parking) not in later.parked:
            advised = Recommendation(Advice.WAIT, "It was decided just now: ask again.")
        elif any(_moved(known, later, place) for place in mine):
            advised = Recommendation(Advice.WAIT, "Totals of this minute were on their way just now: ask again.")
        judged.append(Judged(entry, sights, advised))
    return judged


def _reason(entry: Entry) -> Reason:
    if entry.reason is None:
        raise ValueError(f"{entry.total.identifier} is not parked")
    return entry.reason


def _sight(identifier: str, place: Place, mine: tuple[Piece, ...], known: _Known, seen: Seen | str) -> Sight:
    others = tuple(piece for total, piece in known.maybe.get(place, ()) if total != identifier)
    sure = tuple(known.sure.get(place, ()))
    if isinstance(seen, str):
        return Sight(place, mine, sure, others, unseen=seen)
    return Sight(place, mine, sure, others, seen)


# Our records


def _known(
    store: Archive, places: AbstractSet[Place], customers: Customers | None, *, since: Mapping[int, int] | None = None
) -> _Known:
    known = _Known()
    anybody: dict[tuple[str, int], list[str]] = {}
    for place in places:
        anybody.setdefault((place.event_name, place.minute), []).append(place.customer)
    for each in everything(store, since=since):
        if isinstance(each, Outcome):
            identifier, at = each.identifier, place_of("", each.event_name, each.timestamp)
        else:
            total = each if isinstance(each, Total) else each.total
            identifier, at = total.identifier, place_of("", total.stripe.event_name, total.timestamp)
        if (everybody := anybody.get((at.event_name, at.minute))) is None:
            continue
        if isinstance(each, Outcome):
            sure, maybe = finished(each)
            if sure is not None and sure[0] in places:
                known.sure.setdefault(sure[0], []).append(sure[1])
        else:
            if isinstance(each, Entry) and each.state is State.PARKED:
                known.parked.add((identifier, each.parking))
            maybe = _unfinished(Entry(each) if isinstance(each, Total) else each, customers, everybody)
        for place in maybe.keys() & places:
            known.maybe.setdefault(place, []).extend((identifier, piece) for piece in maybe[place])
    return known


def _unfinished(entry: Entry, customers: Customers | None, everybody: Sequence[str]) -> dict[Place, list[Piece]]:
    found = own(entry)
    if entry.state is not State.PARKED and scaled(entry.total.value):
        for customer in _who(entry, customers, everybody):
            found |= may_come(entry, customer)
    return found


def _who(entry: Entry, customers: Customers | None, everybody: Sequence[str]) -> Sequence[str]:
    """Who it may be for at Stripe: where that is not known, everybody."""
    if entry.customer is not None:
        return [entry.customer]
    if customers is None:
        return everybody
    try:
        found = customers.stripe_customer(entry.total.customer)
    except UnmappedError:
        return []
    except LookupFailedError:
        return everybody
    return [] if found is None else [found]


def _moved(before: _Known, after: _Known, place: Place) -> bool:
    """Whether there is something now that there was not before Stripe was asked."""
    return bool(after.sure.get(place)) or not {*after.maybe.get(place, ())} <= {*before.maybe.get(place, ())}


def _missing(store: Archive, minute: int) -> str:
    """Why it is not known what was delivered since this time; nothing where it is."""
    ends = store.ends(Log.OUTCOMES)
    for partition in sorted(store.shortened(Log.OUTCOMES)):
        first = next(store.logged(Log.OUTCOMES, {}, {partition: ends[partition]}), None)
        if first is None or first.appended_at > minute * 1000:
            kept = "none are" if first is None else f"they are kept since {shown(first.appended_at)}"
            return f"outcomes of that time are not kept any more ({kept})"
    return ""


# Stripe


def _ask(reads: StripeReads, places: AbstractSet[Place]) -> dict[Place, Seen | str]:
    seen: dict[Place, Seen | str] = {}
    failed = ""
    meters: dict[str, Meter] = {}
    try:
        meters = reads.meters()
    except ReadFailed as wrong:
        failed = _end(wrong)
    for place in sorted(places):
        meter = meters.get(place.event_name)
        if failed:
            seen[place] = failed
        elif meter is None:
            seen[place] = f"it has no meter of the event name {place.event_name}"
        elif not meter.sums:
            seen[place] = f"its meter {place.event_name} does not sum raw events"
        else:
            try:
                found = reads.minute(meter.id, place.customer, place.minute)
                seen[place] = Seen(found.value, found.uncertainty, reads.now())
            except NotThere as wrong:
                seen[place] = _end(wrong)
            except (Silent, KeyRefused, BudgetSpent) as wrong:
                seen[place] = failed = _end(wrong)
            except ReadFailed as wrong:
                seen[place] = _end(wrong)
    return seen


def _end(wrong: ReadFailed) -> str:
    return str(wrong).rstrip(".")
