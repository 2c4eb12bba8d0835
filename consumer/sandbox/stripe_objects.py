"""The objects of the Stripe stand-in's account: meters, meter events, and the parameters that its endpoints take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Context, Decimal, Inexact
from typing import Any, Literal, NamedTuple

import msgspec

from consumer.sandbox.stripe_wire import Field, Refused

DAY = 86_400
PAST = 35 * DAY
FUTURE = 5 * 60
UNIQUE_FOR = KEPT_FOR = DAY
"""How long an identifier stays unique, and how long an answer is kept under its idempotency key, in seconds."""
DIGITS = 15
REPORT_EVERY, SAMPLES = 10, 5
"""Errors of asynchronous processing are collected for so many seconds into one report, with at most so many samples."""
WINDOWS = {"hour": 3600, "day": DAY}

_EXACT = Context(prec=400, traps=[Inexact])
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class Meter(msgspec.Struct):
    """A meter; only its name, its status and the time of the last change ever change."""

    id: str
    event_name: str
    formula: str
    customer_key: str
    value_key: str
    event_time_window: str | None
    display_name: str
    created: int
    updated: int
    deactivated_at: int | None = None

    @property
    def status(self) -> Literal["active", "inactive"]:
        """Only an active meter takes events."""
        return "active" if self.deactivated_at is None else "inactive"

    def standing(self, events: Iterable[MeterEvent]) -> list[MeterEvent]:
        """The events, in the order of their receipt, that no later event of a pre-aggregated window has replaced."""
        if self.event_time_window is None:
            return list(events)
        size = WINDOWS[self.event_time_window]
        return list({event.timestamp // size: event for event in events}.values())

    def aggregate(self, events: Iterable[MeterEvent]) -> Decimal:
        """The usage that standing events of one customer amount to, exactly."""
        if self.formula == "last":
            return max(enumerate(events), key=lambda each: (each[1].timestamp, each[0]))[1].value
        total = Decimal(0)
        for event in events:
            total = _EXACT.add(total, event.value)
        return total

    def value(self, payload: dict[str, str]) -> Decimal:
        """What one event with this payload counts; raises `Refused` for what Stripe would not take as a value."""
        if self.formula == "count":
            return Decimal(1)
        text = payload.get(self.value_key, "")
        param = f"payload[{self.value_key}]"
        if not text:
            raise Refused(
                "no_value", f"The payload must contain a value under the key '{self.value_key}'.", param=param
            )
        if not _DECIMAL.fullmatch(text):
            message = f"The value in the event payload must be a plain decimal number. Received {text}."
            raise Refused("bad_value", message, param=param)
        if len(text.removeprefix("-").replace(".", "").lstrip("0")) > DIGITS:
            message = f"The value in the event payload can have at most {DIGITS} digits. Received {text}."
            raise Refused("too_many_digits", message, param=param)
        return Decimal(text)

    def shown(self, *, livemode: bool) -> dict[str, Any]:
        """The meter as the API returns it."""
        return {
            "id": self.id,
            "object": "billing.meter",
            "created": self.created,
            "customer_mapping": {"event_payload_key": self.customer_key, "type": "by_id"},
            "default_aggregation": {"formula": self.formula},
            "display_name": self.display_name,
            "event_name": self.event_name,
            "event_time_window": self.event_time_window,
            "livemode": livemode,
            "status": self.status,
            "status_transitions": {"deactivated_at": self.deactivated_at},
            "updated": self.updated,
            "value_settings": {"event_payload_key": self.value_key},
        }


class MeterEvent(msgspec.Struct, gc=False):
    """An accepted meter event. `received` is by the stand-in's clock; `key` is the request's idempotency key."""

    identifier: str
    event_name: str
    customer: str
    value: Decimal
    payload: dict[str, str]
    timestamp: int
    received: float
    key: str
    livemode: bool
    status: Literal["processing", "counted", "rejected", "cancelled"] = "processing"

    def shown(self) -> dict[str, Any]:
        """The event as the API returns it."""
        return {
            "object": "billing.meter_event",
            "created": int(self.received),
            "event_name": self.event_name,
            "identifier": self.identifier,
            "livemode": self.livemode,
            "payload": self.payload,
            "timestamp": self.timestamp,
        }


class Violation(NamedTuple):
    """Something a client that bills once never does."""

    kind: Literal["content changed", "counted again"]
    identifier: str
    detail: str


EVENT = {
    "event_name": Field(required=True, at_most=100),
    "payload": Field(required=True, free=True),
    "identifier": Field(at_most=100),
    "timestamp": Field(integer=True),
}
_KEY = Field(required=True, at_most=100)
METER = {
    "display_name": Field(required=True, at_most=250),
    "event_name": Field(required=True, at_most=100),
    "default_aggregation": Field(
        required=True, fields={"formula": Field(required=True, choices=("count", "last", "sum"))}
    ),
    "customer_mapping": Field(fields={"type": Field(required=True, choices=("by_id",)), "event_payload_key": _KEY}),
    "value_settings": Field(fields={"event_payload_key": _KEY}),
    "event_time_window": Field(choices=("day", "hour")),
}
PAGE = {"limit": Field(integer=True, lowest=1, highest=100), "starting_after": Field()}
SUMMARIES = {
    **PAGE,
    "customer": Field(required=True),
    "start_time": Field(required=True, integer=True),
    "end_time": Field(required=True, integer=True),
    "value_grouping_window": Field(choices=("hour", "day")),
}
ADJUSTMENT = {
    "event_name": Field(required=True, at_most=100),
    "type": Field(required=True, choices=("cancel",)),
    "cancel": Field(fields={"identifier": Field(at_most=100)}),
}
_METADATA = Field(free=True)
_TRUTH = Field(choices=("true", "false"))
CUSTOMER = {
    "name": Field(),
    "email": Field(),
    "description": Field(),
    "metadata": _METADATA,
}
CUSTOMERS = {**PAGE, "email": Field()}
PRODUCT = {
    "name": Field(required=True),
    "description": Field(),
    "unit_label": Field(),
    "metadata": _METADATA,
}
_INTERVAL = Field(required=True, choices=("day", "month", "week", "year"))
_USAGE = Field(choices=("licensed", "metered"))
PRICE = {
    "currency": Field(required=True, at_most=3),
    "unit_amount": Field(integer=True, lowest=0),
    "unit_amount_decimal": Field(),
    "product": Field(),
    "product_data": Field(fields={name: PRODUCT[name] for name in ("name", "unit_label", "metadata")}),
    "recurring": Field(fields={"interval": _INTERVAL, "usage_type": _USAGE, "meter": Field()}),
    "lookup_key": Field(at_most=200),
    "transfer_lookup_key": _TRUTH,
    "nickname": Field(),
    "metadata": _METADATA,
}
PRICES = {
    **PAGE,
    "active": _TRUTH,
    "product": Field(),
    "lookup_keys": Field(each=Field()),
    "recurring": Field(fields={"interval": Field(), "usage_type": _USAGE, "meter": Field()}),
}
SUBSCRIPTION = {
    "customer": Field(required=True),
    "items": Field(required=True, each=Field(fields={"price": Field(required=True)})),
    "metadata": _METADATA,
}
SUBSCRIPTIONS = {**PAGE, "customer": Field(), "price": Field()}
