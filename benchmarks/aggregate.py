"""Stage 1 from a real Kafka, beside two ceilings: the client alone, and the client with a typed decode.

``python -m benchmarks.aggregate`` starts a broker, fills a topic with a dense log (hundreds of events in each total)
and reads it in turn with each candidate, a process of its own each time, held on one core; the broker has the others.

    consume   consume(500) and value() of each record
    decode    the same, and one typed decode of the members that the meter needs
    stage 1   the service's intake with its store: decode, duplicates, windows, exact sums, commits every five seconds

Reported are medians of interleaved rounds. Times run from the first to the last record.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from consumer.aggregate.aggregator import Aggregator, Rules
from consumer.aggregate.meters import Meter
from consumer.aggregate.meters import Source as Identity
from consumer.events import Decoder
from consumer.runtime.clocks import SystemClock
from consumer.runtime.intake import BATCH, BATCH_S, Intake
from consumer.runtime.membership import Alone
from consumer.runtime.source import Source
from consumer.sandbox.kafka import LocalKafka
from consumer.sandbox.traffic import Message, produce
from consumer.storage import Facts
from consumer.storage.sqlite import SqliteStore
from consumer.totals import Destination

TOPIC: Final = "usage"
PARTITIONS: Final = 4
CUSTOMERS: Final = 200
WINDOWS: Final = 10
CANDIDATES: Final = ("consume", "decode", "stage 1")

METER: Final = Meter(
    name="ai-tokens",
    event_types=("ai.completion",),
    where=(),
    aggregation="sum",
    value=("tokens", "total"),
    decimals=12,
    allow_negative=False,
    customer="subject",
    window="1m",
    lateness=120_000,
    accept_late=86_400_000,
    stripe=Destination("ai_tokens"),
)


def events(number: int, end: int, partitions: int = PARTITIONS) -> Iterator[Message]:
    """Events of ten minutes that end at ``end`` (ms), a third with decimals, two in a hundred sent twice."""
    rng = random.Random(1)  # noqa: S311 - a benchmark wants the same events each time
    start = end - WINDOWS * 60_000
    last: list[Message] = []
    for position in range(number):
        if last and rng.random() < 0.02:
            yield last.pop()._replace(timestamp_ms=start + position * WINDOWS * 60_000 // number)
            continue
        at = start + position * WINDOWS * 60_000 // number
        moment = datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        customer = rng.randrange(CUSTOMERS)
        value = f"{rng.random() * 100:.6f}" if position % 3 == 0 else str(rng.randrange(1, 4000))
        body = (
            f'{{"specversion":"1.0","id":"{rng.getrandbits(64):016x}-{position}","source":"/services/completions/eu-west-1",'
            f'"type":"ai.completion","time":"{moment}.{at % 1000:03d}Z","subject":"cus_{customer:06d}",'
            f'"datacontenttype":"application/json","data":{{"model":"gpt-5","region":"eu-west-1","tokens":'
            f'{{"prompt":812,"completion":155,"total":{value}}}}}}}'
        )
        # As brokers date them: a batch at a time.
        arrival = at - at % 100 + 100
        message = Message(b"cus_%06d" % customer, customer % partitions, arrival, [], body.encode())
        if not position % 50:
            last = [message]
        yield message


def ceiling(servers: str, number: int, *, decode: bool) -> dict[str, float]:
    """The client alone, or with a typed decode."""
    from confluent_kafka import TopicPartition  # noqa: PLC0415 - only the children need it

    consumer = Source({"bootstrap.servers": servers}, TOPIC, "ceiling").consumer()
    consumer.assign([TopicPartition(TOPIC, p, 0) for p in range(PARTITIONS)])
    typed = Decoder({("tokens", "total")}, {"subject"}).typed
    seen = 0
    stopwatch = None
    while seen < number:
        messages = consumer.consume(BATCH, BATCH_S)
        if messages and stopwatch is None:
            stopwatch = Stopwatch()
        for message in messages:
            if message.error() is not None:
                continue
            value = message.value()
            if decode and value is not None:
                typed(value)
            seen += 1
    return (stopwatch or Stopwatch()).read()


def stage_1(servers: str, number: int) -> dict[str, float]:
    """The intake of the service, with its store."""
    clock = SystemClock()
    rules = Rules((METER,), 0, 5_000, 86_400_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tallyman.db"
        with SqliteStore.open(path, now=clock.now, create=True, lock=True) as store:
            aggregators = {p: Aggregator(rules, Identity("c", "t", "bench", p), 0) for p in range(PARTITIONS)}
            facts = Facts("bench", "c", TOPIC, "t", 0, PARTITIONS, clock.now())
            store.begin(facts, {p: each.commit() for p, each in aggregators.items()})
            intake = Intake(
                Source({"bootstrap.servers": servers}, TOPIC, "bench"),
                store,
                Alone(PARTITIONS),
                lambda partition, _: aggregators[partition],
                clock=clock,
                commit_every=5_000,
                open_keys=2_000_000,
                witness=lambda: None,
                committed=lambda: None,
            )
            stopwatch: list[Stopwatch] = []
            result: list[dict[str, float]] = []

            def done() -> bool:
                read = sum(each.book.consumed for each in aggregators.values())
                if read and not stopwatch:
                    stopwatch.append(Stopwatch())
                return read >= number

            intake.run(done)
            result.append(stopwatch[0].read())
            for each in aggregators.values():
                each.check()
    return result[0]


class Stopwatch:
    """Wall time and CPU time of this process, all threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds since it was made."""
        return {"wall": time.perf_counter() - self._wall, "cpu": time.process_time() - self._cpu}


def measure(candidate: str, servers: str, number: int) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.aggregate", "--child", candidate, servers, "--events", str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(candidate: str, servers: str, number: int) -> None:
    """What runs in that process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if candidate == "stage 1":
        print(json.dumps(stage_1(servers, number)))
    else:
        print(json.dumps(ceiling(servers, number, decode=candidate == "decode")))


