"""Several processes that share the work, under faults: short forms of what `python -m tests.chaos` does at length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from consumer.sandbox.kafka import Kafka
from consumer.sandbox.kafka_cluster import LocalCluster
from consumer.storage import Stage
from tests.chaos.faults import Kind, Plan
from tests.chaos.run import Scenario, prove
from tests.exactness.scenario import stamped
from tests.kafka.cluster import own

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

AGGREGATE, DELIVER = Stage.AGGREGATE, Stage.DELIVER


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Three brokers for one test."""
    with own(LocalCluster) as brokers:
        yield brokers


def test_workers_that_come_and_go_and_wake_as_zombies_bill_every_event_once(kafka: Kafka, tmp_path: Path) -> None:
    """Two stand still in the middle of a commit until others have their partitions: both commits are refused."""
    plan = Plan(
        counting=[(Kind.ZOMBIE_IN_COMMIT, AGGREGATE), (Kind.ADD, AGGREGATE), (Kind.KILL, AGGREGATE)],
        sending=[(Kind.ZOMBIE_IN_COMMIT, DELIVER), (Kind.REMOVE, DELIVER), (Kind.ROLL, DELIVER)],
    )
    # So slow that commits go on for as long as one is aimed at.
    scenario = Scenario(
        events=20_000, customers=150, minutes=4, workers=3, partitions=6, rate=1_000, burst=20, max_rate=1_000, seed=1
    )
    report = prove(kafka, scenario, plan, tmp_path, stamped())
    print("\n".join(report.lines()))
    assert report.faults.total() == len(plan.counting) + len(plan.sending)
    for stage in Stage:
        assert report.failed_commits[stage, "refused"], f"no commit of a zombie of stage {stage} was refused"
        assert report.counted_as_failed[stage, "refused"], f"the metrics do not tell of stage {stage}"


def test_one_of_three_brokers_may_go_and_every_event_is_billed_once(cluster: LocalCluster, tmp_path: Path) -> None:
    """It is killed while events are counted, and the leaders move back to it while totals are sent."""
    plan = Plan(counting=[(Kind.BROKER_KILL, AGGREGATE)], sending=[(Kind.LEADERS, DELIVER)])
    scenario = Scenario(
        events=6_000, customers=80, minutes=4, workers=2, partitions=3, rate=2_000, burst=20, max_rate=1_000, seed=1
    )
    report = prove(cluster, scenario, plan, tmp_path, stamped())
    print("\n".join(report.lines()))
    assert report.faults.total() == len(plan.counting) + len(plan.sending)
