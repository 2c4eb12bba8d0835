"""Which of the totals in flight is looked at when: armed by a commit, sent in its lane, retried, or probing."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from consumer.deliver.answers import Heard, Verdict
from consumer.deliver.entries import Entry
from consumer.deliver.lanes import Key, Lanes
from consumer.deliver.pacing import Outlet, has_come


class Phase(Enum):
    """Where a total in flight stands."""

    WAITING = auto()
    """For a commit that arms it: marks it durably as possibly tried."""
    ARMING = auto()
    """That commit is on its way."""
    READY = auto()
    SENT = auto()
    RESTING = auto()
    """Until its next look."""
    GONE = auto()


@dataclass(slots=True, eq=False)
class Live:
    """A total in flight."""

    entry: Entry
    seat: str
    """The customer on whose share it is in flight."""
    phase: Phase = Phase.GONE
    tried: bool = False
    """An attempt may have left an event. Not the same as marked, which an armed total is before it is tried."""

    @property
    def lane(self) -> Key:
        """Where it has to queue."""
        return self.entry.customer or "", self.entry.total.stripe.event_name


class Schedule:
    """The totals of one delivery that are in flight, by what they wait for."""

    def __init__(self, outlet: Outlet) -> None:
        """The outlet is shared with other schedules; this one is part of it until it is dropped."""
        self._outlet = outlet
        outlet.join(self)
        self._turned = outlet.gate.turned
        """Of the gate, as far as it was noticed here."""
        self._waiting: dict[str, Live] = {}
        self._arming: list[Live] = []
        self._lanes: Lanes[Live] = Lanes()
        self._resting: list[tuple[int, int, Live]] = []
        self._rests = 0
        self._sent = 0
        self._probe: Live | None = None
        self._probe_wanted = False
        self._fresh: Live | None = None
        """The one to probe with, where it is to be one whose customer has not been tried in this outage."""
        self._asked = 0
        """The last of the gate's calls for a fresh probe that was followed, or could not be."""
        self._retired = False

    @property
    def moving(self) -> int:
        """How many are sent, or will be soon: while the gate is shut those that are ready wait for hours."""
        return self._sent if self._outlet.gate.shut else len(self._lanes) + self._sent

    @property
    def starved(self) -> bool:
        """Whether more could be sent if more were armed."""
        if self._retired:
            return False
        return self._probe_wanted if self._outlet.gate.shut else not self._lanes.ready and bool(self._waiting)

    @property
    def can_probe(self) -> bool:
        """Whether there is a total to probe with, as far as is known."""
        return not self._retired and bool(self._arming or self._lanes.ready or self._waiting or self._resting)

    def wait(self, live: Live) -> None:
        """It may be tried as soon as a commit has marked it."""
        live.phase = Phase.WAITING
        self._waiting[live.entry.total.identifier] = live

    def ready(self, live: Live) -> None:
        """It may be sent: its durable entry is marked."""
        live.phase = Phase.READY
        self._lanes.add(live.lane, live)

    def rest(self, live: Live, until: int) -> None:
        """Nothing is done about it until then."""
        live.phase = Phase.RESTING
        live.entry.next_look = until
        self._rests += 1
        heapq.heappush(self._resting, (until, self._rests, live))

    def leave(self, live: Live) -> None:
        """It is not in flight any more."""
        live.phase = Phase.GONE
        self._waiting.pop(live.entry.total.identifier, None)

    def withdraw(self, wanted: Callable[[Live], bool]) -> list[Live]:
        """Those that are ready, and wanted back."""
        withdrawn = self._lanes.withdraw(wanted)
        for live in withdrawn:
            live.phase = Phase.GONE
        return withdrawn

    def arm(self, now: int) -> list[Live]:
        """Mark what the commit that is being made allows to be sent: all that waits, or one that is to probe."""
        probe = self._probe_wanted and self._outlet.has_turn(self)
        if self._retired:
            self._arming = []
        elif not self._outlet.gate.shut:
            self._arming = list(self._waiting.values())
        elif probe and self._fresh is not None and self._fresh.phase is Phase.WAITING:
            self._arming = [self._fresh]
        else:
            self._arming = list(self._waiting.values())[: int(probe)]
        for live in self._arming:
            del self._waiting[live.entry.total.identifier]
            live.phase = Phase.ARMING
            live.entry.first_unproven = now
        self._probe_wanted, self._fresh = False, None
        return self._arming

    def armed(self) -> None:
        """That commit is durable."""
        for live in self._arming:
            if live.phase is Phase.ARMING:
                live.phase = Phase.READY
                self._lanes.add(live.lane, live, first=self._outlet.gate.shut is not None)
        self._arming = []

    def noticed(self) -> list[Live]:
        """Those to be looked at anew because the gate was shut or opened, whoever heard the answer that did it."""
        gate = self._outlet.gate
        if gate.turned == self._turned:
            return []
        self._turned = gate.turned
        return self._unsent() if gate.shut else self._rouse()

    def woken(self, now: int) -> list[Live]:
        """Those whose time to be looked at has come."""
        woken = self.noticed()
        while self._resting and has_come(self._resting[0][0], now):
            live = heapq.heappop(self._resting)[2]
            if live.phase is Phase.RESTING:
                woken.append(live)
        if self._outlet.gate.shut and not (woken or self._waiting or self._lanes.ready) and self._may_probe(now):
            # Nobody is asked to rest for longer than the gate is shut: whoever comes next in time probes.
            woken = self._rouse(1)
        return woken

    def _rouse(self, count: int | None = None) -> list[Live]:
        roused: list[Live] = []
        while self._resting and len(roused) != count:
            live = heapq.heappop(self._resting)[2]
            if live.phase is Phase.RESTING:
                roused.append(live)
        return roused

    def take(self, now: int) -> Live | None:
        """The one to send now; its lane is busy until it has ``ended``."""
        if self._retired:
            return None
        outlet = self._outlet
        if outlet.gate.shut:
            if not self._may_probe(now):
                return None
            self._call_fresh()
            self._probe_wanted = self._fresh is not None or (not self._lanes.ready and bool(self._waiting))
            if self._fresh is not None:
                return None
            if not self._lanes.ready and not self._waiting:
                outlet.cannot_probe(self, now)
        elif not self._lanes.ready or outlet.pacing.wait(now):
            return None
        live = self._lanes.take()
        if live is not None:
            live.phase = Phase.SENT
            self._sent += 1
            outlet.sent += 1
            outlet.pacing.spend()
            self._probe = live if outlet.gate.shut else None
        return live

    def _call_fresh(self) -> None:
        gate = self._outlet.gate
        if self._fresh is not None and self._fresh.phase is not Phase.WAITING:
            self._fresh = None
        if gate.fresh != self._asked:
            self._asked = gate.fresh
            self._fresh = next((live for live in self._waiting.values() if live.seat not in gate.unheard), None)

    def _may_probe(self, now: int) -> bool:
        return not self._arming and self._outlet.may_probe(self, now)

    def ended(self, live: Live) -> None:
        """It was answered, or not sent after all."""
        self._sent -= 1
        self._outlet.sent -= 1
        self._lanes.done(live.lane)
        if live is self._probe:
            self._outlet.probed(self)

    def heard(self, live: Live, heard: Heard, verdict: Verdict, now: int) -> list[Live]:
        """Tell the outlet what came of an attempt; returns those to be looked at anew."""
        self._outlet.heard(heard, verdict, live.seat, probe=live is self._probe, now=now)
        return self.noticed()

    def retire(self) -> list[Live]:
        """Send nothing any more, and mark nothing; returns those to be looked at anew."""
        self._retired = True
        return self._unsent()

    def drop(self) -> None:
        """Leave the outlet to the others: nothing is sent any more, and no answer is waited for."""
        self._retired = True
        self._outlet.leave(self, self._sent)
        self._sent = 0

    def _unsent(self) -> list[Live]:
        # Marked, and not sent soon: a restart would make tried ones of them, and a day's wait doubts.
        arming = [live for live in self._arming if live.phase is Phase.ARMING]
        return arming + self.withdraw(lambda live: not live.tried)

    def wake(self, now: int) -> int | None:
        """When time alone brings something to look at or to send; None where it does not."""
        outlet = self._outlet
        if outlet.gate.turned != self._turned:
            return now
        times = [self._resting[0][0]] if self._resting else []
        if outlet.gate.shut:
            if not (outlet.sent or self._arming or self._probe_wanted) and outlet.has_turn(self):
                times = [outlet.gate.probe_at]
        elif self._lanes.ready:
            times.append(now + outlet.pacing.wait(now))
        return max(now, min(times)) if times else None
