"""The world of one seed: virtual time, the source, the store, Stripe, processes, and a scheduler that means no good."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from consumer.aggregate.aggregator import Rules
from consumer.aggregate.clock import Reading
from consumer.deliver.answers import Heard, Lost, NeverConnected
from consumer.deliver.entries import SAME_IDENTIFIER_FOR, Reason, unpack
from consumer.storage import Changes, Log, Stage
from consumer.totals import Advance, Total, decode
from tests.simulation.groups import Group
from tests.simulation.intake import Intake
from tests.simulation.reporter import Reporter, Request
from tests.simulation.shells import Shell, Steps
from tests.simulation.source import AMOUNTS, SourceLog, Usage
from tests.simulation.store import NotDoneError, SimulatedStore, Transaction
from tests.simulation.stripe import SimulatedStripe
from tests.unit.delivery_world import Names
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, T0, meter, rules

CUSTOMERS: Final = {"ann": "cus_ann", "bob": "cus_bob", "cem": "cus_cem", "dee": "cus_dee", "free": None}
TIMEOUT_MS: Final = 10_000
SMALL_STEP: Final = 2 * SECOND
"""Clocks that differ by no more are as exact as they are asked to be."""
HOST_CLOCKS: Final = 20 * MINUTE
"""How wrong the time of day may be where requests are sent: with the way of a request, less than the hour that the
retries of one identifier leave."""

FEATURES: Final = (
    "crash", "pause", "rebalance", "bad commits", "lost answers", "server errors", "away", "busy", "dawdling",
    "refusals", "locked out", "offsets expire", "wrong clocks", "a year's step", "days", "configurations",
    "transactions", "elsewhere", "unmapped", "repetitions", "late", "stalls", "slow answers", "slow restores",
    "single stages", "cut off", "operator", "second writer",
)  # fmt: skip

DOUBTFUL: Final = frozenset({"operator", "lost answers", "server errors", "days"})


class Violation(AssertionError):
    """Something is lost, doubled or left behind."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run did, for the sums at the end."""

    seed: int
    steps: int
    met: Counter[str]


class Worker:
    """One process on a host of its own."""

    def __init__(self, world: World, name: str, runs: frozenset[Stage]) -> None:
        self.world = world
        self.name = name
        self.runs = runs
        """The stages that it runs."""
        self.skew = 0
        """Of the host's clock, in milliseconds."""
        self.years = 0
        """What stage 1 sees of a step of a year; see ``HOST_CLOCKS``."""
        self.incarnation = 0
        self.silent_since: int | None = None
        self.paused = False
        self.rules = world.rules
        self.start()

    def start(self) -> None:
        """A new life, with the configuration of the day."""
        self.incarnation += 1
        self.boot = self.world.time
        self.silent_since = None
        self.paused = self.stopping = False
        self.stalled: set[Stage] = set()
        """Stages whose loop stands still, while all else goes on."""
        self.rules = self.world.rules
        self.heard_of_stripe: Reading | None = None
        self.intake = Intake(self)
        self.reporter = Reporter(self)
        self.loops: dict[Stage, Steps] = {shell.stage: shell.run() for shell in self.shells}

    @property
    def shells(self) -> list[Shell]:
        """The stages that it runs."""
        return [shell for shell in (self.intake, self.reporter) if shell.stage in self.runs]

    @property
    def id(self) -> str:
        """As its groups know it."""
        return f"{self.name}.{self.incarnation}"

    @property
    def turns(self) -> bool:
        """Whether it is alive and not paused."""
        return self.silent_since is None

    def now(self) -> int:
        """The time of day by its host."""
        return self.world.time + self.skew + (self.years if self.world.wild else 0)

    def wild_now(self) -> int:
        """The same, where it may be wrong by anything."""
        return self.world.time + self.skew + self.years

    def elapsed(self) -> int:
        """Its monotonic clock."""
        return self.world.time - self.boot

    def step(self, choice: int) -> None:
        """One effect: of a stage's loop, a request, an answer, or a restore."""
        if choice == 2 and self.reporter.sending:
            self.reporter.send(self.world.random.randrange(len(self.reporter.sending)))
        elif choice == 3 and self.reporter.answers:
            self.reporter.hear(self.world.random.randrange(len(self.reporter.answers)))
        elif choice == 4 and (restoring := [shell for shell in self.shells if shell.threads]):
            threads = self.world.random.choice(restoring).threads
            thread = self.world.random.choice(threads)
            if next(thread, "over") == "over":
                threads.remove(thread)
        else:
            turning = [stage for stage in self.loops if stage not in self.stalled]
            if turning and next(self.loops[stage := turning[choice % len(turning)]], "over") == "over":
                del self.loops[stage]
        if not self.loops:
            self.start()
        elif self.world.calm or self.world.chance(0.5):
            self.reporter.send_on()

    def pause(self) -> None:
        """All of it stands still."""
        self.paused, self.silent_since = True, self.world.time
        for shell in self.shells:
            shell.client.asleep_since = self.world.time

    def wake(self) -> None:
        """It goes on where it was."""
        self.paused, self.silent_since = False, None
        for shell in self.shells:
            shell.client.asleep_since = None

    def stall(self, shell: Shell) -> None:
        """One loop stands still; requests, restores and heartbeats go on."""
        self.stalled.add(shell.stage)
        shell.client.unpolled_since = self.world.time

    def turn_again(self) -> None:
        """The loops go on where they were."""
        self.stalled.clear()
        for shell in self.shells:
            shell.client.unpolled_since = None

    def kill(self) -> None:
        """At once, wherever it was."""
        self.loops = {}
        self.silent_since = self.world.time
        for shell in self.shells:
            shell.threads.clear()
            shell.client.die(self.world.time)


