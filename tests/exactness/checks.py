"""What a run has to have left: compared with the traffic's own account, from outside where that is possible."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from typing import NamedTuple

from confluent_kafka import Consumer, Message, TopicPartition

from consumer import deadletters, totals
from consumer.aggregate.aggregator import Aggregator, Record
from consumer.aggregate.meters import Source as Identity
from consumer.config import Config, load
from consumer.deliver.delivery import Delivery
from consumer.deliver.entries import decode_outcome
from consumer.deliver.pacing import Outlet
from consumer.runtime import processors
from consumer.runtime.customers import Passthrough
from consumer.sandbox.traffic import METERS, Expected
from consumer.storage import Facts, Log, Stage
from consumer.storage.kafka_records import partition_of
from consumer.totals import Advance, Total, scaled
from tests.exactness.left import InSqlite, Left
from tests.exactness.world import Service, ask

_UNIT = Decimal(10) ** 12
_PAGE = 5_000


class NotExactError(Exception):
    """Something was billed wrongly, or the books do not say what happened; the message lists all of it."""


@dataclass
class Verdict:
    """What was compared, and what did not agree."""

    compared: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def equal(self, what: str, found: object, expected: object) -> None:
        """Both have to be the same; small things are shown."""
        if found == expected:
            self.compared.append(f"{what}: {_shown(expected)}")
        else:
            self.wrong.append(f"{what}: {_difference(found, expected)}")


@dataclass(frozen=True)
class Produced:
    """What was written to the topic: the traffic's account of it, and records without value that ended it."""

    expected: Expected
    tombstones: int
    partitions: int


def judge(produced: Produced, service_: Service, stripe: str) -> Verdict:
    """Compare everything that the embedded store has kept, after the service has stopped. Raises ``NotExactError``."""
    with InSqlite.open(service_.database) as left:
        return compare(produced, load(service_.config_file, service_.environment), left, stripe)


def compare(produced: Produced, config: Config, left: Left, stripe: str) -> Verdict:
    """Compare everything, after all that was produced is billed. Raises ``NotExactError``."""
    verdict = Verdict()
    _check_billed(verdict, produced.expected, stripe)
    log = [Entry(kept.partition, kept.offset, kept.value, totals.decode(kept.value)) for kept in left.log(Log.TOTALS)]
    made = [each.record for each in log if isinstance(each.record, Total)]
    _check_identifiers(verdict, made, left, stripe)
    _check_stage_1(verdict, produced, made, config, left)
    _check_stage_2(verdict, produced.expected, log, left)
    _check_replay(verdict, produced.partitions, config, log, left)
    if verdict.wrong:
        raise NotExactError("\n".join(verdict.wrong))
    return verdict


class Entry(NamedTuple):
    """A record of the totals log, as it lies there and as what it is."""

    partition: int
    offset: int
    value: bytes
    record: totals.Record


def _check_billed(verdict: Verdict, expected: Expected, stripe: str) -> None:
    billed = {
        (event_name, customer, minute * 1000): int(Decimal(value) * _UNIT)
        for event_name, customer, minute, value in ask(stripe, "billed")
    }
    verdict.equal("billed per event name, customer and minute", billed, expected.by_window())
    verdict.equal("identifiers sent with two contents or counted twice", ask(stripe, "violations"), [])


def _check_identifiers(verdict: Verdict, made: list[Total], left: Left, stripe: str) -> None:
    events = {event["identifier"]: scaled(event["value"]) for event in ask(stripe, "events")}
    verdict.equal("totals made once", len({total.identifier for total in made}), len(made))
    verdict.equal("Meter Events at Stripe", events, {t.identifier: scaled(t.value) for t in made if scaled(t.value)})
    outcomes = [decode_outcome(each.value) for each in left.log(Log.OUTCOMES)]
    verdict.equal("totals finished once", sorted(o.identifier for o in outcomes), sorted(t.identifier for t in made))


