"""The life of a total, told in stories: in each of them money is lost or doubled where the rule does not hold."""

import pytest

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Delivery
from consumer.deliver.entries import SAME_IDENTIFIER_FOR, EntryError, Reason, State, pack, unpack
from consumer.deliver.ledger import PREFIX
from consumer.storage import Changes
from tests.unit.delivery_world import (
    BROKEN,
    BUSY,
    HOUR,
    MINUTE,
    NO_METER,
    OK,
    REFUSED,
    SECOND,
    World,
    duplicate,
)

PROVEN_ABSENT = [BUSY, Answer(409, "idempotency_error"), NeverConnected("refused")]


def test_a_total_is_delivered_once_and_leaves_an_outcome_and_no_entry() -> None:
    """The everyday life: read, armed, sent, answered, finished."""
    world = World()
    identifier = world.total("alice", "12.5")
    world.run(world.now + MINUTE)

    assert world.stripe.billed == [(identifier, "cus_alice", "12.5")]
    (outcome,) = world.outcomes
    assert (outcome.identifier, outcome.how, outcome.billed, outcome.stripe_customer) == (
        identifier,
        "delivered",
        "12.5",
        "cus_alice",
    )
    assert (outcome.timestamp, outcome.attempts, outcome.key) == (1_779_999_007, 1, identifier)
    assert world.entries == {}
    assert world.balanced()


def test_nothing_is_sent_before_its_mark_is_durable() -> None:
    """Sent first and marked later, a crash between the two forgets the attempt, and a day later it is sent again."""
    world = World()
    identifier = world.total()
    world.read()
    assert world.send() is None

    assert world.store()
    assert world.send() is None
    assert world.entry(identifier).state is State.SENDING
    assert world.entry(identifier).first_unproven == world.now

    world.delivery.committed()
    attempt = world.must_send()
    assert (attempt.identifier, attempt.key) == (identifier, identifier)
    assert attempt.payload == {"stripe_customer_id": "cus_alice", "value": "5"}
    assert attempt.timestamp == 1_779_999_007


def test_after_a_crash_what_was_sending_is_tried_at_once_under_the_same_identifier() -> None:
    """It had arrived, and the answer was lost with the process: the refusal as duplicate means delivered."""
    world = World()
    attempt = world.sent()
    world.stripe.post(attempt, world.now)
    world.restart()

    again = world.must_send()
    assert again == attempt
    world.delivery.answered(again, duplicate(again.identifier), world.now)
    world.commit()
    assert [outcome.how for outcome in world.outcomes] == ["duplicate"]
    assert world.balanced()


def test_a_replayed_success_on_a_restored_total_is_its_delivery() -> None:
    """Stripe stored the answer that the crash kept from us."""
    world = World()
    world.stripe.post(world.sent(), world.now)
    world.restart()
    again = world.must_send()
    answer = world.stripe.post(again, world.now)
    assert answer.replayed
    world.delivery.answered(again, answer, world.now)
    world.commit()
    assert [outcome.how for outcome in world.outcomes] == ["delivered"]
    assert len(world.stripe.billed) == 1


@pytest.mark.parametrize(
    "answer",
    [
        duplicate("x"),
        Answer(200, replayed=True),
        Answer(500, "api_error", replayed=True),
        Answer(400, "idempotency_error", message="Keys for idempotent requests can only be used with the same …"),
    ],
)
def test_on_a_sure_first_attempt_it_is_a_collision(answer: Answer) -> None:
    """Somebody else has used our identifier: a total of ours that was called delivered would never be billed."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, answer, world.now)
    assert world.parked() == {attempt.identifier: "collision"}
    assert Reason.COLLISION not in world.delivery.alarms, "paged about before it is durable"

    assert world.store()
    assert Reason.COLLISION not in world.delivery.alarms
    world.delivery.committed()
    assert world.delivery.alarms[Reason.COLLISION] == 1
    assert world.balanced()


def test_a_park_that_no_commit_has_seen_raises_no_alarm() -> None:
    """A crash would take it back, and the page with it."""
    world = World()
    attempt = world.sent()
    world.total("bob")
    world.read()
    world.store()
    world.delivery.answered(attempt, duplicate(attempt.identifier), world.now)
    world.delivery.committed()
    assert Reason.COLLISION not in world.delivery.alarms
    world.commit()
    assert world.delivery.alarms[Reason.COLLISION] == 1


@pytest.mark.parametrize("absent", PROVEN_ABSENT)
def test_after_an_attempt_that_left_nothing_the_next_one_needs_a_new_mark(absent: Heard) -> None:
    """The first mark is taken back, so that hours without a connection make no doubts; a retry is marked anew."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, absent, world.now)
    world.commit()
    assert world.entry(attempt.identifier).first_unproven is None
    assert world.entry(attempt.identifier).state is State.RETRY

    world.wait(MINUTE)
    assert world.send() is None
    assert world.due()
    world.commit()
    assert world.must_send().identifier == attempt.identifier
    assert world.entry(attempt.identifier).first_unproven == world.now


