"""How fast totals are sent, when they are tried again, and when only one of them probes."""

import zlib
from collections import Counter, deque
from enum import StrEnum
from typing import Final, Protocol

from consumer.deliver.answers import Answer, Heard, Verdict, throttled

SECOND: Final = 1000
MINUTE: Final = 60 * SECOND

_FIRST_DELAY: Final = SECOND
_LONGEST_DELAY: Final = 5 * MINUTE


def delay(identifier: str, attempts: int) -> int:
    """Milliseconds until a total is tried again after so many attempts.

    Doubles from a second to five minutes. Up to a half is taken off, by a digest: totals that failed together do not
    come back together, and the same total always waits as long.
    """
    longest = min(_FIRST_DELAY << min(max(attempts, 1) - 1, 16), _LONGEST_DELAY)
    share = zlib.crc32(f"{identifier}:{attempts}".encode()) / 2**33
    return longest - int(longest * share)


def has_come(time: int, now: int) -> bool:
    """Whether it is time; also where it lies further ahead than any wait, for then the clock has been set back."""
    return not now < time <= now + _LONGEST_DELAY


class Pacing:
    """A token bucket whose rate adapts: up by a sixtieth of the maximum a second, and down when Stripe says too fast.

    Down by the share that Stripe did not take, at least by a twentieth and at most by a half.
    """

    STALL: Final = 100
    """Milliseconds for which a sender may be kept from sending, and catch up afterwards."""
    BURST: Final = 50
    """So many milliseconds' attempts go out at once where nothing was to be sent for a time."""

    def __init__(self, max_rate: float) -> None:
        """The highest rate, in attempts per second; it is also the first."""
        if max_rate <= 0:
            raise ValueError(f"max_rate must be positive: {max_rate}")
        self.max_rate = float(max_rate)
        self.rate = self.max_rate
        self._tokens = 0.0
        self._filled = 0
        self._raised = 0
        self._cut = 0
        self._taken = 0
        """Answers since the last cut that did not ask for less."""
        self._refused = 0
        """Those that did."""

    def limit(self, max_rate: float) -> None:
        """From now on this is the highest rate: the share of a process changes with its partitions."""
        self.rate = max_rate if self.rate == self.max_rate else min(self.rate, max_rate)
        self.max_rate = max_rate
        self._tokens = min(self._tokens, self._depth(self.STALL))

    def wait(self, now: int) -> int:
        """Milliseconds until the next attempt; 0 means that it may be made now."""
        if now != self._filled:
            # A clock that steps back must neither mint tokens nor stop the flow until it has caught up.
            passed = max(0, now - self._filled)
            depth = self._depth(self.STALL if passed <= self.STALL else self.BURST)
            self._tokens = min(depth, self._tokens + passed * self.rate / SECOND)
            self._filled = now
        if self._tokens >= 1:
            return 0
        return max(1, -int((self._tokens - 1) * SECOND // self.rate))

    def spend(self) -> None:
        """An attempt is made."""
        self._tokens -= 1

    def went_well(self, now: int) -> None:
        """An answer came that did not ask for less."""
        self._taken += 1
        if self.rate < self.max_rate and not 0 <= now - self._raised < SECOND:
            self.rate = min(self.max_rate, self.rate + self.max_rate / 60)
            self._raised = now

    def too_fast(self, now: int) -> None:
        """Stripe asked for less. What it says within a second counts once: those attempts were made at one rate."""
        self._refused += 1
        if not 0 <= now - self._cut < SECOND:
            share = self._refused / (self._refused + self._taken)
            self._slow_down(self.rate * (1 - min(max(share, 0.05), 0.5)), now)

    def start_over(self, now: int) -> None:
        """Stripe was away; what has piled up must not knock it over again."""
        self._slow_down(min(self.rate, self.max_rate / 10), now)

    def _slow_down(self, rate: float, now: int) -> None:
        self.rate = max(rate, min(1.0, self.max_rate))
        self._tokens = min(self._tokens, self._depth(self.BURST))
        self._cut = self._raised = now
        self._taken = self._refused = 0

    def _depth(self, milliseconds: int) -> float:
        return max(1.0, self.rate * milliseconds / SECOND)


class Shut(StrEnum):
    """Why only one total at a time is tried."""

    DOWN = "down"
    """No answers: neither this stage nor a person can do anything but wait. Not a pause: reading goes on."""
    UNAUTHORISED = "unauthorised"
    REFUSALS = "refusals"


_SILENCE: Final = frozenset({Verdict.UNPROVEN, Verdict.ABSENT})
_PAST_THE_DOOR: Final = frozenset(
    {Verdict.DELIVERED, Verdict.DUPLICATE, Verdict.REFUSED, Verdict.METER_REFUSED, Verdict.MISMATCH}
)
_CURES: Final = {
    Shut.DOWN: _PAST_THE_DOOR | {Verdict.BUSY},
    Shut.UNAUTHORISED: _PAST_THE_DOOR,
    Shut.REFUSALS: frozenset({Verdict.DELIVERED, Verdict.DUPLICATE}),
}


class Gate:
    """Open, or shut for a reason: then one total at a time probes until Stripe takes it."""

    SILENT: Final = 20
    """So many attempts in a row without an answer, or with nothing but server errors, mean that Stripe is down."""
    UNHEARD: Final = 2
    """For at least so many customers: a bad one whose turn it is again and again, at night, holds up nobody else."""
    ATTEMPTS: Final = 200
    REFUSED: Final = 40
    """More refusals than this among the last ATTEMPTS, of at least CUSTOMERS customers, are not about single totals."""
    CUSTOMERS: Final = 5
    PROBE_EVERY: Final = 30 * SECOND
    UNKNOWN: Final = 10
    """So many totals are risked, one a second, where Stripe takes them and does not say what its meters are."""

    def __init__(self) -> None:
        self.shut: Shut | None = None
        self.turned = 0
        """How often it was shut, for whatever reason, or opened: who has not seen a turn can tell by this."""
        self.probe_at = 0
        self._silent = 0
        self.unheard: set[str] = set()
        """Customers for whom nothing was heard since something was heard for anybody."""
        self.fresh = 0
        """How often a probe was called for with somebody else's total, one that has not been tried: the first ones may
        never be answered though Stripe is there. After 2, 4, 8 … probes in vain, for each of them may be a doubt."""
        self._probes = 0
        self._risked: int | None = None
        """How many totals have been taken by meters of which nobody knows what they bill; None where that is known."""
        self._last: deque[str | None] = deque()
        self._refused: Counter[str] = Counter()

    def meters_unknown(self, now: int) -> None:
        """Stripe has not said yet what its meters bill, as if it were down; until it has, or for long enough, probe."""
        self._risked = 0
        self._close(Shut.DOWN, now)

    def meters_known(self) -> None:
        """They bill what they are sent. Whoever said so is there, unless probes tell otherwise: these go on."""
        if self._risked is not None and self.shut is Shut.DOWN and not self._probes:
            self._open()
        self._risked = None

    def heard(self, verdict: Verdict, customer: str, *, probe: bool, now: int) -> None:
        """Take an answer into account. Of those to come while it is shut, only the probe's can open it."""
        if self.shut is None:
            self._remember(customer if verdict is Verdict.REFUSED else None)
            if verdict in _SILENCE:
                self._silent += 1
                self.unheard.add(customer)
            else:
                self._forget_silence()
            if verdict is Verdict.UNAUTHORISED:
                self._close(Shut.UNAUTHORISED, now)
            elif self._refused.total() > self.REFUSED and len(self._refused) >= self.CUSTOMERS:
                self._close(Shut.REFUSALS, now)
            elif self._silent >= self.SILENT and len(self.unheard) >= self.UNHEARD:
                self._close(Shut.DOWN, now)
        elif verdict is Verdict.UNAUTHORISED and self.shut is not Shut.UNAUTHORISED:
            self._close(Shut.UNAUTHORISED, now)
        elif probe and verdict in _CURES[self.shut]:
            self._cured(now)
        elif probe:
            self._probes += 1
            self.unheard.add(customer)
            if self.shut is Shut.DOWN and self._probes > 1 and not self._probes & (self._probes - 1):
                self.fresh += 1
            self._plan(now)

    def _cured(self, now: int) -> None:
        if self._risked is None or self._risked + 1 >= self.UNKNOWN:
            self._open()
        else:
            self._risked += 1
            self._probes = 0
            self._plan(now)

    def _remember(self, refused: str | None) -> None:
        self._last.append(refused)
        if refused is not None:
            self._refused[refused] += 1
        if len(self._last) > self.ATTEMPTS and (forgotten := self._last.popleft()) is not None:
            self._refused[forgotten] -= 1
            if not self._refused[forgotten]:
                del self._refused[forgotten]

    def _close(self, reason: Shut, now: int) -> None:
        self.turned += 1
        self.shut = reason
        self._probes = 0
        self._plan(now)

    def _plan(self, now: int) -> None:
        soon = SECOND << min(self._probes, 16)
        self.probe_at = now + (min(soon, self.PROBE_EVERY) if self.shut is Shut.DOWN else self.PROBE_EVERY)

    def _open(self) -> None:
        self.turned += 1
        self.shut = self._risked = None
        self._forget_silence()
        self._last.clear()
        self._refused.clear()

    def _forget_silence(self) -> None:
        self._silent = 0
        self.unheard.clear()


class Sender(Protocol):
    """Who sends through it."""

    @property
    def can_probe(self) -> bool:
        """Whether there is a total to probe with, as far as is known."""


class Outlet:
    """Rate and gate are about the account at Stripe, and not about a partition: there is one per process.

    While the gate is shut, one total of all senders probes. They take turns at that, so that one of them whose totals
    Stripe will never take does not keep those from probing that show it to be well again.
    """

    def __init__(self, max_rate: float) -> None:
        """The highest rate, in attempts per second."""
        self.gate = Gate()
        self.pacing = Pacing(max_rate)
        self.sent = 0
        """How many attempts are on their way, whoever sent them."""
        self._turns: deque[Sender] = deque()

    def join(self, sender: Sender) -> None:
        """One more sends through it, until it leaves."""
        self._turns.append(sender)

    def leave(self, sender: Sender, sent: int) -> None:
        """It will not send any more, and so many of its attempts are not waited for."""
        self.sent -= sent
        if sender in self._turns:
            self._turns.remove(sender)

    def heard(self, heard: Heard, verdict: Verdict, customer: str, *, probe: bool, now: int) -> None:
        """Go faster, slower, or one at a time, after what came of an attempt."""
        was = self.gate.shut
        self.gate.heard(verdict, customer, probe=probe, now=now)
        if throttled(heard):
            self.pacing.too_fast(now)
        elif isinstance(heard, Answer) and heard.status < 500:
            self.pacing.went_well(now)
        self._begin_slowly(was, now)

    def meters_unknown(self, now: int) -> None:
        """Stripe has not said what its meters bill: one total at a time finds out whether it takes any."""
        self.gate.meters_unknown(now)

    def meters_known(self, now: int) -> None:
        """It has said it, and they bill what they are sent."""
        was = self.gate.shut
        self.gate.meters_known()
        self._begin_slowly(was, now)

    def _begin_slowly(self, was: Shut | None, now: int) -> None:
        if was is Shut.DOWN and not self.gate.shut:
            self.pacing.start_over(now)

    def may_probe(self, sender: Sender, now: int) -> bool:
        """Whether this one's probe may go now: nothing else is on its way."""
        return not self.sent and has_come(self.gate.probe_at, now) and self.has_turn(sender)

    def has_turn(self, sender: Sender) -> bool:
        """Whether the next probe is this one's. It stays so until ``probed``, or for as long as it can."""
        for _ in range(len(self._turns)):
            if self._turns[0].can_probe:
                return self._turns[0] is sender
            self._turns.rotate(-1)
        return False

    def probed(self, sender: Sender) -> None:
        """Its turn is over."""
        if sender in self._turns:
            self._turns.remove(sender)
            self._turns.append(sender)

    def cannot_probe(self, sender: Sender, now: int) -> None:
        """It had nothing to probe with after all; the next one's turn comes in a second."""
        self.gate.probe_at = now + SECOND
        self.probed(sender)
