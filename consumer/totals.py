"""The log between the stages: what stage 1, operators and Stripe's reports write and stage 2 reads, in exact numbers.

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
    found: str | None = None
    """Discarded because it is at Stripe, under this identifier: it counts as delivered. None: nobody is billed."""


class Rejection(msgspec.Struct, frozen=True, tag_field="kind", tag="rejection"):
    """Stripe took a total's event, and rejected it later: one of its error reports names it. Lies beside its total."""

    identifier: str
    """The total's, in all generations."""
    key: str
    """The Idempotency-Key of the request, as the report says it."""
    code: str
    """Stripe's word for why."""
    message: str
    report: str
    """The id of Stripe's event."""
    at: int
    """When we heard of it, in milliseconds since the epoch."""
    outcome: msgspec.Raw
    """What then became of the total: a record of the outcomes log, as stage 2 appends it. Null where it had not ended:
    how it ends decides what the rejection means."""


class Report(msgspec.Struct, frozen=True, tag_field="kind", tag="report"):
    """Stripe reported errors of a meter, or events that no meter takes. The totals it names are rejections."""

    report: str
    """The id of Stripe's event."""
    at: int
    """When we heard of it, in milliseconds since the epoch."""
    event_name: str | None
    """None where Stripe found no meter, and none was named."""
    since: int
    until: int
    """When Stripe looked at the events in it, in seconds since the epoch."""
    errors: dict[str, int]
    """How many events were rejected, by code."""
    named: int
    """How many of those events are named and ours; Stripe names samples."""


class Compared(msgspec.Struct, frozen=True):
    """A meter, compared with Stripe's sums: customers' days by how they stand."""

    at: int
    """When it was begun, in milliseconds since the epoch."""
    since: int
    until: int
    """The days that were compared, in seconds since the epoch; the end is not in it."""
    equal: int = 0
    open: int = 0
    doubt: int = 0
    differs: int = 0
    not_asked: int = 0
    """Customers that the budget left out."""
    missing: str = "0"
    """By how much less Stripe has where it has too little: exact, plain, not negative."""
    surplus: str = "0"
    """By how much more where it has too much."""


class Comparison(msgspec.Struct, frozen=True, tag_field="kind", tag="comparison"):
    """What `tallyman reconcile` found last: for metrics."""

    at: int
    """When it was begun, in milliseconds since the epoch."""
    meters: dict[str, Compared]
    """By Stripe event name. Of a meter that is not in it, the one before still holds."""


Record = Total | Advance | Command | Rejection | Report | Comparison

_COMMAND: Final = b'{"kind":"command",'
_OF_STAGE_1: Final = (b'{"kind":"total",', b'{"kind":"advance",')
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


def is_of_stage_1(value: bytes) -> bool:
    """Whether a record of the totals log is a total or an advance; all others came from people or from Stripe."""
    return value.startswith(_OF_STAGE_1)


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
