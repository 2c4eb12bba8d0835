"""Deliberate faults: what somebody may one day break, each with the story of how money is lost by it.

They are put into the real cores, the shells or the store while they are in force; the simulation has to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace

from consumer.aggregate import aggregator, buckets, counting, duplicates
from consumer.aggregate.aggregator import Aggregator
from consumer.aggregate.clock import QuietClock, Reading
from consumer.aggregate.counting import Counting
from consumer.aggregate.duplicates import Remembered
from consumer.aggregate.meters import identifier
from consumer.aggregate.readers import Uncountable
from consumer.deliver import answers, delivery, doubt
from consumer.deliver.answers import Answer, Heard, Lost, Verdict
from consumer.deliver.delivery import Delivery
from consumer.deliver.doubt import Sight
from consumer.deliver.entries import Entry
from consumer.deliver.lanes import Lanes
from consumer.deliver.pacing import Outlet
from consumer.deliver.schedule import Live, Phase, Schedule
from consumer.events import Event
from consumer.storage import Changes, Restored, Stage
from consumer.totals import Total
from tests.simulation.groups import Client, Metadata
from tests.simulation.intake import Intake
from tests.simulation.reporter import Reporter
from tests.simulation.shells import Job, Shell, Steps
from tests.simulation.store import NotDoneError, SimulatedStore, State, Transaction
from tests.unit.stage1 import HOUR


@dataclass(frozen=True)
class Fault:
    """One of them; ``within`` so many seeds, from 0 on, it has to be noticed."""

    name: str
    story: str
    within: int
    put: Callable[[], AbstractContextManager[object]]
    doubtful: bool = False
    """Whether it is looked for in worlds that are about doubts."""
    features: frozenset[str] | None = None
    """What happens in the worlds in which it is looked for, where that is not a selection of everything."""


FAULTS: list[Fault] = []


def fault(
    name: str, story: str, *, within: int, doubtful: bool = False, features: frozenset[str] | None = None
) -> Callable[[Callable[[], Iterator[None]]], Callable[[], Any]]:
    """Name one."""

    def named(put: Callable[[], Iterator[None]]) -> Callable[[], Any]:
        made = contextmanager(put)
        FAULTS.append(Fault(name, story, within, made, doubtful, features))
        return made

    return named


# Stage 1


@fault(
    "ids are forgotten on restore",
    "After a crash a producer's repetition is counted, and billed, once more.",
    within=10,
)
def _forgotten_on_restore() -> Iterator[None]:
    made = Remembered.__init__

    def init(self: Remembered, remember_for: int, _chunks: object = ()) -> None:
        made(self, remember_for)

    with patch.object(Remembered, "__init__", init):
        yield


@fault(
    "a duplicate does not renew its id",
    "A producer that repeats an event every twenty hours has it billed every second time.",
    within=150,
)
def _not_renewed() -> Iterator[None]:
    remember = Remembered.remember

    def once(self: Remembered, digest: int) -> None:
        if not self.has(digest):
            remember(self, digest)

    with patch.object(Remembered, "remember", once):
        yield


@fault("ids are forgotten early", "A repetition half a day later is billed.", within=150)
def _forgotten_early() -> Iterator[None]:
    def has(self: Remembered, digest: int) -> bool:
        last = self.seen.get(digest)
        return last is not None and self.interval - last <= duplicates.INTERVALS // 2

    with patch.object(Remembered, "has", has):
        yield


@fault("late events are dropped", "Usage that arrives after its window has closed is billed to nobody.", within=10)
def _late_dropped() -> Iterator[None]:
    read = Counting.read

    def on_time(self: Counting, event: Event, at: int, age: int) -> tuple[str, int]:
        if self._partition.clock >= at - at % self._meter.size + self._grace:
            raise Uncountable("late", "its window has closed")
        return read(self, event, at, age)

    with patch.object(Counting, "read", on_time):
        yield


@fault(
    "late events go back to revision 0",
    "A bucket that has closed is opened again: its identifier stands for a second sum, which Stripe never takes.",
    within=10,
)
def _reopened() -> Iterator[None]:
    with patch.object(Counting, "_late", lambda self, start: self._open(start, 0)):
        yield


@fault(
    "a bucket closes before settle",
    "A host whose clock is a little ahead closes a bucket for which events still arrive: it is opened once more.",
    within=120,
)
def _before_settle() -> Iterator[None]:
    def early(meter: str, window: Any, due: int, _closes: int, stripe: Any) -> buckets.Header:
        return buckets.Header(meter, window, due, due, stripe)

    with patch.object(counting, "Header", early):
        yield


@fault(
    "the edition is not in the identifier",
    "A changed lateness makes two buckets of one window: the second is taken for a repetition of the first.",
    within=50,
)
def _no_edition() -> Iterator[None]:
    with patch.object(aggregator, "identifier", lambda source, **of: identifier(source, **(of | {"edition": b""}))):
        yield


@fault(
    "a clock that jumps a year is believed",
    "All that is open closes at once, and all that follows is late.",
    within=30,
)
def _year_believed() -> Iterator[None]:
    with patch.object(QuietClock, "limit", lambda _self, now, _elapsed, _witness: now):
        yield


@fault(
    "a clock is believed after a restore without a witness",
    "A host whose clock is a year ahead starts, and closes a year of buckets.",
    within=30,
)
def _no_witness() -> Iterator[None]:
    limit = QuietClock.limit

    def alone(self: QuietClock, now: int, elapsed: int, _witness: object) -> int:
        return limit(self, now, elapsed, Reading(now, elapsed))

    with patch.object(QuietClock, "limit", alone):
        yield


@fault(
    "the end is asked for read_committed",
    "While a transaction is open, what lies behind it is invisible: the clock passes records that have arrived.",
    within=40,
)
def _stable_end() -> Iterator[None]:
    with patch.object(Intake, "asked_end", lambda self, number: self.world.source[number].stable_end):
        yield


@fault(
    "the clock is read after the end was asked for",
    "What arrives in between is older than the clock, and late through no fault of its own.",
    within=40,
)
def _clock_after_end() -> Iterator[None]:
    def look_at_end(self: Intake, number: int) -> Steps:
        each = self.partitions[number]
        if each.aggregator.closing or not each.aggregator.closes_by(self.worker.wild_now()):
            return
        end = self.asked_end(number)
        yield from self.effect()
        self.move_on(each, end, self.worker.wild_now(), self.worker.elapsed())

    with patch.object(Intake, "look_at_end", look_at_end):
        yield


@fault(
    "an advance is not recorded",
    "The log alone does not say any more which bucket an event went to: an audit computes other totals.",
    within=10,
)
def _advance_unrecorded() -> Iterator[None]:
    def advance(self: Aggregator, clock: int) -> None:
        if clock > self.book.clock:
            self.book.clock = clock
            self._changed = True

    with patch.object(Aggregator, "advance", advance):
        yield


# The store


@fault(
    "the generation is not checked at the commit",
    "A process that was paused past its session wakes, and writes its old state over that of the new owner.",
    within=40,
)
def _unfenced() -> Iterator[None]:
    with patch.object(SimulatedStore, "current", lambda *_: True):
        yield


@fault(
    "the group is asked who we are when it commits, not when it was polled",
    "Partitions were lost and won in between: the new generation covers for what was computed in the old one.",
    within=150,
)
def _metadata_fresh() -> Iterator[None]:
    def fresh(self: Shell) -> Metadata:
        return self.client.metadata

    with patch.object(Shell, "credentials", fresh):
        yield


@fault(
    "a partition that was revoked is committed still",
    "The group checks who commits, and not what: the state is written over that of the new owner.",
    within=20,
)
def _not_cut() -> Iterator[None]:
    def keeps(self: Shell, partitions: Any) -> None:
        self.owned.difference_update(partitions)
        for number in partitions:
            self.give_up(number)

    with patch.object(Shell, "lost", keeps):
        yield


@fault(
    "a restore is taken for another one of the same partition",
    "The partition was lost while it was restored, worked on elsewhere, and won again: its state is as old as that.",
    within=200,
)
def _any_restore() -> Iterator[None]:
    def any_(self: Shell, job: Job) -> bool:
        return job.partition in self.jobs

    with patch.object(Shell, "wants", any_):
        yield


@fault(
    "what was taken back while it was restored is taken over",
    "Two work on one partition: what the second one reads is never committed, or what it sends is sent twice.",
    within=20,
)
def _not_given_up() -> Iterator[None]:
    def all_(self: Shell, job: Job) -> bool:
        self.jobs[job.partition] = job
        return True

    with patch.object(Shell, "wants", all_):
        yield


@fault(
    "the state is kept after a commit that failed",
    "What it was to make durable is written down nowhere, and is not in the next one either.",
    within=20,
)
def _kept_after_failure() -> Iterator[None]:
    make_durable = Shell.make_durable

    def forgives(self: Shell, changes: dict[int, Changes]) -> Steps:
        numbers = dict(self.numbers)
        try:
            yield from make_durable(self, changes)
        except NotDoneError:
            self.numbers = numbers

    with patch.object(Shell, "make_durable", forgives):
        yield


@fault(
    "after a commit that failed nothing is restored",
    "The partition is ours, and stands still for ever.",
    within=20,
)
def _not_restored() -> Iterator[None]:
    def stands_still(self: Shell, partitions: Any) -> None:
        self.drop(partitions)

    with patch.object(Shell, "failed", stands_still):
        yield


@fault(
    "an offset is committed without its entries",
    "A commit that fails has moved on: what it read is gone.",
    within=20,
)
def _offset_alone() -> Iterator[None]:
    abort = SimulatedStore.abort

    def half(self: SimulatedStore, transaction: Transaction) -> None:
        if transaction in self.pending:
            for partition, changes in transaction.changes.items():
                self.put(transaction.stage, partition, Changes(changes.offset))
        abort(self, transaction)

    with patch.object(SimulatedStore, "abort", half):
        yield


@fault(
    "totals are appended by a commit that fails",
    "They are computed and appended again: the same identifiers are in the log twice.",
    within=20,
)
def _appends_alone() -> Iterator[None]:
    abort = SimulatedStore.abort

    def half(self: SimulatedStore, transaction: Transaction) -> None:
        if transaction in self.pending:
            for changes in transaction.changes.values():
                for each in changes.appends:
                    self.append(each)
        abort(self, transaction)

    with patch.object(SimulatedStore, "abort", half):
        yield


@fault(
    "restore drops the tail",
    "A commit that is made while its successor restores is not seen: what it read is read, and billed, again.",
    within=150,
    features=frozenset({"pause", "bad commits", "rebalance"}),
)
def _tail_dropped() -> Iterator[None]:
    with patch.object(SimulatedStore, "unstable", lambda *_: False):
        yield


@fault(
    "without the group's offset nothing is restored",
    "The group forgets its offsets after a quiet week, and the whole log is billed again.",
    within=20,
)
def _offset_trusted() -> Iterator[None]:
    restore = SimulatedStore.restore

    def trusting(self: SimulatedStore, stage: Stage, partition: int, reader: Client) -> tuple[Restored | None, int]:
        restored, number = restore(self, stage, partition, reader)
        return restored if (stage, partition) in self.witness else None, number

    with patch.object(SimulatedStore, "restore", trusting):
        yield


@fault("deleted entries come back on restore", "A total that has ended is sent again a day later.", within=10)
def _no_tombstones() -> Iterator[None]:
    def put(self: SimulatedStore, stage: Stage, partition: int, changes: Changes) -> None:
        state = self.states.setdefault((stage, partition), State())
        state.offset = self.witness[stage, partition] = changes.offset
        state.entries.update(changes.puts)

    with patch.object(SimulatedStore, "put", put):
        yield


@fault(
    "an unknown outcome is taken for a failure, and the state is kept",
    "The commit was made; made again, it appends its totals twice.",
    within=40,
)
def _unknown_kept() -> Iterator[None]:
    make_durable = Shell.make_durable

    def again(self: Shell, changes: dict[int, Changes]) -> Steps:
        numbers = dict(self.numbers)
        try:
            yield from make_durable(self, changes)
        except NotDoneError as failed:
            if "no answer" not in str(failed):
                raise
            self.numbers = numbers
            yield from make_durable(self, changes)

    with patch.object(Shell, "make_durable", again):
        yield


# Stage 2


@fault(
    "totals are sent before the commit",
    "A crash in between forgets that they were; a day later they are sent again, and both are billed.",
    within=30,
)
def _send_first() -> Iterator[None]:
    changes = Reporter.changes

    def send(self: Reporter, partitions: Any) -> dict[int, Changes]:
        found = changes(self, partitions)
        for number in found:
            self.deliveries[number].committed()
            self.give_out(self.deliveries[number])
        return found

    with patch.object(Reporter, "changes", send), patch.object(Reporter, "committed", lambda *_: None):
        yield


@fault(
    "what was restored as sending counts as untried",
    "It may be at Stripe: the mark that says since when is set anew, and the day is over before it is noticed.",
    within=10,
)
def _restored_untried() -> Iterator[None]:
    take_back = Delivery._take_back

    def untried(self: Delivery, entry: Entry, now: int) -> None:
        take_back(self, entry, now)
        live = self._live.get(entry.total.identifier)
        if live is not None:
            live.tried = False

    with patch.object(Delivery, "_take_back", untried):
        yield


@fault(
    "a later refusal clears an unproven attempt",
    "The first attempt was taken and its answer lost; a 429 an hour later proves nothing of it.",
    within=40,
)
def _refusal_clears() -> Iterator[None]:
    left_nothing = Delivery._left_nothing

    def clears(self: Delivery, live: Live, verdict: Verdict, message: str | None, now: int) -> None:
        live.tried = False
        left_nothing(self, live, verdict, message, now)

    with patch.object(Delivery, "_left_nothing", clears):
        yield


@fault(
    "an identifier is used after 24 hours",
    "Stripe was away for a day, and has forgotten what it took before that.",
    within=60,
)
def _too_long() -> Iterator[None]:
    with patch.object(delivery, "SAME_IDENTIFIER_FOR", 48 * HOUR):
        yield


@fault(
    "the time is not looked at before the request is written",
    "A process stands still for a day with a request in its hands, and then writes it.",
    within=150,
)
def _no_last_look() -> Iterator[None]:
    with patch.object(
        Delivery, "may_send", lambda self, attempt, _now: self._attempts.get(attempt.identifier) is attempt
    ):
        yield


@fault(
    "a duplicate on a first attempt passes for delivered",
    "Somebody else's event has our identifier: our usage is never billed, and nobody is told.",
    within=30,
)
def _collision_delivered() -> Iterator[None]:
    with patch.object(delivery, "_COLLISIONS", frozenset({Verdict.MISMATCH})):
        yield


@fault(
    "a stored 500 is asked for again under the same key",
    "Stripe replays it for as long as the key lives: the total never arrives.",
    within=40,
)
def _same_key() -> Iterator[None]:
    with patch.object(Verdict, "stored", property(lambda _: False)):
        yield


@fault(
    "no answer counts as no attempt",
    "The request was taken, and only its answer lost.",
    within=120,
)
def _lost_is_absent() -> Iterator[None]:
    judge = answers.judge

    def hopeful(heard: Heard) -> Verdict:
        return Verdict.ABSENT if isinstance(heard, Lost) else judge(heard)

    with patch.object(delivery, "judge", hopeful):
        yield


@fault(
    "a 500 counts as a refusal",
    "Half of them were taken; the total is parked as if it were not, and released.",
    within=60,
)
def _broken_is_refused() -> Iterator[None]:
    judge = answers.judge

    def sure(heard: Heard) -> Verdict:
        return Verdict.REFUSED if isinstance(heard, Answer) and heard.status == 500 else judge(heard)

    with patch.object(delivery, "judge", sure):
        yield


@fault(
    "a replayed answer passes for this attempt's",
    "A replayed refusal is about an earlier attempt, and clears nothing; here it does.",
    within=80,
)
def _replay_believed() -> Iterator[None]:
    judge = answers.judge

    def credulous(heard: Heard) -> Verdict:
        if isinstance(heard, Answer) and heard.status >= 500 and heard.replayed:
            return Verdict.ABSENT
        return judge(heard)

    def forgets(self: Delivery, live: Live, verdict: Verdict, message: str | None, now: int) -> None:
        live.tried = live.tried and verdict is not Verdict.ABSENT
        left_nothing(self, live, verdict, message, now)

    left_nothing = Delivery._left_nothing
    with patch.object(delivery, "judge", credulous), patch.object(Delivery, "_left_nothing", forgets):
        yield


@fault("two requests for one customer at a time", "Stripe refuses one of them, again and again.", within=20)
def _two_at_once() -> Iterator[None]:
    take = Lanes.take

    def both(self: Lanes[Any]) -> Any:
        key = self._free[0] if self._free else None
        item = take(self)
        if key is not None and self._lanes[key].queue:
            self._free.append(key)
        return item

    with patch.object(Lanes, "take", both):
        yield


@fault(
    "a total that is in the log twice begins twice",
    "The log was written twice, once in vain: both are sent.",
    within=10,
)
def _outcome_twice() -> Iterator[None]:
    begin = Delivery._begin

    def twice(self: Delivery, total: Total, now: int) -> None:
        begin(self, total, now)
        if total.identifier not in self._live and total.identifier not in self._seats:
            begin(self, total, now)

    with patch.object(Delivery, "_begin", twice):
        yield


@fault(
    "the offset of the totals log is moved by what was not read yet",
    "A crash skips a total: it is nowhere.",
    within=10,
)
def _offset_ahead() -> Iterator[None]:
    commit = Delivery.commit

    def ahead(self: Delivery, now: int) -> Changes | None:
        changes = commit(self, now)
        if changes is not None and self._live:
            changes.offset += 1
        return changes

    with patch.object(Delivery, "commit", ahead):
        yield


@fault(
    "a commit's mark is forgotten by the next one",
    "What was sent is written down as untried while its answer is on the way.",
    within=30,
)
def _mark_forgotten() -> Iterator[None]:
    pack = delivery._pack

    def unmarked(live: Live) -> bytes:
        packed = pack(live)
        if live.phase is Phase.RESTING and live.tried:
            marked, live.entry.first_unproven = live.entry.first_unproven, None
            packed = pack(live)
            live.entry.first_unproven = marked
        return packed

    with patch.object(delivery, "_pack", unmarked):
        yield


@fault(
    "every partition has a gate of its own",
    "Stripe takes the key no more, and each partition knocks for itself.",
    within=40,
)
def _own_gates() -> Iterator[None]:
    begin = Reporter.begin

    def alone(self: Reporter, partition: int, restored: Restored | None) -> None:
        shared, self.outlet = self.outlet, Outlet(1_000)
        begin(self, partition, restored)
        self.outlet = shared

    with patch.object(Reporter, "begin", alone):
        yield


@fault(
    "what was given out is written after the partition has gone",
    "A request that lay in a queue is written while the new owner has long been at work on its total.",
    within=10,
)
def _written_after_drop() -> Iterator[None]:
    with patch.object(Delivery, "drop", lambda self: self._schedule.drop()):
        yield


@fault(
    "the requests of a partition that has gone are waited for",
    "Nobody hears their answers: nothing probes ever again, and all that is left stays.",
    within=10,
)
def _waits_for_the_gone() -> Iterator[None]:
    leave = Outlet.leave

    def half(self: Outlet, sender: Schedule, sent: int) -> None:
        leave(self, sender, 0 * sent)

    with patch.object(Outlet, "leave", half):
        yield


@fault(
    "a partition that has gone keeps its turn to probe",
    "Whoever was to probe for all is not asked any more, and the others wait for it.",
    within=40,
)
def _keeps_its_turn() -> Iterator[None]:
    def half(self: Schedule) -> None:
        self._outlet.sent -= self._sent
        self._sent = 0

    with patch.object(Schedule, "drop", half):
        yield


@fault(
    "a partition is given back, and its requests keep the outlet",
    "The others wait for answers that nobody hears: while Stripe is down they never probe.",
    within=20,
)
def _outlet_kept() -> Iterator[None]:
    with patch.object(Reporter, "let_go", lambda *_: None):
        yield


# Doubts


@fault(
    "a doubt is released before the sums can have it",
    "Stripe took it, and its sums show it an hour later: it is billed twice.",
    within=40,
    doubtful=True,
)
def _before_the_sums() -> Iterator[None]:
    with patch.object(doubt, "FINAL_AFTER", 0):
        yield


@fault(
    "other doubts of the minute are not looked at",
    "The one that is there passes for the one that is not: this is given up, and billed to nobody.",
    within=120,
    doubtful=True,
)
def _alone() -> Iterator[None]:
    look = doubt._look

    with patch.object(doubt, "_look", lambda sight: look(replace(sight, others=()))):
        yield


@fault(
    "what was delivered lately is taken to be in the sum",
    "It is not yet; what is there instead is a doubt of the same value, which is released, and billed twice.",
    within=60,
    doubtful=True,
)
def _all_seen() -> Iterator[None]:
    look = doubt._look

    def final(sight: Sight) -> object:
        return look(replace(sight, sure=tuple(replace(each, newest=0) for each in sight.sure)))

    with patch.object(doubt, "_look", final):
        yield
