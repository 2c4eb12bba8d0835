"""Stripe, as operators' commands ask it: meters, prices, customers, and what its summaries say was used.

Stripe shows sums alone: no event can be looked up. A summary says nothing of how fresh it is. It is "eventually
consistent", nothing is promised, and minutes of lag have been seen.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, Literal
from urllib.parse import quote

import msgspec
import stripe

from consumer.aggregate.clock import Reading
from consumer.runtime.clocks import Clock
from consumer.runtime.stripe import API_VERSION, Error, WrongMode, proxy_to
from consumer.totals import SCALE

ATTEMPTS: Final = 5
"""Of one read; to read twice does no harm."""

TIMEOUT: Final = (4, 20)
"""Seconds, to connect and to answer."""

PAGE: Final = 100
"""Rows of an answer: the most that Stripe gives."""

RATE: Final = {True: 50, False: 10}
"""Reads a second, in live mode and in a sandbox: half of what Stripe takes; in a sandbox the sender has the rest."""

Window = Literal["hour", "day"]

_SECONDS: Final[Mapping[Window | None, int]] = {None: 60, "hour": 3_600, "day": 86_400}


class ReadFailed(Exception):
    """Stripe does not say what was asked; the message tells why and what to do."""


class Silent(ReadFailed):
    """Stripe does not answer, or not now. Nothing is wrong with what was asked: ask again later."""


class KeyRefused(ReadFailed):
    """The key may not do this, or is none."""


class NotThere(ReadFailed):
    """Stripe does not have what was asked for."""


class BudgetSpent(ReadFailed):
    """One more call would be one too many."""


class Meter(msgspec.Struct, frozen=True):
    """A meter. It cannot be changed or deleted, only deactivated."""

    id: str
    event_name: str
    status: str
    """``active`` or ``inactive``."""
    formula: str
    """``sum``, ``count`` or ``last``."""
    event_time_window: str | None
    """``hour`` or ``day`` where only the newest event in it counts; None where every event does."""
    customer_key: str
    value_key: str | None

    @property
    def sums(self) -> bool:
        """Whether it adds all events up: only then do totals of several partitions bill what they should."""
        return self.formula == "sum" and self.event_time_window is None


class Price(msgspec.Struct, frozen=True):
    """A price that a meter's usage is billed by."""

    id: str
    product: str
    meter: str | None
    currency: str
    interval: str | None
    lookup_key: str | None
    unit_amount: str | None
    """In the currency's smallest unit, a plain decimal; None where it is tiered."""


class Customer(msgspec.Struct, frozen=True):
    """A customer; of a deleted one only the id is left."""

    id: str
    name: str | None
    deleted: bool
    metadata: dict[str, str]


class Summary(msgspec.Struct, frozen=True):
    """What a customer used on a meter from ``start`` on and before ``end``, in seconds since the epoch."""

    start: int
    end: int
    value: int
    """In units of 10⁻¹², as exact as Stripe says it."""
    uncertainty: int
    """Stripe says it as a binary fraction: the true sum is at most so far from it, in the same unit."""


