"""The processes of a run, seen from outside: the service, which is killed and started again, and Stripe's stand-in."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
import yaml

from consumer.sandbox import traffic
from consumer.sandbox.kafka import free_ports
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.traffic import METERS, REACH_MS, Message

PIPELINE = "exactness"
PATIENCE_S = 330.0
"""A run in which nothing moves for so long has failed. A total that was refused again and again rests for 5 minutes."""
POLL_S = 0.1

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class StandIn:
    """Stripe's stand-in in a process of its own. A context manager."""

    def __init__(self, *, seed: int, burst: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.exactness.stripe", f"--seed={seed}", f"--burst={burst}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout is None:
            raise RuntimeError("the stand-in has no standard output")
        self.url = self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    @property
    def accepted(self) -> int:
        """Meter Events taken so far, whatever was answered."""
        return int(ask(self.url, "stats").get("accepted", 0))


def ask(stripe: str, what: str) -> Any:
    """What the stand-in at this address knows: its ``stats``, ``events``, ``billed`` or ``violations``."""
    with urllib.request.urlopen(f"{stripe}/_sandbox/{what}", timeout=60) as answer:  # noqa: S310 - our own
        return orjson.loads(answer.read())


class Metrics:
    """One look at /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [(name, labels or "", float(value)) for name, labels, value in _SAMPLE.findall(text)]

    def sum(self, name: str, *having: str) -> float:
        """Of all series of this name that have these labels, written ``label="value"``."""
        return sum(value for each, labels, value in self._samples if each == name and all(h in labels for h in having))

    @property
    def consumed(self) -> int:
        """Records read, as committed."""
        return int(self.sum("tallyman_consumed_total"))

    @property
    def open(self) -> int:
        """Events counted that are in no total yet, as committed."""
        return int(self.sum("tallyman_counted_events_total") - self.sum("tallyman_closed_events_total"))

    @property
    def unfinished(self) -> int:
        """Events in open windows, and totals that are made and not finished."""
        return self.open + sum(
            int(self.sum("tallyman_totals", f'state="{s}"')) for s in ("pending", "unread", "parked")
        )


def configuration(
    pipeline: str, *, kafka: str, topic: str, stripe: str, max_rate: int, first_arrival_ms: int
) -> dict[str, Any]:
    """What is configured in every run, but for where its state is."""
    bill_from = time.gmtime((first_arrival_ms - REACH_MS) // 1000 - 60)
    return {
        "pipeline": pipeline,
        "bill_from": time.strftime("%Y-%m-%dT%H:%M:%SZ", bill_from),
        "kafka": {"bootstrap_servers": kafka, "topic": topic, "arrival": "create_time"},
        "commit_every": "1s",
        "stripe": {"livemode": False, "api_base": stripe, "max_rate": max_rate},
        "meters": [dict(meter) for meter in METERS],
    }


class Process:
    """``tallyman run`` as a process, or as one after the other, with a configuration and a log of its own."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        """The configuration is that of the pipeline; where the process listens is added."""
        self.config_file = folder / f"{name}.yaml"
        self.log_file = folder / f"{name}.log"
        self.peak_rss_kb = 0
        """The largest that any of its processes has been, as far as was looked."""
        self._process: subprocess.Popen[bytes] | None = None
        self._port, _ = free_ports()
        self.config_file.write_text(yaml.safe_dump({**config, "http": {"host": "127.0.0.1", "port": self._port}}))

    @property
    def environment(self) -> dict[str, str]:
        """What it runs with: this one's, and the stand-in's key. If it crashes it says where its threads stood."""
        return os.environ | {"STRIPE_SECRET_KEY": SECRET_KEY, "PYTHONFAULTHANDLER": "1"}

    def log_tail(self) -> str:
        """The last lines of its log."""
        lines = self.log_file.read_text(errors="replace")[-3000:] if self.log_file.exists() else ""
        return f"The end of its log, {self.log_file}:\n{lines}"

    def _run(self, *more: str) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "consumer", "run", "-c", str(self.config_file), *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )

    def _scraped(self, timeout_s: float) -> Metrics | None:
        """What it says of itself; None where nobody listens."""
        self._note_size()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=timeout_s) as answer:
                return Metrics(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            return None

    def _note_size(self) -> None:
        if self._process is not None:
            # The kernel's own mark, so that nothing is missed between two looks at it.
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{self._process.pid}/status").read_text()
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    self.peak_rss_kb = max(self.peak_rss_kb, int(found[1]))


class Service(Process):
    """One that is killed, and started again on the same file. A context manager."""

    def __init__(self, folder: Path, *, kafka: str, topic: str, stripe: str, first_arrival_ms: int) -> None:
        self.database = folder / "tallyman.db"
        self.kills = 0
        config = configuration(
            PIPELINE, kafka=kafka, topic=topic, stripe=stripe, max_rate=10_000, first_arrival_ms=first_arrival_ms
        )
        super().__init__(folder, "service", config | {"storage": {"kind": "sqlite", "path": str(self.database)}})

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start(self) -> None:
        """Start it; it takes up work by itself."""
        self._process = self._run()

    def kill_and_restart(self) -> None:
        """SIGKILL, as a power cut would, and a new start at once."""
        self._note_size()
        self._end(signal.SIGKILL)
        self.kills += 1
        self.start()

    def stop(self) -> None:
        """SIGTERM, after which it has to end well."""
        self._note_size()
        code = self._end(signal.SIGTERM)
        if code:
            raise RuntimeError(f"the service ended with {code} after SIGTERM. {self.log_tail()}")

    def metrics(self) -> Metrics | None:
        """What it says of itself; None while it is starting."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the service is not running. {self.log_tail()}")
        return self._scraped(30)

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            raise RuntimeError("the service is not running")
        process.send_signal(number)
        return process.wait(30)


