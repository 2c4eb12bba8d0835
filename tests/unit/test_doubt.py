"""What is recommended about a total that may be at Stripe: each case by itself, and all of them at random."""

from typing import Final

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from consumer.deliver.doubt import (
    CHOICES,
    FINAL_AFTER,
    Advice,
    Piece,
    Place,
    Recommendation,
    Seen,
    Sight,
    finished,
    own,
    recommend,
)
from consumer.deliver.entries import Entry, Reason, State, outcome
from consumer.totals import SCALE, Command, Destination, Total

NOW: Final = 1_793_534_400_000
OLD: Final = NOW - FINAL_AFTER
"""Whatever Stripe took until then is in its sums."""
HOUR: Final = 3_600_000
PLACE: Final = Place("cus_a", "tokens", 1_793_300_000)


def piece(value: float, newest: int | None = OLD, name: str = "tm1-x") -> Piece:
    return Piece(name, round(value * SCALE), newest)


def sight(
    stripe: float | None,
    mine: Piece | tuple[Piece, ...],
    *,
    sure: tuple[Piece, ...] = (),
    others: tuple[Piece, ...] = (),
    uncertainty: int = 0,
) -> Sight:
    seen = None if stripe is None else Seen(round(stripe * SCALE), uncertainty, NOW)
    own_ = mine if isinstance(mine, tuple) else (mine,)
    return Sight(PLACE, own_, sure, others, seen, "it was not asked")


