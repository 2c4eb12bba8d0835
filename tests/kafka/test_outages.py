"""What Kafka does to a pipeline whose state is in it: away, back, refusing. Nothing is lost, and it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from confluent_kafka.admin._acl import AclBinding, AclBindingFilter, AclOperation, AclPermissionType
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType

from consumer.runtime.source import Ends, Source, SourceError, SourceSilent
from consumer.sandbox.kafka import LocalKafka
from consumer.sandbox.kafka_cluster import LocalCluster
from consumer.storage import Stage, StorageError
from consumer.storage.kafka_reading import witnessed
from consumer.storage.kafka_topics import Topics
from tests.kafka.cluster import own
from tests.kafka.harness import Bench, Service, Topic, bench, past_events, real_now, until
from tests.kafka.test_distributed import Usage, owned, worker

pytestmark = pytest.mark.kafka

B = TypeVar("B", AclBinding, AclBindingFilter)


@pytest.fixture
def on(own_kafka: LocalKafka, tmp_path: Path) -> Iterator[Bench]:
    with bench(own_kafka, tmp_path) as made:
        yield made


@pytest.fixture
def topic(on: Bench) -> Topic:
    return Topic.create(on.kafka, 2, arrival="create_time")


def guarded() -> LocalKafka:
    """A broker that looks at rights; whatever is not spoken of is allowed."""
    return LocalKafka(
        authorizer_class_name="org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        allow_everyone_if_no_acl_found="true",
    )


def rule(kind: type[B], topic: str, operation: AclOperation, permission: AclPermissionType) -> B:
    """What nobody in particular, which is everybody here, may do with a topic."""
    return kind(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)


def configure(topic: Topic, name: str, **settings: object) -> None:
    entries = [
        ConfigEntry(key.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
        for key, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries)
    topic.admin.incremental_alter_configs([resource])[resource].result(10.0)


def failed_commits(service: Service) -> float:
    return service.metrics().sum("tallyman_commits_failed_total")


def test_a_start_waits_for_kafka_and_says_so(on: Bench, topic: Topic, own_kafka: LocalKafka) -> None:
    service = worker(on, topic)
    usage = Usage(topic)
    usage.produce()
    own_kafka.stop()
    service.spawn()
    service.until(lambda: "Kafka does not answer" in service.get("/readyz")[1], "it says what it waits for")
    assert service.get("/healthz") == (200, "ok\n"), "an outage is no reason to start it again"
    assert service.metrics().by("tallyman_kafka_up") == {(): 0}
    own_kafka.start()
    usage.until_billed(on, service)
    service.stop()


def test_a_start_that_waits_for_kafka_can_be_stopped(on: Bench, topic: Topic, own_kafka: LocalKafka) -> None:
    service = worker(on, topic)
    own_kafka.stop()
    service.spawn()
    service.until(lambda: "kafka_silent" in service.log(), "it waits")
    service.stop()


def test_who_only_sends_notices_that_kafka_is_away(on: Bench, topic: Topic, own_kafka: LocalKafka) -> None:
    service = worker(on, topic, Stage.DELIVER)
    service.start()
    own_kafka.kill()
    service.until(lambda: "Kafka has not answered since" in service.get("/readyz")[1], "it says so")
    assert service.metrics().sum("tallyman_kafka_up") == 0
    own_kafka.start()
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    service.stop()


@pytest.mark.parametrize("how", ["killed", "suspended"])
def test_a_broker_that_goes_away_and_comes_back_costs_nothing(
    on: Bench, topic: Topic, own_kafka: LocalKafka, how: str
) -> None:
    service = worker(on, topic)
    usage = Usage(topic)
    service.start()
    usage.produce()
    service.until(on.stripe.model.billed, "some are billed")
    if how == "killed":
        own_kafka.kill()
    else:
        own_kafka.suspend()
    service.until(lambda: service.get("/readyz")[0] == 503, "it is not ready", within=40.0)
    assert service.get("/healthz") == (200, "ok\n")
    if how == "killed":
        own_kafka.start()
    else:
        own_kafka.resume()
    usage.produce()
    usage.until_billed(on, service, within=60.0)
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    assert owned(service, "aggregate") == 2
    service.stop()


@pytest.mark.slow
def test_while_a_leader_is_silent_its_partitions_have_no_ends() -> None:
    """Kafka's client then gives those of the others, and for these a number below zero, as if all had been read."""
    with own(LocalCluster) as kafka:
        topic = Topic.create(kafka, 6)
        for partition in range(6):
            past_events(topic, {"cus_a": 1}, at=real_now(), partition=partition)
        source = Source({"bootstrap.servers": kafka.bootstrap_servers}, topic.name, "group")
        everywhere = range(6)
        began = source.ends(everywhere)
        assert min(began.values()) > 0

        def known() -> bool:
            try:
                ends = source.ends(everywhere, 1.0)
            except SourceSilent:
                return False
            assert ends == began
            assert source.starts(everywhere, 0) == dict.fromkeys(everywhere, 0)
            return True

        assert known()
        for fault in ("suspend", "kill"):
            leader = kafka.nodes[1]
            getattr(leader, fault)()
            assert not known()
            until(known, "another leads", within=40.0)
            (leader.start if fault == "kill" else leader.resume)()
            kafka.until_whole()
            kafka.balance()
            until(known, "it leads again", within=40.0)


