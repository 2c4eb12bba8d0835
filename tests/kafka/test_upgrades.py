"""Every setting that changes what is billed, changed in turn while usage flows.

Each event is billed once, by the rules that were in force when it was read. Which those were is told from outside: by
the offsets at which a process with these rules took a partition over. What they make of each event is computed here
again, from what the events were made to say.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from threading import Event, Thread
from typing import Any, Final, NamedTuple

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourceType

from consumer import totals
from consumer.cli.options import opened_store
from consumer.config import load, schema
from consumer.config_values import Duration
from consumer.deliver.entries import Outcome, decode_outcome
from consumer.storage import Log
from consumer.totals import Total
from tests.kafka.harness import DAY, HOUR, MINUTE, SECOND, Bench, Service, Topic, iso, real_now, until
from tests.kafka.test_distributed import owned, until_shared

pytestmark = pytest.mark.kafka

PARTITIONS: Final = 2
CUSTOMERS: Final = 4
BEGIN: Final = iso(real_now() - 30 * DAY)
TICK_S: Final = 0.03
TICK: Final = 10 * SECOND
"""So much of the events' time passes with each tick: a window closes within the second in which it is looked at."""

TOKENS: Final[dict[str, Any]] = {
    "name": "tokens",
    "event_types": ["used"],
    "aggregation": "sum",
    "value": "$.n",
    "stripe": {"event_name": "ai_tokens"},
}
CALLS: Final[dict[str, Any]] = {
    "name": "calls",
    "event_types": ["used", "called"],
    "aggregation": "count",
    "stripe": {"event_name": "api_calls"},
}
"""Stays as it is, and counts the same events: what is changed beside it must not touch it."""


# What is produced


class Said(NamedTuple):
    """One record, as its author meant it."""

    stamp: int
    at: int
    id: str
    type: str
    subject: str
    org: str
    who: str
    model: str
    n: Decimal
    m: int

    @property
    def value(self) -> bytes:
        data = {"n": str(self.n), "m": self.m, "model": self.model, "who": self.who}
        event = {
            "specversion": "1.0",
            "id": self.id,
            "source": "/upgrades",
            "type": self.type,
            "subject": self.subject,
            "org": self.org,
            "time": iso(self.at),
            "data": data,
        }
        return json.dumps(event).encode()


class Traffic:
    """Usage that flows all the time, dated in the past and faster than time: late, repeated, negative."""

    def __init__(self, topic: Topic, *, seed: int = 1) -> None:
        self.records: list[list[Said]] = [[] for _ in range(topic.partitions)]
        """By partition and offset."""
        self.at = real_now() - 20 * HOUR
        self._topic = topic
        self._random = random.Random(seed)  # noqa: S311 - must be reproducible
        self._stop = Event()
        settings = {"bootstrap.servers": topic.kafka.bootstrap_servers, "enable.idempotence": True, "linger.ms": 0}
        self._producer = Producer(settings)
        self._thread = Thread(target=self._flow, daemon=True)
        self._thread.start()

    def stop(self, after: int = 3 * HOUR) -> int:
        """No more of it, and so much later a record that closes its windows. Returns how many there are."""
        self._stop.set()
        self._thread.join()
        for partition in range(self._topic.partitions):
            self._producer.produce(
                self._topic.name, None, b"k", partition=partition, timestamp=min(self.at + after, real_now())
            )
        assert self._producer.flush(30.0) == 0
        return sum(map(len, self.records)) + self._topic.partitions

    def _flow(self) -> None:
        while not self._stop.wait(TICK_S):
            self.at += TICK
            for partition, records in enumerate(self.records):
                for _ in range(4):
                    said = self._said(records)
                    records.append(said)
                    self._producer.produce(
                        self._topic.name, said.value, b"k", partition=partition, timestamp=said.stamp
                    )
            self._producer.poll(0)

    def _said(self, before: Sequence[Said]) -> Said:
        dice = self._random.random()
        if before and dice < 0.05:  # a producer that tries again
            return self._random.choice(before[-100:])._replace(stamp=self.at)
        if before and dice < 0.08:  # somebody who produces this morning's events once more
            return self._random.choice(before)._replace(stamp=self.at)
        late = self._random.randrange(20 * MINUTE) if dice < 0.2 else self._random.randrange(20 * SECOND)
        customer = self._random.randrange(CUSTOMERS)
        return Said(
            self.at,
            self.at - late,
            f"{self._random.getrandbits(64):x}",
            self._random.choice(["used", "used", "called"]),
            f"cus_{customer}",
            f"cus_org{customer % 2}",
            f"cus_who{customer}",
            self._random.choice("ab"),
            Decimal(self._random.randrange(-200 if dice > 0.9 else 1, 10_000)).scaleb(-3),
            self._random.randrange(1, 100),
        )


