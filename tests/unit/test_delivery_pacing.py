"""How fast totals go out, and when one of them goes ahead alone."""

from itertools import cycle

import pytest

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.deliver.lanes import Lanes
from consumer.deliver.pacing import Outlet, Pacing, delay
from tests.unit.delivery_world import BROKEN, HOUR, MINUTE, OK, REFUSED, SECOND, UNAUTHORISED, World

LIMITED = Answer(429, "invalid_request_error", "rate_limit", limited="global-rate")


def crowd(count: int, *, in_flight: int = 100, outlet: Outlet | None = None) -> World:
    """So many customers with a total each."""
    names: dict[str, str | None] = {f"c{number}": f"cus_{number}" for number in range(count)}
    world = World(names=names, in_flight=in_flight, outlet=outlet)
    for number in range(count):
        world.total(f"c{number}")
    return world


def attempts_within(pacing: Pacing, start: int, milliseconds: int) -> int:
    """How many attempts are made by somebody who makes all that are allowed."""
    made = 0
    for now in range(start, start + milliseconds):
        while not pacing.wait(now):
            pacing.spend()
            made += 1
    return made


@pytest.mark.parametrize("rate", [25, 1000])
def test_no_more_than_the_rate_goes_out(rate: int) -> None:
    """Beyond a burst of a tenth of a second."""
    made = attempts_within(Pacing(rate), 10**12, 10 * SECOND)
    assert 10 * rate - 1 <= made <= 10.1 * rate + 1


def test_a_rate_below_one_a_second_goes_out_too() -> None:
    """Slowly, but it does."""
    assert attempts_within(Pacing(0.5), 10**12, 10 * SECOND) in {5, 6}


def test_the_time_to_wait_is_the_time_until_the_next_attempt() -> None:
    """Otherwise the shell polls, or sleeps too long."""
    pacing = Pacing(25)
    now = 10**12
    while not pacing.wait(now):
        pacing.spend()
    pause = pacing.wait(now)
    assert pacing.wait(now + pause - 1) > 0
    assert pacing.wait(now + pause) == 0


def test_a_clock_that_steps_back_neither_mints_attempts_nor_stops_them() -> None:
    """Hosts' clocks are corrected while we send."""
    pacing = Pacing(100)
    attempts_within(pacing, 10**12, SECOND)
    made = attempts_within(pacing, 10**12 - HOUR, SECOND)
    assert 98 <= made <= 112


def test_the_rate_is_halved_once_a_second_and_comes_back_in_steps() -> None:
    """A burst of 429s is one message; a minute without any brings the rate back."""
    pacing = Pacing(1000)
    now = 10**12
    for _ in range(50):
        pacing.too_fast(now)
    assert pacing.rate == 500
    pacing.too_fast(now + SECOND)
    assert pacing.rate == 250
    for second in range(2, 62):
        pacing.went_well(now + second * SECOND)
        pacing.went_well(now + second * SECOND)
    assert pacing.rate == 1000
    for second in range(100):
        pacing.too_fast(now + second * HOUR)
    assert pacing.rate == 1


def test_a_share_that_changes_takes_the_rate_along_and_forgets_no_slowing_down() -> None:
    """A process has the share of its partitions; what Stripe asked for holds on."""
    pacing = Pacing(1000)
    pacing.limit(250)
    assert attempts_within(pacing, 10**12, 10 * SECOND) <= 10.1 * 250 + 1
    pacing.limit(500)
    assert pacing.rate == 500
    pacing.too_fast(10**12)
    pacing.limit(1000)
    assert pacing.rate == 250
    pacing.limit(100)
    assert pacing.rate == 100


def test_the_delay_is_the_same_for_the_same_total_and_differs_between_totals() -> None:
    """What failed together does not come back together; a replay waits as long as the first run."""
    delays = {delay(f"tm1-{number}", 5) for number in range(100)}
    assert len(delays) > 90
    assert all(8 * SECOND <= pause <= 16 * SECOND for pause in delays)
    assert delay("tm1-1", 5) == delay("tm1-1", 5)
    assert delay("tm1-1", 10**6) <= 5 * MINUTE


def test_lanes_take_turns() -> None:
    """A long queue does not hold up a short one."""
    lanes: Lanes[int] = Lanes()
    for item in range(5):
        lanes.add(("a", "m"), item)
    lanes.add(("b", "m"), 10)
    assert (lanes.take(), lanes.take(), lanes.take()) == (0, 10, None)
    lanes.add(("b", "m"), 11)
    lanes.done(("b", "m"))
    lanes.done(("a", "m"))
    assert (lanes.take(), lanes.take()) == (11, 1)
    assert lanes.withdraw(lambda item: item > 2) == [3, 4]
    assert len(lanes) == 1
    lanes.done(("a", "m"))
    assert lanes.take() == 2


