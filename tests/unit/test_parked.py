"""`tallyman parked` and `tallyman totals --explain`, on a store that stage 2 has written and a stand-in it sent to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from consumer import totals as log_of_totals
from consumer.cli import app
from consumer.deliver.answers import Heard, Lost
from consumer.deliver.delivery import Attempt
from consumer.deliver.doubt import FINAL_AFTER
from consumer.runtime import audit, evidence
from consumer.runtime.clocks import SystemClock
from consumer.runtime.customers import Passthrough
from consumer.runtime.stripe_reads import reading
from consumer.sandbox import stripe_wire
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Clock, StripeStandIn
from consumer.sandbox.stripe_wire import Call
from consumer.storage import Append, Log
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Command, Total
from tests.totals import total_of
from tests.unit.stage2 import StageTwo, post

T0: Final = 1_793_534_400
"""2026-11-01T12:00:00Z."""
HOUR: Final = 3_600
DAY: Final = 86_400

CONFIG: Final = """\
pipeline: test
storage: {{kind: sqlite, path: {path}}}
stripe: {{livemode: false, api_base: "{base}"}}
meters:
  - {{name: ai, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens}}}}
"""


class Desk:
    """A pipeline that delivers to the stand-in, and an operator who has only the command."""

    def __init__(self, directory: Path, stripe: StripeStandIn) -> None:
        self.stripe = stripe
        self.path = directory / "tallyman.db"
        self.config = directory / "tallyman.yaml"
        self.config.write_text(CONFIG.format(path=self.path, base=stripe.url))

    def close(self, *given: Total) -> None:
        """Stage 1 closes totals."""
        with SqliteStore.open(self.path, now=self._now, create=True, lock=False) as store:
            store.append(Append(Log.TOTALS, b"k", log_of_totals.encode(each)) for each in given)

    def deliver(self, *, arrives: tuple[str, ...] | None = None) -> None:
        """Stage 2 sends all there is. ``arrives``: Stripe answers nobody any more, and of these it takes the event."""

        def answer(attempt: Attempt) -> Heard:
            if arrives is None or attempt.total in arrives:
                heard: Heard = post(self.stripe, attempt)
            return Lost("TimeoutError") if arrives is not None else heard

        with SqliteStore.open(self.path, now=self._now, create=True, lock=False) as store:
            StageTwo(store, store, Passthrough(), self._now()).work(answer)

    def doubt(self, *given: Total, arrives: tuple[str, ...]) -> None:
        """Totals that Stripe never answered about for a day."""
        self.close(*given)
        self.deliver(arrives=arrives)
        self.wait(DAY)
        self.deliver()

    def wait(self, seconds: int) -> None:
        """Time goes by, here and at Stripe."""
        self.stripe.clock.advance(seconds)

    def tallyman(self, *words: str, **options: Any) -> Any:
        """The command with these words."""
        options.setdefault("env", {"STRIPE_SECRET_KEY": SECRET_KEY})
        return CliRunner().invoke(app, [*words, "-c", str(self.config)], **options)

    def says(self, *words: str) -> str:
        """What it answers."""
        result = self.tallyman(*words)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    def refuses(self, *words: str) -> str:
        """Why it does nothing."""
        result = self.tallyman(*words)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        return str(result.stderr)

    def advice(self, identifier: str) -> str:
        """What is recommended."""
        return str(json.loads(self.says("parked", "show", identifier, "--json"))["recommendation"]["advice"])

    def story(self, identifier: str) -> dict[str, Any]:
        """What is told of a total."""
        told: dict[str, Any] = json.loads(self.says("totals", "--explain", identifier, "--json"))
        return told

    def billed(self) -> dict[str, str]:
        """Identifiers and values that Stripe has, of all that was accepted."""
        return {each.identifier: str(each.value) for each in self.stripe.model.events}

    def _now(self) -> int:
        return int(self.stripe.clock()) * 1000


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with StripeStandIn(clock=Clock(lambda: T0 + 600), accept_any_customer=True) as stripe:
        stripe.model.add_meter("tokens")
        yield Desk(tmp_path, stripe)


def total(name: str, value: str = "5", customer: str = "cus_a", *, minute: int = 0) -> Total:
    """The total of a minute; their customers have all of them in the same one."""
    at = T0 + minute * 60 + 7
    return total_of(name, at, customer, value, edition="e7", first_offset=40, last_offset=49)


def test_a_doubt_that_is_at_stripe_is_found_there_and_discarded(desk: Desk) -> None:
    """The answer was lost, and the sum has it."""
    desk.close(total("a", "12"))
    desk.deliver()
    desk.doubt(total("x"), arrives=("tm1-x",))
    assert desk.says("parked", "show", "tm1-x").endswith(
        "customer at Stripe  event name  minute                delivered  others, maybe  this total  Stripe  "
        "at                  \n"
        "cus_a               tokens      2026-11-01T12:00:00Z  12         0              5           17      "
        "2026-11-02T12:10:00Z\n"
        "\n"
        "Recommendation: discard. Stripe counts 17; we delivered 12, and this total is 5. So this total is there.\n"
        'To do so: tallyman parked discard tm1-x --why "…"\n'
    )
    assert "to release it is not recommended" in desk.refuses("parked", "release", "tm1-x")
    desk.says("parked", "discard", "tm1-x", "--why", "it is in Stripe's sum", "--by", "ann")
    desk.deliver()
    story = desk.story("tm1-x")
    assert (story["state"], story["billed"]) == ("delivered", "5"), "it is billed, whoever found that out"
    assert [(each["action"], each["by"], each["carried_out"]) for each in story["decisions"]] == [
        ("discard", "ann", "yes")
    ]
    assert story["generations"][0]["at_stripe"] == "yes"
    assert desk.billed() == {"tm1-a": "12", "tm1-x": "5"}


def test_a_doubt_that_is_not_at_stripe_is_waited_for_and_then_released(desk: Desk) -> None:
    """Its sums may lag: only after a day is a sum without it the end of the doubt."""
    desk.doubt(total("x"), arrives=())
    assert desk.advice("tm1-x") == "wait"
    shown = desk.says("parked", "show", "tm1-x")
    assert "sums lag, and are relied on after 24 hours" in shown
    assert "Ask again after 2026-11-03T12:10:00Z." in shown
    assert "not recommended" in desk.refuses("parked", "release", "tm1-x")

    desk.wait(FINAL_AFTER // 1000)
    assert desk.says("parked", "show", "tm1-x").endswith(
        "Recommendation: release. Stripe counts 0; we delivered 0, and this total is 5. So this total is not there.\n"
        "To do so: tallyman parked release tm1-x\n"
    )
    desk.says("parked", "release", "tm1-x", "--why", "never arrived", "--by", "ann")
    desk.deliver()
    assert desk.billed() == {"tm1-x-g2": "5"}
    (line,) = [json.loads(each) for each in desk.says("totals", "--json").splitlines()]
    assert (line["identifier"], line["state"], line["billed_as"]) == ("tm1-x", "delivered", "tm1-x-g2")


def test_the_story_of_a_total_is_told_from_its_offsets_to_the_identifier_it_was_billed_under(desk: Desk) -> None:
    """And is found under every identifier that it ever had."""
    desk.doubt(total("x"), arrives=())
    desk.wait(DAY)
    desk.says("parked", "release", "tm1-x", "--why", "never arrived", "--by", "ann")
    assert [each["carried_out"] for each in desk.story("tm1-x")["decisions"]] == ["not yet"]
    late = Command("discard", "tm1-x", "bob", "too late", 1, 1)
    with SqliteStore.open(desk.path, now=lambda: 0, create=False, lock=False) as store:
        store.append([Append(Log.TOTALS, b"k", log_of_totals.encode(late))])
    desk.deliver()

    story = desk.story("tm1-x-g2")
    assert story == desk.story("tm1-x")
    assert (story["meter"], story["edition"], story["revision"], story["value"]) == ("ai", "e7", 0, "5")
    assert (story["partition"], story["first_offset"], story["last_offset"]) == (0, 40, 49)
    assert [(each["identifier"], each["at_stripe"], each["attempts"]) for each in story["generations"]] == [
        ("tm1-x", "maybe", 1),
        ("tm1-x-g2", "yes", 1),
    ]
    assert [(each["by"], each["action"], each["carried_out"]) for each in story["decisions"]] == [
        ("bob", "discard", "no"),
        ("ann", "release", "yes"),
    ]
    text = desk.says("totals", "--explain", "tm1-x")
    assert "partition 0, offsets 40 to 49" in text
    assert "never arrived" in text


def test_what_is_not_finished_is_explained_as_far_as_it_has_come(desk: Desk) -> None:
    desk.close(total("x"))
    assert desk.story("tm1-x")["state"] == "pending"
    desk.deliver(arrives=())
    told = desk.story("tm1-x")
    assert (told["state"], told["generations"][0]["at_stripe"], told["generations"][0]["attempts"]) == (
        "pending",
        "maybe",
        1,
    )
    assert told["next_look"] > 0
    desk.wait(DAY)
    desk.deliver()
    told = desk.story("tm1-x")
    assert (told["state"], told["reason"]) == ("parked", "in_doubt")
    assert "no total has this identifier" in desk.refuses("totals", "--explain", "tm1-none")


def test_of_two_doubts_of_the_same_value_nobody_can_tell(desk: Desk) -> None:
    """One of them is there. Whoever knows which decides, and says how they know."""
    desk.doubt(total("x"), total("y"), arrives=("tm1-x",))
    desk.wait(DAY)
    assert desk.advice("tm1-x") == desk.advice("tm1-y") == "cannot_tell"
    refusal = desk.refuses("parked", "release", "tm1-y")
    assert "That fits with this total as well as without it: the difference may as well be tm1-x." in refusal
    assert "--despite-doubt" in refusal
    assert "needs a reason" in desk.refuses("parked", "release", "tm1-y", "--despite-doubt")
    result = desk.tallyman("parked", "release", "--reason", "in_doubt", "--yes")
    assert result.exit_code == 1
    assert result.stderr.startswith("2 are left out: they may be at Stripe, and to release them is not recommended;")

    desk.says("parked", "release", "tm1-y", "--despite-doubt", "--why", "the proxy's log has only x")
    desk.says("parked", "discard", "tm1-x", "--despite-doubt", "--why", "the proxy's log has x")
    desk.deliver()
    assert desk.billed() == {"tm1-x": "5", "tm1-y-g2": "5"}
    assert desk.story("tm1-x")["state"] == "discarded", "that it is at Stripe was not said"


def test_what_somebody_knows_to_be_at_stripe_counts_as_delivered_and_tells_of_the_others(desk: Desk) -> None:
    desk.doubt(total("x"), total("y"), arrives=("tm1-x",))
    desk.wait(DAY)
    assert "goes with --despite-doubt" in desk.refuses("parked", "discard", "tm1-x", "--at-stripe", "--why", "a log")
    desk.says("parked", "discard", "tm1-x", "--despite-doubt", "--at-stripe", "--why", "the proxy's log has x")
    desk.deliver()
    story = desk.story("tm1-x")
    assert (story["state"], story["billed"], story["generations"][0]["at_stripe"]) == ("delivered", "5", "yes")
    assert desk.advice("tm1-y") == "release", "x makes up for all of the sum"
    desk.says("parked", "release", "tm1-y")
    desk.deliver()
    assert desk.billed() == {"tm1-x": "5", "tm1-y-g2": "5"}


def test_an_earlier_generation_that_turns_up_is_what_was_delivered(desk: Desk) -> None:
    """Somebody released it too early, and the second one was never written."""
    desk.doubt(total("x"), arrives=("tm1-x",))
    desk.says("parked", "release", "tm1-x", "--despite-doubt", "--why", "too sure")
    desk.deliver(arrives=())
    desk.wait(DAY)
    desk.deliver()
    desk.wait(DAY)
    assert desk.advice("tm1-x") == "discard"
    desk.says("parked", "discard", "tm1-x", "--why", "the first one is there")
    desk.deliver()
    story = desk.story("tm1-x")
    assert (story["state"], story["billed"]) == ("delivered", "5")
    assert [each["at_stripe"] for each in story["generations"]] == ["maybe", "yes"], "one of them, the sum says"


def test_what_was_never_tried_cannot_be_at_stripe(desk: Desk) -> None:
    desk.close(total("x", customer="nobody"))
    desk.deliver()
    refusal = desk.refuses("parked", "discard", "tm1-x", "--despite-doubt", "--at-stripe", "--why", "sure")
    assert "tm1-x cannot be at Stripe" in refusal


def test_a_selection_takes_those_whose_sums_decide(desk: Desk) -> None:
    """Each customer's minute by itself."""
    desk.doubt(total("x"), total("y", "7", "cus_b"), total("z", "9", "cus_c"), arrives=("tm1-y",))
    desk.wait(DAY)
    result = desk.tallyman("parked", "release", "--reason", "in_doubt", "--yes")
    assert result.stderr.startswith("1 are left out")
    assert result.exit_code == 0
    desk.says("parked", "discard", "--reason", "in_doubt", "--why", "there", "--yes")
    desk.deliver()
    assert desk.billed() == {"tm1-x-g2": "5", "tm1-y": "7", "tm1-z-g2": "9"}


