"""Event names whose meter Stripe refuses: their totals are parked, and one of them finds out when that is cured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from consumer.deliver.pacing import MINUTE

PROBE_EVERY: Final = MINUTE


@dataclass(slots=True)
class _Stop:
    message: str
    """What Stripe said."""
    probe_at: int
    probe: str | None = None
    """The total that finds out now."""
    lifted: bool = False
    """Somebody says that it is cured: all may be tried, until Stripe says otherwise."""


class Stops:
    """One for each event name that is stopped."""

    def __init__(self) -> None:
        self._stops: dict[str, _Stop] = {}

    def names(self) -> list[str]:
        """The event names that are stopped. Another thread may ask."""
        return list(self._stops)

    def message(self, event_name: str) -> str:
        """What Stripe said."""
        return self._stops[event_name].message

    def may_try(self, event_name: str, identifier: str) -> bool:
        """Whether this total may be sent: its event name is not stopped, or it is the one that finds out."""
        stop = self._stops.get(event_name)
        return stop is None or stop.lifted or stop.probe == identifier

    def stop(self, event_name: str, message: str, probe_at: int) -> None:
        """Nothing more of this event name, for now."""
        self._stops.setdefault(event_name, _Stop(message, probe_at))

    def refused(self, event_name: str, identifier: str, message: str, now: int) -> None:
        """Stripe has no active meter for this total."""
        self.stop(event_name, message, now + PROBE_EVERY)
        stop = self._stops[event_name]
        stop.message, stop.lifted = message, False
        if stop.probe == identifier:
            stop.probe, stop.probe_at = None, now + PROBE_EVERY

    def lift(self, event_name: str) -> None:
        """Somebody says that it takes events: whatever is released is sent, and those that are parked go on asking."""
        if event_name in self._stops:
            self._stops[event_name].lifted = True

    def cured(self, event_name: str) -> None:
        """It takes events."""
        self._stops.pop(event_name, None)

    def due(self, now: int, at_work: Callable[[str], bool]) -> list[str]:
        """Those to send a probe for now. ``at_work`` tells whether a total may still find out."""
        for stop in self._stops.values():
            if stop.probe is not None and not at_work(stop.probe):
                # It ended for another reason, and found out nothing.
                stop.probe, stop.probe_at = None, now + PROBE_EVERY
        # A time further ahead than any wait is one that a clock made which has been set back.
        return [
            event_name
            for event_name, stop in self._stops.items()
            if stop.probe is None and not now < stop.probe_at <= now + PROBE_EVERY
        ]

    def probe(self, event_name: str, identifier: str) -> None:
        """This total finds out."""
        self._stops[event_name].probe = identifier

    def wake(self) -> int | None:
        """When the next probe is due; None where none is."""
        return min((stop.probe_at for stop in self._stops.values() if stop.probe is None), default=None)
