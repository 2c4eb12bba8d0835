"""`tallyman reconcile`, on a store that stage 2 has written and against the Stripe stand-in that it sent to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from typer.testing import CliRunner

from consumer import totals as log_of_totals
from consumer.cli import account as commands
from consumer.cli import app
from consumer.deliver.answers import Heard, Lost
from consumer.deliver.customers import Customers
from consumer.deliver.delivery import Attempt
from consumer.deliver.entries import SAME_IDENTIFIER_FOR, Outcome, decode_outcome, encode_outcome, refused
from consumer.deliver.reports import Reports
from consumer.runtime.customers import Mapped, Passthrough
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Clock, StripeStandIn
from consumer.sandbox.stripe_wire import Answer, Call
from consumer.storage import Append, Log
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Comparison, Record, Rejection, Report, Total
from tests.totals import total_of
from tests.unit.stage2 import StageTwo, post

DAY: Final = 86_400
T0: Final = 1_793_491_200
"""2026-11-01T00:00:00Z."""
NOON: Final = T0 + DAY // 2
LATER: Final = T0 + 3 * DAY

MONTH: Final = ("--since", "2026-11-01", "--until", "2026-11-04")

CONFIG: Final = """\
pipeline: test
storage: {{kind: sqlite, path: {path}}}
stripe: {{livemode: false, api_base: "{base}"}}
meters:
  - {{name: ai, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens}}}}
  - {{name: api, event_types: [called], aggregation: count, stripe: {{event_name: calls}}}}
