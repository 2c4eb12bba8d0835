"""The service: the stages, their store and their pages in one process, from start to orderly stop."""

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from threading import Event, Thread
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector

from consumer.config import Config, SqliteStorage
from consumer.config import CustomerFile as CustomerFileConfig
from consumer.config import Http as HttpConfig
from consumer.config import Webhook as WebhookConfig
from consumer.deliver.customers import Customers
from consumer.deliver.delivery import Delivery
from consumer.deliver.pacing import Outlet
from consumer.runtime import archive, distributed, embedded, start, stripe_check, stripe_reads
from consumer.runtime.aside import aside
from consumer.runtime.clocks import Clock
from consumer.runtime.customers import CustomerFile, Passthrough
from consumer.runtime.ground import Ground
from consumer.runtime.http import Http
from consumer.runtime.intake import Intake
from consumer.runtime.logs import KAFKA_LINES
from consumer.runtime.metrics import Reports, Requests, State
from consumer.runtime.preconditions import ServiceError, check_arrival, check_cleanup, stripe_key, webhook_secrets
from consumer.runtime.reporter import TAKES_S, Reporter
from consumer.runtime.source import Silence, Source, SourceError, SourceSilent
from consumer.runtime.stripe import Stripe
from consumer.runtime.stripe_reads import KeyRefused, ReadFailed, StripeReads
from consumer.runtime.webhooks import Webhooks
from consumer.storage import Stage, Unreachable
from consumer.storage.kafka_topics import Topics
from consumer.storage.sqlite import SqliteStore

log = structlog.get_logger()

SLOW_MS: Final = 5_000
"""A commit that takes so long is one that Kafka, or the disk, does not answer."""
STUCK_MS: Final = 120_000
"""A loop that has not gone round for so long will not go round again."""
EXPIRE_EVERY_S: Final = 600.0
LOOK_EVERY_S: Final = 0.05
WARN_EVERY_S: Final = 3_600.0
WARN_BEFORE_S: Final = 7 * 86_400
"""A week is left for a person to act."""
BEGIN_AGAIN_S: Final = 1.0
ASK_EVERY_S: Final = 5.0
BOTH: Final = frozenset(Stage)
ASK_STRIPE_S: Final = 10.0
"""So long a start waits for Stripe to say what its meters are."""
ASK_STRIPE_AGAIN_S: Final = 5.0
"""Where it has not said it then, it is asked again so often."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the service takes from outside; the sandbox gives it other ones."""

    clock: Clock
    source: Callable[[Config, str], Source]
    """The source topic as the given group reads it."""


def group_of(config: Config) -> str:
    """The consumer group of stage 1, which holds the witness of how far it has read."""
    return Topics.of(config.pipeline).group(Stage.AGGREGATE)


def kafka_source(config: Config, group: str) -> Source:
    """The source topic on the configured cluster."""
    client = {"log_level": "4", "logger": KAFKA_LINES} | config.kafka_client()
    return Source(client, config.kafka.topic, group)


def run(config: Config, around: Surroundings, stages: frozenset[Stage] = BOTH) -> None:
    """Run until SIGTERM or SIGINT, then commit and return. Raises the errors of whatever cannot go on."""
    if isinstance(config.storage, SqliteStorage) and stages != BOTH:
        raise ServiceError("with storage.kind: sqlite one process runs both stages: leave out --stage")
    # Who only counts needs no key, and has none to lose.
    key = stripe_key(config) if Stage.DELIVER in stages else None
    if key is not None:
        webhook_secrets(config)
    source = around.source(config, group_of(config))
    asyncio.run(_Service(config, key, around.clock, source, stages).run())


def _begin(config: Config, clock: Clock, source: Source, stages: frozenset[Stage]) -> Ground:
    topic = source.describe()
    check_arrival(config, topic)
    check_cleanup(topic)
    if not isinstance(config.storage, SqliteStorage):
        return distributed.ground(config, clock, source, topic, stages)
    with ExitStack() as opened:
        # Last of all: what is refused before leaves no empty file behind.
        store = opened.enter_context(SqliteStore.open(config.storage.path, now=clock.now, create=True, lock=True))
        ground = embedded.ground(config, clock, source, topic, store)
        return replace(ground, close=opened.pop_all().close)


