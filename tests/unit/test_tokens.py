"""Tokens for Kafka: when one is made, what happens where none can be, and those that AWS's library signs."""

from __future__ import annotations

import base64
import gc
import http.server
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from confluent_kafka.admin import AdminClient
from structlog.testing import capture_logs

from consumer.config import Config, ConfigError, load
from consumer.runtime.source import Source, SourceSilent
from consumer.tokens import AGAIN_S, Failure, NoToken, Token, Tokens, aws_msk_iam

LIFE_S = 900.0


class Issuer:
    """Makes a token for a quarter of an hour, unless it is closed; its clock is moved by the test."""

    def __init__(self) -> None:
        self.time = 1_000_000.0
        self.made = self.asked = 0
        self.closed = False
        self.tokens = Tokens(self._make, now=lambda: self.time)

    def _make(self) -> Token:
        self.asked += 1
        if self.closed:
            raise NoToken("closed")
        self.made += 1
        return Token(f"token {self.made}", self.time + LIFE_S)

    def failure(self) -> Failure | None:
        return self.tokens.failure


def test_clients_that_ask_at_the_same_time_are_given_the_same_token() -> None:
    issuer = Issuer()
    assert issuer.tokens() == issuer.tokens("what the client was configured with") == ("token 1", issuer.time + LIFE_S)
    issuer.time += LIFE_S / 10
    assert issuer.tokens().text == "token 2"


def test_the_last_token_is_given_until_it_expires_and_none_after_that() -> None:
    issuer = Issuer()
    issuer.tokens()
    issuer.time += 0.8 * LIFE_S  # when Kafka's client asks
    issuer.closed, began = True, issuer.time
    with capture_logs() as lines:
        assert issuer.tokens().text == "token 1"
        assert issuer.failure() == (began * 1000, "closed")
        issuer.time += 0.2 * LIFE_S
        with pytest.raises(NoToken, match="closed"):
            issuer.tokens()
        assert issuer.failure() == (began * 1000, "closed")
        issuer.closed = False
        issuer.time += AGAIN_S
        assert issuer.tokens().text == "token 2"
    assert issuer.failure() is None
    assert [(each["event"], each["log_level"]) for each in lines] == [
        ("kafka_token_failed", "warning"),
        ("kafka_token_made", "info"),
    ]


def test_an_issuer_that_fails_is_not_asked_by_every_client_at_once() -> None:
    issuer = Issuer()
    issuer.closed = True
    for _ in range(10):
        with pytest.raises(NoToken):
            issuer.tokens()
    assert issuer.asked == 1


# AWS


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment in which AWS's library finds nothing, and asks nobody."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def signed(token: Token) -> tuple[str, dict[str, list[str]]]:
    """Host and parameters of the address that the token is."""
    url = urlsplit(base64.urlsafe_b64decode(token.text + "=" * (-len(token.text) % 4)).decode())
    assert (url.scheme, url.path) == ("https", "/")
    assert not token.text.endswith("=")
    return url.netloc, parse_qs(url.query)


def test_keys_of_the_environment_sign_a_token_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an address at which AWS would say whether we may connect; only a part of it is secret, the signature."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_REGION", "us-east-2")
    before = int(time.time())
    token = aws_msk_iam("eu-central-1")()
    assert before + LIFE_S <= token.expires <= time.time() + LIFE_S
    host, said = signed(token)
    assert host == "kafka.eu-central-1.amazonaws.com"
    assert said["Action"] == ["kafka-cluster:Connect"]
    assert said["X-Amz-Expires"] == ["900"]
    (scope,) = said["X-Amz-Credential"]
    assert scope.split("/")[0] == "AKIAEXAMPLE"
    assert scope.split("/")[2:] == ["eu-central-1", "kafka-cluster", "aws4_request"]
    assert len(said["X-Amz-Signature"][0]) == 64
    assert "hunter2" not in repr(said)

    assert signed(aws_msk_iam(None)())[0] == "kafka.us-east-2.amazonaws.com"
    monkeypatch.delenv("AWS_REGION")
    with pytest.raises(NoToken, match=r"set kafka\.token\.region, or AWS_REGION"):
        aws_msk_iam(None)()


def test_without_credentials_it_says_so_and_how_to_give_some(monkeypatch: pytest.MonkeyPatch) -> None:
    make = aws_msk_iam("eu-central-1")
    with pytest.raises(NoToken, match="finds no credentials: give the pod a service account with a role"):
        make()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert signed(make())[0] == "kafka.eu-central-1.amazonaws.com", "they are found when they are there"


