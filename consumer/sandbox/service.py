"""The real service on the embedded broker, composed with what that broker cannot tell.

The embedded broker has no cluster id, no topic ids, no LogAppendTime and no offsets by time. Here, and nowhere else,
the service does without them. ``python -m consumer.sandbox.service CONFIG`` runs it as a process of its own, so that
the demo can kill it.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from consumer.config import Config, load
from consumer.runtime import service
from consumer.runtime.clocks import SystemClock
from consumer.runtime.source import Source, Topic
from consumer.sandbox.broker import PARTITIONS


class EmbeddedSource(Source):
    """A topic of the embedded broker."""

    def describe(self) -> Topic:
        """Its four partitions; the rest is made up."""
        return Topic("embedded", self.topic, self.topic, PARTITIONS, log_append_time=False)

    def beginnings(self, partitions: Iterable[int]) -> dict[int, int]:
        """Nothing is ever deleted."""
        return dict.fromkeys(partitions, 0)

    def topic_now(self, timeout: float) -> tuple[str, int]:  # noqa: ARG002 - nothing is asked
        """As described."""
        return self.topic, PARTITIONS

    def starts(self, partitions: Iterable[int], time: int) -> dict[int, int]:  # noqa: ARG002 - it cannot look up times
        """The whole log."""
        return dict.fromkeys(partitions, 0)


def source(config: Config, group: str) -> Source:
    """The source topic on the embedded broker."""
    return EmbeddedSource(config.kafka_client(), config.kafka.topic, group)


if __name__ == "__main__":
    service.run(load(Path(sys.argv[1]), os.environ), service.Surroundings(SystemClock(), source))
