"""What goes wrong in each story, and what the runbook says to do about it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from threading import Thread
from typing import Final

from confluent_kafka import Producer

from consumer.sandbox.kafka import LocalKafka, free_ports
from consumer.sandbox.stripe_notifications import Destination
from consumer.sandbox.stripe_server import Fault, Instead, Wrong
from consumer.storage import Append, Log, Stage
from consumer.totals import Compared, Comparison, encode
from tests.alerts.stories import (
    Plot,
    Scene,
    Steps,
    Usage,
    backlog,
    customers_file,
    ended,
    flowing,
    restarted,
    started,
    told,
    write_customers,
)
from tests.kafka.harness import DAY, HOUR, MINUTE, TOKENS, Service, event, iso, past_events, real_now

WEBHOOK_SECRET: Final = "whsec_stories"  # noqa: S105 - opens nothing
LAG_S: Final = 20

# Nothing is wrong


def _shop(scene: Scene) -> Steps:
    """All is well: some events are repeated, some late, some too exact for Stripe; and sums are compared."""
    service = scene.service
    _count(service, "requests", "used")
    scene.on.stripe.model.add_meter("requests")
    yield from started(service)
    backlog(scene.topic, 40)
    usage = Usage(scene.topic)
    yield from flowing(usage, seconds=10)
    usage.produce(time=iso(real_now() - 3 * MINUTE), data={"n": 123456789.123456789})
    yield from flowing(usage, seconds=5)
    told(service, "reconcile")
    yield from flowing(usage)


def _scaled(scene: Scene) -> Steps:
    """All is well in two processes, one for each stage: only together do they balance."""
    scene.services[0].stages, scene.services[1].stages = frozenset({Stage.AGGREGATE}), frozenset({Stage.DELIVER})
    yield from started(*scene.services)
    backlog(scene.topic, 100)
    yield from flowing(Usage(scene.topic))


# Reading usage


def _bad_events(scene: Scene) -> Steps:
    yield from started(scene.service)
    usage = Usage(scene.topic)
    yield from flowing(usage, seconds=30, key=False)
    for _ in flowing(usage, end=scene.cured, key=False, repeat=True):
        usage.broken([b"{"] * 10 + [event(1, at=real_now() + HOUR)])
        yield 0.5
    yield from flowing(usage)


def _hanging_producer(scene: Scene) -> Steps:
    """A producer leaves a transaction open: what lies behind it on these partitions cannot be read."""
    yield from started(scene.service)
    at = real_now() - 45 * MINUTE
    for partition in range(scene.topic.partitions):
        past_events(scene.topic, {"cus_1": 1}, at=at, partition=partition, closed=False)
    while scene.service.metrics().sum("tallyman_consumed_total") < scene.topic.partitions:
        yield 0.1
    hanging = _left_open(scene, scene.topic.name, range(scene.topic.partitions))
    yield from flowing(Usage(scene.topic), end=scene.cured)
    hanging.abort_transaction(10.0)
    yield from flowing(Usage(scene.topic))


def _clock(scene: Scene) -> Steps:
    scene.service.clock.jump(-6 * MINUTE)
    yield from started(scene.service)
    scene.topic.produce(event(1))
    yield from scene.until_cured()
    scene.service.clock.jump(6 * MINUTE)


# Delivering totals


def _stripe_away(scene: Scene) -> Steps:
    yield from started(scene.service)
    scene.on.stripe.down()
    backlog(scene.topic, 60, minutes=45)
    yield from scene.until_cured()
    scene.on.stripe.up()


def _stripe_ill(scene: Scene) -> Steps:
    """Some of its answers are errors, for as long as there is something to send."""
    yield from _sending_with(scene, Fault.ERROR)


def _stripe_limits(scene: Scene) -> Steps:
    """Some of its answers say that we are too fast, however slow we are."""
    yield from _sending_with(scene, Fault.RATE_LIMITED)


def _sending_with(scene: Scene, fault: Fault) -> Steps:
    scene.service.set(stripe={"max_rate": 30})
    yield from started(scene.service)
    backlog(scene.topic, 3000)
    scene.on.stripe.faults.rates = {fault: 0.3}
    yield from scene.until_cured()
    scene.on.stripe.faults.rates = {}
    scene.service.set(stripe={"max_rate": 1000})
    yield from restarted(scene.service)


def _wrong_key(scene: Scene) -> Steps:
    yield from started(scene.service)
    scene.on.stripe.model.keys = {"sk_test_another": None}
    backlog(scene.topic, 60)
    yield from scene.until_cured()
    scene.service.environ |= {"STRIPE_SECRET_KEY": "sk_test_another"}
    yield from restarted(scene.service)


def _held(scene: Scene) -> Steps:
    scene.service.set(stripe={"mode": "hold"})
    yield from started(scene.service)
    backlog(scene.topic, 20, minutes=45)
    yield from scene.until_cured()
    scene.service.set(stripe={"mode": "send"})
    yield from restarted(scene.service)


def _late(scene: Scene) -> Steps:
    service = scene.service
    yield from started(service)
    yield 20
    backlog(scene.topic, 20, minutes=120)
    yield 10
    day = real_now() // DAY * DAY // 1000
    found = Compared(real_now(), day - 86_400, day, equal=18, differs=2, missing="2")
    record = encode(Comparison(real_now(), {TOKENS: found}))
    with service.store() as store:
        store.append([Append(Log.TOTALS, b"comparison", record)])
    yield from scene.until_cured()
    told(service, "reconcile", "--since", "7d")


# Parked totals


def _parked(scene: Scene) -> Steps:
    service, stripe = scene.service, scene.on.stripe
    _count(service, "images", "drawn")
    images = stripe.model.add_meter("images")
    yield from started(service)
    error = {"type": "invalid_request_error", "message": "No such customer: 'cus_1'", "code": "resource_missing"}
    there = error | {"message": "An event already exists with identifier tm1.", "code": None}
    answers = {20 + n: Instead(400, json.dumps({"error": each}).encode()) for n, each in enumerate((error, there))}
    stripe.faults.plan = lambda number, _: answers.get(number)
    images.deactivated_at = int(time.time())
    at = real_now() - 6 * MINUTE
    scene.topic.produce(event(at=at, customer="new"), event(at=at, customer="cus_7", type="drawn"), at=at)
    backlog(scene.topic, 200)
    yield 5
    customers_file(service).write_text("cus_1: cu")
    yield from scene.until_cured()
    write_customers(service, "new")
    images.deactivated_at = None
    service.clock.pass_time(2 * MINUTE)
    told(service, "parked", "release", "--reason", "refused", "--yes", "--wait", "0")
    settle = "--despite-doubt", "--yes", "--wait", "0", "--why"
    told(service, "parked", "release", "--reason", "collision", *settle, "a proxy answered")


def _in_doubt(scene: Scene) -> Steps:
    service = scene.service
    yield from started(service)
    victim: list[str] = []

    def lose(_: int, identifier: str) -> Wrong:
        if not victim:
            victim.append(identifier)
        return Fault.LOSE if identifier in victim else None

    scene.on.stripe.faults.plan = lose
    backlog(scene.topic, 400)
    while service.metrics().sum("tallyman_totals", state="delivered") < 399:
        yield 0.5
    # Not while it runs: for the moment until it had looked, this total would be late.
    yield from ended(service)
    service.clock.pass_time(34 * DAY)
    yield from started(service)
    yield from scene.until_cured()
    settle = "--despite-doubt", "--yes", "--wait", "0", "--why"
    told(service, "parked", "discard", "--reason", "in_doubt", *settle, "billed by hand")


# What Stripe has


def _rejected(scene: Scene) -> Steps:
    """Stripe rejects half of what it has taken."""
    service, stripe = scene.service, scene.on.stripe
    port = _listens(scene)
    stripe.model.lag = LAG_S
    yield from started(service)
    stripe.notify(Destination(f"http://127.0.0.1:{port}/stripe", WEBHOOK_SECRET))
    backlog(scene.topic, 400)
    while service.metrics().sum("tallyman_totals", state="delivered") < 400:
        yield 0.5
    for customer in range(0, 400, 2):
        stripe.model.delete_customer(f"cus_{customer}")
    stripe.clock.advance(LAG_S + 20)


def _forged(scene: Scene) -> Steps:
    """The secret of another destination."""
    service, stripe = scene.service, scene.on.stripe
    port = _listens(scene)
    stripe.model.lag = LAG_S
    yield from started(service)
    stripe.notify(Destination(f"http://127.0.0.1:{port}/stripe", "whsec_another"))
    backlog(scene.topic, 20)
    while service.metrics().sum("tallyman_totals", state="delivered") < 20:
        yield 0.5
    stripe.model.delete_customer("cus_3")
    stripe.clock.advance(LAG_S + 20)
    yield from scene.until_cured()
    service.environ["STRIPE_WEBHOOK_SECRET"] = f"{WEBHOOK_SECRET},whsec_another"
    yield from restarted(service)


# Processes, state and Kafka


def _restarts(scene: Scene) -> Steps:
    yield from started(scene.service)
    usage = Usage(scene.topic)
    for _ in range(5):
        yield from flowing(usage, seconds=5)
        scene.service.kill()
        yield from started(scene.service)
    yield from flowing(usage)


def _stage_away(scene: Scene) -> Steps:
    yield from started(scene.service)
    yield 3
    yield from ended(scene.service)
    yield from scene.until_cured()
    yield from started(scene.service)


def _kafka_away(scene: Scene) -> Steps:
    yield from started(scene.service)
    usage = Usage(scene.topic)
    yield from flowing(usage, seconds=10)
    kafka = scene.on.kafka
    if isinstance(kafka, LocalKafka):
        kafka.kill()
        yield from scene.until_cured()
        Thread(target=kafka.start, daemon=True).start()


def _restore_stuck(scene: Scene) -> Steps:
    """A transaction stays open on the state, and then somebody has to take a partition over."""
    one, other = scene.services
    yield from started(one, other)
    usage, theirs = Usage(scene.topic), list[int]()
    while len(theirs) != 1:
        usage.produce()
        yield 0.5
        theirs = [int(partition) for (partition,) in other.metrics().by("tallyman_lag_records", "partition")]
    hanging = _left_open(scene, f"tallyman-{one.config['pipeline']}-aggregate-state", theirs)
    other.kill()
    yield from flowing(Usage(scene.topic), end=scene.cured)
    hanging.abort_transaction(10.0)
    yield from flowing(Usage(scene.topic))


def _unscraped(scene: Scene) -> Steps:
    """Of two processes that count Prometheus knows one."""
    known, unknown = scene.services
    unknown.stages = frozenset({Stage.AGGREGATE})
    yield from started(known, unknown)
    yield 5
    backlog(scene.topic, 20)
    yield from scene.until_cured()
    yield from ended(unknown)


PLOTS: Final = (
    Plot("shop", _shop),
    Plot("scaled", _scaled, processes=2, kafka=True),
    Plot(
        "bad-events",
        _bad_events,
        ("DeadLetters", "DeadLetterJump", "FutureEvents", "DuplicatesJump", "UnkeyedRecords"),
    ),
    Plot("hanging-producer", _hanging_producer, ("LagGrowing", "FarBehind", "NoProgress")),
    Plot("clock", _clock, ("PartitionWaitsForClock",), arrival="log_append_time"),
    Plot("stripe-away", _stripe_away, ("StripeAway", "DeliveryLate", "DeliverySlow", "UsageNearsCutoff")),
    Plot("stripe-ill", _stripe_ill, ("StripeErrors",)),
    Plot("stripe-limits", _stripe_limits, ("StripeLimits",)),
    Plot("wrong-key", _wrong_key, ("DeliveryPaused",)),
    Plot("held", _held, ("DeliveryHeld",)),
    Plot("late", _late, ("DeliveredAfterGrace", "ReconcileDrift")),
    Plot("parked", _parked, ("ParkedTotals", "MeterStopped", "Collision", "CustomersFileRefused"), customers=True),
    Plot("in-doubt", _in_doubt, ("InDoubt", "ParkedPastCutoff", "ParkedUsageExpires", "ParkedUsageExpiresSoon")),
    Plot("rejected", _rejected, ("StripeRejects", "StripeRejectsJump")),
    Plot("forged", _forged, ("StripeReportsRefused",)),
    Plot("restarts", _restarts, ("Restarts",)),
    Plot("stage-away", _stage_away, ("StageAway",)),
    Plot("kafka-away", _kafka_away, ("KafkaAway",), alone=True),
    Plot("restore-stuck", _restore_stuck, ("RestoreStuck",), processes=2, kafka=True),
    Plot("unscraped", _unscraped, ("TotalsUnexplained",), processes=2, kafka=True, scraped=1),
)
"""All at once; the first two are those in which nothing is wrong."""


def _count(service: Service, name: str, event_type: str) -> None:
    """One more meter, that counts."""
    service.config["meters"] += [
        {"name": name, "event_types": [event_type], "aggregation": "count", "stripe": {"event_name": name}}
    ]


def _listens(scene: Scene) -> int:
    """Have it take notifications of Stripe's; returns the port."""
    port, _ = free_ports()
    scene.service.set(webhook={"host": "127.0.0.1", "port": port})
    scene.service.environ["STRIPE_WEBHOOK_SECRET"] = WEBHOOK_SECRET
    return port


def _left_open(scene: Scene, topic: str, partitions: Iterable[int]) -> Producer:
    """A producer whose transaction has a record on each of these partitions, and stays open for minutes."""
    producer = Producer(
        {
            "bootstrap.servers": scene.topic.kafka.bootstrap_servers,
            "transactional.id": f"hangs-{topic}",
            "transaction.timeout.ms": 600_000,
            "log_level": 0,
        }
    )
    producer.init_transactions(30.0)
    producer.begin_transaction()
    for partition in partitions:
        producer.produce(topic, b"{", key=b"k", partition=partition, timestamp=real_now())
    producer.flush(10.0)
    return producer