def test_following_the_recommendation_bills_everything_once(desk: Desk) -> None:
    """Many doubts, of which some arrived: what can be decided is decided rightly, and the rest stays."""
    names = [total(str(number), str(number % 4 + 1), f"cus_{number % 5}", minute=number % 3) for number in range(24)]
    desk.close(*names[:8])
    desk.deliver()
    arrived = tuple(each.identifier for each in names[8:20] if int(each.identifier[4:]) % 3 == 0)
    desk.doubt(*names[8:20], arrives=arrived)
    desk.close(*names[20:])
    desk.deliver()
    desk.wait(DAY)
    for action in ("release", "discard"):
        desk.tallyman("parked", action, "--reason", "in_doubt", "--why", "recommended", "--yes")
        desk.deliver()
        desk.wait(DAY)
    left = [json.loads(each) for each in desk.says("parked", "list", "--json").splitlines()]
    assert len(left) < 12
    billed = [each.identifier.removesuffix("-g2") for each in desk.stripe.model.events]
    assert len(billed) == len(set(billed)), "billed twice"
    assert set(billed) | {each["identifier"] for each in left} == {each.identifier for each in names}


def test_the_list_says_what_may_be_released(desk: Desk) -> None:
    """Of what may be at Stripe it says to ask: a list makes no calls."""
    desk.doubt(total("x"), total("gone", customer="nobody"), arrives=())
    found = [json.loads(each) for each in desk.says("parked", "list", "--json").splitlines()]
    assert {each["identifier"]: (each["release"], each["may_be_at_stripe"]) for each in found} == {
        "tm1-x": ("ask", True),
        "tm1-gone": ("ask", True),
    }
    assert desk.stripe.model.stats["requests"] == 0
    assert " ask " in desk.says("parked", "list")


