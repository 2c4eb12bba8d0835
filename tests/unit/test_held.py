"""The oldest of what waits, in each group: always right, and no larger than what waits."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.deliver.held import Oldest

MANY = 20_000


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab")), max_size=200))
def test_the_oldest_of_each_group_is_known_while_totals_come_and_go(moves: list[tuple[int, str]]) -> None:
    """Each move is of a total: it comes, or goes if it is there. Its timestamp is always the same."""
    oldest: Oldest[str] = Oldest()
    there: dict[int, tuple[str, int]] = {}
    for number, group in moves:
        timestamp = number // 2
        if number in there:
            oldest.remove(str(number))
            del there[number]
        else:
            oldest.add(str(number), group, timestamp)
            there[number] = group, timestamp
        groups = {each for each, _ in there.values()}
        assert oldest.by_group() == {name: min(at for each, at in there.values() if each == name) for name in groups}


@pytest.mark.parametrize("others", [MANY, 1])
def test_who_comes_and_goes_behind_somebody_who_stays_leaves_nothing_behind(others: int) -> None:
    """One customer's totals are set aside for a day; another one's again and again for a moment, or one of them is."""
    oldest: Oldest[str] = Oldest()
    oldest.add("stays", "tokens", 0)
    tracemalloc.start()
    try:
        for number in range(MANY):
            oldest.add(f"goes-{number % others}", "tokens", 1 + number % others)
            oldest.remove(f"goes-{number % others}")
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert oldest.by_group() == {"tokens": 0}
    assert left < MANY, "bytes"
