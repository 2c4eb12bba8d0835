"""The first start of a pipeline on Kafka, which any number of processes may make at once, and a source that grew."""

import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from time import monotonic, sleep
from typing import Any, Final

from confluent_kafka import TopicPartition

from consumer.storage import Abandoned, Changes, Facts, Log, OutcomeUnknown, Stage, StorageError, Unreachable
from consumer.storage.kafka_client import AGAIN_S, reader
from consumer.storage.kafka_reading import PATIENCE_S, committed, ends_of, log_sizes, partition_count, witnessed
from consumer.storage.kafka_records import POSITION_KEY, Position, decode_position, encode_position
from consumer.storage.kafka_topics import Topics
from consumer.storage.kafka_transactions import ABORT_S, COMMIT_S, Offsets, Record, Transactions

TAIL: Final = 64
"""Records from the end of a state partition on in which its position is looked for at first."""


def recorded(client: Mapping[str, Any], topics: Topics) -> Facts | None:
    """What the pipeline's state belongs to, or None before its first start."""
    return newest(positions(client, topics, Stage.AGGREGATE))


def newest(at: Mapping[int, Position]) -> Facts | None:
    """What positions say that the state belongs to. None without any.

    Each partition that has begun has one. Their number is not always in them: who ran before some of them were added
    goes on committing the number that it knows.
    """
    facts = max((each.facts for each in at.values()), key=lambda facts: facts.partitions, default=None)
    return facts and replace(facts, partitions=max(facts.partitions, *(partition + 1 for partition in at)))


def positions(client: Mapping[str, Any], topics: Topics, stage: Stage) -> dict[int, Position]:
    """How far the stage's processors have read, by partition, as far as they have committed since the last reset.

    Reads only the ends of the state's partitions: the position is the last record of each commit.
    """
    topic = topics.state(stage)
    everywhere = range(partition_count(client, topic))
    found = _positions(client, topic, everywhere)
    if found and (missing := [partition for partition in everywhere if partition not in found]):
        # A transaction that begins all of them may have been seen in some, and not in others, of which the ends were
        # asked for before it.
        found |= _positions(client, topic, missing)
    return {partition: position for partition, position in found.items() if position is not None}


def _positions(client: Mapping[str, Any], topic: str, partitions: Iterable[int]) -> dict[int, Position | None]:
    """None for a partition that has been reset."""
    ends = ends_of(client, topic, partitions)
    found: dict[int, Position | None] = {}
    unread, tail = {partition: end for partition, end in ends.items() if end}, TAIL
    while unread:
        starts = {partition: max(0, end - tail) for partition, end in unread.items()}
        for records in committed(client, topic, starts, unread):
            for record in records:
                if record.key() == POSITION_KEY:
                    value = record.value()
                    found[record.partition()] = None if value is None else decode_position(value)
        unread = {p: end for p, end in unread.items() if p not in found and starts[p]}
        tail *= 16
    return found


def begin(
    client: Mapping[str, Any], facts: Facts, changes: Mapping[int, Changes], *, patience: float = PATIENCE_S
) -> Facts:
    """The first start: the facts, and the first commit of both stages on every partition, in one step.

    Any number of processes may start at once: one of them begins, and all are told what has begun.

    Args:
        client: the settings of any librdkafka client.
        facts: what the state is going to belong to.
        changes: the first commit of stage 1 on every partition of the source.
        patience: seconds in which it has to be done.

    Raises:
        Unreachable: not within this time.
        StorageError: this is no first start, for something is there already.
    """
    if changes.keys() != set(range(facts.partitions)):
        raise ValueError(f"each of the {facts.partitions} partitions needs its first commit, not {[*changes]}")
    topics = Topics.of(facts.pipeline)

    def judge() -> Facts | None:
        begun = recorded(client, topics)
        if begun is None:
            try:
                check_empty(client, topics, source=facts.topic, partitions=facts.partitions)
            except StorageError:
                # What is there may be what another process has begun with in this very moment.
                begun = recorded(client, topics)
                if begun is None:
                    raise
        return begun

    def write(transactions: Transactions) -> None:
        transactions.run(*_first(client, topics, facts, changes, with_stage_2=True))

    return alone(client, topics.pipeline, judge, write, patience=patience) or facts


