"""To start over: what is given up, from when events may be billed again, and the new beginning."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from consumer import totals
from consumer.aggregate.aggregator import Aggregator, UnbalancedError, UnknownEntryError
from consumer.aggregate.meters import WINDOW_MS
from consumer.config import Config, SqliteStorage
from consumer.deliver.doubt import own
from consumer.deliver.entries import EntryError, Outcome, State, decode_outcome, is_total, unpack
from consumer.deliver.ledger import Column
from consumer.runtime import embedded, processors, start
from consumer.runtime.archive import client_of
from consumer.runtime.clocks import Clock
from consumer.runtime.source import Source, Topic
from consumer.storage import Archive, Facts, Log, Stage, StorageError, Unreachable
from consumer.storage.kafka_archive import KafkaArchive
from consumer.storage.kafka_reading import ends_of
from consumer.storage.kafka_reset import Standing, end_leftovers, standing, start_over, vacant
from consumer.storage.kafka_topics import Topics, ensure, level, present
from consumer.storage.sqlite import SqliteStore
from consumer.storage.sqlite_file import locked
from consumer.totals import Total, scaled

UNKNOWN: Final = "--newest-total-unknown"
"""The option by which somebody answers for what cannot be seen here."""


class ResetRefused(Exception):
    """Starting over so would bill twice, or there is nothing to start over; the message says what to do."""


@dataclass(slots=True)
class GivenUp:
    """What one meter loses by starting over."""

    pending: Column = field(default_factory=Column)
    """Totals that have not been delivered."""
    parked: Column = field(default_factory=Column)
    open: Column = field(default_factory=Column)
    """In open windows; these are not totals yet, and counted in events."""


@dataclass(frozen=True, slots=True)
class Old:
    """The state as it is before a reset."""

    facts: Facts
    newest: int | None
    """The end of the newest window that has a total, in milliseconds, shadowed ones left out: nobody has been billed
    for those here. None where there is none."""
    meters: dict[str, GivenUp]
    shadowed: int | None = None
    """The end of the newest window with a total that was shadowed, in milliseconds."""
    longest: int = 0
    """The longest window with such a total, in milliseconds."""
    standing: Standing | None = None
    """In Kafka: nothing else is given up."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A state that is not there, or cannot be read."""

    why: str
    traces: bool = False
    """Whether something else shows that there was one."""
    standing: Standing | None = None


_Damages: Final = (UnbalancedError, UnknownEntryError, EntryError, StorageError)


def look(config: Config, clock: Clock) -> Old | Lost:
    """What the state holds. Raises ``StorageError`` where a service uses it."""
    if isinstance(config.storage, SqliteStorage):
        return _look_at_file(config, config.storage.path, clock)
    return _look_at_topics(config, clock)


def _look_at_file(config: Config, path: Path, clock: Clock) -> Old | Lost:
    if not path.exists():
        return Lost(f"{path} is not there")
    with locked(path):
        try:
            with SqliteStore.open(path, now=clock.now, create=False, lock=False) as store:
                facts = store.facts()
                return _old(config, store, facts) if facts else Lost(f"{path} holds no state")
        except _Damages as damage:
            return Lost(f"{path} cannot be read ({damage})")


