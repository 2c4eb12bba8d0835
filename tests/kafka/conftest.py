"""Fixtures that the tests of the running service share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from consumer.sandbox.kafka import Kafka
from tests.kafka.harness import Bench, bench


@pytest.fixture
def on(kafka: Kafka, tmp_path: Path) -> Iterator[Bench]:
    """A bench on the session's Kafka; whoever stops brokers has one on a broker of its own instead."""
    with bench(kafka, tmp_path) as made:
        yield made
