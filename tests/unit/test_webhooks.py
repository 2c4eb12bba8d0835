"""Stripe notifies us of what it rejected: who is believed, what is taken, when it is repeated, and what follows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import stripe as sdk
import yaml
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from consumer import totals
from consumer.config import load
from consumer.deliver.entries import Entry, Outcome, State, decode_outcome, encode_outcome, outcome, pack, refused
from consumer.runtime import archive, reports, service, stripe_reads
from consumer.runtime.metrics import Reports
from consumer.runtime.reports import Malformed, Sample, matched, understood
from consumer.runtime.webhooks import LARGEST, Webhooks, refusal
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_notifications import Destination, signature, thin
from consumer.sandbox.stripe_server import Clock, Fault, Instead, StripeStandIn
from consumer.storage import Append, Changes, Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Destination as To
from consumer.totals import Rejection, Report, Total
from tests.kafka.harness import until

SECRET: Final = "whsec_one"  # noqa: S105 - opens nothing
OTHER: Final = "whsec_other"
NOW: Final = 1_793_000_405
"""Seconds since the epoch."""
NOW_MS: Final = NOW * 1000
HOUR_MS: Final = 3_600_000
KIND: Final = "v1.billing.meter.error_report_triggered"
BODY: Final = b'{"id": "evt_1", "object": "v2.core.event"}'


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


# A server beside a store, and a Stripe that reports


def total(number: int = 1, customer: str = "alice") -> Total:
    start = NOW // 60 * 60 - 600
    return Total(
        f"tm1-{number}-{customer}", "test", "ai", "e", 0, start, "1m", 0, start * 1000, customer, "5", 3, start + 7,
        0, 9, To("tokens"),
    )  # fmt: skip


def delivered(number: int = 1, *, key: str = "", how: Any = "delivered", **entry: Any) -> Outcome:
    """What became of a total whose last attempt had this key."""
    of = total(number)
    return outcome(Entry(of, customer="cus_alice", attempts=1, **entry), how, NOW_MS, key=key or of.identifier)


class HostClock:
    """The service's clock, as the stand-in has it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self) -> int:
        return int(self._clock() * 1000)

    def elapsed(self) -> int:
        return int(self._clock() * 1000)


