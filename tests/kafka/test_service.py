"""The service as users run it: a process between a real Kafka and Stripe, through stops, kills and outages."""

from __future__ import annotations

import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourceType

from consumer.deliver.pacing import Gate
from consumer.sandbox.kafka import LocalKafka
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Fault
from consumer.storage import Append, Log
from consumer.totals import Command, encode
from tests.kafka.harness import (
    DAY,
    HOUR,
    METER,
    MINUTE,
    SECOND,
    Bench,
    Page,
    Service,
    Topic,
    bench,
    event,
    iso,
    past_events,
    real_now,
    until,
)

pytestmark = pytest.mark.kafka


def past_topic(on: Bench, partitions: int = 1) -> Topic:
    """A topic whose producers date the records, so that windows can close at once."""
    return Topic.create(on.kafka, partitions, arrival="create_time")


def in_state(service: Service, state: str, reason: str = "") -> float:
    """How many totals stand there."""
    return service.metrics().sum("tallyman_totals", state=state, reason=reason)


# Stops and kills


def test_a_stop_is_orderly_and_soon_and_keeps_what_was_read(on: Bench) -> None:
    topic = past_topic(on, 2)
    service = on.service(topic, commit_every="1m")
    service.start()
    past_events(topic, {"cus_a": 5, "cus_b": 7}, at=real_now() - HOUR)
    past_events(topic, {"cus_a": 1}, at=real_now() - HOUR, partition=1)
    service.until(lambda: service.metrics().sum("tallyman_open_keys") == 3, "all is read, and nothing committed")
    assert service.metrics().sum("tallyman_consumed_total") == 0, "counters show what no crash takes back"
    assert service.stop() < 5, "a second and a commit, on a machine that is not busy"
    assert sorted((total.customer, total.value) for total in service.totals()) == [
        ("cus_a", "1"),
        ("cus_a", "5"),
        ("cus_b", "7"),
    ]
    service.start()
    service.until(lambda: on.billed() == {"cus_a": "6", "cus_b": "7"}, "all is billed")
    service.stop()


def test_kills_at_any_moment_change_neither_totals_nor_counters(on: Bench) -> None:
    topic = past_topic(on, 2)
    service = on.service(topic, windows={"deduplicate_for": "24h"})
    chance = random.Random(3)  # noqa: S311 - has to be the same every time
    start = real_now() - 2 * HOUR
    expected: dict[str, int] = {}

    def produce() -> None:
        producer = Producer({"bootstrap.servers": on.kafka.bootstrap_servers})
        for n in range(12_000):
            at = start + n * 500
            customer = f"cus_{n % 7}"
            repeated = n % 10 == 9
            expected[customer] = expected.get(customer, 0) + n
            for _ in range(2 if repeated else 1):
                value = event(n, at=at, customer=customer, id=str(n))
                producer.produce(topic.name, value, partition=n % 2, timestamp=at)
            if n % 20 == 0:
                producer.flush(30.0)
                time.sleep(0.004)
        for partition in range(2):
            producer.produce(topic.name, None, partition=partition, timestamp=real_now())
        producer.flush(30.0)

    produced = threading.Thread(target=produce, daemon=True)
    produced.start()
    seen: dict[object, float] = {}
    for _ in range(5):
        service.start()
        producing_for = time.monotonic() + chance.uniform(0.05, 0.8)
        while time.monotonic() < producing_for:
            seen = not_less(service.metrics(), seen)
        service.kill()
    produced.join()
    service.start()
    wanted = {customer: str(value) for customer, value in expected.items()}
    service.until(lambda: on.billed() == wanted, "all is billed once", within=30.0)
    page = service.metrics()
    not_less(page, seen)
    assert page.sum("tallyman_events_total", outcome="duplicate") == 1_200
    assert page.sum("tallyman_totals_missing_value") == 0
    service.stop()
    assert on.stripe.model.violations == []


def not_less(page: Page, before: dict[object, float]) -> dict[object, float]:
    """What the counters show now, none of them less than before."""
    now = page.counters
    assert {name: value for name, value in before.items() if now.get(name, 0) < value} == {}
    return now


# Outages


