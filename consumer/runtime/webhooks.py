"""The webhook server: Stripe notifies us of events that it took and rejected later.

A notification is thin: it names an event, which is fetched. It is answered with 200 when what follows from it is
durable in the totals log. Until then it is answered with 503, and Stripe repeats it, for days. What can never be
handled is answered with 200 too, and logged: repeating it would cure nothing.
"""

import asyncio
import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final, Protocol

import msgspec
import structlog
from aiohttp import web

from consumer.runtime import reports
from consumer.runtime.aside import aside
from consumer.runtime.clocks import Clock
from consumer.runtime.reports import Malformed, Matched, Reported
from consumer.runtime.stripe import WrongMode
from consumer.runtime.stripe_reads import KeyRefused, NotThere, ReadFailed, StripeReads
from consumer.storage import Archive, StorageError

log = structlog.get_logger()

PATH: Final = "/stripe"
HEADER: Final = "Stripe-Signature"
LARGEST: Final = 256 * 1024
"""Bytes of a notification; a thin one has some hundred."""
TOLERANCE_S: Final = 300
"""So far the time of a signature may lie from ours: an old notification is not taken from somebody who kept it."""
BODY_S: Final = 10.0
"""So long a notification may take to arrive."""
WAIT_S: Final = 20.0
"""So long a notification waits for those before it."""
LAST_S: Final = 3.0
"""So long a stop waits for what has been begun; the rest is repeated by Stripe."""
REMEMBERED: Final = 10_000
"""Events that have been handled, and are told from new ones without asking for them; stage 2 knows all of them."""

THIN: Final = "v2.core.event"
LONGEST_TYPE: Final = 100

_EVENT_ID: Final = re.compile(r"[A-Za-z0-9_]{1,255}")


class Result(StrEnum):
    """What became of a notification."""

    TAKEN = "taken"
    REPEATED = "repeated"
    """It has been handled before."""
    IGNORED = "ignored"
    """No report, or of the other mode."""
    REFUSED_SIGNATURE = "refused_signature"
    POSTPONED = "postponed"
    """Stripe or the store did not answer, or the service was not ready: Stripe repeats it."""
    FAILED = "failed"
    """It can never be handled."""


class Observer(Protocol):
    """Counts."""

    def notified(self, result: Result) -> None:
        """A notification has been answered."""

    def rejected(self, reported: Reported, named: int) -> None:
        """A report was taken, which names so many totals of ours."""


class Notification(msgspec.Struct):
    """What Stripe sends, as far as it is looked at."""

    id: str
    object: str = ""
    type: str = ""
    livemode: bool | None = None


def refusal(header: str | None, body: bytes, secrets: Sequence[str], now_s: int) -> str | None:
    """Why a notification is not taken for Stripe's; None where it is.

    The client's own function goes by the host's time of day, and takes what is dated ahead of it.

    Args:
        header: ``t=…,v1=…``: the time in seconds since the epoch, and signatures by one or several secrets.
        body: as it came, before anybody has read it.
        secrets: any of them will do.
        now_s: seconds since the epoch.
    """
    pairs = [pair.partition("=")[::2] for pair in (header or "").split(",")]
    stamp = next((value for name, value in pairs if name.strip() == "t"), "")
    given = [value.encode() for name, value in pairs if name.strip() == "v1"]
    if not (stamp.isascii() and stamp.isdecimal() and len(stamp) < 15 and given):
        return "it is not signed"
    signed = stamp.encode() + b"." + body
    expected = [hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest().encode() for secret in secrets]
    if not any([hmac.compare_digest(ours, theirs) for ours in expected for theirs in given]):  # noqa: C419 - all of them
        return "it is signed with another secret, or was changed"
    if abs(now_s - int(stamp)) > TOLERANCE_S:
        return f"it was signed {now_s - int(stamp)} s ago by this host's clock"
    return None