def report(figures: Mapping[str, list[dict[str, float]]], number: int) -> None:
    """The table, and the one ratio that counts."""
    median: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu")}
        for name, runs in figures.items()
    }
    ratios = [
        decode["wall"] / whole["wall"] for decode, whole in zip(figures["decode"], figures["stage 1"], strict=True)
    ]
    print(f"\n{'':10}{'events/s':>12}{'CPU s per million':>20}{'of consume':>12}{'of decode':>12}")
    for name, each in median.items():
        of = [median[other]["wall"] / each["wall"] for other in ("consume", "decode")]
        print(
            f"{name:10}{number / each['wall']:>12,.0f}{each['cpu'] / number * 1e6:>20.2f}{of[0]:>12.0%}{of[1]:>12.0%}"
        )
    print(
        f"\nstage 1 at {statistics.median(ratios):.0%} of the decode ceiling (median of {len(ratios)} rounds, ", end=""
    )
    print(
        f"{min(ratios):.0%} to {max(ratios):.0%}), {number:,} events, {number // (CUSTOMERS * WINDOWS)} in each total"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("CANDIDATE", "SERVERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        candidate, servers = arguments.child
        child(candidate, servers, arguments.events)
        return
    with LocalKafka() as kafka:
        kafka.create_topic(TOPIC, PARTITIONS, arrival="create_time")
        print(f"producing {arguments.events:,} events …", flush=True)
        produce(kafka.bootstrap_servers, TOPIC, events(arguments.events, int(time.time() * 1000)))
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES}
        for number in range(arguments.rounds):
            for name in CANDIDATES:
                figures[name].append(measure(name, kafka.bootstrap_servers, arguments.events))
                print(f"round {number + 1}: {name} took {figures[name][-1]['wall']:.2f} s", flush=True)
    report(figures, arguments.events)


if __name__ == "__main__":
    main()
