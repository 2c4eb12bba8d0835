"""The Stripe stand-in answers as Stripe does, and knows what Stripe would bill."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import aiohttp
import pytest
import stripe as sdk

from consumer.sandbox.stripe import SECRET_KEY, StripeModel
from consumer.sandbox.stripe_server import Clock, Fault, Faults, StripeStandIn
from consumer.sandbox.stripe_wire import read_call

NOW = 1_760_000_040  # 40 seconds into a minute
MINUTE = NOW // 60 * 60
DAY = 86_400
LIVE, READ_ONLY = "sk_live_standin", "rk_test_reader"
EVENTS = "/v1/billing/meter_events"
NO_PAYLOAD = {"payload[stripe_customer_id]": None, "payload[value]": None}


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: Any

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


def ask(stand_in: StripeStandIn, method: str, path: str, params: dict[str, Any] | None = None, **headers: str) -> Reply:
    """Send one request on a connection of its own; `key` is the idempotency key, `api_key` the secret key."""
    sent = {"Authorization": f"Bearer {headers.pop('api_key', SECRET_KEY)}"}
    if headers.get("key"):
        sent["Idempotency-Key"] = headers.pop("key")
    sent.update(headers)
    sent.pop("key", None)
    connection = http.client.HTTPConnection(urlsplit(stand_in.url).netloc, timeout=10)
    try:
        if method == "POST" and path.startswith("/_sandbox/"):
            connection.request(method, path, json.dumps(params or {}), sent)
        elif method == "POST":
            connection.request(method, path, urlencode(params or {}), sent)
        else:
            connection.request(method, f"{path}?{urlencode(params or {})}", headers=sent)
        response = connection.getresponse()
        body = response.read()
        return Reply(response.status, response.headers, json.loads(body) if body else None)
    finally:
        connection.close()


def event(identifier: str = "e1", value: str = "1", **changes: Any) -> dict[str, Any]:
    """The parameters of a meter event; a change to None leaves the parameter out."""
    params = {
        "event_name": "tokens",
        "payload[stripe_customer_id]": "cus_1",
        "payload[value]": value,
        "identifier": identifier,
        "timestamp": MINUTE,
    }
    return {name: value for name, value in {**params, **changes}.items() if value is not None}


def send(stand_in: StripeStandIn, identifier: Any = "e1", value: Any = "1", **more: Any) -> Reply:
    """Send a meter event with the identifier as idempotency key, unless another is given."""
    headers = {name: more.pop(name) for name in ("key", "api_key") if name in more}
    headers.setdefault("key", identifier or "")
    return ask(stand_in, "POST", EVENTS, event(identifier, value, **more), **headers)


@contextmanager
def hanging(stand_in: StripeStandIn, params: dict[str, Any], key: str = "") -> Iterator[None]:
    """Send a meter event and hang up at the end without waiting for the answer."""
    connection = http.client.HTTPConnection(urlsplit(stand_in.url).netloc, timeout=10)
    headers = {"Authorization": f"Bearer {SECRET_KEY}", "Idempotency-Key": key}
    try:
        connection.request("POST", EVENTS, urlencode(params), headers)
        yield
    finally:
        connection.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that is about to come true."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def serve(**options: Any) -> StripeStandIn:
    """A stand-in whose clock stands, with a meter and a customer."""
    keys = {SECRET_KEY: None, LIVE: None, READ_ONLY: frozenset({"billing_meter_read"})}
    stand_in = StripeStandIn(clock=Clock(lambda: float(NOW)), **{"keys": keys, **options})
    stand_in.model.add_meter("tokens")
    stand_in.model.add_customer("cus_1")
    return stand_in


@pytest.fixture
def stripe() -> Iterator[StripeStandIn]:
    with serve() as stand_in:
        yield stand_in


# Meter events


def test_an_event_is_accepted_and_counted_exactly(stripe: StripeStandIn) -> None:
    reply = send(stripe, "e1", "0.1")
    send(stripe, "e2", "0.2", timestamp=MINUTE + 59)
    send(stripe, "e3", "-0.3", timestamp=MINUTE + 60)

    assert reply.status == 200
    assert reply.body == {
        "object": "billing.meter_event",
        "created": NOW,
        "event_name": "tokens",
        "identifier": "e1",
        "livemode": False,
        "payload": {"stripe_customer_id": "cus_1", "value": "0.1"},
        "timestamp": MINUTE,
    }
    assert stripe.model.billed() == {
        ("tokens", "cus_1", MINUTE): Decimal("0.3"),
        ("tokens", "cus_1", MINUTE + 60): Decimal("-0.3"),
    }
    assert stripe.model.billed_by("tokens", "cus_1") == 0
    assert stripe.model.violations == []


def test_every_answer_carries_the_headers_of_the_api(stripe: StripeStandIn) -> None:
    stripe.clock.advance(DAY)
    headers = send(stripe, timestamp=None, key="k1").headers

    assert headers["Date"] == "Fri, 10 Oct 2025 08:54:00 GMT"
    assert headers["Request-Id"].startswith("req_")
    assert headers["Idempotency-Key"] == "k1"
    assert headers["Stripe-Version"]
    assert ask(stripe, "GET", "/v1/billing/meters", None, **{"Stripe-Version": "2020-08-27"}).headers[
        "Stripe-Version"
    ] == ("2020-08-27")


@pytest.mark.parametrize(
    ("changes", "message", "code"),
    [
        ({"event_name": None}, "Missing required param: event_name.", "parameter_missing"),
        (NO_PAYLOAD, "Missing required param: payload.", "parameter_missing"),
        ({"colour": "red"}, "Received unknown parameter: colour", "parameter_unknown"),
        ({"identifier": "x" * 101}, "Invalid string: xxxx...xxxx; must be at most 100 characters", None),
        ({"event_name": "x" * 101}, "Invalid string: xxxx...xxxx; must be at most 100 characters", None),
        ({"timestamp": "2025-10-09T08:54:00Z"}, "Invalid integer: 2025-10-09T08:54:00Z", "parameter_invalid_integer"),
        ({"timestamp": f"{NOW}.5"}, f"Invalid integer: {NOW}.5", "parameter_invalid_integer"),
        ({"identifier": ""}, "You passed an empty string for 'identifier'", "parameter_invalid_empty"),
        ({"payload[region][name]": "eu"}, "Invalid string: {'name': 'eu'}", None),
        ({"payload[stripe_customer_id]": None}, "must contain the customer under the key 'stripe_customer_id'", None),
        ({"payload[value]": None}, "must contain a value under the key 'value'", None),
        ({"payload[value]": "1e-05"}, "must be a plain decimal number. Received 1e-05.", None),
        ({"payload[value]": "nan"}, "must be a plain decimal number. Received nan.", None),
        ({"payload[value]": "1234567890.123456"}, "can have at most 15 digits. Received 1234567890.123456.", None),
        ({"payload[stripe_customer_id]": "cus_2"}, "No such customer: 'cus_2'", "resource_missing"),
        ({"event_name": "steps"}, 'No active meter found for event name "steps"', None),
        ({"timestamp": NOW - 35 * DAY - 1}, "The event timestamp cannot be more than 35 days in past. Expected", None),
        ({"timestamp": NOW - 35 * DAY - 1}, f" a timestamp greater than or equal to {NOW - 35 * DAY}.", None),
        ({"timestamp": NOW + 301}, f"Expected a timestamp less than or equal to {NOW + 300}.", None),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(
    stripe: StripeStandIn, changes: dict[str, Any], message: str, code: str | None
) -> None:
    reply = send(stripe, **changes)

    assert (reply.status, reply.body["error"]["type"]) == (400, "invalid_request_error")
    assert message in reply.message
    assert reply.body["error"].get("code") == code
    assert stripe.model.events == []


@pytest.mark.parametrize(
    "changes",
    [
        {"timestamp": NOW - 35 * DAY},
        {"timestamp": NOW + 300},
        {"timestamp": None},
        {"identifier": None},
        {"payload[region]": "eu"},
        {"payload[value]": "-0.000000000000123"},
        {"payload[value]": "123456789012345"},
        {"expand[]": "payload"},
    ],
)
def test_what_is_just_within_the_limits_is_accepted(stripe: StripeStandIn, changes: dict[str, Any]) -> None:
    assert send(stripe, **changes).status == 200


def test_a_count_meter_needs_no_value(stripe: StripeStandIn) -> None:
    stripe.model.add_meter("calls", formula="count")
    for identifier in ("c1", "c2"):
        send(stripe, identifier, event_name="calls", **{"payload[value]": None})

    assert stripe.model.billed_by("calls", "cus_1") == 2


def test_any_customer_is_known_where_that_was_asked_for() -> None:
    with serve(accept_any_customer=True) as stripe:
        assert send(stripe, "e1", **{"payload[stripe_customer_id]": "cus_new"}).status == 200
        assert send(stripe, "e2", **{"payload[stripe_customer_id]": "somebody"}).status == 400


def test_the_model_answers_without_a_server() -> None:
    model = StripeModel(lambda: float(NOW), accept_any_customer=True)
    model.add_meter("tokens")
    call = read_call("POST", EVENTS, urlencode(event()), f"Bearer {SECRET_KEY}", "k1")

    assert [model.handle(call).status for _ in range(2)] == [200, 200]
    assert model.stats == {"requests": 2, "accepted": 1, "replayed": 1}


# Uniqueness and stored answers


def test_an_identifier_is_refused_for_24_hours_and_then_counts_again(stripe: StripeStandIn) -> None:
    send(stripe, "e1", key="k1")

    stripe.clock.advance(DAY - 1)
    refused = send(stripe, "e1", key="k2")
    assert (refused.status, refused.message) == (400, "An event already exists with identifier e1.")
    assert "code" not in refused.body["error"]
    assert refused.headers["stripe-should-retry"] == "false"
    assert stripe.model.violations == []

    stripe.clock.advance(1)
    assert send(stripe, "e1", key="k3").status == 200
    assert stripe.model.billed_by("tokens", "cus_1") == 2
    assert [violation.kind for violation in stripe.model.violations] == ["counted again"]


def test_the_same_key_replays_the_answer_for_24_hours(stripe: StripeStandIn) -> None:
    first = send(stripe)
    stripe.clock.advance(DAY - 1)
    again = send(stripe)

    assert (again.status, again.body) == (first.status, first.body)
    assert first.headers["Idempotent-Replayed"] is None
    assert again.headers["Idempotent-Replayed"] == "true"
    assert stripe.model.billed_by("tokens", "cus_1") == 1

    stripe.clock.advance(1)
    assert send(stripe).headers["Idempotent-Replayed"] is None


def test_a_key_belongs_to_its_parameters(stripe: StripeStandIn) -> None:
    send(stripe, "e1", key="k1")
    reply = send(stripe, "e2", key="k1")

    assert (reply.status, reply.body["error"]["type"]) == (400, "idempotency_error")
    assert stripe.model.stats["key_reused"] == 1


@pytest.mark.parametrize(("fault", "billed"), [(Fault.ERROR, 0), (Fault.ACCEPT_ERROR, 1)])
def test_a_500_is_replayed_until_another_key_finds_out_what_happened(
    stripe: StripeStandIn, fault: Fault, billed: int
) -> None:
    stripe.faults.script = [fault]
    first, again = send(stripe), send(stripe)

    assert (first.status, first.body["error"]["type"]) == (500, "api_error")
    assert (again.status, again.headers["Idempotent-Replayed"]) == (500, "true")
    assert stripe.model.billed_by("tokens", "cus_1") == billed
    assert send(stripe, key="e1:1").status == (400 if billed else 200)
    assert stripe.model.billed_by("tokens", "cus_1") == 1


def test_what_was_wrong_with_the_request_alone_is_not_stored(stripe: StripeStandIn) -> None:
    assert send(stripe, "e1", "1e3", key="k1").status == 400
    assert send(stripe, "e2", key="k1").status == 200


def test_what_was_wrong_with_the_account_is_stored(stripe: StripeStandIn) -> None:
    changes = {"payload[stripe_customer_id]": "cus_2"}
    assert send(stripe, **changes).status == 400
    stripe.model.add_customer("cus_2")

    assert send(stripe, **changes).headers["Idempotent-Replayed"] == "true"
    assert send(stripe, key="e1:1", **changes).status == 200


def test_an_identifier_with_two_contents_is_a_violation_even_if_refused(stripe: StripeStandIn) -> None:
    stripe.faults.script = [Fault.RATE_LIMITED]
    send(stripe, "e1", "1")
    send(stripe, "e1", "2")
    send(stripe, "e1", "2e9", key="k2")

    assert [(violation.kind, violation.identifier) for violation in stripe.model.violations] == [
        ("content changed", "e1")
    ] * 2


# Keys


def test_keys_decide_who_may_do_what_in_which_mode(stripe: StripeStandIn) -> None:
    basic = base64.b64encode(f"{SECRET_KEY}:".encode()).decode()

    assert send(stripe, api_key="sk_test_wrong").status == 401
    assert "sk_test_wrong" not in send(stripe, api_key="sk_test_wrong").message
    assert ask(stripe, "POST", EVENTS, event(), Authorization="").status == 401
    assert send(stripe, api_key=READ_ONLY).status == 403
    assert ask(stripe, "GET", "/v1/billing/meters", api_key=READ_ONLY).status == 200
    assert send(stripe, api_key=LIVE).body["livemode"] is True
    assert ask(stripe, "POST", EVENTS, event("e2"), Authorization=f"Basic {basic}").body["livemode"] is False
    assert ask(stripe, "GET", "/v1/refunds").status == 404
    assert len(stripe.model.events) == 2


# Limits


def test_one_call_at_a_time_for_each_customer_and_meter(stripe: StripeStandIn) -> None:
    stripe.model.add_customer("cus_2")
    stripe.faults.by_identifier = {"e1": [Fault.ACCEPT_HANG]}
    with hanging(stripe, event("e1"), key="e1"):
        until(lambda: stripe.model.stats["accepted"] == 1)
        conflict, other, same_key = (
            send(stripe, "e2"),
            send(stripe, "e3", **{"payload[stripe_customer_id]": "cus_2"}),
            send(stripe, "e1"),
        )

    assert (conflict.status, conflict.body["error"]["code"]) == (429, "lock_timeout")
    assert conflict.headers["Stripe-Rate-Limited-Reason"] is None
    assert conflict.headers["stripe-should-retry"] == "true"
    assert other.status == 200
    assert same_key.headers["Idempotent-Replayed"] == "true"
    until(lambda: send(stripe, "e2").status == 200)


def test_a_key_in_use_is_a_conflict_and_nothing_is_stored(stripe: StripeStandIn) -> None:
    stripe.faults.script = [Fault.HANG]
    with hanging(stripe, event(), key="e1"):
        until(lambda: stripe.model.stats["fault_hang"] == 1)
        conflict = send(stripe)

    assert (conflict.status, conflict.body["error"]["code"]) == (409, "idempotency_key_in_use")
    until(lambda: send(stripe).status == 200)


def test_a_request_whose_client_gave_up_is_still_executed(stripe: StripeStandIn) -> None:
    stripe.faults.latency = (0.05, 0.05)
    with hanging(stripe, event()):
        until(lambda: stripe.model.stats["requests"] == 1)

    until(lambda: stripe.model.billed_by("tokens", "cus_1") == 1)


@pytest.mark.parametrize(
    ("options", "api_key", "reasons"),
    [
        ({"endpoint_rate": 2}, LIVE, [None, None, "endpoint-rate"]),
        ({"global_rate": 2}, SECRET_KEY, [None, None, "global-rate"]),
        ({"global_rate": 2}, LIVE, [None, None, None]),
    ],
)
def test_a_limiter_counts_calls_per_second_and_names_itself(
    options: dict[str, int], api_key: str, reasons: list[str | None]
) -> None:
    with serve(**options) as stripe:
        replies = [send(stripe, f"e{number}", api_key=api_key) for number in range(3)]
        assert [reply.headers["Stripe-Rate-Limited-Reason"] for reply in replies] == reasons
        if replies[2].status == 429:
            assert replies[2].body["error"]["code"] == "rate_limit"
        stripe.clock.advance(1)
        assert send(stripe, "e2", api_key=api_key).status == 200


# Faults


@pytest.mark.parametrize(
    ("fault", "billed"),
    [(Fault.LOSE, 0), (Fault.ACCEPT_LOSE, 1), (Fault.ACCEPT_CUT, 1), (Fault.HANG, 0), (Fault.ACCEPT_HANG, 1)],
)
def test_an_answer_can_be_lost_with_and_without_the_event(stripe: StripeStandIn, fault: Fault, billed: int) -> None:
    stripe.faults.script = [fault]
    connection = http.client.HTTPConnection(urlsplit(stripe.url).netloc, timeout=0.3)
    headers = {"Authorization": f"Bearer {SECRET_KEY}"}
    connection.request("POST", EVENTS, urlencode(event()), headers)
    with pytest.raises((OSError, http.client.HTTPException)):
        connection.getresponse().read()
    connection.close()

    until(lambda: stripe.model.stats[f"fault_{fault}"] == 1)
    until(lambda: stripe.model.billed_by("tokens", "cus_1") == billed)


def test_anything_can_be_answered_with_and_without_the_event(stripe: StripeStandIn) -> None:
    page = {"status": 502, "body": "<html>", "headers": {"Content-Type": "text/html"}}
    ask(stripe, "POST", "/_sandbox/faults", {"script": [page, {**page, "accepted": True}]})
    connection = http.client.HTTPConnection(urlsplit(stripe.url).netloc, timeout=10)
    for accepted in (0, 1):
        connection.request("POST", EVENTS, urlencode(event()), {"Authorization": f"Bearer {SECRET_KEY}"})
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Type"], response.read()) == (502, "text/html", b"<html>")
        assert stripe.model.billed_by("tokens", "cus_1") == accepted
    connection.close()
    assert stripe.model.stats["fault_instead"] == 2


def test_rates_are_reproducible_and_reads_have_a_script_of_their_own(stripe: StripeStandIn) -> None:
    def statuses() -> list[int]:
        stripe.faults.update({"seed": 7})
        return [send(stripe, f"e{number}").status for number in range(30)]

    stripe.faults.rates = {Fault.RATE_LIMITED: 0.3, Fault.LOCK_TIMEOUT: 0.2}
    first = statuses()
    assert 5 < first.count(429) < 25
    assert statuses() == first

    stripe.faults.reads = [Fault.ERROR, None]
    assert [ask(stripe, "GET", "/v1/billing/meters").status for _ in range(2)] == [500, 200]


def test_faults_are_planned_by_request_identifier_or_order() -> None:
    faults = Faults(
        plan=lambda number, _: Fault.RATE_LIMITED if number == 0 else None,
        by_identifier={"e2": [None, Fault.ERROR]},
        script=[Fault.LOCK_TIMEOUT],
    )
    with serve(faults=faults) as stripe:
        order = ["e1", "e2", "e1", "e2", "e1"]
        statuses = [send(stripe, each, key=f"k{number}").status for number, each in enumerate(order)]

    assert statuses == [429, 200, 429, 500, 200]


def test_latency_is_spent_before_the_answer(stripe: StripeStandIn) -> None:
    stripe.faults.latency = (0.05, 0.06)
    started = time.monotonic()
    send(stripe)

    assert time.monotonic() - started >= 0.05


def test_down_refuses_connections_and_keeps_what_it_knows(stripe: StripeStandIn) -> None:
    send(stripe)
    stripe.down()
    with pytest.raises(ConnectionRefusedError):
        send(stripe)
    stripe.up()

    assert send(stripe).headers["Idempotent-Replayed"] == "true"


# Meters, customers, summaries, adjustments


def test_meters_are_created_listed_renamed_and_deactivated(stripe: StripeStandIn) -> None:
    params = {
        "display_name": "Seconds",
        "event_name": "seconds",
        "default_aggregation[formula]": "sum",
        "customer_mapping[type]": "by_id",
        "customer_mapping[event_payload_key]": "who",
        "value_settings[event_payload_key]": "much",
    }
    created = ask(stripe, "POST", "/v1/billing/meters", params).body
    path = f"/v1/billing/meters/{created['id']}"
    payload = {"payload[stripe_customer_id]": None, "payload[value]": None, "payload[who]": "cus_1", "payload[much]": 3}

    assert created["status"] == "active"
    assert ask(stripe, "GET", path).body == created
    assert send(stripe, "s1", event_name="seconds", **payload).status == 200
    assert ask(stripe, "POST", "/v1/billing/meters", params).status == 400
    assert ask(stripe, "POST", path, {"event_name": "other"}).status == 400
    assert ask(stripe, "POST", path, {"display_name": "Other"}).body["display_name"] == "Other"
    assert ask(stripe, "POST", f"{path}/deactivate").body["status_transitions"] == {"deactivated_at": NOW}
    assert send(stripe, "s2", event_name="seconds", **payload).message == (
        'No active meter found for event name "seconds"'
    )
    assert [meter["id"] for meter in ask(stripe, "GET", "/v1/billing/meters", {"status": "inactive"}).body["data"]] == [
        created["id"]
    ]
    assert ask(stripe, "POST", f"{path}/reactivate").body["status"] == "active"
    assert send(stripe, "s3", event_name="seconds", **payload).status == 200
    assert ask(stripe, "GET", "/v1/billing/meters/mtr_none").status == 404


def test_lists_have_pages(stripe: StripeStandIn) -> None:
    for number in range(11):
        stripe.model.add_meter(f"meter{number}")
    page = ask(stripe, "GET", "/v1/billing/meters").body
    rest = ask(stripe, "GET", "/v1/billing/meters", {"starting_after": page["data"][-1]["id"], "limit": 100}).body

    assert (len(page["data"]), page["has_more"]) == (10, True)
    assert ([meter["event_name"] for meter in rest["data"]], rest["has_more"]) == (["meter0", "tokens"], False)
    assert ask(stripe, "GET", "/v1/billing/meters", {"limit": 101}).status == 400


def test_customers_are_created_and_deleted(stripe: StripeStandIn) -> None:
    created = ask(stripe, "POST", "/v1/customers", {"name": "Ada", "metadata[tier]": "gold"}).body

    assert ask(stripe, "GET", f"/v1/customers/{created['id']}").body == created
    assert created["metadata"] == {"tier": "gold"}
    assert ask(stripe, "GET", "/v1/customers/cus_none").status == 404
    assert ask(stripe, "DELETE", f"/v1/customers/{created['id']}").body["deleted"] is True
    assert ask(stripe, "GET", f"/v1/customers/{created['id']}").body["deleted"] is True


def test_customers_are_listed_by_email_the_deleted_ones_left_out(stripe: StripeStandIn) -> None:
    ada, bob = (ask(stripe, "POST", "/v1/customers", {"email": f"{name}@example.com"}).body for name in ("ada", "bob"))

    def listed(**wanted: Any) -> list[str]:
        return [each["id"] for each in ask(stripe, "GET", "/v1/customers", wanted).body["data"]]

    assert listed() == [bob["id"], ada["id"], "cus_1"]
    assert listed(email="ada@example.com") == [ada["id"]]
    ask(stripe, "DELETE", f"/v1/customers/{bob['id']}")
    assert listed() == [ada["id"], "cus_1"]


# Products, prices, subscriptions


def priced(stand_in: StripeStandIn, **changes: Any) -> Reply:
    """Create a metered price of the first meter, with a product of its own; a change to None leaves it out."""
    params = {
        "currency": "usd",
        "unit_amount_decimal": "0.25",
        "product_data[name]": "Tokens",
        "recurring[interval]": "month",
        "recurring[usage_type]": "metered",
        "recurring[meter]": stand_in.model._meter_of["tokens"].id,
        **changes,
    }
    return ask(stand_in, "POST", "/v1/prices", {name: value for name, value in params.items() if value is not None})


def test_a_metered_price_is_made_with_its_product_and_found_by_meter_and_lookup_key(stripe: StripeStandIn) -> None:
    price = priced(stripe, lookup_key="tokens").body
    product = ask(stripe, "POST", "/v1/products", {"name": "Other"}).body
    other = priced(stripe, **{"product_data[name]": None, "product": product["id"], "unit_amount_decimal": "2"}).body

    def listed(**wanted: Any) -> list[str]:
        return [each["id"] for each in ask(stripe, "GET", "/v1/prices", wanted).body["data"]]

    meter = price["recurring"]["meter"]
    assert (price["unit_amount"], price["unit_amount_decimal"], other["unit_amount"]) == (None, "0.25", 2)
    assert ask(stripe, "GET", f"/v1/products/{price['product']}").body["name"] == "Tokens"
    assert ask(stripe, "GET", f"/v1/prices/{price['id']}").body == price
    assert [each["name"] for each in ask(stripe, "GET", "/v1/products").body["data"]] == ["Other", "Tokens"]
    assert listed(**{"recurring[meter]": meter}) == [other["id"], price["id"]]
    assert listed(**{"lookup_keys[0]": "tokens", "lookup_keys[1]": "none"}) == [price["id"]]
    assert listed(**{"recurring[meter]": "mtr_none"}) == []
    stripe.model.archive_price(price["id"])
    assert (listed(active="true"), listed(active="false")) == ([other["id"]], [price["id"]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurring[meter]": "mtr_none"}, "No such billing meter: 'mtr_none'"),
        ({"recurring[meter]": None}, "A metered price needs a meter, and no other price takes one."),
        ({"recurring[usage_type]": "licensed"}, "A metered price needs a meter, and no other price takes one."),
        ({"product_data[name]": None, "product": "prod_none"}, "No such product: 'prod_none'"),
        ({"product_data[name]": None}, "You must provide one of `product` or `product_data`."),
        ({"unit_amount_decimal": "much"}, "Invalid decimal: much"),
        ({"unit_amount": "1"}, "You must specify one of `unit_amount` and `unit_amount_decimal`."),
        ({"lookup_key": "taken"}, "A price (`price_00000000000001`) already uses that lookup key."),
    ],
)
def test_a_price_that_cannot_be_is_refused(stripe: StripeStandIn, changes: dict[str, Any], message: str) -> None:
    stripe.model.archive_price(priced(stripe, lookup_key="taken").body["id"])

    assert priced(stripe, **changes).message == message


def test_a_lookup_key_may_be_taken_over(stripe: StripeStandIn) -> None:
    first = priced(stripe, lookup_key="taken").body["id"]
    second = priced(stripe, lookup_key="taken", transfer_lookup_key="true").body

    assert (second["lookup_key"], ask(stripe, "GET", f"/v1/prices/{first}").body["lookup_key"]) == ("taken", None)


def test_an_inactive_meter_takes_no_price(stripe: StripeStandIn) -> None:
    meter = stripe.model._meter_of["tokens"].id
    ask(stripe, "POST", f"/v1/billing/meters/{meter}/deactivate")

    assert priced(stripe).message == f"The meter '{meter}' is inactive: it cannot be attached to a price."


def test_a_subscription_holds_its_prices_and_is_found_by_its_customer(stripe: StripeStandIn) -> None:
    price = priced(stripe).body
    params = {"customer": "cus_1", "items[0][price]": price["id"]}
    subscription = ask(stripe, "POST", "/v1/subscriptions", params).body

    assert [item["price"]["id"] for item in subscription["items"]["data"]] == [price["id"]]
    for wanted in ({"customer": "cus_1"}, {"price": price["id"]}):
        assert ask(stripe, "GET", "/v1/subscriptions", wanted).body["data"] == [subscription]
    assert ask(stripe, "GET", "/v1/subscriptions", {"customer": "cus_2"}).body["data"] == []
    for changes, param in (
        ({"customer": "cus_none"}, "customer"),
        ({"items[0][price]": "price_none"}, "items[0][price]"),
        ({"items[0]": price["id"]}, "items[0]"),
        ({"items[0][price]": None}, "items"),
    ):
        given = {name: value for name, value in {**params, **changes}.items() if value is not None}
        if "items[0]" in changes:
            del given["items[0][price]"]
        assert ask(stripe, "POST", "/v1/subscriptions", given).body["error"]["param"] == param


def summaries(stand_in: StripeStandIn, **changes: Any) -> Reply:
    """The summaries of the first meter for the hour around now."""
    hour = NOW // 3600 * 3600
    params = {"customer": "cus_1", "start_time": hour, "end_time": hour + 3600, **changes}
    return ask(stand_in, "GET", "/v1/billing/meters/mtr_0000000000000001/event_summaries", params)


def test_summaries_lag_behind() -> None:
    with serve(lag=60) as stripe:
        send(stripe, "e1", "2.5")
        stripe.clock.advance(59)
        assert summaries(stripe).body["data"] == []
        stripe.clock.advance(1)
        assert [row["aggregated_value"] for row in summaries(stripe).body["data"]] == [2.5]


def test_summaries_are_half_open_grouped_and_paged(stripe: StripeStandIn) -> None:
    day = NOW // DAY * DAY
    for number, timestamp in enumerate([day - 3600, day - 1, day, day + 3599, day + 3600]):
        send(stripe, f"e{number}", "1", timestamp=timestamp)
    span = {"start_time": day - DAY, "end_time": day + 3600}

    total = summaries(stripe, **span).body["data"]
    assert [(row["start_time"], row["end_time"], row["aggregated_value"]) for row in total] == [
        (day - DAY, day + 3600, 4.0)
    ]
    hours = summaries(stripe, **span, value_grouping_window="hour", limit=1).body
    assert ([(row["start_time"], row["aggregated_value"]) for row in hours["data"]], hours["has_more"]) == (
        [(day, 2.0)],
        True,
    )
    after = summaries(stripe, **span, value_grouping_window="hour", starting_after=hours["data"][0]["id"]).body
    assert [(row["start_time"], row["aggregated_value"]) for row in after["data"]] == [(day - 3600, 2.0)]
    days = summaries(stripe, start_time=day - DAY, end_time=day + DAY, value_grouping_window="day").body["data"]
    assert [row["aggregated_value"] for row in days] == [3.0, 2.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"start_time": MINUTE + 1},
        {"end_time": MINUTE + 1},
        {"end_time": 0},
        {"start_time": MINUTE, "value_grouping_window": "hour"},
        {"value_grouping_window": "month"},
        {"customer": "cus_none"},
    ],
)
def test_summaries_insist_on_their_parameters(stripe: StripeStandIn, changes: dict[str, Any]) -> None:
    assert summaries(stripe, **changes).status == 400


def test_a_pre_aggregated_meter_keeps_the_last_event_received_in_a_window(stripe: StripeStandIn) -> None:
    stripe.model.add_meter("hourly", event_time_window="hour")
    hour = NOW // 3600 * 3600
    for identifier, value, timestamp in [("h1", "5", hour + 9), ("h2", "7", hour), ("h3", "1", hour - 1)]:
        send(stripe, identifier, value, event_name="hourly", timestamp=timestamp)

    assert stripe.model.billed_by("hourly", "cus_1") == 8


def test_a_last_meter_bills_the_latest_event(stripe: StripeStandIn) -> None:
    stripe.model.add_meter("seats", formula="last")
    for identifier, value, timestamp in [("s1", "5", MINUTE), ("s2", "7", MINUTE - 60)]:
        send(stripe, identifier, value, event_name="seats", timestamp=timestamp)

    assert stripe.model.billed_by("seats", "cus_1") == 5


def adjust(stand_in: StripeStandIn, identifier: str, event_name: str = "tokens") -> Reply:
    """Cancel a meter event."""
    params = {"event_name": event_name, "type": "cancel", "cancel[identifier]": identifier}
    return ask(stand_in, "POST", "/v1/billing/meter_event_adjustments", params)


def test_an_event_can_be_cancelled_for_24_hours(stripe: StripeStandIn) -> None:
    send(stripe, "e1", "2")
    send(stripe, "e2", "3")

    stripe.clock.advance(DAY)
    assert adjust(stripe, "e1").body["cancel"] == {"identifier": "e1"}
    assert stripe.model.billed_by("tokens", "cus_1") == 3
    assert [row["aggregated_value"] for row in summaries(stripe).body["data"]] == [3.0]
    stripe.clock.advance(1)
    assert adjust(stripe, "e2").status == 400
    assert adjust(stripe, "e1").status == 400
    assert adjust(stripe, "none").status == 400
    assert adjust(stripe, "e2", "other").status == 400


# Asynchronous rejections


def test_events_of_a_deleted_customer_are_accepted_and_then_reported() -> None:
    with serve(lag=20) as stripe:
        send(stripe, "before")
        stripe.clock.advance(20)
        stripe.model.delete_customer("cus_1")
        for number in range(7):
            assert send(stripe, f"e{number}", key=f"e{number}:1").status == 200
        assert stripe.model.billed_by("tokens", "cus_1") == 8

        stripe.clock.advance(30)
        assert stripe.model.billed_by("tokens", "cus_1") == 1
        (report,) = stripe.model.reports()
        fetched = ask(stripe, "GET", f"/v2/core/events/{report['id']}").body

    (error,) = fetched["data"]["reason"]["error_types"]
    assert fetched["type"] == "v1.billing.meter.error_report_triggered"
    assert fetched["related_object"]["id"] == "mtr_0000000000000001"
    assert (error["code"], error["error_count"]) == ("meter_event_customer_not_found", 7)
    assert [sample["request"]["identifier"] for sample in error["sample_errors"]] == [f"e{n}:1" for n in range(5)]


def test_a_rejection_without_a_meter_has_a_report_of_its_own(stripe: StripeStandIn) -> None:
    stripe.model.rejected_later["cus_1"] = "no_meter"
    send(stripe)
    stripe.clock.advance(10)

    assert [report["type"] for report in stripe.model.reports()] == ["v1.billing.meter.no_meter_found"]
    assert ask(stripe, "GET", "/v2/core/events/evt_none").status == 404


# The stand-in as a process


def test_a_process_is_controlled_and_asked_over_http() -> None:
    command = [sys.executable, "-m", "consumer.sandbox.stripe", "--meter", "tokens", "--now", str(NOW)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        stripe = StripeStandIn(port=int(url.rpartition(":")[2]))
        try:
            ask(stripe, "POST", "/_sandbox/customers", {"id": "cus_1"})
            ask(stripe, "POST", "/_sandbox/meters", {"event_name": "calls", "formula": "count"})
            ask(stripe, "POST", "/_sandbox/faults", {"script": ["rate_limited", None], "seed": 3, "latency": [0, 0]})
            assert [send(stripe).status, send(stripe).status] == [429, 200]
            assert ask(stripe, "POST", "/_sandbox/clock", {"advance": DAY}).body["now"] >= NOW + DAY
            assert send(stripe, value="2").status == 200

            assert ask(stripe, "GET", "/_sandbox/billed").body == [["tokens", "cus_1", MINUTE, "3"]]
            assert [each["value"] for each in ask(stripe, "GET", "/_sandbox/events").body] == ["1", "2"]
            kinds = [each["kind"] for each in ask(stripe, "GET", "/_sandbox/violations").body]
            assert kinds == ["content changed", "counted again"]
            assert ask(stripe, "GET", "/_sandbox/stats").body["accepted"] == 2
            assert ask(stripe, "GET", "/_sandbox/reports").body == []
            assert ask(stripe, "POST", "/_sandbox/faults", {"script": ["earthquake"]}).status == 400
            assert ask(stripe, "GET", "/_sandbox/nothing").status == 404

            ask(stripe, "POST", "/_sandbox/down", {"seconds": 0.5})
            until(lambda: refused(stripe))
            until(lambda: not refused(stripe))
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def refused(stand_in: StripeStandIn) -> bool:
    """Whether nobody listens."""
    try:
        ask(stand_in, "GET", "/_sandbox/stats")
    except OSError:
        return True
    return False


# Stripe's own client


@asynccontextmanager
async def official(
    stand_in: StripeStandIn, api_key: str = SECRET_KEY, **timeouts: float
) -> AsyncIterator[sdk.StripeClient]:
    """Stripe's client, as the service uses it."""
    transport = sdk.AIOHTTPClient(timeout=aiohttp.ClientTimeout(**(timeouts or {"total": 5})))
    try:
        yield sdk.StripeClient(
            api_key, http_client=transport, base_addresses={"api": stand_in.url}, max_network_retries=0
        )
    finally:
        await transport.close_async()  # type: ignore[no-untyped-call]  # untyped in the SDK


