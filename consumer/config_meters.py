"""What the configuration says of counting: meters, when their windows close, and what must hold between them."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from consumer import events
from consumer.aggregate.duplicates import INTERVALS
from consumer.aggregate.meters import WINDOW_MS
from consumer.aggregate.meters import Meter as CoreMeter
from consumer.aggregate.windows import EARLY_MARKS, MINUTE
from consumer.config_file import Place
from consumer.config_values import (
    Customer,
    Duration,
    Name,
    PathText,
    PayloadKey,
    Scalar,
    Section,
    Text,
    between,
    in_order,
    invalid,
)
from consumer.totals import SCALE_DIGITS, Destination

_IN_TIME: Final = "events that are in time for their window would become dead letters"


class Windows(Section):
    """When windows close, and what becomes of late and repeated events."""

    lateness: Annotated[Duration, between("0s", "72h")] = Field(
        default=Duration.of("2m"),
        description="How long after its end a window stays open. What arrives later is billed as a correction.",
    )
    settle: Annotated[Duration, between("0s", "5m")] = Field(
        default=Duration.of("5s"),
        description="How far the brokers' clocks may be apart; windows close that much later.",
    )
    deduplicate_for: Annotated[Duration, between("24ms", "90d")] = Field(
        default=Duration.of("24h"),
        description="How long an event's (source, id) is remembered: a repetition within this time does not count.",
    )
    accept_late: Annotated[Duration, between("0s", "34d")] = Field(
        default_factory=lambda data: min(data["deduplicate_for"], Duration.of("34d")),
        validate_default=False,
        description="Events that arrive later than this after their time become dead letters. Not set, it is"
        " deduplicate_for. At most 34d, because Stripe takes 35.",
    )

    @field_validator("deduplicate_for")
    @classmethod
    def _divisible(cls, value: Duration) -> Duration:
        if value % INTERVALS:
            raise ValueError(f"{value} does not divide into {INTERVALS} intervals of whole milliseconds")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.accept_late < self.lateness:
            derived = "" if "accept_late" in self.model_fields_set else " (which is deduplicate_for, as it is not set)"
            reason = f"accept_late {self.accept_late}{derived} is less than lateness {self.lateness}: {_IN_TIME}"
            raise invalid([(("accept_late",), reason)])
        return self


class StripeMeter(Section):
    """The Stripe meter that the totals go to. It has to sum raw events."""

    event_name: Annotated[str, StringConstraints(min_length=1, max_length=100)] = Field(
        description="The event_name of the meter at Stripe."
    )
    value_key: PayloadKey = Field(default="value", description="The payload key in which that meter expects the value.")
    customer_key: PayloadKey = Field(
        default="stripe_customer_id",
        validate_default=True,
        description="The payload key in which that meter expects the customer.",
    )

    @field_validator("customer_key")
    @classmethod
    def _distinct(cls, value: str, info: ValidationInfo) -> str:
        if value == info.data.get("value_key"):
            raise ValueError("is the value_key too: one payload cannot hold both under one key")
        return value


class Meter(Section):
    """What is counted, and where the totals go."""

    name: Name = Field(description="Names the meter in identifiers, metrics and logs; a new name is a new meter.")
    event_types: tuple[Text, ...] = Field(
        strict=False, min_length=1, description="The CloudEvents types that are counted."
    )
    where: dict[PathText, Annotated[tuple[Scalar, ...], Field(strict=False, min_length=1)]] = Field(
        default_factory=dict,
        description="Only events whose data has one of these values at each of these paths are counted.",
    )
    aggregation: Literal["sum", "count"] = Field(description="sum: of a value in the data. count: of the events.")
    value: PathText | None = Field(
        default=None,
        validate_default=True,
        description="The path of the value that is summed: a JSON number, or a string that is one. Not for count.",
    )
    decimals: int = Field(
        default=SCALE_DIGITS,
        ge=0,
        le=SCALE_DIGITS,
        description="Decimals kept of each value; more are rounded half to even.",
    )
    allow_negative: bool = Field(
        default=False, description="Whether a value may be negative; if not, it is a dead letter."
    )
    customer: Customer = Field(
        default="subject",
        description="What names the customer: subject, a path into the data, or the name of an extension attribute.",
    )
    window: Literal["1m", "1h"] = Field(
        default="1m", description="The size of the windows. 1h sends fewer totals and needs a longer grace at Stripe."
    )
    lateness: Annotated[Duration, between("0s", "72h")] | None = Field(
        default=None, description="For this meter, instead of windows.lateness."
    )
    accept_late: Annotated[Duration, between("0s", "34d")] | None = Field(
        default=None, description="For this meter, instead of windows.accept_late."
    )
    stripe: StripeMeter = Field(description="The Stripe meter that the totals go to.")

    @field_validator("event_types")
    @classmethod
    def _no_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return in_order(value)

    @field_validator("where")
    @classmethod
    def _distinct(cls, value: dict[str, tuple[Scalar, ...]]) -> dict[str, tuple[Scalar, ...]]:
        first: dict[events.Path, str] = {}
        for text in value:
            other = first.setdefault(events.parse_path(text), text)
            if other != text:
                raise ValueError(f"{other} and {text} are the same place: write it once, with all values")
        return {text: in_order(value[text]) for text in sorted(value)}

    @field_validator("value")
    @classmethod
    def _as_aggregated(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("aggregation") == "sum" and value is None:
            raise ValueError("is required where aggregation is sum: the path of what is summed, such as $.tokens.total")
        if info.data.get("aggregation") == "count" and value is not None:
            raise ValueError("has no meaning where aggregation is count: remove it, or write aggregation: sum")
        return value

    def core(self, common: Windows) -> CoreMeter:
        """The meter as stage 1 takes it, with what windows say of all."""
        return CoreMeter(
            name=self.name,
            event_types=self.event_types,
            where=tuple((events.parse_path(path), values) for path, values in self.where.items()),
            aggregation=self.aggregation,
            value=None if self.value is None else events.parse_path(self.value),
            decimals=self.decimals,
            allow_negative=self.allow_negative,
            customer=events.parse_path(self.customer) if self.customer.startswith("$") else self.customer,
            window=self.window,
            lateness=int(common.lateness if self.lateness is None else self.lateness),
            accept_late=int(common.accept_late if self.accept_late is None else self.accept_late),
            stripe=Destination(**self.stripe.model_dump()),
        )


def collisions(each: Mapping[int, Meter]) -> Iterator[tuple[Place, str]]:
    """What meters take from each other, by their positions in the list: where it stands, and what is wrong."""
    names: dict[str, int] = {}
    destinations: dict[str, int] = {}
    for position, meter in each.items():
        first = names.setdefault(meter.name, position)
        if first != position:
            yield (position, "name"), f"{meter.name} is the name of meters[{first}] already: names are unique"
        # Two meters may add up in one meter at Stripe, which has one key for the value and one for the customer.
        first = destinations.setdefault(meter.stripe.event_name, position)
        if meter.stripe != each[first].stripe:
            same = f"the value_key and customer_key of meters[{first}], which sends to {meter.stripe.event_name} too"
            yield (position, "stripe"), f"must have {same}: a meter at Stripe has one of each"


def delays(each: Mapping[int, Meter], common: Windows, grace: Duration | None) -> Iterator[tuple[Place, str]]:
    """Where a meter's events come too late for its windows, or its totals for an invoice, which waits for ``grace``."""
    correction, sending, most = Duration(EARLY_MARKS[1]), Duration.of("5m"), Duration.of("72h")
    for position, meter in each.items():
        size = Duration(WINDOW_MS[meter.window])
        lateness = common.lateness if meter.lateness is None else meter.lateness
        accept_late = common.accept_late if meter.accept_late is None else meter.accept_late
        if accept_late < size + lateness:
            key = next((key for key in ("accept_late", "lateness") if getattr(meter, key) is not None), "window")
            sizes = f"accept_late {accept_late} is less than window {size} + lateness {lateness}"
            yield (position, key), f"{sizes}: {_IN_TIME}"
        needed = size + lateness + correction + common.settle + sending
        if grace is not None and needed > grace:
            parts = f"{size} + lateness {lateness} + first correction {correction} + settle {common.settle}"
            cures = ["raise the grace in Stripe and here (at most 72h)"] if needed <= most else []
            cures += ["use 1m" if meter.window == "1h" else "shorten lateness"]
            need = (
                f"{meter.window} windows need at least {-(-needed // MINUTE)} min ({parts} + sending {sending}), and"
                f" stripe.finalization_grace is {grace}: {', or '.join(cures)}"
            )
            yield (position, "window"), need
