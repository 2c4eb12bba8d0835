"""Quantities: from the JSON text of a value to an exact integer in units of 10⁻¹², with no binary float on the way."""

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final

from consumer.totals import SCALE_DIGITS

LARGEST_EXPONENT: Final = 15
"""A quantity is smaller than 10¹⁵, either way: nothing longer fits the digits that Stripe takes."""

_NUMBER: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE]([+-]?[0-9]+))?")
_LONGEST: Final = 1_000
"""Bytes of text; a longer one is no measurement. It bounds the work that one event can cause."""
_LARGEST_WRITTEN_EXPONENT: Final = 10_000
"""Beyond it a number is zero, nearly zero or too large, whatever its digits are (of which there are at most 1 000)."""

_EXACT: Final = Context(prec=2 * _LONGEST, rounding=ROUND_HALF_EVEN)


class NotAQuantity(Exception):
    """A value cannot be counted: ``reason`` is a short name for it, the message is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def quantity(raw: bytes, *, decimals: int, allow_negative: bool) -> tuple[int, bool]:
    """The exact value of a JSON number or numeric string, and whether decimals had to be rounded away.

    Decimals beyond ``decimals`` (0 to 12) are rounded half to even; an ordinary float such as 0.1 + 0.2 has 17.
    Raises ``NotAQuantity`` for all that is no number, is not within ±10¹⁵, or is negative where that is not allowed.
    """
    text = raw[1:-1] if raw[:1] == b'"' else raw
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise NotAQuantity("value_not_a_number", f"the value is no number: {_shown(raw)}")
    if abs(int(match[1] or 0)) > _LARGEST_WRITTEN_EXPONENT:
        raise NotAQuantity("value_out_of_range", f"the value has an exponent that no measurement has: {_shown(raw)}")
    number = Decimal(text.decode("ascii"))
    if number and number.adjusted() >= LARGEST_EXPONENT:
        raise NotAQuantity("value_out_of_range", f"the value is not within ±10¹⁵: {_shown(raw)}")
    if number < 0 and not allow_negative:
        raise NotAQuantity("value_negative", f"the value is negative, which the meter does not allow: {_shown(raw)}")
    if not number or number.adjusted() < -SCALE_DIGITS - 1:
        return 0, bool(number)
    rounded = number.quantize(Decimal(1).scaleb(-decimals), context=_EXACT)
    return int(rounded.scaleb(SCALE_DIGITS, context=_EXACT)), rounded != number


def _shown(raw: bytes) -> str:
    return raw[:60].decode("utf-8", "replace") + ("…" if len(raw) > 60 else "")
