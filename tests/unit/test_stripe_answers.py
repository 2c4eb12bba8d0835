"""What Stripe may answer, as it comes over HTTP: what it proves, and what becomes of the total.

Each answer comes from the stand-in, through the real client, to a real delivery: once to a sure first attempt, and once
to one that follows an attempt of which nobody knows the end. Then what was wrong is put right, and Stripe must have
billed the total once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import aiohttp
import msgspec
import pytest

from consumer.deliver.answers import Heard, Verdict, judge, throttled
from consumer.deliver.delivery import Attempt
from consumer.deliver.entries import total_of
from consumer.runtime import stripe as runtime
from consumer.runtime.stripe import Stripe, WrongMode
from consumer.sandbox.stripe import SECRET_KEY, StripeModel, lock_timeout, rate_limited
from consumer.sandbox.stripe_server import Clock, Fault, Instead, StripeStandIn, Wrong
from consumer.sandbox.stripe_wire import Refused
from tests.unit.delivery_world import HOUR, MINUTE, World

LIVE: Final = "sk_live_standin"
READER: Final = "rk_test_reader"
DAY_S: Final = 86_400
IMPATIENT: Final = aiohttp.ClientTimeout(total=1, connect=0.3, sock_connect=0.3)
"""Seconds that a request may take where the answer is that there is none."""

HTML: Final = b"<html><body>Bad Gateway</body></html>"
LATIN: Final = "<html>Zugang verweigert: Schlüssel ungültig</html>".encode("latin-1")


class Scene:
    """A delivery, the client that it sends by, and the account of the stand-in."""

    def __init__(self, stand_in: StripeStandIn, world: World) -> None:
        self.stand_in = stand_in
        self.world = world
        self.model: StripeModel = stand_in.model
        self.base = stand_in.url
        self.key = SECRET_KEY
        self.sends: Callable[[Attempt], Attempt] = lambda attempt: attempt
        self.opened = ExitStack()

    async def send(self, attempt: Attempt) -> Heard:
        """Over HTTP, by a client of its own."""
        client = Stripe(self.key, api_base=self.base, livemode=False, clock=self.world_clock)
        try:
            return await client.send(attempt)
        finally:
            await client.close()

    @property
    def world_clock(self) -> Any:
        return WorldClock(self.world)

    def next_are(self, *wrong: Wrong) -> None:
        self.stand_in.faults.script = [*wrong]

    def cure(self) -> None:
        """Whatever was wrong is right from now on."""
        self.opened.close()
        self.stand_in.faults.script.clear()
        self.stand_in.clock.move_to(self.world.now / 1000)
        self.base, self.key, self.sends = self.stand_in.url, SECRET_KEY, lambda attempt: attempt
        self.model.keys = dict.fromkeys((SECRET_KEY,))
        for event_name in ("ai_tokens", "unknown", "inactive"):
            if event_name not in self.model._meter_of or self.model._meter_of[event_name].status == "inactive":
                self.model.add_meter(event_name)
        for customer in ("cus_alice", "cus_bob"):
            self.model.add_customer(customer)

    async def until_idle(self) -> None:
        """Deliver until nothing is left that time alone brings on."""
        world, until = self.world, self.world.now + HOUR
        while world.now <= until:
            world.read()
            if world.delivery.due:
                world.commit()
            while (attempt := world.send()) is not None:
                if world.delivery.may_send(attempt, world.now):
                    world.delivery.answered(attempt, await self.send(attempt), world.now)
            if not world.delivery.due:
                wake = world.delivery.wake(world.now)
                if wake is None:
                    break
                world.now = wake
        world.commit()


class WorldClock:
    """The world's time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> int:
        return self._world.now

    def elapsed(self) -> int:
        return self._world.now


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    world = World()
    clock = Clock(lambda: world.now / 1000)
    keys = {SECRET_KEY: None, LIVE: None, READER: frozenset({"billing_meter_read"})}
    async with StripeStandIn(clock=clock, keys=keys) as stand_in:
        stand_in.model.add_meter("ai_tokens")
        stand_in.model.add_customer("cus_alice")
        made = Scene(stand_in, world)
        with made.opened:
            yield made


