"""Several deliveries in one process, one account at Stripe: what one of them hears holds for all."""

from collections import deque
from collections.abc import Callable
from itertools import count

import pytest

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.deliver.entries import State
from consumer.deliver.pacing import Outlet
from tests.unit.delivery_world import (
    HOUR,
    MINUTE,
    OK,
    REFUSED,
    SECOND,
    UNAUTHORISED,
    World,
    duplicate,
)

TOO_FAST = Answer(429, "invalid_request_error", "rate_limit", limited="global-rate")


def crowd(totals: int, *, of: str = "c", outlet: Outlet | None = None, in_flight: int = 100) -> World:
    """A delivery with so many totals to send, each of another customer."""
    world = World(names={f"{of}{n}": f"cus_{of}{n}" for n in range(totals)}, outlet=outlet, in_flight=in_flight)
    for n in range(totals):
        world.total(f"{of}{n}")
    return world


def pair(totals: int = 60, others: int | None = None, *, max_rate: float = 1000) -> tuple[World, World]:
    """Two deliveries with so many totals each."""
    first = crowd(totals, of="a", outlet=Outlet(max_rate))
    return first, crowd(totals if others is None else others, of="b", outlet=first.outlet)


def armed(*worlds: World) -> None:
    """Their totals have been read, and may be sent."""
    for world in worlds:
        world.read()
        world.commit()


def wait(milliseconds: int, *worlds: World) -> None:
    """Time goes by for all."""
    for world in worlds:
        world.wait(milliseconds)


def go_down(world: World) -> None:
    """So many attempts without an answer, heard by this one, that Stripe is down."""
    for _ in range(20):
        world.delivery.answered(world.must_send(), NeverConnected(), world.now)
    assert str(world.delivery.shut) == "down"


def probing(*worlds: World) -> list[World]:
    """Those that send something, each asked three times in turn, with commits between."""
    out = []
    for _ in range(3):
        for world in worlds:
            if world.delivery.due:
                world.commit()
            if world.send() is not None:
                out.append(world)
    return out


def marked(*worlds: World) -> int:
    """How many totals a crash would make doubtful."""
    return sum(entry.first_unproven is not None for world in worlds for entry in world.entries.values())


def run(*worlds: World, until: int, answer: Callable[[Attempt], Heard] | None = None) -> None:
    """What a process does with its deliveries: round by round, going on behind the one that was served last."""
    turns = deque(worlds)
    in_vain = 0
    now = max(world.now for world in worlds)
    while now <= until:
        for world in worlds:
            world.now = now
            world.read()
            if world.delivery.due:
                world.commit()
        nothing = 0
        while nothing < len(turns):
            world = turns[0]
            turns.rotate(-1)
            attempt = world.send()
            nothing = 0 if attempt else nothing + 1
            if attempt and world.delivery.may_send(attempt, now):
                heard = answer(attempt) if answer else world.stripe.post(attempt, now)
                world.delivery.answered(attempt, heard, now)
        if not any(world.delivery.due for world in worlds):
            times = [wake for world in worlds if (wake := world.delivery.wake(now)) is not None]
            if not times:
                break
            in_vain = in_vain + 1 if min(times) <= now else 0
            assert in_vain < 5, "the shell would spin"
            now = max(now, min(times))
    for world in worlds:
        world.commit()


# The gate


def test_until_stripe_has_said_what_its_meters_bill_few_totals_are_risked() -> None:
    """It takes them, and perhaps by a meter that bills the last one alone: whoever knows that ends the process."""
    world = crowd(60)
    world.outlet.meters_unknown(world.now)
    began = world.now
    run(world, until=began + 5 * SECOND)
    assert 3 <= len(world.stripe.billed) <= 6
    assert marked(world) == 0, "a crash leaves no doubts"

    world.outlet.meters_known(world.now)
    run(world, until=world.now + 5 * SECOND)
    assert len(world.stripe.billed) == 60
    assert world.delivery.shut is None


