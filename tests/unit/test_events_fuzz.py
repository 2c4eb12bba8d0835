"""No record raises anything but Malformed: not in decoding, and not when something is read from the event."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from consumer.events import Decoder, Event, Headers, Malformed, Path, Reason

PATHS: tuple[Path, ...] = (
    ("model",),
    ("tokens", "total"),
    ("items", 1, "n"),
    ('say "x"', "n"),
    ("deep",),
    ("deep", "n"),
)
DECODERS = {
    Decoder(PATHS, ["customerid"]): PATHS,
    Decoder([(), (0, "n")], []): ((), (0, "n")),
    Decoder([], ["customerid"]): (),
}

ENVELOPE = {
    "specversion": "1.0",
    "id": "1",
    "source": "s",
    "type": "t",
    "customerid": "acme",
    "data": {"model": "m", "tokens": {"total": 1.5}, "items": [{}, {"n": 2}], "deep": {"n": 3}},
}
EVENT = json.dumps(ENVELOPE).encode()
DATA = json.dumps(ENVELOPE["data"]).encode()
BINARY: Headers = [
    *((f"ce_{name}", str(text).encode()) for name, text in ENVELOPE.items() if name != "data"),
    ("content-type", b"application/json"),
]

HEADERS = st.none() | st.lists(
    st.tuples(
        st.sampled_from(["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_", "CE_Id", "content-type", "x"])
        | st.text(max_size=8),
        st.none()
        | st.sampled_from(
            [b"1.0", b"1", b"application/json", b"application/cloudevents+json", b"application/cloudevents-batch+json"]
        )
        | st.binary(max_size=8),
    ),
    max_size=8,
)


def is_a_proper_refusal(refusal: Malformed) -> bool:
    return refusal.reason in get_args(Reason) and len(refusal.detail) <= 200


def read(headers: Headers, value: bytes) -> None:
    """Decode with every decoder and read all there is: returns, or fails the test with what is not Malformed."""
    for decoder, paths in DECODERS.items():
        try:
            event = decoder.decode(headers, value)
        except Malformed as refusal:
            if not is_a_proper_refusal(refusal):
                raise
            continue
        for path in paths:
            text = decoder.raw(path)(event)
            assert text is UNSET or bytes(text).decode()


@given(HEADERS, st.binary())
def test_any_bytes_under_any_headers(headers: Headers, value: bytes) -> None:
    read(headers, value)


@given(st.sampled_from([None, BINARY]), st.binary(max_size=6), st.integers(0, len(EVENT)), st.integers(0, 8))
def test_an_event_with_some_bytes_replaced(headers: Headers, piece: bytes, start: int, length: int) -> None:
    value = DATA if headers else EVENT

    read(headers, value[:start] + piece + value[start + length :])


@given(st.integers(0, len(EVENT)))
def test_an_event_that_was_cut_off(end: int) -> None:
    read(None, EVENT[:end])
    read(BINARY, DATA[:end])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*ENVELOPE, "subject", "time", "data_base64", "x"]), JSON_VALUES))
def test_an_event_with_any_json_in_its_members(members: dict[str, Any]) -> None:
    value = json.dumps(ENVELOPE | members).encode()

    read(None, value)
    read(BINARY, value)


@given(HEADERS, st.integers(0, 10))
def test_an_event_with_any_further_headers(further: Headers, at: int) -> None:
    headers = list(BINARY or ())
    headers[at:at] = further or ()

    read(headers, DATA)


def with_data(text: bytes) -> bytes:
    return EVENT.replace(DATA, text)


HOSTILE = {
    "5,000 opening brackets": b"[" * 5_000,
    "5,000 opening braces": b'{"a":' * 5_000,
    "arrays 5,000 deep": b"[" * 5_000 + b"]" * 5_000,
    "objects 5,000 deep": b'{"deep":' * 5_000 + b"1" + b"}" * 5_000,
    "a million opening brackets": b"[" * 1_000_000,
    "an integer of 100,000 digits": b"9" * 100_000,
    "a fraction of 100,000 digits": b"0." + b"3" * 100_000,
    "an exponent of 100,000 digits": b"1e" + b"9" * 100_000,
    "lone surrogates": b'"\\ud800"',
    "surrogates the wrong way round": b'"\\udc00\\ud800"',
    "encoded surrogates": b'"\xed\xa0\x80"',
    "invalid UTF-8": b'"\xc3\x28"',
    "overlong UTF-8": b'"\xc0\xaf"',
    "NUL in text": b'"\\u0000"',
    "NUL": b"\x00",
    "NaN": b"NaN",
    "a name of a megabyte": b'{"' + b"x" * 1_000_000 + b'": 1}',
    "10,000 members": json.dumps({str(n): n for n in range(10_000)}).encode(),
    "UTF-16": '{"model": 1}'.encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_wherever_a_value_can_be(text: bytes) -> None:
    read(None, text)
    read(BINARY, text)
    read([("ce_id", text), *(BINARY or ())], DATA)
    read([(text.decode(errors="replace"), text)], EVENT)
    read([("content-type", text)], EVENT)
    read(None, with_data(text))
    read(None, with_data(b'{"deep": ' + text + b', "items": [0, ' + text + b"]}"))
    for name in (b'"1"', b'"acme"', b'"1.0"', b'"s"'):
        read(None, EVENT.replace(name, text))


def test_what_could_be_decoded_can_be_read_from_deeper_in_the_stack() -> None:
    decoder = next(iter(DECODERS))

    def decoded(depth: int) -> Event | None:
        try:
            return decoder.decode(None, with_data(b'{"deep": ' * depth + b"1" + b"}" * depth))
        except Malformed:
            return None

    def read_below(frames: int, event: Event) -> None:
        if frames:
            read_below(frames - 1, event)
        else:
            for path in PATHS:
                decoder.raw(path)(event)

    accepted, refused = 1, 500_000
    while refused - accepted > 1:
        depth = (accepted + refused) // 2
        accepted, refused = (depth, refused) if decoded(depth) else (accepted, depth)
    for depth in range(accepted - 200, accepted, 10):
        event = decoded(depth)
        assert event is not None
        read_below(100, event)