"""


class Account:
    """A pipeline that has delivered to the stand-in, and both seen from outside."""

    def __init__(self, directory: Path, stripe: StripeStandIn) -> None:
        self.stripe = stripe
        self.path = directory / "tallyman.db"
        self.config = directory / "tallyman.yaml"
        self.config.write_text(CONFIG.format(path=self.path, base=stripe.url))

    def deliver(
        self,
        *given: Record,
        now: int | None = None,
        silent: bool = False,
        lost: bool = False,
        shadow: bool = False,
        names: Customers | None = None,
    ) -> Reports:
        """Stage 1 closes totals and stage 2 sends them. ``silent``: Stripe does not answer; ``lost``: it takes them."""
        now = (int(self.stripe.clock()) if now is None else now) * 1000

        def answer(attempt: Attempt) -> Heard:
            heard = Lost("TimeoutError") if silent else self.send(attempt)
            return Lost("TimeoutError") if lost else heard

        with SqliteStore.open(self.path, now=lambda: now, create=True, lock=False) as store:
            store.append(Append(Log.TOTALS, b"k", log_of_totals.encode(each)) for each in given)
            life = StageTwo(store, store, names or Passthrough(), now, shadow=shadow)
            life.work(answer)
            return life.delivery.reports

    def outcomes(self) -> list[Outcome]:
        """What became of totals, in order."""
        with SqliteStore.open(self.path, now=lambda: 0, create=False, lock=False) as store:
            return [decode_outcome(each.value) for each in store.logged(Log.OUTCOMES)]

    def send(self, attempt: Attempt) -> Heard:
        """One Meter Event."""
        answer = post(self.stripe, attempt)
        assert answer.status == 200
        return answer

    def sent_by_another(self, value: str, customer: str = "cus_alice", timestamp: int = NOON) -> None:
        """Usage that is not ours."""
        name = f"other-{value}-{customer}-{timestamp}"
        payload = {"stripe_customer_id": customer, "value": value}
        self.send(Attempt(name, name, "tokens", "tokens", value, payload, timestamp, customer))

    def reconcile(self, *words: str, json_: bool = True, given: Sequence[str] = MONTH) -> Any:
        """The command, over the first three days of the month unless something else is given."""
        return CliRunner().invoke(
            app,
            ["reconcile", "-c", str(self.config), *given, *words, *(["--json"] if json_ else [])],
            env={"STRIPE_SECRET_KEY": SECRET_KEY, "COLUMNS": "250"},
        )


def found(result: Any, exit_code: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The days that are not equal, and what was compared."""
    assert result.exit_code == exit_code, result.stderr
    *days, compared = map(json.loads, result.stdout.splitlines())
    assert compared.pop("kind") == "compared"
    assert sum(each["differs"] for each in compared["meters"].values()) == compared["differs"]
    assert {day.pop("kind") for day in days} <= {"day"}
    return days, compared


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    clock = Clock(lambda: float(LATER))
    with StripeStandIn(clock=clock, accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        stripe.model.add_meter("calls")
        yield Account(tmp_path, stripe)


def total(
    timestamp: int, customer: str = "cus_alice", value: str = "5", *, event_name: str = "tokens", offset: int = 0
) -> Total:
    return total_of(
        f"{timestamp}-{customer}-{event_name}",
        timestamp,
        customer,
        value,
        event_name=event_name,
        partition=2,
        first_offset=offset,
        last_offset=offset + 9,
    )


def later(account: Account, hours: int) -> None:
    account.stripe.clock.advance(hours * 3600)


# Equal


def test_usage_that_is_dated_ahead_of_our_clock_is_found_in_the_logs(account: Account) -> None:
    """It was delivered before its day had begun, by the clock of the host that has the store."""
    account.deliver(total(T0 + 60), now=T0 - 3600)

    days, compared = found(account.reconcile())

    assert (days, compared["equal"]) == ([], 1)


def test_what_is_delivered_while_it_is_compared_is_open_and_not_wrong(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late usage of an old day comes to Stripe between our look at our records and its answer."""
    account.deliver(total(NOON))
    later(account, 24)
    execute = account.stripe.model.execute
    late = [total(NOON + 60)]

    def meanwhile(call: Call, **options: Any) -> Answer:
        if "event_summaries" in call.path and late:
            account.deliver(late.pop())
        return execute(call, **options)

    monkeypatch.setattr(account.stripe.model, "execute", meanwhile)
    ((day,), _) = found(account.reconcile())

    assert (day["state"], day["ours"], day["stripe"]) == ("open", "5", "10")
    assert day["why"] == "it changed while it was compared"


def test_what_was_delivered_and_counted_is_equal(account: Account) -> None:
    account.deliver(
        *(total(T0 + day * DAY + 60 * minute, value="0.1") for day in range(3) for minute in range(1440)[::90]),
        total(NOON, "cus_bob", "-7.000000000001"),
        total(NOON, event_name="calls", value="3"),
        total(T0 - 1, value="1000"),
    )
    later(account, 2)

    days, compared = found(account.reconcile())

    assert days == []
    meter: dict[str, Any] = {"since": T0, "until": T0 + 3 * DAY, "open": 0, "doubt": 0, "differs": 0, "not_asked": 0}
    meter |= {"at": compared["at"], "missing": "0", "surplus": "0"}
    assert compared["at"] // 1000 == pytest.approx(account.stripe.clock(), abs=5)
    assert compared == {
        "since": T0,
        "until": T0 + 3 * DAY,
        "mode": "send",
        "at": compared["at"],
        "shadowed": "0",
        "reported": [],
        "meters": {"calls": meter | {"equal": 1}, "tokens": meter | {"equal": 4}},
        "calls": 4,
        "customers": 3,
        "not_asked": 0,
        "equal": 5,
        "equal_value": "0.799999999999",
        "open": 0,
        "doubt": 0,
        "differs": 0,
    }


def test_it_may_be_about_one_meter_or_one_customer(account: Account) -> None:
    account.deliver(total(NOON), total(NOON, "cus_bob", "7"), total(NOON, event_name="calls", value="3"))

    assert found(account.reconcile("--meter", "api"))[1]["equal_value"] == "3"
    assert found(account.reconcile("--customer", "cus_bob"))[1]["equal_value"] == "7"
    unknown = account.reconcile("--meter", "none")
    assert (unknown.exit_code, unknown.stderr) == (2, "tallyman: there is no meter none: ai, api\n")


# Different


def test_a_difference_is_narrowed_down_to_hours_totals_and_offsets(account: Account) -> None:
    account.deliver(
        total(NOON, offset=100), total(NOON + 60, value="2", offset=200), total(NOON + 3600), total(T0 + DAY)
    )
    account.sent_by_another("0.25")
    later(account, 2)

    days, compared = found(account.reconcile(), exit_code=1)

    assert days == [
        {
            "event_name": "tokens",
            "customer": "cus_alice",
            "start": T0,
            "ours": "12",
            "stripe": "12.25",
            "difference": "0.25",
            "state": "differs",
            "why": "Stripe has more than was delivered: who else sends usage there?",
            "hours": [
                {
                    "start": NOON,
                    "ours": "7",
                    "stripe": "7.25",
                    "totals": [
                        {
                            "identifier": f"tm1-{NOON}-cus_alice-tokens",
                            "state": "delivered",
                            "value": "5",
                            "partition": 2,
                            "first_offset": 100,
                            "last_offset": 109,
                        },
                        {
                            "identifier": f"tm1-{NOON + 60}-cus_alice-tokens",
                            "state": "delivered",
                            "value": "2",
                            "partition": 2,
                            "first_offset": 200,
                            "last_offset": 209,
                        },
                    ],
                }
            ],
        }
    ]
    assert (compared["equal"], compared["differs"], compared["calls"]) == (1, 1, 2)


def test_a_long_span_asks_for_days_and_then_for_the_hours_of_those_that_differ(account: Account) -> None:
    account.deliver(total(NOON), total(T0 + DAY), total(NOON, "cus_bob"))
    account.sent_by_another("1")
    later(account, 2)

    days, compared = found(account.reconcile("--since", "2026-10-20"), exit_code=1)

    assert [[hour["start"] for hour in day["hours"]] for day in days] == [[NOON]]
    assert compared["calls"] == 4  # the meters, two customers, and the hours of one


def test_usage_that_stripe_rejected_afterwards_is_missing(account: Account) -> None:
    account.stripe.model.lag = 60
    account.deliver(total(NOON), total(NOON, "cus_bob"))
    account.stripe.model.rejected_later["cus_bob"] = "meter_event_customer_not_found"
    later(account, 2)

    (day,), _ = found(account.reconcile(), exit_code=1)

    assert (day["customer"], day["ours"], day["stripe"], day["difference"]) == ("cus_bob", "5", "0", "-5")
    assert day["why"].startswith("Stripe has less than was delivered: events were rejected")


def test_a_customer_or_a_meter_that_stripe_does_not_know_differs(account: Account) -> None:
    account.deliver(total(NOON), total(NOON, event_name="calls"))
    del account.stripe.model._meters["mtr_0000000000000002"]
    account.stripe.model.accept_any_customer = False
    later(account, 2)

    days, _ = found(account.reconcile(), exit_code=1)

    assert [day["event_name"] for day in days] == ["calls", "tokens"]
    assert {day["why"].split(":")[0] for day in days} == {"Stripe knows no such meter or customer"}


def test_usage_of_a_day_on_which_we_sent_nothing_is_seen_too(account: Account) -> None:
    account.deliver(total(NOON))
    account.sent_by_another("1", timestamp=NOON + DAY)
    later(account, 2)

    (day,), _ = found(account.reconcile(), exit_code=1)

    assert (day["start"], day["ours"], day["stripe"]) == (T0 + DAY, "0", "1")


def rejected(account: Account, report: str = "evt_1") -> list[Record]:
    """Stripe reports that it rejected what has been delivered last, as the service writes it into the log."""
    last = account.outcomes()[-1]
    assert last.key is not None
    now = int(account.stripe.clock()) * 1000
    why = "meter_event_customer_not_found"
    raw = msgspec.Raw(encode_outcome(refused(last, f"{why}: gone", now)))
    return [
        Rejection(last.identifier, last.key, why, "gone", report, now, raw),
        Report(report, now, last.event_name, now // 1000 - 10, now // 1000, {why: 1}, 1),
    ]


def test_what_is_refused_is_not_held_against_stripe(account: Account) -> None:
    """Stripe said yes, and rejected the event later; where its report has been read, both sides agree."""
    account.stripe.model.lag = 60
    account.deliver(total(NOON), total(NOON, "cus_bob"))
    account.stripe.model.rejected_later["cus_bob"] = "meter_event_customer_not_found"
    later(account, 2)
    assert [day["customer"] for day in found(account.reconcile(), exit_code=1)[0]] == ["cus_bob"]
    account.deliver(*rejected(account))

    days, compared = found(account.reconcile())

    assert [each.how for each in account.outcomes()] == ["delivered", "delivered", "refused"]
    assert (days, compared["equal"], compared["equal_value"]) == ([], 2, "5")


def test_an_event_that_was_rejected_and_is_in_stripes_sum_is_found(account: Account) -> None:
    account.deliver(total(NOON, "cus_bob"))
    account.deliver(*rejected(account))
    later(account, 2)

    (day,), _ = found(account.reconcile(), exit_code=1)

    assert (day["state"], day["ours"], day["stripe"]) == ("differs", "0", "5")
    ((part,),) = (hour["totals"] for hour in day["hours"])
    assert part["state"] == "refused"


# Too early, and in doubt


def test_what_was_just_delivered_may_lag_and_is_open(account: Account) -> None:
    account.stripe.model.lag = 600
    account.deliver(total(NOON), total(NOON + DAY, "cus_bob"))

    days, _ = found(account.reconcile())

    assert {(day["state"], day["why"]) for day in days} == {
        ("open", "delivered within the last hour, and Stripe's sums may lag")
    }
    later(account, 2)
    assert found(account.reconcile())[0] == []


def test_a_day_that_is_not_over_is_open(account: Account) -> None:
    account.stripe.clock.advance(-NOON)
    account.stripe.clock.move_to(NOON)
    account.deliver(total(NOON - 7200), now=NOON - 7100)
    account.sent_by_another("1", timestamp=NOON - 60)

    (day,), _ = found(account.reconcile())

    assert (day["state"], day["why"]) == ("open", "it is not over, or only just")


def test_totals_that_are_on_their_way_keep_a_day_open(account: Account) -> None:
    account.deliver(total(NOON), lost=True)
    later(account, 2)

    (day,), _ = found(account.reconcile())

    assert (day["state"], day["why"], day["stripe"]) == ("open", "a total is on its way", "5")


@pytest.mark.parametrize("taken", [True, False])
def test_totals_in_doubt_may_be_the_difference_and_are_not_called_wrong(account: Account, taken: bool) -> None:
    account.deliver(total(NOON), total(NOON + 60, value="2"), lost=taken, silent=not taken)
    later(account, 1 + SAME_IDENTIFIER_FOR // 3_600_000)
    account.deliver(silent=True)
    later(account, 2)

    days, compared = found(account.reconcile())

    if taken:
        assert [(day["state"], day["difference"]) for day in days] == [("doubt", "7")]
    else:
        assert (days, compared["equal"]) == ([], 1)
    account.sent_by_another("0.5")
    assert [day["state"] for day in found(account.reconcile(), exit_code=1)[0]] == ["differs"]


def test_what_was_delivered_long_after_it_was_used_is_found_behind_what_was_delivered_before(account: Account) -> None:
    """The outcomes of before are not read."""
    for day in range(-24, 8, 8):
        account.deliver(total(min(NOON, NOON + day * DAY), "cus_bob"), now=NOON + day * DAY + 300)
    account.deliver(total(NOON, value="3"), now=NOON + 34 * DAY)
    later(account, 40 * 24)

    days, compared = found(account.reconcile())

    assert (days, compared["equal"], compared["equal_value"]) == ([], 2, "8")


# The budget


def test_stripe_is_asked_no_more_often_than_it_may_be(account: Account) -> None:
    account.deliver(*(total(NOON, f"cus_{number}") for number in range(12)))
    later(account, 48)

    _, compared = found(account.reconcile("--budget", "5"))

    assert (compared["calls"], compared["customers"], compared["not_asked"]) == (5, 4, 8)
    shown = account.reconcile("--budget", "5", json_=False).stdout
    assert shown.endswith("8 customers were left out: raise --budget, or ask for less\n")


def test_calls_that_narrow_differences_down_are_kept_back(account: Account) -> None:
    account.deliver(*(total(NOON, f"cus_{number}") for number in range(12)))
    for number in range(12):
        account.sent_by_another("1", customer=f"cus_{number}")
    later(account, 48)

    days, compared = found(account.reconcile("--budget", "7", "--since", "2026-10-20"), exit_code=1)

    assert (compared["calls"], compared["customers"], compared["not_asked"]) == (7, 3, 9)
    assert [[hour["start"] for hour in day["hours"]] for day in days] == [[NOON]] * 3


def test_repetitions_count_and_what_was_compared_before_them_is_shown(account: Account) -> None:
    account.deliver(*(total(NOON, f"cus_{number}") for number in range(4)))
    later(account, 48)
    account.stripe.faults.update({"reads": [None, None, "error", None]})

    _, compared = found(account.reconcile("--budget", "4"))

    assert (compared["calls"], compared["customers"], compared["not_asked"]) == (4, 2, 2)


def test_whom_stripe_reported_errors_of_are_asked_first(account: Account) -> None:
    account.deliver(*(total(NOON, f"cus_{number}") for number in range(12)))
    later(account, 14 * 24)
    account.deliver(total(NOON + 14 * DAY, "cus_late"))
    account.deliver(*rejected(account))
    later(account, 2)
    words = ["--since", "2026-11-01", "--until", "2026-11-20", "--budget", "3"]

    days, compared = found(account.reconcile(*words), exit_code=1)

    assert [day["customer"] for day in days] == ["cus_late"]
    (reported,) = compared["reported"]
    assert reported == {
        "event_name": "tokens",
        "since": T0 + 15 * DAY,
        "until": T0 + 18 * DAY,
        "errors": {"meter_event_customer_not_found": 1},
    }


# What the service is told


class _Today:
    """The stand-in's time is the host's."""

    def __init__(self, stripe: StripeStandIn) -> None:
        self._stripe = stripe

    def now(self) -> int:
        return int(self._stripe.clock()) * 1000

    def elapsed(self) -> int:
        return time.monotonic_ns() // 1_000_000


@pytest.fixture
def today(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "CLOCK", _Today(account.stripe))


def compared_last(account: Account) -> Comparison | None:
    """What the service knows of comparisons, once it has read the log."""
    return account.deliver().comparison


@pytest.mark.usefixtures("today")
def test_what_was_compared_is_for_the_service_to_show(account: Account) -> None:
    account.deliver(total(NOON), total(NOON, "cus_bob"), total(NOON + DAY, event_name="calls"))
    account.sent_by_another("0.25")
    later(account, 2)
    assert compared_last(account) is None

    account.reconcile(given=[])

    first = compared_last(account)
    assert first is not None
    at, span = int(account.stripe.clock()), (T0, T0 + 4 * DAY)
    tokens, calls = first.meters["tokens"], first.meters["calls"]
    assert abs(tokens.at // 1000 - at) < 5
    assert (tokens.since, tokens.until) == span
    assert (tokens.equal, tokens.differs, tokens.surplus, tokens.missing) == (1, 1, "0.25", "0")
    assert (calls.equal, calls.differs, calls.surplus, calls.missing) == (1, 0, "0", "0")

    later(account, 1)
    account.sent_by_another("1")
    account.reconcile("--meter", "api", given=[])
    second = compared_last(account)
    assert second is not None
    assert second.meters["tokens"] == tokens, "it has not been looked at"
    assert second.meters["calls"].at > calls.at


@pytest.mark.usefixtures("today")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], True),
        (["--since", "2026-10-01"], True),
        (["--since", "2026-11-02"], False),
        (["--customer", "cus_bob"], False),
        (["--until", "2026-11-03"], False),
    ],
)
def test_what_is_but_a_part_is_not_told(account: Account, words: list[str], *, told: bool) -> None:
    account.deliver(total(NOON + DAY), total(NOON + DAY, "cus_bob"))

    assert account.reconcile(*words, given=[]).exit_code == 0

    assert (compared_last(account) is not None) is told


@pytest.mark.usefixtures("today")
def test_what_was_reported_is_said_until_it_has_been_compared(account: Account) -> None:
    account.deliver(total(NOON + DAY), now=LATER - 3600)
    account.deliver(*rejected(account))
    later(account, 1)
    wanted = (
        "Stripe reported errors of tokens (1 meter_event_customer_not_found): customers with usage on 2026-11-02 to "
        "2026-11-04 were asked first\n"
    )

    said = account.reconcile("--customer", "cus_alice", given=[], json_=False).stdout
    assert said.endswith(wanted)
    assert account.reconcile(given=[], json_=False).stdout.endswith(wanted)
    account.deliver()
    assert "reported" not in account.reconcile(given=[], json_=False).stdout
    account.stripe.clock.advance(1)  # reports are dated to the second here
    account.deliver(*rejected(account, "evt_2"))
    later(account, 10 * 24)
    assert account.reconcile(given=[], json_=False).stdout.endswith(": look at 2026-11-03 to 2026-11-04 too\n")


# Shadow


def shadowing(account: Account, mode: str = "shadow") -> None:
    account.config.write_text(account.config.read_text().replace("livemode: false", f"livemode: false, mode: {mode}"))


def test_in_shadow_it_is_compared_with_what_somebody_else_bills(account: Account) -> None:
    shadowing(account)
    account.deliver(
        total(NOON, offset=100), total(NOON + 60, value="2"), total(NOON + DAY), total(NOON, "cus_bob"), shadow=True
    )
    assert account.stripe.model.events == []
    account.sent_by_another("7", timestamp=NOON + 3599)
    account.sent_by_another("5", timestamp=NOON + DAY)
    account.sent_by_another("4", "cus_bob")
    later(account, 2)

    days, compared = found(account.reconcile(), exit_code=1)

    assert (compared["mode"], compared["equal"], compared["equal_value"]) == ("shadow", 2, "12")
    (day,) = days
    assert (day["customer"], day["ours"], day["stripe"], day["difference"]) == ("cus_bob", "5", "4", "-1")
    ((part,),) = (hour["totals"] for hour in day["hours"])
    assert (part["state"], part["value"]) == ("shadowed", "5")
    shown = account.reconcile(json_=False).stdout
    assert shown.startswith("meter at Stripe  customer  day         would have been billed  Stripe  difference")
    assert "2026-11-01T12:00:00Z: 5 would have been billed, 4 at Stripe" in shown
    assert "is there usage here that is not billed today?" in shown


def test_in_shadow_a_day_that_is_not_over_is_open(account: Account) -> None:
    shadowing(account)
    account.deliver(total(NOON + 2 * DAY), shadow=True, now=LATER - 600)

    (day,), _ = found(account.reconcile())

    assert (day["state"], day["why"]) == ("open", "it is not over, or only just")


def test_in_shadow_what_was_delivered_before_counts_as_well(account: Account) -> None:
    account.deliver(total(NOON))
    shadowing(account)
    account.deliver(total(NOON + 60, value="2"), shadow=True)
    account.sent_by_another("2")
    later(account, 2)

    days, compared = found(account.reconcile())

    assert (days, compared["equal"], compared["equal_value"]) == ([], 1, "7")


def test_when_sending_what_was_shadowed_is_somebody_elses(account: Account) -> None:
    account.deliver(total(NOON), total(NOON, "cus_bob"), total(NOON, "cus_carol"), shadow=True)
    account.deliver(*(total(NOON + 60, customer) for customer in ("cus_alice", "cus_bob", "cus_carol")))
    account.sent_by_another("5")
    account.sent_by_another("6", "cus_carol")
    later(account, 2)

    days, compared = found(account.reconcile(), exit_code=1)

    assert (compared["mode"], compared["equal"], compared["equal_value"]) == ("send", 2, "10")
    assert compared["shadowed"] == "15"
    (day,) = days
    assert (day["customer"], day["ours"], day["stripe"]) == ("cus_carol", "5", "11")
    assert day["why"].endswith("(5 of that day was shadowed, for somebody else to bill)")
    assert [part["state"] for hour in day["hours"] for part in hour["totals"]] == ["shadowed", "delivered"]
    assert account.reconcile(json_=False).stdout.endswith(
        "\n15 was shadowed in these days, for somebody else to bill: a day is equal where Stripe has what was "
        "delivered, with it or without it\n"
    )


def test_in_shadow_also_those_are_compared_of_whom_nothing_was_counted(account: Account, tmp_path: Path) -> None:
    """With passthrough nobody knows who they are; a file names them."""
    shadowing(account)
    file = tmp_path / "customers.yaml"
    file.write_text("alice: cus_alice\nbob: cus_bob\nours: null\n")
    account.config.write_text(account.config.read_text() + f"customers: {{kind: file, path: {file}}}\n")
    account.deliver(
        total(NOON, "alice"), shadow=True, names=Mapped({"alice": "cus_alice", "bob": "cus_bob", "ours": None})
    )
    account.sent_by_another("5")
    account.sent_by_another("3", "cus_bob")
    later(account, 2)

    days, compared = found(account.reconcile(), exit_code=1)

    assert [(day["customer"], day["ours"], day["stripe"]) for day in days] == [("cus_bob", "0", "3")]
    assert days[0]["why"] == "Stripe has more than would have been billed: is all that is billed today counted here?"
    assert compared["equal"] == 1


# What people see, and what is refused


def test_people_see_what_differs_and_where_it_came_from(account: Account) -> None:
    account.deliver(total(NOON, offset=100), total(NOON, "cus_bob"))
    account.sent_by_another("1")
    later(account, 2)

    result = account.reconcile(json_=False)

    assert result.exit_code == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines == [
        "meter at Stripe customer day delivered Stripe difference",
        "tokens cus_alice 2026-11-01 5 6 1 differs Stripe has more than was delivered: who else sends usage there?",
        "",
        "cus_alice, tokens, 2026-11-01T12:00:00Z: 5 delivered, 6 at Stripe",
        "identifier state value read from",
        f"tm1-{NOON}-cus_alice-tokens delivered 5 partition 2, offsets 100 to 109",
        (
            "2026-11-01 to 2026-11-03, 3 calls to Stripe: of 2 customers (by meter), 1 days are equal (5 in sum), "
            "1 differ"
        ),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--since", "2026-11-05"], "there is no day between --since and --until"),
        (["--since", "2026-07-01"], "that is more than 100 days"),
    ],
)
def test_spans_that_cannot_be_compared_are_refused(account: Account, words: list[str], says: str) -> None:
    account.deliver()

    result = account.reconcile(*words)

    assert result.exit_code == 2
    assert says in result.stderr


def test_what_is_not_kept_any_more_is_not_compared(account: Account) -> None:
    account.deliver(total(NOON), total(NOON + DAY), now=NOON)
    with SqliteStore.open(account.path, now=lambda: 0, create=False, lock=False) as store:
        assert store.expire(Log.OUTCOMES, NOON * 1000 + 1, 2) > 0
    account.config.write_text(account.config.read_text() + "limits: {keep: 24h}\n")

    result = account.reconcile()

    assert result.exit_code == 2
    assert "outcomes are kept for 24h (limits.keep)" in result.stderr


def test_stripe_not_answering_is_a_failure(account: Account) -> None:
    account.deliver(total(NOON))
    account.stripe.down()

    result = account.reconcile()

    assert (result.exit_code, result.stdout) == (1, "")
    assert "Stripe does not answer" in result.stderr
