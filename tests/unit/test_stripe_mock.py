"""All requests that we make of Stripe are of the shape that its API specification wants, as stripe-mock judges it.

stripe-mock is Stripe's own: it knows the endpoints, and the names, types and necessity of parameters. It knows nothing
of what an account holds. It is taken from the first of: ``TALLYMAN_STRIPE_MOCK``, the address of one that runs; Go, by
which it is built, once. Where neither is there this is skipped, and the end of the run says so in capitals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

import pytest

from consumer import config
from consumer.deliver.answers import Answer
from consumer.deliver.delivery import Attempt
from consumer.runtime import stripe_check
from consumer.runtime.clocks import SystemClock
from consumer.runtime.setup import Account, Terms, setup
from consumer.runtime.stripe import API_VERSION, Stripe
from consumer.runtime.stripe_reads import KeyRefused
from consumer.totals import Destination
from tests.go import STRIPE_MOCK, GoUnavailableError

ADDRESS: Final = "TALLYMAN_STRIPE_MOCK"
KEY: Final = "sk_test_mock"

SPECIFIED: Final = "2025-09-30.clover"
"""The version of Stripe's API that this stripe-mock knows."""

PACKAGE_FOLDER: Final = Path(config.__file__).parent

CONFIG: Final = """\
pipeline: test
stripe: {{livemode: false, api_base: "{base}"}}
customers: {{kind: passthrough}}
meters:
  - {{name: tokens, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens}}}}
"""


@contextlib.contextmanager
def listening(*options: str) -> Iterator[str]:
    """A stripe-mock of our own, and its address."""
    command = [str(STRIPE_MOCK.built()), "-http-addr", "127.0.0.1:", "-https-addr", "127.0.0.1:", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"Listening for HTTP at address: (\S+)", line):
                    yield f"http://{found[1]}"
                    break
            else:
                raise RuntimeError(f"stripe-mock did not start:\n{''.join(said)}")
        finally:
            process.kill()


@dataclass
class Asked:
    """One request, and what stripe-mock thought of it."""

    method: str
    path: str
    params: str
    status: int
    says: str
    headers: dict[str, str]

    @property
    def names(self) -> set[str]:
        """The parameters; of lists one."""
        return {re.sub(r"\[\d+\]", "[]", name) for name, _ in parse_qsl(self.params)}