@pytest.mark.parametrize("absent", PROVEN_ABSENT)
def test_after_an_attempt_that_left_nothing_the_next_one_is_a_sure_first_one(absent: Heard) -> None:
    """A duplicate there is a collision still: our first attempt cannot have left it."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, absent, world.now)
    world.wait(MINUTE)
    world.send()
    world.commit()
    world.delivery.answered(world.must_send(), duplicate(attempt.identifier), world.now)
    assert world.parked() == {attempt.identifier: "collision"}


@pytest.mark.parametrize("unproven", [BROKEN, Lost("timeout")])
def test_an_unproven_attempt_is_retried_on_its_standing_mark(unproven: Heard) -> None:
    """No commit is needed between a 500 and the retry: the durable entry has said since before that it was tried."""
    world = World()
    attempt = world.sent()
    marked = world.now
    world.delivery.answered(attempt, unproven, world.now)
    world.wait(MINUTE)
    again = world.must_send()
    assert again.identifier == attempt.identifier
    assert world.entry(attempt.identifier).first_unproven == marked

    world.delivery.answered(again, duplicate(attempt.identifier), world.now)
    world.commit()
    assert [outcome.how for outcome in world.outcomes] == ["duplicate"]


@pytest.mark.parametrize("nothing", [*PROVEN_ABSENT, Answer(401, "invalid_request_error")])
def test_that_an_attempt_left_nothing_says_nothing_of_the_one_before(nothing: Heard) -> None:
    """A 500 that had arrived, then a 429: forgetting the 500 would make a collision of our own event."""
    world = World()
    attempt = world.sent()
    marked = world.now
    world.delivery.answered(attempt, world.stripe.post(attempt, world.now, broken=True), world.now)
    world.wait(MINUTE)
    world.delivery.answered(world.must_send(), nothing, world.now)
    world.commit()
    assert world.entry(attempt.identifier).first_unproven == marked

    world.wait(10 * MINUTE)
    world.run(world.now + HOUR)
    assert [outcome.how for outcome in world.outcomes] == ["duplicate"]
    assert len(world.stripe.billed) == 1


def test_a_stored_500_is_escaped_by_another_key() -> None:
    """Stripe replays its 500 for as long as the key lives: under the same key the total would never get through."""
    world = World()
    attempt = world.sent()
    keys = [attempt.key]
    for _ in range(3):
        world.delivery.answered(attempt, BROKEN, world.now)
        world.wait(10 * MINUTE)
        attempt = world.must_send()
        keys.append(attempt.key)
    name = attempt.identifier
    assert keys == [name, f"{name}:1", f"{name}:2", f"{name}:3"]


@pytest.mark.parametrize("busy", [BUSY, Answer(409, "idempotency_error")])
def test_a_429_and_a_409_are_not_stored_and_keep_their_key(busy: Answer) -> None:
    """Another key would not hurt, but the same one lets Stripe recognise an attempt that is still under way."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, busy, world.now)
    world.wait(MINUTE)
    world.send()
    world.commit()
    assert world.must_send().key == attempt.key


def test_a_restart_changes_nothing_that_had_to_be_written() -> None:
    """Otherwise thousands of entries are written again for nothing. One commit shows that they are still ours."""
    world = World()
    world.delivery.answered(world.sent(), BROKEN, world.now)
    world.commit()
    before = dict(world.durable)
    world.delivery.drop()
    restored = Delivery(customers=world.names, in_flight=10, parked_limit=10, outlet=world.outlet)
    restored.restore(world.offset, list(before.items()), world.now)
    assert restored.commit(world.now) == Changes(world.offset)
    restored.committed()
    assert restored.commit(world.now) is None