Prepared = Callable[[Scene, Attempt], Awaitable[None] | None]


@dataclass(frozen=True)
class Row:
    """One answer, and what we do about it."""

    what: str
    prepared: Prepared
    verdict: Verdict
    first: str
    """What becomes of a total of which this was surely the first attempt."""
    again: str
    """And of one that may have been tried before: its process was killed while it was sending."""
    key: str = "next"
    """The Idempotency-Key of the next attempt, where there is one."""
    slows: bool = False
    """Whether it says that all of us send too fast."""
    billed: bool = False
    """Whether the event is there after this answer."""
    impatient: bool = False
    customer: str = "alice"
    event_name: str = "ai_tokens"
    value: str = "5"


RETRY: Final = ("retry", "retry")
ANEW: Final = ("parked: collision", "retry")
REFUSED: Final = ("parked: refused", "parked: refused")
METER: Final = ("parked: meter", "parked: meter")
PAUSED: Final = ("retry, paused: unauthorised", "retry, paused: unauthorised")


def scripted(*wrong: Wrong) -> Prepared:
    return lambda scene, _: scene.next_are(*wrong)


def instead(status: int, body: bytes = b"", accepted: bool = False, **headers: str) -> Prepared:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return scripted(Instead(status, body, given, accepted))


def by_a_proxy(status: int, body: bytes = HTML, *, accepted: bool = False) -> Prepared:
    return instead(status, body, accepted, Content_Type="text/html", Server="a-proxy")


def said(refused: Refused, *, accepted: bool = False) -> Prepared:
    """One of Stripe's answers that the stand-in does not come to by itself."""
    answer = refused.answer
    return scripted(Instead(answer.status, answer.body, answer.headers, accepted))


def nothing(_scene: Scene, _attempt: Attempt) -> None:
    pass


async def sent_before(scene: Scene, attempt: Attempt) -> None:
    """Somebody has sent the very same."""
    await scene.send(attempt)


async def identifier_taken(scene: Scene, attempt: Attempt) -> None:
    """Somebody has sent the same under another key."""
    await scene.send(msgspec.structs.replace(attempt, key="another-key"))


async def key_taken(scene: Scene, attempt: Attempt) -> None:
    """Somebody has used the key for something else."""
    await scene.send(msgspec.structs.replace(attempt, identifier="another-identifier", value="7"))


async def stored_error(scene: Scene, attempt: Attempt) -> None:
    """The key has a 500 in store."""
    scene.next_are(Fault.ERROR)
    await scene.send(attempt)


async def stored_error_of_an_event(scene: Scene, attempt: Attempt) -> None:
    scene.next_are(Fault.ACCEPT_ERROR)
    await scene.send(attempt)


async def stored_refusal(scene: Scene, attempt: Attempt) -> None:
    """The key has a refusal in store, whose cause is gone."""
    del scene.model._customers["cus_alice"]
    await scene.send(attempt)
    scene.model.add_customer("cus_alice")


def years_late(scene: Scene, _attempt: Attempt) -> None:
    scene.stand_in.clock.advance(36 * DAY_S)


def ahead(scene: Scene, _attempt: Attempt) -> None:
    scene.stand_in.clock.advance(-2 * DAY_S)


def deactivated(scene: Scene, _attempt: Attempt) -> None:
    scene.model.add_meter("inactive", deactivated_at=1)


def deleted_customer(scene: Scene, _attempt: Attempt) -> None:
    scene.model.delete_customer("cus_alice")


def other_customer_key(scene: Scene, _attempt: Attempt) -> None:
    scene.model._meter_of["ai_tokens"].customer_key = "who"
    scene.opened.callback(setattr, scene.model._meter_of["ai_tokens"], "customer_key", "stripe_customer_id")


