"""Starts on a real Kafka: what belongs together goes on, and what does not is refused with its cure."""

from __future__ import annotations

import shutil
import time

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.cimpl import NewPartitions

from consumer.config import load
from consumer.runtime import embedded, service
from consumer.storage import Changes, Facts, Stage, StorageError
from consumer.storage.sqlite import SqliteStore
from tests.kafka.harness import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    Bench,
    Service,
    Topic,
    event,
    iso,
    past_events,
    real_now,
    until,
)

pytestmark = pytest.mark.kafka


def has_run(service: Service, *, until_records: int) -> None:
    """One life: it reads what is there, and stops in good order."""
    service.start()
    service.until_consumed(until_records)
    service.stop()


def group_offsets(service: Service) -> dict[int, int]:
    """What the group has committed, as Kafka tells it."""
    asked = ConsumerGroupTopicPartitions(service.group)
    found = service.topic.admin.list_consumer_group_offsets([asked])[service.group].result(10.0).topic_partitions
    return {each.partition: each.offset for each in found or []}


def group_notes(service: Service) -> set[str | None]:
    """What stands beside the group's offsets."""
    asked = ConsumerGroupTopicPartitions(service.group)
    found = service.topic.admin.list_consumer_group_offsets([asked])[service.group].result(10.0).topic_partitions
    return {each.metadata for each in found or []}


def read_to(service: Service, partition: int = 0) -> int:
    """The offset in the state."""
    with service.store() as store:
        restored = store.restore(Stage.AGGREGATE, partition)
        assert restored is not None
        return restored.offset


# The first start


def test_the_first_start_says_what_it_needs_and_takes_nothing_older_than_stripe_does(on: Bench) -> None:
    service = on.service(Topic.create(on.kafka), bill_from=None)
    assert "set bill_from in the configuration to the time from which events are to be billed" in service.refuses()
    service.set(bill_from=iso(real_now() - 35 * DAY))
    assert "more than 34 days back: Stripe refuses older usage. The earliest time possible is" in service.refuses()
    assert group_offsets(service) == {}
    service.set(bill_from=iso(real_now() - DAY))
    service.start()
    service.stop()
    service.set(bill_from=iso(real_now() - 2 * DAY))
    assert "it is fixed from the first start on. Set it back" in service.refuses()


def test_reading_starts_five_minutes_before_bill_from_and_earlier_event_times_are_ignored(on: Bench) -> None:
    """An event may arrive before its time, as clocks go; usage from before the start is billed by somebody else."""
    topic = Topic.create(on.kafka, arrival="create_time")
    bill_from = (real_now() - HOUR) // 1000 * 1000
    topic.produce(event(1000, at=bill_from), at=bill_from - 6 * MINUTE)  # offset 0: before the reading starts
    topic.produce(event(100, at=bill_from - 1), at=bill_from - 5 * MINUTE)  # offset 1: read, and too early
    topic.produce(event(10, at=bill_from), at=bill_from - 4 * MINUTE)
    topic.produce(event(1, at=bill_from), at=bill_from)
    service = on.service(topic, bill_from=iso(bill_from))
    service.start()
    service.until_consumed(3)
    page = service.metrics()
    assert page.sum("tallyman_counted_value") == 11
    assert page.sum("tallyman_events_total", reason="before_bill_from") == 1
    service.stop()


def test_a_transaction_that_is_open_at_the_first_start_is_read_when_it_is_committed(on: Bench) -> None:
    """Asked as a reader of committed records, Kafka says that nothing has arrived since, and they were skipped."""
    topic = Topic.create(on.kafka, arrival="create_time")
    bill_from = (real_now() - HOUR) // 1000 * 1000
    topic.produce(event(1000, at=bill_from), at=bill_from - HOUR)
    service = on.service(topic, bill_from=iso(bill_from))
    with topic.transaction() as (producer, append):
        append(event(1, at=bill_from), timestamp=bill_from)
        append.flush()
        topic.produce(event(10, at=bill_from), at=bill_from)
        service.start()
        producer.commit_transaction(30.0)
    service.until_consumed(2)
    assert service.metrics().sum("tallyman_counted_value") == 11
    service.stop()


def test_a_first_start_killed_at_any_moment_can_be_repeated(on: Bench) -> None:
    topic = Topic.create(on.kafka, 3)
    topic.produce(event(1), event(2))
    service = on.service(topic)
    for tenths in range(2, 14, 2):
        service.spawn()
        time.sleep(tenths / 10)  # moments of a start, from the imports to the first commits
        service.kill()
    service.start()
    service.until(lambda: service.metrics().sum("tallyman_counted_value") == 3, "all is counted once")
    service.stop()


# Another topic, another cluster, more partitions


def test_a_topic_that_was_created_again_is_refused(on: Bench) -> None:
    """Its offsets mean other records, and the identifiers of its totals would be those of other totals."""
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    topic.admin.delete_topics([topic.name], operation_timeout=30.0)[topic.name].result(30.0)
    until(lambda: topic.name not in topic.admin.list_topics(timeout=10.0).topics, "the topic is gone")
    on.kafka.create_topic(topic.name)
    topic.produce(event(1), event(2))
    assert f"belongs to the topic {topic.name} (" in service.refuses()


