"""A page that shows a dashboard's panels as Prometheus answers them; a browser makes a picture of it."""

from __future__ import annotations

import html
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.alerts.grafana import Dashboard, Panel, dashboard

Points = list[tuple[float, float]]
Ask = Callable[[str, bool], list[tuple[dict[str, str], Points]]]
"""Answers a panel's query: series with their points; at this moment alone where the second argument says so."""


class Line(NamedTuple):
    """One series of a panel."""

    name: str
    labels: dict[str, str]
    points: Points


WIDTH: Final = 1360
_COLUMN: Final = WIDTH / 24
_UNIT: Final = 25
"""Pixels for one unit of Grafana's grid."""

_COLOURS: Final = (
    *("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9"),
    *("#8ab8ff", "#96d98d", "#ffb357", "#ca95e5", "#c0d8ff", "#ff7383"),
)
_LEVELS: Final = {"green": "#37872d", "orange": "#c15c17", "red": "#c4162a"}
_STYLE: Final = """
body { margin: 0; background: #111217; color: #ccccdc; font: 12px 'DejaVu Sans', sans-serif; }
h1 { font-size: 17px; font-weight: normal; margin: 0; padding: 12px 14px 2px; }
p { margin: 0; padding: 0 14px 8px; color: #8e8ea0; }
.board { position: relative; }
.row { position: absolute; font-size: 14px; padding: 4px 10px; }
.panel { position: absolute; box-sizing: border-box; background: #181b1f; border: 1px solid #25272e; overflow: hidden; }
.panel h2 { font-size: 11.5px; font-weight: bold; margin: 5px 8px 3px; white-space: nowrap; }
.legend { padding: 1px 8px; font-size: 10px; line-height: 13px; height: 26px; overflow: hidden; }
.legend span { margin-right: 10px; white-space: nowrap; }
.legend b { display: inline-block; width: 10px; height: 3px; margin-right: 4px; vertical-align: middle; }
.stats { display: flex; height: 70px; gap: 2px; }
.stat { flex: 1; text-align: center; color: #fff; overflow: hidden; padding-top: 8px; }
.stat div { font-size: 11px; white-space: nowrap; }
.stat big { font-size: 22px; }
table { border-collapse: collapse; width: 100%; } td, th { padding: 5px 10px; text-align: right; font-size: 12px; }
th { color: #6e9fff; font-weight: normal; } tr + tr { border-top: 1px solid #25272e; }
td:first-child, th:first-child { text-align: left; }
svg text { fill: #8e8ea0; font-size: 9.5px; }
"""


def page(of: Dashboard, ask: Ask, note: str) -> tuple[str, int]:
    """The page, and how many pixels high it is."""
    whole = dashboard(of)
    parts = []
    for shown, part in zip(whole["panels"], of.parts, strict=True):
        at = shown["gridPos"]
        width, height = at["w"] * _COLUMN - 6, at["h"] * _UNIT - 6
        place = f"left:{at['x'] * _COLUMN + 3:.0f}px;top:{at['y'] * _UNIT}px;width:{width:.0f}px;height:{height}px"
        if isinstance(part, Panel):
            inside = f"<h2>{html.escape(part.title)}</h2>" + _drawn(part, list(_lines(part, ask)), width, height)
            parts.append(f'<div class="panel" style="{place}">{inside}</div>')
        else:
            parts.append(f'<div class="row" style="{place}">{html.escape(part.title)}</div>')
    bottom = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in whole["panels"]) * _UNIT
    head = f"<h1>{html.escape(of.title)}</h1><p>{html.escape(note)}</p>"
    board = f'<div class="board" style="height:{bottom}px">{"".join(parts)}</div>'
    return f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style>{head}{board}", bottom + 70


def picture(content: str, height: int, to: Path) -> None:
    """Have a browser draw the page."""
    browser = shutil.which("chromium")
    if browser is None:
        raise FileNotFoundError("there is no chromium: install Debian's package chromium")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(content, encoding="utf-8")
        how = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile")
        where = (f"--window-size={WIDTH},{height}", f"--screenshot={to}", file.as_uri())
        subprocess.run([browser, *how, *where], check=True, capture_output=True, timeout=120)


def _lines(panel: Panel, ask: Ask) -> Iterator[Line]:
    for legend, expr in panel.queries.items():
        for labels, points in sorted(ask(expr, panel.kind != "timeseries"), key=lambda each: sorted(each[0].items())):
            if points:
                name = legend
                for label, value in labels.items():
                    name = name.replace("{{" + label + "}}", value)
                # What has no such label is the answer that there is none.
                yield Line("none" if "{{" in name else name, labels, points)


def _drawn(panel: Panel, lines: list[Line], width: float, height: float) -> str:
    if panel.kind == "stat":
        return _stats(panel, lines)
    return _table(panel, lines) if panel.kind == "table" else _graph(panel, lines, width, height)


