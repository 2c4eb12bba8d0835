"""The ground for any number of processes: state, offsets and logs are in Kafka, and groups share out the partitions."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from typing import Any

import structlog

from consumer.aggregate.aggregator import Aggregator
from consumer.config import Config
from consumer.runtime import processors, start
from consumer.runtime.clocks import Clock
from consumer.runtime.ground import Ground
from consumer.runtime.logs import KAFKA_LINES
from consumer.runtime.membership import Member
from consumer.runtime.reporter import State
from consumer.runtime.source import Source, SourceError, Topic
from consumer.runtime.totals_log import KafkaTotals
from consumer.storage import Facts, Progress, Stage, StorageError, Unreachable
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_start import begin, grow, newest, positions, recorded
from consumer.storage.kafka_topics import Topics, ensure

log = structlog.get_logger()


def ground(config: Config, clock: Clock, source: Source, topic: Topic, stages: frozenset[Stage]) -> Ground:
    """Create what is missing, judge whether state and source belong together, and begin where it is the first start.

    Raises ``StartRefused`` and the errors of the store and of the source.
    """
    client, topics = _client(config), Topics.of(config.pipeline)
    ensure(client, topics, partitions=topic.partitions, keep_ms=int(config.limits.keep))
    facts = _begun(config, clock, source, topic, topics)
    with ExitStack() as opened:
        reads = {Stage.AGGREGATE: topic.name, Stage.DELIVER: topics.totals}
        members = {stage: Member(client, reads[stage], topics.group(stage)) for stage in stages}
        store = KafkaStore(client, facts, {stage: _metadata_of(member) for stage, member in members.items()})
        opened.callback(store.close)
        unread, ahead = (KafkaTotals(client, topics.totals, topics.group(Stage.DELIVER)) for _ in range(2))
        opened.callback(unread.close)
        opened.callback(ahead.close)
        growing, begun = Lock(), facts.partitions

        def aggregator(partition: int, progress: Progress) -> Aggregator:
            nonlocal begun
            with growing:
                if partition >= begun:
                    begun = _grow(config, source, topics)
            left = store.restore(Stage.AGGREGATE, partition, progress)
            if left is None:
                raise _damaged(topics, Stage.AGGREGATE, partition)
            return processors.restored(config, facts, partition, left)

        def delivery(partition: int, progress: Progress) -> State:
            left = store.restore(Stage.DELIVER, partition, progress)
            if left is None:
                raise _damaged(topics, Stage.DELIVER, partition)
            return left.offset, list(left.entries)

        return Ground(
            store=store,
            memberships=members,
            aggregator=aggregator,
            delivery=delivery,
            unread=unread,
            ahead=ahead,
            spread=store.spread,
            ends=None,
            expire=None,
            close=opened.pop_all().close,
        )


def _begun(config: Config, clock: Clock, source: Source, topic: Topic, topics: Topics) -> Facts:
    client, place = _client(config), topics.aggregate_state
    everywhere = range(topic.partitions)
    # First: what others read meanwhile must not lie beyond the ends that are asked for then.
    at = positions(client, topics, Stage.AGGREGATE)
    found = start.Found(topic, source.group, source.beginnings(everywhere), source.ends(everywhere), {})
    facts = newest(at)
    if facts is None:
        now = clock.now()
        bill_from = start.first_start(config.pipeline, config.bill_from, found, now, place=place)
        new = Facts(config.pipeline, topic.cluster_id, topic.name, topic.topic_id, bill_from, topic.partitions, now)
        offsets = source.starts(everywhere, bill_from - processors.READ_BEFORE_MS)
        facts = begin(client, new, processors.first_commits(config, topic, bill_from, offsets))
        if facts == new:
            log.info("first_start", pipeline=config.pipeline, bill_from=start.shown(bill_from), offsets=offsets)
            return facts
        return _begun(config, clock, source, topic, topics)
    offsets = {partition: each.offset for partition, each in at.items()}
    start.next_start(config.pipeline, config.bill_from, facts, offsets, found, place=place)
    return facts


def _grow(config: Config, source: Source, topics: Topics) -> int:
    """Read partitions of the source that are not recorded yet from their beginnings; returns how many it has."""
    client = _client(config)
    try:
        topic = source.describe()
        ensure(client, topics, partitions=topic.partitions, keep_ms=int(config.limits.keep))
        facts = recorded(client, topics)
        if facts is None or topic.partitions <= facts.partitions:
            return topic.partitions
        new = range(facts.partitions, topic.partitions)
        beginnings = source.beginnings(new)
    except SourceError as failed:
        raise Unreachable(str(failed)) from None
    grown = replace(facts, partitions=topic.partitions)
    grow(client, grown, processors.first_commits(config, topic, facts.bill_from, beginnings))
    log.info("partitions_added", partitions=list(new))
    return topic.partitions


def _client(config: Config) -> dict[str, Any]:
    # Below errors the clients say that producers have no use for what is set for consumers, and the other way round.
    return {"log_level": "3", "logger": KAFKA_LINES} | config.kafka_client()


def _metadata_of(member: Member) -> Callable[[], bytes]:
    return lambda: member.metadata


def _damaged(topics: Topics, stage: Stage, partition: int) -> StorageError:
    return StorageError(
        f"{topics.state(stage)} has nothing of partition {partition}, which has begun: it is damaged. Bring the topic "
        "back from a backup; `tallyman reset --bill-from T` starts over with events from T on."
    )
