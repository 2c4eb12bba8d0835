"""The Stripe stand-in over HTTP, with faults: inside an event loop, on a thread of its own, or as a process.

    async with StripeStandIn() as stripe: ...         # in the running event loop
    with StripeStandIn() as stripe: ...               # on a thread of its own
    python -m consumer.sandbox.stripe --port 12111    # as a process; it prints its URL

`/_sandbox/…` is for tests and demos in other processes: `GET billed`, `events`, `violations`, `stats` and `reports`;
`POST meters`, `customers`, `clock`, `faults` and `down`, each with a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from enum import StrEnum
from typing import Any, Self, TypeVar

import orjson
from aiohttp import web

from consumer.sandbox.stripe import SECRET_KEY, StripeModel, lock_timeout, rate_limited
from consumer.sandbox.stripe_notifications import Destination, Notifications
from consumer.sandbox.stripe_wire import API_VERSION, Answer, Call, read_call

T = TypeVar("T")

_EVENTS = "/v1/billing/meter_events"
_HANG_AT_MOST = 300
"""A client that has not hung up after this many seconds is not going to."""


class Fault(StrEnum):
    """What may go wrong with one request. "Accept" does what was asked for, all others leave nothing."""

    RATE_LIMITED = "rate_limited"
    LOCK_TIMEOUT = "lock_timeout"
    ERROR = "error"
    ACCEPT_ERROR = "accept_error"
    LOSE = "lose"
    ACCEPT_LOSE = "accept_lose"
    ACCEPT_CUT = "accept_cut"  # the connection breaks in the middle of the answer
    HANG = "hang"
    ACCEPT_HANG = "accept_hang"


@dataclass(frozen=True)
class Instead:
    """An answer that the endpoint did not give: a proxy's, or one of Stripe's that nobody can bring about."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    accepted: bool = False
    """What was asked for has been done all the same."""


Wrong = Fault | Instead | None
"""What goes wrong with one request, if anything."""


@dataclass
class Faults:
    """What goes wrong; may be changed at any time.

    For every meter event the first of these decides that has something to say: `plan`, called with the number of the
    request (from 0) and the identifier; the next entry for its identifier; the next entry of `script`; `rates`, the
    probabilities. An entry of None lets the request pass. `reads` is the script for all other requests. `latency` is
    a range of real seconds, spent before anything is done.
    """

    rates: dict[Fault, float] = field(default_factory=dict)
    script: list[Wrong] = field(default_factory=list)
    by_identifier: dict[str, list[Wrong]] = field(default_factory=dict)
    reads: list[Wrong] = field(default_factory=list)
    plan: Callable[[int, str], Wrong] | None = None
    latency: tuple[float, float] = (0.0, 0.0)
    random: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - must be reproducible
    meter_events: int = 0

    def choose(self, call: Call) -> Wrong:
        """The fault for this request, taken from what is planned."""
        if call.path != _EVENTS:
            return self.reads.pop(0) if self.reads else None
        number = self.meter_events
        self.meter_events += 1
        planned = self.plan(number, call.identifier) if self.plan else None
        if planned is not None:
            return planned
        if self.by_identifier.get(call.identifier):
            return self.by_identifier[call.identifier].pop(0)
        if self.script:
            return self.script.pop(0)
        if self.rates:
            dice = self.random.random()
            for fault, rate in self.rates.items():
                dice -= rate
                if dice < 0:
                    return fault
        return None

    def delay(self) -> float:
        """Seconds to spend on the next request."""
        low, high = self.latency
        return low if low == high else self.random.uniform(low, high)

    def update(self, changes: dict[str, Any]) -> None:
        """Change what is named, from JSON; raises ValueError or KeyError for what does not exist."""
        read: dict[str, Callable[[Any], Any]] = {
            "rates": lambda rates: {Fault(name): float(rate) for name, rate in rates.items()},
            "script": _read_script,
            "reads": _read_script,
            "by_identifier": lambda each: {name: _read_script(script) for name, script in each.items()},
            "latency": lambda pair: (float(pair[0]), float(pair[1])),
            "seed": random.Random,
        }
        changed = {name: read[name](value) for name, value in changes.items()}
        for name, value in changed.items():
            setattr(self, "random" if name == "seed" else name, value)


