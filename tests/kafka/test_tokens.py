"""Kafka is shown tokens that expire: the service on a broker that asks every connection for a new one all the time."""

from __future__ import annotations

import base64
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from typer.testing import CliRunner

from consumer.cli import app
from consumer.config import load
from consumer.runtime import service
from consumer.runtime.check import check
from consumer.runtime.clocks import SystemClock
from consumer.runtime.findings import Finding
from consumer.sandbox.kafka import LocalKafka
from consumer.sandbox.stripe import SECRET_KEY
from consumer.storage import Abandoned, Refused, kafka_transactions
from consumer.storage.kafka_transactions import Offsets, Transactions
from consumer.tokens import NoToken, Token
from tests.kafka.cluster import SaslKafka, own
from tests.kafka.harness import HOUR, METER, TOKENS, Bench, Service, Topic, bench, past_events, real_now, until

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

LIFE_S: Final = 6
"""Of a token."""
AGAIN_S: Final = 2
"""After so long the broker wants to see it again."""
REFUSED: Final = "the issuer is closed: open it"


@dataclass(frozen=True)
class Issuer:
    """Makes tokens that the broker takes without asking anybody, and writes down that it did."""

    folder: Path
    too_old: bool = False
    """Its tokens have expired before the broker sees them, and say nothing of it."""
    collects: bool = False
    """It makes Python collect garbage meanwhile, in the thread that asks, as Python may by itself at any moment."""

    def __call__(self, region: str | None) -> Callable[[], Token]:
        assert region == "eu-central-1"
        return self.make

    def make(self) -> Token:
        if self.collects:
            gc.collect()
        if self.closed.exists():
            raise NoToken(REFUSED)
        now = time.time()
        with (self.folder / "issued").open("a") as issued:
            issued.write(f"{now}\n")
        claims = {"sub": "tallyman", "iat": now, "exp": now - HOUR if self.too_old else now + LIFE_S}
        parts = (json.dumps(each).encode() for each in ({"alg": "none"}, claims))
        return Token(
            ".".join(base64.urlsafe_b64encode(each).rstrip(b"=").decode() for each in parts) + ".", now + LIFE_S
        )

    @property
    def closed(self) -> Path:
        """It makes none while this is there."""
        return self.folder / "closed"

    @property
    def issued(self) -> int:
        return len((self.folder / "issued").read_text().splitlines())


def wants_tokens() -> SaslKafka:
    """A broker that wants to see tokens, again and again."""
    module = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule"
    login = f'{module} required unsecuredLoginStringClaim_sub="broker";'
    return SaslKafka("OAUTHBEARER", login, connections_max_reauth_ms=str(AGAIN_S * 1000))


@pytest.fixture
def by_token() -> Iterator[SaslKafka]:
    with own(wants_tokens) as broker:
        yield broker


def with_token(on: Bench, broker: SaslKafka, topic: Topic, **changes: object) -> Service:
    made = on.service(topic, **changes)
    made.set(kafka={"bootstrap_servers": broker.guarded, "token": {"kind": "aws_msk_iam", "region": "eu-central-1"}})
    options = {"security.protocol": "SASL_PLAINTEXT", "reconnect.backoff.max.ms": 500}
    made.set(kafka={"options": options})
    return made


def until_it_says(made: Service, text: str) -> None:
    """Wait for this on its page of readiness."""
    made.until(lambda: text in made.get("/readyz")[1], f"it says {text}", within=90.0)


def in_one_line(text: str) -> str:
    """What a command shows, however it was broken into lines."""
    return " ".join(text.split())


