"""How the command's answers look: tables for people, lines of JSON for machines, progress on a terminal alone."""

import base64
import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from consumer.runtime.audit import Line, Standing
from consumer.runtime.findings import Finding
from consumer.runtime.redrive import Letter, Redriven
from consumer.runtime.reset import GivenUp, Lost, Old
from consumer.runtime.setup import Piece
from consumer.runtime.start import shown
from consumer.totals import plain

T = TypeVar("T")

_WIDE: Final = 250
"""Columns where nobody looks at a terminal: identifiers are not broken."""

_EACH: Final = 50
"""So many decisions are answered one by one."""

_COLOURS: Final = {"ok": "green", "warning": "yellow", "error": "bold red"}


# Where it goes


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, whole: str = "") -> None:
    """Rows below their columns; ``whole`` is the column that is never cut."""
    made = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for name in columns:
        made.add_column(name, overflow="fold", no_wrap=bool(whole) and name == whole and not sys.stdout.isatty())
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(_clean(cell)) for cell in row))
    if not made.row_count:
        typer.echo("none")
        return
    Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False).print(made)


def json_line(found: object) -> None:
    """One JSON object on a line of its own."""
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")


def more(number: int) -> None:
    """Say that there is more than was shown, where JSON does not get in its way."""
    if number > 0:
        typer.echo(f"and {number} more: raise --limit, or ask for less", err=True)


def newest(
    found: Iterable[T],
    limit: int,
    key: Callable[[T], Any],
    *,
    as_json: bool,
    line: Callable[[T], object],
    rows: Callable[[Sequence[T]], None],
) -> None:
    """At most so many of what was found, the newest by this key first; with a limit of 0 all, as it comes, as JSON.

    ``line`` makes of each what is written as JSON, ``rows`` shows them as a table.
    """
    if not limit:
        for each in found:
            json_line(line(each))
        return
    with status("reading") as counted:
        chosen = heapq.nlargest(limit, counted(found), key=key)
    if as_json:
        for each in chosen:
            json_line(line(each))
    else:
        rows(chosen)
    more(counted.number - len(chosen))


