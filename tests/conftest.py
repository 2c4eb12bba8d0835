"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings

from consumer.sandbox.kafka import Kafka, KafkaUnavailableError, LocalKafka
from tests.kafka.cluster import running_kafka

# A busy machine makes an example slow, not wrong.
settings.register_profile("tallyman", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tallyman")

_UNAVAILABLE = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """A real Kafka, shared by the session: every test uses topics and groups of its own."""
    with ExitStack() as running:
        try:
            kafka = running.enter_context(running_kafka())
        except KafkaUnavailableError as error:
            if os.environ.get("CI"):
                raise
            request.config.stash[_UNAVAILABLE] = str(error)
            pytest.skip(f"no real Kafka: {error}")
        yield kafka


@pytest.fixture
def own_kafka() -> Iterator[LocalKafka]:
    """A local broker for one test that stops or kills it."""
    try:
        broker = LocalKafka()
    except KafkaUnavailableError as error:
        pytest.skip(f"no local Kafka to stop and start: {error}")
    with broker:
        yield broker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that what only a real Kafka shows was not tested."""
    if reason := terminalreporter.config.stash.get(_UNAVAILABLE, None):
        terminalreporter.section("NOTHING WAS TESTED ON A REAL KAFKA", sep="!", red=True, bold=True)
        terminalreporter.line(reason, red=True)
