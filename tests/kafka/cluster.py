"""Where the tests' Kafka comes from: an address in the environment, Docker, or a broker started here."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from consumer.sandbox.kafka import VERSION, Kafka, KafkaUnavailableError, LocalKafka, free_ports, server_properties

K = TypeVar("K", bound=AbstractContextManager[Any])

ADDRESS = "TALLYMAN_TEST_KAFKA"


@contextmanager
def running_kafka() -> Iterator[Kafka]:
    """A real Kafka, from the first source there is; KafkaUnavailableError, with all cures, where there is none."""
    if address := os.environ.get(ADDRESS):
        given = Kafka(address)
        if not given.answers():
            raise ConnectionError(f"no Kafka answers at {address}, the address in {ADDRESS}")
        yield given
    elif _docker_answers():
        with _container() as kafka:
            yield kafka
    else:
        try:
            # Nobody kills it, and a busy machine must not make it look dead to its own controller.
            local = LocalKafka(**{"broker.session.timeout.ms": "60000"})
        except KafkaUnavailableError as error:
            raise KafkaUnavailableError(f"{error}; or start Docker; or set {ADDRESS} to a Kafka's address") from error
        with local:
            yield local


@contextmanager
def shared_kafka(folder: Path) -> Iterator[Kafka]:
    """The same, one for all processes that name this folder: who is first starts it, and ends it after all others."""
    address = folder / "kafka"
    with (folder / "kafka.users").open("w") as users, (folder / "kafka.first").open("w") as first, ExitStack() as ours:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(first, fcntl.LOCK_EX)
        if address.exists():
            kafka = Kafka(address.read_text())
        else:
            kafka = ours.enter_context(running_kafka())
            address.write_text(kafka.bootstrap_servers)

            def ended() -> None:
                fcntl.flock(users, fcntl.LOCK_EX)
                address.unlink()

            ours.callback(ended)
        fcntl.flock(first, fcntl.LOCK_UN)
        yield kafka


class SaslKafka(LocalKafka):
    """A broker with a second address, at which it wants to know who comes; at the first one it is as open as ever."""

    def __init__(self, mechanism: str, login: str, **settings: str) -> None:
        """``login`` is Kafka's own way to say who is known."""
        super().__init__(**settings)
        port, _ = free_ports()
        self.guarded = f"127.0.0.1:{port}"
        properties = self._node._properties
        for name in ("listeners", "advertised.listeners"):
            properties[name] += f",SASL_PLAINTEXT://{self.guarded}"
        properties["listener.security.protocol.map"] += ",SASL_PLAINTEXT:SASL_PLAINTEXT"
        properties["sasl.enabled.mechanisms"] = mechanism
        properties[f"listener.name.sasl_plaintext.{mechanism.lower()}.sasl.jaas.config"] = login


@contextmanager
def own(make: Callable[[], K]) -> Iterator[K]:
    """Brokers for one test, which may do to them what it likes; where none can be started here, it is skipped."""
    try:
        made = make()
    except KafkaUnavailableError as error:
        pytest.skip(f"no Kafka of its own: {error}")
    with made:
        yield made


def _docker_answers() -> bool:
    try:
        asked = subprocess.run(["docker", "version"], capture_output=True, timeout=5.0, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


@contextmanager
def _container() -> Iterator[Kafka]:
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - slow, and needs an engine

    container = DockerContainer(f"apache/kafka:{VERSION}")
    port, _ = free_ports()
    kafka = Kafka(f"{container.get_docker_client().host()}:{port}")
    properties = {
        **server_properties(),
        "listeners": f"PLAINTEXT://0.0.0.0:{port},CONTROLLER://localhost:9093",
        "advertised.listeners": f"PLAINTEXT://{kafka.bootstrap_servers}",
        "controller.quorum.voters": "1@localhost:9093",
    }
    for key, value in properties.items():
        container.with_env("KAFKA_" + key.upper().replace(".", "_"), value)
    with container.with_bind_ports(port, port):
        deadline = time.monotonic() + 60.0
        while not kafka.answers():
            if time.monotonic() > deadline:
                log = b"".join(container.get_logs()).decode(errors="replace")
                raise TimeoutError(f"Kafka does not answer 60 s after its container started:\n{log[-2000:]}")
        yield kafka
