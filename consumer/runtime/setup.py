"""What a Stripe account needs before totals become invoices: a meter, a price that uses it, and who to try it with.

Everything is looked for before it is made: meters by their event name and prices by their lookup key, both of which
are unique at Stripe, customers by what is noted on them, subscriptions by their prices. So a second run changes
nothing, and one that was broken off is completed by the next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple
from uuid import uuid4

import msgspec

from consumer.config import Config, CustomerFile
from consumer.runtime.stripe_meters import destinations, unfit
from consumer.runtime.stripe_reads import Customer, Meter, NotThere, Price, StripeReads
from consumer.totals import Destination

NOTE: Final = "tallyman-customer"
"""The key under which a customer's metadata say how events name it."""

DASHBOARD: Final = "https://dashboard.stripe.com"
STRIPE: Final = "https://api.stripe.com"

Kind = Literal["meter", "product", "price", "customer", "subscription"]


class SetupRefused(Exception):
    """The account is not as it has to be, and only a person can change that; nothing has been made."""


class Terms(NamedTuple):
    """What a price that is made here says."""

    unit_amount: str = "0.01"
    """Of one unit, in the currency's smallest unit: a plain decimal."""
    currency: str = "usd"
    interval: Literal["day", "week", "month", "year"] = "month"


class Piece(msgspec.Struct, frozen=True, omit_defaults=True):
    """One object at Stripe."""

    kind: Kind
    id: str
    made: bool
    """Whether it was made now, and not there before."""
    says: str
    link: str | None = None


class Account(StripeReads):
    """A client that also makes what is missing."""

    def make_meter(self, name: str, wanted: Destination) -> str:
        """An active meter that sums raw events; its id."""
        made = self._made(
            f"a meter for {wanted.event_name}",
            self._client.v1.billing.meters.create,
            {
                "display_name": name[:250],
                "event_name": wanted.event_name,
                "default_aggregation": {"formula": "sum"},
                "customer_mapping": {"type": "by_id", "event_payload_key": wanted.customer_key},
                "value_settings": {"event_payload_key": wanted.value_key},
            },
        )
        return str(made.id)

    def make_price(self, name: str, meter: str, terms: Terms, lookup_key: str, *, take_over: bool) -> tuple[str, str]:
        """A metered price with a product of its own; the ids of both. ``take_over``: the key is an archived price's."""
        params: dict[str, Any] = {
            "currency": terms.currency,
            "unit_amount_decimal": terms.unit_amount,
            "recurring": {"interval": terms.interval, "usage_type": "metered", "meter": meter},
            "product_data": {"name": name},
            "lookup_key": lookup_key,
        }
        if take_over:
            params["transfer_lookup_key"] = True
        made = self._made(f"a price for {name}", self._client.v1.prices.create, params)
        return made.id, made.product

    def holder(self, lookup_key: str) -> str | None:
        """The price that has this lookup key, active or archived."""
        found = self._ask(f"price {lookup_key}", lambda: self._client.v1.prices.list({"lookup_keys": [lookup_key]}))
        return found.data[0].id if found.data else None

    def make_customer(self, name: str) -> str:
        """A customer on whom it is noted how events name it."""
        params = {"name": name, "metadata": {NOTE: name}}
        return str(self._made(f"the customer {name}", self._client.v1.customers.create, params).id)

    def subscriptions(self, customer: str) -> Iterator[tuple[str, frozenset[str]]]:
        """The subscriptions of a customer that are not cancelled, and their prices."""
        listing = self._client.v1.subscriptions.list
        for each in self._rows(f"subscriptions of {customer}", listing, {"customer": customer}):
            yield each.id, frozenset(item.price.id for item in each["items"].data)

    def make_subscription(self, customer: str, prices: Iterable[str]) -> str:
        """A subscription of these prices; its id."""
        params = {"customer": customer, "items": [{"price": price} for price in prices]}
        return str(self._made(f"a subscription for {customer}", self._client.v1.subscriptions.create, params).id)

    def _made(self, what: str, create: Callable[[Any, Any], Any], params: dict[str, Any]) -> Any:
        # One key for all tries of this one call: a lost answer does not make two of it.
        options = {"idempotency_key": f"tallyman-setup-{uuid4()}"}
        return self._ask(what, lambda: create(params, options))


