"""A pipeline's logs and state, opened beside whoever is at work on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from consumer.config import Config, SqliteStorage
from consumer.storage import Archive
from consumer.storage.kafka_archive import KafkaArchive
from consumer.storage.sqlite import SqliteStore


def client_of(config: Config) -> dict[str, Any]:
    """The settings of Kafka's client in a command: that raises what is wrong, and lines beside it would be noise."""
    return {"log_level": "0"} | config.kafka_client()


@contextmanager
def opened(config: Config, *, now: Callable[[], int]) -> Iterator[Archive]:
    """The configured store, beside a service that may be running, and never created.

    ``now`` gives milliseconds since the epoch. Raises ``StorageError``.
    """
    if isinstance(config.storage, SqliteStorage):
        with SqliteStore.open(config.storage.path, now=now, create=False, lock=False) as store:
            yield store
    else:
        with KafkaArchive.open(client_of(config), config.pipeline, now=now) as archive:
            yield archive
