"""What can be told of a total that may be at Stripe, and what cannot: from sums, for Stripe shows no events.

Stripe tells what a customer used on a meter in a minute. We know what we delivered there, and what else may be there.
Where only one choice of the latter explains Stripe's sum, it is known whether the total is among it. That holds as long
as nobody else writes there; where the sum shows that somebody does, nothing is told.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import combinations
from typing import Final, Literal, NamedTuple

import msgspec

from consumer.deliver.entries import (
    BILLED,
    HOUR,
    Decision,
    Entry,
    Outcome,
    Reason,
    State,
    identifier_of,
    newest,
)
from consumer.totals import for_stripe, plain, scaled

FINAL_AFTER: Final = 24 * HOUR
"""Milliseconds after which what Stripe has taken is relied on to be in its summaries. Stripe promises nothing; minutes
have been seen. It is so long because doubts come from the days on which Stripe is not well."""

CHOICES: Final = 50_000
"""Sums that are tried; where there are more, nothing is told."""

GENERATIONS: Final = 10
"""Of the total itself, likewise."""


class Advice(StrEnum):
    """What to do about a parked total."""

    RELEASE = "release"
    """Nothing of it is at Stripe."""
    DISCARD = "discard"
    """It is at Stripe already."""
    WAIT = "wait"
    """It is not known yet, or nobody has to do anything."""
    CANNOT_TELL = "cannot_tell"
    """The sums do not decide it, and will not."""


class Place(NamedTuple):
    """What Stripe has one sum for, at the finest."""

    customer: str
    """At Stripe."""
    event_name: str
    minute: int
    """Its start, in seconds since the epoch."""


class Piece(msgspec.Struct, frozen=True):
    """Usage that is at Stripe, or may be."""

    identifier: str
    """As Stripe was told it."""
    value: int
    """As Stripe was told it, in units of 10⁻¹²."""
    newest: int | None
    """Milliseconds since the epoch: Stripe has not taken it later. None while it may still come."""


class Seen(msgspec.Struct, frozen=True):
    """What Stripe says of a place."""

    value: int
    uncertainty: int
    """The true sum is at most so far from the value; both in units of 10⁻¹²."""
    at: int
    """When it said so, in milliseconds since the epoch."""


class Sight(msgspec.Struct, frozen=True):
    """All that is known of one place of the total in question."""

    place: Place
    own: tuple[Piece, ...]
    """What of the total itself may be there: one piece for each generation that was not proven absent."""
    sure: tuple[Piece, ...] = ()
    """What was delivered there."""
    others: tuple[Piece, ...] = ()
    """What of other totals may be there."""
    seen: Seen | None = None
    unseen: str = ""
    """Why Stripe did not tell; the end of a sentence."""


class Recommendation(msgspec.Struct, frozen=True, omit_defaults=True):
    """What to do about a parked total, and why."""

    advice: Advice
    why: str
    until: int | None = None
    """When more will be known, in milliseconds since the epoch."""
    found: str | None = None
    """Under which identifier it is there, where it is: of several that may be, the last one."""


# What is where


def place_of(customer: str, event_name: str, timestamp: int) -> Place:
    """Where Stripe adds usage with this timestamp up."""
    return Place(customer, event_name, timestamp - timestamp % 60)


def own(entry: Entry) -> dict[Place, list[Piece]]:
    """What of this parked total may be at Stripe, in all generations; nothing where every attempt is proven absent."""
    total = entry.total
    name, stamp = total.stripe.event_name, total.timestamp
    found = _earlier(entry.decisions, total.identifier, total.value, name, stamp)
    if entry.first_unproven is not None and entry.customer is not None:
        place = place_of(entry.customer, name, stamp)
        last = newest(entry.first_unproven, entry.parked_at) if entry.state is State.PARKED else None
        found.append((place, Piece(entry.identifier, for_stripe(scaled(total.value)), last)))
    return _grouped(found)


def may_come(entry: Entry, customer: str) -> dict[Place, list[Piece]]:
    """The same of a total that is not parked: it may get there at any moment, if this is who it is for."""
    found = own(entry)
    place = place_of(customer, entry.total.stripe.event_name, entry.total.timestamp)
    piece = Piece(entry.identifier, for_stripe(scaled(entry.total.value)), None)
    found[place] = [each for each in found.get(place, ()) if each.identifier != piece.identifier] + [piece]
    return found


def finished(outcome: Outcome) -> tuple[tuple[Place, Piece] | None, dict[Place, list[Piece]]]:
    """What is surely at Stripe of a finished total, and what may be."""
    name, stamp = outcome.event_name, outcome.timestamp
    maybe = _earlier(outcome.decisions, outcome.identifier, outcome.value, name, stamp)
    value = scaled(outcome.billed) if outcome.how in BILLED else for_stripe(scaled(outcome.value))
    piece = Piece(outcome.billed_as or outcome.identifier, value, outcome.at)
    if outcome.how in BILLED:
        # What was found there by its sum was in doubt before.
        found = [each for _, each in maybe if each.identifier == piece.identifier]
        maybe = [(place, each) for place, each in maybe if each not in found]
        piece = found[-1] if found else piece
    if outcome.stripe_customer is None:
        return None, _grouped(maybe)
    place = place_of(outcome.stripe_customer, name, stamp)
    if outcome.how in BILLED:
        return (place, piece), _grouped(maybe)
    # Discarded by a version that kept no decisions, or refused after it was delivered, and perhaps there all the same.
    if outcome.first_unproven is not None and (outcome.how == "refused" or not outcome.decisions):
        maybe.append((place, piece))
    return None, _grouped(maybe)


def _earlier(
    decisions: Iterable[Decision], identifier: str, value: str, event_name: str, timestamp: int
) -> list[tuple[Place, Piece]]:
    return [
        (
            place_of(each.stripe_customer, event_name, timestamp),
            Piece(identifier_of(identifier, each.generation), for_stripe(scaled(value)), each.newest),
        )
        for each in decisions
        if each.newest is not None and each.stripe_customer is not None
    ]


def _grouped(found: Iterable[tuple[Place, Piece]]) -> dict[Place, list[Piece]]:
    grouped: dict[Place, list[Piece]] = {}
    for place, piece in found:
        grouped.setdefault(place, []).append(piece)
    return grouped


# What follows from it


class _Told(NamedTuple):
    """Of one place: whether the total is there."""

    what: Literal["there", "absent", "wait", "unknown"]
    why: str
    until: int | None = None


def recommend(reason: Reason, sights: Sequence[Sight], *, incomplete: str = "") -> Recommendation:
    """What to do about a total that is parked for this reason, from all places at which it may be.

    ``incomplete`` tells why it is not known what was delivered there, where it is not; the end of a sentence.
    """
    if not sights:
        return _clear(reason)
    if incomplete:
        return Recommendation(Advice.CANNOT_TELL, f"What was delivered there is not known: {incomplete}.")
    told: dict[str, list[_Told]] = {}
    found: str | None = None
    for sight in sights:
        each = _look(sight)
        told.setdefault(each.what, []).append(each)
        if each.what == "there":
            found = sight.own[-1].identifier
    first = next(what for what in ("there", "wait", "unknown", "absent") if what in told)
    why = " ".join(each.why for each in told[first])
    if first == "wait":
        ends = [each.until for each in told[first] if each.until is not None]
        return Recommendation(Advice.WAIT, why, max(ends) if len(ends) == len(told[first]) else None)
    if first == "absent" and reason is Reason.COLLISION:
        why += (
            " But Stripe had an event with this identifier before we sent it: with another value, customer or minute, "
            "or it was cancelled or rejected since. Find out who sent it."
        )
        first = "unknown"
    advice = {"there": Advice.DISCARD, "absent": Advice.RELEASE, "unknown": Advice.CANNOT_TELL}[first]
    return Recommendation(advice, why, found=found)


def _clear(reason: Reason) -> Recommendation:
    """Of a total of which nothing can be at Stripe."""
    if reason is Reason.UNMAPPED:
        why = "It was never sent. Add the customer to the customers' file: it is released by itself (null: not billed)."
        return Recommendation(Advice.WAIT, why)
    cure = "Create the meter at Stripe, or activate it" if reason is Reason.METER else "Put right what Stripe says"
    why = f"Nothing of it is at Stripe. {cure}, then release it; or discard it, and nobody is billed."
    return Recommendation(Advice.RELEASE, why)


def _look(sight: Sight) -> _Told:
    seen = sight.seen
    if seen is None:
        return _Told("unknown", f"Stripe's sum is not known: {sight.unseen}.")
    late = [each for each in sight.sure if not _is_final(each, seen)]
    rest = seen.value - sum(each.value for each in sight.sure if _is_final(each, seen))
    without = _sums([each.value for each in (*late, *sight.others)])
    if without is None or len(sight.own) > GENERATIONS:
        return _Told("unknown", "Too many totals of this minute may be there to tell which are.")
    counts = {
        count
        for count in range(len(sight.own) + 1)
        for chosen in combinations(sight.own, count)
        if _reaches(without, rest - sum(each.value for each in chosen), seen.uncertainty)
    }
    facts = _facts(sight, seen)
    told = _Told("absent", f"{facts} So this total is not there.")
    if not counts:
        who = "somebody else writes there, or an event was cancelled, or rejected after it was taken"
        told = _Told("unknown", f"{facts} Nothing that we know of makes this sum: {who}.")
    elif 0 not in counts:
        twice = ", more than once: cancel one, or credit the customer" if min(counts) > 1 else ""
        told = _Told("there", f"{facts} So this total is there{twice}.")
    else:
        missing = [each for each in (*late, *sight.others, *sight.own) if not _is_final(each, seen)]
        if missing and (len(counts) > 1 or not all(_is_final(each, seen) for each in sight.own)):
            told = _wait(facts, missing, seen)
        elif len(counts) > 1:
            told = _Told("unknown", f"{facts} That fits with this total as well as without it: {_alike(sight)}.")
    return told


def _is_final(piece: Piece, seen: Seen) -> bool:
    """Whether it is in Stripe's sum, if it is at Stripe."""
    return piece.newest is not None and piece.newest + FINAL_AFTER <= seen.at


