"""Pictures of the dashboards for the documentation: ``python -m tests.alerts.pictures`` makes them in eight minutes.

A real service works on a real Kafka in two processes, through an outage of the stand-in for Stripe and the like; a real
Prometheus scrapes it; a browser draws what Prometheus answers to the panels' queries, in the place of Grafana.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Final

from consumer.sandbox.stripe_server import Instead
from consumer.storage import Stage
from tests.alerts.dashboards import ALL
from tests.alerts.drawing import Points, page, picture
from tests.alerts.prometheus import Prometheus
from tests.alerts.rules import ROOT
from tests.alerts.stories import Plot, Scene, Steps, Stories, Usage, backlog, flowing, started, told
from tests.kafka.cluster import running_kafka
from tests.kafka.harness import MINUTE, event, iso, real_now

DOCS: Final = ROOT / "docs"
MINUTES: Final = 8.0


def a_day_in_minutes(scene: Scene) -> Steps:
    """What a dashboard has to show: usage, an outage of Stripe, and what wants a person."""
    stripe = scene.on.stripe
    first, second = scene.services
    first.stages, second.stages = frozenset({Stage.AGGREGATE}), frozenset({Stage.DELIVER})
    for each in scene.services:
        each.config["meters"] = [
            each.config["meters"][0] | {"name": "ai-tokens"},
            {"name": "requests", "event_types": ["used"], "aggregation": "count", "stripe": {"event_name": "requests"}},
        ]
    stripe.model.add_meter("requests")
    stripe.faults.latency = (0.1, 0.35)
    error = {"type": "invalid_request_error", "message": "No such customer: 'cus_9'", "code": "resource_missing"}
    refused = Instead(400, json.dumps({"error": error}).encode())
    stripe.faults.plan = lambda number, _: refused if number in {50, 90, 130} else None
    yield from started(*scene.services)
    backlog(first.topic, 300)
    usage = Usage(first.topic, customers=150)
    yield from flowing(usage, seconds=100)
    usage.produce(time=iso(real_now() - 3 * MINUTE), data={"n": 1234.123456789012})
    usage.broken([event(1, customer=""), b"{", event("many")] * 4)
    yield from flowing(usage, seconds=15, repeat=True)
    stripe.down()
    yield from flowing(usage, seconds=100)
    stripe.up()
    yield from flowing(usage, seconds=60)
    yield from flowing(usage, seconds=30, key=False)
    first.kill()
    yield from flowing(usage, seconds=20)
    yield from started(first)
    yield from flowing(usage, seconds=40)
    Thread(target=told, args=(second, "reconcile"), daemon=True).start()
    yield from flowing(usage)


def main() -> None:
    """Run it, and draw."""
    parser = argparse.ArgumentParser(prog="python -m tests.alerts.pictures")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--to", type=Path, default=DOCS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_kafka() as kafka:
        stories = Stories(kafka, None, Path(folder, "stories"))
        with stories:
            stories.add(Plot("shop", a_day_in_minutes, processes=2, kafka=True))
            with Prometheus(Path(folder, "prometheus"), stories.targets, fast=False) as prometheus:
                end = time.monotonic() + given.minutes * 60
                while time.monotonic() < end:
                    stories.go_on()
                    time.sleep(0.05)
                draw(prometheus, given.to)


def draw(prometheus: Prometheus, to: Path) -> None:
    """Each dashboard as one picture."""
    note = 'Job "shop", two processes; drawn from the answers of a real Prometheus to the queries of the panels.'

    def ask(expr: str, at_this_moment: bool) -> list[tuple[dict[str, str], Points]]:
        query = expr.replace("FILTER", 'job="shop", pipeline=~".+"').replace("$__rate_interval", "15s")
        if at_this_moment:
            return [(labels, [(time.time(), value)]) for labels, value in prometheus.now(query)]
        return prometheus.over_time(query, step=2)

    for each in ALL:
        content, height = page(each, ask, note)
        picture(content, height, to / f"{each.uid}.png")


if __name__ == "__main__":
    main()
