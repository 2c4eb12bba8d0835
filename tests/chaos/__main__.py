"""Is every event billed once, whatever happens? Several processes on a real Kafka, faults, and a failing Stripe.

    python -m tests.chaos --events 1000000 --workers 3 --partitions 12 --faults 40 --seed 1 --brokers 3

Half of the faults come while events are counted, half while the last totals are sent, each when so many events or
totals have been seen. The seed draws traffic and faults; what they fall on depends on the moment, so that no two runs
are alike. Ends with 0 if everything agrees; otherwise the folder with all logs is kept.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

from consumer.sandbox.kafka import Kafka, LocalKafka
from consumer.sandbox.kafka_cluster import LocalCluster
from tests.chaos.faults import drawn, possible
from tests.chaos.run import Scenario, prove


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--brokers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--customers", type=int, default=5_000)
    parser.add_argument("--minutes", type=int, default=7, help="of event time that the traffic stretches over")
    parser.add_argument("--rate", type=float, default=8_000, help="events produced per second")
    parser.add_argument("--max-rate", type=int, default=10_000, help="requests per second that each worker may send")
    parser.add_argument("--burst", type=int, default=500, help="requests in a row that a rate limit refuses")
    given = parser.parse_args()
    scenario = Scenario(
        events=given.events,
        customers=given.customers,
        minutes=given.minutes,
        workers=given.workers,
        partitions=given.partitions,
        rate=given.rate,
        burst=given.burst,
        max_rate=given.max_rate,
        seed=given.seed,
    )
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="tallyman-chaos-"))
    cluster: AbstractContextManager[Kafka] = LocalCluster(given.brokers) if given.brokers > 1 else LocalKafka()
    say(f"{scenario}")
    try:
        with cluster as kafka:
            plan = drawn(possible(kafka), given.faults, random.Random(given.seed))  # noqa: S311 - reproducible
            report = prove(kafka, scenario, plan, folder, say)
    except BaseException:
        say(f"not proven. All logs are in {folder}; again: python -m tests.chaos {' '.join(sys.argv[1:])}")
        raise
    print("\n".join(report.lines()))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