def other_value_key(scene: Scene, _attempt: Attempt) -> None:
    scene.model._meter_of["ai_tokens"].value_key = "much"
    scene.opened.callback(setattr, scene.model._meter_of["ai_tokens"], "value_key", "value")


def with_value(value: str) -> Prepared:
    """What could only be sent by a fault of ours."""

    def prepare(scene: Scene, _attempt: Attempt) -> None:
        scene.sends = lambda attempt: msgspec.structs.replace(attempt, payload={**attempt.payload, "value": value})
        scene.opened.callback(scene.model._contents.clear)

    return prepare


def with_key(key: str) -> Prepared:
    def prepare(scene: Scene, _attempt: Attempt) -> None:
        scene.key = key

    return prepare


def at(base: str) -> Prepared:
    def prepare(scene: Scene, _attempt: Attempt) -> None:
        scene.base = base

    return prepare


async def port_closed(scene: Scene, _attempt: Attempt) -> None:
    await scene.stand_in.close()


def over_tls(scene: Scene, _attempt: Attempt) -> None:
    """Who answers there does not speak TLS."""
    scene.base = scene.base.replace("http://", "https://")


async def reset_at_once(scene: Scene, _attempt: Attempt) -> None:
    """A connection is taken, and reset while TLS is being agreed on."""

    def taken(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(taken, "127.0.0.1", 0)
    scene.opened.callback(server.close)
    scene.base = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def nobody_takes_the_call(scene: Scene, _attempt: Attempt) -> None:
    """Somebody listens, and has no more room for connections: a packet that goes nowhere looks the same."""
    listening = scene.opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    for _ in range(3):
        waiting = scene.opened.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listening.getsockname())
    scene.base = f"http://127.0.0.1:{listening.getsockname()[1]}"


def busy_key() -> Refused:
    return Refused("in_use", "in progress", status=409, kind="idempotency_error", code="idempotency_key_in_use")


def error(status: int, **more: Any) -> Refused:
    return Refused("error", "Something went wrong", status=status, kind="api_error", **more)


EVENT: Final = b'{"object":"billing.meter_event","livemode":false,"identifier":"another"}'
REASONS: Final = ("global-concurrency", "global-rate", "endpoint-concurrency", "endpoint-rate", "resource-specific")

