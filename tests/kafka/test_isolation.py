"""A bad customer, a bad meter and poisonous totals beside good ones, over HTTP: nobody waits for them."""

from __future__ import annotations

from itertools import repeat

import pytest

from consumer.sandbox.stripe_server import Fault
from tests.kafka.harness import HOUR, METER, MINUTE, Bench, Topic, event, real_now

pytestmark = pytest.mark.kafka

MINUTES = 6
GOOD = [f"cus_good{number}" for number in range(30)]
GONE = "gone"
"""The event name of a meter that Stripe does not have."""


def test_nobody_waits_for_a_bad_customer_a_bad_meter_or_a_poisonous_total(on: Bench) -> None:
    """All good totals are billed while the first request for the bad customer still waits for its answer.

    They come behind the bad ones in the log, and each good customer has usage on the bad meter too.
    """
    topic = Topic.create(on.kafka, 1, arrival="create_time")
    gone = dict(METER) | {"name": "gone", "event_types": ["lost"], "stripe": {"event_name": GONE}}
    service = on.service(topic, stripe={"mode": "hold"}, meters=[dict(METER), gone])
    service.start()
    start = (real_now() - HOUR) // MINUTE * MINUTE
    for at in range(start, start + MINUTES * MINUTE, MINUTE):
        bad = [event(7, at=at, customer=each) for each in ("cus_bad", "cus_poison", "nobody")]
        lost = [event(3, at=at, customer=each, type="lost") for each in GOOD]
        good = [event(5, at=at, customer=each) for each in GOOD]
        topic.produce(*bad, *lost, *good, at=at)
    topic.produce(None, at=start + 2 * MINUTES * MINUTE)
    number = MINUTES * (3 + 2 * len(GOOD))
    service.until(lambda: service.metrics().sum("tallyman_totals", state="unread") == number, "all are totals")
    for total in service.totals():
        if total.customer in {"cus_bad", "cus_poison"}:
            fault = Fault.HANG if total.customer == "cus_bad" else Fault.ERROR
            on.stripe.faults.by_identifier[total.identifier] = list(repeat(fault, 1_000))
    service.stop()

    service.set(stripe={"mode": "send"})
    service.start()
    wanted = dict.fromkeys(GOOD, str(5 * MINUTES))
    service.until(lambda: on.billed() == wanted, "all good totals are billed", within=60.0)
    page, stats = service.metrics(), on.stripe.model.stats
    assert stats["fault_hang"] == 1, "the bad customer's first request was waited for"
    assert page.sum("tallyman_totals", state="parked", reason="refused") == MINUTES, "nobody is no customer"
    assert page.sum("tallyman_totals", state="parked", reason="meter") == MINUTES * len(GOOD)
    assert page.sum("tallyman_totals", state="parked") == MINUTES * (1 + len(GOOD))
    assert page.sum("tallyman_totals", state="pending") == 2 * MINUTES
    assert page.sum("tallyman_delivery_paused") == 0
    service.kill()
    assert on.stripe.model.violations == []
