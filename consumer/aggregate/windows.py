"""Event time: tumbling windows, revisions, and when each is due.

All times are milliseconds since the Unix epoch. A window is ``[start, start + size)``. What arrives before the deadline
is revision 0, due at the deadline; later arrivals are grouped by marks after it, one revision for each stretch.
"""

from typing import Final

MINUTE: Final = 60_000
HOUR: Final = 60 * MINUTE

EARLY_MARKS: Final = (0, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR)
"""After the deadline, when revisions 0, 1, 2, … are due; every hour from the last one on.

The first ones are close together because Stripe finalises an invoice one hour after its period: a correction that is
due later than that is billed to nobody.
"""


def window_start(event_time: int, size: int) -> int:
    """Start of the window that the event time lies in."""
    return event_time - event_time % size


def due(deadline: int, revision: int) -> int:
    """When a revision is due: everything that belongs to it has arrived before this time."""
    if revision < len(EARLY_MARKS):
        return deadline + EARLY_MARKS[revision]
    return deadline + EARLY_MARKS[-1] + (revision - len(EARLY_MARKS) + 1) * HOUR


def revision_at(deadline: int, time: int) -> int:
    """The first revision that is due after ``time``: the one that an arrival at that time belongs to."""
    late = time - deadline
    if late >= EARLY_MARKS[-1]:
        return len(EARLY_MARKS) + (late - EARLY_MARKS[-1]) // HOUR
    return sum(late >= mark for mark in EARLY_MARKS)
