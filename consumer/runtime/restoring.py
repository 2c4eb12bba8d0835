"""Taking processors over in the background, so that nothing else has to wait for it."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Final, Generic, TypeVar

import structlog

from consumer.storage import Progress, Stage, Unreachable

T = TypeVar("T")

log = structlog.get_logger()

AT_ONCE: Final = 4
"""Small states are restored in the time of a few round trips, of which most is waiting."""
AGAIN_S: Final = 1.0


class _GivenUp(Exception):
    """Nobody wants it any more."""


class _Job:
    """One partition on its way."""

    def __init__(self) -> None:
        self.given_up = Event()
        self.read = self.end = 0

    def progress(self, read: int, end: int) -> None:
        """Note how far it is; raises where nobody wants it any more."""
        self.read, self.end = read, end
        if self.given_up.is_set():
            raise _GivenUp


class Restoring(Generic[T]):
    """The partitions of one stage that are being restored. Used by one thread."""

    def __init__(self, stage: Stage, restore: Callable[[int, Progress], T]) -> None:
        """``restore`` is called in threads of its own. ``Unreachable`` makes it be called again, a second later."""
        self._stage = stage
        self._restore = restore
        self._jobs: dict[int, _Job] = {}
        self._done: SimpleQueue[tuple[int, _Job, T | BaseException]] = SimpleQueue()
        self._turns = Semaphore(AT_ONCE)

    def __len__(self) -> int:
        """How many are on their way."""
        return len(self._jobs)

    @property
    def progress(self) -> dict[int, tuple[int, int]]:
        """Of each partition on its way, how far its state has been read and to which end, as offsets."""
        return {partition: (job.read, job.end) for partition, job in list(self._jobs.items())}

    def begin(self, partition: int, *, after_s: float = 0.0) -> None:
        """Restore it, after so many seconds; an earlier beginning is given up."""
        self.give_up(partition)
        job = self._jobs[partition] = _Job()
        name = f"restore-{self._stage}-{partition}"
        Thread(target=self._work, args=(partition, job, after_s), name=name, daemon=True).start()

    def give_up(self, partition: int) -> None:
        """It is not wanted any more, if it ever was."""
        job = self._jobs.pop(partition, None)
        if job is not None:
            job.given_up.set()

    def done(self) -> list[tuple[int, T]]:
        """Those that have been restored since the last call. Raises what one of them has met."""
        done: list[tuple[int, T]] = []
        while True:
            try:
                partition, job, result = self._done.get_nowait()
            except Empty:
                return done
            if self._jobs.get(partition) is not job:
                continue
            del self._jobs[partition]
            if isinstance(result, BaseException):
                raise result
            done.append((partition, result))

    def _work(self, partition: int, job: _Job, after_s: float) -> None:
        job.given_up.wait(after_s)
        while not job.given_up.is_set():
            with self._turns:
                try:
                    result: T | BaseException = self._restore(partition, job.progress)
                except _GivenUp:
                    return
                except Unreachable as failed:
                    log.warning("restore_waits", stage=self._stage, partition=partition, reason=str(failed))
                    job.given_up.wait(AGAIN_S)
                    continue
                except BaseException as failed:  # noqa: BLE001 - raised again by ``done``, in the thread that asks
                    result = failed
            self._done.put((partition, job, result))
            return
