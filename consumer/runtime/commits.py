"""How the commits of a stage go: what metrics and readiness say of them, and how long to wait when they fail."""

from collections import Counter
from collections.abc import Collection
from typing import Final

import structlog

from consumer.runtime.clocks import Clock
from consumer.storage import CommitFailed, Stage

log = structlog.get_logger()

LONGEST_S: Final = 30.0


def backoff(failures: int) -> float:
    """Seconds to wait after so many commits in a row that failed: a cluster that is ill gets no worse by us."""
    return 0.0 if failures <= 1 else min(LONGEST_S, 2.0 ** (failures - 2))


class Commits:
    """The account of one stage's commits."""

    def __init__(self, stage: Stage, clock: Clock) -> None:
        self._stage = stage
        self._clock = clock
        self._failed_in_a_row = 0
        self.failures: Counter[str] = Counter()
        """By how they failed."""
        self.failing_since: int | None = None
        """The time of day since which no commit has been made, though one was due; None while they are made."""
        self.last: tuple[int, float] | None = None
        """When (time of day, ms) the last commit was made and how long it took, in seconds."""

    def made(self, began: int) -> float:
        """One was made that began then, by the monotonic clock; returns how many seconds it took."""
        self._failed_in_a_row, self.failing_since = 0, None
        took = (self._clock.elapsed() - began) / 1000
        self.last = self._clock.now(), took
        return took

    def failed(self, partitions: Collection[int], failed: CommitFailed) -> float:
        """One of these partitions failed; returns how many seconds to wait before they are restored.

        What is in memory may be ahead of what is durable, or behind it: only that restore tells.
        """
        self._failed_in_a_row += 1
        self.failures[failed.how] += 1
        if self.failing_since is None:
            self.failing_since = self._clock.now()
        again_s = backoff(self._failed_in_a_row)
        log.warning(
            "commit_failed",
            stage=str(self._stage),
            how=failed.how,
            reason=str(failed),
            partitions=sorted(partitions),
            again_s=again_s,
        )
        return again_s
