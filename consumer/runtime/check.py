"""Everything that can be wrong before a start, without changing anything; also beside a service that is running."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from consumer.config import Config, CustomerFile, SqliteStorage
from consumer.config_values import Duration
from consumer.runtime import customers, embedded, preconditions, processors, start, stripe_check
from consumer.runtime.archive import client_of
from consumer.runtime.clocks import Clock
from consumer.runtime.findings import Finding
from consumer.runtime.source import Source, SourceError, Topic
from consumer.storage import Facts, Stage, StorageError
from consumer.storage.kafka_archive import told
from consumer.storage.kafka_reading import ends_of, members_of
from consumer.storage.kafka_start import check_empty, newest, positions
from consumer.storage.kafka_topics import Topics, faults, present
from consumer.storage.sqlite import SqliteStore
from consumer.storage.sqlite_file import held_by

SHORTEST_MS: Final = 3 * 86_400_000
"""A weekend, and a day to put things right."""


def check(config: Config, source: Source, clock: Clock) -> Iterator[Finding]:
    """Look at everything that `run` depends on, in the order in which it would fail."""
    path = config.storage.path if isinstance(config.storage, SqliteStorage) else None
    holder = None
    if path is not None:
        try:
            holder = held_by(path)
            yield from _file(path, clock, holder)
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
        yield _judged("arrival", lambda: _arrival(config, topic), preconditions.ServiceError)
        yield _kept(config, topic)
        if path is None:
            holder = _members(config)
            yield _judged("storage", lambda: _topics(config, holder), StorageError)
        yield _judged("start", lambda: _start(config, path, source, topic, clock), start.StartRefused, StorageError)
    except SourceError as wrong:
        yield Finding("error", "kafka", str(wrong))
    except StorageError as wrong:
        yield Finding("error", "storage", str(wrong))
    yield from _stripe(config, clock)
    yield from _mode(config)
    yield from _memory(config)
    yield _judged("customers", lambda: _customers(config), customers.CustomerFileError)
    if holder is None:
        yield _free("http", config.http.host, config.http.port)
    yield from _webhook(config, holder)


def _judged(what: str, look: Callable[[], str], *refusals: type[Exception]) -> Finding:
    try:
        return Finding("ok", what, look())
    except refusals as refused:
        return Finding("error", what, str(refused))


def _file(path: Path, clock: Clock, holder: str | None) -> Iterator[Finding]:
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
    preconditions.check_arrival(config, topic)
    if topic.log_append_time:
        return "the broker dates the records (LogAppendTime)"
    return "producers date the records (CreateTime), as kafka.arrival states: a replay may give other totals"


def _kept(config: Config, topic: Topic) -> Finding:
    try:
        preconditions.check_cleanup(topic)
    except preconditions.ServiceError as wrong:
        return Finding("error", "retention", str(wrong))
    ids = f"ids are remembered for {config.windows.deduplicate_for} (deduplicate_for)"
    if topic.retention_ms < 0:
        return Finding("ok", "retention", f"records are kept for ever, {ids}")
    kept = Duration(topic.retention_ms)
    if topic.retention_ms < SHORTEST_MS:
        return Finding(
            "warning",
            "retention",
            f"{topic.name} keeps records for {kept} (retention.ms): usage that is not read by then, because the "
            f"service is down or held up, is lost. Keep them for {Duration(SHORTEST_MS)} at least",
        )
    if topic.retention_ms < config.windows.deduplicate_for:
        return Finding(
            "warning",
            "retention",
            f"{ids}, longer than {topic.name} keeps records ({kept}): after `tallyman reset` nobody can tell what has "
            "come before and comes again. Raise retention.ms to deduplicate_for",
        )
    return Finding("ok", "retention", f"records are kept for {kept}, {ids}")


def _members(config: Config) -> str | None:
    """Which processes run the stages; None where there is none."""
    found = {stage: told(members_of(client_of(config), Topics.of(config.pipeline).group(stage))) for stage in Stage}
    return "; ".join(f"{stage} by {hosts}" for stage, hosts in found.items() if hosts) or None


def _topics(config: Config, holder: str | None) -> str:
    client, topics = client_of(config), Topics.of(config.pipeline)
    found = present(client, topics)
    missing = [topic for topic in topics.all if topic not in found]
    wrong = faults(client, topics, found, keep_ms=int(config.limits.keep))
    if wrong:
        raise StorageError("\n".join(wrong))
    if missing and any(any(ends_of(client, topic, range(count)).values()) for topic, count in found.items()):
        raise StorageError(
            f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not there, but the pipeline has run: bring "
            "back what was deleted from a backup; `tallyman reset --bill-from T` starts over with events from T on."
        )
    if missing:
        return f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not there yet: the first start creates them"
    return f"{len(found)} topics are as they have to be, in use{f': {holder}' if holder else ' by nobody'}"


class _State(NamedTuple):
    """What the state says of stage 1, and where it is."""

    place: str
    facts: Facts | None = None
    offsets: Mapping[int, int] = {}


def _start(config: Config, path: Path | None, source: Source, topic: Topic, clock: Clock) -> str:
    """What `run` would say; asked in an order in which a service that goes on meanwhile raises no false alarm."""
    everywhere = range(topic.partitions)
    beginnings, committed = source.beginnings(everywhere), source.committed(everywhere)
    state = _in_topics(config, topic) if path is None else _in_file(path, source, topic, clock)
    ends = source.ends(everywhere)
    found = start.Found(topic, source.group, beginnings, ends, committed)
    if state.facts is None:
        bill_from = start.first_start(config.pipeline, config.bill_from, found, clock.now(), place=state.place)
        first = source.starts(everywhere, bill_from - processors.READ_BEFORE_MS)
        unread = sum(ends[partition] - offset for partition, offset in first.items())
        return f"a first start: events from {start.shown(bill_from)} on are billed, about {unread} records are there"
    added = start.next_start(config.pipeline, config.bill_from, state.facts, state.offsets, found, place=state.place)
    unread = sum(ends[partition] - state.offsets.get(partition, beginnings[partition]) for partition in everywhere)
    new = f", {len(added)} of the partitions are new" if added else ""
    return (
        f"goes on where it stopped, billing since {start.shown(state.facts.bill_from)}: about {unread} records to "
        f"read{new}"
    )


def _in_file(path: Path, source: Source, topic: Topic, clock: Clock) -> _State:
    said = source.committed_ends(range(topic.partitions))
    if not path.exists() or not path.stat().st_size:
        return _State(str(path))
    with SqliteStore.open(path, now=clock.now, create=False, lock=False) as store:
        facts = store.facts()
        if facts is not None:
            start.check_newest(embedded.ends_of(store), said, source.group, place=str(path))
        return _State(str(path), facts, store.offsets(Stage.AGGREGATE))


def _in_topics(config: Config, topic: Topic) -> _State:
    client, topics = client_of(config), Topics.of(config.pipeline)
    found = present(client, topics)
    if found.keys() != set(topics.all):
        return _State(topics.aggregate_state)
    at = positions(client, topics, Stage.AGGREGATE)
    if not at:
        check_empty(client, topics, source=topic.name, partitions=topic.partitions)
        return _State(topics.aggregate_state)
    delivered = positions(client, topics, Stage.DELIVER)
    for partition, end in ends_of(client, topics.totals, range(found[topics.totals])).items():
        if (position := delivered.get(partition)) is None or position.offset > end:
            read = f"was read up to {position.offset} and ends at {end}" if position else "has never begun to be read"
            raise StorageError(
                f"partition {partition} of {topics.totals} {read}: totals or the state of stage 2 were lost. Bring the "
                "topics back from a backup; `tallyman reset --bill-from T` starts over with events from T on."
            )
    return _State(topics.aggregate_state, newest(at), {partition: each.offset for partition, each in at.items()})


def _stripe(config: Config, clock: Clock) -> Iterator[Finding]:
    try:
        key = preconditions.stripe_key(config)
    except preconditions.ServiceError as wrong:
        yield Finding("error", "stripe", str(wrong))
    else:
        money = "live mode: customers are billed" if config.stripe.livemode else "a sandbox: nobody is billed"
        yield Finding("ok", "stripe", f"the key is of the stated mode, {money}")
        yield from stripe_check.findings(config, key, clock)
    yield stripe_check.rate(config)


def _mode(config: Config) -> Iterator[Finding]:
    if config.stripe.mode == "hold":
        yield Finding("warning", "stripe", "stripe.mode is hold: totals are kept and nothing is sent; send sends them")
    elif config.stripe.mode == "shadow":
        yield Finding(
            "warning",
            "stripe",
            "stripe.mode is shadow: nothing is sent, somebody else has to bill; `tallyman reconcile` compares",
        )


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


def _webhook(config: Config, holder: str | None) -> Iterator[Finding]:
    if config.webhook is None:
        return
    try:
        secrets = preconditions.webhook_secrets(config)
    except preconditions.ServiceError as wrong:
        yield Finding("error", "webhook", str(wrong))
    else:
        known = "a secret" if len(secrets) == 1 else f"one of {len(secrets)} secrets"
        yield Finding("ok", "webhook", f"Stripe's notifications are taken where they are signed with {known}")
    if holder is None:
        yield _free("webhook", config.webhook.host, config.webhook.port)


def _free(section: str, host: str, port: int) -> Finding:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as failed:
        return Finding(
            "error",
            section,
            f"{host}:{port} cannot be listened on ({failed.strerror}): end what does, or change {section}.port",
        )
    return Finding("ok", section, f"{host}:{port} is free")