async def create(client: sdk.StripeClient, identifier: str = "e1", value: str = "1", key: str | None = None) -> Any:
    """Create a meter event through Stripe's client."""
    payload = {"stripe_customer_id": "cus_1", "value": value}
    return await client.v1.billing.meter_events.create_async(
        {"event_name": "tokens", "payload": payload, "identifier": identifier, "timestamp": MINUTE},
        {"idempotency_key": key or identifier},
    )


def test_the_official_client_sends_events_and_reads_meters_and_summaries() -> None:
    async def talk() -> tuple[Any, ...]:
        async with serve() as stripe, official(stripe) as client:
            created = await create(client)
            meters = [meter async for meter in (await client.v1.billing.meters.list_async()).auto_paging_iter()]
            rows = await client.v1.billing.meters.event_summaries.list_async(
                meters[0].id, {"customer": "cus_1", "start_time": MINUTE, "end_time": MINUTE + 60}
            )
            replayed = await create(client)
            return created, meters[0], rows.data[0], replayed

    created, meter, row, replayed = asyncio.run(talk())

    assert (created.identifier, created.livemode) == ("e1", False)
    assert (meter.event_name, row.aggregated_value) == ("tokens", 1.0)
    assert replayed.last_response.headers["Idempotent-Replayed"] == "true"


