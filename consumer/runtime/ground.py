"""What the two stages stand on, whichever store it is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from consumer.aggregate.aggregator import Aggregator
from consumer.runtime.membership import Membership
from consumer.runtime.reporter import State
from consumer.runtime.source import Ends
from consumer.runtime.totals_log import TotalsLog
from consumer.storage import Progress, Stage, Store


@dataclass(frozen=True, slots=True)
class Ground:
    """A pipeline that has begun, and this process's way to it."""

    store: Store
    memberships: Mapping[Stage, Membership]
    """Of the stages that this process runs."""
    aggregator: Callable[[int, Progress], Aggregator]
    """Restores a partition of stage 1."""
    delivery: Callable[[int, Progress], State]
    """Restores a partition of stage 2."""
    unread: TotalsLog
    ahead: TotalsLog
    """The totals log once more, to look ahead in it."""
    spread: int
    """The number of partitions of the totals log."""
    ends: Callable[[], Ends] | None
    """Where the logs end, where the group is to bear witness to it."""
    expire: Callable[[int, int], None] | None
    """Deletes what was appended before a time, in milliseconds, as far as it has been read: below this offset of the
    totals log. None where the store does so by itself."""
    close: Callable[[], None]
