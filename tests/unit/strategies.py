"""Hypothesis strategies, and how thoroughly the tests that use them search. Every run tries the same examples."""

import json
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from consumer.aggregate.meters import Meter
from tests.unit.oracle import Said, Wanted
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, T0, Stage1, meter, rules, time_text

_ALIKE = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

THOROUGH = settings(_ALIKE, max_examples=300)
"""For a function or a single event."""
LOGS = settings(_ALIKE, max_examples=120)
"""For whole logs of events."""

METERS: Final = (
    Wanted("tokens", ("a", "b", "plain")),
    Wanted("calls", ("a",), counts=True, size=HOUR, lateness=10 * MINUTE),
    Wanted("filtered", ("b", "c"), models=("x", "y"), decimals=2, accept_late=3 * HOUR),
    Wanted("credits", ("c",), negative=True, decimals=0, lateness=0),
)
"""Events of the type `plain` count in one meter alone: only such ones take the short path."""

BILL_FROM: Final = T0 - 25 * HOUR


def real(each: Wanted) -> Meter:
    """The meter that the oracle is told about."""
    return meter(
        each.name,
        event_types=each.types,
        where=((("model",), each.models),) if each.models else (),
        aggregation="count" if each.counts else "sum",
        value=None if each.counts else ("n",),
        decimals=each.decimals,
        allow_negative=each.negative,
        window="1m" if each.size == MINUTE else "1h",
        lateness=each.lateness,
        accept_late=each.accept_late,
    )


@dataclass(frozen=True)
class Written:
    """A record: what it says, and the bytes that say it."""

    said: Said
    value: bytes | None


def _number_text(number: Fraction) -> str:
    digits = Decimal(number.numerator) / Decimal(number.denominator)
    return f"{digits:f}" if number.denominator != 1 else str(number.numerator)


_DELAYS = st.one_of(
    st.sampled_from([0, 1, SECOND, MINUTE, 59_999, 2 * MINUTE, 3 * MINUTE, 7 * MINUTE, 8 * MINUTE, 18 * MINUTE]),
    st.sampled_from([-5 * MINUTE - 1, -5 * MINUTE, -MINUTE, HOUR, 3 * HOUR, 3 * HOUR + 1, DAY, DAY + 1, 2 * DAY]),
    st.integers(-6 * MINUTE, 2 * HOUR),
)
_STEPS = st.one_of(
    st.just(0),
    st.sampled_from([1, SECOND, 5 * SECOND, MINUTE, 3 * MINUTE, HOUR, 5 * HOUR, 25 * HOUR]),
    st.sampled_from([-1, -4 * SECOND, -MINUTE, -2 * HOUR]),
    st.integers(0, 10 * MINUTE),
)
_NUMBERS: st.SearchStrategy[Fraction | str | None] = st.one_of(
    st.integers(0, 1000).map(Fraction),
    st.sampled_from(["0.30000000000000004", "0.005", "0.015", "2.5", "0.0000000000005"]).map(Fraction),
    st.sampled_from([Fraction(10**15 - 1), Fraction(10**15), Fraction(-1), Fraction(-5, 2), Fraction(0)]),
    st.sampled_from(["many", "", "1 000"]),
    st.none(),
)
_TIMES = st.sampled_from(["ms", "ms", "ms", "finer", "absent", "offset", "naive"])


