"""Stripe as it is reached from where nothing goes out but through a proxy: by name, over TLS, with a password."""

import asyncio
import base64
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any, Final

import pytest
import stripe

from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected
from consumer.deliver.delivery import Attempt
from consumer.runtime.clocks import SystemClock
from consumer.runtime.stripe import Stripe, WrongProxy, proxy_to
from consumer.runtime.stripe_reads import Silent, StripeReads
from consumer.sandbox.stripe import SECRET_KEY
from consumer.sandbox.stripe_server import Fault, StripeStandIn

STRIPE: Final = "https://stripe.test"
"""A name that nobody but the proxy can resolve."""
PASSWORD: Final = "a secret"  # noqa: S105 - of a proxy that lives as long as a test
HEADER: Final = b"Proxy-Authorization: Basic " + base64.b64encode(f"tally:{PASSWORD}".encode())


class Proxy(ThreadingTCPServer):
    """Tunnels to the stand-in, whatever name it is asked for, for those who have its password."""

    daemon_threads = True

    def __init__(self, to: str) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.to_port = int(to.rpartition(":")[2])
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://tally:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.server_address[1]}"


class Tunnel(StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        request, *headers = iter(lambda: self.rfile.readline().strip(), b"")
        self.server.asked.append(request.decode())
        if HEADER not in headers:
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.server.to_port)) as onwards:
            ends = {self.connection: onwards, onwards: self.connection}
            while True:
                for end in select.select([*ends], [], [])[0]:
                    try:
                        some = end.recv(65536)
                    except ConnectionResetError:
                        return
                    if not some:
                        return
                    ends[end].sendall(some)


def certificate(directory: Path) -> Path:
    """A certificate for Stripe's name by an authority that nobody knows: itself; in one file with its key."""
    made = directory / "stripe.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=stripe.test", "-addext", "subjectAltName=DNS:stripe.test", "-keyout", made, "-out", made],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def stand_in(pem: Path) -> Iterator[StripeStandIn]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pem)
    with StripeStandIn(tls=tls, accept_any_customer=True) as served:
        served.model.add_meter("tokens")
        yield served


@pytest.fixture
def proxy(stand_in: StripeStandIn, pem: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that the environment names, as well as the authority that is to be believed."""
    for name in ("HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(stripe, "ca_bundle_path", stripe.ca_bundle_path)
    with Proxy(stand_in.url) as served:
        threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", served.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        yield served
        served.shutdown()


def send() -> Heard:
    """A Meter Event, as stage 2 writes it."""

    async def once() -> Heard:
        client = Stripe(SECRET_KEY, api_base=STRIPE, livemode=False, clock=SystemClock())
        try:
            return await client.send(
                Attempt(
                    identifier="tm1-x",
                    key="tm1-x",
                    meter="tokens",
                    event_name="tokens",
                    value="5",
                    payload={"stripe_customer_id": "cus_a", "value": "5"},
                    timestamp=SystemClock().now() // 1000,
                    stripe_customer="cus_a",
                )
            )
        finally:
            await client.close()

    return asyncio.run(once())


def meters() -> list[str]:
    """What operators' commands read."""
    reads = StripeReads(
        SECRET_KEY, api_base=STRIPE, livemode=False, clock=SystemClock(), pause=lambda _seconds: None, attempts=1
    )
    try:
        return [*reads.meters()]
    finally:
        reads.close()


def test_sending_and_reading_go_through_the_proxy_that_the_environment_names(
    proxy: Proxy, stand_in: StripeStandIn
) -> None:
    assert send() == Answer(200)
    assert meters() == ["tokens"]

    assert [each.split()[:2] for each in proxy.asked] == [["CONNECT", "stripe.test:443"]] * 2
    assert [*stand_in.model.billed().values()] == [5]


def test_a_proxy_that_refuses_proves_that_nothing_was_sent(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each total that was tried meanwhile would be in doubt for a day."""
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("tally:", "nobody:"))

    assert send() == NeverConnected("ClientHttpProxyError")
    assert proxy.asked


@pytest.mark.usefixtures("proxy")
def test_what_is_lost_behind_the_proxy_may_have_arrived(stand_in: StripeStandIn) -> None:
    stand_in.faults.script = [Fault.ACCEPT_LOSE]

    assert isinstance(send(), Lost)
    assert stand_in.model.billed()


@pytest.mark.usefixtures("proxy")
def test_an_authority_that_is_not_known_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")

    assert send() == NeverConnected("ClientConnectorCertificateError")
    with pytest.raises(Silent, match=r"the certificate is not trusted: .* name its authority in SSL_CERT_FILE"):
        meters()


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, STRIPE, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, STRIPE, "http://proxy:3128"),
        ({"https_proxy": "proxy:3128"}, STRIPE, "http://proxy:3128"),
        ({"ALL_PROXY": "https://proxy"}, STRIPE, "https://proxy"),
        ({"HTTP_PROXY": "http://proxy:3128"}, STRIPE, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org,.test"}, STRIPE, None),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, STRIPE, None),
        ({"HTTP_PROXY": "http://proxy:3128", "ALL_PROXY": "http://proxy:3128"}, "http://127.0.0.1:12111", None),
    ],
)
def test_which_proxy_is_taken(
    environment: dict[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch, environment)

    assert proxy_to(url) == proxy


def test_a_proxy_of_another_kind_is_refused_without_telling_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, {"HTTPS_PROXY": f"socks5://tally:{PASSWORD}@proxy:1080"})

    for ask in (send, meters):
        with pytest.raises(WrongProxy) as refused:
            ask()
        assert str(refused.value) == (
            "HTTPS_PROXY names a proxy of the kind socks5, and Stripe is reached through HTTP proxies only: give it as "
            "http://host:port, or set NO_PROXY"
        )


def alone(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    """These variables, and no others that name proxies."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
