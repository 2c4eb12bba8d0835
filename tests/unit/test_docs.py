"""The documentation says what is so: references are generated, commands and links are looked up, examples are run.

``TALLYMAN_WRITE_DOCS=1 python -m pytest tests/unit/test_docs.py`` writes the generated parts anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from prometheus_client import CollectorRegistry, ProcessCollector
from typer.testing import CliRunner

from consumer import cli, config
from consumer.deadletters import REASONS
from consumer.deliver.answers import Answer, Heard, Lost, NeverConnected, Verdict, judge
from consumer.deliver.delivery import Attempt, Delivery
from consumer.deliver.pacing import Outlet
from consumer.runtime.clocks import SystemClock
from consumer.runtime.customers import CustomerFile, Passthrough
from consumer.runtime.intake import Intake
from consumer.runtime.membership import Alone
from consumer.runtime.metrics import Reports, Requests, State
from consumer.runtime.reporter import Reporter
from consumer.runtime.reports import Reported
from consumer.runtime.source import Source
from consumer.runtime.stripe import Stripe
from consumer.runtime.totals_log import SqliteTotals
from consumer.storage.sqlite import SqliteStore
from consumer.tokens import Tokens

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITE = "TALLYMAN_WRITE_DOCS"

HOSTS = {"localhost", "127.0.0.1", "api.stripe.com", "dashboard.stripe.com", "cloudevents.io", "keepachangelog.com"}
"""All that an address in the documentation may name."""

_BEGIN = "<!-- generated: {}, by tests/unit/test_docs.py -->"
_END = "<!-- end of generated part -->"


def _relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _check_generated(page: Path, name: str, lines: list[str]) -> None:
    """The part of the page between its two comments is these lines; written there where that is asked for."""
    begin = _BEGIN.format(name)
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    inside, closed, after = rest.partition(_END)
    assert found, f"{_relative(page)} has no part that begins with {begin}"
    assert closed, f"{_relative(page)}: {begin} has no end"
    expected = "\n\n" + "\n".join(lines) + "\n\n"
    if os.environ.get(WRITE):
        page.write_text(f"{before}{begin}{expected}{_END}{after}", encoding="utf-8")
    else:
        assert inside == expected, f"{_relative(page)} is stale: run this test with {WRITE}=1"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# The reference of the configuration


def test_the_reference_of_the_configuration_is_current() -> None:
    """Every key of the schema, with its type, default and meaning."""
    schema = config.schema()
    _check_generated(ROOT / "docs" / "configuration.md", "keys", [*_section(schema, schema, "")][:-1])


def _section(schema: dict[str, Any], section: dict[str, Any], place: str) -> Iterator[str]:
    inner: list[tuple[str, str, dict[str, Any]]] = []
    yield from (_row("key", "what it takes", "default", "meaning"), _row(*["---"] * 4))
    for name, key in section["properties"].items():
        required = name in section.get("required", ())
        default = "**required**" if required else _default(key)
        below = _sections(schema, key)
        # The key that tells two kinds of section apart stands before the keys of each.
        takes = "keys, see below" if below else _takes(key)
        meaning = key.get("description") or below[0]["description"]
        yield _row(f"`{place}{name}`", takes, default, meaning)
        for each in below:
            kind = each["properties"].get("kind", {}).get("const")
            inside = f"{place}{name}{'[]' if key.get('type') == 'array' else ''}"
            inner.append((f"{inside}, kind `{kind}`" if kind else inside, inside, each))
    yield ""
    for title, inside, each in inner:
        yield f"{'#' * (3 if '.' not in inside else 4)} {title}"
        yield ""
        yield each["description"]
        yield ""
        yield from _section(schema, each, f"{inside}.")


def _sections(schema: dict[str, Any], key: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that may stand under a key."""
    references = [each.get("$ref") for each in (key, key.get("items", {}), *key.get("oneOf", key.get("anyOf", ())))]
    return [schema["$defs"][each.rsplit("/", 1)[-1]] for each in references if each]


def _default(key: dict[str, Any]) -> str:
    if "default" not in key:
        return ""
    default = key["default"]
    return "unset" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _takes(key: dict[str, Any]) -> str:
    kinds = [each for each in key.get("anyOf", [key]) if each.get("type") != "null"]
    return " or ".join(_kind(each) for each in kinds)


def _kind(key: dict[str, Any]) -> str:
    if values := key.get("enum", [key["const"]] if "const" in key else None):
        return ", ".join(f"`{value}`" for value in values)
    if key.get("examples"):
        return "duration"
    if key.get("pattern") == r"^\$":
        return "path"
    if key.get("format") == "date-time":
        return "time"
    bounds = [f"{word} {key[name]}" for word, name in (("from", "minimum"), ("to", "maximum")) if name in key]
    return " ".join([_TYPES[key["type"]], *bounds])


_TYPES = {
    "string": "text",
    "integer": "whole number",
    "boolean": "`true`, `false`",
    "array": "list",
    "object": "keys with values",
}


# The reference of the metrics


_SUFFIX = {"counter": "_total", "info": "_info"}


