"""What people decide about parked totals: a doubt that is released begins anew, and nothing of it is forgotten."""

from collections.abc import Callable
from functools import partial

import msgspec
import pytest

from consumer.deliver.answers import Answer, Heard, Lost
from consumer.deliver.delivery import Attempt
from consumer.deliver.doubt import finished
from consumer.deliver.entries import KEPT, LONGEST, Decision, Outcome, Reason, pack, unpack
from consumer.totals import Command, Total
from tests.unit.delivery_world import BROKEN, HOUR, MINUTE, REFUSED, World, duplicate

DAY = 24 * HOUR


def in_doubt(world: World, *, arrived: bool) -> str:
    """A total that Stripe never answered about for a day."""
    attempt = world.sent()
    if arrived:
        world.stripe.post(attempt, world.now)
    world.delivery.answered(attempt, Lost(), world.now)
    world.commit()
    world.wait(DAY)
    world.restart()
    assert world.send() is None
    world.commit()
    assert world.parked() == {attempt.total: "in_doubt"}
    return attempt.total


def collided(world: World) -> str:
    """A total whose identifier Stripe had before we sent it."""
    attempt = world.sent()
    world.delivery.answered(attempt, duplicate(attempt.identifier), world.now)
    world.commit()
    return attempt.total


def refused(world: World) -> str:
    """A total that was refused, after an attempt that was never answered."""
    attempt = world.sent()
    world.delivery.answered(attempt, Lost(), world.now)
    world.wait(MINUTE)
    world.delivery.answered(world.must_send(), REFUSED, world.now)
    world.commit()
    return attempt.total


def decisions(world: World) -> list[Decision]:
    """Of the only outcome."""
    (outcome,) = world.outcomes
    return list(outcome.decisions)


@pytest.mark.parametrize("parked", [partial(in_doubt, arrived=False), collided, refused])
def test_a_doubt_is_released_under_the_next_generation_of_its_identifier(parked: Callable[[World], str]) -> None:
    """Under the old one Stripe would bill it again, or say that it has it: after a day, nobody knows which."""
    world = World()
    identifier = parked(world)
    reason = world.parked()[identifier]
    world.wait(25 * HOUR)
    world.command("release", identifier)
    world.run(world.now + MINUTE)

    (outcome,) = world.outcomes
    assert (outcome.identifier, outcome.how, outcome.generation) == (identifier, "delivered", 2)
    assert (outcome.billed_as, outcome.key, outcome.attempts) == (f"{identifier}-g2", f"{identifier}-g2", 1)
    (decision,) = outcome.decisions
    assert (decision.action, decision.by, decision.reason, decision.parked) == ("release", "eve", "because", reason)
    assert decision.generation == 1
    assert decision.first_unproven is not None
    assert decision.stripe_customer == "cus_alice"
    assert decision.at > decision.first_unproven
    assert [name for name, *_ in world.stripe.billed] == [f"{identifier}-g2"]
    assert world.entries == {}
    assert world.balanced()


def test_a_total_that_was_never_unproven_keeps_its_identifier() -> None:
    """Nothing can be at Stripe: another identifier would only open a way to bill it twice."""
    world = World()
    attempt = world.sent()
    world.delivery.answered(attempt, REFUSED, world.now)
    world.command("release", attempt.identifier)
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.generation, outcome.billed_as, outcome.key) == (1, None, f"{attempt.identifier}:1")
    (decision,) = outcome.decisions
    assert (decision.action, decision.parked, decision.message) == ("release", "refused", REFUSED.message)
    assert decision.first_unproven is None


def test_a_discard_is_recorded_with_what_may_be_at_stripe() -> None:
    """Whoever looks a year later finds who decided, why, and about what."""
    world = World()
    identifier = in_doubt(world, arrived=True)
    world.command("discard", identifier, by="ann")
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.by, outcome.reason, outcome.billed_as) == ("discarded", "ann", "because", None)
    (decision,) = outcome.decisions
    assert (decision.action, decision.by, decision.parked) == ("discard", "ann", Reason.IN_DOUBT)
    assert decision.newest == decision.parked_at
    assert len(world.stripe.billed) == 1
    assert world.balanced()


@pytest.mark.parametrize("parked", [partial(in_doubt, arrived=True), collided, refused])
def test_what_is_found_at_stripe_counts_as_delivered(parked: Callable[[World], str]) -> None:
    """It is billed: books, totals and comparisons with Stripe's sums have to say so."""
    world = World()
    identifier = parked(world)
    (entry,) = world.delivery.parked()
    world.log.append(Command("discard", identifier, "ann", "in the sum", world.now, 1, identifier))
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.billed, outcome.stripe_customer) == ("duplicate", "5", "cus_alice")
    assert (outcome.by, outcome.reason, outcome.billed_as) == ("ann", "in the sum", None)
    book = world.delivery.ledger.books["ai-tokens"]
    assert (book.delivered.totals, book.discarded.totals) == (1, 0)
    assert world.balanced()
    sure, maybe = finished(outcome)
    assert sure is not None
    newest = max(entry.parked_at, (entry.first_unproven or 0) + 23 * HOUR)
    assert (sure[1].identifier, sure[1].newest, maybe) == (identifier, newest, {})


