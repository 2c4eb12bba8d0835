"""Windows, and the marks at which their corrections are due."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.aggregate.windows import due, revision_at, window_start
from tests.unit.stage1 import HOUR, MINUTE, T0
from tests.unit.strategies import THOROUGH

DEADLINE = T0 + 3 * MINUTE


@pytest.mark.parametrize("size", [MINUTE, HOUR])
def test_a_window_contains_its_start_and_not_its_end(size: int) -> None:
    """An event on the edge that lay in two windows, or in none, would be billed twice or never."""
    assert window_start(T0, size) == T0
    assert window_start(T0 + size - 1, size) == T0
    assert window_start(T0 + size, size) == T0 + size
    assert window_start(T0 - 1, size) == T0 - size


@pytest.mark.parametrize(
    ("revision", "minutes"), [(0, 0), (1, 5), (2, 15), (3, 30), (4, 60), (5, 120), (6, 180), (7, 240), (821, 49_080)]
)
def test_corrections_are_due_soon_at_first_and_then_hourly(revision: int, minutes: int) -> None:
    """Stripe finalises an invoice one hour after its period: hourly corrections from the start would all miss it."""
    assert due(DEADLINE, revision) == DEADLINE + minutes * MINUTE


@pytest.mark.parametrize("revision", range(12))
def test_an_arrival_at_a_mark_belongs_to_the_next_revision(revision: int) -> None:
    """The bucket of the mark may have closed by then; added to it, the event would never be billed."""
    mark = due(DEADLINE, revision)
    assert revision_at(DEADLINE, mark - 1) == revision
    assert revision_at(DEADLINE, mark) == revision + 1


@THOROUGH
@given(st.integers(-40 * 24 * HOUR, 40 * 24 * HOUR))
def test_an_arrival_belongs_to_the_first_revision_that_is_due_after_it(late: int) -> None:
    revision = revision_at(DEADLINE, DEADLINE + late)
    assert due(DEADLINE, revision) > DEADLINE + late
    assert revision == 0 or due(DEADLINE, revision - 1) <= DEADLINE + late


@THOROUGH
@given(st.integers(0, 2**45), st.sampled_from([MINUTE, HOUR]))
def test_every_time_lies_in_exactly_one_window(at: int, size: int) -> None:
    start = window_start(at, size)
    assert start % size == 0
    assert start <= at < start + size
