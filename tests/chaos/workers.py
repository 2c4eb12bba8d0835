"""The processes of the service: started, killed, suspended and stopped, and what they say of themselves."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from consumer.sandbox.guard import guard
from consumer.storage import Stage
from tests.exactness.world import Metrics, Process

STOP_WITHIN_S = 45.0
DISTURBED_S = 60.0
BOTH = frozenset(Stage)
ONLY = {stage: frozenset({stage}) for stage in Stage}

Failed = Counter[tuple[str, str]]
"""Commits that came to nothing, by stage and how."""


class WorkerError(Exception):
    """A process of the service did something that it must not; the message says which and what."""


class Worker(Process):
    """One that runs one stage or both, and may be suspended."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], stages: frozenset[Stage]) -> None:
        """``config`` is that of the pipeline; what is the worker's own is added."""
        kafka = config["kafka"]
        super().__init__(folder, name, {**config, "kafka": kafka | {"options": kafka["options"] | {"client.id": name}}})
        self.name = name
        self.stages = stages
        self.busy = False
        """Whether a fault is about it."""
        self.suspended = False
        self.failed_commits = Failed()
        """As its metrics have counted them, in all of its lives."""
        self._failed_in_this_life = Failed()
        self._began_at = 0
        self._stopping = False
        self._guard: subprocess.Popen[bytes] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({'+'.join(sorted(self.stages))})"

    @property
    def running(self) -> bool:
        """Whether it was started, and nobody has ended it."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        """Start it; it takes up work by itself."""
        stage = [] if self.stages == BOTH else [f"--stage={next(iter(self.stages))}"]
        self._failed_in_this_life = Failed()
        self._stopping = False
        self._began_at = self.log_file.stat().st_size if self.log_file.exists() else 0
        self._process = self._run(*stage)
        self._guard = guard(self._process)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self._note_size()
        if self._process is not None:
            self._process.kill()
            self._gone()
        self.suspended = False

    def abort(self) -> None:
        """SIGABRT: before it ends it writes to its log where each of its threads stood."""
        if self._process is not None:
            self._process.send_signal(signal.SIGABRT)
            self._process.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)

    def suspend(self) -> None:
        """SIGSTOP: it stands still, and does not know it."""
        self._signal(signal.SIGSTOP)
        self.suspended = True

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)
        self.suspended = False

    def terminate(self) -> None:
        """SIGTERM; it ends by itself, and ``bury`` looks how."""
        self._note_size()
        self.metrics()
        self._stopping = True
        self._signal(signal.SIGTERM)

    def bury(self) -> None:
        """It has ended after SIGTERM, which has to be with 0."""
        if self._process is None:
            return
        try:
            code = self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"{self} has not ended {STOP_WITHIN_S:.0f} s after SIGTERM") from None
        self._gone()
        if code:
            raise WorkerError(f"{self} ended with {code} after SIGTERM. {self.log_tail()}")

    def check(self, *, may_give_up: bool) -> bool:
        """Whether it has ended while it was starting, where it may. Raises where it has ended otherwise by itself."""
        code = None if self._process is None or self._stopping else self._process.poll()
        if code is None:
            return False
        if code == 1 and may_give_up and not self._started:
            self._gone()
            return True
        raise WorkerError(f"{self} ended by itself, with {code}. {self.log_tail()}")

    @property
    def _started(self) -> bool:
        with self.log_file.open("rb") as log:
            log.seek(self._began_at)
            return b'"event": "started"' in log.read()

    def metrics(self) -> Metrics | None:
        """What it says of itself; None while it cannot."""
        if self.ended or self.suspended:
            return None
        try:
            seen = self._scraped(5)
        except TimeoutError:
            seen = None
        if seen is None:
            return None
        failed = Failed(
            {
                (stage, reason): int(value)
                for stage in Stage
                for reason in ("refused", "abandoned", "unknown", "fenced")
                if (value := seen.sum("tallyman_commits_failed_total", f'stage="{stage}"', f'reason="{reason}"'))
            }
        )
        self.failed_commits += failed - self._failed_in_this_life
        self._failed_in_this_life = failed
        return seen

    def _gone(self) -> None:
        for process in (self._guard, self._process):  # in this order: the guard must not outlive what it would kill
            if process is not None:
                process.kill()
                process.communicate()
        self._guard = self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise WorkerError(f"{self} is not running")
        self._process.send_signal(number)


class Fleet:
    """All workers of a pipeline. A context manager, after which none of them runs."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._looked_at = self._disturbed_at = 0.0
        self.given_up = 0
        """Starts that came to nothing, while a broker was away: whoever runs it starts it again."""
        self.workers: list[Worker] = []
        """Those that are at work, or will be again."""
        self.removed: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self.all:
            if error is not None:
                each.abort()
            each.kill()

    @property
    def all(self) -> list[Worker]:
        """Also those that are not there any more."""
        return self.workers + self.removed

    def add(self, stages: frozenset[Stage]) -> Worker:
        """One more, started."""
        worker = Worker(self._folder, f"worker-{len(self.all) + 1}", self._config, stages)
        self.workers.append(worker)
        worker.start()
        return worker

    def remove(self, worker: Worker) -> None:
        """It has ended for good."""
        self.workers.remove(worker)
        self.removed.append(worker)

    def idle(self, stage: Stage | None = None) -> list[Worker]:
        """Those that run, and that no fault is about: of this stage, or all."""
        return [w for w in self.workers if w.running and not w.busy and (stage is None or stage in w.stages)]

    def disturbed(self) -> None:
        """A broker goes away: until a while later a start may fail."""
        self._disturbed_at = time.monotonic()

    def look(self) -> None:
        """See to it that none has ended by itself; and, now and then, what their metrics count."""
        for each in self.workers:
            if not each.suspended and each.check(may_give_up=time.monotonic() - self._disturbed_at < DISTURBED_S):
                self.given_up += 1
                each.start()
        if time.monotonic() - self._looked_at > 1.0:
            self.scrape()

    def scrape(self) -> list[Metrics]:
        """What those say of themselves that can."""
        self._looked_at = time.monotonic()
        return [seen for each in self.workers if (seen := each.metrics()) is not None]

    def stop(self) -> None:
        """SIGTERM to all; each has to end well."""
        running = [each for each in self.workers if each.running]
        for each in running:
            each.terminate()
        for each in running:
            each.bury()

    @property
    def failed_commits(self) -> Failed:
        """As their metrics have counted them."""
        return sum((each.failed_commits for each in self.all), Failed())

    @property
    def peak_rss_mb(self) -> float:
        """The largest that any of the processes has been."""
        return max(each.peak_rss_kb for each in self.all) / 1024


class Line(NamedTuple):
    """A line of a worker's log that one of ours has written."""

    worker: str
    event: dict[str, Any]


def lines(worker: Worker) -> Iterator[Line]:
    """What it has logged."""
    for text in worker.log_file.read_text(errors="replace").splitlines():
        if text.startswith("{"):
            with contextlib.suppress(orjson.JSONDecodeError):
                yield Line(worker.name, orjson.loads(text))


def failed_commits(worker: Worker) -> Failed:
    """Commits that came to nothing, as its log has them."""
    return Failed(
        (str(line.event["stage"]), str(line.event["how"]))
        for line in lines(worker)
        if line.event.get("event") == "commit_failed"
    )


def tracebacks(worker: Worker) -> list[str]:
    """What must not be in its log: errors that nobody has thought of."""
    found = [f"{line.worker}: {line.event}"[:2000] for line in lines(worker) if "exception" in line.event]
    text = worker.log_file.read_text(errors="replace")
    if (at := text.find("Traceback (most recent call last)")) >= 0:
        found.append(f"{worker.name}: {text[at : at + 2000]}")
    return found
