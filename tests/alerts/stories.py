"""Pipelines at work on a real Kafka, each with another fault or with none, and the alerts that it should bring."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import Producer
from typer.testing import CliRunner

from consumer.cli import app
from consumer.sandbox.kafka import Kafka, LocalKafka, free_ports
from consumer.sandbox.stripe_notifications import Destination
from consumer.sandbox.stripe_server import Fault, Instead, Wrong
from consumer.storage import Append, Log, Stage
from consumer.totals import Compared, Comparison, encode
from tests.kafka.harness import (
    DAY,
    HOUR,
    MINUTE,
    TOKENS,
    Bench,
    Service,
    Topic,
    bench,
    event,
    iso,
    past_events,
    real_now,
    until,
)

Steps = Iterator[float]
"""What happens one thing after another; each gives how many seconds pass until the next one."""

SOON: Final = {"lateness": "0s", "settle": "0s"}
WEBHOOK_SECRET: Final = "whsec_stories"  # noqa: S105 - opens nothing
LAG_S: Final = 20


@dataclass
class Story:
    """One job of Prometheus."""

    name: str
    expected: frozenset[str]
    services: list[Service]
    steps: Steps
    at: float = field(default=0.0)
    """When its next step is due, by the monotonic clock."""


class Usage:
    """Usage of many customers, as it happens."""

    def __init__(self, topic: Topic, *, customers: int = 40) -> None:
        self._topic = topic
        self._producer = Producer({"bootstrap.servers": topic.kafka.bootstrap_servers, "linger.ms": 5, "log_level": 0})
        self._customers = customers
        self._last: list[bytes] = []

    def produce(self, *, key: bool = True, repeat: bool = False, **attributes: Any) -> None:
        """One event of each customer; ``repeat`` writes those of the last time once more."""
        new = [event(n + 0.25, customer=f"cus_{n}", **attributes) for n in range(self._customers)]
        for values in (new, self._last if repeat else ()):
            for n, value in enumerate(values):
                self._append(value, n, key=key)
        self._last = new
        self._producer.flush(10.0)

    def broken(self, values: list[bytes]) -> None:
        """Records that are no events."""
        for n, value in enumerate(values):
            self._append(value, n)
        self._producer.flush(10.0)

    def _append(self, value: bytes, n: int, *, key: bool = True) -> None:
        partition = n % self._topic.partitions
        name = b"%d" % n if key else None
        self._producer.produce(self._topic.name, value, key=name, partition=partition, timestamp=real_now())


def backlog(topic: Topic, customers: int, *, minutes: int = 6) -> None:
    """Totals that are due at once: usage of so long ago, of so many customers."""
    for partition in range(topic.partitions):
        used = {f"cus_{n}": n + 1 for n in range(partition, customers, topic.partitions)}
        past_events(topic, used, at=real_now() - minutes * MINUTE, partition=partition)


def flowing(usage: Usage, *, seconds: float = 1e9, **how: Any) -> Steps:
    """Usage for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        usage.produce(**how)
        yield 0.5


