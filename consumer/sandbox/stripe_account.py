"""The state of a Stripe account that bills usage, as the stand-in keeps it: what its endpoints do, and the truth."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from consumer.sandbox.stripe_objects import (
    ADJUSTMENT,
    CUSTOMER,
    CUSTOMERS,
    DAY,
    EVENT,
    FUTURE,
    METER,
    PAGE,
    PAST,
    REPORT_EVERY,
    SAMPLES,
    SUMMARIES,
    UNIQUE_FOR,
    WINDOWS,
    Meter,
    MeterEvent,
    Violation,
)
from consumer.sandbox.stripe_wire import Answer, Call, Field, Refused, check, secret_of


class StripeAccount:
    """Meters, customers, meter events and their asynchronous processing.

    `now` returns Unix seconds. `accept_any_customer` knows every `cus_…`. Events become visible, and are rejected if
    they must be, `lag` seconds after they were received.
    """

    def __init__(self, now: Callable[[], float], *, accept_any_customer: bool = False, lag: float = 0) -> None:
        self.now = now
        self.accept_any_customer = accept_any_customer
        self.lag = lag
        self.rejected_later: dict[str, str] = {}
        """Customer to code: their events are accepted and later rejected with it. Deleting a customer does this."""
        self.events: list[MeterEvent] = []
        self.violations: list[Violation] = []
        self._lock = threading.RLock()
        self._meters: dict[str, Meter] = {}
        self._meter_of: dict[str, Meter] = {}
        self._customers: dict[str, dict[str, Any]] = {}
        self._usage: dict[tuple[str, str], list[MeterEvent]] = {}
        self._taken: dict[str, MeterEvent] = {}
        self._processing: deque[MeterEvent] = deque()
        self._errors: dict[tuple[int, str], list[tuple[MeterEvent, str]]] = {}
        self._reports: list[dict[str, Any]] = []

    # Meter events

    def create_event(self, call: Call) -> MeterEvent:
        """Accept a Meter Event; raises ``Refused``."""
        params = check(call.params, EVENT)
        now = self.now()
        timestamp = params.get("timestamp", int(now))
        _check_timestamp(timestamp, now)
        payload: dict[str, str] = params["payload"]
        meter = self._meter_of.get(params["event_name"])
        if meter is None or meter.status == "inactive":
            message = f'No active meter found for event name "{params["event_name"]}"'
            raise Refused("no_meter", message, param="event_name", stored=True)
        customer = payload.get(meter.customer_key, "")
        if not customer:
            message = f"The payload must contain the customer under the key '{meter.customer_key}'."
            raise Refused("no_customer_key", message, param="payload")
        value = meter.value(payload)
        if not self._knows(customer):
            message = f"No such customer: '{customer}'"
            param = f"payload[{meter.customer_key}]"
            raise Refused("no_customer", message, code="resource_missing", param=param, stored=True)
        identifier = params.get("identifier") or f"standin-{len(self.events):024d}"
        self._check_unique(identifier, now)
        event = MeterEvent(
            identifier,
            meter.event_name,
            customer,
            value,
            payload,
            timestamp,
            now,
            call.idempotency_key,
            self._livemode(call),
        )
        self._taken[identifier] = event
        self.events.append(event)
        self._usage.setdefault((meter.event_name, customer), []).append(event)
        self._processing.append(event)
        return event

    def _check_unique(self, identifier: str, now: float) -> None:
        earlier = self._taken.get(identifier)
        if earlier is None:
            return
        if now - earlier.received < UNIQUE_FOR:
            message = f"An event already exists with identifier {identifier}."
            raise Refused("duplicate", message, headers={"stripe-should-retry": "false"}, stored=True)
        detail = f"received at {earlier.received:.0f} and, no longer unique, at {now:.0f}"
        self.violations.append(Violation("counted again", identifier, detail))

    def _adjust(self, call: Call) -> Answer:
        params = check(call.params, ADJUSTMENT)
        identifier = params.get("cancel", {}).get("identifier")
        if not identifier:
            raise Refused("invalid", "Missing required param: cancel[identifier].", code="parameter_missing")
        event = self._taken.get(identifier)
        if event is None or event.event_name != params["event_name"] or event.status == "rejected":
            message = f"No meter event found with identifier {identifier}."
            raise Refused("not_found", message, param="cancel[identifier]", stored=True)
        if self.now() - event.received > DAY:
            message = f"The event with identifier {identifier} was received more than 24 hours ago."
            raise Refused("too_late", message, param="cancel[identifier]", stored=True)
        if event.status == "cancelled":
            message = f"The event with identifier {identifier} is already cancelled."
            raise Refused("invalid", message, param="cancel[identifier]", stored=True)
        event.status = "cancelled"
        adjustment = {
            "object": "billing.meter_event_adjustment",
            "cancel": {"identifier": identifier},
            "event_name": event.event_name,
            "livemode": self._livemode(call),
            "status": "complete",
            "type": "cancel",
        }
        return ok(adjustment)

    # Meters

    def add_meter(self, event_name: str, *, formula: str = "sum", value_key: str = "value", **fields: Any) -> Meter:
        """Create an active meter; `fields` are further fields of `Meter`."""
        with self._lock:
            now = int(self.now())
            meter = Meter(
                id=f"mtr_{len(self._meters) + 1:016d}",
                event_name=event_name,
                formula=formula,
                value_key=value_key,
                customer_key=fields.pop("customer_key", "stripe_customer_id"),
                event_time_window=fields.pop("event_time_window", None),
                display_name=fields.pop("display_name", event_name),
                created=now,
                updated=now,
                **fields,
            )
            self._meters[meter.id] = self._meter_of[event_name] = meter
            return meter

    def _create_meter(self, call: Call) -> Answer:
        params = check(call.params, METER)
        if params["event_name"] in self._meter_of:
            message = f"A meter with the event name '{params['event_name']}' already exists."
            raise Refused("invalid", message, param="event_name", stored=True)
        meter = self.add_meter(
            params["event_name"],
            formula=params["default_aggregation"]["formula"],
            value_key=params.get("value_settings", {}).get("event_payload_key", "value"),
            customer_key=params.get("customer_mapping", {}).get("event_payload_key", "stripe_customer_id"),
            event_time_window=params.get("event_time_window"),
            display_name=params["display_name"],
        )
        return self._show_meter(call, meter)

    def _list_meters(self, call: Call) -> Answer:
        params = check(call.params, {**PAGE, "status": Field(choices=("active", "inactive"))})
        meters = [
            meter.shown(livemode=self._livemode(call))
            for meter in reversed(self._meters.values())
            if params.get("status") in (None, meter.status)
        ]
        return page("/v1/billing/meters", meters, params)

    def _retrieve_meter(self, call: Call, meter_id: str) -> Answer:
        check(call.params, {})
        return self._show_meter(call, self._meter(meter_id))

    def _update_meter(self, call: Call, meter_id: str) -> Answer:
        params = check(call.params, {"display_name": Field(at_most=250)})
        meter = self._meter(meter_id)
        meter.display_name = params.get("display_name", meter.display_name)
        meter.updated = int(self.now())
        return self._show_meter(call, meter)

    def _deactivate_meter(self, call: Call, meter_id: str) -> Answer:
        check(call.params, {})
        meter = self._meter(meter_id)
        meter.deactivated_at = meter.updated = int(self.now())
        return self._show_meter(call, meter)

    def _reactivate_meter(self, call: Call, meter_id: str) -> Answer:
        check(call.params, {})
        meter = self._meter(meter_id)
        meter.deactivated_at, meter.updated = None, int(self.now())
        return self._show_meter(call, meter)

    def _meter(self, meter_id: str) -> Meter:
        if meter_id not in self._meters:
            message = f"No such billing meter: '{meter_id}'"
            raise Refused("not_found", message, status=404, code="resource_missing", param="id")
        return self._meters[meter_id]

    def _show_meter(self, call: Call, meter: Meter) -> Answer:
        return ok(meter.shown(livemode=self._livemode(call)))

    def _summarise(self, call: Call, meter_id: str) -> Answer:
        params = check(call.params, SUMMARIES)
        meter = self._meter(meter_id)
        start, end, grouping = params["start_time"], params["end_time"], params.get("value_grouping_window")
        step = WINDOWS[grouping] if grouping else 60
        for name in ("start_time", "end_time"):
            if params[name] % step:
                message = f"{name} must be aligned with {grouping or 'minute'} boundaries."
                raise Refused("invalid", message, param=name)
        if end <= start:
            raise Refused("invalid", "end_time must be after start_time.", param="end_time")
        if not self._knows(params["customer"]):
            message = f"No such customer: '{params['customer']}'"
            raise Refused("no_customer", message, code="resource_missing", param="customer")
        self._settle()
        counted = [e for e in self._usage.get((meter.event_name, params["customer"]), ()) if e.status == "counted"]
        groups: dict[int, list[MeterEvent]] = {}
        for event in meter.standing(counted):
            if start <= event.timestamp < end:
                groups.setdefault(event.timestamp // step * step if grouping else start, []).append(event)
        rows = [
            {
                "id": f"mtrusg_{meter_id.removeprefix('mtr_')}{window:012d}",
                "object": "billing.meter_event_summary",
                "aggregated_value": float(meter.aggregate(events)),
                "end_time": window + step if grouping else end,
                "livemode": self._livemode(call),
                "meter": meter_id,
                "start_time": window,
            }
            for window, events in sorted(groups.items(), reverse=True)
        ]
        return page(call.path, rows, params)

    # Customers

    def add_customer(self, customer: str, **fields: Any) -> dict[str, Any]:
        """Create a customer with this id."""
        with self._lock:
            created = {"id": customer, "object": "customer", "created": int(self.now()), **fields}
            self._customers[customer] = created
            return created

    def delete_customer(self, customer: str, code: str = "meter_event_customer_not_found") -> None:
        """Delete a customer: its events are still accepted, and rejected afterwards with this code."""
        with self._lock:
            self._settle()
            self.add_customer(customer, deleted=True)
            self.rejected_later[customer] = code

    def _knows(self, customer: str) -> bool:
        return customer in self._customers or (self.accept_any_customer and customer.startswith("cus_"))

    def _create_customer(self, call: Call) -> Answer:
        params = check(call.params, CUSTOMER)
        customer = self.add_customer(f"cus_{len(self._customers) + 1:014d}", **params)
        return ok({**customer, "livemode": self._livemode(call)})

    def _list_customers(self, call: Call) -> Answer:
        params = check(call.params, CUSTOMERS)
        customers = [
            {**each, "livemode": self._livemode(call)}
            for each in reversed(self._customers.values())
            if not each.get("deleted") and params.get("email") in (None, each.get("email"))
        ]
        return page(call.path, customers, params)

    def _retrieve_customer(self, call: Call, customer: str) -> Answer:
        if customer not in self._customers:
            message = f"No such customer: '{customer}'"
            raise Refused("no_customer", message, status=404, code="resource_missing", param="id")
        return ok({**self._customers[customer], "livemode": self._livemode(call)})

    def _delete_customer(self, call: Call, customer: str) -> Answer:
        self._retrieve_customer(call, customer)
        self.delete_customer(customer)
        return ok({"id": customer, "object": "customer", "deleted": True})

    # Asynchronous processing

    def _settle(self) -> None:
        now = self.now()
        while self._processing and self._processing[0].received + self.lag <= now:
            event = self._processing.popleft()
            code = self.rejected_later.get(event.customer)
            if event.status == "processing":
                event.status = "counted" if code is None else "rejected"
            if code is not None:
                slot = int((event.received + self.lag) // REPORT_EVERY) * REPORT_EVERY
                meter_id = "" if code == "no_meter" else self._meter_of[event.event_name].id
                self._errors.setdefault((slot, meter_id), []).append((event, code))
        for slot, meter_id in sorted(self._errors):
            if slot + REPORT_EVERY <= now:
                self._report(slot, meter_id, self._errors.pop((slot, meter_id)))

    def _report(self, slot: int, meter_id: str, errors: list[tuple[MeterEvent, str]]) -> None:
        codes = Counter(code for _, code in errors)
        samples = {
            code: [
                {"error_message": f"The event was rejected: {code}.", "request": {"identifier": event.key}}
                for event, each in errors
                if each == code
            ][:SAMPLES]
            for code in codes
        }
        report = {
            "id": f"evt_standin_{len(self._reports) + 1:08d}",
            "object": "v2.core.event",
            "type": f"v1.billing.meter.{'error_report_triggered' if meter_id else 'no_meter_found'}",
            "created": _rfc3339(slot + REPORT_EVERY),
            "livemode": errors[0][0].livemode,
            "reason": None,
            "data": {
                "developer_message_summary": f"There are {len(errors)} invalid meter events.",
                "validation_start": _rfc3339(slot),
                "validation_end": _rfc3339(slot + REPORT_EVERY),
                "reason": {
                    "error_count": len(errors),
                    "error_types": [
                        {"code": code, "error_count": count, "sample_errors": samples[code]}
                        for code, count in codes.items()
                    ],
                },
            },
        }
        if meter_id:
            url = f"/v1/billing/meters/{meter_id}"
            report["related_object"] = {"id": meter_id, "type": "billing.meter", "url": url}
        self._reports.append(report)

    def _retrieve_report(self, _call: Call, report_id: str) -> Answer:
        self._settle()
        for report in self._reports:
            if report["id"] == report_id:
                return ok(report)
        raise Refused("not_found", f"No such event: '{report_id}'", status=404, code="not_found")

    # The truth, which Stripe does not tell

    def billed(self) -> dict[tuple[str, str, int], Decimal]:
        """What would be billed, exactly: (event name, customer, start of the minute) to usage."""
        with self._lock:
            return {
                (event_name, customer, minute): self._meter_of[event_name].aggregate(events)
                for event_name, customer in self._usage
                for minute, events in _by_minute(self._billable(event_name, customer)).items()
            }

    def billed_by(self, event_name: str, customer: str) -> Decimal:
        """What would be billed to a customer on a meter altogether, exactly."""
        with self._lock:
            events = self._billable(event_name, customer)
            return self._meter_of[event_name].aggregate(events) if events else Decimal(0)

    def reports(self) -> list[dict[str, Any]]:
        """The error reports until now, oldest first, as `GET /v2/core/events/{id}` returns them."""
        with self._lock:
            self._settle()
            return list(self._reports)

    def _billable(self, event_name: str, customer: str) -> list[MeterEvent]:
        self._settle()
        usage = self._usage.get((event_name, customer), ())
        return self._meter_of[event_name].standing(e for e in usage if e.status in ("processing", "counted"))

    def _livemode(self, call: Call) -> bool:
        return "_live_" in secret_of(call.authorization)


def _check_timestamp(timestamp: int, now: float) -> None:
    if timestamp < int(now) - PAST:
        message = (
            "The event timestamp cannot be more than 35 days in past. "
            f"Expected a timestamp greater than or equal to {int(now) - PAST}."
        )
        raise Refused("too_old", message, param="timestamp")
    if timestamp > int(now) + FUTURE:
        message = (
            "The event timestamp cannot be more than 5 minutes in the future. "
            f"Expected a timestamp less than or equal to {int(now) + FUTURE}."
        )
        raise Refused("future", message, param="timestamp")


def ok(body: dict[str, Any]) -> Answer:
    """The answer to a request that succeeded."""
    return Answer(200, orjson.dumps(body))


def page(url: str, rows: list[dict[str, Any]], params: dict[str, Any]) -> Answer:
    """The part of a list that was asked for."""
    after, limit = params.get("starting_after"), params.get("limit", 10)
    if after is not None:
        ids = [row["id"] for row in rows]
        if after not in ids:
            raise Refused("not_found", f"No such object: '{after}'", code="resource_missing", param="starting_after")
        rows = rows[ids.index(after) + 1 :]
    return ok({"object": "list", "data": rows[:limit], "has_more": len(rows) > limit, "url": url})


def _by_minute(events: list[MeterEvent]) -> dict[int, list[MeterEvent]]:
    minutes: dict[int, list[MeterEvent]] = {}
    for event in events:
        minutes.setdefault(event.timestamp // 60 * 60, []).append(event)
    return minutes


def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