def _look_at_topics(config: Config, clock: Clock) -> Old | Lost:
    client, topics = client_of(config), Topics.of(config.pipeline)
    vacant(client, topics)
    end_leftovers(client, topics)
    found = present(client, topics)
    here = standing(client, topics, found)
    logs = [topic for topic in (topics.totals, topics.outcomes, topics.dead_letters) if topic in found]
    traces = any(any(ends_of(client, topic, range(found[topic])).values()) for topic in logs)
    traces = traces or any(here.positions.values())
    if missing := [topic for topic in topics.all if topic not in found]:
        return Lost(f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not there", traces, here)
    try:
        with KafkaArchive.open(client, config.pipeline, now=clock.now) as archive:
            facts = archive.facts()
            if facts is None:
                return Lost(f"{topics.aggregate_state} holds no state", traces, here)
            return _old(config, archive, facts, here)
    except Unreachable:
        raise
    except _Damages as damage:
        return Lost(
            f"the state in {topics.aggregate_state} and {topics.deliver_state} cannot be read ({damage})", traces, here
        )


def _old(config: Config, store: Archive, facts: Facts, here: Standing | None = None) -> Old:
    meters: dict[str, GivenUp] = {}
    clock = 0
    for aggregator in _aggregators(config, store, facts):
        clock = max(clock, aggregator.book.clock)
        for name, book in aggregator.meter_books.items():
            events, value = book.events - book.total_events, book.value - book.total_value
            if events:
                column = meters.setdefault(name, GivenUp()).open
                column.events += events
                column.value += value
    ended, shadowed, longest = _finished(store)
    ends = [ended, *(_oldest_kept(store, log, clock) for log in (Log.TOTALS, Log.OUTCOMES))]
    shadow = config.stripe.mode == "shadow"
    unread, tried = _in_hand(store, meters, shadow=shadow)
    ends += tried
    for each in store.logged(Log.TOTALS, unread):
        total = totals.decode(each.value)
        if isinstance(total, Total):
            meters.setdefault(total.meter, GivenUp()).pending.add(total.events, scaled(total.value))
            if not shadow:
                ends.append(_end(total))
    return Old(facts, max(ends) or None, meters, shadowed, longest, here)


def _end(of: Total | Outcome) -> int:
    """Of its window, in milliseconds."""
    return of.window_start * 1000 + WINDOW_MS[of.window]


def _finished(store: Archive) -> tuple[int, int | None, int]:
    """The newest end of a window of what is finished, and of what was shadowed, and the longest window of that."""
    newest, shadowed, longest = 0, None, 0
    for each in store.logged(Log.OUTCOMES):
        outcome = decode_outcome(each.value)
        if outcome.how == "shadowed":
            shadowed = max(shadowed or 0, _end(outcome))
            longest = max(longest, WINDOW_MS[outcome.window])
        else:
            newest = max(newest, _end(outcome))
    return newest, shadowed, longest


def _oldest_kept(store: Archive, log: Log, clock: int) -> int:
    """No window of a total that is not kept any more in this log ended after this."""
    newest, ends = 0, store.ends(log)
    for partition in store.shortened(log):
        first = next(store.logged(log, {}, {partition: ends[partition]}), None)
        newest = max(newest, min(first.appended_at if first else clock, clock))
    return newest


def _in_hand(store: Archive, meters: dict[str, GivenUp], *, shadow: bool) -> tuple[dict[int, int], list[int]]:
    """Count what stage 2 has in hand.

    Returns from where on each partition of the totals log is unread, and when the windows end of what it has in hand:
    in shadow of what has been tried before, for the rest would have been shadowed.
    """
    unread: dict[int, int] = {}
    ends: list[int] = []
    for partition, end in store.ends(Log.TOTALS).items():
        restored = store.restore(Stage.DELIVER, partition)
        unread[partition] = restored.offset if restored else 0
        if unread[partition] > end:
            raise StorageError(
                f"totals were lost: partition {partition} was read up to {unread[partition]}, and ends at {end}"
            )
        for key, packed in restored.entries if restored else ():
            if is_total(key):
                entry = unpack(packed)
                of = meters.setdefault(entry.total.meter, GivenUp())
                column = of.parked if entry.state is State.PARKED else of.pending
                column.add(entry.total.events, scaled(entry.total.value))
                if own(entry) or not shadow:
                    ends.append(_end(entry.total))
    return unread, ends


def _aggregators(config: Config, store: Archive, facts: Facts) -> Iterator[Aggregator]:
    """Stage 1 as it was left, one partition after the other."""
    for partition in range(facts.partitions):
        restored = store.restore(Stage.AGGREGATE, partition)
        if restored is None:
            raise StorageError(f"there is no state of partition {partition}")
        yield processors.restored(config, facts, partition, restored)


def judge(old: Old | Lost, bill_from: int, now: int, *, read_before: bool, newest_unknown: bool) -> None:
    """Raise ``ResetRefused`` where billing from this time on could bill twice, or Stripe would refuse it.

    ``read_before``: whether the consumer group has committed offsets.
    """
    oldest = now - int(start.LONGEST_BACK.total_seconds() * 1000)
    if bill_from < oldest:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is more than {start.LONGEST_BACK.days} days back: Stripe refuses "
            f"older usage. The earliest time possible is {start.shown(oldest)}."
        )
    if isinstance(old, Lost):
        if not (read_before or old.traces):
            raise ResetRefused(
                f"{old.why}, and this pipeline has not run before: there is nothing to start over. Set bill_from: "
                f"{start.shown(bill_from)} in the configuration and start with `tallyman run`."
            )
        if not newest_unknown:
            raise ResetRefused(
                f"{old.why}, so nobody knows here up to when usage has been billed. Look at Stripe for the newest "
                f"meter event of this pipeline, choose --bill-from after the end of its window, and add {UNKNOWN}: "
                "whatever was billed after that time would be billed twice."
            )
        return
    if old.newest is not None and bill_from < old.newest:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is before the end of the newest window that has a total: what lies "
            f"between would be billed twice. The earliest time possible is {start.shown(old.newest)}."
        )
    if old.shadowed is not None and bill_from < old.shadowed and bill_from % old.longest:
        step = old.longest
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} lies within a window of which a total was shadowed, and part of it "
            f"would be shadowed and billed. Choose {start.shown(bill_from - bill_from % step)} or "
            f"{start.shown(bill_from - bill_from % step + step)}, up to which somebody else bills."
        )
    if bill_from < old.facts.bill_from and not newest_unknown:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is before {start.shown(old.facts.bill_from)}, from which this state "
            "counts: an earlier one may have billed what lies between. If you know that nothing was billed there, add "
            f"{UNKNOWN}."
        )


