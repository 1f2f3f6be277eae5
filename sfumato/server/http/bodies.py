"""From bytes to a checked request: what bodies are made of, how they are read, and how the first fault is reported.

A body is hostile until it is checked: its values are counted before it is parsed, and its lists and objects before any
of their items is read. Of several faults only the first is reported.

One policy for names that a body has no field for: what asks for nothing of the text is left out, and a header of the
answer says so (`Body.unread`, `Body.is_open`); everything else is refused by its name. A strict server refuses both.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sfumato.options import BIG
from sfumato.server.http.errors import BodyPlace, Refusal, place_name, short
from sfumato.server.settings import Limits


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    """A pydantic schema and all within it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for name, inner in schema.items():
            if name != "metadata":
                yield from schemas_in(inner)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            yield from schemas_in(inner)


@dataclass
class BodyReading:
    """How one body is read, and what was left out of it."""

    limits: Limits
    is_strict: bool = False
    """Whether a field without effect is refused rather than left out."""
    ignored: list[str] = field(default_factory=list)
    """The names of fields that were left out, each once: for a header, so that they are short and plain."""

    def leave_out(self, name: str) -> None:
        """Keep the name of a field that has no effect."""
        name = name if _PLAIN.fullmatch(name) else "?"
        if name not in self.ignored and len(self.ignored) < MOST_IGNORED:
            self.ignored.append(name)


_PLAIN = re.compile(r"[A-Za-z0-9_.\[\]:-]{1,80}")
MOST_IGNORED = 32
"""Names of fields that a header may hold."""


def reading_of(info: ValidationInfo) -> BodyReading:
    """How the body is read that a validator looks at; one that Python builds has no limits of its own."""
    return info.context if isinstance(info.context, BodyReading) else BodyReading(Limits())


class Body(BaseModel):
    """A request, or an object in one.

    Only its first fault is reported: pydantic would look for all, and a million of them take gigabytes."""

    model_config = ConfigDict(extra="forbid", strict=True)
    place: ClassVar[str] = ""
    """What stands before a field's name where it is said to be left out."""
    unread: ClassVar[Mapping[str, str]] = {}
    """Fields that clients send and that ask for nothing of the text, each with the reason: they are left out."""
    is_open: ClassVar[bool] = False
    """Whether every name that it has no field for is left out."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        for inner in schemas_in(handler.resolve_ref_schema(schema)):
            if inner["type"] in ("list", "tuple", "set", "frozenset"):
                inner["fail_fast"] = True
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_unread(cls, value: Any, info: ValidationInfo) -> Any:
        """The fields that are known; of names to be refused only the first is left."""
        known = cls.names()
        if not isinstance(value, dict) or value.keys() <= known:
            return value
        reading = reading_of(info)
        kept = {name: one for name, one in value.items() if name in known}
        for name, one in value.items():
            if name in known:
                continue
            is_unread = cls.is_open or name in cls.unread
            if not is_unread or (reading.is_strict and one is not None):
                return kept | {name: one}
            if one not in (None, [], {}):
                reading.leave_out(cls.place + name)
        return kept

    @classmethod
    def names(cls) -> set[str]:
        """The names of its fields, as a request has them."""
        return {info.alias or name for name, info in cls.model_fields.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        whole = handler.resolve_ref_schema(handler(schema))
        for name, reason in cls.unread.items():
            whole.setdefault("properties", {}).setdefault(name, {"description": f"Left out: {reason}."})
        if cls.is_open:
            whole["additionalProperties"] = True
        return whole

    @field_validator("*")
    @classmethod
    def _is_allowed(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        allowed = extra["enum"] if isinstance(extra, dict) else None
        if isinstance(allowed, list) and not any(_is_same(value, one) for one in allowed):
            raise ValueError(f"this is not supported; leave it out, or give {' or '.join(map(json.dumps, allowed))}")
        return value

    def plain(self) -> dict[str, Any]:
        """As the JSON that it came from, nulls left out."""
        return self.model_dump(by_alias=True, exclude_none=True)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal in JSON, where 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


T = TypeVar("T", bound=Body)


def only(*values: Any) -> Any:
    """A field that a client may send though it has no effect: null or one of these values."""
    return Field(None, json_schema_extra={"enum": [None, *values]})


@dataclass(frozen=True)
class Most:
    """A bound on the items of a list or an object: the limit of this name in `Limits`, checked before any is read."""

    limit: str
    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self.check, handler(source))

    def check(self, value: Any, info: Any) -> Any:
        """The value, if it has no more items than allowed."""
        most = getattr(reading_of(info).limits, self.limit)
        if isinstance(value, (list, dict)) and len(value) > most:
            raise PydanticCustomError(TOO_MANY, f"{len(value)} {self.what}, more than the {most} allowed")
        return value


TOO_MANY = "too_many"
Count = Annotated[int, Field(ge=1, le=BIG)]
Choices = Annotated[list[str], Most("max_choices", "choices")]


def read(data: bytes, kind: type[T], reading: BodyReading) -> T:
    """The request in a body; a Refusal says what is wrong with it, and where."""
    _count_values(data, reading.limits.max_values)
    value = parse(data, reading.limits.max_depth)
    try:
        return kind.model_validate(value, context=reading)
    except ValidationError as error:
        raise _refusal(error, value, kind) from None


def parse(data: bytes, max_depth: int) -> Any:
    """The JSON in a body; a Refusal where it is none, or nests deeper."""
    try:
        with _without_collector():
            value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise _too_deep(max_depth) from None
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if data.count(b"[") + data.count(b"{") > max_depth and _depth(value, max_depth) > max_depth:
        raise _too_deep(max_depth)
    if any(match.lastindex for match in _ESCAPE.finditer(data)):
        raise Refusal(400, "the body has a lone surrogate, which is no character; remove it", code="invalid_json")
    return value


def _count_values(data: bytes, most: int) -> None:
    """Refusal for a body of more values, before it is parsed: parsing them would hold up every other request."""
    count = _separators(data)
    if count > most and (count := _separators(_STRING.sub(b"", data))) > most:
        text = f"the body has about {count} values, more than the {most} allowed; send fewer"
        raise Refusal(400, text, code="invalid_json")


def _separators(data: bytes) -> int:
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)
"""Of JSON; one that is not closed goes to the end."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """JSON holds no circles, and looking for them takes seven times as long as to read it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F])|.)", re.DOTALL)
"""A backslash of JSON and what belongs to it; its group matches where that is half a surrogate pair."""


