"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings

from consumer.sandbox.kafka import Kafka, KafkaUnavailableError, LocalKafka
from tests.kafka.cluster import own, shared_kafka

# A busy machine makes an example slow, not wrong.
settings.register_profile("tallyman", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tallyman")

_LOUD = {
    "no real Kafka: ": "NOTHING WAS TESTED ON A REAL KAFKA",
    "no stripe-mock: ": "NO REQUEST WAS COMPARED WITH STRIPE'S SPECIFICATION",
    "no helm: ": "THE CHART WAS NOT RENDERED",
    "no promtool: ": "NO ALERT WAS TRIED",
    "no image: ": "THE IMAGE WAS NEITHER BUILT NOR RUN",
}
"""How the reason begins for which a test is skipped, and what that comes to."""


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A real Kafka, shared by all processes of the session: every test uses topics and groups of its own."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with ExitStack() as running:
        try:
            kafka = running.enter_context(shared_kafka(folder))
        except KafkaUnavailableError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no real Kafka: {error}")
        yield kafka


@pytest.fixture(scope="module")
def local_kafka() -> Iterator[LocalKafka]:
    """A local broker for those tests of one file that stop or kill it."""
    with own(LocalKafka) as broker:
        yield broker


@pytest.fixture
def own_kafka(local_kafka: LocalKafka) -> LocalKafka:
    """That broker, for one test at a time; whatever the last one did to it, it answers."""
    if not local_kafka.answers():
        local_kafka.kill()
        local_kafka.start()
    return local_kafka


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested for want of something; also where the tests ran in other processes."""
    reports = terminalreporter.stats.get("skipped", ())
    skipped = [each.longrepr[2] for each in reports if isinstance(each.longrepr, tuple)]
    for begins, comes_to in _LOUD.items():
        reason = next((each[each.index(begins) :] for each in skipped if begins in each), None)
        if reason is not None:
            terminalreporter.section(comes_to, sep="!", red=True, bold=True)
            terminalreporter.line(reason, red=True)
