"""Asking Kafka: what is worth another try, and what is said where there is no answer."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Final, TypeVar

from confluent_kafka import OFFSET_INVALID, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from consumer.storage import StorageError, Unreachable
from consumer.tokens import NoToken, Tokens

T = TypeVar("T")

REQUEST_S: Final = 10.0
AGAIN_S: Final = 0.1

_SILENT: Final = KafkaError(KafkaError._TIMED_OUT, "the leader of a partition is silent")  # noqa: SLF001 - no other name

REFUSING_US: Final = frozenset({"_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED"})
"""Kafka does not believe who we are. It may the next time: tokens expire, and their issuers have outages, too."""

AWAY: Final = frozenset(
    {
        *("_TRANSPORT", "_ALL_BROKERS_DOWN", "_FAIL", "_TIMED_OUT", "_TIMED_OUT_QUEUE", "_RESOLVE", "_SSL"),
        *("_DESTROY_BROKER", "_NODE_UPDATE"),
        *REFUSING_US,
    }
)
"""No broker can be reached, or the cluster has told the client that the one it was asking is not there any more."""

PASSING: Final = frozenset(
    {
        *("NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "FENCED_LEADER_EPOCH", "UNKNOWN_LEADER_EPOCH"),
        *("NOT_COORDINATOR", "COORDINATOR_NOT_AVAILABLE", "COORDINATOR_LOAD_IN_PROGRESS", "NOT_CONTROLLER"),
        *("REQUEST_TIMED_OUT", "NETWORK_EXCEPTION", "UNSTABLE_OFFSET_COMMIT", "OFFSET_NOT_AVAILABLE"),
        *("BROKER_NOT_AVAILABLE", "REPLICA_NOT_AVAILABLE", "LISTENER_NOT_FOUND", "KAFKA_STORAGE_ERROR"),
        *("_WAIT_COORD", "_NOENT"),  # the second: no partition that was asked about has a leader now
        *AWAY,
    }
)
"""A partition or a group has moved to another broker or has just been created, or no broker can be reached.

Kafka's protocol calls them retriable, but its client says so of next to none.
"""

_READING: Final = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "earliest",
    "enable.partition.eof": True,
    "allow.auto.create.topics": False,
    "check.crcs": True,
    # The end is told by an empty answer, which the broker would hold back for this long.
    "fetch.wait.max.ms": 10,
    "fetch.queue.backoff.ms": 10,
    "queued.min.messages": 100_000,
    "queued.max.messages.kbytes": 65_536,
}


def made(kind: Callable[[dict[str, Any]], T], settings: Mapping[str, Any]) -> T:
    """A client of Kafka's, of any kind. Raises ``Unreachable`` where it has no token to show.

    The client itself would look for ten seconds, and not say why there is none. It looks once a second, and finds none
    at first: so it takes a second to be made.
    """
    tokens = settings.get("oauth_cb")
    if isinstance(tokens, Tokens):
        try:
            tokens()
        except NoToken as failed:
            raise Unreachable(f"there is no token for Kafka: {failed}") from None
    return kind(dict(settings))


def reader(client: Mapping[str, Any], group: str, *, committed: bool) -> Consumer:
    """A consumer that is assigned its partitions by hand, and is no member of the group whose offsets it may ask."""
    isolation = "read_committed" if committed else "read_uncommitted"
    return made(Consumer, {**client, **_READING, "group.id": group, "isolation.level": isolation})


def administrator(client: Mapping[str, Any]) -> AdminClient:
    """Asks and changes what is no record. It logs nothing: nobody polls it for its lines, and what fails is raised."""
    return made(AdminClient, {name: value for name, value in client.items() if name != "logger"} | {"log_level": "0"})


def answer(future: Future[T]) -> T:
    """What was asked of an administrator; raises what went wrong.

    What a future itself raises leads by its traceback to whoever asked, to the client, and back to the future: garbage
    in a circle, which Python collects in any thread. In one of the client's own that ends the process.
    """
    failed = future.exception()
    if failed is not None:
        raise type(failed)(*failed.args)
    return future.result()


def offsets(
    admin: AdminClient, wanted: dict[TopicPartition, OffsetSpec], isolation: IsolationLevel, within: float
) -> dict[int, int]:
    """Ends, beginnings or offsets of a time of partitions of one topic; raises what went wrong, after so many seconds.

    Of a leader that has not answered the client tells nothing, as long as others have: its offsets are then -1001.
    """
    futures = admin.list_offsets(wanted, isolation_level=isolation, request_timeout=within)
    found = {place.partition: answer(future).offset for place, future in futures.items()}
    if OFFSET_INVALID in found.values():
        raise KafkaException(_SILENT)
    return found


def each_answered(found: list[TopicPartition]) -> list[TopicPartition]:
    """What a consumer was told of partitions; raises what was wrong with one, of which the client raises nothing."""
    for each in found:
        if each.error is not None:
            raise KafkaException(each.error)
    return found


NEW: Final = frozenset({"UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION"})
"""What a broker says of a topic that another one has just created."""


def asked(
    ask: Callable[[float], T],
    what: str,
    *,
    within: float,
    refresh: AdminClient | None = None,
    passing: frozenset[str] = PASSING,
) -> T:
    """Kafka's answer; what passes is asked again until the time (in seconds) is over.

    Args:
        ask: is given the seconds that are left.
        what: is asked for, as the error says it.
        within: seconds.
        passing: the names of the errors that pass, beside those that Kafka says do.
        refresh: a client that believes for minutes what it once was told of who leads a partition, wrong or not.

    Raises:
        Unreachable: no answer in time.
        StorageError: an answer that will not change by itself.
    """
    deadline = monotonic() + within
    while True:
        left = max(1.0, deadline - monotonic())
        try:
            return ask(left)
        except KafkaException as failed:
            error = failed.args[0]
            if error.name() not in passing and not error.retriable():
                raise StorageError(f"{what}: Kafka says {error.name()}, {error.str()}") from None
            if monotonic() + AGAIN_S > deadline:
                raise Unreachable(f"{what}: no answer for {within:.0f} s ({error.str()})") from None
        sleep(AGAIN_S)
        if refresh is not None:
            with suppress(KafkaException):
                refresh.list_topics(timeout=max(1.0, deadline - monotonic()))
