"""What stage 1 has to make of a log, computed again: slowly, from the whole log at once, and in no way like stage 1.

Nothing is decoded and nothing is shared: the oracle is told what each record says (`Said`), it uses rational numbers
and lists, and looks back over everything that came before where stage 1 keeps a state.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

MINUTE: Final = 60_000
MARKS: Final = sorted([0, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, *(hour * 60 * MINUTE for hour in range(1, 1_000))])


@dataclass(frozen=True)
class Said:
    """One record of the log, as its author meant it."""

    arrival: int
    by_producer: bool
    """Whether its producer dated the record."""
    kind: str
    """`event`, `tombstone` or `garbage`."""
    source: str = ""
    id: str = ""
    type: str = ""
    time: Fraction | str | None = None
    """Milliseconds, or a text that is no time, or absent."""
    customer: str | None = None
    model: str | None = None
    number: Fraction | str | None = None
    """A number, or a text that is none, or absent."""
    unkeyed: bool = False


@dataclass(frozen=True)
class Wanted:
    """A meter, as far as the oracle has to know it. Times in milliseconds."""

    name: str
    types: tuple[str, ...]
    models: tuple[str, ...] = ()
    counts: bool = False
    decimals: int = 12
    negative: bool = False
    size: int = MINUTE
    lateness: int = 2 * MINUTE
    accept_late: int = 24 * 60 * MINUTE


@dataclass
class Sum:
    """What one total has to say."""

    due: int
    value: Fraction = Fraction(0)
    times: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


@dataclass
class Expected:
    """What has become of the log."""

    sums: dict[tuple[str, str, int, int], Sum] = field(default_factory=dict)
    """By meter, customer, start of the window and revision."""
    counted: int = 0
    duplicate: int = 0
    unkeyed: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    rounded: Counter[str] = field(default_factory=Counter)
    late: Counter[tuple[str, int]] = field(default_factory=Counter)


def expected(
    log: Sequence[Said],
    meters: Sequence[Wanted],
    advances: Sequence[tuple[int, int]],
    *,
    now: int,
    settle: int,
    deduplicate_for: int,
    bill_from: int,
) -> Expected:
    """Judge every record by all that came before it. An advance is (offset, clock): made before it was read."""
    found = Expected()
    width = -((deduplicate_for + 5 * MINUTE) // -24)
    known: list[tuple[str, str, int]] = []
    for offset, said in enumerate(log):
        found.unkeyed += said.unkeyed
        if said.kind == "tombstone":
            found.ignored["tombstone"] += 1
            continue
        believed = [each.arrival for each in log[: offset + 1] if not _unbelievable(each, now)]
        arrival = max(believed, default=0)
        clock = max([arrival, *(at for place, at in advances if place <= offset)])
        counting = [m for m in meters if said.type in m.types and (not m.models or said.model in m.models)]
        fault = "arrival_in_future" if _unbelievable(said, now) else "not_json" if said.kind == "garbage" else None
        if fault is None and not counting:
            found.ignored["unmatched"] += 1
            continue
        if fault is None and isinstance(said.time, str):
            fault = "time_invalid"
        if fault is not None or isinstance(said.time, str):
            found.dead[str(fault)] += 1
            continue
        time = said.arrival if said.time is None else said.time.numerator // said.time.denominator
        if time < bill_from:
            found.ignored["before_bill_from"] += 1
            continue
        event = said.source, said.id, arrival // width
        if any(each[:2] == event[:2] and event[2] - each[2] <= 24 for each in known):
            found.duplicate += 1
            known.append(event)
            continue
        if faults := [fault for fault in (_fault(said, meter, arrival - time) for meter in counting) if fault]:
            found.dead[faults[0]] += 1
            continue
        found.counted += 1
        known.append(event)
        for meter in counting:
            start = time // meter.size * meter.size
            deadline = start + meter.size + meter.lateness
            revision = next(
                number
                for number, mark in enumerate(MARKS)
                if arrival < deadline + mark and clock < deadline + mark + settle  # it belongs there, and it is open
            )
            total = found.sums.setdefault(
                (meter.name, str(said.customer), start, revision), Sum(due=deadline + MARKS[revision])
            )
            exact = Fraction(1) if meter.counts else Fraction(said.number or 0)
            value = Fraction(round(exact * 10**meter.decimals), 10**meter.decimals)
            total.value += value
            total.times.append(time)
            total.offsets.append(offset)
            found.rounded[meter.name] += value != exact
            found.late[meter.name, revision] += revision > 0
    return found


def _unbelievable(said: Said, now: int) -> bool:
    return said.by_producer and said.arrival > now + 5 * MINUTE


def _fault(said: Said, meter: Wanted, age: int) -> str | None:
    """Why the meter cannot count it."""
    number = Fraction(1) if meter.counts else said.number
    faults = {
        "late": age > meter.accept_late,
        "future": age < -5 * MINUTE,
        "customer_missing": said.customer is None,
        "customer_too_long": len((said.customer or "").encode()) > 255,
        "value_missing": number is None,
        "value_not_a_number": isinstance(number, str),
        "value_out_of_range": isinstance(number, Fraction) and abs(number) >= 10**15,
        "value_negative": isinstance(number, Fraction) and number < 0 and not meter.negative,
    }
    return next((fault for fault, is_so in faults.items() if is_so), None)
