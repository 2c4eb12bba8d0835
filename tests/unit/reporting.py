"""A service that takes Stripe's notifications, without the rest of it, and a Stripe that reports what it rejected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from prometheus_client import CollectorRegistry

from consumer import totals
from consumer.config import load
from consumer.deliver.entries import Entry, Outcome, encode_outcome, outcome, pack
from consumer.runtime import archive, stripe_reads
from consumer.runtime.metrics import Reports
from consumer.runtime.webhooks import Webhooks
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_notifications import signature, thin
from consumer.sandbox.stripe_server import Clock, StripeStandIn
from consumer.storage import Append, Changes, Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Total
from tests.totals import total_of

SECRET: Final = "whsec_one"  # noqa: S105 - opens nothing
OTHER: Final = "whsec_other"
NOW: Final = 1_793_000_405
"""Seconds since the epoch."""
NOW_MS: Final = NOW * 1000
KIND: Final = "v1.billing.meter.error_report_triggered"
BODY: Final = b'{"id": "evt_1", "object": "v2.core.event"}'


def total(number: int = 1, customer: str = "alice") -> Total:
    return total_of(f"{number}-{customer}", NOW // 60 * 60 - 593, customer)


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
