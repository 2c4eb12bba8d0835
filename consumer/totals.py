"""The log between the stages: what stage 1 and operators write and stage 2 reads, in exact numbers.

The log is also the audit trail: every record is one JSON object and explains itself without the configuration.
"""

from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final, Literal

import msgspec

SCALE_DIGITS: Final = 12
"""Decimals that are kept exactly; an exact value is an integer in units of 10⁻¹²."""

SCALE: Final = 10**SCALE_DIGITS

STRIPE_DIGITS: Final = 15
"""Significant digits that Stripe takes in the value of a Meter Event."""

_STRIPE_CONTEXT: Final = Context(prec=STRIPE_DIGITS, rounding=ROUND_HALF_EVEN)


class Destination(msgspec.Struct, frozen=True):
    """Where a meter's totals go: the Stripe meter's event name and the keys of its payload."""

    event_name: str
    value_key: str = "value"
    customer_key: str = "stripe_customer_id"


class Total(msgspec.Struct, frozen=True, tag_field="kind", tag="total"):
    """One closed (bucket, customer): self-contained, and the same bytes however often it is computed."""

    identifier: str
    pipeline: str
    meter: str
    edition: str
    partition: int
    window_start: int
    """Seconds since the epoch."""
    window: Literal["1m", "1h"]
    revision: int
    due: int
    """When the bucket was due, in milliseconds of the log clock."""
    customer: str
    """As the events name the customer; who that is at Stripe is decided at delivery."""
    value: str
    """Exact, a plain decimal."""
    events: int
    timestamp: int
    """The earliest event time in it, in whole seconds since the epoch."""
    first_offset: int
    last_offset: int
    stripe: Destination


class Advance(msgspec.Struct, frozen=True, tag_field="kind", tag="advance"):
    """A quiet partition's clock was moved by evidence: with these records a replay closes what the first run closed."""

    partition: int
    offset: int
    """Everything below it had been read."""
    clock: int
    """Milliseconds since the epoch."""


class Command(msgspec.Struct, frozen=True, tag_field="kind", tag="command"):
    """An operator's decision about a parked total, applied by whoever owns the total."""

    action: Literal["release", "discard"]
    identifier: str
    by: str
    reason: str
    at: int
    """Milliseconds since the epoch, by the operator's clock."""
    parking: int | None = None
    """Which time it is parked, as the operator saw it: of any other one nothing is decided. None is what earlier
    versions wrote: it means any, and releases nothing that may be at Stripe."""


Record = Total | Advance | Command

_COMMAND: Final = b'{"kind":"command",'
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """One record of the totals log."""
    return _encoder.encode(record)


def decode(value: bytes) -> Record:
    """The record that was encoded; raises ``msgspec.DecodeError`` for anything else."""
    return _decoder.decode(value)


def is_command(value: bytes) -> bool:
    """Whether a record of the totals log is an operator's decision, told without decoding what is not."""
    return value.startswith(_COMMAND)


def plain(scaled: int) -> str:
    """An exact value as a plain decimal: no exponent, no trailing zeros."""
    whole, fraction = divmod(abs(scaled), SCALE)
    sign = "-" if scaled < 0 else ""
    return f"{sign}{whole}.{fraction:0{SCALE_DIGITS}}".rstrip("0") if fraction else f"{sign}{whole}"


def scaled(text: str) -> int:
    """The exact value of a plain decimal with at most twelve decimals."""
    whole, _, fraction = text.partition(".")
    value = int(whole.lstrip("-") + fraction.ljust(SCALE_DIGITS, "0"))
    return -value if whole.startswith("-") else value


def for_stripe(value: int) -> int:
    """The nearest exact value that Stripe takes: at most 15 significant digits, rounded half to even."""
    return int(_STRIPE_CONTEXT.plus(Decimal(value)))
