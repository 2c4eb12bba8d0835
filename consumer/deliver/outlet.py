"""The one way out to Stripe that all deliveries of a process share: how fast, and whether only one total may try."""

from collections import deque
from typing import Protocol

from consumer.deliver.answers import Answer, Heard, Verdict, throttled
from consumer.deliver.pacing import SECOND, Gate, Pacing, Shut, has_come


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