def test_an_earlier_generation_that_is_found_is_billed_to_whom_it_was_sent() -> None:
    world = World()
    identifier = in_doubt(world, arrived=True)
    world.command("release", identifier)
    world.names.known["alice"] = "cus_other"
    world.delivery.remap(world.names, world.now)
    world.run(world.now + MINUTE, lambda _: REFUSED)
    assert world.parked() == {identifier: "refused"}
    for wrong in (f"{identifier}-g2", f"{identifier}-g3", "tm1-other"):
        world.log.append(Command("discard", identifier, "ann", "", world.now, 2, wrong))
    world.log.append(Command("discard", identifier, "ann", "", world.now, 2, identifier))
    world.run(world.now + MINUTE)
    assert [note.text.partition(": ")[2] for note in world.delivery.notes] == [
        f"nothing of it can be at Stripe under {wrong}"
        for wrong in (f"{identifier}-g2", f"{identifier}-g3", "tm1-other")
    ]
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.stripe_customer, outcome.billed_as) == ("duplicate", "cus_alice", None)


def test_every_generation_has_a_day_of_its_own_and_is_in_doubt_after_it() -> None:
    """Stripe is away again: the second doubt is another one, and the third generation another life."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    world.command("release", identifier)
    began = world.now
    names: list[str] = []

    def away(attempt: Attempt) -> Heard:
        names.append(attempt.key)
        return Lost()

    world.run(began + 2 * DAY, away)
    assert names[:2] == [f"{identifier}-g2", f"{identifier}-g2:1"]
    (entry,) = world.delivery.parked()
    assert (entry.reason, entry.generation, entry.parking) == ("in_doubt", 2, 2)
    assert entry.first_unproven == began

    world.command("release", identifier)
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.billed_as, outcome.generation) == (f"{identifier}-g3", 3)
    assert [each.generation for each in outcome.decisions] == [1, 2]
    assert world.balanced()


def test_a_generation_keeps_to_its_identifier_through_crashes_and_answers_that_were_lost() -> None:
    """It is marked, sent, lost with the process, and found again: under its own identifier, not the first one."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    world.command("release", identifier)
    world.read()
    world.commit()
    sent = world.must_send()
    assert sent.total == identifier
    world.stripe.post(sent, world.now, broken=True)
    world.restart()

    again = world.must_send()
    assert again == sent
    world.delivery.answered(again, BROKEN, world.now)
    world.commit()
    world.restart()
    world.run(world.now + HOUR)
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.billed_as, outcome.key) == ("duplicate", f"{identifier}-g2", f"{identifier}-g2:1")
    assert len(world.stripe.billed) == 1
    assert world.balanced()


def test_a_release_that_a_crash_took_back_is_done_again_and_once() -> None:
    """Before the commit it has not happened; after it, the log is not read again from there."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    world.commit()
    world.command("release", identifier)
    world.read()
    world.restart()
    assert world.parked() == {identifier: "in_doubt"}
    world.read()
    world.commit()
    world.restart()
    assert world.delivery.noted == 0
    world.run(world.now + HOUR)
    assert [each.billed_as for each in world.outcomes] == [f"{identifier}-g2"]
    assert world.balanced()


def test_the_same_command_twice_releases_once_even_if_the_total_is_parked_again() -> None:
    """Carried out ahead of its turn, a command is read again after a crash: by then it is about another parking."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    release = world.command("release", identifier)
    world.delivery.hear(release, world.now)
    world.commit()
    world.delivery.answered(world.must_send(), REFUSED, world.now)
    world.commit()
    assert world.parked() == {identifier: "refused"}
    world.restart()
    world.obey()
    assert world.parked() == {identifier: "refused"}
    assert not world.delivery.notes, "it was carried out"
    world.delivery.hear(msgspec.structs.replace(release, by="bob"), world.now)
    assert world.parked() == {identifier: "refused"}
    assert world.delivery.notes[-1].text == (
        "release by bob is refused: it was decided when the total was parked for the 1st time, and this is the 2nd"
    )


