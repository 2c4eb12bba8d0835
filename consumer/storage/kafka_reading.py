"""Reading what the Kafka store has written: committed records up to the end, whoever is writing meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol, cast

from confluent_kafka import KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient

from consumer.storage import Log, Stage, StorageError, Unreachable
from consumer.storage.kafka_client import PASSING, REQUEST_S, asked, reader
from consumer.storage.kafka_topics import Topics, partitions_of

PATIENCE_S: Final = 60.0
"""How long a transaction of others is waited for: Kafka's own time for it, and the rounds of its check."""
BATCH: Final = 1_000
BATCH_S: Final = 0.01


class Read(Protocol):
    """A record as the client gives it; all of ours have a key."""

    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def key(self) -> bytes: ...
    def value(self) -> bytes | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def error(self) -> KafkaError | None: ...


class Logged(NamedTuple):
    """A record of a log."""

    partition: int
    offset: int
    key: bytes
    appended_at: int
    """Milliseconds since the epoch, by the broker's clock."""
    value: bytes


def logged(client: Mapping[str, Any], topics: Topics, log: Log) -> Iterator[Logged]:
    """All that a log holds at this moment; the records of one partition in their order."""
    topic = topics.log(log)
    ends = ends_of(client, topic, range(log_sizes(client, topics)[log]))
    for records in committed(client, topic, dict.fromkeys(ends, 0), ends):
        for each in records:
            yield Logged(each.partition(), each.offset(), each.key(), each.timestamp()[1], each.value() or b"")


def log_sizes(client: Mapping[str, Any], topics: Topics) -> dict[Log, int]:
    """How many partitions each log has."""
    found = partitions_of(AdminClient(dict(client)), [topics.log(log) for log in Log])
    missing = [topics.log(log) for log in Log if topics.log(log) not in found]
    if missing:
        raise Unreachable(f"not to be used at the moment: {', '.join(missing)}. Are all brokers up?")
    return {log: found[topics.log(log)] for log in Log}


def witnessed(
    client: Mapping[str, Any], topics: Topics, stage: Stage, source: str, partitions: Iterable[int]
) -> dict[int, int]:
    """The group's offsets, as far as it has any; where a transaction is about to change them, what they then are."""
    topic = source if stage is Stage.AGGREGATE else topics.totals
    group = topics.group(stage)
    wanted = [TopicPartition(topic, partition) for partition in partitions]
    with closing(reader(client, group, committed=True)) as consumer:
        found = asked(
            lambda within: consumer.committed(wanted, timeout=min(within, REQUEST_S)),
            f"the offsets of the group {group}, which a transaction may hold up (kafka-transactions.sh list, "
            "find-hanging and abort show and end it)",
            within=PATIENCE_S,
        )
    return {each.partition: each.offset for each in found if each.offset >= 0}


def partition_count(client: Mapping[str, Any], topic: str) -> int:
    found = partitions_of(AdminClient(dict(client)), [topic])
    if topic not in found:
        raise Unreachable(f"not to be used at the moment: {topic}. Are all brokers up?")
    return found[topic]


def ends_of(client: Mapping[str, Any], topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """Where the partitions end, records of open transactions included: a reader of committed ones is not told."""
    with closing(reader(client, topic, committed=False)) as consumer:

        def end(partition: int) -> int:
            place = TopicPartition(topic, partition)
            _, high = asked(
                lambda within: consumer.get_watermark_offsets(place, timeout=min(within, REQUEST_S)),
                f"the end of {topic}, partition {partition}",
                within=PATIENCE_S,
            )
            return high

        return {partition: end(partition) for partition in partitions}


def committed(
    client: Mapping[str, Any], topic: str, starts: Mapping[int, int], ends: Mapping[int, int]
) -> Iterator[list[Read]]:
    """The committed records between these offsets, in batches; returns once it is past all ends, markers included.

    While it waits the batches are empty, so that the reader can do something else, or give up.

    Raises ``Unreachable`` where nothing moves on: Kafka is away, or a transaction is open and nobody ends it.
    """
    at = {partition: start for partition, start in starts.items() if start < ends[partition]}
    left = set(at)
    if not left:
        return
    with closing(reader(client, topic, committed=True)) as consumer:
        consumer.assign([TopicPartition(topic, partition, start) for partition, start in at.items()])
        moved = monotonic()
        while left:
            records: list[Read] = []
            reached: dict[int, int] = {}
            for record in cast("Sequence[Read]", consumer.consume(BATCH, BATCH_S)):
                error = record.error()
                if error is None:
                    partition, offset = record.partition(), record.offset()
                    reached[partition] = offset + 1
                    if offset < ends[partition]:
                        records.append(record)
                elif error.name() == "_PARTITION_EOF":
                    reached[record.partition()] = record.offset()
                else:
                    _hear(error, topic, record.partition())
            yield records
            for partition, offset in reached.items():
                if offset > at[partition]:
                    at[partition], moved = offset, monotonic()
                if offset >= ends[partition]:
                    left.discard(partition)
            if monotonic() - moved > PATIENCE_S:
                raise Unreachable(_held_up(client, topic, {p: at[p] for p in left}))


def _hear(error: KafkaError, topic: str, partition: int | None) -> None:
    if error.name() not in PASSING and not error.retriable():
        raise StorageError(f"{topic}, partition {partition} cannot be read: {error.name()}, {error.str()}")


def _held_up(client: Mapping[str, Any], topic: str, at: Mapping[int, int]) -> str:
    partition, offset = min(at.items())
    place = f"--bootstrap-server {client['bootstrap.servers']}"
    where = f"--topic {topic} --partition {partition}"
    return (
        f"{topic}, partition {partition} has not moved on from offset {offset} for {PATIENCE_S:.0f} s. If Kafka is up, "
        f"a transaction that began there is open, and whoever began it is gone: kafka-transactions.sh {place} "
        f"describe-producers {where} names it, abort {where} --start-offset {offset} ends it."
    )
