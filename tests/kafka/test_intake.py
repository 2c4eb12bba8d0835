"""Stage 1 on a real Kafka, in this process: what moves a partition's clock, what holds it back, and what is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition

from consumer import deadletters, totals
from consumer.aggregate.aggregator import Aggregator, Record
from consumer.aggregate.clock import Reading
from consumer.aggregate.meters import Source as Identity
from consumer.config import load
from consumer.runtime import embedded, intake, processors, service
from consumer.runtime.intake import Intake, IntakeStopped, Partition
from consumer.runtime.membership import Alone
from consumer.sandbox.kafka import Kafka, LocalKafka
from consumer.storage import Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Advance, Total
from tests.kafka.harness import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    MovedClock,
    Service,
    Topic,
    event,
    real_now,
    until,
    values,
)
from tests.kafka.test_start import delete_below

pytestmark = pytest.mark.kafka

YEAR = 365 * DAY
CLOSED_AFTER = 4 * MINUTE
"""A window of a minute, two minutes of lateness and five seconds to settle: less than this after an event's time."""


class Reader:
    """Stage 1 as the service composes it, turned by the test, with clocks that the test moves.

    Restarted, it goes on from what was committed.
    """

    def __init__(self, topic: Topic, folder: Path, **changes: Any) -> None:
        self.topic = topic
        self.clock = MovedClock(folder / "clock")
        self.witness: Reading | None = None
        written = Service(folder, topic, "http://localhost:1", **changes)
        self.config = load(written.write(), os.environ)
        self._opened = ExitStack()
        path = Path(written.config["storage"]["path"])
        self.store = self._opened.enter_context(SqliteStore.open(path, now=self.clock.now, create=True, lock=True))
        self.source = service.kafka_source(self.config, service.group_of(self.config))
        self.described = self.source.describe()
        bill_from = self.config.bill_from or 0
        embedded.begin(self.config, self.store, self.source, self.described, bill_from=bill_from, now=self.clock.now())
        self.rules = processors.rules_of(self.config, bill_from)
        self.intake: Intake
        self._consumer: Consumer
        self.start()

    def identity(self, partition: int = 0) -> Identity:
        found = self.described
        return Identity(found.cluster_id, found.topic_id, self.config.pipeline, partition)

    def start(self) -> None:
        """A new life, after the last commit."""
        self.intake = Intake(
            self.source,
            self.store,
            Alone(self.topic.partitions),
            self.restored,
            clock=self.clock,
            commit_every=int(self.config.commit_every),
            open_keys=self.config.limits.open_keys,
            witness=lambda: self.witness,
            committed=lambda: None,
        )
        self.intake._membership.join(self.intake)
        self.turn(lambda: self.intake.settled, "all partitions are restored")

    def restored(self, partition: int, _: object) -> Aggregator:
        left = self.store.restore(Stage.AGGREGATE, partition)
        assert left is not None
        return Aggregator(self.rules, self.identity(partition), left.offset, left.entries)

    def crash(self) -> None:
        """Lose what was not committed, and start again."""
        self.intake._consumer.close()
        self.start()

    def close(self) -> None:
        self.intake._consumer.close()
        self._opened.close()

    def turn(self, holds: Callable[[], object], what: str) -> None:
        """Go round until a condition holds."""

        def checked() -> object:
            self.intake._turn()
            return holds()

        until(checked, what, context=lambda: f"{self.totals}\n{self.books}")

    def consume(self, records: int, partition: int = 0) -> None:
        """Go round until so many records of the partition were read, and it is known that they are all."""
        state = self.partition(partition)
        self.turn(
            lambda: state.aggregator.book.consumed == records and state.read_to == self.end(partition),
            f"{records} records are read",
        )

    def end(self, partition: int = 0) -> int:
        """The uncommitted end of the log."""
        return self.source.ends([partition])[partition]

    def look(self, times: int = 3) -> None:
        """Go round so often that quiet partitions are looked at, and what they close is committed."""
        for _ in range(times):
            self.clock.pass_time(SECOND)
            self.intake._turn()

    def partition(self, number: int = 0) -> Partition:
        return self.intake.partitions[number]

    @property
    def books(self) -> list[object]:
        return [each.aggregator.book for each in self.intake.partitions.values()]

    def records(self) -> list[totals.Record]:
        return [totals.decode(each.value) for each in self.store.read(Log.TOTALS, 0, 100_000)]

    @property
    def totals(self) -> list[Total]:
        return [each for each in self.records() if isinstance(each, Total)]

    @property
    def advances(self) -> list[Advance]:
        return [each for each in self.records() if isinstance(each, Advance)]

    def letters(self) -> list[deadletters.DeadLetter]:
        return [deadletters.decode(each.value) for each in self.store.read(Log.DEAD_LETTERS, 0, 100_000)]


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Callable[..., Reader]]:
    """Readers that are closed in the end."""
    readers: list[Reader] = []

    def new(topic: Topic, **changes: Any) -> Reader:
        folder = tmp_path / str(len(readers))
        folder.mkdir()
        readers.append(Reader(topic, folder, **changes))
        return readers[-1]

    yield new
    for reader in readers:
        reader.close()


