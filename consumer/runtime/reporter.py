"""The loop of stage 2: it reads the totals log, lets the cores decide, makes that durable, and sends."""

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import structlog

from consumer import totals
from consumer.deliver.answers import Answer, Heard
from consumer.deliver.customers import Customers
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.pacing import Outlet
from consumer.runtime.clocks import Clock
from consumer.runtime.commits import Commits
from consumer.runtime.customers import CustomerFile
from consumer.runtime.membership import Membership
from consumer.runtime.restoring import Restoring
from consumer.runtime.stripe import CONNECTIONS, Stripe
from consumer.runtime.totals_log import TotalsLog
from consumer.storage import Changes, CommitFailed, Progress, Stage, Store
from consumer.totals import Total

T = TypeVar("T")
K = TypeVar("K")

log = structlog.get_logger()

TAKES_S: Final = 35 * 86_400
"""For so long Stripe takes usage after its time."""

READ_AT_ONCE: Final = 1_000
LOOK_AGAIN_S: Final = 0.5
"""How often the log is looked at for what other processes append, and the customers' file for changes."""
POLL_EVERY_MS: Final = 100
PULSE_S: Final = 0.01
"""So long answers are collected before more is sent, for what has to be looked at is looked at once for all of them."""
TURN_S: Final = 0.025
"""The same for reading and committing."""
GARBAGE: Final = 20_000
"""New objects after which cycles are looked for: with Python's 700 a sixth of the time goes into it."""
LAST_ANSWERS_S: Final = 3.0
"""How long a stop waits for answers to what has been sent: each one saves a second attempt."""

Observer = Callable[[Attempt, Heard, float], None]
State = tuple[int, list[tuple[bytes, bytes]]]
"""What a partition's last commit left: the offset of the next record to read, and the entries."""


class Pending(NamedTuple):
    """Totals that are neither finished nor parked."""

    due: int | None
    """Since when (ms) the oldest of them has been due."""
    oldest: dict[str, int]
    """The earliest timestamp, in seconds, by meter."""


@dataclass(slots=True)
class Partition:
    """One partition of the totals log at work."""

    delivery: Delivery
    next: int
    """The offset of the next record to read."""
    heard_below: int = 0
    """What people decided and Stripe reported below this offset is done, though totals before it are not read."""
    noted: int = 0
    """How many notes of the delivery have been logged."""


