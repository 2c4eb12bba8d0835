"""The loop of stage 2: it reads the totals log, lets the core decide, makes that durable, and sends."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from consumer import totals
from consumer.deliver.answers import Answer, Heard
from consumer.deliver.delivery import Attempt, Delivery
from consumer.runtime.clocks import Clock
from consumer.runtime.customers import CustomerFile
from consumer.runtime.stripe import CONNECTIONS, Stripe
from consumer.storage import Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Command, Total

log = structlog.get_logger()

PARTITION: Final = 0
"""One process has one log of totals."""
READ_AT_ONCE: Final = 1_000
LOOK_AGAIN_S: Final = 0.5
"""How often the log is looked at for what other processes append, and the customers' file for changes."""
LAST_ANSWERS_S: Final = 3.0
"""How long a stop waits for answers to what has been sent: each one saves a second attempt."""

Observer = Callable[[Attempt, Heard, float], None]


class Reporter:
    """Sends totals until told to stop; see ``run``."""

    def __init__(
        self,
        store: SqliteStore,
        delivery: Delivery,
        stripe: Stripe,
        *,
        clock: Clock,
        customers: CustomerFile | None,
        hold: bool,
        observe: Observer,
    ) -> None:
        """``hold``: send nothing, and leave totals in their log. ``observe`` is told of every answer and its time."""
        self.delivery = delivery
        self._store = store
        self._stripe = stripe
        self._clock = clock
        self._customers = customers
        self._hold = hold
        self._observe = observe
        self._next = 1
        self._obeyed_below = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._failure: BaseException | None = None
        self.turned = clock.elapsed()
        """When the loop last went round, by the monotonic clock."""
        self.last_commit: tuple[int, float] | None = None
        """When (time of day, ms) the last commit was made and how long it took, in seconds."""

    def restore(self) -> None:
        """Begin where the last commit ended."""
        restored = self._store.restore(Stage.DELIVER, PARTITION)
        self._next = restored.offset if restored else 1
        self.delivery.restore(self._next, restored.entries if restored else (), self._clock.now())

    @property
    def read_to(self) -> int:
        """The offset of the next record of the totals log."""
        return self._next

    def oldest_due(self) -> int | None:
        """Since when (ms) the oldest total that is neither finished nor parked has been due, if there is any."""
        here = self.delivery.oldest_due()
        # Between the totals lie advances, one for each partition at most, and what operators decided.
        for each in self._store.read(Log.TOTALS, self._next - 1, READ_AT_ONCE):
            record = totals.decode(each.value)
            if isinstance(record, Total):
                return record.due if here is None else min(here, record.due)
        return here

    def wake(self) -> None:
        """There may be something to do. To be called in the event loop's thread."""
        self._news.set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Go round until ``stopping``, wait shortly for answers, and commit once more."""
        if self._hold:
            self.delivery.retire(self._clock.now())
        while not stopping.is_set():
            await self._turn()
        # What was marked and will not be sent now must not come back as possibly sent.
        self.delivery.retire(self._clock.now())
        if self._sending:
            await asyncio.wait(self._sending, timeout=LAST_ANSWERS_S)
        for task in self._sending:
            task.cancel()
        await self._commit()

    async def _turn(self) -> None:
        self.turned = self._clock.elapsed()
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        self._look_at_customers()
        if not self._hold:
            await self._read()
        if self.delivery.due:
            await self._commit()
        while not self._hold and len(self._sending) < CONNECTIONS:
            attempt = self.delivery.next(self._clock.now())
            if attempt is None:
                break
            task = asyncio.create_task(self._send(attempt))
            self._sending.add(task)
            task.add_done_callback(self._sent)
        await self._rest()

    async def _rest(self) -> None:
        now = self._clock.now()
        wake = self.delivery.wake(now) if len(self._sending) < CONNECTIONS and not self._hold else None
        wait = LOOK_AGAIN_S if wake is None else min(LOOK_AGAIN_S, max(0.001, (wake - now) / 1000))
        try:
            async with asyncio.timeout(wait):
                await self._news.wait()
        except TimeoutError:
            pass

    async def _read(self) -> None:
        room = self.delivery.room
        if room <= 0:
            await self._look_for_commands()
            return
        records = await asyncio.to_thread(self._store.read, Log.TOTALS, self._next - 1, min(room, READ_AT_ONCE))
        now = self._clock.now()
        for each in records:
            record = totals.decode(each.value)
            if isinstance(record, Command) and each.offset < self._obeyed_below:
                continue
            self.delivery.read(each.offset, record, now)
        if records:
            self._next = records[-1].offset + 1
            self._news.set()

    async def _look_for_commands(self) -> None:
        """Where no total may be read, an operator's decision further on in the log may be what makes room."""
        after = max(self._obeyed_below, self._next) - 1
        records = await asyncio.to_thread(self._store.read, Log.TOTALS, after, READ_AT_ONCE)
        for each in records:
            if totals.is_command(each.value) and isinstance(record := totals.decode(each.value), Command):
                self.delivery.obey(record, self._clock.now())
        if records:
            self._obeyed_below = records[-1].offset + 1

    async def _commit(self) -> None:
        began = self._clock.elapsed()
        changes = self.delivery.commit(self._clock.now())
        if changes is None:
            return
        await asyncio.to_thread(self._store.commit, Stage.DELIVER, {PARTITION: changes})
        self.delivery.committed()
        self.last_commit = self._clock.now(), (self._clock.elapsed() - began) / 1000
        self._news.set()

    async def _send(self, attempt: Attempt) -> None:
        # The last look at the clock before the request: an identifier protects for a day and no longer.
        if not self.delivery.may_send(attempt, self._clock.now()):
            return
        began = self._clock.elapsed()
        heard = await self._stripe.send(attempt)
        now = self._clock.now()
        self.delivery.answered(attempt, heard, now)
        self._observe(attempt, heard, (self._clock.elapsed() - began) / 1000)
        log.debug("answered", identifier=attempt.identifier, key=attempt.key, heard=repr(heard))
        if isinstance(heard, Answer) and heard.status not in {200, 429} and heard.status < 500:
            log.warning("stripe_refused", identifier=attempt.identifier, status=heard.status, message=heard.message)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
        self._news.set()

    def _look_at_customers(self) -> None:
        changed = self._customers.changed() if self._customers else None
        if changed is not None:
            self.delivery.remap(changed, self._clock.now())
