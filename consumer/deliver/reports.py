"""What Stripe reports of events that it took and rejected later, and what the last comparison with its sums found."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from consumer.deliver.entries import HOUR, EntryError
from consumer.totals import Comparison, Rejection, Report, decode, encode

REJECTED: Final = b"rejected/"
"""Of the keys of entries; what follows is the identifier of a total that was billed, and is refused since."""

_LOOK_EVERY: Final = HOUR
_REPORT: Final = "report/"
_COMPARISON: Final = "comparison/"

Noted = Rejection | Report | Comparison


class Reports:
    """What was read of them in this partition of the totals log, each once and for as long as outcomes are kept."""

    def __init__(self, keep: int) -> None:
        """``keep``: for how many milliseconds."""
        self._keep = keep
        self._kept: dict[str, Noted] = {}
        self._looked_at = 0

    @property
    def comparison(self) -> Comparison | None:
        """The last one of every meter."""
        found = self._kept.get(_COMPARISON)
        return found if isinstance(found, Comparison) else None

    def load(self, key: bytes, value: bytes) -> None:
        """Take over a restored entry; raises ``EntryError``."""
        try:
            noted = decode(value)
        except msgspec.DecodeError as error:
            raise EntryError(f"{key!r} cannot be read: {error}") from error
        if not isinstance(noted, Noted) or _key(noted) != key.decode():
            raise EntryError(f"{key!r} is not what it is called: use the newer tallyman")
        self._kept[_key(noted)] = noted

    def note(self, noted: Noted) -> tuple[str, bytes] | None:
        """Keep it; returns its entry, or None where it is known already."""
        key = _key(noted)
        before = self._kept.get(key)
        if isinstance(noted, Comparison):
            noted = self._newest(noted)
            if noted == before:
                return None
        elif before is not None:
            return None
        self._kept[key] = noted
        return key, encode(noted)

    def _newest(self, noted: Comparison) -> Comparison:
        """The last one of every meter; who compares one meter says nothing about the others."""
        meters = dict(self.comparison.meters) if self.comparison else {}
        for event_name, each in noted.meters.items():
            if event_name not in meters or meters[event_name].at < each.at:
                meters[event_name] = each
        at = max((each.at for each in meters.values()), default=noted.at)
        return Comparison(at, {name: each for name, each in meters.items() if each.at >= at - self._keep})

    def expired(self, now: int) -> Iterator[str]:
        """The entries that are not needed any more."""
        if 0 <= now - self._looked_at < _LOOK_EVERY:
            return
        self._looked_at = now
        before = now - self._keep
        old = [key for key, each in self._kept.items() if not isinstance(each, Comparison) and each.at < before]
        for key in old:
            del self._kept[key]
            yield key


def unanswered(entries: Iterable[tuple[bytes, bytes]]) -> list[Report]:
    """The reports among the entries of stage 2, of all partitions, whose meters have not been compared since."""
    prefixes = (_REPORT.encode(), _COMPARISON.encode())
    found = [decode(value) for key, value in entries if key.startswith(prefixes)]
    compared: dict[str | None, int] = {}
    for comparison in found:
        if isinstance(comparison, Comparison):
            for event_name, each in comparison.meters.items():
                for name in (event_name, None):  # nobody knows which meter was meant: any of them
                    compared[name] = max(each.at, compared.get(name, 0))
    return [each for each in found if isinstance(each, Report) and compared.get(each.event_name, 0) <= each.at]


def _key(noted: Noted) -> str:
    if isinstance(noted, Rejection):
        return REJECTED.decode() + noted.identifier
    return _REPORT + noted.report if isinstance(noted, Report) else _COMPARISON
