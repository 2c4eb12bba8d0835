"""From another reporter to this one: shadow beside it, compare, and take over at a time, without loss and overlap."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import pytest
from confluent_kafka import Producer
from typer.testing import CliRunner

from consumer.cli import app
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.sandbox.stripe_wire import read_call
from tests.kafka.harness import (
    HOUR,
    MINUTE,
    SECOND,
    TOKENS,
    Bench,
    Service,
    Topic,
    event,
    iso,
    producing,
    real_now,
)

pytestmark = pytest.mark.kafka

CUSTOMERS: Final = ("cus_a", "cus_b", "cus_c")
T: Final = real_now() // HOUR * HOUR - 4 * HOUR
"""The cut-over: a full hour."""


class Used(NamedTuple):
    """One usage event."""

    at: int
    customer: str
    n: Decimal
    arrival: int
    id: str


def usage(since: int, until: int) -> list[Used]:
    """Of every customer in every minute, as it arrives: some late, and events at the very bounds."""
    chance = random.Random(since)  # noqa: S311 - traffic
    made = []
    for minute in range(since, until, MINUTE):
        for customer in CUSTOMERS:
            at = minute + chance.choice((0, 1, 30_000, 59_999))
            late = chance.random() < 0.1
            n = Decimal(chance.randint(1, 99)) / 10
            made.append(Used(at, customer, n, at + (chance.randint(3, 9) * MINUTE if late else SECOND), ""))
    return [each._replace(id=f"{each.customer}-{each.at}") for each in sorted(made, key=lambda each: each.arrival)]


def produce(topic: Topic, used: Iterable[Used], *, close: int) -> None:
    """Each event twice, dated as it arrived; and at last what lets the windows before that time close."""
    producer = Producer({"bootstrap.servers": topic.kafka.bootstrap_servers, "linger.ms": 5})
    with producing(producer, topic.name) as append:
        for each in used:
            value = event(float(each.n), at=each.at, customer=each.customer, id=each.id)
            for _ in range(2):
                append(value, partition=CUSTOMERS.index(each.customer) % topic.partitions, timestamp=each.arrival)
        for partition in range(topic.partitions):
            append(None, partition=partition, timestamp=close)


def billed_by_another(stripe: StripeStandIn, used: Iterable[Used]) -> None:
    """The reporter of today: sums of an hour, dated at its last second."""
    for (customer, hour), value in sums(used, HOUR).items():
        given = {
            "event_name": TOKENS,
            "identifier": f"old-{customer}-{hour}",
            "timestamp": hour // 1000 + 3599,
            "payload[stripe_customer_id]": customer,
            "payload[value]": str(value),
        }
        call = read_call("POST", "/v1/billing/meter_events", urlencode(given), f"Bearer {SECRET_KEY}")
        assert stripe.model.handle(call).status == 200


def sums(used: Iterable[Used], size: int) -> dict[tuple[str, int], Decimal]:
    """By customer and time."""
    found: dict[tuple[str, int], Decimal] = {}
    for each in used:
        key = (each.customer, each.at // size * size)
        found[key] = found.get(key, Decimal(0)) + each.n
    return found


class Team:
    """Who runs the service, and types commands."""

    def __init__(self, on: Bench, topic: Topic, storage: str) -> None:
        self.stripe = on.stripe
        self.service: Service = on.service(topic, storage=None, stripe={"mode": "shadow"})
        path = {"path": str(self.service.folder / "tallyman.db")} if storage == "sqlite" else {}
        self.service.set(storage={"kind": storage, **path}, windows={"lateness": "2m"})

    def tallyman(self, *words: str) -> Any:
        return CliRunner().invoke(app, [*words, "-c", str(self.service.write())], env=self.service.environ)

    def lines(self, *words: str, exit_code: int = 0) -> list[dict[str, Any]]:
        result = self.tallyman(*words, "--json")
        assert result.exit_code == exit_code, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    def pending(self) -> list[dict[str, Any]]:
        return self.lines("totals", "--limit", "0", "--state", "pending")

    def shadowed(self) -> float:
        return self.service.metrics().sum("tallyman_totals_value", state="shadowed")

    def until_shadowed(self, used: Iterable[Used]) -> None:
        wanted = float(sum(each.n for each in used))
        self.service.until(lambda: self.shadowed() == pytest.approx(wanted), f"{wanted} is shadowed", within=40)

    def compare(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What `reconcile` says: nothing differs."""
        *days, compared = self.lines("reconcile")
        return days, compared

    def take_over(self, at: int) -> None:
        """As the guide says."""
        when = iso(at)[:-5] + "Z"
        self.service.stop()
        done = self.tallyman("reset", "--bill-from", when, "--yes")
        assert done.exit_code == 0, done.output
        assert f"Set bill_from: {when} and stripe.mode: send in " in done.stdout
        self.service.set(bill_from=when, stripe={"mode": "send"})
        assert {each["what"] for each in self.lines("check") if each["level"] == "error"} == set()
        self.service.start()

    def until_billed(self, used: Iterable[Used]) -> None:
        wanted = sum(each.n for each in used)
        self.service.until(lambda: sum(self.stripe.model.billed().values()) == wanted, f"{wanted} is billed", within=60)


