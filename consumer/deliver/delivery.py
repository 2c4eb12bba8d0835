"""The life of a total: from the log to Stripe, exactly once, or to a person.

A total is marked durably as possibly tried before it is tried. Whatever happens afterwards, the mark says what is
known: nothing was left at Stripe, or something may have been. Only delivery or a person clears the second.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from consumer.deliver.answers import Answer, Heard, Verdict, judge
from consumer.deliver.customers import Customers, LookupFailedError, UnmappedError
from consumer.deliver.entries import (
    LONGEST,
    LONGEST_MESSAGE,
    SAME_IDENTIFIER_FOR,
    Entry,
    How,
    Reason,
    Rejected,
    State,
    decode_outcome,
    encode_outcome,
    identifier_of,
    is_total,
    outcome,
    pack,
    refused,
    rejects,
    unpack,
)
from consumer.deliver.held import Parked, Seats
from consumer.deliver.journal import Journal
from consumer.deliver.ledger import PREFIX, Ledger
from consumer.deliver.pacing import MINUTE, SECOND, Outlet, Shut, delay
from consumer.deliver.reports import Noted, Reports
from consumer.deliver.schedule import Live, Phase, Schedule
from consumer.deliver.stops import Stops
from consumer.storage import Changes
from consumer.totals import Command, Record, Rejection, Total, for_stripe, plain, scaled

LOOK_UP_AGAIN: Final = 30 * SECOND
CLOCKS_DIFFER: Final = 60 * MINUTE
"""The hour that is left of Stripe's 24 is for this too."""

KEEP: Final = 90 * 24 * 60 * MINUTE

_COLLISIONS: Final = frozenset({Verdict.DUPLICATE, Verdict.MISMATCH})
_MARKED: Final = frozenset({Phase.ARMING, Phase.READY, Phase.SENT})


class Attempt(msgspec.Struct, frozen=True):
    """One Meter Event that may be written to Stripe now."""

    identifier: str
    """As Stripe is told it."""
    key: str
    """The Idempotency-Key."""
    meter: str
    event_name: str
    value: str
    payload: dict[str, str]
    timestamp: int
    """Whole seconds since the epoch."""
    stripe_customer: str
    generation: int = 1
    """Of the identifier."""

    @property
    def total(self) -> str:
        """The identifier of the total, in all its generations."""
        return self.identifier if self.generation == 1 else self.identifier.removesuffix(f"-g{self.generation}")


class Note(msgspec.Struct, frozen=True):
    """Something in the log that was not done, and why."""

    at: int
    identifier: str
    text: str


