"""What is done to the service and to Kafka, and when: stories that go on as soon as what they wait for has come."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from consumer.sandbox.kafka import Kafka, LocalKafka, Node
from consumer.sandbox.kafka_cluster import LocalCluster
from consumer.storage import Stage
from tests.chaos.observer import Observer
from tests.chaos.workers import BOTH, ONLY, STOP_WITHIN_S, Fleet, Worker, failed_commits

PATIENCE_S = 120.0
"""What a story waits for has to come within this time."""
AIM_S = 10.0
"""For how long a story tries to catch a worker in the middle of a commit."""
AWAKE_WITHIN_S = 10.0
"""A commit that stands still for longer is given up by the worker itself or by the broker: nobody refuses it."""
TOLD_WITHIN_S = 15.0
"""What has become of it is known by then."""

ON_THE_WAY_S = 0.2
"""What a worker had sent before it was suspended is with the broker by then."""
DELIVER_TOO = 0.3
"""Of the faults that come while events are counted: those that are about stage 2."""

Story = Generator[Callable[[], bool], None, None]


class Kind(StrEnum):
    """A fault."""

    KILL = "kill"
    ZOMBIE = "zombie"
    ZOMBIE_IN_COMMIT = "zombie in commit"
    ROLL = "rolling restart"
    ADD = "add worker"
    REMOVE = "remove worker"
    BROKER_KILL = "broker killed"
    BROKER_STOP = "broker restarted"
    BROKER_SUSPEND = "broker suspended"
    LEADERS = "leaders moved"


WORKERS = (
    *(Kind.KILL, Kind.ZOMBIE_IN_COMMIT, Kind.ADD, Kind.ZOMBIE, Kind.KILL, Kind.ROLL, Kind.ZOMBIE_IN_COMMIT),
    *(Kind.REMOVE, Kind.KILL),
)
ONE_BROKER = (Kind.BROKER_KILL, Kind.BROKER_STOP, Kind.BROKER_SUSPEND)
BROKERS = (*ONE_BROKER, Kind.LEADERS)


def possible(kafka: Kafka) -> tuple[Kind, ...]:
    """What can be done where this Kafka is: to the brokers only what is ours."""
    if isinstance(kafka, LocalCluster):
        return WORKERS + BROKERS
    return WORKERS + ONE_BROKER if isinstance(kafka, LocalKafka) else WORKERS


@dataclass(frozen=True)
class Plan:
    """Faults in their order, each with the stage that it is about where it is about one."""

    counting: Sequence[tuple[Kind, Stage]]
    """While events are counted."""
    sending: Sequence[tuple[Kind, Stage]]
    """While the last totals are sent."""


def drawn(kinds: Sequence[Kind], number: int, chance: random.Random) -> Plan:
    """So many faults in a random order: each kind comes as often as in the sequence, or once more."""
    order: list[Kind] = []
    while len(order) < number:
        order += chance.sample(kinds, len(kinds))
    counting = (number + 1) // 2
    return Plan(
        [(kind, Stage.DELIVER if chance.random() < DELIVER_TOO else Stage.AGGREGATE) for kind in order[:counting]],
        [(kind, Stage.DELIVER) for kind in order[counting:number]],
    )


@dataclass
class _Running:
    name: str
    story: Story
    waiting: Callable[[], bool]
    since: float


class Faults:
    """Tells the stories, any number at a time; ``turn`` is called again and again."""

    def __init__(
        self, kafka: Kafka, fleet: Fleet, observer: Observer, chance: random.Random, say: Callable[[str], None]
    ) -> None:
        self.done: Counter[str] = Counter()
        """Faults that have happened, by kind, as they came out."""
        self.about_to_aim = 0
        """Stories that are going to catch a worker in the middle of a commit: something has to be left to commit."""
        self.aiming = False
        """Whether one of them is at it: commits have to go on."""
        self._kafka = kafka
        self._fleet = fleet
        self._observer = observer
        self._chance = chance
        self._say = say
        self._running: list[_Running] = []
        self._brokers_busy = False

    def __len__(self) -> int:
        """How many are going on."""
        return len(self._running)

    def begin(self, kind: Kind, stage: Stage) -> None:
        """One more; ``stage`` is the one that is at work now."""
        story = {
            Kind.KILL: lambda: self._kill(stage),
            Kind.ZOMBIE: lambda: self._zombie(stage),
            Kind.ZOMBIE_IN_COMMIT: lambda: self._zombie_in_commit(stage),
            Kind.ROLL: self._roll,
            Kind.ADD: self._add,
            Kind.REMOVE: self._remove,
            Kind.BROKER_KILL: lambda: self._broker(kind),
            Kind.BROKER_STOP: lambda: self._broker(kind),
            Kind.BROKER_SUSPEND: lambda: self._broker(kind),
            Kind.LEADERS: self._leaders,
        }[kind]()
        running = _Running(f"{kind} ({stage})", story, lambda: True, time.monotonic())
        self._running.append(running)
        self._go_on(running)

    def turn(self) -> None:
        """Go on with those whose time has come. Raises where one waits in vain, or a worker has ended by itself."""
        self._fleet.look()
        for each in list(self._running):
            self._go_on(each)

    def _go_on(self, running: _Running) -> None:
        try:
            while running.waiting():
                running.waiting = next(running.story)
                running.since = time.monotonic()
        except StopIteration:
            self._running.remove(running)
            return
        if time.monotonic() - running.since > PATIENCE_S:
            raise TimeoutError(f"{running.name}: what it waits for has not come for {PATIENCE_S:.0f} s")

    # The stories

    def _kill(self, stage: Stage) -> Story:
        worker = yield from self._chosen(stage)
        worker.kill()
        self._note(Kind.KILL, worker)
        yield self._after(0.0, 5.0)
        worker.start()
        yield from self._at_work(worker)

    def _zombie(self, stage: Stage) -> Story:
        worker = yield from self._chosen(stage, others=1)
        worker.suspend()
        self._note(Kind.ZOMBIE, worker)
        began = time.monotonic()
        yield lambda: self._observer.taken_over(stage, worker.name)
        taken = time.monotonic() - began
        yield self._after(0.0, 12.0)
        worker.resume()
        self._say(f"  {worker} wakes after {time.monotonic() - began:.1f} s; others took over after {taken:.1f} s")
        yield lambda: bool(self._observer.owned(stage).get(worker.name))
        worker.busy = False

    def _zombie_in_commit(self, stage: Stage) -> Story:
        self.about_to_aim += 1
        worker = yield from self._chosen(stage, others=1)
        yield lambda: bool(self._observer.owned(stage).get(worker.name))
        self.about_to_aim, self.aiming = self.about_to_aim - 1, True
        caught = self._caught(worker, stage)
        self.aiming = False
        if not caught:
            self._note(f"{Kind.ZOMBIE_IN_COMMIT}, missed", worker)
            worker.busy = False
            return
        began = time.monotonic()
        before = failed_commits(worker)
        self._note(Kind.ZOMBIE_IN_COMMIT, worker)
        yield lambda: self._observer.expelled(stage, worker.name) or time.monotonic() - began > AWAKE_WITHIN_S
        worker.resume()
        woken = time.monotonic()
        yield lambda: bool(failed_commits(worker) - before) or time.monotonic() - woken > TOLD_WITHIN_S
        failed = failed_commits(worker) - before
        told = ", ".join(f"{each}: {how}" for each, how in failed) or "no commit of it failed"
        self._say(f"  {worker} woke in its commit after {woken - began:.1f} s; {told}")
        worker.metrics()
        worker.busy = False

    def _roll(self) -> Story:
        self._note(Kind.ROLL, None)
        for worker in list(self._fleet.workers):
            yield lambda worker=worker: not worker.busy or worker in self._fleet.removed  # type: ignore[misc]
            if not worker.running or worker not in self._fleet.workers:
                continue
            worker.busy = True
            yield from self._stopped(worker)
            worker.start()
            yield from self._at_work(worker)

    def _add(self) -> Story:
        stages = self._chance.choice([BOTH, *ONLY.values()])
        yield from self._added(stages, Kind.ADD)

    def _remove(self) -> Story:
        def spare() -> list[Worker]:
            # Two of each stage stay: one that becomes a zombie, and one that takes over.
            others = {w: [stage for o in self._fleet.workers if o is not w for stage in o.stages] for w in idle()}
            return [w for w, stages in others.items() if all(stages.count(stage) > 1 for stage in Stage)]

        idle = self._fleet.idle
        if not any(spare()):
            yield from self._added(BOTH, "worker added that another can be spared")
        yield lambda: bool(spare())
        worker = self._chance.choice(spare())
        worker.busy = True
        self._note(Kind.REMOVE, worker)
        yield from self._stopped(worker)
        self._fleet.remove(worker)

    def _broker(self, kind: Kind) -> Story:
        kafka = self._kafka
        yield from self._brokers_free()
        if isinstance(kafka, LocalCluster):
            number = self._chance.choice(sorted(kafka.nodes))
            broker: LocalKafka | Node = kafka.nodes[number]
        elif isinstance(kafka, LocalKafka):
            number, broker = 1, kafka
        self._note(kind, None, f"broker {number}")
        ends = {Kind.BROKER_KILL: broker.kill, Kind.BROKER_STOP: broker.stop, Kind.BROKER_SUSPEND: broker.suspend}
        self._fleet.disturbed()
        ends[kind]()
        yield self._after(1.0, 8.0)
        (broker.resume if kind is Kind.BROKER_SUSPEND else broker.start)()
        yield from self._whole()

    def _leaders(self) -> Story:
        yield from self._brokers_free()
        if isinstance(self._kafka, LocalCluster):
            self._note(Kind.LEADERS, None, f"{self._kafka.balance()} leaders")
        yield from self._whole()

    # What they have in common

    def _chosen(self, stage: Stage, others: int = 0) -> Generator[Callable[[], bool], None, Worker]:
        """A worker of this stage, taken as soon as one is idle and so many others are too."""
        yield lambda: len(self._fleet.idle(stage)) > others
        worker = self._chance.choice(self._fleet.idle(stage))
        worker.busy = True
        return worker

    def _added(self, stages: frozenset[Stage], why: str) -> Story:
        worker = self._fleet.add(stages)
        worker.busy = True
        self._note(why, worker)
        yield from self._at_work(worker)

    def _at_work(self, worker: Worker) -> Story:
        yield lambda: worker.metrics() is not None
        worker.busy = False

    def _stopped(self, worker: Worker) -> Story:
        # One that gave up its start has been started again a moment ago: it would not hear the signal yet.
        yield lambda: worker.metrics() is not None
        worker.terminate()
        began = time.monotonic()
        yield lambda: worker.ended or time.monotonic() - began > STOP_WITHIN_S
        worker.bury()

    def _caught(self, worker: Worker, stage: Stage) -> bool:
        """Suspend it when a commit has begun of which the group has not heard yet."""
        owned = self._observer.owned(stage).get(worker.name, set())
        until = time.monotonic() + AIM_S
        with self._observer.commits(stage, owned) as first_record:
            while time.monotonic() < until:
                partition = first_record(1.0)
                if partition is None:
                    continue
                worker.suspend()
                time.sleep(ON_THE_WAY_S)
                if self._observer.undecided(stage, partition) and not self._observer.offsets_wait(stage, partition):
                    return True
                worker.resume()
        return False

    def _brokers_free(self) -> Story:
        yield lambda: not self._brokers_busy
        self._brokers_busy = True

    def _whole(self) -> Story:
        kafka = self._kafka
        yield kafka.whole if isinstance(kafka, LocalCluster) else kafka.answers
        self._brokers_busy = False

    def _after(self, least_s: float, most_s: float) -> Callable[[], bool]:
        due = time.monotonic() + self._chance.uniform(least_s, most_s)
        return lambda: time.monotonic() >= due

    def _note(self, kind: str, worker: Worker | None, what: str = "") -> None:
        self.done[kind] += 1
        self._say(f"fault {self.done.total()}: {kind} {worker or what}")