class World:
    """Made from a seed, and by nothing else."""

    def __init__(
        self,
        seed: int,
        *,
        trace: bool = False,
        wild: bool = False,
        doubtful: bool = False,
        features: frozenset[str] | None = None,
    ) -> None:
        """``features``: these, and not a selection of all."""
        self.random = random = Random(seed)  # noqa: S311 - it has to repeat itself
        self.seed = seed
        self.wild = wild
        """Whether the clock by which requests are sent may step by years, too."""
        self.doubtful = doubtful
        """Whether it is about doubts: answers get lost for days, and the totals of a minute are many."""
        self.trace: list[str] | None = [] if trace else None
        self.time = T0 + random.randrange(HOUR)
        self.began = self.time
        self.calm = False
        self.calm_since = 0
        self.progress = 0
        self.met: Counter[str] = Counter()
        self.features = {each for each in FEATURES if random.random() < 0.45}
        if features is not None:
            self.features = set(features)
        if doubtful:
            self.features = (self.features | DOUBTFUL) - {"away", "refusals", "locked out", "late"}
        self.honest = not self.features & {"wrong clocks", "a year's step"}
        self.source = [SourceLog() for _ in range(random.choice((1, 2, 3)))]
        spread = random.choice((1, 2, 4))
        self.groups = {
            Stage.AGGREGATE: Group(len(self.source), random),
            Stage.DELIVER: Group(spread, random),
        }
        self.store = SimulatedStore(self.groups, spread, lambda: self.time, self.applied)
        self.stripe = SimulatedStripe(random)
        self.in_flight = random.choice((3, 40))
        self.lag = Random(seed).choice((0, 10 * MINUTE, 20 * HOUR))  # noqa: S311 - it has to repeat itself
        """How long it takes at most until Stripe's sums have an event."""
        self.names = Names(dict(CUSTOMERS))
        self.mapping = 0
        self.deduplicate_for = random.choice((HOUR, DAY))
        self.accept_late = random.choice((self.deduplicate_for, 3 * DAY))
        self.editions = 0
        self.rules = self._rules()
        self.perhaps_tried: set[str] = set()
        """Totals that were restored as perhaps tried."""
        self.written: Counter[str] = Counter()
        """How many requests there were for each."""
        self.foreign: set[str] = set()
        """Identifiers that somebody else wrote."""
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._planned = 0
        self._ids = 0
        self.workers = [Worker(self, name, runs) for name, runs in zip("ABCD", self._processes(), strict=False)]

    def _processes(self) -> list[frozenset[Stage]]:
        """Which stages each of them runs."""
        if "single stages" not in self.features:
            return [frozenset(Stage)] * self.random.choice((1, 2, 2, 3))
        each = [frozenset({stage}) for stage in Stage]
        return [*each, *self.random.sample([*each, frozenset(Stage)], self.random.choice((0, 1, 2)))]

    def _rules(self) -> Rules:
        late = {"lateness": self.random.choice((5 * SECOND, 30 * SECOND, 2 * MINUTE)), "accept_late": self.accept_late}
        return rules(
            meter("tokens", **late),
            meter("calls", event_types=("used", "called"), aggregation="count", value=None, **late),
            deduplicate_for=self.deduplicate_for,
        )

    # For everybody in it

    def chance(self, probability: float) -> bool:
        """Whether it happens this time."""
        return self.random.random() < probability

    def note(self, text: str, *values: object) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.at(self.time)}  {text % values}")

    def at(self, time: int) -> str:
        """A time, as seconds since the beginning."""
        return f"{(time - self.began) / 1000:11.3f}"

    def claim(self, true: bool, text: str, *values: object) -> None:
        """Raise ``Violation`` where it is not so."""
        if not true:
            raise Violation(text % values)

    def later(self, delay: int, what: Callable[[], None]) -> None:
        """Something on its way."""
        self._planned += 1
        heapq.heappush(self._events, (self.time + delay, self._planned, what))

    @property
    def next_event(self) -> int | None:
        """When the next thing on its way arrives."""
        return self._events[0][0] if self._events else None

    def move(self, milliseconds: int) -> None:
        """Time goes by, and things arrive."""
        until = self.time + milliseconds
        while self._events and self._events[0][0] <= until:
            at, _, what = heapq.heappop(self._events)
            self.time = max(self.time, at)
            what()
        self.time = until
        self.store.expire()
        for group in self.groups.values():
            group.settle(self.time, calm=self.calm)

    # Commits, requests

    def fate_of_commit(self, *, last: bool) -> str:
        """What becomes of a commit; more often something bad where others wait to go on behind it."""
        if self.calm or "bad commits" not in self.features or self.chance(0.4 if last else 0.8):
            return "is made"
        fate = self.random.choice(("fails", "is lost", "is late", "is unknown"))
        self.met[f"a commit {fate}"] += 1
        return fate

    def restore_takes(self) -> int:
        """How long a state is read, from when its end was asked for."""
        return self.random.choice((1_000, 15_000, 60_000) if "slow restores" in self.features else (0, 0, 1_000))

    def finish_late(self, transaction: Transaction) -> None:
        """A commit whose author has given up."""
        try:
            self.store.finish(transaction)
        except NotDoneError:
            return
        self.note("a commit nobody waited for was made: %s", sorted(transaction.changes))

    def applied(self, stage: Stage, partition: int, changes: Changes) -> None:
        """A commit has become durable."""
        if stage is Stage.AGGREGATE:
            for each in changes.appends:
                if each.log is Log.TOTALS and isinstance(record := decode(each.value), Advance):
                    self._look_at_advance(record)
            return
        for value in changes.puts.values():
            # The word is in the decisions of those that have been released, too.
            entry = unpack(value) if b"in_doubt" in value else None
            if entry is not None and entry.reason is Reason.IN_DOUBT and entry.first_unproven is not None:
                self.met["in doubt"] += 1
                age = self.time - entry.first_unproven
                aged = self.wild or age >= SAME_IDENTIFIER_FOR - HOST_CLOCKS
                self.claim(aged, "partition %d: in doubt after %d ms", partition, age)

    def _look_at_advance(self, advance: Advance) -> None:
        """An advance is evidence: what was not read by then has arrived later, and the time has really passed."""
        settle = self.rules.settle
        wrong = settle if self.honest else 5 * MINUTE + settle
        self.claim(
            advance.clock <= self.time + wrong + SMALL_STEP,
            "partition %d was moved to %s, ahead of time", advance.partition, self.at(advance.clock),
        )  # fmt: skip
        for record in self.source[advance.partition].behind(advance.offset):
            self.claim(
                record[1][1] >= advance.clock - wrong,
                "partition %d was moved to %s past what had arrived before",
                advance.partition, self.at(advance.clock),
            )  # fmt: skip
        self.met["quiet clock"] += 1

    def write(self, worker: Worker, request: Request) -> None:
        """A request leaves, and perhaps an answer comes."""
        attempt = request.attempt
        self.written[attempt.identifier] += 1
        reporter, life, mood = worker.reporter, worker.id, self.stripe.mood
        self.note("%s sends %s under %s", worker.id, attempt.payload, attempt.key)

        def answer(heard: Heard, dated: bool = False) -> None:
            if worker.id == life and not request.over:
                reporter.answers.append((request, heard))
                if dated:
                    worker.heard_of_stripe = Reading(self.time, worker.elapsed())

        def arrive() -> None:
            if self.time < self.stripe.away_until:
                if not away and waits and not lost:
                    self.later(TIMEOUT_MS - there, lambda: answer(Lost()))
                return
            heard = self.stripe.post(attempt, self.time)
            self.note("Stripe answers %s with %s", attempt.key, heard)
            if waits and not lost:
                self.later(back, lambda: answer(heard, dated=True))

        lost = self.chance(mood.loses)
        slow = self.chance(mood.dawdles)
        there = self.random.randrange(20 * MINUTE) if slow else self.random.randrange(300)
        back = self.random.randrange(300)
        away = self.time < self.stripe.away_until
        waits = there + back < TIMEOUT_MS
        if away and self.chance(0.5):
            self.later(there % TIMEOUT_MS, lambda: answer(NeverConnected()))
            return
        self.later(there, arrive)
        if away or lost or not waits:
            self.met["an answer is lost"] += 1
            self.later(TIMEOUT_MS, lambda: answer(Lost()))

    # What producers do

    def answer_takes_time(self, number: int) -> None:
        """Something comes to this partition before its reader is told where its end was."""
        if not self.calm and "slow answers" in self.features and self.chance(0.3):
            self.produce(number)
            self.move(self.random.choice((2 * SECOND, 12 * SECOND, 6 * MINUTE)))
            self.met["a slow answer"] += 1

    def produce(self, number: int | None = None) -> None:
        """Some records for one partition, perhaps in a transaction that stays open."""
        random = self.random
        if number is None:
            number = random.randrange(len(self.source))
        log = self.source[number]
        transaction = log.begin() if "transactions" in self.features and self.chance(0.15) else 0
        for _ in range(random.randrange(1, 5)):
            log.append(self._usage(number, log), self.time + random.randrange(50), transaction)
        self.note("partition %d has %d records%s", number, log.end, " (open)" if transaction else "")

    def _usage(self, number: int, log: SourceLog) -> Usage:
        random = self.random
        if "repetitions" in self.features and log.said and self.chance(0.3):
            again = random.choice(log.said[-40:])
            if again is not None:
                return again
        self._ids += 1
        mine = (
            ["ann"]
            if self.doubtful
            else [name for name in CUSTOMERS if zlib.crc32(name.encode()) % len(self.source) == number] or ["ann"]
        )
        kind = random.choices(("used", "called", "garbage", "tombstone"), (70, 25, 3, 2))[0]
        return Usage(f"e{self._ids}", self._event_time(), random.choice(mine), kind, random.randrange(len(AMOUNTS)))

    def _event_time(self) -> int | None:
        random = self.random
        draw = random.random()
        if draw < 0.25:
            return None
        if draw < 0.6:
            return self.time - random.randrange(90 * SECOND)
        if draw < 0.85 or "late" not in self.features:
            return self.time - self.rules.meters[0].lateness - random.randrange(MINUTE)
        if draw < 0.95:
            return self.time - random.randrange(3 * HOUR)
        return self.time + random.choice((4 * MINUTE, 7 * MINUTE, -self.accept_late - MINUTE))

    @property
    def totals(self) -> list[Total]:
        """All that stage 1 has made durable."""
        return [record for log in self.store.totals for record in log if isinstance(record, Total)]
