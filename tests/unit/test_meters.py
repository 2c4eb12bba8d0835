"""Meters: their editions, the identifiers of their totals, and what they read from events."""

import tracemalloc
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from consumer.aggregate.meters import Source, identifier
from consumer.aggregate.readers import LONGEST_CUSTOMER, shown
from consumer.totals import Destination
from tests.unit.stage1 import DAY, HOUR, MINUTE, SECOND, SOURCE, T0, Stage1, event, meter, rules

# Editions

CHANGES: list[dict[str, Any]] = [
    {"name": "other"},
    {"event_types": ("used", "used.again")},
    {"event_types": ("used.again",)},
    {"where": ((("model",), ("gpt-5",)),)},
    {"where": ((("model",), ("gpt-5", "gpt-5-mini")),)},
    {"where": ((("model",), ("1",)),)},
    {"where": ((("model",), (1,)),)},
    {"where": ((("model",), (True,)),)},
    {"where": ((("model",), ("True",)),)},
    {"where": ((("model",), (Decimal("1.5"),)),)},
    {"where": ((("size",), ("gpt-5",)),)},
    {"where": ((("model", 0), ("gpt-5",)),)},
    {"where": ((("model", "0"), ("gpt-5",)),)},
    {"where": ((("model",), ("gpt-5",)), (("size",), (1,)))},
    {"where": ((("items", 0), (1,)), (("items", "a"), (1,)))},
    {"aggregation": "count", "value": None},
    {"value": ("m",)},
    {"value": ("n", "total")},
    {"value": ("n", 0)},
    {"value": ("n", "0")},
    {"decimals": 11},
    {"allow_negative": True},
    {"customer": "tenant"},
    {"customer": ("subject",)},
    {"window": "1h"},
    {"lateness": 2 * MINUTE + 1},
    {"accept_late": DAY - 1},
    {"stripe": Destination("other")},
    {"stripe": Destination("tokens", value_key="amount")},
    {"stripe": Destination("tokens", customer_key="customer")},
]


def edition(settle: int = 5 * SECOND, deduplicate_for: int = DAY, **changes: Any) -> bytes:
    return meter(**changes).edition(settle=settle, deduplicate_for=deduplicate_for)


def test_every_change_of_meaning_has_an_edition_of_its_own() -> None:
    """With the edition of before, the identifier of a total that Stripe has would stand for a different sum."""
    editions = [edition(), edition(settle=6 * SECOND), edition(deduplicate_for=DAY + 1)]
    editions += [edition(**changes) for changes in CHANGES]
    assert len(set(editions)) == len(editions)


def test_the_order_in_which_a_configuration_is_written_has_no_meaning() -> None:
    """A reformatted file must not split windows in two."""
    one = edition(event_types=("a", "b"), where=((("x",), ("1", 2)), (("y",), (True,))))
    other = edition(event_types=("b", "a"), where=((("y",), (True,)), (("x",), (2, "1"))))
    assert one == other


def test_an_edition_is_the_same_in_every_process_and_release() -> None:
    """One that changed with a library or a hash seed would cut every open window in two when the service restarts."""
    assert edition().hex() == "1023acf74203defc"


# Identifiers

NAMED: dict[str, Any] = {
    "meter": "tokens",
    "edition": b"8 bytes.",
    "customer": "acme",
    "start": T0,
    "window": "1m",
    "revision": 0,
}


def test_everything_that_tells_totals_apart_is_in_the_identifier() -> None:
    """Stripe takes one of two totals with one identifier, and says that it has the other."""
    sources = [
        SOURCE,
        replace(SOURCE, cluster_id="cluster-2"),
        replace(SOURCE, topic_id="topic-2"),
        replace(SOURCE, pipeline="test"),
        replace(SOURCE, partition=1),
        Source("cluster-1topic-1", "", "prod", 0),
    ]
    names = [
        NAMED | {"meter": "calls"},
        NAMED | {"meter": "tokensacme", "customer": ""},
        NAMED | {"edition": b"8 others"},
        NAMED | {"customer": "acme2"},
        NAMED | {"customer": "ACME"},
        NAMED | {"start": T0 + MINUTE},
        NAMED | {"window": "1h"},
        NAMED | {"revision": 1},
        NAMED | {"revision": 11},
    ]
    found = [identifier(source, **NAMED) for source in sources] + [identifier(SOURCE, **named) for named in names]
    assert len(set(found)) == len(found)


def test_an_identifier_is_readable_and_at_most_100_characters() -> None:
    """Stripe refuses longer ones."""
    longest = Source("c" * 100, "t" * 100, "p" * 249, 2**31)
    named = NAMED | {"meter": "m" * 100, "customer": "ü" * 127, "start": 253_402_300_740_000, "revision": 821}
    found = identifier(longest, **named)
    assert found.startswith("tm1-99991231T2359Z-1m-r821-")
    assert len(found) <= 100
    assert found.isascii()
    assert identifier(SOURCE, **NAMED | {"window": "1h"}).startswith("tm1-20261101T0000Z-1h-r0-")


