"""Every event billed once, on a real Kafka: the run that ``tests.exactness.run`` makes large, made small."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumer.sandbox.kafka import Kafka
from tests.exactness.run import Scenario, prove

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


def test_a_service_that_is_killed_again_and_again_bills_every_event_once(kafka: Kafka, tmp_path: Path) -> None:
    """Three kills while stage 1 counts and three while stage 2 sends, to a Stripe that refuses, fails and forgets."""
    report = prove(
        kafka,
        Scenario(events=24_000, customers=250, minutes=4, kills=6, rate=2_000, burst=50, seed=1),
        tmp_path,
        print,
    )
    print("\n".join(report.lines()))
    assert report.kills == (3, 3)
    for answer in ("429 rate limit", "429 lock timeout", "500", "accepted, answer lost", "400 already exists"):
        assert report.answers[answer], f"no request met this: {answer}"