class _Family(NamedTuple):
    """What /metrics says of one family."""

    name: str
    kind: str
    labels: list[str]
    help: str


@pytest.fixture
def families(tmp_path: Path) -> list[_Family]:
    """All families of a service that has just been put together, and has made one request."""

    async def collected() -> list[_Family]:
        clock = SystemClock()
        source = Source({"bootstrap.servers": "127.0.0.1:1", "log_level": "0"}, "usage-events", "docs")
        stripe = Stripe("sk_test_docs", api_base="http://127.0.0.1:1", livemode=False, clock=clock)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        requests = Requests(registry, grace=0, clock=clock)
        Reports(registry).rejected(Reported("evt_1", None, 0, 10, {"no_meter": 1}, ()), 0)
        requests.observe(Attempt("tm1", "tm1", "m", "m", "1", {}, 0, "cus_1"), Answer(200), 0.1)
        with SqliteStore.open(tmp_path / "t.db", now=clock.now, create=True, lock=True) as store:
            intake = Intake(
                source,
                store,
                Alone(0),
                lambda *_: pytest.fail("there is nothing to restore"),
                clock=clock,
                commit_every=5_000,
                open_keys=1,
                witness=lambda: None,
                committed=lambda: None,
            )
            outlet = Outlet(1)
            names = tmp_path / "customers.yaml"
            names.write_text("acme: cus_123\n")
            reporter = Reporter(
                store,
                Alone(0),
                lambda *_: pytest.fail("there is nothing to restore"),
                unread=SqliteTotals(store),
                ahead=SqliteTotals(store),
                deliver=lambda customers: Delivery(customers=customers, in_flight=1, parked_limit=1, outlet=outlet),
                stripe=stripe,
                outlet=outlet,
                spread=1,
                clock=clock,
                customers=Passthrough(),
                file=CustomerFile(names),
                hold=True,
                observe=requests.observe,
            )
            intake.run(lambda: True)
            tokens = Tokens(lambda: pytest.fail("nobody asks for one"))
            registry.register(
                State(intake, reporter, clock, intake.silence, grace=3_600_000, mode="send", tokens=tokens)
            )
            found = [
                _Family(m.name + _SUFFIX.get(m.type, ""), m.type, _labels(m), m.documentation)
                for m in registry.collect()
            ]
        await stripe.close()
        return found

    return asyncio.run(collected())


def _labels(metric: Any) -> list[str]:
    # A family that has no series yet knows its labels; one that is collected from a counter shows them in a series.
    if (known := getattr(metric, "_labelnames", None)) is not None and metric.type != "info":
        return list(known)
    return sorted({label for sample in metric.samples for label in sample.labels} - {"le"})


def test_the_reference_of_the_metrics_is_current(families: list[_Family]) -> None:
    """Every family that the service serves, with its type, labels and help."""
    lines = [_row("metric", "type", "labels", "meaning"), _row(*["---"] * 4)]
    lines += [
        _row(f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help)
        for each in families
    ]
    _check_generated(ROOT / "docs" / "metrics.md", "metrics", lines)


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_every_metric_that_a_page_names_is_served(page: Path, families: list[_Family]) -> None:
    """A query that is copied from the documentation finds its series."""
    served = {each.name for each in families}
    served |= {f"{each.name}_{part}" for each in families if each.kind == "histogram" for part in ("bucket", "count")}
    named = set(re.findall(r"\btallyman_[a-z_]+[a-z]\b", page.read_text(encoding="utf-8")))
    assert named <= served


def test_every_reason_of_a_dead_letter_is_explained_and_shown() -> None:
    """The table of reasons has those that the metrics begin with."""
    table = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8").partition("## Dead letters")[2]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in _CODE.findall(cell)} == set(REASONS)


# What Stripe's answers prove

ANSWERS: tuple[tuple[str, Heard], ...] = (
    ("no connection was established", NeverConnected()),
    ("the request may have been written, and no answer came: a timeout, a reset", Lost()),
    ("2xx", Answer(200)),
    (
        "400 `An event already exists with identifier …`",
        Answer(400, type="invalid_request_error", message="An event already exists with identifier tm1."),
    ),
    ("4xx without Stripe's error object: a proxy's", Answer(403)),
    ("409", Answer(409, type="invalid_request_error")),
    ("429, with or without a reason", Answer(429, type="invalid_request_error", code="lock_timeout")),
    (
        "any other answer that Stripe replays (`Idempotent-Replayed: true`)",
        Answer(400, type="invalid_request_error", message="No such customer", replayed=True),
    ),
    ("401", Answer(401, type="invalid_request_error")),
    ("403", Answer(403, type="invalid_request_error")),
    ("4xx `idempotency_error`", Answer(400, type="idempotency_error")),
    ("4xx with `Stripe-Should-Retry: true`", Answer(400, type="invalid_request_error", should_retry=True)),
    (
        "4xx `No active meter found …`, or codes `no_meter`, `archived_meter`",
        Answer(400, type="invalid_request_error", message="No active meter found for event name"),
    ),
    (
        "any other 4xx `invalid_request_error`, such as `No such customer`",
        Answer(400, type="invalid_request_error", message="No such customer: 'cus_1'"),
    ),
    ("4xx with an error of any other kind, as gateways have", Answer(404, type="not_found")),
    ("5xx", Answer(500, type="api_error")),
    ("3xx", Answer(302)),
)