def test_the_end_of_the_log_is_committed_though_nothing_else_has_changed() -> None:
    """Retention deletes what lies before it: a process that was killed in a quiet month would find totals lost."""
    world = World()
    world.delivery.reach(7)
    assert world.delivery.due
    world.commit()
    assert (world.delivery.due, world.offset) == (False, 7)


def test_nothing_restored_is_sent_before_a_commit_has_shown_that_it_is_still_ours() -> None:
    """Somebody who was away restores what he believes to be his. Its owner has just marked it and is about to send it:
    were the other one faster, the owner would find the event at Stripe, and take that for a collision.
    """
    world = World()
    world.delivery.answered(world.sent(), BROKEN, world.now)
    world.commit()
    world.now += HOUR
    zombie = Delivery(customers=world.names, in_flight=10, parked_limit=10, outlet=world.outlet)
    zombie.restore(world.offset, list(world.durable.items()), world.now)
    assert zombie.next(world.now) is None
    assert zombie.wake(world.now) is None
    assert zombie.due
    assert zombie.commit(world.now) is not None
    assert zombie.next(world.now) is None, "it may still be refused"
    zombie.committed()
    assert zombie.next(world.now) is not None


def test_the_generation_of_the_key_survives_a_crash() -> None:
    """Otherwise every restart begins with the stored 500 again."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, BROKEN, world.now)
    world.commit()
    world.restart()
    world.wait(MINUTE)
    assert world.must_send().key == f"{attempt.identifier}:1"


def test_a_key_mismatch_on_a_tried_total_moves_on_to_the_next_key() -> None:
    """The key was used, by us; the identifier decides whether the event is there."""
    world = World()
    attempt = world.sent()
    world.stripe.post(attempt, world.now)
    world.restart()
    world.delivery.answered(world.must_send(), Answer(400, "idempotency_error"), world.now)
    world.wait(MINUTE)
    again = world.must_send()
    assert again.key == f"{attempt.identifier}:1"
    world.delivery.answered(again, world.stripe.post(again, world.now), world.now)
    world.commit()
    assert [outcome.how for outcome in world.outcomes] == ["duplicate"]


def test_after_23_hours_an_unproven_total_is_in_doubt_and_never_sent_again() -> None:
    """Stripe forgets identifiers after a day: what was billed yesterday would be billed again."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, world.stripe.post(attempt, world.now, broken=True), world.now)
    world.wait(SAME_IDENTIFIER_FOR - 1)
    again = world.must_send()
    world.delivery.answered(again, Lost(), world.now)
    world.wait(HOUR)
    world.run(world.now + 48 * HOUR)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert len(world.stripe.billed) == 1
    assert world.delivery.alarms[Reason.IN_DOUBT] == 1

    world.restart()
    world.run(world.now + 48 * HOUR)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert world.balanced()


