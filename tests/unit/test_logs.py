"""The lines of the service's log, as the documentation lists them."""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "consumer"
DOCS = PACKAGE.parent / "docs" / "operations.md"
CALL = re.compile(r"""\blog(?:ger\(\))?\s*\.(?:debug|info|warning|error|critical)\(\s*(?:\#.*)?\s*"([^"]*)\"""")
PASSED_ON = {"kafka_client", "library", "crashed"}
"""Those that others begin; see runtime/logs.py."""


def said() -> set[str]:
    return {
        name for file in PACKAGE.rglob("*.py") if "sandbox" not in file.parts for name in CALL.findall(file.read_text())
    }


def test_every_event_of_the_log_is_explained() -> None:
    """Who is woken by a line looks for its name."""
    table = DOCS.read_text().partition("## Logs")[2].partition("## Traces")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    explained = {name for names in rows for name in re.findall("`([a-z_]+)`", names)}
    assert explained == said() | PASSED_ON


def test_a_line_has_a_name_and_not_a_sentence() -> None:
    """What varies is in its fields: only so can lines be counted and searched for."""
    found = said()
    assert len(found) > 25
    assert not [name for name in found if not re.fullmatch("[a-z]+(_[a-z]+)*", name)]
