"""The service: both stages, their store and their pages in one process, from start to orderly stop."""

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from consumer.aggregate.aggregator import Aggregator, Rules
from consumer.aggregate.meters import Source as Identity
from consumer.config import Config, SqliteStorage
from consumer.config import CustomerFile as CustomerFileConfig
from consumer.credentials import STRIPE_SECRET_KEY, key_matches
from consumer.deliver.delivery import Delivery
from consumer.runtime import start
from consumer.runtime.clocks import Clock
from consumer.runtime.customers import CustomerFile, Passthrough
from consumer.runtime.http import Http
from consumer.runtime.intake import Intake
from consumer.runtime.metrics import Requests, State
from consumer.runtime.reporter import Reporter
from consumer.runtime.source import Ends, Source, Topic
from consumer.runtime.stripe import Stripe
from consumer.storage import Changes, Facts, Log, Stage
from consumer.storage.sqlite import SqliteStore

log = structlog.get_logger()

STUCK_MS: Final = 120_000
"""A loop that has not gone round for so long will not go round again."""
EXPIRE_EVERY_S: Final = 600.0
READ_BEFORE_MS: Final = 5 * 60_000
"""Reading starts this much before ``bill_from``: an event may arrive before its event time."""
LIVE_RATE: Final = 1_000.0
SANDBOX_RATE: Final = 25.0
"""Meter Events a second that Stripe takes of a live account and of a sandbox."""


class ServiceError(Exception):
    """The service cannot run; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the service takes from outside; the sandbox gives it other ones."""

    clock: Clock
    source: Callable[[Config, str], Source]
    """The source topic as the given group reads it."""


def group_of(config: Config) -> str:
    """The consumer group of stage 1, which holds the witness of how far it has read."""
    return f"tallyman-{config.pipeline}-aggregate"


def kafka_source(config: Config, group: str) -> Source:
    """The source topic on the configured cluster."""
    return Source(config.kafka_client(), config.kafka.topic, group)


def rules_of(config: Config, bill_from: int) -> Rules:
    """The rules of stage 1."""
    windows = config.windows
    return Rules(config.core_meters, bill_from, int(windows.settle), int(windows.deduplicate_for))


def run(config: Config, around: Surroundings) -> None:
    """Run until SIGTERM or SIGINT, then commit and return. Raises the errors of whatever cannot go on."""
    if config.stripe.mode == "shadow":
        raise ServiceError("stripe.mode: shadow is not in this version yet; hold counts without sending")
    key = stripe_key(config)
    source = around.source(config, group_of(config))
    topic = source.describe()
    check_arrival(config, topic)
    # Last of all: what is refused before leaves no empty file behind.
    with SqliteStore.open(storage_path(config), now=around.clock.now, create=True, lock=True) as store:
        asyncio.run(_Service(config, key, around.clock, store, source, topic).run())


def storage_path(config: Config) -> Path:
    """The file of the embedded store."""
    if not isinstance(config.storage, SqliteStorage):
        raise ServiceError("storage.kind is not sqlite")
    return config.storage.path


def check_arrival(config: Config, topic: Topic) -> None:
    """Refuse a topic whose timestamps are not what the configuration relies on."""
    if config.kafka.arrival == "log_append_time" and not topic.log_append_time:
        raise ServiceError(
            f"the topic {topic.name} has message.timestamp.type=CreateTime: its producers date the records, and then a "
            "replay of the log need not give the same totals. Set message.timestamp.type=LogAppendTime on the topic, "
            "or kafka.arrival: create_time in the configuration to accept that."
        )
    if config.kafka.arrival == "create_time" and topic.log_append_time:
        raise ServiceError(
            f"kafka.arrival is create_time, but the topic {topic.name} has message.timestamp.type=LogAppendTime, which "
            "is better: set kafka.arrival: log_append_time."
        )


