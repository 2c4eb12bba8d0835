"""Whether Stripe's sums are what was delivered, by customer and day: what to ask, in which order, and what follows.

Pure: records of the logs and Stripe's sums come in, judgements come out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, Literal, NamedTuple

import msgspec
import xxhash

from consumer.deliver import doubt
from consumer.deliver.doubt import Piece, Place
from consumer.deliver.entries import Entry, Outcome, State
from consumer.totals import Report, Total, for_stripe, plain, scaled

HOUR: Final = 3_600
DAY: Final = 86_400

LAG_MS: Final = 3_600_000
"""So long after a delivery a difference may be Stripe's summaries lagging: they promise nothing, and minutes have been
seen. What is older and differs is reported."""

ROWS: Final = 100
"""Of one answer of Stripe's: so many hours or days are one call."""

CHOICES: Final = 5_000
"""Sums of doubtful totals that are tried."""


class Subject(NamedTuple):
    """Whom Stripe has sums of."""

    event_name: str
    customer: str
    """At Stripe."""


class Book(msgspec.Struct):
    """What we know of a subject in an hour or a day."""

    sure: int = 0
    """What was delivered, as Stripe was told it, in units of 10⁻¹²."""
    totals: int = 0
    """How many totals that was."""
    newest: int = 0
    """When the last of them was, in milliseconds since the epoch."""
    maybe: list[int] = []
    """What else may be at Stripe: totals in doubt."""
    shadowed: int = 0
    """What somebody else was to bill, where that is not what is compared."""
    coming: int = 0
    """How many totals may get there at any moment."""


Books = dict[Subject, dict[int, Book]]
"""By the start of the hour or day, in seconds since the epoch."""

Record = Outcome | Entry | Total
"""A total where it stands: finished, at work in stage 2, or not read by it yet."""

Who = Callable[[str], str | None]
"""The Stripe customer of somebody whom events name; None where there is none."""


class Span(NamedTuple):
    """Whole UTC days, in seconds since the epoch; the end is not in it."""

    start: int
    end: int

    def __contains__(self, timestamp: object) -> bool:
        return isinstance(timestamp, int) and self.start <= timestamp < self.end

    @property
    def window(self) -> Literal["hour", "day"]:
        """The finest that Stripe tells in one call."""
        return "hour" if (self.end - self.start) // HOUR <= ROWS else "day"


