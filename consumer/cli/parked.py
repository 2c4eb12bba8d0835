"""`tallyman parked`: totals that wait for a person or for a mapping, and what people decide about them."""

import getpass
import heapq
import os
from typing import Annotated, Literal

import typer

from consumer.cli import show
from consumer.cli.options import (
    CLOCK,
    DEFAULT,
    ConfigFile,
    Json,
    Limit,
    OfCustomer,
    OfMeter,
    Refused,
    Yes,
    check_limit,
    opened_store,
    read_config,
)
from consumer.deliver.entries import Entry, Reason
from consumer.runtime import audit
from consumer.runtime.start import shown
from consumer.storage import Archive, Log

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Totals that wait for a person or for a mapping."
)


OfReason = Annotated[Reason | None, typer.Option("--reason", help="Only those that are parked for this reason.")]
Identifiers = Annotated[list[str] | None, typer.Argument(help="Totals, as `tallyman parked list` names them.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; by default the user of this machine.")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait until a running service has done it.")]


@app.command("list")
def parked_list(
    *,
    config: ConfigFile = DEFAULT,
    reason: OfReason = None,
    meter: OfMeter = None,
    customer: OfCustomer = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Show the totals that wait for somebody.

    Reasons: unmapped (add the customer to the mapping: released by itself), refused (by Stripe, which says why), meter
    (Stripe has no such meter), collision and in_doubt (an event with that identifier may be at Stripe).

    Example: `tallyman parked list --reason refused`
    """
    check_limit(limit, as_json=as_json)
    with opened_store(read_config(config)) as store, show.status("reading") as counted:
        found = counted(audit.parked(store, reason=reason, meter=meter, customer=customer))
        chosen = list(found) if not limit else heapq.nlargest(limit, found, key=lambda entry: entry.total.due)
    if as_json:
        for entry in chosen:
            show.json_line(show.parked_total(entry))
    else:
        show.parked(chosen)
    show.more(counted.number - len(chosen))


@app.command("show")
def parked_show(
    identifier: Annotated[str, typer.Argument(help="As `tallyman parked list` names it.")],
    config: ConfigFile = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show all that is known of one parked total, and what can be done about it.

    Example: `tallyman parked show tm1-20261101T1200Z-1m-r0-0d6f…`
    """
    with opened_store(read_config(config)) as store:
        (entry,) = audit.named(store, [identifier])
    if as_json:
        show.json_line(show.parked_total(entry))
    else:
        show.parked_whole(entry)


@app.command()
def release(
    *,
    identifiers: Identifiers = None,
    config: ConfigFile = DEFAULT,
    reason: OfReason = None,
    meter: OfMeter = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit trail.")] = "",
    by: By = None,
    wait: Wait = 10.0,
    yes: Yes = False,
) -> None:
    """Send parked totals after all, because what kept them has been put right.

    Give identifiers, or say which with --reason and --meter. A total of which Stripe may already have an event is not
    released: that could bill it twice.

    Example: `tallyman parked release --reason meter --meter ai-tokens`
    """
    with opened_store(read_config(config)) as store:
        chosen = _chosen(store, "release", identifiers or [], reason, meter, yes=yes)
        _decide(store, "release", chosen, by=by, reason=why, wait=wait)


@app.command()
def discard(
    *,
    identifiers: Identifiers = None,
    config: ConfigFile = DEFAULT,
    reason: OfReason = None,
    meter: OfMeter = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Required: why nobody is to be billed for it.")] = "",
    by: By = None,
    wait: Wait = 10.0,
    yes: Yes = False,
) -> None:
    """Give parked totals up: they will not be sent, and who decided so and why is kept with them.

    Example: `tallyman parked discard tm1-20261101T1200Z-1m-r0-0d6f… --why "test customer"`
    """
    given = read_config(config)
    if not why.strip():
        raise Refused('discarding usage needs a reason: add --why "…"')
    with opened_store(given) as store:
        chosen = _chosen(store, "discard", identifiers or [], reason, meter, yes=yes)
        _decide(store, "discard", chosen, by=by, reason=why, wait=wait)


def _chosen(
    store: Archive,
    action: Literal["release", "discard"],
    identifiers: list[str],
    reason: Reason | None,
    meter: str | None,
    *,
    yes: bool,
) -> list[Entry]:
    """The parked totals that are meant; those that must not be released are refused, or left out of a selection."""
    if identifiers and (reason or meter):
        raise Refused("give identifiers, or --reason and --meter, not both")
    if identifiers:
        named = audit.named(store, identifiers)
        doubtful = [each for each in named if audit.is_doubtful(each)]
        if action == "release" and doubtful:
            first = doubtful[0].total
            explained = audit.MAY_BE_THERE.format(at=shown(first.timestamp * 1000))
            raise audit.DecisionRefused(f"{first.identifier} is not released: {explained}. Nothing was changed.")
        return named
    if not reason and not meter:
        raise Refused(f"which totals? Give identifiers, or --reason or --meter to {action} all that match")
    found = list(audit.parked(store, reason=reason, meter=meter))
    chosen = [each for each in found if action == "discard" or not audit.is_doubtful(each)]
    if len(chosen) < len(found):
        typer.echo(
            f"{len(found) - len(chosen)} are left out, because Stripe may have their events already: "
            "`tallyman parked show` explains each",
            err=True,
        )
    if not chosen:
        typer.echo("no parked total matches", err=True)
        raise typer.Exit(1)
    if not yes:
        show.parked(chosen[:10])
        show.more(len(chosen) - 10)
        typer.confirm(f"{action.capitalize()} {len(chosen)} parked totals?", abort=True)
    return chosen


def _decide(
    store: Archive,
    action: Literal["release", "discard"],
    chosen: list[Entry],
    *,
    by: str | None,
    reason: str,
    wait: float,
) -> None:
    outcomes_from = store.ends(Log.OUTCOMES)
    decided = audit.decide(store, action, chosen, by=by or _user(), reason=reason.strip(), at=CLOCK.now())
    running = store.holder() is not None
    with show.status("waiting for the service"):
        became = audit.follow(store, decided, outcomes_from=outcomes_from, patience_s=wait if running else 0)
    show.decided({identifier: became.get(identifier) for identifier in decided})
    if len(became) < len(decided):
        later = "the service has not come to it yet" if running else "no service is running"
        typer.echo(f"{later}: the decision is in the log, and is applied as soon as a service reads it")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"
