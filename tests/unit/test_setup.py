"""`tallyman setup`, against the Stripe stand-in: it makes what is missing, once, and leaves what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from consumer.cli import app
from consumer.config import load
from consumer.runtime import setup as preparing
from consumer.runtime.clocks import SystemClock
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Fault, StripeStandIn

READS: Final = frozenset({"billing_meter_read", "plan_read", "customer_read", "subscription_read"})
NO_SUBSCRIPTIONS: Final = "rk_test_nosubs"

CONFIG: Final = """\
pipeline: test
stripe: {{livemode: {live}, api_base: "{base}"}}
customers: {{kind: {customers}}}
meters:
  - {{name: tokens, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens, value_key: n}}}}
  - {{name: more, event_types: [more], aggregation: sum, value: $.n, stripe: {{event_name: tokens, value_key: n}}}}
  - {{name: calls, event_types: [called], aggregation: count, stripe: {{event_name: calls}}}}
"""


class Sandbox:
    """A configuration, and a Stripe account that it is for."""

    def __init__(self, directory: Path, stripe: StripeStandIn) -> None:
        self.stripe = stripe
        self.config = directory / "tallyman.yaml"
        self.write()

    def write(self, *, live: str = "false", customers: str = "passthrough", base: str | None = None) -> None:
        self.config.write_text(CONFIG.format(live=live, customers=customers, base=base or self.stripe.url))

    def setup(self, *words: str, key: str = SECRET_KEY) -> Any:
        """The command, for machines."""
        return CliRunner().invoke(
            app, ["setup", "-c", str(self.config), "--json", *words], env={"STRIPE_SECRET_KEY": key}
        )

    def pieces(self, *words: str, **more: str) -> list[tuple[str, str, bool]]:
        """What the command found and made."""
        return told(self.setup(*words, **more))

    def objects(self) -> tuple[int, ...]:
        """How many meters, prices, products, customers and subscriptions there are."""
        model = self.stripe.model
        kinds: tuple[dict[str, Any], ...] = (
            model._meters,
            model._prices,
            model._products,
            model._customers,
            model._subscriptions,
        )
        return tuple(map(len, kinds))


def told(result: Any, exit_code: int = 0) -> list[tuple[str, str, bool]]:
    assert result.exit_code == exit_code, result.stderr
    return [(each["kind"], each["id"], each["made"]) for each in map(json.loads, result.stdout.splitlines())]


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    with StripeStandIn(keys={SECRET_KEY: None, NO_SUBSCRIPTIONS: READS | {"billing_meter_write"}}) as stripe:
        yield Sandbox(tmp_path, stripe)


ALL: Final = [
    ("meter", "mtr_0000000000000001"),
    ("product", "prod_00000000000001"),
    ("price", "price_00000000000001"),
    ("meter", "mtr_0000000000000002"),
    ("product", "prod_00000000000002"),
    ("price", "price_00000000000002"),
    ("customer", "cus_00000000000001"),
    ("subscription", "sub_00000000000001"),
]


def test_everything_is_made_once_and_found_from_then_on(sandbox: Sandbox) -> None:
    assert sandbox.pieces("--customer", "acme") == [(*each, True) for each in ALL]
    before = sandbox.objects()

    assert sandbox.pieces("--customer", "acme") == [(*each, False) for each in ALL]
    assert before == sandbox.objects() == (2, 2, 2, 1, 1)


def test_what_is_made_bills_what_is_counted(sandbox: Sandbox) -> None:
    sandbox.pieces("--customer", "acme", "--unit-amount", "0.125", "--currency", "EUR", "--interval", "week")

    model = sandbox.stripe.model
    tokens, calls = model._meters.values()
    assert (tokens.event_name, tokens.formula, tokens.event_time_window) == ("tokens", "sum", None)
    assert (tokens.value_key, tokens.customer_key, tokens.display_name) == ("n", "stripe_customer_id", "tokens, more")
    assert (calls.event_name, calls.formula) == ("calls", "sum")  # totals of a count are added up too
    price = model._prices["price_00000000000001"]
    assert (price["unit_amount_decimal"], price["currency"]) == ("0.125", "eur")
    assert price["recurring"] == {
        "interval": "week",
        "interval_count": 1,
        "usage_type": "metered",
        "meter": tokens.id,
    }
    subscription = model._subscriptions["sub_00000000000001"]
    assert [item["price"]["id"] for item in subscription["items"]["data"]] == [*model._prices]
    assert model._customers["cus_00000000000001"]["metadata"] == {"tallyman-customer": "acme"}


def test_meters_that_do_not_fit_are_refused_before_anything_is_made(sandbox: Sandbox) -> None:
    sandbox.stripe.model.add_meter("calls", formula="last", event_time_window="hour", customer_key="who", value_key="v")

    result = sandbox.setup()

    assert (result.exit_code, result.stdout, sandbox.objects()) == (2, "", (1, 0, 0, 0, 0))
    lines = result.stderr.splitlines()
    assert lines[0] == "tallyman: the account has meters that do not fit, and nothing was made:"
    assert [line.split(":")[0] for line in lines[1:]] == ["calls"] * 4
    assert "does not sum its events but has the formula last" in lines[1]
    assert "keeps only the newest event of each hour (event_time_window)" in lines[2]
    assert lines[3].endswith("set stripe.customer_key: who.")
    assert lines[4].endswith("set stripe.value_key: v.")


def test_a_deactivated_meter_is_left_to_whoever_deactivated_it(sandbox: Sandbox) -> None:
    sandbox.stripe.model.add_meter("calls", deactivated_at=1)

    result = sandbox.setup()

    assert result.exit_code == 2
    assert "mtr_0000000000000001 is deactivated, and takes no events: reactivate it" in result.stderr


def test_an_answer_that_is_lost_does_not_make_anything_twice(sandbox: Sandbox) -> None:
    sandbox.stripe.faults.reads = [None, *[Fault.ACCEPT_LOSE, None] * 3]

    assert [(kind, made) for kind, _, made in sandbox.pieces("--customer", "acme")] == [(kind, True) for kind, _ in ALL]
    assert sandbox.objects() == (2, 2, 2, 1, 1)


def test_a_run_that_was_broken_off_shows_what_it_made_and_is_completed_by_the_next(sandbox: Sandbox) -> None:
    result = sandbox.setup("--customer", "acme", key=NO_SUBSCRIPTIONS)

    assert told(result, exit_code=1) == [("meter", "mtr_0000000000000001", True)]
    assert "the Stripe key may not" in result.stderr
    assert "rak_plan_write" in result.stderr
    assert [made for _, _, made in sandbox.pieces("--customer", "acme")] == [False, *[True] * 7]


def test_a_price_that_is_there_is_used_whoever_made_it(sandbox: Sandbox) -> None:
    sandbox.pieces()
    sandbox.stripe.model._prices["price_00000000000001"]["lookup_key"] = None

    assert [made for *_, made in sandbox.pieces("--unit-amount", "7")] == [False] * 6


def test_an_archived_price_gives_its_lookup_key_to_the_next(sandbox: Sandbox) -> None:
    sandbox.pieces()
    sandbox.stripe.model.archive_price("price_00000000000001")

    assert [(kind, made) for kind, _, made in sandbox.pieces()][:3] == [
        ("meter", False),
        ("product", True),
        ("price", True),
    ]
    assert sandbox.stripe.model._prices["price_00000000000003"]["lookup_key"] == "tallyman-tokens"
    assert not any(made for *_, made in sandbox.pieces())


def test_a_subscription_is_made_of_the_prices_that_the_customer_lacks(sandbox: Sandbox) -> None:
    sandbox.stripe.model.add_customer("cus_acme")
    sandbox.pieces("--customer", "cus_acme")
    sandbox.stripe.model._subscriptions["sub_00000000000001"]["items"]["data"].pop()

    kind, subscription, made = sandbox.pieces("--customer", "cus_acme")[-1]

    assert (kind, made) == ("subscription", True)
    assert [item["price"]["id"] for item in sandbox.stripe.model._subscriptions[subscription]["items"]["data"]] == [
        "price_00000000000002"
    ]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_customer_that_is_not_there_is_said_before_anything_is_made(sandbox: Sandbox, deleted: bool) -> None:
    if deleted:
        sandbox.stripe.model.delete_customer("cus_gone")

    result = sandbox.setup("--customer", "cus_gone")

    assert (result.exit_code, sandbox.objects()[:3]) == (2, (0, 0, 0))
    assert "cus_gone is no customer of this account, and nothing was made" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "what is made there is what customers pay: add --live"),
        (["--live", "--customer", "acme"], "in live mode it would bill somebody"),
        (["--live"], "In live mode give --unit-amount and --currency"),
    ],
)
def test_live_mode_is_touched_only_by_who_says_so(sandbox: Sandbox, words: list[str], says: str) -> None:
    sandbox.write(live="true", base="https://127.0.0.1:1")

    result = sandbox.setup(*words, key="sk_live_1")

    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


@pytest.mark.parametrize("amount", ["much", "-1", "NaN", "0.0000000000001"])
def test_an_amount_that_cannot_be_is_explained(sandbox: Sandbox, amount: str) -> None:
    result = sandbox.setup(f"--unit-amount={amount}")

    assert result.exit_code == 2
    assert "is no amount" in result.stderr


def test_the_dashboard_is_linked_where_the_account_is_stripes_own(sandbox: Sandbox) -> None:
    account = preparing.Account(SECRET_KEY, api_base=sandbox.stripe.url, livemode=False, clock=SystemClock())
    sandbox.write(base="https://api.stripe.com")

    pieces = [*preparing.setup(load(sandbox.config, {}), account, preparing.Terms(), "acme")]

    account.close()
    assert [piece.link for piece in pieces[:3]] == [
        "https://dashboard.stripe.com/test/meters/mtr_0000000000000001",
        "https://dashboard.stripe.com/test/products/prod_00000000000001",
        "https://dashboard.stripe.com/test/prices/price_00000000000001",
    ]


def test_people_are_told_how_to_bill_the_customer(sandbox: Sandbox) -> None:
    sandbox.write(customers="file, path: customers.yaml")

    result = CliRunner().invoke(
        app,
        ["setup", "-c", str(sandbox.config), "--customer", "acme"],
        env={"STRIPE_SECRET_KEY": SECRET_KEY, "COLUMNS": "200"},
    )

    assert "to bill it, write `acme: cus_00000000000001` into customers.yaml" in result.stdout