def test_the_23_hours_are_checked_again_before_the_request_is_written() -> None:
    """The attempt lay in a queue of connections while the last hour went by."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(SAME_IDENTIFIER_FOR - 1)
    again = world.send()
    assert again is not None
    world.wait(1)
    assert not world.delivery.may_send(again, world.now)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert not world.delivery.may_send(again, world.now)
    world.delivery.answered(again, OK, world.now)
    assert world.parked() == {attempt.identifier: "in_doubt"}


def test_an_old_mark_of_a_total_that_was_not_sent_is_renewed_and_makes_no_doubt() -> None:
    """We know that it was not sent, and say so before we send it."""
    world = World()
    identifier = world.total()
    world.read()
    world.commit()
    world.wait(30 * HOUR)
    assert world.send() is None
    world.commit()
    assert world.must_send().identifier == identifier
    assert world.entry(identifier).first_unproven == world.now


def test_a_service_that_was_stopped_for_days_has_no_doubts_about_what_it_had_not_sent() -> None:
    """The last commit takes back the marks of what was armed, and marks nothing more; what was sent stays marked."""
    world = World(names={name: f"cus_{name}" for name in "abc"})
    for name in "ab":
        world.total(name)
    world.read()
    world.commit()
    sent = world.must_send()
    world.total("c")
    world.read()
    world.delivery.retire(world.now)
    world.commit()
    assert {name for name, entry in world.entries.items() if entry.first_unproven is not None} == {sent.identifier}
    assert not world.due()
    assert world.send() is None

    world.wait(48 * HOUR)
    world.restart()
    world.run(world.now + MINUTE)
    assert world.parked() == {sent.identifier: "in_doubt"}
    assert len(world.stripe.billed) == 2


def test_a_restored_total_that_was_marked_23_hours_ago_is_in_doubt() -> None:
    """The service was down for a day, and went down while it was sending."""
    world = World()
    attempt = world.sent()
    world.wait(23 * HOUR)
    world.restart()
    assert world.send() is None
    assert world.parked() == {attempt.identifier: "in_doubt"}


@pytest.mark.parametrize("ahead", [HOUR + 1, 30 * HOUR])
def test_a_mark_far_ahead_of_the_clock_tells_nobody_how_old_it_is(ahead: int) -> None:
    """Made by a clock that was wrong, and has been set right since. By the clock as it is now it would be young for
    longer than Stripe knows the identifier."""
    world = World()
    world.wait(ahead)
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(-ahead)
    world.run(world.now + 48 * HOUR)
    assert world.parked() == {attempt.identifier: "in_doubt"}
    assert world.stripe.billed == []


def test_a_mark_a_little_ahead_of_the_clock_is_as_young_as_any() -> None:
    """Another host made it: an hour is kept for what their clocks differ by."""
    world = World()
    world.wait(HOUR)
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(-HOUR)
    world.run(world.now + HOUR)
    assert [each.how for each in world.outcomes] == ["delivered"]


def test_a_doubt_is_ended_by_a_person_who_discards_it() -> None:
    """Who and why is in the outcome; the value moves to discarded."""
    world = World()
    attempt = world.sent()
    world.wait(24 * HOUR)
    world.restart()
    assert world.send() is None
    world.command("discard", attempt.identifier)
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.by, outcome.reason, outcome.billed) == ("discarded", "eve", "because", "0")
    assert world.parked() == {}
    assert world.entries == {}
    assert world.balanced()


def test_a_refused_total_is_parked_with_what_stripe_said_and_can_be_released() -> None:
    """One deleted customer stops nobody else; once it is repaired, the total goes out under the same identifier."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, REFUSED, world.now)
    other = world.total("bob")
    world.run(world.now + MINUTE)
    assert [(outcome.identifier, outcome.how) for outcome in world.outcomes] == [(other, "delivered")]
    (entry,) = world.delivery.parked()
    assert (entry.reason, entry.message) == ("refused", REFUSED.message)
    assert world.balanced()

    world.restart()
    world.command("release", attempt.identifier)
    world.run(world.now + MINUTE)
    assert [outcome.identifier for outcome in world.outcomes] == [other, attempt.identifier]
    assert world.outcomes[-1].key == f"{attempt.identifier}:1"
    assert world.balanced()


def test_a_refused_meter_parks_its_event_name_and_no_other() -> None:
    """A deactivated meter refuses everything: one question is enough, and other meters go on."""
    world = World(names={name: f"cus_{name}" for name in "abcdef"})
    tokens = [world.total(name) for name in "abcdef"]
    world.read()
    world.commit()
    first = world.must_send()
    world.delivery.answered(first, NO_METER, world.now)
    other = world.total("a", meter="storage")
    late = world.total("b")
    world.run(world.now + MINUTE - 1)
    assert world.parked() == dict.fromkeys([*tokens, late], "meter")
    assert [outcome.identifier for outcome in world.outcomes] == [other]
    assert world.balanced()

    for identifier in [*tokens, late]:
        world.command("release", identifier)
    world.obey()
    world.run(world.now + MINUTE - 1)
    assert len(world.outcomes) == 8
    assert world.parked() == {}


def test_a_delivery_shows_that_its_meter_works_again() -> None:
    """It was reactivated meanwhile: what waits for it goes on."""
    world = World()
    world.total("alice")
    world.total("bob")
    world.read()
    world.commit()
    first, second = world.must_send(), world.must_send()
    world.delivery.answered(first, NO_METER, world.now)
    world.delivery.answered(second, OK, world.now)
    late = world.total("bob")
    world.run(world.now)
    assert world.parked() == {}
    assert {each.identifier for each in world.outcomes} == {first.identifier, second.identifier, late}


