"""Generated usage traffic, and what it has to bill: the other side of every comparison in demo, tests and benchmarks.

The traffic has what real traffic has: retries, stragglers, disorder, floats, broken events and other people's events.
What it has to bill is added up while it is made, from what each value was made of: nothing is decoded, windowed or
rounded by the code whose result it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any, Final, Literal, NamedTuple
from zlib import crc32

import orjson
from confluent_kafka import KafkaError, KafkaException, Producer

MINUTE_MS: Final = 60_000

REACH_MS: Final = 45 * MINUTE_MS
"""Event times lie at most this long before their arrival: `bill_from` has to lie this long before the first arrival."""

SETTLED_AFTER_MS: Final = 31 * MINUTE_MS
"""A tombstone dated this long after the last arrival closes every window, those of corrections included."""

REPEATED_WITHIN_MS: Final = 3 * MINUTE_MS
"""Repetitions come at most so long after what they repeat."""

AI_TOKENS: Final = "ai_tokens"
API_CALLS: Final = "api_calls"

METERS: Final[tuple[Mapping[str, Any], ...]] = (
    {
        "name": "ai-tokens",
        "event_types": ["ai.completion"],
        "where": {"$.model": ["gpt-5", "gpt-5-mini"]},
        "aggregation": "sum",
        "value": "$.tokens.total",
        "customer": "subject",
        "window": "1m",
        "stripe": {"event_name": AI_TOKENS},
    },
    {
        "name": "api-calls",
        "event_types": ["ai.completion", "api.call"],
        "aggregation": "count",
        "customer": "subject",
        "window": "1m",
        "stripe": {"event_name": API_CALLS},
    },
)
"""The meters that this traffic is made for, as the configuration file writes them. A completion counts in both.

Lateness is the default of 2 minutes; `allow_negative` and `decimals` are the defaults too.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What the traffic consists of. Shares are between 0 and 1."""

    customers: int = 1_000
    duplicates: float = 0.02
    """Of all records: sent again within minutes, byte for byte. Broken events are repeated as often as others."""
    late: float = 0.01
    """Of the usage events: arriving after their window's deadline."""
    disordered: float = 0.05
    """Of the usage events: overtaken by others for up to 100 seconds, yet in time."""
    malformed: float = 0.001
    """Of all records that are no repetitions."""
    unmatched: float = 0.02
    """Of all records that are no repetitions: events of a type that no meter counts."""
    decimals: float = 1 / 3
    """Of the completions: with a value that is no integer."""
    binary: float = 1 / 5
    """Of all records: in binary mode, with the attributes in headers."""


class Message(NamedTuple):
    """One record for the source topic."""

    key: bytes
    partition: int
    timestamp_ms: int
    """Its arrival, where the topic keeps the producer's time."""
    headers: list[tuple[str, bytes]]
    value: bytes | None


@dataclass(slots=True)
class Counts:
    """What became of the records that were made: `produced = counted + duplicates + malformed + unmatched`."""

    produced: int = 0
    counted: int = 0
    late: int = 0
    """Of those counted: those that arrived after their window's deadline, and are billed as corrections."""
    duplicates: int = 0
    """Repetitions of counted events; those of others share their lot."""
    malformed: int = 0
    unmatched: int = 0


