"""Stage 1 of a process: it reads, moves quiet clocks on, and commits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from consumer.aggregate.aggregator import Aggregator
from consumer.aggregate.clock import QuietClock, Reading
from consumer.aggregate.meters import Source
from consumer.storage import Changes, Restored, Stage
from tests.simulation.shells import Shell, Steps

if TYPE_CHECKING:
    from tests.simulation.world import Worker

BATCH: Final = 20


@dataclass(slots=True)
class Reading1:
    """One partition of the source being read."""

    aggregator: Aggregator
    quiet: QuietClock
    read_to: int


class Intake(Shell):
    """Stage 1."""

    stage = Stage.AGGREGATE

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.partitions: dict[int, Reading1] = {}
        self.heard_of_broker: Reading | None = None

    @property
    def working(self) -> Collection[int]:
        """Those that are read."""
        return self.partitions

    def drop(self, partitions: Collection[int]) -> None:
        """Forget."""
        for number in partitions:
            self.partitions.pop(number, None)
            self.numbers.pop(number, None)

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Restore the core."""
        source = Source("cluster", "topic", "prod", partition)
        offset, entries = restored or (0, iter(()))
        each = Aggregator(self.worker.rules, source, offset, entries)
        self.partitions[partition] = Reading1(
            each, QuietClock(each.book.clock, self.worker.elapsed(), each.settle), each.offset
        )

    def finish(self, _: Collection[int]) -> Steps:
        """Nothing is on its way."""
        yield from ()

    def turn(self) -> Steps:
        """Read, look at the ends, commit."""
        for number in self.turns(iter(self.partitions)):
            self.read(number)
            yield from self.effect()
            yield from self.look_at_end(number)
        if self.world.calm or self.world.chance(0.4):
            yield from self.commit(list(self.partitions))

    def read(self, number: int) -> None:
        """A batch; what is dated ahead of our clock waits."""
        each = self.partitions[number]
        records, position = self.world.source[number].fetch(each.read_to, BATCH)
        now, elapsed = self.worker.wild_now(), self.worker.elapsed()
        if records:
            taken = each.aggregator.step(records, now)
            if taken:
                self.world.progress += 1
                self.world.note("%s reads %d of partition %d", self.worker.id, taken, number)
                each.quiet.read(each.aggregator.book.arrival, elapsed)
                self.heard_of_broker = later(self.heard_of_broker, Reading(records[taken - 1][1][1], elapsed), elapsed)
            if taken < len(records):
                each.read_to = records[taken][0]
                return
        each.read_to = position

    def look_at_end(self, number: int) -> Steps:
        """Let the clock of a quiet partition move on; the time is read before the end is asked for."""
        each = self.partitions[number]
        now, elapsed = self.worker.wild_now(), self.worker.elapsed()
        if each.aggregator.closing or not each.aggregator.closes_by(now):
            return
        yield from self.effect()
        end = self.asked_end(number)
        yield from self.effect()
        self.move_on(each, end, now, elapsed)

    def asked_end(self, number: int) -> int:
        """The uncommitted end, as of some time before it is told."""
        end = self.world.source[number].end
        self.world.answer_takes_time(number)
        return end

    def move_on(self, each: Reading1, end: int, now: int, elapsed: int) -> None:
        """If everything has been read."""
        limit = each.quiet.limit(now, elapsed, later(self.heard_of_broker, self.worker.heard_of_stripe, elapsed))
        if end <= each.read_to and each.aggregator.closes_by(limit):
            self.world.progress += 1
            self.world.note(
                "%s moves partition %d on to %s", self.worker.id, each.aggregator.source.partition, self.world.at(limit)
            )
            each.aggregator.advance(limit)

    def changes(self, partitions: Collection[int]) -> dict[int, Changes]:
        """All of them in one."""
        changed = {
            number: each.aggregator.commit()
            for number, each in self.partitions.items()
            if number in partitions and each.aggregator.changed
        }
        for number in changed:
            self.partitions[number].aggregator.check()
        return changed


def later(one: Reading | None, other: Reading | None, elapsed: int) -> Reading | None:
    """Of two readings of other clocks, the one that makes it later."""
    if one is None or other is None:
        return one or other
    return one if one.now(elapsed) >= other.now(elapsed) else other
