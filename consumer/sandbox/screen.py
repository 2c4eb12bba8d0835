"""What the demo shows: on a terminal, progress that moves; elsewhere, plain lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from decimal import Decimal
from textwrap import fill
from types import TracebackType
from typing import Final, NamedTuple, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from consumer.sandbox.comparison import EXACT, Line
from consumer.sandbox.traffic import AI_TOKENS, API_CALLS, Counts, Expected

WIDTH: Final = 100
_BAR: Final = 40
_LINE_EVERY_S: Final = 1.0
_SHOWN: Final = {AI_TOKENS: ("AI tokens", 6), API_CALLS: ("API calls", 0)}
"""Names of the meters, and the decimals that they usually have."""


class Progress(NamedTuple):
    """How far it is."""

    events: int
    produced: int
    read: int
    totals: int
    billed: int
    kills: int
    answers: Mapping[str, int]
    """Of the stand-in."""


class Screen:
    """The demo's output. A context manager: progress is shown inside."""

    def __init__(self) -> None:
        probe = Console()
        moves = probe.is_terminal and not probe.is_dumb_terminal
        self._console = Console(highlight=False, width=min(probe.width, WIDTH) if moves else WIDTH)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if moves else None
        self._began = time.monotonic()
        self._line_at = self._began + _LINE_EVERY_S

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, what: RenderableType = "", style: str | None = None) -> None:
        """Print it. Text is printed as it is."""
        self._console.print(Text(what) if isinstance(what, str) else what, style=style)

    def tell(self, what: str, style: str | None = None) -> None:
        """Print what has happened, with the time."""
        self.say(Text.assemble((f"{time.monotonic() - self._began:5.1f} s  ", "dim"), (what, style or "")))

    def point(self, what: str) -> None:
        """Print one of several things to know."""
        self.say(fill(what, self._console.width, initial_indent="- ", subsequent_indent="  "))

    def show(self, progress: Progress) -> None:
        """Show how far it is."""
        if self._live is not None:
            self._live.update(_moving(progress), refresh=True)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + _LINE_EVERY_S
            self.tell(
                f"  produced {progress.produced:,}, read {progress.read:,}, "
                f"billed {progress.billed:,} of {progress.totals:,} totals"
            )


def _moving(progress: Progress) -> RenderableType:
    bars = Table.grid(padding=(0, 2))
    for name, done, of, what in (
        ("produced", progress.produced, progress.events, "events"),
        ("read", progress.read, progress.events, "events, committed"),
        ("billed", progress.billed, progress.totals, "totals, so far"),
    ):
        colour = "green" if done >= of else "cyan"
        bar = ProgressBar(max(of, 1), min(done, of), width=_BAR, complete_style=colour, finished_style=colour)
        bars.add_row(f"         {name}", bar, f"{done:,} of {of:,} {what}")
    answers = ", ".join(f"{count:,} {what}" for what, count in progress.answers.items())
    return Group("", bars, Text(f"         Stripe   {answers}\n         killed   {progress.kills} of 2 times", "dim"))


def table(expected: Expected, lines: Mapping[tuple[str, str], Line]) -> Table:
    """What was produced and what is billed, per customer."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column("customer", no_wrap=True)
    for name in ("events", "repeated", "late", "broken"):
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("meter", no_wrap=True)
    for name in ("expected", "billed", "difference"):
        shown.add_column(name, justify="right", overflow="fold")
    for customer in sorted(expected.customers.keys() | {customer for _, customer in lines}):
        counts = expected.customers.get(customer, Counts())
        _add(shown, customer, counts, {meter: lines.get((meter, customer), Line()) for meter in _SHOWN})
    shown.add_section()
    _add(shown, "all", expected.counts, {meter: _together(lines, meter) for meter in _SHOWN})
    return shown


def _add(shown: Table, who: str, counts: Counts, lines: Mapping[str, Line]) -> None:
    numbers = (counts.produced, counts.duplicates, counts.late, counts.malformed)
    first = [who, *(f"{each:,}" for each in numbers)]
    for meter, line in lines.items():
        name, decimals = _SHOWN[meter]
        found = Text(_plain(line.difference, 0, "+") if line.difference else "0", "bold red" if line.wrong else "green")
        shown.add_row(*first, name, _plain(line.expected, decimals), _plain(line.billed, decimals), found)
        first = [""] * len(first)


def _together(lines: Mapping[tuple[str, str], Line], meter: str) -> Line:
    of_meter = [line for (name, _), line in lines.items() if name == meter]
    together = Line()
    for line in of_meter:
        together.add(line.expected, line.billed)
    together.wrong = sum(line.wrong for line in of_meter)
    return together


def _plain(value: Decimal, decimals: int, sign: str = "") -> str:
    """All digits that it has, and at least so many decimals."""
    exponent = value.normalize(EXACT).as_tuple().exponent
    return f"{value:{sign},.{max(decimals, -int(exponent))}f}"
