"""Reading what the Kafka store has written: committed records up to the end, whoever is writing meanwhile."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from time import monotonic
from typing import Any, Final, Protocol, cast

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from consumer.storage import Facts, Log, Logged, Stage, StorageError, Unreachable
from consumer.storage.kafka_client import PASSING, REQUEST_S, administrator, answer, asked, each_answered, reader
from consumer.storage.kafka_records import POSITION_KEY, Position, decode_position, mark_in
from consumer.storage.kafka_topics import Topics, partitions_of

PATIENCE_S: Final = 60.0
"""How long a transaction of others is waited for: Kafka's own time for it, and the rounds of its check."""
BATCH: Final = 500
"""Records asked for at once: the fastest size measured."""
BATCH_S: Final = 0.01


class Read(Protocol):
    """A record as the client gives it; all of ours have a key."""

    def partition(self) -> int: ...
    def offset(self) -> int: ...
    def key(self) -> bytes: ...
    def value(self) -> bytes | None: ...
    def timestamp(self) -> tuple[int, int]: ...
    def error(self) -> KafkaError | None: ...


class Replay:
    """What the records of one partition of the state add up to.

    An entry counts once the position of its commit is read: so a reader who does not own the partition sees whole
    commits too.
    """

    def __init__(self, place: str) -> None:
        """``place`` is the partition, as errors name it."""
        self.position: Position | None = None
        self.entries: dict[bytes, bytes] = {}
        self._place = place
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        """What has been read since the last position, in this order; None deletes."""
        self._wrong: str | None = None

    def read(self, records: Sequence[Read]) -> None:
        """Take the next records."""
        # In one go, for there may be millions, and few of them are positions.
        keys = [record.key() for record in records]
        values = [record.value() for record in records]
        begin = 0
        for _ in range(keys.count(POSITION_KEY)):
            end = keys.index(POSITION_KEY, begin)
            self._keys += keys[begin:end]
            self._values += values[begin:end]
            self._move(values[end])
            self._count()
            begin = end + 1
        self._keys += keys[begin:]
        self._values += values[begin:]

    def _count(self) -> None:
        """What has been read before this position counts from now on."""
        entries = cast("dict[bytes, bytes | None]", self.entries)
        entries.update(zip(self._keys, self._values, strict=True))
        if None in self._values:
            for key in self._keys:
                if entries.get(key, b"") is None:
                    del entries[key]
        self._keys.clear()
        self._values.clear()

    def check(self) -> None:
        """Raise ``StorageError`` where what was read is nobody's state."""
        anew = "Bring the topic back from a backup; `tallyman reset --bill-from T` starts over with events from T on."
        if self._wrong is not None:
            raise StorageError(f"{self._place}: {self._wrong} {anew}")
        pending = dict(zip(self._keys, self._values, strict=True))
        if self.position is None and any(value is not None for value in pending.values()):
            raise StorageError(f"{self._place} has entries but does not say how far it has read: it is damaged. {anew}")

    def _move(self, value: bytes | None) -> None:
        before, now = self.position, None if value is None else decode_position(value)
        if before is None or now is None or _life(now.facts) != _life(before.facts):
            # The state begins anew here: by a reset, or because the source has this partition again.
            self.entries.clear()
            self._wrong = None
        elif now.sequence <= before.sequence:
            # Two processes that wrote one state cannot both have counted on from it.
            self._wrong = self._wrong or (
                f"commit {now.sequence} (up to offset {now.offset}) comes after commit {before.sequence} (up to "
                f"{before.offset}): two processes have written it, and neither is right."
            )
        self.position = now


def _life(facts: Facts) -> Facts:
    return replace(facts, partitions=0)


def logged(
    client: Mapping[str, Any],
    topics: Topics,
    log: Log,
    starts: Mapping[int, int] | None = None,
    ends: Mapping[int, int] | None = None,
) -> Iterator[Logged]:
    """The records of a log from some offsets on and below others, a few at a time; those of one partition in order.

    Without ``starts`` from the beginning, without ``ends`` to where the log ends now. Marks of redriven letters are no
    records of their own: they are in the letters. Memory grows with the number of these marks.
    """
    topic = topics.log(log)
    now = ends_of(client, topic, range(log_sizes(client, topics)[log]))
    ends = now if ends is None else ends
    starts = {partition: (starts or {}).get(partition, 0) for partition in ends}
    redriven = _redriven(client, topic, starts, now) if log is Log.DEAD_LETTERS else {}
    for records in committed(client, topic, starts, ends):
        for each in records:
            partition, offset, value = each.partition(), each.offset(), each.value() or b""
            if log is Log.DEAD_LETTERS and mark_in(value):
                continue
            at = redriven.get((partition, offset))
            yield Logged(partition, offset, each.key(), each.timestamp()[1], value, at)


