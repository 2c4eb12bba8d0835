"""A pipeline on either store as its operators have it: commands, and stage 2 at work with answers that a test gives."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import yaml
from typer.testing import CliRunner

from consumer import deadletters, totals
from consumer.cli import app
from consumer.cli.options import opened_store, source_of
from consumer.config import Config, load
from consumer.deadletters import DeadLetter
from consumer.deliver.answers import Heard
from consumer.deliver.delivery import Attempt
from consumer.runtime import embedded, processors
from consumer.runtime.source import Source
from consumer.runtime.start import shown
from consumer.sandbox.kafka import Kafka
from consumer.storage import Append, Archive, Facts, Log, Stage, Store
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_start import begin
from consumer.storage.kafka_topics import Topics, ensure
from consumer.storage.sqlite import SqliteStore
from consumer.storage.sqlite_file import locked
from consumer.totals import Total
from tests.kafka.harness import DAY, HOUR, until
from tests.kafka.stores import Member
from tests.totals import total_of
from tests.unit.delivery_world import OK, REFUSED, Names
from tests.unit.stage2 import StageTwo

PARTITIONS: Final = 3
KNOWN: Final[Mapping[str, str | None]] = {f"cus{n}": f"cus_{n}" for n in range(40)} | {"gone": "cus_gone", "free": None}


def now() -> int:
    return time.time_ns() // 1_000_000


T0: Final = now() // 60_000 * 60 - 2 * 3600
"""A minute that began two hours ago, in seconds."""


def total(number: int, customer: str = "cus1", *, value: str = "5", meter: str = "tokens") -> Total:
    """The total of a minute; the later the number, the later the minute."""
    return total_of(f"{number}-{customer}", T0 + number * 60 + 7, customer, value, meter=meter, event_name=meter)


def heard(attempt: Attempt) -> Heard:
    """Stripe refuses one customer."""
    return REFUSED if attempt.stripe_customer == "cus_gone" else OK


class Desk:
    """A configuration and a pipeline that has begun, on a topic of its own."""

    storage: Mapping[str, Any]

    def __init__(self, kafka: Kafka, directory: Path, *, partitions: int = PARTITIONS) -> None:
        self.kafka = kafka
        self.pipeline = f"d-{uuid.uuid4().hex[:12]}"
        self.topic = f"usage-{self.pipeline}"
        kafka.create_topic(self.topic, partitions)
        self.file = directory / "tallyman.yaml"
        self.bill_from = T0 * 1000 - HOUR
        self.configure()

    def configure(self, **changes: Any) -> None:
        """Write the configuration."""
        sections: dict[str, Any] = {
            "pipeline": self.pipeline,
            "bill_from": shown(self.bill_from),
            "kafka": {"bootstrap_servers": self.kafka.bootstrap_servers, "topic": self.topic},
            "storage": dict(self.storage),
            "stripe": {"livemode": False, "mode": "hold", "api_base": "http://127.0.0.1:1"},
            "http": {"host": "127.0.0.1", "port": 0},
            "meters": [
                {
                    "name": "tokens",
                    "event_types": ["used"],
                    "aggregation": "sum",
                    "value": "$.n",
                    "stripe": {"event_name": "tokens"},
                }
            ],
        }
        self.file.write_text(yaml.safe_dump(sections | changes))

    @property
    def config(self) -> Config:
        return load(self.file, {"STRIPE_SECRET_KEY": "sk_test_nobody"})

    @property
    def source(self) -> Source:
        return source_of(self.config)

    def tallyman(self, *words: str, **options: Any) -> Any:
        """The command with these words."""
        env = {"STRIPE_SECRET_KEY": "sk_test_nobody"}
        return CliRunner().invoke(app, [*words, "-c", str(self.file)], env=env, **options)

    def answer(self, *words: str) -> list[dict[str, Any]]:
        """The lines of JSON that a command gives."""
        result = self.tallyman(*words, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    def standing(self, *words: str) -> dict[str, str]:
        """What `totals` says of each of them; each is there once."""
        lines = self.answer("totals", "--limit", "0", *words)
        found = {line["identifier"]: line["state"] for line in lines}
        assert len(found) == len(lines)
        return found

    def checked(self) -> dict[str, tuple[str, str]]:
        """What `check` finds: level and text of each finding; of two about the same, the last."""
        result = self.tallyman("check", "--json")
        found = [json.loads(line) for line in result.stdout.splitlines()]
        return {each["what"]: (each["level"], each["says"]) for each in found}

    def archive(self) -> AbstractContextManager[Archive]:
        """As commands open it."""
        return opened_store(self.config)

    def begin(self) -> Facts:
        """The first start."""
        raise NotImplementedError

    def serving(self) -> AbstractContextManager[Store]:
        """What a service has of stage 2, for as long as it runs."""
        raise NotImplementedError

    def close(self, *given: Total) -> None:
        """Totals, as stage 1 appends them."""
        with self.archive() as archive:
            archive.append(Append(Log.TOTALS, each.customer.encode(), totals.encode(each)) for each in given)

    def bury(self, *given: DeadLetter) -> None:
        """Dead letters, as stage 1 appends them."""
        with self.archive() as archive:
            archive.append(Append(Log.DEAD_LETTERS, b"%d" % each.partition, deadletters.encode(each)) for each in given)

    def deliver(self, answer: Callable[[Attempt], Heard] = heard, known: Mapping[str, str | None] = KNOWN) -> None:
        """A service, until stage 2 has nothing left to do."""
        with self.serving() as store, self.archive() as archive:
            go_round(store, archive, answer, known)

    @contextmanager
    def running(self, known: Mapping[str, str | None] = KNOWN) -> Iterator[None]:
        """Such a service beside the commands."""
        stop, serves = Event(), Event()

        def serve() -> None:
            with self.serving() as store, self.archive() as archive:
                serves.set()
                while not stop.wait(0.05):
                    go_round(store, archive, heard, known)

        thread = Thread(target=serve)
        thread.start()
        assert serves.wait(30)
        try:
            yield
        finally:
            stop.set()
            thread.join()


def go_round(
    store: Store, archive: Archive, answer: Callable[[Attempt], Heard], known: Mapping[str, str | None]
) -> None:
    """Every partition of stage 2 as its last commit left it, until it has nothing to do."""
    for partition in archive.ends(Log.TOTALS):
        at = now()
        life = StageTwo(store, archive, Names(dict(known)), at, partition=partition)
        life.read()
        life.delivery.remap(Names(dict(known)), at)
        life.send(answer)


class SqliteDesk(Desk):
    """State in a file."""

    def __init__(self, kafka: Kafka, directory: Path) -> None:
        self.path = directory / "tallyman.db"
        self.storage = {"kind": "sqlite", "path": str(self.path)}
        super().__init__(kafka, directory)

    def begin(self) -> Facts:
        """The first start."""
        source = self.source
        with SqliteStore.open(self.path, now=now, create=True, lock=True) as store:
            return embedded.begin(self.config, store, source, source.describe(), bill_from=self.bill_from, now=now())

    @contextmanager
    def serving(self) -> Iterator[Store]:
        """The file, with its lock."""
        with locked(self.path), SqliteStore.open(self.path, now=now, create=False, lock=False) as store:
            yield store


class KafkaDesk(Desk):
    """State in topics."""

    storage: Mapping[str, Any] = {"kind": "kafka"}

    @property
    def topics(self) -> Topics:
        return Topics.of(self.pipeline)

    @property
    def client(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.kafka.bootstrap_servers, "log_level": 2}

    def begin(self) -> Facts:
        """The first start."""
        source = self.source
        topic = source.describe()
        ensure(self.client, self.topics, partitions=topic.partitions, keep_ms=90 * DAY)
        facts = Facts(
            self.pipeline, topic.cluster_id, topic.name, topic.topic_id, self.bill_from, topic.partitions, now()
        )
        offsets = source.starts(range(topic.partitions), self.bill_from)
        return begin(self.client, facts, processors.first_commits(self.config, topic, self.bill_from, offsets))

    def facts(self) -> Facts:
        with self.archive() as archive:
            found = archive.facts()
        assert found is not None
        return found

    def member(self, stage: Stage) -> Member:
        """A member of the stage's group, with all of its partitions."""
        made = Member(
            self.client, self.topic if stage is Stage.AGGREGATE else self.topics.totals, self.topics.group(stage)
        )
        made.until_owns(PARTITIONS)
        return made

    @contextmanager
    def serving(self, *stages: Stage) -> Iterator[KafkaStore]:
        """A process that has all partitions of these stages, by default of the second one."""
        with ExitStack() as opened:
            members = {each: opened.enter_context(closing(self.member(each))) for each in stages or (Stage.DELIVER,)}
            metadata = {stage: member.metadata for stage, member in members.items()}
            yield opened.enter_context(closing(KafkaStore(self.client, self.facts(), metadata)))

    def until_vacant(self) -> None:
        """Wait until nobody is taken for a member any more."""
        with self.archive() as archive:
            until(lambda: archive.holder() is None, "the group is empty")
