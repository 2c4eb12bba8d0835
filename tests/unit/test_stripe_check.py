"""What `check` says of a Stripe account, and on which of them `run` does not start, against the stand-in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from consumer.config import Config, load
from consumer.runtime import stripe_check
from consumer.runtime.clocks import SystemClock
from consumer.runtime.setup import Account, Terms, setup
from consumer.runtime.stripe import WrongMode
from consumer.runtime.stripe_reads import KeyRefused, ReadFailed, Silent
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import StripeStandIn

SENDER: Final = "rk_test_sender"
READER: Final = "rk_test_reader"
NO_PRICES: Final = "rk_test_noprices"
LIVE: Final = "sk_live_standin"
KEYS: Final = {
    SECRET_KEY: None,
    LIVE: None,
    SENDER: frozenset({"billing_meter_event_write"}),
    READER: frozenset({"billing_meter_read", "plan_read"}),
    NO_PRICES: frozenset({"billing_meter_event_write", "billing_meter_read"}),
}

CONFIG: Final = """\
pipeline: test
stripe: {{livemode: false, api_base: "{base}"{stripe}}}
customers: {{kind: {customers}}}
meters:
  - {{name: tokens, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens}}}}
  - {{name: calls, event_types: [called], aggregation: count, stripe: {{event_name: calls}}}}
