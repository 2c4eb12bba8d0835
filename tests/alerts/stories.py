"""Pipelines at work on a real Kafka, each with another fault or with none, and the alerts that it should bring."""

from __future__ import annotations

import math
import os
import signal
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
from consumer.sandbox.kafka import Arrival, Kafka, LocalKafka
from tests.kafka.harness import (
    DAY,
    MINUTE,
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


@dataclass(frozen=True)
class Scene:
    """Where a story happens."""

    on: Bench
    services: list[Service]
    cured: Callable[[], bool]
    """Whether it is time to do what the runbook says."""

    @property
    def service(self) -> Service:
        """The first of its processes, or the only one."""
        return self.services[0]

    @property
    def topic(self) -> Topic:
        """Where they read."""
        return self.service.topic

    def until_cured(self) -> Steps:
        """Leave it as it is."""
        while not self.cured():
            yield 0.2


@dataclass(frozen=True)
class Plot:
    """What goes wrong, which alerts that brings, and what cures it."""

    name: str
    tell: Callable[[Scene], Steps]
    expected: tuple[str, ...] = ()
    """Alerts, without what their names begin with."""
    processes: int = 1
    kafka: bool = False
    """Where state is kept: in Kafka, or in a file."""
    arrival: Arrival = "create_time"
    customers: bool = False
    """Whether a file names them."""
    alone: bool = False
    """Whether it has a Kafka of its own."""
    scraped: int | None = None
    """How many of the processes Prometheus knows; None: all."""


@dataclass
class Story:
    """One job of Prometheus."""

    plot: Plot
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


def flowing(usage: Usage, *, seconds: float = 1e9, end: Callable[[], bool] = lambda: False, **how: Any) -> Steps:
    """Usage for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not end():
        usage.produce(**how)
        yield 0.5


class Stories:
    """All of them at once; each has a stand-in for Stripe of its own."""

    def __init__(self, kafka: Kafka, away: LocalKafka | None, folder: Path) -> None:
        """``away``: the broker of those that have one of their own; without it they are left out."""
        self._kafka = kafka
        self._away = away
        self._folder = folder
        self._running = ExitStack()
        self._cured = False
        self.stories: list[Story] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._running.close()

    def add(self, plot: Plot) -> None:
        """One more story; its processes are started by its first step."""
        kafka = self._away if plot.alone else self._kafka
        if kafka is None:
            return
        folder = self._folder / plot.name
        folder.mkdir(parents=True)
        on = self._running.enter_context(bench(kafka, folder))
        topic = Topic.create(kafka, 2, arrival=plot.arrival)
        pipeline = f"{plot.name}-{uuid.uuid4().hex[:8]}"
        services = [self._service(on, topic, plot, pipeline) for _ in range(plot.processes)]
        scene = Scene(on, services, lambda: self._cured)
        self.stories.append(Story(plot, services, plot.tell(scene)))

    def _service(self, on: Bench, topic: Topic, plot: Plot, pipeline: str) -> Service:
        made = on.service(topic, windows=SOON, pipeline=pipeline)
        made.set(bill_from=iso(real_now() // DAY * DAY - 20 * DAY))
        if plot.kafka:
            made.config["storage"] = {"kind": "kafka"}
            made.set(kafka={"options": made.config["kafka"]["options"] | {"session.timeout.ms": 6000}})
        if plot.customers:
            made.set(customers={"kind": "file", "path": str(customers_file(made))})
            write_customers(made)
        return made

    @property
    def targets(self) -> dict[str, list[str]]:
        """Where Prometheus finds them."""
        return {
            each.plot.name: [f"127.0.0.1:{s.config['http']['port']}" for s in each.services[: each.plot.scraped]]
            for each in self.stories
        }

    @property
    def expected(self) -> dict[str, set[str]]:
        """The alerts that should fire, by job."""
        return {
            each.plot.name: {f"Tallyman{name}" for name in each.plot.expected}
            for each in self.stories
            if each.plot.expected
        }

    def open(self) -> None:
        """Return once the first of them is there; the others begin under Prometheus' eyes."""
        first = self.stories[0]
        while not first.services[0].get("/metrics")[1]:
            time.sleep(next(first.steps))

    def cure(self) -> None:
        """From now on they do what the runbook says."""
        self._cured = True

    def end(self) -> None:
        """Kill all processes."""
        for story in self.stories:
            story.at = math.inf
            for service in story.services:
                service.kill()

    def go_on(self) -> None:
        """Do what is due."""
        for story in self.stories:
            if time.monotonic() >= story.at:
                story.at = time.monotonic() + next(story.steps, 1e9)


def customers_file(service: Service) -> Path:
    """Where it reads who its customers are at Stripe."""
    return service.folder / "customers.yaml"


def write_customers(service: Service, *others: str) -> None:
    """Write that file anew, as an operator should: in one step."""
    names = {f"cus_{n}": f"cus_{n}" for n in range(200)} | {name: f"cus_{name}" for name in others}
    new = customers_file(service).with_suffix(".new")
    new.write_text("".join(f"{name}: {customer}\n" for name, customer in names.items()))
    new.replace(customers_file(service))


def started(*services: Service) -> Steps:
    """Start them, and wait without holding up the others."""
    before = [each.log().count('"started"') for each in services]
    for each in services:
        each.spawn()
    for each, said in zip(services, before, strict=True):
        while each.log().count('"started"') <= said:
            assert each.running, each.log()[-3000:]
            yield 0.1


def restarted(service: Service) -> Steps:
    """Stop it and start it again, with what was changed meanwhile; the others go on."""
    yield from ended(service)
    yield from started(service)


def ended(service: Service) -> Steps:
    """Stop it in good order."""
    os.kill(service.pid, signal.SIGTERM)
    while service.running:
        yield 0.1
    service.stop()


def told(service: Service, *command: str) -> str:
    """What a command of an operator's says, which has to succeed."""
    done = CliRunner().invoke(app, [*command, "-c", str(service.folder / "tallyman.yaml")], env=service.environ)
    assert done.exit_code == 0, f"{command}: {done.output}"
    return done.output


def run_until(stories: Stories, holds: Callable[[], object], what: str, *, within: float) -> None:
    """Go on until it holds."""

    def checked() -> object:
        stories.go_on()
        return holds()

    until(checked, what, within=within)
