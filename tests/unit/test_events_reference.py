"""Our decoder agrees with the `cloudevents` package: on what is an event, and on every value read from it.

Where the two differ on purpose there is an entry in DIFFERENCES, with examples that prove that they do differ.
"""

import base64
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka_event
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from consumer.events import Decoder, Event, Malformed, Path
from consumer.times import parse_time

PATHS: tuple[Path, ...] = (("model",), ("tokens", "total"), ("tokens",), ("items", 1, "n"))
EXTENSIONS = ("customerid", "region")
DECODER = Decoder(PATHS, EXTENSIONS)
REQUIRED = ("specversion", "id", "source", "type")
CONTEXT = (*REQUIRED, "subject", "time", "datacontenttype", "dataschema")

ABSENT = "absent"
REFUSED = "refused"


@dataclass(frozen=True)
class Record:
    headers: tuple[tuple[str, bytes | None], ...]
    value: bytes

    @property
    def members(self) -> dict[str, Any]:
        """The members of the JSON object in the value, if it is one."""
        with suppress(ValueError, RecursionError):
            members = json.loads(self.value)
            return members if isinstance(members, dict) else {}
        return {}

    def header(self, name: str) -> bytes | None:
        return next((text for header, text in self.headers if header.lower() == name), None)

    @property
    def content_type(self) -> str:
        return (self.header("content-type") or b"").decode(errors="replace").lower()

    @property
    def is_binary(self) -> bool:
        return any(name.lower().startswith("ce_") for name, _ in self.headers)

    @property
    def time(self) -> Any:
        return (self.header("ce_time") or b"").decode(errors="replace") if self.is_binary else self.members.get("time")

    @property
    def data_type(self) -> str:
        """The content type of data that came as bytes."""
        return self.content_type if self.is_binary else str(self.members.get("datacontenttype") or "")

    @property
    def data_bytes(self) -> bytes | None:
        if self.is_binary:
            return self.value
        with suppress(ValueError, TypeError):
            return base64.b64decode(self.members["data_base64"]) if "data_base64" in self.members else None
        return None


Reading = dict[str, Any] | str
"""What was read from a record, by name and path; or that it was refused."""


def theirs(record: Record) -> Reading:
    try:
        event = from_kafka_event(KafkaMessage(headers=dict(record.headers), key=None, value=record.value))  # type: ignore[arg-type]  # headers without a value are part of the test
    except Exception:  # noqa: BLE001 - the package refuses with whatever exception comes
        return REFUSED
    moment = event.get_time()
    reading = {name: event.get_attributes().get(name) for name in (*CONTEXT, *EXTENSIONS)}
    reading["time"] = (
        None if moment is None else (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    )
    for name in EXTENSIONS:
        if isinstance(reading[name], bool | int):
            reading[name] = str(reading[name]).lower()
    return reading | {str(path): at(event, path) for path in PATHS}


def at(event: BaseCloudEvent, path: Path) -> Any:
    value: Any = event.get_data()
    for step in path:
        if isinstance(step, str):
            value = value.get(step, ABSENT) if isinstance(value, dict) else ABSENT
        else:
            value = value[step] if isinstance(value, list) and step < len(value) else ABSENT
    return value


def ours(record: Record) -> Reading:
    """What our decoder reads; an event whose time is not an instant cannot be used, so it counts as refused."""
    try:
        event = DECODER.decode(record.headers, record.value)
        reading: dict[str, Any] = {name: getattr(event, name) for name in CONTEXT}
        reading["time"] = None if event.time is None else parse_time(event.time)
    except (Malformed, ValueError):
        return REFUSED
    reading |= {name: DECODER.attribute(name)(event) for name in EXTENSIONS}
    return reading | {str(path): value(event, path) for path in PATHS}


def value(event: Event, path: Path) -> Any:
    text = DECODER.raw(path)(event)
    return ABSENT if text is UNSET else json.loads(bytes(text))


# The differences


def event(**changes: Any) -> Record:
    members = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "time": "2026-11-01T00:00:00Z"} | changes
    return Record((), json.dumps({name: value for name, value in members.items() if value is not ...}).encode())