def _check_stage_1(verdict: Verdict, produced: Produced, made: list[Total], config: Config, left: Left) -> None:
    counts = produced.expected.counts
    aggregators = list(_restored(produced.partitions, config, left))
    books = [aggregator.book for aggregator in aggregators]
    for aggregator in aggregators:
        aggregator.check()
    verdict.equal("records consumed", sum(b.consumed for b in books), counts.produced + produced.tombstones)
    verdict.equal("events counted", sum(b.counted for b in books), counts.counted)
    verdict.equal("duplicates", sum(b.duplicate for b in books), counts.duplicates)
    verdict.equal("events of no meter", sum(b.ignored.get("unmatched", 0) for b in books), counts.unmatched)
    verdict.equal("tombstones", sum(b.ignored.get("tombstone", 0) for b in books), produced.tombstones)
    verdict.equal("events in dead letters", sum(sum(b.dead.values()) for b in books), counts.malformed)
    letters = [deadletters.decode(each.value) for each in left.log(Log.DEAD_LETTERS)]
    verdict.equal("dead letters kept", len({(each.partition, each.offset) for each in letters}), counts.malformed)
    verdict.equal("dead letters kept once", len(letters), counts.malformed)
    verdict.equal("customers in open windows", sum(a.open_keys for a in aggregators), 0)
    for meter, expected in _by_meter(produced.expected).items():
        of_meter = [total for total in made if total.meter == meter]
        meter_books = [a.meter_books[meter] for a in aggregators if meter in a.meter_books]
        verdict.equal(f"{meter}: value counted", sum(b.value for b in meter_books), expected)
        verdict.equal(f"{meter}: value in totals, by the books", sum(b.total_value for b in meter_books), expected)
        verdict.equal(f"{meter}: value in totals, by the log", sum(scaled(t.value) for t in of_meter), expected)
        verdict.equal(f"{meter}: number of totals", sum(b.totals for b in meter_books), len(of_meter))
        verdict.equal(f"{meter}: events in totals", sum(t.events for t in of_meter), sum(b.events for b in meter_books))


def _check_stage_2(verdict: Verdict, expected: Expected, log: list[Entry], left: Left) -> None:
    deliveries = list(_deliveries(verdict, log, left))
    verdict.equal(
        "totals anywhere but in the logs", sum(d.in_flight + d.aside + len([*d.parked()]) for d in deliveries), 0
    )
    for meter, value in _by_meter(expected).items():
        books = [each.ledger.books[meter] for each in deliveries if meter in each.ledger.books]
        number = sum(isinstance(each.record, Total) and each.record.meter == meter for each in log)
        billed = sum(book.delivered.value + book.rounded.value for book in books)
        verdict.equal(f"{meter}: value read by stage 2", sum(book.read.value for book in books), value)
        verdict.equal(f"{meter}: value delivered and rounded off", billed, value)
        finished = sum(book.delivered.totals + book.zero.totals for book in books)
        verdict.equal(f"{meter}: totals delivered or zero", finished, number)
        verdict.equal(f"{meter}: missing, astray", {(book.missing, book.astray) for book in books}, {(0, 0)})
        elsewhere = [
            column.totals
            for book in books
            for column in (book.pending, book.unbilled, book.refused, book.discarded, *book.parked.values())
        ]
        verdict.equal(f"{meter}: totals anywhere else", sum(elsewhere), 0)


