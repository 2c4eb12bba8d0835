"""`tallyman parked`: totals that wait for a person or for a mapping, and what people decide about them."""

import getpass
import os
from typing import Annotated, Literal

import typer

from consumer.cli import show, show_totals
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
from consumer.config import Config
from consumer.deliver.entries import Entry, Reason
from consumer.runtime import audit, evidence, preconditions
from consumer.runtime.stripe_reads import reading
from consumer.storage import Archive, Log

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Totals that wait for a person or for a mapping."
)


OfReason = Annotated[Reason | None, typer.Option("--reason", help="Only those that are parked for this reason.")]
Identifiers = Annotated[list[str] | None, typer.Argument(help="Totals, as `tallyman parked list` names them.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; by default the user of this machine.")]
DespiteDoubt = Annotated[
    bool,
    typer.Option(
        "--despite-doubt",
        help="Also where Stripe's sums do not say that it is right: you know better. Needs --why; Stripe is not asked.",
    ),
]
AtStripe = Annotated[
    bool,
    typer.Option(
        "--at-stripe", help="With --despite-doubt: you know that it is at Stripe. It then counts as delivered."
    ),
]
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
    with opened_store(read_config(config)) as store:
        show.newest(
            audit.parked(store, reason=reason, meter=meter, customer=customer),
            limit,
            lambda entry: entry.total.due,
            as_json=as_json,
            line=show_totals.parked_total,
            rows=show_totals.parked,
        )