class _Service:
    def __init__(self, config: Config, key: str | None, clock: Clock, source: Source, stages: frozenset[Stage]) -> None:
        self._config = config
        self._key = key
        self._clock = clock
        self._source = source
        self._wanted = stages
        self._waits_for: str | None = None
        self._silence = Silence()
        self._stopping = Event()
        self._intake: Intake | None = None
        self._intake_failure: BaseException | None = None
        self._judged = False
        self._judgement: Exception | None = None
        """Why it ends, though it had started: what Stripe said of its meters as soon as it answered."""
        self._reporter: Reporter | None = None
        self._stripe: Stripe | None = None

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        grace = int(self._config.stripe.finalization_grace)
        requests = Requests(registry, grace=grace, clock=self._clock)
        http = Http(registry, stuck=self._stuck, not_ready=self._not_ready)
        webhooks = self._webhooks(registry)
        try:
            port = await self._listen(http, "http", self._config.http)
            if webhooks is not None and self._config.webhook is not None:
                await self._listen(webhooks, "webhook", self._config.webhook)
            # Whoever waits for Kafka shows that it does.
            waiting = self._state(grace)
            registry.register(waiting)
            # First of all: what is refused here has begun nothing.
            self._judged = await self._judge_meters(waits_s=ASK_STRIPE_S)
            ground = await self._begun()
            if ground is None:
                return
            try:
                self._waits_for = None
                self._prepare(ground, requests)
                registry.unregister(waiting)
                registry.register(self._state(grace))
                await self._stages(ground, port)
            finally:
                await asyncio.to_thread(ground.close)
        finally:
            if webhooks is not None:
                await webhooks.stop()
            await http.stop()
            if self._stripe is not None:
                await self._stripe.close()
        log.info("stopped")

    def _state(self, grace: int) -> State:
        mode, tokens = self._config.stripe.mode, self._config.kafka_tokens
        return State(self._intake, self._reporter, self._clock, self._silence, grace=grace, mode=mode, tokens=tokens)

    async def _begun(self) -> Ground | None:
        """The ground under both stages, as soon as Kafka answers; None where we are to stop before."""
        while not self._stop.is_set():
            try:
                ground = await asyncio.to_thread(_begin, self._config, self._clock, self._source, self._wanted)
            except (SourceSilent, Unreachable) as failed:
                self._waits_for = str(failed)
                self._silence.since = self._silence.since or self._clock.now()
                log.warning("kafka_silent", reason=self._waits_for)
            else:
                self._silence.broken()
                return ground
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), BEGIN_AGAIN_S)
        return None

    async def _judge_meters(self, waits_s: float | None = None) -> bool:
        """Do not go on with meters that would bill wrongly. Returns whether there is nothing more to ask."""
        if self._key is None or self._config.stripe.mode != "send":
            return True
        answer = aside("meters", stripe_check.misbilling, self._config, self._key, self._clock)
        stopping = asyncio.create_task(self._stop.wait())
        either: list[asyncio.Future[Any]] = [answer, stopping]
        await asyncio.wait(either, timeout=waits_s, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not answer.done():
            answer.cancel()
            if not self._stop.is_set():
                log.warning("meters_not_looked_at", reason=f"Stripe has not answered for {waits_s} s")
            return False
        try:
            wrong = answer.result()
        except ReadFailed as failed:
            if waits_s is not None or isinstance(failed, KeyRefused):
                log.warning("meters_not_looked_at", reason=str(failed))
            return isinstance(failed, KeyRefused)
        if wrong is not None:
            raise ServiceError(wrong)
        if waits_s is None:
            log.info("meters_looked_at")
        return True

    async def _judge_meters_at_last(self) -> None:
        """A start does not wait for Stripe, but what it would not have started on ends it as soon as Stripe answers."""
        try:
            while not self._judged:
                await asyncio.sleep(ASK_STRIPE_AGAIN_S)
                self._judged = await self._judge_meters()
                if self._judged and self._reporter is not None:
                    self._reporter.outlet.meters_known(self._clock.now())
        except Exception as failed:  # noqa: BLE001 - raised again when both stages have ended in good order
            self._judgement = failed
            self._stop.set()

    def _prepare(self, ground: Ground, requests: Requests) -> None:
        config = self._config
        if self._key is not None:
            self._stripe = Stripe(
                self._key, api_base=config.stripe.api_base, livemode=config.stripe.livemode, clock=self._clock
            )
            file = CustomerFile(config.customers.path) if isinstance(config.customers, CustomerFileConfig) else None
            outlet = Outlet(stripe_check.rate_limit(config))
            if not self._judged:
                outlet.meters_unknown(self._clock.now())

            def deliver(customers: Customers) -> Delivery:
                return Delivery(
                    customers=customers,
                    in_flight=max(1, config.limits.in_flight // ground.spread),
                    parked_limit=max(1, config.limits.parked // ground.spread),
                    outlet=outlet,
                    keep=int(config.limits.keep),
                    shadow=config.stripe.mode == "shadow",
                )

            self._reporter = Reporter(
                ground.store,
                ground.memberships[Stage.DELIVER],
                ground.delivery,
                unread=ground.unread,
                ahead=ground.ahead,
                deliver=deliver,
                stripe=self._stripe,
                outlet=outlet,
                spread=ground.spread,
                clock=self._clock,
                customers=file.customers if file else Passthrough(),
                file=file,
                hold=config.stripe.mode == "hold",
                observe=requests.observe,
            )
        if Stage.AGGREGATE in ground.memberships:
            stripe = self._stripe
            self._intake = Intake(
                self._source,
                ground.store,
                ground.memberships[Stage.AGGREGATE],
                ground.aggregator,
                clock=self._clock,
                commit_every=int(config.commit_every),
                open_keys=config.limits.open_keys,
                witness=lambda: stripe.date if stripe else None,
                committed=self._tell_reporter,
                ends=ground.ends,
            )
            self._silence = self._intake.silence

    def _webhooks(self, registry: CollectorRegistry) -> Webhooks | None:
        """What takes Stripe's reports, where that is asked for and this process delivers."""
        config, key = self._config, self._key
        if config.webhook is None or key is None:
            return None

        def reading() -> AbstractContextManager[StripeReads]:
            stripe = config.stripe
            return stripe_reads.reading(
                key, api_base=stripe.api_base, livemode=stripe.livemode, clock=self._clock, attempts=1
            )

        return Webhooks(
            webhook_secrets(config),
            livemode=config.stripe.livemode,
            clock=self._clock,
            reading=reading,
            archive=lambda: archive.opened(config, now=self._clock.now),
            ready=lambda: self._settled,
            observe=Reports(registry),
        )

    async def _listen(self, server: Http | Webhooks, section: str, at: HttpConfig | WebhookConfig) -> int:
        try:
            return await server.start(at.host, at.port)
        except OSError as failed:
            raise ServiceError(f"{section}: {at.host}:{at.port} cannot be listened on: {failed}") from None

    async def _stages(self, ground: Ground, port: int) -> None:
        """Both stages until one of them ends; then the other one stops in good order."""
        intake_done = asyncio.Event()
        if self._intake is not None:
            Thread(target=self._read, args=(self._intake, intake_done), name="intake", daemon=True).start()
        reading = asyncio.create_task(intake_done.wait()) if self._intake else None
        delivering = asyncio.create_task(self._reporter.run(self._stop)) if self._reporter else None
        chores = (
            self._say_started(port),
            self._judge_meters_at_last(),
            self._expire(ground),
            self._ask_kafka(),
            self._warn(),
        )
        aside = [asyncio.create_task(each) for each in chores]
        running: list[asyncio.Task[Any]] = [each for each in (reading, delivering) if each is not None]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            self._stop.set()
            for each in aside:
                each.cancel()
            for each in running:
                await each
        if self._intake_failure is not None:
            raise self._intake_failure
        if self._judgement is not None:
            raise self._judgement

    async def _until_settled(self) -> None:
        while not self._settled:  # noqa: ASYNC110 - one of the stages settles in another thread
            await asyncio.sleep(LOOK_EVERY_S)

    async def _say_started(self, port: int) -> None:
        await self._until_settled()
        log.info(
            "started",
            pipeline=self._config.pipeline,
            partitions=len(self._intake.partitions) if self._intake else 0,
            totals_partitions=len(self._reporter.partitions) if self._reporter else 0,
            http_port=port,
        )

    @property
    def _settled(self) -> bool:
        stages = [each for each in (self._intake, self._reporter) if each is not None]
        return bool(stages) and all(each.settled for each in stages)

    def _tell_reporter(self) -> None:
        if self._reporter is not None:
            self._loop.call_soon_threadsafe(self._reporter.wake)

    def _read(self, intake: Intake, done: asyncio.Event) -> None:
        try:
            intake.run(lambda: self._stopping.is_set() or self._stop.is_set())
        except BaseException as failure:  # noqa: BLE001 - raised again in the main thread, which ends the process
            self._intake_failure = failure
        self._loop.call_soon_threadsafe(done.set)

    async def _ask_kafka(self) -> None:
        """Where nobody reads the source, nobody else would notice that Kafka is away."""
        while self._intake is None:
            try:
                await asyncio.to_thread(self._source.topic_now, ASK_EVERY_S)
            except SourceError as failed:
                self._silence.kept(failed, self._clock.now())
            else:
                self._silence.broken()
            await asyncio.sleep(ASK_EVERY_S)

    async def _expire(self, ground: Ground) -> None:
        """Delete what has been kept for long enough, a little at a time."""
        if ground.expire is None or self._reporter is None:
            return
        while True:
            before = self._clock.now() - int(self._config.limits.keep)
            read_to = min((each.next for each in self._reporter.partitions.values()), default=0)
            await asyncio.to_thread(ground.expire, before, read_to)
            await asyncio.sleep(EXPIRE_EVERY_S)

    async def _warn(self) -> None:
        """Of usage that will soon be too old for Stripe, while there is time to do something about it."""
        await self._until_settled()
        while self._reporter is not None:
            now = self._clock.now() // 1000
            for (meter, reason), oldest in self._reporter.oldest_parked().items():
                if (left := oldest + TAKES_S - now) < WARN_BEFORE_S:
                    log.warning("parked_usage_expires", meter=meter, reason=reason, left_s=left, oldest=oldest)
            await asyncio.sleep(WARN_EVERY_S)

    def _stuck(self) -> list[str]:
        elapsed = self._clock.elapsed()
        return [
            f"the loop of stage {stage} has not gone round for {(elapsed - each.turned) // 1000} s"
            for stage, each in ((Stage.AGGREGATE, self._intake), (Stage.DELIVER, self._reporter))
            if each is not None and elapsed - each.turned > STUCK_MS
        ]

    def _not_ready(self) -> list[str]:
        if not self._settled:
            return [self._waits_for or "the state is being restored"]
        reasons = []
        elapsed = self._clock.elapsed()
        for stage, each in ((Stage.AGGREGATE, self._intake), (Stage.DELIVER, self._reporter)):
            if each is not None and elapsed - each.turned > SLOW_MS:
                reasons.append(f"stage {stage} has been waiting for its store for {(elapsed - each.turned) // 1000} s")
            if each is not None and (since := each.commits.failing_since) is not None:
                reasons.append(f"stage {stage} has not been able to commit since {start.shown(since)}")
        if self._intake is not None:
            reasons += [
                f"partition {number} waits: its records are dated ahead of this host's clock"
                for number, partition in list(self._intake.partitions.items())
                if partition.held
            ]
        if self._silence.since is not None:
            reasons.append(f"Kafka has not answered since {start.shown(self._silence.since)}")
        tokens = self._config.kafka_tokens
        if tokens is not None and (failure := tokens.failure) is not None:
            reasons.append(f"no token for Kafka since {start.shown(failure.since)}: {failure.reason}")
        if self._reporter is not None:
            if self._reporter.outlet.gate.shut:
                reasons.append(f"nothing is sent to Stripe but single attempts: {self._reporter.outlet.gate.shut}")
            elif self._reporter.paused:
                reasons.append(f"nothing is sent to Stripe: {self._reporter.paused}")
        return reasons
