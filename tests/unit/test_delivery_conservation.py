"""Whatever happens, in whatever order: everything is billed once, and every total is somewhere."""

from decimal import Decimal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
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

    @rule(data=st.data(), action=st.sampled_from(["release", "discard"]))
    def decide(self, data: st.DataObject, action: str) -> None:
        parked = sorted(self.world.parked())
        # A discard of what is at Stripe is a person's mistake, and theirs to answer for: it is not told to them here.
        held = {entry.total.identifier for entry in self.world.delivery.parked() if entry.first_unproven is None}
        identifiers = parked if action == "release" else [name for name in parked if name in held]
        if identifiers:
            self.world.command(action, data.draw(st.sampled_from(identifiers)))

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

    @rule(milliseconds=st.sampled_from([1, 1000, 20_000, 10 * MINUTE, 5 * HOUR]))
    def wait(self, milliseconds: int) -> None:
        self.world.wait(milliseconds)

    @invariant()
    def every_total_is_somewhere(self) -> None:
        assert self.world.balanced()

    @invariant()
    def nothing_is_billed_twice(self) -> None:
        billed = [identifier for identifier, *_ in self.world.stripe.billed]
        assert len(billed) == len(set(billed))

    @invariant()
    def nothing_is_in_two_places(self) -> None:
        delivery = self.world.delivery
        books = delivery.ledger.books.values()
        assert sum(book.pending.totals for book in books) == delivery.in_flight + delivery.aside
        assert delivery.room >= 0

    def teardown(self) -> None:
        """In the end everything works and everybody is mapped; a person releases and, where that is refused, looks."""
        world = self.world
        self.out = []
        world.restart()
        world.names.fails = False
        world.names.known = {**CUSTOMERS, "nobody": "cus_4"}
        world.delivery.remap(world.names, world.now)
        for _ in range(30):
            world.run(world.now + 2 * HOUR)
            for identifier in world.parked():
                world.command("release", identifier)
            world.obey()
            if world.position == len(world.log) and not world.delivery.in_flight and not world.due():
                break
        self.everything_has_ended_once()

    def everything_has_ended_once(self) -> None:
        world = self.world
        totals = {total.identifier: total for total in world.log if isinstance(total, Total)}
        at_stripe = {identifier: (customer, value) for identifier, customer, value in world.stripe.billed}
        ended = {outcome.identifier: outcome for outcome in world.outcomes}
        assert len(ended) == len(world.outcomes), "a total ended twice"
        assert ended.keys() | world.parked().keys() == totals.keys()
        assert not ended.keys() & world.parked().keys()
        assert world.entries.keys() == world.parked().keys()
        for entry in world.delivery.parked():
            assert entry.first_unproven is not None, "parked for no reason"
        for identifier, outcome in ended.items():
            assert (identifier in at_stripe) == (outcome.how in {"delivered", "duplicate"})
            if identifier in at_stripe:
                assert at_stripe[identifier] == (outcome.stripe_customer, outcome.billed)
            billed = Decimal(outcome.billed) if outcome.how in {"delivered", "duplicate"} else Decimal(outcome.value)
            assert billed + Decimal(outcome.rounded) == Decimal(totals[identifier].value)
        assert world.balanced()


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
