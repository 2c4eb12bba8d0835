"""Stripe away for a whole run, and then back: nothing is lost, nothing doubled, and memory stays as it was."""

from __future__ import annotations

import itertools
import time
import uuid
from pathlib import Path

import pytest

from consumer.sandbox.kafka import Kafka
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.sandbox.traffic import AI_TOKENS, API_CALLS, MINUTE_MS, Mix, Traffic, tombstones
from tests.exactness.checks import Produced, judge
from tests.exactness.run import AGO_MS, PARTITIONS
from tests.exactness.stripe import BEHIND_S
from tests.exactness.world import Production, Service, wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

EVENTS = 8_000
CUSTOMERS = 5_000
"""So many that most events make totals of their own."""
RATE = 600
"""Events produced a second: with Stripe there, few totals wait at a time."""
MORE = 1.2
"""What memory may be with Stripe away, of what it is with Stripe there."""
IN_FLIGHT = 2_000
"""Totals that the service keeps in memory at most, unless configured otherwise."""


def test_memory_stays_flat_while_stripe_is_away_and_all_is_delivered_once_it_is_back(
    kafka: Kafka, tmp_path: Path
) -> None:
    """The same traffic twice: with Stripe there, and with Stripe away until all has been counted and closed."""
    there = _run(kafka, tmp_path / "there", away=False)
    away = _run(kafka, tmp_path / "away", away=True)
    print(f"peak memory: {there / 1024:.1f} MB with Stripe there, {away / 1024:.1f} MB with Stripe away until the end")
    assert away <= there * MORE


def _run(kafka: Kafka, folder: Path, *, away: bool) -> int:
    """One run. Returns the most memory that the service ever had, in KB."""
    folder.mkdir()
    topic = f"outage-{uuid.uuid4().hex[:12]}"
    kafka.create_topic(topic, PARTITIONS, "create_time")
    now_ms = time.time_ns() // 10**6
    made = Traffic(Mix(customers=CUSTOMERS), seed=7, partitions=PARTITIONS)
    messages = made.messages(EVENTS, start_ms=now_ms - AGO_MS, duration_ms=10 * MINUTE_MS)
    messages = itertools.chain(messages, tombstones(PARTITIONS, now_ms))
    with StripeStandIn(accept_any_customer=True) as stripe:
        stripe.clock.advance(-BEHIND_S)
        for event_name in (AI_TOKENS, API_CALLS):
            stripe.model.add_meter(event_name)
        if away:
            stripe.down()
        with Service(
            folder,
            kafka=kafka.bootstrap_servers,
            topic=topic,
            stripe=stripe.url,
            first_arrival_ms=now_ms - AGO_MS,
        ) as service:
            production = Production(kafka.bootstrap_servers, topic, messages, RATE)
            wait_until(production.done, lambda: production.sent, "producing")
            wait_until(lambda: _counted(service), lambda: None, "counting")
            if away:
                assert not stripe.model.events
                _check_backlog(service)
                stripe.up()
            wait_until(lambda: _finished(service), lambda: len(stripe.model.events), "delivering")
            service.stop()
        judge(Produced(made.expected, PARTITIONS, PARTITIONS), service, stripe.url)
        return service.peak_rss_kb


def _check_backlog(service: Service) -> None:
    """What waits for Stripe lies in the log of totals: peaks of memory alone would not tell in a run of this size."""
    seen = service.metrics()
    assert seen is not None
    in_memory = seen.sum("tallyman_in_flight_totals") + seen.sum("tallyman_aside_totals")
    assert 0 < in_memory <= IN_FLIGHT
    assert seen.sum("tallyman_totals", 'state="unread"') > 4 * IN_FLIGHT


def _counted(service: Service) -> bool:
    seen = service.metrics()
    return seen is not None and seen.consumed == EVENTS + PARTITIONS and not seen.open


def _finished(service: Service) -> bool:
    seen = service.metrics()
    return seen is not None and not seen.unfinished