def test_an_unmapped_customer_waits_for_the_mapping_and_a_null_one_is_not_billed() -> None:
    """A customer whom sales has not entered yet is money; one who is mapped to null is not."""
    world = World(names={"free": None})
    carol, dave, free = world.total("carol"), world.total("dave"), world.total("free", "7")
    world.run(world.now + MINUTE)
    assert world.parked() == {carol: "unmapped", dave: "unmapped"}
    assert [(outcome.identifier, outcome.how) for outcome in world.outcomes] == [(free, "unbilled")]

    world.restart()
    world.names.known |= {"carol": "cus_carol", "dave": None}
    world.delivery.remap(world.names, world.now)
    world.run(world.now + MINUTE)
    assert {outcome.identifier: outcome.how for outcome in world.outcomes[1:]} == {
        carol: "delivered",
        dave: "unbilled",
    }
    assert world.stripe.billed == [(carol, "cus_carol", "5")]
    assert world.balanced()


def test_a_failed_lookup_is_not_an_unmapped_customer() -> None:
    """Nothing is known: the total is asked about again, and nobody is paged."""
    world = World()
    identifier = world.total()
    world.names.fails = True
    world.run(world.now + MINUTE)
    assert world.parked() == {}
    assert world.entry(identifier).state is State.RETRY
    world.names.fails = False
    world.wait(MINUTE)
    world.run(world.now + MINUTE)
    assert [outcome.how for outcome in world.outcomes] == ["delivered"]


def test_the_customer_is_frozen_by_an_attempt_that_may_have_arrived() -> None:
    """A mapping that changes between two tries would bill one customer's usage to two."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    assert world.send() is None
    world.wait(MINUTE)
    assert world.must_send().stripe_customer == "cus_alice"
    world.commit()
    world.restart()
    world.wait(MINUTE)
    assert world.must_send().stripe_customer == "cus_alice"


def test_a_total_that_left_nothing_follows_the_mapping() -> None:
    """Nothing of it is at Stripe: it goes to whom it belongs now."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, BUSY, world.now)
    marked = world.total("alice")
    world.read()
    world.commit()
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    world.wait(MINUTE)
    world.run(world.now + MINUTE)
    assert sorted(world.stripe.billed) == [(attempt.identifier, "cus_other", "5"), (marked, "cus_other", "5")]


def test_a_mapping_that_changes_under_an_attempt_waits_for_its_answer() -> None:
    """What is on its way to one customer is not begun for another."""
    world = World()
    attempt = world.sent()
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    world.commit()
    assert world.send() is None
    world.delivery.answered(attempt, OK, world.now)
    world.commit()
    assert [(outcome.how, outcome.stripe_customer) for outcome in world.outcomes] == [("delivered", "cus_alice")]


def test_a_mapping_that_changes_under_a_commit_is_heeded() -> None:
    """What that commit has marked for one customer is not sent to another without a mark of its own."""
    world = World()
    world.total()
    world.read()
    world.store()
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    world.delivery.committed()
    assert world.send() is None
    world.commit()
    attempt = world.must_send()
    assert attempt.stripe_customer == "cus_other"
    world.delivery.answered(attempt, OK, world.now)
    assert world.send() is None


def test_what_a_commit_has_marked_is_not_sent_twice_because_the_mapping_changed() -> None:
    """The total is in one place at a time, whatever was on its way."""
    world = World()
    world.total()
    world.read()
    world.store()
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    world.delivery.committed()
    world.commit()
    world.delivery.answered(world.must_send(), OK, world.now)
    assert world.send() is None


def test_whoever_is_set_aside_comes_in_when_the_mapping_finishes_the_others() -> None:
    """A seat that is given up while looking is given to the next."""
    world = World(in_flight=1)
    world.names.fails = True
    world.total("alice")
    world.read()
    world.total("alice")
    world.obey()
    assert (world.delivery.in_flight, world.delivery.aside) == (1, 1)
    world.names.fails = False
    world.names.known["alice"] = None
    world.wait(MINUTE)
    assert world.send() is None
    world.commit()
    assert [outcome.how for outcome in world.outcomes] == ["unbilled", "unbilled"]


def test_zero_is_finished_unsent() -> None:
    """It adds nothing to an invoice and costs a request; a mapping is not needed either."""
    world = World()
    world.total("nobody", "0")
    world.run(world.now + MINUTE)
    assert [outcome.how for outcome in world.outcomes] == ["zero"]
    assert world.stripe.billed == []
    assert world.balanced()