Reading_ = Callable[..., Reader]


# What closes the windows of a quiet partition


def test_a_quiet_partition_closes_once_time_has_passed_and_not_before(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic)
    start = real_now() // MINUTE * MINUTE
    topic.produce(event(3, at=start), event(4, at=start))
    reader.consume(2)
    due = start + 3 * MINUTE + 5 * SECOND
    reader.clock.pass_time(due - reader.clock.now() - 10 * SECOND)
    reader.look()
    assert reader.totals == []
    reader.clock.pass_time(10 * SECOND)
    reader.look()
    assert values(reader.totals) == [("cus_a", "7")]
    assert [each.clock >= due for each in reader.advances] == [True], "what moved the clock is on record"


def test_records_that_are_not_read_yet_hold_a_quiet_partition_back(kafka: Kafka, reading: Reading_) -> None:
    """What lies unread decides which revision it belongs to by its arrival: its window must still be open."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    now = real_now()
    topic.produce(event(3, at=now))
    reader.consume(1)
    partition = reader.partition()
    reader.intake._consumer.pause([TopicPartition(topic.name, 0)])  # as a fetch that takes its time
    topic.produce(event(4, at=now))
    reader.clock.pass_time(CLOSED_AFTER)
    reader.look()
    assert reader.totals == []
    assert partition.aggregator.book.consumed == 1
    reader.intake._consumer.resume([TopicPartition(topic.name, 0)])
    reader.consume(2)
    reader.look()
    assert values(reader.totals) == [("cus_a", "7")]


def test_the_time_that_a_clock_moves_to_is_read_before_the_end_is_asked_for(
    kafka: Kafka, reading: Reading_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is appended while the answer is on its way arrives after that time, and must not find its window closed."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    topic.produce(event(1))
    reader.consume(1)
    reader.clock.pass_time(CLOSED_AFTER)
    asked = reader.clock.now()
    ends = reader.source.ends

    def slow(*arguments: Any) -> dict[int, int]:
        answer = ends(*arguments)
        reader.clock.pass_time(HOUR)
        return answer

    monkeypatch.setattr(reader.source, "ends", slow)
    reader.intake._turn()
    assert asked <= reader.partition().aggregator.book.clock < asked + HOUR


@pytest.mark.parametrize("outcome", ["commit", "abort"])
def test_an_open_transaction_holds_a_quiet_partition_back_until_it_ends(
    kafka: Kafka, reading: Reading_, outcome: str
) -> None:
    """Its records arrived in time and may yet be committed; its marker, which is no record, must not hold on."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    now = real_now()
    topic.produce(event(3, at=now))
    reader.consume(1)
    with topic.transaction() as (producer, append):
        append(event(4, at=now))
        append.flush()
        reader.clock.pass_time(CLOSED_AFTER)
        reader.look()
        assert reader.totals == []
        if outcome == "commit":
            producer.commit_transaction(30.0)
        else:
            producer.abort_transaction(30.0)
    reader.consume(2 if outcome == "commit" else 1)
    reader.look()
    assert values(reader.totals) == [("cus_a", "7" if outcome == "commit" else "3")]
    assert reader.partition().aggregator.book.dead == {}


