"""What it costs to share the work: CPU time of stage 1 on the Kafka store, by two processes against one.

``python -m benchmarks.scaling`` starts a broker and, for each run, as many processes of ``tallyman run --stage
aggregate`` as it says, each held on a core of its own; the broker is where it likes. The events (the dense log of
``benchmarks.aggregate``, on 12 partitions) lie in a transaction that is open until the processes have shared out the
partitions, so that all of them begin at the same moment and at the beginning.

Measured is the CPU time of the processes, all threads, user and system, from that moment until the group's offsets say
that all events are counted and committed. Starting, joining and taking over are not in it; heartbeats, commits and
waiting are. Reported are medians of interleaved rounds, and the ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.aggregate import CUSTOMERS, WINDOWS, events
from benchmarks.running import cpu_of, hidden, until
from consumer.sandbox.kafka import LocalKafka, free_ports
from consumer.sandbox.traffic import Message
from consumer.storage import Stage
from consumer.storage.kafka_topics import Topics

PARTITIONS: Final = 12
TARGET: Final = 1.25
PATIENCE_S: Final = 180.0


class Run(NamedTuple):
    """What one run took, in seconds."""

    cpu: float
    wall: float


class Worker:
    """One process of stage 1."""

    def __init__(self, folder: Path, config: dict[str, Any], core: int) -> None:
        port, _ = free_ports()
        self._url = f"http://127.0.0.1:{port}/metrics"
        file = folder / f"{port}.yaml"
        file.write_text(json.dumps(config | {"http": {"host": "127.0.0.1", "port": port}}))
        self._log = folder / f"{port}.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "consumer", "run", "-c", str(file), "--stage", str(Stage.AGGREGATE)]
            self._process = subprocess.Popen(command, stderr=log)
        os.sched_setaffinity(self._process.pid, {core})

    def partitions(self) -> int:
        """How many it has taken over."""
        if self._process.poll() is not None:
            raise RuntimeError(f"a process has ended:\n{self._log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(self._url, timeout=5) as answer:  # noqa: S310 - our own page
                families = list(text_string_to_metric_families(answer.read().decode()))
        except OSError:
            return 0
        return sum(int(s.value) for each in families for s in each.samples if s.name == "tallyman_owned_partitions")

    def cpu(self) -> float:
        """Seconds that it has used so far: all of its threads, user and system."""
        return cpu_of(self._process.pid)

    def stop(self) -> None:
        """In good order."""
        self._process.terminate()
        self._process.wait(30)


def run(kafka: LocalKafka, topic: str, workers: int, messages: Sequence[Message]) -> Run:
    """Count these events with so many processes."""
    cores, settings = sorted(os.sched_getaffinity(0)), config(kafka, topic)
    kafka.create_topic(topic, PARTITIONS, arrival="create_time")
    records = (
        {"topic": topic, "value": m.value, "key": m.key, "partition": m.partition, "timestamp": m.timestamp_ms}
        for m in messages
    )
    with (
        hidden(kafka, topic, records, patience_s=PATIENCE_S) as show,
        tempfile.TemporaryDirectory() as folder,
        ExitStack() as started,
    ):
        crew = []
        for number in range(workers):
            crew.append(Worker(Path(folder), settings, cores[number]))
            started.callback(crew[-1].stop)
        fair = [PARTITIONS // workers] * workers
        until(
            lambda: [each.partitions() for each in crew] == fair, "all partitions are shared out", patience_s=PATIENCE_S
        )
        before, began = [each.cpu() for each in crew], time.perf_counter()
        show()
        until_committed(kafka, topic, len(messages))
        took = time.perf_counter() - began
        return Run(sum(each.cpu() for each in crew) - sum(before), took)


def config(kafka: LocalKafka, topic: str) -> dict[str, Any]:
    """What the processes run on: everything else as it is by default."""
    return {
        "pipeline": topic,
        "bill_from": f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}T00:00:00Z",
        "kafka": {"bootstrap_servers": kafka.bootstrap_servers, "topic": topic, "arrival": "create_time"},
        "storage": {"kind": "kafka"},
        "meters": [
            {
                "name": "ai-tokens",
                "event_types": ["ai.completion"],
                "aggregation": "sum",
                "value": "$.tokens.total",
                "stripe": {"event_name": "ai_tokens"},
            }
        ],
        "stripe": {"livemode": False},
    }


def until_committed(kafka: LocalKafka, topic: str, number: int) -> None:
    """Wait until the group has committed so many events."""
    partitions = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
    consumer = Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": Topics.of(topic).group(Stage.AGGREGATE)}
    )
    try:
        until(
            lambda: sum(max(0, each.offset) for each in consumer.committed(partitions, timeout=30)) >= number,
            f"{number} events are committed",
            patience_s=PATIENCE_S,
        )
    finally:
        consumer.close()


def report(runs: dict[int, list[Run]], number: int) -> None:
    """The table, and the one ratio that counts."""
    print(f"\n{'processes':10}{'CPU s per million':>20}")
    for workers, each in runs.items():
        print(f"{workers:<10}{statistics.median(one.cpu for one in each) / number * 1e6:>20.2f}")
    one, two = ([each.cpu for each in runs[workers]] for workers in (1, 2))
    ratios = [both / alone for alone, both in zip(one, two, strict=True)]
    print(
        f"\ntwo processes take {statistics.median(two) / statistics.median(one):.2f} times the CPU time of one "
        f"(rounds: {min(ratios):.2f} to {max(ratios):.2f}; at most {TARGET} is wanted), {number:,} events, "
        f"{number // (CUSTOMERS * WINDOWS)} in each total"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two processes on a core of their own need two cores")
    messages = list(events(arguments.events, int(time.time() * 1000), PARTITIONS))
    runs: dict[int, list[Run]] = {1: [], 2: []}
    names = count()
    with LocalKafka() as kafka:
        for number in range(arguments.rounds):
            for workers, done in runs.items():
                done.append(run(kafka, f"usage-{next(names)}", workers, messages))
                cpu, wall = done[-1]
                load = os.getloadavg()[0]
                print(
                    f"round {number + 1}: {workers} took {cpu:.2f} s of CPU, {wall:.1f} s (load {load:.1f})", flush=True
                )
    report(runs, arguments.events)


if __name__ == "__main__":
    main()