# What has to become of it


class Reign(NamedTuple):
    """From this offset on a partition was read by these rules."""

    offset: int
    since: float
    config: Mapping[str, Any]


def milliseconds(text: str) -> int:
    return int(Duration.of(text))


@dataclass
class Partition:
    """What the log of one partition comes to, computed once more."""

    counted: set[str] = field(default_factory=set)
    remembered_for: int = 0
    known_from: int = 0
    arrival: int = 0

    def reigned(self, windows: Mapping[str, str]) -> None:
        """Other rules are in force now. What was forgotten under the old ones is not in time again under the new."""
        remembered_for = milliseconds(windows.get("deduplicate_for", "24h"))
        if 0 < self.remembered_for < remembered_for:
            self.known_from = max(self.known_from, self.arrival - self.remembered_for)
        self.remembered_for = remembered_for

    def read(self, said: Said, config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Decimal]]:
        """Which meters count it, for whom and how much."""
        self.arrival = said.stamp
        matching = [each for each in config["meters"] if _matches(each, said)]
        if not matching or said.id in self.counted:
            return
        read = []
        for meter in matching:
            accept_late = effective(meter, config)["accept_late"]
            value = Decimal(getattr(said, meter["value"].removeprefix("$."))) if "value" in meter else Decimal(1)
            late = said.stamp - said.at > milliseconds(accept_late) or said.at < self.known_from
            if late or (value < 0 and not meter.get("allow_negative")):
                return
            rounded = value.quantize(Decimal(1).scaleb(-meter.get("decimals", 12)), ROUND_HALF_EVEN)
            read.append((meter, getattr(said, meter.get("customer", "subject").removeprefix("$.")), rounded))
        self.counted.add(said.id)
        yield from read


