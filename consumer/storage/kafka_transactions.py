"""One commit is one Kafka transaction; what can go wrong in it, and what that means for who commits."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final, NamedTuple, NoReturn

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from consumer.storage import Abandoned, Fenced, OutcomeUnknown, Refused, StorageError, Unreachable
from consumer.storage.kafka_client import NEW, asked, made
from consumer.storage.kafka_records import Headers
from consumer.storage.kafka_topics import LARGEST_RECORD

TRANSACTION_S: Final = 15
"""After so long the broker aborts what nobody ends. Whoever takes over a partition waits for that, at worst."""
COMMIT_S: Final = 12.0
"""Bounds a commit: what takes longer than the broker gives it would be aborted while it is being made. Where brokers
stand still the client may overrun it, once, by as much as ``TRANSACTION_S``."""
OFFSETS_S: Final = 5.0
"""The group takes offsets in milliseconds, or in a second or two where it has just moved to another broker."""
LEAST_S: Final = 1.0
"""Any request to Kafka is given so long at least."""
ABORT_S: Final = 5.0
POLL_S: Final = 0.05
ACKNOWLEDGED_S: Final = 0.005
"""Nothing wakes us when all is acknowledged."""


class Record(NamedTuple):
    """One record to produce."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    headers: Headers | None = None


class Offsets(NamedTuple):
    """What becomes the offsets of a group with the transaction, in the name of this member."""

    offsets: list[TopicPartition]
    member: bytes


_REFUSALS: Final = frozenset(
    {"ILLEGAL_GENERATION", "UNKNOWN_MEMBER_ID", "FENCED_INSTANCE_ID", "STALE_MEMBER_EPOCH", "FENCED_MEMBER_EPOCH"}
)
_TOO_LARGE: Final = frozenset({"MSG_SIZE_TOO_LARGE", "_MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"})
_LASTING: Final = frozenset(
    {
        *("TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED", "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"),
        *("CLUSTER_AUTHORIZATION_FAILED", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "UNKNOWN_TOPIC_OR_PART"),
        *("INVALID_RECORD", "POLICY_VIOLATION", "INVALID_TRANSACTION_TIMEOUT", "INVALID_TIMESTAMP"),
        "_UNSUPPORTED_FEATURE",
    }
)
"""Restoring and trying again would meet the same error for ever: a person has to look."""


