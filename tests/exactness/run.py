"""Is every event billed once? A service that is killed again and again, on a real Kafka, against a Stripe that fails.

    python -m tests.exactness.run --events 1000000 --kills 20 --seed 1

Half of the kills hit stage 1 while it counts, the other half stage 2 while it sends; both are triggered by progress,
not by time. The same arguments make the same traffic; the faults are drawn from the seed too, but fall on whichever
requests come, so that no two runs are alike. Ends with 0 if everything agrees.
"""

from __future__ import annotations

import random
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from consumer.sandbox import traffic
from consumer.sandbox.kafka import Kafka
from consumer.sandbox.traffic import MINUTE_MS, Counts, Message, Traffic, tombstones
from tests.exactness.checks import Produced, Verdict, judge
from tests.exactness.scenario import Load, options, scenario, stamped
from tests.exactness.world import Metrics, Production, Service, StandIn, answers, ask, wait_until
from tests.kafka.cluster import running_kafka

PARTITIONS = 4
AGO_MS = 180 * MINUTE_MS
"""The traffic is dated so long ago that nobody has to wait for its windows to close."""


@dataclass(frozen=True, kw_only=True)
class Scenario(Load):
    """One run."""

    kills: int
    """Spread evenly over both stages' progress."""


@dataclass(frozen=True)
class Report:
    """What happened in a run in which everything agreed."""

    seconds: float
    counting_seconds: float
    bytes_per_event: float
    counts: Counts
    kills: tuple[int, int]
    """While stage 1 had records to count, and while stage 2 had totals to send."""
    totals: int
    answers: Counter[str]
    peak_rss_mb: float
    verdict: Verdict

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"  agrees   {each}" for each in self.verdict.compared),
            f"  duration {self.seconds:.0f} s, of which stage 1 was reading {self.counting_seconds:.0f} s",
            f"  events   of {self.bytes_per_event:.0f} bytes on average, headers included",
            f"  repeated {self._share(self.counts.duplicates)} of them",
            f"  late     {self._share(self.counts.late)}",
            f"  broken   {self._share(self.counts.malformed)}",
            f"  kills    {self.kills[0]} while counting, {self.kills[1]} while sending",
            f"  totals   {self.totals}",
            *(f"  Stripe   {count:>8} {answer}" for answer, count in self.answers.items()),
            f"  memory   {self.peak_rss_mb:.0f} MB at most in any of the service's processes",
        ]

    def _share(self, events: int) -> str:
        return f"{events / self.counts.produced:.2%}"


