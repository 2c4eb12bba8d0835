"""What is sold, as the stand-in keeps it: products, prices that use meters, and subscriptions."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from consumer.sandbox.stripe_account import StripeAccount, ok, page
from consumer.sandbox.stripe_objects import PAGE, PRICE, PRICES, PRODUCT, SUBSCRIPTION, SUBSCRIPTIONS
from consumer.sandbox.stripe_wire import Answer, Call, Refused, check


class StripeCatalogue(StripeAccount):
    """An account that sells what it meters. Nothing is invoiced, and subscriptions stay active."""

    def __init__(self, now: Callable[[], float], *, accept_any_customer: bool = False, lag: float = 0) -> None:
        super().__init__(now, accept_any_customer=accept_any_customer, lag=lag)
        self._products: dict[str, dict[str, Any]] = {}
        self._prices: dict[str, dict[str, Any]] = {}
        self._subscriptions: dict[str, dict[str, Any]] = {}

    # Products

    def _create_product(self, call: Call) -> Answer:
        return ok(self._add_product(call, check(call.params, PRODUCT)))

    def _add_product(self, call: Call, fields: dict[str, Any]) -> dict[str, Any]:
        product = {
            "id": f"prod_{len(self._products) + 1:014d}",
            "object": "product",
            "active": True,
            "created": int(self.now()),
            "livemode": self._livemode(call),
            "metadata": {},
            **fields,
        }
        self._products[product["id"]] = product
        return product

    def _list_products(self, call: Call) -> Answer:
        return page(call.path, [*reversed(self._products.values())], check(call.params, PAGE))

    def _retrieve_product(self, call: Call, product: str) -> Answer:
        check(call.params, {})
        return ok(_found(self._products, "product", product))

    # Prices

    def _create_price(self, call: Call) -> Answer:
        params = check(call.params, PRICE)
        amount = _amount(params)
        recurring = self._recurring(params.get("recurring"))
        holder = next((each for each in self._prices.values() if each["lookup_key"] == params.get("lookup_key")), None)
        if holder is not None and holder["lookup_key"] is not None and params.get("transfer_lookup_key") != "true":
            # An archived price holds its key too.
            message = f"A price (`{holder['id']}`) already uses that lookup key."
            raise Refused("invalid", message, param="lookup_key", stored=True)
        if "product" in params:
            product = _found(self._products, "product", params["product"], status=400)
        elif "product_data" in params:
            product = self._add_product(call, params["product_data"])
        else:
            raise Refused("invalid", "You must provide one of `product` or `product_data`.", code="parameter_missing")
        if holder is not None:
            holder["lookup_key"] = None
        price = {
            "id": f"price_{len(self._prices) + 1:014d}",
            "object": "price",
            "active": True,
            "billing_scheme": "per_unit",
            "created": int(self.now()),
            "currency": params["currency"],
            "livemode": self._livemode(call),
            "lookup_key": params.get("lookup_key"),
            "metadata": params.get("metadata", {}),
            "nickname": params.get("nickname"),
            "product": product["id"],
            "recurring": recurring,
            "type": "one_time" if recurring is None else "recurring",
            "unit_amount": int(amount) if amount == int(amount) else None,
            "unit_amount_decimal": f"{amount:f}",
        }
        self._prices[price["id"]] = price
        return ok(price)

    def _recurring(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is None:
            return None
        metered = given.get("usage_type") == "metered"
        if metered != ("meter" in given):
            message = "A metered price needs a meter, and no other price takes one."
            raise Refused("invalid", message, param="recurring[meter]")
        if metered and self._meter(given["meter"]).status == "inactive":
            message = f"The meter '{given['meter']}' is inactive: it cannot be attached to a price."
            raise Refused("invalid", message, param="recurring[meter]", stored=True)
        return {"interval_count": 1, "usage_type": "licensed", "meter": None, **given}

    def _list_prices(self, call: Call) -> Answer:
        params = check(call.params, PRICES)
        wanted = params.get("recurring", {})
        prices = [
            each
            for each in reversed(self._prices.values())
            if params.get("active") in (None, str(each["active"]).lower())
            and params.get("product") in (None, each["product"])
            and each["lookup_key"] in params.get("lookup_keys", [each["lookup_key"]])
            and all((each["recurring"] or {}).get(name) == value for name, value in wanted.items())
        ]
        return page(call.path, prices, params)

    def _retrieve_price(self, call: Call, price: str) -> Answer:
        check(call.params, {})
        return ok(_found(self._prices, "price", price))

    def archive_price(self, price: str) -> None:
        """What somebody may do in the dashboard: subscriptions keep it, and nobody can be given it any more."""
        with self._lock:
            self._prices[price]["active"] = False

    # Subscriptions

    def _create_subscription(self, call: Call) -> Answer:
        params = check(call.params, SUBSCRIPTION)
        if not self._knows(params["customer"]):
            message = f"No such customer: '{params['customer']}'"
            raise Refused("no_customer", message, code="resource_missing", param="customer", stored=True)
        items = []
        for place, wanted in enumerate(params["items"]):
            price = _found(self._prices, "price", wanted["price"], param=f"items[{place}][price]", status=400)
            if not price["active"] or price["recurring"] is None:
                message = f"The price specified is inactive or not recurring: {price['id']}."
                raise Refused("invalid", message, param=f"items[{place}][price]", stored=True)
            item = {"id": f"si_{len(self._subscriptions) + 1:010d}{place:04d}", "object": "subscription_item"}
            items.append(item | {"price": price})
        subscription = {
            "id": f"sub_{len(self._subscriptions) + 1:014d}",
            "object": "subscription",
            "created": int(self.now()),
            "customer": params["customer"],
            "items": {"object": "list", "data": items, "has_more": False, "url": "/v1/subscription_items"},
            "livemode": self._livemode(call),
            "metadata": params.get("metadata", {}),
            "status": "active",
        }
        self._subscriptions[subscription["id"]] = subscription
        return ok(subscription)

    def _list_subscriptions(self, call: Call) -> Answer:
        params = check(call.params, SUBSCRIPTIONS)
        subscriptions = [
            each
            for each in reversed(self._subscriptions.values())
            if params.get("customer") in (None, each["customer"])
            and params.get("price") in (None, *(item["price"]["id"] for item in each["items"]["data"]))
        ]
        return page(call.path, subscriptions, params)


def _amount(params: dict[str, Any]) -> Decimal:
    if ("unit_amount" in params) == ("unit_amount_decimal" in params):
        message = "You must specify one of `unit_amount` and `unit_amount_decimal`."
        raise Refused("invalid", message, param="unit_amount")
    try:
        return Decimal(params["unit_amount" if "unit_amount" in params else "unit_amount_decimal"])
    except InvalidOperation:
        message = f"Invalid decimal: {params['unit_amount_decimal']}"
        raise Refused("invalid", message, param="unit_amount_decimal") from None


def _found(
    among: dict[str, dict[str, Any]], kind: str, wanted: str, *, param: str = "id", status: int = 404
) -> dict[str, Any]:
    if wanted not in among:
        message = f"No such {kind}: '{wanted}'"
        raise Refused("not_found", message, status=status, code="resource_missing", param=param)
    return among[wanted]
