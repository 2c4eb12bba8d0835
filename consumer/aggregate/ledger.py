"""The books of stage 1: what became of every record, kept in the state so that no crash falsifies them.

Two equations hold after every record and are checked whenever the state is restored:

    consumed = counted + duplicate + dead-lettered + ignored          (events, per partition)
    counted  = in open buckets + in totals                            (events and value, per partition and meter)
"""

import json
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

Book = TypeVar("Book", "MeterBook", "PartitionBook")


@dataclass(slots=True)
class MeterBook:
    """One meter on one partition; values in units of 10⁻¹²."""

    events: int = 0
    value: int = 0
    total_events: int = 0
    total_value: int = 0
    totals: int = 0
    rounded: int = 0
    late: dict[int, int] = field(default_factory=dict)
    """Events by revision, 1 and up."""


@dataclass(slots=True)
class PartitionBook:
    """One partition: its clock and what became of its records."""

    clock: int = 0
    """Milliseconds: how far the log has been read, as a time. It never goes back."""
    arrival: int = 0
    """Milliseconds: the largest arrival read so far."""
    consumed: int = 0
    counted: int = 0
    duplicate: int = 0
    dead: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    unkeyed: int = 0
    deduplicate_for: int = 0
    """Milliseconds: for how long ids were remembered when this was written."""
    known_from: int = 0
    """Milliseconds: of events that took place before, ids may have been forgotten, because ``deduplicate_for`` was
    shorter then."""

    def balanced(self) -> bool:
        """Whether every record consumed is accounted for."""
        return self.consumed == self.counted + self.duplicate + sum(self.dead.values()) + sum(self.ignored.values())


def encode(book: MeterBook | PartitionBook) -> bytes:
    """One entry. JSON from the standard library: values outgrow the 64 bits that faster encoders stop at."""
    return json.dumps(msgspec.to_builtins(book, str_keys=True), separators=(",", ":")).encode()


def decode(value: bytes, kind: type[Book]) -> Book:
    """The book that was encoded."""
    return msgspec.convert(json.loads(value), kind, str_keys=True)