def test_stripes_rate_limit_slows_down_and_success_speeds_up_again() -> None:
    """The rate finds what Stripe takes."""
    world = crowd(50)
    world.run(world.now + 100, lambda _: LIMITED)
    assert world.delivery.rate == 500
    world.run(world.now + HOUR)
    for second in range(90):
        world.wait(SECOND)
        world.total(f"c{second % 50}")
        world.run(world.now + SECOND)
    assert len(world.stripe.billed) == 140
    assert world.delivery.rate == 1000


@pytest.mark.parametrize("silence", [Lost("timeout"), NeverConnected("refused"), BROKEN])
def test_while_stripe_is_down_one_total_probes(silence: Heard) -> None:
    """Two thousand totals that knock at once, every few minutes, are no help to anybody."""
    world = crowd(200)
    sent = 0

    def count(_: Attempt) -> Heard:
        nonlocal sent
        sent += 1
        return silence

    world.run(world.now + SECOND, count)
    assert str(world.delivery.shut) == "down"
    assert sent <= 40
    assert not world.delivery.paused

    sent = 0
    world.run(world.now + 10 * MINUTE, count)
    assert 20 <= sent <= 30

    world.run(world.now + 40 * SECOND)
    assert not world.delivery.shut
    assert len(world.stripe.billed) == 200, "somebody still rests because Stripe was down"
    assert world.delivery.rate < 200
    assert world.balanced()


def test_after_an_outage_nobody_rests_because_of_it() -> None:
    """Each of them has failed twenty times and would wait for minutes, while Stripe is there again."""
    world = crowd(20)
    world.run(world.now + 4 * HOUR, lambda _: Lost())
    world.run(world.now + 40 * SECOND)
    assert len(world.stripe.billed) == 20


def test_only_one_probe_is_on_its_way() -> None:
    """The second would be no probe any more."""
    world = crowd(60)
    world.run(world.now + SECOND, lambda _: Lost())
    world.wait(MINUTE)
    world.must_send()
    world.wait(HOUR)
    assert world.send() is None
    assert world.delivery.wake(world.now) is None or world.delivery.wake(world.now) != world.now


def test_while_stripe_is_down_what_is_heard_is_durable_at_once() -> None:
    """However many wait to be tried again: else, killed hours later, nobody knows what was refused or given up."""
    world = crowd(30)
    world.read()
    world.commit()
    sent = [world.must_send() for _ in range(30)]
    for attempt in sent:
        world.delivery.answered(attempt, Lost(), world.now)
    assert world.delivery.shut == "down"
    world.commit()
    world.wait(HOUR)
    probe = world.must_send()
    world.delivery.answered(probe, Lost(), world.now)
    assert world.due()
    world.commit()
    assert world.entry(probe.total).attempts == 2
    world.wait(23 * HOUR)
    assert world.send() is None, "all of them are given up"
    assert world.due()


def test_an_outage_of_days_leaves_no_doubts_about_what_was_never_sent() -> None:
    """Armed totals that cannot be sent are unmarked: a crash in the outage must not make tried ones of them."""
    world = crowd(100)
    world.run(world.now + 30 * HOUR, lambda _: NeverConnected("refused"))
    assert sum(entry.first_unproven is not None for entry in world.entries.values()) <= 1
    world.restart()
    world.run(world.now + HOUR)
    assert len(world.stripe.billed) == 100
    assert world.parked() == {}


def test_a_revoked_key_pauses_the_stage_until_a_probe_passes() -> None:
    """Nothing is parked, nothing more is read; once somebody has put the key right, it goes on by itself."""
    world = crowd(100, in_flight=40)
    sent = 0

    def revoked(_: Attempt) -> Heard:
        nonlocal sent
        sent += 1
        return UNAUTHORISED

    world.run(world.now + 5 * MINUTE, revoked)
    assert str(world.delivery.paused) == "unauthorised"
    assert world.delivery.room == 0
    assert 10 <= sent <= 12
    assert world.parked() == {}
    assert sum(entry.first_unproven is not None for entry in world.entries.values()) <= 1

    world.run(world.now + HOUR)
    assert not world.delivery.paused
    assert len(world.stripe.billed) == 100
    assert world.balanced()


def test_a_limiter_that_answers_has_not_looked_at_the_key() -> None:
    """It may stand before whatever knows the keys: opened by it, the stage would storm a door that is shut."""
    world = crowd(100, in_flight=40)
    world.run(world.now + MINUTE, lambda _: UNAUTHORISED)
    world.run(world.now + MINUTE, lambda _: Answer(429, "invalid_request_error", "rate_limit", limited="global-rate"))
    assert str(world.delivery.paused) == "unauthorised"


