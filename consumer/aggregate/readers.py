"""What a meter reads from an event: whether it counts it, for whom, and how much."""

from collections.abc import Callable, Mapping, Set
from decimal import Decimal
from typing import Final, NamedTuple

import msgspec
from msgspec import UNSET

from consumer.aggregate.meters import Meter, Scalar
from consumer.aggregate.numbers import NotAQuantity, quantity
from consumer.events import Decoder, Event, Path
from consumer.totals import SCALE, SCALE_DIGITS

LONGEST_CUSTOMER: Final = 255
"""Bytes."""

_LONGEST_WRITTEN_CUSTOMER: Final = 6 * LONGEST_CUSTOMER + 2
"""Bytes of its JSON text, if all of it is escaped."""
SURELY_SHORT: Final = LONGEST_CUSTOMER // 4
"""Characters that are no more than the longest customer's bytes, whatever they are."""

_CACHED: Final = 50_000
"""Pieces of text whose meaning is kept; a value seen again is then not parsed again."""
_LONGEST_CACHED: Final = 100
"""Bytes: anybody can send long ones."""
_SHORT: Final = 5
"""Bytes of a number that may well come again; there are at most some 100 000 of them."""
_UNIT: Final = tuple(10 ** (SCALE_DIGITS - n) for n in range(SCALE_DIGITS + 1))

RawText = Callable[[Event], msgspec.Raw | msgspec.UnsetType]


class Uncountable(Exception):
    """An event that a meter should count has something missing or wrong in it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def paths_of(meter: Meter) -> list[Path]:
    """The places in the data that the meter reads."""
    value = [meter.value] if meter.value is not None else []
    customer = [meter.customer] if isinstance(meter.customer, tuple) else []
    return [path for path, _ in meter.where] + value + customer


def filter_of(meter: Meter, decoder: Decoder) -> Callable[[Event], bool] | None:
    """Whether the meter counts an event of its types; None where it counts all of them."""
    conditions = [_condition(decoder.raw(path), allowed) for path, allowed in meter.where]
    if not conditions:
        return None
    return lambda event: all(holds(event) for holds in conditions)


def customer_getter(meter: Meter, decoder: Decoder) -> Callable[[Event], str | None]:
    """What names the customer, unjudged; raises ``Uncountable`` where it is not even text."""
    if isinstance(meter.customer, str):
        return decoder.attribute(meter.customer)
    return _customer_at(decoder.raw(meter.customer), meter)


def customer_reader(meter: Meter, decoder: Decoder) -> Callable[[Event], str]:
    """For whom an event counts. Raises ``Uncountable``."""
    if isinstance(meter.customer, str):
        return _customer_attribute(decoder.attribute(meter.customer), meter.customer)
    return _customer_at(decoder.raw(meter.customer), meter)


class Quantity(NamedTuple):
    """How much an event counts, in units of 10⁻¹²; in pieces for the hot path, and whole."""

    raw: RawText | None
    """None where the meter counts events."""
    known: Mapping[bytes, int]
    """Short texts that came before."""
    parse: Callable[[bytes], int]
    """Raises ``Uncountable``."""
    read: Callable[[Event], int]
    """Raises ``Uncountable``, also where there is no value."""


def quantity_reader(meter: Meter, decoder: Decoder, rounded: Callable[[], None]) -> Quantity:
    """Compile how a meter reads quantities; ``rounded`` is told when decimals are lost."""
    decimals, allow_negative = meter.decimals, meter.allow_negative
    known: dict[bytes, int] = {}

    def parse(text: bytes) -> int:
        whole, point, fraction = text.partition(b".")
        # The two plain forms that nearly all events have; everything else is read with care.
        if len(whole) <= 15 and whole.isdigit() and len(fraction) <= decimals and (fraction.isdigit() or not point):
            value: int = int(whole + fraction) * _UNIT[len(fraction)]
        else:
            try:
                value, inexact = quantity(text, decimals=decimals, allow_negative=allow_negative)
            except NotAQuantity as refused:
                raise Uncountable(refused.reason, f"at {shown(meter.value)}: {refused}") from None
            if inexact:
                rounded()
                return value
        if len(text) <= _SHORT:
            known[text] = value
        return value

    if meter.value is None:
        return Quantity(None, known, parse, lambda _: SCALE)
    raw = decoder.raw(meter.value)

    def read(event: Event) -> int:
        text = raw(event)
        if text is UNSET:
            raise Uncountable("value_missing", f"there is no value at {shown(meter.value)}")
        return parse(bytes(text))

    return Quantity(raw, known, parse, read)


def _condition(get: RawText, allowed: tuple[Scalar, ...]) -> Callable[[Event], bool]:
    # True == 1 in Python, and never in a filter.
    wanted: set[tuple[bool, Scalar]] = {
        (isinstance(value, bool), Decimal(value) if type(value) is int else value) for value in allowed
    }
    known: dict[bytes, bool] = {}

    def holds(event: Event) -> bool:
        raw = get(event)
        if raw is UNSET:
            return False
        text = bytes(raw)
        answer = known.get(text)
        if answer is None:
            answer = _is_one_of(text, wanted)
            if len(known) < _CACHED and len(text) <= _LONGEST_CACHED:
                known[text] = answer
        return answer

    return holds


def _is_one_of(text: bytes, wanted: Set[tuple[bool, Scalar]]) -> bool:
    if text[:1] in b'"tf' and text:
        value = msgspec.json.decode(text)
        return (isinstance(value, bool), value) in wanted
    try:
        number, _ = quantity(text, decimals=SCALE_DIGITS, allow_negative=True)
    except NotAQuantity:
        return False
    exact = Decimal(text.decode("ascii"))
    return exact == Decimal(number).scaleb(-SCALE_DIGITS) and (False, exact) in wanted


def _customer_attribute(get: Callable[[Event], str | None], name: str) -> Callable[[Event], str]:
    def customer(event: Event) -> str:
        found = get(event)
        if not found:
            raise Uncountable("customer_missing", f"the attribute {name}, which names the customer, is absent")
        if len(found) > SURELY_SHORT and len(found.encode()) > LONGEST_CUSTOMER:
            raise Uncountable(
                "customer_too_long", f"the customer is longer than {LONGEST_CUSTOMER} bytes: {found[:60]}…"
            )
        return found

    return customer


def _customer_at(get: RawText, meter: Meter) -> Callable[[Event], str]:
    known: dict[bytes, str] = {}

    def customer(event: Event) -> str:
        raw = get(event)
        if raw is UNSET:
            raise Uncountable("customer_missing", f"there is no customer at {shown(meter.customer)}")
        text = bytes(raw)
        found = known.get(text)
        if found is None:
            found = _customer_named(text, meter)
            if len(known) < _CACHED and len(text) <= _LONGEST_CACHED:
                known[text] = found
        return found

    return customer


def _customer_named(text: bytes, meter: Meter) -> str:
    value = None
    if text[:1] == b'"':
        value = msgspec.json.decode(text, type=str) if len(text) <= _LONGEST_WRITTEN_CUSTOMER else text.decode()
    elif text.removeprefix(b"-").isdigit():
        value = text.decode()
    if not value:
        raise Uncountable("customer_invalid", f"the customer at {shown(meter.customer)} is no string: {text[:60]!r}")
    if len(value.encode()) > LONGEST_CUSTOMER:
        raise Uncountable("customer_too_long", f"the customer is longer than {LONGEST_CUSTOMER} bytes: {value[:60]}…")
    return value


def shown(path: Path | str | None) -> str:
    """A path as the configuration writes it."""
    if not isinstance(path, tuple):
        return str(path)
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
