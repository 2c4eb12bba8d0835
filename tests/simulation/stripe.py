"""Stripe: identifiers are unique for a day, answers are stored under their keys, and not every answer arrives."""

from dataclasses import dataclass
from random import Random

from consumer.deliver.answers import Answer
from consumer.deliver.delivery import Attempt
from consumer.totals import Total
from tests.unit.delivery_world import BROKEN, BUSY, NO_METER, OK, REFUSED, UNAUTHORISED, duplicate
from tests.unit.stage1 import DAY

TOO_FAST = Answer(429, "invalid_request_error", "rate_limit", "Too many requests", limited="global-rate")
MISMATCH = Answer(400, "idempotency_error", message="Keys for idempotent requests can only be used with the same")


@dataclass(frozen=True, slots=True)
class Taken:
    """An event that Stripe bills."""

    at: int
    attempt: Attempt
    foreign: bool = False
    """Written by somebody else."""


@dataclass(slots=True)
class Mood:
    """How often, from 0 to 1, an attempt meets what."""

    breaks: float = 0
    """A 500, before or after the event was taken."""
    busy: float = 0
    loses: float = 0
    """The answer, on its way back."""
    dawdles: float = 0
    """The request arrives minutes later, when nobody waits any more."""


class SimulatedStripe:
    """One account. It forgets identifiers and keys after exactly a day, as early as it may."""

    def __init__(self, random: Random) -> None:
        self.taken: list[Taken] = []
        self.mood = Mood()
        self.away_until = 0
        self.locked_out_until = 0
        """The key is refused."""
        self.inactive: set[str] = set()
        """Event names without an active meter."""
        self.deleted: set[str] = set()
        """Customers."""
        self._random = random
        self._identifiers: dict[str, int] = {}
        self._stored: dict[str, tuple[int, Attempt, Answer]] = {}

    def post(self, attempt: Attempt, now: int) -> Answer:
        """One request has arrived."""
        if now < self.locked_out_until:
            return UNAUTHORISED
        if self._random.random() < self.mood.busy:
            return self._random.choice((BUSY, TOO_FAST))
        if (known := self._stored.get(attempt.key)) and now - known[0] < DAY:
            _, first, answer = known
            if first != attempt:
                return MISMATCH
            return Answer(answer.status, answer.type, answer.code, answer.message, replayed=True)
        answer = self._judge(attempt, now)
        self._stored[attempt.key] = (now, attempt, answer)
        return answer

    def _judge(self, attempt: Attempt, now: int) -> Answer:
        broken = self._random.random() < self.mood.breaks
        if broken and self._random.random() < 0.5:
            return BROKEN
        if attempt.stripe_customer in self.deleted:
            return REFUSED
        if attempt.event_name in self.inactive:
            return NO_METER
        since = self._identifiers.get(attempt.identifier)
        if since is not None and now - since < DAY:
            return duplicate(attempt.identifier)
        self._identifiers[attempt.identifier] = now
        self.taken.append(Taken(now, attempt))
        return BROKEN if broken else OK

    def take_from_elsewhere(self, identifier: str, beside: Total, value: str, customer: str, now: int) -> None:
        """Somebody else writes an event with this identifier, to the meter and minute of a total."""
        event_name = beside.stripe.event_name
        attempt = Attempt(identifier, "elsewhere", "?", event_name, value, {}, beside.timestamp, customer)
        self._identifiers[identifier] = now
        self.taken.append(Taken(now, attempt, foreign=True))