def test_tokens_expire_all_the_time_and_everything_is_billed_once(
    by_token: SaslKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    With either store every client that the service has gets the next token in time. While none can be made it says so
    and goes on trying; what was produced meanwhile is billed when there are tokens again.
    """
    with bench(by_token, tmp_path) as on:
        topic = Topic.create(by_token, 2, arrival="create_time")
        file, kafka = (with_token(on, by_token, topic) for _ in range(2))
        kafka.config |= {"pipeline": "in-kafka", "storage": {"kind": "kafka"}}
        kafka.set(meters=[{**METER, "stripe": {"event_name": "in_kafka"}}])
        on.stripe.model.add_meter("in_kafka")
        issuer = Issuer(tmp_path)
        issuer.closed.touch()
        for each in (file, kafka):
            each.provider = Issuer(tmp_path, collects=True)
            each.spawn()
            until_it_says(each, REFUSED)
            assert each.metrics().sum("tallyman_kafka_token_up") == 0
        issuer.closed.unlink()
        for each in (file, kafka):
            until_it_says(each, "ok\n")

        def logs() -> str:
            return "\n\n".join(each.log()[-3000:] for each in (file, kafka))

        used = 0

        def use(hours_ago: int) -> None:
            nonlocal used
            for partition in range(2):
                past_events(topic, {"cus_a": 5, "cus_b": 7}, at=real_now() - hours_ago * HOUR, partition=partition)
            used += 1

        def billed(event_name: str) -> dict[str, int]:
            found: dict[str, int] = {}
            for (name, customer, _), value in on.stripe.model.billed().items():
                if name == event_name:
                    found[customer] = found.get(customer, 0) + int(value)
            return found

        def all_billed() -> bool:
            expected = {"cus_a": 10 * used, "cus_b": 14 * used}
            return billed(TOKENS) == billed("in_kafka") == expected

        use(20)
        until(all_billed, "what was used is billed", within=40.0, context=logs)
        assert issuer.issued > 8, "many have expired by now"

        issuer.closed.touch()
        for each in (file, kafka):
            until_it_says(each, "no token for Kafka since")
            until_it_says(each, "Kafka has not answered since")
            assert each.metrics().sum("tallyman_kafka_up") == 0
            assert each.metrics().sum("tallyman_kafka_token_up") == 0
            assert each.get("/healthz")[0] == 200
        use(19)
        issuer.closed.unlink()
        until(all_billed, "what was used meanwhile is billed", within=60.0, context=logs)
        for each in (file, kafka):
            until_it_says(each, "ok\n")
            assert each.metrics().sum("tallyman_kafka_token_up") == 1
            each.stop(within=40.0)
            events = [json.loads(line)["event"] for line in each.log().splitlines()]
            assert events.count("kafka_token_failed") == events.count("kafka_token_made") == 2
        assert on.stripe.model.violations == []

        assert [each for each in checked(file, issuer) if each.level == "error"] == []
        (wrong,) = (each.says for each in checked(file, Issuer(tmp_path, too_old=True)) if each.level == "error")
        assert "does not let us in" in wrong
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        nobody = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "", "AWS_SHARED_CREDENTIALS_FILE": ""}
        command = ["check", "-c", str(file.write())]
        said = CliRunner().invoke(app, command, env=nobody | {"STRIPE_SECRET_KEY": SECRET_KEY})
        assert said.exit_code == 1
        told = "there is no token for Kafka: AWS's library finds no credentials: give the pod a service account"
        assert told in in_one_line(said.stdout)


def checked(made: Service, issuer: Issuer) -> list[Finding]:
    config = load(made.write(), made.environ, provider=issuer)
    return [*check(config, service.kafka_source(config, service.group_of(config)), SystemClock())]


@pytest.mark.parametrize("given_up", [False, True])
def test_a_producer_whose_commit_was_refused_is_not_left_for_the_garbage_collector(
    own_kafka: LocalKafka, given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in tests/unit/test_tokens.py: what went wrong does not lead back to the client that it went wrong with.

    Nor where it went wrong after nobody waited for it any more.
    """
    topic = Topic.create(own_kafka)
    client = {"bootstrap.servers": own_kafka.bootstrap_servers, "log_level": "0"}
    member = Consumer(client | {"group.id": topic.name})
    member.subscribe([topic.name])
    until(lambda: member.poll(0.1) is None and member.assignment(), "it is a member")
    was = member.consumer_group_metadata()
    member.close()
    transactions = Transactions(client, topic.name, within=10.0)
    gc.collect()
    gc.disable()
    try:
        before = producers()
        transactions.settle()
        assert producers() == before + 1
        if given_up:
            monkeypatch.setattr(kafka_transactions, "OFFSETS_S", 0.2)
            own_kafka.suspend()
        with pytest.raises(Abandoned if given_up else Refused):
            transactions.run([], Offsets([TopicPartition(topic.name, 0, 1)], was))
        if given_up:
            own_kafka.resume()
        transactions.close()
        until(lambda: producers() == before, "none is left", within=30.0)
    finally:
        gc.enable()


def producers() -> int:
    return sum(isinstance(each, Producer) for each in gc.get_objects())