def stripe_key(config: Config) -> str:
    """The secret key, if it is there and of the stated mode."""
    key = config.secrets.stripe_secret_key
    mode = "live" if config.stripe.livemode else "test"
    if key is None:
        raise ServiceError(
            f"there is no Stripe key: set {STRIPE_SECRET_KEY}, or {STRIPE_SECRET_KEY}_FILE to a file that holds it"
        )
    if not key_matches(config.stripe.livemode, key):
        raise ServiceError(
            f"stripe.livemode is {str(config.stripe.livemode).lower()}, but {STRIPE_SECRET_KEY} is no {mode} key: give "
            f"one that begins with sk_{mode}_ or rk_{mode}_, or correct stripe.livemode"
        )
    return key.get_secret_value()


def begin(config: Config, store: SqliteStore, source: Source, topic: Topic, *, bill_from: int, now: int) -> Facts:
    """The first start: record what the state belongs to and where reading begins, and let the group bear witness."""
    facts = Facts(config.pipeline, topic.cluster_id, topic.name, topic.topic_id, bill_from, topic.partitions, now)
    offsets = source.starts(range(topic.partitions), bill_from - READ_BEFORE_MS)
    store.begin(facts, _unread(config, topic, bill_from, offsets))
    source.commit(offsets, ends_of(store))
    log.info("first_start", pipeline=config.pipeline, bill_from=start.shown(bill_from), offsets=offsets)
    return facts


def ends_of(store: SqliteStore) -> Ends:
    """Where the state's logs end."""
    return Ends(store.end(Log.TOTALS), store.end(Log.OUTCOMES))


def _unread(config: Config, topic: Topic, bill_from: int, offsets: Mapping[int, int]) -> dict[int, Changes]:
    rules = rules_of(config, bill_from)
    return {p: Aggregator(rules, _identity(config, topic, p), offset).commit() for p, offset in offsets.items()}


def _identity(config: Config, topic: Topic, partition: int) -> Identity:
    return Identity(topic.cluster_id, topic.topic_id, config.pipeline, partition)


