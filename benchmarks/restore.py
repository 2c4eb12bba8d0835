"""The Kafka store under a large state: how long a commit takes, and taking a partition over.

``python -m benchmarks.restore`` starts a broker and lets stage 1 count on one partition, with a commit for every
100,000 events of as many customers. Then a process that knows nothing takes the partition over. Nothing is compacted
meanwhile: each commit's changes lie in the log, so that the state is read together with all that it replaced.

The usual size takes a minute; ``--ids 5000000 --keys 1000000`` is the size that one partition is made for.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, Final

from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import AlterConfigOpType, ConfigEntry, ConfigResource
from confluent_kafka.admin._resource import ResourceType

from benchmarks.aggregate import Stopwatch
from consumer.aggregate.aggregator import LOG_APPEND_TIME, Aggregator, Record, Rules
from consumer.aggregate.duplicates import IDS_PER_CHUNK
from consumer.aggregate.meters import Meter
from consumer.aggregate.meters import Source as Identity
from consumer.sandbox.kafka import LocalKafka
from consumer.storage import Facts, Stage
from consumer.storage.kafka import KafkaStore
from consumer.storage.kafka_reading import committed, ends_of
from consumer.storage.kafka_start import begin
from consumer.storage.kafka_topics import Topics, ensure
from consumer.totals import Destination

SOURCE: Final = "usage"
COMMIT: Final = 100_000
HEAD: Final = 100_000
"""Events of the last commit, which is not compacted."""
COMPACTED_S: Final = 300.0
BATCH: Final = 500
START: Final = 1_790_000_000_000 // 3_600_000 * 3_600_000
METER: Final = Meter(
    name="ai-tokens",
    event_types=("ai.completion",),
    where=(),
    aggregation="sum",
    value=("tokens",),
    decimals=12,
    allow_negative=False,
    customer="subject",
    window="1h",
    lateness=120_000,
    accept_late=86_400_000,
    stripe=Destination("ai_tokens"),
)
RULES: Final = Rules((METER,), 0, 5_000, 86_400_000)
IDENTITY: Final = Identity("cluster", "topic", "bench", 0)
FACTS: Final = Facts("bench", "cluster", SOURCE, "topic", 0, 1, 0)


def records(first: int, last: int, ids: int, keys: int) -> Iterator[list[Record]]:
    """Events of 50 minutes in one window; each one has an id of its own, and the customers take turns."""
    for begin_ in range(first, last, BATCH):
        at = START + begin_ * 3_000_000 // ids
        moment = datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        yield [
            (
                number,
                (LOG_APPEND_TIME, at),
                b"k",
                None,
                b'{"specversion":"1.0","id":"%d","source":"/bench","type":"ai.completion","subject":"cus_%010d",'
                b'"time":"%s","data":{"tokens":%d.25}}' % (number, number % keys, moment.encode(), number % 4_000),
            )
            for number in range(begin_, min(begin_ + BATCH, last))
        ]


def client_of(servers: str) -> dict[str, Any]:
    """The settings of every client."""
    return {"bootstrap.servers": servers, "log_level": 3}


def member(client: dict[str, Any]) -> Consumer:
    """The one member of stage 1's group."""
    assigned: list[object] = []
    consumer = Consumer(
        {
            **client,
            "group.id": Topics.of("bench").group(Stage.AGGREGATE),
            "enable.auto.commit": False,
            "max.poll.interval.ms": 3_600_000,
        }
    )
    consumer.subscribe([SOURCE], on_assign=lambda _, partitions: assigned.extend(partitions))
    while not assigned:
        consumer.poll(0.1)
    return consumer


def fill(store: KafkaStore, aggregator: Aggregator, last: int, ids: int, keys: int) -> list[float]:
    """Count up to this event and commit; returns how long each commit took, in seconds, the core's part included."""
    took: list[float] = []
    for first in range(aggregator.offset, last, COMMIT):
        for batch in records(first, min(first + COMMIT, last), ids, keys):
            aggregator.step(batch, batch[0][1][1])
        began = time.perf_counter()
        store.commit(Stage.AGGREGATE, {0: aggregator.commit()})
        took.append(time.perf_counter() - began)
    return took


