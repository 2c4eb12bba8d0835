"""The commands that ask Kafka: check, produce, redrive and reset, beside the service as it really runs."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from confluent_kafka import Consumer, Producer, TopicPartition
from typer.testing import CliRunner

from consumer import deadletters, totals
from consumer.aggregate.aggregator import Aggregator
from consumer.aggregate.meters import Source as Identity
from consumer.cli import app
from consumer.config import load
from consumer.runtime import processors, service
from consumer.runtime.source import SourceError
from consumer.runtime.start import shown
from consumer.sandbox.kafka import Arrival, Kafka
from consumer.storage import Append, Log, Stage
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Destination, Total

pytestmark = pytest.mark.kafka

KEY: Final = {"STRIPE_SECRET_KEY": "sk_test_nobody"}
HOUR: Final = 3_600_000
DEADLINE_S: Final = 30.0


def now() -> int:
    return time.time_ns() // 1_000_000


class Place:
    """A topic, a configuration and a store of a test's own."""

    def __init__(self, kafka: Kafka, directory: Path, *, arrival: Arrival = "log_append_time") -> None:
        self.servers = kafka.bootstrap_servers
        self.topic = f"commands-{uuid.uuid4().hex}"
        kafka.create_topic(self.topic, partitions=2, arrival=arrival, max_message_bytes=2_000_000)
        self.path = directory / "tallyman.db"
        self.config = directory / "tallyman.yaml"
        self.bill_from = now() - 2 * HOUR
        self.configure()
        self._wait_for_coordinator()

    def _wait_for_coordinator(self) -> None:
        """A cluster that has just begun needs a moment to appoint one for the group."""
        config = load(self.config, KEY)
        source = service.kafka_source(config, service.group_of(config))
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                source.committed([0])
            except SourceError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return

    def configure(self, **changes: Any) -> None:
        """Write the configuration anew, with changes to its sections."""
        value = changes.pop("value", "$.n")
        sections: dict[str, Any] = {
            "pipeline": self.topic,
            "bill_from": shown(self.bill_from),
            "kafka": {"bootstrap_servers": self.servers, "topic": self.topic},
            "storage": {"kind": "sqlite", "path": str(self.path)},
            "commit_every": "100ms",
            "stripe": {"livemode": False, "mode": "hold", "api_base": "http://127.0.0.1:1"},
            "http": {"host": "127.0.0.1", "port": 0},
            "meters": [
                {
                    "name": "used",
                    "event_types": ["used"],
                    "aggregation": "sum",
                    "value": value,
                    "stripe": {"event_name": "used"},
                }
            ],
        }
        for name, change in changes.items():
            sections[name] = {**sections[name], **change}
        self.config.write_text(yaml.safe_dump(sections))

    def tallyman(self, *words: str, **options: Any) -> Any:
        return CliRunner().invoke(app, [*words, "-c", str(self.config)], env=KEY, **options)

    def checked(self, env: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
        """What `check` finds: level and text of each finding; of two about the same, the last."""
        result = CliRunner().invoke(app, ["check", "--json", "-c", str(self.config)], env=KEY | (env or {}))
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert result.exit_code == (1 if any(each["level"] == "error" for each in found) else 0)
        return {each["what"]: (each["level"], each["says"]) for each in found}

    def send(self, *values: bytes, headers: list[tuple[str, bytes]] | None = None) -> None:
        """Records for partition 1."""
        producer = Producer({"bootstrap.servers": self.servers, "message.max.bytes": 2_000_000})
        for value in values:
            producer.produce(self.topic, value, b"alice", 1, headers=headers or [])  # type: ignore[arg-type]
        assert producer.flush(DEADLINE_S) == 0

    def records(self) -> list[Any]:
        """All records of partition 1."""
        consumer = Consumer({"bootstrap.servers": self.servers, "group.id": "any", "enable.partition.eof": True})
        consumer.assign([TopicPartition(self.topic, 1, 0)])
        found: list[Any] = []
        while (message := consumer.poll(DEADLINE_S)) is not None and message.error() is None:
            found.append(message)
        consumer.close()
        return found

    @contextmanager
    def store(self) -> Iterator[SqliteStore]:
        with SqliteStore.open(self.path, now=now, create=False, lock=False) as store:
            yield store

    def stage1(self) -> Aggregator:
        """Partition 1 as the last commit left it."""
        config = load(self.config, KEY)
        with self.store() as store:
            facts, restored = store.facts(), store.restore(Stage.AGGREGATE, 1)
            assert facts is not None
            assert restored is not None
            identity = Identity(facts.cluster_id, facts.topic_id, facts.pipeline, 1)
            return Aggregator(processors.rules_of(config, facts.bill_from), identity, restored.offset, restored.entries)

    def counted(self) -> tuple[int, str]:
        """Events and value that stage 1 has counted."""
        book = self.stage1().meter_books["used"]
        return book.events, totals.plain(book.value)

    @contextmanager
    def service(self) -> Iterator[None]:
        """The service in a process of its own, until it has started; it has to end in good order."""
        command = [sys.executable, "-m", "consumer", "run", "-c", str(self.config)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | KEY) as process:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if '"started"' in line:
                    break
            else:
                pytest.fail("".join(said))
            try:
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                rest = process.stderr.read()
                assert process.wait(DEADLINE_S) == 0, "".join(said) + rest

    def run_until(self, done: Callable[[], bool]) -> None:
        """The service until something is true."""
        with self.service():
            deadline = time.monotonic() + DEADLINE_S
            while not done():
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def read_to(self, offset: int) -> Callable[[], bool]:
        """Whether stage 1 has read partition 1 so far."""

        def read() -> bool:
            with self.store() as store:
                return store.offsets(Stage.AGGREGATE)[1] >= offset

        return read


@pytest.fixture
def place(kafka: Kafka, tmp_path: Path) -> Place:
    return Place(kafka, tmp_path)


def event(number: int, at: int | None, **changes: Any) -> bytes:
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": f"e{number}",
        "source": "/svc",
        "type": "used",
        "subject": "alice",
        "data": {"m": number},
    }
    if at is not None:
        attributes["time"] = datetime.fromtimestamp(at / 1000, UTC).isoformat()
    return json.dumps(attributes | changes).encode()