def _wait(facts: str, missing: Sequence[Piece], seen: Seen) -> _Told:
    coming = [each.identifier for each in missing if each.newest is None]
    if coming:
        return _Told("wait", f"{facts} Others of the minute are not finished ({_some(coming)}): wait until they are.")
    last = max(each.newest or 0 for each in missing)
    why = (
        f"{facts} But its sums lag, and are relied on after {FINAL_AFTER // HOUR} hours: the newest that may be "
        f"missing is less than {max(0, seen.at - last) // HOUR + 1} h old."
    )
    return _Told("wait", why, last + FINAL_AFTER)


def _sums(values: Iterable[int]) -> list[int] | None:
    """What choices of these values add up to, in order; None where there are too many."""
    sums = {0}
    for value in values:
        sums |= {each + value for each in sums}
        if len(sums) > CHOICES:
            return None
    return sorted(sums)


def _reaches(sums: Sequence[int], wanted: int, uncertainty: int) -> bool:
    at = bisect_left(sums, wanted - uncertainty)
    return at < len(sums) and sums[at] <= wanted + uncertainty


def _facts(sight: Sight, seen: Seen) -> str:
    sure, maybe = plain(sum(each.value for each in sight.sure)), plain(sight.own[-1].value)
    others = f", others for {plain(sum(each.value for each in sight.others))} may be" if sight.others else ""
    return f"Stripe counts {plain(seen.value)}; we delivered {sure}{others}, and this total is {maybe}."


def _alike(sight: Sight) -> str:
    if sight.others:
        return f"the difference may as well be {_some([each.identifier for each in sight.others])}"
    return "its value is less than what Stripe's sum tells apart"


def _some(identifiers: Sequence[str]) -> str:
    return ", ".join(identifiers[:3]) + (f" and {len(identifiers) - 3} more" if len(identifiers) > 3 else "")
