"""Stripe, as stage 2 asks it: one Meter Event a call, no retries, and what a call without an answer proves."""

import ssl
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Final
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec

from consumer import __version__
from consumer.aggregate.clock import Reading
from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.runtime.clocks import Clock

API_VERSION: Final = "2026-09-30.endive"
"""Pinned, so that an upgrade of the account or of the package does not change what is sent or answered."""

CONNECTIONS: Final = 512
"""Calls in flight at once: 1,000 a second need 300 at Stripe's usual latency of 0.3 s, and more where it is slow."""

TIMEOUT: Final = aiohttp.ClientTimeout(total=10, connect=4, sock_connect=3)
"""Seconds. Connecting has less than the whole, so that an expiry tells which of the two it was."""


_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class WrongMode(Exception):
    """Stripe answered in another mode than the configuration states: live totals in a sandbox, or worse."""


class WrongProxy(Exception):
    """The environment names a proxy that Stripe cannot be reached through; the message says which to name."""


def proxy_to(url: str) -> str | None:
    """The proxy that the environment names for this address: HTTPS_PROXY unless NO_PROXY has the host.

    What is served on this machine is asked without one, whatever NO_PROXY says. Raises ``WrongProxy``.
    """
    to = urlsplit(url)
    proxies = getproxies()
    named = proxies.get(to.scheme) or proxies.get("all")
    if not named or to.hostname in _HERE or proxy_bypass(to.netloc):
        return None
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme not in {"http", "https"} or not proxy.hostname:
        # Its password is not to be seen.
        raise WrongProxy(
            f"{to.scheme.upper()}_PROXY names a proxy of the kind {proxy.scheme}, and Stripe is reached through HTTP "
            "proxies only: give it as http://host:port, or set NO_PROXY"
        )
    return proxy.geturl()


class Stripe:
    """A client for one account. Used within one event loop; ``close`` it there.

    It writes the one request that there is by itself: Stripe's own client takes more than twice the CPU for it.
    """

    def __init__(self, key: str, *, api_base: str, livemode: bool, clock: Clock) -> None:
        self._livemode = livemode
        self._clock = clock
        self._url = f"{api_base.rstrip('/')}/v1/billing/meter_events"
        self._headers = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/x-www-form-urlencoded",
            "Stripe-Version": API_VERSION,
            "User-Agent": f"tallyman/{__version__}",
        }
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=ssl.create_default_context()),
            proxy=proxy_to(api_base),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=TIMEOUT,
            trace_configs=[_tracing_writes()],
        )
        self._dated = ""
        self.date: Reading | None = None
        """Stripe's own clock, as of its last answer."""

    async def close(self) -> None:
        """Give up the connections."""
        await self._session.close()

    async def send(self, attempt: Attempt) -> Heard:
        """Write one Meter Event. Raises ``WrongMode``; every other failure is an answer, for it proves something."""
        written = _Written()
        try:
            async with self._session.post(
                self._url,
                data=_form(attempt),
                headers=self._headers | {"Idempotency-Key": attempt.key},
                # Who answers with a redirect has not answered.
                allow_redirects=False,
                trace_request_ctx=written,
            ) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as failed:
            what = type(failed).__name__
            return Lost(what) if written.anything else NeverConnected(what)
        return self._understand(attempt, response.status, response.headers, body)

    def _understand(self, attempt: Attempt, status: int, headers: Mapping[str, str], body: bytes) -> Heard:
        said = _read(body)
        if not 200 <= status < 300:
            self._note_date(headers)
            error = said.error or Error()
            retry = headers.get("Stripe-Should-Retry")
            return Answer(
                status,
                type=error.type,
                code=error.code,
                message=error.message or None,
                replayed=_is_replayed(headers),
                should_retry=None if retry is None else retry == "true",
                limited=headers.get("Stripe-Rate-Limited-Reason"),
            )
        if said.object != "billing.meter_event" or said.livemode is None:
            # Somebody else answered: a proxy, a page for signing in.
            return Lost("a 200 without a Meter Event")
        self._note_date(headers)
        if said.livemode != self._livemode:
            raise WrongMode(
                f"stripe.livemode is {str(self._livemode).lower()}, but Stripe answered in "
                f"{'live' if said.livemode else 'test'} mode: the key belongs to another account than was meant"
            )
        if said.identifier != attempt.identifier:
            return Lost(f"a 200 for another event: {said.identifier}")
        return Answer(200, replayed=_is_replayed(headers))

    def _note_date(self, headers: Mapping[str, str]) -> None:
        text = headers.get("Date", "")
        if text == self._dated:
            return
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return
        self._dated = text
        self.date = Reading(int(date.timestamp() * 1000), self._clock.elapsed())


def _form(attempt: Attempt) -> bytes:
    payload = {f"payload[{key}]": value for key, value in attempt.payload.items()}
    form = {
        "event_name": attempt.event_name,
        **payload,
        "identifier": attempt.identifier,
        "timestamp": str(attempt.timestamp),
    }
    return urlencode(form, safe="[]").encode()


class Error(msgspec.Struct):
    """What Stripe says is wrong. Whoever answers in its place may say anything."""

    type: str | None = None
    code: str | None = None
    message: str | None = None


class _Body(msgspec.Struct):
    object: str | None = None
    livemode: bool | None = None
    identifier: str | None = None
    error: Error | None = None


_decoder = msgspec.json.Decoder(_Body)


def _read(body: bytes) -> _Body:
    """What Stripe said; empty for what only a proxy says."""
    try:
        return _decoder.decode(body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return _Body()


class _Written:
    """Whether any byte of a request has been handed to a connection."""

    __slots__ = ("anything",)

    def __init__(self) -> None:
        self.anything = False


def _tracing_writes() -> aiohttp.TraceConfig:
    # It is called before the first byte is written: without this call, Stripe cannot have seen the request.
    async def writing(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
        context.trace_request_ctx.anything = True

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(writing)
    return trace


def _is_replayed(headers: Mapping[str, str]) -> bool:
    return headers.get("Idempotent-Replayed") == "true"
