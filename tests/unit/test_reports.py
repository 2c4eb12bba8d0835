"""What a report of Stripe's says, whatever it looks like, and which totals the rejected events have billed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.deliver.entries import Entry, State, decode_outcome, refused
from consumer.runtime import reports
from consumer.runtime.reports import Malformed, Sample, matched, understood
from consumer.sandbox.stripe_server import Clock, StripeStandIn
from consumer.storage import Stage
from consumer.storage.sqlite import SqliteStore
from tests.unit.reporting import NOW, NOW_MS, Desk, delivered, reported, total


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with StripeStandIn(clock=Clock(lambda: float(NOW)), accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        yield Desk(tmp_path, stripe)


# What a report says


def test_codes_are_an_open_list_and_what_is_missing_is_done_without() -> None:
    kinds = [
        {"code": "brand_new", "error_count": 3},
        {"code": None, "sample_errors": [{"request": {"idempotency_key": "older"}}, {"error_message": "x"}, {}]},
        {
            "code": "brand_new",
            "error_count": -1,
            "sample_errors": [{"request": {"id": "req_1"}, "error_message": None}],
        },
    ]
    said = understood("evt_1", {"data": {"reason": {"error_types": kinds, "novelty": 1}}}, NOW_MS)
    assert said.errors == {"brand_new": 4, "unknown": 3}
    assert said.samples == (Sample("older", "unknown", ""),)
    assert (said.since, said.until, said.meter) == (NOW - 86_400, NOW, None)


@pytest.mark.parametrize(
    ("data", "since", "until"),
    [
        ({}, NOW - 86_400, NOW),
        ({"validation_start": "soon", "validation_end": 5 * "9"}, NOW - 86_400, NOW),
        ({"validation_start": "2027-01-01T00:00:00Z"}, NOW, NOW),
        ({"validation_start": "0001-01-01T00:00:00Z"}, 0, NOW),
        ({"validation_end": "2026-10-26T07:40:00.001Z"}, 1_793_000_400 - 86_400, 1_793_000_401),
    ],
)
def test_times_that_make_no_sense_do_not_narrow_the_search(data: dict[str, str], since: int, until: int) -> None:
    said = understood("evt_1", {"data": {"reason": {}, **data}}, NOW_MS)
    assert (said.since, said.until) == (since, until)
    assert said.errors == {"unknown": 0}


def test_no_report_is_too_large() -> None:
    samples = [{"error_message": "m" * 9000, "request": {"identifier": f"k{n}"}} for n in range(400)]
    many = [{"code": f"c{n}", "error_count": 1, "sample_errors": samples} for n in range(90)]
    many[0]["code"], many[0]["error_count"] = "\ud800" * 9000, 10**30
    long = [{"request": {"identifier": "k" * 256}}]
    said = understood("evt_1", {"data": {"reason": {"error_types": [*many, {"sample_errors": long}]}}}, NOW_MS)
    assert len(said.samples) == reports.SAMPLES
    assert {len(each.message) for each in said.samples} == {reports.LONGEST_MESSAGE}
    assert len(said.errors) == reports.CODES + 1
    assert said.errors["other"] > 0
    written = reports.records(said, [], None, NOW_MS)
    assert max(len(each.value) for each in written) < 64 * 1024


@pytest.mark.parametrize("event", [{}, {"data": None}, {"data": {}}, {"data": {"reason": None}}, {"data": []}])
def test_an_event_without_a_reason_is_no_report(event: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        understood("evt_1", event, NOW_MS)


# Which totals are meant


def meant(desk: Desk, *keys: str) -> list[tuple[str, str, str | None]]:
    """Identifier, key and how it then ends, of the totals that a report with these keys rejects."""
    with desk.store() as store:
        found = matched(store, understood("evt_1", reported(*keys), NOW_MS), NOW_MS)
    assert {each.customer for each in found} <= {"alice"}
    assert {each.event_name for each in found} <= {"tokens"}
    thens = [bytes(each.rejection.outcome) for each in found]
    hows = [None if then == b"null" else decode_outcome(then).how for then in thens]
    return [(each.rejection.identifier, each.rejection.key, how) for each, how in zip(found, hows, strict=True)]


def test_the_event_of_the_attempt_that_was_taken_is_the_one_that_bills(desk: Desk) -> None:
    desk.finish(
        delivered(1, key="tm1-1-alice:1"),
        delivered(2, key="tm1-2-alice-g2:1", how="duplicate", generation=2),
        delivered(3, how="discarded"),
        delivered(4),
        refused(delivered(4), "reported before", NOW_MS),
    )
    assert meant(desk, "tm1-1-alice", "tm1-2-alice", "tm1-3-alice", "tm1-4-alice", "tm1-9-alice", "foreign") == []
    assert meant(desk, "tm1-1-alice:1", "tm1-1-alice:1", "tm1-2-alice-g2", "tm1-2-alice-g2:1") == [
        ("tm1-1-alice", "tm1-1-alice:1", "refused"),
        ("tm1-2-alice", "tm1-2-alice-g2", "refused"),
    ], "each total once"


def test_a_total_that_is_not_finished_remembers_each_attempt_that_was_rejected(desk: Desk) -> None:
    desk.keep(Entry(total(1), State.RETRY, "cus_alice", first_unproven=NOW_MS, attempts=2), Entry(total(2)))
    assert meant(desk, "tm1-1-alice", "tm1-1-alice:1", "tm1-3-alice") == [
        ("tm1-1-alice", "tm1-1-alice", None),
        ("tm1-1-alice", "tm1-1-alice:1", None),
    ], "how it ends is not known yet"


def test_what_was_finished_long_before_is_not_searched(desk: Desk) -> None:
    """Stripe looked at these events now; what we heard of two hours ago is another matter."""
    desk.stripe.clock.move_to(NOW - 2 * 3600)
    desk.finish(delivered(1))
    desk.stripe.clock.move_to(NOW - 1800)
    desk.finish(delivered(2))
    assert meant(desk, "tm1-1-alice", "tm1-2-alice") == [("tm1-2-alice", "tm1-2-alice", "refused")]


def test_a_total_that_is_finished_while_it_is_searched_is_found(desk: Desk) -> None:
    """It is nowhere among the outcomes when these are read, and not among the entries when those are read."""

    class Moving(SqliteStore):
        def restore(self, stage: Stage, partition: int) -> Any:
            desk.finish(delivered(1))
            return super().restore(stage, partition)

    desk.keep()
    with Moving.open(desk.path, now=desk.clock.now, create=False, lock=False) as store:
        found = matched(store, understood("evt_1", reported("tm1-1-alice"), NOW_MS), NOW_MS)
    assert [each.rejection.identifier for each in found] == ["tm1-1-alice"]