def test_where_stripe_takes_totals_and_never_says_what_its_meters_bill_all_go_on() -> None:
    """Reads may be out of order for days, and usage that is late is billed to nobody."""
    world = crowd(60)
    world.outlet.meters_unknown(world.now)
    run(world, until=world.now + MINUTE)
    assert len(world.stripe.billed) == 60
    assert world.delivery.shut is None

    for number in range(20):
        world.total(f"c{number}")
    run(world, until=world.now + MINUTE, answer=lambda _: NeverConnected())
    world.outlet.meters_known(world.now)
    assert str(world.delivery.shut) == "down", "that it takes them is known by now, and it does not answer any more"


def test_nobody_waits_for_a_total_to_find_out_that_the_meters_are_known() -> None:
    """Nothing is to be sent, and Stripe is not down."""
    world = crowd(0)
    world.outlet.meters_unknown(world.now)
    assert str(world.delivery.shut) == "down"
    world.outlet.meters_known(world.now)
    assert world.delivery.shut is None
    assert world.outlet.pacing.rate == world.outlet.pacing.max_rate / 10, "what has piled up goes out slowly"


def test_what_is_known_of_meters_says_nothing_of_totals_that_are_not_answered() -> None:
    world = crowd(60)
    world.outlet.meters_unknown(world.now)
    run(world, until=world.now + MINUTE, answer=lambda _: Lost())
    world.outlet.meters_known(world.now)
    assert str(world.delivery.shut) == "down"
    run(world, until=world.now + MINUTE)
    assert len(world.outcomes) == 60


def test_an_outage_that_one_hears_of_stops_all_and_leaves_no_marks() -> None:
    """The other one's totals are marked and not sent: a crash in the outage must not make doubts of them."""
    first, second = pair()
    armed(first, second)
    assert marked(second) == 60
    go_down(first)
    assert str(second.delivery.shut) == "down"
    assert second.delivery.wake(second.now) == second.now, "nobody would look"
    assert second.send() is None
    second.commit()
    assert marked(second) == 0
    assert second.balanced()


def test_a_commit_on_its_way_when_another_one_hears_of_an_outage_marks_nothing_for_long() -> None:
    """What it arms is taken back, too."""
    first, second = pair()
    armed(first)
    second.read()
    second.store()
    go_down(first)
    second.delivery.committed()
    assert second.send() is None
    second.commit()
    assert marked(second) == 0


def test_a_revoked_key_that_one_hears_of_pauses_all() -> None:
    """The others would knock with the same key."""
    first, second = pair()
    armed(first, second)
    first.delivery.answered(first.must_send(), UNAUTHORISED, first.now)
    assert str(second.delivery.paused) == "unauthorised"
    assert second.delivery.room == 0
    assert second.send() is None


@pytest.mark.parametrize("silence", [Lost(), NeverConnected()])
def test_while_stripe_is_down_one_total_probes_for_all(silence: Heard) -> None:
    """Twenty partitions that probe each for itself would be a load."""
    first, second = pair()
    sent = 0

    def unheard(_: Attempt) -> Heard:
        nonlocal sent
        sent += 1
        return silence

    run(first, second, until=first.now + SECOND, answer=unheard)
    assert sent <= 40
    sent = 0
    run(first, second, until=first.now + 10 * MINUTE, answer=unheard)
    assert 20 <= sent <= 30
    if isinstance(silence, NeverConnected):
        assert marked(first, second) <= 1


def test_a_probe_is_alone_whoever_sent_the_other_attempts() -> None:
    """What the other one sent before the outage is on its way: the answer to it may make a probe superfluous."""
    first, second = pair()
    armed(first, second)
    late = second.must_send()
    go_down(first)
    wait(MINUTE, first, second)
    assert probing(first, second) == []
    second.delivery.answered(late, Lost(), second.now)
    assert len(probing(first, second)) == 1
    wait(HOUR, first, second)
    assert probing(first, second) == []
    assert not any(world.delivery.wake(world.now) == world.now for world in (first, second)), "the shell would spin"
    assert marked(first, second) <= 2


def test_while_the_last_total_of_one_probes_the_others_are_not_asked_in_vain() -> None:
    """It has no other one to probe with, so the turn is the next one's already; but its answer is to come."""
    first, second = pair(1, 60)
    armed(first, second)
    go_down(second)
    wait(MINUTE, first, second)
    assert probing(first) == [first]
    assert second.send() is None
    assert second.delivery.wake(second.now) is None, "the shell would spin"


