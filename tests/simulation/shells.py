"""What a process does around the cores, as generators that stop between any two effects.

The order of effects is the service's: read, commit (arm), send, hear, commit. Whoever stops a generator for good has
killed the process there; whoever lets it wait for a day has paused it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consumer.aggregate.aggregator import Aggregator
from consumer.aggregate.clock import QuietClock, Reading
from consumer.aggregate.meters import Source
from consumer.deliver.answers import Heard
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.entries import State as EntryState
from consumer.deliver.entries import unpack
from consumer.deliver.ledger import PREFIX
from consumer.deliver.pacing import Outlet
from consumer.storage import Changes, Restored, Stage
from consumer.totals import Total
from tests.simulation.store import Member, NotDoneError, UnstableError

if TYPE_CHECKING:
    from tests.simulation.world import Worker, World

Steps = Iterator[None]

BATCH = 20


class Shell:
    """One stage of one process, in and out of its group."""

    stage: Stage

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.world: World = worker.world
        self.member = Member(worker.id, 0, ())
        self.drop()

    def run(self) -> Steps:
        """Until the process is to stop."""
        world, group = self.world, self.world.groups[self.stage]
        while not self.worker.stopping:
            self.drop()
            member = group.member(self.worker.id)
            if member is None:
                group.join(self.worker.id, world.time)
                yield
                continue
            self.member = member
            world.note("%s %s owns %s", self.worker.id, self.stage, member.partitions)
            try:
                for partition in member.partitions:
                    yield from self.take_over(partition)
                yield from self.work()
            except NotDoneError as failed:
                world.note("%s %s starts over: %s", self.worker.id, self.stage, failed)
                if self.world.chance(0.5):
                    group.rebalance(world.time)
        self.drop()
        group.leave(self.worker.id, world.time)

    def take_over(self, partition: int) -> Steps:
        """Restore it, when nobody's commit of it is pending any more."""
        while True:
            yield
            if self.world.groups[self.stage].calls_back(self.member):
                raise NotDoneError("the partitions were taken back while they were restored")
            try:
                restored = self.world.store.restore(self.stage, partition)
            except UnstableError:
                continue
            self.begin(partition, restored)
            self.world.progress += 1
            return

    @property
    def over(self) -> bool:
        """Whether everything has to be given back."""
        return self.worker.stopping or self.world.groups[self.stage].calls_back(self.member)

    def make_durable(self, changes: dict[int, Changes]) -> Steps:
        """One commit, of which any step may fail; raises ``NotDoneError`` where it was not made, or nobody knows."""
        world, store = self.world, self.world.store
        yield from self.effect()
        fate = world.fate_of_commit()
        if not world.calm and world.groups[self.stage].calls_back(self.member):
            # The thread that polls joins again while this one commits, and may be given other partitions by then.
            world.groups[self.stage].join(self.member.name, world.time)
            yield
        if fate == "fails":
            raise NotDoneError("the commit failed")
        transaction = store.begin(self.stage, self.member, changes)
        yield from self.effect()
        if fate == "is lost":
            raise NotDoneError("the commit was lost on its way; it stays pending")
        if fate == "is late":
            world.later(world.random.randrange(1, 20_000), lambda: world.finish_late(transaction))
            raise NotDoneError("no answer to the commit, which is made later")
        store.finish(transaction)
        if fate == "is unknown":
            raise NotDoneError("no answer to the commit, which was made")
        world.progress += 1
        world.note("%s %s commits %s", self.worker.id, self.stage, {n: c.offset for n, c in changes.items()})
        yield from self.effect()

    def effect(self) -> Steps:
        """Anything may happen here, in other than calm weather."""
        if not self.world.calm:
            yield

    def turns(self, numbers: Iterator[int]) -> list[int]:
        """Whose turn it is: everybody's when all is calm, and anybody's else."""
        all_ = list(numbers)
        return all_ if self.world.calm or not all_ else [self.world.random.choice(all_)]

    def drop(self) -> None:
        """Forget everything that is not durable."""
        raise NotImplementedError

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Take up a partition."""
        raise NotImplementedError

    def work(self) -> Steps:
        """Until the partitions are taken back."""
        raise NotImplementedError


@dataclass(slots=True)
class Reading1:
    """One partition of the source being read."""

    aggregator: Aggregator
    quiet: QuietClock
    read_to: int


class Intake(Shell):
    """Stage 1."""

    stage = Stage.AGGREGATE

    def drop(self) -> None:
        """Forget."""
        self.partitions: dict[int, Reading1] = {}
        self.heard_of_broker: Reading | None = None

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Restore the core."""
        source = Source("cluster", "topic", "prod", partition)
        offset, entries = restored or (0, iter(()))
        each = Aggregator(self.worker.rules, source, offset, entries)
        self.partitions[partition] = Reading1(
            each, QuietClock(each.book.clock, self.worker.elapsed(), each.settle), each.offset
        )

    def work(self) -> Steps:
        """Read, look at the ends, commit."""
        while not self.over:
            for number in self.turns(iter(self.partitions)):
                self.read(number)
                yield from self.effect()
                yield from self.look_at_end(number)
            if self.world.calm or self.world.chance(0.4):
                yield from self.commit()
            yield
        if self.world.calm or self.world.chance(0.7):
            yield from self.commit()

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
        self.move_on(each, end, now, elapsed)

    def asked_end(self, number: int) -> int:
        """The uncommitted end."""
        return self.world.source[number].end

    def move_on(self, each: Reading1, end: int, now: int, elapsed: int) -> None:
        """If everything has been read."""
        limit = each.quiet.limit(now, elapsed, later(self.heard_of_broker, self.worker.heard_of_stripe, elapsed))
        if end <= each.read_to and each.aggregator.closes_by(limit):
            self.world.progress += 1
            self.world.note(
                "%s moves partition %d on to %s", self.worker.id, each.aggregator.source.partition, self.world.at(limit)
            )
            each.aggregator.advance(limit)

    def commit(self) -> Steps:
        """All partitions in one."""
        changes = {
            number: each.aggregator.commit() for number, each in self.partitions.items() if each.aggregator.changed
        }
        for number in changes:
            self.partitions[number].aggregator.check()
        if changes:
            yield from self.make_durable(changes)


