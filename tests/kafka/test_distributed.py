"""Any number of processes on one pipeline, whose state is in Kafka: seen from outside, as processes."""

from __future__ import annotations

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.cimpl import NewPartitions

from consumer.storage import Stage
from consumer.storage.kafka_reading import ends_of, witnessed
from consumer.storage.kafka_topics import Topics
from tests.kafka.harness import DAY, MINUTE, Bench, Service, Topic, iso, past_events, real_now, until

pytestmark = pytest.mark.kafka

BEGIN = iso(real_now() - 30 * DAY)
PARTITIONS = 4
AGGREGATE, DELIVER = str(Stage.AGGREGATE), str(Stage.DELIVER)


@pytest.fixture
def topic(on: Bench) -> Topic:
    return Topic.create(on.kafka, PARTITIONS, arrival="create_time")


def worker(on: Bench, topic: Topic, *stages: Stage) -> Service:
    """One more process of the topic's pipeline; a group notices within six seconds that it is gone."""
    made = on.service(topic, bill_from=BEGIN)
    made.config["storage"] = {"kind": "kafka"}
    made.set(kafka={"options": made.config["kafka"]["options"] | {"session.timeout.ms": 6000}})
    made.stages = frozenset(stages or Stage)
    return made


class Usage:
    """What is produced, and what has to be billed of it."""

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self.at = real_now() - 180 * MINUTE
        self.expected: dict[str, str] = {}

    def produce(self, customers: int = 10) -> None:
        """So many customers on each partition, in a window of their own, which is closed."""
        self.at += 6 * MINUTE
        for partition in range(self.topic.partitions):
            used = {f"cus_{len(self.expected) + n}": n + 1 for n in range(customers)}
            past_events(self.topic, used, at=self.at, partition=partition)
            self.expected |= {customer: str(n) for customer, n in used.items()}

    def until_billed(self, on: Bench, *workers: Service, within: float = 40.0) -> None:
        """Wait until each of them is billed, once."""
        until(
            lambda: len(on.billed()) == len(self.expected),
            "all are billed",
            within=within,
            context=lambda: "\n\n".join(each.log()[-3000:] for each in workers),
        )
        assert on.billed() == self.expected


def owned(service: Service, stage: str) -> float:
    return service.metrics().sum("tallyman_owned_partitions", stage=stage)


def until_shared(*workers: Service, stage: str = AGGREGATE, partitions: int = PARTITIONS) -> None:
    """Wait until each of them has some, and together they have all."""

    def shared() -> bool:
        have = [owned(each, stage) for each in workers]
        return sum(have) == partitions and min(have) > 0

    until(shared, f"{partitions} partitions of stage {stage} are shared", within=40.0)


def test_a_process_that_joins_takes_its_share_and_one_that_leaves_gives_it_back(on: Bench, topic: Topic) -> None:
    first, second = worker(on, topic), worker(on, topic)
    usage = Usage(topic)
    first.start()
    usage.produce()
    usage.until_billed(on, first)
    second.start()
    until_shared(first, second)
    until_shared(first, second, stage=DELIVER)
    usage.produce()
    usage.until_billed(on, first, second)
    assert second.metrics().sum("tallyman_consumed_total") > 0, "it has read"
    unread = sum(each.metrics().sum("tallyman_totals", state="unread") for each in (first, second))
    assert unread == 0, "over both of them, what is made is read"
    rates = sum(each.metrics().sum("tallyman_stripe_rate") for each in (first, second))
    assert rates == first.config["stripe"]["max_rate"], "together they send no faster than one would"
    first.stop()
    until(lambda: owned(second, AGGREGATE) == PARTITIONS, "all of them are the second one's", within=20.0)
    usage.produce()
    usage.until_billed(on, second)
    failed = second.metrics().by("tallyman_commits_failed_total", "reason")
    assert {how: count for how, count in failed.items() if count} in ({}, {("refused",): 1}), (
        "one may be on its way at the moment at which the group changes"
    )
    second.stop()


def test_a_log_of_totals_of_which_all_has_been_deleted_is_gone_on_with(on: Bench, topic: Topic) -> None:
    """Retention takes the last total with the marker of its transaction: begun at that, totals would seem to be lost.

    A partition without a total for as long as they are kept would stop every process that gets it.
    """
    service = worker(on, topic)
    usage = Usage(topic)
    service.start()
    usage.produce()
    usage.until_billed(on, service)
    client, topics = {"bootstrap.servers": on.kafka.bootstrap_servers}, Topics.of(service.config["pipeline"])
    totals, everywhere = topics.totals, range(PARTITIONS)

    def read_to_the_end() -> bool:
        return witnessed(client, topics, Stage.DELIVER, "", everywhere) == ends_of(client, totals, everywhere)

    until(read_to_the_end, "the end of the totals log is committed")
    service.kill()
    ends = ends_of(client, totals, everywhere)
    places = [TopicPartition(totals, partition, end) for partition, end in ends.items()]
    for future in topic.admin.delete_records(places).values():
        future.result(30.0)
    service.start()
    usage.produce()
    usage.until_billed(on, service)