@pytest.mark.parametrize(
    ("value", "billed", "rounded"),
    [
        ("1000000000000005", "1000000000000000", "5"),
        ("1000000000000015", "1000000000000020", "-5"),
        ("-1000000000000005", "-1000000000000000", "-5"),
        ("1000.000000000005", "1000", "0.000000000005"),
    ],
)
def test_half_of_the_last_digit_goes_to_the_even_one(value: str, billed: str, rounded: str) -> None:
    """Always up, a customer with many such totals would pay for it."""
    world = World()
    world.total("alice", value)
    world.run(world.now)
    (outcome,) = world.outcomes
    assert (outcome.billed, outcome.rounded) == (billed, rounded)
    assert world.balanced()


def test_a_value_beyond_stripes_digits_is_rounded_and_the_difference_kept() -> None:
    """15 digits go out, without an exponent; what is cut off is accounted for, and not lost."""
    world = World()
    world.total("alice", "123456789012.123456789012")
    world.run(world.now + MINUTE)
    assert world.stripe.billed[0][2] == "123456789012.123"
    (outcome,) = world.outcomes
    assert (outcome.value, outcome.billed, outcome.rounded) == (
        "123456789012.123456789012",
        "123456789012.123",
        "0.000456789012",
    )
    book = world.delivery.ledger.books["ai-tokens"]
    assert book.rounded.value == 456789012
    assert book.missing == 0


def test_one_customer_and_meter_has_one_request_at_a_time() -> None:
    """Stripe answers the second one with 429; another meter or customer does not wait."""
    world = World()
    world.total("alice")
    second = world.total("alice")
    world.total("alice", meter="storage")
    world.total("bob")
    world.read()
    world.commit()
    attempts = [world.must_send() for _ in range(3)]
    assert {(attempt.stripe_customer, attempt.event_name) for attempt in attempts} == {
        ("cus_alice", "ai_tokens"),
        ("cus_alice", "storage"),
        ("cus_bob", "ai_tokens"),
    }
    assert world.send() is None
    world.delivery.answered(attempts[0], OK, world.now)
    assert world.must_send().identifier == second


def test_nobody_waits_for_a_customer_with_a_backlog() -> None:
    """Beyond its share a customer's totals are set aside; they are entries, and come in one by one, in order."""
    world = World(in_flight=40)
    flood = [world.total("alice") for _ in range(50)]
    bob = world.total("bob")
    world.read()
    assert world.delivery.in_flight == 3
    assert world.delivery.aside == 48
    world.commit()
    assert [entry.state for entry in world.entries.values()].count(State.ASIDE) == 48
    assert {world.must_send().identifier, world.must_send().identifier} == {flood[0], bob}
    assert world.balanced()

    world.restart()
    assert world.delivery.aside == 48
    world.run(world.now + HOUR)
    assert [identifier for identifier, customer, _ in world.stripe.billed if customer == "cus_alice"] == flood
    assert world.balanced()


def test_what_is_released_all_at_once_comes_in_as_there_is_room() -> None:
    """A mapping that arrives for everybody does not put everybody into flight."""
    names = [f"c{number}" for number in range(30)]
    world = World(names={}, in_flight=4)
    for name in names:
        world.total(name)
    world.run(world.now + MINUTE)
    world.names.known = {name: f"cus_{name}" for name in names}
    world.delivery.remap(world.names, world.now)
    assert (world.delivery.in_flight, world.delivery.aside) == (4, 26)
    world.run(world.now + MINUTE)
    assert len(world.stripe.billed) == 30


def test_a_larger_share_is_filled_after_a_restart() -> None:
    """The limit was raised, and the backlog comes in at once."""
    world = World(in_flight=20)
    for _ in range(10):
        world.total("alice")
    world.obey()
    world.commit()
    world.bounds = (100, 1000)
    world.restart()
    assert (world.delivery.in_flight, world.delivery.aside) == (5, 5)
    assert world.balanced()


def test_several_names_of_one_stripe_customer_have_one_share() -> None:
    """They queue in one lane, so they may not take everybody's place."""
    world = World(names={"a": "cus_1", "b": "cus_1", "c": "cus_1", "d": "cus_2"}, in_flight=40)
    for name in "abcd":
        world.total(name)
    world.read()
    assert (world.delivery.in_flight, world.delivery.aside) == (3, 1)


