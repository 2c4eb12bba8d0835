"""The demo: the real service on this machine, killed twice, and what Stripe bills in the end beside what was produced.

The broker and the Stripe stand-in live in this process, the service in one of its own. Nothing is waited for: the
traffic is dated in the past, the service is killed by what it is seen to do, and the demo is over once the service's
own metrics say that it has nothing left to do. What is billed is compared only then.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import Any, Final, NoReturn

from confluent_kafka import KafkaException

from consumer import deadletters
from consumer.runtime.clocks import SystemClock
from consumer.sandbox import traffic
from consumer.sandbox.broker import PARTITIONS, EmbeddedBroker
from consumer.sandbox.child import Child, Seen
from consumer.sandbox.comparison import Line, compare
from consumer.sandbox.kafka import free_ports
from consumer.sandbox.screen import Progress, Screen, table
from consumer.sandbox.stripe_server import Fault, Faults, StripeStandIn
from consumer.sandbox.traffic import (
    METERS,
    MINUTE_MS,
    REACH_MS,
    SETTLED_AFTER_MS,
    Message,
    Mix,
    Traffic,
    tombstones,
)
from consumer.storage import Log
from consumer.storage.sqlite import SqliteStore

EVENTS: Final = 60_000
FEWEST: Final = 1_000
MOST: Final = 150_000
"""Beyond 5 MiB a partition the embedded broker drops records, silently; so many events have been seen to fit."""

TOPIC: Final = "usage-events"
MINUTES: Final = 60
"""How long the traffic says that it took."""
PACE: Final = 8_000
"""Events a second that are produced at most: slow enough to watch, and to be killed in the middle of."""
RATE: Final = 250
"""Requests a second that the service may send to the stand-in."""
DEADLINE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.05

MIX: Final = Mix(customers=8, duplicates=0.04, late=0.015, malformed=0.004)
FAULTS: Final = {
    Fault.ERROR: 0.008,
    Fault.ACCEPT_ERROR: 0.008,
    Fault.LOSE: 0.008,
    Fault.ACCEPT_LOSE: 0.016,
    Fault.LOCK_TIMEOUT: 0.008,
}
"""What goes wrong with how many of the requests."""
TOO_FAST: Final = range(200, 210)
"""These requests are told that there are too many. Each time that happens, the service halves its rate."""
KILL_AFTER: Final = 15
"""Requests to Stripe, once all traffic has been counted."""


class DemoFailed(Exception):
    """The demo cannot go on; the message says what was seen."""


class Demo:
    """One run of the demo."""

    def __init__(self, screen: Screen, folder: Path, broker: EmbeddedBroker, stripe: StripeStandIn, seed: int) -> None:
        self.traffic = Traffic(MIX, seed=seed, partitions=PARTITIONS)
        self.seen = Seen()
        self.kills: list[str] = []
        """What each kill came in the middle of."""
        self._screen = screen
        self._broker = broker
        self._stripe = stripe
        self._duration = MINUTES * MINUTE_MS
        # So long ago that all is over by now, the last corrections included.
        self._start = SystemClock().now() - self._duration - SETTLED_AFTER_MS - MINUTE_MS
        # Stripe lives when the traffic ends. If its clock agreed with this host's, the service would believe them after
        # a kill: nothing has come for an hour, and what is still to be produced is late.
        stripe.clock.move_to((self._start + self._duration) / 1000)
        self.database = folder / "tallyman.db"
        self.service = Child(folder, self._config())
        self._produced = 0
        self._producing_failed: KafkaException | None = None
        self._go_on = Event()
        self._stopping = Event()
        self._kill_at: int | None = None
        stripe.faults.plan = self._plan

    def _config(self) -> dict[str, Any]:
        port, _ = free_ports()
        bill_from = datetime.fromtimestamp((self._start - REACH_MS) // 1000, UTC)
        kafka = {"bootstrap_servers": self._broker.bootstrap_servers, "topic": TOPIC, "arrival": "create_time"}
        return {
            "pipeline": "demo",
            "bill_from": bill_from.isoformat(),
            "kafka": kafka,
            "storage": {"kind": "sqlite", "path": str(self.database)},
            "commit_every": "1s",
            "meters": [dict(meter) for meter in METERS],
            "stripe": {"livemode": False, "api_base": self._stripe.url, "max_rate": RATE},
            "http": {"host": "127.0.0.1", "port": port},
        }

    def play(self, events: int) -> None:
        """Produce, kill and start again, and return once the service has nothing left to do. Raises ``DemoFailed``."""
        self._deadline = time.monotonic() + DEADLINE_S
        self._events = events
        self._hold_at = events * 2 // 3
        self._broker.create_topic(TOPIC)
        producer = Thread(target=self._produce, name="producer", daemon=True)
        try:
            self._start_service()
            producer.start()
            self._kill_while_counting()
            self._start_service()
            self._until("it has counted all events", lambda: self.seen.consumed == events)
            self._kill_while_sending()
            self._start_service()
            self._until("it has nothing left to do", self._finished)
            if code := self.service.stop():
                raise DemoFailed(f"the service was asked to stop, and ended with exit code {code}")
            self._screen.tell("it has nothing left to do, was asked to stop, and has")
        finally:
            self._stopping.set()
            self._go_on.set()
            self.service.kill()
            self.service.wait()
            if producer.ident is not None:
                producer.join(timeout=5)

    def _start_service(self) -> None:
        pid = self.service.start()
        self._until("the service has started", lambda: self.service.look() is not None)
        again = "started again: it goes on from its last commit" if self.kills else "started"
        self._screen.tell(f"the service (process {pid}) has {again}")

    def _kill_while_counting(self) -> None:
        def counting() -> bool:
            seen = self.seen
            uncommitted = seen.counted_in_memory - seen.counted
            in_the_middle = seen.counted_in_memory > self._events // 4 and uncommitted > self._events // 100
            # Should that moment be missed, producing holds here, and there is still a third to come.
            return in_the_middle or seen.consumed >= self._hold_at

        self._until("it is in the middle of counting", counting)
        self.service.kill()
        self.service.wait()
        self._go_on.set()
        seen = self.seen
        self._note_kill(
            f"while it counted, with {seen.counted:,} events committed and "
            f"{seen.counted_in_memory - seen.counted:,} more not yet"
        )

    def _kill_while_sending(self) -> None:
        self._screen.tell("all events are counted; a tombstone on each partition closes the windows still open")
        self._kill_at = self._stripe.faults.meter_events + KILL_AFTER
        traffic.produce(self._broker.bootstrap_servers, TOPIC, tombstones(PARTITIONS, SystemClock().now()))
        self._until("it is in the middle of sending", lambda: self._kill_at is None)
        self.service.wait()
        accepted = len(self._stripe.model.events)
        unnoted = accepted - self._noted()
        self._note_kill(f"while it sent, with {accepted:,} totals at Stripe and {unnoted:,} of them not noted yet")

    def _note_kill(self, where: str) -> None:
        self.kills.append(where)
        self._screen.tell(f"SIGKILL {where}", "bold yellow")

    def _plan(self, number: int, _identifier: str) -> Fault | None:
        """The stand-in asks this, on its own thread, about every total that it is sent, before anything else."""
        if self._kill_at is not None and number >= self._kill_at:
            self._kill_at = None  # first: an end that nobody wanted is a failure
            self.service.kill()
        return Fault.RATE_LIMITED if number in TOO_FAST else None

    def _noted(self) -> int:
        """Totals that the killed service had finished, from a copy: its file is left as the kill left it."""
        with tempfile.TemporaryDirectory(dir=self.database.parent) as copy:
            for file in self.database.parent.glob(f"{self.database.name}*"):
                shutil.copy(file, copy)
            with _opened(Path(copy, self.database.name)) as store:
                return store.end(Log.OUTCOMES) - 1

    def _finished(self) -> bool:
        seen = self.seen
        return seen.consumed == self._events + PARTITIONS and not seen.open_windows and not seen.waiting

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._producing_failed is not None:
                raise DemoFailed(f"events could not be produced: {self._producing_failed}")
            if not self.service.running and not condition():
                raise DemoFailed(f"the service ended by itself, with exit code {self.service.wait()}")
            if time.monotonic() > self._deadline:
                raise DemoFailed(f"after {DEADLINE_S:.0f} s it is still not so that {what}; last seen: {self.seen}")
            self.seen = self.service.look() or self.seen
            self._screen.show(self._progress())
            time.sleep(LOOK_EVERY_S)

    def _progress(self) -> Progress:
        return Progress(
            events=self._events,
            produced=self._produced,
            read=min(self.seen.consumed, self._events),
            totals=self.seen.totals,
            billed=len(self._stripe.model.events),
            kills=len(self.kills),
            answers=answers(self._stripe),
        )

    # On a thread of its own

    def _produce(self) -> None:
        try:
            traffic.produce(self._broker.bootstrap_servers, TOPIC, self._paced(), self._note_produced)
        except KafkaException as failed:
            self._producing_failed = failed

    def _note_produced(self, number: int) -> None:
        self._produced = number

    def _paced(self) -> Iterator[Message]:
        began = time.monotonic()
        messages = self.traffic.messages(self._events, start_ms=self._start, duration_ms=self._duration)
        for number, message in enumerate(messages):
            if number % 100 == 0:
                if number > self._hold_at:
                    self._go_on.wait()
                time.sleep(max(0.0, began + number / PACE - time.monotonic()))
                if self._stopping.is_set():
                    return
            yield message


def answers(stripe: StripeStandIn) -> dict[str, int]:
    """How often the stand-in did what, in the words of the demo."""
    stats = stripe.model.stats
    return {
        "taken": stats["accepted"],
        "told 429": stats["rate_limited"] + stats["lock_timeout"],
        "told 500": stats["error"],
        "not answered": stats[f"fault_{Fault.LOSE}"] + stats[f"fault_{Fault.ACCEPT_LOSE}"],
        "known already": stats["duplicate"] + stats["replayed"],
    }


def main(*, events: int = EVENTS, seed: int = 1) -> int:
    """Run the demo with so many events; the same seed makes the same traffic.

    Returns the exit code: 0 if every customer is billed exactly what was produced, 1 if not or if it gets stuck, 2 for
    a number of events that it is not made for, 130 after Ctrl-C.
    """
    screen = Screen()
    if not FEWEST <= events <= MOST:
        screen.say(f"The demo takes {FEWEST:,} to {MOST:,} events, not {events:,}.", "bold red")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="tallyman-demo-"))
    code = 1
    try:
        with _terminable():
            code = _run(screen, folder, events, seed)
    except KeyboardInterrupt:
        screen.say("Stopped.")
        code = 130
    finally:
        if code == 1:
            screen.say(f"Configuration, state and log of the service are kept in {folder}", "bold red")
        else:
            shutil.rmtree(folder)
    return code


def _run(screen: Screen, folder: Path, events: int, seed: int) -> int:
    faults = Faults(rates=dict(FAULTS), latency=(0.005, 0.03))
    with EmbeddedBroker() as broker, StripeStandIn(faults=faults, accept_any_customer=True) as stripe:
        for meter in METERS:
            stripe.model.add_meter(meter["stripe"]["event_name"])
        demo = Demo(screen, folder, broker, stripe, seed)
        _introduce(screen, demo, broker, stripe, events)
        try:
            with screen:
                demo.play(events)
        except DemoFailed as failed:
            screen.say(f"\nThe demo failed: {failed}", "bold red")
            screen.say(f"\nThe end of the service's log:\n{demo.service.log_tail()}\n")
            return 1
        expected = demo.traffic.expected
        lines = compare(expected.by_window(), stripe.model.billed())
        screen.say()
        screen.say(table(expected, lines))
        wrong = [*_wrong(demo, stripe, lines)]
        if wrong:
            screen.say("\nThis must not be:", "bold red")
            for each in wrong:
                screen.say(f"- {each}", "red")
            return 1
        _conclude(screen, demo, stripe, lines)
        return 0


def _introduce(screen: Screen, demo: Demo, broker: EmbeddedBroker, stripe: StripeStandIn, events: int) -> None:
    screen.say("Tallyman: usage events on Kafka become Stripe Meter Events, every event billed once", "bold")
    metrics = f"http://127.0.0.1:{demo.service.metrics_port}/metrics"
    screen.say(
        f"""
  Kafka    {broker.bootstrap_servers:<32} embedded in this process
  Stripe   {stripe.url:<32} a stand-in in this process, which fails on purpose
  service  {metrics:<32} the real one, a process that will be killed twice
  traffic  {events:,} events of {MIX.customers} customers within {MINUTES} minutes, for two meters: AI tokens with
           decimals, and API calls. Some come twice, out of order, too late, or broken.