def _stats(panel: Panel, lines: list[Line]) -> str:
    shown = []
    for line in lines:
        value = line.points[-1][1]
        named = [text for low, high, text in panel.names if low <= value <= (math.inf if high is None else high)]
        levels = [colour for at, colour in panel.levels if at is None or value >= at]
        colour = _LEVELS[levels[-1]] if levels else "#181b1f"
        text = named[0] if named else _written(value, panel.unit)
        size = "" if len(text) < 9 else ' style="font-size:15px"'
        name = html.escape(line.name.removeprefix("Tallyman"))
        shown.append(f'<div class="stat" style="background:{colour}"><div>{name}</div><big{size}>{text}</big></div>')
    return f'<div class="stats">{"".join(shown)}</div>'


def _table(panel: Panel, lines: list[Line]) -> str:
    cells = {(each.labels["meter"], each.labels["state"]): each.points[-1][1] for each in lines}
    states = sorted({state for _, state in cells})
    head = "".join(f"<th>{state}</th>" for state in ("meter", *states))
    rows = (
        f"<tr><td>{meter}</td>" + "".join(f"<td>{_written(cells.get((meter, s), 0), panel.unit)}</td>" for s in states)
        for meter in sorted({meter for meter, _ in cells})
    )
    return f"<table><tr>{head}</tr>{'</tr>'.join(rows)}</tr></table>"


def _graph(panel: Panel, lines: list[Line], width: float, height: float) -> str:
    left, top, right, bottom = 52.0, 6.0, width - 10, height - 70.0
    # What stays at nothing is told by the legend: a dozen of them would hide the others.
    drawn = _stacked(lines) if panel.stacked else [(each.points, None) for each in lines]
    values = [value for points, _ in drawn for _, value in points] or [0.0]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    times = [at for each in lines for at, _ in each.points] or [0.0, 1.0]
    begin, end = min(times), max(*times, min(times) + 1)

    def x(at: float) -> float:
        return left + (at - begin) / (end - begin) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    marks = [
        _mark(y(low + (high - low) * n / 3), left, right, low + (high - low) * n / 3, panel.unit) for n in range(4)
    ]
    minutes = max(1, round((end - begin) / 60 / 6))
    marks += [
        f'<text x="{x(begin + at):.0f}" y="{bottom + 13:.0f}">{at // 60} min</text>'
        for at in range(0, int(end - begin) - 20, minutes * 60)
    ]
    for level, colour in panel.levels:
        if level is not None and low < level < high:
            where = f'x1="{left}" x2="{right:.0f}" y1="{y(level):.1f}" y2="{y(level):.1f}"'
            marks.append(f'<line {where} stroke="{_LEVELS[colour]}" stroke-dasharray="5 4"/>')
    for number, (points, below) in reversed(list(enumerate(drawn))):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        under = [(at, 0.0) for at, _ in points] if below is None else below
        area = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in reversed(under))
        marks.append(
            f'<polygon points="{path} {area}" fill="{colour}" fill-opacity="{0.35 if panel.stacked else 0.1}"/>'
        )
        marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
    legend = "".join(
        f'<span><b style="background:{_COLOURS[n % len(_COLOURS)]}"></b>{html.escape(each.name)}'
        f" {_written(each.points[-1][1], panel.unit)}</span>"
        for n, each in enumerate(lines)
    )
    drawing = f'<svg width="{width:.0f}" height="{height - 52:.0f}">{"".join(marks)}</svg>'
    return f'{drawing}<div class="legend">{legend}</div>'


def _mark(at: float, left: float, right: float, value: float, unit: str) -> str:
    line = f'<line x1="{left}" x2="{right:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#25272e"/>'
    return f'{line}<text x="{left - 6}" y="{at + 3:.1f}" text-anchor="end">{_written(value, unit)}</text>'


def _stacked(lines: Sequence[Line]) -> list[tuple[Points, Points | None]]:
    """Each on top of those before it, with what is below it."""
    times = sorted({at for each in lines for at, _ in each.points})
    sums = dict.fromkeys(times, 0.0)
    stacked: list[tuple[Points, Points | None]] = []
    for each in lines:
        below = list(sums.items())
        for at, value in each.points:
            sums[at] += value
        stacked.append((list(sums.items()), below))
    return stacked


_STEPS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def _written(value: float, unit: str) -> str:
    if unit == "s":
        for size, name in _STEPS:
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
        return f"{value * 1000:.3g} ms" if value else "0 s"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.4g} MiB"
    suffix = {"ops": "/s", "reqps": "/s"}.get(unit, "")
    for large, name in ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K")):
        if abs(value) >= large:
            return f"{value / large:.3g}{name}{suffix}"
    return f"{value:.3g}{suffix}"
