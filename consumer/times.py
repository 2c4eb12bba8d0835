"""Times in events: RFC 3339 to the millisecond, truncated.

Our own, since a library that rounds 11:59:59.9999996 up bills the next window.
"""

import re
from datetime import date
from typing import Final

from consumer.memory import Memory

_SECOND: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt]([01]\d|2[0-3]):([0-5]\d):([0-5]\d)", re.ASCII)
_REST: Final = re.compile(r"(?:\.(\d+))?([Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))", re.ASCII)
_EPOCH: Final = date(1970, 1, 1).toordinal()
_DAY: Final = 86_400_000


def parse_time(text: str) -> int:
    """An RFC 3339 time in milliseconds since the epoch, UTC: the millisecond in which it lies, never rounded up.

    Raises ValueError for anything else, a time without an offset included. A leap second, 23:59:60 UTC, is the last
    millisecond of its day whatever its fraction: it stays in the minute to which it belongs.
    """
    try:
        return SECONDS[text[:19]] + RESTS[text[19:]]
    except ValueError as error:
        instant = _leap_second(text)
        if instant is not None:
            return instant
        raise ValueError(f"{text[:60]!r} is not an RFC 3339 time: {error}") from None


def _second(text: str) -> int:
    match = _SECOND.fullmatch(text)
    if match is None:
        raise ValueError("it does not begin with YYYY-MM-DDThh:mm:ss, or has a number out of range")
    year, month, day, hour, minute, second = map(int, match.groups())
    return (date(year, month, day).toordinal() - _EPOCH) * _DAY + (hour * 3600 + minute * 60 + second) * 1000


def _rest(text: str) -> int:
    match = _REST.fullmatch(text)
    if match is None:
        raise ValueError("it does not end with an optional fraction and Z or an offset such as +05:30")
    fraction, _, sign, hours, minutes = match.groups()
    milliseconds = int((fraction or "").ljust(3, "0")[:3])
    if sign is None:
        return milliseconds
    offset = (int(hours) * 60 + int(minutes)) * 60_000
    return milliseconds - offset if sign == "+" else milliseconds + offset


class _Rests(Memory[str, int]):
    """Digits below the millisecond change nothing, and with them no rest would ever come back."""

    def __missing__(self, piece: str) -> int:
        if len(piece) > 5:
            zone = -1 if piece[-1] in "Zz" else -6
            below = piece[4:zone]
            if below and below.isdigit() and below.isascii():
                return self[piece[:4] + piece[zone:]]
        return super().__missing__(piece)


SECONDS: Final = Memory(_second)
"""The first 19 characters of a time, in milliseconds since the epoch as if it were UTC; for the hot path."""
RESTS: Final = _Rests(_rest)
"""What follows them, fraction and offset, in milliseconds to add."""


def _leap_second(text: str) -> int | None:
    rest = _REST.fullmatch(text, 19)
    if text[17:19] != "60" or rest is None:
        return None
    try:
        instant = SECONDS[f"{text[:17]}59"] + 999 + RESTS[rest[2]]
    except ValueError:
        return None
    return instant if instant % _DAY == _DAY - 1 else None
