"""The command line: what people read on it, what machines do, exit codes, and what commands write into the log."""

import json
import logging
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final

import msgspec
import pytest
import structlog
from typer.testing import CliRunner

from consumer import deadletters
from consumer import totals as log_of_totals
from consumer.cli import app
from consumer.config import load
from consumer.deadletters import DeadLetter
from consumer.deliver.answers import Heard, Lost
from consumer.deliver.delivery import Attempt
from consumer.deliver.entries import SAME_IDENTIFIER_FOR
from consumer.runtime import audit, logs, redrive, reset
from consumer.runtime.clocks import SystemClock
from consumer.runtime.source import Source, SourceError, Topic
from consumer.storage import Append, Facts, Log
from consumer.storage.sqlite import SqliteStore
from consumer.storage.sqlite_file import locked
from consumer.totals import Command, Total
from tests.totals import total_of
from tests.unit.delivery_world import NO_METER, OK, REFUSED, Names
from tests.unit.stage2 import StageTwo

T0: Final = 1_793_534_400
"""2026-11-01T12:00:00Z in seconds, as windows begin."""
NOW: Final = (T0 + 600) * 1000

CONFIG: Final = """\
pipeline: test
bill_from: 2026-11-01T00:00:00Z
kafka: {{bootstrap_servers: "127.0.0.1:1"}}
storage: {{kind: sqlite, path: {path}}}
stripe: {{livemode: false}}
http: {{port: 0}}
meters:
  - {{name: tokens, event_types: [used], aggregation: sum, value: $.n, stripe: {{event_name: tokens}}}}
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither keys nor a configuration from outside."""
    for name in ("STRIPE_SECRET_KEY", "STRIPE_SECRET_KEY_FILE", "TALLYMAN_CONFIG", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


class Place:
    """A configuration and its store, and stage 2 at work on it with answers that a test gives."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "tallyman.db"
        self.config = directory / "tallyman.yaml"
        self.config.write_text(CONFIG.format(path=self.path))

    def tallyman(self, *words: str, config: bool = True, **options: Any) -> Any:
        """The command with these words, at this place."""
        return CliRunner().invoke(app, [*words, *(["-c", str(self.config)] if config else [])], **options)

    @contextmanager
    def store(self) -> Iterator[SqliteStore]:
        with SqliteStore.open(self.path, now=lambda: NOW, create=True, lock=False) as store:
            yield store

    def close(self, *given: Total) -> None:
        """Totals, as stage 1 appends them."""
        with self.store() as store:
            store.append(Append(Log.TOTALS, b"k", log_of_totals.encode(each)) for each in given)

    def deliver(
        self,
        answer: Callable[[Attempt], Heard],
        *,
        known: dict[str, str | None],
        now: int = NOW,
        shadow: bool = False,
    ) -> None:
        """Stage 2 until it has nothing left to do at this time."""
        with self.store() as store:
            StageTwo(store, store, Names(known), now, shadow=shadow).work(answer)

    def commands(self) -> list[Command]:
        """What operators have decided, as the log has it."""
        with self.store() as store:
            records = [log_of_totals.decode(each.value) for each in store.read(Log.TOTALS, 0, 1000)]
        return [each for each in records if isinstance(each, Command)]

    def bury(self, *given: DeadLetter) -> None:
        """Dead letters, as stage 1 appends them."""
        with self.store() as store:
            store.append(Append(Log.DEAD_LETTERS, b"0", deadletters.encode(each)) for each in given)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def total(number: int, customer: str = "alice", *, value: str = "5", meter: str = "tokens") -> Total:
    """The total of a minute; the later the number, the later the minute."""
    return total_of(f"{number}-{customer}", T0 + number * 60 + 7, customer, value, meter=meter, event_name=meter)


def heard(attempt: Attempt) -> Heard:
    """What Stripe says to each customer of these tests."""
    if attempt.stripe_customer == "cus_gone":
        return REFUSED
    if attempt.event_name == "lost":
        return NO_METER
    return Lost("TimeoutError") if attempt.stripe_customer == "cus_silent" else OK


KNOWN: Final[dict[str, str | None]] = {
    "alice": "cus_alice",
    "free": None,
    "gone": "cus_gone",
    "silent": "cus_silent",
}


@pytest.fixture
def busy(place: Place) -> Place:
    """A total in every state that there is without a person, and two that stage 2 has not read yet."""
    place.close(
        total(1), total(2, "free"), total(3, value="0"), total(4, "gone"), total(5, "nobody"), total(6, meter="lost")
    )
    place.deliver(heard, known=KNOWN)
    place.close(total(7), total(8))
    return place


@pytest.fixture
def doubtful(busy: Place) -> Place:
    """And one that Stripe never answered about for a day."""
    busy.close(total(0, "silent"))
    busy.deliver(heard, known=KNOWN)
    busy.deliver(heard, known=KNOWN, now=NOW + SAME_IDENTIFIER_FOR + 1)
    return busy


def json_lines(result: Any) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def refusal(result: Any, exit_code: int = 2) -> str:
    """The message of a command that did nothing but say why not."""
    assert result.stdout == ""
    assert result.exit_code == exit_code
    assert "Traceback" not in result.stderr
    return str(result.stderr)


# The command line itself


@pytest.mark.parametrize(
    "words",
    [
        ["check"],
        ["produce"],
        ["totals"],
        ["parked", "list"],
        ["parked", "release", "x"],
        ["dead-letters", "list"],
        ["dead-letters", "redrive"],
        ["reset", "--bill-from", "2026-11-01T00:00:00Z"],
    ],
)
def test_every_command_shows_all_that_is_wrong_with_the_configuration(place: Place, words: list[str]) -> None:
    place.config.write_text(place.config.read_text().replace("stripe: {livemode: false}", "stripe: {lifemode: false}"))

    said = refusal(place.tallyman(*words))

    assert said == (
        f"tallyman: {place.config}: 2 errors\n\n"
        "  line 5, stripe.livemode\n"
        "    is required: true bills real customers, false is a sandbox. It must fit the key and every answer.\n\n"
        "  line 5, stripe.lifemode\n"
        "    unknown key (did you mean livemode?); allowed here: livemode, mode, finalization_grace, api_base, "
        "max_rate\n"
    )
    line = json.loads(refusal(place.tallyman("run")))
    assert (line["event"], line["level"], line["exit_code"]) == ("failed", "error", 2), "the service says it in its log"
    assert f"tallyman: {line['reason']}\n" == said


def test_a_configuration_that_is_not_there_is_named_with_what_the_system_says(place: Place) -> None:
    result = place.tallyman("totals", "-c", "nowhere.yaml", config=False)

    assert refusal(result) == "tallyman: nowhere.yaml: the configuration cannot be read: No such file or directory\n"


def test_the_configuration_may_be_named_by_the_environment(busy: Place) -> None:
    result = busy.tallyman("totals", "--json", config=False, env={"TALLYMAN_CONFIG": str(busy.config)})

    assert json_lines(result)


def test_a_store_that_does_not_exist_is_a_failure_with_its_cure(place: Place) -> None:
    message = f"tallyman: {place.path} does not exist: correct the path, or start the service once\n"

    assert refusal(place.tallyman("totals"), exit_code=1) == message


def test_python_m_consumer_is_the_same_command() -> None:
    said = subprocess.run([sys.executable, "-m", "consumer", "--version"], capture_output=True, text=True, check=True)

    assert said.stdout == CliRunner().invoke(app, ["--version"]).stdout
    assert said.stdout.startswith("tallyman ")


def test_what_nobody_foresaw_keeps_its_traceback(place: Place) -> None:
    with place.store() as store:
        store.append([Append(Log.TOTALS, b"k", b"no total")])

    result = place.tallyman("totals")

    assert isinstance(result.exception, msgspec.DecodeError)


@pytest.mark.parametrize(
    "words",
    [["totals"], ["parked", "list"], ["dead-letters", "list"]],
)
def test_a_table_of_everything_is_refused(busy: Place, words: list[str]) -> None:
    message = "tallyman: --limit 0 shows all of them, however many there are: add --json\n"

    assert refusal(busy.tallyman(*words, "--limit", "0")) == message


def test_a_time_that_cannot_be_read_is_explained(busy: Place) -> None:
    result = busy.tallyman("totals", "--since", "yesterday", env={"COLUMNS": "300"})

    assert result.exit_code == 2
    assert "'yesterday' is no time: write 2026-11-01T00:00:00Z, 2026-11-01, or how long ago, like 90m" in result.stderr


# Logs


def test_logs_are_json_lines_where_there_is_no_terminal_and_never_hold_a_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info")

    structlog.get_logger().info("started", key="sk_test_123abc", partitions=3)
    structlog.get_logger().debug("not_wanted")
    logging.getLogger("aiohttp.client").warning("slow %s", "answer")
    logging.getLogger("aiohttp.client").info("chatter")

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    for line in lines:
        assert line.pop("timestamp").endswith("Z")
    assert lines == [
        {"event": "started", "key": "[hidden]", "partitions": 3, "level": "info"},
        {"event": "library", "logger": "aiohttp.client", "message": "slow answer", "level": "warning"},
    ]


# check, without Kafka


def test_check_says_everything_that_is_wrong_at_once_each_with_its_cure(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.runtime.source.REQUEST_S", 0.5)
    text = place.config.read_text().replace(str(place.path), "missing/tallyman.db")
    place.config.write_text(text + "customers: {kind: file, path: missing.yaml}\n")

    result = place.tallyman("check", "--json", env={"STRIPE_SECRET_KEY": "sk_live_1"})

    assert result.exit_code == 1
    here = Path.cwd()
    assert [tuple(json.loads(line).values()) for line in result.stdout.splitlines()] == [
        ("ok", "configuration", f"{place.config} is right in itself"),
        (
            "error",
            "storage",
            f"there is no directory {here}/missing: create or mount it, or correct storage.path",
        ),
        (
            "error",
            "kafka",
            (
                "Kafka does not answer at 127.0.0.1:1 (Failed while waiting for controller: Local: Timed out): "
                "is it up, is bootstrap_servers right?"
            ),
        ),
        (
            "error",
            "stripe",
            (
                "stripe.livemode is false, but STRIPE_SECRET_KEY is no test key: give one that begins with sk_test_ or "
                "rk_test_, or correct stripe.livemode"
            ),
        ),
        ("ok", "rate", "25 calls a second are enough for 1500 customers with usage in every window"),
        ("error", "customers", "customers.path: missing.yaml cannot be read: No such file or directory"),
        ("ok", "http", "0.0.0.0:0 is free"),
    ]


def test_check_warns_where_a_topic_that_is_produced_again_would_be_billed_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumer.runtime.source.REQUEST_S", 0.5)
    place.config.write_text(place.config.read_text() + "windows: {deduplicate_for: 24h, accept_late: 48h}\n")

    found = [json.loads(line) for line in place.tallyman("check", "--json").stdout.splitlines()]

    (warning,) = (finding for finding in found if finding["what"] == "duplicates")
    assert warning["level"] == "warning"
    assert "accepts events longer (accept_late) than their ids are remembered (deduplicate_for)" in warning["says"]


def test_check_of_a_wrong_configuration_is_json_too(place: Place) -> None:
    place.config.write_text("pipeline: [")

    result = place.tallyman("check", "--json")

    assert result.exit_code == 2
    finding = json.loads(result.stdout)
    assert (finding["level"], finding["what"]) == ("error", "configuration")
    assert result.stderr == f"tallyman: {finding['says']}\n"


# totals


def test_totals_shows_every_total_once_with_where_it_stands_the_newest_window_first(busy: Place) -> None:
    lines = json_lines(busy.tallyman("totals", "--json"))

    assert [(line["identifier"], line["state"], line.get("reason")) for line in lines] == [
        ("tm1-8-alice", "pending", None),
        ("tm1-7-alice", "pending", None),
        ("tm1-6-alice", "parked", "meter"),
        ("tm1-5-nobody", "parked", "unmapped"),
        ("tm1-4-gone", "parked", "refused"),
        ("tm1-3-alice", "zero", None),
        ("tm1-2-free", "unbilled", None),
        ("tm1-1-alice", "delivered", None),
    ]
    assert lines[-1] == {
        "identifier": "tm1-1-alice",
        "state": "delivered",
        "meter": "tokens",
        "customer": "alice",
        "window_start": T0 + 60,
        "window": "1m",
        "revision": 0,
        "value": "5",
        "events": 3,
        "timestamp": T0 + 67,
        "event_name": "tokens",
        "billed": "5",
        "stripe_customer": "cus_alice",
        "at": NOW,
    }


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--state", "delivered"], [1]),
        (["--state", "pending", "--state", "zero"], [8, 7, 3]),
        (["--state", "parked"], [6, 5, 4]),
        (["--meter", "lost"], [6]),
        (["--customer", "gone"], [4]),
        (["--customer", "cus_alice", "--state", "delivered"], [1]),
        (["--since", "2026-11-01T12:06:00Z"], [8, 7, 6]),
        (["--until", "2026-11-01T12:03:00Z"], [2, 1]),
        (["--since", "2026-11-01", "--until", "2026-11-01"], []),
        (["--limit", "3"], [8, 7, 6]),
    ],
)
def test_totals_are_filtered(busy: Place, options: list[str], numbers: list[int]) -> None:
    lines = json_lines(busy.tallyman("totals", "--json", *options))

    assert [int(line["identifier"].split("-")[1]) for line in lines] == numbers


def test_a_limit_says_how_many_more_there_are_beside_the_answer(busy: Place) -> None:
    result = busy.tallyman("totals", "--limit", "3")

    assert "tm1-6-alice" in result.stdout
    assert "tm1-5-nobody" not in result.stdout
    assert result.stderr == "and 5 more: raise --limit, or ask for less\n"


def test_a_table_of_nothing_says_so(busy: Place) -> None:
    assert busy.tallyman("totals", "--customer", "somebody").stdout == "none\n"


def test_all_totals_are_streamed_as_lines_of_json(busy: Place) -> None:
    assert len(json_lines(busy.tallyman("totals", "--json", "--limit", "0"))) == 8


def test_a_table_that_is_piped_keeps_identifiers_whole(busy: Place) -> None:
    long = "tm1-20261101T1200Z-1m-r0-" + "0123456789abcdef" * 4
    busy.close(msgspec.structs.replace(total(9), identifier=long))

    assert long in busy.tallyman("totals").stdout


def test_memory_does_not_grow_with_the_number_of_totals(place: Place) -> None:
    place.close(*(total(number) for number in range(20_000)))

    with place.store() as store:
        tracemalloc.start()
        found = sum(1 for _ in audit.lines(store, audit.Wanted()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert found == 20_000
    assert peak < 4_000_000, "20,000 lines are more than 20 MB"


# parked


def test_parked_totals_are_listed_with_what_stripe_said(busy: Place) -> None:
    result = busy.tallyman("parked", "list")

    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "identifier", "tm1-6-alice", "tm1-5-nobody", "tm1-4-gone",
    ]  # fmt: skip
    assert "No such customer: 'cus_gone'" in result.stdout
    assert "2026-11-01T12:04:00Z 1m" in result.stdout


def test_parked_totals_as_json_are_filtered(busy: Place) -> None:
    lines = json_lines(busy.tallyman("parked", "list", "--reason", "refused", "--meter", "tokens", "--json"))

    assert [(line["identifier"], line["message"], line["may_be_at_stripe"]) for line in lines] == [
        ("tm1-4-gone", "No such customer: 'cus_gone'", False)
    ]
    assert lines[0]["total"]["value"] == "5"


def test_showing_a_parked_total_says_what_to_do(doubtful: Place) -> None:
    refused = doubtful.tallyman("parked", "show", "tm1-4-gone").stdout
    silent = doubtful.tallyman("parked", "show", "tm1-0-silent").stdout

    assert refused.endswith(
        "Recommendation: release. Nothing of it is at Stripe. Put right what Stripe says, then release it; or discard "
        "it, and nobody is billed.\nTo do so: tallyman parked release tm1-4-gone\n"
    )
    assert silent.endswith(
        "Recommendation: cannot tell. Stripe's sum is not known: it was not asked, because there is no Stripe key: set "
        "STRIPE_SECRET_KEY, or STRIPE_SECRET_KEY_FILE to a file that holds it.\n"
        "Whoever knows better releases or discards it with --despite-doubt.\n"
    )


def test_what_others_wrote_cannot_take_over_the_terminal(place: Place) -> None:
    place.close(total(1, "\x1b[2J[red]evil\x07"))
    place.deliver(heard, known={})

    shown = place.tallyman("parked", "list").stdout

    assert "\\x1b[2J[red]evil\\x07" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("action", ["release", "discard"])
def test_a_total_that_may_be_at_stripe_is_not_decided_about_blindly(doubtful: Place, action: str) -> None:
    assert refusal(doubtful.tallyman("parked", action, "tm1-4-gone", "tm1-0-silent", "--why", "x")) == (
        f"tallyman: tm1-0-silent may be at Stripe, and to {action} it is not recommended. Stripe's sum is not known: "
        "it was not asked, because there is no Stripe key: set STRIPE_SECRET_KEY, or STRIPE_SECRET_KEY_FILE to a file "
        "that holds it. Nothing was changed. `tallyman parked show tm1-0-silent` shows all that is known; whoever "
        "knows better adds --despite-doubt.\n"
    )
    assert doubtful.commands() == []


def test_a_total_that_is_not_parked_cannot_be_decided_about(busy: Place) -> None:
    assert refusal(busy.tallyman("parked", "discard", "tm1-4-gone", "tm1-1-alice", "--why", "x")) == (
        "tallyman: not parked: tm1-1-alice. `tallyman parked list` shows what is, `tallyman totals` what became of the "
        "others. Nothing was changed.\n"
    )
    assert busy.commands() == []


def test_discarding_needs_a_reason(busy: Place) -> None:
    message = 'tallyman: discarding usage needs a reason: add --why "…"\n'

    assert refusal(busy.tallyman("parked", "discard", "tm1-4-gone")) == message


def test_a_decision_about_nothing_or_about_everything_is_refused(busy: Place) -> None:
    assert refusal(busy.tallyman("parked", "release")) == (
        "tallyman: which totals? Give identifiers, or --reason or --meter to release all that match\n"
    )
    assert refusal(busy.tallyman("parked", "release", "tm1-4-gone", "--meter", "tokens")) == (
        "tallyman: give identifiers, or --reason and --meter, not both\n"
    )


def test_a_decision_is_a_record_of_who_decided_what_and_why(busy: Place) -> None:
    result = busy.tallyman("parked", "discard", "tm1-4-gone", "tm1-5-nobody", "--by", "eve", "--why", " test ")

    assert result.stdout == (
        "tm1-4-gone: not applied yet\n"
        "tm1-5-nobody: not applied yet\n"
        "no service is running: the decision is in the log, and is applied as soon as a service reads it\n"
    )
    commands = busy.commands()
    assert [(each.action, each.identifier, each.by, each.reason) for each in commands] == [
        ("discard", "tm1-4-gone", "eve", "test"),
        ("discard", "tm1-5-nobody", "eve", "test"),
    ]
    busy.deliver(heard, known=KNOWN)
    (line,) = json_lines(busy.tallyman("totals", "--json", "--customer", "gone"))
    assert (line["state"], line["by"], line["reason"]) == ("discarded", "eve", "test")


def test_a_selection_is_shown_and_confirmed_and_leaves_out_what_may_be_at_stripe(doubtful: Place) -> None:
    asked = doubtful.tallyman("parked", "release", "--meter", "tokens", input="n\n")
    assert asked.exit_code == 1
    assert "tm1-4-gone" in asked.stdout
    assert "tm1-0-silent" not in asked.stdout
    assert "Release 2 parked totals? [y/N]: n" in asked.stdout
    assert asked.stderr.startswith(
        "1 are left out: they may be at Stripe, and to release them is not recommended; `tallyman parked show` "
        "explains each\n"
    )
    assert doubtful.commands() == []

    assert doubtful.tallyman("parked", "release", "--meter", "tokens", "--yes").exit_code == 0
    assert {each.identifier for each in doubtful.commands()} == {"tm1-4-gone", "tm1-5-nobody"}


def test_many_decisions_are_answered_by_their_number(place: Place) -> None:
    place.close(*(total(number, "nobody") for number in range(60)))
    place.deliver(heard, known={})

    result = place.tallyman("parked", "release", "--reason", "unmapped", "--yes")

    assert result.stdout.startswith("60 not applied yet\n")


@contextmanager
def running(place: Place, known: dict[str, str | None]) -> Iterator[None]:
    """A service on the file, as far as commands can tell: it holds the lock and applies what is in the log."""
    stop, holds = Event(), Event()

    def serve() -> None:
        with locked(place.path), place.store() as store:
            stage_two = StageTwo(store, store, Names(known), NOW)
            stage_two.work(heard)
            holds.set()
            while not stop.wait(0.05):
                stage_two.work(heard)

    thread = Thread(target=serve)
    thread.start()
    assert holds.wait(10)
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_beside_a_running_service_a_decision_waits_to_tell_what_became_of_it(busy: Place) -> None:
    with running(busy, KNOWN | {"gone": "cus_here"}):
        discarded = busy.tallyman("parked", "discard", "tm1-5-nobody", "--why", "a test customer")
        released = busy.tallyman("parked", "release", "tm1-4-gone", "tm1-6-alice")

    assert discarded.stdout == "tm1-5-nobody: discarded\n"
    assert released.stdout == "tm1-4-gone: delivered: 5 to cus_here\ntm1-6-alice: parked (meter)\n"


# dead letters

EVENT: Final = b'{"specversion":"1.0","id":"e1","source":"/svc","type":"used","subject":"alice","data":{"n":1.10}}'


def letter(number: int, reason: str = "value_missing", **changes: Any) -> DeadLetter:
    usual: dict[str, Any] = {"detail": "$.m is not there", "key": b"alice", "headers": [], "value": EVENT}
    return DeadLetter(number % 2, number, NOW + number, reason, **(usual | changes))


def test_dead_letters_are_listed_with_reason_place_and_event(place: Place) -> None:
    place.bury(letter(1), letter(2, "not_json", value=b"\xff"), letter(3, value=None, key=None, headers=None))
    with place.store() as store:
        store.mark_redriven(store.read(Log.DEAD_LETTERS, 0, 1))

    lines = json_lines(place.tallyman("dead-letters", "list", "--json"))

    assert lines[2] == {
        "number": 1,
        "reason": "value_missing",
        "detail": "$.m is not there",
        "partition": 1,
        "offset": 1,
        "arrival": NOW + 1,
        "source": "/svc",
        "id": "e1",
        "kept": True,
        "redriven_at": NOW,
        "traceparent": None,
        "tracestate": None,
    }
    assert [(line["number"], line["id"], line["kept"], line["redriven_at"]) for line in lines] == [
        (3, None, False, None),
        (2, None, True, None),
        (1, "e1", True, NOW),
    ]
    table = place.tallyman("dead-letters", "list", "--limit", "2")
    assert table.stderr == "and 1 more: raise --limit, or ask for less\n"
    assert "value_missing" in table.stdout


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--reason", "not_json"], [2]),
        (["--partition", "1"], [3, 1]),
        (["--since", "2026-11-01T12:10:00.002Z"], [3, 2]),
        (["--limit", "1"], [3]),
        (["--limit", "0"], [1, 2, 3]),
    ],
)
def test_dead_letters_are_filtered(place: Place, options: list[str], numbers: list[int]) -> None:
    place.bury(letter(1), letter(2, "not_json"), letter(3))

    lines = json_lines(place.tallyman("dead-letters", "list", "--json", *options))

    assert [line["number"] for line in lines] == numbers


def test_a_dead_letter_is_shown_whole_as_text_where_it_is_text(place: Place) -> None:
    place.bury(letter(1, headers=[("ce_id", b"e\x1b1")]), letter(2, value=b"\xff\x00"))

    text = place.tallyman("dead-letters", "show", "1").stdout
    assert text.endswith(EVENT.decode() + "\n")
    assert "e\\x1b1" in text
    assert "2 bytes that are no text, in base64: /wA=" in place.tallyman("dead-letters", "show", "2").stdout
    (whole,) = json_lines(place.tallyman("dead-letters", "show", "2", "--json"))
    assert (whole["key"], whole["headers"], whole["value"]) == ("alice", [], {"base64": "/wA="})


def test_a_dead_letter_that_does_not_exist_is_said(place: Place) -> None:
    place.bury(letter(1))

    assert refusal(place.tallyman("dead-letters", "show", "2")) == (
        "tallyman: there is no dead letter 2: `tallyman dead-letters list` shows their numbers\n"
    )


def test_a_redriven_event_without_a_time_gets_its_first_arrival_and_stays_as_it_is_otherwise() -> None:
    value, headers = redrive.with_time(letter(123))

    assert headers == []
    assert value == EVENT[:-1] + b',"time":"2026-11-01T12:10:00.123Z"}'


@pytest.mark.parametrize(
    ("given", "headers", "written", "headers_written"),
    [
        (b'{"time":"2020-01-01T00:00:00Z"}', [], b'{"time":"2020-01-01T00:00:00Z"}', []),
        (b'{"time":null,"n":1e3}', [], b'{"time":"2026-11-01T12:10:00.000Z","n":1e3}', []),
        (b'{"n":1}', [("ce_id", b"1")], b'{"n":1}', [("ce_id", b"1"), ("ce_time", b"2026-11-01T12:10:00.000Z")]),
        (b'{"n":1}', [("CE_Time", b"x")], b'{"n":1}', [("CE_Time", b"x")]),
        (
            b'{"n":1}',
            [("content-type", b"application/cloudevents+json"), ("ce_id", b"1")],
            b'{"n":1,"time":"2026-11-01T12:10:00.000Z"}',
            [("content-type", b"application/cloudevents+json"), ("ce_id", b"1")],
        ),
        (b"no event", [], b"no event", []),
        (b"[" * 5000, [], b"[" * 5000, []),
        (b'{"a":' * 5000, [], b'{"a":' * 5000, []),
    ],
)
def test_event_times_are_written_where_the_mode_of_the_event_has_them(
    given: bytes,
    headers: list[tuple[str, bytes]],
    written: bytes,
    headers_written: list[tuple[str, bytes]],
) -> None:
    assert redrive.with_time(letter(0, value=given, headers=headers)) == (written, headers_written)


# reset, as far as it does without Kafka


def begun(place: Place, *, bill_from: int = T0 * 1000) -> None:
    with place.store() as store:
        store.begin(Facts("test", "c", "usage-events", "t", bill_from, 0, NOW), {})


def looked(place: Place) -> reset.Old | reset.Lost:
    return reset.look(load(place.config, {}), SystemClock())


def judged(old: reset.Old | reset.Lost, bill_from: int, *, read_before: bool = True, unknown: bool = False) -> str:
    with pytest.raises(reset.ResetRefused) as caught:
        reset.judge(old, bill_from * 1000, NOW, read_before=read_before, newest_unknown=unknown)
    return str(caught.value)


def test_reset_is_refused_while_the_service_runs(busy: Place) -> None:
    begun(busy)
    with running(busy, KNOWN):
        message = refusal(busy.tallyman("reset", "--bill-from", "2026-11-02T00:00:00Z"), exit_code=1)

    assert message == (
        f"tallyman: {busy.path} is in use by pid {os.getpid()} on {os.uname().nodename}: stop that first, or give this "
        "service a file of its own\n"
    )


def test_reset_may_not_begin_before_the_end_of_the_newest_window_that_has_a_total(busy: Place) -> None:
    begun(busy)
    old = looked(busy)

    assert judged(old, T0 + 539) == (
        "--bill-from 2026-11-01T12:08:59Z is before the end of the newest window that has a total: what lies between "
        "would be billed twice. The earliest time possible is 2026-11-01T12:09:00Z."
    )
    reset.judge(old, (T0 + 540) * 1000, NOW, read_before=True, newest_unknown=False)


def test_reset_may_not_begin_before_what_an_archived_state_may_have_billed(place: Place) -> None:
    begun(place)

    assert judged(looked(place), T0 - 60) == (
        "--bill-from 2026-11-01T11:59:00Z is before 2026-11-01T12:00:00Z, from which this state counts: an earlier one "
        "may have billed what lies between. If you know that nothing was billed there, add --newest-total-unknown."
    )


def test_reset_does_not_bill_what_stripe_would_refuse(place: Place) -> None:
    begun(place)

    assert judged(looked(place), T0 - 35 * 86_400) == (
        "--bill-from 2026-09-27T12:00:00Z is more than 34 days back: Stripe refuses older usage. The earliest time "
        "possible is 2026-09-28T12:10:00Z."
    )


def test_reset_after_a_lost_file_needs_somebody_who_answers_for_what_was_billed(place: Place) -> None:
    gone = looked(place)

    assert judged(gone, T0) == (
        f"{place.path} is not there, so nobody knows here up to when usage has been billed. Look at Stripe for the "
        "newest meter event of this pipeline, choose --bill-from after the end of its window, and add "
        "--newest-total-unknown: whatever was billed after that time would be billed twice."
    )
    reset.judge(gone, T0 * 1000, NOW, read_before=True, newest_unknown=True)
    assert judged(gone, T0, read_before=False, unknown=True) == (
        f"{place.path} is not there, and this pipeline has not run before: there is nothing to start over. Set "
        "bill_from: 2026-11-01T12:00:00Z in the configuration and start with `tallyman run`."
    )


def test_a_file_that_a_refused_start_left_empty_is_a_lost_one(place: Place) -> None:
    with place.store():
        pass

    assert looked(place) == reset.Lost(f"{place.path} holds no state")


def test_reset_counts_what_is_given_up(busy: Place) -> None:
    begun(busy)

    old = looked(busy)

    assert isinstance(old, reset.Old)
    given = {
        name: (each.pending.totals, each.pending.value, each.parked.totals, each.parked.value)
        for name, each in old.meters.items()
    }
    five = 5 * 10**12
    assert given == {"tokens": (2, 2 * five, 2, 2 * five), "lost": (0, 0, 1, five)}


def test_totals_that_are_not_kept_any_more_still_bound_a_reset(place: Place) -> None:
    place.close(total(1), total(2))
    begun(place)
    with place.store() as store:
        assert store.expire(Log.TOTALS, NOW + 1, 2) == 1

    old = looked(place)

    assert isinstance(old, reset.Old)
    assert old.newest == (T0 + 180) * 1000


def shadowed(place: Place) -> Place:
    """One total was billed; then three were shadowed, one for an hour; and one is unread."""
    place.close(total(1))
    place.deliver(lambda _: OK, known=KNOWN)
    place.close(total(2), msgspec.structs.replace(total(3), window="1h"), total(4))
    place.deliver(lambda _: OK, known=KNOWN, shadow=True)
    place.close(total(5))
    begun(place)
    place.config.write_text(place.config.read_text().replace("livemode: false", "livemode: false, mode: shadow"))
    return place


def test_totals_are_shown_as_shadowed(place: Place) -> None:
    lines = json_lines(shadowed(place).tallyman("totals", "--json", "--state", "shadowed"))

    assert [(line["identifier"], line["stripe_customer"]) for line in lines] == [
        ("tm1-4-alice", "cus_alice"),
        ("tm1-3-alice", "cus_alice"),
        ("tm1-2-alice", "cus_alice"),
    ]
    assert "billed" not in lines[0]


def test_what_was_shadowed_may_be_billed_after_a_reset_from_the_beginning_of_its_windows(place: Place) -> None:
    """Nobody has been billed for it here; but no window may be half somebody else's."""
    old = looked(shadowed(place))

    assert isinstance(old, reset.Old)
    assert (old.newest, old.shadowed) == ((T0 + 120) * 1000, (T0 + 180 + 3600) * 1000)
    assert judged(old, T0 + 119) == (
        "--bill-from 2026-11-01T12:01:59Z is before the end of the newest window that has a total: what lies between "
        "would be billed twice. The earliest time possible is 2026-11-01T12:02:00Z."
    )
    assert judged(old, T0 + 1800) == (
        "--bill-from 2026-11-01T12:30:00Z lies within a window of which a total was shadowed, and part of it would be "
        "shadowed and billed. Choose 2026-11-01T12:00:00Z or 2026-11-01T13:00:00Z, up to which somebody else bills."
    )
    reset.judge(old, (T0 + 3600) * 1000, NOW, read_before=True, newest_unknown=False)
    place.config.write_text(place.config.read_text().replace("mode: shadow", "mode: send"))
    sending = looked(place)
    assert isinstance(sending, reset.Old)
    assert sending.newest == (T0 + 360) * 1000, "what is unread would be sent"


def test_a_total_that_may_have_been_sent_before_shadow_bounds_a_reset(place: Place) -> None:
    place.close(total(1), total(2))
    place.deliver(lambda _: Lost("TimeoutError"), known=KNOWN)
    place.close(total(3))
    place.deliver(lambda _: OK, known=KNOWN, shadow=True)
    begun(place)
    place.config.write_text(place.config.read_text().replace("livemode: false", "livemode: false, mode: shadow"))

    old = looked(place)

    assert isinstance(old, reset.Old)
    assert (old.newest, old.shadowed) == ((T0 + 180) * 1000, (T0 + 240) * 1000)


def test_what_was_shadowed_and_is_counted_anew_is_shown_once(place: Place) -> None:
    """In topics the outcomes of the life before a reset stay where they are."""
    place.close(total(1), total(2), total(3))
    place.deliver(lambda _: OK, known=KNOWN, shadow=True)
    with place.store() as store:
        store.begin(Facts("test", "c", "usage-events", "t", (T0 + 120) * 1000, 0, NOW + 1), {})
    place.close(total(2), total(3))
    place.deliver(lambda _: OK, known=KNOWN, now=NOW + 2)

    lines = json_lines(place.tallyman("totals", "--json"))

    assert [(line["identifier"], line["state"]) for line in lines] == [
        ("tm1-3-alice", "delivered"),
        ("tm1-2-alice", "delivered"),
        ("tm1-1-alice", "shadowed"),
    ]


def test_a_reset_that_fails_leaves_everything_as_it_was(busy: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumer.runtime.source.REQUEST_S", 0.2)
    begun(busy)
    config, before = load(busy.config, {}), looked(busy)
    source = Source({"bootstrap.servers": "127.0.0.1:1", "log_level": "0"}, "usage-events", "g")
    topic = Topic("c", "usage-events", "t", 1, log_append_time=True)

    with pytest.raises(SourceError):
        reset.reset(config, before, source, topic, bill_from=NOW, clock=SystemClock())

    after = looked(busy)
    assert isinstance(after, reset.Old)
    assert isinstance(before, reset.Old)
    assert (after.facts, after.newest) == (before.facts, before.newest)
    assert [*busy.path.parent.glob("tallyman.db.before*")] == []
    assert len(json_lines(busy.tallyman("totals", "--json"))) == 8


@pytest.mark.parametrize("text", ["2026-11-01", "2026-11-01T00:00:00", "2026-11-01T00:00:00.5Z", "24h"])
def test_reset_takes_only_a_time_that_leaves_no_doubt(place: Place, text: str) -> None:
    result = place.tallyman("reset", "--bill-from", text, env={"COLUMNS": "200"})

    assert result.exit_code == 2
    assert f"'{text}' is no time in whole seconds: write it like 2026-11-01T00:00:00Z" in result.stderr
