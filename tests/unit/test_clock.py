"""How far the clock of a quiet partition may follow its reader's clock."""

import pytest

from consumer.aggregate.clock import AGREEMENT, QuietClock, Reading
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, T0

SETTLE = 5 * SECOND
YEAR = 365 * DAY
BOOT = 77 * HOUR
"""What the monotonic clock shows when it all begins: its zero means nothing."""


def restored(at: int = T0) -> QuietClock:
    return QuietClock(at, BOOT, SETTLE)


def test_the_clock_follows_the_time_that_passes_after_the_last_record() -> None:
    """Without it the last windows before a quiet night would be billed the next morning, after the invoice."""
    quiet = restored()
    quiet.read(T0 + MINUTE, BOOT + MINUTE)
    assert quiet.limit(T0 + 3 * MINUTE, BOOT + 3 * MINUTE, None) == T0 + 3 * MINUTE


def test_a_host_clock_that_jumps_a_year_closes_nothing() -> None:
    """It would close a year of buckets, and what arrives for them would be billed as corrections, too late."""
    quiet = restored()
    quiet.read(T0 + MINUTE, BOOT + MINUTE)
    jumped = quiet.limit(T0 + YEAR, BOOT + 2 * MINUTE, None)
    assert jumped == T0 + 2 * MINUTE + SETTLE
    assert quiet.limit(T0 + YEAR, BOOT + 3 * MINUTE, None) == T0 + 3 * MINUTE + SETTLE, "and it does not add up"


def test_a_host_clock_that_jumps_is_not_believed_because_a_witness_is_there() -> None:
    quiet = restored()
    witness = Reading(T0 + MINUTE, BOOT + MINUTE)
    assert quiet.limit(T0 + YEAR, BOOT + 2 * MINUTE, witness) == T0 + 2 * MINUTE + SETTLE


def test_a_host_clock_that_is_behind_is_followed() -> None:
    """What has been read may be newer than the reader's time; later windows are not its to close."""
    quiet = restored()
    quiet.read(T0 + MINUTE, BOOT)
    assert quiet.limit(T0 - HOUR, BOOT + SECOND, None) == T0 - HOUR


@pytest.mark.parametrize(
    ("apart", "believed"), [(0, True), (AGREEMENT, True), (-AGREEMENT, True), (AGREEMENT + 1, False)]
)
def test_after_a_restore_a_witness_within_five_minutes_lets_the_clock_jump(apart: int, believed: bool) -> None:
    """Without the jump a partition that was quiet during an outage would never close what it holds."""
    quiet = restored()
    now = T0 + 3 * HOUR
    witness = Reading(now - MINUTE + apart, BOOT)
    expected = now if believed else T0 + MINUTE + SETTLE
    assert quiet.limit(now, BOOT + MINUTE, witness) == expected


def test_after_a_restore_nothing_but_a_witness_lets_the_clock_jump() -> None:
    """A host that starts with a wrong clock must not bill by it."""
    quiet = restored()
    assert quiet.limit(T0 + 3 * HOUR, BOOT + MINUTE, None) == T0 + MINUTE + SETTLE


def test_only_one_jump_is_allowed() -> None:
    """Clocks that went wrong together later, as those of one host do, must not close a year of buckets."""
    quiet = restored()
    first = T0 + 3 * HOUR
    assert quiet.limit(first, BOOT, Reading(first, BOOT)) == first
    second = T0 + YEAR
    assert quiet.limit(second, BOOT + MINUTE, Reading(second, BOOT + MINUTE)) == first + MINUTE + SETTLE


def test_a_partition_that_has_jumped_goes_on_from_there() -> None:
    quiet = restored()
    now = T0 + 3 * HOUR
    quiet.limit(now, BOOT, Reading(now, BOOT))
    assert quiet.limit(now + HOUR, BOOT + HOUR, None) == now + HOUR


def test_a_jump_that_is_not_needed_is_not_spent() -> None:
    quiet = restored()
    assert quiet.limit(T0 + MINUTE, BOOT + MINUTE, Reading(T0 + MINUTE, BOOT + MINUTE)) == T0 + MINUTE
    now = T0 + 9 * HOUR
    assert quiet.limit(now, BOOT + 2 * MINUTE, Reading(now, BOOT + 2 * MINUTE)) == now


def test_a_backlogs_last_record_does_not_hold_the_clock_back() -> None:
    """Its arrival is hours ago, which says nothing against a time that has passed since the restore."""
    quiet = restored(T0)
    for minutes in range(60):
        quiet.read(T0 - 2 * HOUR + minutes * MINUTE, BOOT + minutes * SECOND)
    assert quiet.limit(T0 + HOUR, BOOT + HOUR, None) == T0 + HOUR


def test_a_backlog_moves_the_limit_with_its_records_and_no_further() -> None:
    """Three hours of backlog are read in seconds; the rest of the way needs a witness."""
    quiet = restored(T0)
    quiet.read(T0 + 2 * HOUR, BOOT + SECOND)
    assert quiet.limit(T0 + 3 * HOUR, BOOT + 2 * SECOND, None) == T0 + 2 * HOUR + SECOND + SETTLE
    witness = Reading(T0 + 3 * HOUR, BOOT + 2 * SECOND)
    assert quiet.limit(T0 + 3 * HOUR, BOOT + 2 * SECOND, witness) == T0 + 3 * HOUR


def test_a_reading_grows_with_the_time_that_passed_since() -> None:
    assert Reading(T0, BOOT).now(BOOT + HOUR) == T0 + HOUR
