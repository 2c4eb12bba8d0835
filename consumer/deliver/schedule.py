"""Which of the totals in flight is looked at when: armed by a commit, sent in its lane, retried, or probing."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from consumer.deliver.answers import Answer, Heard, Verdict, throttled
from consumer.deliver.entries import Entry
from consumer.deliver.lanes import Key, Lanes
from consumer.deliver.pacing import SECOND, Gate, Pacing, Shut, has_come


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
    """The totals in flight, by what they wait for."""

    def __init__(self, max_rate: float) -> None:
        """The highest rate, in attempts per second."""
        self.gate = Gate()
        self.pacing = Pacing(max_rate)
        self._waiting: dict[str, Live] = {}
        self._arming: list[Live] = []
        self._lanes: Lanes[Live] = Lanes()
        self._resting: list[tuple[int, int, Live]] = []
        self._rests = 0
        self._sent = 0
        self._probe: Live | None = None
        self._probe_wanted = False
        self._retired = False

    @property
    def moving(self) -> int:
        """How many are ready or sent."""
        return len(self._lanes) + self._sent

    @property
    def starved(self) -> bool:
        """Whether more could be sent if more were armed."""
        if self._retired:
            return False
        return not self._lanes.ready and bool(self._probe_wanted if self.gate.shut else self._waiting)

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
        count = len(self._waiting) if not self.gate.shut else int(self._probe_wanted)
        self._arming = [] if self._retired else list(self._waiting.values())[:count]
        for live in self._arming:
            del self._waiting[live.entry.total.identifier]
            live.phase = Phase.ARMING
            live.entry.first_unproven = now
        self._probe_wanted = False
        return self._arming

    def armed(self) -> None:
        """That commit is durable."""
        for live in self._arming:
            if live.phase is Phase.ARMING:
                self.ready(live)
        self._arming = []

    def woken(self, now: int) -> list[Live]:
        """Those whose time to be looked at has come."""
        woken = []
        while self._resting and has_come(self._resting[0][0], now):
            live = heapq.heappop(self._resting)[2]
            if live.phase is Phase.RESTING:
                woken.append(live)
        if self.gate.shut and self._may_probe(now) and not (woken or self._waiting or self._lanes.ready):
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
        if self.gate.shut:
            if not self._may_probe(now):
                return None
            self._probe_wanted = not self._lanes.ready and bool(self._waiting)
            if not self._lanes.ready and not self._waiting:
                self.gate.probe_at = now + SECOND
        elif not self._lanes.ready or self.pacing.wait(now):
            return None
        live = self._lanes.take()
        if live is not None:
            live.phase = Phase.SENT
            self._sent += 1
            self.pacing.spend()
            self._probe = live if self.gate.shut else None
        return live

    def _may_probe(self, now: int) -> bool:
        return not self._sent and not self._arming and has_come(self.gate.probe_at, now)

    def ended(self, live: Live) -> None:
        """It was answered, or not sent after all."""
        self._sent -= 1
        self._lanes.done(live.lane)

    def heard(self, live: Live, heard: Heard, verdict: Verdict, now: int) -> list[Live]:
        """Go faster, slower, or one at a time, after what came of an attempt; returns those to be looked at anew."""
        was = self.gate.shut
        self.gate.heard(verdict, live.seat, probe=live is self._probe, now=now)
        if throttled(heard):
            self.pacing.too_fast(now)
        elif isinstance(heard, Answer) and heard.status < 500:
            self.pacing.went_well(now)
        if self.gate.shut and not was:
            return self._unsent()
        if was and not self.gate.shut:
            if was is Shut.DOWN:
                self.pacing.start_over(now)
            return self._rouse()
        return []

    def retire(self) -> list[Live]:
        """Send nothing any more, and mark nothing; returns those to be looked at anew."""
        self._retired = True
        return self._unsent()

    def _unsent(self) -> list[Live]:
        # Marked, and not sent soon: a restart would make tried ones of them, and a day's wait doubts.
        arming = [live for live in self._arming if live.phase is Phase.ARMING]
        return arming + self.withdraw(lambda live: not live.tried)

    def wake(self, now: int) -> int | None:
        """When time alone brings something to look at or to send; None where it does not."""
        times = [self._resting[0][0]] if self._resting else []
        if self.gate.shut:
            if not (self._sent or self._arming or self._probe_wanted):
                times = [self.gate.probe_at] if times or self._waiting or self._lanes.ready else []
        elif self._lanes.ready:
            times.append(now + self.pacing.wait(now))
        return max(now, min(times)) if times else None
