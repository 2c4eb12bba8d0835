"""What the keys of the configuration hold, and what is said where they hold something else.

Durations, times, paths and names are written as people write them, and are checked where they stand. Messages never
show what stands under a key that may hold a secret.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PlainValidator,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from consumer import credentials, events
from consumer.aggregate import meters
from consumer.config_file import Place
from consumer.totals import SCALE_DIGITS

_UNITS: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}


class Duration(int):
    """Milliseconds, written and shown as `500ms`, `5s`, `2m`, `24h` or `90d`."""

    pattern: Final = r"^[0-9]{1,9}(ms|s|m|h|d)$"

    @classmethod
    def of(cls, text: object) -> Self:
        """The duration that is written so; raises ValueError."""
        if not isinstance(text, str) or re.fullmatch(cls.pattern, text, re.ASCII) is None:
            raise ValueError(
                f"{shown(text)} is not a duration: a whole number and its unit (ms, s, m, h or d), like 90s or 24h"
            )
        number = text.rstrip("dhms")
        return cls(int(number) * _UNITS[text[len(number) :]])

    def __str__(self) -> str:
        """As people write it: days from four days on, else the largest unit without a fraction."""
        units = _UNITS if self >= 4 * _UNITS["d"] else {unit: size for unit, size in _UNITS.items() if unit != "d"}
        unit, size = next((unit, size) for unit, size in units.items() if self % size == 0 and (self or unit == "s"))
        return f"{int(self) // size}{unit}"

    __repr__ = __str__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls.of)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": cls.pattern, "examples": ["500ms", "5s", "2m", "24h", "90d"]}


def between(least: str, most: str) -> AfterValidator:
    """Refuses durations that are shorter or longer than these."""
    low, high = Duration.of(least), Duration.of(most)

    def check(value: Duration) -> Duration:
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range: {low} to {high} is allowed")
        return value

    return AfterValidator(check)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_INSTANT: Final = r"^\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d(:\d\d(\.\d{3}|\.\d{6})?)?([Zz]|[+-]\d\d:\d\d)?)?$"


def _instant(value: object) -> int:
    text = value.isoformat() if isinstance(value, date) else value
    if not isinstance(text, str) or re.fullmatch(_INSTANT, text, re.ASCII) is None:
        raise ValueError(f"{shown(value)} is not a time: write it like 2026-11-01T00:00:00Z")
    try:
        time = datetime.fromisoformat(text.upper())
    except ValueError as error:
        raise ValueError(f"{shown(value)} is not a time: {error}") from None
    if time.tzinfo is None:
        raise ValueError(f"{shown(value)} has no offset from UTC: write Z for UTC itself, or an offset like +02:00")
    return (time - _EPOCH) // timedelta(milliseconds=1)


def _path(text: str) -> str:
    events.parse_path(text)
    return text


def _customer(text: str) -> str:
    if text.startswith("$"):
        return _path(text)
    if re.fullmatch("[a-z0-9]+", text) is None:
        raise ValueError(
            f"{shown(text)} names no customer: write subject, a path into the data such as $.customer, or the name of"
            " an extension attribute (lower-case letters and digits)"
        )
    if text in _CONTEXT_ATTRIBUTES:
        raise ValueError(
            f"{text} is an attribute of every event, not its customer: write subject, a path or an extension"
        )
    return text


_CONTEXT_ATTRIBUTES: Final = {"id", "source", "specversion", "type", "time", "datacontenttype", "dataschema", "data"}


def _scalar(value: object) -> meters.Scalar:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | Decimal):
        number = Decimal(value)
        if abs(number) >= 10**15 or number != round(number, SCALE_DIGITS):
            raise ValueError(
                f"{number} matches no event: numbers are below 10^15, with at most {SCALE_DIGITS} decimals"
            )
        return int(number) if number == int(number) else number.normalize()
    raise ValueError(f"must be text, a number, true or false, not {shown(value)}")


def _option(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | Decimal):
        return str(value)
    raise ValueError("must be text, a number, true or false")


def in_order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each of them once, in an order that does not depend on how they were written."""
    # By type first: 1, true and "1" are three values, and 1 == True in Python.
    distinct = {(type(value).__name__, value): value for value in values}
    return tuple(distinct[key] for key in sorted(distinct))


