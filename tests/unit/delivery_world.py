"""A small world for the delivery tests: a log, a durable store, a mapping, a clock, and a Stripe of a few lines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from consumer.deliver.answers import Answer, Heard
from consumer.deliver.customers import LookupFailedError, UnmappedError
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.entries import Entry, Outcome, decode_outcome, is_total, unpack
from consumer.deliver.pacing import Outlet
from consumer.storage import Log
from consumer.totals import Advance, Command, Destination, Record, Total

SECOND = 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

OK = Answer(200)
BROKEN = Answer(500, "api_error", message="Something went wrong")
BUSY = Answer(429, "invalid_request_error", "lock_timeout", "This object cannot be accessed right now")
REFUSED = Answer(400, "invalid_request_error", message="No such customer: 'cus_gone'")
NO_METER = Answer(400, "invalid_request_error", message='No active meter found for event name "ai_tokens".')
UNAUTHORISED = Answer(401, "invalid_request_error", message="Invalid API Key provided")


def duplicate(identifier: str) -> Answer:
    """What Stripe says to an identifier that it has: there is no code."""
    message = f"An event already exists with identifier {identifier}."
    return Answer(400, "invalid_request_error", message=message, should_retry=False)


@dataclass
class Names:
    """A mapping: unknown names are unmapped; while it fails, nothing is known of anybody."""

    known: dict[str, str | None]
    fails: bool = False

    def stripe_customer(self, name: str) -> str | None:
        if self.fails:
            raise LookupFailedError(name)
        try:
            return self.known[name]
        except KeyError:
            raise UnmappedError(name) from None


@dataclass
class Stripe:
    """Identifiers are unique for a day, answers are stored under their key; it says what it was told to say, once."""

    events: dict[str, tuple[int, Attempt]] = field(default_factory=dict)
    billed: list[tuple[str, str, str]] = field(default_factory=list)
    """Identifier, customer and value of everything it took, in order."""
    stored: dict[str, tuple[Attempt, Answer]] = field(default_factory=dict)

    def post(self, attempt: Attempt, now: int, *, broken: bool = False) -> Answer:
        """Take a Meter Event; a broken one is taken and answered with 500 all the same."""
        if attempt.key in self.stored:
            first, answer = self.stored[attempt.key]
            if first != attempt:
                return Answer(400, "idempotency_error", message="Keys can only be used with the same parameters")
            return Answer(answer.status, answer.type, message=answer.message, replayed=True)
        known = self.events.get(attempt.identifier)
        if known and now - known[0] < 24 * HOUR:
            return duplicate(attempt.identifier)
        self.events[attempt.identifier] = (now, attempt)
        self.billed.append((attempt.identifier, attempt.stripe_customer, attempt.payload["value"]))
        answer = BROKEN if broken else OK
        self.stored[attempt.key] = (attempt, answer)
        return answer


class World:
    """A delivery, what it has made durable, and what it reads."""

    def __init__(
        self,
        *,
        names: dict[str, str | None] | None = None,
        in_flight: int = 100,
        parked_limit: int = 1000,
        max_rate: float = 1000,
        outlet: Outlet | None = None,
        shadow: bool = False,
    ) -> None:
        """With an outlet, it is another delivery of the process that has the outlet already."""
        self.now = 1_780_000_000_000
        self.names = Names(names if names is not None else {"alice": "cus_alice", "bob": "cus_bob"})
        self.bounds = (in_flight, parked_limit)
        self.outlet = outlet or Outlet(max_rate)
        self.shadow = shadow
        self.log: list[Record] = []
        self.offset = 0
        self.durable: dict[bytes, bytes] = {}
        self.outcomes: list[Outcome] = []
        self.stripe = Stripe()
        self.begin()

    def restart(self) -> None:
        """The process dies, and another one restores what was durable."""
        self.outlet = Outlet(self.outlet.pacing.max_rate)
        self.begin()

    def begin(self) -> None:
        """Restore what is durable, through the outlet that is there."""
        in_flight, parked_limit = self.bounds
        self.delivery = Delivery(
            customers=self.names, in_flight=in_flight, parked_limit=parked_limit, outlet=self.outlet, shadow=self.shadow
        )
        self.delivery.restore(self.offset, list(self.durable.items()), self.now)
        self.position = self.offset
        if self.delivery.due:
            self.commit()

    def total(self, customer: str = "alice", value: str = "5", *, meter: str = "ai-tokens", event: str = "") -> str:
        """One more total in the log; returns its identifier."""
        identifier = f"tm1-{len(self.log)}-{customer}"
        to = Destination(event or meter.replace("-", "_"))
        start = 1_779_999_000
        self.log.append(
            Total(identifier, "p", meter, "e", 0, start, "1m", 0, 0, customer, value, 3, start + 7, 0, 9, to)
        )
        return identifier

    def command(self, action: str, identifier: str, by: str = "eve") -> Command:
        """One more command in the log, about the total as it is parked now."""
        parking = next((each.parking for each in self.delivery.parked() if each.total.identifier == identifier), 1)
        decided: Literal["release", "discard"] = "release" if action == "release" else "discard"
        self.log.append(command := Command(decided, identifier, by, "because", self.now, parking))
        return command

    def advance(self) -> None:
        """One more advance in the log."""
        self.log.append(Advance(0, len(self.log), self.now))

    def read(self) -> None:
        """Read all there is room for."""
        while self.position < len(self.log) and self.delivery.room:
            self.delivery.read(self.position, self.log[self.position], self.now)
            self.position += 1

    def obey(self) -> None:
        """Read all that is in the log, room or not."""
        while self.position < len(self.log):
            self.delivery.read(self.position, self.log[self.position], self.now)
            self.position += 1

    def commit(self) -> bool:
        """Make everything durable and say so."""
        if not self.store():
            return False
        self.delivery.committed()
        return True

    def store(self) -> bool:
        """Make everything durable; the delivery does not hear of it yet."""
        changes = self.delivery.commit(self.now)
        if changes is None:
            return False
        assert changes.offset >= self.offset
        assert not changes.puts.keys() & set(changes.deletes)
        self.offset = changes.offset
        self.durable.update(changes.puts)
        for key in changes.deletes:
            self.durable.pop(key, None)
        assert all(append.log is Log.OUTCOMES for append in changes.appends)
        self.outcomes += [decode_outcome(append.value) for append in changes.appends]
        return True

    def entry(self, identifier: str) -> Entry:
        """The durable entry."""
        return unpack(self.durable[identifier.encode()])

    @property
    def entries(self) -> dict[str, Entry]:
        """All durable entries of totals."""
        return {key.decode(): unpack(value) for key, value in self.durable.items() if is_total(key)}

    def send(self) -> Attempt | None:
        """The next attempt, which must be marked durably already."""
        attempt = self.delivery.next(self.now)
        if attempt is not None:
            durable = self.entry(attempt.total)
            assert durable.first_unproven is not None, "sent without a durable mark"
            assert durable.customer == attempt.stripe_customer, "sent to somebody else than the entry says"
        return attempt

    def must_send(self) -> Attempt:
        """The next attempt, which must be there, and must still go in the line before it is written."""
        attempt = self.send()
        assert attempt is not None
        assert self.delivery.may_send(attempt, self.now)
        return attempt

    def sent(self, customer: str = "alice", value: str = "5") -> Attempt:
        """Put a total into the log, read it, commit and send it."""
        self.total(customer, value)
        self.read()
        assert self.commit()
        return self.must_send()

    def wait(self, milliseconds: int) -> None:
        """Time goes by."""
        self.now += milliseconds

    def run(self, until: int, answer: Callable[[Attempt], Heard] | None = None) -> None:
        """Deliver with a Stripe that works, or answers like this, until a time or until nothing is left to do."""
        while self.now <= until:
            self.read()
            if self.delivery.due:
                self.commit()
            while (attempt := self.send()) is not None:
                if self.delivery.may_send(attempt, self.now):
                    heard = answer(attempt) if answer else self.stripe.post(attempt, self.now)
                    self.delivery.answered(attempt, heard, self.now)
            if not self.delivery.due:
                wake = self.delivery.wake(self.now)
                if wake is None:
                    break
                assert wake > self.now, "the shell would spin"
                self.now = wake
        self.commit()

    def due(self) -> bool:
        """Whether a commit is worth making now."""
        return self.delivery.due

    def parked(self) -> dict[str, str]:
        """Parked totals and why."""
        return {entry.total.identifier: str(entry.reason) for entry in self.delivery.parked()}

    def balanced(self) -> bool:
        """Whether every total that was read, and its value, is in exactly one other column."""
        return all(not book.missing and not book.astray for book in self.delivery.ledger.books.values())
