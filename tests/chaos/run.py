"""One run of chaos: what is produced, what is done to the service meanwhile, and what is compared at the end."""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consumer.config import load
from consumer.sandbox import traffic
from consumer.sandbox.kafka import Kafka
from consumer.sandbox.traffic import MINUTE_MS, Traffic, tombstones
from consumer.storage import Log, Stage
from tests.chaos.faults import AIM_S, Faults, Kind, Plan
from tests.chaos.observer import Observer
from tests.chaos.workers import BOTH, ONLY, Failed, Fleet, failed_commits, tracebacks
from tests.exactness.checks import NotExactError, Produced, Verdict, compare
from tests.exactness.left import InKafka
from tests.exactness.run import AGO_MS
from tests.exactness.scenario import Load
from tests.exactness.world import PATIENCE_S, Production, StandIn, answers, ask, configuration, wait_until

ROLES = (BOTH, *ONLY.values(), BOTH)
"""What the workers do, in turn."""

COUNTING_S = 90.0
"""Events are counted, and windows closed, at least so often: longer than any fault may hold up everything."""


@dataclass(frozen=True, kw_only=True)
class Scenario(Load):
    """One run."""

    workers: int
    partitions: int
    max_rate: int
    """Requests a second that each worker may send."""


@dataclass(frozen=True)
class Report:
    """What happened in a run in which everything agreed."""

    seconds: float
    counting_seconds: float
    totals: int
    faults: Counter[str]
    given_up: int
    """Starts, while a broker was away."""
    failed_commits: Failed
    """As the logs have them."""
    counted_as_failed: Failed
    """As the metrics have them, as far as somebody looked before the process ended."""
    answers: Counter[str]
    peak_rss_mb: float
    verdict: Verdict

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"  agrees   {each}" for each in self.verdict.compared),
            f"  duration {self.seconds:.0f} s, of which events came for {self.counting_seconds:.0f} s",
            *(f"  faults   {count:>8} {kind}" for kind, count in self.faults.items()),
            *(f"  commits  {count:>8} of stage {stage} {how}" for (stage, how), count in self.failed_commits.items()),
            *(
                f"  metrics  {count:>8} of stage {stage} {how}"
                for (stage, how), count in self.counted_as_failed.items()
            ),
            f"  starts   {self.given_up:>8} given up while a broker was away, and made again",
            f"  totals   {self.totals}",
            *(f"  Stripe   {count:>8} {answer}" for answer, count in self.answers.items()),
            f"  memory   {self.peak_rss_mb:.0f} MB at most in any of the workers' processes",
        ]


def prove(kafka: Kafka, scenario: Scenario, plan: Plan, folder: Path, say: Callable[[str], None]) -> Report:
    """Run it, and compare everything. Raises ``NotExactError``, or what went wrong before; the folder has the logs."""
    began = time.monotonic()
    topic, pipeline = f"chaos-{uuid.uuid4().hex[:12]}", f"chaos-{uuid.uuid4().hex[:8]}"
    kafka.create_topic(topic, scenario.partitions, "create_time")
    first_ms = time.time_ns() // 10**6 - AGO_MS
    made = Traffic(scenario.mix, seed=scenario.seed, partitions=scenario.partitions)
    with (
        StandIn(seed=scenario.seed, burst=scenario.burst) as stripe,
        Fleet(folder, _config(kafka, scenario, topic, pipeline, stripe.url, first_ms)) as fleet,
        closing(Observer(kafka, topic, pipeline, scenario.partitions)) as observer,
    ):
        for number in range(scenario.workers):
            fleet.add(ROLES[number % len(ROLES)])
        faults = Faults(kafka, fleet, observer, random.Random(scenario.seed), say)  # noqa: S311 - reproducible
        run = _Run(scenario, made, fleet, observer, faults, stripe, say)
        run.counting(plan.counting, kafka, topic, first_ms)
        counting_seconds = time.monotonic() - began
        run.sending(plan.sending)
        run.finishing()
        say("all is finished")
        fleet.stop()
        seconds = time.monotonic() - began
        verdict = _judged(kafka, made, fleet, scenario, stripe.url)
        if faults.done[Kind.ZOMBIE_IN_COMMIT]:
            _check_refused(verdict, fleet)
        stats = ask(stripe.url, "stats")
    return Report(
        seconds=seconds,
        counting_seconds=counting_seconds,
        totals=run.totals,
        faults=faults.done,
        given_up=fleet.given_up,
        failed_commits=sum(map(failed_commits, fleet.all), Failed()),
        counted_as_failed=fleet.failed_commits,
        answers=answers(stats),
        peak_rss_mb=fleet.peak_rss_mb,
        verdict=verdict,
    )