class Stories:
    """All of them at once; each has a stand-in for Stripe of its own."""

    def __init__(self, kafka: Kafka, away: LocalKafka | None, folder: Path) -> None:
        """``away``: the broker that goes away."""
        self._kafka = kafka
        self._away = away
        self._folder = folder
        self._running = ExitStack()
        self.stories: list[Story] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running.close()

    def all(self) -> None:
        """Those in which something goes wrong, and those in which nothing does."""
        self.add("shop", self._shop)
        self.add("scaled", self._scaled)
        self.add("stripe-away", self._stripe_away, "StripeAway", "DeliveryLate", "DeliverySlow", "UsageNearsCutoff")
        self.add("wrong-key", self._wrong_key, "DeliveryPaused")
        self.add(
            "bad-events",
            self._bad_events,
            *("DeadLetters", "DeadLetterJump", "FutureEvents", "DuplicatesJump", "UnkeyedRecords"),
        )
        self.add(
            "parked", self._parked, "ParkedTotals", "MeterStopped", "Collision", "CustomersFileRefused", customers=True
        )
        self.add(
            "in-doubt",
            self._in_doubt,
            *("InDoubt", "ParkedPastCutoff", "ParkedUsageExpires", "ParkedUsageExpiresSoon"),
        )
        self.add("late", self._late, "DeliveredAfterGrace", "ReconcileDrift")
        self.add("rejected", self._rejected, "StripeRejects")
        self.add("clock", self._clock, "PartitionWaitsForClock")
        self.add("restarts", self._restarts, "Restarts")
        self.add("held", self._held, "DeliveryHeld")
        if self._away is not None:
            self.add("kafka-away", self._kafka_away, "KafkaAway")

    def add(
        self, name: str, tell: Callable[[Bench, list[Service]], Steps], *expected: str, customers: bool = False
    ) -> None:
        """One more story; its processes are chosen here, and started by its first step."""
        folder = self._folder / name
        folder.mkdir(parents=True)
        kafka = self._away if name == "kafka-away" and self._away is not None else self._kafka
        on = self._running.enter_context(bench(kafka, folder))
        topic = Topic.create(kafka, 2, arrival="log_append_time" if name == "clock" else "create_time")
        services = [self._service(on, topic, name) for _ in range(2 if name == "scaled" else 1)]
        if customers:
            file = folder / "customers.yaml"
            file.write_text("".join(f"cus_{n}: cus_{n}\n" for n in range(200)))
            services[0].set(customers={"kind": "file", "path": str(file)})
        alerts = frozenset(f"Tallyman{each}" for each in expected)
        self.stories.append(Story(name, alerts, services, tell(on, services)))

    def _service(self, on: Bench, topic: Topic, name: str) -> Service:
        made = on.service(topic, windows=SOON, pipeline=f"{name}-{uuid.uuid4().hex[:8]}")
        made.set(bill_from=iso(real_now() // DAY * DAY - 20 * DAY))
        if name == "scaled":
            made.config["storage"] = {"kind": "kafka"}
            made.set(kafka={"options": made.config["kafka"]["options"] | {"session.timeout.ms": 6000}})
            on._services[0].config["pipeline"] = made.config["pipeline"]
        return made

    @property
    def targets(self) -> dict[str, list[str]]:
        """Where Prometheus finds them."""
        return {
            each.name: [f"127.0.0.1:{service.config['http']['port']}" for service in each.services]
            for each in self.stories
        }

    @property
    def expected(self) -> dict[str, set[str]]:
        """The alerts that should fire, by job."""
        return {each.name: set(each.expected) for each in self.stories if each.expected}

    def open(self) -> None:
        """Return once the first of them is there; the others begin under Prometheus' eyes."""
        first = self.stories[0]
        while not first.services[0].get("/metrics")[1]:
            time.sleep(next(first.steps))

    def go_on(self) -> None:
        """Do what is due."""
        for story in self.stories:
            if time.monotonic() >= story.at:
                story.at = time.monotonic() + next(story.steps, 1e9)

    # The stories

    def _shop(self, on: Bench, services: list[Service]) -> Steps:
        """All is well: some events are repeated, some late, some too exact for Stripe; and sums are compared."""
        service = services[0]
        service.config["meters"] += [
            {"name": "requests", "event_types": ["used"], "aggregation": "count", "stripe": {"event_name": "requests"}}
        ]
        on.stripe.model.add_meter("requests")
        yield from started(service)
        backlog(service.topic, 100)
        usage = Usage(service.topic)
        yield from flowing(usage, seconds=10)
        usage.produce(time=iso(real_now() - 3 * MINUTE), data={"n": 123456789.123456789})
        yield from flowing(usage, seconds=5)
        reconcile(service)
        yield from flowing(usage)

    def _scaled(self, _on: Bench, services: list[Service]) -> Steps:
        """All is well in two processes, one for each stage: only together do they balance."""
        services[0].stages, services[1].stages = frozenset({Stage.AGGREGATE}), frozenset({Stage.DELIVER})
        yield from started(*services)
        backlog(services[0].topic, 100)
        yield from flowing(Usage(services[0].topic))

    def _stripe_away(self, on: Bench, services: list[Service]) -> Steps:
        yield from started(services[0])
        on.stripe.down()
        backlog(services[0].topic, 60, minutes=45)

    def _wrong_key(self, on: Bench, services: list[Service]) -> Steps:
        yield from started(services[0])
        on.stripe.model.keys = {"sk_test_another": None}
        backlog(services[0].topic, 60)

    def _bad_events(self, _on: Bench, services: list[Service]) -> Steps:
        yield from started(services[0])
        usage = Usage(services[0].topic)
        yield from flowing(usage, seconds=35, key=False)
        for _ in flowing(usage, key=False, repeat=True):
            usage.broken([b"{"] * 10 + [event(1, at=real_now() + HOUR)])
            yield 0.5

    def _parked(self, on: Bench, services: list[Service]) -> Steps:
        service = services[0]
        service.config["meters"] += [
            {"name": "images", "event_types": ["drawn"], "aggregation": "count", "stripe": {"event_name": "images"}}
        ]
        images = on.stripe.model.add_meter("images")
        yield from started(service)
        error = {"type": "invalid_request_error", "message": "No such customer: 'cus_1'", "code": "resource_missing"}
        there = error | {"message": "An event already exists with identifier tm1.", "code": None}
        answers = {20 + n: Instead(400, json.dumps({"error": each}).encode()) for n, each in enumerate((error, there))}
        on.stripe.faults.plan = lambda number, _: answers.get(number)
        images.deactivated_at = int(time.time())
        at = real_now() - 6 * MINUTE
        others = event(at=at, customer="new"), event(at=at, customer="cus_7", type="drawn")
        service.topic.produce(*others, at=at)
        backlog(service.topic, 200)
        yield 5
        (self._folder / "parked" / "customers.yaml").write_text("cus_1: cu")

    def _in_doubt(self, on: Bench, services: list[Service]) -> Steps:
        service = services[0]
        yield from started(service)
        victim: list[str] = []

        def lose(_: int, identifier: str) -> Wrong:
            if not victim:
                victim.append(identifier)
            return Fault.LOSE if identifier in victim else None

        on.stripe.faults.plan = lose
        backlog(service.topic, 400)
        while service.metrics().sum("tallyman_totals", state="delivered") < 399:
            yield 0.5
        service.clock.pass_time(34 * DAY)
        yield 1e9

    def _late(self, _on: Bench, services: list[Service]) -> Steps:
        service = services[0]
        yield from started(service)
        yield 20
        backlog(service.topic, 20, minutes=120)
        yield 10
        day = real_now() // DAY * DAY // 1000
        found = Compared(real_now(), day - 86_400, day, equal=18, differs=2, missing="2")
        record = encode(Comparison(real_now(), {TOKENS: found}))
        with service.store() as store:
            store.append([Append(Log.TOTALS, b"comparison", record)])

    def _rejected(self, on: Bench, services: list[Service]) -> Steps:
        service = services[0]
        port, _ = free_ports()
        service.set(webhook={"host": "127.0.0.1", "port": port})
        service.environ["STRIPE_WEBHOOK_SECRET"] = WEBHOOK_SECRET
        on.stripe.model.lag = LAG_S
        yield from started(service)
        on.stripe.notify(Destination(f"http://127.0.0.1:{port}/stripe", WEBHOOK_SECRET))
        backlog(service.topic, 20)
        while service.metrics().sum("tallyman_totals", state="delivered") < 20:
            yield 0.5
        on.stripe.model.delete_customer("cus_3")
        on.stripe.clock.advance(LAG_S + 20)

    def _clock(self, _on: Bench, services: list[Service]) -> Steps:
        services[0].clock.jump(-6 * MINUTE)
        yield from started(services[0])
        services[0].topic.produce(event(1))

    def _restarts(self, _on: Bench, services: list[Service]) -> Steps:
        yield from started(services[0])
        usage = Usage(services[0].topic)
        for _ in range(5):
            yield from flowing(usage, seconds=5)
            services[0].kill()
            yield from started(services[0])
        yield from flowing(usage)

    def _held(self, _on: Bench, services: list[Service]) -> Steps:
        services[0].set(stripe={"mode": "hold"})
        yield from started(services[0])
        backlog(services[0].topic, 20, minutes=45)

    def _kafka_away(self, on: Bench, services: list[Service]) -> Steps:
        yield from started(services[0])
        usage = Usage(services[0].topic)
        yield from flowing(usage, seconds=10)
        if isinstance(on.kafka, LocalKafka):
            on.kafka.kill()


def started(*services: Service) -> Steps:
    """Start them, and wait without holding up the others."""
    before = [each.log().count('"started"') for each in services]
    for each in services:
        each.spawn()
    for each, said in zip(services, before, strict=True):
        while each.log().count('"started"') <= said:
            assert each.running, each.log()[-3000:]
            yield 0.1


def reconcile(service: Service) -> None:
    """Compare what was delivered with what Stripe has, as an operator does."""
    done = CliRunner().invoke(app, ["reconcile", "-c", str(service.folder / "tallyman.yaml")], env=service.environ)
    assert done.exit_code == 0, done.output


def run_until(stories: Stories, holds: Callable[[], object], what: str, *, within: float) -> None:
    """Go on until it holds."""

    def checked() -> object:
        stories.go_on()
        return holds()

    until(checked, what, within=within)
