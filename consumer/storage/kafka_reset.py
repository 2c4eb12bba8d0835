"""To start over on Kafka: one transaction that takes all entries away and writes the first commits of a new life.

The logs stay as they are. Whoever dies on the way leaves the old life or the new one.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import TopicPartition

from consumer.storage import Changes, Facts, Log, Stage, StorageError
from consumer.storage.kafka_client import reader
from consumer.storage.kafka_reading import (
    PATIENCE_S,
    committed,
    ends_of,
    log_sizes,
    members_of,
    partition_count,
    witnessed,
)
from consumer.storage.kafka_records import POSITION_KEY, Position, decode_position, encode_position
from consumer.storage.kafka_start import alone, positions, recorded, transactions_of
from consumer.storage.kafka_topics import Topics
from consumer.storage.kafka_transactions import TRANSACTION_S, Offsets, Record, Transactions

RECORDS_A_SECOND: Final = 20_000
"""Of a state, read and taken away by a slow host: so long the transaction is given."""
LONGEST_S: Final = 840
"""Brokers take transactions of 15 minutes, unless they are told otherwise."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far the processors had come when somebody looked: what is judged is given up, and nothing else."""

    positions: Mapping[Stage, Mapping[int, Position]]


def standing(client: Mapping[str, Any], topics: Topics, found: Mapping[str, int]) -> Standing:
    """As it is now, of the topics that were found."""
    return Standing({s: positions(client, topics, s) if topics.state(s) in found else {} for s in Stage})


def vacant(client: Mapping[str, Any], topics: Topics) -> None:
    """Raise ``StorageError`` while the pipeline has a service."""
    for stage in Stage:
        hosts = members_of(client, topics.group(stage))
        if hosts:
            raise StorageError(
                f"the group {topics.group(stage)} has {len(hosts)} member{'s' * (len(hosts) > 1)} "
                f"({', '.join(sorted(set(hosts))[:3])}): stop the service everywhere first. One that was killed is a "
                "member until its session has timed out"
            )


def end_leftovers(client: Mapping[str, Any], topics: Topics) -> None:
    """End what a start or a reset has left open that died: else everybody waits until its time is over."""
    with closing(transactions_of(client, topics.pipeline)) as transactions:
        transactions.settle()


def start_over(client: Mapping[str, Any], facts: Facts, changes: Mapping[int, Changes], seen: Standing) -> None:
    """Begin anew, if everything stands as it did; the topics are there.

    Why nobody is in between: at first no group has a member, and no offset is on its way that one has left behind. Then
    the offsets are held by our transaction, and whoever takes over a partition is not told them until it is decided.
    When still no group has a member, those who took one over before have lost it, so that nothing they send is taken.
    A commit that somebody had almost made is waited for when the partition is read, and noticed.

    Args:
        client: the settings of any librdkafka client.
        facts: what the state is going to belong to.
        changes: the first commit of stage 1 on every partition of the source.
        seen: how it stood when starting over was judged.

    Raises:
        StorageError: it does not stand so any more, or a service runs; nothing was changed.
        Unreachable: Kafka does not answer, or others kept us from it; nothing was changed.
    """
    if changes.keys() != set(range(facts.partitions)):
        raise ValueError(f"each of the {facts.partitions} partitions needs its first commit, not {[*changes]}")
    topics = Topics.of(facts.pipeline)
    spread = log_sizes(client, topics)[Log.TOTALS]

    def judge() -> Facts | None:
        if (begun := recorded(client, topics)) == facts:
            return begun  # by our own transaction, of which no answer came
        vacant(client, topics)
        for stage, partitions in ((Stage.AGGREGATE, facts.partitions), (Stage.DELIVER, spread)):
            witnessed(client, topics, stage, facts.topic, range(partitions))
        return None

    def write(transactions: Transactions) -> None:
        ends = ends_of(client, topics.totals, range(spread))
        begins = {Stage.AGGREGATE: changes, Stage.DELIVER: {p: Changes(end) for p, end in ends.items()}}
        transactions.run(
            (
                record
                for stage, of_stage in begins.items()
                for record in _anew(
                    client, topics.state(stage), of_stage, seen.positions[stage], facts=facts, spread=spread
                )
            ),
            _offsets(client, topics.group(Stage.AGGREGATE), facts.topic, begins[Stage.AGGREGATE]),
            _offsets(client, topics.group(Stage.DELIVER), topics.totals, begins[Stage.DELIVER]),
            held=lambda: vacant(client, topics),
        )

    records = sum(
        sum(ends_of(client, topic, range(partition_count(client, topic))).values())
        for topic in (topics.aggregate_state, topics.deliver_state)
    )
    aborted_after = min(LONGEST_S, 2 * TRANSACTION_S + records // RECORDS_A_SECOND)
    alone(client, topics.pipeline, judge, write, patience=PATIENCE_S, aborted_after=aborted_after)


def _anew(
    client: Mapping[str, Any],
    topic: str,
    begins: Mapping[int, Changes],
    seen: Mapping[int, Position],
    *,
    facts: Facts,
    spread: int,
) -> Iterator[Record]:
    """Of each partition of a stage's state: its entries deleted, and its first commit; where the source has it no more,
    it has never committed."""
    for partition in range(partition_count(client, topic)):
        keys, last, highest = _written(client, topic, partition)
        if last != seen.get(partition):
            raise StorageError(
                f"partition {partition} of {topic} has changed since it was judged what is given up: a service has "
                "run, or another reset. Nothing was changed; try again"
            )
        changed = begins.get(partition)
        puts = changed.puts if changed else {}
        for key in keys - puts.keys():
            yield Record(topic, partition, key, None)
        for key, value in puts.items():
            yield Record(topic, partition, key, value)
        if changed is not None:
            position = Position(changed.offset, highest + 1, spread, facts)
            yield Record(topic, partition, POSITION_KEY, encode_position(position))
        elif last is not None:
            yield Record(topic, partition, POSITION_KEY, None)


def _written(client: Mapping[str, Any], topic: str, partition: int) -> tuple[set[bytes], Position | None, int]:
    """The keys of a partition that have values, its last position and the highest number of a commit.

    Whatever is there, be it anybody's state or not: a damaged one is to be taken away too.
    """
    keys: set[bytes] = set()
    last: Position | None = None
    highest = 0
    for records in committed(client, topic, {partition: 0}, ends_of(client, topic, [partition])):
        for record in records:
            key, value = record.key(), record.value()
            if key == POSITION_KEY:
                last = None if value is None else decode_position(value)
                highest = max(highest, last.sequence if last else 0)
            elif value is None:
                keys.discard(key)
            else:
                keys.add(key)
    return keys, last, highest


def _offsets(client: Mapping[str, Any], group: str, topic: str, begins: Mapping[int, Changes]) -> Offsets:
    """In nobody's name: a group without members takes them."""
    with closing(reader(client, group, committed=True)) as nobody:
        places = [TopicPartition(topic, partition, changed.offset) for partition, changed in begins.items()]
        return Offsets(places, nobody.consumer_group_metadata())
