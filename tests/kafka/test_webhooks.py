"""What Stripe rejects after it took it: notified by a stand-in, taken by the service, and refused. On either store."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from consumer.cli import app
from consumer.config import load
from consumer.deliver.entries import decode_outcome
from consumer.runtime import archive
from consumer.sandbox.kafka import free_ports
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_notifications import Destination, signature, thin
from consumer.sandbox.stripe_server import Fault
from consumer.storage import Log
from tests.kafka.harness import DAY, MINUTE, Bench, Service, Topic, iso, past_events, real_now, until

pytestmark = pytest.mark.kafka

PARTITIONS: Final = 4
SECRET: Final = "whsec_harness"  # noqa: S105 - opens nothing
LAG_S: Final = 20
"""So long the stand-in works on an event before it is counted or rejected."""
CODE: Final = "meter_event_customer_not_found"


@pytest.fixture
def on(on: Bench) -> Bench:
    on.stripe.model.lag = LAG_S
    return on


@pytest.fixture(params=["sqlite", "kafka"])
def service(request: pytest.FixtureRequest, on: Bench) -> Service:
    topic = Topic.create(on.kafka, PARTITIONS, arrival="create_time")
    return worker(on, topic) if request.param == "kafka" else listening(on.service(topic))


def worker(on: Bench, topic: Topic) -> Service:
    """A process whose state is in Kafka; a group notices within six seconds that it is gone."""
    made = on.service(topic, bill_from=iso(real_now() // DAY * DAY - 20 * DAY))
    made.config["storage"] = {"kind": "kafka"}
    made.set(kafka={"options": made.config["kafka"]["options"] | {"session.timeout.ms": 6000}})
    return listening(made)


def listening(made: Service) -> Service:
    """It takes notifications."""
    port, _ = free_ports()
    made.set(webhook={"host": "127.0.0.1", "port": port})
    made.environ["STRIPE_WEBHOOK_SECRET"] = SECRET
    return made


def address(service: Service) -> Destination:
    return Destination(f"http://127.0.0.1:{service.config['webhook']['port']}/stripe", SECRET)


def deliver(*services: Service, customers: int = 6) -> None:
    """Usage of so many customers, over all partitions, billed; Stripe has yet to work on it."""
    topic = services[0].topic
    for number in range(customers):
        at = real_now() - 60 * MINUTE
        past_events(topic, {f"cus_{number}": 5 + number}, at=at, partition=number % topic.partitions, closed=False)
    for partition in range(topic.partitions):
        topic.produce(None, at=real_now() - 50 * MINUTE, partition=partition)
    until(lambda: standing(*services)["delivered"] == customers, "all are delivered", within=60.0)


def reject(on: Bench, *customers: str) -> None:
    """These are deleted before Stripe has worked on their events."""
    for customer in customers:
        on.stripe.model.delete_customer(customer)
    on.stripe.clock.advance(LAG_S + 20)


def standing(*services: Service) -> dict[str, float]:
    """How many totals are delivered, refused, or nowhere, over these processes."""
    pages = [each.metrics() for each in services]
    return {
        "delivered": sum(page.sum("tallyman_totals", state="delivered") for page in pages),
        "refused": sum(page.sum("tallyman_totals", state="refused") for page in pages),
        "refused value": sum(page.sum("tallyman_totals_value", state="refused") for page in pages),
        "missing": sum(page.sum("tallyman_totals_missing_value") for page in pages),
    }


def tallyman(service: Service, *words: str) -> Any:
    """A command beside the service."""
    env = {"COLUMNS": "250", **service.environ}
    return CliRunner().invoke(app, [*words, "-c", str(service.folder / "tallyman.yaml")], env=env)


def lines(service: Service, *words: str) -> list[dict[str, Any]]:
    result = tallyman(service, *words, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def outcomes(service: Service) -> list[tuple[str, str]]:
    """Customer and how, of all outcomes in their order."""
    with archive.opened(load(service.folder / "tallyman.yaml", service.environ), now=service.clock.now) as logs:
        found = [decode_outcome(each.value) for each in logs.logged(Log.OUTCOMES)]
    return sorted((each.customer, each.how) for each in found)


def notify(on: Bench, service: Service, event: dict[str, Any]) -> int:
    """Stripe notifies once more, and does not repeat it."""
    body = thin(event)
    headers = {"Stripe-Signature": signature(body, SECRET, int(on.stripe.clock()))}
    request = urllib.request.Request(address(service).url, body, headers)  # noqa: S310 - our own page
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own page
            return int(answer.status)
    except urllib.error.HTTPError as failed:
        with failed:
            return failed.code


def reported(service: Service, result: str) -> float:
    """Notifications that came to this."""
    return service.metrics().sum("tallyman_stripe_reports_total", result=result)


def test_what_stripe_took_and_rejected_is_refused_once_and_reconciles(on: Bench, service: Service) -> None:
    service.start()
    on.stripe.notify(address(service))
    deliver(service)

    reject(on, "cus_3")
    service.until(lambda: standing(service)["refused"] == 1, "it is refused")
    assert standing(service) == {"delivered": 5, "refused": 1, "refused value": 8, "missing": 0}
    (refused,) = lines(service, "totals", "--limit", "0", "--state", "refused")
    assert (refused["customer"], refused["value"], "billed" in refused) == ("cus_3", "8", False)
    assert refused["reason"] == f"{CODE}: The event was rejected: {CODE}."
    shown = tallyman(service, "totals", "--customer", "cus_3")
    assert "refused" in shown.stdout
    (story,) = lines(service, "totals", "--explain", refused["identifier"])
    assert (story["state"], story["message"]) == ("refused", refused["reason"])
    assert on.billed() == {f"cus_{n}": str(5 + n) for n in range(6) if n != 3}

    reconciled = tallyman(service, "reconcile", "--since", "3d", "--json")
    assert reconciled.exit_code == 0, reconciled.output
    compared = json.loads(reconciled.stdout.splitlines()[-1])
    assert (compared["differs"], compared["open"], compared["doubt"]) == (0, 0, 0)

    # Once more, and again in another report: nothing moves.
    (report,) = on.stripe.model.reports()
    assert notify(on, service, report) == 200
    again = {**report, "id": "evt_again"}
    on.stripe.model._reports.append(again)
    service.until(lambda: reported(service, "taken") == 2, "the second is taken")
    assert reported(service, "repeated") == 1
    service.stop()
    service.start()
    until(lambda: standing(service)["delivered"] == 5, "all is there")
    assert notify(on, service, report) == 200, "a new process does not know it, and stage 2 does"
    on.stripe.model.rejected_later.clear()
    deliver_more(service)
    assert standing(service) == {"delivered": 6, "refused": 1, "refused value": 8, "missing": 0}
    assert [each for each in outcomes(service) if each[0] == "cus_3"] == [("cus_3", "delivered"), ("cus_3", "refused")]
    assert "cus_3" not in service.log().split('"stripe_rejected_events"', 1)[1].splitlines()[0]
    service.stop()


def deliver_more(service: Service) -> None:
    """One more total: what was told before it in its partition has been read when it is delivered."""
    at = real_now() - 40 * MINUTE
    before = standing(service)["delivered"]
    past_events(service.topic, {"cus_3x": 1}, at=at)
    until(lambda: standing(service)["delivered"] == before + 1, "it is delivered", within=30.0)


def test_on_hold_what_was_rejected_is_refused_and_a_kill_after_the_notification_loses_nothing(
    on: Bench, service: Service
) -> None:
    """No total is read then; what was taken lies in their log when the process is killed, applied or not, and twice."""
    service.start()
    deliver(service)
    service.stop()
    service.set(stripe={"mode": "hold"})
    service.start()
    reject(on, "cus_1", "cus_2")
    on.stripe.notify(address(service))
    until(lambda: on.stripe.notifications.answers == [200], "it is taken")
    service.kill()
    service.start()
    service.until(lambda: standing(service)["refused"] == 2, "both are refused")
    (report,) = on.stripe.model.reports()
    on.stripe.model._reports.append({**report, "id": "evt_again"})
    until(lambda: on.stripe.notifications.answers == [200, 200], "the second one is taken")
    service.kill()
    service.set(stripe={"mode": "send"})
    service.start()
    deliver_more(service)
    assert standing(service) == {"delivered": 5, "refused": 2, "refused value": 13, "missing": 0}
    assert [how for customer, how in outcomes(service) if customer in {"cus_1", "cus_2"}] == [
        "delivered",
        "refused",
    ] * 2
    service.stop()


def test_a_total_whose_answer_was_lost_is_not_delivered_by_an_event_that_was_rejected(
    on: Bench, service: Service
) -> None:
    """Stripe took it, nobody heard so, and it was rejected. The next attempt is told that the event exists."""
    on.stripe.faults.plan = lambda number, _: Fault.ACCEPT_LOSE if number == 0 else Fault.LOSE
    service.start()
    on.stripe.notify(address(service))
    at = real_now() - 60 * MINUTE
    past_events(service.topic, {"cus_0": 5}, at=at, closed=False)
    for partition in range(PARTITIONS):
        service.topic.produce(None, at=real_now() - 50 * MINUTE, partition=partition)
    service.until(lambda: on.stripe.model.events, "Stripe has it")
    reject(on, "cus_0")
    service.until(lambda: reported(service, "postponed") > 0, "it is told, and to be told again")
    assert reported(service, "taken") == 0
    on.stripe.faults.plan = None
    service.until(lambda: standing(service)["refused"] == 1, "it is refused", within=60.0)
    assert standing(service) == {"delivered": 0, "refused": 1, "refused value": 5, "missing": 0}
    *before, last = outcomes(service)
    assert last == ("cus_0", "refused")
    assert before in ([], [("cus_0", "duplicate")]), "the attempt may be quicker than the reader of the log"
    service.until(lambda: reported(service, "taken") == 1, "it is not told any more")
    assert on.billed() == {}
    service.stop()


def test_a_notification_waits_for_the_service(on: Bench, service: Service) -> None:
    """While nobody listens, or Stripe does not tell more, it is repeated."""
    service.start()
    deliver(service)
    service.stop()
    reject(on, "cus_0")
    on.stripe.notify(address(service))
    until(lambda: len(on.stripe.notifications.answers) >= 2, "nobody answers")
    service.start()
    service.until(lambda: standing(service)["refused"] == 1, "it is refused")
    assert set(on.stripe.notifications.answers) <= {0, 503, 200}
    service.stop()


def test_whoever_is_notified_the_owner_of_a_total_refuses_it(on: Bench) -> None:
    """Two processes: Stripe tells one of them, and totals of both are meant."""
    topic = Topic.create(on.kafka, PARTITIONS, arrival="create_time")
    first, second = worker(on, topic), worker(on, topic)
    second.set(webhook=None)
    for each in (first, second):
        each.start()

    def shared() -> bool:
        owned = [each.metrics().sum("tallyman_owned_partitions", stage="deliver") for each in (first, second)]
        return sum(owned) == PARTITIONS and min(owned) > 0

    until(shared, "both have partitions", within=40.0)
    on.stripe.notify(address(first))
    deliver(first, second, customers=16)
    reject(on, *(f"cus_{n}" for n in range(5)))
    until(lambda: standing(first, second)["refused"] == 5, "they are refused", within=40.0)
    assert standing(first, second)["delivered"] == 11
    assert standing(first, second)["missing"] == 0
    assert standing(first)["refused"] < 5, "the other one has some"
    for each in (first, second):
        each.stop()


def test_what_a_webhook_needs_is_checked_before_a_start(on: Bench) -> None:
    service = listening(on.service(Topic.create(on.kafka)))

    def found() -> list[tuple[str, str]]:
        lines = map(json.loads, tallyman(service, "check", "--json").stdout.splitlines())
        return [(each["level"], each["says"]) for each in lines if each["what"] == "webhook"]

    service.write()
    host, port = service.config["webhook"].values()
    assert found() == [
        ("ok", "Stripe's notifications are taken where they are signed with a secret"),
        ("ok", f"{host}:{port} is free"),
    ]
    service.environ["STRIPE_WEBHOOK_SECRET"] = SECRET_KEY
    with socket.create_server((host, port)):
        (secret, place) = found()
        assert secret[0] == place[0] == "error"
        assert "is no signing secret" in secret[1]
        assert place[1].endswith("end what does, or change webhook.port")
        assert "is no signing secret" in service.refuses()
        service.environ["STRIPE_WEBHOOK_SECRET"] = SECRET
        assert service.refuses().startswith(f"webhook: {host}:{port} cannot be listened on")
