"""What operators do, on either store: the same stories; and what only Kafka's can be asked."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions
from typer.testing import CliRunner

from consumer import totals
from consumer.cli import app
from consumer.deadletters import DeadLetter
from consumer.deliver.answers import Heard
from consumer.deliver.delivery import Attempt
from consumer.runtime import audit, processors
from consumer.runtime.start import shown
from consumer.sandbox.kafka import Kafka
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.sandbox.stripe_wire import read_call
from consumer.storage import (
    Archive,
    Changes,
    Facts,
    Log,
    Logged,
    Refused,
    Restored,
    Stage,
    StorageError,
    kafka_reset,
    kafka_transactions,
)
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_client import reader
from consumer.storage.kafka_reading import committed, ends_of, logged, witnessed
from consumer.storage.kafka_records import POSITION_KEY, mark_in
from consumer.storage.kafka_reset import Standing, standing, start_over
from consumer.storage.kafka_start import positions, recorded
from consumer.storage.kafka_topics import partitions_of, present
from consumer.totals import Command
from tests.kafka.harness import HOUR, Topic, bench, iso, past_events, real_now, until
from tests.kafka.operators import KNOWN, PARTITIONS, T0, Desk, KafkaDesk, SqliteDesk, go_round, heard, now, total
from tests.unit.delivery_world import OK, duplicate
from tests.unit.stage2 import post

pytestmark = pytest.mark.kafka

AGGREGATE, DELIVER = Stage.AGGREGATE, Stage.DELIVER
RIGHT = shown((T0 + 40 * 60) * 1000)
"""A time after all totals."""


@pytest.fixture(params=[SqliteDesk, KafkaDesk])
def desk(request: pytest.FixtureRequest, kafka: Kafka, tmp_path: Path) -> Desk:
    made: Desk = request.param(kafka, tmp_path)
    made.begin()
    return made


@pytest.fixture
def topics_desk(kafka: Kafka, tmp_path: Path) -> KafkaDesk:
    made = KafkaDesk(kafka, tmp_path)
    made.begin()
    return made


def busy(desk: Desk) -> None:
    """Totals of many customers, in every state that there is without a person; some unread."""
    desk.close(*(total(n, f"cus{n}") for n in range(8)), total(8, "free"), total(9, "cus9", value="0"))
    desk.close(total(10, "gone"), total(11, "nobody"))
    desk.deliver()
    desk.close(total(12, "cus12"), total(13, "cus13"))


BUSY: dict[str, str] = (
    {f"tm1-{n}-cus{n}": "delivered" for n in range(8)}
    | {"tm1-8-free": "unbilled", "tm1-9-cus9": "zero", "tm1-10-gone": "parked", "tm1-11-nobody": "parked"}
    | {"tm1-12-cus12": "pending", "tm1-13-cus13": "pending"}
)


# Totals and decisions


def test_every_total_is_shown_once_with_where_it_stands_and_decisions_are_applied(desk: Desk) -> None:
    busy(desk)
    assert desk.standing() == BUSY
    assert desk.standing("--state", "parked") == {"tm1-10-gone": "parked", "tm1-11-nobody": "parked"}
    assert desk.standing("--customer", "cus3") == {"tm1-3-cus3": "delivered"}
    assert {each["identifier"] for each in desk.answer("parked", "list", "--limit", "0")} == {
        "tm1-10-gone",
        "tm1-11-nobody",
    }
    assert "REFUSED" not in desk.tallyman("parked", "show", "tm1-10-gone").stdout

    alone = desk.tallyman("parked", "discard", "tm1-11-nobody", "--why", "a test customer", "--by", "ann")

    assert alone.stdout == (
        "tm1-11-nobody: not applied yet\n"
        "no service is running: the decision is in the log, and is applied as soon as a service reads it\n"
    )
    with desk.running({**KNOWN, "gone": "cus_here"}):
        released = desk.tallyman("parked", "release", "tm1-10-gone")
        until(lambda: "pending" not in desk.standing().values(), "all is read")
    assert released.stdout == "tm1-10-gone: delivered: 5 to cus_here\n"
    assert desk.standing() == BUSY | {
        "tm1-10-gone": "delivered",
        "tm1-11-nobody": "discarded",
        "tm1-12-cus12": "delivered",
        "tm1-13-cus13": "delivered",
    }


def test_what_was_appended_since_a_time_is_read_from_there_on(desk: Desk) -> None:
    desk.close(*(total(n, f"cus{n}") for n in range(6)))
    between = real_now() + 1
    until(lambda: real_now() > between, "time goes by")
    with desk.archive() as archive:
        middle = archive.ends(Log.TOTALS)
    desk.close(*(total(n, f"cus{n}") for n in range(6, 12)))
    with desk.archive() as archive:
        everything = archive.since(Log.TOTALS, T0 * 1000)
        assert len(list(archive.logged(Log.TOTALS, everything))) == len(list(archive.logged(Log.TOTALS)))
        later = archive.since(Log.TOTALS, between)
        names = {r.identifier for r in map(decoded, archive.logged(Log.TOTALS, later)) if isinstance(r, totals.Total)}
        assert names == {f"tm1-{n}-cus{n}" for n in range(6, 12)}
        assert all(later[partition] <= end for partition, end in middle.items()), "a transaction's marker is no record"
        assert archive.since(Log.TOTALS, real_now() + HOUR) == archive.ends(Log.TOTALS)
        assert archive.since(Log.DEAD_LETTERS, T0 * 1000) == archive.ends(Log.DEAD_LETTERS)


def decoded(record: Logged) -> totals.Record:
    return totals.decode(record.value)


def test_a_decision_lies_behind_its_total_in_the_same_partition(desk: Desk) -> None:
    desk.close(*(total(n, f"lost{n}") for n in range(12)))
    desk.deliver()

    assert desk.tallyman("parked", "discard", "--meter", "tokens", "--why", "tests", "--yes").exit_code == 0

    with desk.archive() as archive:
        found = list(archive.logged(Log.TOTALS))
    records = [(each, totals.decode(each.value)) for each in found]
    of_total = {r.identifier: each for each, r in records if isinstance(r, totals.Total)}
    decided = {r.identifier: each for each, r in records if isinstance(r, Command)}
    assert decided.keys() == of_total.keys()
    for identifier, each in decided.items():
        assert (each.partition, each.key) == (of_total[identifier].partition, of_total[identifier].key)
        assert each.offset > of_total[identifier].offset
    desk.deliver()
    assert set(desk.standing().values()) == {"discarded"}


def test_a_doubt_is_settled_by_stripes_sums_or_by_a_person_and_its_story_is_told(desk: Desk) -> None:
    """Of two totals Stripe said that it had them before. It has the first one."""

    def collide(attempt: Attempt) -> Heard:
        return OK if attempt.stripe_customer == "cus_2" else duplicate(attempt.identifier)

    with StripeStandIn(keys={"sk_test_nobody": None}, accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        desk.configure(stripe={"livemode": False, "api_base": stripe.url})
        desk.close(*(total(number, f"cus{number}") for number in range(3)))
        desk.deliver(collide)
        there = f"event_name=tokens&payload[stripe_customer_id]=cus_0&payload[value]=5&timestamp={T0 + 7}"
        stripe.model.handle(read_call("POST", "/v1/billing/meter_events", there, "Bearer sk_test_nobody"))

        shown = {name: desk.answer("parked", "show", name)[0] for name in ("tm1-0-cus0", "tm1-1-cus1")}
        advice = {name: each["recommendation"]["advice"] for name, each in shown.items()}
        assert advice == {"tm1-0-cus0": "discard", "tm1-1-cus1": "wait"}
        assert desk.tallyman("parked", "discard", "tm1-0-cus0", "--why", "it is there").exit_code == 0
        assert desk.tallyman("parked", "release", "tm1-1-cus1").exit_code == 2
        known_better = desk.tallyman("parked", "release", "tm1-1-cus1", "--despite-doubt", "--why", "an old state")
        assert known_better.exit_code == 0

    sent: list[str] = []

    def note(attempt: Attempt) -> Heard:
        sent.append(attempt.identifier)
        return OK

    desk.deliver(note)
    assert sent == ["tm1-1-cus1-g2"]
    assert set(desk.standing().items()) == {
        ("tm1-0-cus0", "delivered"),
        ("tm1-1-cus1", "delivered"),
        ("tm1-2-cus2", "delivered"),
    }
    (story,) = desk.answer("totals", "--explain", "tm1-1-cus1-g2")
    assert [(each["identifier"], each["at_stripe"]) for each in story["generations"]] == [
        ("tm1-1-cus1", "maybe"),
        ("tm1-1-cus1-g2", "yes"),
    ]
    assert [(each["action"], each["reason"], each["carried_out"]) for each in story["decisions"]] == [
        ("release", "an old state", "yes")
    ]
    assert (story["first_offset"], story["last_offset"]) == (0, 9)


def test_what_stripe_lacks_is_found_and_where_it_came_from(desk: Desk) -> None:
    """Stripe said yes to three totals, and counts two of them."""
    with StripeStandIn(keys={"sk_test_nobody": None}, accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        desk.configure(stripe={"livemode": False, "api_base": stripe.url})

        def take(attempt: Attempt) -> Heard:
            if attempt.stripe_customer != "cus_1":
                assert post(stripe, attempt, "sk_test_nobody").status == 200
            return OK

        desk.close(*(total(number, f"cus{number}") for number in range(3)))
        desk.deliver(take)
        stripe.clock.advance(26 * 3600)
        result = desk.tallyman("reconcile", "--json")

    assert result.exit_code == 1, result.output
    day, compared = map(json.loads, result.stdout.splitlines())
    assert (day["customer"], day["ours"], day["stripe"], day["state"]) == ("cus_1", "5", "0", "differs")
    ((part,),) = (hour["totals"] for hour in day["hours"])
    assert (part["identifier"], part["partition"], part["last_offset"]) == ("tm1-1-cus1", 0, 9)
    assert (compared["equal"], compared["differs"], compared["open"]) == (2, 1, 0)


MOMENTS: dict[type[Desk], tuple[int, ...]] = {SqliteDesk: tuple(range(11)), KafkaDesk: (1, 3, 5, 6)}
"""Before which question it happens: of these at a topic, the others are between questions that do not differ."""


class Watched:
    """An archive beside which something happens at one of the moments at which it is asked."""

    def __init__(self, archive: Archive, at: int, happens: Callable[[], None]) -> None:
        self._archive, self._at, self._happens, self.asked = archive, at, happens, 0

    def _ask(self) -> None:
        if self.asked == self._at:
            self._happens()
        self.asked += 1

    def facts(self) -> Facts | None:
        return self._archive.facts()

    def restore(self, stage: Stage, partition: int) -> Restored | None:
        self._ask()
        return self._archive.restore(stage, partition)

    def ends(self, log: Log) -> dict[int, int]:
        self._ask()
        return self._archive.ends(log)

    def settled(self, log: Log) -> dict[int, int]:
        self._ask()
        return self._archive.settled(log)

    def logged(self, log: Log, *places: Mapping[int, int]) -> Iterator[Logged]:
        self._ask()
        yield from self._archive.logged(log, *places)
        self._ask()


def test_totals_that_move_while_they_are_read_are_neither_missed_nor_shown_twice(desk: Desk) -> None:
    """Whenever it happens: some are finished that were parked or unread, and others are read and parked."""
    with desk.serving() as store, desk.archive() as archive:
        for moment in MOMENTS[type(desk)]:
            first = 100 * moment
            before = [total(first + n, f"cus{n}") for n in range(4)] + [total(first + 4, "nobody")]
            unread = [total(first + 10 + n, f"cus{n}") for n in range(4)] + [total(first + 14, "nobody")]
            desk.close(*before)
            go_round(store, archive, heard, {})
            desk.close(*unread)
            watched = Watched(archive, moment, lambda: go_round(store, archive, heard, KNOWN))

            found = [line.identifier for line in audit.lines(cast("Archive", watched), audit.Wanted())]

            assert watched.asked > moment, "it has happened"
            assert len(found) == len(set(found)), moment
            assert {each.identifier for each in before + unread} <= set(found), moment


def test_an_outcome_whose_commit_is_not_decided_is_waited_for(topics_desk: KafkaDesk) -> None:
    """It lies below the end and above what is settled; its total is shown once, whatever becomes of it."""
    topics_desk.close(total(1, "cus1"))
    topics_desk.deliver()
    with topics_desk.archive() as archive:
        ends = archive.ends(Log.OUTCOMES)
        writer = kafka_transactions.Transactions(topics_desk.client, "somebody", within=10.0)
        producer = writer._fresh()
        producer.begin_transaction()
        for partition in range(PARTITIONS):
            producer.produce(topics_desk.topics.outcomes, b"{}", b"k", partition)
        assert producer.flush(20.0) == 0

        assert archive.settled(Log.OUTCOMES) == ends
        assert all(archive.ends(Log.OUTCOMES)[p] > end for p, end in ends.items())
        producer.abort_transaction()
        assert topics_desk.standing() == {"tm1-1-cus1": "delivered"}


# Dead letters

EVENT = b'{"specversion":"1.0","id":"e1","source":"/svc","type":"used","subject":"alice","data":{"m":1}}'


def letter(number: int, **changes: Any) -> DeadLetter:
    """One for each source partition in turn."""
    usual: dict[str, Any] = {"key": b"alice", "headers": [], "value": EVENT.replace(b"e1", b"e%d" % number)}
    return DeadLetter(number % PARTITIONS, number, now(), "value_missing", "$.n is not there", **(usual | changes))


def records(desk: Desk) -> dict[int, list[bytes]]:
    """Keys and values on the source, by partition."""
    consumer = Consumer(
        {"bootstrap.servers": desk.kafka.bootstrap_servers, "group.id": "any", "enable.partition.eof": True}
    )
    found: dict[int, list[bytes]] = {}
    for partition in range(PARTITIONS):
        consumer.assign([TopicPartition(desk.topic, partition, 0)])
        while (message := consumer.poll(30.0)) is not None and message.error() is None:
            found.setdefault(partition, []).append(message.value() or b"")
    consumer.close()
    return found


def test_dead_letters_have_numbers_of_their_own_and_are_redriven_once(desk: Desk) -> None:
    desk.bury(*(letter(n) for n in range(1, 8)))
    listed = desk.answer("dead-letters", "list", "--limit", "0")
    numbers = {each["id"]: each["number"] for each in listed}
    assert len(set(numbers.values())) == len(numbers) == 7
    for name, number in numbers.items():
        (shown_one,) = desk.answer("dead-letters", "show", str(number))
        assert (shown_one["id"], shown_one["number"], shown_one["redriven_at"]) == (name, number, None)
    unknown = max(numbers.values()) + 1000
    assert f"there is no dead letter {unknown}" in desk.tallyman("dead-letters", "show", str(unknown)).stderr

    chosen = desk.tallyman("dead-letters", "redrive", str(numbers["e2"]), str(numbers["e7"]), "--yes")
    assert chosen.stdout == f"2 dead letters were produced to {desk.topic} again (2 value_missing)\n"
    desk.bury(letter(8))
    rest = desk.tallyman("dead-letters", "redrive", "--yes")

    assert rest.stdout == (
        f"6 dead letters were produced to {desk.topic} again (6 value_missing)\n"
        "2 not, because they were redriven before: add --again to produce them once more\n"
    )
    ids = {partition: [json.loads(each)["id"] for each in values] for partition, values in records(desk).items()}
    assert {p: sorted(found) for p, found in ids.items()} == {
        0: ["e3", "e6"],
        1: ["e1", "e4", "e7"],
        2: ["e2", "e5", "e8"],
    }
    after = desk.answer("dead-letters", "list", "--limit", "0")
    assert all(abs(each["redriven_at"] - now()) < HOUR for each in after)
    assert {each["id"]: each["number"] for each in after if each["id"] != "e8"} == numbers
    newest = desk.answer("dead-letters", "list", "--limit", "1")
    assert [each["id"] for each in newest] == ["e8"]
    again = desk.tallyman("dead-letters", "redrive", str(numbers["e1"]), "--again", "--yes")
    assert again.stdout.startswith("1 dead letters were")


def test_marks_are_records_behind_their_letters_and_no_letters_themselves(topics_desk: KafkaDesk) -> None:
    topics_desk.bury(letter(1), letter(2), letter(4))
    assert topics_desk.tallyman("dead-letters", "redrive", "--yes").exit_code == 0

    consumer = Consumer(
        topics_desk.client | {"group.id": "any", "enable.partition.eof": True, "auto.offset.reset": "earliest"}
    )
    consumer.assign([TopicPartition(topics_desk.topics.dead_letters, p, 0) for p in range(PARTITIONS)])
    left, marks = PARTITIONS, {}
    while left:
        message = consumer.poll(30.0)
        assert message is not None
        if message.error() is not None:
            left -= 1
        elif (mark := mark_in(message.value() or b"")) is not None:
            marks[message.partition()] = mark
            assert dict(cast("Any", message.headers()))["ce_type"] == b"tallyman.redriven.v1"
            assert all(offset < cast("int", message.offset()) for offset in mark.offsets)
    consumer.close()

    found = list(logged(topics_desk.client, topics_desk.topics, Log.DEAD_LETTERS))
    assert sorted((p, offset) for p, mark in marks.items() for offset in mark.offsets) == sorted(
        (each.partition, each.offset) for each in found
    )
    assert all(mark.partition == partition for partition, mark in marks.items())


def test_letters_from_before_a_reset_are_not_redriven_unasked(topics_desk: KafkaDesk) -> None:
    """They stay in their log. An event that was too large to be kept may not be what lies at its offset now."""
    topics_desk.bury(letter(1), letter(2, value=None))
    assert topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes").exit_code == 0
    topics_desk.bury(letter(3))

    done = topics_desk.tallyman("dead-letters", "redrive", "--yes")

    assert done.stdout.startswith(
        f"1 dead letters were produced to {topics_desk.topic} again (1 value_missing)\n"
        "2 not, because they are from before the pipeline began anew"
    )
    assert [each["redriven_at"] is None for each in topics_desk.answer("dead-letters", "list")] == [False, True, True]
    forced = topics_desk.tallyman("dead-letters", "redrive", "--even-old", "--yes")
    assert forced.stdout.startswith("1 dead letters were produced")
    assert "1 not, because they were kept in the topic alone and are gone from it" in forced.stdout


# Starting over


def test_starting_over_gives_up_what_is_not_delivered_and_sends_none_of_it(desk: Desk) -> None:
    busy(desk)
    early = shown((T0 + 60) * 1000)
    refused = desk.tallyman("reset", "--bill-from", early, "--yes")
    assert (refused.exit_code, refused.stdout) == (2, "")
    earliest = shown((T0 + 14 * 60) * 1000)
    assert refused.stderr.endswith(f"would be billed twice. The earliest time possible is {earliest}.\n")
    declined = desk.tallyman("reset", "--bill-from", earliest, input="n\n")
    assert declined.exit_code == 1
    table = [line.split() for line in declined.stdout.splitlines()]
    assert ["tokens", "2", "10", "2", "10", "0", "0"] in table
    assert desk.standing() == BUSY

    done = desk.tallyman("reset", "--bill-from", earliest, "--yes")

    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(
        f"{desk.pipeline} begins anew. Set bill_from: {earliest} in {desk.file}, then start with `tallyman run`.\n"
    )
    assert "but the pipeline started with" in desk.checked()["start"][1]
    desk.bill_from = (T0 + 14 * 60) * 1000
    desk.configure()
    assert desk.checked()["start"][0] == "ok"
    assert not {"pending", "parked"} & set(desk.standing().values())
    sent: list[str] = []

    def answer(attempt: Attempt) -> Heard:
        sent.append(attempt.identifier)
        return OK

    desk.close(total(20, "cus2"))
    desk.deliver(answer)
    assert sent == ["tm1-20-cus2"]
    assert desk.standing()["tm1-20-cus2"] == "delivered"


def test_in_topics_what_was_billed_stays_to_be_seen_and_the_group_stands_where_the_state_does(
    topics_desk: KafkaDesk,
) -> None:
    busy(topics_desk)
    before, commits = topics_desk.facts(), numbers_of_commits(topics_desk)
    done = topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes")
    assert f"What there was before stays in {topics_desk.topics.totals}, " in done.stdout

    assert topics_desk.standing() == {
        name: how for name, how in BUSY.items() if how in {"delivered", "unbilled", "zero"}
    }
    client, topics, after = topics_desk.client, topics_desk.topics, topics_desk.facts()
    assert (after.bill_from, after.partitions) == ((T0 + 40 * 60) * 1000, PARTITIONS)
    assert after.created_at > before.created_at
    assert numbers_of_commits(topics_desk) == {place: number + 1 for place, number in commits.items()}
    with topics_desk.archive() as archive:
        ends = archive.ends(Log.TOTALS)
    for stage in Stage:
        at = {p: each.offset for p, each in positions(client, topics, stage).items()}
        assert at == witnessed(client, topics, stage, topics_desk.topic, range(PARTITIONS))
        assert stage is AGGREGATE or at == ends
    assert kept_by_compaction(topics_desk, DELIVER) == {POSITION_KEY}
    with topics_desk.serving(*Stage) as store:
        for stage in Stage:
            left = {partition: store.restore(stage, partition) for partition in range(PARTITIONS)}
            assert stage is AGGREGATE or not [key for each in left.values() if each for key, _ in each.entries]
            store.commit(stage, {p: Changes(each.offset, {b"k": b"v"}) for p, each in left.items() if each})
            assert all(store.restore(stage, partition) for partition in range(PARTITIONS))


def kept_by_compaction(desk: KafkaDesk, stage: Stage) -> set[bytes]:
    """The keys of a state that have a value."""
    topic = desk.topics.state(stage)
    ends = ends_of(desk.client, topic, range(PARTITIONS))
    values: dict[tuple[int, bytes], bytes | None] = {}
    for batch in committed(desk.client, topic, dict.fromkeys(ends, 0), ends):
        values |= {(each.partition(), each.key()): each.value() for each in batch}
    return {key for (_, key), value in values.items() if value is not None}


def numbers_of_commits(desk: KafkaDesk) -> dict[tuple[Stage, int], int]:
    return {
        (stage, partition): each.sequence
        for stage in Stage
        for partition, each in positions(desk.client, desk.topics, stage).items()
    }


@pytest.mark.parametrize("stage", Stage)
def test_nobody_starts_over_while_a_service_runs(topics_desk: KafkaDesk, stage: Stage) -> None:
    with topics_desk.serving(stage) as store:
        store.restore(stage, 0)
        for answers in ({"input": "y\n"}, {}):
            words = ["--yes"] if not answers else []
            refused = topics_desk.tallyman("reset", "--bill-from", RIGHT, *words, **answers)
            assert refused.exit_code == 1
            assert refused.stderr.startswith(f"tallyman: the group {topics_desk.topics.group(stage)} has 1 member (")
        store.commit(stage, {0: Changes(1)})


def test_who_had_a_partition_before_cannot_commit_it_afterwards(topics_desk: KafkaDesk) -> None:
    member = topics_desk.member(DELIVER)
    old = topics_desk.facts()
    zombie = KafkaStore(topics_desk.client, old, {DELIVER: lambda: metadata})
    metadata = member.metadata()
    zombie.restore(DELIVER, 0)
    member.close()
    topics_desk.until_vacant()

    assert topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes").exit_code == 0

    with pytest.raises(Refused):
        zombie.commit(DELIVER, {0: Changes(7, {b"k": b"late"})})
    zombie.close()
    with topics_desk.archive() as archive:
        left = archive.restore(DELIVER, 0)
    assert left is not None
    assert not dict(left.entries)


def test_what_has_changed_since_it_was_judged_is_not_given_up(topics_desk: KafkaDesk) -> None:
    seen = seen_of(topics_desk)
    busy(topics_desk)

    with pytest.raises(StorageError, match=r"has changed since it was judged what is given up"):
        anew(topics_desk, seen)

    assert topics_desk.standing() == BUSY


class Interrupted(dict[int, Changes]):
    """First commits; when they are first asked for, something happens."""

    happens: Callable[[], None] | None = None

    def items(self) -> Any:
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return super().items()


def test_a_service_that_comes_while_somebody_starts_over_keeps_what_it_has(topics_desk: KafkaDesk) -> None:
    """It joins when it has been seen that there is none, and takes its partitions over before the offsets are held."""
    with ExitStack() as later:
        stores: list[KafkaStore] = []

        def happens() -> None:
            stores.append(later.enter_context(topics_desk.serving()))
            stores[0].restore(DELIVER, 0)

        topic, at = topics_desk.source.describe(), (T0 + 40 * 60) * 1000
        changes = Interrupted(processors.first_commits(topics_desk.config, topic, at, dict.fromkeys(range(3), 0)))
        changes.happens = happens
        facts, seen = replace(topics_desk.facts(), bill_from=at, created_at=now()), seen_of(topics_desk)

        with pytest.raises(StorageError, match="has 1 member"):
            start_over(topics_desk.client, facts, changes, seen)

        stores[0].commit(DELIVER, {0: Changes(3, {b"k": b"v"})})
        left = stores[0].restore(DELIVER, 0)
        assert left is not None
        assert (left.offset, dict(left.entries)) == (3, {b"k": b"v"})


def test_offsets_that_are_held_are_told_to_nobody_until_it_is_decided(topics_desk: KafkaDesk) -> None:
    client, topics = topics_desk.client, topics_desk.topics
    place, group = TopicPartition(topics.totals, 0, 5), topics.group(DELIVER)
    record = kafka_transactions.Record(topics.outcomes, 0, b"k", b"{}")

    def held() -> None:
        with closing(reader(client, group, committed=True)) as other, pytest.raises(KafkaException):
            other.committed([place], timeout=0.5)
        raise LookupError

    with (
        closing(reader(client, group, committed=True)) as nobody,
        closing(kafka_transactions.Transactions(client, topics.pipeline, within=10.0)) as transactions,
    ):
        offsets = kafka_transactions.Offsets([place], nobody.consumer_group_metadata())
        with pytest.raises(LookupError):
            transactions.run([record], offsets, held=held)
        assert witnessed(client, topics, DELIVER, "", range(1)) == {}
        transactions.run([record], offsets, held=lambda: None)
    assert witnessed(client, topics, DELIVER, "", range(1)) == {0: 5}
    assert [each.offset for each in logged(client, topics, Log.OUTCOMES)] == [0]


def seen_of(desk: KafkaDesk) -> Standing:
    return standing(desk.client, desk.topics, present(desk.client, desk.topics))


def anew(desk: KafkaDesk, seen: Standing, *, bill_from: int = (T0 + 40 * 60) * 1000, created_at: int = 0) -> Facts:
    """Start over, as the command does when it has judged."""
    topic = desk.source.describe()
    facts = Facts(
        desk.pipeline, topic.cluster_id, topic.name, topic.topic_id, bill_from, topic.partitions, created_at or now()
    )
    changes = processors.first_commits(desk.config, topic, bill_from, dict.fromkeys(range(topic.partitions), 0))
    start_over(desk.client, facts, changes, seen)
    return facts


def test_of_two_who_start_over_at_once_one_does(topics_desk: KafkaDesk) -> None:
    busy(topics_desk)
    seen = seen_of(topics_desk)
    with ThreadPoolExecutor(2) as people:
        asked = [people.submit(anew, topics_desk, seen, created_at=at) for at in (1, 2)]
        failed = [each.exception() for each in asked]

    (refusal,) = [each for each in failed if each is not None]
    assert isinstance(refusal, StorageError)
    assert "another reset" in str(refusal)
    (done,) = [each.result() for each, error in zip(asked, failed, strict=True) if error is None]
    assert recorded(topics_desk.client, topics_desk.topics) == done
    for stage in Stage:
        assert {each.facts for each in positions(topics_desk.client, topics_desk.topics, stage).values()} == {done}


def _killed(file: Path, servers: str, pipeline: str, bill_from: int, when: str) -> None:
    """Start over, and die: with all written and nothing committed, or just committed."""
    desk = KafkaDesk.__new__(KafkaDesk)
    desk.kafka, desk.file, desk.pipeline, desk.topic = Kafka(servers), file, pipeline, f"usage-{pipeline}"

    class Dying(Producer):
        def commit_transaction(self, *given: float) -> None:
            if when == "after":
                super().commit_transaction(*given)
            os.kill(os.getpid(), signal.SIGKILL)

    kafka_reset.TRANSACTION_S = 300  # type: ignore[attr-defined]  # nobody waits until its time is over
    kafka_transactions.Producer = Dying  # type: ignore[attr-defined]  # in a process that ends with it
    anew(desk, seen_of(desk), bill_from=bill_from)


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_dies_while_starting_over_leaves_the_old_state_or_the_new_one(topics_desk: KafkaDesk, when: str) -> None:
    busy(topics_desk)
    old = topics_desk.facts()
    anew_from = (T0 + 40 * 60) * 1000
    given = topics_desk.file, topics_desk.kafka.bootstrap_servers, topics_desk.pipeline, anew_from, when
    child = multiprocessing.get_context("forkserver").Process(target=_killed, args=given)
    child.start()
    child.join(60.0)
    assert child.exitcode == -signal.SIGKILL

    # Asking ends what the dead one has left open.
    declined = topics_desk.tallyman("reset", "--bill-from", RIGHT, input="n\n")

    assert declined.exit_code == 1, declined.output
    if when == "before":
        assert topics_desk.facts() == old
        assert topics_desk.standing() == BUSY
    else:
        assert topics_desk.facts().bill_from == anew_from
        assert "parked" not in topics_desk.standing().values()
    assert topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes").exit_code == 0
    topics_desk.close(total(60, "cus1"))
    topics_desk.deliver()
    assert topics_desk.standing()["tm1-60-cus1"] == "delivered"


def test_a_state_that_two_have_written_is_cured_by_starting_over(topics_desk: KafkaDesk) -> None:
    with topics_desk.serving() as one:
        other = KafkaStore(topics_desk.client, topics_desk.facts(), {DELIVER: one._members[DELIVER]})
        for each in (one, other):
            each.restore(DELIVER, 0)
            each.commit(DELIVER, {0: Changes(0, {b"k": b"v"})}) if each is other else None
        one.commit(DELIVER, {0: Changes(0, {b"k": b"w"})})
        other.close()
    topics_desk.until_vacant()
    damaged = topics_desk.tallyman("totals", "--json")
    assert damaged.exit_code == 1
    assert "two processes have written it" in damaged.stderr
    refused = topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes")
    assert refused.exit_code == 2
    assert "so nobody knows here up to when usage has been billed" in refused.stderr

    done = topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes", "--newest-total-unknown")

    assert done.exit_code == 0, done.output
    topics_desk.close(total(60, "cus1"))
    topics_desk.deliver()
    assert topics_desk.standing() == {"tm1-60-cus1": "delivered"}


def test_after_topics_were_deleted_starting_over_needs_a_promise(topics_desk: KafkaDesk) -> None:
    busy(topics_desk)
    topics = topics_desk.topics
    delete(topics_desk, topics.aggregate_state, topics.totals)
    missing = f"{topics.aggregate_state}, {topics.totals} are not there"
    checked = topics_desk.checked()
    assert checked["storage"][1].startswith(f"{missing}, but the pipeline has run")
    assert topics_desk.tallyman("totals", "--json").stderr.startswith(
        f"tallyman: {topics.aggregate_state}, {topics.totals} do not exist at "
    )

    refused = topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"tallyman: {missing}, so nobody knows here")
    done = topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes", "--newest-total-unknown")

    assert done.exit_code == 0, done.output
    topics_desk.close(total(60, "cus1"))
    topics_desk.deliver()
    assert topics_desk.standing()["tm1-60-cus1"] == "delivered"
    assert "parked" not in topics_desk.standing().values()


def delete(desk: KafkaDesk, *names: str) -> None:
    admin = AdminClient(desk.client)
    for each in admin.delete_topics(list(names)).values():
        each.result(30.0)
    until(lambda: not partitions_of(admin, names), "the topics are gone")


def test_a_source_that_was_made_anew_with_fewer_partitions_is_begun_again(topics_desk: KafkaDesk) -> None:
    busy(topics_desk)
    delete(topics_desk, topics_desk.topic)
    topics_desk.kafka.create_topic(topics_desk.topic, 1)
    assert "belongs to the topic" in topics_desk.checked()["start"][1]

    assert topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes").exit_code == 0

    topics_desk.bill_from = (T0 + 40 * 60) * 1000
    topics_desk.configure()
    assert topics_desk.checked()["start"][0] == "ok"
    assert positions(topics_desk.client, topics_desk.topics, AGGREGATE).keys() == {0}
    topics_desk.close(total(60, "cus1"))
    topics_desk.deliver()
    assert topics_desk.standing()["tm1-60-cus1"] == "delivered"


def test_totals_whose_number_of_partitions_changed_are_begun_again(topics_desk: KafkaDesk) -> None:
    admin = AdminClient(topics_desk.client)
    admin.create_partitions([NewPartitions(topics_desk.topics.totals, 4)])[topics_desk.topics.totals].result(30.0)
    until(lambda: partitions_of(admin, [topics_desk.topics.totals]) == {topics_desk.topics.totals: 4}, "it has grown")
    assert "their numbers are equal and never change" in topics_desk.checked()["storage"][1]

    assert topics_desk.tallyman("reset", "--bill-from", RIGHT, "--yes", "--newest-total-unknown").exit_code == 0

    assert positions(topics_desk.client, topics_desk.topics, DELIVER).keys() == {0, 1, 2, 3}
    assert topics_desk.checked()["storage"][0] == "ok"


def test_there_is_nothing_to_start_over_before_the_first_start(kafka: Kafka, tmp_path: Path) -> None:
    desk = KafkaDesk(kafka, tmp_path)
    assert desk.checked()["storage"][1].endswith("are not there yet: the first start creates them")
    assert desk.checked()["start"][1].startswith("a first start: events from ")
    refused = desk.tallyman("reset", "--bill-from", RIGHT, "--yes")
    assert refused.exit_code == 2
    assert "this pipeline has not run before: there is nothing to start over" in refused.stderr
    assert present(desk.client, desk.topics) == {}, "nothing has been created"


# check


def test_check_says_who_runs_the_stages(topics_desk: KafkaDesk) -> None:
    assert topics_desk.checked()["storage"] == ("ok", "5 topics are as they have to be, in use by nobody")
    with topics_desk.serving(*Stage):
        found = topics_desk.checked()
    assert found["storage"][1].startswith("5 topics are as they have to be, in use: aggregate by 1 process (")
    assert "; deliver by 1 process (" in found["storage"][1]
    assert found["start"][1].startswith("goes on where it stopped, billing since ")
    assert "http" not in found


# Beside the service as it really runs


def test_a_decision_is_carried_out_and_the_service_goes_on_after_starting_over(kafka: Kafka, tmp_path: Path) -> None:
    with bench(kafka, tmp_path) as on:
        topic = Topic.create(kafka, 2, arrival="create_time")
        mapping = tmp_path / "customers.yaml"
        mapping.write_text("cus_a: cus_a\ncus_b: cus_b\n")
        service = on.service(topic, storage=None, customers={"kind": "file", "path": str(mapping)})
        service.set(storage={"kind": "kafka"})
        at = real_now() - 3 * HOUR

        def tallyman(*words: str) -> Any:
            return CliRunner().invoke(app, [*words, "-c", str(service.write())], env=service.environ)

        def states() -> dict[str, str]:
            lines = map(json.loads, tallyman("totals", "--json").stdout.splitlines())
            return {line["customer"]: line["state"] for line in lines}

        for partition in range(2):
            past_events(topic, {"cus_a": 3, "unknown": 4}, at=at, partition=partition)
        service.start()
        service.until(lambda: len(states()) == 2 and "pending" not in states().values(), "all is sent or parked")
        discarded = tallyman("parked", "discard", "--reason", "unmapped", "--why", "not ours", "--yes")
        assert discarded.stdout.count(": discarded\n") == 2, discarded.output
        refused = tallyman("reset", "--bill-from", iso(at + HOUR)[:-5] + "Z", "--yes")
        assert (refused.exit_code, "stop the service everywhere first" in refused.stderr) == (1, True)
        service.stop()

        again = iso(at + HOUR)[:-5] + "Z"
        done = tallyman("reset", "--bill-from", again, "--yes")
        assert done.exit_code == 0, done.output
        service.set(bill_from=again)
        past_events(topic, {"cus_a": 100, "cus_b": 7}, at=at + 2 * HOUR)
        service.start()
        service.until(lambda: "cus_b" in on.billed(), "what came after is billed")
        service.stop()
        assert on.billed() == {"cus_a": "106", "cus_b": "7"}
        assert states() == {"cus_a": "delivered", "cus_b": "delivered", "unknown": "discarded"}
