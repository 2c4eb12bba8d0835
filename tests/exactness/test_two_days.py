"""Stripe away for two days, in every way in which it can be: what is in doubt then, and how it is settled.

The real service on a real Kafka, with a clock that is moved, as Stripe's is. Traffic goes on all the time. First
connections are refused, then requests are taken and the answers lost, then Stripe answers with 500 and has taken some
of them; in between the service is killed. Then all is well again, and an operator settles what is left.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Final
from urllib.parse import urlencode
from zlib import crc32

import pytest

from consumer.deliver.entries import SAME_IDENTIFIER_FOR, Entry, Reason, State, is_total, unpack
from consumer.sandbox.kafka import Kafka
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_objects import UNIQUE_FOR
from consumer.sandbox.stripe_server import Fault, StripeStandIn
from consumer.sandbox.stripe_wire import read_call
from consumer.storage import Stage
from consumer.totals import Total
from tests.exactness.operator import Operator
from tests.kafka.harness import DAY, HOUR, METER, MINUTE, SECOND, TOKENS, Bench, Topic, event, iso, until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

CALLS: Final = "api_calls"
LAG: Final = 10 * MINUTE
"""So long Stripe's sums lag."""
BEFORE: Final = 10 * DAY
"""So long ago the story begins: Kafka takes no records of the future."""
IN_FLIGHT: Final = 80
"""Totals that are sending or wait for another try; four of each customer."""

TWINS: Final[Mapping[str, tuple[bool, bool]]] = {
    "cus_one": (True, False),
    "cus_both": (True, True),
    "cus_none": (False, False),
    "cus_late": (False, True),
}
"""Two totals of one minute have equal values, and these of them get to Stripe. The last one's second is a revision,
the others come from two partitions."""
EARLY: Final = (*TWINS, "cus_a", "cus_b", "cus_c")
"""They are in flight when answers begin to get lost."""
BOTH_METERS_OF_EACH: Final = 2 * len(EARLY)
LATER: Final = ("cus_p", "cus_q", "cus_r")
"""They come while Stripe answers with 500."""

Place = tuple[str, str, int]
"""Event name, customer and minute, in seconds since the epoch."""


