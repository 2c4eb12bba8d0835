"""Whatever happens, in whatever order: everything is billed once, and every total is somewhere."""

import re
from decimal import Decimal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.deliver.doubt import own
from consumer.deliver.entries import Entry
from consumer.totals import Total
from tests.unit.delivery_world import BROKEN, BUSY, HOUR, MINUTE, NO_METER, REFUSED, UNAUTHORISED, World

CUSTOMERS = {"alice": "cus_1", "al": "cus_1", "bob": "cus_2", "carol": "cus_3", "free": None}
METERS = ("ai-tokens", "storage")
NOTHING: list[Heard] = [BUSY, Answer(409, "idempotency_error"), NeverConnected(), UNAUTHORISED, REFUSED, NO_METER]


class Conservation(RuleBasedStateMachine):
    """Random lives of a small delivery with a Stripe that takes, refuses, breaks, and loses its answers."""

    @initialize(in_flight=st.sampled_from([1, 3, 40]), parked_limit=st.sampled_from([3, 1000]))
    def begin(self, in_flight: int, parked_limit: int) -> None:
        self.world = World(names={"alice": "cus_1"}, in_flight=in_flight, parked_limit=parked_limit)
        self.out: list[Attempt] = []
        self.stored = False
        self.sent_under: dict[str, set[tuple[str, str]]] = {}

    @rule(
        customer=st.sampled_from([*CUSTOMERS, "nobody"]),
        value=st.sampled_from(["0", "1", "-2.5", "0.000000000001", "999999999999999.9", "123456789.123456789012"]),
        meter=st.sampled_from(METERS),
        count=st.integers(1, 4),
    )
    def produce(self, customer: str, value: str, meter: str, count: int) -> None:
        for _ in range(count):
            self.world.total(customer, value, meter=meter)

    @rule(data=st.data(), action=st.sampled_from(["release", "discard"]), times=st.integers(1, 2))
    def decide(self, data: st.DataObject, action: str, times: int) -> None:
        """Where nothing can be at Stripe as they like; where something may be, a person looks, and makes no mistake."""
        parked = {entry.total.identifier: entry for entry in self.world.delivery.parked()}
        if parked:
            entry = parked[data.draw(st.sampled_from(sorted(parked)))]
            for _ in range(times):
                self.world.command(self.looked(entry) or action, entry.total.identifier)

    def looked(self, entry: Entry) -> str | None:
        """What a person would do who sees everything that is at Stripe; None where there is nothing to see."""
        if not own(entry):
            return None
        return "discard" if entry.total.identifier in self.at_stripe() else "release"

    def at_stripe(self) -> dict[str, tuple[str, str]]:
        """Customer and value of each total that was billed, in whatever generation."""
        billed = self.world.stripe.billed
        return {re.sub(r"-g\d+$", "", name): (customer, value) for name, customer, value in billed}

    @rule(known=st.sets(st.sampled_from(sorted(CUSTOMERS))), fails=st.booleans())
    def map(self, known: set[str], *, fails: bool) -> None:
        self.world.names.known = {name: CUSTOMERS[name] for name in known}
        self.world.names.fails = fails
        self.world.delivery.remap(self.world.names, self.world.now)

    @rule()
    def read(self) -> None:
        self.world.read()

    @rule()
    def read_beyond_the_room(self) -> None:
        self.world.obey()

    @rule()
    def store(self) -> None:
        if not self.stored:
            self.stored = self.world.store()

    @rule()
    def settle(self) -> None:
        if self.stored:
            self.world.delivery.committed()
            self.stored = False

    @rule(count=st.integers(1, 10))
    def send(self, count: int) -> None:
        for _ in range(count):
            attempt = self.world.send()
            if attempt is not None and self.world.delivery.may_send(attempt, self.world.now):
                self.note(attempt)
                self.out.append(attempt)

    def note(self, attempt: Attempt) -> None:
        lanes = [(other.stripe_customer, other.event_name) for other in self.out]
        assert (attempt.stripe_customer, attempt.event_name) not in lanes, "two at a time in one lane"
        self.sent_under.setdefault(attempt.identifier, set()).add((attempt.payload["value"], str(attempt.timestamp)))
        assert len(self.sent_under[attempt.identifier]) == 1, "one identifier has two values"

    @rule(
        data=st.data(), how=st.sampled_from(["works", "works", "works", "loses", "breaks", "lost", "broken", "nothing"])
    )
    def answer(self, data: st.DataObject, how: str) -> None:
        """Stripe works, or takes it and loses or breaks the answer, or does not take it and says so or does not."""
        if not self.out:
            return
        attempt = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        heard: Heard = BROKEN
        if how in {"works", "loses", "breaks"}:
            heard = self.world.stripe.post(attempt, self.world.now, broken=how == "breaks")
        elif how == "nothing":
            heard = data.draw(st.sampled_from(NOTHING))
        self.world.delivery.answered(attempt, Lost() if how in {"loses", "lost"} else heard, self.world.now)

    @rule(arrive=st.booleans())
    def crash(self, *, arrive: bool) -> None:
        """What was written arrives at Stripe, or does not."""
        for attempt in self.out:
            if arrive:
                self.world.stripe.post(attempt, self.world.now)
        self.out = []
        self.stored = False
        self.world.restart()

    @rule(arrive=st.booleans())
    def fall_into_doubt(self, *, arrive: bool) -> None:
        """It dies while it sends, and is away for a day: nobody can ask Stripe any more what became of it."""
        self.settle()
        self.read()
        self.store()
        self.settle()
        self.send(3)
        self.crash(arrive=arrive)
        self.world.wait(24 * HOUR)
        self.send(10)

    @rule(milliseconds=st.sampled_from([1, 1000, 20_000, 10 * MINUTE, 5 * HOUR]))
    def wait(self, milliseconds: int) -> None:
        self.world.wait(milliseconds)

    @invariant()
    def every_total_is_somewhere(self) -> None:
        assert self.world.balanced()

    @invariant()
    def nothing_is_billed_twice(self) -> None:
        assert len(self.world.stripe.billed) == len(self.at_stripe())

    @invariant()
    def nothing_is_in_two_places(self) -> None:
        delivery = self.world.delivery
        books = delivery.ledger.books.values()
        assert sum(book.pending.totals for book in books) == delivery.in_flight + delivery.aside
        assert delivery.room >= 0

    def teardown(self) -> None:
        """In the end everything works and everybody is mapped; a person looks, and decides about all that is left."""
        world = self.world
        self.out = []
        world.restart()
        world.names.fails = False
        world.names.known = {**CUSTOMERS, "nobody": "cus_4"}
        world.delivery.remap(world.names, world.now)
        for _ in range(30):
            world.run(world.now + 2 * HOUR)
            for entry in world.delivery.parked():
                world.command(self.looked(entry) or "release", entry.total.identifier)
            world.obey()
            if world.position == len(world.log) and not world.delivery.in_flight and not world.due():
                break
        self.everything_has_ended_once()

    def everything_has_ended_once(self) -> None:
        world = self.world
        totals = {total.identifier: total for total in world.log if isinstance(total, Total)}
        at_stripe = self.at_stripe()
        ended = {outcome.identifier: outcome for outcome in world.outcomes}
        assert len(ended) == len(world.outcomes), "a total ended twice"
        assert ended.keys() == totals.keys()
        assert not world.parked()
        assert not world.entries
        for identifier, outcome in ended.items():
            doubts = [each for each in outcome.decisions if each.first_unproven is not None]
            delivered = outcome.how in {"delivered", "duplicate"}
            assert (identifier in at_stripe) == (delivered or (outcome.how == "discarded" and bool(doubts)))
            assert outcome.generation == 1 + len([each for each in doubts if each.action == "release"])
            if delivered:
                assert at_stripe[identifier] == (outcome.stripe_customer, outcome.billed)
            billed = Decimal(outcome.billed) if outcome.how in {"delivered", "duplicate"} else Decimal(outcome.value)
            assert billed + Decimal(outcome.rounded) == Decimal(totals[identifier].value)
        assert world.balanced()


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