# check


def test_check_before_the_first_start_says_where_reading_would_begin_and_changes_nothing(place: Place) -> None:
    place.send(event(1, now()), event(2, now()))

    found = place.checked()

    assert found["kafka"][0] == "ok"
    assert f"{place.topic} has 2 partitions" in found["kafka"][1]
    assert found["arrival"] == ("ok", "the broker dates the records (LogAppendTime)")
    assert found["start"] == (
        "ok",
        f"a first start: events from {shown(place.bill_from)} on are billed, about 2 records are there",
    )
    assert found["storage"][1] == f"{place.path} does not exist yet; its directory is writable, in use by nobody"
    assert found["stripe"] == ("warning", "stripe.mode is hold: totals are kept and nothing is sent; send sends them")
    assert not place.path.exists()


def test_check_works_beside_the_running_service(place: Place) -> None:
    place.send(event(1, now()))
    with place.service():
        found = place.checked()

    assert "in use by pid" in found["storage"][1]
    assert found["start"][0] == "ok"
    assert found["start"][1].startswith(f"goes on where it stopped, billing since {shown(place.bill_from)}")
    assert "http" not in found


def test_check_names_the_cure_for_what_kafka_says(place: Place, kafka: Kafka) -> None:
    topic = place.topic
    place.configure(kafka={"topic": "nowhere"})
    assert place.checked()["kafka"] == (
        "error",
        f"the topic nowhere does not exist at {place.servers}: create it, or correct kafka.topic",
    )
    place.configure(kafka={"arrival": "create_time"})
    assert place.checked()["arrival"] == (
        "error",
        (
            f"kafka.arrival is create_time, but the topic {topic} has message.timestamp.type=LogAppendTime, which is "
            "better: set kafka.arrival: log_append_time."
        ),
    )
    dated = f"{topic}-dated"
    kafka.create_topic(dated, arrival="create_time")
    place.configure(kafka={"topic": dated})
    assert place.checked()["arrival"] == (
        "error",
        (
            f"the topic {dated} has message.timestamp.type=CreateTime: its producers date the records, and then a "
            "replay of the log need not give the same totals. Set message.timestamp.type=LogAppendTime on the topic, "
            "or kafka.arrival: create_time in the configuration to accept that."
        ),
    )