ROWS: Final = (
    # It is there
    Row("200", nothing, Verdict.DELIVERED, "delivered", "delivered", billed=True),
    Row("200, replayed", sent_before, Verdict.DELIVERED, "parked: collision", "delivered", billed=True),
    Row("400 duplicate identifier", identifier_taken, Verdict.DUPLICATE, "parked: collision", "duplicate", billed=True),
    Row("200, customer deleted", deleted_customer, Verdict.DELIVERED, "delivered", "delivered", billed=True),
    Row("200, 16 digits rounded", nothing, Verdict.DELIVERED, "delivered", "delivered", value="1234567890.123456", billed=True),  # noqa: E501 - one row
    # Refused
    Row("400 too old", years_late, Verdict.REFUSED, *REFUSED),
    Row("400 too far ahead", ahead, Verdict.REFUSED, *REFUSED),
    Row("400 unknown event name", nothing, Verdict.METER_REFUSED, *METER, event_name="unknown"),
    Row("400 inactive meter", deactivated, Verdict.METER_REFUSED, *METER, event_name="inactive"),
    Row("400 unknown customer", nothing, Verdict.REFUSED, *REFUSED, customer="bob"),
    Row("400 customer key missing", other_customer_key, Verdict.REFUSED, *REFUSED),
    Row("400 value key missing", other_value_key, Verdict.REFUSED, *REFUSED),
    Row("400 more than 15 digits", with_value("1234567890123456"), Verdict.REFUSED, *REFUSED),
    Row("400 no number", with_value("1e-05"), Verdict.REFUSED, *REFUSED),
    Row("400 empty value", with_value(""), Verdict.REFUSED, *REFUSED),
    Row("400 any other refusal", said(Refused("new", "We do not like it")), Verdict.REFUSED, *REFUSED),
    Row("400 to be retried", said(Refused("new", "Later", headers={"stripe-should-retry": "true"})), Verdict.UNPROVEN, *RETRY),  # noqa: E501 - one row
    # Keys
    Row("400 idempotency_error", key_taken, Verdict.MISMATCH, *ANEW),
    Row("500, replayed, not taken", stored_error, Verdict.UNPROVEN, *ANEW),
    Row("500, replayed, taken", stored_error_of_an_event, Verdict.UNPROVEN, *ANEW, billed=True),
    Row("400, replayed", stored_refusal, Verdict.UNPROVEN, *ANEW),
    Row("409 key in use", said(busy_key()), Verdict.BUSY, *RETRY, key="same"),
    # Not allowed
    Row("401", with_key("sk_test_wrong"), Verdict.UNAUTHORISED, *PAUSED),
    Row("403", with_key(READER), Verdict.UNAUTHORISED, *PAUSED),
    # Too fast, or locked
    *(
        Row(f"429 {reason}", said(rate_limited(reason)), Verdict.BUSY, *RETRY, key="same", slows=reason != REASONS[-1])
        for reason in REASONS
    ),
    Row("429 lock_timeout, no reason", scripted(Fault.LOCK_TIMEOUT), Verdict.BUSY, *RETRY, key="same"),
    Row("429 lock_timeout, own words", said(lock_timeout()), Verdict.BUSY, *RETRY, key="same"),
    Row("429, a reason and nothing else", instead(429, Stripe_Rate_Limited_Reason=REASONS[1]), Verdict.BUSY, *RETRY, key="same", slows=True),  # noqa: E501 - one row
    Row("409 too_many_concurrent_requests", said(Refused("busy", "Busy", status=409, code="too_many_concurrent_requests")), Verdict.BUSY, *RETRY, key="same"),  # noqa: E501 - one row
    # Broken
    Row("500, not taken", scripted(Fault.ERROR), Verdict.UNPROVEN, *RETRY),
    Row("500, taken", scripted(Fault.ACCEPT_ERROR), Verdict.UNPROVEN, *RETRY, billed=True),
    Row("500, to be retried", said(error(500, headers={"stripe-should-retry": "true"})), Verdict.UNPROVEN, *RETRY),
    Row("503 of Stripe", said(error(503)), Verdict.UNPROVEN, *RETRY),
    Row("400 api_error", said(error(400)), Verdict.UNPROVEN, *RETRY),
    # Somebody else's
    *(
        Row(f"{status} of a proxy, {'' if taken else 'not '}taken", by_a_proxy(status, accepted=taken), Verdict.UNPROVEN, *RETRY, slows=status == 429, billed=taken)  # noqa: E501 - one row
        for status in (400, 401, 403, 404, 407, 408, 409, 413, 429, 499, 502, 503, 504)
        for taken in (False, True)
    ),
    Row("403 of a proxy, in Latin-1", by_a_proxy(403, LATIN), Verdict.UNPROVEN, *RETRY),
    Row("502 of a proxy, in Latin-1", by_a_proxy(502, LATIN), Verdict.UNPROVEN, *RETRY),
    Row("404 of a gateway, in JSON", said(Refused("route", "no route", status=404, kind="not_found")), Verdict.UNPROVEN, *RETRY),  # noqa: E501 - one row
    Row("502, no body", instead(502), Verdict.UNPROVEN, *RETRY),
    *(
        Row(f"{status} {body.decode()}", instead(status, body), Verdict.UNPROVEN, *RETRY)
        for status in (400, 500)
        for body in (b'{"error":"late"}', b'{"error":null}', b'{"error":[]}', b'{"error":{"message":5}}', b"[]", b"{}")
    ),
    *(
        Row(f"{status} to another place", instead(status, Location="/v1/billing/meter_events"), Verdict.UNPROVEN, *RETRY)  # noqa: E501 - one row
        for status in (301, 302, 303, 307, 308)
    ),
    Row("302 to nowhere", instead(302), Verdict.UNPROVEN, *RETRY),
    Row("200 of a proxy", by_a_proxy(200), Verdict.UNPROVEN, *RETRY),
    Row("200 of a proxy, taken", by_a_proxy(200, accepted=True), Verdict.UNPROVEN, *RETRY, billed=True),
    Row("200 of a proxy, in Latin-1", by_a_proxy(200, LATIN), Verdict.UNPROVEN, *RETRY),
    *(
        Row(f"200 {body.decode() or 'without a body'}", instead(200, body), Verdict.UNPROVEN, *RETRY)
        for body in (b"", b"{}", b"[]", b"null", b'{"object":"customer"}', b'{"object":"billing.meter_event"}')
    ),
    Row("200 of another kind, live", instead(200, b'{"object":"customer","livemode":true}'), Verdict.UNPROVEN, *RETRY),
    Row("200, nested deeply", instead(200, b'{"a":' + b"[" * 50_000), Verdict.UNPROVEN, *RETRY),
    Row("200, packed", instead(200, EVENT, Content_Encoding="br"), Verdict.UNPROVEN, *RETRY),
    Row("200 for another event", instead(200, EVENT), Verdict.UNPROVEN, *RETRY),
    Row("204", instead(204), Verdict.UNPROVEN, *RETRY),
    # No answer
    Row("connection refused", port_closed, Verdict.ABSENT, *RETRY),
    Row("name not known", at("http://no-such-host.invalid"), Verdict.ABSENT, *RETRY),
    Row("no TLS there", over_tls, Verdict.ABSENT, *RETRY),
    Row("reset while TLS is agreed on", reset_at_once, Verdict.ABSENT, *RETRY),
    Row("no connection in time", nobody_takes_the_call, Verdict.ABSENT, *RETRY, impatient=True),
    Row("reset, not taken", scripted(Fault.LOSE), Verdict.UNPROVEN, *RETRY),
    Row("reset, taken", scripted(Fault.ACCEPT_LOSE), Verdict.UNPROVEN, *RETRY, billed=True),
    Row("reset within the answer", scripted(Fault.ACCEPT_CUT), Verdict.UNPROVEN, *RETRY, billed=True),
    Row("no answer in time, not taken", scripted(Fault.HANG), Verdict.UNPROVEN, *RETRY, impatient=True),
    Row("no answer in time, taken", scripted(Fault.ACCEPT_HANG), Verdict.UNPROVEN, *RETRY, billed=True, impatient=True),
)  # fmt: skip


