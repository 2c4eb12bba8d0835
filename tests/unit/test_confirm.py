"""`python -m consumer.sandbox.confirm` works: it asks, says what differs, and puts away what it made.

The stand-in is not Stripe. That it answers as expected shows nothing about Stripe.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from consumer.sandbox import confirm as command
from consumer.sandbox.confirm import Answer, confirm
from consumer.sandbox.confirm_account import AT_ONCE, LiveMode
from consumer.sandbox.confirm_checks import CHECKS, Check
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Clock, Fault, Faults, Instead, StripeStandIn

NOW: Final = 1_790_000_040.0
SANDBOX_RATE: Final = 25
LATER: Final = {each.name for each in CHECKS if each.ask is None}
WAITS: Final = {each.name for each in CHECKS if each.waits}


class Stripe:
    """A stand-in whose time goes by only where something is waited for, and what is learned of it."""

    def __init__(self, stand_in: StripeStandIn) -> None:
        self.stand_in = stand_in
        self.model = stand_in.model
        self.left: list[str] = []
        self.calls = 0
        self._sleepers: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Until whoever has to wake before has done so; then time jumps."""
        clock = self.stand_in.clock
        wake = clock() + seconds
        self._sleepers.append(wake)
        while clock() < wake - 0.001:
            await asyncio.sleep(0)
            if clock() < wake == min(self._sleepers):
                clock.move_to(wake)
        self._sleepers.remove(wake)

    def learn(self, *names: str, key: str = SECRET_KEY, patience: float = 300) -> dict[str, Answer]:
        def wanted(check: Check) -> bool:
            return not names or check.name in names

        answers, self.left, self.calls = asyncio.run(
            confirm(
                key,
                base=self.stand_in.url,
                run="test",
                wanted=wanted,
                patience=patience,
                now=self.stand_in.clock,
                sleep=self.sleep,
            )
        )
        return {each.check: each for each in answers}


def serve(**options: Any) -> StripeStandIn:
    keys = {SECRET_KEY: None, "sk_live_standin": None}
    return StripeStandIn(clock=Clock(lambda: NOW), **{"keys": keys, "lag": 40, **options})


@pytest.fixture
def stripe() -> Iterator[Stripe]:
    with serve(global_rate=SANDBOX_RATE) as stand_in:
        yield Stripe(stand_in)


def test_all_that_can_be_asked_is_asked_and_of_the_rest_it_is_said_how(stripe: Stripe) -> None:
    answers = stripe.learn()

    assert [*answers] == [each.name for each in CHECKS]
    assert {name for name, each in answers.items() if each.verdict == "not tried"} == LATER
    assert {each.verdict for name, each in answers.items() if name not in LATER} == {"as expected", "learned"}
    assert all(each.expected for each in answers.values())
    assert all(each.observed for name, each in answers.items() if name not in LATER)
    assert stripe.model.stats["rate_limited"] == 0, "it makes fewer calls than a sandbox takes"


def test_what_it_made_is_put_away(stripe: Stripe) -> None:
    stripe.learn()

    assert {meter.status for meter in stripe.model._meters.values()} == {"inactive"}
    assert all("test" in meter.event_name for meter in stripe.model._meters.values())
    assert all(each.get("deleted") for each in stripe.model._customers.values())
    assert stripe.left == []


def test_what_it_says_it_saw_is_what_was_there(stripe: Stripe) -> None:
    answers = stripe.learn()

    assert answers["duplicate"].observed == (
        "400, type invalid_request_error, no code, Stripe-Should-Retry: false, “An event already exists with "
        "identifier confirm-test-2.”"
    )
    assert answers["scope-of-identifiers"].observed.startswith("in the account: 400")
    assert answers["exponents"].observed.startswith("taken: none; refused: 1e3, 1E3, 1e-05, 1.5e+2; 1e3: 400")
    assert answers["lag-of-sums"].observed.startswith("3.25, first seen after ")
    assert answers["bounds-of-a-minute"].observed == "3 of 1 (first), 2 (last), 4 (next)"
    assert answers["newest-of-an-hour"].observed == "3 of 5 (at 60 s) then 3 (at 120 s)"
    assert answers["deleted-customer"].observed.startswith("taken: 200; its identifier a minute later: 400")


def test_a_sum_is_waited_for_no_longer_than_patience() -> None:
    with serve(lag=10_000) as stand_in:
        answers = Stripe(stand_in).learn(*WAITS)

    assert (
        answers["lag-of-sums"].observed
        == "no sum within patience, asked " + answers["lag-of-sums"].observed.partition("asked ")[2]
    )
    assert {each.verdict for each in answers.values()} == {"learned"}


