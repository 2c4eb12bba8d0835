"""Duplicates: which event ids have been counted, told by arithmetic on arrival intervals.

Time is cut into 24 intervals for the time that an id is remembered. An id is a duplicate if it last arrived at most 24
intervals ago, whatever happens to be in memory, and a duplicate renews its id. Arrivals never go back, so only the
current interval grows, and an interval that has fallen behind is forgotten whole.

Ids are 64-bit digests: with five million remembered, a new event looks like a duplicate once in 4·10¹² cases.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from consumer.memory import Memory

INTERVALS: Final = 24
IDS_PER_CHUNK: Final = 8_000
"""Digests in one entry: 64 000 bytes, within the 64 KB that a message may have."""


PREFIXES: Final[Memory[str, str]] = Memory(lambda source: f"{len(source)}:{source}")
"""What is hashed before an event's id: its source, with its length, so that no two pairs read alike."""


class Name(NamedTuple):
    """Of a chunk. Intervals are counted in widths, so that a state outlives a change of their width."""

    width: int
    """Milliseconds."""
    interval: int
    number: int


class Chunk(NamedTuple):
    """One entry: digests, in the order of their arrival, that came (again) in one interval."""

    name: Name
    digests: bytes
    """Little-endian, eight bytes each."""


class Remembered:
    """The ids of one partition, and what has changed of them since the last commit.

    The hot path puts ids that it has never seen into ``seen``, with the current ``interval``, and ``fresh`` itself.
    """

    __slots__ = ("_chunks", "_dropped", "_older", "_unsaved", "_width", "fresh", "interval", "seen")

    def __init__(self, remember_for: int, chunks: Iterable[Chunk] = ()) -> None:
        """Whatever comes again within ``remember_for``, in milliseconds, is a duplicate."""
        self._width = -(-remember_for // INTERVALS)
        self.interval = 0
        self.seen: dict[int, int] = {}
        """Digest to the interval in which it last arrived."""
        self.fresh: list[int] = []
        """What was put into the current interval since the last commit."""
        self._chunks: dict[int, list[array[int]]] = {}
        self._older: dict[int, list[tuple[Name, array[int]]]] = {}
        """Chunks of another width, by the interval in which theirs ends: the latest that their ids can have come."""
        self._unsaved: dict[int, int] = {}
        """Per interval, the first chunk that the store does not have as it is."""
        self._dropped: list[Name] = []
        # In the order of their ends, so that the last thing said of an id is the newest.
        for name, packed in sorted(chunks, key=lambda chunk: (_end(chunk.name), chunk.name)):
            digests = _little_endian(array("Q", packed))
            interval = (_end(name) - 1) // self._width
            if name.width == self._width:
                self._chunks.setdefault(interval, []).append(digests)
                self.interval = interval
            else:
                self._older.setdefault(interval, []).append((name, digests))
            self.seen.update(dict.fromkeys(digests, interval))

    def __len__(self) -> int:
        return len(self.seen)

    def has(self, digest: int) -> bool:
        """Whether an event with this id that arrives now is a duplicate."""
        last = self.seen.get(digest)
        return last is not None and self.interval - last <= INTERVALS

    def remember(self, digest: int) -> None:
        """It arrived, for the first time or again, in the current interval.

        What was noted when intervals were longer may have come at the end of its own, which is still ahead.
        """
        if self.seen.get(digest, -1) < self.interval:
            self.seen[digest] = self.interval
            self.fresh.append(digest)

    def enter(self, arrival: int) -> int:
        """Move on to the interval of this arrival, forgetting what fell behind; return the time at which it ends."""
        interval = arrival // self._width
        if interval > self.interval:
            self._fold()
            self.interval = interval
            for old in [i for i in {*self._chunks, *self._older} if interval - i > INTERVALS]:
                self._forget(old)
        return (self.interval + 1) * self._width

    def changes(self) -> tuple[Iterator[Chunk], list[Name]]:
        """The chunks that a commit has to put, and those that it has to delete."""
        self._fold()
        unsaved, dropped = self._unsaved, self._dropped
        self._unsaved, self._dropped = {}, []
        return (
            Chunk(Name(self._width, interval, number), _little_endian(self._chunks[interval][number]).tobytes())
            for interval, first in unsaved.items()
            for number in range(first, len(self._chunks[interval]))
        ), dropped

    def _fold(self) -> None:
        if not self.fresh:
            return
        chunks = self._chunks.setdefault(self.interval, [array("Q")])
        self._unsaved.setdefault(self.interval, len(chunks) - 1)
        digests = array("Q", self.fresh)
        while digests:
            room = IDS_PER_CHUNK - len(chunks[-1])
            chunks[-1].extend(digests[:room])
            digests = digests[room:]
            if digests:
                chunks.append(array("Q"))
        self.fresh.clear()

    def _forget(self, interval: int) -> None:
        chunks = self._older.pop(interval, [])
        numbered = enumerate(self._chunks.pop(interval, []))
        chunks.extend((Name(self._width, interval, number), digests) for number, digests in numbered)
        self._unsaved.pop(interval, None)
        for name, digests in chunks:
            self._dropped.append(name)
            for digest in digests:
                if self.seen.get(digest) == interval:
                    del self.seen[digest]


def _end(name: Name) -> int:
    """When its interval ends, in milliseconds."""
    return (name.interval + 1) * name.width


def _little_endian(digests: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        digests = digests[:]
        digests.byteswap()
    return digests
