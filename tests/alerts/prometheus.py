"""A real Prometheus over real processes, for which a minute of the rules is a second."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import yaml

from consumer.sandbox.kafka import free_ports
from tests.alerts.rules import RULES, groups

FACTOR: Final = 60
"""How much faster rules look: ranges, offsets and durations are divided by it, and nothing else is changed."""

STEP_S: Final = 1
"""How often it scrapes, and evaluates rules."""

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_RANGE: Final = re.compile(r"(\[|offset )(\d+)([smhd])\b")


class PrometheusUnavailableError(Exception):
    """There is no Prometheus here; the message says what to install."""


def faster(query: str) -> str:
    """The query with all its ranges and offsets divided by ``FACTOR``."""
    return _RANGE.sub(lambda found: found[1] + _divided(found[2] + found[3]), query)


def _divided(duration: str) -> str:
    seconds = int(duration[:-1]) * _SECONDS[duration[-1]]
    return f"{seconds * 1000 // FACTOR}ms"


class Prometheus:
    """Runs while the context is open."""

    def __init__(self, folder: Path, targets: Mapping[str, Sequence[str]], *, fast: bool = True) -> None:
        """``targets``: addresses by job. ``fast``: whether the rules look ``FACTOR`` times as fast."""
        program = shutil.which("prometheus")
        if program is None:
            raise PrometheusUnavailableError("install Debian's package prometheus")
        self._folder = folder
        self._fast = fast
        port, _ = free_ports()
        self._address = f"127.0.0.1:{port}"
        self.began = 0.0
        """When it had scraped all of them, in seconds since the epoch."""
        self._process: subprocess.Popen[bytes] | None = None
        self._scraped = sum(map(len, targets.values()))
        folder.mkdir(parents=True)
        self._write(targets)
        self._command = [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self._address}",
        ]

    def _write(self, targets: Mapping[str, Sequence[str]]) -> None:
        for file in RULES:
            rules = groups(file)
            for rule in (each for group in rules for each in group["rules"] if self._fast):
                rule["expr"] = faster(rule["expr"])
                if "for" in rule:
                    rule["for"] = _divided(rule["for"])
            (self._folder / file.name).write_text(yaml.safe_dump({"groups": rules}))
        jobs = [
            {"job_name": job, "static_configs": [{"targets": list(each), "labels": {"pipeline": job}}]}
            for job, each in targets.items()
        ]
        every = {"scrape_interval": f"{STEP_S}s", "scrape_timeout": f"{STEP_S}s", "evaluation_interval": f"{STEP_S}s"}
        config = {"global": every, "rule_files": [file.name for file in RULES], "scrape_configs": jobs}
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Self:
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        # It begins to scrape some seconds after it is ready: what is over by then it would never have seen.
        while not (self._ready() and len(self.now("up")) == self._scraped):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus does not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        self.began = time.time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str, **asked: object) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(f"{asked}: {error.read().decode()}") from None

    def now(self, query: str) -> list[tuple[dict[str, str], float]]:
        """What the query gives at this moment."""
        return [(each["metric"], float(each["value"][1])) for each in self._get("query", query=query)["result"]]

    def over_time(
        self, query: str, *, step: float = STEP_S, since: float | None = None
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """What it gave at each moment until now; without what is no number."""
        found = self._get("query_range", query=query, start=since or self.began, end=time.time(), step=step)["result"]
        return [(each["metric"], [(at, float(v)) for at, v in each["values"] if _finite(v)]) for each in found]

    def fired(self) -> dict[str, set[str]]:
        """The alerts that have fired until now, by job."""
        found: dict[str, set[str]] = {}
        for labels, _ in self.over_time('ALERTS{alertstate="firing"}'):
            found.setdefault(labels.get("job", ""), set()).add(labels["alertname"])
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts at this moment, with what they say."""
        return list(self._get("alerts")["alerts"])


def _finite(value: str) -> bool:
    return math.isfinite(float(value))
