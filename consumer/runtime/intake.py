"""The loop of stage 1: one thread owns the consumer and everything that reads from it.

What the client does not forgive is answered here. It is given no callbacks: an exception in one loses a whole batch.
Waits are short, for it sits out the timeout of ``consume`` and lets no signal through. Offsets are given to the client
with each partition and kept by us, never asked of it. Records of a partition that is not ours are dropped.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Thread
from typing import Final

import structlog
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from consumer.aggregate.aggregator import CLOSINGS_PER_COMMIT, LOG_APPEND_TIME, Aggregator, Record
from consumer.aggregate.clock import QuietClock, Reading
from consumer.aggregate.ledger import MeterBook, PartitionBook
from consumer.runtime.clocks import Clock
from consumer.runtime.commits import Commits
from consumer.runtime.membership import Membership
from consumer.runtime.restoring import Restoring
from consumer.runtime.source import Ends, Silence, Source, SourceError
from consumer.storage import Changes, CommitFailed, Log, Progress, Stage, Store
from consumer.storage.kafka_client import PASSING

log = structlog.get_logger()

BATCH: Final = 500
"""Records asked for at once: the fastest size measured, and small enough to look at the clock often."""
BATCH_S: Final = 0.05
COMMIT_BYTES: Final = 32 * 2**20
"""A commit is due when it would write so much: what one takes too long for would be read again, and again, for ever."""
LOOK_AGAIN_MS: Final = 1_000
"""How often quiet and waiting partitions are looked at."""
LOOK_AT_TOPIC_MS: Final = 10_000
SAY_AGAIN_MS: Final = 10_000
"""The group is told again after so long: what it was told may be lost, or overtaken by what it was told before."""
END_S: Final = 0.9
"""How long the loop waits to be told the end of a log; it has to notice within a second that it is to stop."""
CLOSE_S: Final = 5.0

_PASSING: Final = PASSING | {"_MAX_POLL_EXCEEDED"}
"""Errors that the client gets over by itself. An outage of Kafka is for metrics and readiness, not for a restart."""

_UNREADABLE: Final = [("ce_specversion", b"\xff")]
"""Stands for headers whose names are no text, which the client cannot give us: such an event is a dead letter."""


class IntakeStopped(Exception):
    """Stage 1 cannot go on without losing or repeating usage; the message says why and what to do."""


@dataclass(slots=True)
class Partition:
    """One partition being read."""

    aggregator: Aggregator
    quiet: QuietClock
    read_to: int
    """Everything below this offset has been read, transaction markers included."""
    held: list[Record] = field(default_factory=list)
    """Read from Kafka, and waiting until the reader's clock agrees with the broker's."""
    end: int | None = None
    """The end of the log, as of the last fetch."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What the last commit made durable of one partition; metrics show it, so that no crash falsifies them."""

    offset: int
    book: PartitionBook
    meters: Mapping[str, MeterBook]