class Desk:
    """A configured store, an account at Stripe, and the server of the webhook."""

    def __init__(self, folder: Path, stripe: StripeStandIn) -> None:
        self.folder = folder
        self.stripe = stripe
        self.path = folder / "tallyman.db"
        self.clock = HostClock(stripe.clock)
        self.ready = True
        self.registry = CollectorRegistry()
        self.observed = Reports(self.registry)
        self.config = configured(folder, webhook={"port": 0})
        with self.store(create=True):
            pass

    def store(self, *, create: bool = False) -> Any:
        return SqliteStore.open(self.path, now=self.clock.now, create=create, lock=create)

    def finish(self, *outcomes: Outcome) -> None:
        """Totals have come to their end."""
        with self.store() as store:
            store.append(Append(Log.OUTCOMES, each.identifier.encode(), encode_outcome(each)) for each in outcomes)

    def keep(self, *entries: Entry) -> None:
        """Totals are not finished."""
        with self.store() as store:
            puts = {each.total.identifier.encode(): pack(each) for each in entries}
            store.commit(Stage.DELIVER, {0: Changes(1, puts)})

    def told(self) -> list[totals.Record]:
        """What stage 2 is told."""
        with self.store() as store:
            return [totals.decode(each.value) for each in store.read(Log.TOTALS, 0, 1000)]

    def report(self, *keys: str, code: str = "meter_event_customer_not_found", **changes: Any) -> dict[str, Any]:
        """Stripe has rejected the events of these keys, just now."""
        return self.said(reported(*keys, code=code, **changes))

    def said(self, event: dict[str, Any]) -> dict[str, Any]:
        event = {**event, "id": f"evt_{len(self.stripe.model._reports) + 1}"}
        self.stripe.model._reports.append(event)
        return event

    def counted(self, result: str) -> float | None:
        return self.registry.get_sample_value("tallyman_stripe_reports_total", {"result": result})

    @asynccontextmanager
    async def server(self) -> AsyncIterator[Caller]:
        server = Webhooks(
            [SECRET],
            livemode=False,
            clock=self.clock,
            reading=lambda: stripe_reads.reading(
                SECRET_KEY, api_base=self.stripe.url, livemode=False, clock=self.clock, attempts=1
            ),
            archive=lambda: archive.opened(self.config, now=self.clock.now),
            ready=lambda: self.ready,
            observe=self.observed,
        )
        port = await server.start("127.0.0.1", 0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            try:
                yield Caller(session, self.stripe.clock)
            finally:
                await server.stop()

    def run(self, story: Callable[[Caller], Awaitable[None]]) -> None:
        """Tell a story of calls."""

        async def told() -> None:
            async with self.server() as caller:
                await story(caller)

        asyncio.run(told())

    def send(self, *events: dict[str, Any]) -> list[int]:
        """Notify of these, one after the other, and return how each was answered."""
        answers: list[int] = []

        async def story(caller: Caller) -> None:
            answers.extend([await caller.notify(each) for each in events])

        self.run(story)
        return answers


class Caller:
    """Whoever calls the server."""

    def __init__(self, session: aiohttp.ClientSession, clock: Clock) -> None:
        self.session = session
        self.clock = clock

    async def post(self, body: bytes, *, secret: str | None = SECRET, path: str = "/stripe") -> int:
        headers = {} if secret is None else {"Stripe-Signature": signature(body, secret, int(self.clock()))}
        async with self.session.post(path, data=body, headers=headers) as answer:
            assert not await answer.text() or answer.status >= 400
            return answer.status

    async def notify(self, event: dict[str, Any]) -> int:
        return await self.post(thin(event))


def configured(folder: Path, **changes: Any) -> Any:
    file = folder / "tallyman.yaml"
    sections: dict[str, Any] = {
        "pipeline": "test",
        "storage": {"kind": "sqlite", "path": str(folder / "tallyman.db")},
        "stripe": {"livemode": False},
        "meters": [
            {"name": "ai", "event_types": ["used"], "aggregation": "count", "stripe": {"event_name": "tokens"}},
        ],
    }
    environ = {"STRIPE_SECRET_KEY": SECRET_KEY, **changes.pop("environ", {})}
    file.write_text(yaml.safe_dump(sections | changes))
    return load(file, environ)


def reported(*keys: str, code: str = "meter_event_customer_not_found", count: int = 0, **changes: Any) -> Any:
    """An event of Stripe's, in full."""
    samples = [{"error_message": f"No such customer: {key}", "request": {"identifier": key}} for key in keys]
    kinds = [{"code": code, "error_count": count or len(keys), "sample_errors": samples}]
    return {
        "id": "evt_1",
        "object": "v2.core.event",
        "type": KIND,
        "created": "2026-10-26T07:40:20.000Z",
        "livemode": False,
        "related_object": {"id": "mtr_0000000000000001", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"},
        "data": {
            "developer_message_summary": "There are invalid meter events.",
            "validation_start": "2026-10-26T07:40:00.000Z",
            "validation_end": "2026-10-26T07:40:10.500Z",
            "reason": {"error_count": len(keys), "error_types": kinds},
        },
    } | changes


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with StripeStandIn(clock=Clock(lambda: float(NOW)), accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        yield Desk(tmp_path, stripe)


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


def meant(desk: Desk, *keys: str) -> list[tuple[str, str, str]]:
    """Identifier, key and reason of the totals that a report with these keys rejects."""
    with desk.store() as store:
        found = matched(store, understood("evt_1", reported(*keys), NOW_MS), NOW_MS)
    thens = [decode_outcome(bytes(each.rejection.outcome)) for each in found]
    assert all((each.how, each.billed) == ("refused", "0") for each in thens)
    return [(each.rejection.identifier, each.rejection.key, each.customer) for each in found]


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
        ("tm1-1-alice", "tm1-1-alice:1", "alice"),
        ("tm1-2-alice", "tm1-2-alice-g2", "alice"),
    ], "each total once"


def test_a_total_that_is_not_finished_remembers_each_attempt_that_was_rejected(desk: Desk) -> None:
    desk.keep(Entry(total(1), State.RETRY, "cus_alice", first_unproven=NOW_MS, attempts=2), Entry(total(2)))
    assert meant(desk, "tm1-1-alice", "tm1-1-alice:1", "tm1-3-alice") == [
        ("tm1-1-alice", "tm1-1-alice", "alice"),
        ("tm1-1-alice", "tm1-1-alice:1", "alice"),
    ]


def test_what_was_finished_long_before_is_not_searched(desk: Desk) -> None:
    """Stripe looked at these events now; what we heard of two hours ago is another matter."""
    desk.stripe.clock.move_to(NOW - 2 * 3600)
    desk.finish(delivered(1))
    desk.stripe.clock.move_to(NOW - 1800)
    desk.finish(delivered(2))
    assert meant(desk, "tm1-1-alice", "tm1-2-alice") == [("tm1-2-alice", "tm1-2-alice", "alice")]


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
    with pytest.raises(service.ServiceError, match=says) as refused:
        service.webhook_secrets(config)
    assert SECRET not in str(refused.value)


def test_secrets_can_be_several_and_nobody_needs_one_without_a_webhook(tmp_path: Path) -> None:
    environ = {"STRIPE_WEBHOOK_SECRET": f"{SECRET}, {OTHER}\n"}
    config = configured(tmp_path, webhook={}, environ=environ)
    assert (config.webhook.host, config.webhook.port) == ("0.0.0.0", 9465)  # noqa: S104 - the documented default
    assert service.webhook_secrets(config) == [SECRET, OTHER]
    assert service.webhook_secrets(configured(tmp_path)) == []