def span(since: int, until: int) -> Span:
    """The days that contain these times, in milliseconds since the epoch."""
    return Span(since // 1000 // DAY * DAY, -(-until // 1000 // DAY) * DAY)


# What is ours


class Pieces(NamedTuple):
    """What of a total is at Stripe."""

    sure: tuple[Place, Piece] | None = None
    maybe: Mapping[Place, list[Piece]] = {}
    """What may be there, or may get there at any moment."""
    shadowed: tuple[Place, Piece] | None = None
    """What somebody else was to bill."""

    @property
    def places(self) -> set[Place]:
        """Where it has a part in Stripe's sum, or may have."""
        return {*self.maybe, *(each[0] for each in (self.sure, self.shadowed) if each)}


def pieces(record: Record, who: Who) -> Pieces:
    """What of a total is at Stripe, or may be."""
    if isinstance(record, Outcome):
        return _finished(record)
    if isinstance(record, Entry):
        if record.state is State.PARKED:
            return Pieces(maybe=doubt.own(record))
        customer = record.customer or who(record.total.customer)
        return Pieces(maybe=doubt.own(record) if customer is None else doubt.may_come(record, customer))
    customer = who(record.customer)
    if customer is None:
        return Pieces()
    place = doubt.place_of(customer, record.stripe.event_name, record.timestamp)
    return Pieces(maybe={place: [Piece(record.identifier, for_stripe(scaled(record.value)), None)]})


def _finished(outcome: Outcome) -> Pieces:
    found = Pieces(*doubt.finished(outcome))
    if outcome.how not in {"shadowed", "refused"} or outcome.stripe_customer is None:
        return found
    place = doubt.place_of(outcome.stripe_customer, outcome.event_name, outcome.timestamp)
    if outcome.how == "shadowed":
        return found._replace(
            shadowed=(place, Piece(outcome.identifier, for_stripe(scaled(outcome.value)), outcome.at))
        )
    # That nothing of it is there is to be compared as well.
    return found._replace(sure=(place, Piece(outcome.identifier, 0, outcome.at)))


def books(records: Iterable[Record], within: Span, size: int, who: Who, *, shadow: bool = False) -> Books:
    """What is ours, by subject and hour or day (``size``, in seconds).

    ``shadow``: what was shadowed is to be compared too, as if it had been delivered.
    """
    found: Books = {}

    def book(place: Place) -> Book:
        of = found.setdefault(Subject(place.event_name, place.customer), {})
        return of.setdefault(place.minute // size * size, Book())

    for record in records:
        delivered, maybe, shadowed = pieces(record, who)
        sure = delivered or (shadowed if shadow else None)
        if sure is not None and sure[0].minute in within:
            place, piece = sure
            each = book(place)
            each.sure += piece.value
            each.totals += 1
            each.newest = max(each.newest, piece.newest or 0)
        elif shadowed is not None and shadowed[0].minute in within:
            book(shadowed[0]).shadowed += shadowed[1].value
        for place, several in maybe.items():
            if place.minute in within:
                for piece in several:
                    if piece.newest is None:
                        book(place).coming += 1
                    else:
                        book(place).maybe.append(piece.value)
    return found


# What is asked


def about(report: Report) -> Span:
    """The days of the usage whose events Stripe reports on: of the days on which it looked at them, and of the one
    before, for usage is sent after it was used."""
    return Span(report.since // DAY * DAY - DAY, report.until // DAY * DAY + DAY)


def plan(known: Books, now: int, reports: Iterable[Report] = ()) -> list[Subject]:
    """In which order to ask, when not everybody can be: those whom Stripe reported errors of, as far as that is known,
    those with doubts, those that changed within a day, the others.

    Within each of these the order is another one every day, so that all get their turn.
    """
    today = now // 1000 // DAY
    reported = [(each.event_name, about(each)) for each in reports]

    def rank(subject: Subject) -> tuple[int, int]:
        of = known[subject]
        if any(name == subject.event_name and any(day in days for day in of) for name, days in reported):
            first = 0
        elif any(book.maybe for book in of.values()):
            first = 1
        elif any(book.coming or book.newest > now - DAY * 1000 for book in of.values()):
            first = 2
        else:
            first = 3
        return first, xxhash.xxh64_intdigest("\0".join((str(today), *subject)).encode())

    return sorted(known, key=rank)


def narrowing(days: Iterable[int]) -> list[Span]:
    """Calls that tell the hours of these days: as few as Stripe's pages allow."""
    calls: list[Span] = []
    for day in sorted(days):
        if calls and day + DAY - calls[-1].start <= ROWS * HOUR:
            calls[-1] = Span(calls[-1].start, day + DAY)
        else:
            calls.append(Span(day, day + DAY))
    return calls


# What follows


class Sum(NamedTuple):
    """What Stripe says; the true sum is at most ``uncertainty`` from it. Both in units of 10⁻¹²."""

    value: int = 0
    uncertainty: int = 0


class Standing(StrEnum):
    """How Stripe's sum and ours compare."""

    EQUAL = "equal"
    OPEN = "open"
    """They differ, and it is too early to say."""
    DOUBT = "doubt"
    """They differ by what may be at Stripe of totals in doubt."""
    DIFFERS = "differs"


class Judgement(NamedTuple):
    """How they compare, and why."""

    standing: Standing
    why: str = ""


def judge(ours: Book, stripe: Sum, *, end: int, now: int, shadow: bool = False) -> Judgement:
    """Compare an hour or a day that ends at ``end``, in seconds; ``now`` is in milliseconds, by Stripe's clock.

    ``shadow``: ours is what would have been billed, and what Stripe has is somebody else's.
    """
    difference = stripe.value - ours.sure
    if abs(difference) <= stripe.uncertainty:
        return Judgement(Standing.EQUAL)
    if ours.shadowed and abs(difference - ours.shadowed) <= stripe.uncertainty:
        return Judgement(Standing.EQUAL, "what was shadowed has been billed by somebody else")
    if early := _early(ours, end, now, "shadowed" if shadow else "delivered"):
        return Judgement(Standing.OPEN, early)
    if any(_reaches(ours.maybe, difference - others, stripe.uncertainty) for others in {0, ours.shadowed}):
        return Judgement(
            Standing.DOUBT, "as much may be at Stripe of totals that are or were in doubt: see `tallyman parked list`"
        )
    why = (_LESS, _MORE)[difference > 0][shadow]
    if ours.shadowed:
        why += f" ({plain(ours.shadowed)} of that day was shadowed, for somebody else to bill)"
    return Judgement(Standing.DIFFERS, why)


_MORE: Final = (
    "Stripe has more than was delivered: who else sends usage there?",
    "Stripe has more than would have been billed: is all that is billed today counted here?",
)
_LESS: Final = (
    "Stripe has less than was delivered: events were rejected after they were taken, or cancelled",
    "Stripe has less than would have been billed: is there usage here that is not billed today?",
)


def _early(ours: Book, end: int, now: int, done: str) -> str:
    """Why it is too early to say that something is wrong; nothing where it is not."""
    if now < end * 1000 + LAG_MS:
        return "it is not over, or only just"
    if ours.coming:
        return "a total is on its way" if ours.coming == 1 else f"{ours.coming} totals are on their way"
    return f"{done} within the last hour, and Stripe's sums may lag" if now < ours.newest + LAG_MS else ""


def _reaches(values: Sequence[int], wanted: int, uncertainty: int) -> bool:
    """Whether some of these values add up to what is wanted; where there are too many to tell, they may."""
    least, most = sum(each for each in values if each < 0), sum(each for each in values if each > 0)
    if not least - uncertainty <= wanted <= most + uncertainty:
        return False
    sums = {0}
    for value in values:
        sums |= {each + value for each in sums}
        if len(sums) > CHOICES:
            return True
    return any(abs(each - wanted) <= uncertainty for each in sums)


def by_day(rows: Mapping[int, Sum]) -> dict[int, Sum]:
    """Sums of hours as sums of days."""
    days: dict[int, Sum] = {}
    for start, each in rows.items():
        day = days.get(start // DAY * DAY, Sum())
        days[start // DAY * DAY] = Sum(day.value + each.value, day.uncertainty + each.uncertainty)
    return days
