"""Dashboards as Grafana imports them: a panel is a question, what answers it, and how that is shown.

Everything else is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

SCHEMA: Final = 42
"""Grafana's schemaVersion; an older Grafana takes it, and a newer one migrates it."""

_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH: Final = 24
_HEIGHTS: Final = {"row": 1, "stat": 4, "timeseries": 8, "table": 5}

Levels = tuple[tuple[float | None, str], ...]
"""From which value on which colour."""
Names = tuple[tuple[float, float | None, str], ...]
"""What values of a range are called."""


@dataclass(frozen=True)
class Panel:
    """A question and what answers it."""

    title: str
    about: str
    queries: dict[str, str]
    """By legend. ``FILTER`` stands for what is chosen at the top of the dashboard."""
    kind: str = "timeseries"
    width: int = 8
    unit: str = "short"
    levels: Levels = ()
    names: Names = ()
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A heading."""

    title: str


@dataclass(frozen=True)
class Dashboard:
    """One file."""

    uid: str
    title: str
    about: str
    since: str
    parts: tuple[Panel | Row, ...]


def dashboard(of: Dashboard) -> dict[str, Any]:
    """The whole file."""
    return {
        "uid": of.uid,
        "title": of.title,
        "description": of.about,
        "tags": ["tallyman"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": of.since, "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "title": "Tallyman", "tags": ["tallyman"], "asDropdown": True, "includeVars": True}
        ],
        "templating": {"list": [_source(), _choice("job", "Job"), _choice("pipeline", "Pipeline")]},
        "panels": list(_panels(of.parts)),
    }


def _source() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "refresh": 1}


def _choice(label: str, title: str) -> dict[str, Any]:
    query = f"label_values(tallyman_build_info, {label})"
    return {
        "type": "query",
        "name": label,
        "label": title,
        "datasource": _SOURCE,
        "query": {"query": query, "refId": label},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also what has no such label.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(parts: tuple[Panel | Row, ...]) -> Iterator[dict[str, Any]]:
    x = y = tallest = 0
    for number, part in enumerate(parts, start=1):
        kind, width = ("row", _WIDTH) if isinstance(part, Row) else (part.kind, part.width)
        if x + width > _WIDTH or kind == "row":
            x, y, tallest = 0, y + tallest, 0
        at = {"x": x, "y": y, "w": width, "h": _HEIGHTS[kind]}
        x, tallest = x + width, max(tallest, at["h"])
        if isinstance(part, Row):
            yield {"id": number, "type": "row", "title": part.title, "gridPos": at, "collapsed": False, "panels": []}
        else:
            yield {"id": number, "gridPos": at} | _panel(part)


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "targets": [
            {
                "refId": "ABCDEFGH"[number],
                "datasource": _SOURCE,
                "editorMode": "code",
                "expr": expr.replace("FILTER", 'job=~"$job", pipeline=~"$pipeline"'),
                "legendFormat": legend,
                "format": "table" if panel.kind == "table" else "time_series",
                "instant": panel.kind != "timeseries",
                "range": panel.kind == "timeseries",
            }
            for number, (legend, expr) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        "transformations": _MATRIX if panel.kind == "table" else [],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.levels:
        steps = [{"value": value, "color": colour} for value, colour in panel.levels]
        defaults |= {"thresholds": {"mode": "absolute", "steps": steps}}
        if panel.kind == "stat":
            defaults |= {"color": {"mode": "thresholds"}}
    if panel.names:
        ranges = (
            {"type": "range", "options": {"from": low, "to": high, "result": {"index": number, "text": text}}}
            for number, (low, high, text) in enumerate(panel.names)
        )
        defaults |= {"mappings": list(ranges)}
    if panel.kind == "timeseries":
        custom: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
        if panel.stacked:
            custom |= {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 30}
        if panel.levels:
            custom |= {"thresholdsStyle": {"mode": "dashed"}}
        defaults |= {"custom": custom}
    return defaults


_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "background",
        "graphMode": "none",
        "textMode": "auto",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "table": {"showHeader": True},
}

_MATRIX: Final = [
    {
        "id": "groupingToMatrix",
        "options": {"rowField": "meter", "columnField": "state", "valueField": "Value", "emptyValue": "null"},
    }
]
"""A row for each meter, a column for each state."""


def text(of: Dashboard) -> str:
    """The file."""
    return json.dumps(dashboard(of), indent=1, ensure_ascii=False) + "\n"