def _depth(value: Any, most: int) -> int:
    """Levels of lists and objects in a value, counted up to one more than `most`."""
    level, depth = [value] if isinstance(value, (list, dict)) else [], 0
    while level and depth <= most:
        depth += 1
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (list, dict))
        ]
    return depth


def _too_deep(limit: int) -> Refusal:
    return Refusal(400, f"the body nests deeper than the {limit} levels allowed; flatten it", code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    if abs(number := float(text)) == float("inf"):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refusal(error: ValidationError, value: Any, kind: type[Body]) -> Refusal:
    """The fault at the deepest place.

    A value that may be text or a list fails as both, and the list's reason says more."""
    by_place: dict[BodyPlace, list[Any]] = {}
    for fault in error.errors(include_url=False):
        by_place.setdefault(_place(fault["loc"], value, fault["type"] == "missing"), []).append(fault)
    place = max(by_place, key=len)
    faults = [fault for fault in by_place[place] if fault["type"] == TOO_MANY] or by_place[place]
    first, name = faults[0], place_name(place)
    shown = short(name, 200)
    if first["type"] == "extra_forbidden":
        message = _of_unknown(name, kind)
    elif first["type"] == "missing":
        message = f"{shown} is missing; give it"
    elif first["type"] == TOO_MANY:
        message = f"{shown} has {first['msg']}; send fewer"
    else:
        reasons = dict.fromkeys(fault["msg"].removeprefix("Value error, ") for fault in faults)
        message = f"{shown or 'the body'} is {beginning_of(first['input'])}: {' – or: '.join(reasons)}"
    code = _CODES.get(first["type"])
    if code is not None and isinstance(first["input"], float):
        code = code.replace("integer", "decimal")
    return Refusal(400, message, param=shown or None, code=code, place=place)


_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    TOO_MANY: "array_above_max_length",
    "too_short": "empty_array",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
}
"""OpenAI's codes of some faults."""


def _of_unknown(place: str, kind: type[Body]) -> str:
    """What is said of a field that is not known, or that a strict server refuses."""
    if reason := kind.unread.get(place):
        return f"{place} has no effect here ({reason}), and this server is strict; leave it out"
    text = f"there is no field {short(place, 200)!r} in this request"
    near = get_close_matches(place, kind.names(), 1, 0.75) if len(place) < 64 else []
    return f"{text}; is {near[0]!r} meant? Else leave it out" if near else f"{text}; leave it out"


def beginning_of(value: Any) -> str:
    """The beginning of a value; it may be as large as the body."""
    if isinstance(value, (list, dict)):
        return short("".join(islice(_JSON.iterencode(value), 100)), 80)
    return short(repr(value[:100] if isinstance(value, str) else value), 80)


_JSON = json.JSONEncoder(ensure_ascii=False)


def _place(loc: tuple[int | str, ...], value: Any, is_missing: bool) -> BodyPlace:
    """A place in the request, such as messages[0].role: pydantic's own, less the names of the types it tried."""
    place: list[int | str] = []
    for number, step in enumerate(loc):
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            place.append(step)
            value = value[step]
        elif isinstance(step, str) and isinstance(value, dict):
            if step in value:
                place.append(step)
                value = value[step]
            elif is_missing and number == len(loc) - 1:
                place.append(step)
    return tuple(place)
