"""What was produced beside what Stripe would bill: exactly, by customer, meter and minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact
from typing import Final

from consumer.sandbox.traffic import MINUTE_MS

EXACT: Final = Context(prec=100, traps=[Inexact])
"""Decimal arithmetic that raises where it would have to round."""


@dataclass(slots=True)
class Line:
    """One customer on one meter, in whole units of the meter."""

    expected: Decimal = Decimal(0)
    billed: Decimal = Decimal(0)
    minutes: int = 0
    """In which there was or should have been usage."""
    wrong: int = 0
    """Of these minutes. Two of them can make up for each other, and are wrong all the same."""

    @property
    def difference(self) -> Decimal:
        """Billed too much, or too little where it is negative."""
        return EXACT.subtract(self.billed, self.expected)

    def add(self, expected: Decimal, billed: Decimal) -> None:
        """One more minute."""
        self.expected = EXACT.add(self.expected, expected)
        self.billed = EXACT.add(self.billed, billed)
        self.minutes += 1
        self.wrong += expected != billed


def compare(
    expected: Mapping[tuple[str, str, int], int], billed: Mapping[tuple[str, str, int], Decimal]
) -> dict[tuple[str, str], Line]:
    """One line per Stripe event name and customer.

    ``expected`` is as generated traffic gives it, by minutes in milliseconds and in units of 10⁻¹²; ``billed`` is as
    the Stripe stand-in gives it, by minutes in seconds.
    """
    wanted = {
        (event_name, customer, start // MINUTE_MS): Decimal(value).scaleb(-12, EXACT)
        for (event_name, customer, start), value in expected.items()
    }
    found = {
        (event_name, customer, start * 1000 // MINUTE_MS): value
        for (event_name, customer, start), value in billed.items()
    }
    lines: dict[tuple[str, str], Line] = {}
    for minute in sorted(wanted.keys() | found.keys()):
        line = lines.setdefault(minute[:2], Line())
        line.add(wanted.get(minute, Decimal(0)), found.get(minute, Decimal(0)))
    return lines
