"""Stage 2 of a process: it reads totals, commits, and gives out what may be sent."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from consumer.deliver.answers import Heard
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.entries import State, is_total, unpack
from consumer.deliver.pacing import Outlet
from consumer.runtime.reporter import LAST_ANSWERS_S
from consumer.storage import Changes, Restored, Stage
from consumer.totals import Command, Total
from tests.simulation.shells import Shell, Steps

if TYPE_CHECKING:
    from tests.simulation.world import Worker

RATE: Final = 1_000
"""Attempts per second at most, of all processes."""


@dataclass(eq=False)
class Request:
    """An attempt that was given out: a task of its own from then on."""

    delivery: Delivery
    attempt: Attempt
    written: bool = False
    over: bool = False
    """Answered, not sent after all, or not waited for any more."""


class Reporter(Shell):
    """Stage 2. Requests and their answers are the scheduler's: ``send`` and ``hear`` are effects of their own."""

    stage = Stage.DELIVER

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.outlet = Outlet(RATE)
        self.deliveries: dict[int, Delivery] = {}
        self.positions: dict[int, int] = {}
        self.sending: list[Request] = []
        """Given out, and not written yet."""
        self.answers: list[tuple[Request, Heard]] = []
        """Arrived, and not heard yet."""
        self.waited_for: list[Request] = []
        """Given out for a partition at work, and not over."""
        self.mapping = self.world.mapping

    @property
    def working(self) -> Collection[int]:
        """Those whose totals are sent."""
        return self.deliveries

    def drop(self, partitions: Collection[int]) -> None:
        """Forget; what was written goes its way, and what is not written yet must not be."""
        for number in partitions:
            self.numbers.pop(number, None)
            delivery = self.deliveries.pop(number, None)
            if delivery is not None:
                self.world.met["dropped with requests on their way"] += any(
                    each.written and each.delivery is delivery for each in self.waited_for
                )
                self.waited_for = [each for each in self.waited_for if each.delivery is not delivery]
                self.let_go(delivery)
                self.share()
        sent = len(self.waited_for)
        self.world.claim(self.outlet.sent == sent, "%d requests are waited for, and not %d", self.outlet.sent, sent)

    def let_go(self, delivery: Delivery) -> None:
        """The outlet is the others'."""
        delivery.drop()

    def share(self) -> None:
        """Processes share the rate by their partitions."""
        if self.deliveries:
            self.outlet.pacing.limit(RATE * len(self.deliveries) / len(self.world.store.totals))

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Restore the core."""
        delivery = Delivery(
            customers=self.world.names, in_flight=self.world.in_flight, parked_limit=1_000, outlet=self.outlet
        )
        offset, entries = restored or (0, iter(()))
        found = list(entries)
        for key, value in found:
            if is_total(key) and unpack(value).state is State.SENDING:
                self.world.perhaps_tried.add(key.decode())
        delivery.restore(offset, found, self.worker.now())
        self.deliveries[partition] = delivery
        self.positions[partition] = offset
        self.share()

    def turn(self) -> Steps:
        """Read, and commit."""
        if self.mapping != self.world.mapping:
            self.mapping = self.world.mapping
            for delivery in self.deliveries.values():
                delivery.remap(self.world.names, self.worker.now())
        for number in self.turns(iter(self.deliveries)):
            self.read(number)
            yield from self.effect()
        if any(delivery.due for delivery in self.deliveries.values()):
            yield from self.commit(list(self.deliveries))

    def send_on(self) -> None:
        """Give out what may be sent, beside the loop: that may be reading, committing, or hanging."""
        for number in self.turns(iter(self.deliveries)):
            self.give_out(self.deliveries[number])

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
        if self.world.time % 4 == 0:
            self.hear_ahead(number)

    def hear_ahead(self, number: int) -> None:
        """What people have decided, behind totals that are not read: now and again, and once more in a later life."""
        for record in self.world.store.totals[number][self.positions[number] :]:
            if isinstance(record, Command):
                self.world.met["a decision is heard ahead of its turn"] += 1
                self.deliveries[number].hear(record, self.worker.now())

    def changes(self, partitions: Collection[int]) -> dict[int, Changes]:
        """With what is to be armed; only when it is durable is it sent."""
        now = self.worker.now()
        found = {number: self.deliveries[number].commit(now) for number in partitions}
        return {number: changed for number, changed in found.items() if changed is not None}

    def committed(self, partitions: Collection[int]) -> None:
        """What this armed may be sent."""
        for number in partitions:
            self.deliveries[number].committed()

    def finish(self, partitions: Collection[int]) -> Steps:
        """Send nothing more of these, and wait shortly for answers; what is not over then is given up."""
        ending = [self.deliveries[number] for number in partitions if number in self.deliveries]
        for delivery in ending:
            delivery.retire(self.worker.now())
        until = self.world.time + int(LAST_ANSWERS_S * 1000)
        while self.world.time < until and any(each.delivery in ending for each in self.waited_for):
            yield
        for each in self.waited_for:
            if each.delivery in ending:
                self.world.met["not waited for any longer"] += 1
                each.over = True
        self.sending = [each for each in self.sending if not each.over]
        self.answers = [each for each in self.answers if not each[0].over]

    def give_out(self, delivery: Delivery) -> None:
        """Attempts that may be made now; each is a task of its own from here on."""
        while (attempt := delivery.next(self.worker.now())) is not None:
            alone = not (delivery.shut and self.waited_for)
            self.world.claim(alone, "%s is to probe while others are on their way", attempt.identifier)
            self.world.met["a probe for several"] += bool(delivery.shut) and len(self.deliveries) > 1
            request = Request(delivery, attempt)
            self.waited_for.append(request)
            self.sending.append(request)
            if not self.world.calm:
                break

    def send(self, place: int) -> None:
        """Look at the clock once more, and write one request."""
        request = self.sending.pop(place)
        self.world.progress += 1
        if not request.delivery.may_send(request.attempt, self.worker.now()):
            self.world.note("%s does not send %s after all", self.worker.id, request.attempt.identifier)
            self._is_over(request)
            return
        ours, identifier = self.has(request.delivery), request.attempt.identifier
        self.world.claim(ours, "%s is sent for a partition that was given back", identifier)
        lane = _lane(request)
        free = not any(each.written and _lane(each) == lane for each in self.waited_for)
        self.world.claim(free, "two requests at a time for %s", lane)
        self.world.met["sent by who is no member"] += not self.client.group.belongs(self.client.metadata)
        request.written = True
        self.world.write(self.worker, request)

    def hear(self, place: int) -> None:
        """One answer."""
        request, heard = self.answers.pop(place)
        self.world.progress += 1
        self.world.note("%s hears of %s: %s", self.worker.id, request.attempt.key, heard)
        self._is_over(request)
        request.delivery.answered(request.attempt, heard, self.worker.now())

    def _is_over(self, request: Request) -> None:
        request.over = True
        if request in self.waited_for:
            self.waited_for.remove(request)

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


def _lane(request: Request) -> tuple[str, str]:
    return request.attempt.stripe_customer, request.attempt.event_name
