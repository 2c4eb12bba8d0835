"""What happens to a world, and how it comes to rest: every seed has its own selection, and its own luck."""

from collections.abc import Callable
from typing import Final

from consumer.deliver.doubt import own
from consumer.deliver.entries import Reason, State, is_total, unpack
from consumer.storage import Stage
from consumer.totals import Command
from tests.simulation.operator import settle
from tests.simulation.stripe import Mood
from tests.simulation.world import CUSTOMERS, SMALL_STEP, Run, Violation, Worker, World
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND

STEPS: Final = 320
PATIENCE: Final = 12 * HOUR
"""In calm weather everything has ended by then: revisions are due within the hour, retries within minutes."""


def wait(world: World) -> None:
    """Seconds or minutes; often to where a window closes."""
    milliseconds = world.random.choice((SECOND, 5 * SECOND, 20 * SECOND, MINUTE))
    if world.chance(0.5):
        to_deadline = -(world.time - world.rules.meters[0].lateness) % MINUTE
        milliseconds = max(1, to_deadline + world.random.randrange(-6 * SECOND, 6 * SECOND))
    world.move(milliseconds)


def victim(world: World) -> Worker:
    """Somebody; rather one who is just sending or committing."""
    wanted = world.random.choice(("anybody", "sends", "commits", "commits"))
    found = [
        worker
        for worker in world.workers
        if (wanted == "sends" and worker.reporter.sending)
        or (wanted == "commits" and any(shell.commits for shell in worker.shells))
    ]
    return world.random.choice(found or world.workers)


def crash(world: World) -> None:
    """One process, or all."""
    for worker in world.workers if world.chance(0.2) else [victim(world)]:
        if worker.turns:
            world.note("%s crashes", worker.id)
            worker.kill()
            world.met["crash"] += 1


def revive(world: World) -> None:
    """Whoever has crashed starts anew, whoever was paused goes on where they were."""
    for worker in world.workers:
        if not worker.turns and world.chance(0.6):
            world.note("%s %s", worker.id, "wakes" if worker.paused else "starts again")
            if worker.paused:
                worker.wake()
            else:
                worker.start()
        if worker.stalled and world.chance(0.3):
            world.note("%s turns again", worker.id)
            worker.turn_again()


def for_a_while(world: World, worker: Worker, end: Callable[[], None]) -> None:
    """Perhaps for not much longer than it is a member: what it was about to do is then of some seconds ago."""
    life = worker.id
    if world.chance(0.6):
        world.later(world.random.randrange(60 * SECOND), lambda: end() if worker.id == life and worker.loops else None)


def pause(world: World) -> None:
    """A process stands still, wherever it is; often longer than its session, sometimes for days."""
    worker = victim(world)
    if worker.turns:
        world.note("%s is paused", worker.id)
        worker.pause()
        world.met["pause"] += 1
        for_a_while(world, worker, worker.wake)


def stall(world: World) -> None:
    """A loop hangs, in whatever; its process goes on to send and to hear, perhaps for longer than it is a member."""
    worker = victim(world)
    if worker.turns:
        shell = world.random.choice([shell for shell in worker.shells if shell.commits] or worker.shells)
        world.note("%s stalls in stage %s", worker.id, shell.stage)
        worker.stall(shell)
        world.met["stall"] += 1
        for_a_while(world, worker, worker.turn_again)


def cut_off(world: World) -> None:
    """A process is no member any more, and goes on as if it were; its loop perhaps stands still for as long."""
    shells = [shell for worker in world.workers if worker.turns for shell in worker.shells]
    wanted = world.random.choice(("commits", "jobs", "sending"))
    shells = [shell for shell in shells if getattr(shell, wanted, None)] or shells
    if shells:
        shell = world.random.choice(shells)
        until = world.time + world.random.randrange(5 * SECOND, 30 * SECOND)
        world.note("%s is cut off from %s", shell.worker.id, shell.stage)
        shell.client.group.cut_off(shell.client, world.time, until)
        world.met["cut off"] += 1
        if world.chance(0.7):
            shell.worker.stall(shell)
            life = shell.worker.id
            # For as long as the broker lets a commit be pending, or until it is a member again.
            pending = world.random.randrange(4 * SECOND, 14 * SECOND)
            world.later(
                world.random.choice((pending, until - world.time + 8 * SECOND)),
                lambda: shell.worker.turn_again() if shell.worker.id == life and shell.worker.loops else None,
            )


