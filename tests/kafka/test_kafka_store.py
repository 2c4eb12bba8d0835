"""The Kafka store beyond what every store has to do: who may commit, what is left of failures, how states begin."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, Final, cast

import msgspec
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary_event
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewPartitions

from consumer import deadletters, totals
from consumer.deadletters import DeadLetter
from consumer.deliver.entries import Entry, encode_outcome, outcome
from consumer.sandbox.kafka import Kafka, LocalKafka
from consumer.storage import (
    Abandoned,
    Append,
    Changes,
    Facts,
    Fenced,
    Log,
    OutcomeUnknown,
    Refused,
    Stage,
    StorageError,
    Unreachable,
    kafka_reading,
    kafka_start,
    kafka_transactions,
)
from consumer.storage import kafka as kafka_store
from consumer.storage.kafka import KafkaStore, append
from consumer.storage.kafka_client import reader
from consumer.storage.kafka_reading import ends_of, witnessed
from consumer.storage.kafka_records import is_member, partition_of
from consumer.storage.kafka_start import begin, grow, positions, recorded
from consumer.storage.kafka_topics import Topics, ensure, partitions_of
from tests.kafka.harness import DAY, until
from tests.kafka.stores import Member, Pipeline

pytestmark = pytest.mark.kafka

AGGREGATE, DELIVER = Stage.AGGREGATE, Stage.DELIVER
TOTAL: Final = totals.Total(
    identifier="tm1-20261101T0000Z-1m-r0-0123",
    pipeline="prod",
    meter="tokens",
    edition="00",
    partition=1,
    window_start=1_793_000_000,
    window="1m",
    revision=0,
    due=1_793_000_120_000,
    customer="cus_a",
    value="2.5",
    events=2,
    timestamp=1_793_000_001,
    first_offset=4,
    last_offset=9,
    stripe=totals.Destination("ai_tokens"),
)


@pytest.fixture
def pipeline(kafka: Kafka) -> Iterator[Pipeline]:
    with closing(Pipeline(kafka)) as made:
        yield made


def restored(store: KafkaStore, stage: Stage = AGGREGATE, partition: int = 0) -> tuple[int, dict[bytes, bytes]] | None:
    found = store.restore(stage, partition)
    return (found.offset, dict(found.entries)) if found else None


def restore_all(store: KafkaStore, partitions: int = 3) -> None:
    for stage in Stage:
        for partition in range(partitions):
            store.restore(stage, partition)


@cache
def admin_of(kafka: Kafka) -> AdminClient:
    """Kept, for its answers never come once it is garbage."""
    return AdminClient({"bootstrap.servers": kafka.bootstrap_servers})


def configure(kafka: Kafka, topic: str, **settings: str | float) -> None:
    """Change a topic's settings, as kafka-configs.sh does."""
    changes = [
        ConfigEntry(name.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=changes)
    admin_of(kafka).incremental_alter_configs([resource])[resource].result(20.0)


@contextmanager
def open_transaction(pipeline: Pipeline, topic: str, partition: int) -> Iterator[Producer]:
    """Somebody's transaction on a partition, with one record, who then is silent."""
    producer = Producer({**pipeline.client, "transactional.id": uuid.uuid4().hex, "transaction.timeout.ms": 60_000})
    producer.init_transactions(20.0)
    producer.begin_transaction()
    producer.produce(topic, b"never counted", b"stray", partition)
    assert producer.flush(20.0) == 0
    yield producer


# Topics


def test_the_topics_are_made_and_found_again_whoever_else_makes_them(kafka: Kafka) -> None:
    topics, client = Topics.of(f"s-{uuid.uuid4().hex[:12]}"), {"bootstrap.servers": kafka.bootstrap_servers}
    with ThreadPoolExecutor(4) as processes:
        made = [processes.submit(ensure, client, topics, partitions=2, keep_ms=DAY) for _ in range(4)]
        for each in made:
            each.result(60.0)
    assert partitions_of(admin_of(kafka), topics.all) == dict.fromkeys(topics.all, 2)
    ensure(client, topics, partitions=2, keep_ms=DAY)


def test_wrong_topics_are_refused_with_the_commands_that_cure_them(kafka: Kafka) -> None:
    topics, client = Topics.of(f"s-{uuid.uuid4().hex[:12]}"), {"bootstrap.servers": kafka.bootstrap_servers}
    kafka.create_topic(topics.deliver_state, 1, cleanup_policy="compact,delete")
    kafka.create_topic(topics.totals, 1, retention_ms=1000, max_message_bytes=1000)

    with pytest.raises(StorageError) as refused:
        ensure(client, topics, partitions=1, keep_ms=DAY)

    said = str(refused.value)
    command = (
        f"kafka-configs.sh --bootstrap-server {kafka.bootstrap_servers} --alter --entity-type topics --entity-name"
    )
    assert f"{command} {topics.totals} --add-config retention.ms=86400000,max.message.bytes=1048588" in said
    assert f"{topics.deliver_state} has cleanup.policy=compact,delete" in said
    assert topics.outcomes not in said
    for line in said.splitlines()[1:]:
        topic, _, settings = line.partition("--entity-name ")[2].partition(" --add-config ")
        configure(kafka, topic, **dict(each.split("=") for each in settings.split(",")))
    ensure(client, topics, partitions=1, keep_ms=DAY)


def test_the_state_grows_with_its_source_and_the_logs_stay(pipeline: Pipeline) -> None:
    begun = pipeline.begin()
    add_partitions(pipeline.kafka, pipeline.source, 5)
    ensure(pipeline.client, pipeline.topics, partitions=5, keep_ms=90 * DAY)

    grown = grow(pipeline.client, replace(begun, partitions=5), {3: Changes(7), 4: Changes(8, {b"k": b"v"})})

    assert partitions_of(admin_of(pipeline.kafka), [pipeline.topics.totals]) == {pipeline.topics.totals: 3}
    assert grown.partitions == 5
    assert recorded(pipeline.client, pipeline.topics) == grown
    with pipeline.store() as store:
        assert restored(store, partition=0) == (0, {})
        assert restored(store, partition=4) == (8, {b"k": b"v"})
    again = grow(pipeline.client, replace(begun, partitions=5, created_at=0), {3: Changes(0), 4: Changes(0)})
    assert again == grown, "another process has added them: they are left as they are"


def test_a_process_that_ran_before_the_source_grew_commits_the_new_partitions_too(pipeline: Pipeline) -> None:
    """Its producer has been told how many partitions the state had then, and asks again every few minutes only."""
    begun = pipeline.begin()
    with pipeline.store() as store:
        restore_all(store)
        store.commit(AGGREGATE, {0: Changes(1)})
        add_partitions(pipeline.kafka, pipeline.source, 4)
        ensure(pipeline.client, pipeline.topics, partitions=4, keep_ms=90 * DAY)
        grow(pipeline.client, replace(begun, partitions=4), {3: Changes(0)})
        assert restored(store, partition=3) == (0, {})
        store.commit(AGGREGATE, {3: Changes(2)})
        assert restored(store, partition=3) == (2, {})
    assert recorded(pipeline.client, pipeline.topics) == replace(begun, partitions=4), "it did not know of the fourth"
    grow(pipeline.client, replace(begun, partitions=4), {3: Changes(0)})
    with pipeline.store() as store:
        assert restored(store, partition=3) == (2, {}), "what has begun is not begun again"


def test_totals_whose_number_of_partitions_changed_are_refused(pipeline: Pipeline) -> None:
    pipeline.begin()
    add_partitions(pipeline.kafka, pipeline.topics.totals, 4)
    with pytest.raises(StorageError, match=r"4 partitions and .* 3; their numbers are equal and never change"):
        ensure(pipeline.client, pipeline.topics, partitions=3, keep_ms=90 * DAY)
    with pipeline.store() as store, pytest.raises(StorageError, match="had 3 partitions and has 4"):
        store.restore(AGGREGATE, 0)


def add_partitions(kafka: Kafka, topic: str, partitions: int) -> None:
    admin_of(kafka).create_partitions([NewPartitions(topic, partitions)])[topic].result(20.0)
    until(lambda: partitions_of(admin_of(kafka), [topic]) == {topic: partitions}, "the topic has grown")


# The first start


def test_before_the_first_start_there_is_nothing_and_then_every_partition_of_both_stages(pipeline: Pipeline) -> None:
    assert recorded(pipeline.client, pipeline.topics) is None
    assert positions(pipeline.client, pipeline.topics, AGGREGATE) == {}

    begun = begin(pipeline.client, pipeline.facts, {p: Changes(p + 5, {b"k": b"v"}) for p in range(3)})

    assert begun == pipeline.facts == recorded(pipeline.client, pipeline.topics)
    found = positions(pipeline.client, pipeline.topics, AGGREGATE)
    assert {p: each.offset for p, each in found.items()} == {0: 5, 1: 6, 2: 7}
    assert witnessed(pipeline.client, pipeline.topics, AGGREGATE, pipeline.source, range(3)) == {0: 5, 1: 6, 2: 7}
    with pipeline.store() as store:
        assert restored(store, AGGREGATE, 2) == (7, {b"k": b"v"})
        assert [restored(store, DELIVER, partition) for partition in range(3)] == [(0, {})] * 3


def test_a_first_start_that_comes_while_one_looks_is_seen_as_a_whole(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the partitions that were looked at before it would be taken for lost."""

    def one_by_one(client: dict[str, Any], topic: str, partitions: Iterable[int]) -> dict[int, int]:
        monkeypatch.undo()
        first, *others = partitions
        before = ends_of(client, topic, [first])
        pipeline.begin()
        return before | ends_of(client, topic, others)

    monkeypatch.setattr(kafka_start, "ends_of", one_by_one)
    assert positions(pipeline.client, pipeline.topics, AGGREGATE).keys() == {0, 1, 2}


def _begin(client: dict[str, Any], facts: Facts, go: Any, said: Connection) -> None:
    go.wait()
    said.send(begin(client, facts, {p: Changes(facts.created_at) for p in range(facts.partitions)}))


def test_of_processes_that_start_at_once_exactly_one_begins(pipeline: Pipeline) -> None:
    spawning = multiprocessing.get_context("forkserver")
    go, ears, starters = spawning.Event(), [], []
    for number in range(4):
        ear, mouth = spawning.Pipe(duplex=False)
        facts = replace(pipeline.facts, created_at=number + 1)
        starters.append(spawning.Process(target=_begin, args=(pipeline.client, facts, go, mouth), daemon=True))
        ears.append(ear)
        starters[-1].start()
    go.set()

    begun = [ear.recv() if ear.poll(60.0) else None for ear in ears]

    for each in starters:
        each.join(10.0)
    assert len(set(begun)) == 1, begun
    assert begun[0] is not None
    found = positions(pipeline.client, pipeline.topics, AGGREGATE)
    assert {(each.sequence, each.offset, each.facts) for each in found.values()} == {(1, begun[0].created_at, begun[0])}


def test_a_start_that_died_half_way_does_not_hold_up_the_next(pipeline: Pipeline) -> None:
    dead = Producer(
        {**pipeline.client, "transactional.id": f"tallyman-{pipeline.facts.pipeline}-begin", "linger.ms": 0}
    )
    dead.init_transactions(20.0)
    dead.begin_transaction()
    dead.produce(pipeline.topics.aggregate_state, b"half", b"k", 0)
    assert dead.flush(20.0) == 0

    assert pipeline.begin() == pipeline.facts
    with pipeline.store() as store:
        assert restored(store) == (0, {})


def test_what_shows_an_earlier_life_is_no_first_start(pipeline: Pipeline) -> None:
    append(pipeline.client, pipeline.topics, [Append(Log.TOTALS, b"cus", b"{}")])
    with pytest.raises(StorageError, match=r"-totals is not\. The state was lost"):
        pipeline.begin()


def test_a_group_that_has_read_is_no_first_start(pipeline: Pipeline) -> None:
    offset_of_group(pipeline, 0, 12)
    with pytest.raises(StorageError, match="-aggregate has read before"):
        pipeline.begin()


def offset_of_group(pipeline: Pipeline, partition: int, offset: int) -> None:
    group = pipeline.topics.group(AGGREGATE)
    asked = ConsumerGroupTopicPartitions(group, [TopicPartition(pipeline.source, partition, offset)])

    def altered() -> bool:
        done = admin_of(pipeline.kafka).alter_consumer_group_offsets([asked])[group].result(20.0)
        return all(each.error is None for each in done.topic_partitions)

    until(altered, "the group has that offset")


# State and witness


def test_a_commit_moves_the_groups_offsets_with_it(pipeline: Pipeline) -> None:
    with pipeline.store() as store:
        restore_all(store)
        store.commit(AGGREGATE, {0: Changes(5), 2: Changes(9)})
        store.commit(DELIVER, {1: Changes(3)})
    assert witnessed(pipeline.client, pipeline.topics, AGGREGATE, pipeline.source, range(3)) == {0: 5, 2: 9}
    assert witnessed(pipeline.client, pipeline.topics, DELIVER, pipeline.source, range(3)) == {1: 3}


def test_a_group_ahead_of_the_state_shows_that_the_state_is_old(pipeline: Pipeline) -> None:
    pipeline.begin()
    offset_of_group(pipeline, 1, 40)
    with pipeline.store() as store:
        assert restored(store, partition=0) == (0, {})
        with pytest.raises(StorageError, match=r"has read up to 0, but the group .* has read up to 40"):
            store.restore(AGGREGATE, 1)


def test_a_group_without_state_shows_that_the_state_is_gone(pipeline: Pipeline) -> None:
    offset_of_group(pipeline, 1, 40)
    with pipeline.store() as store, pytest.raises(StorageError, match="has no state, but the group"):
        store.restore(AGGREGATE, 1)


def test_a_state_without_the_groups_offset_is_trusted(pipeline: Pipeline) -> None:
    pipeline.begin()
    group = pipeline.topics.group(AGGREGATE)
    admin_of(pipeline.kafka).delete_consumer_groups([group])[group].result(20.0)
    with pipeline.store() as store:
        assert restored(store) == (0, {})


def test_the_state_of_another_pipeline_is_refused(pipeline: Pipeline) -> None:
    pipeline.begin()
    others: list[dict[str, Any]] = [{"cluster_id": "another"}, {"topic_id": "another"}, {"bill_from": 1}]
    for other in others:
        facts = replace(pipeline.facts, **other)
        with pipeline.store(facts) as store, pytest.raises(StorageError, match="belongs to the pipeline"):
            store.restore(AGGREGATE, 0)


def test_a_partition_is_restored_before_it_is_committed(pipeline: Pipeline) -> None:
    with pipeline.store() as store, pytest.raises(ValueError, match="are to be restored"):
        store.commit(AGGREGATE, {0: Changes(1)})


def test_the_stores_own_key_is_refused(pipeline: Pipeline) -> None:
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        with pytest.raises(ValueError, match="the store's own"):
            store.commit(AGGREGATE, {0: Changes(1, {b"k": b"v", b"\x00offset": b""})})
        assert restored(store) is None
        store.commit(AGGREGATE, {0: Changes(1)})


def test_two_writers_of_one_partition_are_noticed(pipeline: Pipeline) -> None:
    """Generations fence members: what a member writes of a partition that is not its own any more is not refused."""
    pipeline.begin()
    with pipeline.store() as owner, pipeline.store() as other:
        for each in (owner, other):
            each.restore(AGGREGATE, 0)
        owner.commit(AGGREGATE, {0: Changes(10, {b"sum": b"10"})})
        other.commit(AGGREGATE, {0: Changes(7, {b"sum": b"7"})})
        with pytest.raises(StorageError, match=r"commit 2 \(up to offset 7\) comes after commit 2 \(up to 10\)"):
            owner.restore(AGGREGATE, 0)


def test_a_restore_tells_how_far_it_is_and_can_be_given_up(pipeline: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        store.commit(AGGREGATE, {0: Changes(1, {b"%d" % n: b"v" for n in range(1000)})})
        store.restore(AGGREGATE, 0, lambda read, end: told.append((read, end)))
        assert told[-1] == (1001, 1002), "the marker is the last in the log"

        def give_up(_read: int, _end: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            store.restore(AGGREGATE, 0, give_up)


# Zombies


def left(first: Member, _: Pipeline) -> bytes:
    metadata = first.metadata()
    first.close()
    return metadata


def outdated(first: Member, pipeline: Pipeline) -> bytes:
    metadata = first.metadata()
    with closing(pipeline.member(AGGREGATE)) as second:
        second.until_shares(first, 3)
    return metadata


def replaced(first: Member, pipeline: Pipeline) -> bytes:
    metadata = first.metadata()
    second = pipeline.member(AGGREGATE, **{"group.instance.id": "pod-0"})
    second.until_owns(3)
    return metadata


def test_a_restore_that_has_been_overtaken_by_another_one_leaves_no_trace(pipeline: Pipeline) -> None:
    """Given up by the one who asked, it ends when the partition has been restored and committed anew."""
    pipeline.begin()
    with pipeline.store() as store:

        def overtaken(_read: int, _end: int) -> None:
            if not met:
                met.append(True)
                store.restore(AGGREGATE, 0)
                store.commit(AGGREGATE, {0: Changes(5)})

        met: list[bool] = []
        with pytest.raises(Unreachable, match="is being restored once more"):
            store.restore(AGGREGATE, 0, overtaken)
        store.commit(AGGREGATE, {0: Changes(6)})
        assert restored(store) == (6, {})


@pytest.mark.parametrize(
    ("happens", "reason", "settings"),
    [
        (left, "UNKNOWN_MEMBER_ID", {}),
        (outdated, "ILLEGAL_GENERATION", {}),
        (replaced, "FENCED_INSTANCE_ID", {"group.instance.id": "pod-0"}),
    ],
)
def test_a_zombies_commit_is_refused_and_leaves_nothing(
    pipeline: Pipeline, happens: Callable[[Member, Pipeline], bytes], reason: str, settings: dict[str, str]
) -> None:
    pipeline.begin()
    first = pipeline.member(AGGREGATE, **settings)
    first.until_owns(3)
    with pipeline.store(aggregate=first) as zombie:
        zombie.restore(AGGREGATE, 0)
        zombie.commit(AGGREGATE, {0: Changes(5, {b"sum": b"5"}, appends=[Append(Log.TOTALS, b"cus", b"5")])})
        stale = happens(first, pipeline)
        with closing(KafkaStore(pipeline.client, pipeline.facts, {AGGREGATE: lambda: stale})) as late:
            late.restore(AGGREGATE, 0)
            with pytest.raises(Refused) as refused:
                late.commit(AGGREGATE, {0: Changes(9, {b"sum": b"9"}, appends=[Append(Log.TOTALS, b"cus", b"9")])})

    assert refused.value.reason == reason
    assert [each.value for each in pipeline.logged(Log.TOTALS)] == [b"5"]
    with pipeline.store() as owner:
        assert restored(owner) == (5, {b"sum": b"5"})
    assert witnessed(pipeline.client, pipeline.topics, AGGREGATE, pipeline.source, [0]) == {0: 5}


def _sleep_and_commit(pipeline_of: tuple[dict[str, Any], Facts], mouth: Connection) -> None:
    client, facts = pipeline_of
    topics = Topics.of(facts.pipeline)
    member = Member(client, facts.topic, topics.group(AGGREGATE), **{"session.timeout.ms": 6_000})
    member.until_owns(facts.partitions)
    store = KafkaStore(client, facts, {AGGREGATE: member.metadata})
    store.restore(AGGREGATE, 0)
    mouth.send(None)
    mouth.recv()
    # It has slept until now. Its client's heartbeat is told that there is no such member; we have not polled yet.
    until(lambda: not is_member(member.metadata()), "the client knows", within=30.0)
    try:
        store.commit(AGGREGATE, {0: Changes(9, {b"sum": b"9"})})
        mouth.send("committed")
    except Refused as refused:
        mouth.send(refused.reason)


def test_a_process_that_slept_through_its_session_cannot_commit(pipeline: Pipeline) -> None:
    """Its client hears of it in the background, and nothing tells the thread that is about to commit."""
    pipeline.begin()
    spawning = multiprocessing.get_context("forkserver")
    ear, mouth = spawning.Pipe()
    child = spawning.Process(target=_sleep_and_commit, args=((pipeline.client, pipeline.facts), mouth), daemon=True)
    child.start()
    assert ear.poll(30.0)
    ear.recv()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    owner = pipeline.member(AGGREGATE)
    owner.until_owns(3)
    os.kill(child.pid, signal.SIGCONT)
    ear.send(None)
    assert ear.poll(40.0)
    assert ear.recv() == "not_a_member"
    child.join(10.0)

    with pipeline.store(aggregate=owner) as store:
        assert restored(store) == (0, {})


def test_who_has_not_joined_cannot_commit_though_kafka_would_let_him(pipeline: Pipeline) -> None:
    """Kafka takes a transaction's offsets from somebody without generation and member id, though there are members."""
    pipeline.begin()
    pipeline.metadata(AGGREGATE)
    with reader(pipeline.client, pipeline.topics.group(AGGREGATE), committed=True) as nobody:
        metadata = nobody.consumer_group_metadata()
    with closing(KafkaStore(pipeline.client, pipeline.facts, {AGGREGATE: lambda: metadata})) as store:
        store.restore(AGGREGATE, 0)
        with pytest.raises(Refused) as refused:
            store.commit(AGGREGATE, {0: Changes(9)})
    assert refused.value.reason == "not_a_member"

    stranger = Producer({**pipeline.client, "transactional.id": uuid.uuid4().hex})
    stranger.init_transactions(20.0)
    stranger.begin_transaction()
    stranger.send_offsets_to_transaction([TopicPartition(pipeline.source, 0, 77)], metadata, 20.0)
    stranger.commit_transaction(20.0)
    assert witnessed(pipeline.client, pipeline.topics, AGGREGATE, pipeline.source, [0]) == {0: 77}, "it let that pass"


def test_a_producer_that_was_fenced_is_replaced(pipeline: Pipeline) -> None:
    pipeline.begin()
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        store.commit(AGGREGATE, {0: Changes(1, {b"sum": b"1"})})
        name = store._transactions[AGGREGATE].name
        Producer({**pipeline.client, "transactional.id": name}).init_transactions(20.0)

        with pytest.raises(Fenced):
            store.commit(AGGREGATE, {0: Changes(2, {b"sum": b"2"})})
        with pytest.raises(ValueError, match="are to be restored"):
            store.commit(AGGREGATE, {0: Changes(3, {b"sum": b"3"})})
        assert restored(store) == (1, {b"sum": b"1"})
        store.commit(AGGREGATE, {0: Changes(2, {b"sum": b"2"})})
        assert restored(store) == (2, {b"sum": b"2"})


# Records that do not fit


@pytest.mark.parametrize(("limit", "size"), [(1_048_588, 2**20 + 1), (10_000, 20_000)])
def test_a_record_that_is_too_large_is_named_and_nothing_is_half_written(
    pipeline: Pipeline, limit: int, size: int
) -> None:
    pipeline.begin()
    configure(pipeline.kafka, pipeline.topics.dead_letters, max_message_bytes=limit)
    letter = Append(Log.DEAD_LETTERS, b"0", os.urandom(size))
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        with pytest.raises(StorageError, match=f"too large for the topic {pipeline.topics.dead_letters}"):
            store.commit(AGGREGATE, {0: Changes(1, {b"k": b"v"}, appends=[Append(Log.TOTALS, b"c", b"1"), letter])})
        assert restored(store) == (0, {})
        store.commit(AGGREGATE, {0: Changes(1, appends=[Append(Log.TOTALS, b"c", b"2")])})
    assert [each.value for each in pipeline.logged(Log.TOTALS)] == [b"2"]
    assert pipeline.logged(Log.DEAD_LETTERS) == []


def test_the_largest_dead_letter_fits(pipeline: Pipeline) -> None:
    value = deadletters.encode(DeadLetter(0, 1, 2, "invalid", "x" * 500, b"k" * 10, [], b"v" * (256 * 1024 - 10)))
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        store.commit(AGGREGATE, {0: Changes(1, appends=[Append(Log.DEAD_LETTERS, b"0", value)])})
    assert [each.value for each in pipeline.logged(Log.DEAD_LETTERS)] == [value]


# Open transactions


def test_a_restore_waits_for_a_transaction_that_is_open_below_the_last_commit(pipeline: Pipeline) -> None:
    """A zombie's records lie below the owner's commit; the broker hides all that is above them until they are decided.

    The end of the log, asked as a reader of committed records, is where the zombie began: a restore up to there
    would miss the owner's commit, though it was acknowledged and the group's offset tells of it.
    """
    state = pipeline.topics.aggregate_state
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        store.commit(AGGREGATE, {0: Changes(1, {b"sum": b"1"})})
        with open_transaction(pipeline, state, 0) as zombie:
            store.commit(AGGREGATE, {0: Changes(2, {b"sum": b"2"}, appends=[Append(Log.TOTALS, b"cus", b"2")])})

            true_end = ends_of(pipeline.client, state, [0])[0]
            assert true_end == 3 + 1 + 3
            assert end_for_readers(pipeline, state) == 3, "the tail would be lost"
            assert witnessed(pipeline.client, pipeline.topics, AGGREGATE, pipeline.source, [0]) == {0: 2}
            with ThreadPoolExecutor(1) as process:
                restoring = process.submit(restored, store)
                time.sleep(0.5)
                assert not restoring.done()
                zombie.abort_transaction(20.0)
                assert restoring.result(20.0) == (2, {b"sum": b"2"})


def end_for_readers(pipeline: Pipeline, topic: str) -> int:
    place = TopicPartition(topic, 0)
    newest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # the client's annotation is missing
    asked = admin_of(pipeline.kafka).list_offsets({place: newest}, isolation_level=IsolationLevel.READ_COMMITTED)
    found = asked[place].result(timeout=20.0).offset
    assert isinstance(found, int)
    return found


def test_offsets_that_are_being_committed_are_waited_for(pipeline: Pipeline) -> None:
    pipeline.begin()
    with reader(pipeline.client, pipeline.topics.group(AGGREGATE), committed=True) as nobody:
        metadata = nobody.consumer_group_metadata()
    with pipeline.store() as store, open_transaction(pipeline, pipeline.topics.totals, 0) as other:
        other.send_offsets_to_transaction([TopicPartition(pipeline.source, 0, 0)], metadata, 20.0)
        with ThreadPoolExecutor(1) as process:
            restoring = process.submit(restored, store)
            time.sleep(0.5)
            assert not restoring.done()
            other.commit_transaction(20.0)
            assert restoring.result(20.0) == (0, {})


def test_a_transaction_that_does_not_end_is_named_with_what_to_do(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_reading, "PATIENCE_S", 1.0)
    pipeline.begin()
    state = pipeline.topics.aggregate_state
    with pipeline.store() as store, open_transaction(pipeline, state, 1) as other:
        with pytest.raises(Unreachable) as refused:
            store.restore(AGGREGATE, 1)
        assert f"describe-producers --topic {state} --partition 1 names it" in str(refused.value)
        assert f"abort --topic {state} --partition 1 --start-offset 2 ends it" in str(refused.value)
        assert restored(store, partition=0) == (0, {}), "other partitions are not held up"
        other.abort_transaction(20.0)
        assert restored(store, partition=1) == (0, {})


# Kills and outages


def _commit_for_ever(pipeline_of: tuple[dict[str, Any], Facts, bytes], mouth: Connection) -> None:
    """Commit number n adds entry n, appends total n and moves the offset to n; each is announced once it is made."""
    kafka_transactions.TRANSACTION_S = 2  # type: ignore[misc]  # what is left open is over sooner
    client, facts, metadata = pipeline_of
    store = KafkaStore(client, facts, {AGGREGATE: lambda: metadata})
    found = store.restore(AGGREGATE, 0)
    number = found.offset if found else 0
    mouth.send(number)
    while True:
        number += 1
        store.commit(AGGREGATE, {0: numbered(number)})
        mouth.send(number)


def numbered(number: int) -> Changes:
    """Large enough that a kill finds it half produced."""
    puts = {b"n%d" % number: b"", **{b"f%d" % each: b"%d" % number for each in range(2000)}}
    return Changes(number, puts, [b"n%d" % (number - 10)], [Append(Log.TOTALS, b"cus", b"%d" % number)])


def check_numbered(pipeline: Pipeline, store: KafkaStore, at_least: int, at_most: int) -> int:
    """Exactly the commits 1 to n are there, in the state as in the log; returns n."""
    offset, entries = restored(store) or (0, {})
    assert at_least <= offset <= at_most
    assert {key for key in entries if key[:1] == b"n"} == {
        b"n%d" % each for each in range(max(1, offset - 9), offset + 1)
    }
    assert {value for key, value in entries.items() if key[:1] == b"f"} <= {b"%d" % offset}
    assert [int(each.value) for each in pipeline.logged(Log.TOTALS)] == list(range(1, offset + 1))
    return offset


@pytest.mark.slow
def test_a_kill_leaves_what_was_acknowledged_or_one_commit_more(pipeline: Pipeline) -> None:
    spawning, rng = multiprocessing.get_context("forkserver"), random.Random(7)  # noqa: S311 - the same story each time
    what = pipeline.client, pipeline.facts, pipeline.metadata(AGGREGATE)
    number = 0
    with pipeline.store() as store:
        for _ in range(10):
            ear, mouth = spawning.Pipe(duplex=False)
            child = spawning.Process(target=_commit_for_ever, args=(what, mouth), daemon=True)
            child.start()
            mouth.close()
            acknowledged = number
            enough = number + rng.randrange(1, 6)
            while acknowledged < enough:
                assert ear.poll(30.0)
                acknowledged = ear.recv()
            time.sleep(rng.random() * 0.02)
            child.kill()
            child.join(10.0)
            while ear.poll():
                try:
                    acknowledged = ear.recv()
                except EOFError:
                    break
            number = check_numbered(pipeline, store, acknowledged, acknowledged + 1)
    assert number >= 10


@pytest.mark.slow
def test_a_broker_that_stands_still_never_leaves_half_a_commit(
    own_kafka: LocalKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_store, "COMMIT_S", 1.5)
    monkeypatch.setattr(kafka_transactions, "ABORT_S", 1.0)
    rng = random.Random(3)  # noqa: S311 - the same story each time
    with closing(Pipeline(own_kafka)) as pipeline, pipeline.store() as store, ThreadPoolExecutor(1) as process:
        until(lambda: restores(store), "the broker is ready for transactions")
        pipeline.metadata(AGGREGATE)  # it joins its group, which a broker that stands still would hold up
        number = check_numbered(pipeline, store, 0, 0)
        for _ in range(3):
            committing = process.submit(commit_until_it_fails, store, number)
            time.sleep(0.1 + rng.random() * 0.1)
            own_kafka.suspend()
            try:
                acknowledged, failure = committing.result(60.0)
            finally:
                own_kafka.resume()
            assert isinstance(failure, Abandoned | OutcomeUnknown), failure
            until(own_kafka.answers, "the broker is back")
            one_more = 0 if isinstance(failure, Abandoned) else 1
            number = check_numbered(pipeline, store, acknowledged, acknowledged + one_more)
    assert number > 0


class Stopping(Producer):
    """Its broker stands still from just before, or just after, a transaction is to be committed."""

    broker: LocalKafka
    after = False
    stops = False

    def commit_transaction(self, timeout: float = -1) -> None:
        if self.stops and self.after:
            super().commit_transaction(timeout)
        if self.stops:
            self.broker.suspend()
        if self.stops and self.after:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "the answer is lost"))
        super().commit_transaction(timeout)