@app.command("show")
def parked_show(
    identifier: Annotated[str, typer.Argument(help="As `tallyman parked list` names it.")],
    config: ConfigFile = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show all that is known of one parked total, and what to do about it.

    Of one that may be at Stripe: for its customer, meter and minute what was delivered, what else is doubtful, what
    Stripe's summary says, and what follows from it.

    Example: `tallyman parked show tm1-20261101T1200Z-1m-r0-0d6f…`
    """
    given = read_config(config)
    with opened_store(given) as store, show.status("asking Stripe"):
        (judged,) = _judge(store, given, audit.named(store, [identifier]))
    if as_json:
        show.json_line(show_totals.judged_total(judged))
    else:
        show_totals.judged(judged)


@app.command()
def release(
    *,
    identifiers: Identifiers = None,
    config: ConfigFile = DEFAULT,
    reason: OfReason = None,
    meter: OfMeter = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit trail.")] = "",
    by: By = None,
    despite_doubt: DespiteDoubt = False,
    wait: Wait = 10.0,
    yes: Yes = False,
) -> None:
    """Send parked totals after all, because what kept them has been put right.

    Give identifiers, or say which with --reason and --meter. A total of which Stripe may already have an event is sent
    under the next generation of its identifier, and only if Stripe's sums say that it is not there, or --despite-doubt.

    Example: `tallyman parked release --reason meter --meter ai-tokens`
    """
    given = read_config(config)
    if given.stripe.mode == "shadow":
        raise Refused(
            "stripe.mode is shadow: what is released now is finished as shadowed, and billed to nobody. Release it "
            "when the mode is send; or have it billed by whoever bills now, and discard it"
        )
    _check_why(why, despite_doubt=despite_doubt)
    with opened_store(given) as store:
        chosen, found = _chosen(
            store, given, "release", identifiers or [], reason=reason, meter=meter, despite_doubt=despite_doubt
        )
        _confirm("release", chosen, asked=not identifiers and not yes)
        _decide(store, "release", chosen, found, by=by, reason=why, wait=wait)


@app.command()
def discard(
    *,
    identifiers: Identifiers = None,
    config: ConfigFile = DEFAULT,
    reason: OfReason = None,
    meter: OfMeter = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="Required: why nobody is to be billed for it.")] = "",
    by: By = None,
    despite_doubt: DespiteDoubt = False,
    at_stripe: AtStripe = False,
    wait: Wait = 10.0,
    yes: Yes = False,
) -> None:
    """Give parked totals up: they will not be sent, and who decided so and why is kept with them.

    One of which Stripe may already have an event only if Stripe's sums say that it is there, or --despite-doubt. What
    is there counts as delivered; of all others nobody is billed.

    Example: `tallyman parked discard tm1-20261101T1200Z-1m-r0-0d6f… --why "test customer"`
    """
    given = read_config(config)
    if not why.strip():
        raise Refused('discarding usage needs a reason: add --why "…"')
    if at_stripe and not despite_doubt:
        raise Refused("--at-stripe goes with --despite-doubt: without it, Stripe's sums tell what is there")
    with opened_store(given) as store:
        chosen, found = _chosen(
            store, given, "discard", identifiers or [], reason=reason, meter=meter, despite_doubt=despite_doubt
        )
        if at_stripe:
            found = _known(chosen)
        _confirm("discard", chosen, asked=not identifiers and not yes)
        _decide(store, "discard", chosen, found, by=by, reason=why, wait=wait)


def _check_why(why: str, *, despite_doubt: bool) -> None:
    if despite_doubt and not why.strip():
        raise Refused('to decide despite a doubt needs a reason: add --why "…", and say how you know')


def _chosen(
    store: Archive,
    config: Config,
    action: Literal["release", "discard"],
    identifiers: list[str],
    *,
    reason: Reason | None,
    meter: str | None,
    despite_doubt: bool,
) -> tuple[list[Entry], dict[str, str | None]]:
    """The parked totals that are meant, and as what they are at Stripe, where Stripe's sums say that they are.

    Those for which something else is right are refused, or left out.
    """
    if identifiers and (reason or meter):
        raise Refused("give identifiers, or --reason and --meter, not both")
    if not identifiers and not reason and not meter:
        raise Refused(f"which totals? Give identifiers, or --reason or --meter to {action} all that match")
    found = audit.named(store, identifiers) if identifiers else [*audit.parked(store, reason=reason, meter=meter)]
    doubtful = [] if despite_doubt else [each for each in found if evidence.is_doubtful(each)]
    with show.status("asking Stripe"):
        judged = {each.entry.total.identifier: each.recommendation for each in _judge(store, config, doubtful)}
    wrong = {name: told for name, told in judged.items() if told.advice != action}
    if wrong and identifiers:
        name, told = next(iter(wrong.items()))
        raise audit.DecisionRefused(
            f"{name} may be at Stripe, and to {action} it is not recommended. {told.why} Nothing was changed. "
            f"`tallyman parked show {name}` shows all that is known; whoever knows better adds --despite-doubt."
        )
    if wrong:
        typer.echo(
            f"{len(wrong)} are left out: they may be at Stripe, and to {action} them is not recommended; "
            "`tallyman parked show` explains each",
            err=True,
        )
    chosen = [each for each in found if each.total.identifier not in wrong]
    if not chosen:
        typer.echo("no parked total matches", err=True)
        raise typer.Exit(1)
    return chosen, {name: told.found for name, told in judged.items()}


def _known(chosen: list[Entry]) -> dict[str, str | None]:
    """As what they are at Stripe, where somebody knows that they are."""
    found = {each.total.identifier: evidence.last_sent_as(each) for each in chosen}
    for identifier, sent_as in found.items():
        if sent_as is None:
            raise audit.DecisionRefused(
                f"{identifier} cannot be at Stripe: leave out --at-stripe. Nothing was changed."
            )
    return found


def _judge(store: Archive, config: Config, entries: list[Entry]) -> list[evidence.Judged]:
    customers = evidence.names(config)
    try:
        key = preconditions.stripe_key(config)
    except preconditions.ServiceError as wrong:
        return evidence.judge(store, entries, customers, f"it was not asked, because {wrong}")
    given = config.stripe
    with reading(key, api_base=given.api_base, livemode=given.livemode, clock=CLOCK, budget=evidence.BUDGET) as reads:
        return evidence.judge(store, entries, customers, reads)


def _confirm(action: str, chosen: list[Entry], *, asked: bool) -> None:
    if asked:
        show_totals.parked(chosen[:10])
        show.more(len(chosen) - 10)
        typer.confirm(f"{action.capitalize()} {len(chosen)} parked totals?", abort=True)


def _decide(
    store: Archive,
    action: Literal["release", "discard"],
    chosen: list[Entry],
    found: dict[str, str | None],
    *,
    by: str | None,
    reason: str,
    wait: float,
) -> None:
    outcomes_from = store.ends(Log.OUTCOMES)
    decided = audit.decide(store, action, chosen, by=by or _user(), reason=reason.strip(), at=CLOCK.now(), found=found)
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
