"""A Stripe sandbox, as `confirm` asks it: raw requests, paced, and meters and customers that it makes and puts away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple, Self

import aiohttp

from consumer.runtime.stripe import API_VERSION

EVENTS: Final = "/v1/billing/meter_events"
METERS: Final = "/v1/billing/meters"
CUSTOMERS: Final = "/v1/customers"

RATE: Final = 8.0
"""Calls a second: a third of what a sandbox takes, which others may be using."""

AT_ONCE: Final = 10
"""Calls that are made at the same time where that is what is tried. A sandbox takes 25 in a second."""

LOOK_AGAIN_S: Final = 5.0
"""How often a sum is asked for that is not there yet."""

STILL_S: Final = 60.0
"""A sum that has not changed for so long is taken for the last one."""


class LiveMode(Exception):
    """The account bills somebody."""


class Failed(Exception):
    """Stripe did not do what a check needs before it can ask; the message says what it said."""


class Reply(NamedTuple):
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def error(self) -> dict[str, Any]:
        """Stripe's error object; empty where there is none."""
        found = self.body.get("error")
        return found if isinstance(found, dict) else {}

    def __str__(self) -> str:
        told = [str(self.status)]
        told += [f"{name} {self.error[name]}" for name in ("type", "code", "param") if self.error.get(name)]
        if self.error and not self.error.get("code"):
            told.append("no code")
        told += [
            f"{name}: {self.headers[name]}"
            for name in ("Stripe-Should-Retry", "Stripe-Rate-Limited-Reason", "Idempotent-Replayed")
            if name in self.headers
        ]
        if message := self.error.get("message"):
            told.append(f"“{message}”")
        return ", ".join(told)


class Meter(NamedTuple):
    """One of the meters that were made."""

    id: str
    event_name: str


class Sum(NamedTuple):
    """What the summaries say, and how long after its events were sent it was seen first."""

    value: Decimal | None
    """None: nothing was seen within patience."""
    after_s: float
    asked: int

    def __str__(self) -> str:
        return "no sum within patience" if self.value is None else f"{self.value:f}"


