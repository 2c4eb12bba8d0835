"""Generated traffic is what it says it is, and stage 1 makes of it exactly what it says that it bills."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, KafkaException, TopicPartition

from consumer import deadletters, totals
from consumer.aggregate.aggregator import Aggregator, Record, Rules
from consumer.aggregate.meters import Source
from consumer.config import Config
from consumer.sandbox.broker import PARTITIONS, EmbeddedBroker
from consumer.sandbox.traffic import (
    API_CALLS,
    METERS,
    REACH_MS,
    SETTLED_AFTER_MS,
    Counts,
    Message,
    Mix,
    Traffic,
    exact,
    produce,
    tombstones,
)
from consumer.storage import Log

START_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
EVENTS = 20_000
MIX = Mix(customers=50)
CLEAN = Mix(customers=50, duplicates=0, malformed=0)


def traffic(
    mix: Mix = MIX, *, seed: int = 7, events: int = EVENTS, partitions: int = 1
) -> tuple[Traffic, list[Message]]:
    made = Traffic(mix, seed=seed, partitions=partitions)
    return made, list(made.messages(events, start_ms=START_MS, duration_ms=HOUR_MS))


def as_event(message: Message) -> BaseCloudEvent:
    """What the reference library reads."""
    assert message.value is not None
    return from_kafka_event(KafkaMessage(dict(message.headers), message.key, message.value))


def is_binary(message: Message) -> bool:
    return any(name.startswith("ce_") for name, _ in message.headers)


def meters() -> Config:
    document = {"pipeline": "test", "stripe": {"livemode": False}, "meters": METERS}
    return Config.model_validate(json.loads(json.dumps(document)))


def aggregated(messages: Sequence[Message], partition: int) -> tuple[Aggregator, list[totals.Total], list[Any]]:
    """What stage 1 makes of a partition, read in batches, with a commit after each."""
    rules = Rules(meters().core_meters, bill_from=START_MS - REACH_MS, settle=5_000, deduplicate_for=24 * HOUR_MS)
    aggregator = Aggregator(rules, Source("cluster", "topic", "test", partition), 0)
    now = messages[-1].timestamp_ms
    records: list[Record] = [
        (offset, (TIMESTAMP_CREATE_TIME, each.timestamp_ms), each.key, each.headers, each.value)
        for offset, each in enumerate(messages)
    ]
    closed: list[totals.Total] = []
    dead: list[Any] = []
    for first in range(0, len(records), 500):
        aggregator.step(records[first : first + 500], now)
        while aggregator.changed:
            for append in aggregator.commit().appends:
                if append.log is Log.DEAD_LETTERS:
                    dead.append(deadletters.decode(append.value))
                elif isinstance(total := totals.decode(append.value), totals.Total):
                    closed.append(total)
    aggregator.check()
    return aggregator, closed, dead


def test_the_same_seed_makes_the_same_records_and_expects_the_same() -> None:
    (first, messages), (second, again) = traffic(events=3_000), traffic(events=3_000)

    assert again == messages
    assert second.expected.by_window() == first.expected.by_window()
    assert second.expected.customers == first.expected.customers


def test_two_seeds_share_no_event() -> None:
    def names(seed: int) -> set[tuple[str, str]]:
        _, messages = traffic(CLEAN, seed=seed, events=1_000)
        return {(event.get_source(), event.get_id()) for event in map(as_event, messages)}

    assert len(names(1)) == 1_000, "an id and a source name one event"
    assert not names(1) & names(2)


def test_an_id_alone_names_events_of_several_sources() -> None:
    _, messages = traffic(CLEAN, events=999)
    sources = Counter(as_event(each).get_id() for each in messages)

    assert set(sources.values()) == {3}


def test_exactly_as_many_records_as_asked_for_arrive_in_order_within_the_duration() -> None:
    made, messages = traffic(partitions=4)

    assert len(messages) == made.expected.counts.produced == EVENTS
    assert all(earlier.timestamp_ms <= later.timestamp_ms for earlier, later in pairwise(messages))
    assert messages[0].timestamp_ms == START_MS
    assert messages[-1].timestamp_ms < START_MS + HOUR_MS


def test_a_customer_is_the_key_and_has_one_partition() -> None:
    _, messages = traffic(Mix(), partitions=4)
    per_key: dict[bytes, set[int]] = {}
    for each in messages:
        per_key.setdefault(each.key, set()).add(each.partition)

    assert all(len(partitions) == 1 for partitions in per_key.values())
    assert set().union(*per_key.values()) == {0, 1, 2, 3}
    assert all(key.startswith(b"cus_") for key in per_key)


def test_shares_are_those_of_the_mix() -> None:
    mix = replace(MIX, malformed=0.02)
    made, messages = traffic(mix, events=40_000)
    counts = made.expected.counts
    usage = counts.counted

    assert counts.produced == usage + counts.duplicates + counts.malformed + counts.unmatched
    assert counts.duplicates / counts.produced == pytest.approx(mix.duplicates, rel=0.2)
    assert counts.malformed / counts.produced == pytest.approx(mix.malformed, rel=0.2)
    assert counts.unmatched / counts.produced == pytest.approx(mix.unmatched, rel=0.2)
    assert counts.late / usage == pytest.approx(mix.late, rel=0.2)
    assert sum(map(is_binary, messages)) / counts.produced == pytest.approx(mix.binary, rel=0.1)
    assert sum(map(size, messages)) / counts.produced == pytest.approx(300, rel=0.15)


def size(message: Message) -> int:
    return len(message.value or b"") + sum(len(name) + len(value) for name, value in message.headers)


def test_completions_have_decimals_as_often_as_the_mix_says() -> None:
    _, messages = traffic(CLEAN)
    values = [value for value in map(tokens, map(as_event, messages)) if value is not None]

    decimal = [value for value in values if not value.isdigit()]
    assert len(decimal) / len(values) == pytest.approx(MIX.decimals, rel=0.1)
    assert any(len(value.partition(".")[2]) > 12 for value in decimal)
    assert any(value.startswith('"') for value in decimal)


def tokens(event: BaseCloudEvent) -> str | None:
    """The value of a completion, as JSON."""
    data = event.get_data()
    return json.dumps(data["tokens"]["total"]) if isinstance(data, dict) and "tokens" in data else None


def test_events_are_late_or_disordered_but_never_from_beyond_reach_nor_from_the_future() -> None:
    made, messages = traffic(CLEAN)
    delays = [each.timestamp_ms - milliseconds(as_event(each)) for each in messages]

    assert min(delays) >= 0
    assert 40 * 60_000 < max(delays) <= REACH_MS
    assert sum(delay >= 180_000 for delay in delays) == made.expected.counts.late
    assert sum(1_000 < delay < 120_000 for delay in delays) / EVENTS == pytest.approx(MIX.disordered, rel=0.2)


def milliseconds(event: BaseCloudEvent) -> int:
    at = event.get_time()
    assert at is not None
    return (at - at.fromtimestamp(0, at.tzinfo)) // timedelta(milliseconds=1)


def test_the_cloudevents_package_reads_every_event_that_is_not_meant_to_be_broken() -> None:
    _, messages = traffic(replace(MIX, malformed=0))
    read = [as_event(each) for each in messages]

    assert {is_binary(each) for each in messages} == {True, False}
    assert {event.get_specversion() for event in read} == {"1.0"}
    assert {event.get_type() for event in read} == {"ai.completion", "api.call", "session.started"}
    assert all(event.get_subject() == each.key.decode() for event, each in zip(read, messages, strict=True))


def test_repetitions_follow_their_original_within_minutes_on_its_partition() -> None:
    made, messages = traffic(replace(MIX, duplicates=0.1, malformed=0.05), partitions=4)
    first: dict[tuple[bytes | None, str], Message] = {}
    repetitions = []
    for each in messages:
        original = first.setdefault((each.value, repr(each.headers)), each)
        if original is not each:
            repetitions.append((original, each))

    assert all(again.partition == original.partition for original, again in repetitions)
    # A repetition may be repeated, so that the last is a multiple of 3 minutes from the original.
    assert all(again.timestamp_ms - original.timestamp_ms < 20 * 60_000 for original, again in repetitions)
    broken = made.expected.counts.malformed / EVENTS
    assert made.expected.counts.duplicates < len(repetitions) < EVENTS * 0.12
    assert broken == pytest.approx(0.05, rel=0.2), "broken events are repeated too"


@pytest.mark.parametrize("seed", [1, 2])
def test_stage_1_makes_of_it_exactly_what_is_expected(seed: int) -> None:
    partitions = 2
    made, messages = traffic(
        replace(MIX, malformed=0.005), seed=seed, events=EVENTS * partitions, partitions=partitions
    )
    now = START_MS + HOUR_MS + SETTLED_AFTER_MS
    messages += tombstones(partitions, now)
    sums: Counter[tuple[str, str, int]] = Counter()
    seen = Counts()
    reasons: set[str] = set()
    for partition in range(partitions):
        own = [each for each in messages if each.partition == partition]
        aggregator, closed, dead = aggregated(own, partition)
        assert aggregator.open_buckets == 0, "the tombstone closes everything"
        for total in closed:
            sums[total.stripe.event_name, total.customer, total.window_start * 1000] += totals.scaled(total.value)
        book = aggregator.book
        late = sum(aggregator.meter_books["api-calls"].late.values())
        assert book.ignored.pop("tombstone") == 1
        ignored = book.ignored.pop("unmatched")
        assert not book.ignored
        reasons |= {letter.reason for letter in dead}
        each = Counts(book.consumed - 1, book.counted, late, book.duplicate, len(dead), ignored)
        seen = Counts(*(getattr(seen, field.name) + getattr(each, field.name) for field in fields(Counts)))

    assert seen == made.expected.counts
    assert dict(sums) == made.expected.by_window()
    assert len(reasons) >= 8


def test_no_total_has_more_digits_than_stripe_takes() -> None:
    made, _ = traffic(Mix(customers=3))

    values = made.expected.by_window().values()
    assert all(totals.for_stripe(value) == value for value in values)
    assert any(value % totals.SCALE for value in values)


def test_what_is_expected_of_customers_is_the_sum_of_their_windows() -> None:
    made, _ = traffic()
    sums: Counter[tuple[str, str]] = Counter()
    for (event_name, customer, _), value in made.expected.by_window().items():
        sums[event_name, customer] += value

    assert made.expected.by_customer() == dict(sums)
    calls = sum(value for (event_name, _), value in sums.items() if event_name == API_CALLS)
    assert calls == made.expected.counts.counted * totals.SCALE


@pytest.mark.parametrize(
    ("text", "rounded"),
    [
        ("7", "7"),
        (repr(0.1 + 0.2), "0.3"),
        ("1.0000000000005", "1"),
        ("1.9999999999995", "2"),
        ("1.0000000000015", "1.000000000002"),
        ("1.00000000000250000000001", "1.000000000003"),
        ("15e-1", "1.5"),
    ],
)
def test_values_are_rounded_half_to_even_at_twelve_decimals(text: str, rounded: str) -> None:
    assert Decimal(exact(text)).scaleb(-12) == Decimal(rounded)


def consumed(broker: EmbeddedBroker, topic: str, number: int) -> Iterator[tuple[Message, int]]:
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "reader"})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    deadline = time.monotonic() + 30.0
    left = number
    while left and time.monotonic() < deadline:
        for record in consumer.consume(500, 0.05):
            assert record.error() is None
            given = record.headers() or []
            assert isinstance(given, list)
            headers = [(name, value) for name, value in given if isinstance(value, bytes)]
            key, partition, offset = record.key(), record.partition(), record.offset()
            assert isinstance(key, bytes)
            assert partition is not None
            assert offset is not None
            left -= 1
            yield Message(key, partition, record.timestamp()[1], headers, record.value()), offset
    consumer.close()


def test_produced_messages_arrive_whole_and_in_order() -> None:
    _, messages = traffic(events=5_000, partitions=PARTITIONS)
    messages += tombstones(PARTITIONS, START_MS + 2 * HOUR_MS)
    told: list[int] = []
    with EmbeddedBroker() as broker:
        broker.create_topic("usage")
        assert produce(broker.bootstrap_servers, "usage", messages, told.append) == len(messages)
        read = sorted(consumed(broker, "usage", len(messages)), key=lambda each: (each[0].partition, each[1]))

    assert [message for message, _ in read] == sorted(messages, key=lambda each: each.partition)
    assert told == sorted(told)
    assert told[-1] == len(messages)


def test_a_message_that_cannot_be_delivered_is_an_error() -> None:
    _, messages = traffic(events=10)
    with pytest.raises(KafkaException):
        produce("127.0.0.1:1", "usage", messages, options={"message.timeout.ms": 500, "log_level": 0})
