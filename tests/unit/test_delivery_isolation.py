"""One bad customer, one bad meter, one poisonous total: nobody else waits for them, and a slow Stripe is not stormed.

The shell of these tests has a clock of its own: commits take time, requests take time, and nothing is waited for.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from typing import NamedTuple

import pytest

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from tests.unit.delivery_world import BROKEN, BUSY, HOUR, MINUTE, NO_METER, OK, REFUSED, SECOND, World

LIMITED = Answer(429, "invalid_request_error", "rate_limit", limited="endpoint-rate")
PULSE = 10
COMMIT = 30
LATENCY = 300
CONNECTIONS = 512

Stripe = Callable[[Attempt, int], tuple[Heard, int]]
"""What is heard of an attempt that is made then, and after how many milliseconds."""


class Usage(NamedTuple):
    """A total that comes so many milliseconds after the beginning."""

    at: int
    customer: str
    meter: str
    number: int


class Told(NamedTuple):
    """What Stripe was asked, and what became of it."""

    taken: dict[Usage, int]
    """When each total was taken, since the beginning."""
    said: Counter[int]
    """Answers by status; 0 is silence."""


def drive(traffic: Iterable[Usage], stripe: Stripe, *, until: int, in_flight: int = 2000, rate: float = 1000) -> Told:
    """What a process does that sends while it commits, until this time has passed, or all has been taken."""
    coming = sorted(traffic, key=lambda each: each.at)
    names: dict[str, str | None] = {each.customer: f"cus_{each.customer}" for each in coming}
    world = World(names=names, in_flight=in_flight, parked_limit=100_000, max_rate=rate)
    begun = world.now
    of: dict[str, Usage] = {}
    taken: dict[Usage, int] = {}
    said: Counter[int] = Counter()
    answers: list[tuple[int, int, Attempt, Heard]] = []
    numbers = count()
    committed_at = None
    arrived = 0
    while world.now < begun + until and len(taken) < len(coming):
        while arrived < len(coming) and begun + coming[arrived].at <= world.now:
            each = coming[arrived]
            of[world.total(each.customer, meter=each.meter)] = each
            arrived += 1
        while answers and answers[0][0] <= world.now:
            _, _, attempt, heard = heapq.heappop(answers)
            world.delivery.answered(attempt, heard, world.now)
            said[heard.status if isinstance(heard, Answer) else 0] += 1
            if heard is OK:
                taken[of[attempt.total]] = world.now - begun
        if committed_at is not None and committed_at <= world.now:
            world.delivery.committed()
            committed_at = None
        world.read()
        if committed_at is None and world.delivery.due and world.store():
            committed_at = world.now + COMMIT
        while len(answers) < CONNECTIONS and (sent := world.delivery.next(world.now)) is not None:
            if world.delivery.may_send(sent, world.now):
                heard, after = stripe(sent, world.now - begun)
                heapq.heappush(answers, (world.now + after, next(numbers), sent, heard))
        world.wait(PULSE)
        if committed_at is None and not answers and not world.delivery.due:
            wakes = [world.delivery.wake(world.now), begun + coming[arrived].at if arrived < len(coming) else None]
            world.now = max(world.now, min((wake for wake in wakes if wake is not None), default=begun + until))
    return Told(taken, said)


# One bad one among others


def stripe_with(bad: Callable[[Attempt], Heard | None], *, silent: int = LATENCY) -> Stripe:
    """One that works, but for what is bad; so long it is silent where it does not answer at all."""

    def answer(attempt: Attempt, _: int) -> tuple[Heard, int]:
        heard = bad(attempt)
        return (OK, LATENCY) if heard is None else (heard, silent if isinstance(heard, Lost) else LATENCY)

    return answer


def of_customer(heard: Heard) -> Callable[[Attempt], Heard | None]:
    """Every total of one customer, on every meter, is answered like this."""
    return lambda attempt: heard if attempt.stripe_customer == "cus_bad" else None


def of_meter(heard: Heard) -> Callable[[Attempt], Heard | None]:
    """Every total of one meter."""
    return lambda attempt: heard if attempt.event_name == "bad" else None


BUSY_DAY = [Usage(n * 20, f"c{n % 40}", "ai-tokens", n) for n in range(3_000)]
"""A minute of fifty a second."""
QUIET_NIGHT = [Usage(n * 7 * MINUTE + 13, f"c{n % 3}", "ai-tokens", n) for n in range(1, 30)]
"""Three hours with one total in seven minutes."""


def one(number: int) -> tuple[str, str]:
    """Of a bad customer, on the meter of the others."""
    del number
    return "bad", "ai-tokens"


BADS: dict[str, tuple[Stripe, Callable[[int], tuple[str, str]], int]] = {
    # name: Stripe, customer and meter of the n-th bad total, how many bad ones there are for each good one
    "a customer whose lock is never free": (stripe_with(of_customer(BUSY)), one, 2),
    "a customer Stripe does not know": (stripe_with(of_customer(REFUSED)), one, 2),
    "a customer who breaks Stripe": (stripe_with(of_customer(BROKEN)), one, 2),
    "a customer nothing is heard of": (
        stripe_with(of_customer(Lost("timeout")), silent=10 * SECOND),
        lambda n: ("bad", f"meter-{n % 5}"),
        2,
    ),
    "a meter that is not there": (stripe_with(of_meter(NO_METER)), lambda n: (f"c{n % 40}", "bad"), 2),
    "a total that breaks Stripe": (stripe_with(of_customer(BROKEN)), one, 0),
    "a total that is refused": (stripe_with(of_customer(REFUSED)), one, 0),
}


def bad_ones(name: str, good: list[Usage]) -> list[Usage]:
    """Their totals come a moment before those of the others."""
    _, whose, each = BADS[name]
    if each == 0:
        return [Usage(0, *whose(0), -1)]
    return [
        Usage(max(0, usage.at - 5), *whose(number), -1 - number)
        for number, usage in enumerate(usage for usage in good for _ in range(each))
    ]


@pytest.mark.parametrize("name", BADS)
@pytest.mark.parametrize("traffic", [BUSY_DAY, QUIET_NIGHT], ids=["busy", "quiet"])
def test_nobody_waits_for_a_bad_one(name: str, traffic: list[Usage]) -> None:
    """Each total of the others is at Stripe within a second of when it would be without the bad ones."""
    stripe = BADS[name][0]
    until = traffic[-1].at + MINUTE
    alone = drive(traffic, stripe, until=until)
    beside = drive([*traffic, *bad_ones(name, traffic)], stripe, until=until)
    assert alone.taken.keys() == set(traffic)
    assert {each for each in traffic if each not in beside.taken} == set(), "not taken at all"
    late = {each: beside.taken[each] - at for each, at in alone.taken.items()}
    assert max(late.values()) <= SECOND


@pytest.mark.parametrize("heard", [BROKEN, Lost("timeout")])
def test_nobody_waits_for_ever_where_stripe_does_not_answer_for_several(heard: Heard) -> None:
    """That looks like an outage, and a total of theirs is always there to probe with; others find out that it is none.

    Before an hour is over, at any time of the night: Stripe waits for so long before an invoice is final.
    """
    stripe = stripe_with(lambda attempt: heard if "bad" in attempt.stripe_customer else None, silent=10 * SECOND)
    bad = [Usage(max(0, usage.at - 5), f"bad{n}", "ai-tokens", -1 - n) for usage in QUIET_NIGHT for n in range(4)]
    told = drive([*QUIET_NIGHT, *bad], stripe, until=QUIET_NIGHT[-1].at + HOUR)
    late = {each: told.taken.get(each, 2 * HOUR) - each.at for each in QUIET_NIGHT}
    assert max(late.values()) <= 50 * MINUTE


# A backlog, and a Stripe that takes so many a second


def taking(allowed: Callable[[int], int]) -> Stripe:
    """One that takes so many in each second of its clock, and says at once that it takes no more."""
    asked: Counter[int] = Counter()

    def answer(_: Attempt, at: int) -> tuple[Heard, int]:
        second = (at + 470) // SECOND  # its seconds are not ours
        asked[second] += 1
        return (OK, LATENCY) if asked[second] <= allowed(at) else (LIMITED, 5)

    return answer


def backlog(number: int) -> list[Usage]:
    """So many totals of two thousand customers, all there at the beginning."""
    return [Usage(0, f"c{n % 2000}", "ai-tokens", n) for n in range(number)]


@pytest.mark.parametrize(("rate", "allowed"), [(1000, 1000), (1000, 600), (1000, 100), (25, 25), (25, 10)])
def test_a_backlog_goes_out_about_as_fast_as_stripe_takes_it_without_a_storm_of_429s(rate: int, allowed: int) -> None:
    """Also where it takes less than is configured, and where it takes exactly that."""
    number = 40 * allowed
    told = drive(backlog(number), taking(lambda _: allowed), until=HOUR, rate=rate)
    assert len(told.taken) == number
    assert max(told.taken.values()) <= 44 * SECOND
    # Nobody knows beforehand what it takes: the first second's go for that.
    assert told.said[429] <= rate + 0.03 * number


def test_when_stripe_takes_less_for_a_while_the_rate_follows_down_and_up() -> None:
    """Another program of the account sends as well, for half a minute."""
    told = drive(backlog(40_000), taking(lambda at: 300 if 10_000 <= at < 40_000 else 900), until=HOUR)
    assert told.said[429] <= 0.04 * 40_000
    # 10 s at 900, 30 s at 300, and the rate rises for another 36 s until it is at 900 again.
    assert max(told.taken.values()) <= 85 * SECOND


def test_totals_that_wait_for_others_of_their_customer_are_nothing_that_a_person_has_to_settle() -> None:
    """Stripe is away, and all usage is of few customers: no more is read, and nothing is parked."""
    world = World(in_flight=20, parked_limit=30)
    world.total("carol")
    for _ in range(60):
        world.total()
    world.run(world.now + MINUTE, lambda _: NeverConnected())
    assert list(world.parked().values()) == ["unmapped"]
    assert (world.delivery.aside, world.delivery.room) == (29, 0)
    assert world.delivery.paused is None
    world.run(world.now + HOUR)
    assert len(world.outcomes) == 60
