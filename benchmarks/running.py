"""What several benchmarks need: processes' CPU time, waiting for a condition, and a backlog that appears at once."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from confluent_kafka import Producer

from consumer.sandbox.kafka import LocalKafka

TICKS: Final = os.sysconf("SC_CLK_TCK")
LOOK_S: Final = 0.2
"""How often we look whether it is so, which takes time from those who work."""


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used so far: all of its threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def until(holds: Callable[[], bool], what: str, *, patience_s: float) -> None:
    """Wait for it."""
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {patience_s:.0f} s: {what}")
        time.sleep(LOOK_S)


@contextmanager
def hidden(
    kafka: LocalKafka, name: str, records: Iterable[Mapping[str, Any]], *, patience_s: float
) -> Iterator[Callable[[], None]]:
    """Inside, these records, as ``produce`` takes them, are in Kafka; nobody sees them until the function is called."""
    settings = {"transactional.id": name, "transaction.timeout.ms": 900_000, "compression.type": "zstd"}
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 3, "linger.ms": 50, **settings})
    producer.init_transactions(30)
    producer.begin_transaction()
    for each in records:
        while True:
            try:
                producer.produce(**each)
                break
            except BufferError:
                producer.poll(0.1)
    until(lambda: not (producer.poll(0.1) or len(producer)), "all is produced", patience_s=patience_s)
    yield lambda: producer.commit_transaction(30)