class Expected:
    """What the traffic made so far has to bill: exact, in units of 10⁻¹².

    No total needs more than the 15 digits that Stripe takes, so that what Stripe adds up must be equal.
    """

    def __init__(self) -> None:
        self.customers: dict[str, Counts] = {}
        self._windows: dict[str, dict[tuple[str, int], int]] = {AI_TOKENS: {}, API_CALLS: {}}

    @property
    def counts(self) -> Counts:
        """Of all customers together."""
        each = self.customers.values()
        return Counts(*(sum(getattr(counts, field.name) for counts in each) for field in fields(Counts)))

    def by_window(self) -> dict[tuple[str, str, int], int]:
        """Per Stripe event name, customer and start of the minute in milliseconds."""
        return {
            (event_name, customer, start): value
            for event_name, windows in self._windows.items()
            for (customer, start), value in windows.items()
        }

    def by_customer(self) -> dict[tuple[str, str], int]:
        """Per Stripe event name and customer."""
        sums: dict[tuple[str, str], int] = {}
        for event_name, windows in self._windows.items():
            for (customer, _), value in windows.items():
                sums[event_name, customer] = sums.get((event_name, customer), 0) + value
        return sums

    def add(self, event_name: str, customer: str, at_ms: int, value: int) -> None:
        """One event at this time is to be billed under the event name."""
        windows = self._windows[event_name]
        window = customer, at_ms - at_ms % MINUTE_MS
        windows[window] = windows.get(window, 0) + value


class _Customer(NamedTuple):
    name: str
    key: bytes
    partition: int
    counts: Counts


class _Repeat(NamedTuple):
    due_ms: int
    order: int
    customer: _Customer
    kind: Literal["usage", "malformed", "unmatched"]
    headers: list[tuple[str, bytes]]
    value: bytes


_UNIT: Final = 10**12
_MICRO: Final = 10**6
_REGIONS: Final = ("eu-west-1", "us-east-1", "ap-south-1")
_MODELS: Final = ("gpt-5",) * 6 + ("gpt-5-mini",) * 3 + ("gpt-4.1",)
_BILLED_MODELS: Final = frozenset(METERS[0]["where"]["$.model"])
_PATHS: Final = ("/v1/responses", "/v1/files", "/v1/embeddings", "/v1/batches/status")
_STRUCTURED: Final = [("content-type", b"application/cloudevents+json")]
_OFFSET_MS: Final = (5 * 60 + 30) * MINUTE_MS

_AWKWARD: Final[tuple[Callable[[int], str], ...]] = (
    lambda n: repr(n * 0.1 + 0.2),  # as floats come: 0.1 + 0.2 has 17 decimals
    lambda n: f"{n}.0000000000005",  # half a unit too much: to the even one, which is below
    lambda n: f"{n}.9999999999995",  # and here above
    lambda n: f"{n}5e-1",
    lambda n: f'"{n}.000250"',
)
"""Values that are easily billed wrongly. Rounded to twelve decimals, none keeps more than six."""

_ABSENT: Final = object()
_FAULTS: Final[tuple[tuple[str, object], ...]] = (
    ("data", orjson.Fragment('{"model":"gpt-5","tokens":{"prom')),
    ("id", _ABSENT),
    ("source", _ABSENT),
    ("type", _ABSENT),
    ("subject", _ABSENT),
    ("specversion", _ABSENT),
    ("specversion", "0.3"),
    ("time", "2026-11-01T12:00:00"),
    ("time", "yesterday"),
    ("total", _ABSENT),
    ("total", None),
    ("total", True),
    ("total", -5),
    ("total", "NaN"),
    ("total", orjson.Fragment("NaN")),
    ("total", orjson.Fragment("1e15")),
)
"""What is wrong with malformed events: the place in a completion, and what stands there."""