@pytest.mark.parametrize("outcome", ["commit", "abort"])
def test_a_marker_at_the_end_of_the_log_does_not_hold_a_restarted_reader_back(
    kafka: Kafka, reading: Reading_, outcome: str
) -> None:
    """Nothing comes after the marker: the end has to be reached all the same, and to be where the next reader begins.

    Begun before the marker, it would be taken for the first of lost records when retention has deleted all of the log.
    """
    topic = Topic.create(kafka)
    reader = reading(topic)
    with topic.transaction() as (producer, append):
        append(event(3))
        producer.commit_transaction(30.0)
    if outcome == "abort":
        with topic.transaction() as (producer, append):
            append(event(100))
            append.flush()
            producer.abort_transaction(30.0)
    reader.consume(1)
    reader.look()
    reader.crash()
    ends = 2 if outcome == "commit" else 4
    reader.turn(lambda: reader.partition().read_to == ends, "the end behind the marker is reached")
    reader.clock.pass_time(CLOSED_AFTER)
    reader.look()
    assert values(reader.totals) == [("cus_a", "3")]
    delete_below(topic, 0, ends)
    reader.crash()
    topic.produce(event(4))
    reader.consume(2)


def test_a_host_clock_that_jumps_a_year_closes_nothing(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic)
    topic.produce(event(3))
    reader.consume(1)
    reader.clock.jump(YEAR)
    reader.look(5)
    assert reader.totals == []
    assert reader.partition().aggregator.book.clock < real_now() + MINUTE
    topic.produce(event(4))
    reader.consume(2)
    assert reader.letters() == [], "and what arrives then is counted as usual"


# After a restart


def after_an_outage(topic: Topic, reading: Reading_, lasted: int) -> Reader:
    """A partition with an open window, whose reader comes back later; its host's monotonic clock began anew."""
    reader = reading(topic)
    topic.produce(event(3))
    reader.consume(1)
    reader.look()
    reader.clock.jump(lasted)
    reader.crash()
    return reader


def test_after_a_restart_no_clock_is_believed_without_a_witness(kafka: Kafka, reading: Reading_) -> None:
    reader = after_an_outage(Topic.create(kafka), reading, 3 * HOUR)
    reader.look(5)
    assert reader.totals == []


def test_after_a_restart_a_clock_is_believed_once_where_stripe_agrees(kafka: Kafka, reading: Reading_) -> None:
    reader = after_an_outage(Topic.create(kafka), reading, 3 * HOUR)
    reader.witness = Reading(reader.clock.now() - 4 * MINUTE, reader.clock.elapsed())
    reader.look()
    assert values(reader.totals) == [("cus_a", "3")]
    reached = reader.partition().aggregator.book.clock
    reader.topic.produce(event(4, at=real_now()))
    reader.consume(2)
    reader.clock.jump(YEAR)
    reader.witness = Reading(reader.clock.now(), reader.clock.elapsed())
    reader.look(5)
    assert reader.partition().aggregator.book.clock < reached + MINUTE, "the second jump is one too many"


def test_after_a_restart_a_record_of_another_partition_is_a_witness(kafka: Kafka, reading: Reading_) -> None:
    """The broker dated it: that is a second clock. It agrees with ours within five minutes."""
    reader = after_an_outage(Topic.create(kafka, 2), reading, CLOSED_AFTER)
    reader.look()
    assert reader.totals == []
    reader.topic.produce(event(1, customer="cus_b"), partition=1)
    reader.consume(1, 1)
    reader.look()
    assert ("cus_a", "3") in values(reader.totals)


def test_after_a_restart_a_record_that_disagrees_is_no_witness(kafka: Kafka, reading: Reading_) -> None:
    reader = after_an_outage(Topic.create(kafka, 2), reading, HOUR)
    reader.topic.produce(event(1, customer="cus_b"), partition=1)
    reader.consume(1, 1)
    reader.look(5)
    assert reader.totals == []


def test_a_producers_date_is_no_witness(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka, 2, arrival="create_time")
    reader = reading(topic)
    topic.produce(event(3), at=real_now())
    reader.consume(1)
    reader.look()
    reader.clock.jump(CLOSED_AFTER)
    reader.crash()
    topic.produce(event(1), partition=1, at=real_now())
    reader.consume(1, 1)
    reader.look(5)
    assert reader.totals == []


