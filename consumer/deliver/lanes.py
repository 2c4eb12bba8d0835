"""One request at a time per Stripe customer and meter: Stripe takes no more, whatever the rate."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Key = tuple[str, str]
"""A Stripe customer and an event name."""

T = TypeVar("T")


class _Lane(Generic[T]):
    __slots__ = ("busy", "queue")

    def __init__(self) -> None:
        self.queue: deque[T] = deque()
        self.busy = False


class Lanes(Generic[T]):
    """Queues that take turns; one that has given an item away gives no other until told that it is done."""

    def __init__(self) -> None:
        self._lanes: dict[Key, _Lane[T]] = {}
        self._free: deque[Key] = deque()
        self._length = 0

    def __len__(self) -> int:
        """How many items wait."""
        return self._length

    @property
    def ready(self) -> bool:
        """Whether ``take`` would give one."""
        return bool(self._free)

    def add(self, key: Key, item: T, *, first: bool = False) -> None:
        """Put an item at the end of its lane; or before all others, so that it is taken next if its lane is free."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        if first:
            if lane.queue and not lane.busy:
                self._free.remove(key)
            if not lane.busy:
                self._free.appendleft(key)
            lane.queue.appendleft(item)
        else:
            if not lane.queue and not lane.busy:
                self._free.append(key)
            lane.queue.append(item)
        self._length += 1

    def take(self) -> T | None:
        """The next item of the lane whose turn it is; the lane is busy from now on."""
        if not self._free:
            return None
        lane = self._lanes[self._free.popleft()]
        lane.busy = True
        self._length -= 1
        return lane.queue.popleft()

    def done(self, key: Key) -> None:
        """The lane is not busy any more."""
        lane = self._lanes[key]
        lane.busy = False
        if lane.queue:
            self._free.append(key)
        else:
            del self._lanes[key]

    def withdraw(self, wanted: Callable[[T], bool]) -> list[T]:
        """Take out all waiting items of a kind, without making their lanes busy."""
        out: list[T] = []
        for key, lane in list(self._lanes.items()):
            found = [item for item in lane.queue if wanted(item)]
            if not found:
                continue
            out += found
            lane.queue = deque(item for item in lane.queue if not wanted(item))
            if not lane.queue and not lane.busy:
                del self._lanes[key]
        self._free = deque(key for key in self._free if key in self._lanes)
        self._length -= len(out)
        return out