class Story:
    """What happens, and what is true."""

    def __init__(self, bench: Bench, topic: Topic) -> None:
        self.stripe = bench.stripe
        self.topic = topic
        calls = {name: each for name, each in METER.items() if name != "value"}
        self.service = bench.service(
            topic,
            stripe={"max_rate": 200},
            limits={"in_flight": IN_FLIGHT},
            meters=[METER, calls | {"name": "calls", "aggregation": "count", "stripe": {"event_name": CALLS}}],
        )
        self.service.clock.jump(-BEFORE)
        self.service.set(bill_from=iso(self.now() - HOUR))
        self.stripe.clock.advance(-BEFORE / SECOND)
        self.stripe.faults.plan = self._meet
        self.fate: Callable[[str], Fault | None] = lambda _: None
        """What becomes of a request, by its identifier."""
        self.arrives: set[str] = set()
        """Of totals: whether Stripe takes them, where answers get lost; of others the identifier decides."""
        self.stays_away: set[str] = set()
        self.reached: set[str] = set()
        """Identifiers of requests that have come to Stripe."""
        self.marked: set[str] = set()
        """Totals that had possibly been tried, as far as the service knew when it was killed."""
        self.expected: dict[Place, Decimal] = defaultdict(Decimal)
        """What was used."""
        self.foreign: dict[Place, Decimal] = defaultdict(Decimal)
        """What somebody else used."""
        self.away_since = 0
        self._produced = 0
        self._chance = random.Random(48)  # noqa: S311 - has to be the same every time

    # Time

    def now(self) -> int:
        return self.service.clock.now()

    def sleep(self, milliseconds: int) -> None:
        """So much time passes, here and at Stripe."""
        self.stripe.clock.advance(milliseconds / SECOND)
        self.service.clock.pass_time(milliseconds)

    def until(self, hours: int, minutes: int = 0) -> None:
        """So long Stripe has been away by now."""
        left = self.away_since + hours * HOUR + minutes * MINUTE - self.now()
        assert left >= 0, "it is later already"
        self.sleep(left)

    # Traffic

    def use(self, *customers: str) -> None:
        """A minute of usage: counted, its windows closed, in the log of totals."""
        at = self.now()
        used = {customer: self._chance.randrange(1, 1_000) for customer in customers}
        for number, (customer, n) in enumerate(used.items()):
            for partition in (0, 1) if customer in TWINS and customer != "cus_late" else (number % 2,):
                self._produce(customer, n, at, partition)
        self.sleep(5 * MINUTE)
        if "cus_late" in used:
            self._produce("cus_late", used["cus_late"], at, 0)
        self.sleep(7 * MINUTE)
        for partition in (0, 1):
            self.topic.produce(None, at=self.now(), partition=partition)
        self._produced += 2
        self.service.until(self._closed, "all is counted, and closed")

    def _produce(self, customer: str, n: int, at: int, partition: int) -> None:
        self.topic.produce(event(n, at=at, customer=customer), at=self.now(), partition=partition)
        self._produced += 1
        minute = at // MINUTE * 60
        self.expected[TOKENS, customer, minute] += n
        self.expected[CALLS, customer, minute] += 1

    def _closed(self) -> bool:
        seen = self.service.metrics()
        return seen.sum("tallyman_consumed_total") == self._produced and not seen.sum("tallyman_open_keys")

    def write_elsewhere(self, place: Place) -> None:
        """Somebody else has used the same meter, for the same customer, in the same minute."""
        event_name, customer, minute = place
        value = "7" if event_name == CALLS else "5000.25"
        form = {
            "event_name": event_name,
            "identifier": f"other-{len(self.foreign)}",
            "timestamp": minute + 30,
            "payload[stripe_customer_id]": customer,
            "payload[value]": value,
        }
        call = read_call("POST", "/v1/billing/meter_events", urlencode(form), f"Bearer {SECRET_KEY}")
        until(lambda: self.stripe.model.handle(call).status == 200, "somebody else's event is taken")
        self.foreign[place] += Decimal(value)

    # Stripe, as it is just then

    def _meet(self, _number: int, identifier: str) -> Fault | None:
        self.reached.add(identifier)
        return self.fate(identifier)

    def takes(self, identifier: str) -> bool:
        if identifier in self.arrives or identifier in self.stays_away:
            return identifier in self.arrives
        return crc32(identifier.encode()) % 2 == 0

    def loses_answers(self, identifier: str) -> Fault:
        return Fault.ACCEPT_LOSE if self.takes(identifier) else Fault.LOSE

    def hangs(self, identifier: str) -> Fault:
        return Fault.ACCEPT_HANG if self.takes(identifier) else Fault.HANG

    def breaks(self, identifier: str) -> Fault:
        """500; and it never comes to saying what it has, as it would to a repetition."""
        if self._refuses(identifier):
            return Fault.LOSE
        return Fault.ACCEPT_ERROR if self.takes(identifier) else Fault.ERROR

    def breaks_at_once(self, identifier: str) -> Fault:
        """The same, and it takes nothing."""
        return Fault.LOSE if self._refuses(identifier) else Fault.ERROR

    def breaks_too_late(self, identifier: str) -> Fault:
        """The same, and it takes all that it has not."""
        return Fault.LOSE if self._refuses(identifier) else Fault.ACCEPT_ERROR

    def _refuses(self, identifier: str) -> bool:
        since = [each.received for each in list(self.stripe.model.events) if each.identifier == identifier]
        return bool(since) and self.stripe.clock() - max(since) < UNIQUE_FOR

    # The service

    def kill(self, fate: Callable[[str], Fault | None], *, latency: float = 0.0) -> None:
        """SIGKILL, and a new start into another mood of Stripe's."""
        self.service.kill()
        self.marked |= self.tried().keys()
        self.fate = fate
        self.stripe.faults.latency = (latency, latency)
        self.service.start()

    def shut(self) -> None:
        """Wait until the service has noticed that Stripe does not answer."""
        self.service.until(lambda: "down" in self.service.get("/readyz")[1], "it is noticed that Stripe is away")

    def probe(self) -> None:
        """Half a minute, in which one attempt is made."""
        answered = self._answered()
        self.sleep(31 * SECOND)
        self.service.until(lambda: self._answered() > answered, "somebody probes")

    def _answered(self) -> float:
        return self.service.metrics().sum("tallyman_stripe_requests_total")

    def probe_until(self, holds: Callable[[], bool], what: str) -> None:
        """As often as it takes; not for ever."""
        for _ in range(100):
            if holds():
                return
            self.probe()
        raise AssertionError(f"a hundred attempts, and it is not so that {what}")

    def tried(self) -> dict[str, Entry]:
        """The totals, not finished, of which something may be at Stripe as far as is known durably."""
        with self.service.store() as store:
            restored = store.restore(Stage.DELIVER, 0)
        found = [unpack(value) for key, value in (restored.entries if restored else ()) if is_total(key)]
        return {
            each.total.identifier: each
            for each in found
            if each.state is State.SENDING or each.first_unproven is not None
        }

    def given_up(self) -> set[str]:
        """Those that Stripe may have forgotten the identifier of, soon."""
        return {
            name
            for name, each in self.tried().items()
            if each.first_unproven is not None and self.now() - each.first_unproven >= SAME_IDENTIFIER_FOR
        }

    def in_doubt(self) -> dict[str, Entry]:
        return {name: each for name, each in self.tried().items() if each.reason is Reason.IN_DOUBT}

    def let_finish(self) -> None:
        """Time goes on until all is delivered, or parked."""

        def finished() -> bool:
            self.sleep(SECOND)
            return self.finished()

        self.service.until(finished, "all is delivered, or parked")

    def finished(self) -> bool:
        """Whether all is delivered, or parked."""
        seen = self.service.metrics()
        return not seen.sum("tallyman_totals", state="unread") and not seen.sum("tallyman_totals", state="pending")

    def totals_of(self, customer: str, event_name: str, minute: int) -> list[Total]:
        found = [total for total in self.service.totals() if place_of(total) == (event_name, customer, minute)]
        return sorted(found, key=lambda each: (each.revision, each.partition))

    # The truth

    def at_stripe(self, identifier: str) -> bool:
        """Whether an event of a total is there, in whatever generation."""
        return any(base(each.identifier) == identifier for each in list(self.stripe.model.events))

    def billed(self) -> dict[Place, Decimal]:
        """What Stripe bills of ours."""
        sums: dict[Place, Decimal] = defaultdict(Decimal)
        for each in list(self.stripe.model.events):
            if not each.identifier.startswith("other-"):
                sums[each.event_name, each.customer, each.timestamp // 60 * 60] += each.value
        return sums


def place_of(total: Total) -> Place:
    return total.stripe.event_name, total.customer, total.window_start


def base(identifier: str) -> str:
    """Without its generation."""
    return identifier.partition("-g")[0]


@pytest.fixture
def story(kafka: Kafka, tmp_path: Path) -> Iterator[Story]:
    with StripeStandIn(accept_any_customer=True, lag=LAG / SECOND) as stripe:
        for event_name in (TOKENS, CALLS):
            stripe.model.add_meter(event_name)
        bench = Bench(kafka, tmp_path, stripe)
        try:
            yield Story(bench, Topic.create(kafka, 2, arrival="create_time", retention_ms=-1))
        finally:
            bench.kill_all()


def test_two_days_without_stripe_leave_doubts_that_an_operator_settles_rightly(story: Story) -> None:
    story.service.start()
    story.use(*EARLY, *LATER)
    story.service.until(story.finished, "all is delivered")
    assert story.billed() == story.expected

    minute = connections_are_refused(story)
    answers_are_lost(story, minute)
    stripe_answers_with_500(story, minute)
    doubts = stripe_is_back(story)

    operator = Operator(
        story.service.folder / "tallyman.yaml", SECRET_KEY, at_stripe=story.at_stripe, now=story.now, sleep=story.sleep
    )
    the_operator_settles(story, operator, doubts)
    assert story.billed() == story.expected, "nothing is lost, nothing doubled"
    sent = Counter(base(each.identifier) for each in story.stripe.model.events if each.identifier.startswith("tm1-"))
    assert sent == dict.fromkeys((total.identifier for total in story.service.totals()), 1)
    assert story.stripe.model.violations == []
    all_that_differs_is_somebody_elses(story, operator)
    story.service.stop()


def connections_are_refused(story: Story) -> int:
    """Ten hours. Nothing is in doubt by that, though the service is killed. Returns a minute of which all is tried."""
    had = len(story.reached)
    story.stripe.down()
    story.away_since = story.now()
    story.until(1)
    minute = story.now() // MINUTE * 60
    story.use(*EARLY)
    story.shut()
    story.until(4)
    story.service.until(lambda: len(story.tried()) <= 1, "what was refused is durably untried, but for a probe")
    story.kill(story.fate)
    story.shut()
    story.until(8)
    story.use(*EARLY)
    assert len(story.reached) == had
    assert len(story.marked) <= 1, "one at a time probes"
    story.service.until(lambda: story.tried().keys() <= story.marked, "nothing is taken to be tried by that")
    return minute


def answers_are_lost(story: Story, minute: int) -> None:
    """Seven hours. The service is killed when it waits for a first round of answers, and knows what may be there."""
    for event_name in (TOKENS, CALLS):
        for customer, fates in TWINS.items():
            for total, arrives in zip(story.totals_of(customer, event_name, minute), fates, strict=True):
                (story.arrives if arrives else story.stays_away).add(total.identifier)
    story.arrives |= {total.identifier for total in story.totals_of("cus_a", TOKENS, minute)}
    story.stays_away |= {total.identifier for total in story.totals_of("cus_b", TOKENS, minute)}
    had = len(story.reached)
    story.until(10)
    story.stripe.up()
    story.kill(story.hangs)
    story.service.until(lambda: len(story.reached) == had + BOTH_METERS_OF_EACH, "all that may be at once is sent")
    story.kill(story.loses_answers, latency=0.2)
    story.shut()
    wanted = {total.identifier for customer in TWINS for total in story.totals_of(customer, TOKENS, minute)}
    story.probe_until(lambda: wanted <= story.reached, "twins have come to Stripe, as far as they do")
    assert BOTH_METERS_OF_EACH < len(story.tried()) <= IN_FLIGHT


def stripe_answers_with_500(story: Story, minute: int) -> None:
    """31 hours. What was tried first is given up after 23; others are tried meanwhile, and taken at the last moment."""
    story.until(17)
    story.fate = story.breaks
    later = story.now() // MINUTE * 60
    story.use(*LATER)
    story.stays_away |= {total.identifier for name in LATER for total in story.totals_of(name, TOKENS, later)}
    story.until(24, 57)
    story.kill(story.breaks_at_once, latency=0.2)
    story.shut()
    story.fate = story.breaks
    for customer, event_name in (("cus_a", TOKENS), ("cus_b", TOKENS), ("cus_none", TOKENS), ("cus_c", CALLS)):
        story.write_elsewhere((event_name, customer, minute))
    story.until(27)
    story.use(*EARLY, *LATER)
    story.until(33, 20)
    story.probe_until(lambda: story.given_up() == story.in_doubt().keys(), "what was tried first is in doubt")
    assert len(story.in_doubt()) > BOTH_METERS_OF_EACH
    story.until(36)
    story.kill(story.breaks, latency=0.2)
    story.shut()
    story.until(44)
    story.use(*EARLY, *LATER)
    story.until(47, 55)
    story.kill(story.breaks_too_late, latency=0.2)
    story.shut()
    story.until(47, 59)


def stripe_is_back(story: Story) -> dict[str, Entry]:
    """What is in doubt, of all that was used meanwhile: only what may have been written, and was so for 23 hours."""
    before = story.tried()
    story.until(48)
    story.fate, story.stripe.faults.latency = lambda _: None, (0.0, 0.0)
    story.let_finish()
    doubts = story.in_doubt()
    meanwhile = [total for total in story.service.totals() if total.due >= story.away_since]
    reached = sum(each in story.reached for each in doubts)
    there = sum(map(story.at_stripe, doubts))
    print(
        f"\nof {len(meanwhile)} totals made without Stripe {len(before)} had been tried, and {len(doubts)} are in"
        f" doubt: {reached} came to Stripe, {there} are there. The bound is {IN_FLIGHT}."
    )
    assert doubts.keys() <= story.reached | story.marked
    for each in doubts.values():
        assert each.first_unproven is not None
        assert story.away_since <= each.first_unproven <= each.parked_at - SAME_IDENTIFIER_FOR
    assert 0 < there < reached <= len(doubts) <= IN_FLIGHT
    assert len(doubts) < len(before), "those that are tried for less than 23 hours are tried again"
    return doubts


def the_operator_settles(story: Story, operator: Operator, doubts: Mapping[str, Entry]) -> None:
    """Asked at once, and then when the advice says. What it cannot tell, the operator knows from others' logs."""
    fresh = [each for each in story.stripe.model.events if each.received > story.stripe.clock() - LAG / SECOND]
    assert any(each.identifier in doubts for each in fresh), "there is a doubt that the sums do not show yet"
    # Nor do they show what somebody else has used, in a minute with a doubt and in one without.
    of_p = [each.total for each in doubts.values() if place_of(each.total)[:2] == (TOKENS, "cus_p")]
    of_c = [each for each in story.service.totals() if place_of(each)[:2] == (TOKENS, "cus_c")]
    story.write_elsewhere(place_of(of_p[0]))
    story.write_elsewhere(place_of(of_c[-1]))
    operator.settle()
    story.service.until(story.finished, "all is delivered")
    assert operator.parked() == {}
    assert operator.followed.keys() == doubts.keys()
    print(f"asked {operator.given.total()} times: {dict(operator.given)}; done: {Counter(operator.followed.values())}")
    assert operator.given.keys() == {"release", "discard", "wait", "cannot_tell"}
    known = {name for name, how in operator.followed.items() if how.endswith("known")}
    undecided = {doubts[each].total.customer for each in known}
    assert undecided == {"cus_one", "cus_late", *(customer for _, customer, _ in story.foreign)}


def all_that_differs_is_somebody_elses(story: Story, operator: Operator) -> None:
    """A day later, when all sums are final."""
    story.sleep(25 * HOUR)
    since, upto = (iso(at)[:10] for at in (story.away_since - DAY, story.now()))
    found = operator.lines("reconcile", "--since", since, "--until", upto, code=1)
    days: dict[Place, Decimal] = defaultdict(Decimal)
    for (event_name, customer, minute), value in story.foreign.items():
        days[event_name, customer, minute // 86_400 * 86_400] += value
    differs = {(each["event_name"], each["customer"], each["start"]): each for each in found if each["kind"] == "day"}
    assert {place: (each["state"], Decimal(each["difference"])) for place, each in differs.items()} == {
        place: ("differs", value) for place, value in days.items()
    }