def test_another_cluster_or_pipeline_is_refused(on: Bench) -> None:
    service = on.service(Topic.create(on.kafka))
    service.start()
    service.stop()
    pipeline = service.config["pipeline"]
    service.set(pipeline="other")
    assert f"belongs to the pipeline {pipeline}, and this is other" in service.refuses()
    service.set(pipeline=pipeline)
    with service.store() as store, store._transaction() as transaction:
        transaction.execute("UPDATE facts SET cluster_id = 'of yesterday'")
    assert "belongs to the Kafka cluster of yesterday, and this is" in service.refuses()


def test_partitions_that_are_added_are_read_from_their_beginning(on: Bench) -> None:
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    topic.admin.create_partitions([NewPartitions(topic.name, 3)])[topic.name].result(30.0)
    until(lambda: len(topic.admin.list_topics(topic.name, timeout=5.0).topics[topic.name].partitions) == 3, "three")
    topic.produce(event(10), partition=2)
    has_run(service, until_records=2)
    assert [read_to(service, each) for each in range(3)] == [1, 0, 1]
    with service.store() as store, store._transaction() as transaction:
        transaction.execute("UPDATE facts SET partitions = 4")
    assert f"{topic.name} had 4 partitions and has 3" in service.refuses()


def test_a_topic_that_is_created_again_under_the_running_service_stops_it(on: Bench) -> None:
    """The client would go on in the new topic at the old one's offset, and what lies before it would be lost."""
    topic = Topic.create(on.kafka)
    topic.produce(event(1), event(1))
    service = on.service(topic)
    service.start()
    service.until_consumed(2)
    topic.admin.delete_topics([topic.name], operation_timeout=30.0)[topic.name].result(30.0)
    until(lambda: topic.name not in topic.admin.list_topics(timeout=10.0).topics, "the topic is gone")
    on.kafka.create_topic(topic.name)
    topic.produce(*(event(10) for _ in range(5)))
    service.clock.pass_time(10 * SECOND)
    assert "was deleted and created again while it was read" in service.fails()
    assert "Offsets and identifiers of one mean nothing in the other" in service.refuses()


def test_partitions_that_are_added_under_the_running_service_are_taken_up_where_they_begin(on: Bench) -> None:
    """Nobody has to start anything again, and what was produced before it was noticed counts."""
    topic = Topic.create(on.kafka)
    service = on.service(topic)
    service.start()
    topic.admin.create_partitions([NewPartitions(topic.name, 2)])[topic.name].result(30.0)
    until(lambda: len(topic.admin.list_topics(topic.name, timeout=5.0).topics[topic.name].partitions) == 2, "two")
    topic.produce(event(10), partition=1)
    service.clock.pass_time(10 * SECOND)
    service.until_consumed(1)
    service.stop()


# The log has moved under the state


def test_records_that_retention_deletes_unread_stop_the_service(on: Bench) -> None:
    topic = Topic.create(on.kafka, 2)
    topic.produce(event(1), event(2), partition=1)
    service = on.service(topic)
    has_run(service, until_records=2)
    topic.produce(*(event(1) for _ in range(5)), partition=1)
    delete_below(topic, 1, 6)
    refused = service.refuses()
    assert f"partition 1 of {topic.name} was to be read from 2 on" in refused
    assert "has deleted what is before 6: 4 records are gone unread" in refused


def test_records_that_are_deleted_under_the_running_service_stop_it(on: Bench) -> None:
    """It must neither skip to the newest record nor wait for ever."""
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    service.clock.jump(-6 * MINUTE)  # the partition waits, and what comes later is not fetched meanwhile
    service.start()
    service.until(lambda: service.metrics().sum("tallyman_partition_waits_for_clock") == 1, "it waits")
    topic.produce(*(event(1) for _ in range(5)))
    delete_below(topic, 0, 4)
    service.clock.jump(6 * MINUTE)
    said = service.fails()
    assert f"partition 0 of {topic.name} does not have offset 1 any more" in said


def delete_below(topic: Topic, partition: int, offset: int) -> None:
    """As retention does."""
    place = TopicPartition(topic.name, partition, offset)
    for future in topic.admin.delete_records([place]).values():
        future.result(30.0)


# The state and its witness


def test_a_lost_file_is_refused(on: Bench) -> None:
    """A first start in its place would bill again what has been billed."""
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    for file in service.state.parent.glob("tallyman.db*"):
        file.unlink()
    refused = service.refuses()
    assert f"holds no state, but the consumer group {service.group} has read {topic.name} before" in refused
    assert "tallyman reset --bill-from" in refused


def test_a_file_that_is_lost_before_anything_was_read_is_refused(on: Bench) -> None:
    """Killed as soon as it has started, and yet the group knows that there was a state."""
    service = on.service(Topic.create(on.kafka))
    service.start()
    service.kill()
    for file in service.state.parent.glob("tallyman.db*"):
        file.unlink()
    assert "holds no state, but the consumer group" in service.refuses()


