"""Usage events: CloudEvents 1.0 read from Kafka records, as far as the meters need them.

Almost every record is one JSON object (structured mode). It is decoded in a single typed pass that builds only the
context attributes and the data members some meter reads; data members stay raw JSON text, so that no number passes
through a binary float. Whatever that pass refuses is read again by the general path, which takes its time to accept
data of another shape or to say what is wrong.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from operator import attrgetter
from typing import Annotated, Any, Final, Literal, cast

import msgspec
from msgspec import UNSET, UnsetType

from consumer.memory import Memory

Headers = Sequence[tuple[str, bytes | None]] | None
"""The headers of a Kafka record, in the form in which the client gives them."""

Path = tuple[str | int, ...]
"""A place in the data: `$.tokens.total` is `("tokens", "total")`, `$.items[0].n` is `("items", 0, "n")`."""

Reason = Literal[
    "not_json",
    "not_cloudevents",
    "unsupported_specversion",
    "missing_attribute",
    "invalid_attribute",
    "duplicate_attribute",
    "ambiguous_data",
    "binary_data",
    "batch_mode",
    "undecodable",
]

_NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class Malformed(Exception):
    """A record that is not a usable event: a stable reason to count by, and a detail, of bounded length, for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:200]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Event(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The context of a usage event. What else the meters read is behind the getters of the decoder that made it.

    `time` is the text as it came, judged by whoever needs the instant.
    """

    specversion: Literal["1.0"]
    id: _NonEmpty
    source: _NonEmpty
    type: _NonEmpty
    time: str | None = None
    subject: _NonEmpty | None = None
    datacontenttype: _NonEmpty | None = None
    dataschema: _NonEmpty | None = None


_REQUIRED: Final = ("specversion", "id", "source", "type")
_CONTEXT: Final = Event.__struct_fields__

_RAW: Final = msgspec.json.Decoder(msgspec.Raw)
_OBJECT: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ARRAY: Final = msgspec.json.Decoder(list[msgspec.Raw])
_STRING: Final = msgspec.json.Decoder(str | None)
_SCALAR: Final = msgspec.json.Decoder(str | bool | int | None)


# Paths into the data

_STEP: Final = re.compile(
    r"""\.(?P<name>[\w-]+)
      | \[(?P<index>[0-9]{1,9})\]
      | \[(?P<quote>['"])(?P<quoted>(?:\\['"\\]|(?!(?P=quote))[^\\])*)(?P=quote)\]""",
    re.VERBOSE,
)
_ESCAPED: Final = re.compile(r"\\(.)")


def parse_path(text: str) -> Path:
    """Read a path such as `$.tokens.total`, `$.items[0].n` or `$['any name'].n`.

    Raises ValueError with the place at which the text stops being a path.
    """
    if not text.startswith("$"):
        raise ValueError(f"a path starts with '$', as in $.tokens.total: {text!r} does not")
    steps: list[str | int] = []
    position = 1
    while position < len(text):
        step = _STEP.match(text, position)
        if step is None:
            raise ValueError(
                f"not a path at character {position + 1} of {text!r}: expected .name, ['name'] or [0]"
                f" where it has {text[position : position + 12]!r}"
            )
        if step["name"] is not None:
            steps.append(step["name"])
        elif step["index"] is not None:
            steps.append(int(step["index"]))
        else:
            steps.append(_ESCAPED.sub(r"\1", step["quoted"]))
        position = step.end()
    return tuple(steps)


def _descend(text: msgspec.Raw | UnsetType, path: Path) -> msgspec.Raw | UnsetType:
    """What lies at the path inside a JSON value that is known to be well formed."""
    for step in path:
        if isinstance(text, UnsetType):
            return UNSET
        try:
            text = _ARRAY.decode(text)[step] if isinstance(step, int) else _OBJECT.decode(text)[step]
        except (msgspec.ValidationError, LookupError, RecursionError):  # the last: a caller deeper down than decode()
            return UNSET
    return text


# Shapes: which members of the data are read


_ESCAPED_IN_JSON: Final = re.compile(r'["\\\x00-\x1f]')

_Tree = dict[str, "_Tree"] | None  # None is a leaf: the value is kept as raw JSON text


def _is_field(step: str | int) -> bool:
    """Whether a struct can have this step as the name of a field: not an index, nothing that JSON escapes."""
    return isinstance(step, str) and not _ESCAPED_IN_JSON.search(step)


def _tree(paths: Iterable[Path]) -> _Tree:
    """Join the paths, each as far as fields reach. Below a leaf there is nothing: getters descend from it."""
    named = {tuple(takewhile(_is_field, path)) for path in paths}
    if not named or () in named:
        return None
    root: dict[str, Any] = {}
    for path in sorted(named):
        members: _Tree = root
        for step in path[:-1]:
            if members is not None:
                members = members.setdefault(str(step), {})
        if members is not None:
            members[str(path[-1])] = None
    return root


class _Shape:
    """The members of an object that are read, and the struct that holds them."""

    def __init__(self, members: Mapping[str, _Tree]) -> None:
        """Give every member a field with a default, so that looking up any path in a struct succeeds."""
        self.members = {
            member: (f"m{number}", None if below is None else _Shape(below))
            for number, (member, below) in enumerate(members.items())
        }
        self.struct: type[msgspec.Struct] = msgspec.defstruct(
            "Data",
            [
                (field, msgspec.Raw, UNSET) if shape is None else (field, shape.struct, shape.struct())
                for field, shape in self.members.values()
            ],
            rename={field: member for member, (field, _) in self.members.items()},
            frozen=True,
            gc=False,
        )

    def read(self, text: msgspec.Raw) -> msgspec.Struct:
        """Fill the struct from JSON of any shape: what is not where a path expects it is absent."""
        try:
            found = _OBJECT.decode(text)
        except msgspec.ValidationError:
            return self.struct()
        return self.struct(
            **{
                field: found[member] if shape is None else shape.read(found[member])
                for member, (field, shape) in self.members.items()
                if member in found
            }
        )


# Headers

_CONTENT_TYPE: Final = "content-type"
_PREFIX: Final = "ce_"


def _carried(header: str) -> str:
    """`content-type`, or the name of the attribute that the header carries; empty for other people's headers."""
    name = header.lower()
    if name.startswith(_PREFIX):
        return name.removeprefix(_PREFIX) or _PREFIX
    return name if name == _CONTENT_TYPE else ""


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _envelope(content_type: bytes) -> Literal["event", "batch"] | None:
    """Whether the value of a record with this content type is a whole event, several, or data alone."""
    media = _media_type(content_type.decode("utf-8", "replace"))
    if media.startswith("application/cloudevents-batch"):
        return "batch"
    return "event" if media.startswith("application/cloudevents") else None


def _is_json(content_type: str) -> bool:
    return _media_type(content_type).endswith(("/json", "+json"))


def _is_attribute(name: str) -> bool:
    """Whether the specification allows an attribute of this name."""
    return name.isascii() and name.isalnum() and name == name.lower() and name != "data"


_carried_by: Final = Memory(_carried)
_envelope_of: Final = Memory(_envelope)
_json_by: Final = Memory(_is_json)
_attribute_names: Final = Memory(_is_attribute)


def _is_binary(headers: Sequence[tuple[str, bytes | None]]) -> bool:
    """Whether the attributes are in the headers. A content type that says that the value is the event prevails."""
    binary = False
    for header, text in headers:
        carried = _carried_by[header]
        if carried == _CONTENT_TYPE:
            envelope = _envelope_of[text or b""]
            if envelope == "event":
                return False
            if envelope == "batch":
                raise Malformed("batch_mode", "the record holds a batch; Kafka carries one event in each record")
        elif carried:
            binary = True
    return binary


def in_value(headers: Sequence[tuple[str, bytes | None]]) -> bool:
    """Whether the headers surely leave it to the value to be the event; for the hot path."""
    for header, text in headers:
        carried = _carried_by[header]
        if carried and (carried != _CONTENT_TYPE or _envelope_of[text or b""] == "batch"):
            return False
    return True


def in_headers(headers: Headers) -> bool:
    """Whether a record is an event by its headers alone: in binary mode one without data has no value."""
    try:
        return bool(headers) and _is_binary(headers or ())
    except Malformed:
        return False


def _as_text(value: str | bool | int) -> str:
    """The canonical string for an attribute that the JSON format may carry as a boolean or an integer."""
    if isinstance(value, str):
        return value
    return str(value).lower()


def _fault(attributes: Mapping[str, Any]) -> Malformed:
    """What keeps these attributes from being an event's."""
    for name in _REQUIRED:
        if name not in attributes:
            return Malformed("missing_attribute", f"{name} is missing")
    for name in _CONTEXT:
        if attributes.get(name) == "" and name != "time":
            return Malformed("invalid_attribute", f"{name} is empty")
    return Malformed("unsupported_specversion", f"specversion is {attributes['specversion']!r}, not '1.0'")


def _is_null(text: msgspec.Raw | None) -> bool:
    return text is None or bytes(text) == b"null"


# The decoder


class Decoder:
    """Decodes records into what the meters read of them: these paths into the data, these attributes.

    One decoder serves all meters of a pipeline; it keeps nothing from one record to the next.
    """

    def __init__(self, paths: Iterable[Path], attributes: Iterable[str]) -> None:
        """Raises ValueError for a name that no attribute can have."""
        extensions = sorted({*attributes}.difference(_CONTEXT))
        for name in extensions:
            if not _is_attribute(name):
                raise ValueError(f"{name!r} cannot be an attribute: their names are lower-case letters and digits")
        self._fields = {name: name for name in _CONTEXT} | {name: f"x{at}" for at, name in enumerate(extensions)}
        tree = _tree(paths)
        self._shape = None if tree is None else _Shape(tree)
        data_type: Any = msgspec.Raw if self._shape is None else self._shape.struct
        self._no_data: Any = UNSET if self._shape is None else self._shape.struct()
        self._event = cast(
            "type[Event]",
            msgspec.defstruct(
                "UsageEvent",
                [
                    ("data", data_type, self._no_data),
                    ("data_base64", None, None),  # anything but null goes to the general path
                    *((self._fields[name], str | None, None) for name in extensions),
                ],
                bases=(Event,),
                rename={self._fields[name]: name for name in extensions},
                kw_only=True,
                frozen=True,
                gc=False,
            ),
        )
        self._typed_event = msgspec.json.Decoder(self._event)
        self.typed: Callable[[bytes], Event] = self._typed_event.decode
        """Decode an ASCII value in structured mode, for the hot path; any ``msgspec.DecodeError`` is for ``decode``."""
        self._typed_data = msgspec.json.Decoder(data_type)

    def raw(self, path: Path) -> Callable[[Event], msgspec.Raw | UnsetType]:
        """A getter for the raw JSON text at one of the decoder's paths: UNSET where absent, `null` where null."""
        field, shape, rest = "data", self._shape, path
        while rest and shape is not None:
            below, shape = shape.members[str(rest[0])]
            field, rest = f"{field}.{below}", rest[1:]
        get = attrgetter(field)
        return (lambda event: _descend(get(event), rest)) if rest else get

    def attribute(self, name: str) -> Callable[[Event], str | None]:
        """A getter for one of the decoder's attributes, or any of the context: None where absent."""
        return attrgetter(self._fields[name])

    def decode(self, headers: Headers, value: bytes) -> Event:
        """Read one record. Raises Malformed, whatever the bytes are."""
        try:
            if headers and _is_binary(headers):
                return self._binary(headers, value)
            try:
                if not value.isascii():
                    value.decode()  # typed decoding does not look into what it skips
                return self._typed_event.decode(value)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return self._structured(value)
        except (Malformed, MemoryError):
            raise
        except Exception as error:
            raise Malformed("undecodable", f"{type(error).__name__}: {error}") from error

    def _structured(self, value: bytes) -> Event:
        """The general path: what the typed one does, for any JSON object, or the reason against it."""
        try:
            value.decode()
            members = _OBJECT.decode(value)
        except msgspec.ValidationError:
            raise Malformed("not_cloudevents", "the value is JSON, but not an object") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Malformed("not_json", str(error)) from error
        attributes: dict[str, Any] = {}
        for name in self._fields:
            if (text := members.get(name)) is not None:
                try:
                    scalar = _STRING.decode(text) if name in _CONTEXT else _SCALAR.decode(text)
                except msgspec.ValidationError as error:
                    raise Malformed("invalid_attribute", f"{name}: {error}") from error
                if scalar is not None:
                    attributes[name] = _as_text(scalar)
        if "specversion" not in attributes:
            raise Malformed("not_cloudevents", "the value is a JSON object without specversion")
        data = members.get("data")
        if _is_null(members.get("data_base64")):
            return self._made_of(attributes, self._no_data if data is None else self._data_of(data))
        if not _is_null(data):
            raise Malformed("ambiguous_data", "the event has data and data_base64")
        try:
            binary = base64.b64decode(msgspec.json.decode(members["data_base64"], type=str))
        except (msgspec.ValidationError, ValueError) as error:
            raise Malformed("binary_data", f"data_base64: {error}") from error
        return self._made_of(attributes, self._data_in(binary, attributes.get("datacontenttype")))

    def _binary(self, headers: Sequence[tuple[str, bytes | None]], value: bytes) -> Event:
        """Binary mode: the attributes are headers, the value is the data."""
        attributes: dict[str, Any] = {}
        for header, text in headers:
            name = _carried_by[header]
            if not name:
                continue
            if name == _CONTENT_TYPE:
                name = "datacontenttype"
            elif not _attribute_names[name]:
                raise Malformed("invalid_attribute", f"{name!r} cannot be the name of an attribute")
            if text is None:
                raise Malformed("invalid_attribute", f"{name}: the header has no value")
            try:
                said = text.decode()
            except UnicodeDecodeError as error:
                raise Malformed("invalid_attribute", f"{name}: {error}") from error
            # Some libraries write content-type and ce_datacontenttype, which are one attribute.
            if attributes.setdefault(name, said) != said:
                raise Malformed("duplicate_attribute", f"{name} is in two headers, which differ")
        return self._made_of(attributes, self._data_in(value, attributes.get("datacontenttype")))

    def _data_in(self, content: bytes, content_type: str | None) -> Any:
        """Data that came as bytes. What is declared to be JSON must be; what is not declared may be."""
        if not content or not (content_type is None or _json_by[content_type]):
            return self._no_data
        try:
            content.decode()
            try:
                return self._typed_data.decode(content)
            except msgspec.ValidationError:
                return self._data_of(_RAW.decode(content))  # typed decoding stopped there: the rest may not be JSON
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if content_type is None:
                return self._no_data
            raise Malformed("not_json", f"data declared as {content_type}: {error}") from error

    def _data_of(self, text: msgspec.Raw) -> Any:
        return text if self._shape is None else self._shape.read(text)

    def _made_of(self, attributes: dict[str, Any], data: Any) -> Event:
        if data is not UNSET:
            attributes["data"] = data
        try:
            return msgspec.convert(attributes, self._event)
        except msgspec.ValidationError as error:
            raise _fault(attributes) from error
