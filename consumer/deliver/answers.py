"""What Stripe, or the connection, said about one attempt, and what that proves."""

from enum import Enum
from typing import Final

import msgspec

_DUPLICATE: Final = "An event already exists with identifier"
_NO_METER: Final = ("No active meter found", "No such meter")
_NO_METER_CODES: Final = frozenset({"archived_meter", "no_meter"})


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer: its status and what matters of its headers and of Stripe's error object."""

    status: int
    type: str | None = None
    """None also means that the body was not Stripe's error object."""
    code: str | None = None
    message: str | None = None
    replayed: bool = False
    """The header ``Idempotent-Replayed: true``."""
    should_retry: bool | None = None
    """The header ``Stripe-Should-Retry``."""
    limited: str | None = None
    """The header ``Stripe-Rate-Limited-Reason``."""


class NeverConnected(msgspec.Struct, frozen=True):
    """No connection was established: nothing was written."""

    message: str = ""


class Lost(msgspec.Struct, frozen=True):
    """The request may have been written, and no answer came: a timeout, a reset."""

    message: str = ""


Heard = Answer | NeverConnected | Lost


class Verdict(Enum):
    """What an attempt came to."""

    DELIVERED = "delivered"
    DUPLICATE = "duplicate"
    """Stripe has an event with this identifier; whose, the total's past has to tell."""
    REFUSED = "refused"
    """Final, and about this total."""
    METER_REFUSED = "meter_refused"
    """Final, and about every total of the event name."""
    UNAUTHORISED = "unauthorised"
    BUSY = "busy"
    MISMATCH = "mismatch"
    """The idempotency key was used before, with other parameters."""
    ABSENT = "absent"
    UNPROVEN = "unproven"

    @property
    def left_nothing(self) -> bool:
        """Whether it proves that this attempt left nothing at Stripe. It never says anything of earlier attempts."""
        return self not in _LEFT_SOMETHING

    @property
    def stored(self) -> bool:
        """Whether Stripe may replay this answer to the same key, so that the next try needs another one."""
        return self is not Verdict.BUSY


_LEFT_SOMETHING: Final = frozenset({Verdict.DELIVERED, Verdict.DUPLICATE, Verdict.UNPROVEN})


def judge(heard: Heard) -> Verdict:
    """The one table of answers. The first line that fits decides.

    =============================================== ============= ==============================
    heard                                           verdict       what this attempt left
    =============================================== ============= ==============================
    no connection                                   ABSENT        nothing
    no answer                                       UNPROVEN      unknown
    2xx                                             DELIVERED     the event
    4xx "An event already exists with identifier"   DUPLICATE     nothing; an event is there
    4xx without Stripe's error object: a proxy's    UNPROVEN      unknown
    409, 429                                        BUSY          nothing
    any other answer that is replayed               UNPROVEN      it is about an earlier attempt
    401, 403                                        UNAUTHORISED  nothing
    4xx ``idempotency_error``                       MISMATCH      nothing
    4xx that Stripe asks to retry                   UNPROVEN      unknown
    4xx "No active meter found …"                   METER_REFUSED nothing
    4xx with another ``invalid_request_error``      REFUSED       nothing
    everything else: 5xx, 3xx, errors of other kind UNPROVEN      unknown
    =============================================== ============= ==============================
    """
    if isinstance(heard, NeverConnected):
        return Verdict.ABSENT
    if isinstance(heard, Lost):
        return Verdict.UNPROVEN
    if 200 <= heard.status < 300:
        return Verdict.DELIVERED
    if 400 <= heard.status < 500:
        return _judge_4xx(heard)
    return Verdict.UNPROVEN


def _judge_4xx(answer: Answer) -> Verdict:
    message = answer.message or ""
    verdict = Verdict.REFUSED
    if message.startswith(_DUPLICATE):
        verdict = Verdict.DUPLICATE
    elif answer.type is None and answer.limited is None:
        # Said perhaps in place of an answer that was not let through.
        verdict = Verdict.UNPROVEN
    elif answer.status in {409, 429}:
        verdict = Verdict.BUSY
    elif answer.replayed:
        verdict = Verdict.UNPROVEN
    elif answer.status in {401, 403}:
        verdict = Verdict.UNAUTHORISED
    elif answer.type == "idempotency_error":
        verdict = Verdict.MISMATCH
    elif answer.should_retry or answer.type != "invalid_request_error":
        verdict = Verdict.UNPROVEN
    elif answer.code in _NO_METER_CODES or message.startswith(_NO_METER):
        verdict = Verdict.METER_REFUSED
    return verdict


def throttled(heard: Heard) -> bool:
    """Whether we are sending too fast as a whole, rather than contending for one customer's lock."""
    return (
        isinstance(heard, Answer)
        and heard.status == 429
        and heard.limited != "resource-specific"
        and heard.code != "lock_timeout"
    )