class Traffic:
    """One run of traffic: the same mix, seed, partitions and times make the same records, byte for byte.

    Records are keyed by customer, and we choose the partition, so that it does not depend on a client's partitioner.
    Repetitions go to the partition of what they repeat. Two runs with different seeds share no event.
    """

    def __init__(self, mix: Mix, *, seed: int, partitions: int) -> None:
        self.expected = Expected()
        """Of all records made so far."""
        self._mix = mix
        self._random = Random(seed)  # noqa: S311 - reproducible traffic, no secrets
        self._run = f"{seed:08x}"
        self._repeats: list[_Repeat] = []
        self._order = count()
        self._made = self._malformed = 0
        self._customers: list[_Customer] = []
        for number in range(mix.customers):
            name = f"cus_{number:06d}"
            counts = self.expected.customers[name] = Counts()
            self._customers.append(_Customer(name, name.encode(), crc32(name.encode()) % partitions, counts))

    def messages(self, events: int, *, start_ms: int, duration_ms: int) -> Iterator[Message]:
        """So many records, repetitions included, arriving evenly from the start on for the duration."""
        for number in range(events):
            yield self.message(start_ms + number * duration_ms // events)

    def message(self, arrival_ms: int) -> Message:
        """The next record, which arrives now. Arrivals must not go back."""
        if self._repeats and self._repeats[0].due_ms <= arrival_ms:
            _, _, customer, kind, headers, value = heappop(self._repeats)
            again = True
        else:
            customer, kind, headers, value = self._new(arrival_ms)
            again = False
        counts = customer.counts
        counts.produced += 1
        if kind == "malformed":
            counts.malformed += 1
        elif kind == "unmatched":
            counts.unmatched += 1
        elif again:
            counts.duplicates += 1
        else:
            counts.counted += 1
        if self._random.random() < self._mix.duplicates:
            due_ms = arrival_ms + int(self._random.random() * REPEATED_WITHIN_MS)
            heappush(self._repeats, _Repeat(due_ms, next(self._order), customer, kind, headers, value))
        return Message(customer.key, customer.partition, arrival_ms, headers, value)

    def _new(
        self, arrival_ms: int
    ) -> tuple[_Customer, Literal["usage", "malformed", "unmatched"], list[tuple[str, bytes]], bytes]:
        random, mix = self._random.random, self._mix
        # Squared, so that customers differ in size as they do: the first tenth makes a third of the traffic.
        customer = self._customers[int(random() ** 2 * mix.customers)]
        number = self._made
        self._made += 1
        # Three sources count their events alike: an id alone names three events.
        region = _REGIONS[number % 3]
        event: dict[str, Any] = {
            "specversion": "1.0",
            "id": f"{self._run}-{number // 3:08d}",
            "source": f"/services/gateway/{region}",
            "type": "api.call",
            "time": "",
            "subject": customer.name,
            "datacontenttype": "application/json",
        }
        kind: Literal["usage", "malformed", "unmatched"] = "usage"
        drawn = random()
        if drawn < mix.malformed:
            kind = "malformed"
            event["time"] = _written(arrival_ms, random())
            self._complete(event, "gpt-5")
            self._break(event)
        elif drawn < mix.malformed + mix.unmatched:
            kind = "unmatched"
            event["time"] = _written(arrival_ms, random())
            event["type"] = "session.started"
            event["data"] = {"region": region, "client": "web"}
        else:
            at_ms = self._event_time(arrival_ms, customer.counts)
            event["time"] = _written(at_ms, random())
            if random() < 0.7:
                model = _MODELS[int(random() * len(_MODELS))]
                value = self._complete(event, model)
                if model in _BILLED_MODELS:
                    self.expected.add(AI_TOKENS, customer.name, at_ms, value)
            else:
                path = _PATHS[int(random() * len(_PATHS))]
                event["data"] = {"method": "POST", "path": path, "region": region, "status": 200}
            self.expected.add(API_CALLS, customer.name, at_ms, _UNIT)
        if random() < mix.binary:
            return customer, kind, *_in_binary_mode(event)
        return customer, kind, _STRUCTURED, orjson.dumps(event)

    def _event_time(self, arrival_ms: int, counts: Counts) -> int:
        random = self._random.random
        drawn = random()
        if drawn < self._mix.late:
            counts.late += 1
            # A window and its lateness are 3 minutes: a longer delay is late wherever in the window it began.
            return arrival_ms - 3 * MINUTE_MS - int(random() * (REACH_MS - 3 * MINUTE_MS))
        if drawn < self._mix.late + self._mix.disordered:
            return arrival_ms - int(random() * 100_000)
        return arrival_ms - int(random() * 1_000)

    def _complete(self, event: dict[str, Any], model: str) -> int:
        """Make it a completion, and return the exact value of its total."""
        random = self._random.random
        prompt, completion = 1 + int(random() * 4_000), 1 + int(random() * 1_000)
        total: object = prompt + completion
        value = (prompt + completion) * _UNIT
        if random() < self._mix.decimals:
            if random() < 0.8:
                micros = int(random() * _MICRO)
                total, value = orjson.Fragment(f"{prompt}.{micros:06d}"), prompt * _UNIT + micros * _MICRO
            else:
                text = _AWKWARD[int(random() * len(_AWKWARD))](prompt)
                total, value = orjson.Fragment(text), exact(text.strip('"'))
        event["type"] = "ai.completion"
        event["data"] = {
            "model": model,
            "request": f"req_{self._made:010d}",
            "tokens": {"prompt": prompt, "completion": completion, "total": total},
        }
        return value

    def _break(self, event: dict[str, Any]) -> None:
        """Do something to it that makes it a dead letter: everything in turn, so that short runs have it all."""
        place, fault = _FAULTS[self._malformed % len(_FAULTS)]
        self._malformed += 1
        where = event["data"]["tokens"] if place == "total" else event
        if fault is _ABSENT:
            del where[place]
        else:
            where[place] = fault


def exact(text: str) -> int:
    """The value of a number in units of 10⁻¹², rounded half to even."""
    return round(Fraction(text) * _UNIT)


def tombstones(partitions: int, now_ms: int) -> list[Message]:
    """A record without value for each partition: it bills nothing, and its arrival closes all that was due before."""
    return [Message(b"end", partition, now_ms, [], None) for partition in range(partitions)]


def _in_binary_mode(event: Mapping[str, Any]) -> tuple[list[tuple[str, bytes]], bytes]:
    headers = [
        ("content-type" if name == "datacontenttype" else f"ce_{name}", value.encode())
        for name, value in event.items()
        if name != "data"
    ]
    return headers, orjson.dumps(event["data"])


def _written(at_ms: int, drawn: float) -> str:
    """A time as producers write it: mostly in UTC with milliseconds."""
    if drawn < 0.9:
        return f"{_second(at_ms // 1000)}.{at_ms % 1000:03d}Z"
    if drawn < 0.95:  # rounded up to microseconds it could lie in the next window
        return f"{_second(at_ms // 1000)}.{at_ms % 1000:03d}9996Z"
    return f"{_second((at_ms + _OFFSET_MS) // 1000)}.{at_ms % 1000:03d}+05:30"


@lru_cache(maxsize=16_384)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def produce(
    bootstrap_servers: str,
    topic: str,
    messages: Iterable[Message],
    progress: Callable[[int], None] | None = None,
    *,
    options: Mapping[str, str | int | float | bool] | None = None,
) -> int:
    """Write the messages to the topic, in their order, and return their number once the broker has them all.

    `progress` is called now and then with the number that the broker has; `options` are further settings of the client.
    Raises KafkaException when a message cannot be delivered; then some may be missing.
    """
    sent = 0
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: object) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer(
        {
            "bootstrap.servers": bootstrap_servers,
            "enable.idempotence": True,  # keeps the order when a batch has to be sent again
            "compression.type": "zstd",  # the embedded broker keeps twice as many events as with lz4
            "linger.ms": 50,
            "batch.size": 1_000_000,
            "queue.buffering.max.messages": 200_000,
            "message.timeout.ms": 60_000,
            "delivery.report.only.error": True,
            "on_delivery": delivered,
            **(options or {}),
        }
    )

    def served(timeout_s: float = 0) -> None:
        producer.poll(timeout_s)
        if failures:
            raise KafkaException(failures[0])

    def tell() -> None:
        if progress is not None:
            progress(sent - len(producer))

    for key, partition, timestamp_ms, headers, value in messages:
        while True:
            try:
                producer.produce(topic, value, key, partition, timestamp=timestamp_ms, headers=[*headers])
                break
            except BufferError:
                served(0.1)
        sent += 1
        served()
        if sent % 1_000 == 0:
            tell()
    while producer.flush(0.5):
        served()
        tell()
    served()
    tell()
    return sent
