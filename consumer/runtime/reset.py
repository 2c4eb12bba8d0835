"""To start over: what is given up, from when events may be billed again, and the new beginning."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from consumer import totals
from consumer.aggregate.aggregator import Aggregator, UnbalancedError, UnknownEntryError
from consumer.aggregate.meters import WINDOW_MS
from consumer.aggregate.meters import Source as Identity
from consumer.config import Config
from consumer.deliver.entries import EntryError, State, unpack
from consumer.deliver.ledger import PREFIX, Column
from consumer.runtime import embedded, processors, start
from consumer.runtime.clocks import Clock
from consumer.runtime.source import Source, Topic
from consumer.storage import Facts, Log, Stage, StorageError
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
    """The end of the newest window that has a total, in milliseconds; None where there is none."""
    meters: dict[str, GivenUp]


def look(config: Config, path: Path, clock: Clock) -> Old | str:
    """What the file holds; where it is gone or cannot be read, why. Raises ``StorageError`` where a service uses it."""
    if not path.exists():
        return f"{path} is not there"
    with locked(path):
        try:
            with SqliteStore.open(path, now=clock.now, create=False, lock=False) as store:
                facts = store.facts()
                return _old(config, store, facts) if facts else f"{path} holds no state"
        except (UnbalancedError, UnknownEntryError, EntryError, StorageError) as damage:
            return f"{path} cannot be read ({damage})"


def _old(config: Config, store: SqliteStore, facts: Facts) -> Old:
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
    restored = store.restore(Stage.DELIVER, 0)
    for key, packed in restored.entries if restored else ():
        if not key.startswith(PREFIX):
            entry = unpack(packed)
            of = meters.setdefault(entry.total.meter, GivenUp())
            column = of.parked if entry.state is State.PARKED else of.pending
            column.add(entry.total.events, scaled(entry.total.value))
    newest = _expired(store, clock)
    for each in store.logged(Log.TOTALS):
        total = totals.decode(each.value)
        if isinstance(total, Total):
            end = total.window_start * 1000 + WINDOW_MS[total.window]
            newest = end if newest is None else max(newest, end)
            if restored is None or each.offset >= restored.offset:
                meters.setdefault(total.meter, GivenUp()).pending.add(total.events, scaled(total.value))
    return Old(facts, newest, meters)


def _aggregators(config: Config, store: SqliteStore, facts: Facts) -> Iterator[Aggregator]:
    """Stage 1 as it was left, one partition after the other."""
    rules = processors.rules_of(config, facts.bill_from)
    for partition in range(facts.partitions):
        restored = store.restore(Stage.AGGREGATE, partition)
        if restored is not None:
            identity = Identity(facts.cluster_id, facts.topic_id, facts.pipeline, partition)
            yield Aggregator(rules, identity, restored.offset, restored.entries)


def _expired(store: SqliteStore, clock: int) -> int | None:
    """No window of a total that is not kept any more ended after this; None where all are kept."""
    first = store.read(Log.TOTALS, 0, 1)
    if first:
        return None if first[0].offset == 1 else min(first[0].appended_at, clock)
    return clock if store.end(Log.TOTALS) > 1 else None


def judge(old: Old | str, bill_from: int, now: int, *, read_before: bool, newest_unknown: bool) -> None:
    """Raise ``ResetRefused`` where billing from this time on could bill twice, or Stripe would refuse it.

    ``read_before``: whether the consumer group has committed offsets.
    """
    oldest = now - int(start.LONGEST_BACK.total_seconds() * 1000)
    if bill_from < oldest:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is more than {start.LONGEST_BACK.days} days back: Stripe refuses "
            f"older usage. The earliest time possible is {start.shown(oldest)}."
        )
    if isinstance(old, str):
        if not read_before:
            raise ResetRefused(
                f"{old}, and this pipeline has not run before: there is nothing to start over. Set bill_from: "
                f"{start.shown(bill_from)} in the configuration and start with `tallyman run`."
            )
        if not newest_unknown:
            raise ResetRefused(
                f"{old}, so nobody knows here up to when usage has been billed. Look at Stripe for the newest meter "
                f"event of this pipeline, choose --bill-from after the end of its window, and add {UNKNOWN}: whatever "
                "was billed after that time would be billed twice."
            )
        return
    if old.newest is not None and bill_from < old.newest:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is before the end of the newest window that has a total: what lies "
            f"between would be billed twice. The earliest time possible is {start.shown(old.newest)}."
        )
    if bill_from < old.facts.bill_from and not newest_unknown:
        raise ResetRefused(
            f"--bill-from {start.shown(bill_from)} is before {start.shown(old.facts.bill_from)}, from which this state "
            "counts: an earlier one may have billed what lies between. If you know that nothing was billed there, add "
            f"{UNKNOWN}."
        )


def reset(config: Config, path: Path, source: Source, topic: Topic, *, bill_from: int, clock: Clock) -> Path | None:
    """Archive the file, if there is one, and begin anew; returns where it is now.

    Where that fails the file is put back, and what failed is raised: the errors of the store and of the source.
    """
    archive = SqliteStore.reset(path, now=clock.now) if path.exists() else None
    try:
        with SqliteStore.open(path, now=clock.now, create=True, lock=True) as store:
            embedded.begin(config, store, source, topic, bill_from=bill_from, now=clock.now())
    except BaseException:
        if archive is not None:
            with locked(path):
                archive.replace(path)
        raise
    return archive