class Between(BaseHTTPRequestHandler):
    """Stands between a client and stripe-mock, and writes down what goes by."""

    mock: str
    asked: list[Asked]

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self._pass_on(path, query)

    def do_POST(self) -> None:
        self._pass_on(self.path, self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())

    def _pass_on(self, path: str, params: str) -> None:
        status, body = call(self.mock, self.command, path, params, dict(self.headers))
        self.asked.append(Asked(self.command, path, params, status, body.decode(), dict(self.headers)))
        # Its example of a meter is a live one.
        body = re.sub(rb'"livemode":\s*true', b'"livemode":false', body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def call(mock: str, method: str, path: str, params: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """One request to stripe-mock itself."""
    wanted = ("Authorization", "Content-Type", "Idempotency-Key", "Stripe-Version")
    request = urllib.request.Request(  # noqa: S310 - the address is ours
        f"{mock}{path}" + (f"?{params}" if method == "GET" and params else ""),
        data=params.encode() if method == "POST" else None,
        method=method,
        headers={name: headers[name] for name in wanted if name in headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - the address is ours
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read()


class Mock:
    """A stripe-mock, seen through somebody who writes down what it is asked."""

    def __init__(self, mock: str, url: str, asked: list[Asked], directory: Path) -> None:
        self.mock = mock
        self.url = url
        self.asked = asked
        self._file = directory / "tallyman.yaml"

    @property
    def config(self) -> config.Config:
        self._file.write_text(CONFIG.format(base=self.url))
        return config.load(self._file, {})

    @contextlib.contextmanager
    def account(self) -> Iterator[Account]:
        made = Account(KEY, api_base=self.url, livemode=False, clock=SystemClock(), attempts=1, pause=lambda _: None)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if given := os.environ.get(ADDRESS):
        yield given
        return
    try:
        STRIPE_MOCK.built()
    except GoUnavailableError as missing:
        if os.environ.get("CI") and shutil.which("go"):
            raise
        pytest.skip(f"no stripe-mock: {missing}; or set {ADDRESS} to the address of one that runs")
    with listening() as found:
        yield found


@pytest.fixture
def mock(address: str, tmp_path: Path) -> Iterator[Mock]:
    asked: list[Asked] = []
    handler = type("Noting", (Between,), {"mock": address, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield Mock(address, f"http://127.0.0.1:{server.server_port}", asked, tmp_path)
        server.shutdown()


def send(mock: Mock) -> None:
    """One Meter Event, as a total is sent."""

    async def talk() -> None:
        client = Stripe(KEY, api_base=mock.url, livemode=False, clock=SystemClock())
        try:
            payload = {"stripe_customer_id": "cus_1", "value": "-0.000000000001"}
            attempt = Attempt("tm1-x", "tm1-x:1", "tokens", "tokens", "1", payload, 1_790_000_000, "cus_1")
            assert await client.send(attempt) == Answer(200)
        finally:
            await client.close()

    asyncio.run(talk())


def try_sending(mock: Mock) -> None:
    """What `check` asks to learn what a key may do."""
    said = {each.what: each.level for each in stripe_check.findings(mock.config, KEY, SystemClock())}
    assert said["account"] == "ok"


def read(ask: Callable[[Account], object]) -> Callable[[Mock], None]:
    def asking(mock: Mock) -> None:
        with mock.account() as account:
            ask(account)

    return asking


SENDING: Final = "a Meter Event"
WANTED: Final = Destination("tokens")

REQUESTS: Final[dict[str, list[Callable[[Mock], None]]]] = {
    SENDING: [send],
    "v1.billing.meter_events.create": [try_sending],
    "v1.billing.meters.list": [read(lambda on: on.meters())],
    "v1.billing.meters.retrieve": [read(lambda on: on.event_name("mtr_1"))],
    "v1.billing.meters.create": [read(lambda on: on.make_meter("tokens", WANTED))],
    "v1.billing.meters.event_summaries.list": [
        read(lambda on: on.summaries("mtr_1", "cus_1", 0, 86_400)),
        read(lambda on: on.summaries("mtr_1", "cus_1", 0, 86_400, window="hour")),
        read(lambda on: on.summaries("mtr_1", "cus_1", 0, 86_400, window="day")),
        read(lambda on: on.minute("mtr_1", "cus_1", 60)),
    ],
    "v1.prices.list": [
        read(lambda on: on.prices("mtr_1")),
        read(lambda on: on.holder("tallyman-tokens")),
    ],
    "v1.prices.create": [
        read(lambda on: on.make_price("tokens", "mtr_1", Terms("0.000125", "eur", "week"), "key", take_over=False)),
        read(lambda on: on.make_price("tokens", "mtr_1", Terms(), "key", take_over=True)),
    ],
    "v1.customers.retrieve": [read(lambda on: on.customer("cus_1"))],
    "v1.customers.list": [read(lambda on: [*on.customers()])],
    "v1.customers.create": [read(lambda on: on.make_customer("acme"))],
    "v1.subscriptions.list": [read(lambda on: [*on.subscriptions("cus_1")])],
    "v1.subscriptions.create": [read(lambda on: on.make_subscription("cus_1", ["price_1", "price_2"]))],
}
"""What is called of Stripe's client, and how we call it; and what stage 2 sends."""


def test_every_call_of_stripes_client_is_tried_here() -> None:
    """Whoever adds one adds it here. What is not of version 1 of the API stripe-mock does not know."""
    called: set[str] = set()
    for file in PACKAGE_FOLDER.rglob("*.py"):
        called.update(re.findall(r"_client\.(v1(?:\.\w+)+)", file.read_text(encoding="utf-8")))
    assert called == set(REQUESTS) - {SENDING}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_we_ask_is_of_the_shape_that_stripe_wants(mock: Mock, name: str) -> None:
    """It is accepted. With a parameter more, or less by one that is necessary, it is not: it has been looked at."""
    for ask in REQUESTS[name]:
        mock.asked.clear()
        ask(mock)
        for each in mock.asked:
            probe = each.path.endswith("/meter_events") and not each.params
            assert each.status == (400 if probe else 200), f"{each.method} {each.path} {each.params}: {each.says}"
            assert each.headers["Stripe-Version"] == API_VERSION
            more = call(mock.mock, each.method, each.path, each.params + "&tallyman=1", each.headers)
            assert more[0] == 400, f"{each.path} takes anything"


@pytest.mark.parametrize(
    ("name", "necessary"),
    [
        (SENDING, {"event_name", "payload"}),
        ("v1.billing.meters.create", {"display_name", "event_name", "default_aggregation"}),
        ("v1.billing.meters.event_summaries.list", {"customer", "start_time", "end_time"}),
        ("v1.prices.create", {"currency"}),
        ("v1.subscriptions.create", {"customer"}),
    ],
)
def test_what_is_necessary_is_there(mock: Mock, name: str, necessary: set[str]) -> None:
    """Without it the request is refused, so that stripe-mock would notice if it were missing."""
    for ask in REQUESTS[name]:
        mock.asked.clear()
        ask(mock)
        (each,) = mock.asked
        for missing in necessary:
            less = "&".join(part for part in each.params.split("&") if not re.match(rf"{missing}(=|\[|%5B)", part))
            assert less != each.params, f"{missing} is not sent"
            assert call(mock.mock, each.method, each.path, less, each.headers)[0] == 400


def test_what_a_meter_event_consists_of(mock: Mock) -> None:
    """All of it is always there: a missing timestamp moves usage, a missing identifier bills it twice."""
    send(mock)

    (event,) = mock.asked
    assert (event.method, event.path) == ("POST", "/v1/billing/meter_events")
    assert event.names == {
        "event_name",
        "identifier",
        "timestamp",
        "payload[stripe_customer_id]",
        "payload[value]",
    }
    assert event.headers["Idempotency-Key"] == "tm1-x:1"
    assert event.headers["Authorization"] == f"Bearer {KEY}"
    assert dict(parse_qsl(event.params))["payload[value]"] == "-0.000000000001"


@pytest.mark.parametrize("customer", [None, "acme", "cus_1"])
def test_setting_up_asks_for_nothing_that_stripe_does_not_know(mock: Mock, customer: str | None) -> None:
    with mock.account() as account:
        pieces = [each.kind for each in setup(mock.config, account, Terms(), customer)]

    assert pieces[:3] == ["meter", "product", "price"]
    assert {each.status for each in mock.asked} == {200}


def test_checking_an_account_needs_a_key(mock: Mock) -> None:
    """A key of the wrong shape is refused, which is all that stripe-mock knows of keys."""
    account = Account("nonsense", api_base=mock.url, livemode=False, clock=SystemClock(), attempts=1)
    with contextlib.closing(account), pytest.raises(KeyRefused):
        account.meters()


def test_the_version_that_we_pin_is_newer_than_what_is_checked_here(mock: Mock) -> None:
    """stripe-mock judges by the version that it knows, whatever a request asks for; told to mind, it refuses ours."""
    assert API_VERSION > SPECIFIED
    with mock.account() as account:
        account.meters()
    assert mock.asked[0].status == 200
    if ADDRESS in os.environ:
        return
    with listening("-strict-version-check") as strict:
        headers = {"Authorization": f"Bearer {KEY}", "Stripe-Version": API_VERSION}
        status, body = call(strict, "GET", "/v1/billing/meters", "", headers)
        assert (status, f"doesn't match version in OpenAPI specification '{SPECIFIED}'" in body.decode()) == (400, True)
        assert call(strict, "GET", "/v1/billing/meters", "", {**headers, "Stripe-Version": SPECIFIED})[0] == 200
