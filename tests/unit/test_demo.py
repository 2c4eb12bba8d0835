"""The demo: what it promises, and that it would say so if the promise were broken."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlencode

import pytest
from typer.main import get_command

from consumer.cli import app
from consumer.sandbox.comparison import compare
from consumer.sandbox.stripe import SECRET_KEY

DEADLINE_S = 90.0
MINUTE = 1_790_000_040  # a full minute, in seconds


@contextmanager
def demo(folder: Path, *, events: int) -> Iterator[subprocess.Popen[str]]:
    """The demo as a process of its own, with its temporary files in the folder."""
    # Whoever runs the tests in the background has told Ctrl-C to be ignored, by all that is started from there.
    interruptible = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{interruptible}from consumer.sandbox.demo import main; sys.exit(main(events={events}))",
        ],
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read its output up to a line that the pattern is found in; returns the pattern's first group."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"there is no {pattern} in\n{seen}")


def has_ended(pid: int) -> bool:
    """Whether there is no such process any more, soon."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


class Stripe:
    """The demo's stand-in, as anybody else who has the account's key uses it."""

    def __init__(self, url: str) -> None:
        self._address = url.removeprefix("http://")

    def post(self, path: str, form: dict[str, str]) -> None:
        # It fails on purpose: what may not have been done is asked for again.
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                if self._ask("POST", path, urlencode(form))[0] in {200, 400}:
                    return
        raise AssertionError(f"{path} is never answered")

    def events(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self._ask("GET", "/_sandbox/events")[1])
        return found

    def _ask(self, method: str, path: str, body: str = "") -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {SECRET_KEY}", "Content-Type": "application/x-www-form-urlencoded"}
        with closing(http.client.HTTPConnection(self._address, timeout=10)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()


def row(output: str, customer: str, meter: str) -> list[str]:
    """The numbers in the line of a customer and a meter: expected, billed, difference."""
    lines = iter(output.splitlines())
    for line in lines:
        if line.startswith(customer):
            while meter not in line:
                line = next(lines)  # noqa: PLW2901 - the meters of a customer are on lines of their own
            return line.split(meter)[1].split()
    raise AssertionError(f"no line of {customer} in\n{output}")


@pytest.mark.slow
def test_every_event_is_billed_once_though_the_service_is_killed_twice(tmp_path: Path) -> None:
    with demo(tmp_path, events=3_000) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert output.count("SIGKILL") == 2
    for meter in ("AI tokens", "API calls"):
        expected, billed, difference = row(output, "all", meter)
        assert expected == billed != "0"
        assert difference == "0"
    assert max(len(line) for line in output.splitlines()) <= 100
    assert not [*tmp_path.iterdir()], "temporary files are left"
    named = re.findall(r"^  tallyman (\S+) ", output, re.MULTILINE)
    assert named
    assert {*named} <= {*get_command(app).commands}, "it sends people to a command that does not exist"  # type: ignore[attr-defined]  # a group


@pytest.mark.slow
def test_what_somebody_else_bills_or_cancels_at_stripe_shows_as_a_difference(tmp_path: Path) -> None:
    with demo(tmp_path, events=3_000) as process:
        stripe = Stripe(read_until(process, r"Stripe +(http://\S+)"))
        added = {"event_name": "api_calls", "payload[value]": "7", "payload[stripe_customer_id]": "cus_000000"}
        stripe.post("/v1/billing/meter_events", added | {"identifier": "somebody-else"})
        cancelled: list[dict[str, str]] = []
        while not cancelled:
            assert process.poll() is None
            cancelled = [event for event in stripe.events() if event["event_name"] == "ai_tokens"]
            time.sleep(0.02)
        event = cancelled[0]
        by_identifier = {"type": "cancel", "event_name": "ai_tokens", "cancel[identifier]": event["identifier"]}
        stripe.post("/v1/billing/meter_event_adjustments", by_identifier)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, output
    assert row(output, "cus_000000", "API calls")[2] == "+7"
    missing = Decimal(row(output, event["customer"], "AI tokens")[2].replace(",", ""))
    assert missing == -Decimal(event["value"])
    assert "This must not be" in output
    (kept,) = tmp_path.iterdir()
    assert f"kept in {kept}" in output.replace("\n", " ").replace("  ", " ")


def test_a_service_that_dies_by_itself_is_a_failure_and_its_log_is_shown(tmp_path: Path) -> None:
    with demo(tmp_path, events=60_000) as process:
        os.kill(int(read_until(process, r"process (\d+)")), signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, output
    assert "the service ended by itself, with exit code -9" in output
    assert "first_start" in output
    assert (next(tmp_path.iterdir()) / "service.log").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path, events=60_000) as process:
        service = int(read_until(process, r"process (\d+)"))
        process.send_signal(number)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert has_ended(service)
    assert not [*tmp_path.iterdir()]


def test_a_demo_that_is_killed_leaves_no_service_behind(tmp_path: Path) -> None:
    with demo(tmp_path, events=60_000) as process:
        service = int(read_until(process, r"process (\d+)"))
        process.kill()
    assert has_ended(service)


def test_a_number_of_events_that_the_demo_is_not_made_for_is_refused(tmp_path: Path) -> None:
    with demo(tmp_path, events=10) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "not 10" in output


def test_the_comparison_is_exact_to_the_last_decimal() -> None:
    expected = {("ai_tokens", "cus_1", MINUTE * 1000): 123_456_789_012_345_678}
    (line,) = compare(expected, {("ai_tokens", "cus_1", MINUTE): Decimal("123456.789012345678")}).values()
    assert (line.difference, line.minutes, line.wrong) == (Decimal(0), 1, 0)
    (line,) = compare(expected, {("ai_tokens", "cus_1", MINUTE): Decimal("123456.789012345679")}).values()
    assert (line.difference, line.wrong) == (Decimal("1e-12"), 1)


def test_usage_billed_in_the_wrong_minute_is_wrong_though_the_sum_is_right() -> None:
    expected = {("api_calls", "cus_1", MINUTE * 1000): 5 * 10**12}
    (line,) = compare(expected, {("api_calls", "cus_1", MINUTE + 60): Decimal(5)}).values()
    assert (line.difference, line.minutes, line.wrong) == (Decimal(0), 2, 2)


def test_what_is_not_billed_at_all_and_what_nobody_produced_are_differences() -> None:
    lines = compare({("api_calls", "cus_1", MINUTE * 1000): 10**12}, {("api_calls", "cus_2", MINUTE): Decimal(3)})
    assert lines["api_calls", "cus_1"].difference == -1
    assert lines["api_calls", "cus_2"].difference == 3
