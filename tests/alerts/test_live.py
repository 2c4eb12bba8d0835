"""A real Prometheus scrapes real runs with faults: what should fire does, and nothing else; all panels have data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumer.sandbox.kafka import Kafka, LocalKafka
from tests.alerts.dashboards import ALL
from tests.alerts.grafana import Panel
from tests.alerts.plots import PLOTS
from tests.alerts.prometheus import Prometheus, PrometheusUnavailableError, faster
from tests.alerts.rules import alerts
from tests.alerts.stories import Stories, run_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

WITHIN_S = 180.0
"""A machine that is not busy takes half of it."""

NOT_HERE = {
    # Faults of ours: what could bring them about is refused at a start.
    *("TallymanEventsUnaccounted", "TallymanUsageUnaccounted", "TallymanTotalsUnaccounted"),
    # Days, and brokers that do not take writes for a quarter of an hour.
    *("TallymanReconcileNotDone", "TallymanCommitsFail", "TallymanNothingCommitted"),
}
"""Alerts that are tried by promtool alone."""


@pytest.fixture
def stories(kafka: Kafka, own_kafka: LocalKafka, tmp_path: Path) -> Iterator[Stories]:
    with Stories(kafka, own_kafka, tmp_path / "stories") as made:
        for plot in PLOTS:
            made.add(plot)
        yield made


def chosen(expr: str) -> str:
    """A panel's query, with all jobs and pipelines, and an interval that holds some scrapes."""
    return faster(expr.replace("FILTER", 'job=~".*", pipeline=~".*"').replace("$__rate_interval", "5m"))


def test_the_alerts_that_should_fire_do_and_only_they_and_every_panel_has_data(
    stories: Stories, tmp_path: Path
) -> None:
    try:
        prometheus = Prometheus(tmp_path / "prometheus", stories.targets)
    except PrometheusUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no promtool: {error}")
    stories.open()
    with prometheus:
        looked = 0.0

        def all_fire() -> bool:
            nonlocal looked
            if time.monotonic() < looked + 1:
                return False
            looked = time.monotonic()
            fired = prometheus.fired()
            return all(alerts <= fired.get(job, set()) for job, alerts in stories.expected.items())

        try:
            run_until(stories, all_fire, "all alerts fire", within=WITHIN_S)
        except AssertionError:
            assert prometheus.fired() == stories.expected
            raise
        fired = prometheus.fired()
        assert fired == stories.expected
        assert set().union(*fired.values(), NOT_HERE, {"TallymanNotScraped"}) == alerts().keys()
        for alert in prometheus.alerts():
            for text in alert["annotations"].values():
                assert "<no value>" not in text
                assert "<error" not in text
        empty = [
            f"{part.title} {legend}: {expr}"
            for dashboard in ALL
            for part in dashboard.parts
            if isinstance(part, Panel)
            for legend, expr in part.queries.items()
            if not any(values for _, values in prometheus.over_time(chosen(expr)))
        ]
        assert empty == []
        stories.end()
        run_until(
            stories, lambda: "TallymanNotScraped" in prometheus.fired().get("", ()), "nothing is scraped", within=60
        )
