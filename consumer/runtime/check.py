"""Everything that can be wrong before a start, without changing anything; also beside a service that is running."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from consumer.config import Config, CustomerFile
from consumer.runtime import customers, embedded, processors, service, start
from consumer.runtime.clocks import Clock
from consumer.runtime.source import Source, SourceError, Topic
from consumer.storage import Stage, StorageError
from consumer.storage.sqlite import SqliteStore
from consumer.storage.sqlite_file import held_by

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. Where it is not right, ``says`` ends with what to do."""

    level: Level
    what: str
    says: str


def check(config: Config, source: Source, clock: Clock) -> Iterator[Finding]:
    """Look at everything that `run` depends on, in the order in which it would fail."""
    path = service.storage_path(config)
    holder = None
    try:
        holder = held_by(path)
        yield from _storage(path, clock, holder)
    except StorageError as wrong:
        yield Finding("error", "storage", str(wrong))
    try:
        topic = source.describe()
        yield Finding(
            "ok",
            "kafka",
            f"{config.kafka.bootstrap_servers}, cluster {topic.cluster_id}: {topic.name} has {topic.partitions} "
            f"partition{'s' * (topic.partitions != 1)}",
        )
        yield _judged("arrival", lambda: _arrival(config, topic), service.ServiceError)
        yield _judged("start", lambda: _start(config, path, source, topic, clock), start.StartRefused, StorageError)
    except SourceError as wrong:
        yield Finding("error", "kafka", str(wrong))
    yield _judged("stripe", lambda: _stripe(config), service.ServiceError)
    yield from _mode(config)
    yield from _memory(config)
    yield _judged("customers", lambda: _customers(config), customers.CustomerFileError)
    if holder is None:
        yield _http(config.http.host, config.http.port)


def _judged(what: str, look: Callable[[], str], *refusals: type[Exception]) -> Finding:
    try:
        return Finding("ok", what, look())
    except refusals as refused:
        return Finding("error", what, str(refused))


def _storage(path: Path, clock: Clock, holder: str | None) -> Iterator[Finding]:
    place = path.resolve()
    if not place.parent.is_dir():
        yield Finding(
            "error", "storage", f"there is no directory {place.parent}: create or mount it, or correct storage.path"
        )
        return
    if not os.access(place.parent, os.W_OK | os.X_OK) or (place.exists() and not os.access(place, os.W_OK)):
        yield Finding("error", "storage", f"{path} cannot be written by this user: make it and its directory writable")
        return
    if place.exists():
        with SqliteStore.open(path, now=clock.now, create=False, lock=False) as store:
            store.facts()
        state = f"{path}, {place.stat().st_size / 2**20:.1f} MB"
    else:
        state = f"{path} does not exist yet; its directory is writable"
    yield Finding("ok", "storage", f"{state}, {f'in use by {holder}' if holder else 'in use by nobody'}")


def _arrival(config: Config, topic: Topic) -> str:
    service.check_arrival(config, topic)
    if topic.log_append_time:
        return "the broker dates the records (LogAppendTime)"
    return "producers date the records (CreateTime), as kafka.arrival states: a replay may give other totals"


def _start(config: Config, path: Path, source: Source, topic: Topic, clock: Clock) -> str:
    """What `run` would say; asked in an order in which a service that goes on meanwhile raises no false alarm."""
    everywhere = range(topic.partitions)
    beginnings, committed = source.beginnings(everywhere), source.committed(everywhere)
    said = source.committed_ends(everywhere)
    facts, offsets = None, {}
    if path.exists() and path.stat().st_size:
        with SqliteStore.open(path, now=clock.now, create=False, lock=False) as store:
            facts, offsets = store.facts(), store.offsets(Stage.AGGREGATE)
            if facts is not None:
                start.check_newest(embedded.ends_of(store), said, source.group, place=str(path))
    ends = source.ends(everywhere)
    found = start.Found(topic, source.group, beginnings, ends, committed)
    if facts is None:
        bill_from = start.first_start(config.pipeline, config.bill_from, found, clock.now(), place=str(path))
        first = source.starts(everywhere, bill_from - processors.READ_BEFORE_MS)
        unread = sum(ends[partition] - offset for partition, offset in first.items())
        return f"a first start: events from {start.shown(bill_from)} on are billed, about {unread} records are there"
    added = start.next_start(config.pipeline, config.bill_from, facts, offsets, found, place=str(path))
    unread = sum(ends[partition] - offsets.get(partition, beginnings[partition]) for partition in everywhere)
    new = f", {len(added)} of the partitions are new" if added else ""
    return (
        f"goes on where it stopped, billing since {start.shown(facts.bill_from)}: about {unread} records to read{new}"
    )


def _stripe(config: Config) -> str:
    service.stripe_key(config)
    money = "live mode: customers are billed" if config.stripe.livemode else "a sandbox: nobody is billed"
    return f"the key is of the stated mode, {money}"


def _mode(config: Config) -> Iterator[Finding]:
    if config.stripe.mode == "hold":
        yield Finding("warning", "stripe", "stripe.mode is hold: totals are kept and nothing is sent; send sends them")
    elif config.stripe.mode == "shadow":
        yield Finding("error", "stripe", "stripe.mode: shadow is not in this version yet; hold counts without sending")


def _memory(config: Config) -> Iterator[Finding]:
    for meter in config.core_meters:
        if meter.accept_late > config.windows.deduplicate_for:
            yield Finding(
                "warning",
                "duplicates",
                f"{meter.name} accepts events longer (accept_late) than their ids are remembered (deduplicate_for): a "
                "topic that is produced again in between is billed twice; raise deduplicate_for or lower accept_late",
            )


def _customers(config: Config) -> str:
    if not isinstance(config.customers, CustomerFile):
        return "events name Stripe customers themselves"
    known = customers.CustomerFile(config.customers.path).customers
    return f"{config.customers.path} names {len(known)} customers"


def _http(host: str, port: int) -> Finding:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as failed:
        return Finding(
            "error",
            "http",
            f"{host}:{port} cannot be listened on ({failed.strerror}): end what does, or change http.port",
        )
    return Finding("ok", "http", f"{host}:{port} is free")
