"""Stage 1, one story for each rule: how usage would be lost, doubled or put into the wrong period without it."""

import pytest

from consumer.totals import Destination
from tests.unit.stage1 import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    T0,
    Stage1,
    event,
    meter,
    revisions,
    rules,
    time_text,
    values,
)

DEADLINE = T0 + 3 * MINUTE
"""Of the window that starts at T0."""
SETTLE = 5 * SECOND


def after(deadline: int) -> int:
    """The clock at which what was due at the deadline closes."""
    return deadline + SETTLE


# Windows and revisions


def test_a_window_closes_once_with_all_that_arrived_in_time() -> None:
    stage = Stage1(rules())
    stage.send(event("1", T0, n=1), T0)
    stage.send(event("2", T0 + MINUTE - 1, n=2), T0 + MINUTE)
    stage.send(event("3", T0 + MINUTE, n=4), T0 + MINUTE)
    stage.send(event("4", T0, n=8), DEADLINE - 1)
    assert values(stage.close_all()) == ["11", "4"]


def test_customers_have_totals_of_their_own_in_a_fixed_order() -> None:
    stage = Stage1(rules())
    for number, customer in enumerate(["b", "ü", "a", "b"]):
        stage.send(event(str(number), subject=customer), T0)
    assert [(total.customer, total.value, total.events) for total in stage.close_all()] == [
        ("a", "1", 1),
        ("b", "2", 2),
        ("ü", "1", 1),
    ]