def _read_script(script: list[str | dict[str, Any] | None]) -> list[Wrong]:
    return [_read_wrong(each) for each in script]


def _read_wrong(given: str | dict[str, Any] | None) -> Wrong:
    if isinstance(given, dict):
        return Instead(**{**given, "body": str(given.get("body", "")).encode()})
    return None if given is None else Fault(given)


class Clock:
    """A clock that can be moved; it goes on from there as `base` does. Give a constant as `base` to make it stand."""

    def __init__(self, base: Callable[[], float] = time.time) -> None:
        self._base = base
        self._offset = 0.0

    def __call__(self) -> float:
        return self._base() + self._offset

    def advance(self, seconds: float) -> None:
        """Move by so many seconds."""
        self._offset += seconds

    def move_to(self, seconds: float) -> None:
        """Move to this Unix time."""
        self._offset = seconds - self._base()


class StripeStandIn:
    """Serves a `StripeModel`, made with these `options`. Port 0 takes a free port and keeps it.

    Error reports are notified to `webhook`, if it is given.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        faults: Faults | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        webhook: Destination | None = None,
        **options: Any,
    ) -> None:
        self.clock = clock or Clock()
        self.model = StripeModel(self.clock, **options)
        self.faults = faults or Faults()
        self.notifications = Notifications(self.model.reports, self.clock)
        self._webhook = webhook
        self._notifying: asyncio.Task[None] | None = None
        self._host, self._port, self._tls = host, port, tls
        self._http: web.Server | None = None
        self._listening: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._reopening: set[asyncio.Task[None]] = set()
        self._requests = 0

    @property
    def url(self) -> str:
        """The base address for clients."""
        return f"{'https' if self._tls else 'http'}://{self._host}:{self._port}"

    # In the running event loop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._http = web.Server(self._serve, access_log=None, keepalive_timeout=3600)
        await self.open()
        if self._webhook is not None:
            self._notifying = asyncio.create_task(self.notifications.run(self._webhook))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._reopening:
            task.cancel()
        if self._notifying is not None:
            self._notifying.cancel()
            await asyncio.wait([self._notifying])
        await self.close()
        if self._http is not None:
            await self._http.shutdown(timeout=0)

    async def open(self) -> None:
        """Listen."""
        if self._http is not None and self._listening is None:
            listener = socket.create_server((self._host, self._port), backlog=1024)
            self._port = listener.getsockname()[1]
            loop = asyncio.get_running_loop()
            self._listening = await loop.create_server(self._http, sock=listener, ssl=self._tls)

    async def close(self) -> None:
        """Refuse connections and break those that exist; the state stays."""
        if self._http is not None and self._listening is not None:
            self._listening.close()
            self._listening = None
            for connection in self._http.connections:
                _abort(connection)

    # On a thread of its own

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stripe-stand-in", daemon=True)
        self._thread.start()
        self._run(self.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._thread is not None:
            self._run(self.__aexit__())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def down(self) -> None:
        """Like `close`, from another thread."""
        self._run(self.close())

    def up(self) -> None:
        """Like `open`, from another thread."""
        self._run(self.open())

    def notify(self, to: Destination) -> None:
        """Notify reports there from now on, from another thread."""

        async def begin() -> None:
            self._notifying = asyncio.create_task(self.notifications.run(to))

        self._run(begin())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            raise RuntimeError("the stand-in is not running")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    # Requests

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        body = await request.read()
        if path.startswith("/_sandbox/"):
            return await self._control(request.method, path.removeprefix("/_sandbox/"), body)
        headers = request.headers
        form = body.decode(errors="replace") if request.method == "POST" else query
        call = read_call(
            request.method, path, form, headers.get("Authorization", ""), headers.get("Idempotency-Key", "")
        )
        self.model.receive(call)
        fault = self.faults.choose(call)
        if fault is not None:
            self.model.stats[f"fault_{'instead' if isinstance(fault, Instead) else fault}"] += 1
        if isinstance(fault, Instead):
            return await self._answer_instead(request, call, fault)
        if fault in (Fault.RATE_LIMITED, Fault.LOCK_TIMEOUT):
            refused = lock_timeout() if fault is Fault.LOCK_TIMEOUT else rate_limited("global-rate")
            return self._respond(request, self.model.refuse(refused))
        if fault is Fault.LOSE:
            _abort(request.protocol)
            return web.Response()
        answer = self.model.admit(call)
        if answer is None:
            try:
                answer = await self._execute(request, call, fault)
            finally:
                self.model.release(call)
        elif fault in (Fault.HANG, Fault.ACCEPT_HANG):
            await _hang(request)
        if fault is Fault.ACCEPT_LOSE:
            _abort(request.protocol)
        if fault is Fault.ACCEPT_CUT:
            return await self._cut(request, answer)
        return self._respond(request, answer)

    async def _answer_instead(self, request: web.BaseRequest, call: Call, instead: Instead) -> web.Response:
        if instead.accepted and self.model.admit(call) is None:
            try:
                await self._execute(request, call, None)
            finally:
                self.model.release(call)
        return self._respond(request, Answer(instead.status, instead.body, dict(instead.headers)))

    async def _execute(self, request: web.BaseRequest, call: Call, fault: Fault | None) -> Answer:
        delay = self.faults.delay()
        if delay:
            await asyncio.sleep(delay)
        if fault is Fault.HANG:
            await _hang(request)
            return Answer(504, b"")
        if fault is Fault.ERROR:
            return self.model.execute(call, fail="before")
        answer = self.model.execute(call, fail="after" if fault is Fault.ACCEPT_ERROR else "")
        if fault is Fault.ACCEPT_HANG:
            await _hang(request)
        return answer

    def _headers(self, request: web.BaseRequest, answer: Answer) -> dict[str, str]:
        self._requests += 1
        headers = {
            "Content-Type": "application/json",
            "Date": formatdate(self.model.now(), usegmt=True),
            "Request-Id": f"req_{self._requests:014d}",
            "Stripe-Version": request.headers.get("Stripe-Version", API_VERSION),
            **answer.headers,
        }
        if "Idempotency-Key" in request.headers:
            headers["Idempotency-Key"] = request.headers["Idempotency-Key"]
        return headers

    def _respond(self, request: web.BaseRequest, answer: Answer) -> web.Response:
        return web.Response(status=answer.status, body=answer.body, headers=self._headers(request, answer))

    async def _cut(self, request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, headers=self._headers(request, answer))
        response.content_length = len(answer.body)
        await response.prepare(request)
        await response.write(answer.body[:20])
        if request.transport is not None:
            request.transport.close()
        return response

    # For other processes

    async def _control(self, method: str, name: str, body: bytes) -> web.Response:
        read: dict[str, Callable[[], Any]] = {
            "billed": lambda: [[*place, str(value)] for place, value in self.model.billed().items()],
            "events": self._events,
            "violations": lambda: [violation._asdict() for violation in list(self.model.violations)],
            "stats": lambda: dict(self.model.stats),
            "reports": self.model.reports,
        }
        write: dict[str, Callable[[dict[str, Any]], Any]] = {
            "meters": lambda given: self.model.add_meter(**given).shown(livemode=False),
            "customers": self._set_customer,
            "clock": self._set_clock,
            "faults": self.faults.update,
            "down": self._set_down,
        }
        if method == "GET" and name in read:
            return _json(read[name]())
        if method != "POST" or name not in write:
            return _json({"error": f"no such control: {method} {name}"}, 404)
        try:
            return _json(write[name](orjson.loads(body)))
        except (KeyError, TypeError, ValueError) as error:
            return _json({"error": repr(error)}, 400)

    def _events(self) -> list[dict[str, Any]]:
        return [
            {
                "identifier": event.identifier,
                "event_name": event.event_name,
                "customer": event.customer,
                "value": str(event.value),
                "timestamp": event.timestamp,
                "received": event.received,
                "status": event.status,
            }
            for event in list(self.model.events)
        ]

    def _set_customer(self, given: dict[str, Any]) -> None:
        if given.get("deleted"):
            self.model.delete_customer(given["id"], given.get("code", "meter_event_customer_not_found"))
        else:
            self.model.add_customer(given["id"])

    def _set_clock(self, given: dict[str, Any]) -> dict[str, float]:
        if "now" in given:
            self.clock.move_to(float(given["now"]))
        self.clock.advance(float(given.get("advance", 0)))
        return {"now": self.clock()}

    def _set_down(self, given: dict[str, Any]) -> None:
        async def reopen(seconds: float) -> None:
            await asyncio.sleep(0.01)  # the answer to this request must get out
            await self.close()
            await asyncio.sleep(seconds)
            await self.open()

        task = asyncio.get_running_loop().create_task(reopen(float(given["seconds"])))
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)


def _abort(connection: web.RequestHandler) -> None:
    if isinstance(connection.transport, asyncio.WriteTransport):
        connection.transport.abort()


async def _hang(request: web.BaseRequest) -> None:
    deadline = time.monotonic() + _HANG_AT_MOST
    # A transport tells nobody that its peer has gone.
    while request.transport is not None and not request.transport.is_closing() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


def main() -> None:
    """Serve until SIGTERM or SIGINT; print the URL once connections are accepted."""
    parser = argparse.ArgumentParser(prog="python -m consumer.sandbox.stripe", description="Stripe stand-in")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", action="append", help=f"a valid secret key (default: {SECRET_KEY})")
    parser.add_argument("--meter", action="append", default=[], metavar="EVENT_NAME[:FORMULA]", help="an active meter")
    parser.add_argument("--any-customer", action="store_true", help="know every customer cus_…")
    parser.add_argument("--customer", action="append", default=[], metavar="CUS", help="a known customer")
    parser.add_argument("--lag", type=float, default=0, help="seconds until events show up in summaries")
    parser.add_argument("--endpoint-rate", type=int, help="meter events per second")
    parser.add_argument("--global-rate", type=int, help="other requests per second, in test mode all")
    parser.add_argument("--now", type=float, help="Unix time at the start")
    parser.add_argument("--webhook", metavar="URL", help="where error reports are notified")
    parser.add_argument("--webhook-secret", default="whsec_standin", help="what notifications are signed with")
    parser.add_argument("--faults", type=orjson.loads, default={}, metavar="JSON", help="as for POST /_sandbox/faults")
    given = parser.parse_args()
    stripe = StripeStandIn(
        host=given.host,
        port=given.port,
        webhook=Destination(given.webhook, given.webhook_secret) if given.webhook else None,
        keys=dict.fromkeys(given.key) if given.key else None,
        accept_any_customer=given.any_customer,
        lag=given.lag,
        endpoint_rate=given.endpoint_rate,
        global_rate=given.global_rate,
    )
    if given.now is not None:
        stripe.clock.move_to(given.now)
    for meter in given.meter:
        event_name, _, formula = meter.partition(":")
        stripe.model.add_meter(event_name, formula=formula or "sum")
    for customer in given.customer:
        stripe.model.add_customer(customer)
    stripe.faults.update(given.faults)
    asyncio.run(_serve_until_stopped(stripe))


async def _serve_until_stopped(stripe: StripeStandIn) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with stripe:
        print(stripe.url, flush=True)
        await stopped.wait()
