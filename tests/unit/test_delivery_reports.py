"""What Stripe rejects after it took it: delivered is then refused, once, whatever is reported how often."""

import msgspec
import pytest

from consumer.deliver.answers import Answer, Lost
from consumer.deliver.delivery import Attempt
from consumer.deliver.doubt import finished, place_of
from consumer.deliver.entries import EntryError, encode_outcome, refused, rejects, total_of
from consumer.deliver.reports import unanswered
from consumer.totals import Compared, Comparison, Rejection, Report, encode
from tests.unit.delivery_world import HOUR, MINUTE, OK, World

DAY = 24 * HOUR
WHY = "meter_event_customer_not_found: No such customer"


def delivered() -> tuple[World, str]:
    """A world in which one total has been delivered."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, OK, world.now)
    world.commit()
    return world, attempt.identifier


def rejection(world: World, key: str, report: str = "evt_1") -> Rejection:
    """Stripe names the event of this key, and we found what became of its total."""
    identifier = total_of(key)
    assert identifier is not None
    found = next(each for each in world.outcomes if each.identifier == identifier)
    raw = msgspec.Raw(encode_outcome(refused(found, WHY, world.now)))
    code, _, message = WHY.partition(": ")
    return Rejection(identifier, key, code, message, report, world.now, raw)


def of_unfinished(attempt: Attempt, report: str, at: int) -> Rejection:
    """Stripe names the event of this attempt; its total is not finished."""
    return Rejection(attempt.identifier, attempt.key, "code", "why", report, at, msgspec.Raw(b"null"))


def test_what_was_delivered_and_is_rejected_is_refused() -> None:
    world, identifier = delivered()
    world.log.append(rejection(world, identifier))
    world.run(world.now)
    assert [each.how for each in world.outcomes] == ["delivered", "refused"]
    last = world.outcomes[-1]
    assert (last.billed, last.value, last.reason) == ("0", "5", WHY)
    assert last.first_unproven is None, "the attempt that was taken is the one that was rejected: nothing is left"
    book = world.delivery.ledger.books["ai-tokens"]
    assert (book.delivered.totals, book.refused.totals) == (0, 1)
    assert (book.delivered.value, book.refused.events) == (0, 3)
    assert world.balanced()


def test_a_rounded_total_goes_back_with_what_was_rounded_off() -> None:
    world = World()
    attempt = world.sent(value="1234567890123.456")
    world.delivery.answered(attempt, OK, world.now)
    world.commit()
    assert world.delivery.ledger.books["ai-tokens"].rounded.totals == 1
    world.log.append(rejection(world, attempt.identifier))
    world.run(world.now)
    book = world.delivery.ledger.books["ai-tokens"]
    assert (book.rounded.totals, book.rounded.value, book.delivered.value) == (0, 0, 0)
    assert world.balanced()


def test_two_reports_of_one_event_count_once_in_this_life_and_the_next() -> None:
    world, identifier = delivered()
    world.log += [rejection(world, identifier), rejection(world, identifier, "evt_2")]
    world.run(world.now)
    world.restart()
    world.log.append(rejection(world, identifier, "evt_3"))
    world.run(world.now)
    assert [each.how for each in world.outcomes] == ["delivered", "refused"]
    assert world.balanced()


def test_of_a_total_that_is_still_tried_the_reported_attempt_counts_for_nothing() -> None:
    """The first attempt was taken, its answer lost, and the event rejected. The second one is told that it is there."""
    world = World()
    attempt = world.sent()
    world.stripe.post(attempt, world.now)
    world.delivery.answered(attempt, Lost(), world.now)
    world.log.append(of_unfinished(attempt, "evt_1", world.now))
    world.read()
    world.restart()
    world.log.append(of_unfinished(attempt, "evt_2", world.now))
    world.run(world.now + 10 * MINUTE)
    assert [(each.how, each.reason) for each in world.outcomes] == [("refused", "code: why")]
    assert world.balanced()
    world.log.append(rejection(world, attempt.identifier, "evt_3"))
    world.run(world.now)
    assert len(world.outcomes) == 1, "it is refused already"
    assert world.balanced()


def test_a_report_that_is_repeated_for_days_makes_the_entry_no_larger() -> None:
    """Its total is being tried, and so Stripe is asked to say it again: every time it is read once more."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.log += [of_unfinished(attempt, f"evt_{number}", world.now) for number in range(100)]
    world.read()
    world.commit()
    assert [each.key for each in world.entry(attempt.identifier).rejected] == [attempt.key]


def test_an_earlier_attempt_that_was_rejected_does_not_take_back_a_later_one_that_was_taken() -> None:
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.log.append(
        Rejection(attempt.identifier, attempt.key, "code", "why", "evt_1", world.now, msgspec.Raw(b"null"))
    )
    world.run(world.now + 10 * MINUTE)
    assert [(each.how, each.key) for each in world.outcomes] == [("delivered", f"{attempt.identifier}:1")]


