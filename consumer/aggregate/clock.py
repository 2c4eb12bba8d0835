"""How far a quiet partition's log clock may follow the reader's clock, which may be wrong.

The log clock moves with the records. Where none come, it may move only as far as the time that has really passed since
the last one: a host whose clock jumps a year must not close a year of buckets. Times are milliseconds; ``elapsed`` is
a monotonic clock, which nobody can set.
"""

from dataclasses import dataclass
from typing import Final

AGREEMENT: Final = 5 * 60_000
"""Two clocks agree if they differ by at most this; also how far ahead of the reader a record may be dated."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A time, and when it was read."""

    time: int
    elapsed: int

    def now(self, elapsed: int) -> int:
        """The time that this reading makes it by now."""
        return self.time + elapsed - self.elapsed


class QuietClock:
    """The limit for one partition, from the records that were read of it since it was restored at ``clock``."""

    __slots__ = ("_anchor", "_settle", "_trusted")

    def __init__(self, clock: int, elapsed: int, settle: int) -> None:
        self._anchor = Reading(clock, elapsed)
        self._settle = settle
        self._trusted = False

    def read(self, arrival: int, elapsed: int) -> None:
        """A record with this arrival has been read.

        The reading that makes it latest counts: a backlog's last record says nothing against a time that passed.
        """
        if arrival > self._anchor.now(elapsed):
            self._anchor = Reading(arrival, elapsed)

    def limit(self, now: int, elapsed: int, witness: Reading | None) -> int:
        """The latest time that the partition's clock may be set to, if everything in its log has been read.

        After a restore nobody knows how long the partition has been quiet. Then the reader's clock may be believed
        once, if a clock that is not the reader's (the broker's, Stripe's) agrees with it.
        """
        limit = self._anchor.now(elapsed) + self._settle
        if now > limit and not self._trusted and witness and abs(witness.now(elapsed) - now) <= AGREEMENT:
            self._trusted = True
            self._anchor = Reading(now, elapsed)
            return now
        return min(now, limit)