class Delivery:
    """Stage 2 on one partition of the totals log. Times are milliseconds since the epoch.

    A total that has been read is in exactly one place: in flight (the schedule), set aside (the seats) or parked.

    All deliveries of a process share one outlet. Whoever has several asks each in turn for its ``next``, and goes on
    behind the one that had something: otherwise the first takes all that the rate allows.
    """

    def __init__(
        self,
        *,
        customers: Customers,
        in_flight: int,
        parked_limit: int,
        outlet: Outlet,
        keep: int = KEEP,
        shadow: bool = False,
    ) -> None:
        """``restore`` comes first, and once; ``drop`` last.

        Args:
            customers: who they are at Stripe.
            in_flight: how many totals may be in flight in this delivery.
            parked_limit: how many may be parked.
            outlet: what all deliveries of the process share.
            keep: for how many milliseconds outcomes are kept.
            shadow: send nothing, and finish what would be sent.
        """
        self.ledger = Ledger()
        self.reports = Reports(keep)
        self.stops = Stops()
        self.alarms: dict[Reason, int] = {}
        """How many totals are parked, by reason, as of the last commit."""
        self.notes: deque[Note] = deque(maxlen=100)
        self.noted = 0
        """How many notes there ever were in this life."""
        self._customers = customers
        self._parked_limit = parked_limit
        self._seats = Seats(in_flight)
        self._parked = Parked()
        self._outlet = outlet
        self._schedule = Schedule(outlet)
        self._dropped = False
        self._shadow = shadow
        self._live: dict[str, Live] = {}
        self._attempts: dict[str, Attempt] = {}
        self._futile: set[str] = set()
        """Totals that were refused while the stage is paused for refusals."""
        self._journal: Journal[Live] = Journal(_pack)
        self._committing: dict[Reason, int] | None = None
        self._ours = True
        """Whether this life may go on with what others have perhaps tried: only a commit shows that no other has it."""

    # What is known from outside

    @property
    def room(self) -> int:
        """How many more totals may be read from the log now; the others lie well there."""
        if self._dropped:
            return 0
        if self.shut in {Shut.UNAUTHORISED, Shut.REFUSALS}:
            # Somebody has to find out whether it is cured, and everybody in here was refused.
            return min(1, self._seats.left) if self._live.keys() <= self._futile else 0
        return max(0, min(self._seats.left, self._parked_limit - len(self._parked) - self._seats.aside))

    @property
    def shut(self) -> Shut | None:
        """Why only one total at a time is tried; None where all may be."""
        return self._outlet.gate.shut

    @property
    def paused(self) -> str | None:
        """Why nothing more is read and a person is needed: ``unauthorised``, ``refusals`` or ``parked``.

        Totals that are set aside fill the same room, and make it again by themselves.
        """
        if self.shut in {Shut.UNAUTHORISED, Shut.REFUSALS}:
            return str(self.shut)
        return "parked" if len(self._parked) >= self._parked_limit else None

    @property
    def rate(self) -> float:
        """Attempts per second at most, as Stripe lets us."""
        return self._outlet.pacing.rate

    @property
    def in_flight(self) -> int:
        """Totals that are sending or to be retried."""
        return len(self._live)

    @property
    def aside(self) -> int:
        """Totals that wait for others of their customer."""
        return self._seats.aside

    @property
    def due(self) -> bool:
        """Whether a commit is worth making now: as much has changed as is moving, or nothing is left to send."""
        if self._committing is not None or self._dropped:
            return False
        return not self._ours or self._schedule.starved or len(self._journal) >= max(1, self._schedule.moving)

    def oldest_due(self) -> int | None:
        """Since when the oldest total in flight has been due; None where there is none."""
        return min((live.entry.total.due for live in list(self._live.values())), default=None)

    def oldest_pending(self) -> dict[str, int]:
        """The earliest timestamp, in seconds, of what is in flight or set aside, by meter."""
        found = self._seats.oldest.by_group()
        for live in list(self._live.values()):
            total = live.entry.total
            found[total.meter] = min(total.timestamp, found.get(total.meter, total.timestamp))
        return found

    def oldest_parked(self) -> dict[tuple[str, Reason], int]:
        """The earliest timestamp, in seconds, of what is parked, by meter and reason."""
        return self._parked.oldest.by_group()

    def parked(self) -> Iterator[Entry]:
        """The parked totals, in the order in which they were."""
        return iter(self._parked)

    # Restoring and committing

    def restore(self, offset: int, entries: Iterable[tuple[bytes, bytes]], now: int) -> None:
        """Begin where the last commit ended; without one, at the offset to begin at. Raises ``EntryError``."""
        for key, value in entries:
            if key.startswith(PREFIX):
                self.ledger.load(key, value)
            elif is_total(key):
                self._take_back(unpack(value), now)
            else:
                self.reports.load(key, value)
        for event_name in self._parked.stopped():
            self.stops.stop(event_name, "Stripe had no active meter for it", now)
        self._journal.forget()
        self._journal.offset = offset
        self._ours = not any(live.tried for live in self._live.values())
        self._fill(now)
        self.alarms = dict(self._parked.reasons)

    def _take_back(self, entry: Entry, now: int) -> None:
        self.ledger.restored(entry)
        if entry.state is State.PARKED:
            self._parked.add(entry)
        elif entry.state is State.ASIDE:
            self._seats.set_aside(entry.customer or entry.total.customer, entry)
        else:
            live = self._seat(entry)
            live.tried = entry.first_unproven is not None
            self._rest(live, now if entry.state is State.SENDING else entry.next_look)

    def commit(self, now: int) -> Changes | None:
        """What has to be made durable now, None where nothing has changed. ``committed`` comes before the next one."""
        if self._committing is not None:
            raise RuntimeError("the last commit is not settled")
        if self._dropped:
            return None
        for live in self._schedule.arm(now):
            self._journal.put(live.entry.total.identifier, live)
        if not self._ours:
            self._journal.move(self._journal.offset)
        for key in self.reports.expired(now):
            self._journal.remove(key)
        changes = self._journal.take()
        if changes is not None:
            changes.puts.update(self.ledger.changes())
            self._committing = dict(self._parked.reasons)
        return changes

    def committed(self) -> None:
        """The last commit is durable: what it marked may be sent, what it parked may be paged about."""
        if self._committing is None:
            raise RuntimeError("there is no commit to settle")
        self._schedule.armed()
        self._ours = True
        self.alarms, self._committing = self._committing, None

    def retire(self, now: int) -> None:
        """Before the last commit of a life: nothing is sent any more, and what was not sent must not look tried."""
        for live in self._schedule.retire():
            self._look(live, now)
        self._fill(now)

    def drop(self) -> None:
        """The partition is not ours any more, or what is known of it here is not to be trusted.

        Nothing is sent and nothing committed from now on, answers to come have no say, and the others have the outlet
        to themselves. Whoever gives up a delivery has to drop it, after ``retire`` too; to do it twice is harmless.
        """
        self._dropped = True
        self._attempts.clear()
        self._schedule.drop()

    # The log and the mapping

    def read(self, offset: int, record: Record, now: int) -> None:
        """Take the record at an offset; raises ``ValueError`` for one that was read before."""
        if offset < self._journal.offset:
            raise ValueError(f"offset {offset} was read before: the next one is {self._journal.offset}")
        self._journal.move(offset + 1)
        if isinstance(record, Total):
            self._begin(record, now)
        else:
            self.hear(record, now)

    def reach(self, offset: int) -> None:
        """There is no record below this offset that has not been read.

        A commit says so even if nothing else has changed: who begins at what retention has deleted finds totals lost.
        """
        self._journal.reach(offset)

    def hear(self, record: Record, now: int) -> None:
        """Take what people decided, or Stripe reported: also before what lies before it is read.

        To hear it twice is to hear it once.
        """
        if isinstance(record, Command):
            self._obey(record, now)
        elif isinstance(record, Rejection):
            self._reject(record, now)
        elif isinstance(record, Noted):
            self._keep(record)

    def _begin(self, total: Total, now: int) -> None:
        identifier = total.identifier
        if identifier in self._live or identifier in self._parked or identifier in self._seats:
            self._note(now, identifier, "it is in the log once more; the first one counts")
            return
        self._journal.begin(identifier)
        self.ledger.read(total)
        if scaled(total.value):
            self._place(Entry(total), now)
        else:
            self._finish(Entry(total), "zero", now)

    def _reject(self, rejection: Rejection, now: int) -> None:
        """Stripe took an event of a total, and rejected it later: what was delivered is refused now."""
        identifier = rejection.identifier
        live = self._live.get(identifier)
        entry = live.entry if live else self._parked.get(identifier)
        if entry is not None:
            told = Rejected(rejection.key, f"{rejection.code}: {rejection.message}", rejection.at)
            if all(each.key != told.key for each in entry.rejected):
                entry.rejected = [*entry.rejected, told]
                self._journal.put(identifier, live or self._parked.replace(entry))
        elif identifier in self._seats:
            self._note(now, identifier, f"the report {rejection.report} of Stripe names it, and it has not been sent")
        elif bytes(rejection.outcome) == b"null":
            # Which attempt ended it is not known here any more: Stripe is asked to say it again.
            self._note(now, identifier, f"the report {rejection.report} of Stripe names it, and it has ended meanwhile")
        elif self._keep(rejection):
            taken_back = decode_outcome(bytes(rejection.outcome))
            self.ledger.reject(taken_back)
            self._journal.append(taken_back)

    def _keep(self, noted: Noted) -> bool:
        """Whether it was not known yet."""
        entry = self.reports.note(noted)
        if entry is not None:
            self._journal.put(*entry)
        return entry is not None

    def _obey(self, command: Command, now: int) -> None:
        """Do what an operator decided about a parked total."""
        identifier = command.identifier
        live, entry = self._live.get(identifier), self._parked.get(identifier)
        if (known := live.entry if live else entry) is not None and known.was_decided(command):
            return  # heard ahead of its turn, in an earlier life
        refusal = "it is not parked, or not any more" if entry is None else _refusal(entry, command)
        if refusal:
            self._note(now, identifier, f"{command.action} by {command.by} is refused: {refusal}")
        elif command.action == "discard":
            how: How = "discarded" if command.found is None else "duplicate"
            self._finish(self._unpark(identifier, command), how, now, command=command)
        else:
            released = self._unpark(identifier, command)
            self.stops.lift(released.total.stripe.event_name)
            released.renew()
            self._place(released, now)
        self._fill(now)

    def remap(self, customers: Customers, now: int) -> None:
        """Use another mapping, for those who waited for it and for those who have not been tried."""
        self._customers = customers
        for customer, identifiers in self._parked.unmapped().items():
            try:
                customers.stripe_customer(customer)
            except (UnmappedError, LookupFailedError):
                continue
            for identifier in identifiers:
                self._place(self._unpark(identifier), now)
        moved = dict.fromkeys(live for live in self._live.values() if self._is_other_at_stripe(live))  # in their order
        self._schedule.withdraw(moved.__contains__)
        for live in moved:
            self._look(live, now)
        self._fill(now)

    def _is_other_at_stripe(self, live: Live) -> bool:
        if live.tried or live.phase is Phase.SENT:
            return False
        try:
            return self._customers.stripe_customer(live.entry.total.customer) != live.entry.customer
        except UnmappedError:
            return True
        except LookupFailedError:
            return False

    # Sending

    def next(self, now: int) -> Attempt | None:
        """An attempt to write to Stripe now; None where there is nothing to send now."""
        if not self._ours:
            return None
        self._probe_meters(now)
        for live in (woken := self._schedule.woken(now)):
            self._look(live, now)
        if woken:
            self._fill(now)
        if not self.shut:
            self._futile.clear()
        while (taken := self._schedule.take(now)) is not None:
            if self._may_go(taken, now):
                attempt = _attempt(taken.entry)
                self._attempts[attempt.identifier] = attempt
                return attempt
            self._turn_back(taken, now)
        return None

    def wake(self, now: int) -> int | None:
        """When ``next`` may have something that it has not now, as far as time alone decides."""
        if not self._ours or self._dropped:
            return None
        probe_at = None if self._shadow else self.stops.wake()
        times = [at for at in (self._schedule.wake(now), probe_at) if at is not None]
        return max(now, min(times)) if times else None

    def may_send(self, attempt: Attempt, now: int) -> bool:
        """Whether the attempt may be written at this moment; False ends it, and no answer to it is expected."""
        if self._attempts.get(attempt.identifier) is not attempt:
            return False
        live = self._live[attempt.total]
        if self._may_go(live, now):
            return True
        del self._attempts[attempt.identifier]
        self._turn_back(live, now)
        return False

    def _may_go(self, live: Live, now: int) -> bool:
        if self._shadow:
            return False
        marked, total = live.entry.first_unproven, live.entry.total
        stopped = not self.stops.may_try(total.stripe.event_name, total.identifier)
        # A mark that lies in the future was made by a clock that has been set back: nobody knows how old it is.
        young = marked is not None and -CLOCKS_DIFFER <= now - marked < SAME_IDENTIFIER_FOR
        return young and (live.tried or not stopped)

    def _turn_back(self, live: Live, now: int) -> None:
        self._schedule.ended(live)
        if live.tried:
            self._unseat(live)
            self._park(live.entry, Reason.IN_DOUBT, now)
        else:
            self._look(live, now)
        self._fill(now)

    def answered(self, attempt: Attempt, heard: Heard, now: int) -> None:
        """What came of an attempt; an attempt that is over already has no say."""
        if self._attempts.get(attempt.identifier) is not attempt:
            return
        del self._attempts[attempt.identifier]
        live = self._live[attempt.total]
        verdict = judge(heard)
        self._schedule.ended(live)
        live.entry.attempts += 1
        if verdict.stored:
            live.entry.key_number += 1
        for other in self._schedule.heard(live, heard, verdict, now):
            self._look(other, now)
        if not self.shut:
            self._futile.clear()
        replayed = isinstance(heard, Answer) and heard.replayed
        if not live.tried and (replayed or verdict in _COLLISIONS):
            # The mark stays: an event with this identifier is at Stripe, and nobody knows since when.
            self._unseat(live)
            self._park(live.entry, Reason.COLLISION, now, heard.message)
        elif verdict is Verdict.DELIVERED or verdict is Verdict.DUPLICATE:
            self._unseat(live)
            self._finish(live.entry, "delivered" if verdict is Verdict.DELIVERED else "duplicate", now, attempt=attempt)
            self._go_on(attempt.event_name, now)
        elif verdict is Verdict.UNPROVEN:
            live.tried = True
            self._rest(live, now + delay(attempt.identifier, live.entry.attempts))
        else:
            self._left_nothing(live, verdict, heard.message, now)
        self._fill(now)

    def _left_nothing(self, live: Live, verdict: Verdict, message: str | None, now: int) -> None:
        """That is known of this attempt alone: a total that was tried before stays as doubtful as it was."""
        entry = live.entry
        if not live.tried:
            entry.first_unproven = None
        if verdict is Verdict.METER_REFUSED:
            self.stops.refused(entry.total.stripe.event_name, entry.total.identifier, message or "", now)
            self._unseat(live)
            self._park(entry, Reason.METER, now, message)
        elif verdict is Verdict.REFUSED and self.shut is not Shut.REFUSALS:
            self._unseat(live)
            self._park(entry, Reason.REFUSED, now, message)
        else:
            if verdict is Verdict.REFUSED:
                self._futile.add(entry.total.identifier)
            self._rest(live, now + delay(entry.total.identifier, entry.attempts))

    # Event names whose meter Stripe refuses

    def _probe_meters(self, now: int) -> None:
        if self._shadow:
            return
        for event_name in self.stops.due(now, lambda identifier: identifier in self._live or identifier in self._seats):
            identifier = next(iter(self._parked.of_meter(event_name)), None)
            if identifier is None:
                self.stops.cured(event_name)  # all were discarded: the next total finds out
            else:
                self.stops.probe(event_name, identifier)
                self._resume(identifier, now)

    def _go_on(self, event_name: str, now: int) -> None:
        """The meter takes events: so it will take those that wait for it."""
        self.stops.cured(event_name)
        for identifier in list(self._parked.of_meter(event_name)):
            self._resume(identifier, now)

    def _resume(self, identifier: str, now: int) -> None:
        entry = self._unpark(identifier)
        if entry.first_unproven is None:
            self._place(entry, now)
        elif -CLOCKS_DIFFER <= now - entry.first_unproven < SAME_IDENTIFIER_FOR:
            live = self._seat(entry)
            live.tried = True
            self._schedule.ready(live)
            self._journal.put(identifier, live)
        else:
            self._park(entry, Reason.IN_DOUBT, now)

    # From one place to another

    def _place(self, entry: Entry, now: int) -> None:
        """An untried total that is nowhere: find out who it is for, and let it in, set it aside, park or finish it."""
        total = entry.total
        entry.state, entry.customer, entry.first_unproven = State.RETRY, None, None
        known = True
        try:
            entry.customer = self._customers.stripe_customer(total.customer)
        except UnmappedError:
            self._park(entry, Reason.UNMAPPED, now)
            return
        except LookupFailedError:
            known = False
        customer = entry.customer or total.customer
        event_name = total.stripe.event_name
        if known and entry.customer is None:
            self._finish(entry, "unbilled", now)
        elif known and self._shadow:
            self._finish(entry, "shadowed", now)
        elif not self.stops.may_try(event_name, total.identifier):
            self._park(entry, Reason.METER, now, self.stops.message(event_name))
        elif not self._seats.free(customer):
            entry.state = State.ASIDE
            self._journal.put(total.identifier, self._seats.set_aside(customer, entry))
        elif known:
            live = self._seat(entry)
            self._schedule.wait(live)
            self._journal.put(total.identifier, live)
        else:
            self._rest(self._seat(entry), now + LOOK_UP_AGAIN)

    def _fill(self, now: int) -> None:
        while (entry := self._seats.call()) is not None:
            self._place(entry, now)

    def _look(self, live: Live, now: int) -> None:
        if live.tried:
            self._schedule.ready(live)
        else:
            self._unseat(live)
            self._place(live.entry, now)

    def _rest(self, live: Live, until: int) -> None:
        self._schedule.rest(live, until)
        self._journal.put(live.entry.total.identifier, live)

    def _seat(self, entry: Entry) -> Live:
        live = self._live[entry.total.identifier] = Live(entry, entry.customer or entry.total.customer)
        self._seats.sit(live.seat)
        return live

    def _unseat(self, live: Live) -> None:
        identifier = live.entry.total.identifier
        self._schedule.leave(live)
        del self._live[identifier]
        self._seats.leave(live.seat)

    def _park(self, entry: Entry, reason: Reason, now: int, message: str | None = None) -> None:
        entry.state, entry.reason = State.PARKED, reason
        entry.message = message[:LONGEST_MESSAGE] if message else None
        entry.parking, entry.parked_at = entry.parking + 1, now
        self.ledger.park(entry.total, reason)
        self._journal.put(entry.total.identifier, self._parked.add(entry))

    def _unpark(self, identifier: str, command: Command | None = None) -> Entry:
        entry, reason = self._parked.pop(identifier)
        self.ledger.unpark(entry.total, reason)
        if command is not None:
            entry.decided(command, reason)
        entry.reason = entry.message = None
        return entry

    def _finish(
        self, entry: Entry, how: How, now: int, *, attempt: Attempt | None = None, command: Command | None = None
    ) -> None:
        key = attempt.key if attempt else None
        finished = outcome(entry, how, now, key=key, command=command)
        billed_as = finished.billed_as or finished.identifier
        rejected = next((each for each in entry.rejected if rejects(how, key, billed_as, each.key)), None)
        if rejected is not None:
            finished = refused(finished, rejected.why, now)
        self.ledger.finish(entry.total, finished.how)
        self._journal.finish(finished)
        if rejected is not None:
            # So that one more report of it moves nothing.
            raw = msgspec.Raw(encode_outcome(finished))
            self._keep(Rejection(finished.identifier, rejected.key, "", rejected.why, "", rejected.at, raw))

    def _note(self, now: int, identifier: str, text: str) -> None:
        self.notes.append(Note(now, identifier, text))
        self.noted += 1


