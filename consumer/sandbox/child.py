"""The service as a child process on the embedded broker, watched through its metrics, so that it can be killed."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from prometheus_client.parser import text_string_to_metric_families

from consumer.sandbox.guard import guard
from consumer.sandbox.stripe import SECRET_KEY

_STOP_S: Final = 15.0
_LAST_LINES: Final = 15
_LONGEST_LINE: Final = 200


class Seen(NamedTuple):
    """The service as its metrics show it: what it has committed, where nothing else is said."""

    consumed: int = 0
    """`counted + duplicates + dead + ignored`."""
    counted: int = 0
    duplicates: int = 0
    dead: int = 0
    ignored: int = 0
    """Other people's events, and tombstones."""
    counted_in_memory: int = 0
    """Whether committed or not."""
    open_windows: int = 0
    totals: int = 0
    """Made by stage 1."""
    waiting: int = 0
    """Of these totals: not finished by stage 2, and not parked."""


class Child:
    """The service in a process of its own, with its configuration, its file and its log in a folder.

    Nothing of the user's own Kafka and Stripe reaches it. If we are killed ourselves, it is too.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """The configuration's port must be free: it stays the same when the service is started again."""
        self.log_file = folder / "service.log"
        self.metrics_port: int = config["http"]["port"]
        self._config_file = folder / "tallyman.yaml"
        self._config_file.write_text(yaml.safe_dump(config, sort_keys=False))
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def start(self) -> int:
        """Start it, and return its process id."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("KAFKA_", "STRIPE_"))}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "consumer.sandbox.service", str(self._config_file)],
                env=ours | {"STRIPE_SECRET_KEY": SECRET_KEY},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is meant for whoever started it
            )
        self._guard = guard(self._process)
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it at once, as a power failure would. From any thread."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)

    def stop(self) -> int:
        """Ask it to end in good order; returns its exit code, which is negative where it had to be killed."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.wait()

    def wait(self) -> int:
        """Wait for the end of what has been killed or ends by itself; returns its exit code."""
        if self._process is None:
            return 0
        if self._guard is not None:  # before it can kill somebody else under the same number
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        return self._process.wait()

    def look(self) -> Seen | None:
        """What its metrics say; None while it does not say anything."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=2)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                state = sample.labels.get("outcome") or sample.labels.get("state") or ""
                sums[f"{sample.name} {state}".rstrip()] += int(sample.value)
        if "tallyman_consumed_total" not in sums:
            return None  # it is still restoring its state
        return Seen(
            consumed=sums["tallyman_consumed_total"],
            counted=sums["tallyman_events_total counted"],
            duplicates=sums["tallyman_events_total duplicate"],
            dead=sums["tallyman_events_total dead_letter"],
            ignored=sums["tallyman_events_total ignored"],
            counted_in_memory=sums["tallyman_remembered_ids"],
            open_windows=sums["tallyman_open_buckets"],
            totals=sums["tallyman_closed_totals_total"],
            waiting=sums["tallyman_totals unread"] + sums["tallyman_totals pending"],
        )

    def log_tail(self) -> str:
        """The end of its log, without the ends of long lines."""
        written = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return "\n".join(line[:_LONGEST_LINE] for line in written.splitlines()[-_LAST_LINES:])
