"""Stage 1's processors as the configuration makes them: new ones, and those that a commit has left."""

from collections.abc import Mapping

from consumer.aggregate.aggregator import Aggregator, Rules
from consumer.aggregate.meters import Source as Identity
from consumer.config import Config
from consumer.runtime.source import Topic
from consumer.storage import Changes, Facts, Restored

READ_BEFORE_MS = 5 * 60_000
"""Reading starts this much before ``bill_from``: an event may arrive before its event time."""


def rules_of(config: Config, bill_from: int) -> Rules:
    """The rules of stage 1."""
    windows = config.windows
    return Rules(config.core_meters, bill_from, int(windows.settle), int(windows.deduplicate_for))


def first_commits(config: Config, topic: Topic, bill_from: int, offsets: Mapping[int, int]) -> dict[int, Changes]:
    """What partitions that begin at these offsets make durable before anything is read."""
    rules = rules_of(config, bill_from)
    return {
        partition: Aggregator(
            rules, Identity(topic.cluster_id, topic.topic_id, config.pipeline, partition), offset
        ).commit()
        for partition, offset in offsets.items()
    }


def restored(config: Config, facts: Facts, partition: int, left: Restored) -> Aggregator:
    """A partition as its last commit left it."""
    identity = Identity(facts.cluster_id, facts.topic_id, facts.pipeline, partition)
    return Aggregator(rules_of(config, facts.bill_from), identity, left.offset, left.entries)
