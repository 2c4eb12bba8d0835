"""The rights that docs/operations.md lists are enough for each stage and each command, and none is for nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from confluent_kafka.admin._acl import AclBinding, AclOperation, AclPermissionType
from confluent_kafka.admin._resource import ResourcePatternType, ResourceType
from confluent_kafka.cimpl import NewPartitions
from typer.testing import CliRunner

from consumer.cli import app
from consumer.runtime.start import shown
from consumer.sandbox.stripe import SECRET_KEY
from consumer.storage import Stage
from tests.kafka.cluster import SaslKafka, own
from tests.kafka.harness import MINUTE, SECOND, Bench, Service, Topic, bench, event, past_events, real_now, until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

PASSWORD: Final = "open"  # noqa: S105 - opens a broker that is gone in a minute
WORDS: Final = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Alter": AclOperation.ALTER,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
}
KINDS: Final = (ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID)
LOGGED: Final = re.compile(
    r"Principal = User:(\S+) is (Allowed|Denied) operation = (\w+) from host = \S+ "
    r"on resource = (\w+):LITERAL:(\S+) for"
)


class Right(NamedTuple):
    """What may be done with a resource; a name that ends with - is a prefix."""

    kind: ResourceType
    name: str
    operation: str

    def covers(self, kind: str, name: str, operation: str) -> bool:
        """Whether this is what a request needed. Who may read or write may describe."""
        same = name.startswith(self.name) if self.name.endswith("-") else name == self.name
        return (
            kind.upper() == self.kind.name.replace("_", "")
            and same
            and operation.replace("_", "") == self.operation.upper()
        )


def listed(store: str) -> dict[str, list[Right]]:
    """The table of a store, by the first column."""
    text = Path("docs/operations.md").read_text()
    table = text.partition(f"<!-- rights: {store} -->")[2].partition("<!--")[0]
    found = {}
    for line in table.splitlines():
        if not line.startswith("| `"):
            continue
        who, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rights = []
        for kind, cell in zip(KINDS, cells, strict=False):
            for name, words in re.findall(r"`([^`]+)` ([A-Za-z, ]+)", cell):
                rights += [Right(kind, name, word.strip()) for word in words.split(",")]
        for each in re.findall("`([^`]+)`", who):
            found[each] = rights
    return found


class Guarded(SaslKafka):
    """A broker that lets a user do what rights allow, and nothing else; tests are nobody, who may do everything."""

    def __init__(self, users: list[str]) -> None:
        known = " ".join(f'user_{user}="{PASSWORD}"' for user in users)
        super().__init__(
            "PLAIN",
            f"org.apache.kafka.common.security.plain.PlainLoginModule required {known};",
            authorizer_class_name="org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            super_users="User:ANONYMOUS",
        )


def user_of(store: str, who: str) -> str:
    return re.sub("[^a-z]", "_", f"{store}_{who}")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    users = [user_of(store, who) for store in ("sqlite", "kafka") for who in listed(store)]
    # So that it says what was asked for, and allowed.
    logger = "-Dorg.slf4j.simpleLogger.log.kafka.authorizer.logger=debug"
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", logger)
    with own(lambda: Guarded([*users, "first"])) as broker:
        yield broker


@pytest.fixture
def on(guarded: Guarded, tmp_path: Path) -> Iterator[Bench]:
    with bench(guarded, tmp_path) as made:
        yield made


class Office:
    """A pipeline, and users who may do what the table says."""

    def __init__(self, on: Bench, guarded: Guarded, topic: Topic, store: str) -> None:
        self.on, self.guarded, self.topic, self.store = on, guarded, topic, store
        self.service = self._service()
        self.names = {"SOURCE": topic.name, "P": f"tallyman-{self.service.config['pipeline']}"}
        self.rights = {who: [self._named(each) for each in rights] for who, rights in listed(store).items()}
        for who, rights in self.rights.items():
            self.allow(user_of(store, who), *rights)

    def _service(self) -> Service:
        made = self.on.service(self.topic)
        if self.store == "kafka":
            made.config["storage"] = {"kind": "kafka"}
        options = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
        more = {"session.timeout.ms": 6000, "topic.metadata.refresh.interval.ms": 1000}
        made.set(kafka={"bootstrap_servers": self.guarded.guarded, "options": options | more})
        made.set(pipeline=f"p-{self.topic.name[-8:]}-{self.store}")
        return made

    def _named(self, right: Right) -> Right:
        name = right.name.replace("SOURCE", self.names["SOURCE"])
        return right._replace(name=re.sub("^P(?=-)", self.names["P"], name))

    def allow(self, user: str, *rights: Right) -> None:
        bindings = [
            AclBinding(
                each.kind,
                each.name,
                ResourcePatternType.PREFIXED if each.name.endswith("-") else ResourcePatternType.LITERAL,
                f"User:{user}",
                "*",
                WORDS.get(each.operation, AclOperation.ALL),
                AclPermissionType.ALLOW,
            )
            for each in rights
        ]
        if bindings:
            for done in self.topic.admin.create_acls(bindings).values():
                done.result(10.0)

    def environ(self, who: str) -> dict[str, str]:
        user = who if who == "first" else user_of(self.store, who)
        return {"STRIPE_SECRET_KEY": SECRET_KEY, "KAFKA_SASL_USERNAME": user, "KAFKA_SASL_PASSWORD": PASSWORD}

    def run(self, who: str, *stages: Stage) -> Service:
        """A process that has begun."""
        made = self._service()
        made.config |= {"bill_from": self.service.config["bill_from"], "storage": self.service.config["storage"]}
        made.environ = self.environ(who)
        made.stages = frozenset(stages or Stage)
        made.start()
        return made

    def tallyman(self, who: str, *words: str) -> str:
        """A command, which has to do what it is for."""
        environ = os.environ | self.environ(who)
        result = CliRunner().invoke(app, [*words, "-c", str(self.service.write())], env=environ)
        assert result.exit_code == 0, f"{who}: {result.output}\n{result.stderr}"
        return result.stdout

    def use(self, minutes_ago: int, customer: str) -> None:
        """Usage, and an event that cannot be counted."""
        at = real_now() - minutes_ago * MINUTE
        for partition in range(self.topic.partitions):
            self.topic.produce(event("x", at=at), at=at, partition=partition)
            past_events(self.topic, {customer: 1}, at=at + SECOND, partition=partition)

    def reset(self) -> None:
        begin = real_now() // 1000 * 1000
        self.tallyman("reset", "reset", "--bill-from", shown(begin), "--yes")

    def check_used(self) -> None:
        """The broker has refused nobody anything, and has been asked for all that is listed."""
        log = self.guarded.log_file.read_text(errors="replace")
        asked: dict[str, set[tuple[str, str, str]]] = {}
        for user, how, operation, kind, name in LOGGED.findall(log):
            if how == "Allowed":
                asked.setdefault(user, set()).add((kind, name, operation))
            else:
                assert user not in {user_of(self.store, who) for who in self.rights}, (user, operation, kind, name)
        for rights in {tuple(rights) for rights in self.rights.values()}:
            users = [user_of(self.store, who) for who, its in self.rights.items() if tuple(its) == rights]
            of_all = set().union(*(asked.get(user, set()) for user in users))
            unused = [each for each in rights if not any(each.covers(*what) for what in of_all)]
            assert not unused, f"{users} never needed {unused}"


def test_what_is_listed_for_state_in_kafka_is_enough_and_used(on: Bench, guarded: Guarded) -> None:
    topic = Topic.create(guarded, 2, arrival="create_time")
    office = Office(on, guarded, topic, "kafka")
    on.stripe.model.accept_any_customer = False
    on.stripe.model.add_customer("cus_known")
    everything = [Right(kind, "tallyman-", "All") for kind in KINDS]
    office.allow("first", *everything, Right(ResourceType.TOPIC, topic.name, "All"))
    office.run("first").stop()
    aggregate = office.run("run --stage aggregate", Stage.AGGREGATE)
    deliver = office.run("run --stage deliver", Stage.DELIVER)
    office.use(180, "cus_known")
    office.use(170, "cus_gone")
    topic.admin.create_partitions([NewPartitions(topic.name, 3)])[topic.name].result(30.0)
    until(lambda: '"partitions_added"' in aggregate.log(), "the source has grown", within=40.0, context=aggregate.log)
    until(lambda: deliver.metrics().sum("tallyman_parked_totals") == 2, "two are parked", context=deliver.log)
    until(lambda: len(on.stripe.model.events) == 2, "two are billed", context=deliver.log)
    office.tallyman("check", "check", "--json")
    deliver.stop()
    office.use(160, "cus_known")
    until(lambda: aggregate.metrics().sum("tallyman_closed_totals_total") == 6, "two are unread", context=aggregate.log)
    assert office.tallyman("totals", "totals", "--json").count("\n") == 6
    deliver = office.run("run --stage deliver", Stage.DELIVER)
    first, second = (
        json.loads(x)["identifier"] for x in office.tallyman("parked list", "parked", "list", "--json").splitlines()
    )
    office.tallyman("parked show", "parked", "show", first)
    office.tallyman("parked release", "parked", "release", first, "--yes")
    office.tallyman("parked discard", "parked", "discard", second, "--why", "a test", "--yes")
    office.tallyman("reconcile", "reconcile")
    letters = office.tallyman("dead-letters list", "dead-letters", "list", "--json").splitlines()
    office.tallyman("dead-letters show", "dead-letters", "show", str(json.loads(letters[0])["number"]))
    office.tallyman("dead-letters redrive", "dead-letters", "redrive", "--yes")
    deliver.stop()
    aggregate.stop()
    office.reset()
    office.check_used()


def test_what_is_listed_for_a_file_is_enough_and_used(on: Bench, guarded: Guarded) -> None:
    topic = Topic.create(guarded, 2, arrival="create_time")
    office = Office(on, guarded, topic, "sqlite")
    office.use(180, "cus_known")
    service = office.run("run")
    until(lambda: len(on.stripe.model.events) == 2, "two are billed", context=service.log)
    office.tallyman("check", "check", "--json")
    assert office.tallyman("totals", "totals", "--json").count("\n") == 2
    office.tallyman("parked", "parked", "list", "--json")
    office.tallyman("dead-letters list", "dead-letters", "list", "--json")
    office.tallyman("dead-letters redrive", "dead-letters", "redrive", "--yes")
    service.stop()
    office.reset()
    office.check_used()