def test_what_a_process_had_begun_when_it_was_killed_is_done_by_another(on: Bench, topic: Topic) -> None:
    """Killed with requests on their way: they are tried again, and count once."""
    first, second = worker(on, topic), worker(on, topic)
    usage = Usage(topic)
    first.start()
    on.stripe.faults.latency = (1.0, 1.0)
    usage.produce()
    until(on.stripe.model.billed, "some are billed")
    first.kill()
    on.stripe.faults.latency = (0.0, 0.0)
    second.start()
    usage.until_billed(on, second)
    second.stop()


def test_partitions_change_hands_while_requests_are_on_their_way(on: Bench, topic: Topic) -> None:
    first, second = worker(on, topic), worker(on, topic)
    usage = Usage(topic)
    first.start()
    on.stripe.faults.latency = (0.2, 2.0)
    usage.produce(40)
    until(on.stripe.model.billed, "some are billed")
    second.start()
    until_shared(first, second, stage=DELIVER)
    usage.until_billed(on, first, second)
    for each in (first, second):
        assert each.metrics().sum("tallyman_totals", state="parked") == 0
        each.stop()


def test_the_commit_of_a_process_that_was_away_is_refused_and_it_takes_part_again(on: Bench, topic: Topic) -> None:
    """A zombie: suspended for longer than its session, it wakes and believes that its partitions are its own."""
    first, second = worker(on, topic), worker(on, topic)
    usage = Usage(topic)
    for each in (first, second):
        each.set(commit_every="3s")
        each.start()
    until_shared(first, second)
    usage.produce()
    usage.until_billed(on, first, second)
    usage.produce()
    first.until(lambda: first.metrics().sum("tallyman_lag_records") == 0, "it has read what it will not commit")
    first.suspend()
    usage.until_billed(on, first, second, within=60.0)
    first.resume()
    refused = {"stage": AGGREGATE, "reason": "refused"}
    first.until(lambda: first.metrics().sum("tallyman_commits_failed_total", **refused) > 0, "its commit is refused")
    assert "commit_failed" in first.log()
    until_shared(first, second)
    usage.produce()
    usage.until_billed(on, first, second)
    for each in (first, second):
        each.stop()


def test_each_stage_can_have_processes_of_its_own_and_counting_needs_no_key(on: Bench, topic: Topic) -> None:
    counting, sending = worker(on, topic, Stage.AGGREGATE), worker(on, topic, Stage.DELIVER)
    del counting.environ["STRIPE_SECRET_KEY"]
    usage = Usage(topic)
    counting.start()
    usage.produce()
    counting.until_consumed(11 * PARTITIONS)
    assert on.billed() == {}
    sending.start()
    usage.until_billed(on, counting, sending)
    assert counting.metrics().sum("tallyman_stripe_requests_total") == 0
    assert sending.metrics().sum("tallyman_consumed_total") == 0
    for each in (counting, sending):
        assert each.get("/readyz") == (200, "ok\n")
        each.stop()


def test_partitions_that_are_added_to_the_source_are_read_by_whoever_gets_them(on: Bench, topic: Topic) -> None:
    first = worker(on, topic)
    usage = Usage(topic)
    first.set(kafka={"options": first.config["kafka"]["options"] | {"topic.metadata.refresh.interval.ms": 1000}})
    first.start()
    usage.produce()
    usage.until_billed(on, first)
    topic.admin.create_partitions([NewPartitions(topic.name, PARTITIONS + 2)])[topic.name].result(30.0)
    until(
        lambda: len(topic.admin.list_topics(topic.name, timeout=5.0).topics[topic.name].partitions) == PARTITIONS + 2,
        "they are there",
    )
    topic.partitions += 2
    usage.produce()
    usage.until_billed(on, first)
    first.stop()
    first.start()
    usage.produce()
    usage.until_billed(on, first)
    first.stop()


def test_stages_cannot_be_parted_on_one_file(on: Bench, topic: Topic) -> None:
    service = on.service(topic, bill_from=BEGIN)
    service.stages = frozenset({Stage.DELIVER})
    service.spawn()
    assert "leave out --stage" in service.fails()


def test_a_state_that_was_lost_is_not_begun_anew(on: Bench, topic: Topic) -> None:
    first = worker(on, topic)
    usage = Usage(topic)
    first.start()
    usage.produce()
    usage.until_billed(on, first)
    first.stop()
    lost = f"tallyman-{first.config['pipeline']}-aggregate-state"
    topic.admin.delete_topics([lost])[lost].result(10.0)
    until(lambda: lost not in topic.admin.list_topics(timeout=5.0).topics, "it is gone")
    said = first.refuses()
    assert f"{lost} is empty, but tallyman-{first.config['pipeline']}-totals is not" in said
    assert "tallyman reset --bill-from T" in said
