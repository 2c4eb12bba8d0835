"""What stage 2 keeps and leaves behind: the entry of a total that is not finished, and the outcome of one that is."""

import re
from enum import StrEnum
from typing import Final, Literal

import msgspec

from consumer.totals import Command, Total, for_stripe, plain, scaled

HOUR: Final = 3_600_000

SAME_IDENTIFIER_FOR: Final = 23 * HOUR
"""Stripe keeps identifiers unique for 24 hours; one of them is left for clocks and for the request's way."""

LONGEST: Final = 100
"""Characters of an identifier that Stripe takes."""

LONGEST_REASON: Final = 1_000
"""Characters of why somebody decided, as far as they are kept in an entry."""

LONGEST_MESSAGE: Final = 1_000
"""Characters of what Stripe said, or somebody in its place, likewise."""

KEPT: Final = 20
"""Decisions that are kept of a total, beside those that left a doubt behind: these are all kept."""

_VERSION: Final = b"\x02"
_READ: Final = frozenset({b"\x01", _VERSION})
"""Version 1 had no generations and no decisions: their fields are at the end, and have defaults."""


class State(StrEnum):
    """Where an unfinished total stands."""

    SENDING = "sending"
    """It may be written to Stripe at any moment; after a restore it counts as tried."""
    RETRY = "retry"
    ASIDE = "aside"
    """Untried, until its customer's others are finished."""
    PARKED = "parked"


class Reason(StrEnum):
    """Why a total is parked."""

    UNMAPPED = "unmapped"
    REFUSED = "refused"
    METER = "meter"
    COLLISION = "collision"
    IN_DOUBT = "in_doubt"


def identifier_of(identifier: str, generation: int) -> str:
    """What Stripe is told in a generation of a total's identifier: the first one is the total's own."""
    return identifier if generation == 1 else f"{identifier}-g{generation}"


_KEY: Final = re.compile(r"(tm[0-9]+-.+?)(?:-g[0-9]+)?(?::[0-9]+)?")


def total_of(key: str) -> str | None:
    """The identifier of the total that was sent under this Idempotency-Key; None where it is none of ours."""
    found = _KEY.fullmatch(key)
    return found[1] if found else None


def is_total(key: bytes) -> bool:
    """Whether an entry of stage 2 is a total's: the keys of all others have a slash, which no identifier has."""
    return b"/" not in key


def newest(first_unproven: int, parked_at: int) -> int:
    """When Stripe can have taken the last event of a parked total.

    Not only until it was parked: a process that was suspended with a request in its hands, and does not know that
    others go on in its place, writes it when it wakes, if the 23 hours are not over.
    """
    return max(parked_at, first_unproven + SAME_IDENTIFIER_FOR)


