"""The topics of the Kafka store: what they are called, how they have to be, and what to do where they are not."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewPartitions, NewTopic

from consumer.storage import Log, Stage, StorageError, Unreachable
from consumer.storage.kafka_client import AGAIN_S, REQUEST_S, asked

LARGEST_RECORD: Final = 2**20
"""Bytes. Larger than any record of ours: a dead letter holds an event of 256 KB in base64."""

TOMBSTONES_KEPT_S: Final = 600
"""At least so long the marks of deleted entries stay: a restore that takes longer could miss one, and is given up."""

_DAY_MS: Final = 86_400_000
READY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Topics:
    """The names of a pipeline's topics and groups."""

    pipeline: str
    aggregate_state: str
    totals: str
    deliver_state: str
    outcomes: str
    dead_letters: str

    @classmethod
    def of(cls, pipeline: str) -> "Topics":
        """Those of this pipeline."""
        begin = f"tallyman-{pipeline}"
        return cls(
            pipeline,
            f"{begin}-aggregate-state",
            f"{begin}-totals",
            f"{begin}-deliver-state",
            f"{begin}-outcomes",
            f"{begin}-dead-letters",
        )

    def state(self, stage: Stage) -> str:
        """Where the stage keeps its entries."""
        return self.aggregate_state if stage is Stage.AGGREGATE else self.deliver_state

    def log(self, log: Log) -> str:
        """The topic that is this log."""
        return {Log.TOTALS: self.totals, Log.OUTCOMES: self.outcomes, Log.DEAD_LETTERS: self.dead_letters}[log]

    def group(self, stage: Stage) -> str:
        """The consumer group of the stage's processes."""
        return f"tallyman-{self.pipeline}-{stage}"

    @property
    def all(self) -> tuple[str, ...]:
        return self.aggregate_state, self.totals, self.deliver_state, self.outcomes, self.dead_letters


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting that we give a topic, and which ones of somebody else are good enough."""

    name: str
    value: str
    suits: Callable[[str], bool]


def _exactly(name: str, value: str) -> _Setting:
    return _Setting(name, value, lambda found: found == value)


def _at_most(name: str, value: float, most: float) -> _Setting:
    return _Setting(name, str(value), lambda found: float(found) <= most)


def _at_least(name: str, value: int, least: int) -> _Setting:
    return _Setting(name, str(value), lambda found: float(found) >= least)


_RECORD_SIZE: Final = _at_least("max.message.bytes", LARGEST_RECORD + 12, LARGEST_RECORD)

_STATE: Final = (
    _exactly("cleanup.policy", "compact"),
    # What is in the newest segment, or not yet compacted, is read by every restore.
    _at_most("segment.bytes", 64 * 2**20, 256 * 2**20),
    _at_most("max.compaction.lag.ms", 600_000, 3_600_000),
    _at_most("min.compaction.lag.ms", 0, 600_000),
    _at_most("min.cleanable.dirty.ratio", 0.1, 0.5),
    # Every closed bucket leaves such marks: kept for long, they are most of what a restore reads.
    _Setting("delete.retention.ms", "900000", lambda found: TOMBSTONES_KEPT_S * 1000 <= int(found) <= _DAY_MS),
    _RECORD_SIZE,
)


def _log_settings(keep_ms: int) -> tuple[_Setting, ...]:
    return (
        _exactly("cleanup.policy", "delete"),
        _Setting("retention.ms", str(keep_ms), lambda found: int(found) == -1 or int(found) >= keep_ms),
        _exactly("retention.bytes", "-1"),
        # Retention goes by these times: a host with a wrong clock must not have its totals deleted.
        _exactly("message.timestamp.type", "LogAppendTime"),
        _RECORD_SIZE,
    )


def ensure(client: Mapping[str, Any], topics: Topics, *, partitions: int, keep_ms: int) -> None:
    """Create the topics that are missing, let the state of stage 1 grow with its source, and verify all of it.

    Any number of processes may do so at once.

    Args:
        client: the settings of any librdkafka client.
        topics: of the pipeline.
        partitions: how many the source has. The logs get as many when they are created, and keep that number for ever.
        keep_ms: for how long totals, outcomes and dead letters are kept.

    Raises:
        StorageError: a topic is not as it has to be; the message holds the commands that cure it.
        Unreachable: Kafka does not answer.
    """
    admin = AdminClient(dict(client))
    servers = str(client["bootstrap.servers"])
    settings = {topic: _log_settings(keep_ms) for topic in (topics.totals, topics.outcomes, topics.dead_letters)}
    settings |= {topics.aggregate_state: _STATE, topics.deliver_state: _STATE}
    found = partitions_of(admin, topics.all)
    missing = [topic for topic in topics.all if topic not in found]
    for topic in missing:
        # Stage 2's state lies beside the totals that it is about.
        count = found.get(topics.totals, partitions) if topic == topics.deliver_state else partitions
        _create(admin, topic, count, settings[topic])
    if found.get(topics.aggregate_state, partitions) < partitions:
        _grow(admin, topics.aggregate_state, partitions)
    if missing or found.get(topics.aggregate_state) != partitions:
        found = _ready(admin, topics, partitions)
    wrong = [
        *_wrong_partitions(topics, found, partitions),
        *(each for topic in topics.all for each in _wrong_settings(admin, servers, topic, settings[topic])),
    ]
    if wrong:
        raise StorageError("the topics of the pipeline are not as they have to be:\n" + "\n".join(wrong))


def partitions_of(admin: AdminClient, topics: Iterable[str]) -> dict[str, int]:
    """How many partitions each topic has, of those that are there and can be used."""

    def ask(within: float) -> dict[str, int]:
        wanted = list(topics)
        answers = admin.describe_topics(TopicCollection(wanted), request_timeout=within)
        found: dict[str, int] = {}
        for topic in wanted:
            try:
                described = answers[topic].result().partitions
            except KafkaException as failed:
                if failed.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
            else:
                if all(each.leader is not None and each.leader.id >= 0 for each in described):
                    found[topic] = len(described)
        return found

    return asked(ask, "the topics of the pipeline", within=REQUEST_S, refresh=admin)


def _create(admin: AdminClient, topic: str, partitions: int, settings: Iterable[_Setting]) -> None:
    new = NewTopic(
        topic, num_partitions=partitions, replication_factor=-1, config={each.name: each.value for each in settings}
    )
    _changed(lambda within: admin.create_topics([new], request_timeout=within)[topic].result(), f"creating {topic}")


def _grow(admin: AdminClient, topic: str, partitions: int) -> None:
    new = NewPartitions(topic, partitions)
    _changed(lambda within: admin.create_partitions([new], request_timeout=within)[topic].result(), f"growing {topic}")


def _changed(change: Callable[[float], object], what: str) -> None:
    def once(within: float) -> None:
        try:
            change(within)
        except KafkaException as failed:
            # Another process was faster, or our own first try.
            if failed.args[0].code() not in {KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.INVALID_PARTITIONS}:
                raise

    asked(once, what, within=READY_S)


def _ready(admin: AdminClient, topics: Topics, partitions: int) -> dict[str, int]:
    """Wait until what was created can be used."""
    deadline = monotonic() + READY_S
    while True:
        found = partitions_of(admin, topics.all)
        if found.keys() == set(topics.all) and found[topics.aggregate_state] >= partitions:
            return found
        if monotonic() > deadline:
            missing = ", ".join(sorted(set(topics.all) - found.keys())) or topics.aggregate_state
            raise Unreachable(f"not usable {READY_S:.0f} s after they were created: {missing}. Are all brokers up?")
        sleep(AGAIN_S)


def _wrong_partitions(topics: Topics, found: Mapping[str, int], partitions: int) -> Iterable[str]:
    state, totals, deliver = (found[t] for t in (topics.aggregate_state, topics.totals, topics.deliver_state))
    if state > partitions:
        yield (
            f"{topics.aggregate_state} has {state} partitions and the source topic {partitions}: the source was made "
            "anew. `tallyman reset --bill-from T` starts over with events from T on."
        )
    if totals != deliver:
        yield (
            f"{topics.totals} has {totals} partitions and {topics.deliver_state} {deliver}; their numbers are equal "
            "and never change, for customers would move. Bring back the topics from a backup, or `tallyman reset "
            "--bill-from T` starts over with events from T on."
        )


def _wrong_settings(admin: AdminClient, servers: str, topic: str, settings: Iterable[_Setting]) -> Iterable[str]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found = asked(
        lambda within: admin.describe_configs([resource], request_timeout=within)[resource].result(),
        f"the settings of {topic}",
        within=REQUEST_S,
    )
    wrong = [each for each in settings if not each.suits(found[each.name].value)]
    if wrong:
        are = ", ".join(f"{each.name}={found[each.name].value}" for each in wrong)
        cure = ",".join(f"{each.name}={each.value}" for each in wrong)
        yield (
            f"{topic} has {are}. Correct it: kafka-configs.sh --bootstrap-server {servers} --alter "
            f"--entity-type topics --entity-name {topic} --add-config {cure}"
        )
