"""A meter that Stripe refuses stops its event name, one total finds out when it is cured, and then all go on."""

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.deliver.stops import PROBE_EVERY
from tests.unit.delivery_world import HOUR, MINUTE, NO_METER, OK, REFUSED, SECOND, World

NAMES: dict[str, str | None] = {name: f"cus_{name}" for name in "abcdefgh"}


class Account:
    """A Stripe account that has no active meter until one is made, and counts who asks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.active = False
        self.asked: list[str] = []

    def answer(self, attempt: Attempt) -> Heard:
        """What Stripe says."""
        self.asked.append(attempt.identifier)
        return self.world.stripe.post(attempt, self.world.now) if self.active else NO_METER


def stopped(count: int = 8) -> tuple[World, Account, list[str]]:
    """A world whose totals are parked because their meter is deactivated."""
    world = World(names=NAMES)
    account = Account(world)
    identifiers = [world.total(name) for name in list(NAMES)[:count]]
    world.run(world.now, account.answer)
    assert world.parked() == dict.fromkeys(identifiers, "meter")
    assert world.delivery.stops.names() == ["ai_tokens"]
    account.asked.clear()
    return world, account, identifiers


def test_a_meter_that_is_cured_takes_what_waited_for_it_without_anybody() -> None:
    world, account, identifiers = stopped()
    world.run(world.now + 10 * MINUTE, account.answer)
    assert 9 <= len(account.asked) <= 11, "one total asks each minute"
    account.active = True
    world.run(world.now + PROBE_EVERY, account.answer)
    assert {each.identifier: each.how for each in world.outcomes} == dict.fromkeys(identifiers, "delivered")
    assert world.parked() == {}
    assert world.delivery.stops.names() == []
    assert world.balanced()


def test_after_a_restart_the_event_name_is_still_stopped_and_one_total_asks() -> None:
    world, account, identifiers = stopped()
    world.restart()
    late = world.total("a")
    world.run(world.now, account.answer)
    assert len(account.asked) == 1
    assert world.parked() == dict.fromkeys([*identifiers, late], "meter")
    account.active = True
    world.run(world.now + PROBE_EVERY, account.answer)
    assert len(world.outcomes) == 9


def test_what_may_be_at_stripe_goes_on_under_its_own_identifier() -> None:
    """An attempt timed out, and the next one found the meter deactivated: the first may have been taken."""
    world = World()
    attempt = world.sent()
    world.stripe.post(attempt, world.now)
    world.delivery.answered(attempt, Lost(), world.now)
    world.run(world.now + MINUTE, lambda _: NO_METER)
    assert world.parked() == {attempt.identifier: "meter"}
    world.run(world.now + PROBE_EVERY)
    assert [(each.identifier, each.how) for each in world.outcomes] == [(attempt.identifier, "duplicate")]
    assert len(world.stripe.billed) == 1


def test_what_may_be_at_stripe_for_a_day_is_not_sent_again_when_the_meter_is_cured() -> None:
    """Stripe has forgotten the identifier by then, and would count it twice."""
    world = World()
    attempt = world.sent()
    world.stripe.post(attempt, world.now)
    world.delivery.answered(attempt, Lost(), world.now)
    world.run(world.now + 25 * HOUR, lambda _: NO_METER)
    world.run(world.now + 2 * MINUTE)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert len(world.stripe.billed) == 1


def test_a_probe_that_ends_for_another_reason_lets_the_next_one_ask() -> None:
    world, account, identifiers = stopped()
    poisonous = identifiers[0]

    def answer(attempt: Attempt) -> Heard:
        return REFUSED if attempt.identifier == poisonous else account.answer(attempt)

    world.run(world.now + PROBE_EVERY, answer)
    assert world.parked()[poisonous] == "refused"
    account.active = True
    world.run(world.now + 3 * PROBE_EVERY, answer)
    assert len(world.outcomes) == len(identifiers) - 1


def test_the_other_meters_go_on_and_a_stop_of_one_says_nothing_of_them() -> None:
    world, account, _ = stopped()
    other = world.total("a", meter="storage")
    world.run(world.now, lambda attempt: OK if attempt.event_name == "storage" else account.answer(attempt))
    assert [each.identifier for each in world.outcomes] == [other]
    assert world.delivery.stops.names() == ["ai_tokens"]


def test_where_all_that_waited_is_discarded_the_next_total_finds_out() -> None:
    world, account, identifiers = stopped(2)
    for each in identifiers:
        world.command("discard", each)
    world.obey()
    account.active = True
    world.run(world.now + PROBE_EVERY, account.answer)
    assert world.delivery.stops.names() == []
    late = world.total("a")
    world.run(world.now, account.answer)
    assert world.outcomes[-1].identifier == late


def test_a_probe_asks_no_more_often_where_stripe_says_something_else_meanwhile() -> None:
    """An answer about the request, not about the meter: it is tried again, and still finds out."""
    world, account, identifiers = stopped(2)
    busy = Answer(429, "invalid_request_error", "lock_timeout", "busy")
    world.run(world.now + PROBE_EVERY, lambda _: busy)
    assert len([each for each in world.entries.values() if each.reason is None]) == 1, "one of them is at work"
    account.active = True
    world.run(world.now + 10 * MINUTE, account.answer)
    assert {each.identifier for each in world.outcomes} == set(identifiers)


def test_a_release_that_finds_out_nothing_leaves_nobody_behind() -> None:
    """One of those that wait was released, and Stripe refused it for a reason of its own: of the meter nobody knows."""
    world, account, identifiers = stopped()
    world.wait(-SECOND)  # before the next probe
    released = identifiers[0]
    world.command("release", released)
    world.obey()
    account.active = True

    world.run(world.now, lambda attempt: REFUSED if attempt.identifier == released else account.answer(attempt))
    assert world.delivery.stops.names() == ["ai_tokens"], "it is not known to be cured"

    world.run(world.now + PROBE_EVERY, account.answer)
    assert {each.identifier for each in world.outcomes} == set(identifiers[1:])
    assert world.parked() == {released: "refused"}
    assert world.delivery.stops.names() == []


def test_all_that_are_released_are_sent_though_the_meter_was_refused_before() -> None:
    world, account, identifiers = stopped()
    for each in identifiers:
        world.command("release", each)
    world.obey()
    account.active = True
    world.run(world.now, account.answer)
    assert {each.identifier for each in world.outcomes} == set(identifiers)
    assert world.delivery.stops.names() == []


def test_what_was_released_too_early_stops_its_event_name_again() -> None:
    world, _, identifiers = stopped()
    world.wait(-SECOND)  # before the next probe
    world.command("release", identifiers[0])
    world.obey()
    world.commit()
    world.delivery.answered(world.must_send(), NO_METER, world.now)
    late = world.total("a")
    world.obey()
    world.commit()
    assert world.send() is None, "nobody has to ask for it"
    assert world.parked() == dict.fromkeys([*identifiers, late], "meter")


def test_what_was_released_waits_for_stripe_and_is_not_parked_again_by_the_next_probe() -> None:
    """Stripe is away when it is released: until it answers, nobody knows better than who released it."""
    world, account, identifiers = stopped()
    world.command("release", identifiers[-1])
    world.obey()
    world.run(world.now + 10 * MINUTE, lambda _: NeverConnected("refused"))
    assert identifiers[-1] not in world.parked()
    account.active = True
    world.run(world.now + 10 * MINUTE, account.answer)
    assert {each.identifier for each in world.outcomes} == set(identifiers)


def test_in_shadow_no_meter_is_asked_for_and_nobody_waits_for_that() -> None:
    """What was parked while totals were sent is left alone: a shell that is woken for it would spin."""
    world, _, identifiers = stopped()
    world.shadow = True
    world.restart()
    assert world.delivery.next(world.now) is None
    assert world.delivery.wake(world.now) is None
    assert world.parked() == dict.fromkeys(identifiers, "meter")
