"""The dashboards ask for what is exposed, and Grafana can import them as they are."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.alerts.dashboards import ALL, FOLDER
from tests.alerts.grafana import Dashboard, Panel, dashboard, text
from tests.alerts.rules import ROOT, SCRAPED, asked, exposed, labels_of, matchers
from tests.alerts.test_alerts import VALUES

PANELS = [pytest.param(part, id=part.title) for each in ALL for part in each.parts if isinstance(part, Panel)]


@pytest.mark.parametrize("of", ALL, ids=lambda each: each.uid)
def test_the_file_is_current(of: Dashboard) -> None:
    """``python -m tests.alerts.dashboards`` writes it."""
    assert (FOLDER / f"{of.uid}.json").read_text(encoding="utf-8") == text(of)


def test_there_are_no_other_files() -> None:
    """The chart takes all that are there."""
    assert {file.name for file in FOLDER.iterdir()} == {f"{of.uid}.json" for of in ALL}


@pytest.mark.parametrize("of", ALL, ids=lambda each: each.uid)
def test_grafana_can_import_it_as_it_is(of: Dashboard) -> None:
    """No data source but the one that is chosen, nothing of an instance, all panels in their places."""
    whole = dashboard(of)
    assert "id" not in whole
    assert "__inputs" not in whole
    assert [each["name"] for each in whole["templating"]["list"]] == ["datasource", "job", "pipeline"]
    panels: list[dict[str, Any]] = whole["panels"]
    assert len({each["id"] for each in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for each in panels:
        at = each["gridPos"]
        covered = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not covered & places, each["title"]
        assert max(x for x, _ in covered) < 24
        places |= covered
    sources = re.findall(r'"uid": "(\$[^"]*)"', json.dumps(panels))
    assert set(sources) == {"${datasource}"}


@pytest.mark.parametrize("of", ALL, ids=lambda each: each.uid)
def test_the_documentation_has_a_picture_of_it_that_is_soon_there(of: Dashboard) -> None:
    """``python -m tests.alerts.pictures`` makes it."""
    shown = (ROOT / "docs" / f"{of.uid}.png").read_bytes()
    assert shown.startswith(b"\x89PNG")
    assert len(shown) < 300_000


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_answers_the_question_in_its_title(panel: Panel) -> None:
    """With queries for what is exposed, narrowed to what is chosen."""
    assert panel.title.endswith("?")
    assert panel.about.endswith(".")
    for expr in panel.queries.values():
        assert asked(expr) or "ALERTS" in expr
        assert asked(expr) <= exposed().keys()
        selected = re.findall(r"\{([^{}]*)\}", expr)
        assert selected
        assert all("FILTER" in each for each in selected)
        for metric, label, value in matchers(expr):
            assert label in labels_of(metric) | SCRAPED
            assert value in VALUES[label]
        shown = {label for legend in panel.queries for label in re.findall(r"\{\{(\w+)\}\}", legend)}
        assert "customer" not in shown