def test_the_log_keeps_what_does_not_fit_into_flight() -> None:
    """However long Stripe is away, memory stays flat."""
    world = World(names={str(number): f"cus_{number}" for number in range(50)}, in_flight=20)
    for number in range(50):
        world.total(str(number))
    world.read()
    assert (world.position, world.delivery.room) == (20, 0)
    world.run(world.now + MINUTE)
    assert len(world.stripe.billed) == 50


def test_at_the_limit_of_parked_totals_the_stage_pauses_and_goes_on_after_a_decision() -> None:
    """A mapping that lost everybody must not read the whole log into entries."""
    world = World(names={}, parked_limit=5)
    identifiers = [world.total(f"c{number}") for number in range(9)]
    world.run(world.now + MINUTE)
    assert str(world.delivery.paused) == "parked"
    assert (world.position, world.delivery.room) == (5, 0)
    world.names.known = {f"c{number}": f"cus_{number}" for number in range(9)}
    world.delivery.remap(world.names, world.now)
    world.run(world.now + MINUTE)
    assert not world.delivery.paused
    assert [identifier for identifier, *_ in world.stripe.billed] == identifiers


def test_commands_about_totals_that_are_not_parked_are_noted() -> None:
    """A mistyped identifier is visible and stops nothing."""
    world = World()
    world.command("release", "tm1-nonsense")
    world.command("discard", world.total())
    world.obey()
    world.read()
    assert world.delivery.noted == 2
    assert [note.identifier for note in world.delivery.notes] == ["tm1-nonsense", "tm1-1-alice"]
    world.run(world.now + MINUTE)
    assert len(world.stripe.billed) == 1


def test_a_total_that_is_in_the_log_twice_counts_once() -> None:
    """While it is here we know it; later Stripe does, and it is parked as a collision."""
    world = World()
    identifier = world.total()
    world.log.append(world.log[0])
    world.run(world.now + MINUTE)
    assert world.delivery.noted == 1
    world.log.append(world.log[0])
    world.run(world.now + MINUTE)
    assert len(world.stripe.billed) == 1
    assert world.parked() == {identifier: "collision"}
    assert world.balanced()


def test_a_total_that_is_set_aside_or_parked_and_is_in_the_log_once_more_counts_once() -> None:
    world = World(in_flight=1)
    world.total()
    world.read()
    aside, parked = world.total(), world.total("carol")
    world.log += [world.log[1], world.log[2]]
    world.obey()
    assert (world.delivery.in_flight, world.delivery.aside, list(world.parked())) == (1, 1, [parked])
    assert [each.identifier for each in world.delivery.notes] == [aside, parked]
    world.run(world.now + MINUTE)
    assert [each.how for each in world.outcomes] == ["delivered", "delivered"]
    assert world.balanced()


def test_what_is_said_in_stripes_place_makes_no_entry_too_large_to_be_stored() -> None:
    """A gateway that speaks as Stripe does put a page into the message: its total is parked, and nobody else waits."""
    world = World()
    attempt = world.sent()
    page = Answer(400, "invalid_request_error", message="No. " + "x" * 2_000_000)
    world.delivery.answered(attempt, page, world.now)
    world.commit()
    assert world.parked() == {attempt.identifier: "refused"}
    assert sum(map(len, world.durable.values())) < 10_000
    message = world.entry(attempt.identifier).message
    assert message is not None
    assert message.startswith("No. xxx")


def test_a_lookup_that_fails_while_the_mapping_changes_moves_nobody() -> None:
    """What is marked stays marked and goes out; looked at anew it would wait for the next lookup."""
    world = World()
    identifier = world.total()
    world.read()
    world.commit()
    world.names.fails = True
    world.delivery.remap(world.names, world.now)
    assert world.must_send().identifier == identifier