class Reporter:
    """Sends the totals of the partitions that it owns until told to stop; see ``run``."""

    def __init__(
        self,
        store: Store,
        membership: Membership,
        restore: Callable[[int, Progress], State],
        *,
        unread: TotalsLog,
        ahead: TotalsLog,
        deliver: Callable[[Customers], Delivery],
        stripe: Stripe,
        outlet: Outlet,
        spread: int,
        clock: Clock,
        customers: Customers,
        file: CustomerFile | None,
        hold: bool,
        observe: Observer,
    ) -> None:
        """
        Args:
            store: for the commits.
            membership: which partitions are ours.
            restore: gives a partition as its last commit left it; called in the background.
            unread: the totals log.
            ahead: the same, to look for what people decide and Stripe reports where no total may be read.
            deliver: a core for one more partition.
            stripe: where totals are sent.
            outlet: what all cores have in common, with the rate of all partitions.
            spread: how many partitions the totals log has, whoever owns them.
            clock: the host's.
            customers: who they are at Stripe.
            file: where that is written, if it can change.
            hold: send nothing, and leave totals in their log; what is decided and reported is heard.
            observe: is told of every answer, and how many seconds it took.
        """
        self._store = store
        self._unread = unread
        self._ahead = ahead
        self._membership = membership
        self._deliver = deliver
        self._stripe = stripe
        self.outlet = outlet
        self._rate = outlet.pacing.max_rate / spread
        """The share of a partition in what the account takes: the others' owners send as well."""
        self._clock = clock
        self._customers = customers
        self._file = file
        self._hold = hold
        self._observe = observe
        self._owned: set[int] = set()
        self._joined = False
        self._turns: deque[Partition] = deque()
        """Whose turn it is to send."""
        self._sending: dict[asyncio.Task[None], Delivery] = {}
        self._news = asyncio.Event()
        """For the loop."""
        self._room = asyncio.Event()
        """For who sends: there may be something to send, or a connection for it."""
        self._failure: BaseException | None = None
        self._polled_at = 0
        self.partitions: dict[int, Partition] = {}
        """Those at work; the other ones that are ours are restored."""
        self.restoring = Restoring(Stage.DELIVER, restore)
        self.settled = False
        """Whether it has been told what it owns, and has restored all of it; once true it stays so."""
        self.commits = Commits(Stage.DELIVER, clock)
        self.turned = clock.elapsed()
        """When the loop last went round, by the monotonic clock."""

    # What is seen from outside

    @property
    def deliveries(self) -> list[Delivery]:
        """The cores, one for each partition at work."""
        return [each.delivery for each in list(self.partitions.values())]

    @property
    def paused(self) -> str | None:
        """Why nothing more is read somewhere and a person is needed; None where all goes on."""
        return next((why for each in self.deliveries if (why := each.paused)), None)

    def pending(self) -> Pending:
        """What is neither finished nor parked. Of what is unread the first totals are looked at, in each partition."""
        due: list[int] = []
        oldest: dict[str, int] = {}
        for number, partition in list(self.partitions.items()):
            if (here := partition.delivery.oldest_due()) is not None:
                due.append(here)
            _merge(oldest, partition.delivery.oldest_pending())
            for each in self._unread.read(number, partition.next, READ_AT_ONCE):
                if isinstance(record := totals.decode(each.value), Total):
                    due.append(record.due)
                    _merge(oldest, {record.meter: record.timestamp})
        return Pending(min(due, default=None), oldest)

    def oldest_parked(self) -> dict[tuple[str, str], int]:
        """The earliest timestamp, in seconds, of what is parked, by meter and reason."""
        oldest: dict[tuple[str, str], int] = {}
        for each in self.deliveries:
            _merge(oldest, {(meter, str(reason)): at for (meter, reason), at in each.oldest_parked().items()})
        return oldest

    @property
    def stopped(self) -> set[str]:
        """The event names whose meter Stripe refuses."""
        return {event_name for each in self.deliveries for event_name in each.stops.names()}

    @property
    def customers_refused(self) -> bool | None:
        """Whether the customers' file, as it is now, is of no use; None where there is no file."""
        return None if self._file is None else self._file.refused

    def wake(self) -> None:
        """There may be something to do. To be called in the event loop's thread."""
        self._news.set()
        self._room.set()

    # What is ours: called by the membership, in any thread but that of the event loop

    def assigned(self, partitions: Collection[int]) -> None:
        """Restore these, and go on with them as soon as that is done."""
        self._loop.call_soon_threadsafe(self._own, partitions)

    def revoked(self, partitions: Collection[int]) -> None:
        """Send nothing more of these, commit them for the last time, and let go of them."""
        changes = self._in_loop(self._finish(partitions))
        try:
            if changes:
                self._store.commit(Stage.DELIVER, changes)
        except CommitFailed as failed:
            self.commits.failed(changes, failed)
        self.lost(partitions)

    def lost(self, partitions: Collection[int]) -> None:
        """Let go of these, as they are."""
        self._in_loop(self._disown(partitions))

    def _in_loop(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    def _own(self, partitions: Collection[int]) -> None:
        self._joined = True
        self._drop(partitions)
        self._owned.update(partitions)
        for number in partitions:
            self.restoring.begin(number)
        self._news.set()

    async def _disown(self, partitions: Collection[int]) -> None:
        self._owned.difference_update(partitions)
        for number in partitions:
            self.restoring.give_up(number)
        self._drop(partitions)

    def _drop(self, partitions: Iterable[int]) -> None:
        for number in partitions:
            partition = self.partitions.pop(number, None)
            if partition is not None:
                partition.delivery.drop()
                self._turns.remove(partition)
                self._unread.let_go(number)
                self._ahead.let_go(number)
        self._share()

    def _share(self) -> None:
        if self.partitions:
            self.outlet.pacing.limit(self._rate * len(self.partitions))

    def _take_over(self) -> None:
        for number, (offset, entries) in self.restoring.done():
            delivery = self._deliver(self._customers)
            delivery.restore(offset, entries, self._clock.now())
            if self._hold:
                delivery.retire(self._clock.now())
            partition = self.partitions[number] = Partition(delivery, offset)
            self._turns.append(partition)
            self.wake()
            self._share()
            log.info("totals_taken_over", partition=number, offset=offset, entries=len(entries))
        self.settled = self.settled or (self._joined and not len(self.restoring))

    # The loop

    async def run(self, stopping: asyncio.Event) -> None:
        """Go round until ``stopping``, wait shortly for answers, and commit once more."""
        self._loop = asyncio.get_running_loop()
        gc.freeze()  # what has been imported stays
        gc.set_threshold(GARBAGE, *gc.get_threshold()[1:])
        self._membership.join(self)
        sender = asyncio.create_task(self._send_on())
        sender.add_done_callback(self._ended)
        try:
            while not stopping.is_set():
                await self._turn()
            changes = await self._finish(list(self.partitions))
            await self._commit(changes)
        finally:
            sender.cancel()
            await self._disown(list(self._owned))
            await asyncio.to_thread(self._membership.close)

    async def _turn(self) -> None:
        self.turned = self._clock.elapsed()
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        if self.turned - self._polled_at >= POLL_EVERY_MS:
            self._polled_at = self.turned
            # In a thread: what the membership tells us may want an answer of this loop.
            await asyncio.to_thread(self._membership.poll)
        self._take_over()
        self._look_at_customers()
        await self._read()
        if any(each.due for each in self.deliveries):
            # With what the others have: a commit costs as much for one partition as for all.
            await self._commit(self._changes(self.partitions))
        await self._rest()

    async def _rest(self) -> None:
        await asyncio.sleep(TURN_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._news.wait()

    def _next(self) -> tuple[Delivery, Attempt] | None:
        """The next attempt; the partitions take turns."""
        now = self._clock.now()
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            delivery = self._turns[0].delivery
            if (attempt := delivery.next(now)) is not None:
                return delivery, attempt
        return None

    async def _read(self) -> None:
        wanted = {
            number: (partition.next, min(room, READ_AT_ONCE))
            for number, partition in self.partitions.items()
            if not self._hold and (room := partition.delivery.room) > 0
        }
        full = {
            number: max(partition.heard_below, partition.next)
            for number, partition in self.partitions.items()
            if number not in wanted
        }
        if not self.partitions:
            return
        found = await asyncio.to_thread(
            lambda: {
                number: (self._unread.read(number, *what), self._unread.reached(number, what[0]))
                for number, what in wanted.items()
            }
        )
        now = self._clock.now()
        for number, (records, reached) in found.items():
            partition = self.partitions[number]
            for each in records:
                if each.offset >= partition.heard_below or totals.is_of_stage_1(each.value):
                    partition.delivery.read(each.offset, totals.decode(each.value), now)
            if records:
                partition.next = records[-1].offset + 1
                self._news.set()
            elif reached > partition.next:
                partition.next = reached
                partition.delivery.reach(reached)
        if full:
            await self._hear(full)
        for partition in self.partitions.values():
            self._tell(partition)

    def _tell(self, partition: Partition) -> None:
        """Log what the core has noted: somebody decided, or reported, something that was not done."""
        delivery = partition.delivery
        new, partition.noted = delivery.noted - partition.noted, delivery.noted
        for note in list(delivery.notes)[-new:] if new else ():
            log.warning("record_not_applied", identifier=note.identifier, reason=note.text)

    async def _hear(self, full: dict[int, int]) -> None:
        """Where no total may be read, a decision further on in the log may be what makes room; and whoever holds or
        pauses wants to see what is reported."""
        found = await asyncio.to_thread(
            lambda: {number: self._ahead.read(number, offset, READ_AT_ONCE) for number, offset in full.items()}
        )
        for number, records in found.items():
            partition = self.partitions[number]
            for each in records:
                if not totals.is_of_stage_1(each.value):
                    partition.delivery.hear(totals.decode(each.value), self._clock.now())
            if records:
                partition.heard_below = records[-1].offset + 1
                self._news.set()

    # Commits

    def _changes(self, partitions: Iterable[int]) -> dict[int, Changes]:
        now = self._clock.now()
        found = {number: self.partitions[number].delivery.commit(now) for number in partitions}
        return {number: changes for number, changes in found.items() if changes is not None}

    async def _finish(self, partitions: Collection[int]) -> dict[int, Changes]:
        """Send nothing more of these, wait shortly for answers, and return what is left to be made durable."""
        ending = [each.delivery for number in partitions if (each := self.partitions.get(number)) is not None]
        for delivery in ending:
            # What was marked and will not be sent now must not come back as possibly sent.
            delivery.retire(self._clock.now())
        sending = [task for task, delivery in self._sending.items() if delivery in ending]
        if sending:
            await asyncio.wait(sending, timeout=LAST_ANSWERS_S)
        for task in sending:
            task.cancel()
        return self._changes(number for number in partitions if number in self.partitions)

    async def _commit(self, changes: dict[int, Changes]) -> None:
        if not changes:
            return
        began = self._clock.elapsed()
        try:
            await asyncio.to_thread(self._store.commit, Stage.DELIVER, changes)
        except CommitFailed as failed:
            again_s = self.commits.failed(changes, failed)
            self._drop(changes)
            for number in self._owned.intersection(changes):
                self.restoring.begin(number, after_s=again_s)
            return
        for number in changes:
            self.partitions[number].delivery.committed()
        self.commits.made(began)
        self.wake()

    # Sending

    async def _send_on(self) -> None:
        """Send what may be sent, beside the loop: that waits for reads and commits."""
        while not self._hold:
            self._room.clear()
            while len(self._sending) < CONNECTIONS and (found := self._next()) is not None:
                delivery, attempt = found
                task = asyncio.create_task(self._send(delivery, attempt))
                self._sending[task] = delivery
                task.add_done_callback(self._sent)
            if any(each.due for each in self.deliveries):
                self._news.set()
            await asyncio.sleep(PULSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s()):
                    await self._room.wait()

    def _idle_s(self) -> float:
        """How long nothing can be sent, as far as time alone decides."""
        now = self._clock.now()
        wake = None
        if len(self._sending) < CONNECTIONS:
            wake = min((at for each in self.deliveries if (at := each.wake(now)) is not None), default=None)
        return LOOK_AGAIN_S if wake is None else min(LOOK_AGAIN_S, max(0.0, (wake - now) / 1000))

    async def _send(self, delivery: Delivery, attempt: Attempt) -> None:
        # The last look before the request: an identifier protects for a day and no longer, and others may own it now.
        if not delivery.may_send(attempt, self._clock.now()):
            return
        began = self._clock.elapsed()
        heard = await self._stripe.send(attempt)
        now = self._clock.now()
        delivery.answered(attempt, heard, now)
        self._observe(attempt, heard, (self._clock.elapsed() - began) / 1000)
        log.debug("answered", identifier=attempt.identifier, key=attempt.key, heard=heard)
        if isinstance(heard, Answer) and heard.status not in {200, 429} and heard.status < 500:
            # Stripe's message names the customer; it is kept with the total.
            what = {"status": heard.status, "type": heard.type, "code": heard.code}
            log.warning("stripe_refused", identifier=attempt.identifier, **what)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.pop(task, None)
        self._ended(task)
        self.wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            self._news.set()

    def _look_at_customers(self) -> None:
        changed = self._file.changed() if self._file else None
        if changed is not None:
            self._customers = changed
            for each in self.deliveries:
                each.remap(changed, self._clock.now())


def _merge(oldest: dict[K, int], more: Mapping[K, int]) -> None:
    for key, at in more.items():
        oldest[key] = min(at, oldest.get(key, at))