class Webhooks:
    """Listens for Stripe's notifications, and appends what follows from its reports to the totals log."""

    def __init__(
        self,
        secrets: Sequence[str],
        *,
        livemode: bool,
        clock: Clock,
        reading: Callable[[], AbstractContextManager[StripeReads]],
        archive: Callable[[], AbstractContextManager[Archive]],
        ready: Callable[[], bool],
        observe: Observer,
    ) -> None:
        """
        Args:
            secrets: of the event destination; several while they are changed.
            livemode: of the account; notifications of the other mode are ignored.
            clock: what the time of signatures is compared with.
            reading: opens a client that gives up soon, for Stripe asks again by itself. Called in threads.
            archive: opens the logs. Called in threads.
            ready: whether the state is there; until then nothing is taken.
            observe: is told what became of notifications.
        """
        self._secrets = tuple(secrets)
        self._livemode = livemode
        self._clock = clock
        self._reading = reading
        self._archive = archive
        self._ready = ready
        self._observe = observe
        self._handled: OrderedDict[str, None] = OrderedDict()
        self._event_names: dict[str, str] = {}
        """By the id of Stripe's meter."""
        self._turn = asyncio.Lock()
        app = web.Application(client_max_size=LARGEST)
        app.add_routes([web.post(PATH, self._answer)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=LAST_S)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which is a free one where 0 was asked for. Raises ``OSError``."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        taken = int(self._runner.addresses[0][1])
        log.info("webhook_listens", host=host, port=taken)
        return taken

    async def stop(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(BODY_S):
                body = await request.read()
        except TimeoutError:
            return web.Response(status=408)
        why = refusal(request.headers.get(HEADER), body, self._secrets, self._clock.now() // 1000)
        if why is not None:
            log.info("stripe_notification_refused", reason=why)
            self._observe.notified(Result.REFUSED_SIGNATURE)
            return web.Response(status=400)
        result = await self._handle(body)
        self._observe.notified(result)
        return web.Response(status=503 if result is Result.POSTPONED else 200)

    async def _handle(self, body: bytes) -> Result:
        said = _read(body)
        if said is None:
            log.error("stripe_notification_failed", reason="it cannot be read")
            return Result.FAILED
        if (why := self._ignored(said)) is not None:
            log.info("stripe_notification_ignored", type=said.type[:LONGEST_TYPE], reason=why)
            return Result.IGNORED
        try:
            async with asyncio.timeout(WAIT_S):
                await self._turn.acquire()
        except TimeoutError:
            return _postponed(said.id, "others are being handled")
        try:
            return await self._report(said.id)
        finally:
            self._turn.release()

    def _ignored(self, said: Notification) -> str | None:
        if said.livemode is not None and said.livemode != self._livemode:
            return f"it is of {'live' if said.livemode else 'test'} mode, and stripe.livemode says otherwise"
        if said.object != THIN:
            return "it is no thin event: give the event destination the payload style Thin"
        return None if said.type in reports.TYPES else "it is no report of meter events"

    async def _report(self, report: str) -> Result:
        if report in self._handled:
            return Result.REPEATED
        if not self._ready():
            return _postponed(report, "the state is being restored")
        try:
            reported, event_name, found = await aside("stripe-report", self._take, report)
        except (Malformed, NotThere, WrongMode) as failed:
            result, why = Result.FAILED, str(failed)
        except (ReadFailed, StorageError) as failed:
            return _postponed(report, str(failed))
        else:
            if any(each.moving for each in found):
                return _postponed(report, "a total that it names is being tried: how that ends is needed")
            result, why = Result.TAKEN, ""
            self._tell(reported, event_name, found)
        if why:
            log.error("stripe_report_failed", report=report, reason=why)
        self._handled[report] = None
        if len(self._handled) > REMEMBERED:
            self._handled.popitem(last=False)
        return result

    def _tell(self, reported: Reported, event_name: str | None, found: Sequence[Matched]) -> None:
        self._observe.rejected(reported, len(found))
        for code, count in reported.errors.items():
            named = sum(each.rejection.code == code for each in found)
            log.warning(
                "stripe_rejected_events",
                report=reported.report,
                event_name=event_name,
                code=code,
                count=count,
                named=named,
            )

    # In a thread: one at a time

    def _take(self, report: str) -> tuple[Reported, str | None, list[Matched]]:
        """Fetch a report, find what it names, and make durable what follows."""
        with self._reading() as stripe:
            reported = reports.understood(report, stripe.event(report), self._clock.now())
            event_name = self._event_name(stripe, reported.meter)
        with self._archive() as archive:
            found = reports.matched(archive, reported, self._clock.now())
            if event_name is None and found:
                event_name = found[0].event_name
            archive.append(reports.records(reported, found, event_name, self._clock.now()))
        return reported, event_name, found

    def _event_name(self, stripe: StripeReads, meter: str | None) -> str | None:
        """Of a meter; None where there is none, or where the key may not know."""
        if meter is None:
            return None
        if meter not in self._event_names:
            try:
                self._event_names[meter] = stripe.event_name(meter)
            except (KeyRefused, NotThere) as failed:
                log.warning("stripe_meter_unknown", meter=meter[:100], reason=str(failed))
                return None
        return self._event_names[meter]


def _read(body: bytes) -> Notification | None:
    try:
        said = msgspec.json.decode(body, type=Notification)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return said if _EVENT_ID.fullmatch(said.id) else None


def _postponed(report: str, reason: str) -> Result:
    log.warning("stripe_report_postponed", report=report, reason=reason)
    return Result.POSTPONED