def test_of_a_total_that_has_ended_meanwhile_only_its_outcome_tells_whether_it_is_taken_back() -> None:
    """Unfinished when its outcome was looked for, and delivered by a later attempt when the rejection is read."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.run(world.now + 10 * MINUTE)
    world.log.append(of_unfinished(attempt, "evt_1", world.now))
    world.run(world.now)
    assert [(each.how, each.key) for each in world.outcomes] == [("delivered", f"{attempt.identifier}:1")]
    assert "has ended meanwhile" in world.delivery.notes[-1].text
    world.log.append(rejection(world, f"{attempt.identifier}:1"))
    world.run(world.now)
    assert [each.how for each in world.outcomes] == ["delivered", "refused"], "said again, it counts"
    assert world.balanced()


def test_a_parked_total_keeps_what_stripe_reported_of_it() -> None:
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(24 * HOUR)
    world.run(world.now)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    world.log.append(
        Rejection(attempt.identifier, attempt.key, "code", "why", "evt_1", world.now, msgspec.Raw(b"null"))
    )
    world.run(world.now)
    (told,) = world.entry(attempt.identifier).rejected
    assert (told.key, told.why) == (attempt.key, "code: why")
    assert world.parked() == {attempt.identifier: "in_doubt"}


@pytest.mark.parametrize(
    ("how", "key", "billed_as", "rejected", "taken_back"),
    [
        ("delivered", "tm1-a", "tm1-a", "tm1-a", True),
        ("delivered", "tm1-a:1", "tm1-a", "tm1-a:1", True),
        ("delivered", "tm1-a:1", "tm1-a", "tm1-a", False),
        ("duplicate", "tm1-a:2", "tm1-a", "tm1-a", True),
        ("duplicate", "tm1-a:2", "tm1-a", "tm1-a:1", True),
        ("duplicate", "tm1-a-g2:1", "tm1-a-g2", "tm1-a", False),
        ("duplicate", "tm1-a-g2:1", "tm1-a-g2", "tm1-a-g2", True),
        ("discarded", None, "tm1-a", "tm1-a", False),
        ("unbilled", None, "tm1-a", "tm1-a", False),
    ],
)
def test_which_event_bills_a_total(
    how: str, key: str | None, billed_as: str, rejected: str, *, taken_back: bool
) -> None:
    assert rejects(how, key, billed_as, rejected) is taken_back  # type: ignore[arg-type]  # words, as parameters


@pytest.mark.parametrize(("how", "left"), [("delivered", False), ("duplicate", True)])
def test_what_may_be_left_of_a_rejected_total(how: str, *, left: bool) -> None:
    """Of several attempts of which one was taken, nobody knows which one that was, nor whether another one followed."""
    world, _ = delivered()
    billed = msgspec.structs.replace(world.outcomes[0], how=how, attempts=3)
    assert billed.first_unproven is not None
    taken_back = refused(billed, WHY, world.now)
    assert (taken_back.first_unproven is not None) is left
    assert [*finished(taken_back)[1]] == ([place_of("cus_alice", "ai_tokens", billed.timestamp)] if left else [])


@pytest.mark.parametrize(
    ("key", "total"),
    [
        ("tm1-20261101T1200Z-1m-r0-543db3", "tm1-20261101T1200Z-1m-r0-543db3"),
        ("tm1-20261101T1200Z-1m-r0-543db3:12", "tm1-20261101T1200Z-1m-r0-543db3"),
        ("tm1-20261101T1200Z-1m-r0-543db3-g2", "tm1-20261101T1200Z-1m-r0-543db3"),
        ("tm1-20261101T1200Z-1m-r0-543db3-g12:3", "tm1-20261101T1200Z-1m-r0-543db3"),
        ("9f3e9c9a-8a0e-4d6e", None),
        ("", None),
    ],
)
def test_a_key_tells_its_total(key: str, total: str | None) -> None:
    assert total_of(key) == total


def test_reports_and_comparisons_are_kept_once_and_not_for_ever() -> None:
    world, _ = delivered()
    report = Report("evt_1", world.now, "ai_tokens", 0, 10, {"meter_event_customer_not_found": 7}, 0)
    early = Comparison(world.now, {"ai_tokens": Compared(world.now, 0, 86_400, equal=3)})
    late = Comparison(world.now + 1, {"ai_tokens": Compared(world.now + 1, 0, 86_400, differs=1, missing="5")})
    world.log += [report, report, late, early]
    world.run(world.now)
    assert [key for key in world.durable if key.startswith(b"report/")] == [b"report/evt_1"]
    world.restart()
    assert world.delivery.reports.comparison == late, "the later one, in whichever order they came"
    world.wait(91 * DAY)
    world.total()
    world.run(world.now)
    assert [key for key in world.durable if b"/" in key and not key.startswith(b"ledger/")] == [b"comparison/"]


def test_who_compares_one_meter_says_nothing_about_the_others() -> None:
    world, _ = delivered()
    both = {name: Compared(world.now, 0, 86_400, equal=1) for name in ("ai_tokens", "calls")}
    later = Compared(world.now + HOUR, 0, 86_400, differs=1, surplus="2")
    world.log += [
        Comparison(world.now, both),
        Comparison(later.at, {"calls": later}),
        Comparison(world.now, {"calls": both["calls"]}),
    ]
    world.run(world.now)
    world.restart()
    assert world.delivery.reports.comparison == Comparison(later.at, both | {"calls": later})
    fresh = Compared(world.now + 91 * DAY, 0, 86_400)
    world.log.append(Comparison(fresh.at, {"calls": fresh}))
    world.run(world.now)
    assert world.delivery.reports.comparison == Comparison(fresh.at, {"calls": fresh}), "that meter is long gone"


def test_a_report_is_answered_by_the_next_comparison_of_its_meter() -> None:
    reports = [
        Report(f"evt_{name}_{at}", at, name, 0, 10, {"no_meter": 1}, 0)
        for name in ("tokens", "calls", None)
        for at in (10, 20, 30)
    ]
    compared = Comparison(25, {"tokens": Compared(20, 0, 86_400), "other": Compared(25, 0, 86_400)})
    entries = [(f"report/{each.report}".encode(), encode(each)) for each in reports]

    assert unanswered(entries) == reports
    left = unanswered([(b"tm1-1", b"?"), (b"comparison/", encode(compared)), *entries])

    assert [(each.event_name, each.at) for each in left] == [
        *(("tokens", at) for at in (20, 30)),
        *(("calls", at) for at in (10, 20, 30)),
        (None, 30),
    ]


def test_what_cannot_be_read_is_refused() -> None:
    world, _ = delivered()
    world.durable[b"report/evt_1"] = b"{"
    with pytest.raises(EntryError, match="report/evt_1"):
        world.restart()
    world.durable[b"report/evt_1"] = b'{"kind":"advance","partition":0,"offset":1,"clock":2}'
    with pytest.raises(EntryError, match="newer tallyman"):
        world.restart()


def test_in_shadow_everything_is_done_but_sending() -> None:
    world = World(names={"alice": "cus_alice", "free": None}, shadow=True)
    billed, free = world.total("alice"), world.total("free")
    unmapped, zero = world.total("carol"), world.total("alice", "0")
    world.run(world.now + MINUTE)
    assert {each.identifier: each.how for each in world.outcomes} == {
        billed: "shadowed",
        free: "unbilled",
        zero: "zero",
    }
    assert world.parked() == {unmapped: "unmapped"}
    assert world.stripe.billed == []
    assert world.outcomes[0].stripe_customer == "cus_alice", "to be compared with what Stripe has"
    assert world.balanced()
    world.names.known["carol"] = "cus_carol"
    world.delivery.remap(world.names, world.now)
    world.run(world.now)
    assert world.outcomes[-1].how == "shadowed"


def test_who_goes_from_sending_to_shadow_sends_nothing_more() -> None:
    """What may be at Stripe is nobody's guess then: it is in doubt. What was not tried is somebody else's to bill."""
    world = World()
    tried = world.sent("alice")
    world.delivery.answered(tried, Lost(), world.now)
    waiting = world.total("bob")
    world.read()
    world.commit()
    busy = world.must_send()
    world.delivery.answered(busy, Answer(429, "invalid_request_error", "lock_timeout"), world.now)
    world.commit()
    world.shadow = True
    world.restart()
    world.run(world.now + HOUR)
    assert world.parked() == {tried.identifier: "in_doubt"}
    assert [(each.identifier, each.how) for each in world.outcomes] == [(waiting, "shadowed")]
    assert world.stripe.billed == []


def test_the_oldest_usage_that_waits_is_known_by_meter() -> None:
    world = World(in_flight=20)
    first = world.total("alice")
    world.total("alice")
    world.total("carol", meter="storage")
    world.read()
    stamp = world.log[0].timestamp  # type: ignore[union-attr]  # a total
    assert world.delivery.oldest_pending() == {"ai-tokens": stamp}
    ((group, when),) = world.delivery.oldest_parked().items()
    assert (group[0], str(group[1]), when) == ("storage", "unmapped", stamp)
    assert world.delivery.aside == 1, "one customer has one seat of twenty"
    world.run(world.now)
    assert world.delivery.oldest_pending() == {}
    assert first in {each.identifier for each in world.outcomes}
    parked = next(iter(world.parked()))
    world.command("discard", parked)
    world.obey()
    assert world.delivery.oldest_parked() == {}
