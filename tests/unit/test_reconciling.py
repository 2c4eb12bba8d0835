"""What to ask Stripe, and what follows from its sums: tables of every case, and what holds for all of them."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deliver.entries import Entry, Outcome, Reason, State
from consumer.deliver.reconciling import (
    DAY,
    HOUR,
    LAG_MS,
    ROWS,
    Book,
    Record,
    Span,
    Standing,
    Subject,
    Sum,
    about,
    books,
    by_day,
    judge,
    narrowing,
    plan,
    span,
)
from consumer.totals import SCALE, Report, Total
from tests.totals import total_of

T0: Final = 1_793_491_200
"""2026-11-01T00:00:00Z."""
END: Final = T0 + DAY
LONG_AFTER: Final = END * 1000 + 10 * LAG_MS
SUBJECT: Final = Subject("tokens", "cus_alice")


def total(timestamp: int = T0 + 7, value: str = "5", customer: str = "alice", name: str = "1") -> Total:
    return total_of(name, timestamp, customer, value)


def outcome(how: Any = "delivered", timestamp: int = T0 + 7, billed: str = "5", **more: Any) -> Outcome:
    fields = {"stripe_customer": "cus_alice", "at": T0 * 1000, **more}
    return Outcome(
        identifier="tm1-1", how=how, pipeline="test", meter="tokens", edition="e", partition=0,
        window_start=timestamp // 60 * 60, window="1m", revision=0, timestamp=timestamp, customer="alice",
        event_name="tokens", events=3, value=billed, billed=billed if how in {"delivered", "duplicate"} else "0",
        **fields,
    )  # fmt: skip


def who(name: str) -> str | None:
    return None if name == "nobody" else f"cus_{name}"


PARKED: Final[dict[str, Any]] = {"state": State.PARKED, "customer": "cus_alice", "parked_at": T0 * 1000}
FIVE: Final = 5 * SCALE


# What is ours


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (outcome(), Book(sure=FIVE, totals=1, newest=T0 * 1000)),
        (outcome("duplicate"), Book(sure=FIVE, totals=1, newest=T0 * 1000)),
        (outcome("unbilled"), None),
        (outcome("zero", billed="0"), None),
        (outcome("discarded", stripe_customer=None), None),
        (outcome("discarded"), None),
        (outcome("discarded", first_unproven=1), Book(maybe=[FIVE])),
        (outcome("refused"), Book(totals=1, newest=T0 * 1000)),
        (outcome("refused", first_unproven=1), Book(totals=1, newest=T0 * 1000, maybe=[FIVE])),
        (outcome("shadowed"), Book(shadowed=FIVE)),
        (outcome("shadowed", stripe_customer=None), None),
        (outcome("shadowed", timestamp=T0 - 1), None),
        (Entry(total(), State.SENDING), Book(coming=1)),
        (Entry(total(), State.RETRY, customer="cus_alice"), Book(coming=1)),
        (Entry(total(customer="nobody"), State.RETRY), None),
        (Entry(total(), first_unproven=1, reason=Reason.IN_DOUBT, **PARKED), Book(maybe=[FIVE])),
        (Entry(total(), reason=Reason.REFUSED, **PARKED), None),
        (total(), Book(coming=1)),
        (total(customer="nobody"), None),
        (outcome(timestamp=T0 - 1), None),
        (outcome(timestamp=END), None),
    ],
)
def test_what_of_each_total_is_at_stripe_and_what_may_be(record: Record, expected: Book | None) -> None:
    assert books([record], Span(T0, END), DAY, who) == ({} if expected is None else {SUBJECT: {T0: expected}})


@given(
    st.lists(st.tuples(st.integers(T0 - HOUR, END + HOUR), st.integers(-(10**6), 10**6)), max_size=30),
)
def test_hours_add_up_to_days_and_days_to_everything_that_was_delivered(made: list[tuple[int, int]]) -> None:
    within = Span(T0, END)
    records = [outcome(timestamp=timestamp, billed=str(value)) for timestamp, value in made]

    hours = books(records, within, HOUR, who).get(SUBJECT, {})
    days = books(records, within, DAY, who).get(SUBJECT, {})

    expected = sum(value for timestamp, value in made if T0 <= timestamp < END)
    assert sum(each.sure for each in hours.values()) == sum(each.sure for each in days.values()) == expected * SCALE
    assert set(days) <= {T0}
    assert all(T0 <= start < END and start % HOUR == 0 for start in hours)


@given(st.dictionaries(st.integers(0, 200).map(lambda hour: T0 + hour * HOUR), st.integers(0, 10**9)))
def test_stripes_hours_add_up_to_days_with_all_their_uncertainty(rows: dict[int, int]) -> None:
    days = by_day({start: Sum(value, 1) for start, value in rows.items()})

    assert sum(each.value for each in days.values()) == sum(rows.values())
    assert sum(each.uncertainty for each in days.values()) == len(rows)
    assert {start // DAY for start in rows} == {start // DAY for start in days}


# What is asked


def test_days_are_whole_and_short_spans_are_told_by_the_hour() -> None:
    noon = (T0 + DAY // 2) * 1000

    assert span(noon, noon + 1) == Span(T0, END)
    assert span(T0 * 1000, END * 1000) == Span(T0, END)
    assert [Span(T0, T0 + days * DAY).window for days in (1, 4, 5, 90)] == ["hour", "hour", "day", "day"]


def test_doubts_come_first_then_what_changed_within_a_day_then_the_others() -> None:
    now = (T0 + 10 * DAY) * 1000
    known = {
        Subject("tokens", "cus_old"): {T0: Book(1, 1, T0 * 1000)},
        Subject("tokens", "cus_new"): {T0: Book(1, 1, T0 * 1000), END: Book(1, 1, now - 1)},
        Subject("calls", "cus_coming"): {T0: Book(coming=1)},
        Subject("tokens", "cus_doubt"): {T0: Book(maybe=[1])},
    }

    order = [subject.customer for subject in plan(known, now)]

    assert (order[0], set(order[1:3]), order[3]) == ("cus_doubt", {"cus_new", "cus_coming"}, "cus_old")


def test_whom_stripe_reported_errors_of_come_first() -> None:
    """On the days on which Stripe looked at the events, and on the one before: usage is sent after it was used."""
    now = (T0 + 10 * DAY) * 1000
    old = Book(1, 1, T0 * 1000)
    report = Report("evt_1", now, "tokens", T0 + 2 * DAY + HOUR, T0 + 3 * DAY + HOUR, {"no_meter": 1}, 0)
    known = {
        Subject("tokens", "cus_doubt"): {T0: Book(maybe=[1])},
        Subject("tokens", "cus_long_before"): {T0: old},
        Subject("calls", "cus_other_meter"): {T0 + 2 * DAY: old},
        **{Subject("tokens", f"cus_{day}"): {T0: old, T0 + day * DAY: old} for day in range(1, 5)},
    }

    order = [subject.customer for subject in plan(known, now, [report])]

    assert (set(order[:3]), order[3]) == ({"cus_1", "cus_2", "cus_3"}, "cus_doubt")
    assert plan(known, now, [])[0].customer == "cus_doubt"
    assert about(report) == Span(T0 + DAY, T0 + 4 * DAY)


def test_everybody_gets_a_turn_although_the_budget_never_reaches_all() -> None:
    known = {Subject("tokens", f"cus_{number}"): {T0: Book(1, 1, 1)} for number in range(100)}

    asked = {subject for day in range(60) for subject in plan(known, (T0 + day * DAY) * 1000)[:10]}

    assert asked == set(known)
    assert plan(known, T0 * 1000) == plan(known, (T0 + HOUR) * 1000)  # the same all day


@given(st.sets(st.integers(0, 60), max_size=20))
def test_narrowing_covers_each_day_once_within_a_page(numbers: set[int]) -> None:
    days = {T0 + number * DAY for number in numbers}

    calls = narrowing(days)

    assert all(sum(day in call for call in calls) == 1 for day in days)
    assert all((call.end - call.start) // HOUR <= ROWS for call in calls)
    assert len(calls) <= len(days)


# What follows


@pytest.mark.parametrize(
    ("ours", "stripe", "now", "standing"),
    [
        (Book(sure=5), Sum(5), LONG_AFTER, Standing.EQUAL),
        (Book(sure=5), Sum(7, 2), LONG_AFTER, Standing.EQUAL),
        (Book(sure=5), Sum(5), T0 * 1000, Standing.EQUAL),
        (Book(sure=5), Sum(8, 2), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5), Sum(), LONG_AFTER, Standing.DIFFERS),
        (Book(), Sum(5), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5), Sum(4), END * 1000 + LAG_MS - 1, Standing.OPEN),
        (Book(sure=5), Sum(4), END * 1000 + LAG_MS, Standing.DIFFERS),
        (Book(sure=5, newest=LONG_AFTER - LAG_MS + 1), Sum(4), LONG_AFTER, Standing.OPEN),
        (Book(sure=5, newest=LONG_AFTER - LAG_MS), Sum(4), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5, coming=1), Sum(6), LONG_AFTER, Standing.OPEN),
        (Book(sure=5, maybe=[3, 4]), Sum(8), LONG_AFTER, Standing.DOUBT),
        (Book(sure=5, maybe=[3, 4]), Sum(12), LONG_AFTER, Standing.DOUBT),
        (Book(sure=5, maybe=[3, 4]), Sum(5), LONG_AFTER, Standing.EQUAL),
        (Book(sure=5, maybe=[3, 4]), Sum(10), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5, maybe=[3, 4]), Sum(2), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5, maybe=[1 << n for n in range(20)]), Sum(6), LONG_AFTER, Standing.DOUBT),
        (Book(sure=5, maybe=[1 << n for n in range(20)]), Sum(4), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5, maybe=[-3, 4]), Sum(2), LONG_AFTER, Standing.DOUBT),
        (Book(sure=5, maybe=[-3, 4]), Sum(3), LONG_AFTER, Standing.DIFFERS),
        (Book(sure=5, maybe=[3, 4], shadowed=7), Sum(15), LONG_AFTER, Standing.DOUBT),
        (Book(sure=5, maybe=[3, 4], shadowed=8), Sum(10), LONG_AFTER, Standing.DIFFERS),
    ],
)
def test_sums_are_judged(ours: Book, stripe: Sum, now: int, standing: Standing) -> None:
    assert judge(ours, stripe, end=END, now=now).standing is standing


@pytest.mark.parametrize(
    ("stripe", "standing", "why"),
    [
        (5, Standing.EQUAL, ""),
        (12, Standing.EQUAL, "what was shadowed has been billed by somebody else"),
        (
            11,
            Standing.DIFFERS,
            "Stripe has more than was delivered: who else sends usage there? (0.000000000007 of",
        ),
        (13, Standing.DIFFERS, "Stripe has more than was delivered"),
        (4, Standing.DIFFERS, "Stripe has less than was delivered"),
        (7, Standing.DIFFERS, "Stripe has more than was delivered"),
    ],
)
def test_what_was_shadowed_may_be_at_stripe_or_not(stripe: int, standing: Standing, why: str) -> None:
    """After the cut-over a day has usage that somebody else billed, and usage that we did."""
    judgement = judge(Book(sure=5, shadowed=7), Sum(stripe), end=END, now=LONG_AFTER)

    assert judgement.standing is standing
    assert judgement.why.startswith(why)


@pytest.mark.parametrize(
    ("stripe", "now", "standing", "why"),
    [
        (5, LONG_AFTER, Standing.EQUAL, ""),
        (6, LONG_AFTER, Standing.DIFFERS, "Stripe has more than would have been billed"),
        (4, LONG_AFTER, Standing.DIFFERS, "Stripe has less than would have been billed"),
        (4, END * 1000, Standing.OPEN, "it is not over"),
        (4, END * 1000 + LAG_MS + 1, Standing.OPEN, "shadowed within the last hour"),
    ],
)
def test_in_shadow_it_is_somebody_elses_billing_that_is_compared(
    stripe: int, now: int, standing: Standing, why: str
) -> None:
    ours = books([outcome("shadowed", billed="0.000000000003", at=END * 1000 + 2), outcome(billed="0.000000000002")],
                 Span(T0, END), DAY, who, shadow=True)  # fmt: skip
    assert ours == {SUBJECT: {T0: Book(sure=5, totals=2, newest=END * 1000 + 2)}}

    judgement = judge(ours[SUBJECT][T0], Sum(stripe), end=END, now=now, shadow=True)

    assert judgement.standing is standing
    assert judgement.why.startswith(why)


sums = st.integers(0, 10**16)


@given(sums, st.lists(st.integers(-(10**16), 10**16), max_size=6), st.data())
def test_what_doubts_explain_is_never_called_wrong(sure: int, maybe: list[int], data: st.DataObject) -> None:
    """Of a meter that allows negative totals they explain that Stripe has less, too."""
    there = data.draw(st.lists(st.booleans(), min_size=len(maybe), max_size=len(maybe)))
    error = data.draw(st.integers(-100, 100))
    seen = sure + sum(value for value, is_there in zip(maybe, there, strict=True) if is_there) + error

    judgement = judge(Book(sure=sure, maybe=maybe), Sum(seen, 100), end=END, now=LONG_AFTER)

    assert judgement.standing in {Standing.EQUAL, Standing.DOUBT}


@given(sums, st.integers(0, 100), st.integers(1, 10**16), st.booleans())
def test_what_is_settled_and_differs_by_more_than_stripe_can_err_is_called_wrong(
    sure: int, uncertainty: int, by: int, more: bool
) -> None:
    seen = Sum(sure + (by + uncertainty if more else -by - uncertainty), uncertainty)

    judgement = judge(Book(sure=sure, newest=T0 * 1000), seen, end=END, now=LONG_AFTER)

    assert judgement.standing is Standing.DIFFERS
    assert judgement.why.startswith("Stripe has more" if more else "Stripe has less")
