"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from consumer.sandbox.kafka import Kafka, KafkaUnavailableError
from tests.kafka.cluster import running_kafka

_UNAVAILABLE = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[Kafka]:
    """A real Kafka, shared by the session: every test uses topics and groups of its own."""
    source = running_kafka()
    try:
        running = source.__enter__()
    except KafkaUnavailableError as error:
        if os.environ.get("CI"):
            raise
        request.config.stash[_UNAVAILABLE] = str(error)
        pytest.skip(f"no real Kafka: {error}")
    yield running
    source.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that what only a real Kafka shows was not tested."""
    if reason := terminalreporter.config.stash.get(_UNAVAILABLE, None):
        terminalreporter.section("NOTHING WAS TESTED ON A REAL KAFKA", sep="!", red=True, bold=True)
        terminalreporter.line(reason, red=True)