"""
    )


def _wrong(demo: Demo, stripe: StripeStandIn, lines: dict[tuple[str, str], Line]) -> Iterator[str]:
    for (event_name, customer), line in lines.items():
        if line.wrong:
            yield f"{customer} on {event_name}: {line.wrong} of {line.minutes} minutes are not billed as they should be"
    for violation in stripe.model.violations:
        yield f"{violation.identifier}: {violation.kind}: {violation.detail}"
    seen, counts = demo.seen, demo.traffic.expected.counts
    for what, produced, found in (
        ("counted", counts.counted, seen.counted),
        ("found to be duplicates", counts.duplicates, seen.duplicates),
        ("kept as dead letters", counts.malformed, seen.dead),
        ("ignored", counts.unmatched + PARTITIONS, seen.ignored),
    ):
        if produced != found:
            yield f"{found:,} events were {what}, and {produced:,} should have been"


def _conclude(screen: Screen, demo: Demo, stripe: StripeStandIn, lines: dict[tuple[str, str], Line]) -> None:
    counts, heard, stats = demo.traffic.expected.counts, answers(stripe), stripe.model.stats
    minutes = sum(line.minutes for line in lines.values())
    requests = stripe.faults.meter_events
    screen.say(f"\nWhat Stripe bills is what was produced, in each of {minutes:,} customer-minutes.\n", "bold green")
    screen.point(
        f"The service was killed {', and '.join(demo.kills)}. It went on from its last commit: nothing was lost, "
        "nothing was counted or billed twice."
    )
    screen.point(
        f"{counts.duplicates:,} events were duplicates. {counts.late:,} came after their window had been closed, and "
        "were billed as corrections, in the minute in which they happened."
    )
    screen.point(
        f"{counts.unmatched:,} events were of a type that no meter counts. {counts.malformed:,} could not be counted, "
        f"and are kept as dead letters: {_reasons(demo.database)}."
    )
    screen.point(
        f"Stripe took {heard['taken']:,} totals in {requests:,} requests: to {heard['told 429']:,} it said 429, to "
        f"{heard['told 500']:,} it said 500, and {heard['not answered']:,} got no answer."
    )
    screen.point(
        f"{heard['known already']:,} requests were about a total that Stripe had, without the service knowing: "
        f"{stats['duplicate']:,} were refused as duplicates, {stats['replayed']:,} got the first answer again. "
        "Neither bills anything."
    )
    tallyman = sys.argv[0] if Path(sys.argv[0]).name == "tallyman" else "tallyman"
    screen.say("\nWhere to go next, with config/tallyman.yaml", "bold")
    for command, what in (
        ("check", "what would keep it from running, before it does"),
        ("produce", "sample events for your topic"),
        ("run", "the service, with a Stripe key in STRIPE_SECRET_KEY"),
        ("totals", "what was or will be billed"),
    ):
        screen.say(f"  {tallyman} {command:<8} {what}")


def _opened(database: Path) -> AbstractContextManager[SqliteStore]:
    return SqliteStore.open(database, now=SystemClock().now, create=False, lock=False)


def _reasons(database: Path) -> str:
    reasons: Counter[str] = Counter()
    with _opened(database) as store:
        for letter in store.read(Log.DEAD_LETTERS, 0, MOST):
            reasons[deadletters.decode(letter.value).reason] += 1
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the demo as cleanly as Ctrl-C does."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
