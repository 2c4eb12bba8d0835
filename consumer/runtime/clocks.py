"""Clocks, passed to whatever needs one, so that tests and the sandbox can move them."""

import time
from typing import Protocol


class Clock(Protocol):
    """The time of day, and a time that nobody can set. Both in whole milliseconds."""

    def now(self) -> int:
        """Since the Unix epoch, by this host's clock."""

    def elapsed(self) -> int:
        """Since some moment in the past; it never goes back and does not follow the time of day."""


class SystemClock:
    """This host's clocks."""

    def now(self) -> int:
        """The time of day."""
        return time.time_ns() // 1_000_000

    def elapsed(self) -> int:
        """The monotonic clock."""
        return time.monotonic_ns() // 1_000_000
