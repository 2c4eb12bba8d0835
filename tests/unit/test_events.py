"""What is read from a record, what is refused, and why."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from consumer.events import Decoder, Event, Headers, Malformed, Path, parse_path

TOKENS: Path = ("tokens", "total")
MODEL: Path = ("model",)
THIRD: Path = ("items", 2, "n")
PATHS = (TOKENS, MODEL, THIRD)
DECODER = Decoder(PATHS, ["customerid"])

ENVELOPE: dict[str, Any] = {
    "specversion": "1.0",
    "id": "e-1",
    "source": "/completions",
    "type": "ai.completion",
    "subject": "cus_1",
    "time": "2026-11-01T12:34:56.789Z",
    "customerid": "acme",
    "data": {"model": "gpt-5", "tokens": {"prompt": 3, "total": 12.50}, "items": [{}, {}, {"n": 7}]},
}
STRUCTURED: Headers = [("content-type", b"application/cloudevents+json")]
BINARY: Headers = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"e-1"),
    ("ce_source", b"/completions"),
    ("ce_type", b"ai.completion"),
    ("ce_customerid", b"acme"),
    ("content-type", b"application/json"),
]


def structured(**changes: Any) -> bytes:
    """The envelope with some members changed; `...` takes one out."""
    return json.dumps({name: text for name, text in (ENVELOPE | changes).items() if text is not ...}).encode()


def binary(**changes: bytes | None) -> Headers:
    """The binary-mode headers with some changed; `content_type` stands for content-type."""
    headers: dict[str, bytes | None] = dict(BINARY or ())
    for name, text in changes.items():
        headers["content-type" if name == "content_type" else f"ce_{name}"] = text
    return list(headers.items())


def without(*headers: str) -> Headers:
    return [(name, text) for name, text in BINARY or () if name not in headers]


def read(decoder: Decoder, event: Event, path: Path) -> str | None:
    """The raw text at a path, None where absent."""
    text = decoder.raw(path)(event)
    return None if text is UNSET else bytes(text).decode()


def reason(headers: Headers, value: bytes, decoder: Decoder = DECODER) -> str:
    with pytest.raises(Malformed) as caught:
        decoder.decode(headers, value)
    return caught.value.reason


def general(value: bytes) -> bytes:
    """The same event, in a form that only the general path can read: of a repeated member the last one counts."""
    members = value.strip().removeprefix(b"{").removesuffix(b"}")
    return b'{"data_base64":"x",' + members + b',"data_base64":null}'


class TestStructured:
    @pytest.mark.parametrize(
        "headers",
        [
            None,
            [],
            STRUCTURED,
            [("Content-Type", b"application/cloudevents+json; charset=utf-8")],
            [("CONTENT-TYPE", b"Application/CloudEvents+JSON;charset=UTF-8")],
            [("traceparent", b"\xff\x00"), ("content-type", b"application/json")],
            [("content-type", None)],
            [("x", None)],
        ],
    )
    def test_a_json_object_with_specversion_is_an_event_whatever_foreign_headers_it_has(self, headers: Headers) -> None:
        event = DECODER.decode(headers, structured())

        assert (event.id, event.source, event.type) == ("e-1", "/completions", "ai.completion")
        assert (event.time, event.subject) == ("2026-11-01T12:34:56.789Z", "cus_1")
        assert DECODER.attribute("customerid")(event) == "acme"
        assert DECODER.attribute("subject")(event) == "cus_1"
        assert [read(DECODER, event, path) for path in PATHS] == ["12.5", '"gpt-5"', "7"]

    def test_context_headers_beside_a_structured_value_are_ignored(self) -> None:
        headers = [("ce_id", b"other"), ("ce_bad-name", b""), ("content-type", b"application/cloudevents+json")]

        assert DECODER.decode(headers, structured()).id == "e-1"

    def test_optional_attributes_may_be_absent(self) -> None:
        event = DECODER.decode(None, b'{"specversion":"1.0","id":"1","source":"s","type":"t"}')

        assert (event.time, event.subject, DECODER.attribute("customerid")(event)) == (None, None, None)
        assert [read(DECODER, event, path) for path in PATHS] == [None, None, None]

    @pytest.mark.parametrize("name", ["subject", "time", "customerid", "datacontenttype", "dataschema", "data_base64"])
    def test_an_attribute_that_is_null_is_absent(self, name: str) -> None:
        event = DECODER.decode(None, structured(**{name: None}))

        assert event == DECODER.decode(None, structured(**{name: ...}))
        assert read(DECODER, event, TOKENS) == "12.5"

    @pytest.mark.parametrize(
        ("sent", "text"),
        [("acme", "acme"), ("", ""), (42, "42"), (-(10**30), str(-(10**30))), (True, "true"), (False, "false")],
    )
    def test_an_extension_is_read_as_its_canonical_string(self, sent: Any, text: str) -> None:
        assert DECODER.attribute("customerid")(DECODER.decode(None, structured(customerid=sent))) == text

    def test_time_is_text_that_is_judged_elsewhere(self) -> None:
        assert DECODER.decode(None, structured(time="yesterday")).time == "yesterday"

    @pytest.mark.parametrize("name", ["id", "\\u0069d"])
    def test_of_a_repeated_member_the_last_one_counts(self, name: str) -> None:
        value = structured().replace(b'"id"', f'"id": 5, "{name}": "e-0", "{name}"'.encode())

        assert DECODER.decode(None, value) == DECODER.decode(None, structured())

    def test_of_repeated_data_only_the_last_one_is_read(self) -> None:
        value = structured().replace(b'"data":', b'"data": {"model": "other", "tokens": 1}, "data":')

        assert DECODER.decode(None, value) == DECODER.decode(None, structured())
        assert read(DECODER, DECODER.decode(None, value[:-1] + b', "data": {}}'), MODEL) is None

    def test_an_unread_attribute_may_have_any_name_and_value(self) -> None:
        assert DECODER.decode(None, structured(Any_Name={"a": [None]})) == DECODER.decode(None, structured())

    def test_numbers_keep_every_digit(self) -> None:
        digits = "123456789012345678901234567890.123456789012345678901234567890e-7"
        event = DECODER.decode(None, structured().replace(b"12.5", digits.encode()))

        assert Decimal(read(DECODER, event, TOKENS) or "") == Decimal(digits)

    def test_text_beyond_ascii_is_read_escaped_or_not(self) -> None:
        plain = structured(subject="Zoë 😀", data={"model": "😀"})
        event = DECODER.decode(None, plain)

        assert event.subject == "Zoë 😀"
        assert json.loads(read(DECODER, event, MODEL) or "") == "😀"
        unescaped = json.dumps(json.loads(plain), ensure_ascii=False).encode()
        assert DECODER.decode(None, unescaped).subject == "Zoë 😀"

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"specversion": ...}, "not_cloudevents"),
            ({"specversion": None}, "not_cloudevents"),
            ({"specversion": 1.0}, "invalid_attribute"),
            ({"specversion": "0.3"}, "unsupported_specversion"),
            ({"specversion": "0.3", "time": ""}, "unsupported_specversion"),
            ({"id": ...}, "missing_attribute"),
            ({"id": None}, "missing_attribute"),
            ({"id": ""}, "invalid_attribute"),
            ({"id": 17}, "invalid_attribute"),
            ({"source": ...}, "missing_attribute"),
            ({"source": ""}, "invalid_attribute"),
            ({"type": ...}, "missing_attribute"),
            ({"type": []}, "invalid_attribute"),
            ({"subject": ""}, "invalid_attribute"),
            ({"subject": 5}, "invalid_attribute"),
            ({"time": 1700000000}, "invalid_attribute"),
            ({"datacontenttype": ""}, "invalid_attribute"),
            ({"datacontenttype": 5, "data": ..., "data_base64": ""}, "invalid_attribute"),
            ({"dataschema": ""}, "invalid_attribute"),
            ({"customerid": 1.5}, "invalid_attribute"),
            ({"customerid": {}}, "invalid_attribute"),
            ({"data_base64": "e30="}, "ambiguous_data"),
            ({"data": ..., "data_base64": "a"}, "binary_data"),
            ({"data": ..., "data_base64": 5}, "binary_data"),
            ({"data": ..., "data_base64": "ew==", "datacontenttype": "application/json"}, "not_json"),
        ],
    )
    def test_what_is_not_a_valid_event_is_refused_with_the_reason(self, change: dict[str, Any], why: str) -> None:
        assert reason(None, structured(**change)) == why

    @pytest.mark.parametrize(
        ("value", "why"),
        [
            (b"", "not_json"),
            (b"\x00\x00\x00\x00\x07", "not_json"),
            (b"hello", "not_json"),
            (b"\xef\xbb\xbf{}", "not_json"),
            (structured() + b"}", "not_json"),
            (structured().replace(b"12.5", b"NaN"), "not_json"),
            (structured(other=7).replace(b"7}", b"-Infinity}"), "not_json"),
            (structured(subject="~").replace(b"~", b"\xff"), "not_json"),
            (structured(other="~").replace(b"~", b"\xff"), "not_json"),
            (structured(other="~").replace(b"~", b"\xed\xa0\x80"), "not_json"),
            (structured(subject="~").replace(b"~", b"\\ud800"), "not_json"),
            (structured(other="~").replace(b"~", b"\\ud800"), "not_json"),
            (structured(other="~").replace(b"~", b"\n"), "not_json"),
            (b"[" + structured() + b"]", "not_cloudevents"),
            (b'"text"', "not_cloudevents"),
            (b"null", "not_cloudevents"),
            (b"{}", "not_cloudevents"),
            (b'{"amount": 5}', "not_cloudevents"),
            (b"[" * 5_000, "not_cloudevents"),
            (b'{"a":' * 500_000, "undecodable"),
            (structured(data="~").replace(b'"~"', b'{"tokens":' * 500_000), "undecodable"),
        ],
    )
    def test_what_is_not_a_json_object_with_specversion_is_refused(self, value: bytes, why: str) -> None:
        assert reason(None, value) == why

    @pytest.mark.parametrize("headers", [[], [("ce_id", b"1")]])
    def test_batches_are_refused(self, headers: list[tuple[str, bytes | None]]) -> None:
        headers = [*headers, ("Content-Type", b"application/cloudevents-batch+json; charset=utf-8")]

        assert reason(headers, b"[" + structured() + b"]") == "batch_mode"

    def test_a_refusal_says_what_is_wrong_in_a_bounded_number_of_characters(self) -> None:
        with pytest.raises(Malformed, match=r"^missing_attribute: id is missing$"):
            DECODER.decode(None, structured(id=...))
        with pytest.raises(Malformed) as caught:
            DECODER.decode(None, structured(specversion="9" * 10_000))

        assert len(str(caught.value)) < 300


class TestData:
    @pytest.mark.parametrize(
        ("data", "tokens", "model", "third"),
        [
            ({}, None, None, None),
            (None, None, None, None),
            ("text", None, None, None),
            ("", None, None, None),
            (5, None, None, None),
            (True, None, None, None),
            ([], None, None, None),
            ([{"model": "m"}], None, None, None),
            ({"tokens": 5, "model": "m"}, None, '"m"', None),
            ({"tokens": None, "model": None}, None, "null", None),
            ({"tokens": [{"total": 1}], "model": {"a": 1}}, None, '{"a": 1}', None),
            ({"tokens": {"total": None}}, "null", None, None),
            ({"tokens": {"total": "12"}}, '"12"', None, None),
            ({"tokens": {"total": [1]}}, "[1]", None, None),
            ({"items": [1, 2]}, None, None, None),
            ({"items": [1, 2, 3]}, None, None, None),
            ({"items": {"2": {"n": 1}}}, None, None, None),
            ({"items": [1, 2, {"m": 1}]}, None, None, None),
            ({"items": None}, None, None, None),
            ({"items": [1, 2, {"n": {"x": []}}], "tokens": 0}, None, None, '{"x": []}'),
        ],
    )
    def test_data_of_another_shape_lacks_what_is_not_there(
        self, data: Any, tokens: str | None, model: str | None, third: str | None
    ) -> None:
        for event in (
            DECODER.decode(None, structured(data=data)),
            DECODER.decode(BINARY, json.dumps(data).encode()),
            DECODER.decode(None, general(structured(data=data))),
        ):
            assert [read(DECODER, event, path) for path in PATHS] == [tokens, model, third]

    @pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/xml"])
    def test_structured_data_is_read_as_the_json_it_is_whatever_its_content_type(self, content_type: str) -> None:
        event = DECODER.decode(None, structured(datacontenttype=content_type))

        assert event.datacontenttype == content_type
        assert read(DECODER, event, TOKENS) == "12.5"

    @pytest.mark.parametrize("content_type", [..., None, "application/json", "application/cloudevents+json"])
    @pytest.mark.parametrize("data", [..., None])
    def test_json_carried_as_base64_is_read(self, content_type: Any, data: Any) -> None:
        value = structured(data=data, data_base64="eyJtb2RlbCI6ICJtIn0=", datacontenttype=content_type)

        assert read(DECODER, DECODER.decode(None, value), MODEL) == '"m"'

    @pytest.mark.parametrize(
        ("content_type", "data"), [("image/png", "eyJtb2RlbCI6ICJtIn0="), (..., "/w=="), (..., "")]
    )
    def test_other_bytes_carried_as_base64_are_data_without_members(self, content_type: Any, data: str) -> None:
        event = DECODER.decode(None, structured(data=..., data_base64=data, datacontenttype=content_type))

        assert [read(DECODER, event, path) for path in PATHS] == [None, None, None]

    def test_a_value_may_be_read_as_a_whole_and_by_its_members(self) -> None:
        decoder = Decoder([("tokens", "total"), ("tokens",), ("tokens", "by", 0)], [])
        whole = decoder.decode(None, structured(data={"tokens": 7}))
        parts = decoder.decode(None, structured(data={"tokens": {"total": 8, "by": [9]}}))

        assert [read(decoder, whole, path) for path in (("tokens",), TOKENS)] == ["7", None]
        assert [read(decoder, parts, path) for path in (TOKENS, ("tokens", "by", 0))] == ["8", "9"]

    def test_the_data_as_a_whole_is_a_path(self) -> None:
        decoder = Decoder([(), ("n",)], [])

        assert read(decoder, decoder.decode(None, structured(data=5)), ()) == "5"
        assert read(decoder, decoder.decode(None, structured(data={"n": 6})), ("n",)) == "6"
        assert read(decoder, decoder.decode(None, structured(data=...)), ("n",)) is None
        assert read(decoder, decoder.decode(BINARY, b" [1] "), ()) == "[1]"
        assert read(decoder, decoder.decode(BINARY, b""), ()) is None

    @pytest.mark.parametrize(
        "name", ["prompt-tokens", "class", "__class__", "0", "", "a.b", 'say "x"', "Zoë", "m0", "😀"]
    )
    def test_members_may_have_any_name(self, name: str) -> None:
        decoder = Decoder([(name,), ("deep", name, name)], [])
        event = decoder.decode(None, structured(data={name: 1, "deep": {name: {name: 2}}}))

        assert read(decoder, event, (name,)) == "1"
        assert read(decoder, event, ("deep", name, name)) == "2"

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["tokens", "total", "model", "items", "n", "x"]), inner, max_size=4)
            ),
            max_leaves=12,
        ),
        st.fixed_dictionaries(
            {},
            optional={
                "subject": st.none() | st.text(max_size=2),
                "customerid": st.none() | st.text(max_size=2) | st.integers() | st.floats(allow_nan=False),
                "id": st.text(max_size=2),
                "time": st.none() | st.text(max_size=2) | st.integers(),
            },
        ),
    )
    def test_the_typed_and_the_general_path_read_the_same(self, data: Any, attributes: dict[str, Any]) -> None:
        value = structured(data=data, **attributes)

        assert outcome(value) == outcome(general(value))


def outcome(value: bytes) -> object:
    try:
        return DECODER.decode(None, value)
    except Malformed as refusal:
        return refusal.reason


class TestBinary:
    def test_attributes_are_headers_and_the_value_is_the_data(self) -> None:
        event = DECODER.decode(binary(subject="Zoë".encode(), time=b"2026-11-01T00:00:00Z"), b'{"model": "m"}')

        assert (event.id, event.source, event.type) == ("e-1", "/completions", "ai.completion")
        assert (event.subject, event.time) == ("Zoë", "2026-11-01T00:00:00Z")
        assert event.datacontenttype == "application/json"
        assert DECODER.attribute("customerid")(event) == "acme"
        assert read(DECODER, event, MODEL) == '"m"'

    def test_headers_come_in_any_order_and_case_among_foreign_ones(self) -> None:
        headers = [(name.upper(), text) for name, text in reversed(BINARY or ())]
        headers += [("traceparent", b"\xff"), ("traceparent", b"twice"), ("x", None), ("ce_unread", b"")]

        assert DECODER.decode(headers, b"{}") == DECODER.decode(BINARY, b"{}")

    def test_attribute_values_are_not_percent_decoded(self) -> None:
        assert DECODER.decode(binary(source=b"/a%20b"), b"").source == "/a%20b"

    @pytest.mark.parametrize(
        ("content_type", "is_read"),
        [
            (b"application/json", True),
            (b"application/json; charset=utf-8", True),
            (b"Application/JSON ; charset=utf-8", True),
            (b"text/json", True),
            (b"application/vnd.acme.usage+json", True),
            (b"application/xml", False),
            (b"text/plain; note=application/json", False),
            (b"application/jsonl", False),
            (b"application/octet-stream", False),
        ],
    )
    def test_data_is_read_where_its_content_type_is_json(self, content_type: bytes, is_read: bool) -> None:
        event = DECODER.decode(binary(content_type=content_type), b'{"model": "m"}')

        assert (read(DECODER, event, MODEL) is not None) == is_read

    @pytest.mark.parametrize("value", [b"", b"\x89PNG\xff", b"text", b"{", b"NaN", b'"\xff"'])
    def test_undeclared_data_that_is_not_json_is_data_without_members(self, value: bytes) -> None:
        event = DECODER.decode(without("content-type"), value)

        assert read(DECODER, event, MODEL) is None

    def test_undeclared_data_that_is_json_is_read(self) -> None:
        assert read(DECODER, DECODER.decode(without("content-type"), b'{"model": 1}'), MODEL) == "1"

    def test_no_data_is_no_data_whatever_the_content_type(self) -> None:
        assert read(DECODER, DECODER.decode(BINARY, b""), MODEL) is None

    @pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
    def test_a_missing_required_attribute_is_refused(self, name: str) -> None:
        assert reason(without(f"ce_{name}"), b"{}") == "missing_attribute"

    @pytest.mark.parametrize(
        ("headers", "value", "why"),
        [
            (binary(specversion=b"0.3"), b"{}", "unsupported_specversion"),
            (binary(id=b""), b"{}", "invalid_attribute"),
            (binary(id=None), b"{}", "invalid_attribute"),
            (binary(id=b"\xff"), b"{}", "invalid_attribute"),
            (binary(subject=b""), b"{}", "invalid_attribute"),
            (binary(unread=b"\xff"), b"{}", "invalid_attribute"),
            (binary(data=b"{}"), b"{}", "invalid_attribute"),
            (binary(data_base64=b"e30="), b"{}", "invalid_attribute"),
            (binary(**{"bad-name": b"x"}), b"{}", "invalid_attribute"),
            (binary(**{"": b"x"}), b"{}", "invalid_attribute"),
            (binary(content_type=b""), b"{}", "invalid_attribute"),
            ([*(BINARY or ()), ("CE_ID", b"e-2")], b"{}", "duplicate_attribute"),
            ([*(BINARY or ()), ("Content-Type", b"text/json")], b"{}", "duplicate_attribute"),
            (binary(datacontenttype=b"text/plain"), b"{}", "duplicate_attribute"),
            (BINARY, b"{", "not_json"),
            (BINARY, b"[1, 2", "not_json"),
            (BINARY, b'{"tokens": 5, "model": ', "not_json"),
            (BINARY, b'{"x": NaN}', "not_json"),
            (BINARY, b'{"x": "\xff"}', "not_json"),
            (BINARY, b"[" * 500_000, "undecodable"),
            (without("content-type"), b"[" * 500_000, "undecodable"),
        ],
    )
    def test_what_is_not_a_valid_event_is_refused_with_the_reason(
        self, headers: Headers, value: bytes, why: str
    ) -> None:
        assert reason(headers, value) == why

    @pytest.mark.parametrize(
        "header", [("ce_id", b"e-1"), ("CE_ID", b"e-1"), ("ce_datacontenttype", b"application/json")]
    )
    def test_an_attribute_that_two_headers_agree_on_is_that(self, header: tuple[str, bytes]) -> None:
        """SmallRye, and with it Quarkus, writes content-type and ce_datacontenttype: it would never be billed."""
        event = DECODER.decode([*(BINARY or ()), header], b'{"tokens": 5}')
        assert (event.id, event.datacontenttype) == ("e-1", "application/json")


class TestDecoder:
    @pytest.mark.parametrize("name", ["data", "Upper", "under_score", "da-sh", "", "naïve", "a\n"])
    def test_a_name_that_no_attribute_can_have_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="cannot be an attribute"):
            Decoder([], [name])

    def test_without_paths_and_attributes_the_context_is_read(self) -> None:
        decoder = Decoder([], [])

        for data in (..., None, 5, "text", {"a": 1}):
            assert decoder.decode(None, structured(data=data)).id == "e-1"
        assert decoder.decode(BINARY, b"5").id == "e-1"

    def test_any_context_attribute_can_be_asked_for(self) -> None:
        decoder = Decoder([], ["subject", "dataschema", "type"])
        event = decoder.decode(None, structured(dataschema="urn:x"))

        assert [decoder.attribute(name)(event) for name in ("subject", "dataschema", "source")] == [
            "cus_1",
            "urn:x",
            "/completions",
        ]


class TestParsePath:
    @pytest.mark.parametrize(
        ("text", "path"),
        [
            ("$", ()),
            ("$.tokens.total", ("tokens", "total")),
            ("$.items[0].n", ("items", 0, "n")),
            ("$.a-b._c.9", ("a-b", "_c", "9")),
            ("$['any name'].n", ("any name", "n")),
            ('$["it\'s"]', ("it's",)),
            (r"$['it\'s']['\\']", ("it's", "\\")),
            ("$[12][3]", (12, 3)),
            ("$['0']", ("0",)),
            ("$['']", ("",)),
        ],
    )
    def test_members_quoted_names_and_indexes_are_steps(self, text: str, path: Path) -> None:
        assert parse_path(text) == path

    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("$.", 2),
            ("$.a..b", 4),
            ("$.a b", 4),
            ("$.a[", 4),
            ("$.a[-1]", 4),
            ("$.a[*]", 4),
            ("$a", 2),
            ("$.a[1", 4),
            ("$.a['b]", 4),
            ("$..a", 2),
            ("$.a ", 4),
            ("$.a\n", 4),
            ("$[9999999999]", 2),
        ],
    )
    def test_the_place_of_what_is_no_path_is_named(self, text: str, place: int) -> None:
        with pytest.raises(ValueError, match=f"^not a path at character {place} of"):
            parse_path(text)

    @pytest.mark.parametrize("text", ["", "tokens.total", ".tokens", " $.a"])
    def test_a_path_starts_with_a_dollar_sign(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"starts with '\$'"):
            parse_path(text)