def test_what_became_of_a_commit_without_an_answer_is_told_by_the_restore(
    own_kafka: LocalKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_store, "COMMIT_S", 1.5)
    monkeypatch.setattr(kafka_transactions, "Producer", Stopping)
    monkeypatch.setattr(Stopping, "broker", own_kafka, raising=False)
    with closing(Pipeline(own_kafka)) as pipeline, pipeline.store() as store:
        until(lambda: restores(store), "the broker is ready for transactions")
        number = check_numbered(pipeline, store, 0, 0)
        for after in (False, True):
            monkeypatch.setattr(Stopping, "after", after)
            store.commit(AGGREGATE, {0: numbered(number + 1)})
            monkeypatch.setattr(Stopping, "stops", True)
            with pytest.raises(OutcomeUnknown):
                store.commit(AGGREGATE, {0: numbered(number + 2)})
            monkeypatch.setattr(Stopping, "stops", False)
            with pytest.raises(Unreachable):
                store.restore(AGGREGATE, 0)
            own_kafka.resume()
            until(lambda: restores(store), "the broker is back")
            number = check_numbered(pipeline, store, number + (2 if after else 1), number + 2)


def restores(store: KafkaStore) -> bool:
    try:
        store.restore(AGGREGATE, 0)
    except Unreachable:
        return False
    return True