class Account:
    """A Stripe account in test mode, for one run. A context manager: what the run has made is put away at its end."""

    def __init__(
        self,
        key: str,
        *,
        base: str,
        run: str,
        patience: float,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """``patience``: seconds that a sum is waited for. ``now``: Unix time."""
        self.run = run
        self.now = now
        self.sleep = sleep
        self.calls = 0
        self.left: list[str] = []
        """What could not be put away."""
        self._key = key
        self._base = base
        self._patience = patience
        self._turn = asyncio.Lock()
        self._meters: list[Meter] = []
        self._customers: list[str] = []
        self._identifiers = 0
        # Whole minutes of their own for each check, so that sums do not mix; hours, where a check needs one.
        self._minutes: Iterator[int] = iter(range(int(now()) // 3600 * 3600 - 3 * 3600, int(now()), 60))

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for meter in self._meters:
                await self._put_away("POST", f"{METERS}/{meter.id}/deactivate", meter.event_name)
            for customer in self._customers:
                await self._put_away("DELETE", f"{CUSTOMERS}/{customer}", customer)
        finally:
            await self._session.close()

    async def _put_away(self, method: str, path: str, what: str) -> None:
        try:
            reply = await self.ask(method, path)
        except aiohttp.ClientError as failed:
            self.left.append(f"{what} ({type(failed).__name__})")
        else:
            if reply.status not in {200, 404}:
                self.left.append(f"{what} ({reply})")

    # Asking

    async def ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        key: str = "",
        secret: str | None = None,
    ) -> Reply:
        """One request, when its turn has come. ``key`` is the Idempotency-Key."""
        async with self._turn:
            await self.sleep(1 / RATE)
        return await self._request(method, path, params or {}, key, secret)

    async def at_once(self, events: list[dict[str, Any]]) -> list[Reply]:
        """So many Meter Events at the same time; no more than ``AT_ONCE``."""
        async with self._turn:
            await self.sleep(1.0)
            calls = [self._request("POST", EVENTS, event, event["identifier"], None) for event in events[:AT_ONCE]]
            replies = await asyncio.gather(*calls)
            await self.sleep(1.0)
        return replies

    async def _request(self, method: str, path: str, params: Mapping[str, Any], key: str, secret: str | None) -> Reply:
        self.calls += 1
        form = dict(_flat(params))
        headers = {"Authorization": f"Bearer {self._key if secret is None else secret}", "Stripe-Version": API_VERSION}
        if key:
            headers["Idempotency-Key"] = key
        async with self._session.request(
            method,
            f"{self._base}{path}",
            params=form if method == "GET" else None,
            data=None if method == "GET" else form,
            headers=headers,
            allow_redirects=False,
        ) as answered:
            said = await answered.read()
        try:
            body = json.loads(said)
        except ValueError:
            body = {}
        if not isinstance(body, dict):
            body = {}
        if body.get("livemode"):
            raise LiveMode(f"{path} was answered in live mode: nothing more is asked")
        return Reply(answered.status, answered.headers, body)

    # What a check needs

    async def meter(self, what: str, **more: Any) -> Meter:
        """A new meter, which sums raw events unless more is said."""
        event_name = f"tallyman_confirm_{self.run}_{what}"
        params = {
            "display_name": f"tallyman confirm {self.run} {what}",
            "event_name": event_name,
            "default_aggregation": {"formula": "sum"},
            "customer_mapping": {"type": "by_id", "event_payload_key": "stripe_customer_id"},
            "value_settings": {"event_payload_key": "value"},
        }
        made = self._made(await self.ask("POST", METERS, {**params, **more}), "a meter")
        self._meters.append(Meter(made, event_name))
        return self._meters[-1]

    async def deactivate(self, meter: Meter) -> None:
        """From now on it takes no events."""
        reply = await self.ask("POST", f"{METERS}/{meter.id}/deactivate")
        if reply.status != 200:
            raise Failed(f"a meter could not be deactivated: {reply}")
        self._meters.remove(meter)

    async def customer(self) -> str:
        """A new customer."""
        name = f"tallyman confirm {self.run}"
        params = {"name": name, "metadata": {"tallyman-confirm": self.run}}
        self._customers.append(self._made(await self.ask("POST", CUSTOMERS, params), "a customer"))
        return self._customers[-1]

    def _made(self, reply: Reply, what: str) -> str:
        if reply.status != 200 or "id" not in reply.body:
            raise Failed(f"{what} could not be made: {reply}")
        return str(reply.body["id"])

    def minute(self) -> int:
        """A minute of the last hours that no other check uses, in Unix seconds."""
        return next(self._minutes)

    def identifier(self) -> str:
        """One that nobody has used."""
        self._identifiers += 1
        return f"confirm-{self.run}-{self._identifiers}"

    def event(self, meter: Meter, customer: str, value: str | None = "1", **more: Any) -> dict[str, Any]:
        """The parameters of a Meter Event, with an identifier of its own; None leaves a parameter out."""
        payload = {"stripe_customer_id": customer, "value": value}
        params = {
            "event_name": meter.event_name,
            "identifier": self.identifier(),
            "timestamp": int(self.now()) - 60,
            "payload": {name: each for name, each in payload.items() if each is not None},
        }
        return {name: each for name, each in {**params, **more}.items() if each is not None}

    async def send(self, event: dict[str, Any], *, key: str = "") -> Reply:
        """A Meter Event, under its identifier as key unless another is given."""
        return await self.ask("POST", EVENTS, event, key=key or event["identifier"])

    async def sum(self, meter: Meter, customer: str, start: int, end: int, *, wanted: Decimal | None = None) -> Sum:
        """What the customer used there, as soon as it is what is wanted, or else has not changed for a while."""
        began, asked, changed = self.now(), 0, 0.0
        value: Decimal | None = None
        while True:
            params = {"customer": customer, "start_time": start, "end_time": end}
            reply = await self.ask("GET", f"{METERS}/{meter.id}/event_summaries", params)
            asked += 1
            if reply.status != 200:
                raise Failed(f"a sum could not be asked for: {reply}")
            rows = reply.body.get("data", [])
            found = Decimal(repr(rows[0]["aggregated_value"])).normalize() if rows else None
            passed = self.now() - began
            if found != value:
                value, changed = found, passed
            if value is not None and (value == wanted or passed - changed >= STILL_S):
                return Sum(value, changed, asked)
            if passed >= self._patience:
                return Sum(value, changed, asked)
            await self.sleep(LOOK_AGAIN_S)


def _flat(params: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        shown = f"{within}[{name}]" if within else name
        if isinstance(value, Mapping):
            yield from _flat(value, shown)
        else:
            yield shown, str(value)
