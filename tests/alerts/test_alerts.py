"""The alert rules: Prometheus' own tool judges and tries them, and they ask for nothing that is not exposed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from consumer.deadletters import REASONS
from consumer.deliver.answers import Verdict
from consumer.deliver.entries import Reason
from consumer.runtime.webhooks import Result
from consumer.storage import Stage
from tests.alerts.rules import (
    OTHERS,
    ROOT,
    RULES,
    SCRAPED,
    STORIES,
    alerts,
    asked,
    exposed,
    groups,
    labels_of,
    matchers,
    recorded,
)

RUNBOOK = ROOT / "docs" / "runbook.md"

VALUES: dict[str, set[str]] = {
    "outcome": {"counted", "duplicate", "dead_letter", "ignored"},
    "reason": {*REASONS, *Reason},
    "result": {*(each.value for each in Verdict), *(each.value for each in Result)},
    "mode": {"send", "hold", "shadow"},
    "stage": {*Stage},
    "state": {
        *("delivered", "unbilled", "zero", "refused", "discarded", "shadowed", "rounded", "pending", "parked"),
        *("unread", "equal", "open", "doubt", "differs"),
    },
    "container": {"tallyman"},
}
"""What the labels that rules look at can be."""


@pytest.fixture(scope="session")
def promtool() -> str:
    """Prometheus' tool. Under CI it has to be there."""
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI"):
            raise FileNotFoundError("promtool is not on the PATH: install Prometheus (Debian's package prometheus)")
        pytest.skip("no promtool: install Prometheus (Debian's package prometheus)")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_rules(promtool: str) -> None:
    """As files of Prometheus, without a warning."""
    _run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


@pytest.mark.parametrize("file", STORIES, ids=lambda file: file.name)
def test_the_alerts_fire_when_they_should_and_no_others_do(promtool: str, file: Path) -> None:
    """The stories beside this file."""
    _run(promtool, "test", "rules", str(file))


@cache
def _stories() -> list[dict[str, Any]]:
    return [story for file in STORIES for story in yaml.safe_load(file.read_text())["tests"]]


def _expected(question: dict[str, Any]) -> set[str]:
    return {
        name for each in question.get("exp_samples", ()) for name in re.findall(r'alertname="(\w+)"', each["labels"])
    }


@pytest.mark.parametrize("name", alerts())
def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_is_quiet(name: str) -> None:
    """Quiet although what it asks for is there: at another time of the story, or in another one."""
    fires = quiet = False
    for story in _stories():
        there = {re.split(r"[{ ]", each["series"])[0] for each in story["input_series"]}
        for question in story["promql_expr_test"]:
            if name in _expected(question):
                fires = True
            elif asked(alerts()[name].expr) & there and "alertname=" not in question["expr"]:
                quiet = True
    assert fires
    assert quiet


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_what_whoever_is_woken_needs(name: str) -> None:
    """How bad, for how long and why so long, what it means in a sentence, and where to read on; of no customer."""
    alert = alerts()[name]
    assert alert.severity in {"page", "ticket"}
    assert re.fullmatch(r"\d+[mhd]", alert.wait)
    assert set(alert.annotations) == {"summary", "description", "for_reason", "runbook_url"}
    assert all(text.endswith(".") for key, text in alert.annotations.items() if key != "runbook_url")
    assert alert.annotations["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert "customer" not in " ".join(re.findall(r"\{\{.*?\}\}", str(alert.annotations)))


def test_every_alert_has_its_place_in_the_runbook_and_every_place_its_alert() -> None:
    """With what it means, what to look at and what to do."""
    text = RUNBOOK.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (Tallyman\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(alerts())
    for name, section in sections.items():
        parts = re.findall(r"^\*\*(.+?)\*\*", section, re.MULTILINE)
        assert parts == ["Means.", "Look at.", "Do."], name
        assert f"`{alerts()[name].severity}`" in section, name
        assert f"`{alerts()[name].wait}`" in section, name


def _queries() -> list[tuple[str, str]]:
    return [(name, alert.expr) for name, alert in alerts().items()] + list(recorded().items())


@pytest.mark.parametrize(("name", "expr"), _queries(), ids=lambda each: each if re.fullmatch(r"[\w:]+", each) else "")
def test_every_metric_that_a_rule_names_is_exposed_with_these_labels(name: str, expr: str) -> None:
    """A rule about what is not there would never fire."""
    assert asked(expr), name
    assert asked(expr) <= exposed().keys() | OTHERS.keys()
    for metric, label, value in matchers(expr):
        assert label in labels_of(metric) | SCRAPED, f"{metric} has no label {label}"
        assert value in VALUES[label], f"{metric} has no {label} {value}"
    grouped = {label for labels in re.findall(r"(?:by|on) \(([^)]*)\)", expr) for label in labels.split(", ")}
    assert grouped <= set().union(*map(labels_of, asked(expr))) | SCRAPED


def test_rules_are_plain_prometheus() -> None:
    """Groups that Prometheus reads as they are: the chart puts them into a resource."""
    for file in RULES:
        assert set(yaml.safe_load(file.read_text())) == {"groups"}
        assert all(set(group) == {"name", "rules"} for group in groups(file))
