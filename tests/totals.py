"""Totals as stage 1 makes them, for tests to which only some of what they hold matters."""

from __future__ import annotations

from typing import Any

from consumer.totals import Destination, Total


def total_of(
    name: str,
    at: int,
    customer: str,
    value: str = "5",
    *,
    meter: str = "ai",
    event_name: str = "tokens",
    edition: str = "e",
    **other: Any,
) -> Total:
    """The total of a customer's minute; ``at``, in seconds since the epoch, is the time of its earliest event."""
    start = at // 60 * 60
    fields: dict[str, Any] = {"partition": 0, "due": (start + 180) * 1000, "first_offset": 0, "last_offset": 9}
    return Total(
        identifier=f"tm1-{name}",
        pipeline="test",
        meter=meter,
        edition=edition,
        window_start=start,
        window="1m",
        revision=0,
        customer=customer,
        value=value,
        events=3,
        timestamp=at,
        stripe=Destination(event_name),
        **fields | other,
    )
