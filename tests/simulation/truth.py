"""What has to be billed, computed from the log alone, and whether it was: once, in the right window, with nothing left.

Nothing of the cores is used for it: intervals, windows, revisions and rounding are told here once more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING, Final

from consumer.aggregate.aggregator import Aggregator
from consumer.aggregate.meters import Source
from consumer.deliver.delivery import Delivery
from consumer.deliver.entries import Reason
from consumer.deliver.pacing import Outlet
from consumer.storage import Log, Stage
from consumer.totals import Advance, Total, decode
from tests.simulation.source import AMOUNTS
from tests.unit.oracle import MARKS

if TYPE_CHECKING:
    from tests.simulation.world import World

MINUTE: Final = 60_000
STRIPE: Final = Context(prec=15, rounding=ROUND_HALF_EVEN)

Place = tuple[str, str, int]
"""Meter, customer and start of the window in seconds."""


@dataclass
class Truth:
    """What has become of one partition's records."""

    sums: dict[Place, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """Events, and their value in units of 10⁻¹²."""
    revisions: dict[tuple[str, str, int, int], int] = field(default_factory=Counter)
    """Events by revision too, as their arrivals alone would have it."""
    counted: int = 0
    duplicate: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    ignored: int = 0


def truth_of(world: World, partition: int) -> Truth:
    """Judge every record by those before it."""
    found = Truth()
    width = -((world.deduplicate_for + 5 * MINUTE) // -24)
    last: dict[str, int] = {}
    arrival = 0
    grace = MINUTE + world.rules.meters[0].lateness
    for (_, (_, stamp), *_), usage in world.source[partition].committed():
        arrival = max(arrival, stamp)
        if usage.kind == "tombstone":
            found.ignored += 1
            continue
        if usage.kind == "garbage":
            found.dead["not_json"] += 1
            continue
        at = stamp if usage.at is None else usage.at
        interval = arrival // width
        if usage.id in last and interval - last[usage.id] <= 24:
            found.duplicate += 1
            last[usage.id] = interval
            continue
        if arrival - at > world.accept_late or at - arrival > 5 * MINUTE:
            found.dead["late" if arrival > at else "future"] += 1
            continue
        last[usage.id] = interval
        found.counted += 1
        start = at // MINUTE * MINUTE
        late = arrival - start - grace
        revision = sum(late >= mark for mark in MARKS[:110])
        for meter in ("tokens", "calls") if usage.kind == "used" else ("calls",):
            row = found.sums[meter, usage.customer, start // 1000]
            row[0] += 1
            row[1] += AMOUNTS[usage.amount][1] if meter == "tokens" else 10**12
            found.revisions[meter, usage.customer, start // 1000, revision] += 1
    return found


def verify(world: World, parked: dict[str, Reason | None]) -> None:
    """All invariants of a run that has come to rest. Raises ``Violation``."""
    truths = [truth_of(world, number) for number in range(len(world.source))]
    totals = world.totals
    _totals_are_the_truth(world, truths, totals)
    _stripe_has_each_total_once(world, {total.identifier: total for total in totals}, parked)
    _billed_is_the_truth(world, truths, totals, parked)
    torn = [processor for processor, state in world.store.states.items() if state.torn]
    world.claim(not torn, "two processes have written the state of %s", torn)
    _first_stage_adds_up(world, truths)
    _second_stage_adds_up(world, totals, parked)
    if not world.editions:
        _replays_are_the_same(world)


def _totals_are_the_truth(world: World, truths: list[Truth], totals: list[Total]) -> None:
    identifiers = Counter(total.identifier for total in totals)
    world.claim(len(identifiers) == len(totals), "identifiers come twice: %s", identifiers.most_common(3))
    wanted: dict[Place, list[int]] = defaultdict(lambda: [0, 0])
    for truth in truths:
        for place, (events, value) in truth.sums.items():
            wanted[place][0] += events
            wanted[place][1] += value
    found: dict[Place, list[int]] = defaultdict(lambda: [0, 0])
    for total in totals:
        row = found[total.meter, total.customer, total.window_start]
        row[0] += total.events
        row[1] += int(Decimal(total.value).scaleb(12))
        inside = total.window_start <= total.timestamp < total.window_start + 60
        world.claim(inside, "%s is dated outside its window", total.identifier)
    wrong = [
        (place, wanted.get(place), found.get(place)) for place in {**wanted, **found} if wanted[place] != found[place]
    ]
    world.claim(not wrong, "totals are not what was used (place, used, found): %s", wrong[:4])
    if world.honest and not world.editions:
        by_revision: Counter[tuple[str, str, int, int]] = Counter()
        for truth in truths:
            by_revision.update(truth.revisions)
        for total in totals:
            by_revision[total.meter, total.customer, total.window_start, total.revision] -= total.events
        moved = [each for each in by_revision.items() if each[1]]
        world.claim(not moved, "events are in other revisions than they arrived for: %s", moved[:4])


def _stripe_has_each_total_once(world: World, totals: dict[str, Total], parked: dict[str, Reason | None]) -> None:
    ours = Counter(each.attempt.total for each in world.stripe.taken if not each.foreign)
    outcomes = {outcome.identifier: outcome for outcome in world.store.outcomes}
    world.claim(len(outcomes) == len(world.store.outcomes), "a total has ended twice")
    world.claim(ours.keys() <= totals.keys(), "Stripe was sent what is no total")
    for each in world.stripe.taken:
        if not each.foreign:
            total, attempt = totals[each.attempt.total], each.attempt
            world.claim(
                (attempt.value, attempt.stripe_customer, attempt.event_name, attempt.timestamp)
                == (_rounded(total), world.names.known[total.customer], total.meter, total.timestamp),
                "Stripe was told %s of %s", attempt, total,
            )  # fmt: skip
    for identifier, total in totals.items():
        count = ours[identifier]
        if identifier in parked:
            world.claim(count <= 1, "%s is parked, and billed %d times", identifier, count)
            world.claim(
                parked[identifier] is not Reason.COLLISION or identifier in world.foreign,
                "%s is parked as a collision with itself", identifier,
            )  # fmt: skip
            continue
        world.claim(identifier in outcomes, "%s has not ended", identifier)
        how = outcomes[identifier].how
        world.claim((how == "zero") == (Decimal(total.value) == 0), "%s, worth %s: %s", identifier, total.value, how)
        if identifier in world.foreign and how == "duplicate":
            unsure = identifier in world.perhaps_tried or world.written[identifier] > 1
            world.claim(unsure, "%s was written by somebody else and passes for ours", identifier)
            world.claim(count <= 1, "%s is billed %d times", identifier, count)
        else:
            world.claim(
                count == (how in {"delivered", "duplicate"}), "%s: %s, and billed %d times", identifier, how, count
            )


def _billed_is_the_truth(
    world: World, truths: list[Truth], totals: list[Total], parked: dict[str, Reason | None]
) -> None:
    """From end to end: all that was used by somebody who pays, less what waits for a person."""
    windows = {total.identifier: total.window_start for total in totals}
    billed: dict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
    for each in world.stripe.taken:
        if not each.foreign:
            attempt = each.attempt
            billed[attempt.event_name, attempt.stripe_customer, windows[attempt.total]] += Decimal(attempt.value)
    here = {each.attempt.total for each in world.stripe.taken if not each.foreign}
    away: dict[Place, Decimal] = defaultdict(Decimal)
    for total in totals:
        place = total.meter, total.customer, total.window_start
        if total.identifier not in here and (total.identifier in parked or total.identifier in world.foreign):
            away[place] += Decimal(total.value)
        elif total.identifier in here:
            away[place] += Decimal(total.value) - Decimal(_rounded(total))
    for meter, customer, start in {place: None for truth in truths for place in truth.sums}:
        payer = world.names.known[customer]
        used = sum(truth.sums[meter, customer, start][1] for truth in truths)
        due = Decimal(used).scaleb(-12) - away[meter, customer, start] if payer else Decimal(0)
        paid = billed.get((meter, str(payer), start), Decimal(0))
        world.claim(paid == due, "%s of %s at %d: used %s, billed %s", meter, customer, start, due, paid)


def _rounded(total: Total) -> str:
    return f"{STRIPE.plus(Decimal(total.value)).normalize():f}"


def _first_stage_adds_up(world: World, truths: list[Truth]) -> None:
    for number, truth in enumerate(truths):
        state = world.store.states[Stage.AGGREGATE, number]
        world.claim({key[:1] for key in state.entries} <= {b"p", b"m", b"i"}, "entries of buckets are left behind")
        core = Aggregator(world.rules, Source("cluster", "topic", "prod", number), state.offset, state.entries.items())
        core.check()
        book = core.book
        found = (book.counted, book.duplicate, Counter(book.dead), sum(book.ignored.values()))
        said = (truth.counted, truth.duplicate, truth.dead, truth.ignored)
        world.claim(found == said, "the books of partition %d say %s, and it was %s", number, found, said)
        log = world.source[number]
        world.claim(not log.fetch(state.offset, 1)[0], "partition %d was not read to its end", number)
    dead = sum(truth.dead.total() for truth in truths)
    world.claim(world.store.letters == dead, "%d letters for %d dead events", world.store.letters, dead)


def _second_stage_adds_up(world: World, totals: list[Total], parked: dict[str, Reason | None]) -> None:
    ended = {outcome.identifier for outcome in world.store.outcomes}
    world.claim(not ended & parked.keys(), "a total is parked and has ended")
    world.claim(len(ended) + len(parked) == len(totals), "not every total is somewhere")
    read = 0
    for number in range(len(world.store.totals)):
        state = world.store.states.get((Stage.DELIVER, number))
        if state is None:
            continue
        core = Delivery(customers=world.names, in_flight=10, parked_limit=1000, outlet=Outlet(10))
        core.restore(state.offset, state.entries.items(), world.time)
        for name, book in core.ledger.books.items():
            world.claim(not book.missing and not book.astray, "the books of %s: missing %d", name, book.missing)
            read += book.read.totals
    world.claim(read == len(totals), "%d totals were read of %d", read, len(totals))


def _replays_are_the_same(world: World) -> None:
    """Read the log in one go, stopping only for the advances that were recorded: every total is the same again."""
    lived: dict[str, Total] = {total.identifier: total for total in world.totals}
    advances = [record for log in world.store.totals for record in log if isinstance(record, Advance)]
    again: dict[str, Total] = {}
    for number, log in enumerate(world.source):
        core = Aggregator(world.rules, Source("cluster", "topic", "prod", number), 0)
        position = 0
        mine = sorted((each.offset, each.clock) for each in advances if each.partition == number)
        for offset, clock in [*mine, (log.end, 0)]:
            while position < offset:
                records, position = log.fetch(position, log.end, until=offset)
                core.step(records, world.time + MINUTE)
            core.advance(clock)
        while core.changed:
            for each in core.commit().appends:
                if each.log is Log.TOTALS and isinstance(record := decode(each.value), Total):
                    again[record.identifier] = record
    world.claim(again == lived, "a replay makes other totals: %s", [i for i in lived if lived[i] != again.get(i)][:3])