def test_an_identifier_is_the_same_in_every_process_and_release() -> None:
    """Stripe would not recognise the total that it has, and would take it again."""
    assert identifier(SOURCE, **NAMED) == "tm1-20261101T0000Z-1m-r0-ff6acc0374ef9ec284653e3baa1ccfa128318b74"


def test_an_identifier_does_not_depend_on_the_value() -> None:
    """Who computes a total again, from a corrected log, must not bill it beside the first."""
    found = set()
    for n in (1, 2):
        stage = Stage1(rules())
        stage.send(event("1", n=n), T0)
        found.add(stage.close_all()[0].identifier)
    assert len(found) == 1


# Filters


def matches(where: tuple[Any, ...], raw: str) -> bool:
    stage = Stage1(rules(meter(where=where)))
    stage.send(event("1", data={"model": "RAW"}, raw=raw), T0)
    assert not stage.dead
    return stage.aggregator.book.counted == 1


@pytest.mark.parametrize(
    ("wanted", "raw", "expected"),
    [
        ("gpt-5", '"gpt-5"', True),
        ("gpt-5", r'"gpt\u002d5"', True),
        ("gpt-5", '"gpt-5-mini"', False),
        ("gpt-5", "null", False),
        ("gpt-5", '["gpt-5"]', False),
        ("gpt-5", '{"gpt-5": 1}', False),
        (1, "1", True),
        (1, "1.0", True),
        (1, "10e-1", True),
        (1, '"1"', False),
        (1, "true", False),
        (1, "1.0000000000001", False),
        (1, "1.00000000000000000000000000000000001", False),
        (0, "false", False),
        (0, "-0.0", True),
        (-3, "-3", True),
        (Decimal("0.1"), "0.1", True),
        (Decimal("0.1"), "0.1000000000000000055511151231257827", False),
        (True, "true", True),
        (True, "1", False),
        (True, '"true"', False),
        (False, "false", True),
        (False, "0", False),
        (False, "null", False),
        ("", '""', True),
        ("1", '"1"', True),
        ("1", "1", False),
        (1, "1e400", False),
    ],
)
def test_a_filter_takes_exactly_the_values_it_names(wanted: Any, raw: str, expected: bool) -> None:
    """True is 1 in Python, and 0.1 is not 0.1 in floats: either would count events that somebody else pays for."""
    assert matches(((("model",), (wanted,)),), raw) is expected
    assert matches(((("model",), ("something", wanted)),), raw) is expected


def test_an_event_without_what_the_filter_asks_for_does_not_match() -> None:
    assert not matches(((("absent",), ("gpt-5",)),), '"gpt-5"')


def test_all_conditions_of_a_filter_must_hold() -> None:
    where = ((("model",), ("gpt-5",)), (("n",), (1,)))
    assert matches(where, '"gpt-5"')
    assert not matches((where[0], (("n",), (2,))), '"gpt-5"')


def test_a_filter_gives_the_same_answer_again() -> None:
    stage = Stage1(rules(meter(where=((("model",), ("a", 1)),))))
    for number, model in enumerate(["a", "b", 1, True, "a", "b", 1, True]):
        stage.send(event(str(number), data={"model": model}), T0)
    assert stage.aggregator.book.counted == 4
    assert stage.aggregator.book.ignored == {"unmatched": 4}


def test_long_values_under_a_filter_are_not_kept() -> None:
    """Anybody can send long ones: a service without memory bills nothing."""
    stage = Stage1(rules(meter(where=((("model",), ("a",)),))))
    tracemalloc.start()
    try:
        for number in range(200):
            stage.send(event(str(number), data={"model": str(number) * 20_000}), T0)
            stage.log[-1] = (*stage.log[-1][:4], None)
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


# Customers


def customer_of(customer: Any, **attributes: Any) -> str:
    """The customer that the event counts for, or why it does not."""
    stage = Stage1(rules(meter(customer=customer)))
    stage.send(event("1", **attributes), T0)
    found = stage.close_all()
    return found[0].customer if found else next(iter(stage.dead))


def test_the_customer_is_an_attribute_or_lies_in_the_data() -> None:
    assert customer_of("subject") == "acme"
    assert customer_of("tenant", tenant="acme-2") == "acme-2"
    assert customer_of(("account", "id"), data={"account": {"id": "acme-3"}}) == "acme-3"
    assert customer_of(("accounts", 1), data={"accounts": ["a", "acme-4"]}) == "acme-4"
    assert customer_of(("account",), data={"account": 42}) == "42"
    assert customer_of(("account",), data={"account": 10**30}) == "1" + "0" * 30