def effective(meter: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A meter with what holds for it of the windows' settings."""
    windows = {"lateness": "2m", "settle": "5s", "deduplicate_for": "24h"} | config.get("windows", {})
    return {"accept_late": windows["deduplicate_for"], **windows, **meter}


def _size(meter: Mapping[str, Any]) -> int:
    return HOUR if meter.get("window") == "1h" else MINUTE


def _matches(meter: Mapping[str, Any], said: Said) -> bool:
    return said.type in meter["event_types"] and said.model in meter.get("where", {}).get("$.model", ["a", "b"])


Changes = Sequence[tuple[str, dict[str, Any], dict[str, Any]]]
"""In turn: the setting that is changed, as the configuration's reference names it; of a meter, and of everything."""

Sums = dict[tuple[str, str, str, str, int], tuple[Decimal, int]]
"""Value and number of events by meter, edition, event name, customer, and start of the window in seconds."""


class Upgraded:
    """A pipeline whose configuration changes."""

    def __init__(self, on: Bench, topic: Topic, **config: Any) -> None:
        self.on = on
        self.topic = topic
        for event_name in ("ai_tokens", "api_calls"):
            on.stripe.model.add_meter(event_name)
        self._begun: list[tuple[Service, int, Mapping[str, Any]]] = []
        self.service = self.worker(**config)
        self.traffic = Traffic(topic)

    def worker(self, **config: Any) -> Service:
        """One more process, with the configuration that a pipeline begins with."""
        usual = {"meters": [deepcopy(TOKENS), deepcopy(CALLS)], "bill_from": BEGIN}
        made = self.on.service(self.topic, **usual | config)
        # No other clock agrees with its own: between two records of the past it must not take them for the last ones.
        made.clock.jump(10 * MINUTE)
        return made

    def start(self, service: Service | None = None, *, spawn: bool = False) -> None:
        """Start it, remembering by which rules it reads from now on."""
        service = service or self.service
        self._begun.append((service, len(service.log()), deepcopy(service.config)))
        if spawn:
            service.spawn()
        else:
            service.start()

    def change(self, *, kill: bool = False, **config: Any) -> None:
        """Stop it, or kill it, and start it with other settings; return when it has counted by them."""
        if kill:
            self.service.kill()
        else:
            self.service.stop()
        self.service.set(**config)
        self.start()
        self.until_counted()

    def change_all(self, changes: Changes) -> None:
        """Each of them, one after the other; now and then the process is killed for it."""
        for number, (_, of_meter, of_all) in enumerate(changes):
            self.change(kill=number % 3 == 2, **{"meters": self.meter(**of_meter)} | of_all)

    def until_counted(self, more: int = 150) -> None:
        """Wait until so many more records are read."""
        self.service.until_consumed(int(self.service.metrics().sum("tallyman_consumed_total")) + more)

    def meter(self, **changes: Any) -> list[dict[str, Any]]:
        """The meters, of which the first one is changed; None takes a key out."""
        first, *others = deepcopy(self.service.config["meters"])
        first |= changes
        return [{key: value for key, value in first.items() if value is not None}, *others]

    # The end

    def finish(self, *services: Service, later: int = 0) -> None:
        """No more usage: let the last windows close and be billed, stop everything, and compare.

        ``later``: so much time passes, where it is not the records that tell it.
        """
        records = self.traffic.stop()
        self.service.clock.pass_time(later)
        services = services or (self.service,)

        def left() -> dict[str, float]:
            # All of it from one look at each, and as it was committed: between two looks totals change their places.
            pages = [each.metrics() for each in services]
            consumed, counted, closed = (
                sum(page.sum(f"tallyman_{name}_total") for page in pages)
                for name in ("consumed", "counted_events", "closed_events")
            )
            states = ("unread", "pending", "parked")
            waiting = sum(page.sum("tallyman_totals", state=state) for page in pages for state in states)
            return {"unconsumed": records - consumed, "open": counted - closed, "waiting": waiting}

        until(
            lambda: not any(left().values()),
            "all is billed",
            within=40.0,
            context=lambda: "\n".join([str(left()), *(each.log()[-2000:] for each in services)]),
        )
        for each in services:
            assert each.metrics().sum("tallyman_totals_missing_value") == 0
            each.stop()
        self.compare()

    def compare(self) -> None:
        """Each event was billed once, by the rules in force when it was read."""
        with opened_store(load(self.service.write(), self.service.environ)) as archive:
            made = [totals.decode(each.value) for each in archive.logged(Log.TOTALS)]
            outcomes = [decode_outcome(each.value) for each in archive.logged(Log.OUTCOMES)]
        found = [each for each in made if isinstance(each, Total)]
        assert len({each.identifier for each in found}) == len(found), "an identifier stands for one total"
        sums: dict[Any, tuple[Decimal, int]] = defaultdict(lambda: (Decimal(0), 0))
        for each in found:
            key = (each.meter, each.edition, each.stripe.event_name, each.customer, each.window_start)
            value, events = sums[key]
            sums[key] = value + Decimal(each.value), events + each.events
        assert dict(sums) == self.expected()
        self._check_outcomes(found, outcomes)

    def _check_outcomes(self, found: Sequence[Total], outcomes: Sequence[Outcome]) -> None:
        assert Counter(each.identifier for each in outcomes) == Counter(each.identifier for each in found)
        billed = {
            each.identifier: (each.event_name, each.customer, each.value, each.timestamp)
            for each in self.on.stripe.model.events
        }
        assert len(billed) == len(self.on.stripe.model.events)
        assert not self.on.stripe.model.violations
        assert billed == {
            each.identifier: (each.event_name, each.stripe_customer, Decimal(each.value), each.timestamp)
            for each in outcomes
            if each.how == "delivered"
        }
        assert {each.how for each in outcomes} <= {"delivered", "zero", "unbilled"}
        self.outcomes = outcomes

    def expected(self) -> Sums:
        """What the totals of the whole log have to hold."""
        sums: Sums = {}
        for number, records in enumerate(self.traffic.records):
            reigns = self.reigns(number)
            partition, current = Partition(), -1
            for offset, said in enumerate(records):
                while current + 1 < len(reigns) and reigns[current + 1].offset <= offset:
                    current += 1
                    partition.reigned(reigns[current].config.get("windows", {}))
                config = reigns[current].config
                for meter, customer, value in partition.read(said, config):
                    start = said.at // _size(meter) * _size(meter) // 1000
                    edition = self.edition(config, meter["name"])
                    key = (meter["name"], edition, meter["stripe"]["event_name"], customer, start)
                    before, events = sums.get(key, (Decimal(0), 0))
                    sums[key] = before + value, events + 1
        return sums

    def reigns(self, partition: int) -> list[Reign]:
        """By which rules a partition was read, from which offset on."""
        found = []
        for number, (service, begin, config) in enumerate(self._begun):
            later = [start for other, start, _ in self._begun[number + 1 :] if other is service]
            for line in service.log()[begin : later[0] if later else None].splitlines():
                said = json.loads(line) if line.startswith("{") else {}
                if said.get("event") == "partition_taken_over" and said["partition"] == partition:
                    found.append(Reign(said["offset"], said["timestamp"], config))
        return sorted(found, key=lambda each: (each.offset, each.since))

    def edition(self, config: Mapping[str, Any], meter: str) -> str:
        """What the configuration's digest for this meter is."""
        key = json.dumps([config.get("windows"), config["meters"], meter])
        if key not in _editions:
            file = self.service.folder / "edition.yaml"
            file.write_text(json.dumps(config))
            loaded = load(file, self.service.environ)
            for each in loaded.core_meters:
                named = json.dumps([config.get("windows"), config["meters"], each.name])
                windows = loaded.windows
                edition = each.edition(settle=int(windows.settle), deduplicate_for=int(windows.deduplicate_for))
                _editions[named] = edition.hex()
        return _editions[key]

    def check_editions(self) -> None:
        """Other settings of a meter or of the windows are another edition, and the same ones again are the same."""
        meant = {
            (json.dumps(effective(each, config), sort_keys=True), self.edition(config, each["name"]))
            for _, _, config in self._begun
            for each in config["meters"]
        }
        assert len(meant) == len({content for content, _ in meant}) == len({edition for _, edition in meant})
        self._check_open_windows()

    def _check_open_windows(self) -> None:
        """Wherever the first meter had other rules than before, windows were open that went on under both."""
        minutes: dict[str, set[int]] = defaultdict(set)
        first = []
        expected = self.expected()
        for _, _, config in self._begun:
            meter = config["meters"][0]
            first.append(edition := self.edition(config, meter["name"]))
            for start in {start for _, other, _, _, start in expected if other == edition}:
                minutes[edition].update(range(start, start + _size(meter) // 1000, 60))
        for before, after in itertools.pairwise(first):
            assert minutes[before] & minutes[after]


_editions: dict[str, str] = {}


# The stories


@pytest.fixture
def topic(on: Bench) -> Topic:
    return Topic.create(on.kafka, PARTITIONS, arrival="create_time")


def meter(setting: str, **changes: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A setting of the first meter."""
    return f"meters[].{setting}", changes, {}


def section(setting: str, **changes: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A setting of all."""
    return setting, {}, changes


WHAT: Final = (
    meter("event_types", event_types=["used", "called"]),
    meter("where", where={"$.model": ["a"]}),
    meter("where", where=None),
    meter("value", value="$.m"),
    meter("value", value="$.n"),
    meter("decimals", decimals=1),
    meter("allow_negative", allow_negative=True),
    meter("customer", customer="$.who"),
    meter("customer", customer="org"),
    meter("aggregation", aggregation="count", value=None, decimals=None, allow_negative=None),
    meter("aggregation", **TOKENS, customer=None),
)
"""What is counted. The last rules are those that the pipeline began with."""

WHEN: Final = (
    meter("window", window="1h"),
    meter("window", window=None),
    meter("lateness", lateness="4m"),
    section("windows.lateness", windows={"lateness": "30s"}),
    section("windows.settle", windows={"settle": "40s"}),
    meter("accept_late", accept_late="6m"),
    section("windows.accept_late", windows={"accept_late": "12m"}),
    section("windows.deduplicate_for", windows={"deduplicate_for": "15m"}),
    meter("accept_late", accept_late=None),
    section("windows.accept_late", windows={"accept_late": "15m"}),
    section("windows.deduplicate_for", windows={"deduplicate_for": "24h", "accept_late": "24h"}),
    section("windows", windows=None),
)
"""When windows close, and what is too late or repeated for them. The last rules make a meter wait for four minutes."""


@pytest.mark.parametrize("changes", [pytest.param(WHAT, id="what"), pytest.param(WHEN, id="when")])
def test_what_is_counted_and_when_it_is_closed_is_changed_in_turn(on: Bench, topic: Topic, changes: Changes) -> None:
    """The open windows close as they would have; what is read from then on goes to windows of its own."""
    upgraded = Upgraded(on, topic, stripe={"finalization_grace": "2h"})
    upgraded.start()
    upgraded.until_counted()
    upgraded.change_all(changes)
    upgraded.finish()
    upgraded.check_editions()


WHERE: Final = (
    meter("stripe.event_name", stripe={"event_name": "tokens_2"}),
    meter("stripe.value_key", stripe={"event_name": "tokens_3", "value_key": "tokens"}),
    meter("stripe.customer_key", stripe={"event_name": "tokens_4", "value_key": "tokens", "customer_key": "payer"}),
    meter("name", name="renamed"),
    section("meters", meters=[TOKENS, TOKENS | {"name": "more"}, CALLS]),
    section("meters", meters=[TOKENS | {"name": "more"}, CALLS]),
    section("stripe.mode", stripe={"mode": "hold"}),
    section("meters", meters=[CALLS]),
    section("stripe.mode", stripe={"mode": "send"}),
    section("meters", meters=[TOKENS, CALLS]),
)
"""Where the totals go, and which meters there are: a value and a customer have other names in a meter of its own."""


def test_where_totals_go_and_which_meters_there_are_is_changed_in_turn(on: Bench, topic: Topic) -> None:
    """Windows that are open go where they would have gone, also when their meter is gone."""
    for event_name, keys in (("tokens_2", {}), ("tokens_3", {"value_key": "tokens"})):
        on.stripe.model.add_meter(event_name, **keys)
    on.stripe.model.add_meter("tokens_4", value_key="tokens", customer_key="payer")
    upgraded = Upgraded(on, topic)
    upgraded.start()
    upgraded.until_counted()
    upgraded.change_all(WHERE)
    upgraded.finish()
    upgraded.check_editions()


def test_who_the_customers_are_at_stripe_is_changed_while_totals_wait(on: Bench, topic: Topic) -> None:
    """That is decided when a total is sent: it is no edition, and a total is billed to one of them, once."""
    upgraded = Upgraded(on, topic)
    names = upgraded.service.folder / "customers.yaml"
    names.write_text("cus_0: cus_zero\ncus_1: null\ncus_2: cus_2\n")
    upgraded.start()
    upgraded.until_counted()
    upgraded.change(customers={"kind": "file", "path": str(names)}, limits={"parked": 5, "in_flight": 3})
    parked = 'tallyman_delivery_paused{reason="parked"} 1.0'
    upgraded.service.until(lambda: parked in upgraded.service.get("/metrics")[1], "too many are parked")
    upgraded.change(kill=True, limits={"parked": 100_000, "in_flight": 2_000})
    names.write_text("cus_0: cus_zero\ncus_1: null\ncus_2: cus_2\ncus_3: cus_three\n")
    upgraded.until_counted()
    upgraded.change(customers=None)
    upgraded.finish()
    billed = {(each.customer, each.stripe_customer) for each in upgraded.outcomes if each.how != "zero"}
    both = {("cus_0", "cus_zero"), ("cus_3", "cus_three"), ("cus_1", None)}
    assert billed == both | {(f"cus_{number}", f"cus_{number}") for number in range(CUSTOMERS)}
    assert len({upgraded.edition(config, "tokens") for _, _, config in upgraded._begun}) == 1


def test_limits_lose_nothing_however_they_are_set(on: Bench, topic: Topic) -> None:
    """One that is too small stops the service, or makes it wait; what it had not counted is counted later."""
    upgraded = Upgraded(on, topic)
    upgraded.start()
    upgraded.until_counted()
    upgraded.service.stop()
    upgraded.service.set(limits={"open_keys": 3})
    upgraded.start(spawn=True)
    assert "more than limits.open_keys allows (3). Nothing is lost." in upgraded.service.fails()
    upgraded.service.set(limits={"open_keys": 2_000_000, "keep": "24h", "in_flight": 1})
    upgraded.start()
    upgraded.until_counted()
    upgraded.change(kill=True, limits={"keep": "3650d", "in_flight": 2_000})
    upgraded.finish()
    assert len({upgraded.edition(config, "tokens") for _, _, config in upgraded._begun}) == 1


def test_what_must_not_change_is_refused_and_costs_nothing(on: Bench, topic: Topic) -> None:
    """Under another name, from another time or on another topic the same usage would be billed again."""
    upgraded = Upgraded(on, topic)
    service = upgraded.service
    upgraded.start()
    upgraded.until_counted()
    service.stop()
    before = deepcopy(service.config)
    other = Topic.create(on.kafka, PARTITIONS, arrival="create_time")
    for changes, said in (
        ({"pipeline": "another"}, f"belongs to the pipeline {before['pipeline']}, and this is another."),
        ({"bill_from": iso(real_now() - DAY)}, "it is fixed from the first start on"),
        ({"kafka": {"topic": other.name}}, f"belongs to the topic {topic.name} "),
        ({"kafka": {"arrival": "log_append_time"}}, "has message.timestamp.type=CreateTime"),
    ):
        service.set(**changes)
        assert said in service.refuses()
        service.set(**before)
    service.set(bill_from=None)
    upgraded.start()
    upgraded.until_counted()
    upgraded.finish()


def test_the_broker_dates_the_records_from_some_day_on(on: Bench, topic: Topic) -> None:
    """The topic is changed first, and what producers have dated until then stays as it is."""
    upgraded = Upgraded(on, topic)
    service = upgraded.service
    upgraded.start()
    upgraded.until_counted()
    service.stop()
    entry = ConfigEntry("message.timestamp.type", "LogAppendTime", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic.name, incremental_configs=[entry])
    topic.admin.incremental_alter_configs([resource])[resource].result(10.0)
    assert "set kafka.arrival: log_append_time" in service.refuses()
    service.set(kafka={"arrival": "log_append_time"})
    upgraded.start()
    upgraded.until_counted()
    upgraded.finish(later=3 * HOUR)


# With state in Kafka


def distributed(upgraded: Upgraded, *before: Service, **changes: Any) -> Service:
    """A process whose state is in Kafka, with the configuration of the one before, but for these changes."""
    made = upgraded.worker()
    made.config["storage"] = {"kind": "kafka"}
    for each in before:
        made.config |= deepcopy(each.config) | {"http": made.config["http"]}
    made.set(kafka={"options": made.config["kafka"]["options"] | {"session.timeout.ms": 6000}}, **changes)
    return made


def until_has_all(service: Service) -> None:
    """Wait until all partitions are its own."""
    service.until(lambda: owned(service, "aggregate") == PARTITIONS, "it has all partitions")


ROLLED: Final[tuple[dict[str, Any], ...]] = (
    {"meters": [TOKENS | {"value": "$.m", "stripe": {"event_name": "tokens_2"}}, CALLS]},
    {
        "meters": [TOKENS | {"window": "1h"}, CALLS],
        "windows": {"deduplicate_for": "12h", "lateness": "1m"},
        "stripe": {"finalization_grace": "2h"},
    },
)


def test_a_rolling_upgrade_bills_each_event_by_the_rules_of_whoever_read_it(on: Bench, topic: Topic) -> None:
    """For a while processes with the old and with the new rules share the partitions, and hand them over."""
    on.stripe.model.add_meter("tokens_2")
    upgraded = Upgraded(on, topic)
    old = upgraded.service = distributed(upgraded)
    upgraded.start(old)
    upgraded.until_counted()
    for number, changes in enumerate(ROLLED):
        new = distributed(upgraded, old, **changes)
        upgraded.start(new)
        until_shared(old, new, partitions=PARTITIONS)
        upgraded.until_counted()
        if number:
            old.kill()
        else:
            old.stop()
        until_has_all(new)
        upgraded.service = old = new
        upgraded.until_counted()
    upgraded.finish()
    upgraded.check_editions()


def test_in_kafka_another_pipeline_is_a_first_start_that_bills_again(on: Bench, topic: Topic) -> None:
    """Nothing there tells it from a second service, which may be meant: so it asks from when on to bill."""
    upgraded = Upgraded(on, topic)
    service = upgraded.service = distributed(upgraded)
    upgraded.start()
    upgraded.until_counted()
    upgraded.finish()
    topics = f"tallyman-{service.config['pipeline']}"
    service.set(limits={"keep": "3650d"})
    assert f"{topics}-totals has retention.ms=7776000000. Correct it" in service.refuses()
    service.set(limits=None, bill_from=iso(real_now() - DAY))
    assert "it is fixed from the first start on" in service.refuses()
    billed = on.billed()
    service.set(pipeline=f"{service.config['pipeline']}-2", bill_from=None)
    assert "has not run before: set bill_from in the configuration" in service.refuses()
    service.set(bill_from=BEGIN)
    upgraded.start()
    twice = {customer: f"{(2 * Decimal(value)).normalize():f}" for customer, value in billed.items()}
    until(lambda: on.billed() == twice, "all of it is billed once more")


def test_no_setting_is_left_out() -> None:
    """A setting that comes later has to be tried here as well, or it has to be said why it bills nothing else."""
    tried = {setting for setting, _, _ in (*WHAT, *WHEN, *WHERE)}
    tried |= {
        "customers.kind",
        "customers.path",
        "limits.open_keys",
        "limits.in_flight",
        "limits.parked",
        "limits.keep",
    }
    tried |= {"pipeline", "bill_from", "kafka.topic", "kafka.arrival"}
    where_things_are = {"kafka.bootstrap_servers", "kafka.options", "storage.kind", "storage.path", "stripe.api_base"}
    how_it_gets_in = {"kafka.token.kind", "kafka.token.region"}
    pace_and_pages = {"commit_every", "stripe.max_rate", "http.host", "http.port", "webhook.host", "webhook.port"}
    judged_before_a_start = {"stripe.livemode", "stripe.finalization_grace"}
    sections = {
        "kafka",
        "kafka.token",
        "storage",
        "limits",
        "customers",
        "stripe",
        "http",
        "webhook",
        "meters[].stripe",
    }
    known = tried | where_things_are | how_it_gets_in | pace_and_pages | judged_before_a_start | sections
    assert set(_settings(schema())) - known == set()


def _settings(schema: Mapping[str, Any]) -> Iterator[str]:
    def of(part: Mapping[str, Any], name: str) -> Iterator[str]:
        for each in (part, *part.get("anyOf", ()), *part.get("oneOf", ())):
            found = schema["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
            if found is not part:
                yield from of(found, name)
            if "$ref" in found.get("items", {}):
                yield from of(found["items"], f"{name}[]")
            for key, value in found.get("properties", {}).items():
                full = f"{name}.{key}".lstrip(".")
                yield full
                if found is part:
                    yield from of(value, full)

    yield from of(schema, "")