@pytest.mark.slow
def test_a_cluster_that_refuses_writes_and_then_loses_its_quorum_is_waited_for(tmp_path: Path) -> None:
    """What is read cannot be committed, so it is read again until it can be."""
    with own(LocalCluster) as kafka, bench(kafka, tmp_path) as on:
        topic = Topic.create(kafka, 2, arrival="create_time", min_insync_replicas=1)
        service = worker(on, topic)
        usage = Usage(topic)
        service.start()
        usage.produce()
        usage.until_billed(on, service)
        configure(topic, f"tallyman-{service.config['pipeline']}-aggregate-state", min_insync_replicas=3)
        kafka.nodes[3].kill()
        until(lambda: kafka.present == {1, 2}, "the cluster has noticed", within=40.0)
        usage.produce()
        since = "stage aggregate has not been able to commit since"
        service.until(lambda: since in service.get("/readyz")[1], "a commit has failed", within=60.0)
        assert service.get("/readyz")[0] == 503
        assert failed_commits(service) > 0
        assert '"commit_failed"' in service.log()
        kafka.nodes[2].kill()
        service.until(lambda: "Kafka has not answered since" in service.get("/readyz")[1], "it says so", within=60.0)
        assert service.get("/healthz") == (200, "ok\n")
        for number in (2, 3):
            kafka.nodes[number].start()
        kafka.until_whole()
        usage.produce()
        usage.until_billed(on, service, within=90.0)
        service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
        service.stop()


def test_a_right_that_is_taken_away_stops_the_service_and_is_named(tmp_path: Path) -> None:
    """Nothing of it mends itself: to try again for ever would look like an outage."""
    with own(guarded) as kafka, bench(kafka, tmp_path) as on:
        topic = Topic.create(kafka, 2, arrival="create_time")
        service = worker(on, topic)
        usage = Usage(topic)
        service.start()
        usage.produce()
        usage.until_billed(on, service)
        totals = f"tallyman-{service.config['pipeline']}-totals"
        allowed = rule(AclBinding, totals, AclOperation.ALL, AclPermissionType.ALLOW)
        forbidden = totals, AclOperation.WRITE, AclPermissionType.DENY
        for done in topic.admin.create_acls([allowed, rule(AclBinding, *forbidden)]).values():
            done.result(10.0)
        usage.produce()
        said = service.fails()
        assert "Kafka refuses what is written, nothing of it was kept: TOPIC_AUTHORIZATION_FAILED" in said
        for removed in topic.admin.delete_acls([rule(AclBindingFilter, *forbidden)]).values():
            removed.result(10.0)
        service.start()
        usage.until_billed(on, service)
        service.stop()


def test_a_log_that_takes_no_record_of_our_size_stops_the_service_until_it_does(on: Bench, topic: Topic) -> None:
    """That does not mend itself: somebody has to, and is told what."""
    service = worker(on, topic)
    usage = Usage(topic)
    service.start()
    usage.produce()
    usage.until_billed(on, service)
    totals = f"tallyman-{service.config['pipeline']}-totals"
    configure(topic, totals, max_message_bytes=200)
    usage.produce()
    said = service.fails()
    assert f"a record is too large for the topic {totals}: raise its max.message.bytes to 1048576" in said
    assert f"--entity-name {totals} --add-config max.message.bytes=" in service.refuses()
    configure(topic, totals, max_message_bytes=1_048_588)
    service.start()
    usage.until_billed(on, service)
    service.stop()


def test_offsets_that_may_not_be_seen_are_not_taken_for_none() -> None:
    """As if nothing had ever been read. Kafka's client says it of each partition, and raises nothing."""
    with own(guarded) as kafka:
        topic = Topic.create(kafka, 2)
        client = {"bootstrap.servers": kafka.bootstrap_servers}
        topics = Topics.of("pipeline")
        source = Source(client, topic.name, topics.group(Stage.AGGREGATE))
        source.commit({0: 5}, Ends(1, 1))

        def seen() -> list[dict[int, int]]:
            return [source.committed([0]), witnessed(client, topics, Stage.AGGREGATE, topic.name, [0])]

        assert seen() == [{0: 5}] * 2
        forbidden = rule(AclBinding, topic.name, AclOperation.DESCRIBE, AclPermissionType.DENY)
        topic.admin.create_acls([forbidden])[forbidden].result(10.0)
        until(lambda: refused(lambda: source.committed([0])), "it is forbidden")
        with pytest.raises(StorageError, match="TOPIC_AUTHORIZATION_FAILED"):
            witnessed(client, topics, Stage.AGGREGATE, topic.name, [0])


def refused(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except SourceError as failed:
        return "refuses access to the topic" in str(failed)
    return False