class _Run:
    """The phases of a run."""

    def __init__(  # noqa: PLR0917 - each of them once
        self,
        scenario: Scenario,
        made: Traffic,
        fleet: Fleet,
        observer: Observer,
        faults: Faults,
        stripe: StandIn,
        say: Callable[[str], None],
    ) -> None:
        self._scenario = scenario
        self._made = made
        self._fleet = fleet
        self._observer = observer
        self._faults = faults
        self._stripe = stripe
        self._say = say
        self._allowed = 0.0
        self.totals = 0
        """Made by stage 1, as of the last look."""

    def counting(self, plan: Sequence[tuple[Kind, Stage]], kafka: Kafka, topic: str, first_ms: int) -> None:
        """Produce everything, while workers count it and faults come."""
        scenario, observer = self._scenario, self._observer
        step = scenario.events / (len(plan) + 1)
        # However slow the service is, there has to be something left to count after each fault.
        self._allowed = 1.9 * step
        production = Production(
            kafka.bootstrap_servers,
            topic,
            self._made.messages(scenario.events, start_ms=first_ms, duration_ms=scenario.minutes * MINUTE_MS),
            scenario.rate,
            self._may_be_produced,
        )
        for number, (kind, stage) in enumerate(plan, 1):
            self._until(lambda: observer.consumed >= step * number, lambda: observer.consumed, "counting")  # noqa: B023
            self._say(f"{observer.consumed} events counted, {self._stripe.accepted} Meter Events taken")
            self._allowed = (number + 1.9) * step if number < len(plan) else scenario.events
            self._faults.begin(kind, stage)
        self._until(production.done, lambda: production.sent, "producing")
        traffic.produce(kafka.bootstrap_servers, topic, tombstones(scenario.partitions, time.time_ns() // 10**6))
        self._say(f"all {scenario.events} events are produced; {self._stripe.accepted} Meter Events taken")

    def _may_be_produced(self) -> float:
        events = self._scenario.events
        if self._faults.aiming:
            return events
        return min(self._allowed, events - AIM_S * self._scenario.rate) if self._faults.about_to_aim else self._allowed

    def sending(self, plan: Sequence[tuple[Kind, Stage]]) -> None:
        """Faults while the rest is sent."""
        had, at_least = self._stripe.accepted, len(self._made.expected.by_window())
        for number, (kind, stage) in enumerate(plan, 1):
            due = had + (at_least - had) * number // (len(plan) + 1)
            self._until(lambda: self._stripe.accepted >= due, lambda: self._stripe.accepted, "sending", PATIENCE_S)  # noqa: B023
            self._say(f"{self._stripe.accepted} Meter Events taken")
            self._faults.begin(kind, stage)

    def finishing(self) -> None:
        """Wait until no fault is going on, and nothing is open or pending."""
        self._until(lambda: not len(self._faults), lambda: len(self._faults), "faults")
        for each in self._fleet.workers:
            if each.ended:
                each.start()
        records = self._scenario.events + self._scenario.partitions

        def unfinished() -> int:
            seen = self._fleet.scrape()
            unread = records - sum(each.consumed for each in seen)
            return abs(unread) + sum(each.open for each in seen)

        self._until(lambda: not unfinished(), unfinished, "closing windows")
        with self._observer.counting(Log.TOTALS) as made, self._observer.counting(Log.OUTCOMES) as finished:
            self._until(lambda: finished() >= made(), lambda: (finished(), made()), "delivering", PATIENCE_S)
            self.totals = made()

    def _until(
        self, reached: Callable[[], bool], progress: Callable[[], object], what: str, patience_s: float = COUNTING_S
    ) -> None:
        """Tell the faults' stories until it is reached; raise where nothing has progressed for so long."""
        wait_until(reached, progress, what, patience_s=patience_s, meanwhile=self._faults.turn)


def _config(  # noqa: PLR0917 - each of them once
    kafka: Kafka, scenario: Scenario, topic: str, pipeline: str, stripe: str, first_ms: int
) -> Mapping[str, Any]:
    options = {"session.timeout.ms": 6_000, "heartbeat.interval.ms": 1_500, "reconnect.backoff.max.ms": 1_000}
    config = configuration(
        pipeline,
        kafka=kafka.bootstrap_servers,
        topic=topic,
        stripe=stripe,
        max_rate=scenario.max_rate,
        first_arrival_ms=first_ms,
    )
    return config | {"kafka": config["kafka"] | {"options": options}, "storage": {"kind": "kafka"}}


def _judged(kafka: Kafka, made: Traffic, fleet: Fleet, scenario: Scenario, stripe: str) -> Verdict:
    """Everything compared: what Stripe bills, what the store has kept, and what the workers have said."""
    worker = fleet.all[0]
    config = load(worker.config_file, worker.environment)
    wrong = [each for worker in fleet.all for each in tracebacks(worker)]
    try:
        with InKafka.open({"bootstrap.servers": kafka.bootstrap_servers}, config.pipeline) as left:
            verdict = compare(Produced(made.expected, scenario.partitions, scenario.partitions), config, left, stripe)
    except NotExactError as failed:
        wrong.insert(0, str(failed))
    if wrong:
        raise NotExactError("\n".join(wrong))
    return verdict


def _check_refused(verdict: Verdict, fleet: Fleet) -> None:
    """Of the commits that zombies went on with, at least one was seen to be refused. Raises ``NotExactError``."""
    for where, failed in (("logs", sum(map(failed_commits, fleet.all), Failed())), ("metrics", fleet.failed_commits)):
        refused = sum(count for (_, how), count in failed.items() if how == "refused")
        if not refused:
            raise NotExactError(f"a worker woke in the middle of its commit, but the {where} tell of none refused")
        verdict.compared.append(f"commits that were refused, by the {where}: {refused}")