CASES: Final[dict[str, tuple[Sight, Advice, str]]] = {
    "nothing was delivered there, and Stripe counts nothing": (
        sight(0, piece(5)),
        Advice.RELEASE,
        "Stripe counts 0; we delivered 0, and this total is 5. So this total is not there.",
    ),
    "Stripe counts what was delivered": (
        sight(12, piece(5), sure=(piece(12),)),
        Advice.RELEASE,
        "Stripe counts 12; we delivered 12, and this total is 5. So this total is not there.",
    ),
    "Stripe counts this total too": (
        sight(17, piece(5), sure=(piece(12),)),
        Advice.DISCARD,
        "Stripe counts 17; we delivered 12, and this total is 5. So this total is there.",
    ),
    "it is there, and that is seen early": (
        sight(5, piece(5, NOW - HOUR)),
        Advice.DISCARD,
        "Stripe counts 5; we delivered 0, and this total is 5. So this total is there.",
    ),
    "it is not seen, and may be on its way into the sum": (
        sight(0, piece(5, NOW - HOUR)),
        Advice.WAIT,
        "But its sums lag, and are relied on after 24 hours: the newest that may be missing is less than 2 h old.",
    ),
    "what was delivered lately is not in the sum yet, or this total is not": (
        sight(5, piece(5), sure=(piece(5, NOW - HOUR),)),
        Advice.WAIT,
        "relied on after 24 hours",
    ),
    "what was delivered lately is not in the sum yet, and does not matter": (
        sight(0, piece(5), sure=(piece(3, NOW - HOUR),)),
        Advice.RELEASE,
        "So this total is not there.",
    ),
    "another one of the same value is in doubt, and one of them is there": (
        sight(5, piece(5), others=(piece(5, name="tm1-y"),)),
        Advice.CANNOT_TELL,
        "others for 5 may be, and this total is 5. That fits with this total as well as without it: the difference may",
    ),
    "another one of the same value is in doubt, and both are there": (
        sight(10, piece(5), others=(piece(5),)),
        Advice.DISCARD,
        "So this total is there.",
    ),
    "another one of the same value is in doubt, and neither is there": (
        sight(0, piece(5), others=(piece(5),)),
        Advice.RELEASE,
        "not there",
    ),
    "others of other values are in doubt, and the sum tells which": (
        sight(19, piece(5), sure=(piece(12),), others=(piece(7), piece(1))),
        Advice.RELEASE,
        "not there",
    ),
    "others of other values add up to this one": (
        sight(5, piece(5), others=(piece(2), piece(3))),
        Advice.CANNOT_TELL,
        "as well as without it",
    ),
    "a negative correction hides it": (
        sight(0, piece(5), others=(piece(-5),)),
        Advice.CANNOT_TELL,
        "as well as without it",
    ),
    "others of the minute are on their way": (
        sight(5, piece(5), others=(piece(5, None, "tm1-y"),)),
        Advice.WAIT,
        "Others of the minute are not finished (tm1-y): wait until they are.",
    ),
    "somebody else writes there": (
        sight(14, piece(5), sure=(piece(12),)),
        Advice.CANNOT_TELL,
        "Nothing that we know of makes this sum: somebody else writes there, or an event was cancelled, or rejected",
    ),
    "what was delivered is missing": (
        sight(4, piece(5), sure=(piece(12),)),
        Advice.CANNOT_TELL,
        "Nothing that we know of makes this sum",
    ),
    "Stripe was not asked": (
        sight(None, piece(5)),
        Advice.CANNOT_TELL,
        "Stripe's sum is not known: it was not asked.",
    ),
    "the value is smaller than what Stripe's sum tells apart": (
        sight(9e14, piece(1e-6), sure=(piece(9e14),), uncertainty=SCALE),
        Advice.CANNOT_TELL,
        "its value is less than what Stripe's sum tells apart",
    ),
    "Stripe's sum is a binary fraction": (
        sight(0.3, piece(0.1), sure=(piece(0.2 + 1e-12),), uncertainty=100),
        Advice.DISCARD,
        "So this total is there.",
    ),
    "neither the generation that was released nor the one before is there": (
        sight(0, (piece(5), piece(5))),
        Advice.RELEASE,
        "not there",
    ),
    "one of two generations is there: the total is billed": (
        sight(5, (piece(5), piece(5))),
        Advice.DISCARD,
        "So this total is there.",
    ),
    "both generations are there": (
        sight(10, (piece(5), piece(5))),
        Advice.DISCARD,
        "So this total is there, more than once: cancel one, or credit the customer.",
    ),
    "too many others are in doubt": (
        sight(5, piece(5), others=tuple(piece(2.0**each) for each in range(17))),
        Advice.CANNOT_TELL,
        "Too many totals of this minute may be there to tell which are.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_doubt_is_judged_by_what_the_sums_allow(case: str) -> None:
    given_, advice, why = CASES[case]
    told = recommend(Reason.IN_DOUBT, [given_])
    assert told.advice is advice
    assert why in told.why


def test_when_to_ask_again_is_told_where_time_alone_helps() -> None:
    newest = NOW - HOUR
    told = recommend(Reason.IN_DOUBT, [sight(0, piece(5, newest))])
    assert told.until == newest + FINAL_AFTER
    told = recommend(Reason.IN_DOUBT, [sight(5, piece(5), others=(piece(5, None),))])
    assert told.until is None


def test_where_it_may_be_in_two_places_both_have_to_say_that_it_is_not() -> None:
    """It was sent to one customer, released, and sent to another one."""
    absent, there, unknown = sight(0, piece(5)), sight(5, piece(5)), sight(None, piece(5))
    waits = sight(0, piece(5, NOW))
    for sights, advice in (
        ([absent, absent], Advice.RELEASE),
        ([absent, there], Advice.DISCARD),
        ([unknown, there], Advice.DISCARD),
        ([absent, unknown], Advice.CANNOT_TELL),
        ([waits, absent], Advice.WAIT),
        ([waits, unknown], Advice.WAIT),
    ):
        assert recommend(Reason.IN_DOUBT, sights).advice is advice


def test_a_collision_is_never_recommended_to_be_released() -> None:
    """Stripe has said that it has the identifier: a sum without it says that it is another one."""
    told = recommend(Reason.COLLISION, [sight(0, piece(5))])
    assert told.advice is Advice.CANNOT_TELL
    assert "Find out who sent it." in told.why
    assert recommend(Reason.COLLISION, [sight(5, piece(5))]).advice is Advice.DISCARD


def test_what_was_delivered_has_to_be_known() -> None:
    told = recommend(Reason.IN_DOUBT, [sight(0, piece(5))], incomplete="outcomes of that time are not kept any more")
    assert told == Recommendation(
        Advice.CANNOT_TELL, "What was delivered there is not known: outcomes of that time are not kept any more."
    )


@pytest.mark.parametrize(
    ("reason", "advice", "cure"),
    [
        (Reason.REFUSED, Advice.RELEASE, "Put right what Stripe says"),
        (Reason.METER, Advice.RELEASE, "Create the meter at Stripe"),
        (Reason.UNMAPPED, Advice.WAIT, "Add the customer to the customers' file"),
    ],
)
def test_of_what_cannot_be_at_stripe_the_cure_is_told(reason: Reason, advice: Advice, cure: str) -> None:
    told = recommend(reason, [])
    assert told.advice is advice
    assert cure in told.why


def test_the_sums_that_are_tried_are_bounded() -> None:
    """A hundred doubts of one customer and minute: an answer at once, not after the universe has ended."""
    many = tuple(piece(1.5**each) for each in range(100))
    assert recommend(Reason.IN_DOUBT, [sight(5, piece(5), others=many)]).advice is Advice.CANNOT_TELL
    alike = tuple(piece(1) for _ in range(CHOICES // 100))
    assert recommend(Reason.IN_DOUBT, [sight(0, piece(5), others=alike)]).advice is Advice.RELEASE


# Random worlds, of which the truth is known


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Sight, bool, bool]:
    """A place as it is, whether the total is there, and whether somebody else writes there too."""
    values = st.integers(-3, 6).filter(bool).map(lambda each: each * SCALE // 2)
    ages = st.sampled_from([OLD, OLD - HOUR, NOW - HOUR, None])
    mine = Piece("mine", draw(values), draw(st.sampled_from([OLD, NOW - HOUR])))
    earlier = Piece("mine-g1", mine.value, OLD)
    lives = (earlier, mine) if draw(st.booleans()) else (mine,)
    sure = tuple(
        Piece("s", draw(values), draw(st.sampled_from([OLD, NOW - 1]))) for _ in range(draw(st.integers(0, 3)))
    )
    others = tuple(Piece("o", draw(values), draw(ages)) for _ in range(draw(st.integers(0, 4))))
    at_stripe = [*sure, *(each for each in (*others, *lives) if draw(st.booleans()))]
    visible = [each for each in at_stripe if (each.newest is not None and each.newest <= OLD) or draw(st.booleans())]
    foreign = draw(st.sampled_from([0, 0, 0, SCALE // 4]))
    total = sum(each.value for each in visible) + foreign
    known = any(each in at_stripe for each in lives)
    return Sight(PLACE, lives, sure, others, Seen(total, 0, NOW)), known, bool(foreign)


@given(worlds())
@settings(max_examples=500, deadline=None)
def test_following_the_recommendation_neither_doubles_nor_loses(world: tuple[Sight, bool, bool]) -> None:
    """Of sums that are final after a day, where we are the only writer, or another one does not pass for us."""
    place, there, _ = world
    told = recommend(Reason.IN_DOUBT, [place])
    event(f"{told.advice}")
    if told.advice is Advice.RELEASE:
        assert not there, "billed twice"
    if told.advice is Advice.DISCARD:
        assert there, "billed to nobody"


@given(worlds())
@settings(max_examples=300, deadline=None)
def test_it_decides_only_where_no_other_world_looks_the_same(world: tuple[Sight, bool, bool]) -> None:
    """All worlds that we could not tell from this one agree; found by trying each of them."""
    place, _, foreign = world
    assert place.seen is not None
    final = [
        each for each in (*place.sure, *place.others, *place.own) if each.newest is not None and each.newest <= OLD
    ]
    answers = set()
    maybe = [*place.others, *place.own]
    for choice in range(2 ** len(maybe)):
        there = [each for number, each in enumerate(maybe) if choice >> number & 1]
        present = [*place.sure, *there]
        hidden = [each for each in present if each not in final]
        base = sum(each.value for each in present if each in final)
        reachable = {0}
        for each in hidden:
            reachable |= {have + each.value for have in reachable}
        if place.seen.value - base in reachable:
            answers.add(any(each in place.own for each in there))
    told = recommend(Reason.IN_DOUBT, [place])
    if answers == {True}:
        assert told.advice is Advice.DISCARD
    elif answers == {False}:
        assert told.advice is Advice.RELEASE
    else:
        assert told.advice in {Advice.WAIT, Advice.CANNOT_TELL}
        assert answers or foreign


# What is where


def entry() -> Entry:
    to = Destination("tokens")
    total = Total("tm1", "p", "t", "e", 0, 1_793_300_040, "1m", 0, 0, "ann", "5", 3, 1_793_300_047, 0, 9, to)
    return Entry(total, customer="cus_a")


def test_a_total_may_be_wherever_an_attempt_is_not_proven_absent() -> None:
    """In every generation, at the customer that it was sent to then."""
    each = entry()
    assert own(each) == {}
    each.first_unproven, each.state, each.reason, each.parked_at = NOW, State.PARKED, Reason.IN_DOUBT, NOW + 24 * HOUR
    here = Place("cus_a", "tokens", 1_793_300_040)
    assert own(each) == {here: [Piece("tm1", 5 * SCALE, NOW + 24 * HOUR)]}
    each.decided(Command("release", "tm1", "eve", "", NOW), Reason.IN_DOUBT)
    each.renew()
    each.first_unproven, each.customer, each.parked_at = NOW + 30 * HOUR, "cus_b", NOW + 60 * HOUR
    assert own(each) == {
        here: [Piece("tm1", 5 * SCALE, NOW + 24 * HOUR)],
        here._replace(customer="cus_b"): [Piece("tm1-g2", 5 * SCALE, NOW + 60 * HOUR)],
    }


def test_a_finished_total_is_where_it_was_delivered_and_may_be_where_it_was_in_doubt() -> None:
    each = entry()
    each.first_unproven, each.state, each.parked_at = NOW, State.PARKED, NOW + 24 * HOUR
    each.decided(Command("release", "tm1", "eve", "", NOW), Reason.IN_DOUBT)
    each.renew()
    here = Place("cus_a", "tokens", 1_793_300_040)
    sure, maybe = finished(outcome(each, "delivered", NOW + 25 * HOUR, key="tm1-g2"))
    assert sure == (here, Piece("tm1-g2", 5 * SCALE, NOW + 25 * HOUR))
    assert maybe == {here: [Piece("tm1", 5 * SCALE, NOW + 24 * HOUR)]}

    given_up = entry()
    given_up.first_unproven, given_up.parked_at = NOW, NOW + 24 * HOUR
    before = outcome(given_up, "discarded", NOW + 25 * HOUR)
    assert finished(before) == (None, {here: [Piece("tm1", 5 * SCALE, NOW + 25 * HOUR)]})
    given_up.decided(Command("discard", "tm1", "eve", "", NOW), Reason.IN_DOUBT)
    assert finished(outcome(given_up, "discarded", NOW)) == (None, {here: [Piece("tm1", 5 * SCALE, NOW + 24 * HOUR)]})
    assert finished(msgspec.structs.replace(before, stripe_customer=None)) == (None, {})
    assert finished(msgspec.structs.replace(before, how="refused", decisions=())) == (
        None,
        {here: [Piece("tm1", 5 * SCALE, NOW + 25 * HOUR)]},
    )


def test_what_was_found_at_stripe_is_surely_there_and_not_perhaps_once_more() -> None:
    """Counted as both it would explain a difference that another total of its minute makes."""
    each = entry()
    each.first_unproven, each.state, each.parked_at = NOW, State.PARKED, NOW + 24 * HOUR
    found = Command("discard", "tm1", "eve", "", NOW, found="tm1")
    each.decided(found, Reason.IN_DOUBT)
    ended = outcome(each, "duplicate", NOW + 25 * HOUR, command=found)
    here = Place("cus_a", "tokens", 1_793_300_040)
    assert finished(ended) == ((here, Piece("tm1", 5 * SCALE, NOW + 24 * HOUR)), {})


def test_who_does_not_know_that_others_go_on_may_write_until_the_23_hours_are_over() -> None:
    """A process that was suspended with a request in its hands; the total was refused meanwhile, and parked."""
    each = entry()
    each.first_unproven, each.state, each.reason, each.parked_at = NOW, State.PARKED, Reason.REFUSED, NOW + HOUR
    here = Place("cus_a", "tokens", 1_793_300_040)
    assert own(each) == {here: [Piece("tm1", 5 * SCALE, NOW + 23 * HOUR)]}
    each.decided(Command("release", "tm1", "eve", "", NOW), Reason.REFUSED)
    each.renew()
    each.first_unproven = None
    assert own(each) == {here: [Piece("tm1", 5 * SCALE, NOW + 23 * HOUR)]}