@st.composite
def _record(draw: st.DrawFn, arrival: int, by_producer: bool) -> Written:
    kind = draw(st.sampled_from(["event"] * 12 + ["tombstone", "garbage"]))
    unkeyed = draw(st.integers(0, 5)) == 0
    if by_producer and draw(st.integers(0, 20)) == 0:
        arrival += 365 * DAY
    if kind != "event":
        return Written(Said(arrival, by_producer, kind, unkeyed=unkeyed), None if kind == "tombstone" else b"{")
    at = arrival - draw(_DELAYS)
    time: Fraction | str | None = Fraction(at)
    text: str | None = time_text(at)
    match draw(_TIMES):
        case "finer":
            time, text = Fraction(at) + Fraction(9996, 10000), time_text(at)[:-1] + "9996Z"
        case "offset":
            text = time_text(at + 2 * HOUR)[:-1] + "+02:00"
        case "absent":
            time = text = None
        case "naive":
            time = text = time_text(at)[:-1]
    number = draw(_NUMBERS)
    source, id_ = draw(st.sampled_from([("ab", "c"), ("a", "bc"), ("s", "1"), ("s", "2"), ("s", "3"), ("", "")]))
    if not source:
        source, id_ = "s", f"unique-{draw(st.integers(0, 10**9))}"
    said = Said(
        arrival,
        by_producer,
        "event",
        source,
        id_,
        draw(st.sampled_from(["a", "a", "b", "b", "c", "c", "d", "plain", "plain", "plain", "plain"])),
        time,
        draw(st.sampled_from(["acme", "acme", "ümlaut", "x" * 255, "x" * 256, None])),
        draw(st.sampled_from(["x", "y", "z", None])),
        number,
        unkeyed,
    )
    event = {
        "specversion": "1.0",
        "source": source,
        "id": id_,
        "type": said.type,
        "time": text,
        "subject": said.customer,
        "data": {"model": said.model, "n": "NUMBER"},
    }
    if number is None:
        event["data"] = {"model": said.model}
    if text is None:
        del event["time"]
    written = json.dumps(event)
    if isinstance(number, str):
        written = written.replace('"NUMBER"', json.dumps(number))
    elif number is not None:
        quote = '"' if draw(st.booleans()) else ""
        written = written.replace('"NUMBER"', quote + _number_text(number) + quote)
    return Written(said, written.encode())


@st.composite
def logs(draw: st.DrawFn, *, most: int = 40) -> list[Written]:
    """A partition's log: several meters' events, repeated, late, early, refused; arrivals that step back."""
    by_producer = draw(st.booleans())
    arrival = T0
    log = []
    size = draw(st.integers(1, most))
    for step in draw(st.lists(_STEPS, min_size=size, max_size=size)):
        arrival += step
        log.append(draw(_record(arrival, by_producer)))
    return log


@dataclass(frozen=True)
class Act:
    """Something that happens to the service while it reads."""

    kind: str
    """`read` so many records, `advance` the clock by so much, `commit`, or `crash`."""
    amount: int = 0


ACTS: Final = st.lists(
    st.one_of(
        st.builds(Act, st.just("read"), st.integers(1, 9)),
        st.builds(Act, st.just("read"), st.integers(1, 9)),
        st.builds(Act, st.just("advance"), st.sampled_from([1, 4 * SECOND, MINUTE, 3 * MINUTE + 6 * SECOND, HOUR])),
        st.just(Act("commit")),
        st.just(Act("crash")),
    ),
    max_size=40,
)


_HEADERS: Final[tuple[list[tuple[str, bytes | None]] | None, ...]] = (
    None,
    [("content-type", b"application/cloudevents+json; charset=UTF-8"), ("traceparent", b"00-1-2-01")],
    [("trace", None)],
)
"""What may stand beside an event that is the value, and changes nothing."""


def stage_of(log: list[Written], **settings_: int) -> Stage1:
    """Stage 1 before it has read any of this log, under the meters above, with a reader's clock that stands still."""
    now = max((each.said.arrival for each in log if each.said.arrival < T0 + 300 * DAY), default=T0)
    stage = Stage1(rules(*map(real, METERS), bill_from=BILL_FROM, **settings_), now=now)
    for number, each in enumerate(log):
        stage.write(
            each.value,
            each.said.arrival,
            key=None if each.said.unkeyed else b"k",
            headers=_HEADERS[number % len(_HEADERS)],
            stamp_type=1 if each.said.by_producer else 2,
        )
    return stage
