"""What is counted: a meter, its edition, and the identifier of each of its totals."""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b
from typing import Final, Literal

import msgspec

from consumer.events import Path
from consumer.totals import Destination

RULES: Final = 1
"""Version of the rules in this package by which events become totals; part of every edition."""

Scalar = str | int | bool | Decimal

WINDOW_MS: Final = {"1m": 60_000, "1h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Meter:
    """One meter of the configuration, validated. Durations are in milliseconds."""

    name: str
    event_types: tuple[str, ...]
    where: tuple[tuple[Path, tuple[Scalar, ...]], ...]
    aggregation: Literal["sum", "count"]
    value: Path | None
    decimals: int
    allow_negative: bool
    customer: Path | str
    """A path into the data, or the name of an attribute."""
    window: Literal["1m", "1h"]
    lateness: int
    accept_late: int
    stripe: Destination

    @property
    def size(self) -> int:
        """Length of a window in milliseconds."""
        return WINDOW_MS[self.window]

    def edition(self, *, settle: int, deduplicate_for: int) -> bytes:
        """Digest of all that decides what a bucket of this meter holds, when it closes and where it goes.

        A changed configuration has another edition, hence other buckets and other identifiers: an identifier that
        Stripe has seen can never stand for a different sum.
        """
        meaning = (
            RULES,
            self.name,
            sorted(self.event_types),
            sorted((str(path), sorted((type(v).__name__, str(v)) for v in values)) for path, values in self.where),
            self.aggregation,
            self.value,
            self.decimals,
            self.allow_negative,
            self.customer,
            self.window,
            self.lateness,
            self.accept_late,
            (self.stripe.event_name, self.stripe.value_key, self.stripe.customer_key),
            settle,
            deduplicate_for,
        )
        return blake2b(msgspec.msgpack.encode(meaning), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Source:
    """Where events come from, to tell apart totals that would otherwise look alike."""

    cluster_id: str
    topic_id: str
    pipeline: str
    partition: int


def identifier(
    source: Source, *, meter: str, edition: bytes, customer: str, start: int, window: str, revision: int
) -> str:
    """The name of one total, for ever: never made of its value, of the time, or of who computes it.

    ``start`` is in milliseconds. At most 100 characters, as Stripe's Meter Events allow.
    """
    named = (source.cluster_id, source.topic_id, source.partition, source.pipeline, meter, edition, customer)
    digest = blake2b(msgspec.msgpack.encode(named), digest_size=20).hexdigest()
    at = datetime.fromtimestamp(start // 1000, UTC).strftime("%Y%m%dT%H%MZ")
    return f"tm1-{at}-{window}-r{revision}-{digest}"
