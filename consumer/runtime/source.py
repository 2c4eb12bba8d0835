"""The source topic, as the service asks Kafka about it; see docs/decisions/0001 for what the client answers and why."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, Final, NamedTuple, TypeVar

import structlog
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.admin._resource import ResourceType

from consumer.storage import Unreachable
from consumer.storage.kafka_client import (
    AGAIN_S,
    AWAY,
    PASSING,
    REFUSING_US,
    REQUEST_S,
    administrator,
    answer,
    each_answered,
    made,
    offsets,
)
from consumer.tokens import Tokens

T = TypeVar("T")

log = structlog.get_logger()

_NOTE: Final = re.compile("totals ([0-9]+) outcomes ([0-9]+)")


class SourceError(Exception):
    """Kafka or the topic is not as it has to be; the message names the place and the cure."""


class SourceSilent(SourceError):
    """Kafka does not answer. Whoever can wait tries again."""


class Silence:
    """Since when Kafka has not answered. The log tells when it begins, and when it ends."""

    def __init__(self) -> None:
        self.since: int | None = None
        """A time of day, in milliseconds; None while Kafka answers."""

    def kept(self, failed: SourceError, now: int) -> None:
        """There was no answer."""
        if self.since is None:
            self.since = now
            log.warning("kafka_silent", reason=str(failed))

    def broken(self) -> None:
        """There was one."""
        if self.since is not None:
            self.since = None
            log.info("kafka_answers")


@dataclass(frozen=True, slots=True)
class Topic:
    """What identifies the source topic, and its size."""

    cluster_id: str
    name: str
    topic_id: str
    partitions: int
    log_append_time: bool
    compacted: bool = False
    """Whether Kafka removes records because newer ones have their key."""
    retention_ms: int = -1
    """How long records are kept at least; -1 is for ever."""


class Ends(NamedTuple):
    """The ends of a state's logs, which the group keeps beside its offsets."""

    totals: int = 0
    outcomes: int = 0

    def __str__(self) -> str:
        """As it stands in the metadata of the group's offsets."""
        return f"totals {self.totals} outcomes {self.outcomes}"


class _Refusal:
    """Why Kafka does not let us in, as it said when it was asked last.

    Apart from who asks: a client that is garbage in a circle could be ended by a thread that it waits for.
    """

    def __init__(self) -> None:
        self.text: str | None = None

    def __call__(self, error: KafkaError) -> None:
        """The client has met an error."""
        if error.name() in REFUSING_US:
            self.text = error.str()