def test_the_log_and_the_recorded_advances_give_the_same_totals_again(kafka: Kafka, reading: Reading_) -> None:
    """An audit needs nothing but the two logs: every byte of every total follows from them."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    for round_, passes in enumerate((CLOSED_AFTER, 3 * HOUR, 2 * HOUR)):
        topic.produce(*(event(n, customer=f"cus_{n}") for n in range(5)))
        topic.produce(event(1, at=real_now() - 10 * MINUTE))
        reader.consume(6 * (round_ + 1))
        reader.clock.pass_time(passes)
        reader.look()
        reader.crash()
        reader.witness = Reading(reader.clock.now(), reader.clock.elapsed())
        reader.look()
    assert len(reader.advances) >= 3

    again = Aggregator(reader.rules, reader.identity(), 0)
    replayed: list[bytes] = []

    def drain() -> None:
        while again.changed:
            replayed.extend(each.value for each in again.commit().appends if each.log is Log.TOTALS)

    records = the_log(topic)
    for advance in reader.advances:
        unread = [record for record in records if again.offset <= record[0] < advance.offset]
        again.step(unread, advance.clock)
        drain()
        again.advance(advance.clock)
        drain()
    written = [each.value for each in reader.store.read(Log.TOTALS, 0, 1000)]
    assert sorted(replayed) == sorted(written)


def the_log(topic: Topic) -> list[Record]:
    """All records of the first partition, read by nobody's code but the client's."""
    consumer = Consumer(
        {
            "bootstrap.servers": topic.kafka.bootstrap_servers,
            "group.id": "audit",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    consumer.assign([TopicPartition(topic.name, 0, 0)])
    records: list[Any] = []
    while True:
        for message in consumer.consume(500, 0.1):
            if message.error():
                consumer.close()
                return records
            records.append((message.offset(), message.timestamp(), message.key(), message.headers(), message.value()))


# Records that are dated ahead


def test_a_record_dated_ahead_makes_its_partition_wait_and_others_go_on(kafka: Kafka, reading: Reading_) -> None:
    """One of the clocks is wrong. Nothing is lost, nothing is billed too early, and the order stays."""
    topic = Topic.create(kafka, 2)
    reader = reading(topic)
    reader.clock.jump(-4 * MINUTE)
    topic.produce(event(1), partition=1)
    reader.consume(1, 1)
    reader.clock.jump(-2 * MINUTE)
    topic.produce(*(event(n) for n in range(1, 1001)))
    reader.turn(lambda: reader.partition(0).held, "partition 0 waits")
    reader.look()
    assert reader.partition(0).aggregator.book.consumed == 0
    topic.produce(event(1), event(2), partition=0)
    reader.clock.jump(4 * MINUTE)
    topic.produce(event(1), partition=1)
    reader.consume(2, 1)
    reader.look()
    reader.consume(1002, 0)
    assert reader.partition(0).held == []
    assert reader.partition(0).aggregator.meter_books["tokens"].value == (500_500 + 3) * totals.SCALE
    assert reader.partition(0).aggregator.book.dead == {}


def test_what_the_client_hands_out_of_a_partition_that_waits_waits_too(kafka: Kafka, reading: Reading_) -> None:
    """It may have been on its way when the partition was paused; the client does not fetch it again."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    reader.clock.jump(-6 * MINUTE)
    topic.produce(event(1))
    reader.turn(lambda: reader.partition().held, "the partition waits")
    topic.produce(event(2))
    reader.intake._take(0, the_log(topic)[1:], reader.clock.now(), reader.clock.elapsed())
    assert [offset for offset, *_ in reader.partition().held] == [0, 1]


def test_a_reader_that_stops_while_it_waits_loses_nothing(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic)
    reader.clock.jump(-6 * MINUTE)
    topic.produce(event(1), event(2))
    reader.turn(lambda: reader.partition().held, "the partition waits")
    reader.crash()
    reader.turn(lambda: reader.partition().held, "it waits again")
    reader.clock.jump(6 * MINUTE)
    reader.look()
    reader.consume(2)
    assert reader.partition().aggregator.book.counted == 2


def test_a_record_that_its_producer_dates_ahead_is_a_dead_letter_and_moves_nothing(
    kafka: Kafka, reading: Reading_
) -> None:
    topic = Topic.create(kafka, arrival="create_time")
    reader = reading(topic)
    topic.produce(event(1), at=real_now())
    topic.produce(event(2), at=real_now() + HOUR)
    topic.produce(event(3), at=real_now())
    reader.consume(3)
    reader.look()
    assert [(letter.offset, letter.reason) for letter in reader.letters()] == [(1, "arrival_in_future")]
    assert reader.partition().aggregator.book.clock < real_now() + MINUTE
    assert reader.totals == []


# Records of all kinds