def test_kafka_may_go_and_come_back_under_the_service(own_kafka: LocalKafka, tmp_path: Path) -> None:
    with bench(own_kafka, tmp_path) as on:
        topic = Topic.create(own_kafka, 2)
        topic.produce(event(1))
        service = on.service(topic)
        service.start()
        service.until_consumed(1)
        assert service.get("/readyz") == (200, "ok\n")
        own_kafka.stop()
        service.clock.pass_time(10 * SECOND)
        service.until(lambda: "Kafka has not answered since" in service.get("/readyz")[1], "readiness shows it")
        assert service.get("/readyz")[0] == 503
        assert service.get("/healthz")[0] == 200
        assert service.metrics().sum("tallyman_kafka_up") == 0
        own_kafka.start()
        topic.produce(event(10), event(100), partition=1)
        service.until_consumed(3)
        service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
        assert service.metrics().sum("tallyman_kafka_up") == 1
        assert service.metrics().sum("tallyman_counted_value") == 111
        own_kafka.stop()
        service.until(lambda: service.get("/readyz")[0] == 503, "it is gone again")
        assert service.stop() < 15, "the client is not waited for long"
        own_kafka.start()
        service.start()
        service.until(
            lambda: service.metrics().sum("tallyman_counted_value") == 111, "nothing is lost or counted twice"
        )
        service.stop()


def test_stripe_may_go_and_come_back_under_the_service(on: Bench) -> None:
    topic = past_topic(on)
    customers = {f"cus_{n}": n + 1 for n in range(30)}
    service = on.service(topic)
    on.stripe.down()
    service.start()
    past_events(topic, customers, at=real_now() - HOUR)
    service.until(lambda: service.get("/readyz")[0] == 503, "readiness shows it")
    assert "down" in service.get("/readyz")[1]
    assert service.get("/healthz")[0] == 200
    service.until(
        lambda: service.metrics().sum("tallyman_oldest_pending_total_age_seconds") > 3_000, "usage waits for it"
    )
    assert service.metrics().sum("tallyman_stripe_up") == 0
    on.stripe.up()
    service.clock.pass_time(30 * SECOND)
    wanted = {customer: str(value) for customer, value in customers.items()}
    service.until(lambda: on.billed() == wanted, "all is billed once")
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    assert service.metrics().sum("tallyman_stripe_up") == 1
    service.stop()


def test_a_partition_that_waits_for_a_clock_shows_and_goes_on_when_the_clocks_agree(on: Bench) -> None:
    topic = Topic.create(on.kafka, 2)
    service = on.service(topic)
    service.clock.jump(-4 * MINUTE)
    service.start()
    topic.produce(event(1), partition=1)
    service.until_consumed(1)
    service.clock.jump(-2 * MINUTE)
    topic.produce(event(10), event(100))
    service.until(lambda: service.get("/readyz")[0] == 503, "readiness shows it")
    assert "partition 0 waits: its records are dated ahead of this host's clock" in service.get("/readyz")[1]
    assert service.metrics().sum("tallyman_lag_seconds") < HOUR / SECOND, "where nothing was read yet, nothing is old"
    assert service.get("/healthz")[0] == 200
    page = service.metrics()
    assert page.by("tallyman_partition_waits_for_clock", "partition") == {("0",): 1, ("1",): 0}
    assert page.by("tallyman_lag_records", "partition") == {("0",): 2, ("1",): 0}
    service.clock.jump(6 * MINUTE)
    service.until_consumed(3)
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    assert service.metrics().sum("tallyman_counted_value") == 111
    service.stop()


# Limits and faults of the configuration


def test_too_many_open_keys_stop_the_service_and_raising_the_limit_loses_nothing(on: Bench) -> None:
    topic = Topic.create(on.kafka)
    topic.produce(*(event(1, customer=f"cus_{n}") for n in range(20)))
    service = on.service(topic, limits={"open_keys": 10})
    service.spawn()
    said = service.fails()
    assert "20 customers in open buckets are more than limits.open_keys allows (10). Nothing is lost." in said
    service.set(limits={"open_keys": 100})
    service.start()
    service.until(lambda: service.metrics().sum("tallyman_counted_value") == 20, "all is counted")
    service.stop()


def test_a_topic_with_other_timestamps_than_configured_is_refused(on: Bench) -> None:
    service = on.service(past_topic(on), kafka={"arrival": "log_append_time"})
    assert "has message.timestamp.type=CreateTime" in service.refuses()
    service = on.service(Topic.create(on.kafka), kafka={"arrival": "create_time"})
    assert "has message.timestamp.type=LogAppendTime, which is better" in service.refuses()