def test_only_one_total_is_marked_to_probe() -> None:
    """While one of them is on its way into a commit, the other one reads what it could probe with, and waits."""
    first, second = pair(1)
    armed(second)
    second.delivery.answered(second.must_send(), UNAUTHORISED, second.now)
    wait(MINUTE, first, second)
    assert second.send() is None
    second.store()
    first.read()
    assert first.send() is None
    first.commit()
    assert marked(first) == 0
    assert first.delivery.wake(first.now) is None, "the shell would spin"
    second.delivery.committed()
    assert first.send() is None
    assert second.send() is not None


def test_when_stripe_is_back_nobody_rests_any_more() -> None:
    """Whoever heard of it: all of them have failed because of the outage, and would wait for minutes."""
    first, second = pair(20)
    run(first, second, until=first.now + 4 * HOUR, answer=lambda _: Lost())
    run(first, second, until=first.now + 40 * SECOND)
    assert len(first.stripe.billed) == len(second.stripe.billed) == 20
    assert first.balanced()
    assert second.balanced()


def test_an_outage_that_comes_and_goes_while_one_is_not_asked_is_noticed_all_the_same() -> None:
    """It rests because of the outage, and was busy with a commit for as long as that lasted."""
    first, second = pair(30, 1)
    armed(first, second)
    for _ in range(12):
        second.delivery.answered(second.must_send(), Lost(), second.now)
        wait(10 * MINUTE, first, second)
    second.delivery.answered(second.must_send(), Lost(), second.now)
    first.delivery.answered(first.must_send(), OK, first.now)
    go_down(first)
    wait(SECOND, first, second)
    assert probing(first) == [first]
    (probe,) = first.delivery._attempts.values()
    first.delivery.answered(probe, OK, first.now)
    assert not second.delivery.shut
    assert second.delivery.wake(second.now) == second.now
    assert second.send() is not None


def test_a_pause_ends_though_the_one_that_probed_first_is_refused_for_ever() -> None:
    """It has read all it may; only the other one has somebody whom Stripe knows."""
    first = crowd(300, of="a", in_flight=45)
    second = crowd(1, of="b", outlet=first.outlet)

    def gone_for_the_first(attempt: Attempt) -> Heard:
        return REFUSED if attempt.stripe_customer.startswith("cus_a") else OK

    run(first, until=first.now + 2 * HOUR, answer=gone_for_the_first)
    assert str(first.delivery.paused) == "refusals"
    second.now = first.now
    run(first, second, until=first.now + 2 * MINUTE, answer=gone_for_the_first)
    assert [outcome.how for outcome in second.outcomes] == ["delivered"]


def test_refusals_of_an_earlier_pause_are_no_reason_to_read_in_the_next_one() -> None:
    """One that has been refused to the last total reads another one to probe with; but that pause was ended."""
    first = crowd(60, of="a")
    run(first, until=first.now + 2 * HOUR, answer=lambda _: REFUSED)
    assert str(first.delivery.paused) == "refusals"
    assert first.delivery.room == 1, "all that it has were refused in this pause"
    second = crowd(2, of="b", outlet=first.outlet)
    second.now = first.now
    second.read()
    while first.delivery.shut:
        wait(MINUTE, first, second)
        for world in probing(first, second):
            (probe,) = world.delivery._attempts.values()
            world.delivery.answered(probe, REFUSED if world is first else OK, world.now)
    first.send()
    second.total("b0")
    armed(second)
    second.delivery.answered(second.must_send(), UNAUTHORISED, second.now)
    assert first.delivery.room == 0


def test_who_has_nothing_to_probe_with_lets_the_others() -> None:
    """All of the first one's are unmapped by now; the turn would otherwise be its own for ever."""
    first, second = pair(20)
    armed(first, second)
    go_down(first)
    wait(MINUTE, first, second)
    assert first.send() is None
    assert first.due()
    first.names.known = {}
    first.delivery.remap(first.names, first.now)
    assert probing(first, second) == [second]