def setup(config: Config, stripe: Account, terms: Terms, customer: str | None = None) -> Iterator[Piece]:
    """Find or make what is needed, one piece after the other; raises ``SetupRefused`` before the first is made.

    ``customer`` is subscribed to all prices: a Stripe customer (cus_…), or one as events name it.
    """
    for piece in _pieces(config, stripe, terms, customer):
        yield msgspec.structs.replace(piece, link=_link(config, piece))


def _pieces(config: Config, stripe: Account, terms: Terms, customer: str | None) -> Iterator[Piece]:
    wanted = destinations(config)
    meters = _meters(stripe, wanted)
    who = _customer(stripe, customer) if customer else None
    prices: dict[str, str] = {}
    for event_name, (destination, names) in wanted.items():
        name, meter = ", ".join(names), meters[event_name]
        meter_id = meter.id if meter else stripe.make_meter(name, destination)
        yield Piece("meter", meter_id, meter is None, f"{event_name}, sums raw events")
        for piece in _price(stripe, name, meter_id, terms, f"tallyman-{event_name}"):
            if piece.kind == "price":
                prices[event_name] = piece.id
            yield piece
    if customer is not None:
        who_id = who.id if who else stripe.make_customer(customer)
        yield Piece("customer", who_id, who is None, _told(config, customer, who_id))
        yield from _subscription(stripe, who_id, prices)


def _meters(stripe: Account, wanted: Mapping[str, tuple[Destination, list[str]]]) -> dict[str, Meter | None]:
    there = stripe.meters()
    wrong = [
        f"{event_name}: {reason}."
        for event_name, (destination, _) in wanted.items()
        if event_name in there
        for reason in unfit(there[event_name], destination)
    ]
    if wrong:
        raise SetupRefused("\n".join(["the account has meters that do not fit, and nothing was made:", *wrong]))
    return {event_name: there.get(event_name) for event_name in wanted}


def _price(stripe: Account, name: str, meter_id: str, terms: Terms, lookup_key: str) -> Iterator[Piece]:
    there = stripe.prices(meter_id)
    if there:
        price = min(there, key=lambda each: each.lookup_key != lookup_key)
        more = f", and {len(there) - 1} more" if len(there) > 1 else ""
        yield Piece("product", price.product, False, "has the price")
        yield Piece("price", price.id, False, f"{_said(price)}{more}")
        return
    taken = stripe.holder(lookup_key) is not None
    price_id, product = stripe.make_price(name, meter_id, terms, lookup_key, take_over=taken)
    yield Piece("product", product, True, name)
    said = f"{terms.unit_amount} {terms.currency} (smallest unit) each, every {terms.interval}"
    yield Piece("price", price_id, True, said)


def _said(price: Price) -> str:
    amount = "tiers" if price.unit_amount is None else f"{price.unit_amount} {price.currency} (smallest unit) each"
    return f"{amount}, every {price.interval}"


def _customer(stripe: Account, wanted: str) -> Customer | None:
    if not wanted.startswith("cus_"):
        return next((each for each in stripe.customers() if each.metadata.get(NOTE) == wanted), None)
    try:
        found = stripe.customer(wanted)
    except NotThere:
        found = None
    if found is None or found.deleted:
        raise SetupRefused(
            f"{wanted} is no customer of this account, and nothing was made: give one that exists, or any other name "
            "to make one"
        )
    return found


def _told(config: Config, name: str, customer: str) -> str:
    if name == customer:
        return "as events name it"
    if isinstance(config.customers, CustomerFile):
        return f"to bill it, write `{name}: {customer}` into {config.customers.path}"
    return f"events have to name it {customer}"


def _subscription(stripe: Account, customer: str, prices: Mapping[str, str]) -> Iterator[Piece]:
    missing = dict(prices)
    for subscription, has in stripe.subscriptions(customer):
        found = [event_name for event_name, price in missing.items() if price in has]
        for event_name in found:
            del missing[event_name]
        if found:
            yield Piece("subscription", subscription, False, f"bills {', '.join(found)}")
    if missing:
        made = stripe.make_subscription(customer, missing.values())
        yield Piece("subscription", made, True, f"bills {', '.join(missing)}")


def _link(config: Config, piece: Piece) -> str | None:
    if config.stripe.api_base != STRIPE:
        return None
    return f"{DASHBOARD}/{'' if config.stripe.livemode else 'test/'}{piece.kind}s/{piece.id}"