def test_what_a_commit_marks_while_the_key_is_revoked_is_unmarked() -> None:
    """The commit was on its way; what it armed waits for the pause to end, and must not look tried."""
    world = crowd(10)
    world.read()
    world.commit()
    attempt = world.must_send()
    for _ in range(10):
        world.total("c1")
    world.read()
    world.store()
    world.delivery.answered(attempt, UNAUTHORISED, world.now)
    world.delivery.committed()
    world.commit()
    assert [entry.first_unproven for entry in world.entries.values()] == [None] * 20
    assert world.balanced()


def test_only_the_probe_ends_a_pause() -> None:
    """What was sent before the key was revoked says nothing about it."""
    world = crowd(3)
    world.read()
    world.commit()
    first, second = world.must_send(), world.must_send()
    world.delivery.answered(first, UNAUTHORISED, world.now)
    world.delivery.answered(second, OK, world.now)
    assert world.delivery.paused == "unauthorised"


def test_a_limiter_that_answers_shows_that_stripe_is_there() -> None:
    world = crowd(60)
    world.run(world.now + MINUTE, lambda _: Lost())
    assert str(world.delivery.shut) == "down"
    limited = Answer(429, "invalid_request_error", "rate_limit", limited="global-rate")
    world.run(world.now + MINUTE, lambda _: limited)
    assert world.delivery.shut is None


def test_failures_between_answers_are_not_an_outage() -> None:
    """Stripe is there, and slow for some."""
    world = crowd(100)
    number = 0

    def every_fifth(_: Attempt) -> Heard:
        nonlocal number
        number += 1
        return Lost() if number % 5 else OK

    world.run(world.now + SECOND // 2, every_fifth)
    assert number >= 100
    assert not world.delivery.shut


def test_refusals_of_many_customers_pause_the_stage_and_spare_the_others() -> None:
    """A wrong value key refuses everybody: a person is needed once, and not for a hundred thousand totals."""
    world = crowd(300, in_flight=100)
    world.run(world.now + 10 * MINUTE, lambda _: REFUSED)
    assert str(world.delivery.paused) == "refusals"
    assert list(world.parked().values()) == ["refused"] * 40
    assert world.delivery.room == 0
    world.run(world.now + HOUR)
    assert not world.delivery.paused
    assert len(world.stripe.billed) == 260
    assert world.balanced()


def test_refusals_of_few_customers_park_and_do_not_pause() -> None:
    """Four deleted customers with many totals are theirs alone."""
    world = World(names={f"c{number}": f"cus_{number}" for number in range(4)}, in_flight=2000)
    for _, number in zip(range(200), cycle(range(4)), strict=False):
        world.total(f"c{number}")
    world.run(world.now + HOUR, lambda _: REFUSED)
    assert not world.delivery.paused
    assert len(world.parked()) == 200


def test_a_fifth_of_refusals_among_deliveries_is_the_limit() -> None:
    """The share counts, and not how many there have ever been."""
    world = crowd(1000)
    number = 0

    def every_sixth(_: Attempt) -> Heard:
        nonlocal number
        number += 1
        return OK if number % 6 else REFUSED

    world.run(world.now + HOUR, every_sixth)
    assert not world.delivery.paused
    assert len(world.parked()) == 166


def test_a_pause_for_refusals_ends_though_everybody_in_flight_is_really_gone() -> None:
    """Each of them is refused as a probe, and then the log is asked for another one."""
    world = crowd(60, in_flight=45)
    world.total("good")
    world.names.known["good"] = "cus_good"
    world.run(world.now + 2 * HOUR, lambda attempt: OK if attempt.stripe_customer == "cus_good" else REFUSED)
    assert not world.delivery.paused
    assert len(world.outcomes) == 1
    assert len(world.parked()) == 60


def test_a_pause_with_nobody_left_in_flight_reads_one_more() -> None:
    """The last total came to be in doubt while the key was revoked; somebody has to find out that it is cured."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(MINUTE)
    world.delivery.answered(world.must_send(), UNAUTHORISED, world.now)
    bob = world.total("bob")
    world.wait(24 * HOUR)
    world.run(world.now + HOUR)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert [identifier for identifier, *_ in world.stripe.billed] == [bob]


def test_failing_lookups_while_stripe_is_down_do_not_spin() -> None:
    """There is nobody to probe with; that is asked again in a second, and not at once."""
    world = crowd(20)
    world.run(world.now + SECOND // 2, lambda _: NeverConnected())
    world.names.fails = True
    world.run(world.now + 10 * MINUTE)
    assert world.stripe.billed == []
    world.names.fails = False
    world.run(world.now + 10 * MINUTE)
    assert len(world.stripe.billed) == 20
