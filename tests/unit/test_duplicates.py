"""Duplicates: told by arithmetic on arrivals, the same for every reader of the log."""

from array import array

import pytest

from consumer.aggregate.aggregator import Rules
from consumer.aggregate.duplicates import IDS_PER_CHUNK, INTERVALS, Chunk, Name, Remembered
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, T0, Stage1, event, meter, rules

FUTURE = 5 * MINUTE
WIDTH = (DAY + FUTURE) // INTERVALS
"""Of an interval: 24 of them last for 24 hours, and for the five minutes that an event may be dated ahead."""

EDGE = (T0 // WIDTH + 1) * WIDTH
"""The start of an interval."""

ALWAYS = meter(accept_late=34 * DAY)


def counted(*arrivals: int, deduplicate_for: int = DAY) -> int:
    """How often one event counts that arrives at these times."""
    stage = Stage1(rules(ALWAYS, deduplicate_for=deduplicate_for))
    for arrival in arrivals:
        stage.send(event("1", T0), arrival)
    assert stage.aggregator.book.duplicate == len(arrivals) - stage.aggregator.book.counted
    return stage.aggregator.book.counted


def test_an_event_that_is_sent_again_counts_once() -> None:
    """Producers retry; a retry that counted would be billed."""
    assert counted(T0, T0, T0 + SECOND, T0 + HOUR) == 1


@pytest.mark.parametrize("first", [0, 1, WIDTH // 2, WIDTH - 1])
@pytest.mark.parametrize("again", [0, 1, WIDTH // 2, WIDTH - 1])
def test_an_interval_at_most_24_away_is_remembered_and_one_25_away_is_not(first: int, again: int) -> None:
    """By the interval and nothing else, however full the memory is: another reader must find the same."""
    assert counted(EDGE + first, EDGE + 24 * WIDTH + again) == 1
    assert counted(EDGE + first, EDGE + 25 * WIDTH + again) == 2


@pytest.mark.parametrize("deduplicate_for", [24, 90 * SECOND, HOUR, DAY, 7 * DAY])
@pytest.mark.parametrize("since", [0, 1, 999, 777_777, WIDTH - 1])
def test_whatever_repeats_within_deduplicate_for_is_a_duplicate(deduplicate_for: int, since: int) -> None:
    assert counted(EDGE + since, EDGE + since + deduplicate_for, deduplicate_for=deduplicate_for) == 1


@pytest.mark.parametrize("span", [24, 25, 47, 48, 999, 300_001, DAY + FUTURE])
def test_what_is_remembered_for_a_time_is_remembered_to_its_end(span: int) -> None:
    """However the time divides into intervals, and wherever in its interval the first arrival lies."""
    for arrival in range(T0, T0 + 3 * (span // 24), max(1, span // 240)):
        remembered = Remembered(span)
        remembered.enter(arrival)
        remembered.remember(7)
        remembered.enter(arrival + span)
        assert remembered.has(7)


@pytest.mark.parametrize("ahead", [0, MINUTE, FUTURE])
def test_whatever_is_not_late_is_still_remembered(ahead: int) -> None:
    """An event may be dated five minutes ahead of its arrival, so that it is not late for 24 hours and five minutes.

    If it were remembered for 24 hours alone, a topic produced again a day later would bill the last of it twice.
    """
    for first in (EDGE, EDGE + WIDTH - MINUTE, EDGE + WIDTH - 1):
        stage = Stage1(rules())
        for arrival in (first, first + ahead + DAY):
            stage.send(event("1", first + ahead), arrival)
        assert stage.aggregator.book.counted == 1
        stage.send(event("1", first + ahead), first + ahead + DAY + 1)
        assert stage.aggregator.book.counted == 1


def test_a_duplicate_renews_its_id() -> None:
    """A producer that repeats an event for days would otherwise be billed once a day."""
    hours = range(0, 200, 20)
    assert counted(*(T0 + hour * HOUR for hour in hours)) == 1


def test_a_storm_of_duplicates_takes_no_room() -> None:
    """A producer that repeats one event for ever must not fill the memory."""
    stage = Stage1(rules())
    for number in range(100):
        stage.send(event("1"), T0 + number)
    stage.commit()
    assert [len(value) for key, value in stage.entries.items() if key[:1] == b"i"] == [8]


def test_a_duplicate_renews_its_id_across_a_crash() -> None:
    stage = Stage1(rules(ALWAYS))
    for hour in range(0, 200, 20):
        stage.send(event("1"), T0 + hour * HOUR)
        stage.commit()
        stage.crash()
    assert stage.aggregator.book.counted == 1


def test_source_and_id_are_told_apart() -> None:
    """ "ab" and "c" are not "a" and "bc": taken together they would swallow each other's usage."""
    stage = Stage1(rules())
    for source, id_ in [("ab", "c"), ("a", "bc"), ("abc", "1"), ("ab", "c1"), ("1:a", "b"), ("1", ":ab")]:
        stage.send(event(id_, source=source), T0)
    assert stage.aggregator.book.counted == 6


def test_the_same_id_from_another_source_is_another_event() -> None:
    stage = Stage1(rules())
    for source in ("/one", "/two"):
        stage.send(event("1", source=source), T0)
    assert stage.billed == "2"


def test_a_corrected_dead_letter_counts() -> None:
    """If refused ids were remembered, a letter that was mended and sent again would be swallowed as a duplicate."""
    stage = Stage1(rules())
    stage.send(event("1", n="many"), T0)
    stage.send(event("1", "yesterday"), T0)
    stage.send(event("1", subject=...), T0)
    assert stage.dead == {"value_not_a_number": 1, "time_invalid": 1, "customer_missing": 1}
    stage.send(event("1", n=5), T0 + HOUR)
    assert stage.billed == "5"


def test_ignored_events_are_not_remembered() -> None:
    """An event that no meter counts yet may be sent again when one does."""
    stage = Stage1(rules())
    stage.send(event("1", type="other"), T0)
    stage.configure(rules(meter(event_types=("used", "other"))))
    stage.send(event("1", type="other"), T0)
    assert stage.billed == "1"


def test_a_crash_forgets_no_committed_id_and_remembers_no_other() -> None:
    """Lost ids would bill retries twice; ids of a lost batch would swallow the events when they are read again."""
    stage = Stage1(rules())
    stage.send(event("1"), T0)
    stage.commit()
    stage.send(event("2"), T0)
    stage.crash()
    stage.read()
    stage.send(event("1"), T0 + SECOND)
    stage.send(event("2"), T0 + SECOND)
    assert (stage.aggregator.book.counted, stage.aggregator.book.duplicate) == (2, 2)


def test_what_has_fallen_behind_is_forgotten_whole() -> None:
    """Memory and state would otherwise grow for ever."""
    stage = Stage1(rules(ALWAYS))
    for number in range(1_000):
        stage.send(event(str(number)), T0 + number * 6 * MINUTE)
        if number % 50 == 0:
            stage.commit()
            stage.crash()
    stage.close_all()
    assert stage.aggregator.remembered <= 26 * 11
    assert (
        sum(len(value) // 8 for key, value in stage.entries.items() if key[:1] == b"i") == stage.aggregator.remembered
    )
    stage.send(None, T0 + 1_000 * 6 * MINUTE + 26 * HOUR)
    stage.commit()
    assert stage.aggregator.remembered == 0
    assert {key[:1] for key in stage.entries} == {b"p", b"m"}


def test_many_ids_are_kept_in_chunks_that_a_message_can_hold() -> None:
    """A commit that the broker refuses for its size would stop the partition for good."""
    remembered = Remembered(DAY)
    remembered.enter(T0)
    stored: dict[Name, bytes] = {}
    for first in range(0, 3 * IDS_PER_CHUNK, IDS_PER_CHUNK // 3):
        remembered.fresh.extend(range(first, first + IDS_PER_CHUNK // 3))
        chunks, dropped = remembered.changes()
        stored |= dict(chunks)
        assert not dropped
    assert all(len(digests) <= 64_000 for digests in stored.values())
    again = Remembered(DAY, (Chunk(*each) for each in stored.items()))
    assert again.seen == dict.fromkeys(range(first + IDS_PER_CHUNK // 3), T0 // (DAY // 24))
    again.enter(T0 + 25 * HOUR)
    assert not again.seen
    assert set(again.changes()[1]) == stored.keys()


def test_only_chunks_that_grew_are_written_again() -> None:
    """Writing all ids with every commit would cost more than counting."""
    remembered = Remembered(DAY)
    remembered.enter(T0)
    remembered.fresh.extend(range(2 * IDS_PER_CHUNK + 10))
    chunks, _ = remembered.changes()
    assert [chunk.name.number for chunk in chunks] == [0, 1, 2]
    remembered.fresh.append(2**64 - 1)
    (chunk,), _ = remembered.changes()
    assert chunk.name.number == 2
    assert array("Q", chunk.digests)[-1] == 2**64 - 1
    assert list(remembered.changes()[0]) == []


@pytest.mark.parametrize("changed", [HOUR * 25, 12 * HOUR, 48 * HOUR, 7 * DAY])
def test_ids_are_still_known_after_deduplicate_for_has_changed(changed: int) -> None:
    """Intervals of another width, taken for today's, would forget all ids at once, or never forget any."""
    stage = Stage1(rules(ALWAYS))
    stage.send(event("1"), T0)
    stage.configure(rules(ALWAYS, deduplicate_for=changed))
    stage.send(event("2"), T0 + HOUR)
    stage.send(event("1"), T0 + 2 * HOUR)
    stage.configure(rules(ALWAYS))
    stage.send(event("1"), T0 + 3 * HOUR)
    stage.send(event("2"), T0 + 3 * HOUR)
    assert (stage.aggregator.book.counted, stage.aggregator.book.duplicate) == (2, 3)
    stage.send(None, T0 + 9 * DAY)
    stage.drain()
    assert stage.aggregator.remembered == 0
    assert not [key for key in stage.entries if key[:1] == b"i"]
    stage.send(event("1"), T0 + 9 * DAY)
    assert stage.aggregator.book.counted == 3


def test_an_id_that_was_renewed_after_the_change_is_remembered_from_then_on() -> None:
    stage = Stage1(rules(ALWAYS))
    stage.send(event("1"), T0)
    stage.configure(rules(ALWAYS, deduplicate_for=12 * HOUR))
    for hours in (10, 20, 30, 40):
        stage.send(event("1"), T0 + hours * HOUR)
        stage.commit()
        stage.crash()
    assert stage.aggregator.book.counted == 1


def test_with_a_shorter_memory_ids_are_remembered_as_long_as_it_says() -> None:
    """Nobody knows when within its interval, which was longer, an id arrived: it may have been at its very end."""
    longer = (48 * HOUR + FUTURE) // INTERVALS
    arrival = (T0 // longer + 1) * longer - 1
    stage = Stage1(rules(ALWAYS, deduplicate_for=48 * HOUR))
    stage.send(event("1"), arrival)
    stage.configure(rules(ALWAYS, deduplicate_for=12 * HOUR))
    stage.send(event("1"), arrival + 12 * HOUR)
    assert stage.aggregator.book.duplicate == 1
    stage.send(event("1"), arrival + 25 * HOUR)
    assert stage.aggregator.book.counted == 2


def test_what_comes_right_after_a_restart_is_remembered_from_then_on() -> None:
    """Taken into an interval of long ago, it would be forgotten with that one: at the next arrival."""
    stage = Stage1(rules(ALWAYS))
    stage.send(event("1"), T0)
    stage.configure(rules(ALWAYS, deduplicate_for=12 * HOUR))
    stage.send(event("2"), T0)
    stage.send(event("3"), T0 + HOUR)
    stage.send(event("2"), T0 + 2 * HOUR)
    assert (stage.aggregator.book.counted, stage.aggregator.book.duplicate) == (3, 1)


@pytest.mark.parametrize("crashes", [False, True])
def test_a_crash_does_not_change_for_how_long_an_id_is_remembered_after_a_shorter_memory(crashes: bool) -> None:
    """Noted in a longer interval it may have come at that one's end, later than now: to renew it takes nothing back."""
    longer = (48 * HOUR + FUTURE) // INTERVALS
    first = (T0 // longer + 1) * longer
    stage = Stage1(rules(ALWAYS, deduplicate_for=48 * HOUR))
    stage.send(event("1"), first)
    stage.configure(rules(ALWAYS, deduplicate_for=HOUR))
    stage.send(event("1"), first + MINUTE)
    stage.commit()
    if crashes:
        stage.crash()
    stage.send(event("1"), first + 2 * HOUR)
    assert (stage.aggregator.book.counted, stage.aggregator.book.duplicate) == (1, 2)


def test_an_id_is_remembered_from_its_last_arrival_on_wherever_that_was_noted() -> None:
    """The setting was changed and changed back: what was noted in between is newer than what was noted before."""
    stage = Stage1(rules(ALWAYS))
    stage.send(event("1"), T0)
    stage.configure(rules(ALWAYS, deduplicate_for=12 * HOUR))
    stage.send(event("1"), T0 + 10 * HOUR)
    stage.configure(rules(ALWAYS))
    stage.send(event("1"), T0 + 30 * HOUR)
    assert stage.aggregator.book.counted == 1


@pytest.mark.parametrize("steps", [(HOUR, DAY), (DAY, HOUR, DAY), (HOUR, 2 * HOUR, DAY), (HOUR, DAY, HOUR, DAY)])
def test_a_longer_memory_does_not_count_what_the_shorter_one_has_forgotten(steps: tuple[int, ...]) -> None:
    """`accept_late` was raised with it, so that an event of this morning would be in time, and known to nobody."""

    def of(deduplicate_for: int) -> Rules:
        return rules(meter(accept_late=deduplicate_for), deduplicate_for=deduplicate_for)

    stage = Stage1(of(steps[0]))
    stage.send(event("old", T0), T0)
    for number, deduplicate_for in enumerate(steps):
        stage.configure(of(deduplicate_for))
        arrival = T0 + (5 + number) * HOUR
        stage.send(event(f"new-{number}", arrival), arrival)
    last = T0 + (6 + len(steps)) * HOUR
    stage.send(event("old", T0), last)
    assert stage.dead == {"late": 1}, "it is kept, for somebody who knows better"
    stage.send(event("new-0", T0 + 5 * HOUR), last)
    stage.send(event(f"new-{len(steps) - 1}", arrival), last)
    stage.send(event("first", arrival), last)
    assert stage.aggregator.book.counted == len(steps) + 2, "what has come since, or would be remembered, is in time"
    stage.commit()
    stage.crash()
    stage.send(event("old", T0), last + HOUR)
    assert stage.aggregator.book.counted == len(steps) + 2


def test_what_the_shortest_memory_has_forgotten_stays_forgotten_when_it_is_made_longer_twice() -> None:
    """The second time tells of what was forgotten since the first one only."""

    def of(deduplicate_for: int) -> Rules:
        return rules(meter(accept_late=deduplicate_for), deduplicate_for=deduplicate_for)

    stage = Stage1(of(HOUR))
    stage.send(event("old", T0), T0)
    stage.send(event("new", T0 + 2 * HOUR), T0 + 2 * HOUR)
    for deduplicate_for in (3 * HOUR, DAY):
        stage.configure(of(deduplicate_for))
        stage.send(event(f"{deduplicate_for}", T0 + 2 * HOUR), T0 + 2 * HOUR)
    stage.send(event("old", T0), T0 + 2 * HOUR)
    assert stage.dead == {"late": 1}


def test_what_a_shorter_memory_has_forgotten_is_not_counted_though_its_window_is_open() -> None:
    """Windows may stay open for longer than ids were remembered; what is in time for them may have been counted."""
    stage = Stage1(rules(meter(lateness=2 * HOUR), deduplicate_for=10 * MINUTE))
    stage.send(event("old", T0), T0)
    now = T0 + HOUR + 30 * SECOND
    stage.send(event("new", now), now)
    stage.configure(rules(meter(lateness=2 * HOUR)))
    known_from = now - 10 * MINUTE
    stage.send(event("other", known_from), now)
    stage.send(event("another", known_from - 1), now)
    stage.send(event("old", T0), now)
    assert (stage.dead, stage.aggregator.book.counted) == ({"late": 2}, 3)


def test_who_accepts_what_nobody_remembers_goes_on_doing_so() -> None:
    """With an `accept_late` beyond `deduplicate_for` it was never promised that old events count once."""
    stage = Stage1(rules(ALWAYS, deduplicate_for=HOUR))
    stage.send(event("1", T0 + 5 * HOUR), T0 + 5 * HOUR)
    stage.configure(rules(ALWAYS))
    stage.send(event("2", T0), T0 + 6 * HOUR)
    assert stage.aggregator.book.counted == 2
