"""Reading Stripe: pages, windows, what is tried again and what is not, and how exact a summary is."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from consumer.runtime.clocks import SystemClock
from consumer.runtime.stripe import WrongMode
from consumer.runtime.stripe_reads import (
    ATTEMPTS,
    BudgetSpent,
    KeyRefused,
    NotThere,
    ReadFailed,
    Silent,
    StripeReads,
    Summary,
)
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Clock, Fault, StripeStandIn
from consumer.sandbox.stripe_wire import read_call
from consumer.totals import SCALE

NOW = 1_760_000_040
MINUTE = NOW // 60 * 60
HOUR = NOW // 3600 * 3600


@pytest.fixture
def stand_in() -> Iterator[StripeStandIn]:
    keys = {SECRET_KEY: None, "rk_test_narrow": frozenset({"customer_read"})}
    with StripeStandIn(clock=Clock(lambda: NOW), keys=keys, accept_any_customer=True) as served:
        yield served


class Client:
    """A client whose pauses are noted and not waited for."""

    def __init__(self, stand_in: StripeStandIn) -> None:
        self.url = stand_in.url
        self.pauses: list[float] = []

    @contextmanager
    def __call__(
        self, key: str = SECRET_KEY, *, livemode: bool = False, budget: int | None = None
    ) -> Iterator[StripeReads]:
        reads = StripeReads(
            key,
            api_base=self.url,
            livemode=livemode,
            clock=SystemClock(),
            budget=budget,
            pause=self.pauses.append,
        )
        try:
            yield reads
        finally:
            reads.close()


@pytest.fixture
def client(stand_in: StripeStandIn) -> Client:
    return Client(stand_in)


def use(stand_in: StripeStandIn, value: str, at: int = NOW, *, customer: str = "cus_a") -> None:
    """One more Meter Event of the customer."""
    body = f"event_name=tokens&payload[stripe_customer_id]={customer}&payload[value]={value}&timestamp={at}"
    answer = stand_in.model.handle(read_call("POST", "/v1/billing/meter_events", body, f"Bearer {SECRET_KEY}"))
    assert answer.status == 200


def test_all_meters_are_found_however_many_pages_they_fill(stand_in: StripeStandIn, client: Client) -> None:
    """Ten rows are what Stripe gives unasked: the eleventh meter must not look missing."""
    for number in range(230):
        stand_in.model.add_meter(f"m{number}")
    stand_in.model.add_meter("daily", formula="count", event_time_window="day", customer_key="who")
    with client() as reads:
        found = reads.meters()
        assert len(found) == 231
        assert reads.calls == 3
        meter = found["daily"]
        assert (meter.formula, meter.event_time_window, meter.customer_key, meter.sums) == (
            "count",
            "day",
            "who",
            False,
        )
        assert found["m0"].sums


def test_of_several_meters_of_one_event_name_the_active_one_counts_or_else_the_newest(
    stand_in: StripeStandIn, client: Client
) -> None:
    add = stand_in.model.add_meter
    _, active, _ = (add("used", deactivated_at=at) for at in (NOW, None, NOW))
    _, newest = (add("left", deactivated_at=NOW) for _ in range(2))
    with client() as reads:
        assert {name: each.id for name, each in reads.meters().items()} == {"used": active.id, "left": newest.id}


def test_a_minute_is_the_sum_of_its_events_and_nothing_known_is_zero(stand_in: StripeStandIn, client: Client) -> None:
    """Half-open, as windows are."""
    meter = stand_in.model.add_meter("tokens")
    for value, at in (("0.1", MINUTE), ("0.2", MINUTE + 59), ("7", MINUTE + 60), ("9", MINUTE - 1)):
        use(stand_in, value, at)
    with client() as reads:
        found = reads.minute(meter.id, "cus_a", MINUTE)
        assert (found.start, found.end, found.value) == (MINUTE, MINUTE + 60, 3 * SCALE // 10)
        assert 0 < found.uncertainty < 100
        assert reads.minute(meter.id, "cus_b", MINUTE) == Summary(MINUTE, MINUTE + 60, 0, 0)


def test_fifteen_digits_are_read_as_they_were_written(stand_in: StripeStandIn, client: Client) -> None:
    """A binary fraction is between two decimals: which of them was meant is told by the shortest."""
    meter = stand_in.model.add_meter("tokens")
    use(stand_in, "123456789.123457")
    with client() as reads:
        assert reads.minute(meter.id, "cus_a", MINUTE).value == 123456789123457 * SCALE // 10**6


def test_hours_and_days_come_in_rows(stand_in: StripeStandIn, client: Client) -> None:
    """A row for each window in which there was usage, over as many pages as it takes."""
    meter = stand_in.model.add_meter("tokens")
    for hour in range(120):
        use(stand_in, "1", HOUR - hour * 3600)
    with client() as reads:
        rows = reads.summaries(meter.id, "cus_a", HOUR - 200 * 3600, HOUR + 3600, window="hour")
        assert [row.start for row in rows] == [HOUR - hour * 3600 for hour in range(120)]
        assert {row.value for row in rows} == {SCALE}
        assert reads.calls == 2
        with pytest.raises(ValueError, match="whole days"):
            reads.summaries(meter.id, "cus_a", HOUR, HOUR + 86_400 - 60, window="day")


@pytest.mark.parametrize("fault", [Fault.RATE_LIMITED, Fault.LOCK_TIMEOUT, Fault.LOSE, Fault.ACCEPT_LOSE, Fault.ERROR])
def test_what_passes_is_asked_again_and_within_bounds(stand_in: StripeStandIn, client: Client, fault: Fault) -> None:
    """A read may be repeated, a few times."""
    stand_in.model.add_meter("tokens")
    stand_in.faults.reads = [fault, fault]
    with client() as reads:
        assert len(reads.meters()) == 1
        assert reads.calls == 3
        stand_in.faults.reads = [fault] * 100
        with pytest.raises(Silent, match="try again later"):
            reads.meters()
        assert reads.calls == 3 + ATTEMPTS
    assert [pause for pause in client.pauses if pause >= 0.5][:2] == [0.5, 1.0]


def test_a_refusal_is_not_asked_again(stand_in: StripeStandIn, client: Client) -> None:
    """It would be refused again; the message names the key's lack without naming the key."""
    with client("rk_test_narrow") as reads:
        with pytest.raises(KeyRefused, match="permission") as refused:
            reads.meters()
        assert reads.calls == 1
        assert "rk_test_narrow" not in str(refused.value)
        with pytest.raises(NotThere):
            reads.customer("cus_none")
    with client("sk_test_wrong") as reads, pytest.raises(KeyRefused):
        reads.meters()
    meter = stand_in.model.add_meter("tokens")
    with client() as reads, pytest.raises(NotThere, match="nobody"):
        reads.minute(meter.id, "nobody", MINUTE)


