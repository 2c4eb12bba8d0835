"""Fixtures that all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain

import pytest
import structlog
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


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Every command configures logging; the next test finds it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = [each for each in handlers if each in root.handlers]
    root.setLevel(level)
    structlog.reset_defaults()


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the tests to the processes that run them, each of which begins with an equal stretch of the list.

    What takes long comes first in each, so that nobody is left alone with it in the end; but the image is built by one
    of them. After that one half of the processes waits for Kafka while the other half computes, and then the other way
    round.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes == 1:
        return
    slow: dict[str, list[pytest.Item]] = {}
    kafka, others = [], []
    for each in items:
        if each.get_closest_marker("slow"):
            image = "image" in getattr(each, "fixturenames", ())
            slow.setdefault("image" if image else each.nodeid, []).append(each)
        elif each.get_closest_marker("kafka"):
            kafka.append(each)
        else:
            others.append(each)
    dealt: list[pytest.Item] = []
    for number in range(processes):
        dealt += chain.from_iterable(list(slow.values())[number::processes])
        for kind in (kafka, others) if number % 2 else (others, kafka):
            dealt += kind[len(kind) * number // processes : len(kind) * (number + 1) // processes]
    items[:] = dealt


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was not tested for want of something; also where the tests ran in other processes."""
    reports = terminalreporter.stats.get("skipped", ())
    skipped = [each.longrepr[2] for each in reports if isinstance(each.longrepr, tuple)]
    for begins, comes_to in _LOUD.items():
        reason = next((each[each.index(begins) :] for each in skipped if begins in each), None)
        if reason is not None:
            terminalreporter.section(comes_to, sep="!", red=True, bold=True)
            terminalreporter.line(reason, red=True)