class StripeReads:
    """A reading client for one account, paced and counted. Not for several threads at once; ``reading`` opens one."""

    def __init__(
        self,
        key: str,
        *,
        api_base: str,
        livemode: bool,
        clock: Clock,
        budget: int | None = None,
        attempts: int = ATTEMPTS,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """``budget``: calls at most, repetitions included; None is as many as it takes. ``attempts``: of one read.
        ``pause`` waits for seconds."""
        stripe.enable_telemetry = False
        # Stripe's client knows its own authorities only; a proxy that looks into TLS has another one.
        stripe.ca_bundle_path = os.environ.get("SSL_CERT_FILE", stripe.ca_bundle_path)
        proxy = proxy_to(api_base) or ""  # empty is none, whatever the environment says
        self._connections = _Connections(timeout=TIMEOUT, proxy={"http": proxy, "https": proxy})
        self._client = stripe.StripeClient(
            key,
            stripe_version=API_VERSION,
            base_addresses={"api": api_base},
            max_network_retries=0,
            http_client=self._connections,
        )
        self._livemode = livemode
        self._clock = clock
        self._budget = budget
        self._attempts = attempts
        self._pause = pause
        self._next_at = clock.elapsed()
        self.calls = 0
        """How many have been made."""
        self.date: Reading | None = None
        """Stripe's own clock, as of its last answer."""

    def close(self) -> None:
        """Give up the connection."""
        self._connections.close()  # type: ignore[no-untyped-call]  # of the client's package

    def now(self) -> int:
        """Milliseconds since the epoch, by Stripe's clock once it has answered: its events are dated by it."""
        return self._clock.now() if self.date is None else self.date.now(self._clock.elapsed())

    # What is asked for. All of these raise ReadFailed, and WrongMode where the account is another than was meant.

    def meters(self) -> dict[str, Meter]:
        """The meter of each event name: of several the active one, or else the newest."""
        found: dict[str, Meter] = {}
        for each in map(_meter, self._rows("meters", self._client.v1.billing.meters.list, {})):
            if each.event_name not in found or each.status == "active":
                found[each.event_name] = each
        return found

    def prices(self, meter_id: str) -> list[Price]:
        """The active prices by which this meter's usage is billed."""
        params = {"recurring": {"meter": meter_id}, "active": True}
        rows = self._rows("prices", self._client.v1.prices.list, params)
        return [price for each in rows if (price := _price(each)).meter == meter_id]

    def customer(self, customer: str) -> Customer:
        """One customer; raises ``NotThere`` for one who never was."""
        return _customer(self._ask(f"customer {customer}", lambda: self._client.v1.customers.retrieve(customer)))

    def customers(self) -> Iterator[Customer]:
        """All customers that are not deleted, the newest first; one call for every hundred."""
        return map(_customer, self._rows("customers", self._client.v1.customers.list, {}))

    def summaries(
        self, meter_id: str, customer: str, start: int, end: int, *, window: Window | None = None
    ) -> list[Summary]:
        """What the customer used from ``start`` on and before ``end`` (seconds since the epoch), the newest first.

        Without a window it is one sum, and the bounds are whole minutes; else one for each UTC hour or day in which
        there was any. No row means that no usage is known. Raises ``NotThere`` where Stripe does not know the customer.
        """
        step = _SECONDS[window]
        if start % step or end % step or start >= end:
            raise ValueError(f"{start} to {end} is not made of whole {window or 'minute'}s")
        params: dict[str, Any] = {"customer": customer, "start_time": start, "end_time": end}
        if window is not None:
            params["value_grouping_window"] = window
        listing = self._client.v1.billing.meters.event_summaries.list
        rows = self._rows(f"usage of {customer}", lambda given: listing(meter_id, given), params)
        return [_summary(each) for each in rows]

    def minute(self, meter_id: str, customer: str, start: int) -> Summary:
        """What the customer used in the minute that begins at ``start``; a sum of 0 where no usage is known."""
        found = self.summaries(meter_id, customer, start, start + 60)
        return found[0] if found else Summary(start, start + 60, 0, 0)

    def event_name(self, meter_id: str) -> str:
        """The event name of a meter; raises ``NotThere`` for one that never was."""
        return _meter(
            self._ask(f"meter {meter_id}", lambda: self._client.v1.billing.meters.retrieve(meter_id))
        ).event_name

    def event(self, event_id: str) -> dict[str, Any]:
        """What Stripe has sent a notification of, in full and as it says it; raises ``NotThere``."""
        path = f"/v2/core/events/{quote(event_id, safe='')}"

        def ask() -> stripe.StripeObject:
            said = self._client.raw_request("get", path)
            # Not as an event of the client's: it fails on fields that are missing.
            return stripe.StripeObject.construct_from(said.data, None, last_response=said)

        found: dict[str, Any] = self._ask(f"event {event_id}", ask).to_dict()
        return found

    # How it is asked for

    def _rows(self, what: str, listing: Callable[[Any], Any], params: Mapping[str, Any]) -> Iterator[Any]:
        after: dict[str, str] = {}
        while True:
            page = self._ask(what, partial(listing, {**params, **after, "limit": PAGE}))
            if getattr(page, "object", None) != "list":
                raise _not_stripes(what)
            yield from page.data
            if not page.has_more:
                return
            if not page.data or page.data[-1].id == after.get("starting_after"):
                raise ReadFailed(f"Stripe's list of {what} has no end: tell its support, or ask again later")
            after = {"starting_after": page.data[-1].id}

    def _ask(self, what: str, call: Callable[[], Any]) -> Any:
        for attempt in range(1, self._attempts + 1):
            self._pace(what)
            try:
                found = call()
            except stripe.StripeError as failed:
                self._note_date(failed.headers or {})
                if attempt == self._attempts or not _passing(failed):
                    raise _failure(what, failed, attempt) from None
                self._pause(0.5 * 2 ** (attempt - 1))
            else:
                return self._checked(what, found)
        raise Silent(f"Stripe was not asked ({what})")

    def _pace(self, what: str) -> None:
        if self._budget is not None and self.calls >= self._budget:
            raise BudgetSpent(f"{what}: {self.calls} calls have been made, and no more were allowed")
        self.calls += 1
        now = self._clock.elapsed()
        if now < self._next_at:
            self._pause((self._next_at - now) / 1000)
        self._next_at = max(now, self._next_at) + 1000 // RATE[self._livemode]

    def _checked(self, what: str, found: Any) -> Any:
        if not isinstance(found, stripe.StripeObject):
            raise _not_stripes(what)
        self._note_date(found.last_response.headers if found.last_response else {})
        rows: list[Any] = found["data"] if getattr(found, "object", None) == "list" else [found]
        if any(getattr(each, "livemode", self._livemode) != self._livemode for each in rows):
            raise WrongMode(
                f"stripe.livemode is {str(self._livemode).lower()}, but Stripe answered in "
                f"{'test' if self._livemode else 'live'} mode: the key belongs to another account than was meant"
            )
        return found

    def _note_date(self, headers: Mapping[str, Any]) -> None:
        try:
            date = parsedate_to_datetime(headers.get("Date", ""))
        except ValueError:
            return
        self.date = Reading(int(date.timestamp() * 1000), self._clock.elapsed())


class _Body(msgspec.Struct):
    error: Error | msgspec.UnsetType = msgspec.UNSET


def _understood(body: bytes) -> bytes:
    """The body of an answer if it can be Stripe's, else nothing: on many a proxy's words Stripe's client fails."""
    try:
        body.decode()
        msgspec.json.decode(body, type=_Body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return b""
    return body


class _Connections(stripe.RequestsClient):
    """Requests as Stripe's client makes them, whoever answers."""

    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None, post_data: Any = None, **more: Any
    ) -> tuple[Any, int, Mapping[str, str]]:
        body, status, answered = super().request(method, url, headers, post_data, **more)
        return _understood(body), status, answered


@contextmanager
def reading(
    key: str, *, api_base: str, livemode: bool, clock: Clock, budget: int | None = None, attempts: int = ATTEMPTS
) -> Iterator[StripeReads]:
    """A client, for as long as it is needed."""
    reads = StripeReads(key, api_base=api_base, livemode=livemode, clock=clock, budget=budget, attempts=attempts)
    try:
        yield reads
    finally:
        reads.close()


def _not_stripes(what: str) -> ReadFailed:
    return ReadFailed(f"{what}: the answer is not Stripe's. Is stripe.api_base right, is a proxy in between?")


def _passing(failed: stripe.StripeError) -> bool:
    status = failed.http_status
    return status is None or status in {409, 429} or status >= 500


def _failure(what: str, failed: stripe.StripeError, attempts: int) -> ReadFailed:
    status, said = failed.http_status, failed.user_message or type(failed).__name__
    code = getattr(failed.error, "code", None)
    times = "once" if attempts == 1 else f"{attempts} times"
    if status is None:
        untrusted = type(failed.__cause__).__name__ == "SSLError"
        return Silent(
            f"{what}: the certificate is not trusted: where a proxy looks into TLS, name its authority in SSL_CERT_FILE"
            if untrusted
            else f"Stripe does not answer ({what}, asked {times}): try again later"
        )
    if 200 <= status < 400:
        return _not_stripes(what)
    if _passing(failed):
        return Silent(f"Stripe does not say ({what}, asked {times}, {status}: {said}): try again later")
    if status in {401, 403}:
        return KeyRefused(f"{what}: the Stripe key may not do this ({status}: {said}): give it this permission")
    if status == 404 or code == "resource_missing":
        return NotThere(f"{what}: {said}")
    return ReadFailed(f"{what}: Stripe refuses to say ({status}: {said})")


def _meter(each: Any) -> Meter:
    values = getattr(each, "value_settings", None)
    return Meter(
        id=each.id,
        event_name=each.event_name,
        status=each.status,
        formula=each.default_aggregation.formula,
        event_time_window=each.event_time_window,
        customer_key=each.customer_mapping.event_payload_key,
        value_key=values.event_payload_key if values else None,
    )


def _price(each: Any) -> Price:
    recurring = each.recurring
    amount = getattr(each, "unit_amount_decimal", None)
    return Price(
        id=each.id,
        product=each.product if isinstance(each.product, str) else each.product.id,
        meter=getattr(recurring, "meter", None) if recurring else None,
        currency=each.currency,
        interval=recurring.interval if recurring else None,
        lookup_key=getattr(each, "lookup_key", None),
        unit_amount=None if amount is None else str(amount),
    )


def _customer(each: Any) -> Customer:
    deleted = bool(getattr(each, "deleted", False))
    return Customer(each.id, None if deleted else getattr(each, "name", None), deleted, _plain(each))


def _plain(each: Any) -> dict[str, str]:
    found = getattr(each, "metadata", None)
    return {} if found is None else {str(name): str(value) for name, value in found.to_dict().items()}


def _summary(each: Any) -> Summary:
    said = each.aggregated_value
    # The shortest decimal that is this fraction: what it was made from, up to 15 digits.
    value = int((Decimal(repr(said)) * SCALE).to_integral_value())
    around = Decimal(math.ulp(float(said))) * 8
    return Summary(each.start_time, each.end_time, value, math.ceil(around * SCALE))