def test_aborted_records_are_not_usage(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic)
    for n, ends in ((1, "commit"), (10, "abort"), (100, "commit"), (1000, "abort")):
        with topic.transaction() as (producer, append):
            append(event(n))
            append.flush()
            if ends == "commit":
                producer.commit_transaction(30.0)
            else:
                producer.abort_transaction(30.0)
    reader.consume(2)
    assert reader.partition().aggregator.meter_books["tokens"].value == 101 * totals.SCALE
    assert reader.partition().read_to == 8


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
def test_compressed_batches_are_read(kafka: Kafka, reading: Reading_, codec: str) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic)
    topic.produce(*(event(1) for _ in range(100)), client={"compression.type": codec, "linger.ms": 50})
    reader.consume(100)
    assert reader.partition().aggregator.book.counted == 100


def test_whatever_a_record_holds_it_is_accounted_for(kafka: Kafka, reading: Reading_) -> None:
    """Nothing that anybody can produce stops the reader: it is counted, ignored or a dead letter."""
    topic = Topic.create(kafka)
    reader = reading(topic)
    topic.produce(None)
    topic.produce(b"")
    topic.produce(event(1), key=None)
    topic.produce(event(1), key=b"")
    topic.produce(event(1), headers=[("", None), ("x", b"\xff\xfe"), ("x", b"")])
    topic.produce(event(1), headers=[("ce_", b"")])
    topic.produce(event(1), headers=[("ce_specversion", b"\xff")])
    topic.produce(event(1), headers=[("ce_specversion", None)])
    topic.produce(b"\xff\xfe\x00")
    topic.produce(event(1, data={"n": 1, "more": "x" * 1_000_000}), client={"message.max.bytes": 2_000_000})
    topic.produce(b"[" * 900_000)
    topic.produce(event(1))
    reader.consume(12)
    reader.look()
    book = reader.partition().aggregator.book
    assert book.balanced()
    assert book.counted == 5
    assert book.ignored == {"tombstone": 1}
    assert book.unkeyed == 1
    assert sum(book.dead.values()) == len(reader.letters()) == 6


def test_what_a_disk_has_changed_is_not_counted(own_kafka: LocalKafka, reading: Reading_) -> None:
    """A flipped bit is still a number: the broker sends what is on its disk, and only the reader looks at checksums."""
    topic = Topic.create(own_kafka)
    topic.produce(event(1111))
    (segment,) = (own_kafka._folder / "data").glob(f"{topic.name}-0/*.log")
    written = segment.read_bytes()
    assert written.count(b"1111") == 1
    with segment.open("r+b") as file:
        file.seek(written.index(b"1111"))
        file.write(b"9")
    with pytest.raises(IntakeStopped, match="partition 0"):
        reading(topic).consume(1)


def test_records_of_partitions_that_are_not_ours_are_dropped(kafka: Kafka, reading: Reading_) -> None:
    """The client may hand out what it had fetched of a partition before that was taken away."""
    topic = Topic.create(kafka, 2)
    reader = reading(topic)
    topic.produce(event(1), partition=0)
    topic.produce(event(1), partition=1)
    del reader.intake.partitions[1]
    reader.consume(1, 0)
    reader.look()
    assert list(reader.intake.partitions) == [0]
    restored = reader.store.restore(Stage.AGGREGATE, 1)
    assert restored is not None
    assert restored.offset == 0


def test_a_partition_that_goes_to_others_is_committed_before_and_one_that_went_is_not(
    kafka: Kafka, reading: Reading_
) -> None:
    """What was read since the last commit need not be read again; of what is others' already nothing may be written."""
    topic = Topic.create(kafka, 2)
    reader = reading(topic)
    reader.intake._commit_every = HOUR
    for number in range(2):
        topic.produce(event(1), partition=number)
        reader.consume(1, number)
    reader.intake.revoked([0])
    reader.intake.lost([1])
    assert reader.intake.partitions == {}
    assert reader.store.offsets(Stage.AGGREGATE) == {0: 1, 1: 0}


def test_too_many_customers_stop_the_reader_which_has_lost_nothing(kafka: Kafka, reading: Reading_) -> None:
    topic = Topic.create(kafka)
    reader = reading(topic, limits={"open_keys": 10})
    topic.produce(*(event(1, customer=f"cus_{n}") for n in range(11)))
    with pytest.raises(IntakeStopped, match=r"11 customers in open buckets .* limits.open_keys allows \(10\)"):
        reader.turn(lambda: False, "it stops")


