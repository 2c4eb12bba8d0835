"""The embedded broker does what the sandbox needs, and where it differs from Kafka we know it."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from consumer.sandbox.broker import PARTITIONS, EmbeddedBroker

LONG_AGO_MS = 1_700_000_000_000
RECORDS = 20_000
NO_SUCH_OFFSET = -1  # the client's OFFSET_END


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as broker:
        broker.create_topic("usage")
        yield broker


def reader(broker: EmbeddedBroker, *assigned: TopicPartition, group: str = "reader") -> Consumer:
    consumer = Consumer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "group.id": group,
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 10,
        }
    )
    consumer.assign(list(assigned))
    return consumer


def write(broker: EmbeddedBroker, values: list[bytes]) -> None:
    """Spread the values over the partitions, the i-th dated i seconds after LONG_AGO_MS."""
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "compression.type": "zstd", "linger.ms": 50})
    for i, value in enumerate(values):
        producer.produce("usage", value, partition=i % PARTITIONS, timestamp=LONG_AGO_MS + i * 1000)
        if i % 1000 == 0:
            producer.poll(0)
    assert producer.flush(30.0) == 0


def test_all_compressed_records_come_back_with_the_times_they_were_given(broker: EmbeddedBroker) -> None:
    values = [f'{{"n": {i:06d}, "id": "{uuid.uuid4()}", "pad": "{"x" * 240}"}}'.encode() for i in range(RECORDS)]
    write(broker, values)
    consumer = reader(broker, *(TopicPartition("usage", partition, 0) for partition in range(PARTITIONS)))

    seen: dict[tuple[int | None, int | None], bytes | None] = {}
    deadline = time.monotonic() + 30.0
    while len(seen) < RECORDS and time.monotonic() < deadline:
        for record in consumer.consume(500, 0.05):
            assert record.error() is None
            seen[record.partition(), record.offset()] = record.value()
            assert record.timestamp() == (
                TIMESTAMP_CREATE_TIME,
                LONG_AGO_MS + 1000 * ((record.offset() or 0) * PARTITIONS + (record.partition() or 0)),
            )
    consumer.close()

    assert seen == {(i % PARTITIONS, i // PARTITIONS): value for i, value in enumerate(values)}


def test_a_consumer_without_membership_commits_and_another_reads_the_offsets(broker: EmbeddedBroker) -> None:
    first = reader(broker, *(TopicPartition("usage", partition, 0) for partition in range(PARTITIONS)))
    first.commit(
        offsets=[TopicPartition("usage", partition, 10 + partition, metadata="why") for partition in range(PARTITIONS)],
        asynchronous=False,
    )
    first.close()

    second = reader(broker)
    stored = second.committed([TopicPartition("usage", partition) for partition in range(PARTITIONS)], timeout=10.0)
    second.close()

    assert [(found.offset, found.metadata) for found in stored] == [(10, "why"), (11, "why"), (12, "why"), (13, "why")]


def test_ends_can_be_asked_for_but_not_offsets_by_time(broker: EmbeddedBroker) -> None:
    write(broker, [b"a", b"b", b"c", b"d", b"e"])
    admin = AdminClient({"bootstrap.servers": broker.bootstrap_servers})
    first = TopicPartition("usage", 0)

    newest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # the client's annotation is missing
    asked = admin.list_offsets({first: newest}, isolation_level=IsolationLevel.READ_UNCOMMITTED)
    consumer = reader(broker)
    [by_time] = consumer.offsets_for_times([TopicPartition("usage", 0, LONG_AGO_MS)], timeout=10.0)
    consumer.close()

    assert asked[first].result(timeout=10.0).offset == 2
    assert by_time.offset == NO_SUCH_OFFSET, "a real Kafka says 0"


def test_other_processes_reach_it(broker: EmbeddedBroker) -> None:
    program = (
        "import sys; from confluent_kafka import Producer; "
        "producer = Producer({'bootstrap.servers': sys.argv[1]}); "
        "producer.produce('usage', b'from afar', partition=3); sys.exit(producer.flush(10.0))"
    )
    subprocess.run([sys.executable, "-c", program, broker.bootstrap_servers], check=True, timeout=30.0)

    consumer = reader(broker, TopicPartition("usage", 3, 0))
    record = consumer.poll(10.0)
    consumer.close()

    assert record is not None
    assert record.value() == b"from afar"