class Transactions:
    """One transactional producer at a time, under one ``transactional.id``; one transaction at a time."""

    def __init__(
        self, client: Mapping[str, Any], name: str, *, within: float, aborted_after: int | None = None
    ) -> None:
        """``name`` is the transactional id. ``within`` bounds a transaction, in seconds; ``aborted_after`` so many the
        broker aborts it if nobody ends it, by default ``TRANSACTION_S``."""
        self.name = name
        self._aborted_after = aborted_after
        self._client = client
        self._within = within
        self._producer: Producer | None = None
        self._failed: tuple[str, KafkaError] | None = None
        self._lock = Lock()

    def settle(self) -> None:
        """Have a producer, and nothing under our name that is neither committed nor aborted.

        Raises:
            Unreachable: Kafka does not answer.
        """
        with self._lock:
            if self._producer is None:
                self._producer = self._fresh()

    def renew(self) -> None:
        """A new producer; from here on no other process can commit under our name."""
        with self._lock:
            self._drop()
            self._producer = self._fresh()

    def close(self) -> None:
        """End the producer. A transaction never stays open between two calls."""
        with self._lock:
            self._drop()

    def run(self, records: Iterable[Record], *offsets: Offsets, held: Callable[[], object] | None = None) -> None:
        """Make the records and the offsets durable, all or none.

        Args:
            records: taken while the transaction is open; where that raises, nothing is left of it.
            offsets: of one group each.
            held: if given, the offsets are sent before the records, and then this is called: until all is decided
                nobody is told the offsets, so nobody takes over the partitions.

        Raises:
            Abandoned, Refused, OutcomeUnknown, Fenced: see there.
            StorageError: it cannot be written, now or later: a person has to look. Nothing of it is there.
        """
        with self._lock:
            if self._producer is None:
                try:
                    self._producer = self._fresh()
                except Unreachable as failed:
                    raise Abandoned(str(failed)) from None
            producer, self._failed = self._producer, None
            deadline = monotonic() + self._within
            try:
                producer.begin_transaction()
                if held is None:
                    self._produce(producer, records, deadline)
                for each in offsets:
                    self._send_offsets(producer, each, deadline)
                if held is not None:
                    held()
                    self._produce(producer, records, deadline)
            except KafkaException as failed:
                self._give_up(producer, failed.args[0])
            except BaseException:
                if self._producer is producer:
                    self._abort(producer)
                raise
            self._commit(producer, deadline)

    def _send_offsets(self, producer: Producer, offsets: Offsets, deadline: float) -> None:
        """The client looks at no timeout here: where the group's broker goes away it may never return."""
        answers: SimpleQueue[BaseException | None] = SimpleQueue()

        def send() -> None:
            try:
                producer.send_offsets_to_transaction(*offsets, _until(deadline))
            except BaseException as failed:  # noqa: BLE001 - raised again below
                # Its traceback leads to this frame, and so to the producer, and to the queue that it is put into:
                # garbage in a circle if nobody takes it out again, see ``answer``.
                answers.put(failed.with_traceback(None))
            else:
                answers.put(None)

        Thread(target=send, name="send-offsets", daemon=True).start()
        try:
            failed = answers.get(timeout=min(OFFSETS_S, _until(deadline)))
        except Empty:
            # It is that thread's for good: whoever touched it would wait as long. Its successor ends what it began.
            self._producer = None
            raise Abandoned("the group does not answer: the commit was given up, nothing of it is there") from None
        try:
            if failed is not None:
                raise failed
        finally:
            # It leads to this frame, and so to the producer: garbage in a circle, see ``answer``.
            del failed

    def _produce(self, producer: Producer, records: Iterable[Record], deadline: float) -> None:
        produce = producer.produce
        for topic, partition, key, value, headers in records:
            while True:
                try:
                    if headers:
                        produce(topic, value, key, partition, headers=headers)
                    else:
                        produce(topic, value, key, partition)
                    break
                except BufferError:
                    if monotonic() > deadline:
                        raise _late(f"{len(producer)} records wait to be sent") from None
                    producer.poll(POLL_S)
                except KafkaException as failed:
                    if failed.args[0].name() in NEW and monotonic() < deadline:
                        # The topic has grown since the client asked for it.
                        with suppress(KafkaException):
                            producer.list_topics(topic, timeout=LEAST_S)
                        producer.poll(POLL_S)
                        continue
                    self._failed = topic, failed.args[0]
                    raise
        # Here, not within the commit: as long as this takes, the outcome is known. (And by polling: the client's flush
        # raises its own errors while it calls us back, which Python does not survive.)
        while len(producer) and monotonic() < deadline:
            producer.poll(ACKNOWLEDGED_S)
        if self._failed is not None:
            if self._failed[1].name().startswith("_PURGE"):
                self._find_cause(producer)
            raise KafkaException(self._failed[1])
        if left := len(producer):
            raise _late(f"{left} records are not acknowledged")

    def _find_cause(self, producer: Producer) -> None:
        """Records are purged when their transaction has failed. To ask for its commit, which cannot be, tells why."""
        try:
            producer.commit_transaction(LEAST_S)
        except KafkaException as failed:
            self._failed = "", failed.args[0]

    def _commit(self, producer: Producer, deadline: float) -> None:
        while True:
            try:
                return producer.commit_transaction(_until(deadline))
            except KafkaException as failed:
                error = failed.args[0]
                if error.txn_requires_abort():
                    self._give_up(producer, error)
                if error.fatal() or not error.retriable() or monotonic() > deadline:
                    self._drop()
                    kind = Fenced if error.fatal() else OutcomeUnknown
                    raise kind(f"whether the commit was made is not known: {_told(error)}") from None
            except BaseException:
                self._drop()
                raise

    def _give_up(self, producer: Producer, error: KafkaError) -> NoReturn:
        """Abort, and say what it was."""
        topic, cause = self._failed or ("", error)
        gone = error if error.fatal() else self._abort(producer)
        if gone is not None:
            self._drop()
        if error.name() in _REFUSALS:
            raise Refused(error.name(), f"the group refused the commit, nothing of it is there: {_told(error)}")
        if cause.name() in _TOO_LARGE:
            raise StorageError(
                f"a record is too large for the topic {topic}: raise its max.message.bytes to {LARGEST_RECORD}, which "
                f"is the most that is ever written. Nothing of the commit was kept ({_told(cause)})."
            )
        if cause.name() in _LASTING:
            where = f" to the topic {topic}" if topic else ""
            raise StorageError(f"Kafka refuses what is written{where}, nothing of it was kept: {_told(cause)}")
        if gone is not None:
            raise Fenced(f"the producer {self.name} is of no use any more: {_told(gone)}")
        raise Abandoned(f"the commit was given up, nothing of it is there: {_told(cause)}")

    def _abort(self, producer: Producer) -> KafkaError | None:
        """Abort; returns the error after which the producer is of no use."""
        try:
            producer.abort_transaction(ABORT_S)
        except KafkaException as failed:
            # The next producer under our name aborts what is open, or else the broker.
            self._drop()
            error: KafkaError = failed.args[0]
            return error if error.fatal() else None
        return None

    def _fresh(self) -> Producer:
        aborted_after = TRANSACTION_S if self._aborted_after is None else self._aborted_after
        settings = {
            "transactional.id": self.name,
            "transaction.timeout.ms": aborted_after * 1000,
            "message.timeout.ms": aborted_after * 1000,
            "compression.type": "lz4",
            "linger.ms": 5,
            "queue.buffering.max.messages": 200_000,
            "queue.buffering.max.kbytes": 131_072,
            "batch.size": 900_000,
            "message.max.bytes": LARGEST_RECORD,
            "delivery.report.only.error": True,
            "on_delivery": self._delivered,
        }
        producer = made(Producer, {**self._client, **settings})
        asked(producer.init_transactions, f"the producer {self.name}", within=self._within)
        return producer

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None and (self._failed is None or self._failed[1].name().startswith("_PURGE")):
            self._failed = message.topic() or "", error

    def _drop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge(blocking=False)


def _until(deadline: float) -> float:
    return max(LEAST_S, deadline - monotonic())


def _late(what: str) -> KafkaException:
    return KafkaException(KafkaError(KafkaError._TIMED_OUT, what))  # noqa: SLF001 - how the client names its own errors


def _told(error: KafkaError) -> str:
    return f"{error.name()}, {error.str()}"