def grow(
    client: Mapping[str, Any], facts: Facts, changes: Mapping[int, Changes], *, patience: float = PATIENCE_S
) -> Facts:
    """The source has been given partitions: their first commit. ``facts`` has their new number; else like ``begin``.

    Partitions that another process has added meanwhile are left as they are.
    """
    topics = Topics.of(facts.pipeline)

    def judge() -> Facts | None:
        begun = recorded(client, topics)
        if begun is None:
            raise StorageError(f"the pipeline {facts.pipeline} has not begun: its partitions are recorded then")
        if begun.partitions >= facts.partitions:
            return begun
        if changes.keys() != set(range(begun.partitions, facts.partitions)):
            raise ValueError(f"partitions {begun.partitions} to {facts.partitions - 1} are new, not {[*changes]}")
        return None

    def write(transactions: Transactions) -> None:
        transactions.run(*_first(client, topics, facts, changes, with_stage_2=False))

    return alone(client, topics.pipeline, judge, write, patience=patience) or facts


def alone(
    client: Mapping[str, Any],
    pipeline: str,
    judge: Callable[[], Facts | None],
    write: Callable[[Transactions], None],
    *,
    patience: float,
    aborted_after: int | None = None,
) -> Facts | None:
    """Judge and write as one step: a new producer of that name ends what others have started and not committed.

    ``write`` makes one transaction. Returns what the judgement found to stand in the way, or None where it was written.
    """
    deadline = monotonic() + patience
    with closing(transactions_of(client, pipeline, aborted_after)) as transactions:
        while True:
            transactions.renew()
            if (begun := judge()) is not None:
                return begun
            try:
                write(transactions)
            except (Abandoned, OutcomeUnknown) as failed:
                if monotonic() > deadline:
                    raise Unreachable(f"the pipeline {pipeline} could not begin: {failed}") from None
            else:
                return None
            # Another process is at it: in their haste they could keep each other from it for ever.
            let_it = monotonic() + random.uniform(1.0, 4.0)  # noqa: S311 - not a secret
            while monotonic() < let_it:
                if (begun := judge()) is not None:
                    return begun
                sleep(AGAIN_S)


def transactions_of(client: Mapping[str, Any], pipeline: str, aborted_after: int | None = None) -> Transactions:
    """Those of whoever begins the pipeline, or begins it anew."""
    within = COMMIT_S if aborted_after is None else aborted_after - ABORT_S
    return Transactions(client, f"tallyman-{pipeline}-begin", within=within, aborted_after=aborted_after)


def _first(
    client: Mapping[str, Any], topics: Topics, facts: Facts, changes: Mapping[int, Changes], *, with_stage_2: bool
) -> tuple[list[Record], Offsets]:
    """The records and offsets of the first commit of these partitions of stage 1, and of all of stage 2."""
    spread = log_sizes(client, topics)[Log.TOTALS]
    first: dict[Stage, Mapping[int, Changes]] = {Stage.AGGREGATE: changes}
    if with_stage_2:
        first[Stage.DELIVER] = {partition: Changes(0) for partition in range(spread)}
    records: list[Record] = []
    for stage, of_stage in first.items():
        topic = topics.state(stage)
        for partition, changed in of_stage.items():
            records.extend(Record(topic, partition, key, value) for key, value in changed.puts.items())
            position = Position(changed.offset, 1, spread, facts)
            records.append(Record(topic, partition, POSITION_KEY, encode_position(position)))
    offsets = [TopicPartition(facts.topic, partition, changed.offset) for partition, changed in changes.items()]
    with closing(reader(client, topics.group(Stage.AGGREGATE), committed=True)) as nobody:
        return records, Offsets(offsets, nobody.consumer_group_metadata())


def check_empty(client: Mapping[str, Any], topics: Topics, *, source: str, partitions: int) -> None:
    """Raise ``StorageError`` where something shows an earlier life of a pipeline whose stage 1 has no state."""
    anew = (
        "The state was lost, or a topic was deleted. Starting anew would bill again what has been billed: bring the "
        "topics back from a backup, or `tallyman reset --bill-from T` starts over with events from T on."
    )
    logs = log_sizes(client, topics)
    if any(ends_of(client, topics.totals, range(logs[Log.TOTALS])).values()):
        raise StorageError(f"{topics.aggregate_state} is empty, but {topics.totals} is not. {anew}")
    if positions(client, topics, Stage.DELIVER):
        raise StorageError(f"{topics.aggregate_state} is empty, but {topics.deliver_state} is not. {anew}")
    for stage, count in ((Stage.AGGREGATE, partitions), (Stage.DELIVER, logs[Log.TOTALS])):
        if witnessed(client, topics, stage, source, range(count)):
            raise StorageError(f"{topics.aggregate_state} is empty, but {topics.group(stage)} has read before. {anew}")