def test_of_two_operators_the_second_is_refused() -> None:
    """Both saw the same doubt. The first one's release is on its way when the second one's is read."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    world.command("release", identifier, by="ann")
    world.command("release", identifier, by="bob")
    world.command("discard", identifier, by="eve")
    world.run(world.now + MINUTE)
    assert [each.by for each in decisions(world)] == ["ann"]
    assert [note.text for note in world.delivery.notes] == [
        "release by bob is refused: it is not parked, or not any more",
        "discard by eve is refused: it is not parked, or not any more",
    ]
    assert [name for name, *_ in world.stripe.billed] == [f"{identifier}-g2"]


def test_a_decision_from_before_a_later_parking_does_not_apply_to_it() -> None:
    """Bob looked while the customer was unmapped. It was tried for a day since: he decided about something else."""
    world = World(names={})
    identifier = world.total()
    world.read()
    world.commit()
    stale = Command("release", identifier, "bob", "mapped now", world.now, 1)
    world.names.known = {"alice": "cus_alice"}
    world.delivery.remap(world.names, world.now)
    world.run(world.now + 2 * DAY, lambda _: Lost())
    assert world.parked() == {identifier: "in_doubt"}
    for command in (stale, replace_action(stale, "discard")):
        world.log.append(command)
    world.obey()
    assert world.parked() == {identifier: "in_doubt"}
    assert world.delivery.noted == 2


def replace_action(command: Command, action: str) -> Command:
    return msgspec.convert(msgspec.to_builtins(command) | {"action": action}, Command)


def test_a_command_of_an_earlier_version_releases_only_what_it_could_have_meant() -> None:
    """It does not say about which parking it was decided, and was written when doubts were not released."""
    world = World()
    doubt = in_doubt(world, arrived=True)
    clear = world.sent("bob")
    world.delivery.answered(clear, REFUSED, world.now)
    for identifier in (doubt, clear.identifier):
        old = b'{"kind":"command","action":"release","identifier":"%s","by":"eve","reason":"","at":1}'
        world.log.append(msgspec.json.decode(old % identifier.encode(), type=Command))
    world.run(world.now + HOUR)
    assert world.parked() == {doubt: "in_doubt"}
    assert "may be at Stripe" in world.delivery.notes[-1].text
    assert [outcome.identifier for outcome in world.outcomes] == [clear.identifier]


def test_a_release_to_nobody_who_is_billed_is_finished_and_the_doubt_is_kept() -> None:
    """The mapping says null meanwhile: nothing is sent, and what may be at Stripe is on record."""
    world = World()
    identifier = in_doubt(world, arrived=True)
    world.names.known = {"alice": None}
    world.command("release", identifier)
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert (outcome.how, outcome.generation, outcome.billed_as) == ("unbilled", 2, None)
    assert decisions(world)[0].first_unproven is not None
    assert world.balanced()


def test_an_identifier_that_has_no_room_for_a_generation_is_not_released() -> None:
    """Stripe takes 100 characters; one that is cut could be another total's."""
    world = World()
    identifier = "t" * LONGEST
    usual = msgspec.to_builtins(total_of(world, world.total()))
    world.log[0] = msgspec.convert(usual | {"identifier": identifier}, Total)
    world.read()
    world.commit()
    world.delivery.answered(world.must_send(), Answer(200, replayed=True), world.now)
    world.command("release", identifier)
    world.obey()
    assert world.parked() == {identifier: "collision"}
    assert "too long" in world.delivery.notes[-1].text


def total_of(world: World, identifier: str) -> Total:
    return next(each for each in world.log if isinstance(each, Total) and each.identifier == identifier)


def test_decisions_are_kept_within_bounds_and_doubts_for_ever() -> None:
    """An entry has to fit into a message: a script that releases every hour must not make it grow."""
    world = World()
    identifier = in_doubt(world, arrived=False)
    for number in range(KEPT + 5):
        world.log.append(Command("release", identifier, "a" * 500, f"{number} " + "x" * 5000, world.now, number + 1))
        world.run(world.now + MINUTE, lambda _: REFUSED)
    (entry,) = world.delivery.parked()
    assert len(entry.decisions) == KEPT + 1
    assert entry.decisions[0].first_unproven is not None
    assert entry.decisions[-1].reason.startswith(f"{KEPT + 4} ")
    assert len(pack(entry)) < 64_000


def test_entries_and_outcomes_of_before_are_read() -> None:
    """They have neither generations nor decisions."""
    world = World()
    identifier = in_doubt(world, arrived=True)
    world.commit()
    fields = msgspec.msgpack.decode(world.durable[identifier.encode()][1:])[:9]
    entry = unpack(b"\x01" + msgspec.msgpack.encode(fields))
    assert (entry.generation, entry.parking, entry.decisions, entry.identifier) == (1, 0, [], identifier)
    world.durable[identifier.encode()] = b"\x01" + msgspec.msgpack.encode(fields)
    world.restart()
    world.command("release", identifier)
    world.run(world.now + MINUTE)
    (outcome,) = world.outcomes
    assert outcome.billed_as == f"{identifier}-g2"
    kept = {name: value for name, value in msgspec.to_builtins(outcome).items() if name not in NEW}
    assert msgspec.convert(kept, Outcome).generation == 1


NEW = {"generation", "billed_as", "decisions"}
