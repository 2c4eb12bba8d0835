"""Totals are a function of the log and its recorded advances, however the log is cut and whatever crashes."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from consumer.aggregate.aggregator import Rules
from consumer.totals import SCALE
from tests.unit import oracle
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, T0, Stage1, event, meter, rules
from tests.unit.strategies import ACTS, BILL_FROM, LOGS, METERS, Act, Written, logs, real, stage_of

SETTLES = st.sampled_from([0, 5 * SECOND, 5 * MINUTE])
MEMORIES = st.sampled_from([90 * SECOND, HOUR, DAY])


def live(stage: Stage1, acts: Sequence[Act]) -> None:
    """Read the log as a service does to which all this happens."""
    for act in acts:
        match act.kind:
            case "read":
                stage.read(act.amount)
            case "advance":
                stage.aggregator.advance(stage.aggregator.book.clock + act.amount)
            case "commit":
                stage.commit()
            case "crash":
                stage.crash()


def live_on(stage: Stage1, acts: Sequence[Act]) -> None:
    """And read what is left."""
    live(stage, acts)
    stage.read()
    stage.drain()


def replay(stage: Stage1, advances: Sequence[tuple[int, int]]) -> None:
    """Read the log in one go, with no commit and no crash, stopping only for the advances that were recorded."""
    for offset, clock in advances:
        while stage.aggregator.offset < offset:
            assert stage.read(offset - stage.aggregator.offset)
        stage.aggregator.advance(clock)
    stage.read()
    stage.drain()


def recorded(stage: Stage1) -> list[tuple[int, int]]:
    return [(each.offset, each.clock) for each in stage.advances]


def only_totals(stage: Stage1) -> list[bytes]:
    return [record for record in stage.appended if b'"kind":"total"' in record]


@LOGS
@given(logs(), ACTS, SETTLES, MEMORIES)
def test_a_replay_yields_the_same_bytes_in_the_same_order(
    log: list[Written], acts: list[Act], settle: int, deduplicate_for: int
) -> None:
    """A crash between sending and remembering is repaired by sending again: that works if it is the same again."""
    lived = stage_of(log, settle=settle, deduplicate_for=deduplicate_for)
    live_on(lived, acts)
    lived.close_all()
    again = stage_of(log, settle=settle, deduplicate_for=deduplicate_for)
    replay(again, recorded(lived))
    assert only_totals(again) == only_totals(lived)
    assert recorded(again) == recorded(lived)
    assert again.letters == lived.letters
    assert again.entries == lived.entries
    assert again.aggregator.book == lived.aggregator.book
    assert again.aggregator.meter_books == lived.aggregator.meter_books


@LOGS
@given(logs(), ACTS, SETTLES, MEMORIES)
def test_totals_and_books_are_what_an_independent_computation_says(
    log: list[Written], acts: list[Act], settle: int, deduplicate_for: int
) -> None:
    stage = stage_of(log, settle=settle, deduplicate_for=deduplicate_for)
    live_on(stage, acts)
    found = stage.close_all()
    assert stage.now is not None
    expected = oracle.expected(
        [each.said for each in log],
        METERS,
        recorded(stage),
        now=stage.now,
        settle=settle,
        deduplicate_for=deduplicate_for,
        bill_from=BILL_FROM,
    )
    assert {
        (total.meter, total.customer, total.window_start * 1000, total.revision): (
            Fraction(total.value),
            total.events,
            total.timestamp,
            total.due,
            total.first_offset,
            total.last_offset,
        )
        for total in found
    } == {
        key: (each.value, len(each.times), min(each.times) // 1000, each.due, min(each.offsets), max(each.offsets))
        for key, each in expected.sums.items()
    }
    assert len({total.identifier for total in found}) == len(found) == len(expected.sums)
    book = stage.aggregator.book
    assert (book.consumed, book.counted, book.duplicate) == (len(log), expected.counted, expected.duplicate)
    assert (book.dead, book.ignored, book.unkeyed) == (expected.dead, expected.ignored, expected.unkeyed)
    assert Counter(letter.reason for letter in stage.letters) == expected.dead
    for name, each in stage.aggregator.meter_books.items():
        assert each.rounded == expected.rounded[name]
        assert each.late == {revision: n for (of, revision), n in expected.late.items() if of == name and n}


@LOGS
@given(logs(), ACTS)
def test_when_all_is_closed_nothing_is_left_but_books_and_remembered_ids(log: list[Written], acts: list[Act]) -> None:
    """What stays for ever grows for ever."""
    stage = stage_of(log)
    live_on(stage, acts)
    stage.close_all()
    assert {key[:1] for key in stage.entries} <= {b"p", b"m", b"i"}
    assert (stage.aggregator.open_keys, stage.aggregator.open_buckets) == (0, 0)
    for book in stage.aggregator.meter_books.values():
        assert (book.events, book.value) == (book.total_events, book.total_value)
    assert sum(Fraction(total.value) for total in stage.totals) == Fraction(
        sum(book.value for book in stage.aggregator.meter_books.values()), SCALE
    )
    stage.now = None
    stage.send(None, stage.aggregator.book.arrival + 26 * HOUR)
    stage.commit()
    assert {key[:1] for key in stage.entries} <= {b"p", b"m"}


@LOGS
@given(logs(), ACTS)
def test_a_restored_processor_is_the_one_that_was_lost(log: list[Written], acts: list[Act]) -> None:
    stage = stage_of(log)
    live_on(stage, acts)
    lost = stage.aggregator
    stage.crash()
    found = stage.aggregator
    assert (found.offset, found.book, found.meter_books) == (lost.offset, lost.book, lost.meter_books)
    assert (found.open_keys, found.open_buckets, found.next_close) == (
        lost.open_keys,
        lost.open_buckets,
        lost.next_close,
    )
    assert found.remembered == lost.remembered
    assert not found.changed


def _variants() -> list[Rules]:
    usual = [real(each) for each in METERS]
    return [
        rules(*usual, bill_from=BILL_FROM),
        rules(*usual, bill_from=BILL_FROM, settle=0),
        rules(*usual, bill_from=BILL_FROM, settle=HOUR),
        rules(*usual, bill_from=BILL_FROM, deduplicate_for=HOUR),
        rules(*usual[:2], bill_from=BILL_FROM),
        rules(*(meter(each.name, event_types=each.event_types, lateness=HOUR) for each in usual), bill_from=BILL_FROM),
    ]


VARIANTS = _variants()


@LOGS
@given(
    logs(),
    st.lists(st.tuples(st.sampled_from(VARIANTS), ACTS), min_size=2, max_size=5),
)
def test_one_identifier_never_has_two_values_across_changes_of_the_configuration(
    log: list[Written], lives: list[tuple[Rules, list[Act]]]
) -> None:
    """Stripe takes the first value of an identifier and never the second: that usage would be lost."""
    stage = stage_of(log)
    for variant, acts in lives:
        stage.crash(variant)
        live(stage, acts)
    stage.read()
    found = stage.close_all()
    assert len({total.identifier for total in found}) == len(found)
    assert sum(total.events for total in found) == sum(book.events for book in stage.aggregator.meter_books.values())
    assert stage.aggregator.book.consumed == len(log)
    assert {key[:1] for key in stage.entries} <= {b"p", b"m", b"i"}


@LOGS
@given(
    logs(),
    st.lists(st.tuples(st.sampled_from(VARIANTS), ACTS), min_size=2, max_size=4),
)
def test_a_restart_changes_nothing_whatever_was_configured_before(
    log: list[Written], lives: list[tuple[Rules, list[Act]]]
) -> None:
    """Who was restarted and who went on would bill differently, and no replay would tell which of them was right."""

    def lived(*, restarts: bool) -> Stage1:
        stage = stage_of(log)
        for variant, acts in lives:
            stage.commit()
            stage.crash(variant)
            for act in acts:
                if act.kind != "crash":
                    live(stage, [act])
                    continue
                stage.commit()
                if restarts:
                    stage.crash()
        stage.read()
        stage.close_all()
        return stage

    restarted, went_on = lived(restarts=True), lived(restarts=False)
    assert restarted.appended == went_on.appended
    assert restarted.letters == went_on.letters
    assert restarted.entries == went_on.entries


def test_the_strategies_reach_every_outcome() -> None:
    """A search that never meets a late event, a repetition or a refusal proves nothing about them."""
    met: Counter[str] = Counter()

    @LOGS
    @given(logs(), ACTS)
    def search(log: list[Written], acts: list[Act]) -> None:
        stage = stage_of(log)
        live_on(stage, acts)
        found = stage.close_all()
        book = stage.aggregator.book
        met.update({"duplicate": book.duplicate, "unkeyed": book.unkeyed} | book.dead | book.ignored)
        met.update({f"revision {min(total.revision, 6)}": 1 for total in found})
        met.update(f"rounded {name}" for name, each in stage.aggregator.meter_books.items() if each.rounded)

    search()
    reasons = [
        "late", "future", "arrival_in_future", "time_invalid", "not_json", "customer_missing", "customer_too_long",
        "value_missing", "value_not_a_number", "value_out_of_range", "value_negative",
        "duplicate", "unkeyed", "tombstone", "unmatched", "before_bill_from",
        "rounded tokens", "rounded filtered", "rounded credits", *(f"revision {number}" for number in range(7)),
    ]  # fmt: skip
    assert {reason: met[reason] for reason in reasons if met[reason] < 5} == {}


def test_a_long_run_leaves_little() -> None:
    """A month of usage on a partition that restarts every day."""
    stage = Stage1(rules())
    for hour in range(30 * 24):
        at = T0 + hour * HOUR
        for number in range(3):
            stage.send(event(f"{hour}-{number}", at - number * 40 * MINUTE), at)
        stage.commit()
        if hour % 24 == 0:
            stage.crash()
    stage.close_all()
    assert len(stage.entries) <= 2 + 26
    edition = meter().edition(settle=stage.rules.settle, deduplicate_for=stage.rules.deduplicate_for)
    assert not stage.aggregator._buckets.on_time(edition)
    assert sum(total.events for total in stage.totals) == 30 * 24 * 3
