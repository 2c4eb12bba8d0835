"""The distributed store: one commit is one Kafka transaction, and Kafka is all there is.

The entries of a processor lie in the partition of a compacted topic that has its number. The group's offsets go with
the same transaction; they are a witness only, for the offset is itself an entry. What the rules rest on is told in
docs/decisions/0013.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from threading import Lock
from time import monotonic
from typing import Any
from uuid import uuid4

from confluent_kafka import TopicPartition

from consumer.storage import Append, Changes, Facts, Log, Progress, Refused, Restored, Stage, StorageError, Unreachable
from consumer.storage.kafka_reading import Replay, committed, ends_of, log_sizes, witnessed
from consumer.storage.kafka_records import (
    POSITION_KEY,
    Position,
    cloud_event,
    encode_position,
    is_member,
    partition_of,
)
from consumer.storage.kafka_topics import TOMBSTONES_KEPT_S, Topics
from consumer.storage.kafka_transactions import COMMIT_S, Offsets, Record, Transactions


class KafkaStore:
    """Restore and commit of one process, for the stages that it runs; every method may be called from any thread.

    A partition is restored before its first commit, and again after a commit of it that failed: the commits of a
    partition are numbered, and a number that comes twice shows that two processes wrote one state.
    """

    def __init__(self, client: Mapping[str, Any], facts: Facts, members: Mapping[Stage, Callable[[], bytes]]) -> None:
        """
        Args:
            client: the settings of any librdkafka client.
            facts: what the pipeline's state belongs to, as ``recorded`` or ``begin`` says.
            members: of each stage that this process runs, its consumer's ``consumer_group_metadata``. It is called
                once for each commit, when that starts, in the thread that commits.
        """
        self.topics = Topics.of(facts.pipeline)
        self._client = dict(client)
        self._facts = facts
        self._members = dict(members)
        self._logs = log_sizes(self._client, self.topics)
        self.spread = self._logs[Log.TOTALS]
        """How many partitions the totals log has."""
        self._sequences: dict[tuple[Stage, int], int] = {}
        self._restores: dict[tuple[Stage, int], object] = {}
        self._lock = Lock()
        self._transactions = {
            stage: Transactions(self._client, f"tallyman-{facts.pipeline}-{stage}-{uuid4()}", within=COMMIT_S)
            for stage in members
        }

    def close(self) -> None:
        """End the producers."""
        for each in self._transactions.values():
            each.close()

    def restore(self, stage: Stage, partition: int, progress: Progress | None = None) -> Restored | None:
        """The processor's last commit, or None where it never made one.

        To be called when the partition is ours: then nobody else's commit of it can succeed any more, and what is still
        undecided is waited for.

        Raises:
            Unreachable: Kafka does not answer, or a transaction of somebody else does not end.
            StorageError: the state is damaged, older than what was read, or somebody else's.
        """
        latest = object()
        with self._lock:
            self._restores[stage, partition] = latest
        if stage in self._transactions:
            # A commit of our own whose outcome is unknown is ended by its successor, not by the broker's timeout.
            self._transactions[stage].settle()
        topic = self.topics.state(stage)
        # In this order: what is decided before the offset is known has its records below the end asked for then.
        seen = witnessed(self._client, self.topics, stage, self._facts.topic, [partition]).get(partition)
        end = ends_of(self._client, topic, [partition])[partition]
        began = monotonic()
        replay = Replay(f"{topic}, partition {partition}")
        read = 0
        for records in committed(self._client, topic, {partition: 0}, {partition: end}):
            replay.read(records)
            if monotonic() - began > TOMBSTONES_KEPT_S:
                raise Unreachable(
                    f"restoring partition {partition} of {topic} has taken more than {TOMBSTONES_KEPT_S} s: what was "
                    "deleted meanwhile could come back. Give this process a faster way to Kafka, or the topic a "
                    "smaller segment.bytes and max.compaction.lag.ms."
                )
            if records:
                read = records[-1].offset() + 1
            if progress is not None:
                progress(read, end)
        replay.check()
        position = replay.position
        self._check(stage, partition, position, seen)
        with self._lock:
            if self._restores[stage, partition] is not latest:
                raise Unreachable(f"partition {partition} of {topic} is being restored once more")
            self._sequences[stage, partition] = position.sequence if position else 0
        return Restored(position.offset, _emptied(replay.entries)) if position else None

    def commit(self, stage: Stage, changes: Mapping[int, Changes]) -> None:
        """Make the changes of these partitions' processors durable, all or none, if they are ours.

        The group checks members, not partitions: the caller names no partition but those that it owns at this moment.

        Raises:
            Refused: others own them now; nothing of it is there.
            Abandoned: nothing of it is there.
            OutcomeUnknown, Fenced: it is there as a whole or not at all.
            StorageError: it cannot be written, now or later; nothing of it is there.
        """
        member = self._members[stage]()
        with self._lock:
            numbers = {partition: self._sequences.pop((stage, partition), None) for partition in changes}
        unknown = [partition for partition, number in numbers.items() if number is None]
        if unknown:
            raise ValueError(f"partitions {unknown} of stage {stage} are to be restored before they are committed")
        if not is_member(member):
            # Kafka would not: without generation and member id it takes offsets from anybody.
            raise Refused("not_a_member", "this process is no member of its group: nothing was committed")
        source = self._facts.topic if stage is Stage.AGGREGATE else self.topics.totals
        offsets = [TopicPartition(source, partition, changed.offset) for partition, changed in changes.items()]
        sequences = {partition: (number or 0) + 1 for partition, number in numbers.items()}
        records = self._records(stage, changes, sequences)
        self._transactions[stage].run(records, Offsets(offsets, member))
        with self._lock:
            self._sequences |= {(stage, partition): number for partition, number in sequences.items()}

    def _records(self, stage: Stage, changes: Mapping[int, Changes], sequences: Mapping[int, int]) -> Iterator[Record]:
        topic = self.topics.state(stage)
        for partition, changed in changes.items():
            if POSITION_KEY in changed.puts or POSITION_KEY in changed.deletes:
                raise ValueError(f"the key {POSITION_KEY!r} is the store's own")
            for key, value in changed.puts.items():
                yield Record(topic, partition, key, value)
            for key in changed.deletes:
                yield Record(topic, partition, key, None)
            position = Position(changed.offset, sequences[partition], self.spread, self._facts)
            yield Record(topic, partition, POSITION_KEY, encode_position(position))
            yield from _appended(self.topics, self._logs, changed.appends)

    def _check(self, stage: Stage, partition: int, position: Position | None, seen: int | None) -> None:
        place = f"partition {partition} of {self.topics.state(stage)}"
        anew = "Bring the topic back from a backup; `tallyman reset --bill-from T` starts over with events from T on."
        read = -1 if position is None else position.offset
        if seen is not None and seen > read:
            raise StorageError(
                f"{place} has {f'read up to {read}' if position else 'no state'}, but the group "
                f"{self.topics.group(stage)} has read up to {seen}: the state was lost or is older than what has "
                f"been billed. {anew}"
            )
        if position is None:
            return
        ours, theirs = _identity(self._facts), _identity(position.facts)
        if ours != theirs:
            raise StorageError(f"{place} belongs to {theirs}, and this is {ours}. {anew}")
        if position.spread != self.spread:
            raise StorageError(
                f"{self.topics.totals} had {position.spread} partitions and has {self.spread}: customers "
                f"would move to others while their totals are on the way. {anew}"
            )


def append(client: Mapping[str, Any], topics: Topics, appends: Iterable[Append]) -> None:
    """Append records that belong to no commit, all or none: operators' commands, from any process.

    A command has the key of the total that it is about, its customer: only so it lies in the same partition.

    Raises:
        Abandoned, OutcomeUnknown, StorageError: as ``KafkaStore.commit``.
    """
    name = f"tallyman-{topics.pipeline}-append-{uuid4()}"
    with closing(Transactions(client, name, within=COMMIT_S)) as transactions:
        transactions.run(_appended(topics, log_sizes(client, topics), appends))


def _appended(topics: Topics, logs: Mapping[Log, int], appends: Iterable[Append]) -> Iterator[Record]:
    for log, key, value in appends:
        headers = cloud_event(topics.pipeline, log, value)
        yield Record(topics.log(log), partition_of(key, logs[log]), key, value, headers)


def _identity(facts: Facts) -> str:
    return (
        f"the pipeline {facts.pipeline}, cluster {facts.cluster_id}, topic {facts.topic} ({facts.topic_id}), bill_from "
        f"{facts.bill_from}"
    )


def _emptied(entries: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The entries, each forgotten when it is given: the memory is needed by who takes them."""
    while entries:
        yield entries.popitem()
