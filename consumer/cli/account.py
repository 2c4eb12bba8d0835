"""`tallyman setup` and `tallyman reconcile`: the Stripe account, prepared and compared."""

from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Final, Literal

import typer
from rich.text import Text

from consumer.cli import show
from consumer.cli.options import (
    CLOCK,
    DEFAULT,
    ConfigFile,
    Json,
    OfMeter,
    Refused,
    Since,
    Until,
    opened_store,
    read_config,
)
from consumer.config import Config
from consumer.deliver import reconciling
from consumer.runtime import preconditions, stripe_reads
from consumer.runtime import reconcile as comparing
from consumer.runtime import setup as preparing
from consumer.runtime.reconcile import Compared, Day, Part, Reported
from consumer.runtime.start import shown

_PLAIN: Final = preparing.Terms()


def _amount(text: str) -> str:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0 or amount != round(amount, 12):
        raise typer.BadParameter(f"{text!r} is no amount: write it like 0.01, with at most 12 decimals")
    return f"{amount:f}"


def setup(
    *,
    config: ConfigFile = DEFAULT,
    customer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Also a customer, subscribed to all prices: cus_…, or a name as events have it."
        ),
    ] = None,
    unit_amount: Annotated[
        str | None,
        typer.Option(
            parser=_amount, metavar="NUMBER", help="What one unit costs, in cents or whatever is smallest; 0.01."
        ),
    ] = None,
    currency: Annotated[str | None, typer.Option(metavar="CODE", help="Of new prices; usd.")] = None,
    interval: Annotated[
        Literal["day", "week", "month", "year"], typer.Option(help="How often new prices are billed.")
    ] = "month",
    live: Annotated[
        bool, typer.Option("--live", help="In live mode: what is made there is what customers pay.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make what a Stripe account needs for the configured meters: meters, products and prices.

    What is there already is found and left as it is, so it can be run again at any time. A meter that does not fit is
    refused before anything is made.

    Example: `tallyman setup --customer acme`
    """
    given = read_config(config)
    key = preconditions.stripe_key(given)
    if given.stripe.livemode:
        if not live:
            raise Refused(
                "stripe.livemode is true, and what is made there is what customers pay: add --live if it is meant"
            )
        if customer is not None:
            raise Refused("--customer is for trying out in a sandbox: in live mode it would bill somebody")
        if unit_amount is None or currency is None:
            raise Refused("what is one unit to cost? In live mode give --unit-amount and --currency")
    terms = preparing.Terms(unit_amount or _PLAIN.unit_amount, (currency or _PLAIN.currency).lower(), interval)
    pieces: list[preparing.Piece] = []
    account = preparing.Account(key, api_base=given.stripe.api_base, livemode=given.stripe.livemode, clock=CLOCK)
    try:
        with show.status("asking Stripe"):
            pieces.extend(preparing.setup(given, account, terms, customer))
    finally:
        # Also what was made before something failed: the next run finds it.
        account.close()
        if as_json:
            for piece in pieces:
                show.json_line(piece)
        elif pieces:
            show.pieces(pieces)


_SINCE_MS: Final = 3 * 86_400_000
_MOST: Final = 50
"""Rows of a table; --json has all."""


def reconcile(
    *,
    config: ConfigFile = DEFAULT,
    since: Since = None,
    until: Until = None,
    meter: OfMeter = None,
    customer: Annotated[
        str | None, typer.Option(metavar="CUSTOMER", help="Only of this customer, as Stripe names it (cus_…).")
    ] = None,
    budget: Annotated[
        int, typer.Option(min=2, metavar="CALLS", help="Stripe is asked so many times at most.")
    ] = comparing.BUDGET,
    as_json: Json = False,
) -> None:
    """Compare what was delivered with what Stripe counts, by meter, customer and UTC day.

    Since three days ago unless --since says otherwise. One call to Stripe tells of one customer and meter; where there
    are more than --budget, those whom Stripe reported errors of come first, then those with totals in doubt, those that
    changed, and the others, in another order every day. What is too recent to differ is shown as open. Exit code 1:
    something differs.

    With stripe.mode: shadow it is what would have been billed, beside what somebody else bills today.

    What it finds of the last three days or more, of all customers, is in the service's metrics.

    Example: `tallyman reconcile --since 7d --budget 1000`
    """
    given = read_config(config)
    key = preconditions.stripe_key(given)
    now = CLOCK.now()
    span = reconciling.span(now - _SINCE_MS if since is None else since, now if until is None else until)
    whole = customer is None and until is None and (since is None or since <= now - _SINCE_MS)
    names = None if meter is None else frozenset({_event_name(given, meter)})
    stripe = given.stripe
    with (
        opened_store(given) as store,
        stripe_reads.reading(
            key, api_base=stripe.api_base, livemode=stripe.livemode, clock=CLOCK, budget=budget
        ) as reads,
        show.status("comparing") as counted,
    ):
        found = [
            *comparing.reconcile(
                given,
                store,
                reads,
                span,
                event_names=names,
                customer=customer,
                budget=budget,
                progress=counted.tell,
            )
        ]
        if as_json:
            for each in found:
                show.json_line(each)
        else:
            _show(found)
        for each in found:
            # A part of it would pass for all.
            if isinstance(each, Compared) and whole:
                comparing.note(store, each)
    if any(isinstance(each, Compared) and each.differs for each in found):
        raise typer.Exit(1)


def _event_name(config: Config, meter: str) -> str:
    for each in config.meters:
        if each.name == meter:
            return each.stripe.event_name
    raise Refused(f"there is no meter {meter}: {', '.join(each.name for each in config.meters)}")


def _show(found: Iterable[Day | Compared]) -> None:
    """What is not equal, the hours of what differs, and how much that was of all."""
    found = list(found)
    days = [each for each in found if isinstance(each, Day)]
    shadow = any(isinstance(each, Compared) and each.mode == "shadow" for each in found)
    ours = "would have been billed" if shadow else "delivered"
    if days:
        show.table(
            ("meter at Stripe", "customer", "day", ours, "Stripe", "difference", "", ""),
            (
                (
                    each.event_name,
                    each.customer,
                    shown(each.start * 1000)[:10],
                    each.ours,
                    each.stripe,
                    each.difference,
                    Text(each.state, "bold red" if each.state == "differs" else "yellow"),
                    each.why,
                )
                for each in days[:_MOST]
            ),
        )
    if len(days) > _MOST:
        typer.echo(f"and {len(days) - _MOST} more: --json has them all")
    for day in days:
        for hour in day.hours:
            typer.echo(
                f"\n{day.customer}, {day.event_name}, {shown(hour.start * 1000)}: {hour.ours} {ours}, "
                f"{hour.stripe} at Stripe"
            )
            show.table(
                ("identifier", "state", "value", "read from"),
                ((each.identifier, each.state, each.value, _read_from(each)) for each in hour.totals[:_MOST]),
                whole="identifier",
            )
            if len(hour.totals) > _MOST:
                typer.echo(f"and {len(hour.totals) - _MOST} more: --json has them all")
    for each in found:
        if isinstance(each, Compared):
            typer.echo(_compared(each))


def _read_from(part: Part) -> str:
    if part.partition is None:
        return "the record is not kept any more"
    return f"partition {part.partition}, offsets {part.first_offset} to {part.last_offset}"


def _compared(all_: Compared) -> str:
    days = f"{shown(all_.since * 1000)[:10]} to {shown(all_.until * 1000 - 1)[:10]}"
    counts = ", ".join(
        f"{number} {what}"
        for number, what in ((all_.differs, "differ"), (all_.doubt, "in doubt"), (all_.open, "open"))
        if number
    )
    text = (
        f"{days}, {all_.calls} calls to Stripe: of {all_.customers} customers (by meter), {all_.equal} days are equal "
        f"({all_.equal_value} in sum){f', {counts}' if counts else ''}"
    )
    if all_.not_asked:
        text += f"\n{all_.not_asked} customers were left out: raise --budget, or ask for less"
    if all_.shadowed != "0":
        text += (
            f"\n{all_.shadowed} was shadowed in these days, for somebody else to bill: a day is equal where Stripe has "
            "what was delivered, with it or without it"
        )
    return "\n".join([text, *(_reported(each, all_) for each in all_.reported)])


def _reported(each: Reported, all_: Compared) -> str:
    errors = ", ".join(f"{number} {code}" for code, number in sorted(each.errors.items()))
    since, until = shown(each.since * 1000)[:10], shown(each.until * 1000 - 1)[:10]
    text = f"Stripe reported errors of {each.event_name or 'events that no meter takes'} ({errors})"
    if each.event_name is None:
        return text
    if each.until <= all_.since or each.since >= all_.until:
        return f"{text}: look at {since} to {until} too"
    return f"{text}: customers with usage on {since} to {until} were asked first"