def test_a_total_that_is_there_again_before_its_end_is_durable_keeps_its_entry() -> None:
    """The new entry and the removal of the old one are in the same commit; the new one wins."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, world.stripe.post(attempt, world.now), world.now)
    world.log.append(world.log[0])
    world.read()
    world.commit()
    assert set(world.entries) == {attempt.identifier}


def test_a_record_is_not_read_twice() -> None:
    """A shell that seeks wrongly is stopped, not obeyed."""
    world = World()
    world.total()
    world.read()
    with pytest.raises(ValueError, match="offset 0 was read before"):
        world.delivery.read(0, world.log[0], world.now)


def test_advances_move_the_offset_and_nothing_else() -> None:
    """Alone they are no reason for a commit, but a commit takes them along."""
    world = World()
    world.advance()
    world.read()
    assert not world.due()
    assert world.commit()
    assert (world.offset, world.durable) == (1, {})
    assert not world.commit()


def test_answers_of_an_earlier_life_have_no_say() -> None:
    """The request of before the crash is answered late, while its successor is on its way."""
    world = World()
    old = world.sent()
    world.restart()
    new = world.must_send()
    world.delivery.answered(old, REFUSED, world.now)
    assert world.parked() == {}
    world.delivery.answered(new, OK, world.now)
    assert world.delivery.in_flight == 0


def test_a_commit_is_due_when_there_is_something_to_arm_and_when_half_of_it_is_done() -> None:
    """Large commits while there is enough to send, at once when there is not."""
    world = World(names={str(number): f"cus_{number}" for number in range(10)})
    assert not world.due()
    for number in range(10):
        world.total(str(number))
    world.read()
    assert world.due()
    world.store()
    assert not world.due()
    world.delivery.committed()
    for done in range(10):
        assert world.due() == (done >= 5)
        world.delivery.answered(world.must_send(), OK, world.now)
    assert world.due()


def test_what_changes_while_a_commit_is_on_its_way_is_in_the_next_one() -> None:
    """The answer came while the disk was busy."""
    world = World()
    first = world.sent("alice")
    bob = world.total("bob")
    world.read()
    world.store()
    world.delivery.answered(first, OK, world.now)
    world.delivery.committed()
    assert world.outcomes == []
    world.commit()
    assert [outcome.identifier for outcome in world.outcomes] == [first.identifier]
    assert set(world.entries) == {bob}


def test_commits_are_settled_one_after_the_other() -> None:
    """Two at once could arrive in the wrong order."""
    world = World()
    world.total()
    world.read()
    world.store()
    with pytest.raises(RuntimeError):
        world.delivery.commit(world.now)
    world.delivery.committed()
    with pytest.raises(RuntimeError):
        world.delivery.committed()


def test_an_entry_of_an_unknown_version_is_refused() -> None:
    """An older program must not guess at what a newer one wrote, or drop it."""
    world = World()
    world.sent()
    (packed,) = (value for key, value in world.durable.items() if not key.startswith(PREFIX))
    assert pack(unpack(packed)) == packed
    for wrong in (b"\x03" + packed[1:], b"", packed[:-1]):
        with pytest.raises(EntryError):
            unpack(wrong)
    world.durable[PREFIX + b"ai-tokens"] = b'{"version":2,"columns":{}}'
    with pytest.raises(EntryError, match="version 2"):
        world.restart()


def test_the_ledger_survives_crashes_and_values_longer_than_64_bits() -> None:
    """Counted again or forgotten by a restart, it would accuse or acquit at random."""
    world = World(names={"alice": "cus_alice"})
    world.total("alice", "999999999999999")
    world.total("alice", "-2.5")
    world.total("zoe", "3")
    world.run(world.now + MINUTE)
    before = world.delivery.ledger.books["ai-tokens"]
    world.restart()
    after = world.delivery.ledger.books["ai-tokens"]
    assert after.delivered.value == before.delivered.value == 9999999999999965 * 10**11
    assert (after.read.totals, after.read.events) == (3, 9)
    assert (after.parked[Reason.UNMAPPED].totals, after.pending.totals) == (1, 0)
    assert world.balanced()


def test_backoff_lets_others_pass_and_grows_to_five_minutes() -> None:
    """One total that always fails costs next to nothing."""
    world = World()
    attempt = world.sent()
    pauses = []
    for _ in range(15):
        world.delivery.answered(attempt, Lost(), world.now)
        wake = world.delivery.wake(world.now)
        assert wake is not None
        pauses.append(wake - world.now)
        world.wait(pauses[-1] - 1)
        assert world.send() is None
        world.wait(1)
        attempt = world.must_send()
    assert pauses[0] <= SECOND
    assert all(MINUTE * 2.5 <= pause <= MINUTE * 5 for pause in pauses[10:])