def _redriven(
    client: Mapping[str, Any], topic: str, starts: Mapping[int, int], ends: Mapping[int, int]
) -> dict[tuple[int, int], int]:
    """When letters were produced again, by partition and offset. A mark lies behind its letters."""
    return {
        (mark.partition, offset): mark.at
        for records in committed(client, topic, starts, ends)
        for each in records
        if (mark := mark_in(each.value() or b""))
        for offset in mark.offsets
    }


def log_sizes(client: Mapping[str, Any], topics: Topics) -> dict[Log, int]:
    """How many partitions each log has."""
    found = partitions_of(administrator(client), [topics.log(log) for log in Log])
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
            lambda within: each_answered(consumer.committed(wanted, timeout=min(within, REQUEST_S))),
            f"the offsets of the group {group}, which a transaction may hold up (kafka-transactions.sh list, "
            "find-hanging and abort show and end it)",
            within=PATIENCE_S,
        )
    return {each.partition: each.offset for each in found if each.offset >= 0}


def members_of(client: Mapping[str, Any], group: str) -> list[str]:
    """The hosts of the group's members; a process that has died is one until its session has timed out."""
    admin = administrator(client)

    def ask(within: float) -> list[str]:
        try:
            described = answer(admin.describe_consumer_groups([group], request_timeout=within)[group])
        except KafkaException as failed:
            if failed.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
                raise
            return []
        return sorted(member.host.lstrip("/") for member in described.members)

    return asked(ask, f"the members of the group {group}", within=REQUEST_S, refresh=admin)


def partition_count(client: Mapping[str, Any], topic: str) -> int:
    """How many partitions a topic has; raises ``Unreachable`` where no broker knows it now."""
    found = partitions_of(administrator(client), [topic])
    if topic not in found:
        raise Unreachable(f"not to be used at the moment: {topic}. Are all brokers up?")
    return found[topic]


def ends_of(
    client: Mapping[str, Any], topic: str, partitions: Iterable[int], *, settled: bool = False
) -> dict[int, int]:
    """Where the partitions end, records of open transactions included: a reader of committed ones is not told.

    ``settled``: where the first transaction that is still open begins.
    """
    found = _bounds(client, topic, partitions, committed=settled)
    return {partition: end for partition, (_, end) in found.items()}


def shortened(client: Mapping[str, Any], topic: str, partitions: Iterable[int]) -> set[int]:
    """The partitions whose first records are not kept any more."""
    found = _bounds(client, topic, partitions, committed=False)
    return {partition for partition, (beginning, _) in found.items() if beginning}


def since(client: Mapping[str, Any], topic: str, partitions: Iterable[int], time: int) -> dict[int, int]:
    """Where the first record of a time (in milliseconds) or later lies; where there is none, the end."""
    partitions = list(partitions)
    ends = ends_of(client, topic, partitions)  # first: what is appended in between must not be skipped
    places = [TopicPartition(topic, partition, time) for partition in partitions]
    with closing(reader(client, topic, committed=False)) as consumer:
        found = asked(
            lambda within: each_answered(consumer.offsets_for_times(places, timeout=min(within, REQUEST_S))),
            f"the offsets of a time in {topic}",
            within=PATIENCE_S,
        )
    return {each.partition: each.offset if each.offset >= 0 else ends[each.partition] for each in found}


def _bounds(
    client: Mapping[str, Any], topic: str, partitions: Iterable[int], *, committed: bool
) -> dict[int, tuple[int, int]]:
    with closing(reader(client, topic, committed=committed)) as consumer:

        def bounds(partition: int) -> tuple[int, int]:
            place = TopicPartition(topic, partition)
            return asked(
                lambda within: consumer.get_watermark_offsets(place, timeout=min(within, REQUEST_S)),
                f"the end of {topic}, partition {partition}",
                within=PATIENCE_S,
            )

        return {partition: bounds(partition) for partition in partitions}


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
            answers = cast("Sequence[Read]", consumer.consume(BATCH, BATCH_S))
            records = [each for each in answers if each.error() is None]
            reached = {each.partition(): each.offset() + 1 for each in records}
            if any(offset > ends[partition] for partition, offset in reached.items()):
                records = [each for each in records if each.offset() < ends[each.partition()]]
            for each in answers if len(records) < len(answers) else ():
                error, partition = each.error(), each.partition()
                if error is not None and error.name() == "_PARTITION_EOF":
                    reached[partition] = max(each.offset(), reached.get(partition, 0))
                elif error is not None:
                    _hear(error, topic, partition)
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