def test_what_is_not_there_is_named_with_its_cure(on: Bench) -> None:
    service = on.service(Topic(on.kafka, "nowhere", 1))
    assert "the topic nowhere does not exist" in service.refuses()
    service = on.service(Topic.create(on.kafka))
    service.environ = {}
    assert "there is no Stripe key: set STRIPE_SECRET_KEY" in service.refuses()
    service.environ = {"STRIPE_SECRET_KEY": "sk_live_x"}
    assert "but STRIPE_SECRET_KEY is no test key" in service.refuses()


# What is scraped


def test_everything_that_was_read_and_made_is_accounted_for_in_the_metrics(on: Bench) -> None:
    topic = past_topic(on, 2)
    at = real_now() - HOUR
    customers = write(on.folder / "customers.yaml", {"a": "cus_a", "free": None, "wrong": "nobody"})
    second = {"name": "calls", "event_types": ["used"], "aggregation": "count", "stripe": {"event_name": "calls"}}
    on.stripe.model.add_meter("calls")
    service = on.service(
        topic,
        meters=[dict(METER), second],
        customers={"kind": "file", "path": customers},
        bill_from=iso(real_now() - DAY),
    )
    for partition in range(2):
        for each in (
            event(1, at=at, customer="a", id="same"),
            event(1, at=at, customer="a", id="same"),
            event(0.25, at=at, customer="free"),
            event(2, at=at, customer="unknown"),
            event(3, at=at, customer="wrong"),
            event(0, at=at, customer="a"),
            event("123456789012345.678", at=at + 2 * MINUTE, customer="a"),
            event("0.1234567890123456", at=at, customer="a"),
            event(1, at=at, customer="a", type="other"),
            event(1, at=at - DAY, customer="a"),
            event(1, at=at - 25 * HOUR, customer="a"),
            event(1, at=at + HOUR, customer="a"),
            event("many", at=at, customer="a"),
            event(1, at=at, subject=None),
            b"no event",
            None,
        ):
            topic.produce(each, at=at, partition=partition, key=b"k" if partition else None)
        topic.produce(event(7, at=at, customer="a"), at=at + 10 * MINUTE, partition=partition)
        topic.produce(None, at=at + 40 * MINUTE, partition=partition)
    service.start()
    service.until_consumed(36)
    service.until(lambda: in_state(service, "unread") + in_state(service, "pending") == 0, "nothing is left to do")
    page = service.metrics()
    assert_valid(page)

    outcomes = page.by("tallyman_events_total", "partition")
    assert outcomes == page.by("tallyman_consumed_total", "partition") == {("0",): 18, ("1",): 18}
    assert page.by("tallyman_unkeyed_total", "partition") == {("0",): 16, ("1",): 0}
    assert page.sum("tallyman_events_total", outcome="dead_letter") == len(service.dead_letters()) == 8
    assert page.by("tallyman_events_total", "reason")[("tombstone",)] == 4
    for metric in ("events_total", "value"):
        counted = page.by(f"tallyman_counted_{metric}", "partition", "meter")
        assert counted == page.by(f"tallyman_closed_{metric}", "partition", "meter")
        assert len(counted) == 4
    states = {state: page.sum("tallyman_totals", state=state) for (state,) in page.by("tallyman_totals", "state")}
    assert states["unbilled"] == states["parked"] / 2 == 4, "in both partitions and meters: one free, two parked"
    assert states["zero"] == 0
    assert states["delivered"] > 0
    assert states["rounded"] == 2, "these are delivered too"
    for meter in ("tokens", "calls"):
        made = page.sum("tallyman_closed_totals_total", meter=meter)
        stand = sum(page.sum("tallyman_totals", meter=meter, state=state) for state in states if state != "rounded")
        assert made == stand
        value = page.sum("tallyman_closed_value", meter=meter)
        assert value == pytest.approx(page.sum("tallyman_totals_value", meter=meter), rel=1e-15)
    assert page.by("tallyman_totals_missing_value", "meter") == {("tokens",): 0, ("calls",): 0}
    for meter in ("tokens", "calls"):
        parked = page.sum("tallyman_totals_value", meter=meter, state="parked")
        assert parked > 0
        assert page.sum("tallyman_undelivered_value", meter=meter) == parked
    delivered = page.sum("tallyman_totals_value", state="delivered")
    assert delivered == float(sum(on.stripe.model.billed().values()))
    service.stop()