NEXT = {
    Verdict.ABSENT: "tried again, with the next key",
    Verdict.UNPROVEN: "tried again, with the next key; after 23 hours parked as `in_doubt`",
    Verdict.DELIVERED: "finished as delivered; replayed on a first attempt: parked as `collision`",
    Verdict.DUPLICATE: "tried before: finished as delivered; on a first attempt: parked as `collision`",
    Verdict.BUSY: "tried again, with the same key",
    Verdict.UNAUTHORISED: "the stage pauses; the total stays to be retried",
    Verdict.MISMATCH: "tried before: tried again, with the next key; on a first attempt: parked as `collision`",
    Verdict.METER_REFUSED: "parked as `meter`, with what comes for the same event name",
    Verdict.REFUSED: "parked as `refused`; many of them pause the stage",
}

_AN_EVENT_IS_THERE = {Verdict.DELIVERED: "the event", Verdict.DUPLICATE: "nothing; an event is there"}


def test_the_table_of_answers_is_current() -> None:
    """Each answer is judged by the code; what is said of it stands beside the verdict."""
    lines = [
        _row("what was heard", "verdict", "what this attempt left", "what becomes of the total"),
        _row(*["---"] * 4),
    ]
    for what, heard in ANSWERS:
        verdict = judge(heard)
        left = "nothing" if verdict.left_nothing else _AN_EVENT_IS_THERE.get(verdict, "unknown")
        lines.append(_row(what, f"`{verdict.value}`", left, NEXT[verdict]))
    _check_generated(ROOT / "docs" / "delivery.md", "answers", lines)


def test_the_table_of_answers_has_every_verdict() -> None:
    """A new verdict has to be explained."""
    assert {judge(heard) for _, heard in ANSWERS} == set(Verdict) == set(NEXT)


# Commands

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


def _commands(page: Path) -> list[str]:
    """The command lines of `tallyman` that a page shows: in blocks after a prompt, and in running text."""
    text = page.read_text(encoding="utf-8")
    blocks = [line.removeprefix("$ ") for _, block in _FENCE.findall(text) for line in block.splitlines()]
    inline = _CODE.findall(_FENCE.sub("", text))
    return [line for line in (*blocks, *inline) if re.match(r"([A-Z_]+=\S+ )*tallyman [a-z-]", line)]


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    """With its options, also those of commands below commands."""
    for line in _commands(page):
        words = [word for word in shlex.split(line.split(" # ")[0]) if "=" not in word or word.startswith("-")][1:]
        command: Any = typer.main.get_command(cli.app)
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{_relative(page)}: {line}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word for word in words if word.startswith("-") and len(word) > 1} - options - {"--help"}
        assert not unknown, f"{_relative(page)}: {line}"


def test_every_command_helps() -> None:
    """`--help` of each command, and each command is in the README."""
    readme = README.read_text(encoding="utf-8")
    for path in _paths(typer.main.get_command(cli.app), ()):
        result = CliRunner().invoke(cli.app, [*path, "--help"])
        assert result.exit_code == 0
        if path:
            assert f"tallyman {path[0]}" in readme


def _paths(command: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield above
    for name, each in getattr(command, "commands", {}).items():
        yield from _paths(each, (*above, name))


# Examples, links and words


def test_the_configurations_of_the_readme_load(tmp_path: Path) -> None:
    """Whoever copies one has a configuration that is right in itself."""
    blocks = [block for kind, block in _FENCE.findall(README.read_text(encoding="utf-8")) if kind == "yaml"]
    whole = [block for block in blocks if "pipeline:" in block]
    assert whole
    for block in whole:
        file = tmp_path / "tallyman.yaml"
        file.write_text(block, encoding="utf-8")
        config.load(file, {})


_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Within the repository: to a file that is there, and to a heading that is in it."""
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_relative(page)}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{_relative(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """From the repository or, for short, from the package."""
    named = {code for code in _CODE.findall(page.read_text(encoding="utf-8")) if re.fullmatch(r"[\w/]+(\.py|/)", code)}
    assert {code for code in named if not (ROOT / code).exists() and not (ROOT / "consumer" / code).exists()} <= {
        "ledger/"
    }


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_relative)
def test_a_page_names_no_machine_and_no_other_host(page: Path) -> None:
    """No folders of whoever wrote it, no addresses but those that everybody needs, and nothing left to be written."""
    text = page.read_text(encoding="utf-8")
    hosts = set(re.findall(r"https?://([^\s/:)>\"'`]+)", text))
    assert hosts <= HOSTS
    assert not re.findall(r"/(?:home|root|Users|work|tmp)/\S*", text)
    assert not re.findall(r"\b(?:TODO|FIXME|TBD|XXX|Lorem)\b", text)