def right(stripe: StripeStandIn, used: list[Used]) -> None:
    """Every hour before the cut-over as the other one reports it, every minute since as we do."""
    billed = {(customer, minute * 1000): value for (_, customer, minute), value in stripe.model.billed().items()}
    before = {(customer, hour + HOUR - MINUTE): n for (customer, hour), n in sums(_before(used), HOUR).items()}
    assert billed == before | sums(_since(used), MINUTE)


def _before(used: Iterable[Used]) -> list[Used]:
    return [each for each in used if each.at < T]


def _since(used: Iterable[Used]) -> list[Used]:
    return [each for each in used if each.at >= T]


@pytest.mark.parametrize("storage", ["sqlite", "kafka"])
def test_a_cut_over_loses_nothing_and_doubles_nothing(on: Bench, storage: str) -> None:
    """Shadow runs past the time of the cut-over; from there on everything is counted anew, and billed."""
    topic = Topic.create(on.kafka, 2, arrival="create_time")
    team = Team(on, topic, storage)
    first, second, third = (
        usage(T - 2 * HOUR, T - HOUR),
        usage(T - HOUR, T + 20 * MINUTE),
        usage(T + HOUR, T + 2 * HOUR),
    )
    produce(topic, first, close=T - HOUR + 20 * MINUTE)
    warnings = {each["says"] for each in team.lines("check") if each["level"] == "warning" and each["what"] == "stripe"}
    assert warnings == {
        "stripe.mode is shadow: nothing is sent, somebody else has to bill; `tallyman reconcile` compares"
    }
    team.service.start()
    team.until_shadowed(first)
    billed_by_another(on.stripe, first)

    days, compared = team.compare()

    assert (days, compared["mode"], compared["not_asked"]) == ([], "shadow", 0)
    assert Decimal(compared["equal_value"]) == sum(each.n for each in first)
    page = team.service.metrics
    team.service.until(lambda: page().sum("tallyman_reconcile_days", state="equal") == compared["equal"], "it is shown")
    assert page().by("tallyman_reconcile_surplus_value", "event_name") == {(TOKENS,): 0}
    assert abs(page().sum("tallyman_reconcile_timestamp_seconds") - real_now() / 1000) < 60

    produce(topic, second, close=T + 40 * MINUTE)
    billed_by_another(on.stripe, _before(second))
    team.until_shadowed(first + second)
    assert on.stripe.model.billed().keys() == {
        (TOKENS, c, (T - h * HOUR) // 1000 - 60) for c in CUSTOMERS for h in (0, 1)
    }

    team.take_over(T)
    team.until_billed(first + second)
    produce(topic, third, close=T + 2 * HOUR + 20 * MINUTE)
    team.until_billed(first + second + third)
    right(on.stripe, first + second + third)

    team.service.until(lambda: not team.pending(), "it is known here, too")
    states = {each["identifier"]: each["state"] for each in team.lines("totals", "--limit", "0")}
    assert set(states.values()) == ({"delivered", "shadowed"} if storage == "kafka" else {"delivered"})
    assert len(states) == len(team.lines("totals", "--limit", "0"))
    if storage == "kafka":
        # What was shadowed before is known still: all that Stripe has is explained.
        days, compared = team.compare()
        assert (days, compared["mode"], compared["shadowed"]) == (
            [],
            "send",
            f"{sum(u.n for u in _before(first + second))}",
        )
    team.service.stop()


def test_the_time_of_a_cut_over_may_lie_ahead(on: Bench) -> None:
    """Shadow ends, and billing is switched on, before the time comes: what is used until then is not billed here."""
    topic = Topic.create(on.kafka, 2, arrival="create_time")
    team = Team(on, topic, "kafka")
    first, second = usage(T - HOUR, T - 20 * MINUTE), usage(T - 20 * MINUTE, T + 20 * MINUTE)
    produce(topic, first, close=T - MINUTE)
    team.service.start()
    team.until_shadowed(first)

    team.take_over(T)
    produce(topic, second, close=T + 40 * MINUTE)
    billed_by_another(on.stripe, _before(first + second))

    team.until_billed(first + second)
    right(on.stripe, first + second)
    team.service.stop()
