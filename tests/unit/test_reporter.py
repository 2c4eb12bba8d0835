"""The loop of stage 2 on a store of its own: what people decide and Stripe reports where no total may be read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import pytest

from consumer import totals
from consumer.deliver.customers import Customers
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.entries import (
    SAME_IDENTIFIER_FOR,
    Entry,
    Reason,
    State,
    decode_outcome,
    encode_outcome,
    outcome,
    pack,
    refused,
    unpack,
)
from consumer.deliver.pacing import Outlet
from consumer.runtime.clocks import SystemClock
from consumer.runtime.customers import Passthrough
from consumer.runtime.membership import Alone
from consumer.runtime.reporter import Reporter
from consumer.runtime.stripe import Stripe
from consumer.runtime.totals_log import SqliteTotals
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.storage import Append, Changes, Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Command, Compared, Comparison, Record, Rejection, Report, Total
from tests.totals import total_of

NOW: Final = int(time.time())
CLOCK: Final = SystemClock()
WITHIN_S: Final = 30.0


class SteppingClock(SystemClock):
    """A host's clock, ahead by as much as a test says."""

    def __init__(self) -> None:
        self.ahead = 0

    def now(self) -> int:
        return super().now() + self.ahead


class Desk:
    """The store of a pipeline whose stage 1 has closed some totals."""

    def __init__(self, store: SqliteStore, stripe: StripeStandIn) -> None:
        self.store = store
        self.stripe = stripe
        self.clock = SteppingClock()

    def write(self, *records: Record) -> None:
        """More in the totals log."""
        self.store.append(Append(Log.TOTALS, b"k", totals.encode(each)) for each in records)

    def park(self, *given: Total) -> None:
        """All of these are read, and Stripe has refused them."""
        self.write(*given)
        entries = [Entry(each, State.PARKED, "cus_1", reason=Reason.REFUSED, parking=1) for each in given]
        puts = {each.total.identifier.encode(): pack(each) for each in entries}
        self.store.commit(Stage.DELIVER, {0: Changes(len(given) + 1, puts)})

    def run(
        self,
        until: Callable[[], object],
        *,
        hold: bool = False,
        shadow: bool = False,
        parked: int = 100,
        core: type[Delivery] = Delivery,
    ) -> None:
        """One life of stage 2, until something is durable."""

        async def live() -> None:
            outlet = Outlet(1000)
            stripe = Stripe(SECRET_KEY, api_base=self.stripe.url, livemode=False, clock=self.clock)

            def deliver(customers: Customers) -> Delivery:
                return core(customers=customers, in_flight=100, parked_limit=parked, outlet=outlet, shadow=shadow)

            reporter = Reporter(
                self.store,
                Alone(1),
                lambda *_: self.state(),
                unread=SqliteTotals(self.store),
                ahead=SqliteTotals(self.store),
                deliver=deliver,
                stripe=stripe,
                outlet=outlet,
                spread=1,
                clock=self.clock,
                customers=Passthrough(),
                file=None,
                hold=hold,
                observe=lambda *_: None,
            )
            stop = asyncio.Event()
            running = asyncio.create_task(reporter.run(stop))
            deadline = time.monotonic() + WITHIN_S
            while not until() and not running.done():
                assert time.monotonic() < deadline, "it does not come about"
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(running), 0.02)
            stop.set()
            await running
            await stripe.close()

        asyncio.run(live())

    def state(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """How far the totals log has been read, and the entries."""
        restored = self.store.restore(Stage.DELIVER, 0)
        assert restored is not None
        return restored.offset, list(restored.entries)

    def entry(self, of: Total) -> Entry:
        """Of a total that is not finished."""
        return unpack(dict(self.state()[1])[of.identifier.encode()])

    @property
    def keys(self) -> set[str]:
        return {key.decode() for key, _ in self.state()[1]}

    @property
    def became(self) -> list[tuple[str, str]]:
        """What became of totals, in order."""
        found = [decode_outcome(each.value) for each in self.store.read(Log.OUTCOMES, 0, 100)]
        return [(each.identifier, each.how) for each in found]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with (
        StripeStandIn(accept_any_customer=True) as stripe,
        SqliteStore.open(tmp_path / "tallyman.db", now=CLOCK.now, create=True, lock=True) as store,
    ):
        stripe.model.add_meter("tokens")
        yield Desk(store, stripe)


def discard(of: Total) -> Command:
    return Command("discard", of.identifier, "ann", "test customer", CLOCK.now(), 1)


def release(of: Total) -> Command:
    return Command("release", of.identifier, "ann", "", CLOCK.now(), 1)


def report(name: str) -> Report:
    return Report(name, CLOCK.now(), "tokens", NOW - 60, NOW, {"no_meter": 7}, 1)


def rejection(of: Total) -> Rejection:
    """Of a total that was delivered."""
    ended = outcome(Entry(of, customer="cus_1"), "delivered", CLOCK.now(), key=of.identifier)
    then = msgspec.Raw(encode_outcome(refused(ended, "no_meter: gone", CLOCK.now())))
    return Rejection(of.identifier, of.identifier, "no_meter", "gone", "evt_1", CLOCK.now(), then)


def test_on_hold_what_is_decided_and_reported_is_done_once_and_totals_stay_in_their_log(desk: Desk) -> None:
    """Hold may last for days: who clears up meanwhile, or looks at Stripe's reports, sees what comes of it."""
    first, second, third = (total_of(name, NOW - 600, "cus_1") for name in ("1", "2", "3"))
    unread, gone = (total_of(name, NOW - 600, "cus_1") for name in ("unread", "gone"))
    desk.park(first, second, third)
    comparison = Comparison(CLOCK.now(), {"tokens": Compared(CLOCK.now(), 0, 86_400, differs=1, missing="5")})
    desk.write(unread, discard(first), release(third), rejection(gone), report("evt_1"), comparison)

    def heard() -> bool:
        if "comparison/" in desk.keys:
            released = desk.entry(third)
            assert (released.state, released.first_unproven) == (State.RETRY, None), "killed now it would look tried"
            return True
        return False

    desk.run(heard, hold=True)
    decided = [(first.identifier, "discarded"), (gone.identifier, "refused")]
    assert desk.became == decided
    assert desk.state()[0] == 4, "the next total is not read"
    assert {"report/evt_1", f"rejected/{gone.identifier}", second.identifier} <= desk.keys

    desk.write(discard(second))
    desk.run(lambda: len(desk.became) > len(decided), hold=True)
    decided.append((second.identifier, "discarded"))
    assert desk.became == decided

    desk.run(lambda: len(desk.became) > len(decided) + 1)
    assert desk.became[:3] == decided
    assert sorted(desk.became[3:]) == [(third.identifier, "delivered"), (unread.identifier, "delivered")]
    assert len(desk.stripe.model.events) == 2


def test_where_too_many_are_parked_what_stripe_reports_and_who_makes_room_is_heard(desk: Desk) -> None:
    parked, unread = total_of("1", NOW - 600, "cus_1"), total_of("unread", NOW - 600, "cus_1")
    desk.park(parked)
    desk.write(unread, report("evt_1"))
    desk.run(lambda: "report/evt_1" in desk.keys, parked=1)
    assert desk.became == []

    desk.write(discard(parked))
    desk.run(lambda: len(desk.became) == 2, parked=1)
    assert desk.became == [(parked.identifier, "discarded"), (unread.identifier, "delivered")]


def test_the_age_of_an_identifier_is_looked_at_in_the_line_before_the_request(desk: Desk) -> None:
    """The last minute of its 23 hours goes by between the choice of what to send and the request for it."""
    total = total_of("1", NOW - 2 * 86_400, "cus_1")
    desk.write(total)
    tried = Entry(total, State.RETRY, "cus_1", first_unproven=CLOCK.now() - SAME_IDENTIFIER_FOR + 60_000, attempts=1)
    desk.store.commit(Stage.DELIVER, {0: Changes(2, {total.identifier.encode(): pack(tried)})})

    class Slow(Delivery):
        """A process that stands still as soon as it has something to send."""

        def next(self, now: int) -> Attempt | None:
            attempt = super().next(now)
            if attempt is not None:
                desk.clock.ahead = 60_000
            return attempt

    desk.run(lambda: desk.entry(total).state is State.PARKED, core=Slow)
    assert desk.entry(total).reason is Reason.IN_DOUBT
    assert desk.clock.ahead, "it was to be sent"
    assert desk.stripe.model.events == []


def test_from_send_to_hold_to_shadow_and_back_nothing_is_billed_that_was_shadowed_or_may_be_there(desk: Desk) -> None:
    """An answer was lost while it was sent. Whatever the mode is then, that total is a person's to settle."""
    doubtful, held, shadowed, sent = (
        total_of(name, NOW - 600, "cus_1") for name in ("doubtful", "held", "shadowed", "sent")
    )
    desk.write(doubtful, held)
    tried = Entry(doubtful, State.SENDING, "cus_1", first_unproven=CLOCK.now() - 60_000, attempts=1)
    desk.store.commit(Stage.DELIVER, {0: Changes(2, {doubtful.identifier.encode(): pack(tried)})})

    desk.write(report("evt_1"))
    desk.run(lambda: "report/evt_1" in desk.keys, hold=True)
    assert desk.entry(doubtful).first_unproven == tried.first_unproven, "hold forgets nothing of it"
    assert desk.became == []

    desk.write(shadowed)
    desk.run(lambda: len(desk.became) == 2 and desk.entry(doubtful).state is State.PARKED, shadow=True)
    assert desk.became == [(each.identifier, "shadowed") for each in (held, shadowed)]
    assert desk.entry(doubtful).reason is Reason.IN_DOUBT

    desk.write(sent)
    desk.run(lambda: len(desk.became) == 3)
    assert desk.became[-1] == (sent.identifier, "delivered")
    assert [each.identifier for each in desk.stripe.model.events] == [sent.identifier]
    assert desk.entry(doubtful).reason is Reason.IN_DOUBT
