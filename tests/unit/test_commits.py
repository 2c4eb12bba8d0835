"""Commits of stage 1: what they make durable, what they are bounded by, and what is refused at a restore."""

import pytest

from consumer.aggregate.aggregator import UnbalancedError, UnknownEntryError
from consumer.storage import Log
from tests.unit.stage1 import (
    HOUR,
    MINUTE,
    SECOND,
    T0,
    Stage1,
    event,
    meter,
    rules,
    values,
)

SETTLE = 5 * SECOND
DEADLINE = T0 + 3 * MINUTE


def after(deadline: int) -> int:
    """The clock at which what was due at the deadline closes."""
    return deadline + SETTLE


def test_a_commit_closes_at_most_10_000_totals_and_the_rest_follows() -> None:
    """A backlog's many windows would make a transaction that the broker times out, for ever."""
    stage = Stage1(rules())
    for number in range(25_000):
        stage.write(event(str(number), subject=f"customer-{number:05}"), T0)
    stage.read()
    stage.commit()
    stage.aggregator.advance(after(DEADLINE))
    closed: list[int] = []
    while stage.aggregator.changed and len(closed) < 4:
        before = len(stage.totals)
        stage.commit()
        closed.append(len(stage.totals) - before)
        stage.crash()
    assert closed == [10_000, 10_000, 5_000]
    customers = [total.customer for total in stage.totals]
    assert customers == sorted(customers)
    assert len(set(customers)) == 25_000


def test_what_is_not_committed_is_read_again_and_counts_once() -> None:
    stage = Stage1(rules())
    stage.send(event("1", n=1), T0)
    stage.commit()
    stage.send(event("2", n=2), T0)
    stage.crash()
    assert stage.aggregator.offset == 1
    stage.read()
    assert values(stage.close_all()) == ["3"]


def test_offsets_of_a_log_need_not_follow_one_another() -> None:
    """Transactions leave markers and what was aborted between the records: counted through, all is read again."""
    stage = Stage1(rules())
    records = [(offset, (2, T0), b"k", None, event(str(offset))) for offset in (3, 7, 20)]
    assert stage.aggregator.step(records, T0) == 3
    assert stage.aggregator.commit().offset == 21


def test_a_commit_writes_the_books_of_those_meters_that_have_changed() -> None:
    """On hundreds of partitions with many meters the others would be most of what is written, all day long."""
    stage = Stage1(rules(meter("tokens"), meter("calls", event_types=("called",))))
    stage.send(event("1"), T0)
    assert {b"mtokens", b"mcalls"} <= stage.commit().puts.keys()
    stage.send(event("2"), T0)
    assert [key for key in stage.commit().puts if key[:1] == b"m"] == [b"mtokens"]
    stage.aggregator.advance(after(DEADLINE))
    assert [key for key in stage.commit().puts if key[:1] == b"m"] == [b"mtokens"]
    stage.crash()
    stage.send(event("3", type="called"), after(DEADLINE))
    stage.commit()
    stage.crash()
    stage.aggregator.check()


def test_records_that_were_read_before_are_refused() -> None:
    """Their ids may have been forgotten, and the offset would go back with them."""
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    with pytest.raises(ValueError, match="offset 0 was read before: the next one is 1"):
        stage.aggregator.step(stage.log, T0)
    stage.aggregator.reach(5)
    with pytest.raises(ValueError, match="offset 4 was read before: the next one is 5"):
        stage.aggregator.step([(4, (2, T0), b"k", None, event("2"))], T0)


def test_an_untouched_partition_has_nothing_to_commit() -> None:
    stage = Stage1(rules())
    changed = [stage.aggregator.changed]
    for act in (lambda: stage.send(None, T0), stage.commit, stage.crash):
        act()
        changed.append(stage.aggregator.changed)
    assert changed == [False, True, False, False]


def test_totals_are_keyed_by_customer_and_the_rest_by_partition() -> None:
    """So that one reader of the totals log has all of a customer's, and sends them one after the other."""
    stage = Stage1(rules())
    stage.send(event("1", subject="ü"), T0)
    stage.send(b"{", T0)
    stage.aggregator.advance(T0 + HOUR)
    appends = stage.commit().appends
    assert sorted((append.log, append.key) for append in appends) == [
        (Log.DEAD_LETTERS, b"0"),
        (Log.TOTALS, b"0"),
        (Log.TOTALS, "ü".encode()),
    ]


def test_only_what_changed_is_written() -> None:
    """Writing all open windows with every commit would cost more than counting."""
    stage = Stage1(rules())
    for number in range(50):
        stage.send(event(str(number), subject=f"customer-{number}"), T0)
    stage.commit()
    stage.send(event("again", subject="customer-7"), T0)
    puts = stage.commit().puts
    assert [key for key in puts if key[:1] in b"rb"] == [key for key in puts if key.endswith(b"customer-7")]


def test_what_is_open_is_told() -> None:
    stage = Stage1(rules())
    for number in range(6):
        stage.send(event(str(number), T0 + number % 2 * MINUTE, subject=f"customer-{number % 3}"), T0 + MINUTE)
    for _ in range(2):
        aggregator = stage.aggregator
        assert (aggregator.open_keys, aggregator.open_buckets, aggregator.remembered) == (6, 2, 6)
        assert aggregator.next_close == after(DEADLINE)
        assert not aggregator.closes_by(after(DEADLINE) - 1)
        assert aggregator.closes_by(after(DEADLINE))
        stage.commit()
        stage.crash()
    stage.close_all()
    assert (stage.aggregator.open_keys, stage.aggregator.open_buckets) == (0, 0)


# A state that is not whole


@pytest.mark.parametrize("kind", [b"b", b"r", b"m"])
def test_a_state_with_an_entry_missing_is_refused(kind: bytes) -> None:
    """Going on without it would bill less than was used, and nobody would know."""
    stage = Stage1(rules())
    stage.send(event("1", n=5), T0)
    stage.commit()
    stage.entries = {key: value for key, value in stage.entries.items() if key[:1] != kind}
    with pytest.raises(UnbalancedError, match=r"partition 0.*tokens"):
        stage.crash()


def test_a_state_with_wrong_books_is_refused() -> None:
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    stage.commit()
    stage.entries[b"p"] = stage.entries[b"p"].replace(b'"consumed":1', b'"consumed":2')
    with pytest.raises(UnbalancedError, match=r"records were read, but .* 0 dead letters .* `tallyman reset`"):
        stage.crash()


def test_a_state_of_something_newer_is_refused() -> None:
    stage = Stage1(rules())
    stage.entries[b"zebra"] = b""
    with pytest.raises(UnknownEntryError, match="unknown kind"):
        stage.crash()


def test_books_hold_values_of_any_size() -> None:
    """Sums are in units of 10⁻¹² and outgrow 64 bits after eighteen million tokens."""
    stage = Stage1(rules())
    for number in range(50):
        stage.send(event(str(number), n=999_999_999_999_999), T0)
    stage.commit()
    stage.crash()
    assert values(stage.close_all()) == ["49999999999999950"]
    stage.crash()
    assert stage.billed == "49999999999999950"