def assert_valid(page: Page) -> None:
    """Prometheus would take it, and people would understand it."""
    names = [family.name for family in page.families]
    assert len(names) == len(set(names)), "a family stands once"
    for family in page.families:
        assert family.documentation.endswith("."), f"{family.name}: {family.documentation!r}"
        assert family.type != "unknown"
        assert family.name.startswith(("tallyman_", "python_", "process_"))
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(series) == len(set(series)), f"{family.name} has a series twice"


# Delivery


def write(path: Path, customers: dict[str, str | None]) -> str:
    """The customers' file, replaced in one step; returns where it is."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(customers))
    new.replace(path)
    return str(path)


def test_who_is_unmapped_waits_for_the_file_and_who_is_null_is_not_billed(on: Bench) -> None:
    topic = past_topic(on)
    file = on.folder / "customers.yaml"
    service = on.service(topic, customers={"kind": "file", "path": write(file, {"a": "cus_a", "free": None})})
    service.start()
    past_events(topic, {"a": 1, "free": 2, "new": 3}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "unmapped") == 1, "it is parked")
    service.until(lambda: on.billed() == {"cus_a": "1"}, "the other one is billed")
    assert in_state(service, "unbilled") == 1
    write(file, {})
    service.until(lambda: "holds no customers" in service.log(), "an empty file is refused")
    past_events(topic, {"a": 10}, at=real_now() - HOUR + 10 * MINUTE)
    service.until(lambda: on.billed() == {"cus_a": "11"}, "the last file that was right is still in use")
    write(file, {"a": "cus_a", "free": None, "new": "cus_new"})
    service.until(lambda: on.billed() == {"cus_a": "11", "cus_new": "3"}, "it is released")
    service.until(lambda: in_state(service, "parked", "unmapped") == 0, "nothing is parked")
    service.stop()


def test_hold_counts_and_sends_nothing_and_send_sends_it_later(on: Bench) -> None:
    topic = Topic.create(on.kafka)
    now = real_now()
    topic.produce(event(1, at=now, customer="cus_a"), event(2, at=now, customer="cus_b"))
    service = on.service(topic, stripe={"mode": "hold"})
    service.start()
    service.until_consumed(2)
    service.clock.pass_time(4 * MINUTE)
    service.until(lambda: in_state(service, "unread") == 2, "both are counted and closed")
    service.clock.pass_time(HOUR)
    assert service.metrics().sum("tallyman_oldest_pending_total_age_seconds") > 3_000
    service.stop()
    assert on.stripe.model.stats["requests"] == 0
    service.set(stripe={"mode": "send"})
    service.start()
    service.until(lambda: on.billed() == {"cus_a": "1", "cus_b": "2"}, "both are billed")
    service.stop()


def test_hold_after_send_leaves_no_doubt_about_what_it_holds(on: Bench) -> None:
    """What is held for days has not been tried, and must not wait for a person as if it had."""
    topic = past_topic(on)
    file = on.folder / "customers.yaml"
    service = on.service(topic, customers={"kind": "file", "path": write(file, {"a": "cus_a"})})
    service.start()
    past_events(topic, {"late": 1}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "unmapped") == 1, "it is parked")
    service.stop()
    service.set(stripe={"mode": "hold"})
    service.start()
    write(file, {"late": "cus_late"})
    service.until(lambda: in_state(service, "pending") == 1, "it is released, and held")
    service.until(lambda: service.metrics().sum("tallyman_parked_totals") == 0, "that is committed")
    service.kill()
    service.clock.pass_time(2 * DAY)
    on.stripe.clock.advance(2 * DAY / 1000)
    service.set(stripe={"mode": "send"})
    service.start()
    service.until(lambda: on.billed() == {"cus_late": "1"}, "it is billed")
    service.stop()


def test_shadow_does_everything_but_send(on: Bench) -> None:
    topic = past_topic(on)
    file = on.folder / "customers.yaml"
    customers = {"kind": "file", "path": write(file, {"a": "cus_a", "free": None})}
    service = on.service(topic, customers=customers, stripe={"mode": "shadow"})
    service.start()
    past_events(topic, {"a": 1, "free": 2, "new": 3}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "unmapped") == 1, "it is parked")
    service.until(lambda: in_state(service, "shadowed") == 1, "it would have been sent")
    assert in_state(service, "unbilled") == 1
    write(file, {"a": "cus_a", "free": None, "new": "cus_new"})
    service.until(lambda: in_state(service, "shadowed") == 2, "it would have been released, and sent")
    past_events(topic, {"a": 10}, at=real_now() - HOUR + 10 * MINUTE)
    service.until(lambda: in_state(service, "shadowed") == 3, "so would this")
    service.stop()
    assert on.stripe.model.stats["requests"] == 0
    service.set(stripe={"mode": "send"})
    service.start()
    past_events(topic, {"a": 100}, at=real_now() - HOUR + 20 * MINUTE)
    service.until(lambda: on.billed() == {"cus_a": "100"}, "what somebody else has billed is not billed again")
    service.stop()


def test_a_deactivated_meter_stops_alone_and_goes_on_by_itself_when_it_is_active_again(on: Bench) -> None:
    topic = past_topic(on)
    second = {"name": "calls", "event_types": ["used"], "aggregation": "count", "stripe": {"event_name": "calls"}}
    calls = on.stripe.model.add_meter("calls")
    calls.deactivated_at = 1
    service = on.service(topic, meters=[dict(METER), second])
    service.start()
    past_events(topic, {"cus_a": 5, "cus_b": 6}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "meter") == 2, "its totals wait")
    service.until(lambda: on.billed() == {"cus_a": "5", "cus_b": "6"}, "the other meter goes on")
    assert service.metrics().by("tallyman_stopped_meters", "event_name") == {("calls",): 1}
    asked = on.stripe.model.stats["requests"]
    for _ in range(3):
        service.clock.pass_time(MINUTE + SECOND)
        asked += 1
        service.until(lambda: on.stripe.model.stats["requests"] == asked, "one total asks")  # noqa: B023 - at once
        service.until(lambda: in_state(service, "parked", "meter") == 2, "it waits again")
    calls.deactivated_at = None
    service.clock.pass_time(MINUTE + SECOND)
    service.until(lambda: on.billed() == {"cus_a": "6", "cus_b": "7"}, "all is billed")
    service.until(lambda: in_state(service, "parked") == 0, "nothing waits")
    assert service.metrics().by("tallyman_stopped_meters", "event_name") == {}
    service.stop()


def test_it_is_known_how_long_undelivered_usage_can_still_be_billed(on: Bench) -> None:
    topic = past_topic(on)
    file = on.folder / "customers.yaml"
    service = on.service(
        topic,
        customers={"kind": "file", "path": write(file, {"a": "cus_a"})},
        stripe={"finalization_grace": "2h"},
    )
    service.start()
    at = real_now() - HOUR
    past_events(topic, {"late": 7}, at=at)
    service.until(lambda: in_state(service, "parked", "unmapped") == 1, "it is parked")

    def left(name: str, **labels: str) -> float:
        return service.metrics().sum(name, meter="tokens", **labels)

    assert left("tallyman_undelivered_value") == 7
    left_s = (at + 2 * HOUR - service.clock.now()) / 1000
    assert left("tallyman_cutoff_seconds", state="parked") == pytest.approx(left_s, abs=5)
    expires_s = left_s - 7_200 + 35 * 86_400
    assert left("tallyman_parked_expiry_seconds", reason="unmapped") == pytest.approx(expires_s, abs=5)
    assert "parked_usage_expires" not in service.log()
    service.clock.pass_time(29 * DAY)
    assert left("tallyman_parked_expiry_seconds", reason="unmapped") == pytest.approx(expires_s - 29 * 86_400, abs=5)
    assert left("tallyman_cutoff_seconds", state="parked") < 0
    on.stripe.faults.latency = (5.0, 5.0)
    write(file, {"a": "cus_a", "late": "cus_late"})
    service.until(lambda: service.metrics().by("tallyman_cutoff_seconds", "state").keys() == {("pending",)}, "released")
    service.until(lambda: on.billed() == {"cus_late": "7"}, "it is billed")
    service.until(lambda: service.metrics().by("tallyman_cutoff_seconds", "state") == {}, "nothing is left to bill")
    service.stop()


def test_of_usage_that_will_soon_be_too_old_for_stripe_somebody_is_told(on: Bench) -> None:
    topic = past_topic(on)
    service = on.service(topic, customers={"kind": "file", "path": write(on.folder / "c.yaml", {"a": "cus_a"})})
    service.start()
    past_events(topic, {"late": 7}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "unmapped") == 1, "it is parked")
    service.stop()
    service.clock.pass_time(29 * DAY)
    service.start()
    service.until(lambda: "parked_usage_expires" in service.log(), "a week before it is too late")
    service.stop()


def test_a_refused_key_pauses_and_its_cure_is_noticed(on: Bench) -> None:
    topic = past_topic(on)
    on.stripe.model.keys = {"sk_test_other": None}
    service = on.service(topic)
    service.start()
    past_events(topic, {"cus_a": 1, "cus_b": 2, "cus_c": 3}, at=real_now() - HOUR)
    service.until(lambda: "unauthorised" in service.get("/readyz")[1], "readiness says why")
    assert service.get("/healthz")[0] == 200
    assert service.metrics().sum("tallyman_delivery_paused", reason="unauthorised") == 1
    on.stripe.model.keys = {SECRET_KEY: None}
    service.clock.pass_time(31 * SECOND)
    service.until(lambda: on.billed() == {"cus_a": "1", "cus_b": "2", "cus_c": "3"}, "all is billed")
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    assert in_state(service, "parked") == 0
    service.stop()


def test_answers_in_the_wrong_mode_stop_the_service_at_once(on: Bench) -> None:
    """Every further total would be one more on the wrong customers' invoices."""
    topic = past_topic(on)
    live = "sk_test_but_live_all_the_same"
    on.stripe.model.keys = {live: None}
    service = on.service(topic, stripe={"max_rate": 1})
    service.environ = {"STRIPE_SECRET_KEY": live}
    past_events(topic, {f"cus_{n}": 1 for n in range(50)}, at=real_now() - HOUR)
    service.spawn()
    said = service.fails()
    assert "stripe.livemode is false, but Stripe answered in live mode" in said
    assert on.stripe.model.events == [], "its meters told it before the first total did"
    on.stripe.faults.reads = [Fault.ERROR]
    service.spawn()
    said = service.fails()
    assert "stripe.livemode is false, but Stripe answered in live mode" in said
    assert live not in service.log()
    assert len(on.stripe.model.events) == 1


