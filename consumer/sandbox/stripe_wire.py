"""The wire format of Stripe's API v1 as the stand-in speaks it: forms in, JSON and error objects out."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import orjson

API_VERSION = "2026-10-28.endive"


class Answer(msgspec.Struct, frozen=True, gc=False):
    """A status, a JSON body and the headers that belong to this answer alone."""

    status: int
    body: bytes
    headers: dict[str, str] = {}


class Refused(Exception):
    """A request that is answered with an error object.

    `result` is the word it is counted under. `stored` tells that the endpoint had begun to execute, so that the answer
    is kept under the idempotency key: what follows from the account's state is, what follows from the request alone is
    not.
    """

    def __init__(
        self,
        result: str,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        stored: bool = False,
    ) -> None:
        super().__init__(message)
        self.result = result
        self.stored = stored
        error = {"message": message, "type": kind, "code": code, "param": param}
        body = orjson.dumps({"error": {name: value for name, value in error.items() if value is not None}})
        self.answer = Answer(status, body, dict(headers or {}))


class Call(msgspec.Struct, gc=False):
    """One request, taken apart as far as that goes without knowing the endpoint."""

    method: str
    path: str
    pairs: list[tuple[str, str]]
    params: dict[str, Any]
    authorization: str = ""
    idempotency_key: str = ""

    @property
    def identifier(self) -> str:
        """The identifier of a meter event, or nothing."""
        found = self.params.get("identifier", "")
        return found if isinstance(found, str) else ""


def read_call(method: str, path: str, form: str, authorization: str = "", idempotency_key: str = "") -> Call:
    """Take a form or a query string apart: `payload[value]=1` becomes `{"payload": {"value": "1"}}`."""
    pairs = parse_qsl(form, keep_blank_values=True)
    params: dict[str, Any] = {}
    for name, value in pairs:
        if "[" not in name:
            params[name] = value
            continue
        head, _, rest = name.partition("[")
        place = params
        keys = [head, *rest.removesuffix("]").split("][")]
        for key in keys[:-1]:
            inner = place.get(key)
            if not isinstance(inner, dict):
                inner = place[key] = {}
            place = inner
        place[sys.intern(keys[-1])] = value  # kept for every event, and there are few
    if idempotency_key == params.get("identifier"):
        idempotency_key = params["identifier"]  # one string to keep
    return Call(method, path, pairs, params, authorization, idempotency_key)


def secret_of(authorization: str) -> str:
    """The secret key in an Authorization header, Bearer or Basic (as user name); empty if there is none."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).decode().partition(":")[0]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


class Field(msgspec.Struct, frozen=True):
    """What a parameter must look like.

    `fields` makes it an object, `free` an object with any string members, `each` a list.
    """

    required: bool = False
    integer: bool = False
    free: bool = False
    at_most: int = 5000
    choices: tuple[str, ...] = ()
    fields: Mapping[str, Field] | None = None
    each: Field | None = None
    lowest: int | None = None
    highest: int | None = None


def check(params: Mapping[str, Any], schema: Mapping[str, Field], within: str = "") -> dict[str, Any]:
    """Return the parameters with integers converted, or raise `Refused` as Stripe's parameter validation would."""
    checked: dict[str, Any] = {}
    for name, value in params.items():
        field = schema.get(name)
        shown = f"{within}[{name}]" if within else name
        if field is None:
            if name == "expand" and not within:
                continue
            raise _invalid(f"Received unknown parameter: {shown}", shown, "parameter_unknown")
        checked[name] = _value(field, shown, value)
    for name, field in schema.items():
        if field.required and name not in params:
            shown = f"{within}[{name}]" if within else name
            raise _invalid(f"Missing required param: {shown}.", shown, "parameter_missing")
    return checked


def _value(field: Field, shown: str, value: Any) -> Any:
    if field.each is not None:
        if not isinstance(value, dict):
            raise _invalid("Invalid array", shown)
        return [_value(field.each, f"{shown}[{place}]", member) for place, member in value.items()]
    if field.free or field.fields is not None:
        if not isinstance(value, dict):
            raise _invalid("Invalid object", shown)
        if field.fields is not None:
            return check(value, field.fields, shown)
        for key, member in value.items():
            if not isinstance(member, str):
                raise _invalid(f"Invalid string: {member}", f"{shown}[{key}]")
        return value
    if not isinstance(value, str):
        raise _invalid(f"Invalid string: {value}", shown)
    if not value:
        message = (
            f"You passed an empty string for '{shown}'. We assume empty values are an attempt to unset a parameter; "
            f"however '{shown}' cannot be unset. You should remove '{shown}' from your request or supply a non-empty "
            "value."
        )
        raise _invalid(message, shown, "parameter_invalid_empty")
    if field.integer:
        return _integer(field, shown, value)
    if len(value) > field.at_most:
        raise _invalid(f"Invalid string: {value[:4]}...{value[-4:]}; must be at most {field.at_most} characters", shown)
    if field.choices and value not in field.choices:
        raise _invalid(f"Invalid {shown}: must be one of {', '.join(field.choices)}", shown)
    return value


def _integer(field: Field, shown: str, value: str) -> int:
    if not (value.removeprefix("-").isdecimal() and value.isascii() and len(value) < 20):
        raise _invalid(f"Invalid integer: {value}", shown, "parameter_invalid_integer")
    number = int(value)
    if field.lowest is not None and number < field.lowest:
        message = f"This value must be greater than or equal to {field.lowest} (it currently is '{number}')."
        raise _invalid(message, shown, "parameter_invalid_integer")
    if field.highest is not None and number > field.highest:
        message = f"This value must be less than or equal to {field.highest} (it currently is '{number}')."
        raise _invalid(message, shown, "parameter_invalid_integer")
    return number


def _invalid(message: str, param: str, code: str | None = None) -> Refused:
    return Refused("invalid", message, param=param, code=code)