class Production:
    """Writes messages to a topic from a thread of its own, at so many a second, and at most as many as are allowed."""

    def __init__(
        self,
        kafka: str,
        topic: str,
        messages: Iterable[Message],
        rate: float,
        allowed: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.sent = 0
        """Messages that the broker has."""
        self._failure: BaseException | None = None

        def write() -> None:
            try:
                self.sent = traffic.produce(kafka, topic, _paced(messages, rate, allowed), self._tell)
            except BaseException as failure:  # noqa: BLE001 - raised again by whoever waits
                self._failure = failure

        self._thread = threading.Thread(target=write, name="production", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """Whether all messages are written. Raises what went wrong."""
        if self._failure is not None:
            raise self._failure
        return not self._thread.is_alive()

    def _tell(self, sent: int) -> None:
        self.sent = sent


def _paced(messages: Iterable[Message], rate: float, allowed: Callable[[], float]) -> Iterator[Message]:
    due = time.monotonic()
    for number, message in enumerate(messages):
        if number % 100 == 0:
            while number >= allowed() or time.monotonic() < due:
                time.sleep(POLL_S / 10)
            due = max(due + 100 / rate, time.monotonic())
        yield message


def wait_until(
    reached: Callable[[], bool],
    progress: Callable[[], object],
    what: str,
    *,
    patience_s: float = PATIENCE_S,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Return once it is reached; raise where nothing has progressed for longer than patience lasts."""
    last, since = progress(), time.monotonic()
    while not reached():
        meanwhile()
        time.sleep(POLL_S)
        now = progress()
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            raise TimeoutError(f"{what}: nothing has moved for {patience_s:.0f} s; it stands at {last}")


def answers(stats: dict[str, int]) -> Counter[str]:
    """What was answered to Meter Events, as the client saw it."""
    count = Counter(stats)
    failed = count["fault_error"] + count["fault_accept_error"]
    return Counter(
        {
            "requests": count["requests"],
            "accepted": count["accepted"],
            "429 rate limit": count["fault_rate_limited"],
            "429 lock timeout": count["lock_timeout"],
            "500": failed,
            "accepted, answer lost": count["fault_accept_lose"],
            "400 already exists": count["duplicate"],
            "replayed": count["replayed"],
            "409 key in use": count["key_in_use"],
        }
    )