def _file(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("must be the name of a file")
    return Path(value)


_NAME: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_TOPIC: Final = r"^[A-Za-z0-9._-]{1,249}$"
_SERVERS: Final = r"^[^\s,@/]+:[0-9]+(,[^\s,@/]+:[0-9]+)*$"
_BASE: Final = r"^https?://[^\s/@]+/?$"
_PAYLOAD_KEY: Final = r"^[^\s\[\]]{1,100}$"
_REGION: Final = r"^[a-z]+(-[a-z]+)+-[0-9]+$"

_PATTERNS: Final = {
    _NAME: "lower-case letters, digits, '-', '_' and '.', beginning with a letter or digit, at most 64 characters",
    _TOPIC: "letters, digits, '.', '_' and '-', at most 249 characters",
    _SERVERS: "host:port, several separated by commas, without user name or password",
    _BASE: "https://host or https://host:port, without path, user name or password",
    _PAYLOAD_KEY: "1 to 100 characters, no spaces or brackets",
    _REGION: "a region of AWS's, such as eu-central-1",
}

Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(pattern=_NAME)]
PayloadKey = Annotated[str, StringConstraints(pattern=_PAYLOAD_KEY)]
Topic = Annotated[str, StringConstraints(pattern=_TOPIC)]
Servers = Annotated[str, StringConstraints(pattern=_SERVERS)]
AwsRegion = Annotated[str, StringConstraints(pattern=_REGION)]
BaseAddress = Annotated[str, StringConstraints(pattern=_BASE)]
Customer = Annotated[str, AfterValidator(_customer)]
PathText = Annotated[str, AfterValidator(_path), WithJsonSchema({"type": "string", "pattern": r"^\$"})]
File = Annotated[Path, PlainValidator(_file), WithJsonSchema({"type": "string", "minLength": 1})]
Instant = Annotated[int, PlainValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
_SCALAR_SCHEMA: Final = WithJsonSchema({"type": ["string", "number", "boolean"]})
Scalar = Annotated[meters.Scalar, PlainValidator(_scalar), _SCALAR_SCHEMA]
Option = Annotated[str, PlainValidator(_option), _SCALAR_SCHEMA]


class Section(BaseModel):
    """Part of the file: its keys and no others, no conversions, and errors in words."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise invalid(in_words(error, cls._message)) from None

    @classmethod
    def _message(cls, error: ErrorDetails) -> str:
        key = error["loc"][-1] if error["loc"] else None
        match error["type"]:
            case "extra_forbidden" if credentials.is_secret(str(key)):
                return f"unknown key; {credentials.CURE}"
            case "extra_forbidden":
                return f"unknown key{_close(key, cls.model_fields)}; allowed here: {', '.join(cls.model_fields)}"
            case "missing":
                return f"is required: {cls.model_fields[str(key)].description}"
        return message(error)


def invalid(wrong: Iterable[tuple[Place, str]]) -> ValidationError:
    """An error for each place, relative to what is being validated, with what is wrong there."""
    details = [
        InitErrorDetails(type=PydanticCustomError("in_words", "{words}", {"words": words}), loc=place, input=None)
        for place, words in wrong
    ]
    return ValidationError.from_exception_data("configuration", details)


_EXPECTED: Final = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
}


def message(error: ErrorDetails) -> str:
    """What pydantic found, in words that say what is allowed."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    words = error["msg"]
    match kind:
        case "value_error":
            words = str(context["error"])
        case "string_pattern_mismatch":
            words = f"must be {_PATTERNS[context['pattern']]}"
            # An address may hold a password.
            words += "" if context["pattern"] in (_SERVERS, _BASE) else f", not {shown(given)}"
        case "literal_error":
            words = _choice(given, re.findall(r"'([^']*)'", context["expected"]))
        case "union_tag_invalid":
            words = _choice(context["tag"], re.findall(r"'([^']*)'", context["expected_tags"]))
        case "union_tag_not_found":
            words = "is required: it says which keys belong here"
        case "greater_than_equal":
            words = f"must be at least {context['ge']}, not {shown(given)}"
        case "less_than_equal":
            words = f"must be at most {context['le']}, not {shown(given)}"
        case "string_too_long":
            words = f"must have at most {context['max_length']} characters"
        case "string_too_short" | "too_short":
            words = "must not be empty"
        case "string_type" if isinstance(given, bool | int | Decimal):
            words = f"must be text, not {shown(given)}: put it in quotes"
        case _ if kind in _EXPECTED:
            words = f"must be {_EXPECTED[kind]}, not {shown(given)}"
    return words


def in_words(error: ValidationError, say: Callable[[ErrorDetails], str] = message) -> Iterator[tuple[Place, str]]:
    """The places and messages of what pydantic found, without what only follows from another error."""
    for each in error.errors():
        kind = each["type"]
        if kind == "default_factory_not_called" or (kind == "too_short" and each["input"]):
            continue
        yield (*each["loc"], "kind") if kind.startswith("union_tag") else each["loc"], say(each)


def _choice(given: object, allowed: list[str]) -> str:
    return f"must be {' or '.join(allowed)}, not {shown(given)}{_close(given, allowed)}"


def _close(given: object, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given).lower(), allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: object) -> str:
    """A value of the file in a message: short, and as it is written there."""
    match value:
        case None:
            return "empty"
        case list() | tuple():
            return "a list"
        case dict():
            return "keys with values"
        case str() | bool():
            text = json.dumps(value, ensure_ascii=False)
            return text if len(text) <= 60 else f"{text[:60]}…"
        case _:
            return str(value)


class Schema(GenerateJsonSchema):
    """JSON Schema in which the default of a duration is written as one."""

    def encode_default(self, dft: object) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)
