"""A pipeline's logs and state, opened beside whoever is at work on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from consumer.config import Config, SqliteStorage
from consumer.storage import Archive
from consumer.storage.kafka_archive import KafkaArchive
from consumer.storage.sqlite import SqliteStore


@contextmanager
def opened(config: Config, *, now: Callable[[], int]) -> Iterator[Archive]:
    """The configured store, beside a service that may be running, and never created.

    ``now`` gives milliseconds since the epoch. Raises ``StorageError``.
    """
    if isinstance(config.storage, SqliteStorage):
        with SqliteStore.open(config.storage.path, now=now, create=False, lock=False) as store:
            yield store
    else:
        client = {"log_level": "0"} | config.kafka_client()
        with KafkaArchive.open(client, config.pipeline, now=now) as archive:
            yield archive