def test_answers_of_another_mode_are_not_taken(stand_in: StripeStandIn, client: Client) -> None:
    """Sums of a sandbox say nothing of live totals."""
    stand_in.model.add_meter("tokens")
    with client(livemode=True) as reads, pytest.raises(WrongMode):
        reads.meters()


def test_no_more_calls_are_made_than_were_allowed(stand_in: StripeStandIn, client: Client) -> None:
    """Repetitions count: Stripe counts them too."""
    stand_in.model.add_meter("tokens")
    stand_in.faults.reads = [Fault.RATE_LIMITED]
    with client(budget=2) as reads:
        reads.meters()
        with pytest.raises(BudgetSpent) as spent:
            reads.meters()
        assert isinstance(spent.value, ReadFailed)
        assert (reads.calls, stand_in.model.stats["requests"]) == (2, 2)


def test_the_time_is_that_of_stripe(stand_in: StripeStandIn, client: Client) -> None:
    """A host whose clock is wrong must not take a summary for older than it is."""
    stand_in.model.add_meter("tokens")
    with client() as reads:
        reads.meters()
        assert NOW * 1000 <= reads.now() < NOW * 1000 + 60_000


def test_customers_tell_whether_they_are_deleted(stand_in: StripeStandIn, client: Client) -> None:
    """What is sent to a deleted one is taken, and rejected later."""
    stand_in.model.add_customer("cus_a", name="Ann", metadata={"of": "us"})
    stand_in.model.delete_customer("cus_b")
    with client() as reads:
        ann = reads.customer("cus_a")
        assert (ann.name, ann.deleted, ann.metadata) == ("Ann", False, {"of": "us"})
        assert reads.customer("cus_b").deleted
