"""What the runbook says, done: ``python -m tests.alerts.cures`` brings alerts about and cures them, in four minutes.

Real processes on a real Kafka, with what is wrong in each story; a real Prometheus, for which a minute of the rules is
a second. Once all alerts fire, each story does what the runbook says. What is printed is when each alert fired, and how
long after that it was over; the exit code is 1 unless all did and are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from consumer.sandbox.kafka import LocalKafka
from tests.alerts.plots import PLOTS
from tests.alerts.prometheus import Prometheus
from tests.alerts.stories import Stories

FIRE_S: Final = 240.0
CLEAR_S: Final = 240.0
"""Some ask for what happened within the hour, and so are over a minute after their cause."""


def main() -> None:
    """Run the stories, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.alerts.cures")
    parser.add_argument("names", nargs="*", choices=[[], *(plot.name for plot in PLOTS)], metavar="STORY")
    names = parser.parse_args().names or [plot.name for plot in PLOTS]
    with ExitStack() as running:
        folder = running.enter_context(tempfile.TemporaryDirectory())
        kafka, own = running.enter_context(LocalKafka()), running.enter_context(LocalKafka())
        stories = running.enter_context(Stories(kafka, own, Path(folder, "stories")))
        for plot in PLOTS:
            if plot.name in names:
                stories.add(plot)
        stories.open()
        prometheus = running.enter_context(Prometheus(Path(folder, "prometheus"), stories.targets))
        expected = {(job, name) for job, alerts in stories.expected.items() for name in alerts}
        began = time.monotonic()
        fired: dict[tuple[str, str], float] = {}
        while expected - fired.keys() and time.monotonic() < began + FIRE_S:
            for each in _firing(stories, prometheus) - fired.keys():
                fired[each] = time.monotonic() - began
        stories.cure()
        cured = time.monotonic()
        over: dict[tuple[str, str], float] = {}
        while expected - over.keys() and time.monotonic() < cured + CLEAR_S:
            firing = _firing(stories, prometheus)
            over = {each: over.get(each, time.monotonic() - cured) for each in expected - firing}
    for job, name in sorted(expected):
        print(f"{job:17} {name:32} {_shown(fired.get((job, name)))}  {_shown(over.get((job, name)))}")
    sys.exit(0 if expected <= fired.keys() and expected <= over.keys() else 1)


def _firing(stories: Stories, prometheus: Prometheus) -> set[tuple[str, str]]:
    """What fires a second from now, as job and alert."""
    end = time.monotonic() + 1
    while time.monotonic() < end:
        stories.go_on()
        time.sleep(0.02)
    labels = [each["labels"] for each in prometheus.alerts() if each["state"] == "firing"]
    return {(each.get("job", ""), each["alertname"]) for each in labels}


def _shown(seconds: float | None) -> str:
    return "   never" if seconds is None else f"{seconds:6.0f} s"


if __name__ == "__main__":
    main()