class _Service:
    def __init__(  # noqa: PLR0917 - each of them once
        self, config: Config, key: str, clock: Clock, store: SqliteStore, source: Source, topic: Topic
    ) -> None:
        self._config = config
        self._key = key
        self._clock = clock
        self._store = store
        self._source = source
        self._topic = topic
        self._stopping = Event()
        self._intake_failure: BaseException | None = None
        self._restoring = True

    async def run(self) -> None:
        config = self._config
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._intake_done = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        stripe = Stripe(self._key, api_base=config.stripe.api_base, livemode=config.stripe.livemode, clock=self._clock)
        registry = CollectorRegistry()
        requests = Requests(registry, grace=int(config.stripe.finalization_grace), clock=self._clock)
        self._intake = intake = Intake(
            self._source,
            self._store,
            clock=self._clock,
            commit_every=int(config.commit_every),
            open_keys=config.limits.open_keys,
            witness=lambda: stripe.date,
            committed=self._tell_reporter,
            ends=lambda: ends_of(self._store),
        )
        customers_file = (
            CustomerFile(config.customers.path) if isinstance(config.customers, CustomerFileConfig) else None
        )
        rate = config.stripe.max_rate or (LIVE_RATE if config.stripe.livemode else SANDBOX_RATE)
        self._reporter = reporter = Reporter(
            self._store,
            Delivery(
                customers=customers_file.customers if customers_file else Passthrough(),
                in_flight=config.limits.in_flight,
                parked_limit=config.limits.parked,
                max_rate=rate,
            ),
            stripe,
            clock=self._clock,
            customers=customers_file,
            hold=config.stripe.mode == "hold",
            observe=requests.observe,
        )
        http = Http(registry, stuck=self._stuck, not_ready=self._not_ready)
        try:
            port = await self._listen(http)
            registry.register(State(intake, reporter, self._clock))
            intake.assign(await asyncio.to_thread(self._restored))
            await asyncio.to_thread(reporter.restore)
            self._restoring = False
            log.info("started", pipeline=config.pipeline, partitions=len(intake.partitions), http_port=port)
            await self._both_stages()
        finally:
            await http.stop()
            await stripe.close()
        log.info("stopped")

    async def _listen(self, http: Http) -> int:
        host, port = self._config.http.host, self._config.http.port
        try:
            return await http.start(host, port)
        except OSError as failed:
            raise ServiceError(f"http: {host}:{port} cannot be listened on: {failed}") from None

    async def _both_stages(self) -> None:
        thread = Thread(target=self._read, name="intake", daemon=True)
        thread.start()
        expiry = asyncio.create_task(self._expire())
        delivering = asyncio.create_task(self._reporter.run(self._stop))
        try:
            await asyncio.wait(
                {delivering, asyncio.ensure_future(self._intake_done.wait())}, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            # Whichever stage ended first, the other one stops in good order.
            self._stopping.set()
            self._stop.set()
            expiry.cancel()
            await self._intake_done.wait()
            await delivering
        if self._intake_failure is not None:
            raise self._intake_failure

    def _tell_reporter(self) -> None:
        self._loop.call_soon_threadsafe(self._reporter.wake)

    def _read(self) -> None:
        try:
            self._intake.run(lambda: self._stopping.is_set() or self._stop.is_set())
        except BaseException as failure:  # noqa: BLE001 - raised again in the main thread, which ends the process
            self._intake_failure = failure
        self._loop.call_soon_threadsafe(self._intake_done.set)

    def _restored(self) -> dict[int, Aggregator]:
        """The partitions as the last commit left them; at the first start, as they begin."""
        config, topic, store = self._config, self._topic, self._store
        place = str(storage_path(config))
        everywhere = range(topic.partitions)
        found = start.Found(
            topic,
            self._source.group,
            self._source.beginnings(everywhere),
            self._source.ends(everywhere),
            self._source.committed(everywhere),
        )
        facts = store.facts()
        if facts is None:
            now = self._clock.now()
            bill_from = start.first_start(config.pipeline, config.bill_from, found, now, place=place)
            facts = begin(config, store, self._source, topic, bill_from=bill_from, now=now)
        else:
            offsets = store.offsets(Stage.AGGREGATE)
            new = start.next_start(config.pipeline, config.bill_from, facts, offsets, found, place=place)
            said = self._source.committed_ends(everywhere)
            start.check_newest(ends_of(store), said, self._source.group, place=place)
            if new:
                offsets = {partition: found.beginnings[partition] for partition in new}
                store.grow(topic.partitions, _unread(config, topic, facts.bill_from, offsets))
                log.info("partitions_added", partitions=list(new))
        rules = rules_of(config, facts.bill_from)
        aggregators: dict[int, Aggregator] = {}
        for partition in range(topic.partitions):
            restored = store.restore(Stage.AGGREGATE, partition)
            if restored is None:
                raise ServiceError(f"{place} has no state of partition {partition}: it is damaged; restore a backup")
            aggregators[partition] = Aggregator(
                rules, _identity(config, topic, partition), restored.offset, restored.entries
            )
        return aggregators

    async def _expire(self) -> None:
        """Delete what has been kept for long enough, a little at a time."""
        while True:
            before = self._clock.now() - int(self._config.limits.keep)
            for each, below in ((Log.TOTALS, self._reporter.read_to), (Log.OUTCOMES, None), (Log.DEAD_LETTERS, None)):
                while await asyncio.to_thread(self._store.expire, each, before, below or self._store.end(each)):
                    pass
            await asyncio.sleep(EXPIRE_EVERY_S)

    def _stuck(self) -> list[str]:
        if self._restoring:
            return []
        elapsed = self._clock.elapsed()
        turned = {"aggregate": self._intake.turned, "deliver": self._reporter.turned}
        return [
            f"the loop of stage {stage} has not gone round for {(elapsed - at) // 1000} s"
            for stage, at in turned.items()
            if elapsed - at > STUCK_MS
        ]

    def _not_ready(self) -> list[str]:
        if self._restoring:
            return ["the state is being restored"]
        reasons = [
            f"partition {number} waits: its records are dated ahead of this host's clock"
            for number, partition in self._intake.partitions.items()
            if partition.held
        ]
        if self._intake.kafka_silent_since is not None:
            reasons.append(f"Kafka has not answered since {start.shown(self._intake.kafka_silent_since)}")
        if self._reporter.delivery.shut:
            reasons.append(f"nothing is sent to Stripe but single attempts: {self._reporter.delivery.shut}")
        elif self._reporter.delivery.paused:
            reasons.append(f"nothing is sent to Stripe: {self._reporter.delivery.paused}")
        return reasons