class Source:
    """One topic of one cluster, and the offsets that a consumer group has committed on it."""

    def __init__(self, client: Mapping[str, Any], topic: str, group: str) -> None:
        """``client`` are the settings of any librdkafka client."""
        self.topic = topic
        self.group = group
        self._client = dict(client)
        self._admin: AdminClient | None = None
        self._refusal = _Refusal()

    def consumer(self) -> Consumer:
        """The consumer of stage 1: offsets are ours alone, and small fetches keep memory and latency low."""
        return made(
            Consumer,
            self._client
            | {
                "group.id": self.group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                # Brokers send what is on their disks: a changed digit would be billed.
                "check.crcs": True,
                "allow.auto.create.topics": False,
                # By default a full queue is looked at again after a second, which starves a reader that is fast.
                "fetch.queue.backoff.ms": 10,
                "queued.min.messages": 20_000,
                "queued.max.messages.kbytes": 16_384,
            },
        )

    def describe(self) -> Topic:
        """The topic as it is. Raises ``SourceError`` where it is not there or Kafka cannot be asked."""

        def ask(admin: AdminClient) -> tuple[Any, Any, Any]:
            resource = ConfigResource(ResourceType.TOPIC, self.topic)
            cluster = answer(admin.describe_cluster(request_timeout=REQUEST_S))
            topics = admin.describe_topics(TopicCollection([self.topic]), request_timeout=REQUEST_S)
            found = answer(topics[self.topic])
            return (
                cluster,
                found,
                answer(admin.describe_configs([resource], request_timeout=REQUEST_S)[resource]),
            )

        cluster, found, settings = self._answer(ask)
        return Topic(
            cluster_id=cluster.cluster_id,
            name=self.topic,
            topic_id=str(found.topic_id),
            partitions=len(found.partitions),
            log_append_time=settings["message.timestamp.type"].value == "LogAppendTime",
            compacted="compact" in settings["cleanup.policy"].value,
            retention_ms=int(settings["retention.ms"].value) if "delete" in settings["cleanup.policy"].value else -1,
        )

    def ends(self, partitions: Iterable[int], timeout: float = REQUEST_S) -> dict[int, int]:
        """Where the log ends, records of open transactions included: what is below has all been appended."""
        return self._offsets(partitions, OffsetSpec.latest(), timeout)  # type: ignore[no-untyped-call]

    def beginnings(self, partitions: Iterable[int]) -> dict[int, int]:
        """The oldest offset that retention has left."""
        return self._offsets(partitions, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def starts(self, partitions: Iterable[int], time: int) -> dict[int, int]:
        """The first offset with an arrival at ``time`` (in milliseconds) or later; the end where there is none."""
        partitions = list(partitions)
        ends = self.ends(partitions)  # before the times: what is appended in between must not be skipped
        found = self._offsets(partitions, OffsetSpec.for_timestamp(time))
        return {p: ends[p] if offset < 0 else offset for p, offset in found.items()}

    def committed(self, partitions: Iterable[int]) -> dict[int, int]:
        """The group's offsets, as far as it has committed any."""
        return {p.partition: p.offset for p in self._committed(partitions)}

    def committed_ends(self, partitions: Iterable[int]) -> Ends:
        """The ends of the state's logs that the group has seen."""
        said = [_NOTE.fullmatch(p.metadata or "") for p in self._committed(partitions)]
        seen = [Ends(int(each[1]), int(each[2])) for each in said if each]
        return Ends(max((e.totals for e in seen), default=0), max((e.outcomes for e in seen), default=0))

    def commit(self, offsets: Mapping[int, int], ends: Ends) -> None:
        """Make these the group's offsets, now."""
        asked = [TopicPartition(self.topic, p, offset, str(ends)) for p, offset in offsets.items()]

        def ask(_: AdminClient) -> None:
            with closing(self.consumer()) as consumer:
                each_answered(consumer.commit(offsets=asked, asynchronous=False))

        self._answer(ask)

    def topic_now(self, timeout: float) -> tuple[str, int]:
        """The topic's id and its number of partitions."""

        def ask(admin: AdminClient) -> tuple[str, int]:
            topics = admin.describe_topics(TopicCollection([self.topic]), request_timeout=timeout)
            found = answer(topics[self.topic])
            return str(found.topic_id), len(found.partitions)

        return self._answer(ask, timeout)

    def _committed(self, partitions: Iterable[int]) -> list[TopicPartition]:
        asked = [TopicPartition(self.topic, p) for p in partitions]

        def ask(_: AdminClient) -> list[TopicPartition]:
            with closing(self.consumer()) as consumer:
                return [p for p in each_answered(consumer.committed(asked, timeout=REQUEST_S)) if p.offset >= 0]

        return self._answer(ask)

    def _offsets(self, partitions: Iterable[int], spec: OffsetSpec, timeout: float = REQUEST_S) -> dict[int, int]:
        asked = {TopicPartition(self.topic, p): spec for p in partitions}
        isolation = IsolationLevel.READ_UNCOMMITTED
        return self._answer(lambda admin: offsets(admin, asked, isolation, timeout), timeout)

    def _answer(self, ask: Callable[[AdminClient], T], timeout: float = REQUEST_S) -> T:
        deadline = monotonic() + timeout
        while True:
            # Held here: the answers to a client that is garbage never come, and another thread may replace it.
            admin = self._administrator()
            admin.poll(0)
            self._refusal.text = None
            try:
                return ask(admin)
            except Unreachable as failed:
                raise SourceSilent(str(failed)) from None
            except KafkaException as failed:
                error = failed.args[0]
                if error.name() not in PASSING:
                    raise SourceError(self._explain(error)) from None
                if error.name() in AWAY or monotonic() > deadline:
                    admin.poll(0)
                    # A client keeps asking the controller and the leaders that it was told of, whoever they are by now.
                    self._admin = None
                    raise SourceSilent(self._why_silent(error)) from None
            sleep(AGAIN_S)
            with suppress(KafkaException):
                # Who leads a partition is asked for once and then believed for minutes, wrong or not.
                admin.list_topics(self.topic, timeout=max(AGAIN_S, deadline - monotonic()))

    def _administrator(self) -> AdminClient:
        admin = self._admin
        if admin is None:
            try:
                admin = self._admin = administrator(self._client | {"error_cb": self._refusal})
            except Unreachable as failed:
                raise SourceSilent(str(failed)) from None
        return admin

    def _why_silent(self, error: KafkaError) -> str:
        tokens, servers = self._client.get("oauth_cb"), self._client["bootstrap.servers"]
        if isinstance(tokens, Tokens) and tokens.failure is not None:
            return f"there is no token for Kafka: {tokens.failure.reason}"
        if self._refusal.text is not None:
            return (
                f"Kafka at {servers} does not let us in ({self._refusal.text}): are kafka.options and the secrets "
                "right, or the role?"
            )
        return f"Kafka does not answer at {servers} ({error.str()}): is it up, is bootstrap_servers right?"

    def _explain(self, error: KafkaError) -> str:
        servers = self._client["bootstrap.servers"]
        code = error.code()
        if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return f"the topic {self.topic} does not exist at {servers}: create it, or correct kafka.topic"
        if code in {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED}:
            return f"{servers} refuses access to the topic {self.topic} or the group {self.group}: {error.str()}"
        return f"Kafka at {servers} says: {error.str()}"