def test_a_first_start_that_fails_leaves_no_witness_of_a_state_that_never_was(on: Bench) -> None:
    """Otherwise it could not be repeated: the next one would look for what was lost."""
    harness = on.service(Topic.create(on.kafka))
    config = load(harness.write(), harness.environ)
    source = service.kafka_source(config, harness.group)
    topic = source.describe()
    facts = Facts("p", topic.cluster_id, topic.name, topic.topic_id, 0, 1, 0)
    with SqliteStore.open(harness.state, now=harness.clock.now, create=True, lock=True) as store:
        store.begin(facts, {0: Changes(0)})
        with pytest.raises(StorageError, match="has begun already"):
            embedded.begin(config, store, source, topic, bill_from=real_now(), now=0)
    assert group_offsets(harness) == {}


def test_an_older_copy_of_the_file_is_refused(on: Bench) -> None:
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    copy = service.folder / "backup.db"
    shutil.copy(service.state, copy)
    topic.produce(event(1))
    has_run(service, until_records=2)
    assert group_offsets(service) == {0: 2}
    shutil.copy(copy, service.state)
    refused = service.refuses()
    assert f"has read partition 0 up to 1, but the group {service.group} up to 2" in refused


def test_an_older_copy_from_before_a_quiet_days_totals_is_refused(on: Bench) -> None:
    """Nothing was read since, but totals were sent, and a day later Stripe would take them again."""
    topic = Topic.create(on.kafka, arrival="create_time")
    past_events(topic, {"cus_a": 5}, at=real_now() - HOUR)
    service = on.service(topic, stripe={"mode": "hold"})
    service.start()
    service.until(lambda: len(service.totals()) == 1, "its total is made")
    service.stop()
    copy = service.folder / "backup.db"
    shutil.copy(service.state, copy)
    service.set(stripe={"mode": "send"})
    service.start()
    service.until(lambda: on.billed() == {"cus_a": "5"}, "it is billed")
    service.until(lambda: group_notes(service) == {"totals 2 outcomes 2"}, "the group has heard of it")
    service.stop()
    newest = service.folder / "newest.db"
    shutil.copy(service.state, newest)
    shutil.copy(copy, service.state)
    service.clock.pass_time(25 * HOUR)
    on.stripe.clock.advance(25 * HOUR / 1000)
    assert "ends its outcomes log at 1, but the group" in service.refuses()
    shutil.copy(newest, service.state)
    service.start()
    service.stop()
    assert on.billed() == {"cus_a": "5"}


def test_a_state_without_group_offsets_is_trusted_and_gets_its_witness_back(on: Bench) -> None:
    """Kafka forgets offsets after a week; the state does not. Until the next record the witness must be there again."""
    topic = Topic.create(on.kafka, 2)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    topic.admin.delete_consumer_groups([service.group])[service.group].result(30.0)
    service.start()
    service.until(lambda: group_offsets(service) == {0: 1, 1: 0}, "the group's offsets are those of the state")
    service.stop()
    assert read_to(service) == 1


def test_a_stop_leaves_the_groups_offsets_where_the_state_is(on: Bench) -> None:
    topic = Topic.create(on.kafka)
    service = on.service(topic, commit_every="1m")
    service.start()
    topic.produce(*(event(1) for _ in range(100)))
    service.until(lambda: service.metrics().sum("tallyman_open_keys") == 1, "it has read")
    service.stop()
    assert read_to(service) == group_offsets(service)[0]


def test_a_second_service_on_the_file_is_refused_by_the_name_of_the_first(on: Bench) -> None:
    service = on.service(Topic.create(on.kafka))
    service.start()
    second = on.service(service.topic, storage=service.config["storage"], pipeline=service.config["pipeline"])
    refused = second.refuses()
    assert str(service.state) in refused
    assert str(service.pid) in refused
    service.stop()


def test_a_group_that_somebody_else_reads_with_is_not_our_end(on: Bench) -> None:
    """Kafka then refuses our commits of offsets. They only bear witness; the state is what counts."""
    topic = Topic.create(on.kafka)
    topic.produce(event(1))
    service = on.service(topic)
    has_run(service, until_records=1)
    other = Consumer({"bootstrap.servers": on.kafka.bootstrap_servers, "group.id": service.group})
    other.subscribe([topic.name])
    until(lambda: (other.poll(0.1), other.assignment())[1], "somebody is a member of the group")
    topic.produce(event(1))
    has_run(service, until_records=2)
    other.close()
    assert read_to(service) == 2


def test_past_events_are_found_again_after_a_restart_in_the_middle_of_the_log(on: Bench) -> None:
    topic = Topic.create(on.kafka, arrival="create_time")
    at = real_now() - HOUR
    past_events(topic, {"cus_a": 5}, at=at, closed=False)
    service = on.service(topic)
    has_run(service, until_records=1)
    past_events(topic, {"cus_a": 6}, at=at)
    service.start()
    service.until(lambda: on.billed() == {"cus_a": "11"}, "both are billed")
    service.stop()
    assert [(total.value, total.revision) for total in service.totals()] == [("11", 0)]