class Decision(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a person decided about a parked total, and what was known of it then. Times are milliseconds."""

    action: Literal["release", "discard"]
    by: str
    reason: str
    at: int
    """By the person's clock."""
    parked: Reason
    """Why it was parked."""
    parked_at: int
    generation: int = 1
    """Of the identifier, until then."""
    attempts: int = 0
    first_unproven: int | None = None
    """Where there is one, an event with the identifier of that generation may be at Stripe, whatever was decided."""
    stripe_customer: str | None = None
    message: str | None = None
    """What Stripe said, where that is why it was parked."""
    found: str | None = None
    """Under which identifier it was found to be at Stripe, where that is why it was given up."""

    @property
    def newest(self) -> int | None:
        """Stripe has not taken an event of that generation later; None where it can have taken none."""
        return None if self.first_unproven is None else newest(self.first_unproven, self.parked_at)


class Rejected(msgspec.Struct, frozen=True):
    """Stripe took an event of an unfinished total, and rejected it later."""

    key: str
    """The Idempotency-Key of that attempt."""
    why: str
    """What Stripe said: its code and its message."""
    at: int
    """When we heard of it."""


class Entry(msgspec.Struct, array_like=True):
    """A total that is not finished. Times are milliseconds since the epoch."""

    total: Total
    state: State = State.RETRY
    customer: str | None = None
    """The Stripe customer; it stays the same from the first attempt that is not proven absent."""
    first_unproven: int | None = None
    """No later than the first attempt that may have left an event at Stripe; None where none can have."""
    key_number: int = 0
    """Of the idempotency key."""
    attempts: int = 0
    next_look: int = 0
    reason: Reason | None = None
    message: str | None = None
    """What Stripe said, where that is why it is parked."""
    generation: int = 1
    """Of the identifier: how often the total has begun anew, with a doubt left behind, and this time."""
    parking: int = 0
    """How often it has been parked; what is decided is decided about one of them."""
    parked_at: int = 0
    """When it was parked last."""
    decisions: list[Decision] = []
    rejected: list[Rejected] = []
    """What Stripe has rejected of it so far."""

    @property
    def identifier(self) -> str:
        """What Stripe is told; the entry itself is known by the total's."""
        return identifier_of(self.total.identifier, self.generation)

    @property
    def key(self) -> str:
        """The Idempotency-Key of the next attempt."""
        return f"{self.identifier}:{self.key_number}" if self.key_number else self.identifier

    def decided(self, command: Command, reason: Reason) -> None:
        """Note what a person decided, who and why, and what may be at Stripe all the same."""
        decision = Decision(
            action=command.action,
            by=command.by[:LONGEST],
            reason=command.reason[:LONGEST_REASON],
            at=command.at,
            parked=reason,
            parked_at=self.parked_at,
            generation=self.generation,
            attempts=self.attempts,
            first_unproven=self.first_unproven,
            stripe_customer=self.customer,
            message=self.message,
            found=command.found,
        )
        clear = [each for each in self.decisions if each.first_unproven is None]
        dropped = clear[0] if len(clear) >= KEPT else None
        self.decisions = [*(each for each in self.decisions if each is not dropped), decision]

    def was_decided(self, command: Command) -> bool:
        """Whether this has been carried out already."""
        wanted = command.action, command.by[:LONGEST], command.reason[:LONGEST_REASON], command.at
        return any((each.action, each.by, each.reason, each.at) == wanted for each in self.decisions)

    def sent_to(self, identifier: str) -> str | None:
        """The Stripe customer who may have been billed for it under this identifier; None where nobody can have."""
        if identifier == self.identifier and self.first_unproven is not None:
            return self.customer
        for each in reversed(self.decisions):
            if each.newest is not None and identifier == identifier_of(self.total.identifier, each.generation):
                return each.stripe_customer
        return None

    def renew(self) -> None:
        """Begin anew: under the next generation of the identifier, where the last one may be at Stripe."""
        if self.first_unproven is not None:
            self.generation += 1
            self.key_number = self.attempts = 0


class EntryError(ValueError):
    """An entry cannot be read; going on without it would lose the total."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Entry)


def pack(entry: Entry) -> bytes:
    """The entry as it is stored: a byte for the version, then MessagePack."""
    return _VERSION + _encoder.encode(entry)


def unpack(value: bytes) -> Entry:
    """The entry that was packed; raises ``EntryError``."""
    if value[:1] not in _READ:
        raise EntryError(f"version {value[:1].hex() or 'none'} of a delivery entry is unknown: use the newer tallyman")
    try:
        return _decoder.decode(value[1:])
    except msgspec.DecodeError as error:
        raise EntryError(f"a delivery entry cannot be read: {error}") from error


How = Literal["delivered", "duplicate", "unbilled", "zero", "discarded", "refused", "shadowed"]

BILLED: Final[frozenset[How]] = frozenset({"delivered", "duplicate"})


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a total: one record of the outcomes log, enough to audit it and to compare days with Stripe."""

    identifier: str
    how: How
    at: int
    """When it was known, in milliseconds since the epoch."""
    pipeline: str
    meter: str
    edition: str
    partition: int
    window_start: int
    """Seconds since the epoch."""
    window: Literal["1m", "1h"]
    revision: int
    timestamp: int
    """The one that Stripe bills by, in seconds since the epoch."""
    customer: str
    event_name: str
    events: int
    value: str
    """Exact."""
    billed: str = "0"
    """What Stripe was told: the value in at most 15 significant digits."""
    rounded: str = "0"
    """The value less what was billed, where it was billed."""
    stripe_customer: str | None = None
    attempts: int = 0
    key: str | None = None
    """The last Idempotency-Key; Stripe's error reports name it."""
    first_unproven: int | None = None
    by: str | None = None
    """Who decided that it ends, where a person did."""
    reason: str | None = None
    generation: int = 1
    """Of the identifier, at the end."""
    billed_as: str | None = None
    """The identifier that Stripe was told, where it was billed under another one than its own."""
    decisions: tuple[Decision, ...] = ()
    """What people decided, from the first one on."""


def outcome(
    entry: Entry,
    how: How,
    at: int,
    *,
    key: str | None = None,
    command: Command | None = None,
) -> Outcome:
    """What became of a total: the attempt with this key ended it, or this command."""
    total = entry.total
    value = scaled(total.value)
    billed = for_stripe(value) if how in BILLED else 0
    found = command.found if command else None
    billed_as = found or entry.identifier
    return Outcome(
        identifier=total.identifier,
        how=how,
        at=at,
        pipeline=total.pipeline,
        meter=total.meter,
        edition=total.edition,
        partition=total.partition,
        window_start=total.window_start,
        window=total.window,
        revision=total.revision,
        timestamp=total.timestamp,
        customer=total.customer,
        event_name=total.stripe.event_name,
        events=total.events,
        value=total.value,
        billed=plain(billed),
        rounded=plain(value - billed) if how in BILLED else "0",
        stripe_customer=entry.sent_to(found) if found else entry.customer,
        attempts=entry.attempts,
        key=key,
        first_unproven=entry.first_unproven,
        by=command.by if command else None,
        reason=command.reason if command else None,
        generation=entry.generation,
        billed_as=billed_as if how in BILLED and billed_as != total.identifier else None,
        decisions=tuple(entry.decisions),
    )


def rejects(how: How, key: str | None, billed_as: str, rejected: str) -> bool:
    """Whether the event that Stripe rejected is the one by which a total is billed.

    A total is billed by the event of its last attempt; where that one heard "already exists", by an earlier one under
    the same identifier, and nobody knows which.

    Args:
        how: how the total was finished.
        key: the Idempotency-Key of its last attempt.
        billed_as: the identifier that Stripe was told.
        rejected: the Idempotency-Key that Stripe names.
    """
    if how == "delivered":
        return rejected == key
    return how == "duplicate" and rejected.partition(":")[0] == billed_as


def refused(outcome: Outcome, why: str, at: int) -> Outcome:
    """What becomes of a total that was billed, when Stripe rejects its event.

    Where the last attempt was taken, no earlier one can have been: an identifier is taken once. Where it heard "already
    exists", one of the earlier ones was, and whether that is the rejected one is not certain: nobody knows whether an
    identifier is free again when its event is rejected.
    """
    doubt = outcome.first_unproven if outcome.how == "duplicate" else None
    return msgspec.structs.replace(
        outcome, how="refused", at=at, billed="0", rounded="0", reason=why, first_unproven=doubt
    )


_outcome_encoder = msgspec.json.Encoder()
_outcome_decoder = msgspec.json.Decoder(Outcome)


def encode_outcome(outcome: Outcome) -> bytes:
    """One record of the outcomes log."""
    return _outcome_encoder.encode(outcome)


def decode_outcome(value: bytes) -> Outcome:
    """The outcome that was encoded; raises ``msgspec.DecodeError`` for anything else."""
    return _outcome_decoder.decode(value)