def commit_until_it_fails(store: KafkaStore, number: int) -> tuple[int, Exception]:
    while True:
        try:
            store.commit(AGGREGATE, {0: numbered(number + 1)})
        except StorageError as failure:
            return number, failure
        number += 1


# Compaction


@pytest.mark.slow
def test_compaction_does_not_change_a_restore(pipeline: Pipeline) -> None:
    state, rng = pipeline.topics.aggregate_state, random.Random(5)  # noqa: S311 - the same story each time
    configure(
        pipeline.kafka,
        state,
        segment_ms=200,
        max_compaction_lag_ms=200,
        delete_retention_ms=0,
        min_cleanable_dirty_ratio=0.0,
    )
    pipeline.begin()
    entries: dict[bytes, bytes] = {}
    offset = 0
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)

        def commit() -> None:
            nonlocal offset
            offset += 1
            puts = {b"%d" % rng.randrange(50): b"%d" % offset for _ in range(20)}
            deletes = [key for key in (b"%d" % rng.randrange(50) for _ in range(5)) if key not in puts]
            store.commit(AGGREGATE, {0: Changes(offset, puts, list(dict.fromkeys(deletes)))})
            entries.update(puts)
            for key in deletes:
                entries.pop(key, None)

        def compacted() -> bool:
            commit()
            assert restored(store) == (offset, entries)
            return offset > 30 and first_offset(pipeline, state) > 100

        until(compacted, "the beginning of the state has been compacted away", within=60.0)
    with pipeline.store() as another:
        assert restored(another) == (offset, entries)
    assert positions(pipeline.client, pipeline.topics, AGGREGATE)[0].offset == offset