def test_a_turn_that_was_lost_marks_nothing_when_there_is_something_again() -> None:
    """Two totals would be marked to probe, and one of them not be sent for as long as the other one takes."""
    first, second = pair(20)
    armed(first, second)
    go_down(first)
    wait(MINUTE, first, second)
    assert first.send() is None
    known, first.names.known = first.names.known, {}
    first.delivery.remap(first.names, first.now)
    assert second.send() is None
    first.names.known = known
    first.delivery.remap(first.names, first.now)
    first.commit()
    second.commit()
    assert (marked(first), marked(second)) == (0, 1)


def test_lookups_that_fail_for_one_do_not_keep_the_others_from_probing() -> None:
    """It looks as if it had something to probe with, again and again."""
    first, second = pair(20)
    armed(first)
    go_down(first)
    first.names.fails = True
    run(first, second, until=first.now + 5 * MINUTE)
    assert len(second.stripe.billed) == 20
    first.names.fails = False
    run(first, second, until=first.now + 5 * MINUTE)
    assert len(first.stripe.billed) == 20


# Giving up


@pytest.mark.parametrize("progress", ["wanted", "on its way into a commit", "armed", "sent"])
@pytest.mark.parametrize("retired", [False, True])
def test_when_the_one_that_probes_is_dropped_another_one_does(progress: str, retired: bool) -> None:
    """However far it has come; also when it made its last commit before."""
    first, second = pair()
    armed(first, second)
    go_down(first)
    wait(MINUTE, first, second)
    assert first.send() is None
    if progress != "wanted":
        first.store()
    if progress in {"armed", "sent"}:
        first.delivery.committed()
    probe = first.send() if progress == "sent" else None
    assert (probe is not None) == (progress == "sent")
    assert probing(second) == []
    if retired:
        first.delivery.retire(first.now)
        if progress == "on its way into a commit":
            first.delivery.committed()
        first.commit()
    first.delivery.drop()
    assert probing(second) == [second]
    assert second.outlet.sent == 1
    if probe is not None:
        first.delivery.answered(probe, OK, first.now)
        assert second.delivery.shut, "what a dropped delivery hears opens nothing"


def test_one_that_sends_nothing_any_more_leaves_probing_to_the_others() -> None:
    """It waits for its last answers, and its last commit may take a while."""
    first, second = pair()
    armed(first, second)
    go_down(first)
    wait(MINUTE, first, second)
    assert first.send() is None
    first.delivery.retire(first.now)
    assert probing(first, second) == [second]


@pytest.mark.parametrize("retired", [False, True])
def test_a_request_on_its_way_when_the_partition_goes_is_the_next_owners(retired: bool) -> None:
    """Its answer has no say here. Whoever restores the total takes it for tried, and hears that Stripe has it."""
    first, second = pair(3)
    armed(first, second)
    attempt = first.must_send()
    if retired:
        first.delivery.retire(first.now)
        first.commit()
    given_up, first.outlet = first.delivery, Outlet(1000)
    given_up.drop()
    assert second.outlet.sent == 0
    first.begin()

    heard = first.stripe.post(attempt, first.now)
    given_up.answered(attempt, heard, first.now)
    assert given_up.commit(first.now) is None
    assert second.outlet.sent == 0
    assert first.entry(attempt.identifier).state is State.SENDING
    again = first.must_send()
    assert again.identifier == attempt.identifier
    first.delivery.answered(again, duplicate(attempt.identifier), first.now)
    first.commit()
    assert [outcome.how for outcome in first.outcomes] == ["duplicate"]


def test_what_was_given_out_is_not_written_once_the_partition_is_gone() -> None:
    """The new owner may have sent it, and heard of it, by then."""
    first, _ = pair(3)
    armed(first)
    attempt = first.send()
    assert attempt is not None
    first.delivery.drop()
    assert not first.delivery.may_send(attempt, first.now)
    assert first.outlet.sent == 0


def test_a_dropped_delivery_wants_nothing_any_more() -> None:
    """Neither records, nor commits, nor to be asked again; dropped by a second event it is dropped still."""
    first, _ = pair(40)
    armed(first)
    first.delivery.answered(first.must_send(), Lost(), first.now)
    first.must_send()
    last = first.must_send()
    first.store()
    first.delivery.answered(last, OK, first.now)
    first.delivery.drop()
    first.delivery.drop()
    first.delivery.committed()
    delivery = first.delivery
    wait(HOUR, first)
    assert (delivery.next(first.now), delivery.wake(first.now), delivery.commit(first.now)) == (None, None, None)
    assert (delivery.room, delivery.due, first.outlet.sent) == (0, False, 0)