def test_a_meter_that_would_bill_wrongly_is_not_started_on(on: Bench) -> None:
    """It takes every total and bills something else, without an error that anybody would see."""
    topic = past_topic(on)
    service = on.service(topic)
    (meter,) = on.stripe.model._meters.values()
    meter.formula = "last"
    past_events(topic, {"cus_a": 1}, at=real_now() - HOUR)
    said = service.refuses()
    assert "Stripe would bill wrongly:" in said
    assert "does not sum its events but has the formula last" in said
    assert on.stripe.model.events == []
    service.set(stripe={"mode": "hold"})
    service.start()
    service.stop()
    service.set(stripe={"mode": "send"})
    on.stripe.faults.reads = [Fault.HANG]
    service.start()
    service.until(lambda: len(on.stripe.model.events) == 1, "a Stripe that does not say keeps nobody from starting")
    service.stop()


def test_a_meter_that_bills_wrongly_ends_the_service_as_soon_as_stripe_says_so(on: Bench) -> None:
    """Stripe was away at the start. Whoever started then must not go on for weeks, and until then risks little."""
    topic = past_topic(on)
    service = on.service(topic, stripe={"max_rate": 1000})
    (meter,) = on.stripe.model._meters.values()
    meter.event_time_window = "day"
    past_events(topic, {f"cus_{number}": 1 for number in range(200)}, at=real_now() - HOUR)
    on.stripe.down()
    service.start()
    assert service.log().count("meters_not_looked_at") == 1
    service.until(lambda: service.metrics().sum("tallyman_totals", state="pending") == 200, "all wait")
    on.stripe.up()
    said = service.fails()
    assert "keeps only the newest event of each day (event_time_window)" in said
    assert "Stripe would bill wrongly:" in service.log()
    assert len(on.stripe.model.events) <= Gate.UNKNOWN


