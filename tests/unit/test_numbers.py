"""Quantities: exact, bounded, and never a binary float."""

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.aggregate.numbers import NotAQuantity, quantity
from consumer.totals import SCALE, plain
from tests.unit.stage1 import T0, Stage1, event, meter, rules
from tests.unit.strategies import THOROUGH


def read(text: str, decimals: int = 12, *, allow_negative: bool = False) -> tuple[str, bool]:
    """The value as a plain decimal, and whether it was rounded."""
    value, rounded = quantity(text.encode(), decimals=decimals, allow_negative=allow_negative)
    return plain(value), rounded


def refused(text: str, *, allow_negative: bool = False) -> str:
    with pytest.raises(NotAQuantity) as caught:
        quantity(text.encode(), decimals=12, allow_negative=allow_negative)
    assert len(str(caught.value)) < 200, "what is said about a number is short, however long the number"
    return caught.value.reason


def through_stage_1(text: str, decimals: int = 12, *, allow_negative: bool = False) -> tuple[str, bool] | str:
    """What stage 1 counts for an event with this JSON text as its value, or the reason why it does not."""
    stage = Stage1(rules(meter(decimals=decimals, allow_negative=allow_negative)))
    stage.send(event("1", n="RAW", raw=text), T0)
    return next(iter(stage.dead), None) or (stage.billed, stage.book().rounded == 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("7", "7"),
        ("1.10", "1.1"),
        ('"12.5"', "12.5"),
        ('"1e3"', "1000"),
        ("1e3", "1000"),
        ("1E+3", "1000"),
        ("1.5e-3", "0.0015"),
        ("123456e-3", "123.456"),
        ("0e10000", "0"),
        ("0.000000000001", "0.000000000001"),
        ("999999999999999", "999999999999999"),
        ("999999999999999.999999999999", "999999999999999.999999999999"),
        ("1" + "0" * 20 + "e-20", "1"),
        ("1" + "." + "0" * 900, "1"),
    ],
)
def test_a_number_is_counted_exactly_as_written(text: str, value: str) -> None:
    """A number that passed through a binary float, or a refused exponent, would bill something else or nothing."""
    assert read(text) == (value, False)
    assert through_stage_1(text) == (value, False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1000000000000000", "value_out_of_range"),
        ("1e15", "value_out_of_range"),
        ("-1e15", "value_out_of_range"),
        ("1e400", "value_out_of_range"),
        ("1e10001", "value_out_of_range"),
        ("0e99999999999999999999", "value_out_of_range"),
        ("1e99999999999999999999", "value_out_of_range"),
        ("1e-99999999999999999999", "value_out_of_range"),
        ("1e" + "9" * 900, "value_out_of_range"),
        ('"' + "9" * 16 + '"', "value_out_of_range"),
        ("9" * 998, "value_out_of_range"),
        ("9" * 2_000, "value_not_a_number"),
        ("true", "value_not_a_number"),
        ("false", "value_not_a_number"),
        ("null", "value_not_a_number"),
        ("[1]", "value_not_a_number"),
        ('{"n": 1}', "value_not_a_number"),
        ('""', "value_not_a_number"),
        ('"NaN"', "value_not_a_number"),
        ('"Infinity"', "value_not_a_number"),
        ('"+1"', "value_not_a_number"),
        ('" 1"', "value_not_a_number"),
        ('"1_000"', "value_not_a_number"),
        ('"1,5"', "value_not_a_number"),
        ('"0x10"', "value_not_a_number"),
        ('"007"', "value_not_a_number"),
        ('".5"', "value_not_a_number"),
        ('"5."', "value_not_a_number"),
        ('"٣"', "value_not_a_number"),
        ("-1", "value_negative"),
        ("-0.0000000000000000001", "value_negative"),
        ('"-3"', "value_negative"),
    ],
)
def test_what_is_no_quantity_is_a_dead_letter(text: str, reason: str) -> None:
    """True counted as 1, or a sentinel such as 10³⁰⁸ as usage, would be on somebody's invoice."""
    allow_negative = reason != "value_negative"
    assert refused(text, allow_negative=allow_negative) == reason
    assert through_stage_1(text, allow_negative=allow_negative) == reason


@pytest.mark.parametrize("text", ["NaN", "Infinity", "01", "1.", ".5", "+1", "1e", "--1", "0x1"])
def test_json_has_no_such_numbers(text: str) -> None:
    assert through_stage_1(text) == "not_json"


def test_negative_quantities_count_where_the_meter_allows_them() -> None:
    assert read("-2.5", allow_negative=True) == ("-2.5", False)
    assert through_stage_1("-2.5", allow_negative=True) == ("-2.5", False)
    assert through_stage_1("-999999999999999", allow_negative=True) == ("-999999999999999", False)