def test_a_dropped_delivery_is_not_due_for_what_it_has_heard() -> None:
    """It would ask for a commit again and again, and never have one to make."""
    first, _ = pair(1)
    armed(first)
    first.delivery.answered(first.must_send(), OK, first.now)
    assert first.due()
    first.delivery.drop()
    assert not first.due()


def test_what_a_dropped_delivery_hears_is_not_about_the_others() -> None:
    """Its requests are not waited for, so they must not count either."""
    first, second = pair()
    armed(first, second)
    attempts = [first.must_send() for _ in range(30)]
    first.delivery.drop()
    for attempt in attempts:
        first.delivery.answered(attempt, Lost(), first.now)
    assert not second.delivery.shut
    assert second.outlet.sent == 0


def test_partitions_that_come_and_go_leave_nothing_behind() -> None:
    """For months, in one process: what is left behind would stop the probes some day, or fill the memory."""
    staying = crowd(60)
    armed(staying)
    for number in range(5):
        other = crowd(10, of=f"d{number}-", outlet=staying.outlet)
        armed(other)
        other.must_send()
        if number % 2:
            other.delivery.retire(other.now)
            other.commit()
        other.delivery.drop()
    assert staying.outlet.sent == 0
    assert list(staying.outlet._turns) == [staying.delivery._schedule]


# The rate


@pytest.mark.parametrize("rate", [1, 25, 200])
def test_together_they_keep_to_the_rate_and_share_it(rate: int) -> None:
    """Stripe counts what comes from the account."""
    first, second = pair(50 * rate, 50 * rate, max_rate=rate)
    begun = first.now
    made: dict[str, int] = {"a": 0, "b": 0}

    def taken(attempt: Attempt) -> Heard:
        made[attempt.stripe_customer[4]] += 1
        return OK

    run(first, second, until=begun + 20 * SECOND, answer=taken)
    assert 20 * rate - 1 <= sum(made.values()) <= 20.1 * rate + 1
    assert abs(made["a"] - made["b"]) <= 1


def test_a_huge_backlog_does_not_keep_the_others_waiting() -> None:
    """At one a second, ten totals beside three hundred are gone after twenty-odd seconds."""
    first, second = pair(300, 10, max_rate=1)
    run(first, second, until=first.now + 25 * SECOND)
    assert len(second.stripe.billed) == 10
    assert len(first.stripe.billed) >= 14


def test_the_time_to_wait_is_that_of_the_bucket_they_share() -> None:
    """Whoever has sent: the next token is for everybody, and nobody is asked in vain before it is there."""
    first, second = pair(5, max_rate=2)
    armed(first, second)
    first.must_send()
    assert first.send() is None
    assert second.send() is None
    assert first.delivery.wake(first.now) == second.delivery.wake(second.now) == second.now + 500
    wait(500, first, second)
    second.must_send()
    assert first.send() is None


def test_stripes_rate_limit_slows_all_of_them_down() -> None:
    """It said so to the account."""
    first, second = pair()
    armed(first, second)
    first.delivery.answered(first.must_send(), TOO_FAST, first.now)
    assert second.delivery.rate == 500
    run(first, second, until=first.now + 40 * SECOND, answer=lambda _: Lost())
    run(first, second, until=first.now + 40 * SECOND)
    assert first.delivery.rate == second.delivery.rate <= 200


def test_refusals_are_counted_over_all_of_them() -> None:
    """A wrong value key refuses everybody; each partition would park forty for itself."""
    worlds = [crowd(30, of="a")]
    worlds += [crowd(30, of=name, outlet=worlds[0].outlet) for name in "bcd"]
    refused = count()

    def refuse(_: Attempt) -> Heard:
        next(refused)
        return REFUSED

    run(*worlds, until=worlds[0].now + SECOND, answer=refuse)
    assert {str(world.delivery.paused) for world in worlds} == {"refusals"}
    assert sum(len(world.parked()) for world in worlds) == 40