def test_meters_are_asked_for_until_stripe_answers(on: Bench) -> None:
    """Also where the key may not ask for them: then nothing more is to be learned."""
    topic = past_topic(on)
    service = on.service(topic)
    on.stripe.faults.reads = [Fault.ERROR, Fault.LOSE]
    service.start()
    service.until(lambda: "meters_looked_at" in service.log(), "it has asked again, and again")
    assert service.log().count("meters_not_looked_at") == 1
    assert on.stripe.faults.reads == []
    past_events(topic, {"cus_a": 1}, at=real_now() - HOUR)
    service.until(lambda: on.billed() == {"cus_a": "1"}, "the total is billed")
    service.stop()
    on.stripe.model.keys = {SECRET_KEY: frozenset({"billing_meter_event_write"})}
    service.start()
    assert service.log().count("meters_not_looked_at") == 2
    service.stop()


def test_a_compacted_topic_is_not_started_on(on: Bench) -> None:
    """Kafka would remove all events of a customer but the newest."""
    topic = past_topic(on)
    entry = ConfigEntry("cleanup.policy", "compact", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic.name, incremental_configs=[entry])
    topic.admin.incremental_alter_configs([resource])[resource].result(10.0)
    assert "has a cleanup.policy with compact" in on.service(topic).refuses()