def first_offset(pipeline: Pipeline, topic: str) -> int:
    with reader(pipeline.client, "tests", committed=True) as consumer:
        consumer.assign([TopicPartition(topic, 0, 0)])
        first = consumer.poll(10.0)
        assert first is not None
        return first.offset() or 0


# The logs


def test_the_logs_can_be_read_as_cloud_events(pipeline: Pipeline) -> None:
    advance = totals.Advance(1, 17, 1_793_000_300_000)
    command = totals.Command("release", TOTAL.identifier, "ann", "mapped", 1_793_000_400_000)
    finished = outcome(Entry(TOTAL), "delivered", 1_793_000_500_000)
    letter = DeadLetter(2, 33, 1_793_000_000_000, "invalid", "no JSON", b"k", [], b"{")
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        appends = [
            Append(Log.TOTALS, b"cus_a", totals.encode(TOTAL)),
            Append(Log.TOTALS, b"1", totals.encode(advance)),
            Append(Log.OUTCOMES, TOTAL.identifier.encode(), encode_outcome(finished)),
            Append(Log.DEAD_LETTERS, b"2", deadletters.encode(letter)),
        ]
        store.commit(AGGREGATE, {0: Changes(1, appends=appends)})
    rejection = totals.Rejection(TOTAL.identifier, TOTAL.identifier, "code", "why", "evt_1", 1, msgspec.Raw(b"null"))
    report = totals.Report("evt_1", 1, "ai_tokens", 0, 10, {"code": 1}, 1)
    given = (command, rejection, report)
    append(pipeline.client, pipeline.topics, [Append(Log.TOTALS, b"cus_a", totals.encode(each)) for each in given])

    here = f"/tallyman/{pipeline.facts.pipeline}"
    assert sorted(events_of(pipeline, Log.TOTALS)) == sorted(
        [
            (TOTAL.identifier, f"{here}/totals", "tallyman.total.v1"),
            ("1-17-1793000300000", f"{here}/totals", "tallyman.advance.v1"),
            (f"{TOTAL.identifier}:release:1793000400000", f"{here}/totals", "tallyman.command.v1"),
            (f"{TOTAL.identifier}:rejection:evt_1", f"{here}/totals", "tallyman.rejection.v1"),
            ("evt_1", f"{here}/totals", "tallyman.report.v1"),
        ]
    )
    assert events_of(pipeline, Log.OUTCOMES) == [
        (f"{TOTAL.identifier}:delivered", f"{here}/outcomes", "tallyman.outcome.v1")
    ]
    assert events_of(pipeline, Log.DEAD_LETTERS) == [("2-33", f"{here}/dead_letters", "tallyman.dead_letter.v1")]


