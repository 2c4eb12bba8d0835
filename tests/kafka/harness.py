"""The service at work on a real Kafka, seen from outside: as a process, with a stand-in for Stripe and moved clocks."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Timer
from typing import Any, Final

import structlog
from confluent_kafka import KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from consumer import deadletters, totals
from consumer.config import load
from consumer.runtime import preconditions, service
from consumer.runtime.customers import CustomerFileError
from consumer.runtime.intake import IntakeStopped
from consumer.runtime.source import SourceError
from consumer.runtime.start import StartRefused
from consumer.runtime.stripe import WrongMode
from consumer.sandbox.kafka import Kafka, free_ports
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import StripeStandIn
from consumer.storage import Log, Logged, Stage, StorageError
from consumer.storage.sqlite import SqliteStore
from consumer.tokens import Provider, aws_msk_iam

SECOND: Final = 1_000
MINUTE: Final = 60 * SECOND
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

TOKENS: Final = "ai_tokens"
METER: Final[Mapping[str, Any]] = {
    "name": "tokens",
    "event_types": ["used"],
    "aggregation": "sum",
    "value": "$.n",
    "stripe": {"event_name": TOKENS},
}

FAILURES: Final = (
    CustomerFileError,
    IntakeStopped,
    SourceError,
    StartRefused,
    StorageError,
    WrongMode,
    preconditions.ServiceError,
)
"""What users are told in words; everything else is a fault of ours."""


class MovedClock:
    """The host's clocks, each moved by so many milliseconds as the file says; whoever has the file open sees them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        if not file.exists():
            self._write(0, 0)

    def now(self) -> int:
        return time.time_ns() // 1_000_000 + self._moved()[0]

    def elapsed(self) -> int:
        return time.monotonic_ns() // 1_000_000 + self._moved()[1]

    def jump(self, by: int) -> None:
        """Somebody sets the time of day."""
        now, elapsed = self._moved()
        self._write(now + by, elapsed)

    def pass_time(self, by: int) -> None:
        """So much time really passes."""
        now, elapsed = self._moved()
        self._write(now + by, elapsed + by)

    def _moved(self) -> tuple[int, int]:
        now, elapsed = self._file.read_text().split()
        return int(now), int(elapsed)

    def _write(self, now: int, elapsed: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{now} {elapsed}")
        new.replace(self._file)


def until(holds: Callable[[], object], what: str, *, within: float = 20.0, context: Callable[[], str] = str) -> None:
    """Wait for a condition; fails with what was waited for, and with what the context says by then."""
    began = time.monotonic()
    while not holds():
        waited = time.monotonic() - began
        if waited > within:
            raise AssertionError(f"not within {within} s: {what}\n{context()}")
        # Looking costs both who looks and who is looked at: the longer it takes, the less often.
        time.sleep(min(max(waited / 10, 0.02), 0.1))


def real_now() -> int:
    """The host's time, which the broker stamps records with."""
    return time.time_ns() // 1_000_000


def iso(at: int) -> str:
    """Milliseconds since the epoch, as events and the configuration write times."""
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at % 1000:03d}Z"


def event(n: object = 1, *, at: int | None = None, customer: str = "cus_a", **attributes: object) -> bytes:
    """A usage event, whose time is now unless another one is given; ``None`` takes an attribute out."""
    usual: dict[str, object] = {
        "specversion": "1.0",
        "id": uuid.uuid4().hex,
        "source": "/harness",
        "type": "used",
        "subject": customer,
        "time": iso(real_now() if at is None else at),
        "data": {"n": n},
    }
    return json.dumps({k: v for k, v in (usual | attributes).items() if v is not None}).encode()