@pytest.mark.parametrize("body", ["<html>Sign in first</html>", "{}", "[]", "null", '"ok"', '{"livemode": false}'])
def test_a_200_of_somebody_else_delivers_nothing(on: Bench, body: str) -> None:
    """A proxy or a page for signing in answers in Stripe's place: the total must not be taken for delivered."""

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Date", "some day")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Quietly."""

    topic = past_topic(on)
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        service = on.service(topic, stripe={"api_base": f"http://127.0.0.1:{proxy.server_port}"})
        past_events(topic, {"cus_a": 1}, at=real_now() - HOUR)
        service.start()
        service.until(
            lambda: service.metrics().sum("tallyman_stripe_requests_total", result="unproven") >= 1, "it was answered"
        )
        service.stop()
        proxy.shutdown()
    service.set(stripe={"api_base": on.stripe.url})
    service.start()
    service.until(lambda: on.billed() == {"cus_a": "1"}, "it is billed")
    service.stop()


def test_too_many_parked_totals_pause_and_decisions_are_obeyed_all_the_same(on: Bench) -> None:
    """The decisions lie behind totals that are not read any more, and are what makes room for them."""
    topic = past_topic(on)
    service = on.service(topic, limits={"parked": 2})
    service.start()
    past_events(topic, {"nobody": 1, "no_one": 2}, at=real_now() - HOUR)
    service.until(lambda: in_state(service, "parked", "refused") == 2, "both are refused and parked")
    past_events(topic, {"cus_a": 3}, at=real_now() - HOUR + 10 * MINUTE)
    service.until(lambda: in_state(service, "unread") == 1, "the next one is not read")
    assert "nothing is sent to Stripe: parked" in service.get("/readyz")[1]
    identifiers = {total.customer: total.identifier for total in service.totals()}
    decide(service, "discard", identifiers["nobody"])
    service.until(lambda: on.billed() == {"cus_a": "3"}, "there is room, and it is read and billed")
    assert in_state(service, "discarded") == 1
    on.stripe.model.add_customer("no_one")
    decide(service, "release", identifiers["no_one"])
    service.until(lambda: on.billed() == {"cus_a": "3", "no_one": "2"}, "the other one is released and billed")
    service.until(lambda: service.get("/readyz")[0] == 200, "it is ready again")
    service.stop()


def decide(service: Service, action: str, identifier: str) -> None:
    """As an operator's command does, while the service runs."""
    command = Command("discard" if action == "discard" else "release", identifier, "me", "a test", real_now())
    with service.store() as store:
        store.append([Append(Log.TOTALS, b"", encode(command))])


def test_pages_are_there_while_nothing_happens(on: Bench) -> None:
    service = on.service(Topic.create(on.kafka, 3))
    service.start()
    assert service.get("/healthz") == (200, "ok\n")
    until(lambda: service.get("/readyz") == (200, "ok\n"), "it is ready")
    assert_valid(service.metrics())
    assert service.get("/")[0] == 404
    service.stop()