class Reporter(Shell):
    """Stage 2. Requests and their answers are the scheduler's: ``send`` and ``hear`` are effects of their own."""

    stage = Stage.DELIVER

    def __init__(self, worker: Worker) -> None:
        self.outlet = Outlet(1_000)
        self.deliveries: dict[int, Delivery] = {}
        self.sending: list[tuple[Delivery, Attempt]] = []
        self.answers: list[tuple[Delivery, Attempt, Heard]] = []
        super().__init__(worker)

    def drop(self) -> None:
        """Forget; what was given out goes its way, and what is not written yet must not be."""
        for delivery in self.deliveries.values():
            delivery.drop()
        self.world.claim(not self.outlet.sent, "%d requests of nobody are waited for", self.outlet.sent)
        self.deliveries = {}
        self.positions: dict[int, int] = {}
        self.given_out: set[str] = set()
        """Identifiers of the attempts of ours that are not over."""
        self.lanes: set[tuple[str, str]] = set()

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Restore the core."""
        delivery = Delivery(
            customers=self.world.names, in_flight=self.world.in_flight, parked_limit=1_000, outlet=self.outlet
        )
        offset, entries = restored or (0, iter(()))
        found = list(entries)
        for key, value in found:
            if not key.startswith(PREFIX) and unpack(value).state is EntryState.SENDING:
                self.world.perhaps_tried.add(key.decode())
        delivery.restore(offset, found, self.worker.now())
        self.deliveries[partition] = delivery
        self.positions[partition] = offset

    def work(self) -> Steps:
        """Read, commit, and give out what may be sent."""
        mapping = self.world.mapping
        while not self.over:
            if mapping != self.world.mapping:
                mapping = self.world.mapping
                for delivery in self.deliveries.values():
                    delivery.remap(self.world.names, self.worker.now())
            for number in self.turns(iter(self.deliveries)):
                self.read(number)
                yield from self.effect()
            if any(delivery.due for delivery in self.deliveries.values()):
                yield from self.commit()
            for number in self.turns(iter(self.deliveries)):
                self.give_out(self.deliveries[number])
            yield
        if self.world.calm or self.world.chance(0.7):
            for delivery in self.deliveries.values():
                delivery.retire(self.worker.now())
            yield from self.commit(all_=True)

    def read(self, number: int) -> None:
        """As many records of the totals log as there is room for."""
        delivery, position = self.deliveries[number], self.positions[number]
        records = self.world.store.totals[number][position : position + delivery.room]
        for record in records:
            delivery.read(self.positions[number], record, self.worker.now())
            self.positions[number] += 1
            if isinstance(record, Total):
                self.world.note("%s reads %s of %s", self.worker.id, record.identifier, record.customer)
        self.world.progress += len(records)

    def commit(self, *, all_: bool = False) -> Steps:
        """Of those for which it is due; only then is sent what it arms."""
        changes = {}
        for number, delivery in self.deliveries.items():
            if (all_ or delivery.due) and (changed := delivery.commit(self.worker.now())) is not None:
                changes[number] = changed
        if changes:
            yield from self.make_durable(changes)
            for number in changes:
                self.deliveries[number].committed()

    def give_out(self, delivery: Delivery) -> None:
        """Attempts that may be made now; each is a task of its own from here on."""
        while (attempt := delivery.next(self.worker.now())) is not None:
            alone = not (delivery.shut and self.given_out)
            self.world.claim(alone, "%s is to probe while others are on their way", attempt.identifier)
            self.world.met["a probe for several"] += bool(delivery.shut) and len(self.deliveries) > 1
            self.given_out.add(attempt.identifier)
            self.sending.append((delivery, attempt))
            if not self.world.calm:
                break

    def send(self, place: int) -> None:
        """Look at the clock once more, and write one request."""
        delivery, attempt = self.sending.pop(place)
        self.world.progress += 1
        if not delivery.may_send(attempt, self.worker.now()):
            self.world.note("%s does not send %s after all", self.worker.id, attempt.identifier)
            if self.has(delivery):
                self.given_out.discard(attempt.identifier)
            return
        self.world.claim(self.has(delivery), "%s is sent for a partition that was given back", attempt.identifier)
        lane = attempt.stripe_customer, attempt.event_name
        self.world.claim(lane not in self.lanes, "two requests at a time for %s", lane)
        self.lanes.add(lane)
        self.world.write(self.worker, delivery, attempt)

    def hear(self, place: int) -> None:
        """One answer."""
        delivery, attempt, heard = self.answers.pop(place)
        self.world.progress += 1
        self.world.note("%s hears of %s: %s", self.worker.id, attempt.key, heard)
        if self.has(delivery):
            self.given_out.discard(attempt.identifier)
            self.lanes.discard((attempt.stripe_customer, attempt.event_name))
        delivery.answered(attempt, heard, self.worker.now())

    def has(self, delivery: Delivery) -> bool:
        """Whether it is one of ours still."""
        return any(delivery is each for each in self.deliveries.values())

    @property
    def idle(self) -> bool:
        """Whether nothing is left to be done, but what waits for a person."""
        return not (self.sending or self.answers) and all(
            not delivery.in_flight
            and not delivery.aside
            and not delivery.due
            and self.positions[number] == len(self.world.store.totals[number])
            for number, delivery in self.deliveries.items()
        )


def later(one: Reading | None, other: Reading | None, elapsed: int) -> Reading | None:
    """Of two readings of other clocks, the one that makes it later."""
    if one is None or other is None:
        return one or other
    return one if one.now(elapsed) >= other.now(elapsed) else other
