"""A real Apache Kafka on this machine: processes that are broker and controller, for tests and measurements."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from xml.sax.saxutils import escape

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from consumer.sandbox.guard import guard

VERSION = "4.3.1"
_ARTIFACTS = (
    ("org.apache.kafka", "kafka_2.13", VERSION),
    ("org.slf4j", "slf4j-simple", "1.7.36"),  # logs to standard error, without configuration
)
_START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 20.0

Arrival = Literal["log_append_time", "create_time"]


class KafkaUnavailableError(Exception):
    """Something that running Kafka needs is absent; the message names the cure."""


class Kafka:
    """A Kafka cluster that is running, whoever runs it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(
        self, name: str, partitions: int = 1, arrival: Arrival = "log_append_time", **config: str | int
    ) -> None:
        """Create a topic with as many replicas as the cluster gives by default; return once clients can use it.

        `arrival` says whose clock stamps the records. Further topic settings are given with underscores for dots:
        `cleanup_policy="compact"`.
        """
        settings = {key.replace("_", "."): str(value) for key, value in config.items()}
        settings["message.timestamp.type"] = "LogAppendTime" if arrival == "log_append_time" else "CreateTime"
        admin = self._admin()
        topic = NewTopic(name, num_partitions=partitions, replication_factor=-1, config=settings)
        admin.create_topics([topic], operation_timeout=30.0)[name].result(timeout=40.0)
        deadline = time.monotonic() + 30.0
        while not _has_leaders(admin, name, partitions):
            if time.monotonic() > deadline:
                raise TimeoutError(f"topic {name} has no leader on each of its {partitions} partitions after 30 s")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether a broker can be reached and is part of the cluster."""
        try:
            return bool(self._admin().list_topics(timeout=2.0).brokers)
        except KafkaException:
            return False

    def _admin(self) -> AdminClient:
        # Silent, because what fails is raised, and because a broker that is still starting refuses connections.
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})


class Node:
    """One Kafka process on this machine, with its folder. `kill` or `stop`, then `start`: address and data stay."""

    def __init__(self, folder: Path, properties: Mapping[str, str], *, heap: str) -> None:
        """`heap` is the most memory that Java's objects get, as Java writes it."""
        self._folder = folder
        self._heap = heap
        self._properties = {**properties, "log.dirs": str(folder / "data")}
        self.log_file = folder / "kafka.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def format(self, cluster_id: str) -> None:
        """Prepare its storage, once."""
        self._write_properties()
        formatted = self._java("128m", "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}").wait()
        if formatted:
            raise RuntimeError(f"Kafka's storage could not be formatted. {self.log_tail()}")

    def format_like(self, other: Node, number: int) -> None:
        """The same as another node of the cluster, which has not been started yet: a second instead of three."""
        self._write_properties()
        shutil.copytree(other._folder / "data", self._folder / "data")
        meta = self._folder / "data" / "meta.properties"
        changed = {"node.id": str(number), "directory.id": new_id()}
        lines = [line.partition("=") for line in meta.read_text().splitlines()]
        meta.write_text("".join(f"{key}{mid}{changed.get(key, value)}\n" for key, mid, value in lines))

    def start(self) -> None:
        """Start it, and wait for nothing."""
        if self._process is not None:
            raise RuntimeError("the broker is running already")
        self._process = self._java(self._heap, "kafka.Kafka")
        self._guard = guard(self._process)

    def stop(self) -> None:
        """Shut it down in good order: clients are told and the log is closed."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_DEADLINE_S)
            self.kill()

    def kill(self) -> None:
        """End it at once, as a power failure would."""
        for process in (self._guard, self._process):  # in this order: the guard must not outlive what it would kill
            if process is not None:
                process.kill()
                process.communicate()
        self._process = self._guard = None

    def suspend(self) -> None:
        """It stands still, with all its connections, until it is resumed."""
        pid = self._signal(signal.SIGSTOP)
        # On a busy machine its threads go on for a while.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """It goes on as if nothing had been."""
        self._signal(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines of its log."""
        lines = self.log_file.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"The end of its log, {self.log_file}:", *lines])

    def _signal(self, number: signal.Signals) -> int:
        if self._process is None:
            raise RuntimeError("the broker is not running")
        self._process.send_signal(number)
        return self._process.pid

    def _write_properties(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._properties_file.write_text("".join(f"{key}={value}\n" for key, value in self._properties.items()))

    @property
    def _properties_file(self) -> Path:
        return self._folder / "server.properties"

    def _java(self, heap: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        configuration = f"--config={self._properties_file}" if arguments else str(self._properties_file)
        settings = [f"-Xmx{heap}", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{_artifacts()}/*"]
        # In its own session, so that Ctrl-C reaches those who use the broker and lets them finish.
        with self.log_file.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own command line
                [_command("java"), *settings, program, *arguments, configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class LocalKafka(Kafka):
    """A Kafka broker in a process of its own, with its data in a temporary folder.

    A context manager: running inside, stopped and removed outside. `stop` or `kill`, then `start`, is an outage: the
    address and the data stay.
    """

    def __init__(self, **settings: str) -> None:
        """`settings` are further ones of the broker, with underscores for dots."""
        _command("java")
        _artifacts()
        self._folder = Path(tempfile.mkdtemp(prefix="tallyman-kafka-"))
        port, controller = free_ports()
        super().__init__(f"127.0.0.1:{port}")
        properties = {
            **server_properties(),
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        } | {name.replace("_", "."): value for name, value in settings.items()}
        self._node = Node(self._folder, properties, heap="512m")
        self.log_file = self._node.log_file

    def __enter__(self) -> Self:
        try:
            self._node.format(new_id())
            self.start()
        except BaseException as error:
            self.kill()
            error.add_note(f"the broker's log is kept in {self.log_file}")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        """Start the broker on its address and data and return once it answers."""
        self._node.start()
        until_started(self.answers, [self._node])

    def stop(self) -> None:
        """Shut the broker down in good order: clients are told and the log is closed."""
        self._node.stop()

    def kill(self) -> None:
        """End the broker at once, as a power failure would."""
        self._node.kill()

    def suspend(self) -> None:
        """It stands still, with all its connections, until it is resumed."""
        self._node.suspend()

    def resume(self) -> None:
        """It goes on as if nothing had been."""
        self._node.resume()


def until_started(answer: Callable[[], bool], nodes: Iterable[Node]) -> None:
    """Return once they answer. Raises what is wrong where one of them has ended, or the deadline has passed."""
    deadline = time.monotonic() + _START_DEADLINE_S
    nodes = list(nodes)
    while not answer():
        for node in nodes:
            if not node.running:
                raise RuntimeError(f"Kafka ended while starting. {node.log_tail()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"Kafka does not answer {_START_DEADLINE_S:.0f} s after start. {node.log_tail()}")
        time.sleep(0.05)


def new_id() -> str:
    """An id as Kafka gives clusters and directories."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def server_properties() -> dict[str, str]:
    """What makes one node start fast and serve transactions and groups without company."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "auto.create.topics.enable": "false",
        "offsets.topic.num.partitions": "2",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "2",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "group.initial.rebalance.delay.ms": "0",
        # A killed broker is let back in once its session has expired, a dead member's partitions likewise,
        # and a hanging transaction is ended once this check comes round.
        "broker.heartbeat.interval.ms": "500",
        "broker.session.timeout.ms": "3000",
        "group.min.session.timeout.ms": "1000",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
        "log.cleaner.backoff.ms": "1000",
        "log.cleaner.dedupe.buffer.size": str(16 << 20),  # the default is a quarter of our heap
    }


def _has_leaders(admin: AdminClient, topic: str, partitions: int) -> bool:
    found = admin.list_topics(topic, timeout=10.0).topics[topic].partitions
    return len(found) == partitions and all(partition.leader != -1 for partition in found.values())


def _artifacts() -> Path:
    """Return the folder with Kafka's libraries, fetched once per user by Maven."""
    default = Path.home() / ".cache" / "tallyman"
    cache = Path(os.environ.get("TALLYMAN_KAFKA_CACHE") or default)
    libraries = cache / f"kafka-{VERSION}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"kafka-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not libraries.is_dir():
            for interrupted in cache.glob(f"{libraries.name}-fetching-*"):
                shutil.rmtree(interrupted, ignore_errors=True)
            _fetch(libraries)
    return libraries


def _fetch(libraries: Path) -> None:
    maven = _command("mvn")
    dependencies = "".join(
        f"<dependency><groupId>{escape(group)}</groupId><artifactId>{escape(name)}</artifactId>"
        f"<version>{escape(version)}</version></dependency>"
        for group, name, version in _ARTIFACTS
    )
    with tempfile.TemporaryDirectory(prefix=f"{libraries.name}-fetching-", dir=libraries.parent) as scratch:
        project, fetched = Path(scratch, "pom.xml"), Path(scratch, "libraries")
        project.write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>tallyman</groupId><artifactId>kafka</artifactId>"
            f"<version>1</version><packaging>pom</packaging><dependencies>{dependencies}</dependencies></project>"
        )
        done = subprocess.run(  # noqa: S603 - our own command line
            [
                *(maven, "--quiet", "--batch-mode", "--file", str(project), "dependency:copy-dependencies"),
                *("-DincludeScope=runtime", f"-DoutputDirectory={fetched}"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise KafkaUnavailableError(
                f"Maven could not fetch Kafka {VERSION}:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        # The rename is what makes it all or nothing: an interrupted fetch leaves no folder of this name.
        fetched.rename(libraries)


def _command(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise KafkaUnavailableError(
            f"a local Kafka needs the command {name}: it runs on Java 17 or newer and is fetched by Maven, once "
            "(apt-get install default-jre-headless maven)"
        )
    return path


def free_ports() -> tuple[int, int]:
    """Two ports of this machine that nobody listens on."""
    first, second = some_free_ports(2)
    return first, second


def some_free_ports(number: int) -> list[int]:
    """So many ports of this machine that nobody listens on."""
    # Below the ephemeral range: a client that reconnects during an outage could be given the very port as its own.
    free: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
        if len(free) == number:
            return free
    raise KafkaUnavailableError(f"a local Kafka needs {number} free ports between 20000 and 32000")
