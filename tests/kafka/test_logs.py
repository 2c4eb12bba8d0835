"""What the service logs where no person watches: one JSON object a line, and nothing about any customer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from consumer.sandbox.kafka import LocalKafka
from tests.kafka.harness import MINUTE, Bench, Service, Topic, bench, event, real_now, until

pytestmark = pytest.mark.kafka

CUSTOMERS: Final = ("cus_greta", "cus_hugo", "cus_ida")
PAYER: Final = "cus_payer"
VALUE: Final = 424242
SECRET: Final = "sk_test_confidential"  # noqa: S105 - opens nothing but the stand-in
PRIVATE: Final = (*CUSTOMERS, PAYER, str(VALUE), SECRET, "private-payload")
"""What no line may hold."""


@pytest.fixture
def on(own_kafka: LocalKafka, tmp_path: Path) -> Iterator[Bench]:
    with bench(own_kafka, tmp_path) as made:
        made.stripe.model.keys[SECRET] = None
        yield made


class Run:
    """`tallyman run` as it is started in production."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._file = service.folder / "stderr"
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def __call__(self, *, ends_with: int = 0) -> Iterator[None]:
        """It runs inside; outside it has ended, if it did not before, with this exit code."""
        command = [sys.executable, "-m", "consumer", "run", "-c", str(self._service.write())]
        environ = os.environ | {"STRIPE_SECRET_KEY": SECRET}
        with self._file.open("ab") as stderr, subprocess.Popen(command, stderr=stderr, env=environ) as process:
            try:
                yield
                if not ends_with:
                    process.send_signal(signal.SIGTERM)
                assert process.wait(30) == ends_with, self._file.read_text()[-3000:]
            finally:
                process.kill()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every line that it has written by now."""
        return [json.loads(line) for line in self._file.read_text().splitlines()]

    def says(self, *names: str) -> None:
        """Wait until it has said these."""
        until(
            lambda: set(names) <= {each["event"] for each in self.lines if each["event"] in names},
            f"it says {names}",
            within=60.0,
            context=self._file.read_text,
        )


def check_lines(lines: list[dict[str, Any]]) -> None:
    for each in lines:
        assert re.fullmatch("[a-z][a-z_]*", each["event"]), each
        assert each["level"] in {"info", "warning", "error", "critical"}, each
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", each["timestamp"]), each
        assert not [text for text in PRIVATE if text in json.dumps(each)], each


def use(topic: Topic, at: int) -> None:
    """Usage of all customers, some of it of no use, and what closes its windows."""
    for partition in range(topic.partitions):
        good = [event(VALUE, at=at, customer=customer) for customer in CUSTOMERS]
        bad = [event("private-payload", at=at, customer=CUSTOMERS[0]), b"private-payload", event(1, customer="")]
        topic.produce(*good, *bad, at=at, partition=partition)
        topic.produce(None, at=at + 5 * MINUTE, partition=partition)


@pytest.mark.parametrize("kind", ["sqlite", "kafka"])
def test_every_line_is_an_event_and_tells_of_no_customer(on: Bench, own_kafka: LocalKafka, kind: str) -> None:
    """Logs go where many may read them: to a collector, into tickets. Who a customer is stays in the state."""
    topic = Topic.create(on.kafka, 2, arrival="create_time")
    service = on.service(topic, commit_every="100ms")
    names = service.folder / "customers.yaml"
    names.write_text(f"{CUSTOMERS[0]}: {PAYER}\n{CUSTOMERS[1]}: null\n")
    service.set(customers={"kind": "file", "path": str(names)})
    service.set(kafka={"options": service.config["kafka"]["options"] | {"session.timeout.ms": 6000}})
    if kind == "kafka":
        service.config["storage"] = {"kind": "kafka"}
    on.stripe.model.accept_any_customer = False
    run = Run(service)
    with run():
        run.says("started")
        use(topic, real_now() - 60 * MINUTE)
        run.says("stripe_refused")
        names.write_text(f"{CUSTOMERS[0]}: {PAYER}\n{CUSTOMERS[0]}: {PAYER}\n")
        run.says("customer_file_refused")
        own_kafka.kill()
        run.says("kafka_client", "kafka_silent")
        own_kafka.start()
        run.says("kafka_answers")
        on.stripe.model.accept_any_customer = True
        names.write_text("".join(f"{each}: {PAYER}\n" for each in CUSTOMERS))
        run.says("customer_file_read")
        use(topic, real_now() - 45 * MINUTE)
        until(lambda: any(e.customer == PAYER for e in on.stripe.model.events), "some is billed", within=40.0)
    service.set(kafka={"topic": "no-such-topic"})
    with run(ends_with=1):
        run.says("failed")
    check_lines(run.lines)
    (failed,) = (each for each in run.lines if each["event"] == "failed")
    assert (failed["level"], failed["exit_code"]) == ("error", 1)
    assert failed["reason"].startswith("the topic no-such-topic does not exist at ")
    clients = [each for each in run.lines if each["event"] == "kafka_client"]
    assert {("error", "FAIL")} <= {(each["level"], each["facility"]) for each in clients}
    assert len(clients) < 60, "an outage is no flood of lines"


def test_what_nobody_catches_is_one_line_too() -> None:
    """A traceback of forty lines is forty events to a collector; and its variables hold what is nobody's business."""
    program = (
        "import asyncio, threading, warnings\n"
        "from consumer.runtime import logs\n"
        "logs.configure('info')\n"
        "logs.log_uncaught()\n"
        "def fails(private='cus_greta'):\n"
        "    raise RuntimeError('a fault of ours')\n"
        "thread = threading.Thread(target=fails, name='intake')\n"
        "thread.start()\n"
        "thread.join()\n"
        "warnings.warn('something is deprecated')\n"
        "async def main():\n"
        "    task = asyncio.create_task(asyncio.to_thread(fails))\n"
        "    await asyncio.sleep(0.1)\n"
        "    del task\n"
        "asyncio.run(main())\n"
        "fails()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    check_lines(lines)
    assert ended.returncode == 1
    assert [(each["event"], each["level"]) for each in lines] == [
        ("crashed", "critical"),
        ("library", "warning"),
        ("library", "error"),
        ("crashed", "critical"),
    ]
    for each in (lines[0], lines[2], lines[3]):
        (raised,) = each["exception"]
        assert (raised["exc_type"], raised["exc_value"]) == ("RuntimeError", "a fault of ours")
        assert raised["frames"][-1]["name"] == "fails"
    assert lines[0]["thread"] == "intake"