class Intake:
    """Reads the partitions that it owns until told to stop; see ``run``."""

    def __init__(
        self,
        source: Source,
        store: Store,
        membership: Membership,
        restore: Callable[[int, Progress], Aggregator],
        *,
        clock: Clock,
        commit_every: int,
        open_keys: int,
        witness: Callable[[], Reading | None],
        committed: Callable[[], None],
        ends: Callable[[], Ends] | None = None,
    ) -> None:
        """``restore`` gives a partition as its last commit left it; it is called in the background.

        ``commit_every`` is in milliseconds. ``witness`` is another clock than ours, if one has been heard of lately.
        ``committed`` is told after each commit, from this loop's thread. ``ends``: where the state's logs end, for the
        group to bear witness to; None where the commits themselves tell the group.
        """
        self._source = source
        self._store = store
        self._membership = membership
        self._clock = clock
        self._commit_every = commit_every
        self._open_keys = open_keys
        self._outside_witness = witness
        self._tell_committed = committed
        self._ends = ends
        self._said: tuple[Ends, dict[int, int]] | None = None
        """What the group was told last."""
        self._said_at = clock.elapsed()
        self._broker_witness: Reading | None = None
        self._consumer: Consumer = source.consumer()
        self._committed_at = self._looked_at = self._looked_at_topic = self._heard_at = clock.elapsed()
        self._joined = False
        self._draining = False
        """Whether the last commit left windows to close, more than one commit may."""
        self._owned: set[int] = set()
        self.partitions: dict[int, Partition] = {}
        """Those that are being read; the other ones that are ours are restored."""
        self.restoring = Restoring(Stage.AGGREGATE, restore)
        self.settled = False
        """Whether it has been told what it owns, and has restored all of it; once true it stays so."""
        self.committed: dict[int, Committed] = {}
        self.commits = Commits(Stage.AGGREGATE, clock)
        self.silence = Silence()
        self.turned = clock.elapsed()
        """When the loop last went round, by the monotonic clock."""

    # What is ours

    def assigned(self, partitions: Collection[int]) -> None:
        """Restore these, and read them as soon as that is done."""
        self._joined = True
        self._drop(partitions)
        self._owned.update(partitions)
        for number in partitions:
            self.restoring.begin(number)

    def revoked(self, partitions: Collection[int]) -> None:
        """Commit these for the last time, and let go of them."""
        self._commit(partitions)
        self.lost(partitions)

    def lost(self, partitions: Collection[int]) -> None:
        """Let go of these, as they are."""
        self._owned.difference_update(partitions)
        for number in partitions:
            self.restoring.give_up(number)
        self._drop(partitions)

    def _drop(self, partitions: Collection[int]) -> None:
        reading = [number for number in partitions if self.partitions.pop(number, None) is not None]
        for number in reading:
            self.committed.pop(number, None)
        if reading:
            self._consumer.incremental_unassign([TopicPartition(self._source.topic, number) for number in reading])

    def _take_over(self) -> None:
        """Read what has been restored from now on, each partition from its own offset."""
        elapsed = self._clock.elapsed()
        for number, aggregator in self.restoring.done():
            quiet = QuietClock(aggregator.book.clock, elapsed, aggregator.settle)
            self.partitions[number] = Partition(aggregator, quiet, aggregator.offset)
            self._note(number)
            taken = [TopicPartition(self._source.topic, number, aggregator.offset)]
            self._consumer.incremental_assign(taken)
            # A partition that was paused when it was last ours would stay so, and starve in silence.
            self._consumer.resume(taken)
            log.info("partition_taken_over", partition=number, offset=aggregator.offset)
        self.settled = self.settled or (self._joined and not len(self.restoring))

    def run(self, stopping: Callable[[], bool]) -> None:
        """Go round until ``stopping``, then commit once more.

        Raises ``IntakeStopped``, or what the store raises; then nothing more has been committed.
        """
        try:
            self._membership.join(self)
            while not stopping():
                self._turn()
            self._commit(self._owned)
            self._bear_witness(self._clock.elapsed())
        finally:
            for number in self._owned:
                self.restoring.give_up(number)
            self._membership.close()
            # It waits for brokers that may be gone; by now nothing depends on it.
            closing = Thread(target=self._consumer.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)

    def _turn(self) -> None:
        self._membership.poll()
        self._take_over()
        messages = self._consumer.consume(BATCH, BATCH_S)
        now, elapsed = self._clock.now(), self._clock.elapsed()
        for number, records in self._sorted(messages).items():
            self._heard_at = elapsed
            self._take(number, records, now, elapsed)
        if messages:
            self._check_limit()
        if elapsed - self._looked_at >= LOOK_AGAIN_MS:
            self._looked_at = elapsed
            self._release_held(now, elapsed)
            self._look_at_ends()
            self._bear_witness(elapsed)
        if elapsed - self._looked_at_topic >= LOOK_AT_TOPIC_MS:
            self._looked_at_topic = elapsed
            self._look_at_topic()
        if self._commit_is_due(elapsed):
            self._commit(self._owned)
        self.turned = elapsed

    def _sorted(self, messages: Sequence[Message]) -> dict[int, list[Record]]:
        batches: dict[int, list[Record]] = defaultdict(list)
        last = append = None
        for message in messages:
            if message.error() is not None:
                self._hear(message)
                continue
            try:
                headers = message.headers()
            except UnicodeDecodeError:
                headers = _UNREADABLE  # type: ignore[assignment]
            number = message.partition()
            if number != last or append is None:  # they come in runs
                last, append = number, batches[number].append  # type: ignore[index]
            # The client's types are wider than what it gives for a record that is no error.
            append((message.offset(), message.timestamp(), message.key(), headers, message.value()))  # type: ignore[arg-type]
        return batches

    def _take(self, number: int, records: list[Record], now: int, elapsed: int) -> None:
        partition = self.partitions.get(number)
        if partition is None:
            return
        if partition.held:
            partition.held.extend(records)
            return
        taken = partition.aggregator.step(records, now)
        if taken:
            offset, (stamp_type, stamp), *_ = records[taken - 1]
            partition.read_to = max(partition.read_to, offset + 1)
            partition.quiet.read(partition.aggregator.book.arrival, elapsed)
            if stamp_type == LOG_APPEND_TIME:
                self._broker_witness = _later(self._broker_witness, Reading(stamp, elapsed), elapsed)
        if taken < len(records):
            partition.held = records[taken:]
            self._consumer.pause([TopicPartition(self._source.topic, number)])
            log.error(
                "partition_waits_for_clock",
                partition=number,
                offset=records[taken][0],
                ahead_s=(records[taken][1][1] - now) // 1000,
                cure="the broker's clock is ahead of this host's: correct the one that is wrong",
            )

    def _release_held(self, now: int, elapsed: int) -> None:
        for number, partition in self.partitions.items():
            if partition.held:
                records, partition.held = partition.held, []
                self._take(number, records, now, elapsed)
                if not partition.held:
                    self._consumer.resume([TopicPartition(self._source.topic, number)])

    def _look_at_ends(self) -> None:
        """Let the clock of a partition on which nothing comes move on, where its whole log has been read.

        The client says nothing of an outage: that Kafka is there is known by what it sends, or by asking.
        """
        # Before the ends are asked for: what is appended later has arrived later.
        now, elapsed = self._clock.now(), self._clock.elapsed()
        quiet = {
            number: partition
            for number, partition in self.partitions.items()
            if not (partition.held or partition.aggregator.closing) and partition.aggregator.closes_by(now)
        }
        if quiet or self.silence.since is not None or elapsed - self._heard_at >= LOOK_AGAIN_MS:
            ends = self._asked_ends(now)
        else:
            ends = self._fetched_ends()
        for number, end in ends.items():
            self.partitions[number].end = end
        witness = _later(self._broker_witness, self._outside_witness(), elapsed)
        for number in quiet.keys() & ends.keys():
            partition = self.partitions[number]
            limit = partition.quiet.limit(now, elapsed, witness)
            if ends[number] <= partition.read_to and partition.aggregator.closes_by(limit):
                partition.aggregator.advance(limit)

    def _look_at_topic(self) -> None:
        """By itself the client reads on in a topic that was created anew, wherever it was, and in no new partition."""
        try:
            topic_id, partitions = self._source.topic_now(END_S)
        except SourceError:
            return
        if any(partition.aggregator.source.topic_id != topic_id for partition in self.partitions.values()):
            raise IntakeStopped(
                f"the topic {self._source.topic} was deleted and created again while it was read: its records are "
                "others. Start again to see what to do."
            )
        self._membership.grown(partitions)

    def _asked_ends(self, now: int) -> dict[int, int]:
        try:
            if not self.partitions:
                self._source.topic_now(END_S)
            ends = self._source.ends(self.partitions, END_S) if self.partitions else {}
        except SourceError as failed:
            self.silence.kept(failed, now)
            return {}
        self.silence.broken()
        return ends

    def _fetched_ends(self) -> dict[int, int]:
        asked = {number: TopicPartition(self._source.topic, number) for number in self.partitions}
        found = {number: self._consumer.get_watermark_offsets(each, cached=True) for number, each in asked.items()}
        return {number: end for number, (_, end) in found.items() if end >= 0}

    def _check_limit(self) -> None:
        while (keys := sum(partition.aggregator.open_keys for partition in self.partitions.values())) > self._open_keys:
            if any(partition.aggregator.closing for partition in self.partitions.values()):
                self._commit(self._owned)
                continue
            raise IntakeStopped(
                f"{keys} customers in open buckets are more than limits.open_keys allows ({self._open_keys}). Nothing "
                "is lost. Raise it and the memory (about 500 bytes each), choose smaller windows or less lateness, "
                "or, if this is a backfill, produce it more slowly."
            )

    def _commit_is_due(self, elapsed: int) -> bool:
        return (
            self._draining
            or elapsed - self._committed_at >= self._commit_every
            or sum(partition.aggregator.unsaved for partition in self.partitions.values()) >= COMMIT_BYTES
        )

    def _commit(self, partitions: Collection[int]) -> None:
        began = self._clock.elapsed()
        self._committed_at = began
        changes: dict[int, Changes] = {}
        room = CLOSINGS_PER_COMMIT
        for number, partition in self.partitions.items():
            if not partition.held:
                partition.aggregator.reach(partition.read_to)
            moved, closing = partition.aggregator.moved, room and partition.aggregator.closing
            if number in partitions and (moved or closing):
                changes[number] = partition.aggregator.commit(room)
                # Advances are among them: never less than none, which would be no bound at all.
                room = max(0, room - sum(each.log is Log.TOTALS for each in changes[number].appends))
        if not changes:
            self._draining = False
            return
        try:
            self._store.commit(Stage.AGGREGATE, changes)
        except CommitFailed as failed:
            again_s = self.commits.failed(changes, failed)
            self._drop(changes)
            for number in self._owned.intersection(changes):
                self.restoring.begin(number, after_s=again_s)
            return
        for number in changes:
            self._note(number)
        took = self.commits.made(began)
        self._tell_committed()
        self._draining = any(partition.aggregator.closing for partition in self.partitions.values())
        log.debug("committed", offsets={n: c.offset for n, c in changes.items()}, seconds=took)

    def _note(self, number: int) -> None:
        aggregator = self.partitions[number].aggregator
        books = deepcopy(aggregator.book), deepcopy(aggregator.meter_books)
        self.committed[number] = Committed(aggregator.offset, *books)

    def _bear_witness(self, elapsed: int) -> None:
        """Let the group follow the state, so that a lost or an older file is noticed. The state does not wait for it.

        Offsets alone say nothing of a quiet day on which totals were closed and sent: hence the ends of the logs.
        """
        if self._ends is None:
            return
        said = self._ends(), {number: committed.offset for number, committed in self.committed.items()}
        if said == self._said and elapsed - self._said_at < SAY_AGAIN_MS:
            return
        self._said, self._said_at = said, elapsed
        topic, note = self._source.topic, str(said[0])
        try:
            offsets = [TopicPartition(topic, number, offset, note) for number, offset in said[1].items()]
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as failed:
            log.warning("group_offsets_not_committed", reason=str(failed))

    def _hear(self, message: Message) -> None:
        """An error comes in the place of a record. What it is decides whether we can go on."""
        error = message.error()
        number = message.partition()
        if error is None:
            return
        if error.name() == "_PARTITION_EOF":
            partition = self.partitions.get(number) if number is not None else None
            offset = message.offset()
            if partition is not None and offset is not None:
                partition.read_to = max(partition.read_to, offset)
        elif error.name() in _PASSING or (error.retriable() and not error.fatal()):
            log.warning("kafka_error", error=error.name(), reason=error.str())
        elif error.name() in {"_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE", "_LOG_TRUNCATION"}:
            raise IntakeStopped(
                f"partition {number} of {self._source.topic} does not have offset {message.offset()} any more: "
                "retention deleted records before they were read, or the log was cut short. Going on elsewhere would "
                f"skip or repeat usage. Start again to see what is missing ({error.str()})."
            )
        else:
            raise IntakeStopped(f"Kafka refuses to let partition {number} be read: {error.name()}, {error.str()}")


def _later(one: Reading | None, other: Reading | None, elapsed: int) -> Reading | None:
    """Of two readings of other clocks, the one that makes it later."""
    if one is None or other is None:
        return one or other
    return one if one.now(elapsed) >= other.now(elapsed) else other