def reset(config: Config, old: Old | Lost, source: Source, topic: Topic, *, bill_from: int, clock: Clock) -> str | None:
    """Begin anew; returns where what there was is now, if there was something.

    Where that fails everything is as it was, and what failed is raised: the errors of the store and of the source.
    """
    if isinstance(config.storage, SqliteStorage):
        return _reset_file(config, config.storage.path, source, topic, bill_from=bill_from, clock=clock)
    return _reset_topics(config, old.standing, source, topic, bill_from=bill_from, clock=clock)


def _reset_file(
    config: Config, path: Path, source: Source, topic: Topic, *, bill_from: int, clock: Clock
) -> str | None:
    archive = SqliteStore.reset(path, now=clock.now) if path.exists() else None
    try:
        with SqliteStore.open(path, now=clock.now, create=True, lock=True) as store:
            embedded.begin(config, store, source, topic, bill_from=bill_from, now=clock.now())
    except BaseException:
        if archive is not None:
            with locked(path):
                archive.replace(path)
        raise
    return f"The state that there was is in {archive}." if archive else None


def _reset_topics(
    config: Config, seen: Standing | None, source: Source, topic: Topic, *, bill_from: int, clock: Clock
) -> str | None:
    client, topics = client_of(config), Topics.of(config.pipeline)
    offsets = source.starts(range(topic.partitions), bill_from - processors.READ_BEFORE_MS)
    facts = Facts(
        config.pipeline, topic.cluster_id, topic.name, topic.topic_id, bill_from, topic.partitions, clock.now()
    )
    level(client, topics)
    ensure(client, topics, partitions=topic.partitions, keep_ms=int(config.limits.keep))
    start_over(client, facts, processors.first_commits(config, topic, bill_from, offsets), seen or Standing({}))
    return f"What there was before stays in {topics.totals}, {topics.outcomes} and {topics.dead_letters}."