def test_check_judges_key_and_start_as_run_would(place: Place) -> None:
    place.bill_from = now() - 40 * 24 * HOUR
    place.configure()
    found = place.checked({"STRIPE_SECRET_KEY": "sk_live_1"})
    assert found["start"][0] == "error"
    assert "more than 34 days back: Stripe refuses older usage." in found["start"][1]
    place.configure(stripe={"mode": "send"})
    found = place.checked({"STRIPE_SECRET_KEY": ""})
    assert found["stripe"] == (
        "error",
        "there is no Stripe key: set STRIPE_SECRET_KEY, or STRIPE_SECRET_KEY_FILE to a file that holds it",
    )


def test_a_wrong_start_ends_the_service_with_a_message_and_no_traceback(place: Place) -> None:
    place.configure(kafka={"topic": "nowhere"})
    command = [sys.executable, "-m", "consumer", "run", "-c", str(place.config)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | KEY, check=False)
    assert (ended.returncode, json.loads(ended.stderr)["reason"]) == (
        1,
        f"the topic nowhere does not exist at {place.servers}: create it, or correct kafka.topic",
    )
    place.configure()
    without_key = {name: value for name, value in os.environ.items() if name != "STRIPE_SECRET_KEY"}
    ended = subprocess.run(command, capture_output=True, text=True, env=without_key, check=False)
    assert (ended.returncode, json.loads(ended.stderr)["reason"]) == (
        2,
        "there is no Stripe key: set STRIPE_SECRET_KEY, or STRIPE_SECRET_KEY_FILE to a file that holds it",
    )


# produce


def test_produce_writes_sample_events_that_are_counted(place: Place) -> None:
    result = place.tallyman("produce", "--rate", "2000", "--events", "500")

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"500 events written to {place.topic}: ")
    place.configure(stripe={"livemode": True, "api_base": "https://127.0.0.1:1"})
    refused = CliRunner().invoke(app, ["produce", "-c", str(place.config)], env={"STRIPE_SECRET_KEY": "sk_live_1"})
    assert (refused.exit_code, refused.stderr) == (
        2,
        "tallyman: stripe.livemode is true: sample events on this topic would be billed to real customers\n",
    )
    assert 0 < len(place.records()) < 500


# dead-letters redrive


def buried(place: Place) -> int:
    """Three events whose value is elsewhere: with a time, without one, in binary mode; returns their arrival."""
    place.send(event(1, now() - HOUR), event(2, None))
    place.send(
        b'{"m":3}',
        headers=[("ce_specversion", b"1.0"), ("ce_id", b"e3"), ("ce_source", b"/svc"), ("ce_type", b"used"),
                 ("ce_subject", b"alice"), ("content-type", b"application/json"), ("trace", b"t1")],
    )  # fmt: skip
    place.run_until(place.read_to(3))
    return int(place.records()[1].timestamp()[1])