def test_late_events_go_to_corrections_that_are_due_soon() -> None:
    """Stripe finalises an invoice an hour after its period: a correction after that is billed to nobody."""
    stage = Stage1(rules())
    stage.send(event("0", n=1), T0)
    marks = [0, 5, 15, 30, 60, 120, 180]
    for number, minutes in enumerate(marks):
        stage.send(event(f"{number}-on", n=10), DEADLINE + minutes * MINUTE)
        stage.send(event(f"{number}-after", n=100), DEADLINE + minutes * MINUTE + 1)
        stage.send(event(f"{number}-before", n=1000), DEADLINE + (*marks, 240)[number + 1] * MINUTE - 1)
    found = stage.close_all()
    assert revisions(found) == [(0, "1")] + [(number + 1, "1110") for number in range(7)]
    assert [(total.due - DEADLINE) // MINUTE for total in found] == [*marks, 240]
    assert stage.book().late == dict.fromkeys(range(1, 8), 3), "and they are counted"


def test_nothing_is_dropped_for_being_late() -> None:
    """Stream frameworks drop what comes after the window; here that would be usage that nobody pays for."""
    stage = Stage1(rules())
    stage.send(event("1", n=1), T0)
    stage.advance(after(DEADLINE))
    stage.send(event("2", n=2), T0 + DAY)
    assert revisions(stage.close_all()) == [(0, "1"), (27, "2")]


def test_a_record_for_a_closed_bucket_goes_to_the_next_revision() -> None:
    """A quiet partition was closed by the reader's clock, then a record came with the clock of a slower host.

    Added to the bucket that is gone it would be lost, or would be a second value for an identifier that Stripe has.
    """
    stage = Stage1(rules())
    stage.send(event("1", n=1), DEADLINE - SECOND)
    stage.advance(after(DEADLINE))
    assert values(stage.totals) == ["1"]
    stage.send(event("2", n=2), DEADLINE - 1)
    assert revisions(stage.close_all()) == [(0, "1"), (1, "2")]


def test_a_slower_hosts_record_counts_in_time_until_the_clock_has_settled() -> None:
    """Hosts' clocks differ: without `settle` every quiet window's last events would be corrections."""
    stage = Stage1(rules())
    stage.send(event("1", n=1), DEADLINE - SECOND)
    stage.advance(after(DEADLINE) - 1)
    assert stage.totals == []
    stage.send(event("2", n=2), DEADLINE - 1)
    assert revisions(stage.close_all()) == [(0, "3")]


@pytest.mark.parametrize("mark", [0, 5, 15, 30, 60, 120])
def test_a_bucket_closes_when_the_clock_has_passed_its_due_time_by_settle(mark: int) -> None:
    """Closed before, it would miss what a slower host has still to say; closed later, it would miss the invoice."""
    stage = Stage1(rules())
    stage.send(event("1"), DEADLINE + mark * MINUTE - 1)
    assert stage.aggregator.next_close == after(DEADLINE + mark * MINUTE)
    stage.send(None, after(DEADLINE + mark * MINUTE) - 1)
    stage.commit()
    assert stage.totals == []
    stage.send(None, after(DEADLINE + mark * MINUTE))
    stage.commit()
    assert values(stage.totals) == ["1"]


def test_a_longer_lateness_moves_the_deadline() -> None:
    stage = Stage1(rules(meter(lateness=HOUR)))
    stage.send(event("1", n=1), T0)
    stage.send(event("2", n=2), T0 + MINUTE + HOUR - 1)
    stage.send(event("3", n=4), T0 + MINUTE + HOUR)
    assert [(total.revision, total.value, total.due) for total in stage.close_all()] == [
        (0, "3", T0 + MINUTE + HOUR),
        (1, "4", T0 + MINUTE + HOUR + 5 * MINUTE),
    ]


def test_a_backlog_after_hours_of_downtime_is_counted_as_it_would_have_been_live() -> None:
    """Judged by the time of reading, all of it would be late, and in corrections that miss the invoice."""
    live, later = Stage1(rules()), Stage1(rules(), now=T0 + 9 * HOUR)
    for number in range(300):
        at = T0 + number * 17 * SECOND
        live.send(event(str(number), at), at + SECOND)
        live.commit()
        later.write(event(str(number), at), at + SECOND)
    later.read()
    assert live.close_all() == later.close_all()
    assert {total.revision for total in later.totals} == {0}


# The log clock


def test_an_arrival_is_never_earlier_than_one_before_it() -> None:
    """On a topic that producers date, a backdated record would otherwise reopen what is closed."""
    stage = Stage1(rules())
    stage.send(event("1", n=1), T0, stamp_type=1)
    stage.send(None, after(DEADLINE), stamp_type=1)
    stage.drain()
    stage.send(event("2", n=2), T0, stamp_type=1)
    assert stage.aggregator.book.arrival == after(DEADLINE)
    assert revisions(stage.close_all()) == [(0, "1"), (1, "2")]


def test_the_clock_never_goes_back() -> None:
    stage = Stage1(rules())
    stage.send(None, T0 + HOUR)
    stage.advance(T0)
    assert stage.aggregator.book.clock == T0 + HOUR
    assert stage.advances == []
    stage.crash()
    assert stage.aggregator.book.clock == T0 + HOUR
    stage.send(None, T0)
    assert stage.aggregator.book.clock == T0 + HOUR


def test_an_advance_is_recorded_where_it_happened() -> None:
    """It decides where a later record goes: without it nobody could compute the same totals again."""
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    stage.advance(T0 + HOUR)
    assert [(each.partition, each.offset, each.clock) for each in stage.advances] == [(0, 1, T0 + HOUR)]
    stage.crash()
    assert stage.aggregator.book.clock == T0 + HOUR


def test_an_advance_closes_windows_but_is_no_arrival() -> None:
    """Ages and repetitions are told by arrivals: by the advances of one reader another could not tell them again."""
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    stage.advance(T0 + 9 * DAY)
    stage.send(event("2"), T0 + SECOND)
    stage.send(event("1"), T0 + SECOND)
    assert (stage.dead, stage.aggregator.book.duplicate) == ({}, 1)


def test_a_new_partition_begins_at_the_clock_it_is_given() -> None:
    stage = Stage1(rules(), clock=after(DEADLINE))
    stage.send(event("1"), T0)
    assert stage.close_all()[0].revision == 1


@pytest.mark.parametrize("ahead", [5 * MINUTE, -HOUR])
def test_a_record_that_the_broker_dates_up_to_five_minutes_ahead_is_read(ahead: int) -> None:
    stage = Stage1(rules(), now=T0)
    stage.write(event("1"), T0 + ahead)
    assert stage.read() == 1


def test_the_partition_waits_where_the_brokers_clock_is_ahead() -> None:
    """One broker with a wrong year would close a year of windows; taken for a dead letter, good usage would be lost."""
    stage = Stage1(rules(), now=T0)
    stage.write(event("1"), T0)
    stage.write(event("2"), T0 + 365 * DAY)
    stage.write(event("3"), T0)
    assert stage.read() == 1
    assert stage.read() == 0
    assert (stage.aggregator.offset, stage.aggregator.book.clock) == (1, T0)
    assert stage.dead == {}
    stage.now = T0 + 365 * DAY
    assert stage.read() == 2


def test_a_record_that_its_producer_dates_ahead_is_a_dead_letter_and_moves_nothing() -> None:
    """One producer with a wrong year would close a year of windows, or stop everybody else's usage for a year."""
    stage = Stage1(rules(), now=T0)
    for number, ahead in enumerate([0, 5 * MINUTE, 5 * MINUTE + 1, 365 * DAY]):
        stage.write(event(str(number), T0), T0 + ahead, stamp_type=1)
    stage.write(None, T0 + 365 * DAY, stamp_type=1)
    assert stage.read() == 5
    assert stage.dead == {"arrival_in_future": 2}
    assert stage.aggregator.book.clock == stage.aggregator.book.arrival == T0 + 5 * MINUTE
    assert stage.billed == "2"


def test_a_record_dated_ahead_is_a_dead_letter_though_its_event_is_of_an_open_window() -> None:
    """Nothing but its date is wrong with it; it is judged by that all the same, on the short path too."""
    stage = Stage1(rules(), now=T0)
    stage.send(event("1", T0), T0, stamp_type=1)
    stage.send(event("2", T0), T0 + 5 * MINUTE + 1, stamp_type=1)
    assert (stage.dead, stage.billed) == ({"arrival_in_future": 1}, "1")


# Late and future events


@pytest.mark.parametrize("stamp_type", [1, 2])
def test_a_topic_that_is_produced_again_after_three_days_bills_nothing_twice(stamp_type: int) -> None:
    """Ids are remembered for a day. What is older than that cannot be told from a repetition, so it is not taken."""
    stage = Stage1(rules())
    first = [(event(str(hour), T0 + hour * HOUR), T0 + hour * HOUR + SECOND) for hour in range(72)]
    for value, arrival in first:
        stage.send(value, arrival, stamp_type=stamp_type)
    again = T0 + 3 * DAY
    if stamp_type == 1:
        stage.send(event("today", again), again, stamp_type=stamp_type)
    for value, arrival in first:
        stage.send(value, arrival if stamp_type == 1 else again, stamp_type=stamp_type)
    book = stage.aggregator.book
    assert book.counted == 72 + (stamp_type == 1)
    assert book.duplicate + book.dead["late"] == 72
    assert book.duplicate >= 23


@pytest.mark.parametrize(("late", "reason"), [(DAY, None), (DAY + 1, "late")])
def test_an_event_more_than_accept_late_before_its_arrival_is_a_dead_letter(late: int, reason: str | None) -> None:
    stage = Stage1(rules())
    stage.send(event("1"), T0 + late)
    assert next(iter(stage.dead), None) == reason


def test_an_events_age_is_told_by_the_log_even_where_its_producer_dates_it() -> None:
    """A topic that was mirrored keeps its dates; told by them, three-day-old events would seem to be on time."""
    stage = Stage1(rules())
    stage.send(None, T0 + 3 * DAY, stamp_type=1)
    stage.send(event("1", T0), T0, stamp_type=1)
    stage.send(event("2", ...), T0, stamp_type=1)  # type: ignore[arg-type]  # without a time of its own
    assert stage.dead == {"late": 2}


@pytest.mark.parametrize(("ahead", "reason"), [(5 * MINUTE, None), (5 * MINUTE + 1, "future")])
def test_an_event_more_than_five_minutes_ahead_of_its_arrival_is_a_dead_letter(ahead: int, reason: str | None) -> None:
    """Stripe refuses such timestamps; a window in the year 3000 would stay open until then."""
    stage = Stage1(rules())
    stage.send(event("1", T0 + ahead), T0)
    assert next(iter(stage.dead), None) == reason


def test_whether_an_event_is_in_the_future_is_told_by_its_arrival_and_not_by_the_reader() -> None:
    """A backlog would otherwise be counted differently from what it would have been live, and by every reader."""
    stage = Stage1(rules(), now=T0 + 9 * HOUR)
    stage.send(event("1", T0 + HOUR), T0)
    assert stage.dead == {"future": 1}


def test_every_meter_has_its_own_accept_late() -> None:
    stage = Stage1(rules(meter("strict", accept_late=HOUR), meter("patient", event_types=("other",))))
    stage.send(event("1", type="other"), T0 + 2 * HOUR)
    stage.send(event("2"), T0 + 2 * HOUR)
    assert stage.dead == {"late": 1}
    assert stage.book("patient").events == 1


@pytest.mark.parametrize("key", [b"k", None])
def test_what_precedes_bill_from_is_ignored(key: bytes | None) -> None:
    """It was billed by whatever billed before."""
    stage = Stage1(rules(bill_from=T0))
    stage.send(event("1", T0 - 1), T0, key=key)
    stage.send(event("2", T0), T0, key=key)
    stage.send(event("3", T0 - 1), T0, key=key)
    assert stage.aggregator.book.ignored == {"before_bill_from": 2}
    assert stage.billed == "1"


# Whole or not at all

TWO_METERS = (
    meter("tokens"),
    meter("calls", aggregation="count", value=None, window="1h"),
    meter("strict", where=((("model",), ("x",)),), value=("m",), accept_late=HOUR, decimals=0),
)


def test_an_event_is_counted_by_all_meters_that_it_matches() -> None:
    stage = Stage1(rules(*TWO_METERS))
    stage.send(event("1", n=5, data={"model": "x", "m": 7}), T0)
    stage.send(event("2", n=6, data={"model": "y", "m": "none"}), T0)
    assert sorted((total.meter, total.value) for total in stage.close_all()) == [
        ("calls", "2"),
        ("strict", "7"),
        ("tokens", "11"),
    ]
    assert stage.aggregator.book.counted == 2


@pytest.mark.parametrize("m", ["none", -1, None, 10**15])
def test_an_event_that_one_of_its_meters_cannot_count_is_counted_by_none(m: object) -> None:
    """Counted by some, it could neither be sent again, which bills those twice, nor be left, which loses it."""
    stage = Stage1(rules(*TWO_METERS))
    stage.send(event("1", n=0.30000000000000004, data={"model": "x", "m": m}), T0)
    assert stage.close_all() == []
    assert sum(stage.dead.values()) == 1
    stage.send(event("1", n=5, data={"model": "x", "m": 1.5}), T0)
    assert stage.billed == "8"


@pytest.mark.parametrize("changes", [{"n": -1}, {"n": "none"}, {"subject": ...}, {"subject": "x" * 256}])
def test_an_event_that_does_not_count_opens_no_window(changes: dict[str, object]) -> None:
    """An empty window is lost in a crash, and until then it moves the clock of a quiet partition: by what is in memory,
    and not by what the log says."""
    stage = Stage1(rules())
    stage.send(event("1", **changes), T0)  # type: ignore[arg-type]
    assert (sum(stage.dead.values()), stage.aggregator.open_buckets, stage.aggregator.next_close) == (1, 0, None)


def test_an_event_that_is_too_late_for_one_of_its_meters_is_counted_by_none() -> None:
    stage = Stage1(rules(*TWO_METERS))
    stage.send(event("1", data={"model": "x", "m": 1}), T0 + 2 * HOUR)
    stage.send(event("2", data={"model": "y"}), T0 + 2 * HOUR)
    assert stage.dead == {"late": 1}
    assert stage.billed == "2"


def test_rounding_is_counted_of_counted_events_only() -> None:
    """The first meter has rounded when the last one refuses; mended and sent again, it would be told twice."""
    first, last = meter("first", decimals=0), meter("last", value=("m",))
    stage = Stage1(rules(first, last))
    stage.send(event("1", n=0.5, data={"m": "none"}), T0)
    assert stage.book("first").rounded == 0
    stage.send(event("1", n=0.5, data={"m": 1}), T0)
    assert stage.book("first").rounded == 1


def test_events_of_types_without_a_meter_are_ignored() -> None:
    stage = Stage1(rules())
    stage.send(event("1", "no time", n="no number", type="other"), T0)
    assert stage.aggregator.book.ignored == {"unmatched": 1}


# Times


@pytest.mark.parametrize(
    ("time", "counted_at"),
    [
        ("2026-11-01T11:59:59.9999996Z", "2026-11-01T11:59:59.999Z"),
        ("2026-11-01T11:59:59.999999999999999Z", "2026-11-01T11:59:59.999Z"),
        ("2026-11-01T13:59:59.9999996+02:00", "2026-11-01T11:59:59.999Z"),
        ("2026-11-01T12:00:00Z", "2026-11-01T12:00:00.000Z"),
    ],
)
def test_times_are_cut_never_rounded_up(time: str, counted_at: str) -> None:
    """A library that rounds 11:59:59.9999996 up bills the next window: at the end of a month, the next invoice."""
    noon = T0 + 12 * HOUR
    stage = Stage1(rules())
    stage.send(event("1", time), noon)
    (total,) = stage.close_all()
    assert time_text(total.timestamp * 1000)[:19] == counted_at[:19]
    assert total.window_start * 1000 == (noon if counted_at[11:13] == "12" else noon - MINUTE)


@pytest.mark.parametrize("time", ["2026-11-01T00:00:00", "2026-11-01", "1793491200", "", "yesterday"])
def test_a_time_without_an_offset_is_a_dead_letter(time: str) -> None:
    """Taken for UTC it would put usage hours away from when it was, and into another month."""
    stage = Stage1(rules())
    stage.send(event("1", time), T0)
    assert stage.dead == {"time_invalid": 1}


def test_an_event_without_a_time_took_place_when_its_record_was_made() -> None:
    stage = Stage1(rules())
    stage.send(None, T0 + 2 * MINUTE)
    stage.send(event("1", time=...), T0 + 30 * SECOND)
    (total,) = stage.close_all()
    assert (total.window_start * 1000, total.timestamp * 1000) == (T0, T0 + 30 * SECOND)


def test_the_timestamp_is_the_earliest_event_time_in_whole_seconds() -> None:
    """The start of the window may lie before the customer's billing period, and the latest time after it."""
    stage = Stage1(rules())
    for number, millisecond in enumerate([30_500, 12_999, 59_999, 13_000]):
        stage.send(event(str(number), T0 + millisecond), T0 + MINUTE)
        stage.commit()
        stage.crash()
    assert [total.timestamp for total in stage.close_all()] == [T0 // 1000 + 12]


def test_a_total_explains_itself() -> None:
    """The totals log is what an auditor has when the configuration and the events are gone."""
    stage = Stage1(rules(meter(stripe=Destination("ai_tokens", "amount", "customer"))))
    stage.write(None, T0)
    for number in range(3):
        stage.write(event(str(number), T0 + number * SECOND, n=1.5), T0 + 2 * SECOND)
    stage.read()
    (total,) = stage.close_all()
    edition = meter(stripe=Destination("ai_tokens", "amount", "customer")).edition(settle=SETTLE, deduplicate_for=DAY)
    assert total.edition == edition.hex()
    assert (total.pipeline, total.partition, total.meter, total.customer) == ("prod", 0, "tokens", "acme")
    assert (total.window, total.window_start, total.revision, total.due) == ("1m", T0 // 1000, 0, DEADLINE)
    assert (total.value, total.events, total.timestamp) == ("4.5", 3, T0 // 1000)
    assert (total.first_offset, total.last_offset) == (1, 3)
    assert total.stripe == Destination("ai_tokens", "amount", "customer")


# A changed configuration


def test_buckets_of_a_meter_that_is_gone_still_close_with_their_own_place_at_stripe() -> None:
    """What was used before the meter was taken out of the configuration is owed."""
    stage = Stage1(rules(meter(stripe=Destination("old_name")), meter("other")))
    stage.send(event("1", n=5), T0)
    stage.configure(rules(meter("other", stripe=Destination("other_name"))))
    stage.send(event("2", n=7), T0)
    assert sorted((total.meter, total.value, total.stripe.event_name) for total in stage.close_all()) == [
        ("other", "5", "other"),
        ("other", "7", "other_name"),
        ("tokens", "5", "old_name"),
    ]
    assert stage.book().total_events == 1


def test_a_changed_meter_does_not_add_to_the_buckets_of_before() -> None:
    """Lateness that was shortened would let the same identifier stand for two sums."""
    stage = Stage1(rules())
    stage.send(event("1", n=1), T0)
    stage.configure(rules(meter(decimals=0)))
    stage.send(event("2", n=2), T0)
    first, second = stage.close_all()
    assert {first.value, second.value} == {"1", "2"}
    assert first.identifier != second.identifier


def test_a_bucket_that_closed_is_never_opened_again_by_settings_that_change_back() -> None:
    """A shorter `settle` closed it; with the longer one again, a record that seems in time makes no second total.

    Stripe would know its identifier already, and never take the second value.
    """
    patient, hasty = rules(settle=HOUR), rules(settle=0)
    stage = Stage1(patient)
    stage.send(event("1", n=1), T0)
    stage.configure(hasty)
    stage.advance(DEADLINE + MINUTE)
    stage.configure(patient)
    stage.send(event("2", n=2), T0 + SECOND)
    found = stage.close_all()
    assert len({total.identifier for total in found}) == len(found)
    assert sum(int(total.value) for total in found) == 3


def test_a_changed_back_configuration_goes_on_where_it_was() -> None:
    stage = Stage1(rules())
    stage.send(event("1", n=1), T0)
    stage.configure(rules(meter(decimals=0)))
    stage.configure(rules())
    stage.send(event("2", n=2), T0)
    assert values(stage.close_all()) == ["3"]


# Records that are no events of ours


def test_tombstones_are_ignored_and_move_the_clock() -> None:
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    stage.send(None, after(DEADLINE))
    stage.commit()
    assert values(stage.totals) == ["1"]
    assert stage.aggregator.book.ignored == {"tombstone": 1}


IN_HEADERS: list[tuple[str, bytes | None]] = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"1"),
    ("ce_source", b"/svc"),
    ("ce_type", b"used"),
    ("ce_subject", b"acme"),
    ("ce_time", time_text(T0).encode()),
]


@pytest.mark.parametrize("value", [None, b""])
def test_an_event_in_headers_alone_counts(value: bytes | None) -> None:
    """In binary mode an event without data has no value; taken for a tombstone, calls would be billed to nobody."""
    stage = Stage1(rules(meter(aggregation="count", value=None)))
    stage.send(value, T0, headers=IN_HEADERS)
    stage.send(value, T0, headers=IN_HEADERS)
    assert (stage.billed, stage.aggregator.book.duplicate, stage.aggregator.book.ignored) == ("1", 1, {})


def test_an_event_in_headers_alone_is_a_dead_letter_where_a_value_is_needed() -> None:
    stage = Stage1(rules())
    stage.send(None, T0, headers=IN_HEADERS)
    stage.commit()
    (letter,) = stage.letters
    assert (letter.reason, letter.headers, letter.value) == ("value_missing", IN_HEADERS, b"")


@pytest.mark.parametrize(
    "header",
    [("trace", b"1"), ("content-type", b"application/cloudevents+json"), ("content-type", b"application/json")],
)
def test_a_record_without_value_whose_headers_carry_no_event_is_a_tombstone(header: tuple[str, bytes]) -> None:
    stage = Stage1(rules())
    stage.send(None, T0, headers=[header])
    assert stage.aggregator.book.ignored == {"tombstone": 1}


def test_unkeyed_records_count_and_are_counted() -> None:
    """They cost more Stripe calls: a total for every partition."""
    stage = Stage1(rules())
    stage.send(event("1"), T0, key=None)
    stage.send(event("2"), T0, key=b"")
    stage.send(None, T0, key=b"")
    assert stage.aggregator.book.unkeyed == 1
    assert stage.billed == "2"


def test_an_event_that_carries_another_event_is_the_outer_one() -> None:
    """In binary mode the value is data: read as an event, somebody else's usage would be billed."""
    outer: list[tuple[str, bytes | None]] = [
        ("ce_specversion", b"1.0"),
        ("ce_id", b"outer"),
        ("ce_source", b"/relay"),
        ("ce_type", b"used"),
        ("ce_subject", b"relay"),
        ("content-type", b"application/json"),
    ]
    stage = Stage1(rules())
    stage.send(event("inner", n=1000) + b" ", T0, headers=outer)
    assert stage.dead == {"value_missing": 1}
    stage.send(event("inner", n=1000)[:-1] + b', "n": 5}', T0, headers=outer)
    assert [(total.customer, total.value) for total in stage.close_all()] == [("relay", "5")]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (("Content-Type", b"application/cloudevents+json"), None),
        (("content-type", b"application/json"), None),
        (("content-type", None), None),
        (("ce-id", b"2"), None),
        (("content-type", b"application/cloudevents-batch+json"), "batch_mode"),
        (("CE_id", b"2"), "missing_attribute"),
        (("ce_", b""), "invalid_attribute"),
    ],
)
def test_headers_say_whether_the_value_is_the_event(header: tuple[str, bytes | None], reason: str | None) -> None:
    """Also where it looks like one: several in one record, or somebody else's data, must not be counted as one."""
    stage = Stage1(rules())
    stage.send(event("0"), T0)
    stage.send(event("1"), T0, headers=[("trace", b"1"), header])
    assert next(iter(stage.dead), None) == reason


def test_text_that_is_not_utf_8_is_a_dead_letter_wherever_it_is() -> None:
    """Two readers would otherwise make different events of it."""
    stage = Stage1(rules())
    stage.send(event("1", data={"unread": "é"}).replace(b"\\u00e9", b"\xe9"), T0)
    stage.send(event("2", data={"unread": "é"}).replace(b"\\u00e9", "é".encode()), T0)
    assert (stage.dead, stage.billed) == ({"not_json": 1}, "1")
