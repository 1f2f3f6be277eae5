"""JSON schemas, checked and brought into llguidance's form.

A schema comes from outside and is hostile until checked: its size and nesting are bounded. A keyword that llguidance
would ignore, fetch or get wrong is refused by its name and its place, a JSON pointer. Errors are InputErrors of one
sentence.

Deliberately absent: JSON Schema as a whole. A keyword is either enforced, or an annotation without effect, or refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sfumato.constraints.forms import MAX_CHARACTERS, GrammarSource, checked_text
from sfumato.errors import InputError

MAX_DEPTH = 64
"""Nesting of a schema, its values included."""
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
"""Values of the schema keyword `format` that are enforced; others are refused."""

_ANNOTATIONS = {
    *("$anchor", "$comment", "$id", "$schema", "id", "title", "description", "default", "example", "examples"),
    *("readOnly", "writeOnly", "deprecated", "contentMediaType", "contentEncoding"),
}
_SCHEMA_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_SCHEMA_MAPS = {"properties", "patternProperties", "$defs", "definitions"}
_SCHEMAS = {"items", "additionalItems", "additionalProperties"}
_PLAIN = {
    *("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_KEYWORDS = _ANNOTATIONS | _SCHEMA_LISTS | _SCHEMA_MAPS | _SCHEMAS | _PLAIN

_OTHER_BOUNDS = {
    "exclusiveMinimum": ("maximum", "exclusiveMaximum"),
    "exclusiveMaximum": ("minimum", "exclusiveMinimum"),
}
_FORMAT_MARKS = "@ . : - / T Z P D"
"""What texts of a format are made of, as hints for the search."""
_DRAFTS = ("http://json-schema.org/draft-0", "https://json-schema.org/draft/20")


def source_of_schema(value: Any) -> GrammarSource:
    """The grammar of the JSON that a schema allows; `value` is a dict, a bool, or JSON text of one."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, (dict, bool)):
        raise InputError(f"a schema is a JSON object, or true; this is {repr(value)[:80]}")
    try:
        checked_text("schema", json.dumps(value, ensure_ascii=False, allow_nan=False), MAX_CHARACTERS)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the schema is no JSON: {error}") from None
    _check_depth(value)
    if value is False:
        raise InputError("the schema is false, which allows no text; give one that allows some")
    patterns: list[str] = []
    schema = _checked(value, "", patterns) if isinstance(value, dict) else {}
    schema["x-guidance"] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return json.dumps({"grammars": [{"json_schema": schema}]}), " ".join(patterns)[:1000]


def _parsed(text: str) -> Any:
    try:
        return json.loads(checked_text("schema", text, MAX_CHARACTERS), parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f"the schema is nested deeper than the {MAX_DEPTH} levels allowed; flatten it") from None
    except ValueError as error:
        raise InputError(f"the schema is no JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _check_depth(value: Any) -> None:
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"the schema is nested deeper than the {MAX_DEPTH} levels allowed; flatten it")
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]


def _checked(schema: Any, pointer: str, patterns: list[str]) -> Any:
    """The schema, and all schemas within, for llguidance; InputError for what it would ignore, fetch or get wrong.

    `$schema` and `$id` are left out where the library would look them up. `pointer` is the place of the schema, a JSON
    pointer. The texts of patterns are appended to `patterns`.
    """
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise InputError(f"a schema is an object, true or false; at {pointer} stands {repr(schema)[:80]}")
    _check_bounds(schema, pointer)
    kept: dict[str, Any] = {}
    for word, value in schema.items():
        here = f"{pointer}/{_escaped(word)}"
        if word not in _KEYWORDS:
            raise InputError(f"the schema keyword {str(word)[:80]!r} at {here[:300]} is not supported; leave it out")
        if word in ("$schema", "$id", "id") and not str(value).startswith(_DRAFTS):
            continue
        kept[word] = _checked_value(word, value, here, patterns)
        if word in ("pattern", "format"):
            patterns.append(_FORMAT_MARKS if word == "format" else str(value))
        elif word == "patternProperties":
            patterns += value
    return kept


def _checked_value(word: str, value: Any, here: str, patterns: list[str]) -> Any:
    """The value of one keyword, the schemas in it checked; `here` is the keyword's place."""
    if word in _SCHEMA_LISTS or (word == "items" and isinstance(value, list)):
        if not isinstance(value, list):
            raise InputError(f"{word} at {here} is a list of schemas, not {repr(value)[:80]}")
        return [_checked(inner, f"{here}/{number}", patterns) for number, inner in enumerate(value)]
    if word in _SCHEMA_MAPS:
        if not isinstance(value, dict):
            raise InputError(f"{word} at {here} is an object of schemas, not {repr(value)[:80]}")
        return {name: _checked(inner, f"{here}/{_escaped(name)}", patterns) for name, inner in value.items()}
    if word in _SCHEMAS:
        return _checked(value, here, patterns)
    if word == "format" and value not in FORMATS:
        raise InputError(f"the format {value!r} at {here} is not supported; choose from {', '.join(FORMATS)}")
    if word == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        raise InputError(
            f"the $ref {repr(value)[:80]} at {here} is not within the schema; copy what it names into $defs"
        )
    return value


def _check_bounds(schema: dict[str, Any], pointer: str) -> None:
    """InputError for an exclusive bound that llguidance would not keep."""
    for word, others in _OTHER_BOUNDS.items():
        bound: Any = schema.get(word)
        for other in (schema.get(name) for name in others):
            if {type(bound), type(other)} <= {int, float} and bound == int(bound) and abs(other - bound) < 1:
                raise InputError(
                    f"{word} {bound} at {pointer}/{word} would not be kept: a whole number itself is allowed where the "
                    "other bound is less than 1 away (a fault of llguidance); give a minimum or maximum"
                )


def _escaped(name: Any) -> str:
    """One step of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")