class Counted:
    """How many of something went by, told on a terminal now and then."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.number = 0
        self.tell = tell

    def __call__(self, found: Iterable[T]) -> Iterator[T]:
        """The same things, counted."""
        for each in found:
            self.number += 1
            if not self.number % 10_000:
                self.tell(self.number)
            yield each


@contextmanager
def status(text: str) -> Iterator[Counted]:
    """Say on a terminal what is being waited for."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Counted(lambda _: None)
        return
    with console.status(f"{text} …") as spinner:
        yield Counted(lambda number: spinner.update(f"{text} … {number:,}"))


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how far it is; to be told how much is done."""
    bar = Progress(
        TextColumn(text),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


# What was found


def findings(found: Iterable[Finding]) -> None:
    """What `check` says."""
    table(("", "", ""), ((Text(each.level, _COLOURS[each.level]), each.what, each.says) for each in found))


def pieces(made: Iterable[Piece]) -> None:
    """What `setup` found and made."""
    table(
        ("", "", "id", "", ""),
        (
            (
                each.kind,
                Text("made", "green") if each.made else "there",
                each.id,
                each.says,
                each.link or "",
            )
            for each in made
        ),
    )


def totals(lines: Sequence[Line]) -> None:
    """Totals, one to a line."""
    table(
        ("identifier", "meter", "customer", "window", "value", "state", ""),
        (
            (
                each.identifier,
                each.meter,
                each.customer,
                window(each.window_start, each.window, each.revision),
                each.value,
                each.state,
                each.reason or each.stripe_customer or "",
            )
            for each in lines
        ),
        whole="identifier",
    )


def decided(lines: Mapping[str, Line | None]) -> None:
    """What became of totals that somebody decided about: of each, or of many by their number."""
    if len(lines) <= _EACH:
        for identifier, line in lines.items():
            typer.echo(f"{identifier}: {_became(line)}")
    else:
        for what, number in Counter(line.state if line else _became(None) for line in lines.values()).items():
            typer.echo(f"{number} {what}")


def _became(line: Line | None) -> str:
    if line is None:
        return "not applied yet"
    if line.state is Standing.PENDING:
        return "released, and about to be sent"
    if line.state is Standing.PARKED:
        return f"parked ({line.reason})"
    if line.billed is None:
        return line.state
    renamed = f" as {line.billed_as}" if line.billed_as else ""
    return f"{line.state}: {line.billed} to {line.stripe_customer}{renamed}"


def letter(each: Letter) -> dict[str, Any]:
    """A dead letter without its event, for machines."""
    source, id_ = each.event or (None, None)
    dead = each.letter
    return {
        "number": each.number,
        "reason": dead.reason,
        "detail": dead.detail,
        "partition": dead.partition,
        "offset": dead.offset,
        "arrival": dead.timestamp,
        "source": source,
        "id": id_,
        "kept": each.kept,
        "redriven_at": each.redriven_at,
        "traceparent": dead.traceparent,
        "tracestate": dead.tracestate,
    }


def event(each: Letter) -> dict[str, Any]:
    """The record of a dead letter: text where it is text, else base64."""
    dead = each.letter
    return {
        "key": _machine(dead.key),
        "headers": [(name, _machine(value)) for name, value in dead.headers or ()],
        "value": _machine(dead.value),
    }


def letters(found: Iterable[Letter]) -> None:
    """Dead letters, one to a line."""
    table(
        ("number", "reason", "detail", "partition", "offset", "arrival", "source", "id", "redriven"),
        (
            (
                each.number,
                each.letter.reason,
                each.letter.detail,
                each.letter.partition,
                each.letter.offset,
                shown(each.letter.timestamp),
                *(each.event or ("", "")),
                "no" if each.redriven_at is None else shown(each.redriven_at),
            )
            for each in found
        ),
    )


def letter_whole(each: Letter) -> None:
    """One dead letter with its event."""
    dead = each.letter
    table(
        ("", ""),
        [
            ("number", each.number),
            ("reason", dead.reason),
            ("detail", dead.detail),
            ("record", f"partition {dead.partition}, offset {dead.offset}, arrived {shown(dead.timestamp)}"),
            ("redriven", "no" if each.redriven_at is None else shown(each.redriven_at)),
            *(("trace", text) for text in (dead.traceparent, dead.tracestate) if text),
            ("key", _human(dead.key)),
            *((f"header {name}", _human(value)) for name, value in dead.headers or ()),
        ],
    )
    if dead.value is None:
        typer.echo("The event is larger than 256 KB: it is kept in the topic alone, at this offset.")
    else:
        typer.echo(_human(dead.value))


def redriven(done: Redriven, what: str, topic: str) -> None:
    """What a redrive did, or would do."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(done.reasons.items()))
    typer.echo(f"{done.produced} dead letters {what} to {topic} again{f' ({reasons})' if reasons else ''}")
    if done.before:
        typer.echo(f"{done.before} not, because they were redriven before: add --again to produce them once more")
    if done.old:
        typer.echo(
            f"{done.old} not, because they are older than deduplicate_for: one that was redriven before would count "
            "twice; add --even-old if you know that none was"
        )
    if done.earlier:
        typer.echo(
            f"{done.earlier} not, because they are from before the pipeline began anew, which has read the topic again "
            "from then on; add --even-old if you know that it has not read these"
        )
    if done.gone:
        typer.echo(
            f"{len(done.gone)} not, because they were kept in the topic alone and are gone from it: {_some(done.gone)}"
        )
    if done.refused:
        typer.echo(
            f"{len(done.refused)} not, because the broker refuses them (is max.message.bytes smaller than it was?): "
            f"{_some(done.refused)}"
        )


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (", …" if len(numbers) > 20 else "")


def given_up(old: Old | Lost) -> None:
    """What a reset loses."""
    if isinstance(old, Lost):
        typer.echo(f"{old.why}: what it held cannot be shown.")
        return
    newest = "none yet" if old.newest is None else f"up to {shown(old.newest)}"
    shadowed = "" if old.shadowed is None else f", shadowed ones up to {shown(old.shadowed)}"
    typer.echo(f"State since {shown(old.facts.bill_from)}, totals {newest}{shadowed}.")
    if not old.meters:
        typer.echo("Nothing is given up: no open window, and every total is finished.")
        return
    typer.echo("Given up, unless events from --bill-from on count them again:")
    table(
        ("meter", "not delivered", "value", "parked", "value", "events in open windows", "value"),
        ((name, *_columns(of)) for name, of in sorted(old.meters.items())),
    )


def _columns(of: GivenUp) -> tuple[object, ...]:
    pending, parked, open_ = of.pending, of.parked, of.open
    return (
        *(pending.totals, plain(pending.value)),
        *(parked.totals, plain(parked.value)),
        *(open_.events, plain(open_.value)),
    )


# Text that others wrote


def window(start: int, size: str, revision: int) -> str:
    """A window, from its start in seconds since the epoch."""
    return f"{shown(start * 1000)} {size}" + (f" r{revision}" if revision else "")


def _clean(cell: object) -> str:
    """Text that cannot take over a terminal: what does not print is written as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(cell))


def _human(content: bytes | None) -> str:
    if content is None:
        return "none"
    try:
        return _clean(content.decode())
    except UnicodeDecodeError:
        return f"{len(content)} bytes that are no text, in base64: {base64.b64encode(content).decode()}"


def _machine(content: bytes | None) -> str | dict[str, str] | None:
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