@pytest.mark.parametrize(
    ("text", "decimals", "value"),
    [
        ("0.30000000000000004", 12, "0.3"),
        ("0.5", 0, "0"),
        ("1.5", 0, "2"),
        ("2.5", 0, "2"),
        ("2.50000000000000000000000000001", 0, "3"),
        ("0.125", 2, "0.12"),
        ("0.135", 2, "0.14"),
        ("0.0000000000005", 12, "0"),
        ("0.0000000000015", 12, "0.000000000002"),
        ("0.00000000000051", 12, "0.000000000001"),
        ("0.00000000000009", 12, "0"),
        ("1e-10000", 12, "0"),
        ("0." + "9" * 900, 12, "1"),
        ("999999999999999.9999999999999", 12, "1000000000000000"),
    ],
)
def test_decimals_too_many_are_rounded_half_to_even_and_counted(text: str, decimals: int, value: str) -> None:
    """0.1 + 0.2 has 17 decimals: refusing it would lose ordinary usage, rounding up favours one side."""
    assert read(text, decimals) == (value, True)
    assert through_stage_1(text, decimals) == (value, True)


@pytest.mark.parametrize("text", ["1.10", "1.100000", "110e-2"])
def test_zeros_beyond_the_meters_decimals_are_not_rounded(text: str) -> None:
    assert read(text, 1) == ("1.1", False)
    assert through_stage_1(text, 1) == ("1.1", False)


def test_rounded_events_are_counted_each_time() -> None:
    """A value whose meaning is remembered must not hide how often it was rounded."""
    stage = Stage1(rules(meter(decimals=0)))
    for number in range(3):
        stage.send(event(str(number), n="RAW", raw="0.5"), T0)
    assert stage.book().rounded == 3
    assert stage.book().events == 3


def test_big_sums_are_exact() -> None:
    """A sum in binary floats, or in a decimal context of 28 digits, loses the small events beside the large ones."""
    stage = Stage1(rules())
    with localcontext(Context(prec=5)):
        for number in range(1_000):
            stage.send(event(f"large-{number}", n="RAW", raw="999999999999999.999999999999"), T0)
            stage.send(event(f"small-{number}", n="RAW", raw="0.000000000001"), T0)
        assert [total.value for total in stage.close_all()] == ["1000000000000000000"]


def test_values_that_come_again_are_the_same_again() -> None:
    """Remembering what a text means must not mistake one text for another."""
    texts = ["12345", "1234", "123", "12", "1", "0", "12.34", "12.3", "1.234", "1.23", "123.4", '"12"', '"123"', "1e3"]
    stage = Stage1(rules())
    for number, text in enumerate(texts * 3):
        stage.send(event(str(number), n="RAW", raw=text), T0)
    assert Fraction(stage.billed) == 3 * sum(Fraction(text.strip('"')) for text in texts)


NUMBERS = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-"]),
    st.one_of(st.integers(0, 30), st.integers(0, 10**16)),
    st.one_of(st.just(""), st.text("0123456789", min_size=1, max_size=20).map(lambda digits: f".{digits}")),
    st.one_of(st.just(""), st.integers(-20, 20).map(lambda power: f"e{power}")),
)


@THOROUGH
@given(NUMBERS, st.integers(0, 12), st.booleans(), st.booleans())
def test_every_number_agrees_with_exact_arithmetic(
    text: str, decimals: int, allow_negative: bool, quoted: bool
) -> None:
    """The fast path, the careful path and rational arithmetic give one answer."""
    mantissa, _, power = text.partition("e")
    exact = Fraction(mantissa) * Fraction(10) ** int(power or 0)
    shown = f'"{text}"' if quoted else text
    if abs(exact) >= 10**15:
        expected: tuple[str, bool] | str = "value_out_of_range"
    elif exact < 0 and not allow_negative:
        expected = "value_negative"
    else:
        rounded = Fraction(round(exact * 10**decimals), 10**decimals)  # half to even, exactly
        expected = (plain(int(rounded * SCALE)), rounded != exact)
    assert through_stage_1(shown, decimals, allow_negative=allow_negative) == expected


@THOROUGH
@given(st.decimals(-(10**30), 10**30, allow_nan=False, places=12))
def test_a_plain_decimal_has_no_exponent_and_loses_nothing(value: Decimal) -> None:
    scaled = int(Fraction(value) * SCALE)
    shown = plain(scaled)
    assert Fraction(shown) == Fraction(scaled, SCALE)
    assert "e" not in shown.lower()
    assert shown == "0" or not (shown.endswith("0") and "." in shown)


def test_rounding_is_half_to_even_in_the_standard_library_too() -> None:
    """The test above rests on it."""
    context = Context(prec=50, rounding=ROUND_HALF_EVEN)
    for text in ("0.5", "1.5", "2.5", "-0.5", "-1.5"):
        assert round(Fraction(text)) == int(Decimal(text).quantize(Decimal(1), context=context))