"""


class Place:
    """A configuration for an account at the stand-in."""

    def __init__(self, directory: Path, stripe: StripeStandIn) -> None:
        self.directory = directory
        self.stripe = stripe
        self.model = stripe.model

    def config(self, *, stripe: str = "", customers: str = "passthrough", base: str | None = None) -> Config:
        file = self.directory / "tallyman.yaml"
        file.write_text(CONFIG.format(base=base or self.stripe.url, stripe=stripe, customers=customers))
        return load(file, {})

    def found(self, key: str = SECRET_KEY, stripe: str = "") -> list[tuple[str, str, str]]:
        """All that `check` says of the account."""
        said = stripe_check.findings(self.config(stripe=stripe), key, SystemClock())
        return [(each.level, each.what, each.says) for each in said]

    def misbilling(self, key: str = SECRET_KEY, base: str | None = None) -> str | None:
        """What keeps `run` from starting."""
        return stripe_check.misbilling(self.config(base=base), key, SystemClock())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with StripeStandIn(keys=KEYS) as stripe:
        yield Place(tmp_path, stripe)


def test_an_account_that_was_set_up_is_right(place: Place) -> None:
    account = Account(SECRET_KEY, api_base=place.stripe.url, livemode=False, clock=SystemClock())
    assert [*setup(place.config(), account, Terms())]
    account.close()

    assert place.found() == [
        ("ok", "clock", "this host's clock and Stripe's agree to the minute"),
        ("ok", "account", "Stripe answers, and shows 2 meters"),
        ("ok", "meter", "tokens: mtr_0000000000000001 is active and sums raw events"),
        ("ok", "price", "tokens: price_00000000000001"),
        ("ok", "meter", "calls: mtr_0000000000000002 is active and sums raw events"),
        ("ok", "price", "calls: price_00000000000002"),
    ]
    assert place.misbilling() is None
    assert place.model.events == []


def test_a_meter_that_is_missing_would_park_its_totals_and_does_not_keep_the_service_from_starting(
    place: Place,
) -> None:
    place.model.add_meter("tokens")

    assert place.found()[2:] == [
        ("ok", "meter", "tokens: mtr_0000000000000001 is active and sums raw events"),
        (
            "warning",
            "price",
            (
                "tokens: no active price uses this meter, so its usage is counted and billed to nobody: "
                "`tallyman setup` creates one"
            ),
        ),
        (
            "error",
            "meter",
            (
                "Stripe has no meter with the event name calls (calls): totals would be parked. `tallyman setup` "
                "creates it; or correct stripe.event_name"
            ),
        ),
    ]
    assert place.misbilling() is None


@pytest.mark.parametrize(
    ("fields", "says", "refused"),
    [
        ({"formula": "last"}, "does not sum its events but has the formula last", True),
        ({"formula": "count"}, "does not sum its events but has the formula count", True),
        ({"event_time_window": "day"}, "keeps only the newest event of each day (event_time_window)", True),
        ({"customer_key": "who"}, "set stripe.customer_key: who", False),
        ({"value_key": "much"}, "set stripe.value_key: much", False),
        ({"deactivated_at": 1}, "is deactivated, and takes no events: reactivate it", False),
    ],
)
def test_a_meter_that_does_not_fit_is_an_error_and_one_that_misbills_is_not_started_on(
    place: Place, fields: dict[str, Any], says: str, refused: bool
) -> None:
    place.model.add_meter("calls")
    place.model.add_meter("tokens", **fields)

    errors = [text for level, _, text in place.found() if level == "error"]

    assert len(errors) == 1
    assert says in errors[0]
    wrong = place.misbilling()
    if refused:
        assert wrong is not None
        assert wrong.startswith("Stripe would bill wrongly:\ntokens: mtr_0000000000000002 ")
        assert says in wrong
    else:
        assert wrong is None


def test_a_key_may_lack_permissions(place: Place) -> None:
    place.model.add_meter("tokens")
    place.model.add_meter("calls")

    sender, reader, no_prices = (place.found(key) for key in (SENDER, READER, NO_PRICES))

    assert [(level, what) for level, what, _ in sender] == [("ok", "clock"), ("warning", "account")]
    assert "rak_billing_meter_read" in sender[1][2]
    assert "without it nobody can tell here whether the meters fit" in sender[1][2]
    assert [text for level, _, text in reader if level == "error"] == [
        (
            "sending Meter Events: the Stripe key may not do this (403: The provided key 'rk_test_********' does not "
            "have the required permissions for this endpoint. Having the 'rak_billing_meter_event_write' permission "
            "would allow this request to continue.): give it this permission"
        )
    ]
    assert [what for level, what, _ in no_prices if level == "warning"] == ["price", "price"]
    with pytest.raises(KeyRefused, match="rak_billing_meter_read"):
        place.misbilling(SENDER)


LATER: Final = ". In shadow nothing is sent: put it right before stripe.mode is send"


def test_in_shadow_what_is_wrong_for_sending_is_a_warning(place: Place) -> None:
    place.model.add_meter("tokens", formula="count")

    found = place.found(READER, stripe=", mode: shadow")

    assert [(level, what) for level, what, _ in found] == [
        ("warning", "account"),
        ("ok", "clock"),
        ("ok", "account"),
        ("warning", "meter"),
        ("warning", "price"),
        ("warning", "meter"),
    ]
    wrong = [text for level, what, text in found if level == "warning" and what != "price"]
    assert all(text.endswith(LATER) for text in wrong)
    assert "sending Meter Events: the Stripe key may not do this" in wrong[0]
    assert "does not sum its events but has the formula count" in wrong[1]
    assert "Stripe has no meter with the event name calls" in wrong[2]


def test_in_shadow_a_key_has_to_read(place: Place) -> None:
    for key, because in ((SENDER, "rak_billing_meter_read"), ("sk_test_wrong", "401")):
        ((_, what, says),) = (each for each in place.found(key, stripe=", mode: shadow") if each[0] == "error")
        assert what == "account"
        assert because in says
        assert says.endswith("; without it nothing can be compared")


def test_a_key_that_stripe_does_not_know_is_an_error(place: Place) -> None:
    assert place.found("sk_test_wrong")[0][:2] == ("error", "account")
    with pytest.raises(KeyRefused):
        place.misbilling("sk_test_wrong")


def test_an_account_in_another_mode_is_an_error_and_not_started_on(place: Place) -> None:
    place.model.add_meter("tokens")

    assert ("error", "account") in [(level, what) for level, what, _ in place.found(LIVE)]
    with pytest.raises(WrongMode, match="Stripe answered in live mode"):
        place.misbilling(LIVE)


@pytest.mark.parametrize(
    ("seconds", "level", "says"),
    [
        (30, "ok", "agree to the minute"),
        (90, "warning", "s behind Stripe's"),
        (-90, "warning", "s ahead of Stripe's"),
        (400, "error", "Set the clock, for example with NTP"),
        (-400, "error", "s ahead of Stripe's"),
    ],
)
def test_clocks_that_disagree_are_noticed(place: Place, seconds: int, level: str, says: str) -> None:
    place.stripe.clock.advance(seconds)

    ((found, _, text),) = (each for each in place.found() if each[1] == "clock")

    assert found == level
    assert says in text


def test_a_stripe_that_does_not_answer_is_a_warning(place: Place) -> None:
    place.stripe.down()

    ((level, what, says),) = place.found()

    assert (level, what) == ("warning", "account")
    assert says.startswith("not looked at: Stripe does not answer")
    with pytest.raises(Silent):
        place.misbilling()


@pytest.mark.parametrize("status", [200, 400, 502])
@pytest.mark.parametrize(
    "body", [b"<html>please sign in</html>", b"{}", b"[]", b'{"error": "late"}', b"gesperrt f\xfcr"]
)
def test_an_answer_that_is_not_stripes_is_none(place: Place, status: int, body: bytes) -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Portal) as portal:
        threading.Thread(target=portal.serve_forever, daemon=True).start()
        with pytest.raises(ReadFailed):
            place.misbilling(base=f"http://127.0.0.1:{portal.server_port}")
        portal.shutdown()


# How many calls there can be


@pytest.mark.parametrize(
    ("customers", "stripe", "level", "says"),
    [
        (None, "", "ok", "25 calls a second are enough for 750 customers with usage in every window"),
        (300, "", "ok", "at most 10 calls a second for 300 customers, of 25 that may be made"),
        (
            900,
            "",
            "warning",
            (
                "900 customers with usage in every window would be 30 calls a second, and 25 may be made: totals wait "
                "when more than 750 have."
            ),
        ),
        (900, ", max_rate: 40", "ok", "at most 30 calls a second for 900 customers, of 40 that may be made"),
    ],
)
def test_the_calls_that_the_configuration_may_need_are_compared_with_the_limit(
    place: Place, customers: int | None, stripe: str, level: str, says: str
) -> None:
    kind = "passthrough"
    if customers is not None:
        file = place.directory / "customers.yaml"
        file.write_text("free: null\n" + "".join(f"c{number}: cus_{number}\n" for number in range(customers)))
        kind = f"file, path: {file}"

    found = stripe_check.rate(place.config(customers=kind, stripe=stripe))

    assert (found.level, found.what) == (level, "rate")
    assert found.says.startswith(says)