def prove(kafka: Kafka, scenario: Scenario, folder: Path, say: Callable[[str], None]) -> Report:
    """Run it, and compare everything. Raises ``NotExactError``, or what a process that failed says."""
    began = time.monotonic()
    topic = f"exactness-{uuid.uuid4().hex[:12]}"
    kafka.create_topic(topic, PARTITIONS, "create_time")
    now_ms = time.time_ns() // 10**6
    first_ms = now_ms - AGO_MS
    made = Traffic(scenario.mix, seed=scenario.seed, partitions=PARTITIONS)
    size = 0

    def measured() -> Iterator[Message]:
        nonlocal size
        for each in made.messages(scenario.events, start_ms=first_ms, duration_ms=scenario.minutes * MINUTE_MS):
            size += len(each.value or b"") + sum(len(name) + len(value) for name, value in each.headers)
            yield each

    with (
        StandIn(seed=scenario.seed, burst=scenario.burst) as stripe,
        Service(
            folder, kafka=kafka.bootstrap_servers, topic=topic, stripe=stripe.url, first_arrival_ms=first_ms
        ) as service,
    ):
        watch = Watch(service, stripe, random.Random(scenario.seed), say)  # noqa: S311 - reproducible
        counting = scenario.kills // 2
        step = scenario.events / (counting + 1)

        def allowed() -> float:
            # However slow the service is, there has to be something left to count after each of its kills.
            return scenario.events if service.kills >= counting else (service.kills + 1.9) * step

        production = Production(kafka.bootstrap_servers, topic, measured(), scenario.rate, allowed)
        for number in range(1, counting + 1):
            watch.kill_when_consumed(int(step * number))
        wait_until(production.done, lambda: production.sent, "producing")
        ended = tombstones(PARTITIONS, time.time_ns() // 10**6)
        traffic.produce(kafka.bootstrap_servers, topic, ended)
        counting_seconds = time.monotonic() - began
        say(f"all {scenario.events} events are produced; Stripe has taken {stripe.accepted} Meter Events")

        sending = scenario.kills - counting
        had, at_least = stripe.accepted, len(made.expected.by_window())
        for number in range(1, sending + 1):
            watch.kill_when_accepted(had + (at_least - had) * number // (sending + 1))
        watch.until_finished(scenario.events + PARTITIONS)
        say("the service says that all is finished")
        service.stop()
        seconds = time.monotonic() - began
        verdict = judge(Produced(made.expected, PARTITIONS, PARTITIONS), service, stripe.url)
        stats = ask(stripe.url, "stats")
    return Report(
        seconds=seconds,
        counting_seconds=counting_seconds,
        bytes_per_event=size / scenario.events,
        counts=made.expected.counts,
        kills=(sum(at < scenario.events for at in watch.consumed), sum(at < watch.totals for at in watch.accepted)),
        totals=watch.totals,
        answers=answers(stats),
        peak_rss_mb=service.peak_rss_kb / 1024,
        verdict=verdict,
    )


class Watch:
    """Waits for progress, and kills."""

    def __init__(self, service: Service, stripe: StandIn, chance: random.Random, say: Callable[[str], None]) -> None:
        self._service = service
        self._stripe = stripe
        self._chance = chance
        self._say = say
        self._last: Metrics | None = None
        self.totals = 0
        """Made by stage 1, as of the last look."""
        self.consumed: list[int] = []
        """Records, at each of the kills that wait for them."""
        self.accepted: list[int] = []
        """Meter Events, at each of the kills that wait for those."""

    def kill_when_consumed(self, records: int) -> None:
        """Kill once so many records are read, at some moment between one commit and the next."""
        wait_until(lambda: self._consumed() >= records, self._consumed, "counting")
        time.sleep(self._chance.random())
        self.consumed.append(self._consumed())
        self._kill(f"{self.consumed[-1]} records consumed")

    def kill_when_accepted(self, events: int) -> None:
        """Kill once Stripe has taken so many Meter Events."""
        wait_until(lambda: self._accepted() >= events, self._accepted, "sending")
        self.accepted.append(self._accepted())
        self._kill(f"{self.accepted[-1]} Meter Events accepted")

    def until_finished(self, records: int) -> None:
        """Wait until all records are read and nothing of them is open or pending."""
        wait_until(lambda: self._consumed() >= records and not self._unfinished(), self._unfinished, "finishing")

    def _kill(self, at: str) -> None:
        self._service.kill_and_restart()
        self._say(f"kill {self._service.kills} at {at}")

    def _look(self) -> Metrics | None:
        self._last = self._service.metrics() or self._last
        return self._last

    def _consumed(self) -> int:
        seen = self._look()
        return seen.consumed if seen else 0

    def _accepted(self) -> int:
        self._look()  # which finds out whether the service is still there
        return self._stripe.accepted

    def _unfinished(self) -> int:
        seen = self._look()
        self.totals = int(seen.sum("tallyman_closed_totals_total")) if seen else 0
        return seen.unfinished if seen else -1


def main() -> None:
    """The command line."""
    parser = options("python -m tests.exactness.run", __doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="a folder to keep the service's file and log in")
    given = parser.parse_args()
    asked, say = scenario(Scenario, given), stamped()
    with running_kafka() as kafka, tempfile.TemporaryDirectory(prefix="tallyman-exactness-") as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        say(f"{asked}")
        print("\n".join(prove(kafka, asked, folder, say).lines()))


if __name__ == "__main__":
    main()
