"""Whether a meter at Stripe bills what is counted here: one of another kind bills wrongly, without any error."""

from collections.abc import Iterator
from typing import Final

from consumer.config import Config
from consumer.runtime.stripe_reads import Meter
from consumer.totals import Destination


def destinations(config: Config) -> dict[str, tuple[Destination, list[str]]]:
    """Where totals go, by event name, and the names of the meters that add up there."""
    found: dict[str, tuple[Destination, list[str]]] = {}
    for meter in config.core_meters:
        found.setdefault(meter.stripe.event_name, (meter.stripe, []))[1].append(meter.name)
    return found


_OTHER: Final = (
    "A meter cannot be changed: create one that sums raw events under another event name (`tallyman setup` does), and "
    "set stripe.event_name to it"
)


def misbills(meter: Meter) -> Iterator[str]:
    """Why a meter would take these totals and bill something else, each with its cure."""
    if meter.formula != "sum":
        yield (
            f"{meter.id} does not sum its events but has the formula {meter.formula}, and totals for one window are "
            f"several where they come from several partitions or late. {_OTHER}"
        )
    if meter.event_time_window is not None:
        yield (
            f"{meter.id} keeps only the newest event of each {meter.event_time_window} (event_time_window): most of "
            f"the usage would be billed to nobody. {_OTHER}"
        )


def unfit(meter: Meter, wanted: Destination) -> Iterator[str]:
    """All that is wrong with a meter for these totals, each with its cure."""
    if meter.status != "active":
        yield f"{meter.id} is deactivated, and takes no events: reactivate it in Stripe's dashboard"
    yield from misbills(meter)
    if meter.customer_key != wanted.customer_key:
        yield (
            f"{meter.id} reads the customer under {meter.customer_key}, and totals have it under "
            f"{wanted.customer_key}: set stripe.customer_key: {meter.customer_key}"
        )
    if meter.value_key is not None and meter.value_key != wanted.value_key:
        yield (
            f"{meter.id} reads the value under {meter.value_key}, and totals have it under {wanted.value_key}: set "
            f"stripe.value_key: {meter.value_key}"
        )