def _attempt(entry: Entry) -> Attempt:
    total, to = entry.total, entry.total.stripe
    if entry.customer is None:
        raise RuntimeError(f"{total.identifier} was armed without a customer")
    value = plain(for_stripe(scaled(total.value)))
    return Attempt(
        identifier=entry.identifier,
        key=entry.key,
        meter=total.meter,
        event_name=to.event_name,
        value=value,
        payload={to.customer_key: entry.customer, to.value_key: value},
        timestamp=total.timestamp,
        stripe_customer=entry.customer,
        generation=entry.generation,
    )


def _refusal(entry: Entry, command: Command) -> str | None:
    """Why a decision about a parked total is not carried out; None where it is."""
    if command.parking is not None and command.parking != entry.parking:
        return (
            f"it was decided when the total was parked for the {_nth(command.parking)} time, and this is the "
            f"{_nth(entry.parking)}"
        )
    if command.action == "discard":
        nowhere = command.found is not None and entry.sent_to(command.found) is None
        return f"nothing of it can be at Stripe under {command.found}" if nowhere else None
    if entry.first_unproven is None:
        return None
    if command.parking is None:
        return (
            f"an event with this identifier may be at Stripe ({entry.reason}), and the decision does not allow for it"
        )
    if len(identifier_of(entry.total.identifier, entry.generation + 1)) > LONGEST:
        return "its identifier is too long to have another generation"
    return None


def _nth(number: int) -> str:
    return f"{number}{'th' if 10 < number % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _pack(live: Live) -> bytes:
    live.entry.state = State.SENDING if live.phase in _MARKED else State.RETRY
    return pack(live.entry)