@pytest.mark.parametrize(
    ("fault", "error", "cause"),
    [
        (Fault.RATE_LIMITED, sdk.RateLimitError, None),
        (Fault.LOCK_TIMEOUT, sdk.RateLimitError, None),
        (Fault.ERROR, sdk.APIError, None),
        (Fault.ACCEPT_LOSE, sdk.APIConnectionError, aiohttp.ServerDisconnectedError),
        (Fault.HANG, sdk.APIConnectionError, TimeoutError),
        (Fault.ACCEPT_CUT, aiohttp.ClientPayloadError, Exception),
    ],
)
def test_the_official_client_raises_by_fault(
    fault: Fault, error: type[Exception], cause: type[Exception] | None
) -> None:
    timeout = 0.3 if fault is Fault.HANG else 5

    async def talk() -> None:
        async with serve(faults=Faults(script=[fault])) as stripe, official(stripe, total=timeout) as client:
            await create(client)

    with pytest.raises(error) as raised:
        asyncio.run(talk())
    assert isinstance(raised.value.__cause__, cause or type(None))


def test_the_official_client_tells_a_connection_that_never_was() -> None:
    async def talk() -> None:
        stripe = serve()
        async with stripe, official(stripe) as client:
            await stripe.close()
            await create(client)

    with pytest.raises(sdk.APIConnectionError) as raised:
        asyncio.run(talk())
    assert isinstance(raised.value.__cause__, aiohttp.ClientConnectorError)


def test_the_official_client_raises_by_refusal() -> None:
    async def talk() -> list[Any]:
        async with (
            serve() as stripe,
            official(stripe) as client,
            official(stripe, "sk_test_wrong") as stranger,
            official(stripe, READ_ONLY) as reader,
        ):
            attempts = [
                create(client),
                create(client, key="e1:1"),
                create(client, "e2", key="e1"),
                create(stranger),
                create(reader),
            ]
            return [await asyncio.gather(attempt, return_exceptions=True) for attempt in attempts]

    (_,), (duplicate,), (reused,), (wrong_key,), (not_allowed,) = asyncio.run(talk())

    assert isinstance(duplicate, sdk.InvalidRequestError)
    assert (duplicate.user_message, duplicate.code) == ("An event already exists with identifier e1.", None)
    assert isinstance(reused, sdk.IdempotencyError)
    assert isinstance(wrong_key, sdk.AuthenticationError)
    assert isinstance(not_allowed, sdk.PermissionError)
