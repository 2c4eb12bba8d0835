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
from consumer.storage.kafka_client import AGAIN_S, NEW, PASSING, REQUEST_S, administrator, answer, asked

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
    admin = administrator(client)
    settings = _settings(topics, keep_ms)
    found = partitions_of(admin, topics.all)
    missing = [topic for topic in topics.all if topic not in found]
    # Stage 2's state lies beside the totals that it is about.
    beside = {topics.deliver_state: topics.totals, topics.totals: topics.deliver_state}
    for topic in missing:
        _create(admin, topic, found.get(beside.get(topic, ""), partitions), settings[topic])
    if found.get(topics.aggregate_state, partitions) < partitions:
        _grow(admin, topics.aggregate_state, partitions)
    if missing or found[topics.aggregate_state] < partitions:
        found = _until_usable(admin, dict.fromkeys(topics.all, 1) | {topics.aggregate_state: partitions})
    wrong = faults(client, topics, found, keep_ms=keep_ms)
    if wrong:
        raise StorageError("the topics of the pipeline are not as they have to be:\n" + "\n".join(wrong))


def present(client: Mapping[str, Any], topics: Topics) -> dict[str, int]:
    """How many partitions each topic of the pipeline has, of those that are there.

    Raises ``Unreachable`` where one is there and cannot be used: that is no lost one.
    """
    found = _described(administrator(client), topics.all)
    unusable = [topic for topic, leaders in found.items() if not all(leaders)]
    if unusable:
        raise Unreachable(f"not to be used at the moment: {', '.join(unusable)}. Are all brokers up?")
    return {topic: len(leaders) for topic, leaders in found.items()}


def faults(client: Mapping[str, Any], topics: Topics, found: Mapping[str, int], *, keep_ms: int) -> list[str]:
    """What is not as it has to be, of the topics that were found with so many partitions; each with its cure."""
    admin, servers, settings = administrator(client), str(client["bootstrap.servers"]), _settings(topics, keep_ms)
    return [
        *_wrong_partitions(topics, found),
        *(each for topic in found for each in _wrong_settings(admin, servers, topic, settings[topic])),
    ]


def level(client: Mapping[str, Any], topics: Topics) -> None:
    """Give the totals and the state of stage 2 the same number of partitions again.

    Only where a pipeline starts over: customers move, so nothing may be on its way.
    """
    found = present(client, topics)
    pair = {topic: found[topic] for topic in (topics.totals, topics.deliver_state) if topic in found}
    most = max(pair.values(), default=0)
    admin = administrator(client)
    for topic in [topic for topic, count in pair.items() if count < most]:
        _grow(admin, topic, most)
        _until_usable(admin, {topic: most})


def partitions_of(admin: AdminClient, topics: Iterable[str]) -> dict[str, int]:
    """How many partitions each topic has, of those that are there and can be used."""
    found = _described(admin, topics)
    return {topic: len(leaders) for topic, leaders in found.items() if all(leaders)}


def _described(admin: AdminClient, topics: Iterable[str]) -> dict[str, list[bool]]:
    """Of the topics that are there, whether each partition has a leader."""

    def ask(within: float) -> dict[str, list[bool]]:
        wanted = list(topics)
        answers = admin.describe_topics(TopicCollection(wanted), request_timeout=within)
        found: dict[str, list[bool]] = {}
        for topic in wanted:
            try:
                described = answer(answers[topic]).partitions
            except KafkaException as failed:
                if failed.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
            else:
                found[topic] = [each.leader is not None and each.leader.id >= 0 for each in described]
        return found

    return asked(ask, "the topics of the pipeline", within=REQUEST_S, refresh=admin)


def _settings(topics: Topics, keep_ms: int) -> dict[str, tuple[_Setting, ...]]:
    logs = {topic: _log_settings(keep_ms) for topic in (topics.totals, topics.outcomes, topics.dead_letters)}
    return logs | {topics.aggregate_state: _STATE, topics.deliver_state: _STATE}


def _create(admin: AdminClient, topic: str, partitions: int, settings: Iterable[_Setting]) -> None:
    new = NewTopic(
        topic, num_partitions=partitions, replication_factor=-1, config={each.name: each.value for each in settings}
    )
    _changed(lambda within: answer(admin.create_topics([new], request_timeout=within)[topic]), f"creating {topic}")


def _grow(admin: AdminClient, topic: str, partitions: int) -> None:
    new = NewPartitions(topic, partitions)
    _changed(lambda within: answer(admin.create_partitions([new], request_timeout=within)[topic]), f"growing {topic}")


def _changed(change: Callable[[float], object], what: str) -> None:
    def once(within: float) -> None:
        try:
            change(within)
        except KafkaException as failed:
            # Another process was faster, or our own first try.
            if failed.args[0].code() not in {KafkaError.TOPIC_ALREADY_EXISTS, KafkaError.INVALID_PARTITIONS}:
                raise

    asked(once, what, within=READY_S)


def _until_usable(admin: AdminClient, least: Mapping[str, int]) -> dict[str, int]:
    """Wait until what was created can be used: each topic with so many partitions, or more."""
    deadline = monotonic() + READY_S
    while True:
        found = partitions_of(admin, least)
        missing = [topic for topic, count in least.items() if found.get(topic, -1) < count]
        if not missing:
            return found
        if monotonic() > deadline:
            missing_ones = ", ".join(sorted(missing))
            raise Unreachable(
                f"not usable {READY_S:.0f} s after they were created: {missing_ones}. Are all brokers up?"
            )
        sleep(AGAIN_S)


def _wrong_partitions(topics: Topics, found: Mapping[str, int]) -> Iterable[str]:
    totals, deliver = found.get(topics.totals), found.get(topics.deliver_state)
    if totals is not None and deliver is not None and totals != deliver:
        yield (
            f"{topics.totals} has {totals} partitions and {topics.deliver_state} {deliver}; their numbers are equal "
            "and never change, for customers would move. Bring back the topics from a backup, or `tallyman reset "
            "--bill-from T` starts over with events from T on."
        )


def _wrong_settings(admin: AdminClient, servers: str, topic: str, settings: Iterable[_Setting]) -> Iterable[str]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found = asked(
        lambda within: answer(admin.describe_configs([resource], request_timeout=within)[resource]),
        f"the settings of {topic}",
        within=REQUEST_S,
        passing=PASSING | NEW,
    )
    wrong = [each for each in settings if not each.suits(found[each.name].value)]
    if wrong:
        are = ", ".join(f"{each.name}={found[each.name].value}" for each in wrong)
        cure = ",".join(f"{each.name}={each.value}" for each in wrong)
        yield (
            f"{topic} has {are}. Correct it: kafka-configs.sh --bootstrap-server {servers} --alter "
            f"--entity-type topics --entity-name {topic} --add-config {cure}"
        )