def events_of(pipeline: Pipeline, log: Log) -> list[tuple[str, str, str]]:
    topic = pipeline.topics.log(log)
    found: list[tuple[str, str, str]] = []
    with reader(pipeline.client, "tests", committed=True) as consumer:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in range(3)])
        expected = len(pipeline.logged(log))
        while len(found) < expected:
            message = consumer.poll(10.0)
            assert message is not None
            if message.error() is None:
                headers = cast("dict[str, bytes]", dict(message.headers() or []))
                event = from_binary_event(KafkaMessage(headers, message.key(), message.value() or b""), JSONFormat())
                assert event.get_data() is not None
                found.append((event.get_id(), event.get_source(), event.get_type()))
    return found


def test_a_command_lies_beside_the_total_of_its_customer(pipeline: Pipeline) -> None:
    with pipeline.store() as store:
        store.restore(AGGREGATE, 0)
        customers = [b"cus_%d" % number for number in range(20)]
        store.commit(AGGREGATE, {0: Changes(1, appends=[Append(Log.TOTALS, each, b"t") for each in customers])})
    append(pipeline.client, pipeline.topics, [Append(Log.TOTALS, each, b"c") for each in customers])

    found: dict[bytes, list[tuple[int, bytes]]] = {}
    for each in pipeline.logged(Log.TOTALS):
        found.setdefault(each.key, []).append((each.partition, each.value))
    assert found == {key: [(partition_of(key, 3), b"t"), (partition_of(key, 3), b"c")] for key in customers}
    assert {partition for [(partition, _), _] in found.values()} == {0, 1, 2}