def _deliveries(verdict: Verdict, log: list[Entry], left: Left) -> Iterator[Delivery]:
    unread = 0
    for partition in range(left.spread):
        restored = left.restored(Stage.DELIVER, partition)
        unread += sum(each.partition == partition and each.offset >= restored.offset for each in log)
        delivery = Delivery(customers=Passthrough(), in_flight=2_000, parked_limit=1, outlet=Outlet(1.0))
        delivery.restore(restored.offset, restored.entries, time.time_ns() // 10**6)
        yield delivery
    verdict.equal("records of the totals log that stage 2 has not read", unread, 0)


def _check_replay(verdict: Verdict, partitions: int, config: Config, log: list[Entry], left: Left) -> None:
    """The log with its recorded advances, read in one go without a single commit, closes the same totals."""
    was: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    advances: dict[int, list[Advance]] = defaultdict(list)
    for each in log:
        if isinstance(each.record, Total):
            was[each.record.partition, each.partition].append(each.value)
        elif isinstance(each.record, Advance):
            advances[each.record.partition].append(each.record)
    again: dict[tuple[int, int], list[bytes]] = defaultdict(list)
    for partition in range(partitions):
        moves = sorted(advances[partition], key=lambda advance: (advance.offset, advance.clock))
        for key, value in replayed(config, left.facts, partition, moves):
            again[partition, partition_of(key, left.spread)].append(value)
    number = sum(map(len, advances.values()))
    verdict.equal(f"totals of a replay with {number} advances of clocks, byte for byte in order", again, was)


def replayed(config: Config, facts: Facts, partition: int, advances: list[Advance]) -> list[tuple[bytes, bytes]]:
    """Keys and values of the totals that a partition's log makes, with its clock moved where it was moved."""
    aggregator = Aggregator(processors.rules_of(config, facts.bill_from), _identity(facts, partition), 0)
    pending = list(reversed(advances))
    now = time.time_ns() // 10**6
    for batch in _records(config, partition):
        rest = batch
        while rest:
            while pending and pending[-1].offset <= rest[0][0]:
                aggregator.advance(pending.pop().clock)
            upto = next((i for i, each in enumerate(rest) if pending and each[0] >= pending[-1].offset), len(rest))
            aggregator.step(rest[:upto], now)
            rest = rest[upto:]
    while pending:
        aggregator.advance(pending.pop().clock)
    made: list[tuple[bytes, bytes]] = []
    while aggregator.changed:
        made += [(each.key, each.value) for each in aggregator.commit().appends if each.log is Log.TOTALS]
    return [each for each in made if isinstance(totals.decode(each[1]), Total)]


def _records(config: Config, partition: int) -> Iterator[list[Record]]:
    """What a partition holds, from its beginning to its end."""
    place = TopicPartition(config.kafka.topic, partition, 0)
    settings = {"group.id": "tallyman-exactness-replay", "enable.auto.commit": False}
    with closing(Consumer(config.kafka_client() | settings)) as consumer:
        _, end = consumer.get_watermark_offsets(place, timeout=30)
        consumer.assign([place])
        at, deadline = 0, time.monotonic() + 60
        while at < end:
            batch = [_record(message) for message in consumer.consume(_PAGE, 0.2)]
            if batch:
                at, deadline = batch[-1][0] + 1, time.monotonic() + 60
                yield batch
            elif time.monotonic() > deadline:
                raise TimeoutError(f"partition {partition} ends at {end}, but only {at} records came")


def _record(message: Message) -> Record:
    if message.error() is not None:
        raise RuntimeError(str(message.error()))
    # The client's types are wider than what it gives for a record.
    return message.offset(), message.timestamp(), message.key(), message.headers(), message.value()  # type: ignore[return-value]


def _restored(partitions: int, config: Config, left: Left) -> Iterator[Aggregator]:
    rules = processors.rules_of(config, left.facts.bill_from)
    for partition in range(partitions):
        restored = left.restored(Stage.AGGREGATE, partition)
        yield Aggregator(rules, _identity(left.facts, partition), restored.offset, restored.entries)


def _identity(facts: Facts, partition: int) -> Identity:
    return Identity(facts.cluster_id, facts.topic_id, facts.pipeline, partition)


def _by_meter(expected: Expected) -> dict[str, int]:
    """What each meter has to bill altogether."""
    sums: dict[str, int] = defaultdict(int)
    for (event_name, _, _), value in expected.by_window().items():
        sums[event_name] += value
    return {meter["name"]: sums[meter["stripe"]["event_name"]] for meter in METERS}


def _shown(value: object) -> str:
    return f"{len(value)} equal" if isinstance(value, dict | list) else str(value)


def _difference(found: object, expected: object) -> str:
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        if isinstance(found, list) and isinstance(expected, list):
            return f"{len(found)}, not {len(expected)}; they begin {found[:3]} and {expected[:3]}"
        return f"{found}, not {expected}"
    keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
    some = "; ".join(f"{key}: {_short(found.get(key))}, not {_short(expected.get(key))}" for key in keys[:5])
    return f"{len(keys)} of {len(expected)} differ: {some}"


def _short(value: object) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else str(value)
