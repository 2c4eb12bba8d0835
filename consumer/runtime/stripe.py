"""Stripe, as stage 2 asks it: one Meter Event a call, no retries, and what a call without an answer proves."""

from collections.abc import Mapping
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
import msgspec
import stripe

from consumer.aggregate.clock import Reading
from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.runtime.clocks import Clock

API_VERSION: Final = "2026-09-30.endive"
"""Pinned, so that an upgrade of the account or of the package does not change what is sent or answered."""

CONNECTIONS: Final = 256
"""Calls in flight at once: enough for 1,000 a second at Stripe's usual latency."""

TIMEOUT: Final = aiohttp.ClientTimeout(total=10, connect=4, sock_connect=3)
"""Seconds. Connecting has less than the whole, so that an expiry tells which of the two it was."""


class WrongMode(Exception):
    """Stripe answered in another mode than the configuration states: live totals in a sandbox, or worse."""


class Stripe:
    """A client for one account. Used within one event loop; ``close`` it there."""

    def __init__(self, key: str, *, api_base: str, livemode: bool, clock: Clock) -> None:
        stripe.enable_telemetry = False
        self._livemode = livemode
        self._clock = clock
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS), trace_configs=[_tracing_writes()]
        )
        self._client = stripe.StripeClient(
            key,
            stripe_version=API_VERSION,
            base_addresses={"api": api_base},
            max_network_retries=0,
            http_client=_Connections(self._session),
        )
        self.date: Reading | None = None
        """Stripe's own clock, as of its last answer."""

    async def close(self) -> None:
        """Give up the connections."""
        await self._session.close()

    async def send(self, attempt: Attempt) -> Heard:
        """Write one Meter Event. Raises ``WrongMode``; every other failure is an answer, for it proves something."""
        written = _Written()
        _written.set(written)
        try:
            event = await self._client.v1.billing.meter_events.create_async(
                {
                    "event_name": attempt.event_name,
                    "payload": attempt.payload,
                    "identifier": attempt.identifier,
                    "timestamp": attempt.timestamp,
                },
                {"idempotency_key": attempt.key},
            )
        except stripe.StripeError as failed:
            if failed.http_status is not None and not 200 <= failed.http_status < 300:
                return self._refusal(failed)
            return _silence(failed.__cause__ or failed, written)
        except (aiohttp.ClientError, TimeoutError) as failed:
            return _silence(failed, written)
        livemode = getattr(event, "livemode", None)
        if getattr(event, "object", None) != "billing.meter_event" or not isinstance(livemode, bool):
            # Somebody else answered: a proxy, a page for signing in.
            return Lost("a 200 without a Meter Event")
        headers = event.last_response.headers if event.last_response else {}
        self._note_date(headers)
        if livemode != self._livemode:
            raise WrongMode(
                f"stripe.livemode is {str(self._livemode).lower()}, but Stripe answered in "
                f"{'live' if livemode else 'test'} mode: the key belongs to another account than was meant"
            )
        identifier = getattr(event, "identifier", None)
        if identifier != attempt.identifier:
            return Lost(f"a 200 for another event: {identifier}")
        return Answer(200, replayed=_is_replayed(headers))

    def _refusal(self, failed: stripe.StripeError) -> Answer:
        error = failed.error
        headers: Mapping[str, Any] = failed.headers or {}
        self._note_date(headers)
        retry = headers.get("stripe-should-retry")
        return Answer(
            failed.http_status or 0,
            type=error.type if error else None,
            code=error.code if error else None,
            message=failed.user_message or None,
            replayed=_is_replayed(headers),
            should_retry=None if retry is None else retry == "true",
            limited=headers.get("stripe-rate-limited-reason"),
        )

    def _note_date(self, headers: Mapping[str, Any]) -> None:
        try:
            date = parsedate_to_datetime(headers.get("Date", ""))
        except ValueError:
            return
        self.date = Reading(int(date.timestamp() * 1000), self._clock.elapsed())


class _Connections(stripe.AIOHTTPClient):
    """Requests as Stripe's client makes them, and no more of them: who answers with a redirect has not answered."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(timeout=TIMEOUT, session=session)
        self._used = session

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: Any = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        async with self._used.request(
            method, url, headers=headers, data=post_data, timeout=TIMEOUT, allow_redirects=False
        ) as response:
            return understood(await response.read()), response.status, response.headers


class _Error(msgspec.Struct):
    type: str | None = None
    code: str | None = None
    message: str | None = None


class _Body(msgspec.Struct):
    error: _Error | msgspec.UnsetType = msgspec.UNSET


def understood(body: bytes) -> bytes:
    """The body of an answer if it can be Stripe's, else nothing: on many a proxy's words Stripe's client fails."""
    try:
        body.decode()
        msgspec.json.decode(body, type=_Body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return b""
    return body


class _Written:
    """Whether any byte of a request has been handed to a connection."""

    __slots__ = ("anything",)

    def __init__(self) -> None:
        self.anything = False


def _silence(cause: BaseException, written: _Written) -> Heard:
    what = type(cause).__name__
    return Lost(what) if written.anything else NeverConnected(what)


_written: ContextVar[_Written] = ContextVar("written")


def _tracing_writes() -> aiohttp.TraceConfig:
    # It is called before the first byte is written: without this call, Stripe cannot have seen the request.
    async def writing(_session: aiohttp.ClientSession, _context: SimpleNamespace, _params: object) -> None:
        _written.get().anything = True

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(writing)
    return trace


def _is_replayed(headers: Mapping[str, Any]) -> bool:
    return headers.get("Idempotent-Replayed") == "true"
