"""The Kafka store as operators' commands need it: read beside the services that are running, and appended to."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from uuid import uuid4

from consumer.storage import Append, Facts, Log, Logged, Restored, Stage, StorageError
from consumer.storage.kafka import append
from consumer.storage.kafka_reading import Replay, committed, ends_of, log_sizes, logged, members_of, shortened, since
from consumer.storage.kafka_records import MARK_KEY, Mark, cloud_event, encode_mark
from consumer.storage.kafka_start import recorded
from consumer.storage.kafka_topics import Topics, present
from consumer.storage.kafka_transactions import COMMIT_S, Record, Transactions


class KafkaArchive:
    """A pipeline's state and logs. Its methods raise ``Unreachable`` where Kafka does not answer.

    What a processor has committed is read from its state, without taking over its partition: a commit that is made
    meanwhile is seen as a whole or not at all.
    """

    def __init__(self, client: Mapping[str, Any], topics: Topics, now: Callable[[], int]) -> None:
        """Used by ``open``."""
        self.topics = topics
        self._client = dict(client)
        self._now = now
        self._sizes = log_sizes(client, topics)
        self._transactions = Transactions(client, f"tallyman-{topics.pipeline}-mark-{uuid4()}", within=COMMIT_S)

    @classmethod
    @contextmanager
    def open(cls, client: Mapping[str, Any], pipeline: str, *, now: Callable[[], int]) -> Iterator["KafkaArchive"]:
        """The archive of a pipeline, until the end of the context.

        Args:
            client: the settings of any librdkafka client.
            pipeline: its name.
            now: milliseconds since the epoch, for marks of redriven letters.

        Raises:
            StorageError: a topic of the pipeline is not there.
        """
        topics = Topics.of(pipeline)
        missing = topics.all - present(client, topics).keys()
        if missing:
            raise StorageError(
                f"{', '.join(sorted(missing))} {'do' if len(missing) > 1 else 'does'} not exist at "
                f"{client['bootstrap.servers']}: correct pipeline or kafka.bootstrap_servers, or start the service once"
            )
        archive = cls(client, topics, now)
        with closing(archive._transactions):
            yield archive

    @property
    def place(self) -> str:
        """The topic of the state, which has the name of the pipeline in it."""
        return self.topics.aggregate_state

    def facts(self) -> Facts | None:
        """What the state belongs to, or None before the first start."""
        return recorded(self._client, self.topics)

    def holder(self) -> str | None:
        """Who is a member of the group that delivers."""
        return told(members_of(self._client, self.topics.group(Stage.DELIVER)))

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        """The processor's last commit, or None where it never made one; raises ``StorageError`` for a damaged one."""
        topic = self.topics.state(stage)
        ends = ends_of(self._client, topic, [partition])
        replay = Replay(f"{topic}, partition {partition}")
        for records in committed(self._client, topic, {partition: 0}, ends):
            replay.read(records)
        replay.check()
        return Restored(replay.position.offset, iter(replay.entries.items())) if replay.position else None

    def ends(self, log: Log) -> dict[int, int]:
        """Where the log ends now, records of open transactions included."""
        return ends_of(self._client, self.topics.log(log), range(self._sizes[log]))

    def settled(self, log: Log) -> dict[int, int]:
        """Where the first transaction that is still open begins, or else the end."""
        return ends_of(self._client, self.topics.log(log), range(self._sizes[log]), settled=True)

    def since(self, log: Log, time: int) -> dict[int, int]:
        """Where the first record of that time or later lies, by the broker's clock; the end where there is none."""
        return since(self._client, self.topics.log(log), range(self._sizes[log]), time)

    def shortened(self, log: Log) -> set[int]:
        """The partitions whose first records are not kept any more."""
        return shortened(self._client, self.topics.log(log), range(self._sizes[log]))

    def logged(
        self, log: Log, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None
    ) -> Iterator[Logged]:
        """The records of a log from some offsets on and below others, a few at a time."""
        return logged(self._client, self.topics, log, starts, ends)

    def number(self, letter: Logged) -> int:
        """Made of its offset and its partition; the number of partitions never changes."""
        return letter.offset * self._sizes[Log.DEAD_LETTERS] + letter.partition

    def letter(self, number: int) -> Logged | None:
        """The dead letter of this number, if it is there."""
        if number < 0:
            return None
        offset, partition = divmod(number, self._sizes[Log.DEAD_LETTERS])
        end = self.ends(Log.DEAD_LETTERS)[partition]
        found = self.logged(Log.DEAD_LETTERS, {partition: offset}, {partition: min(offset + 1, end)})
        return next((each for each in found if each.offset == offset), None)

    def append(self, appends: Iterable[Append]) -> None:
        """Append records that belong to no commit, all or none."""
        append(self._client, self.topics, appends)

    def mark_redriven(self, letters: Iterable[Logged]) -> None:
        """Record that these dead letters have been produced again, now; who reads them is told."""
        offsets: dict[int, list[int]] = {}
        for each in letters:
            offsets.setdefault(each.partition, []).append(each.offset)
        self._transactions.run(self._mark(partition, found) for partition, found in offsets.items())

    def _mark(self, partition: int, offsets: list[int]) -> Record:
        value = encode_mark(Mark(partition, offsets, self._now()))
        headers = cloud_event(self.topics.pipeline, Log.DEAD_LETTERS, value)
        return Record(self.topics.dead_letters, partition, MARK_KEY, value, headers)


def told(hosts: list[str]) -> str | None:
    """Members of a group, as messages say it."""
    if not hosts:
        return None
    some = ", ".join(sorted(set(hosts))[:3])
    return f"{len(hosts)} process{'es' * (len(hosts) > 1)} ({some})"
