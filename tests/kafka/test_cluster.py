"""What the client library says of a real Kafka: the facts that the service is built on."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import (
    TIMESTAMP_CREATE_TIME,
    TIMESTAMP_LOG_APPEND_TIME,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from consumer.sandbox.kafka import Arrival, Kafka, LocalKafka

pytestmark = pytest.mark.kafka

LONG_AGO_MS = 1_700_000_000_000
NOTHING_READ = -1001  # the client's OFFSET_INVALID
NO_SUCH_RECORD = -1  # the client's OFFSET_END


@pytest.fixture
def topic(kafka: Kafka) -> str:
    """One partition, stamped by the broker."""
    name = f"facts-{uuid.uuid4().hex}"
    kafka.create_topic(name)
    return name


@pytest.fixture
def admin(kafka: Kafka) -> AdminClient:
    return AdminClient({"bootstrap.servers": kafka.bootstrap_servers})


@pytest.fixture
def transactions(kafka: Kafka) -> Producer:
    """A producer that is ready for its first transaction."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": f"facts-{uuid.uuid4().hex}"})
    producer.init_transactions(30.0)
    return producer


@pytest.fixture
def reader(kafka: Kafka) -> Iterator[Callable[..., Consumer]]:
    """Consumers that read committed records of what is assigned to them by hand and report ends of partitions."""
    consumers: list[Consumer] = []

    def new(*assigned: TopicPartition, **config: str) -> Consumer:
        consumer = Consumer(
            {
                "bootstrap.servers": kafka.bootstrap_servers,
                "group.id": f"facts-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
            }
            | {key.replace("_", "."): value for key, value in config.items()}
        )
        consumers.append(consumer)
        consumer.assign(list(assigned))
        return consumer

    yield new
    for consumer in consumers:
        consumer.close()


def write(producer: Producer, topic: str, *values: str, timestamp_ms: int = 0) -> None:
    for value in values:
        producer.produce(topic, value.encode(), partition=0, timestamp=timestamp_ms)
    assert producer.flush(30.0) == 0