def test_everything_that_is_known_is_there_for_machines(desk: Desk) -> None:
    desk.close(total("a", "12"))
    desk.deliver()
    desk.doubt(total("x"), total("y", "3"), arrives=("tm1-x",))
    told = json.loads(desk.says("parked", "show", "tm1-x", "--json"))
    (place,) = told["places"]
    assert (place["customer"], place["event_name"], place["minute"]) == ("cus_a", "tokens", T0)
    assert [each["identifier"] for each in place["delivered"]] == ["tm1-a"]
    assert [each["identifier"] for each in place["doubtful"]] == ["tm1-y"]
    assert [(each["identifier"], each["value"]) for each in place["this_total"]] == [("tm1-x", "5")]
    assert place["stripe"] == "17"
    assert 0 <= place["stripe_at"] - (T0 + 600 + DAY) * 1000 < 60_000, "by Stripe's clock, which goes on"
    assert (told["generation"], told["parking"], told["reason"]) == (1, 1, "in_doubt")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("key", "give it this permission"),
        ("meter", "it has no meter of the event name tokens"),
        ("daily", "its meter tokens does not sum raw events"),
        ("customer", "No such customer"),
    ],
)
def test_where_stripe_does_not_tell_it_is_said_why(desk: Desk, change: str, why: str) -> None:
    """And nothing is recommended."""
    desk.doubt(total("x"), arrives=())
    model, meters = desk.stripe.model, desk.stripe.model._meters
    if change == "key":
        model.keys = {SECRET_KEY: frozenset({"customer_read"})}
    elif change == "meter":
        meters.clear()
    elif change == "daily":
        next(iter(meters.values())).event_time_window = "day"
    else:
        model.accept_any_customer = False
    shown = desk.says("parked", "show", "tm1-x")
    assert "Recommendation: cannot tell. Stripe's sum is not known: " in shown
    assert why in shown