@dataclass
class Topic:
    """A topic of its own for each test, and the records that are produced to it."""

    kafka: Kafka
    name: str
    partitions: int
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, kafka: Kafka, partitions: int = 1, **settings: Any) -> Topic:
        """Dated by the broker unless ``arrival`` says otherwise."""
        name = f"usage-{uuid.uuid4().hex}"
        kafka.create_topic(name, partitions, **settings)
        return cls(kafka, name, partitions, settings)

    @cached_property
    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})

    def produce(
        self,
        *values: bytes | None,
        partition: int = 0,
        key: bytes | None = b"k",
        at: int = 0,
        headers: list[tuple[str, bytes | None]] | None = None,
        client: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Append records and return their offsets; ``at`` dates them, where producers do that."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers, "linger.ms": 0} | dict(client or {}))
        with producing(producer, self.name) as append:
            for value in values:
                append(value, partition=partition, key=key, timestamp=at, headers=headers or [])
        return append.offsets

    @contextmanager
    def transaction(self) -> Iterator[tuple[Producer, Appending]]:
        """A transaction that is open inside; the test commits or aborts it."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers, "transactional.id": uuid.uuid4().hex})
        producer.init_transactions(30.0)
        producer.begin_transaction()
        yield producer, Appending(producer, self.name)


class Appending:
    """Appends records through a producer, remembering offsets; what is refused raises."""

    def __init__(self, producer: Producer, topic: str) -> None:
        self._producer, self._topic = producer, topic
        self.offsets: list[int] = []
        self._errors: list[KafkaError] = []

    def __call__(self, value: bytes | None, **record: Any) -> None:
        self._producer.produce(self._topic, value, on_delivery=self._delivered, **({"partition": 0} | record))
        self._producer.poll(0)

    def flush(self) -> None:
        """Return once all of it has been appended."""
        assert self._producer.flush(30.0) == 0
        assert not self._errors, self._errors

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._errors.append(error)
        else:
            self.offsets.append(message.offset() or 0)


@contextmanager
def producing(producer: Producer, topic: str) -> Iterator[Appending]:
    """Appends that are in the log when the context ends."""
    append = Appending(producer, topic)
    yield append
    append.flush()


class Page:
    """One scrape of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def families(self) -> list[Metric]:
        """All that is on it."""
        return list(text_string_to_metric_families(self.text))

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels among theirs."""
        return sum(each.value for each in self._samples(name) if labels.items() <= each.labels.items())

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The samples of a name, by the values of these labels."""
        found: dict[tuple[str, ...], float] = {}
        for each in self._samples(name):
            key = tuple(each.labels[label] for label in labels)
            found[key] = found.get(key, 0) + each.value
        return found

    def _samples(self, name: str) -> list[Sample]:
        # To read the whole page would be most of what waiting for something on it costs.
        lines = "".join(f"{line}\n" for line in self.text.splitlines() if line.startswith(name))
        found = text_string_to_metric_families(lines)
        return [each for family in found for each in family.samples if each.name == name]

    @property
    def counters(self) -> dict[object, float]:
        """All counters of events and totals, which no crash may set back."""
        return {
            (each.name, tuple(sorted(each.labels.items()))): each.value
            for family in self.families
            if family.type == "counter" and family.name.startswith("tallyman_")
            if "stripe_requests" not in family.name and "after_grace" not in family.name
            for each in family.samples
            if each.name == f"{family.name}_total"
        }


class Service:
    """The service as a process of its own; started, stopped, killed and started again on the same state."""

    def __init__(self, folder: Path, topic: Topic, stripe_url: str, /, **changes: Any) -> None:
        """``changes`` are keys of the configuration, merged into what is usual here."""
        self.folder = folder
        self.topic = topic
        port, _ = free_ports()
        arrival = topic.settings.get("arrival", "log_append_time")
        self.config: dict[str, Any] = {
            "pipeline": f"p-{topic.name[-8:]}",
            "bill_from": iso(real_now() - 30 * DAY),
            "kafka": {
                "bootstrap_servers": topic.kafka.bootstrap_servers,
                "topic": topic.name,
                "arrival": arrival,
                "options": {"reconnect.backoff.max.ms": 500},
            },
            "storage": {"kind": "sqlite", "path": str(folder / "tallyman.db")},
            "commit_every": "100ms",
            "meters": [dict(METER)],
            "stripe": {"livemode": False, "api_base": stripe_url, "max_rate": 1000},
            "http": {"host": "127.0.0.1", "port": port},
        }
        for key, value in changes.items():
            self.set(**{key: value})
        self.url = f"http://127.0.0.1:{port}"
        self.environ = {"STRIPE_SECRET_KEY": SECRET_KEY}
        self.clock = MovedClock(folder / "clock")
        self.provider: Provider = aws_msk_iam
        """Makes its tokens, where the configuration asks for any."""
        self.stages = frozenset(Stage)
        """Which of them it runs."""
        self._process: ForkServerProcess | None = None

    @property
    def group(self) -> str:
        return f"tallyman-{self.config['pipeline']}-aggregate"

    @property
    def state(self) -> Path:
        """The SQLite file."""
        return Path(self.config["storage"]["path"])

    def set(self, **changes: Any) -> None:
        """Change the configuration for the next start; sections are merged, and None takes a key out."""
        for key, value in changes.items():
            if value is None:
                self.config.pop(key, None)
            elif isinstance(value, dict) and isinstance(self.config.get(key), dict):
                self.config[key] = self.config[key] | value
            else:
                self.config[key] = value

    def write(self) -> Path:
        """Write the configuration file."""
        file = self.folder / "tallyman.yaml"
        file.write_text(json.dumps(self.config))
        return file

    # Its life

    def spawn(self) -> None:
        """Start the process and wait for nothing."""
        self.write()
        given = (self.folder, self.environ, self.stages, self.provider)
        self._process = _processes.Process(target=_serve, args=given, daemon=True)
        self._process.start()

    def start(self) -> None:
        """Start the process and return once it reads."""
        before = self.log().count('"started"')
        self.spawn()
        self.until(lambda: self.log().count('"started"') > before, "the service has started")

    def stop(self, *, within: float = 20.0) -> float:
        """SIGTERM; returns how many seconds the process took, which ends with 0."""
        assert self._process is not None
        began = time.monotonic()
        self._process.terminate()
        code = self._ended(within)
        took = time.monotonic() - began
        assert code == 0, f"exit code {code}\n{self.log()[-3000:]}"
        return took

    def kill(self) -> None:
        """SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._ended(10.0)

    def suspend(self) -> None:
        """SIGSTOP: it does nothing any more, and does not know."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on where it was."""
        os.kill(self.pid, signal.SIGCONT)

    def fails(self, *, within: float = 30.0) -> str:
        """Wait until it ends by itself with exit code 1; returns its last line, which has to say why."""
        code = self._ended(within)
        assert code == 1, f"exit code {code}\n{self.log()[-3000:]}"
        return self.log().splitlines()[-1]

    def _ended(self, within: float) -> int | None:
        assert self._process is not None
        self._process.join(within)
        code, self._process = self._process.exitcode, None
        return code

    def refuses(self) -> str:
        """Start it in this process, which is faster, and return what it says instead of starting."""
        config = load(self.write(), self.environ)
        too_long = Timer(20.0, lambda: os.kill(os.getpid(), signal.SIGINT))
        too_long.start()
        try:
            service.run(config, service.Surroundings(self.clock, service.kafka_source))
        except FAILURES as refused:
            return str(refused)
        finally:
            too_long.cancel()
        raise AssertionError("it starts")

    # What is seen of it

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid or 0

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of one of its pages; (0, "") where nobody listens."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=5) as answer:  # noqa: S310 - our own page
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metrics(self) -> Page:
        return Page(self.get("/metrics")[1])

    def until(self, holds: Callable[[], object], what: str, *, within: float = 20.0) -> None:
        """Wait for a condition while the service runs; its log is shown where it does not come true."""

        def checked() -> object:
            assert self._process is None or self.running, f"the service has ended before {what}\n{self.log()[-3000:]}"
            return holds()

        until(checked, what, within=within, context=lambda: f"{self.get('/readyz')}\n{self.log()[-3000:]}")

    def until_consumed(self, records: int, **kwargs: Any) -> None:
        """Wait until so many records are read and committed."""
        self.until(
            lambda: self.metrics().sum("tallyman_consumed_total") >= records, f"{records} are consumed", **kwargs
        )

    @contextmanager
    def store(self) -> Iterator[SqliteStore]:
        """Its file, as operators' commands open it."""
        with SqliteStore.open(self.state, now=self.clock.now, create=False, lock=False) as store:
            yield store

    def read(self, log: Log) -> list[Logged]:
        """One of its logs."""
        with self.store() as store:
            return store.read(log, 0, 1_000_000)

    def totals(self) -> list[totals.Total]:
        return [r for r in (totals.decode(each.value) for each in self.read(Log.TOTALS)) if isinstance(r, totals.Total)]

    def dead_letters(self) -> list[deadletters.DeadLetter]:
        return [deadletters.decode(each.value) for each in self.read(Log.DEAD_LETTERS)]


@dataclass
class Bench:
    """What a test builds its story from; everything that runs is ended with it."""

    kafka: Kafka
    folder: Path
    stripe: StripeStandIn
    _services: list[Service] = field(default_factory=list)

    def service(self, topic: Topic, **changes: Any) -> Service:
        folder = self.folder / f"service-{len(self._services)}"
        folder.mkdir()
        made = Service(folder, topic, self.stripe.url, **changes)
        self._services.append(made)
        return made

    def billed(self) -> dict[str, str]:
        """What Stripe would bill, by customer."""
        sums: dict[str, Any] = {}
        for (_, customer, _), value in self.stripe.model.billed().items():
            sums[customer] = sums.get(customer, 0) + value
        return {customer: f"{value.normalize():f}" for customer, value in sums.items()}

    def kill_all(self) -> None:
        for each in self._services:
            each.kill()


@contextmanager
def bench(kafka: Kafka, folder: Path) -> Iterator[Bench]:
    """A stand-in that knows one meter and every customer, and nothing else yet."""
    with ExitStack() as running:
        stripe = running.enter_context(StripeStandIn(accept_any_customer=True))
        stripe.model.add_meter(TOKENS)
        made = Bench(kafka, folder, stripe)
        running.callback(made.kill_all)
        yield made


def past_events(topic: Topic, customers: Mapping[str, int], *, at: int, partition: int = 0, closed: bool = True) -> int:
    """Usage dated in the past on a topic whose producers date it, and a tombstone that lets its windows close.

    Returns how many records.
    """
    topic.produce(
        *(event(n, at=at, customer=customer) for customer, n in customers.items()), at=at, partition=partition
    )
    if closed:
        topic.produce(None, at=at + 5 * MINUTE, partition=partition)
    return len(customers) + closed


def values(found: Iterable[totals.Total]) -> list[tuple[str, str]]:
    """Customer and value of totals, in order."""
    return sorted((each.customer, each.value) for each in found)


def _serve(folder: Path, environ: Mapping[str, str], stages: frozenset[Stage], provider: Provider) -> None:
    """The process. What ends it is said in the last line of its log."""
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1)  # so that one that hangs can be asked where
    structlog.configure(processors=[structlog.processors.TimeStamper(), structlog.processors.JSONRenderer()])
    try:
        service.run(
            load(folder / "tallyman.yaml", environ, provider=provider),
            service.Surroundings(MovedClock(folder / "clock"), service.kafka_source),
            stages,
        )
    except FAILURES as failed:
        print(failed, flush=True)
        sys.exit(1)


# A process that has imported everything and forks: a service starts in a tenth of the time.
_processes: Final = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", __name__])