def test_dead_letters_are_redriven_after_the_configuration_is_mended_and_count_once(place: Place) -> None:
    arrival = buried(place)
    assert place.stage1().book.dead == {"value_missing": 3}

    place.configure(value="$.m")
    dry = place.tallyman("dead-letters", "redrive", "--dry-run")
    assert dry.stdout == f"3 dead letters would be produced to {place.topic} again (3 value_missing)\n"
    assert len(place.records()) == 3
    done = place.tallyman("dead-letters", "redrive", "--yes")
    assert done.stdout == f"3 dead letters were produced to {place.topic} again (3 value_missing)\n"

    first, second, third = place.records()[3:]
    written = datetime.fromtimestamp(arrival / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert first.value() == place.records()[0].value()
    assert first.key() == b"alice"
    assert json.loads(second.value())["time"] == written
    assert dict(third.headers())["trace"] == b"t1"
    assert dict(third.headers())["ce_time"].endswith(b"Z")
    place.run_until(place.read_to(6))
    assert place.counted() == (3, "6")

    again = place.tallyman("dead-letters", "redrive", "--yes")
    assert again.stdout == (
        f"0 dead letters would be produced to {place.topic} again\n"
        "3 not, because they were redriven before: add --again to produce them once more\n"
    )


def test_a_redriven_event_stays_in_its_trace(place: Place) -> None:
    """Who looks at the request that it came from finds the letter, and whatever becomes of it later."""
    parent, hop = (f"00-{digit * 32}-{digit * 16}-01" for digit in "ab")
    place.send(event(1, now(), traceparent=parent, tracestate="shop=1"), headers=[("traceparent", hop.encode())])
    place.send(event(2, now()), headers=[("traceparent", hop.encode())])
    place.run_until(place.read_to(2))
    found = [json.loads(line) for line in place.tallyman("dead-letters", "list", "--json").stdout.splitlines()]
    traces = {each["id"]: (each["traceparent"], each["tracestate"]) for each in found}
    assert traces == {"e1": (parent, "shop=1"), "e2": (hop, None)}
    assert place.tallyman("dead-letters", "redrive", "--yes").exit_code == 0
    for before, again in zip(place.records()[:2], place.records()[2:], strict=True):
        assert (again.value(), again.headers()) == (before.value(), before.headers())


def test_a_crash_between_producing_and_marking_makes_duplicates_that_do_not_count(place: Place) -> None:
    buried(place)
    place.configure(value="$.m")
    assert place.tallyman("dead-letters", "redrive", "--yes").exit_code == 0
    with sqlite3.connect(place.path) as unmarked:
        unmarked.execute("UPDATE dead_letters SET redriven_at = NULL")
    unmarked.close()

    assert place.tallyman("dead-letters", "redrive", "--yes").exit_code == 0

    place.run_until(place.read_to(9))
    assert place.counted() == (3, "6")
    assert place.stage1().book.duplicate == 3


def test_letters_may_be_chosen_and_those_that_die_again_are_told(place: Place) -> None:
    buried(place)
    with place.store() as store:
        late = deadletters.DeadLetter(1, 0, now(), "late", "too late", b"alice", [], event(9, now() - 30 * HOUR))
        store.append([Append(Log.DEAD_LETTERS, b"1", deadletters.encode(late))])

    one = place.tallyman("dead-letters", "redrive", "2", "--dry-run")
    assert one.stdout == f"1 dead letters would be produced to {place.topic} again (1 value_missing)\n"
    dying = place.tallyman("dead-letters", "redrive", "--reason", "late", "--dry-run")
    assert dying.stderr == "1 were too late or in the future: unless accept_late was raised, they will be dead again\n"


def test_an_event_that_was_too_large_to_keep_is_read_from_its_topic(place: Place) -> None:
    place.send(event(1, now(), data={"text": "x" * 300_000, "m": 7}))
    place.run_until(place.read_to(1))
    place.configure(value="$.m")

    assert place.tallyman("dead-letters", "redrive", "--yes").exit_code == 0

    assert [len(each.value()) > 300_000 for each in place.records()] == [True, True]
    place.run_until(place.read_to(2))
    assert place.counted() == (1, "7")


def test_letters_that_are_old_or_gone_are_not_produced(place: Place) -> None:
    place.send(event(1, now()))
    place.run_until(place.read_to(1))
    old = deadletters.DeadLetter(1, 0, now() - 25 * HOUR, "value_missing", "", b"alice", [], event(1, None))
    gone = deadletters.DeadLetter(1, 77, now(), "value_missing", "")
    with place.store() as store:
        store.append(Append(Log.DEAD_LETTERS, b"1", deadletters.encode(each)) for each in (old, gone))

    result = place.tallyman("dead-letters", "redrive", "2", "3", "--yes")

    assert result.stdout == (
        f"0 dead letters would be produced to {place.topic} again\n"
        "1 not, because they are older than deduplicate_for: one that was redriven before would count twice; add "
        "--even-old if you know that none was\n"
        "1 not, because they were kept in the topic alone and are gone from it: 3\n"
    )
    assert "1 dead letters would" in place.tallyman("dead-letters", "redrive", "2", "--even-old", "--dry-run").stdout


def test_one_letter_that_the_broker_refuses_does_not_hold_up_the_others(place: Place) -> None:
    buried(place)
    huge = deadletters.DeadLetter(
        1, 0, now(), "value_missing", "", b"alice", [], event(4, now(), x=os.urandom(3_000_000).hex())
    )
    with place.store() as store:
        store.append([Append(Log.DEAD_LETTERS, b"1", deadletters.encode(huge))])

    result = place.tallyman("dead-letters", "redrive", "--yes")

    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        f"3 dead letters were produced to {place.topic} again (3 value_missing)",
        "1 not, because the broker refuses them (is max.message.bytes smaller than it was?): 4",
    ]
    assert len(place.records()) == 6


