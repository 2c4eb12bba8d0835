"""A person who settles doubts: asks what Stripe's lagging sums say of them, and does what is recommended.

What asks and judges is the service's own. The store and Stripe are the simulated ones; while they are being read,
things go on.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, cast

from consumer import totals
from consumer.deliver.doubt import Advice
from consumer.deliver.entries import encode_outcome
from consumer.runtime import audit, evidence
from consumer.runtime.stripe_reads import Meter, StripeReads, Summary, _summary
from consumer.storage import Archive, Log, Logged, Restored, Stage
from consumer.totals import Command
from tests.simulation.stripe import Taken

if TYPE_CHECKING:
    from tests.simulation.world import World

MOST = 6
"""Totals that are asked about at a time."""


def settle(world: World) -> tuple[int, int | None]:
    """Ask about some doubts, and follow what is told; how many that was of, and when more will be known of others."""
    books = Books(world)
    store = cast("Archive", books)
    doubts = [each for each in audit.parked(store) if evidence.is_doubtful(each)]
    followed, later = 0, None
    if len(doubts) > MOST and not world.calm:
        doubts = world.random.sample(doubts, MOST)
    for judged in evidence.judge(store, doubts, world.names, cast("StripeReads", Sums(books))):
        told, entry = judged.recommendation, judged.entry
        identifier = entry.total.identifier
        there = any(each.attempt.total == identifier for each in world.stripe.taken if not each.foreign)
        world.note("the operator is told of %s: %s (%s)", identifier, told.advice, told.why)
        world.met[f"advice: {told.advice}"] += 1
        if told.advice is Advice.RELEASE:
            world.claim(not there, "%s is to be released, and it is at Stripe: %s", identifier, told.why)
        elif told.advice is Advice.DISCARD:
            world.claim(there, "%s is to be discarded, and it is not at Stripe: %s", identifier, told.why)
        else:
            if told.until is not None:
                later = max(later or 0, told.until)
            continue
        action: Literal["release", "discard"] = "release" if told.advice is Advice.RELEASE else "discard"
        command = Command(action, identifier, "eve", "the sums say so", world.time, entry.parking, told.found)
        world.store.totals[books.partition(identifier)].append(command)
        followed += 1
    return followed, later


class Books:
    """The logs and states as commands read them, one after the other, while everybody goes on."""

    def __init__(self, world: World) -> None:
        self.world = world

    def goes_on(self) -> None:
        """Something happens before the next thing is read."""
        if self.world.calm or not self.world.chance(0.3):
            return
        self.world.move(self.world.random.randrange(300))
        for worker in self.world.workers:
            if worker.turns:
                for _ in range(self.world.random.randrange(1, 8)):
                    worker.step(self.world.random.randrange(5))

    def partition(self, identifier: str) -> int:
        """Where a total lies."""
        for number, log in enumerate(self.world.store.totals):
            if any(isinstance(each, totals.Total) and each.identifier == identifier for each in log):
                return number
        raise LookupError(identifier)

    def facts(self) -> None:
        """Nothing that a doubt depends on."""

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """As of the last commit."""
        self.goes_on()
        state = self.world.store.states.get((stage, partition))
        return None if state is None else Restored(state.offset, iter(list(state.entries.items())))

    def ends(self, log: Log) -> dict[int, int]:
        """So long they are."""
        self.goes_on()
        store = self.world.store
        if log is Log.OUTCOMES:
            return {0: len(store.outcomes)}
        return {number: len(each) for number, each in enumerate(store.totals)}

    def settled(self, log: Log) -> dict[int, int]:
        """Nothing is in a log that is not committed."""
        return self.ends(log)

    def shortened(self, _: Log) -> set[int]:
        """Everything is kept."""
        return set()

    def logged(
        self, log: Log, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None
    ) -> Iterator[Logged]:
        """From some places to others."""
        store, starts = self.world.store, starts or {}
        for number, end in (self.ends(log) if ends is None else ends).items():
            for offset in range(starts.get(number, 0), end):
                value = (
                    encode_outcome(store.outcomes[offset])
                    if log is Log.OUTCOMES
                    else totals.encode(store.totals[number][offset])
                )
                yield Logged(number, offset, b"", 0, value)


class Sums:
    """Stripe's summaries, as late as they are in this world, and no more exact than a binary fraction is."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def meters(self) -> dict[str, Meter]:
        """By their event names, whether they take events or not."""
        return {
            name: Meter(name, name, "active", "sum", None, "stripe_customer_id", "value")
            for name in ("tokens", "calls")
        }

    def now(self) -> int:
        """By Stripe's clock."""
        return self._books.world.time

    def minute(self, meter: str, customer: str, start: int) -> Summary:
        """What is visible of it."""
        self._books.goes_on()
        world = self._books.world
        place = meter, customer, start
        visible = [each for each in world.stripe.taken if _place(each) == place and _seen_at(world, each) <= world.time]
        said = float(sum(Decimal(each.attempt.value) for each in visible))
        return _summary(SimpleNamespace(aggregated_value=said, start_time=start, end_time=start + 60))


def _place(taken: Taken) -> tuple[str, str, int]:
    attempt = taken.attempt
    return attempt.event_name, attempt.stripe_customer, attempt.timestamp // 60 * 60


def _seen_at(world: World, taken: Taken) -> int:
    """When the sums have it: each event by itself, the later one perhaps before the earlier one."""
    return taken.at + (zlib.crc32(f"{taken.attempt.key}{taken.at}".encode()) % world.lag if world.lag else 0)
