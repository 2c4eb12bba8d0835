"""Dead letters: events that cannot be counted, kept with the reason so that they can be mended and sent again."""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, get_args

import msgspec

from consumer.events import Reason

REASONS: Final = (
    *get_args(Reason),
    "time_invalid",
    "late",
    "future",
    "arrival_in_future",
    "customer_missing",
    "customer_invalid",
    "customer_too_long",
    "value_missing",
    "value_not_a_number",
    "value_negative",
    "value_out_of_range",
)
"""Why an event cannot be counted, for metrics; letters of other versions may have others."""

LARGEST_VALUE: Final = 256 * 1024
"""Bytes of an event kept in its letter; of a larger one only the place in its topic is kept."""

LARGEST_LETTER: Final = 512 * 1024
"""Bytes of a letter as it is stored: base64 makes a third more of an event, JSON much more of many small headers."""


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One event that could not be counted, where it was read, and why."""

    partition: int
    offset: int
    timestamp: int
    """The record's timestamp, in milliseconds: its arrival, and its event time if it names none."""
    reason: str
    """Short and stable; the label of the metric."""
    detail: str
    """For people: what is wrong with it."""
    key: bytes | None = None
    headers: list[tuple[str, bytes | None]] | None = None
    value: bytes | None = None
    """None if it is larger than 256 KB; then it has to be read at its offset."""
    traceparent: str | None = None
    """The trace that the event belongs to, as W3C writes it (CloudEvents' extension for distributed tracing)."""
    tracestate: str | None = None


def encode(letter: DeadLetter) -> bytes:
    """One record of the dead-letter log: JSON, with bytes in base64."""
    return msgspec.json.encode(letter)


def decode(value: bytes) -> DeadLetter:
    """The letter that was encoded."""
    return msgspec.json.decode(value, type=DeadLetter)


_TRACEPARENT: Final = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE: Final = re.compile("[ -~]{1,512}")


class _Members(msgspec.Struct):
    traceparent: str = ""
    tracestate: str = ""


_members = msgspec.json.Decoder(_Members)


def trace_of(headers: Sequence[tuple[str, bytes | None]] | None, value: bytes | None) -> tuple[str | None, str | None]:
    """``traceparent`` and ``tracestate`` of an event, however broken it is otherwise; None where there are none.

    The event's own attributes are meant, or else those headers of its record that whoever produced it has set.
    """
    texts = {name.lower(): (text or b"").decode("ascii", "replace") for name, text in headers or ()}
    media = texts.get("content-type", "").lstrip().lower()
    found = []
    if not media.startswith("application/cloudevents") and any(name.startswith("ce_") for name in texts):
        found.append(_Members(texts.get("ce_traceparent", ""), texts.get("ce_tracestate", "")))
    else:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found.append(_members.decode(value or b""))
    found.append(_Members(texts.get("traceparent", ""), texts.get("tracestate", "")))
    for each in found:
        if _TRACEPARENT.fullmatch(each.traceparent):
            return each.traceparent, each.tracestate if _TRACESTATE.fullmatch(each.tracestate) else None
    return None, None