@pytest.mark.parametrize("customer", ["subject", "tenant", ("account",)])
def test_an_event_without_a_customer_is_a_dead_letter(customer: Any) -> None:
    """Usage that is counted for nobody is lost."""
    assert customer_of(customer, subject=...) == "customer_missing"


def test_an_empty_attribute_names_no_customer() -> None:
    assert customer_of("tenant", tenant="") == "customer_missing"


@pytest.mark.parametrize("value", [None, True, False, 1.5, 1e300, "", [], ["acme"], {"id": "acme"}])
def test_a_customer_is_a_name_or_a_whole_number(value: object) -> None:
    assert customer_of(("account",), data={"account": value}) == "customer_invalid"


@pytest.mark.parametrize("letter", ["a", "ü", "€", "😀", "\n", '"'])
def test_a_customer_has_at_most_255_bytes(letter: str) -> None:
    """A longer one is refused while it can be corrected, not when its total is sent."""
    fits, longer = letter * (255 // len(letter.encode())), letter * (255 // len(letter.encode()) + 1)
    for found in ("subject", ("account",)):
        for name, expected in ((fits, fits), (longer, "customer_too_long"), (letter * 9_000, "customer_too_long")):
            attributes = {"subject": name} if found == "subject" else {"data": {"account": name}}
            assert customer_of(found, **attributes) == expected
    assert LONGEST_CUSTOMER == 255


def test_a_customer_that_is_escaped_letter_by_letter_is_the_same_customer() -> None:
    """Encoders that write ASCII alone must not make somebody's usage a dead letter, or another customer's."""
    assert customer_of(("account",), data={"account": "RAW"}, raw='"' + r"\u0061" * 255 + '"') == "a" * 255
    assert customer_of(("account",), data={"account": "RAW"}, raw='"' + r"\u0061" * 256 + '"') == "customer_too_long"


@pytest.mark.parametrize("raw", ["1e999", "-1e999", "1E400", "1e-400", "9" * 256, "9" * 5_000])
def test_a_customer_that_is_no_usable_number_is_a_dead_letter(raw: str) -> None:
    """A decoder that gives up on 1e999 must not stop the partition."""
    assert customer_of(("account",), data={"account": "RAW"}, raw=raw) in {"customer_invalid", "customer_too_long"}


def test_a_customer_that_is_made_of_brackets_is_a_dead_letter() -> None:
    """However deep the brackets and the caller's stack: a crash here would come back with every restart."""

    def deeper(levels: int) -> None:
        if levels:
            deeper(levels - 1)
        else:
            for depth in range(600, 760, 8):
                stage.send(event(f"{depth}", data={"account": "RAW"}, raw="[" * depth + "]" * depth), T0)

    stage = Stage1(rules(meter(customer=("account",))))
    for levels in range(0, 400, 50):
        deeper(levels)
    assert stage.aggregator.book.counted == 0
    assert sum(stage.dead.values()) == len(stage.log)


# Values


def test_a_value_lies_in_the_data() -> None:
    stage = Stage1(rules(meter(value=("tokens", "parts", 1))))
    stage.send(event("1", data={"tokens": {"parts": [1, 20, 3]}}), T0)
    assert stage.billed == "20"


@pytest.mark.parametrize("data", [{}, {"tokens": 5}, {"tokens": {"parts": []}}, {"tokens": {"parts": {"1": 1}}}])
def test_an_event_without_its_value_is_a_dead_letter(data: dict[str, Any]) -> None:
    """It may not count as zero: somebody has to see that usage is not measured."""
    stage = Stage1(rules(meter(value=("tokens", "parts", 1))))
    stage.send(event("1", data=data), T0)
    assert stage.dead == {"value_missing": 1}


def test_count_needs_no_value_and_counts_every_event_as_one() -> None:
    stage = Stage1(rules(meter(aggregation="count", value=None)))
    for number in range(3):
        stage.send(event(str(number), n="whatever"), T0)
    assert stage.billed == "3"


def test_paths_are_shown_as_the_configuration_writes_them() -> None:
    assert shown(("tokens", "parts", 1)) == "$.tokens.parts[1]"
    assert shown("subject") == "subject"


def test_hour_windows_are_an_hour_long() -> None:
    stage = Stage1(rules(meter(window="1h")))
    for number, at in enumerate([T0, T0 + HOUR - 1, T0 + HOUR]):
        stage.send(event(str(number), at), T0 + HOUR)
    assert [(total.window, total.window_start, total.value) for total in stage.close_all()] == [
        ("1h", T0 // 1000, "2"),
        ("1h", (T0 + HOUR) // 1000, "1"),
    ]
