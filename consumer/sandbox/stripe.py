"""A stand-in for Stripe's usage billing: meters, prices, customers, meter events, summaries, error reports.

`StripeModel` is a Stripe account in memory. It answers as Stripe does, where that is known, and where it is not known
takes the side that is harder for a client. It also keeps the truth that Stripe does not tell: every event it accepted,
what would be billed, and which identifiers arrived with more than one content or were counted more than once.
`consumer.sandbox.stripe_server` serves it over HTTP.

The model does no I/O and has no clock: it asks the callable it is given. Several threads may use it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import orjson

from consumer.sandbox.stripe_catalogue import StripeCatalogue
from consumer.sandbox.stripe_objects import KEPT_FOR, MeterEvent, Violation
from consumer.sandbox.stripe_wire import Answer, Call, Refused, secret_of

SECRET_KEY = "sk_test_standin"  # noqa: S105 - opens nothing but the stand-in

_EVENTS = "/v1/billing/meter_events"


class _Stored(NamedTuple):
    fingerprint: int
    result: Answer | MeterEvent
    until: float


class StripeModel(StripeCatalogue):
    """A Stripe account behind Stripe's front door: keys, limits, stored answers, one request at a time.

    `keys` maps every valid secret key to the permissions of a restricted key, or to None for all. `endpoint_rate`
    limits meter events per second, `global_rate` everything else in live mode and everything in test mode.
    The other parameters are those of `StripeAccount`.
    """

    def __init__(
        self,
        now: Callable[[], float],
        *,
        keys: Mapping[str, frozenset[str] | None] | None = None,
        accept_any_customer: bool = False,
        lag: float = 0,
        endpoint_rate: int | None = None,
        global_rate: int | None = None,
    ) -> None:
        super().__init__(now, accept_any_customer=accept_any_customer, lag=lag)
        self.keys = dict(keys or {SECRET_KEY: None})
        self.endpoint_rate, self.global_rate = endpoint_rate, global_rate
        self.stats: Counter[str] = Counter()
        """What was answered, by kind: accepted, duplicate, replayed, lock_timeout, rate_limited, …"""
        self._contents: dict[str, tuple[object, ...]] = {}
        self._stored: dict[str, _Stored] = {}
        self._expiring: deque[str] = deque()
        self._keys_in_use: set[str] = set()
        self._in_flight: set[tuple[str, str]] = set()
        self._second = 0
        self._calls: Counter[str] = Counter()
        self._routes: dict[tuple[str, str], tuple[str, Callable[..., Answer | MeterEvent]]] = {
            ("POST", _EVENTS): ("billing_meter_event_write", self.create_event),
            ("POST", "/v1/billing/meter_event_adjustments"): ("billing_meter_event_write", self._adjust),
            ("POST", "/v1/billing/meters"): ("billing_meter_write", self._create_meter),
            ("GET", "/v1/billing/meters"): ("billing_meter_read", self._list_meters),
            ("GET", "/v1/billing/meters/*"): ("billing_meter_read", self._retrieve_meter),
            ("POST", "/v1/billing/meters/*"): ("billing_meter_write", self._update_meter),
            ("POST", "/v1/billing/meters/*/deactivate"): ("billing_meter_write", self._deactivate_meter),
            ("POST", "/v1/billing/meters/*/reactivate"): ("billing_meter_write", self._reactivate_meter),
            ("GET", "/v1/billing/meters/*/event_summaries"): ("billing_meter_read", self._summarise),
            ("POST", "/v1/customers"): ("customer_write", self._create_customer),
            ("GET", "/v1/customers"): ("customer_read", self._list_customers),
            ("GET", "/v1/customers/*"): ("customer_read", self._retrieve_customer),
            ("DELETE", "/v1/customers/*"): ("customer_write", self._delete_customer),
            ("POST", "/v1/products"): ("product_write", self._create_product),
            ("GET", "/v1/products"): ("product_read", self._list_products),
            ("GET", "/v1/products/*"): ("product_read", self._retrieve_product),
            ("POST", "/v1/prices"): ("plan_write", self._create_price),
            ("GET", "/v1/prices"): ("plan_read", self._list_prices),
            ("GET", "/v1/prices/*"): ("plan_read", self._retrieve_price),
            ("POST", "/v1/subscriptions"): ("subscription_write", self._create_subscription),
            ("GET", "/v1/subscriptions"): ("subscription_read", self._list_subscriptions),
            ("GET", "/v2/core/events/*"): ("event_read", self._retrieve_report),
        }

    # Answering. A request is admitted, executed and released, so that a server may let time pass in between.

    def handle(self, call: Call) -> Answer:
        """Answer a request at once."""
        self.receive(call)
        answer = self.admit(call)
        if answer is None:
            try:
                answer = self.execute(call)
            finally:
                self.release(call)
        return answer

    def receive(self, call: Call) -> None:
        """Note that a request arrived, whatever becomes of it."""
        with self._lock:
            self.stats["requests"] += 1
            if call.path != _EVENTS or not call.identifier:
                return
            params = call.params
            content = (params.get("event_name"), params.get("timestamp"), params.get("payload"))
            first = self._contents.setdefault(call.identifier, content)
            if first != content:
                detail = f"{first} and then {content}"
                self.violations.append(Violation("content changed", call.identifier, detail))

    def admit(self, call: Call) -> Answer | None:
        """Answer a request that must not reach its endpoint; None admits it, and then it must be released."""
        with self._lock:
            try:
                livemode = self._authorize(call)
                self._limit(call, livemode)
                replay = self._replay(call)
                if replay is not None:
                    return self._count("replayed", replay)
                self._occupy(call)
            except Refused as refused:
                return self._count(refused.result, refused.answer)
            return None

    def execute(self, call: Call, *, fail: Literal["before", "after", ""] = "") -> Answer:
        """Do what an admitted request asks for and keep the answer under its key.

        `fail` answers with an internal error instead, before or after having done it.
        """
        with self._lock:
            result: Answer | MeterEvent
            try:
                if fail == "before":
                    raise _internal_error()
                _, endpoint, ids = self._route(call)
                result = endpoint(call, *ids)
                self.stats["accepted" if isinstance(result, MeterEvent) else "ok"] += 1
                if fail == "after":
                    raise _internal_error()
            except Refused as refused:
                self.stats[refused.result] += 1
                if not refused.stored:
                    return refused.answer
                result = refused.answer
            if call.idempotency_key and call.method == "POST":
                self._stored[call.idempotency_key] = _Stored(_fingerprint(call), result, self.now() + KEPT_FOR)
                self._expiring.append(call.idempotency_key)
            return _render(result)

    def release(self, call: Call) -> None:
        """Let the next request for the same customer and meter, or with the same key, in."""
        with self._lock:
            self._keys_in_use.discard(call.idempotency_key)
            self._in_flight.discard(self._subject(call))

    def refuse(self, refused: Refused) -> Answer:
        """Answer without looking at the request, as a limiter in front of the endpoints does."""
        with self._lock:
            return self._count(refused.result, refused.answer)

    def _count(self, result: str, answer: Answer) -> Answer:
        self.stats[result] += 1
        return answer

    def _route(self, call: Call) -> tuple[str, Callable[..., Answer | MeterEvent], list[str]]:
        found = self._routes.get((call.method, call.path))
        if found is not None and "*" not in call.path:
            return *found, []
        parts = call.path.split("/")
        for (method, pattern), (permission, endpoint) in self._routes.items():
            wanted = pattern.split("/")
            if method == call.method and len(wanted) == len(parts):
                ids = [part for part, want in zip(parts, wanted, strict=True) if want == "*"]
                if [want if want == "*" else part for part, want in zip(parts, wanted, strict=True)] == wanted:
                    return permission, endpoint, ids
        message = f"Unrecognized request URL ({call.method}: {call.path}). Please see https://stripe.com/docs."
        raise Refused("unrecognized", message, status=404)

    def _authorize(self, call: Call) -> bool:
        secret = secret_of(call.authorization)
        if secret not in self.keys:
            message = "You did not provide an API key. Provide it in the Authorization header, using Bearer auth."
            if secret:
                message = f"Invalid API Key provided: {_masked(secret)}"
            raise Refused("unauthorized", message, status=401)
        permission, _, _ = self._route(call)
        allowed = self.keys[secret]
        if allowed is not None and permission not in allowed:
            message = (
                f"The provided key '{_masked(secret)}' does not have the required permissions for this endpoint. "
                f"Having the 'rak_{permission}' permission would allow this request to continue."
            )
            raise Refused("forbidden", message, status=403)
        return "_live_" in secret

    def _limit(self, call: Call, livemode: bool) -> None:
        if int(self.now()) != self._second:
            self._second = int(self.now())
            self._calls.clear()
        event = call.path == _EVENTS
        limits = [
            ("endpoint-rate", self.endpoint_rate, event),
            ("global-rate", self.global_rate, not (event and livemode)),
        ]
        for reason, rate, applies in limits:
            if rate is not None and applies:
                self._calls[reason] += 1
                if self._calls[reason] > rate:
                    raise rate_limited(reason)

    def _replay(self, call: Call) -> Answer | None:
        while self._expiring and self._stored[self._expiring[0]].until <= self.now():
            del self._stored[self._expiring.popleft()]
        stored = self._stored.get(call.idempotency_key)
        if stored is None or call.method != "POST":
            return None
        if stored.fingerprint != _fingerprint(call):
            message = (
                "Keys for idempotent requests can only be used with the same parameters they were first used with. "
                f"Try using a key other than '{call.idempotency_key}' if you meant to execute a different request."
            )
            raise Refused("key_reused", message, kind="idempotency_error")
        answer = _render(stored.result)
        return Answer(answer.status, answer.body, {**answer.headers, "Idempotent-Replayed": "true"})

    def _occupy(self, call: Call) -> None:
        if call.idempotency_key in self._keys_in_use:
            message = (
                "There is currently another in-progress request using this Idempotent Key. Please try again later."
            )
            code = "idempotency_key_in_use"
            raise Refused("key_in_use", message, status=409, kind="idempotency_error", code=code)
        subject = self._subject(call)
        if subject in self._in_flight:
            raise lock_timeout()
        if subject[1]:
            self._in_flight.add(subject)
        if call.idempotency_key:
            self._keys_in_use.add(call.idempotency_key)

    def _subject(self, call: Call) -> tuple[str, str]:
        payload = call.params.get("payload")
        meter = self._meter_of.get(str(call.params.get("event_name")))
        if call.path != _EVENTS or meter is None or not isinstance(payload, dict):
            return "", ""
        return meter.event_name, str(payload.get(meter.customer_key, ""))


def rate_limited(reason: str) -> Refused:
    """The answer of a limiter; it names itself in a header."""
    message = "Request rate limit exceeded. Learn more about rate limits here https://stripe.com/docs/rate-limits."
    headers = {"Stripe-Rate-Limited-Reason": reason}
    return Refused("rate_limited", message, status=429, code="rate_limit", headers=headers)


def lock_timeout() -> Refused:
    """The answer to a second request for the same customer and meter while the first is at work."""
    message = (
        "This object cannot be accessed right now because another API request or Stripe process is currently "
        "accessing it. If you see this error intermittently, retry the request."
    )
    return Refused("lock_timeout", message, status=429, code="lock_timeout", headers={"stripe-should-retry": "true"})


def _internal_error() -> Refused:
    message = "An unknown error occurred."
    return Refused(
        "error", message, status=500, kind="api_error", headers={"stripe-should-retry": "false"}, stored=True
    )


def _masked(secret: str) -> str:
    return f"{secret[:8]}{'*' * 8}{secret[-4:]}" if len(secret) > 16 else f"{secret[:8]}********"


def _fingerprint(call: Call) -> int:
    return hash((call.path, frozenset(call.pairs)))


def _render(result: Answer | MeterEvent) -> Answer:
    return result if isinstance(result, Answer) else Answer(200, orjson.dumps(result.shown()))


if __name__ == "__main__":
    from consumer.sandbox.stripe_server import main

    main()
