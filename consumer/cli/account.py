"""`tallyman setup`: the Stripe account, prepared from the command line."""

from decimal import Decimal, InvalidOperation
from typing import Annotated, Final, Literal

import typer

from consumer.cli import show
from consumer.cli.options import CLOCK, DEFAULT, ConfigFile, Json, Refused, read_config
from consumer.runtime import service
from consumer.runtime import setup as preparing

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
    key = service.stripe_key(given)
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