def read_to_end(consumer: Consumer) -> tuple[list[Message], int]:
    """The records before the next end-of-partition event, and the offset that the event carries."""
    records: list[Message] = []
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        message = consumer.poll(0.1)
        if message is None:
            continue
        error = message.error()
        if error is None:
            records.append(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            end = message.offset()
            assert end is not None
            return records, end
        else:
            raise KafkaException(error)
    raise TimeoutError("the end of the partition was not reported within 20 s")


def values(records: list[Message]) -> list[bytes | None]:
    return [record.value() for record in records]


def position(consumer: Consumer, topic: str) -> int:
    return consumer.position([TopicPartition(topic, 0)])[0].offset


def latest(admin: AdminClient, topic: str, isolation: IsolationLevel) -> int:
    partition = TopicPartition(topic, 0)
    newest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # the client's annotation is missing
    asked = admin.list_offsets({partition: newest}, isolation_level=isolation)
    offset = asked[partition].result(timeout=20.0).offset
    assert isinstance(offset, int)
    return offset


@pytest.mark.parametrize(
    ("arrival", "kind"), [("log_append_time", TIMESTAMP_LOG_APPEND_TIME), ("create_time", TIMESTAMP_CREATE_TIME)]
)
def test_a_topic_stamps_as_it_was_created_to(
    kafka: Kafka, reader: Callable[..., Consumer], arrival: Arrival, kind: int
) -> None:
    name = f"facts-{uuid.uuid4().hex}"
    kafka.create_topic(name, partitions=3, arrival=arrival)
    before = int(time.time() * 1000)
    write(Producer({"bootstrap.servers": kafka.bootstrap_servers}), name, "one", timestamp_ms=LONG_AGO_MS)

    [record], _ = read_to_end(reader(TopicPartition(name, 0, 0)))

    stamped_as, stamp = record.timestamp()
    assert stamped_as == kind
    assert (stamp == LONG_AGO_MS) if kind == TIMESTAMP_CREATE_TIME else (stamp >= before - 5_000)


def test_cluster_and_topic_have_ids_and_a_topic_made_again_has_another(
    kafka: Kafka, admin: AdminClient, topic: str
) -> None:
    def topic_id() -> str:
        return str(admin.describe_topics(TopicCollection([topic]))[topic].result(timeout=20.0).topic_id)

    assert len(admin.describe_cluster().result(timeout=20.0).cluster_id) == 22
    first = topic_id()
    assert len(first) == 22
    assert topic_id() == first
    assert not set(first) & set("-_"), "the client prints + and / where Kafka's own tools print - and _"

    admin.delete_topics([topic], operation_timeout=20.0)[topic].result(timeout=30.0)
    kafka.create_topic(topic)

    assert topic_id() != first


def test_read_committed_does_not_see_aborted_records(
    transactions: Producer, topic: str, reader: Callable[..., Consumer]
) -> None:
    for value, end in (("kept", transactions.commit_transaction), ("dropped", transactions.abort_transaction)):
        transactions.begin_transaction()
        write(transactions, topic, value)
        end()

    committed, _ = read_to_end(reader(TopicPartition(topic, 0, 0)))
    everything, _ = read_to_end(reader(TopicPartition(topic, 0, 0), isolation_level="read_uncommitted"))

    assert values(committed) == [b"kept"]
    assert values(everything) == [b"kept", b"dropped"]


def test_the_end_event_and_the_position_are_past_trailing_markers(
    transactions: Producer, topic: str, reader: Callable[..., Consumer], admin: AdminClient
) -> None:
    transactions.begin_transaction()
    write(transactions, topic, "a", "b")
    transactions.commit_transaction()  # its marker is at offset 2
    consumer = reader(TopicPartition(topic, 0, 0))

    records, end = read_to_end(consumer)

    assert [record.offset() for record in records] == [0, 1]
    assert end == position(consumer, topic) == latest(admin, topic, IsolationLevel.READ_UNCOMMITTED) == 3

    transactions.begin_transaction()
    write(transactions, topic, "never seen")
    transactions.abort_transaction()

    assert read_to_end(consumer) == ([], 5)
    assert position(consumer, topic) == 5


def test_the_position_is_unknown_until_the_log_has_been_read_on(
    transactions: Producer, topic: str, reader: Callable[..., Consumer]
) -> None:
    consumer = reader(TopicPartition(topic, 0, 0))
    assert read_to_end(consumer) == ([], 0)
    assert position(consumer, topic) == NOTHING_READ

    transactions.begin_transaction()
    write(transactions, topic, "never seen")
    transactions.abort_transaction()

    assert read_to_end(consumer) == ([], 2)
    assert position(consumer, topic) == 2


def test_an_open_transaction_is_seen_in_the_uncommitted_end_only(
    transactions: Producer, topic: str, reader: Callable[..., Consumer], admin: AdminClient
) -> None:
    """A reader of committed records is told the last stable offset in every way but one, and its end event too."""
    partition = TopicPartition(topic, 0, 0)
    transactions.begin_transaction()
    write(transactions, topic, "a")
    transactions.commit_transaction()
    transactions.begin_transaction()
    write(transactions, topic, "open", "open")  # 2 and 3, above the stable end
    consumer = reader(partition)

    records, end = read_to_end(consumer)

    assert values(records) == [b"a"]
    assert end == position(consumer, topic) == 2
    assert latest(admin, topic, IsolationLevel.READ_COMMITTED) == 2
    assert latest(admin, topic, IsolationLevel.READ_UNCOMMITTED) == 4
    assert consumer.get_watermark_offsets(partition, timeout=20.0) == (0, 2)
    assert consumer.get_watermark_offsets(partition, cached=True) == (0, 4)
    uncommitted = reader(partition, isolation_level="read_uncommitted")
    assert uncommitted.get_watermark_offsets(partition, timeout=20.0) == (0, 4)

    transactions.commit_transaction()

    assert values(read_to_end(consumer)[0]) == [b"open", b"open"]
    assert position(consumer, topic) == 5


def test_a_consumer_without_membership_commits_and_reads_offsets(topic: str, reader: Callable[..., Consumer]) -> None:
    group = f"facts-{uuid.uuid4().hex}"
    first = reader(TopicPartition(topic, 0, 0), group_id=group)
    [none_yet] = first.committed([TopicPartition(topic, 0)], timeout=20.0)
    assert none_yet.offset == NOTHING_READ

    first.commit(offsets=[TopicPartition(topic, 0, 42, metadata="why")], asynchronous=False)

    [stored] = reader(group_id=group).committed([TopicPartition(topic, 0)], timeout=20.0)
    assert (stored.offset, stored.metadata) == (42, "why")


def test_a_stranger_cannot_commit_into_a_group_that_has_members(topic: str, reader: Callable[..., Consumer]) -> None:
    group = f"facts-{uuid.uuid4().hex}"
    member, assigned = reader(group_id=group), []
    member.subscribe([topic], on_assign=lambda _, partitions: assigned.extend(partitions))
    for _ in itertools.takewhile(lambda _: not assigned, range(200)):
        member.poll(0.1)
    assert assigned

    stranger = reader(TopicPartition(topic, 0, 0), group_id=group)

    with pytest.raises(KafkaException) as refused:
        stranger.commit(offsets=[TopicPartition(topic, 0, 1)], asynchronous=False)
    assert refused.value.args[0].code() == KafkaError.UNKNOWN_MEMBER_ID


def test_a_time_after_the_last_record_has_no_offset(kafka: Kafka, topic: str, reader: Callable[..., Consumer]) -> None:
    write(Producer({"bootstrap.servers": kafka.bootstrap_servers}), topic, "a", "b")
    consumer = reader()
    in_an_hour = int(time.time() * 1000) + 3_600_000

    def first_at(time_ms: int) -> int:
        [found] = consumer.offsets_for_times([TopicPartition(topic, 0, time_ms)], timeout=20.0)
        assert found.error is None
        return found.offset

    assert first_at(LONG_AGO_MS) == 0
    assert first_at(in_an_hour) == NO_SUCH_RECORD


def test_a_broker_that_was_killed_comes_back_with_its_address_and_its_records(own_kafka: LocalKafka) -> None:
    own_kafka.create_topic("outage")
    address = own_kafka.bootstrap_servers
    write(Producer({"bootstrap.servers": address}), "outage", "before")

    own_kafka.kill()
    assert not own_kafka.answers()
    own_kafka.start()

    assert own_kafka.bootstrap_servers == address
    write(Producer({"bootstrap.servers": address}), "outage", "after")
    consumer = Consumer({"bootstrap.servers": address, "group.id": "facts", "enable.partition.eof": True})
    consumer.assign([TopicPartition("outage", 0, 0)])
    assert values(read_to_end(consumer)[0]) == [b"before", b"after"]
    consumer.close()


def test_the_first_offset_of_a_time_depends_on_the_isolation_while_a_transaction_is_open(
    transactions: Producer, topic: str, reader: Callable[..., Consumer]
) -> None:
    """Told "no such record", a reader that started at the uncommitted end would lose the open transaction."""
    transactions.begin_transaction()
    write(transactions, topic, "open")

    def first_at(isolation: str) -> int:
        consumer = reader(isolation_level=isolation)
        [found] = consumer.offsets_for_times([TopicPartition(topic, 0, LONG_AGO_MS)], timeout=20.0)
        assert found.error is None
        return found.offset

    assert first_at("read_uncommitted") == 0
    assert first_at("read_committed") == NO_SUCH_RECORD
    transactions.abort_transaction()
