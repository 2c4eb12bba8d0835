"""Duplicates: which event ids have been counted, told by arithmetic on arrival intervals.

Time is cut into intervals of ``deduplicate_for`` / 24. An id is a duplicate if it last arrived at most 24 intervals
ago, whatever happens to be in memory, and a duplicate renews its id. Arrivals never go back, so only the current
interval grows, and an interval that has fallen behind is forgotten whole.

Ids are 64-bit digests: with five million remembered, a new event looks like a duplicate once in 4·10¹² cases.
"""

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

INTERVALS: Final = 24
IDS_PER_CHUNK: Final = 8_000
"""Digests in one entry: 64 000 bytes, within the 64 KB that a message may have."""


class Chunk(NamedTuple):
    """One entry: digests, in the order of their arrival, that came (again) in one interval."""

    interval: int
    number: int
    digests: bytes
    """Little-endian, eight bytes each."""


class Remembered:
    """The ids of one partition, and what has changed of them since the last commit.

    The hot path asks ``seen`` itself: an id that arrives is a duplicate if ``interval - seen[id] <= INTERVALS``. Either
    way it then puts it into ``seen`` with the current ``interval`` and, if it was not there so, into ``fresh``.
    """

    __slots__ = ("_chunks", "_dropped", "_unsaved", "_width", "fresh", "interval", "seen")

    def __init__(self, deduplicate_for: int, chunks: Iterable[Chunk] = ()) -> None:
        self._width = deduplicate_for // INTERVALS
        self.interval = 0
        self.seen: dict[int, int] = {}
        """Digest to the interval in which it last arrived."""
        self.fresh: list[int] = []
        """What was put into the current interval since the last commit."""
        self._chunks: dict[int, list[array[int]]] = {}
        self._unsaved: dict[int, int] = {}
        """Per interval, the first chunk that the store does not have as it is."""
        self._dropped: list[tuple[int, int]] = []
        for chunk in sorted(chunks):
            digests = _little_endian(array("Q", chunk.digests))
            self._chunks.setdefault(chunk.interval, []).append(digests)
            self.seen.update(dict.fromkeys(digests, chunk.interval))
            self.interval = chunk.interval

    def __len__(self) -> int:
        return len(self.seen)

    def enter(self, arrival: int) -> int:
        """Move on to the interval of this arrival, forgetting what fell behind; return the time at which it ends."""
        interval = arrival // self._width
        if interval > self.interval:
            self._fold()
            self.interval = interval
            for old in [i for i in self._chunks if interval - i > INTERVALS]:
                self._forget(old)
        return (self.interval + 1) * self._width

    def changes(self) -> tuple[Iterator[Chunk], list[tuple[int, int]]]:
        """What a commit has to put, and the (interval, number) of what it has to delete."""
        self._fold()
        unsaved, dropped = self._unsaved, self._dropped
        self._unsaved, self._dropped = {}, []
        return (
            Chunk(interval, number, _little_endian(self._chunks[interval][number]).tobytes())
            for interval, first in unsaved.items()
            for number in range(first, len(self._chunks[interval]))
        ), dropped

    def _fold(self) -> None:
        if not self.fresh:
            return
        chunks = self._chunks.setdefault(self.interval, [array("Q")])
        self._unsaved.setdefault(self.interval, len(chunks) - 1)
        for digest in self.fresh:
            if len(chunks[-1]) == IDS_PER_CHUNK:
                chunks.append(array("Q"))
            chunks[-1].append(digest)
        self.fresh.clear()

    def _forget(self, interval: int) -> None:
        chunks = self._chunks.pop(interval)
        self._unsaved.pop(interval, None)
        self._dropped.extend((interval, number) for number in range(len(chunks)))
        for digests in chunks:
            for digest in digests:
                if self.seen.get(digest) == interval:
                    del self.seen[digest]


def _little_endian(digests: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        digests = digests[:]
        digests.byteswap()
    return digests