def test_in_shadow_nothing_is_released(desk: Desk) -> None:
    """It would be finished as shadowed: usage of a time when nobody else billed, and told to be sent after all."""
    desk.doubt(total("x"), arrives=())
    desk.wait(DAY)
    desk.config.write_text(desk.config.read_text().replace("livemode: false", "livemode: false, mode: shadow"))
    assert desk.advice("tm1-x") == "release"
    assert "Release it when the mode is send" in desk.refuses("parked", "release", "tm1-x")
    desk.says("parked", "discard", "tm1-x", "--why", "the other one bills it", "--despite-doubt")


def test_what_moves_while_stripe_is_asked_is_not_judged(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late total of the same minute was delivered between our look at our records and Stripe's answer."""
    desk.doubt(total("x"), arrives=())
    desk.wait(DAY)
    execute = desk.stripe.model.execute
    late = [total("late")]

    def meanwhile(call: Call, **options: Any) -> stripe_wire.Answer:
        if "event_summaries" in call.path and late:
            desk.close(late.pop())
            desk.deliver()
        return execute(call, **options)

    monkeypatch.setattr(desk.stripe.model, "execute", meanwhile)
    told = json.loads(desk.says("parked", "show", "tm1-x", "--json"))
    assert told["places"][0]["stripe"] == "5"
    assert told["recommendation"] == {
        "advice": "wait",
        "why": "Totals of this minute were on their way just now: ask again.",
    }
    assert desk.advice("tm1-x") == "wait", "its sum may lag"
    desk.wait(DAY)
    assert desk.advice("tm1-x") == "release"


def test_unread_totals_of_the_minute_are_waited_for(desk: Desk) -> None:
    """They may be delivered at any moment, and would look like the one in question."""
    desk.doubt(total("x"), arrives=("tm1-x",))
    desk.wait(DAY)
    desk.close(total("late"), total("other", customer="cus_b"), total("next", minute=1))
    told = json.loads(desk.says("parked", "show", "tm1-x", "--json"))
    assert [each["identifier"] for each in told["places"][0]["doubtful"]] == ["tm1-late"]
    assert told["recommendation"]["advice"] == "wait"
    assert "(tm1-late)" in told["recommendation"]["why"]


def test_outcomes_that_are_not_kept_any_more_make_no_recommendation(desk: Desk) -> None:
    """What we delivered there is forgotten: Stripe's sum alone tells nothing."""
    desk.close(total("a", "12"))
    desk.deliver()
    desk.doubt(total("x"), arrives=())
    desk.wait(DAY)
    desk.close(total("b", customer="cus_b"))
    desk.deliver()
    with SqliteStore.open(desk.path, now=lambda: 0, create=False, lock=False) as store:
        assert store.expire(Log.OUTCOMES, (T0 + DAY) * 1000, 100) == 1
    told = json.loads(desk.says("parked", "show", "tm1-x", "--json"))["recommendation"]
    assert told["advice"] == "cannot_tell"
    assert told["why"].startswith("What was delivered there is not known: outcomes of that time are not kept any more")


@pytest.mark.parametrize(
    ("file", "coming"),
    [
        ("ann: cus_a\n", ["tm1-ann"]),
        ("ann: cus_b\n", []),
        ("ann: null\n", []),
        ("bob: cus_a\n", []),
        ("no mapping", ["tm1-ann"]),
    ],
)
def test_who_an_unread_total_is_for_is_looked_up_and_may_be_anybody_where_that_fails(
    desk: Desk, file: str, coming: list[str]
) -> None:
    """The mapping is the service's; where it cannot be read, what is unread may be for the customer in question."""
    desk.doubt(total("x"), arrives=("tm1-x",))
    desk.close(total("ann", customer="ann"))
    customers = desk.path.with_name("customers.yaml")
    customers.write_text(file)
    desk.config.write_text(desk.config.read_text() + f"customers: {{kind: file, path: {customers}}}\n")
    told = json.loads(desk.says("parked", "show", "tm1-x", "--json"))
    assert [each["identifier"] for each in told["places"][0]["doubtful"]] == coming
    assert told["recommendation"]["advice"] == ("wait" if coming else "discard")


@pytest.mark.parametrize("arrives", [("tm1-x",), ()])
def test_what_is_decided_while_it_is_looked_at_is_not_judged_by_what_came_of_it(
    desk: Desk, arrives: tuple[str, ...]
) -> None:
    """Its own outcome would make up for all of the sum: what is there would seem not to be."""
    desk.doubt(total("x"), arrives=arrives)
    desk.wait(DAY)
    with SqliteStore.open(desk.path, now=lambda: 0, create=False, lock=False) as store:
        before = [*audit.parked(store)]
    desk.says("parked", "discard" if arrives else "release", "tm1-x", "--why", "the sum says so")
    desk.deliver()
    desk.wait(2 * DAY)
    with (
        SqliteStore.open(desk.path, now=lambda: 0, create=False, lock=False) as store,
        reading(SECRET_KEY, api_base=desk.stripe.url, livemode=False, clock=SystemClock()) as reads,
    ):
        (judged,) = evidence.judge(store, before, Passthrough(), reads)
    assert judged.recommendation.advice == "wait"
    assert "ask again" in judged.recommendation.why