class Sts(http.server.BaseHTTPRequestHandler):
    """Says who a service account is, once it is told to."""

    open = False
    asked = 0

    def do_POST(self) -> None:
        Sts.asked += 1
        given = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert given["RoleArn"] == ["arn:aws:iam::123456789012:role/tallyman"]
        assert given["WebIdentityToken"] == ["the-service-accounts"]
        if self.open:
            status, answer = (
                200,
                (
                    "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>"
                    "hunter2</SecretAccessKey><SessionToken>of-the-session</SessionToken><Expiration>2099-01-01T00:00:00Z"
                    "</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
                ),
            )
            answer = f"<AssumeRoleWithWebIdentityResponse>{answer}</AssumeRoleWithWebIdentityResponse>"
        else:
            status, answer = (
                403,
                (
                    "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>Not authorized to "
                    "perform sts:AssumeRoleWithWebIdentity</Message></Error></ErrorResponse>"
                ),
            )
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: Any) -> None:
        """To nobody."""


@pytest.fixture
def sts() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sts) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_a_role_of_a_service_account_is_asked_for_once_and_signs_each_token(
    sts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As EKS sets it up: a file with the service account's token, the role, the region. What fails says why."""
    file = tmp_path / "token"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/tallyman")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts)
    make = aws_msk_iam("eu-central-1")
    with pytest.raises(NoToken, match="FileNotFoundError"):
        make()
    file.write_text("the-service-accounts")
    with pytest.raises(NoToken, match=r"AccessDenied.*does it trust this service account") as refused:
        make()
    assert "the-service-accounts" not in str(refused.value)
    Sts.open, Sts.asked = True, 0
    for _ in range(3):
        _, said = signed(make())
        assert said["X-Amz-Credential"][0].startswith("ASIAEXAMPLE/")
        assert said["X-Amz-Security-Token"] == ["of-the-session"]
    assert Sts.asked == 1


# The configuration


def loaded(tmp_path: Path, **kafka: Any) -> Config:
    file = tmp_path / "t.yaml"
    meter = {"name": "n", "event_types": ["t"], "aggregation": "count", "stripe": {"event_name": "n"}}
    file.write_text(yaml.safe_dump({"pipeline": "p", "kafka": kafka, "meters": [meter], "stripe": {"livemode": False}}))
    return load(file, {}, provider=lambda region: lambda: Token(f"in {region}", 2e9))


def wrong(tmp_path: Path, **kafka: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **kafka)
    return str(caught.value)


TOKEN = {"kind": "aws_msk_iam", "region": "eu-central-1"}


def test_one_key_sets_all_that_kafkas_client_needs(tmp_path: Path) -> None:
    config = loaded(tmp_path, token=TOKEN, options={"client.id": "me"})
    client = config.kafka_client()
    tokens = client.pop("oauth_cb")
    assert client == {
        "bootstrap.servers": "localhost:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "OAUTHBEARER",
        "client.id": "me",
    }
    assert tokens("").text == "in eu-central-1"
    assert config.kafka_client()["oauth_cb"] is tokens, "all clients have it from one place"
    assert "oauth_cb" not in loaded(tmp_path).kafka_client()
    assert loaded(tmp_path, token={"kind": "aws_msk_iam"}).kafka_client()["oauth_cb"]().text == "in None"


@pytest.mark.parametrize(
    ("kafka", "said"),
    [
        ({"token": {"kind": "msk"}}, "kafka.token.kind\n    must be aws_msk_iam"),
        ({"token": {"region": "eu-central-1"}}, "kafka.token.kind\n    is required"),
        ({"token": TOKEN | {"region": "Frankfurt"}}, "must be a region of AWS's, such as eu-central-1"),
        ({"token": TOKEN | {"role": "x"}}, "unknown key; allowed here: kind, region"),
        ({"token": TOKEN, "options": {"sasl.mechanism": "PLAIN"}}, "kafka.token says who we are: remove one of them"),
        ({"token": TOKEN, "options": {"sasl.oauthbearer.method": "oidc"}}, "kafka.token says who we are"),
        ({"token": TOKEN, "options": {"security.protocol": "ssl"}}, "kafka.token is shown by SASL: remove it"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, kafka: dict[str, Any], said: str) -> None:
    assert said in wrong(tmp_path, **kafka)


def test_without_awss_library_the_configuration_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aws_msk_iam_sasl_signer", None)
    assert "pip install 'tallyman[msk]', or build the image with --build-arg EXTRAS=msk" in wrong(tmp_path, token=TOKEN)
    assert loaded(tmp_path).kafka_tokens is None, "nobody else needs it"


# Kafka's clients


def test_no_client_that_fails_is_left_for_the_garbage_collector() -> None:
    """It may run in a thread that calls us for a token, and a client that is ended there takes the process with it."""
    gc.collect()
    gc.disable()
    others = [each for each in gc.get_objects() if isinstance(each, AdminClient)]
    try:
        source = Source({"bootstrap.servers": "127.0.0.1:1", "log_level": "0"}, "usage-events", "docs")
        for ask in (lambda: source.topic_now(0.1), lambda: source.ends([0], 0.1)):
            with pytest.raises(SourceSilent):
                ask()
        left = [each for each in gc.get_objects() if isinstance(each, AdminClient)]
        assert len(left) == len(others)
    finally:
        gc.enable()