def test_customers_whose_windows_are_due_do_not_stop_the_reader(kafka: Kafka, reading: Reading_) -> None:
    """A backlog of many windows, of which one commit gets rid, is no reason to stop."""
    topic = Topic.create(kafka, arrival="create_time")
    reader = reading(topic, limits={"open_keys": 10}, commit_every="1m")
    past = real_now() - 3 * HOUR
    for n in range(12):
        at = past + n * 10 * MINUTE
        topic.produce(*(event(1, customer=f"cus_{m}", at=at) for m in range(6)), at=at)
    reader.consume(72)
    assert len(reader.totals) >= 60


def test_a_commit_closes_at_most_10_000_totals_however_many_partitions_there_are(
    kafka: Kafka, reading: Reading_
) -> None:
    """Hundreds of partitions whose windows close at once would make a transaction that the broker times out, for ever.

    Each of them would be within its bound.
    """
    topic = Topic.create(kafka, 3, arrival="create_time")
    reader = reading(topic)
    reader.intake._commit_every = HOUR
    past = real_now() - HOUR
    for number in range(3):
        topic.produce(*(event(1, customer=f"cus_{n}", at=past) for n in range(4_000)), at=past, partition=number)
        topic.produce(None, at=past + HOUR, partition=number)
    for number in range(3):
        reader.consume(4_001, number)
    assert reader.totals == []
    reader.clock.pass_time(HOUR)
    reader.turn(lambda: len(reader.totals) == 12_000, "all windows are closed")
    commits = Counter(each.appended_at for each in reader.store.read(Log.TOTALS, 0, 100_000))
    assert sorted(commits.values()) == [2_000, 10_000]


def test_advances_of_quiet_partitions_leave_a_commit_within_its_bound(
    kafka: Kafka, reading: Reading_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are records beside the totals: a partition that takes all the room would seem to take more than that."""
    monkeypatch.setattr(intake, "CLOSINGS_PER_COMMIT", 10)
    topic = Topic.create(kafka, 3)
    reader = reading(topic)
    reader.intake._commit_every = HOUR
    for number in range(3):
        topic.produce(*(event(1, customer=f"cus_{n}") for n in range(15)), partition=number)
        reader.consume(15, number)
    reader.clock.pass_time(CLOSED_AFTER)
    reader.turn(lambda: all(each.aggregator.closing for each in reader.intake.partitions.values()), "all are to close")
    reader.clock.pass_time(HOUR)
    reader.turn(lambda: len(reader.totals) == 45, "all windows are closed")
    commits = Counter(each.appended_at for each in reader.store.read(Log.TOTALS, 0, 100) if b'"total"' in each.value)
    assert max(commits.values()) == 10


def test_dead_letters_of_one_partition_keep_no_window_of_another_open(
    kafka: Kafka, reading: Reading_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's broken events, thousands a second and for hours, would be a reason to bill nobody."""
    monkeypatch.setattr(intake, "CLOSINGS_PER_COMMIT", 10)
    topic = Topic.create(kafka, 2, arrival="create_time")
    reader = reading(topic)
    reader.intake._commit_every = HOUR
    past = real_now() - HOUR
    for number in range(2):
        topic.produce(*[b"no event"] * 20, event(1, at=past), at=past, partition=number)
        topic.produce(None, at=past + HOUR, partition=number)
    for number in range(2):
        reader.consume(22, number)
    reader.clock.pass_time(HOUR)
    reader.turn(lambda: reader.intake.commits.last is not None, "a commit is made")
    assert len(reader.totals) == 2


@pytest.mark.parametrize("many", ["dead letters", "customers"])
def test_much_that_waits_to_be_committed_is_committed_before_its_time(
    kafka: Kafka, reading: Reading_, monkeypatch: pytest.MonkeyPatch, many: str
) -> None:
    """Memory would grow by whatever comes in until then, and a commit that takes too long would be begun for ever."""
    monkeypatch.setattr(intake, "COMMIT_BYTES", 1_000_000)
    topic = Topic.create(kafka)
    reader = reading(topic)
    reader.intake._commit_every = HOUR
    records = (
        [b"[" * 200_000] * 6
        if many == "dead letters"
        else [event(1, customer=f"cus_{number}") for number in range(8_000)]
    )
    topic.produce(*records)
    reader.consume(len(records))
    assert reader.intake.commits.last is not None
    assert sum(each.aggregator.unsaved for each in reader.intake.partitions.values()) < 1_000_000
