"""Dead letters: whatever anybody sends, the partition goes on, and nothing is lost without a trace."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer import deadletters
from consumer.storage import Log
from consumer.storage.kafka_records import cloud_event
from tests.unit.stage1 import (
    T0,
    Headers,
    Stage1,
    event,
    meter,
    rules,
)
from tests.unit.strategies import THOROUGH


def letter_of(value: bytes, **record: Any) -> Any:
    stage = Stage1(rules())
    stage.send(value, T0, **record)
    stage.commit()
    assert stage.entries[b"p"]
    return stage.letters[0]


def test_a_dead_letter_holds_all_that_is_needed_to_send_it_again() -> None:
    """Its usage can still be billed: what is wrong with it is corrected, and everything else is as it was."""
    value = event("1", n="many")
    letter = letter_of(value, key=b"acme", headers=[("trace", b"\x00\xff"), ("empty", None)])
    assert (letter.partition, letter.offset, letter.timestamp) == (0, 0, T0)
    assert (letter.key, letter.headers, letter.value) == (b"acme", [("trace", b"\x00\xff"), ("empty", None)], value)
    assert letter.reason == "value_not_a_number"
    assert "many" in letter.detail


@pytest.mark.parametrize(("size", "kept"), [(256 * 1024, True), (256 * 1024 + 1, False)])
def test_a_dead_letter_above_256_kb_is_kept_by_reference(size: int, kept: bool) -> None:
    """A commit that the broker refuses for its size would come back with every restart."""
    assert (letter_of(b"x" * size, key=None).value is not None) is kept
    large = b"x" * (size - 2)
    for record in ({"key": large}, {"key": None, "headers": [("ce-a", large[4:])]}):
        letter = letter_of(b"{}", **record)
        assert (letter.value is not None) is (letter.key is not None or letter.headers is not None) is kept


def test_a_dead_letter_that_is_large_only_as_json_is_kept_by_reference_too() -> None:
    """Thousands of tiny headers would make a commit that the broker refuses for ever."""
    letter = letter_of(b"{}", headers=[("\x01", None)] * 50_000)
    assert (letter.key, letter.headers, letter.value) == (None, None, None)


def test_what_is_said_about_a_dead_letter_is_short() -> None:
    """It quotes the event, which may be of any size."""
    long = "x" * 300_000
    for value in (event("1", long), event("1", specversion=long), event("1", subject=long), event("1", long, type=7)):
        letter = letter_of(value)
        assert letter.value is None
        assert len(letter.detail) <= 500
    assert len(letter_of(b"{}", headers=[(f"ce_not a name {long}", b"")]).detail) <= 500


HOSTILE = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"{",
    b'"text"',
    b"[" * 5_000,
    b"[" * 5_000 + b"]" * 5_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    event("1", n="RAW", raw="[" * 5_000 + "]" * 5_000),
    event("1", n="RAW", raw="[" * 400 + "]" * 400),
    event("1", n="RAW", raw="9" * 1_000),
    event("1", n="RAW", raw="9" * 5_000),
    event("1", n="RAW", raw="1e" + "9" * 1_000),
    event("1", n="RAW", raw='"\\ud800"'),
    event("1", subject="RAW", raw='"\\ud800"'),
    event("1", "9999-99-99T99:99:99Z"),
    event("1", "0000-01-01T00:00:00Z"),
    event("1", id=5),
    event("1", id=""),
    event("1", type=...),
    event("1").replace(b'{"n": 1}', b"[]"),
]


@pytest.mark.parametrize("customer", ["subject", ("account",)])
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_that_anybody_can_send_stops_the_partition(value: bytes, customer: Any) -> None:
    """A crash on one record comes back with every restart: all usage behind it is lost until somebody skips it."""
    stage = Stage1(rules(meter(customer=customer)))
    stage.send(value, T0)
    book = stage.aggregator.book
    assert (book.consumed, book.counted, sum(book.dead.values())) == (1, 0, 1)
    stage.send(event("good", data={"account": "acme"}), T0)
    assert book.counted == 1
    stage.commit()
    assert len(stage.letters) == 1
    stage.crash()


JSON_TEXTS = st.one_of(
    st.text("0123456789+-.eE", max_size=12),
    st.builds("{}e{}".format, st.integers(-99, 99), st.integers(-(10**25), 10**25)),
    st.recursive(st.text() | st.integers() | st.floats() | st.booleans() | st.none(), st.lists).map(json.dumps),
    st.text(r"\\\"ud8cefF0{}[],:tn ", max_size=14).map(lambda text: f'"{text}"'),
    st.sampled_from(["", "{}", "[", "NaN", "-Infinity", '"\\udfff"', "\x00", "tru", "9" * 400]),
)


@THOROUGH
@given(JSON_TEXTS, st.sampled_from(["account", "model", "n"]))
def test_no_json_in_any_place_that_is_read_stops_the_partition(raw: str, place: str) -> None:
    filtered = meter(customer=("account",), where=((("model",), ("x", 1, True)),))
    stage = Stage1(rules(filtered, meter("other", customer=("account",), value=("model",))))
    stage.send(event("1", data={"account": "acme", "model": "x"} | {place: "RAW"}, raw=raw), T0)
    stage.commit()
    stage.crash()
    assert stage.aggregator.book.consumed == 1


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-00"
STRUCTURED = [("content-type", b"application/cloudevents+json; charset=utf-8")]
BINARY = [("ce_id", b"1"), ("content-type", b"application/json")]


@pytest.mark.parametrize(
    ("headers", "value", "trace"),
    [
        (STRUCTURED, {"traceparent": PARENT, "tracestate": "a=b,c=d"}, (PARENT, "a=b,c=d")),
        (None, {"traceparent": PARENT}, (PARENT, None)),
        ([("traceparent", OTHER.encode())], {"traceparent": PARENT}, (PARENT, None)),
        ([("TraceParent", OTHER.encode()), ("tracestate", b"x=y")], {}, (OTHER, "x=y")),
        ([("traceparent", OTHER.encode())], b"{", (OTHER, None)),
        ([("traceparent", OTHER.encode())], b"[" * 5_000, (OTHER, None)),
        ([("traceparent", OTHER.encode())], b"\xff\xfe", (OTHER, None)),
        ([*BINARY, ("ce_traceparent", PARENT.encode()), ("ce_tracestate", b"a=b")], {}, (PARENT, "a=b")),
        ([*BINARY, ("traceparent", OTHER.encode())], {"traceparent": PARENT}, (OTHER, None)),
        (BINARY, {"traceparent": PARENT}, (None, None)),
        (None, {"traceparent": PARENT[:-1]}, (None, None)),
        (None, {"traceparent": PARENT + "-more"}, (None, None)),
        (None, {"traceparent": 7}, (None, None)),
        (None, {"tracestate": "a=b"}, (None, None)),
        (None, {"traceparent": PARENT, "tracestate": "a" * 513}, (PARENT, None)),
        (None, {"traceparent": PARENT, "tracestate": "ü=1"}, (PARENT, None)),
        ([("traceparent", None)], b"", (None, None)),
    ],
)
def test_a_dead_letter_names_the_trace_of_its_event_whatever_is_wrong_with_that(
    headers: Headers | None, value: dict[str, Any] | bytes, trace: tuple[str | None, str | None]
) -> None:
    """Who finds the letter finds the request that it came from; nothing in it may stop the partition."""
    stage = Stage1(rules())
    stage.send(value if isinstance(value, bytes) else json.dumps(value).encode(), T0, headers=headers)
    stage.commit()
    (letter,) = stage.letters
    assert (letter.traceparent, letter.tracestate) == trace
    named = dict(cloud_event("prod", Log.DEAD_LETTERS, deadletters.encode(letter)))
    assert (named.get("ce_traceparent"), named.get("ce_tracestate")) == tuple(
        text and text.encode() for text in trace
    ), "and its own record is of that trace"
