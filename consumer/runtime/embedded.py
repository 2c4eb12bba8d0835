"""The default ground: one process has everything, and its state is in a SQLite file."""

from threading import Lock

import structlog

from consumer.aggregate.aggregator import Aggregator
from consumer.config import Config
from consumer.runtime import processors, start
from consumer.runtime.clocks import Clock
from consumer.runtime.ground import Ground
from consumer.runtime.membership import Alone
from consumer.runtime.reporter import State
from consumer.runtime.source import Ends, Source, Topic
from consumer.runtime.totals_log import SqliteTotals
from consumer.storage import Facts, Log, Progress, Stage, StorageError
from consumer.storage.sqlite import SqliteStore

log = structlog.get_logger()


def ground(config: Config, clock: Clock, source: Source, topic: Topic, store: SqliteStore) -> Ground:
    """Judge whether the file, the group's offsets and the topic belong together, and begin where it is the first start.

    Raises ``StartRefused`` and the errors of the store and of the source.
    """
    facts = _begun(config, clock, source, topic, store)
    growing = Lock()

    def aggregator(partition: int, _: Progress) -> Aggregator:
        left = store.restore(Stage.AGGREGATE, partition)
        if left is None:
            with growing:
                _grow(config, source, store)
            left = store.restore(Stage.AGGREGATE, partition)
        if left is None:
            raise StorageError(f"{store.path} has no state of partition {partition}: it is damaged; restore a backup")
        return processors.restored(config, facts, partition, left)

    def delivery(partition: int, _: Progress) -> State:
        left = store.restore(Stage.DELIVER, partition)
        return (left.offset, list(left.entries)) if left else (1, [])

    def expire(before: int, read_to: int) -> None:
        for each, below in ((Log.TOTALS, read_to), (Log.OUTCOMES, None), (Log.DEAD_LETTERS, None)):
            while store.expire(each, before, store.end(each) if below is None else below):
                pass

    unread = SqliteTotals(store)
    return Ground(
        store=store,
        memberships={Stage.AGGREGATE: Alone(topic.partitions), Stage.DELIVER: Alone(1)},
        aggregator=aggregator,
        delivery=delivery,
        unread=unread,
        ahead=unread,
        spread=1,
        ends=lambda: ends_of(store),
        expire=expire,
        close=lambda: None,
    )


def begin(config: Config, store: SqliteStore, source: Source, topic: Topic, *, bill_from: int, now: int) -> Facts:
    """The first start: record what the state belongs to and where reading begins, and let the group bear witness."""
    facts = Facts(config.pipeline, topic.cluster_id, topic.name, topic.topic_id, bill_from, topic.partitions, now)
    offsets = source.starts(range(topic.partitions), bill_from - processors.READ_BEFORE_MS)
    store.begin(facts, processors.first_commits(config, topic, bill_from, offsets))
    source.commit(offsets, ends_of(store))
    log.info("first_start", pipeline=config.pipeline, bill_from=start.shown(bill_from), offsets=offsets)
    return facts


def ends_of(store: SqliteStore) -> Ends:
    """Where the state's logs end."""
    return Ends(store.end(Log.TOTALS), store.end(Log.OUTCOMES))


def _begun(config: Config, clock: Clock, source: Source, topic: Topic, store: SqliteStore) -> Facts:
    place = str(store.path)
    everywhere = range(topic.partitions)
    found = start.Found(
        topic, source.group, source.beginnings(everywhere), source.ends(everywhere), source.committed(everywhere)
    )
    facts = store.facts()
    if facts is None:
        now = clock.now()
        bill_from = start.first_start(config.pipeline, config.bill_from, found, now, place=place)
        return begin(config, store, source, topic, bill_from=bill_from, now=now)
    start.next_start(config.pipeline, config.bill_from, facts, store.offsets(Stage.AGGREGATE), found, place=place)
    start.check_newest(ends_of(store), source.committed_ends(everywhere), source.group, place=place)
    return facts


def _grow(config: Config, source: Source, store: SqliteStore) -> None:
    """The source has more partitions than are recorded: they are read from their beginnings."""
    facts, topic = store.facts(), source.describe()
    if facts is None or topic.partitions <= facts.partitions:
        return
    new = range(facts.partitions, topic.partitions)
    store.grow(topic.partitions, processors.first_commits(config, topic, facts.bill_from, source.beginnings(new)))
    log.info("partitions_added", partitions=list(new))