# reset


def test_reset_archives_the_state_and_begins_anew_where_nothing_is_billed_twice(place: Place) -> None:
    place.send(event(1, now(), data={"n": 5}))
    place.run_until(place.read_to(1))
    newest = now() // 60_000 * 60 - 3600
    with place.store() as store:
        to = Destination("used")
        billed = Total("tm1-x", place.topic, "used", "e", 1, newest, "1m", 0, 0, "alice", "2.5", 1, newest, 0, 0, to)
        store.append([Append(Log.TOTALS, b"alice", totals.encode(billed))])
    early, right = shown(newest * 1000), shown((newest + 60) * 1000)

    refused = place.tallyman("reset", "--bill-from", early, "--yes")
    assert (refused.exit_code, refused.stdout, refused.stderr) == (
        2,
        "",
        (
            f"tallyman: --bill-from {early} is before the end of the newest window that has a total: what lies between "
            f"would be billed twice. The earliest time possible is {right}.\n"
        ),
    )
    declined = place.tallyman("reset", "--bill-from", right, input="n\n")
    assert declined.exit_code == 1
    table = [line.split() for line in declined.stdout.splitlines()]
    assert ["used", "1", "2.5", "0", "0", "1", "5"] in table
    with place.store() as store:
        assert store.end(Log.TOTALS) > 1

    done = place.tallyman("reset", "--bill-from", right, "--yes")

    assert done.exit_code == 0, done.output
    (archive,) = place.path.parent.glob("tallyman.db.before-*[0-9]")
    assert f"The state that there was is in {archive}.\n" in done.stdout
    assert done.stdout.endswith(
        f"{place.topic} begins anew. Set bill_from: {right} in {place.config}, then start with `tallyman run`.\n"
    )
    assert place.checked()["start"][1].startswith(f"bill_from is {shown(place.bill_from)}, but the pipeline started")
    place.bill_from = (newest + 60) * 1000
    place.configure()
    place.run_until(place.read_to(1))
    assert place.counted() == (1, "5")


def test_reset_after_the_file_was_lost_needs_a_promise(place: Place) -> None:
    place.send(event(1, now(), data={"n": 5}))
    place.run_until(place.read_to(1))
    for file in place.path.parent.glob("tallyman.db*"):
        file.unlink()
    assert "holds no state, but the consumer group" in place.checked()["start"][1]
    when = shown(now() - HOUR)

    refused = place.tallyman("reset", "--bill-from", when, "--yes")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"tallyman: {place.path} is not there, so nobody knows here up to when")
    done = place.tallyman("reset", "--bill-from", when, "--yes", "--newest-total-unknown")

    assert done.exit_code == 0, done.output
    place.configure()
    place.config.write_text(place.config.read_text().replace(shown(place.bill_from), when))
    place.run_until(place.read_to(1))
    assert place.counted() == (1, "5")


def test_there_is_nothing_to_reset_before_the_first_start(place: Place) -> None:
    when = shown(now() - HOUR)

    refused = place.tallyman("reset", "--bill-from", when, "--yes")

    assert (refused.exit_code, refused.stderr) == (
        2,
        (
            f"tallyman: {place.path} is not there, and this pipeline has not run before: there is nothing to start "
            f"over. Set bill_from: {when} in the configuration and start with `tallyman run`.\n"
        ),
    )