def test_calls_at_once_show_what_contention_looks_like(stripe: Stripe) -> None:
    stripe.stand_in.faults.latency = (0.2, 0.2)

    (answer,) = stripe.learn("one-at-a-time").values()

    assert answer.verdict == "as expected"
    assert "1 times 200" in answer.observed
    assert f"{AT_ONCE - 1} times 429, type invalid_request_error, code lock_timeout" in answer.observed
    assert "Stripe-Should-Retry: true" in answer.observed


def saying(status: int, body: bytes = b"{}") -> Callable[[Faults], None]:
    def change(faults: Faults) -> None:
        faults.plan = lambda _number, _identifier: Instead(status, body)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("taken", saying(500)),
        ("duplicate", saying(400, b'{"error":{"type":"invalid_request_error","code":"x","message":"Used"}}')),
        ("duplicate", saying(200)),
        ("replay", saying(200)),
        ("key-used-again", saying(200)),
        ("key-before-parameters", saying(400)),
        ("unknown-event-name", saying(400, b'{"error":{"type":"invalid_request_error","message":"Which?"}}')),
        ("too-far-ahead", saying(200)),
        ("too-many-digits", saying(200)),
        ("decimal-places", saying(400)),
        ("one-at-a-time", saying(400)),
    ],
)
def test_what_is_not_as_expected_differs(stripe: Stripe, name: str, change: Callable[[Faults], None]) -> None:
    change(stripe.stand_in.faults)

    assert stripe.learn(name)[name].verdict == "differs"


def test_a_check_that_gets_no_answer_has_failed_and_the_others_go_on(stripe: Stripe) -> None:
    stripe.stand_in.faults.script = [Fault.LOSE]

    answers = stripe.learn("taken", "duplicate")

    assert [(each.check, each.verdict) for each in answers.values()] == [
        ("taken", "failed"),
        ("duplicate", "as expected"),
    ]


def test_what_cannot_be_put_away_is_named(stripe: Stripe) -> None:
    stripe.stand_in.faults.reads = [None, None, None, Fault.LOSE, Instead(403), Fault.ERROR]

    stripe.learn("taken")

    assert [each.split(" ")[0] for each in stripe.left] == [
        "tallyman_confirm_test_first",
        "tallyman_confirm_test_other",
        "cus_00000000000001",
    ]


# The command


def run(stripe: Stripe, *words: str, key: str = SECRET_KEY) -> int:
    stripe.stand_in.clock.move_to(time.time())
    base = ["--api-base", stripe.stand_in.url]
    return command.main([*base, *words], {"STRIPE_SECRET_KEY": key} if key else {})


def test_it_prints_a_table_or_lines_of_json(stripe: Stripe, capsys: pytest.CaptureFixture[str]) -> None:
    only = ("--only", "taken", "--only", "trial")

    assert run(stripe, *only) == 0
    table = capsys.readouterr().out
    assert run(stripe, *only, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [line.split()[0] for line in table.splitlines()[:2]] == ["check", "taken"]
    assert "as expected" in table
    assert [(each["check"], each["verdict"]) for each in lines] == [("taken", "as expected"), ("trial", "not tried")]
    assert set(lines[0]) == {"check", "question", "expected", "observed", "verdict"}
    assert SECRET_KEY not in table


def test_what_differs_is_an_exit_code(stripe: Stripe) -> None:
    saying(500)(stripe.stand_in.faults)

    assert run(stripe, "--only", "taken") == 1


@pytest.mark.parametrize("key", ["", "sk_live_standin", "rk_live_standin", "whsec_standin", "pk_test_standin"])
def test_a_key_that_is_not_of_test_mode_is_refused_before_anything_is_asked(
    stripe: Stripe, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(stripe, key=key) == 2
    said = capsys.readouterr().err
    assert "sk_test_" in said
    assert "standin" not in said
    assert stripe.model.stats["requests"] == 0


def test_an_account_that_answers_in_live_mode_is_asked_nothing_more(stripe: Stripe) -> None:
    live = Instead(200, b'{"id":"mtr_1","livemode":true}')
    stripe.stand_in.faults.reads = [live]

    with pytest.raises(LiveMode):
        stripe.learn()
    assert stripe.model.stats["requests"] == 1


def test_a_stripe_that_is_not_there_is_said(stripe: Stripe, capsys: pytest.CaptureFixture[str]) -> None:
    stripe.stand_in.down()

    assert run(stripe, "--only", "taken") == 1
    assert capsys.readouterr().err.startswith("confirm: Cannot connect")


def test_a_check_that_there_is_not_is_refused(stripe: Stripe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(stripe, "--only", "weather") == 2
    assert "there is no check weather" in capsys.readouterr().err


def test_the_checks_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--list"], {})
    assert ended.value.code == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [each.name for each in CHECKS]
