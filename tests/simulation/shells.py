"""What a process does around the cores, as generators that stop between any two effects.

The order of effects is the service's: poll, take over, read, commit (arm), send, hear. Whoever stops a generator for
good has killed the process there; whoever lets it wait for a day has paused it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from consumer.runtime.commits import backoff
from consumer.storage import Changes, Restored, Stage
from tests.simulation.groups import Client, Metadata
from tests.simulation.store import NotDoneError, UnstableError

if TYPE_CHECKING:
    from tests.simulation.world import Worker, World

Steps = Iterator[None]


@dataclass(eq=False)
class Job:
    """One partition on its way: what its state was when its end was asked for, and the number of that commit."""

    partition: int
    given_up: bool = False
    restored: Restored | None = None
    number: int = 0


class Shell:
    """One stage of one process, and its membership."""

    stage: Stage

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.world: World = worker.world
        self.client = Client(self.world.groups[self.stage], worker.id)
        self.metadata = self.client.metadata
        """As of the last poll."""
        self.owned: set[int] = set()
        """What it was told is its own."""
        self.jobs: dict[int, Job] = {}
        """What is being restored, and wanted."""
        self.threads: list[Steps] = []
        self.done: list[Job] = []
        self.numbers: dict[int, int] = {}
        """Of the last commit of what is at work; none of what is to be restored first."""
        self.failures = 0
        self.commits = False
        """Whether it is about to, at this moment."""

    def run(self) -> Steps:
        """Until the process is to stop; then everything is committed, and the group left."""
        self.client.group.join(self.client, self.world.time)
        while not self.worker.stopping:
            yield from self.poll()
            self.take_over()
            yield from self.turn()
            yield
        yield from self.finish(list(self.working))
        yield from self.commit(list(self.working))
        self.lost(list(self.owned))
        self.client.group.leave(self.client, self.world.time)

    # What is ours

    def poll(self) -> Steps:
        """Hear what the group has decided, and do it."""
        while self.client.events:
            event = self.client.events.popleft()
            self.metadata = self.client.metadata
            self.world.note("%s %s: %s %s", self.worker.id, self.stage, event.what, event.partitions)
            self.world.progress += 1
            self.world.met[event.what] += 1
            if event.what == "assigned":
                self.assigned(event.partitions)
            elif event.what == "revoked":
                yield from self.revoked(event.partitions)
            else:
                self.world.met["lost while it is restored"] += any(each in self.jobs for each in event.partitions)
                self.lost(event.partitions)
            self.client.done(event, self.world.time)
        self.metadata = self.client.metadata

    def assigned(self, partitions: Collection[int]) -> None:
        """Restore these."""
        self.owned.update(partitions)
        for number in partitions:
            self.restore(number)

    def revoked(self, partitions: Collection[int]) -> Steps:
        """Commit these for the last time, and let go of them."""
        yield from self.finish(partitions)
        yield from self.commit(partitions)
        self.lost(partitions)

    def lost(self, partitions: Collection[int]) -> None:
        """Let go of these, as they are."""
        self.owned.difference_update(partitions)
        for number in partitions:
            self.give_up(number)
        self.drop(partitions)

    # Restoring, in the background

    def restore(self, partition: int, after_s: float = 0) -> None:
        """Begin; what was begun before is given up."""
        self.give_up(partition)
        job = self.jobs[partition] = Job(partition)
        self.threads.append(self._restore(job, self.world.time + int(after_s * 1000)))

    def give_up(self, partition: int) -> None:
        """It is not wanted any more; its thread finds out at some time, or not at all."""
        job = self.jobs.pop(partition, None)
        if job is not None:
            job.given_up = True

    def _restore(self, job: Job, begin: int) -> Steps:
        world = self.world
        while world.time < begin:
            yield
        begun = False
        while True:
            yield
            if job.given_up and (not begun or world.chance(0.5)):
                return
            begun = True
            try:
                job.restored, job.number = world.store.restore(self.stage, job.partition, self.client)
                break
            except UnstableError:
                continue
        until = world.time + world.restore_takes()
        while world.time < until and not world.calm:
            yield
        self.done.append(job)

    def take_over(self) -> None:
        """Go on with what has been restored."""
        for job in self.done:
            if self.wants(job):
                del self.jobs[job.partition]
                self.numbers[job.partition] = job.number
                self.begin(job.partition, job.restored)
                self.world.note("%s %s takes over %d", self.worker.id, self.stage, job.partition)
                self.world.progress += 1
            else:
                self.world.met["a restore is in vain"] += 1
        self.done.clear()

    def wants(self, job: Job) -> bool:
        """Whether this is the restore that it waits for."""
        return self.jobs.get(job.partition) is job

    # Commits

    def commit(self, partitions: Collection[int]) -> Steps:
        """What has changed of these; where that fails they are dropped, and restored if they are ours."""
        changes = self.changes([number for number in partitions if number in self.working])
        if not changes:
            return
        self.commits = True
        try:
            yield from self.make_durable(changes)
        except NotDoneError as failed:
            self.commits = False
            self.world.note("%s %s drops %s: %s", self.worker.id, self.stage, sorted(changes), failed)
            self.failures += 1
            self.failed(changes)
        else:
            self.commits = False
            self.failures = 0
            self.committed(changes)

    def failed(self, partitions: Collection[int]) -> None:
        """Only what is durable is to be trusted."""
        self.drop(partitions)
        self.world.met["others go on after a failed commit"] += bool(self.working)
        for number in self.owned.intersection(partitions):
            self.restore(number, backoff(self.failures))

    def make_durable(self, changes: dict[int, Changes]) -> Steps:
        """One commit, of which any step may fail; raises ``NotDoneError`` where it was not made, or nobody knows."""
        world, store = self.world, self.world.store
        numbers = {number: self.numbers.pop(number) + 1 for number in changes}
        yield from self.effect()
        fate = world.fate_of_commit(last=bool(self.client.leaving))
        transaction = store.open(self.stage, self.client, changes, numbers)
        yield from self.effect()
        if fate == "fails":
            store.abort(transaction)
            raise NotDoneError("the commit failed")
        try:
            store.send_offsets(transaction, self.credentials())
        except NotDoneError:
            world.met["a commit is refused"] += 1
            raise
        yield from self.effect()
        if fate == "is lost":
            raise NotDoneError("the commit was lost on its way; it stays pending")
        if fate == "is late":
            transaction.asked = True
            world.later(world.random.randrange(1, 20_000), lambda: world.finish_late(transaction))
            raise NotDoneError("no answer to the commit, which is made later")
        store.finish(transaction)
        if fate == "is unknown":
            raise NotDoneError("no answer to the commit, which was made")
        world.progress += 1
        world.note("%s %s commits %s", self.worker.id, self.stage, {n: c.offset for n, c in changes.items()})
        yield from self.effect()
        self.numbers |= numbers

    def credentials(self) -> Metadata:
        """As whom to commit."""
        return self.metadata

    def effect(self) -> Steps:
        """Anything may happen here, in other than calm weather."""
        if not self.world.calm:
            yield

    def turns(self, numbers: Iterator[int]) -> list[int]:
        """Whose turn it is: everybody's when all is calm, and anybody's else."""
        all_ = list(numbers)
        return all_ if self.world.calm or not all_ else [self.world.random.choice(all_)]

    @property
    def working(self) -> Collection[int]:
        """The partitions at work."""
        raise NotImplementedError

    def drop(self, partitions: Collection[int]) -> None:
        """Forget what is not durable of these."""
        raise NotImplementedError

    def begin(self, partition: int, restored: Restored | None) -> None:
        """Take up a partition."""
        raise NotImplementedError

    def turn(self) -> Steps:
        """Once around with what is at work."""
        raise NotImplementedError

    def changes(self, partitions: Collection[int]) -> dict[int, Changes]:
        """What has changed of these."""
        raise NotImplementedError

    def committed(self, partitions: Collection[int]) -> None:
        """Their changes are durable."""

    def finish(self, partitions: Collection[int]) -> Steps:
        """Begin nothing more with these."""
        raise NotImplementedError
