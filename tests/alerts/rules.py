"""What the alert rules and the dashboards ask for, and what the service exposes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
RULES: Final = sorted((ROOT / "helm" / "alerts").glob("*.yaml"))
STORIES: Final = sorted(Path(__file__).parent.glob("*_test.yaml"))

OTHERS: Final = {"kube_pod_container_status_restarts_total": {"namespace", "pod", "container"}}
"""Metrics that are not ours, with their labels: of kube-state-metrics."""

SCRAPED: Final = frozenset({"namespace", "job", "pipeline", "instance", "pod"})
"""Labels that a series gets when it is scraped."""

_NAME: Final = re.compile(r"(?<![\w:])(?:tallyman|process|kube)_[a-z_]+[a-z](?![\w:])")
_SELECTOR: Final = re.compile(r"((?:\w+:)?[a-z]+_\w+(?::\w+)?)\{([^}]*)\}")
_MATCHER: Final = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


@dataclass(frozen=True)
class Alert:
    """One alert rule."""

    file: Path
    name: str
    expr: str
    wait: str
    """Its ``for``."""
    severity: str
    annotations: dict[str, str]


def groups(file: Path) -> list[dict[str, Any]]:
    """The groups of a file of rules."""
    return list(yaml.safe_load(file.read_text())["groups"])


@cache
def alerts() -> dict[str, Alert]:
    """All alerts, by name."""
    found = [
        Alert(file, rule["alert"], rule["expr"], rule.get("for", ""), rule["labels"]["severity"], rule["annotations"])
        for file in RULES
        for group in groups(file)
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert len({each.name for each in found}) == len(found), "each name once"
    return {each.name: each for each in found}


@cache
def recorded() -> dict[str, str]:
    """What rules record, by name."""
    return {
        rule["record"]: rule["expr"]
        for file in RULES
        for group in groups(file)
        for rule in group["rules"]
        if "record" in rule
    }


@cache
def exposed() -> dict[str, set[str]]:
    """The series that the service exposes, with their labels: as the reference says, which is generated from it."""
    series: dict[str, set[str]] = {}
    for row in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if found := re.match(r"\| `(\w+)` \| (\w+) \| (.*?) \|", row):
            name, kind, labels = found.groups()
            own = set(re.findall(r"`(\w+)`", labels))
            series |= {name: own}
            if kind == "histogram":
                series |= {f"{name}_bucket": own | {"le"}, f"{name}_sum": own, f"{name}_count": own}
    return series


def asked(expr: str) -> set[str]:
    """The metrics that a query names; of what is recorded, those that it is made from."""
    names = set(_NAME.findall(expr))
    for record, made_from in recorded().items():
        if record in expr:
            names |= asked(made_from)
    return names


def matchers(expr: str) -> list[tuple[str, str, str]]:
    """The conditions in a query: metric, label and each value, also of alternatives; without variables."""
    return [
        (metric, label, value)
        for metric, inside in _SELECTOR.findall(expr)
        for label, how, values in _MATCHER.findall(inside)
        if "$" not in values
        for value in (values.split("|") if "~" in how else [values])
    ]


def labels_of(metric: str) -> set[str]:
    """The labels of a metric, or of what is recorded, that do not come from the scrape."""
    if metric in recorded():
        return set().union(*(labels_of(each) for each in asked(metric)))
    return exposed().get(metric) or OTHERS.get(metric, set())