def rebalance(world: World) -> None:
    """Partitions move, some or all; and perhaps back again before anybody has got to work."""
    stage = world.random.choice((Stage.AGGREGATE, Stage.DELIVER))
    world.note("%s rebalances", stage)
    group = world.groups[stage]
    group.rebalance(world.time, mixing=True)
    if world.chance(0.5):
        world.later(world.random.randrange(30 * SECOND), lambda: group.rebalance(world.time, mixing=True))
    world.met["rebalance"] += 1


def change_mood(world: World) -> None:
    """Stripe is as one of the enabled features has it, or well."""
    possible = {
        "lost answers": lambda: Mood(loses=0.5),
        "server errors": lambda: Mood(breaks=world.random.choice((0.3, 1.0))),
        "busy": lambda: Mood(busy=0.6),
        "dawdling": lambda: Mood(dawdles=0.4),
    }
    choices: list[Callable[[], Mood]] = [Mood, *(make for name, make in possible.items() if name in world.features)]
    if world.doubtful:
        choices = [Mood, lambda: Mood(loses=1), lambda: Mood(loses=1, dawdles=0.3), lambda: Mood(breaks=1)]
    world.stripe.mood = world.random.choice(choices)()
    world.note("Stripe: %s", world.stripe.mood)


def go_away(world: World) -> None:
    """Stripe does not answer, for minutes or for more than a day."""
    away = world.random.choice((MINUTE, 20 * MINUTE, 24 * HOUR, 26 * HOUR))
    world.stripe.away_until = world.time + away
    world.note("Stripe is away for %d minutes", away // MINUTE)
    world.met["Stripe away"] += 1


def refuse(world: World) -> None:
    """A customer or a meter is gone, or there again."""
    stripe = world.stripe
    if world.chance(0.5):
        stripe.deleted = set() if stripe.deleted else {"cus_ann"}
    else:
        stripe.inactive = set() if stripe.inactive else {"calls"}
    world.note("Stripe refuses %s", stripe.deleted | stripe.inactive)


def lock_out(world: World) -> None:
    """The key is not taken."""
    world.stripe.locked_out_until = world.time + world.random.choice((MINUTE, HOUR))
    world.note("Stripe takes the key no more")


def expire_offsets(world: World) -> None:
    """The groups have forgotten what they were told."""
    world.store.witness.clear()
    world.note("the groups' offsets expire")


def step_clock(world: World) -> None:
    """A host's clock is corrected, or spoilt."""
    worker = world.random.choice(world.workers)
    worker.skew = world.random.randrange(-SMALL_STEP, SMALL_STEP)
    worker.years = 0
    if "wrong clocks" in world.features and world.chance(0.6):
        worker.skew = world.random.randrange(-15 * MINUTE, 15 * MINUTE)
    if "a year's step" in world.features and world.chance(0.5):
        worker.years = world.random.choice((-365, 365, 2)) * DAY
    for log in world.source:
        log.skew = world.random.randrange(-SMALL_STEP, SMALL_STEP)
    world.note("the clock of %s is off by %d ms", worker.id, worker.skew + worker.years)


def jump(world: World) -> None:
    """Hours pass in which nothing happens."""
    world.move(world.random.choice((20 * MINUTE, 45 * MINUTE, 90 * MINUTE, 15 * HOUR, DAY + MINUTE)))
    world.note("hours have passed")
    world.met["jump"] += 1


def configure(world: World) -> None:
    """A new configuration, which each process has from its next start on; one of them starts anew, in good order."""
    world.rules = world._rules()
    world.editions += 1
    worker = world.random.choice(world.workers)
    worker.stopping = True
    world.note("a new configuration; %s is to stop", worker.id)


def decide(world: World) -> None:
    """An open transaction ends."""
    for number, log in enumerate(world.source):
        for transaction in log.undecided:
            if world.chance(0.5):
                log.decide(transaction, commit=world.chance(0.7))
                world.note("a transaction on partition %d ends", number)
                world.met["transaction"] += 1


def write_elsewhere(world: World) -> None:
    """Somebody else writes an event with the identifier of a total that we have not tried."""
    untried = [each for each in world.totals if not world.written[each.identifier]]
    if untried:
        total = world.random.choice(untried)
        world.foreign.add(total.identifier)
        customer = str(CUSTOMERS[total.customer])
        world.stripe.take_from_elsewhere(total.identifier, total, "666", customer, world.time)
        world.note("somebody else writes %s", total.identifier)
        world.met["foreign"] += 1


def write_beside(world: World) -> None:
    """Somebody else uses a meter, too, under identifiers of their own."""
    if world.totals:
        total = world.random.choice(world.totals)
        name, customer = f"other-{len(world.stripe.taken)}", str(CUSTOMERS[total.customer])
        world.stripe.take_from_elsewhere(name, total, "77.000777", customer, world.time)
        world.note("somebody else uses %s of %s", total.meter, customer)
        world.met["a second writer"] += 1


def ask_operator(world: World) -> None:
    """Somebody looks at what is parked."""
    settle(world)


def remap(world: World) -> None:
    """A customer becomes known. (One who is known stays so.)"""
    world.names.known = dict(CUSTOMERS)
    world.mapping += 1


EVENTS: Final[tuple[tuple[str, float, Callable[[World], None]], ...]] = (
    ("", 40, World.produce),
    ("", 14, wait),
    ("crash", 4, crash),
    ("pause", 4, pause),
    ("stalls", 4, stall),
    ("cut off", 6, cut_off),
    ("rebalance", 6, rebalance),
    ("", 4, change_mood),
    ("away", 2, go_away),
    ("refusals", 2, refuse),
    ("locked out", 4, lock_out),
    ("offsets expire", 3, expire_offsets),
    ("", 3, step_clock),
    ("days", 5, jump),
    ("configurations", 3, configure),
    ("transactions", 8, decide),
    ("elsewhere", 3, write_elsewhere),
    ("second writer", 3, write_beside),
    ("operator", 6, ask_operator),
    ("unmapped", 2, remap),
    ("", 8, revive),
)
WORK: Final = 170
"""How much likelier than one weight of an event it is that a process takes a step."""


def storm(world: World) -> None:
    """Anything can happen."""
    random = world.random
    if "unmapped" in world.features:
        del world.names.known["bob"]
    events = [(weight, happen) for feature, weight, happen in EVENTS if not feature or feature in world.features]
    weights = [weight for weight, _ in events]
    if world.doubtful:
        weights = [weight * 3 if happen in (jump, ask_operator) else weight for weight, happen in events]
    for _ in range(STEPS):
        world.move(random.randrange(300))
        if random.random() < WORK / (WORK + sum(weights)):
            for worker in world.workers:
                if worker.turns:
                    for _ in range(random.randrange(1, 8)):
                        worker.step(random.randrange(5))
        else:
            random.choices(events, weights)[0][1](world)


def calm_down(world: World) -> None:
    """Everybody is well, and time goes on until all is closed, and delivered or parked."""
    world.calm, world.calm_since = True, world.time
    world.note("calm")
    stripe = world.stripe
    stripe.mood, stripe.away_until, stripe.locked_out_until = Mood(), 0, 0
    stripe.inactive, stripe.deleted = set(), set()
    remap(world)
    for log in world.source:
        for transaction in log.undecided:
            log.decide(transaction, commit=True)
    for worker in world.workers:
        worker.skew = worker.years = 0
        worker.turn_again()
        if worker.paused:
            worker.wake()
        elif not worker.turns:
            worker.start()
    released: set[str] = set()
    come_to_rest(world, released)
    while (answer := settle(world)) != (0, None):
        followed, later = answer
        if not followed and later is not None:
            world.move(max(MINUTE, later + SECOND - world.time))
        world.calm_since = world.time
        come_to_rest(world, released)
    stop(world)


def come_to_rest(world: World, released: set[str]) -> None:
    """Go on until nothing happens by itself any more."""
    waited = 0
    while not at_rest(world, released):
        before = world.progress
        for worker in world.workers:
            for _ in range(2):
                worker.step(0)
                worker.step(1)
                for _ in range(sum(len(shell.threads) for shell in worker.shells)):
                    worker.step(4)
                while worker.reporter.sending:
                    worker.step(2)
                while worker.reporter.answers:
                    worker.step(3)
        waited = waited + 1 if world.progress == before else 0
        world.move(idle(world, SECOND << min(waited, 9)) if waited else 1)
        if world.time - world.calm_since > PATIENCE:
            raise Violation(f"something is left behind: {left(world)}")


def idle(world: World, patience: int) -> int:
    """How long nothing happens by itself; what waits for who knows what is looked at after ``patience``."""
    times = [] if world.next_event is None else [world.next_event]
    owned = sum(len(worker.reporter.deliveries) for worker in world.workers) - len(world.store.totals)
    for worker in world.workers:
        times.extend(delivery.wake(world.time) or 0 for delivery in worker.reporter.deliveries.values())
        for each in worker.intake.partitions.values():
            owned += 1
            if each.aggregator.open_keys:
                times.append(each.aggregator.next_close or 0)
    # What is due already waits for something else: a restore, or a witness of the time.
    known = [time if time > world.time else world.time + patience for time in times if time]
    if not known or owned < len(world.source):
        known.append(world.time + patience)
    return min(known) - world.time


def at_rest(world: World, released: set[str]) -> bool:
    """Whether nothing will happen any more; what an operator may release is released, once."""
    intakes = [each for worker in world.workers for each in worker.intake.partitions.items()]
    deliveries = [worker.reporter for worker in world.workers]
    if (
        world.next_event is not None
        or world.store.pending
        or not all(group.settled for group in world.groups.values())
        or any(shell.jobs for worker in world.workers for shell in worker.shells)
        or len(intakes) < len(world.source)
        or sum(len(each.deliveries) for each in deliveries) < len(world.store.totals)
        or any(each.read_to < world.source[number].end for number, each in intakes)
        or any(each.aggregator.open_keys or each.aggregator.changed for _, each in intakes)
        or not all(each.idle for each in deliveries)
    ):
        return False
    again = False
    for reporter in deliveries:
        for number, delivery in reporter.deliveries.items():
            for entry in delivery.parked():
                identifier = entry.total.identifier
                if not own(entry) and identifier not in released:
                    released.add(identifier)
                    world.store.totals[number].append(Command("release", identifier, "eve", "mended", world.time))
                    again = True
    return not again


def left(world: World) -> str:
    """What keeps it from resting."""
    return "; ".join(
        f"{worker.id} holds {each.aggregator.open_keys} open sums, and has read partition {number} up to {each.read_to}"
        for worker in world.workers
        for number, each in worker.intake.partitions.items()
    ) + "; ".join(
        f"{worker.id} has {delivery.in_flight} in flight and {delivery.aside} aside, shut: {delivery.shut}"
        for worker in world.workers
        for delivery in worker.reporter.deliveries.values()
    )


def stop(world: World) -> None:
    """Every process ends in good order."""
    for worker in world.workers:
        worker.stopping = True
        while worker.loops:
            for stage, loop in list(worker.loops.items()):
                if next(loop, "over") == "over":
                    del worker.loops[stage]


def parked(world: World) -> dict[str, Reason | None]:
    """What is parked durably, and why; nothing else may be left."""
    found = {}
    for (stage, _), state in world.store.states.items():
        if stage is Stage.DELIVER:
            for key, value in state.entries.items():
                if is_total(key):
                    entry = unpack(value)
                    world.claim(entry.state is State.PARKED, "%s is left %s", key, entry.state)
                    world.claim(bool(own(entry)), "%s is parked for no reason", key)
                    found[key.decode()] = entry.reason
    return found


def run(seed: int, *, world: World | None = None) -> Run:
    """One seed, from its beginning to its end. Raises ``Violation``, or whatever broke."""
    from tests.simulation.truth import verify  # noqa: PLC0415

    world = world or World(seed)
    storm(world)
    calm_down(world)
    verify(world, parked(world))
    return Run(seed, STEPS, world.met)