def message(value: bytes = b"{}", *more: tuple[str, bytes | None], **changes: bytes) -> Record:
    headers = {
        "specversion": b"1.0",
        "id": b"1",
        "source": b"s",
        "type": b"t",
        "time": b"2026-11-01T00:00:00Z",
    } | changes
    return Record((*((f"ce_{name}", text) for name, text in headers.items()), *more), value)


JSON: tuple[str, bytes] = ("content-type", b"application/json")


def is_json(text: bytes | None) -> bool:
    """Whether this is JSON without NaN and Infinity, and all its strings are text."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        members = json.loads((text or b"").decode(), parse_constant=refuse, object_pairs_hook=list)
        json.dumps(members, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def names_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower().endswith(("/json", "+json"))


WE_REFUSE = frozenset({"we refuse"})
THEY_REFUSE = frozenset({"they refuse"})
ALL_DATA = frozenset(map(str, PATHS))


@dataclass(frozen=True)
class Difference:
    """Why the two differ, how it shows (who refuses, or what differs in value), for which records, and examples."""

    why: str
    shows: frozenset[str]
    applies: Callable[[Record], bool]
    examples: Sequence[Record]


REQUIRED_ABSENT = Difference(
    "a required attribute that is absent is not made up: such an event has no identity",
    WE_REFUSE,
    lambda record: (
        any(record.header(f"ce_{name}") is None for name in ("specversion", "id"))
        if record.is_binary
        else any(record.members.get(name) is None for name in ("specversion", "id"))
    ),
    [event(id=...), event(specversion=...), Record((*message().headers[1:],), b"")],
)
TIME_ABSENT = Difference(
    "a time that is absent is not taken from this machine's clock",
    frozenset({"time"}),
    lambda record: record.header("ce_time") is None if record.is_binary else record.time is None,
    [event(time=...), Record(message().headers[:4], b"")],
)
OLD_VERSION = Difference(
    "CloudEvents 0.3 is not read",
    WE_REFUSE,
    lambda record: record.header("ce_specversion") == b"0.3" or record.members.get("specversion") == "0.3",
    [event(specversion="0.3"), message(specversion=b"0.3")],
)
NOT_RFC_3339 = Difference(
    "times are RFC 3339, not any other form of ISO 8601",
    WE_REFUSE,
    lambda record: isinstance(record.time, str) and not is_time(record.time),
    [event(time="2026-11-01T00Z"), event(time="20261101T000000Z"), message(time=b"2026-11-01T24:00:00Z")],
)
LEAP_SECOND = Difference(
    "leap seconds exist",
    THEY_REFUSE,
    lambda record: isinstance(record.time, str) and ":60" in record.time and is_time(record.time),
    [event(time="2016-12-31T23:59:60Z"), message(time=b"2016-12-31T23:59:60Z")],
)
NULL_ATTRIBUTE = Difference(
    "an attribute that is null is absent, as the JSON format has it",
    THEY_REFUSE,
    lambda record: (
        not record.is_binary
        and any(name in record.members and record.members[name] is None for name in (*CONTEXT, "data_base64"))
    ),
    [event(subject=None), event(time=None), event(dataschema=None), event(data={}, data_base64=None)],
)
NOT_JSON = Difference(
    "NaN, Infinity and lone surrogates are not JSON",
    WE_REFUSE,
    lambda record: not record.is_binary and not is_json(record.value),
    [
        Record((), event(data=5).value.replace(b"5", b"NaN")),
        Record((), event(data=5).value.replace(b"5", b"-Infinity")),
        Record((), event(data=5).value.replace(b"5", b'"\\ud800"')),
    ],
)
LONG_INTEGER = Difference(
    "integers of any length are JSON",
    THEY_REFUSE,
    lambda record: len(record.value) > 4300,
    [Record((), event(data=5).value.replace(b"5", b"9" * 4301))],
)
UNREAD_NAME = Difference(
    "names of attributes that no meter reads are not looked at: it would cost every event, and change no amount",
    THEY_REFUSE,
    lambda record: (
        not record.is_binary
        and any(
            not (name.isascii() and name.isalnum() and name.islower()) for name in {*record.members} - {"data_base64"}
        )
    ),
    [event(Upper="x"), event(under_score="x"), event(**{"": "x"})],
)
EXTENSION_TYPE = Difference(
    "an extension that a meter reads is a string, a boolean or an integer, as the specification has it",
    WE_REFUSE,
    lambda record: any(isinstance(record.members.get(name), float | list | dict) for name in EXTENSIONS),
    [event(customerid=1.5), event(customerid=["acme"]), event(region={})],
)
CONTENT_TYPE_PREVAILS = Difference(
    "a content type that says that the value is the event prevails over attributes in headers, as the binding has it",
    WE_REFUSE | THEY_REFUSE | ALL_DATA | {*CONTEXT, *EXTENSIONS},
    lambda record: record.is_binary and record.content_type.startswith("application/cloudevents"),
    [message(event(id="2").value, ("content-type", b"application/cloudevents+json"))],
)
BATCH = Difference(
    "a batch is refused for its content type, whatever it holds",
    WE_REFUSE,
    lambda record: record.content_type.startswith("application/cloudevents-batch"),
    [Record((("content-type", b"application/cloudevents-batch+json"),), event().value)],
)
REPEATED_HEADER = Difference(
    "an attribute in two headers that differ is refused: nothing says which one is meant",
    WE_REFUSE,
    lambda record: (
        len({name.lower().replace("ce_datacontenttype", "content-type") for name, _ in record.headers})
        < len({(name.lower().replace("ce_datacontenttype", "content-type"), text) for name, text in record.headers})
    ),
    [message(b"{}", ("CE_ID", b"2")), message(b"{}", JSON, ("ce_datacontenttype", b"text/plain"))],
)
FOREIGN_HEADER = Difference(
    "headers that are not the event's may hold anything",
    THEY_REFUSE,
    lambda record: record.is_binary and any(not is_text(text) for name, text in record.headers if not is_ours(name)),
    [message(b"{}", ("trace", b"\xff")), message(b"{}", ("trace", None))],
)
DECLARED_JSON = Difference(
    "data that is declared to be JSON must be; nobody is billed by what was left of it",
    WE_REFUSE,
    lambda record: bool(record.data_bytes) and names_json(record.data_type) and not is_json(record.data_bytes),
    [
        message(b"{", JSON),
        message(b'{"model": NaN}', JSON),
        event(data_base64=base64.b64encode(b"{").decode(), datacontenttype="application/json"),
    ],
)
UNDECLARED_NAN = Difference(
    "undeclared data with NaN or lone surrogates in it is not JSON, so it has no members",
    ALL_DATA,
    lambda record: record.is_binary and not record.data_type and not is_json(record.data_bytes),
    [message(b'{"model": NaN}')],
)
JSON_TYPES = Difference(
    "content types are JSON by their subtype or suffix, in any case and with any white space",
    ALL_DATA,
    lambda record: record.is_binary and names_json(record.data_type),
    [
        message(b'{"model": 1}', ("content-type", b"Application/JSON")),
        message(b'{"model": 1}', ("content-type", b"application/json ; charset=utf-8")),
        message(b'{"model": 1}', ("content-type", b"model/gltf+json")),
    ],
)
BASE64_JSON = Difference(
    "JSON that travels as base64 is JSON",
    ALL_DATA,
    lambda record: not record.is_binary and bool(record.data_bytes),
    [event(data_base64=base64.b64encode(b'{"model": 1}').decode())],
)
DIFFERENCES = {name: difference for name, difference in globals().items() if isinstance(difference, Difference)}


def is_time(text: str) -> bool:
    try:
        parse_time(text)
    except ValueError:
        return False
    return True


def is_text(text: bytes | None) -> bool:
    try:
        return text is not None and bool(text.decode() or True)
    except UnicodeDecodeError:
        return False


def is_ours(header: str) -> bool:
    return header.lower().startswith("ce_") or header.lower() == "content-type"


@pytest.mark.parametrize(
    ("difference", "record"),
    [
        pytest.param(each, record, id=f"{name}-{n}")
        for name, each in DIFFERENCES.items()
        for n, record in enumerate(each.examples)
    ],
)
def test_every_listed_difference_is_one(difference: Difference, record: Record) -> None:
    assert difference.applies(record)
    assert differing(ours(record), theirs(record)) & difference.shows


def differing(mine: Reading, reference: Reading) -> set[str]:
    """Who alone refuses, or the names and paths of which different values are read."""
    if isinstance(mine, str) or isinstance(reference, str):
        return set() if mine == reference else {*(WE_REFUSE if mine == REFUSED else THEY_REFUSE)}
    return {name for name in mine if mine[name] != reference[name]}


# The agreement

SCALARS: st.SearchStrategy[Any] = st.sampled_from(
    [..., None, "", "x", "Zoë", "1.0", 0, 7, -(2**70), True, False, 1.5, [], {}]
)
RIGHT_TIMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["1969-12-31T23:59:59", "2026-11-01T11:59:59", "2024-02-29t00:00:00", "0001-01-02T00:00:00"]),
    st.sampled_from(["", ".0", ".5", ".999", ".9996", ".999999", ".9999996", ".123456789"]),
    st.sampled_from(["Z", "z", "+00:00", "-00:00", "+05:30", "-08:00", "+23:59"]),
)
WRONG_TIMES = st.sampled_from(
    [..., None, "", "now", 5, "2026-11-01T00:00:00", "2026-11-01", "2026-13-01T00:00:00Z", "2016-12-31T23:59:60Z"]
)
MEMBERS = st.sampled_from(["model", "tokens", "total", "items", "n", "\\", "é"])
VALUES = st.recursive(
    st.sampled_from([None, True, 0, 12, -1.5, 1e300, 2**80, "", "text", "12.50", "😀"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=10,
)
DATA = VALUES | st.builds(
    lambda model, total, n: {"model": model, "tokens": {"total": total}, "items": [0, {"n": n}]}, VALUES, VALUES, VALUES
)
RIGHT_TYPES = st.sampled_from(
    [..., "application/json", "application/json; charset=utf-8", "text/json", "application/a.b+json", "application/xml"]
)


def mostly(usual: st.SearchStrategy[Any], rare: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda n: rare if n == 9 else usual)


TIMES = mostly(RIGHT_TIMES, WRONG_TIMES)
CONTENT_TYPES = mostly(RIGHT_TYPES, st.sampled_from([None, "", 5, "text/plain"]))


@st.composite
def structured(draw: st.DrawFn) -> Record:
    """An event as a JSON object: mostly right, some attributes strange, some members twice."""
    members: dict[str, Any] = {"specversion": "1.0", "id": "e-1", "source": "/s", "type": "t", "time": draw(TIMES)}
    members["data"] = draw(st.just(...) | DATA)
    members["datacontenttype"] = draw(CONTENT_TYPES)
    strange = st.sampled_from([*CONTEXT, *EXTENSIONS, "unread", "Unread", "un_read", "data_base64"])
    members |= draw(mostly(st.just({}), st.dictionaries(strange, SCALARS, min_size=1, max_size=2)))
    members |= draw(st.dictionaries(st.sampled_from(EXTENSIONS), st.text(max_size=2) | st.integers() | st.booleans()))
    if draw(st.integers(0, 9)) == 0:
        members["data_base64"] = base64.b64encode(json.dumps(draw(DATA)).encode()).decode()
    pairs = [(name, value) for name, value in members.items() if value is not ...]
    if draw(st.booleans()):
        pairs = draw(st.permutations(pairs))
    if draw(st.integers(0, 9)) == 0 and pairs:
        name, _ = draw(st.sampled_from(pairs))
        pairs.insert(0, (name, draw(SCALARS.filter(lambda each: each is not ...))))
    encode = json.JSONEncoder(ensure_ascii=draw(st.booleans())).encode
    blank = draw(st.sampled_from(["", " ", "\n\t"]))
    text = ",".join(f"{blank}{encode(name)}{blank}:{blank}{encode(value)}{blank}" for name, value in pairs)
    headers = draw(
        st.sampled_from(
            [
                (),
                (("Content-Type", b"application/cloudevents+json; charset=utf-8"),),
                (JSON, ("x", b"\xff")),
                (("content-type", b""),),
            ]
        )
    )
    return Record(headers, f"{blank}{{{text}}}{blank}".encode())


@st.composite
def binary(draw: st.DrawFn) -> Record:
    """An event in headers: mostly right, some attributes strange."""
    texts = st.sampled_from([..., None, b"", b"x", "Zoë".encode(), b"a%20b", b"1.0", b"\xff"])
    attributes: dict[str, Any] = {"specversion": b"1.0", "id": b"e-1", "source": b"/s", "type": b"t"}
    time = draw(TIMES)
    attributes["time"] = time.encode() if isinstance(time, str) else ...
    strange = st.sampled_from([*CONTEXT[:-2], "dataschema", *EXTENSIONS, "unread", "un_read", "data", ""])
    attributes |= draw(mostly(st.just({}), st.dictionaries(strange, texts, min_size=1, max_size=2)))
    attributes |= draw(st.dictionaries(st.sampled_from(EXTENSIONS), st.sampled_from([b"", b"x", b"a%20b"])))
    headers = [(f"ce_{name}", text) for name, text in attributes.items() if text is not ...]
    content_type = draw(CONTENT_TYPES)
    if isinstance(content_type, str):
        headers.append(("content-type", content_type.encode()))
    headers += draw(st.lists(st.just(("x", b"y")), max_size=1))
    recase = draw(st.sampled_from([str.lower, str.upper, str.title]))
    value = draw(
        st.builds(lambda data: json.dumps(data).encode(), DATA)
        | st.sampled_from([b"", b"text", b"{", b"[1", b"\xff", b"NaN", b'{"model": 1} ', b" "])
    )
    return Record(tuple((recase(name), text) for name, text in draw(st.permutations(headers))), value)


@st.composite
def damaged(draw: st.DrawFn) -> Record:
    """A record with one run of bytes replaced."""
    record = draw(structured() | binary())
    start = draw(st.integers(0, len(record.value)))
    length = draw(st.integers(0, 3))
    piece = draw(
        st.sampled_from(
            [
                b"",
                b"0",
                b"{",
                b"}",
                b'"',
                b"\\",
                b",",
                b"\x00",
                b"\xff",
                b"e",
                b"-",
                b"\\ud83d",
                b"\\u00e9",
                b"NaN",
                b" ",
            ]
        )
    )
    return Record(record.headers, record.value[:start] + piece + record.value[start + length :])


@settings(max_examples=500)
@given(structured() | binary() | damaged())
@example(event())
@example(message())
def test_both_read_the_same_or_a_listed_difference_says_why(record: Record) -> None:
    explained = {shown for each in DIFFERENCES.values() if each.applies(record) for shown in each.shows}

    assert differing(ours(record), theirs(record)) <= explained


@pytest.mark.parametrize("records", [structured(), binary()], ids=["structured", "binary"])
def test_enough_records_are_accepted_by_both_for_this_to_prove_something(records: st.SearchStrategy[Record]) -> None:
    accepted = []

    @settings(max_examples=100, database=None, derandomize=True)
    @given(records)
    def look(record: Record) -> None:
        accepted.append(ours(record) == theirs(record) != REFUSED)

    look()

    assert sum(accepted) > 40
