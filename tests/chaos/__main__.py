"""Is every event billed once, whatever happens? Several processes on a real Kafka, faults, and a failing Stripe.

    python -m tests.chaos --events 1000000 --workers 3 --partitions 12 --faults 40 --seed 1 --brokers 3

Half of the faults come while events are counted, half while the last totals are sent, each when so many events or
totals have been seen. The seed draws traffic and faults; what they fall on depends on the moment, so that no two runs
are alike. Ends with 0 if everything agrees; otherwise the folder with all logs is kept.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from consumer.sandbox.kafka import Kafka, LocalKafka
from consumer.sandbox.kafka_cluster import LocalCluster
from tests.chaos.faults import drawn, possible
from tests.chaos.run import Scenario, prove
from tests.exactness.scenario import options, scenario, stamped


def main() -> None:
    """The command line."""
    parser = options("python -m tests.chaos", __doc__)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--brokers", type=int, default=3)
    parser.add_argument("--max-rate", type=int, default=10_000, help="requests per second that each worker may send")
    given = parser.parse_args()
    asked, say = scenario(Scenario, given), stamped()
    folder = Path(tempfile.mkdtemp(prefix="tallyman-chaos-"))
    cluster: AbstractContextManager[Kafka] = LocalCluster(given.brokers) if given.brokers > 1 else LocalKafka()
    say(f"{asked}")
    try:
        with cluster as kafka:
            plan = drawn(possible(kafka), given.faults, random.Random(given.seed))  # noqa: S311 - reproducible
            report = prove(kafka, asked, plan, folder, say)
    except BaseException:
        say(f"not proven. All logs are in {folder}; again: python -m tests.chaos {' '.join(sys.argv[1:])}")
        raise
    print("\n".join(report.lines()))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