@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_what_an_answer_does(row: Row, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer, what it proves, what becomes of the total and which key is next; in the end it is billed once."""
    if row.impatient:
        monkeypatch.setattr(runtime, "TIMEOUT", IMPATIENT)

    async def play() -> None:
        async with scene() as on:
            await act(on, row, before=before)

    asyncio.run(play())


async def act(on: Scene, row: Row, *, before: bool) -> None:
    world, model = on.world, on.model
    identifier = world.total(row.customer, row.value, event=row.event_name)
    world.read()
    world.commit()
    attempt = world.must_send()
    if before:
        # It dies with the request in its hands. Who restores the entry knows only that it may have been written.
        world.restart()
        attempt = world.must_send()
    if (preparing := row.prepared(on, attempt)) is not None:
        await preparing

    heard = await on.send(on.sends(attempt))
    world.delivery.answered(attempt, heard, world.now)
    world.commit()

    assert judge(heard) is row.verdict, heard
    assert throttled(heard) is row.slows
    assert becomes(world, identifier) == (row.again if before else row.first)
    assert bool(own(model, attempt)) is row.billed
    if identifier in world.entries:
        key = world.entry(identifier).key
        assert key == (attempt.key if row.key == "same" else f"{identifier}:1")

    if becomes(world, identifier) == "parked: collision":
        return  # whose it is, a person has to find out
    on.cure()
    await on.stand_in.open()
    world.wait(MINUTE)
    for entry in [*world.delivery.parked()]:
        assert (entry.first_unproven is not None) is before, "what this attempt proves says nothing of an earlier one"
        world.command("release", entry.total.identifier)
    world.obey()
    await on.until_idle()
    (outcome,) = world.outcomes
    assert outcome.how in {"delivered", "duplicate"}
    (event,) = own(model, attempt)
    assert event.value == Decimal(outcome.billed or "0")
    assert (event.identifier, event.timestamp) == (outcome_identifier(identifier, before, row), attempt.timestamp)
    assert model.violations == []
    assert world.balanced()


def outcome_identifier(identifier: str, before: bool, row: Row) -> str:
    """Released with a doubt, a total goes on under the next generation of its identifier."""
    return f"{identifier}-g2" if before and row.again.startswith("parked") else identifier


def becomes(world: World, identifier: str) -> str:
    """Where the total is, and what keeps the others from being sent."""
    for outcome in world.outcomes:
        if outcome.identifier == identifier:
            return str(outcome.how)
    parked = world.parked()
    if identifier in parked:
        return f"parked: {parked[identifier]}"
    paused = world.delivery.paused
    return f"retry, paused: {paused}" if paused else "retry"


def own(model: StripeModel, attempt: Attempt) -> list[Any]:
    """Everything that Stripe has of this total."""
    return [each for each in model.events if each.identifier.startswith(attempt.total)]


def test_a_rejection_that_comes_later_is_known_by_the_key_of_the_attempt() -> None:
    """Of a deleted customer Stripe takes the event, and rejects it afterwards: its report has the key alone."""

    async def play() -> None:
        async with scene() as on:
            attempt = on.world.sent()
            deleted_customer(on, attempt)
            on.next_are(Fault.ERROR, None)
            for _ in range(2):
                on.world.delivery.answered(attempt, await on.send(attempt), on.world.now)
                on.world.commit()
                on.world.wait(MINUTE)
                attempt = on.world.send() or attempt
            (outcome,) = on.world.outcomes
            (report,) = on.model.reports()
            (said,) = report["data"]["reason"]["error_types"]
            assert (outcome.how, outcome.key) == ("delivered", f"{outcome.identifier}:1")
            assert (said["code"], said["error_count"]) == ("meter_event_customer_not_found", 1)
            assert said["sample_errors"][0]["request"]["identifier"] == outcome.key
            assert total_of(f"{outcome.key}") == outcome.identifier
            assert on.model.billed_by("ai_tokens", "cus_alice") == 0

    asyncio.run(play())


def test_an_answer_of_the_other_mode_ends_the_service() -> None:
    """Nobody who meant a sandbox wants to bill, and nobody who meant to bill wants a sandbox."""

    async def play() -> None:
        async with scene() as on:
            attempt = on.world.sent()
            on.key = LIVE
            with pytest.raises(WrongMode, match=r"stripe\.livemode is false, but Stripe answered in live mode"):
                await on.send(attempt)

    asyncio.run(play())


def test_no_more_than_one_request_is_made_of_an_attempt() -> None:
    """Neither for a redirect, nor for a server error, nor for a lock that Stripe says to try again."""

    async def play() -> None:
        async with scene() as on:
            attempt = on.world.sent()
            redirect = Instead(307, b"", {"Location": on.base})
            for wrong in (redirect, Fault.ERROR, Fault.LOCK_TIMEOUT, Fault.LOSE, Fault.ACCEPT_CUT):
                before = on.model.stats["requests"]
                on.next_are(wrong)
                await on.send(msgspec.structs.replace(attempt, key=f"k{before}"))
                assert on.model.stats["requests"] == before + 1

    asyncio.run(play())