def take_over(client: dict[str, Any]) -> None:
    """A stranger's restore; prints what it took."""
    with closing(KafkaStore(client, FACTS, {})) as store:
        stopwatch = Stopwatch()
        restored = store.restore(Stage.AGGREGATE, 0)
        assert restored is not None  # noqa: S101 - it has begun
        read = stopwatch.read()
        aggregator = Aggregator(RULES, IDENTITY, restored.offset, restored.entries)
        took = stopwatch.read()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{aggregator.open_keys:,} open keys and {aggregator.remembered:,} ids taken over in {took['wall']:.1f} s "
        f"({took['cpu']:.1f} s of CPU), of which reading took {read['wall']:.1f} s ({read['cpu']:.1f}); "
        f"memory at most {memory} MB, load {os.getloadavg()[0]:.1f}",
    )


def measure(servers: str, what: str) -> None:
    """The same in a process of its own."""
    print(f"{what}: ", end="", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.restore", "--child", servers], check=True)


def length(client: dict[str, Any], topic: str) -> int:
    """How many records the state's log has, of which there are fewer than offsets."""
    return sum(map(len, committed(client, topic, {0: 0}, ends_of(client, topic, [0]))))


def compact(client: dict[str, Any], topic: str) -> None:
    """From now on everything but what is newest is compacted, as soon as the broker gets round to it."""
    at_once = {"min.compaction.lag.ms": "0", "max.compaction.lag.ms": "1000", "segment.ms": "1000"}
    changes = [ConfigEntry(*each, incremental_operation=AlterConfigOpType.SET) for each in at_once.items()]
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=changes)
    admin = AdminClient(client)
    admin.incremental_alter_configs([resource])[resource].result(30)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=1_000_000, help="events, each with an id to be remembered")
    parser.add_argument("--keys", type=int, default=200_000, help="customers in the open window")
    parser.add_argument("--child", metavar="SERVERS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        take_over(client_of(arguments.child))
        return
    ids, keys = arguments.ids, arguments.keys
    topics = Topics.of("bench")
    state = topics.aggregate_state
    with LocalKafka() as kafka:
        servers = kafka.bootstrap_servers
        client = client_of(servers)
        kafka.create_topic(SOURCE, 1)
        # As wide of compaction as is allowed.
        kafka.create_topic(
            state,
            1,
            cleanup_policy="compact",
            segment_bytes=64 * 2**20,
            min_compaction_lag_ms=600_000,
            max_compaction_lag_ms=3_600_000,
        )
        ensure(client, topics, partitions=1, keep_ms=86_400_000)
        begin(client, FACTS, {0: Aggregator(RULES, IDENTITY, 0).commit()})
        with closing(member(client)) as joined:
            members = {Stage.AGGREGATE: joined.consumer_group_metadata}
            with closing(KafkaStore(client, FACTS, members)) as store:
                restored = store.restore(Stage.AGGREGATE, 0)
                assert restored is not None  # noqa: S101 - it has begun
                aggregator = Aggregator(RULES, IDENTITY, restored.offset, restored.entries)
                commits = fill(store, aggregator, ids, ids, keys)
                print(
                    f"{len(commits)} commits with {min(COMMIT, keys):,} changed keys each: "
                    f"median {statistics.median(commits):.2f} s, longest {max(commits):.2f} s"
                )
                measure(servers, f"nothing compacted, {length(client, state):,} records")
                compact(client, state)
                # The first record behind a segment that is old enough begins the next one.
                time.sleep(1.0)
                fill(store, aggregator, ids + HEAD, ids, keys)
        expected = keys + HEAD + (ids + HEAD) // IDS_PER_CHUNK + 100
        deadline = time.monotonic() + COMPACTED_S
        while (found := length(client, state)) > expected:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{found:,} records are left, not compacted within {COMPACTED_S:.0f} s")
            time.sleep(1.0)
        measure(servers, f"all compacted but the last commit, {found:,} records")


if __name__ == "__main__":
    main()
