"""Stripe notifies us of what it rejected: who is believed, what is taken, and when it is repeated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stripe as sdk
from structlog.testing import capture_logs

from consumer.deliver.entries import Entry, Reason, State, decode_outcome
from consumer.runtime import preconditions
from consumer.runtime.webhooks import LARGEST, refusal
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_notifications import Destination, signature, thin
from consumer.sandbox.stripe_server import Clock, Fault, Instead, StripeStandIn
from consumer.storage import Log
from consumer.totals import Rejection, Report
from tests.kafka.harness import until
from tests.unit.reporting import (
    BODY,
    NOW,
    NOW_MS,
    OTHER,
    SECRET,
    Caller,
    Desk,
    configured,
    delivered,
    reported,
    total,
)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with StripeStandIn(clock=Clock(lambda: float(NOW)), accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        yield Desk(tmp_path, stripe)


# Who is believed


def signed(body: bytes = BODY, *secrets: str, at: int = NOW, scheme: str = "v1") -> str:
    """A header as Stripe makes it, by these secrets."""
    given = [signature(body, each, at).partition("v1=")[2] for each in secrets or (SECRET,)]
    return ",".join([f"t={at}", *(f"{scheme}={each}" for each in given)])


@pytest.mark.parametrize(
    "header",
    [
        signed(),
        signed(BODY, OTHER, "whsec_third", SECRET),
        f"{signed(scheme='v0')},{signed().partition(',')[2]}",
        signed(BODY, "whsec_old"),
        signed(at=NOW - 300),
        signed(at=NOW + 300),
        sdk.WebhookSignature.generate_signature_header(BODY.decode(), SECRET, NOW),
    ],
    ids=["one", "several signatures", "with another scheme", "another secret of ours", "old", "ahead", "Stripe's own"],
)
def test_what_is_signed_with_a_secret_of_ours_is_believed(header: str) -> None:
    assert refusal(header, BODY, [SECRET, "whsec_old"], NOW) is None


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "not signed"),
        ("", "not signed"),
        ("t=,v1=", "not signed"),
        (f"t={NOW}", "not signed"),
        (signed().partition(",")[2], "not signed"),
        (signed(scheme="v0"), "not signed"),
        (signed().replace(f"t={NOW}", f"t=+{NOW}"), "not signed"),
        (signed().replace(f"t={NOW}", f"t={'9' * 5000}"), "not signed"),
        (f"t={NOW},v1=", "another secret"),
        (f"t={NOW},v1=\xff", "another secret"),
        (signed(BODY, OTHER), "another secret"),
        (signed(BODY + b" "), "another secret"),
        (signed().replace(str(NOW), str(NOW + 1)), "another secret"),
        (signed(at=NOW - 301), "301 s ago"),
        (signed(at=NOW + 301), "-301 s ago"),
        ("t=1,t=2;v1", "not signed"),
    ],
)
def test_nobody_else_is(header: str | None, says: str) -> None:
    why = refusal(header, BODY, [SECRET], NOW)
    assert why is not None
    assert says in why


# What is taken


def test_an_event_that_was_rejected_is_told_beside_its_total(desk: Desk) -> None:
    desk.finish(delivered(1), delivered(2))
    event = desk.report("tm1-2-alice", "somebody-else", count=7)
    with capture_logs() as logs:
        assert desk.send(event) == [200]
    rejection, report = desk.told()
    assert isinstance(rejection, Rejection)
    assert (rejection.identifier, rejection.key, rejection.report) == ("tm1-2-alice", "tm1-2-alice", event["id"])
    assert (rejection.code, rejection.message) == (
        "meter_event_customer_not_found",
        "No such customer: tm1-2-alice",
    )
    then = decode_outcome(bytes(rejection.outcome))
    assert (then.how, then.billed, then.value, then.at) == ("refused", "0", "5", NOW_MS)
    assert then.reason == "meter_event_customer_not_found: No such customer: tm1-2-alice"
    begin = 1_793_000_400
    assert report == Report(event["id"], NOW_MS, "tokens", begin, begin + 11, {"meter_event_customer_not_found": 7}, 1)
    with desk.store() as store:
        assert [each.key for each in store.read(Log.TOTALS, 0, 10)] == [b"alice", event["id"].encode()]
    assert desk.counted("taken") == 1
    assert desk.registry.get_sample_value("tallyman_stripe_rejected_totals_total") == 1
    code = {"code": "meter_event_customer_not_found"}
    assert desk.registry.get_sample_value("tallyman_stripe_rejected_events_total", code) == 7
    (line,) = [each for each in logs if each["event"] == "stripe_rejected_events"]
    assert (line["code"], line["count"], line["named"], line["event_name"]) == (code["code"], 7, 1, "tokens")
    assert line["log_level"] == "warning"
    assert "alice" not in json.dumps(logs), "customers are not logged"


def test_a_report_is_taken_once_however_often_it_is_notified(desk: Desk) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")

    async def story(caller: Caller) -> None:
        assert set(await asyncio.gather(*(caller.notify(event) for _ in range(4)))) == {200}
        assert await caller.notify(event) == 200

    desk.run(story)
    assert len(desk.told()) == 2
    assert (desk.counted("taken"), desk.counted("repeated")) == (1, 4)


def test_what_is_no_report_or_of_the_other_mode_is_ignored(desk: Desk) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")
    others: list[dict[str, Any]] = [
        {"type": "v1.billing.meter.created"},
        {"livemode": True},
        {"object": "event"},
        {"type": ""},
    ]
    assert desk.send(*(event | other for other in others)) == [200] * 4
    assert desk.told() == []
    assert desk.counted("ignored") == 4


def test_events_that_no_meter_takes_are_reported_without_a_meter(desk: Desk) -> None:
    event = desk.report("x", code="no_meter", type="v1.billing.meter.no_meter_found", related_object=None)
    assert desk.send(event) == [200]
    (report,) = desk.told()
    assert isinstance(report, Report)
    assert (report.event_name, report.errors, report.named) == (None, {"no_meter": 1}, 0)


def test_a_key_that_may_not_read_meters_is_enough(desk: Desk) -> None:
    desk.finish(delivered())
    desk.stripe.model.keys[SECRET_KEY] = frozenset({"event_read"})
    assert desk.send(desk.report("tm1-1-alice"), desk.report("unknown")) == [200, 200]
    names = [each.event_name for each in desk.told() if isinstance(each, Report)]
    assert names == ["tokens", None], "a total that is named tells it as well"


# What is not


def test_nothing_is_read_that_is_not_signed(desk: Desk) -> None:
    event = desk.report("tm1-1-alice")
    secretive = b'{"id": "evt_1", "customer": "cus_secret"'

    async def story(caller: Caller) -> None:
        assert await caller.post(thin(event), secret=None) == 400
        assert await caller.post(thin(event), secret=OTHER) == 400
        assert await caller.post(secretive, secret=OTHER) == 400, "the signature comes before the syntax"

    with capture_logs() as logs:
        desk.run(story)
    assert desk.told() == []
    assert desk.counted("refused_signature") == 3
    assert desk.stripe.model.stats["requests"] == 0, "Stripe is not asked"
    assert "cus_secret" not in json.dumps(logs)


def test_there_is_one_way_in_and_it_is_narrow(desk: Desk) -> None:
    async def story(caller: Caller) -> None:
        assert await caller.post(BODY, path="/") == 404
        assert await caller.post(BODY, path="/stripe/more") == 404
        for method in ("GET", "PUT", "DELETE"):
            async with caller.session.request(method, "/stripe") as answer:
                assert answer.status == 405
        assert await caller.post(b" " * LARGEST) == 200, "read, and no notification"
        assert await caller.post(b" " * (LARGEST + 1)) == 413

    desk.run(story)
    assert desk.counted("failed") == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[]", b'{"object": "v2.core.event"}', b'{"id": "../secrets"}', b"[" * 100_000]
)
def test_what_cannot_be_read_is_not_asked_for_again(desk: Desk, body: bytes) -> None:
    async def story(caller: Caller) -> None:
        assert await caller.post(body) == 200

    desk.run(story)
    assert desk.counted("failed") == 1


@pytest.mark.parametrize(
    "answer",
    [
        Instead(404, b'{"error": {"type": "invalid_request_error", "message": "No such event"}}'),
        Instead(200, json.dumps(reported(livemode=True)).encode()),
        Instead(200, json.dumps(reported(data=None)).encode()),
        Instead(200, b'{"id": "evt_1", "object": "v2.core.event", "livemode": false}'),
        Instead(200, json.dumps(reported(data={"reason": {"error_types": "many"}})).encode()),
        Instead(200, json.dumps(reported(data={"reason": {"error_types": [{"code": 5}]}})).encode()),
    ],
    ids=["gone", "of the other mode", "null", "missing", "of another shape", "of another type"],
)
def test_what_can_never_be_handled_is_said_and_counted_and_not_asked_for_again(desk: Desk, answer: Instead) -> None:
    event = desk.report("tm1-1-alice")
    desk.stripe.faults.reads = [answer]
    with capture_logs() as logs:
        assert desk.send(event) == [200]
    assert desk.counted("failed") == 1
    assert [each["log_level"] for each in logs if each["event"] == "stripe_report_failed"] == ["error"]
    assert desk.told() == []


@pytest.mark.parametrize(
    "wrong",
    [
        Fault.LOSE,
        Fault.ERROR,
        Fault.RATE_LIMITED,
        Instead(503, b"<html>"),
        Instead(200, b"<html>"),
        Instead(401, b'{"error": {"type": "invalid_request_error", "message": "Invalid API Key"}}'),
        Instead(403, b'{"error": {"type": "invalid_request_error", "message": "May not"}}'),
    ],
)
def test_what_stripe_does_not_say_now_is_repeated_later(desk: Desk, wrong: Any) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")
    desk.stripe.faults.reads = [wrong]
    assert desk.send(event, event) == [503, 200]
    assert (desk.counted("postponed"), desk.counted("taken")) == (1, 1)
    assert len(desk.told()) == 2


def test_while_a_total_is_tried_its_report_is_told_and_repeated(desk: Desk) -> None:
    """It may have ended when stage 2 reads of it; then the outcome tells by which attempt."""
    event = desk.report("tm1-1-alice", "tm1-2-alice")
    tried = Entry(total(1), State.RETRY, "cus_alice", first_unproven=NOW_MS, attempts=1)
    desk.finish(delivered(2))
    desk.keep(tried)
    assert desk.send(event, event) == [503, 503]
    told = desk.told()
    assert {type(each) for each in told} == {Rejection}, "no report yet"
    assert [bytes(each.outcome) == b"null" for each in told if isinstance(each, Rejection)] == [True, False] * 2
    assert desk.registry.get_sample_value("tallyman_stripe_rejected_totals_total") == 0

    desk.finish(delivered(1, key="tm1-1-alice:1"))
    assert desk.send(event) == [200]
    _, report = desk.told()[len(told) :]
    assert isinstance(report, Report)
    assert report.named == 1, "another attempt delivered the first one"


def test_a_parked_total_keeps_nobody_waiting(desk: Desk) -> None:
    desk.keep(Entry(total(1), State.PARKED, "cus_alice", first_unproven=NOW_MS, reason=Reason.IN_DOUBT, parking=1))
    assert desk.send(desk.report("tm1-1-alice")) == [200]
    rejection, _ = desk.told()
    assert isinstance(rejection, Rejection)
    assert bytes(rejection.outcome) == b"null"


def test_without_its_store_the_service_takes_nothing(desk: Desk) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")
    away = desk.path.rename(desk.path.with_suffix(".away"))
    assert desk.send(event) == [503]
    away.rename(desk.path)
    assert desk.send(event) == [200]
    assert len(desk.told()) == 2


def test_before_its_state_is_there_the_service_takes_nothing(desk: Desk) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")

    async def story(caller: Caller) -> None:
        desk.ready = False
        assert await caller.notify(event) == 503
        desk.ready = True
        assert await caller.notify(event) == 200

    desk.run(story)
    assert len(desk.told()) == 2


def test_others_are_answered_while_stripe_is_waited_for(desk: Desk) -> None:
    event = desk.report("tm1-1-alice")
    desk.stripe.faults.reads = [Fault.HANG]

    async def story(caller: Caller) -> None:
        waiting = asyncio.create_task(caller.notify(event))
        while not desk.stripe.model.stats["requests"]:
            assert await caller.post(BODY, secret=None) == 400
        assert not waiting.done()
        await asyncio.to_thread(desk.stripe.down)
        assert await waiting == 503
        await asyncio.to_thread(desk.stripe.up)
        assert await caller.notify(event) == 200

    desk.run(story)


# The stand-in notifies as Stripe does, and the service is told whom to believe


def test_the_stand_in_notifies_until_it_is_believed(desk: Desk) -> None:
    desk.finish(delivered())
    event = desk.report("tm1-1-alice")

    async def story(caller: Caller) -> None:
        desk.ready = False
        await asyncio.to_thread(desk.stripe.notify, Destination(str(caller.session._build_url("/stripe")), SECRET))
        answers = desk.stripe.notifications.answers
        await asyncio.to_thread(until, lambda: 503 in answers, "it is not ready")
        desk.ready = True
        await asyncio.to_thread(until, lambda: 200 in answers, "it has taken it")

    desk.run(story)
    assert [each.report for each in desk.told() if isinstance(each, Report)] == [event["id"]]
    assert b"data" not in thin(event)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "there is no secret to know Stripe by: set STRIPE_WEBHOOK_SECRET"),
        (" , ", "there is no secret"),
        (SECRET_KEY, "is no signing secret"),
        (f"{SECRET},{SECRET_KEY}", "is no signing secret"),
    ],
)
def test_who_takes_notifications_has_to_know_stripe(tmp_path: Path, given: str, says: str) -> None:
    config = configured(tmp_path, webhook={}, environ={"STRIPE_WEBHOOK_SECRET": given})
    with pytest.raises(preconditions.ServiceError, match=says) as refused:
        preconditions.webhook_secrets(config)
    assert SECRET not in str(refused.value)


def test_secrets_can_be_several_and_nobody_needs_one_without_a_webhook(tmp_path: Path) -> None:
    environ = {"STRIPE_WEBHOOK_SECRET": f"{SECRET}, {OTHER}\n"}
    config = configured(tmp_path, webhook={}, environ=environ)
    assert (config.webhook.host, config.webhook.port) == ("0.0.0.0", 9465)  # noqa: S104 - the documented default
    assert preconditions.webhook_secrets(config) == [SECRET, OTHER]
    assert preconditions.webhook_secrets(configured(tmp_path)) == []
