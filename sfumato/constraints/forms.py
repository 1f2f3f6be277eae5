"""What a text can be held to: a JSON Schema, a regular expression, a Lark grammar, choices, checked before any work.

Requests come from outside and are hostile until checked: sizes and nesting are bounded, and a schema keyword that
llguidance would ignore, fetch or get wrong is refused by its name and path.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from sfumato.errors import InputError
from sfumato.options import CONSTRAINTS

MAX_CHARACTERS = 1_000_000
"""Of a schema as JSON, of a Lark grammar, and of all choices together."""
MAX_DEPTH = 64
"""Nesting of a schema, its values included."""
MAX_REGEX = 100_000
MAX_NAMES = 10_000
"""Rules and terminals of a Lark grammar."""
MAX_CHAIN = 500
"""Rules of a Lark grammar that are needed one for the other: the library follows them on its stack."""
MAX_CHOICES = 10_000
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


Source = tuple[str, str]
"""A grammar as llguidance takes it, and text from which hints are taken: patterns, without what surrounds them."""


def source_of(kind: str, value: Any) -> Source:
    """The grammar that llguidance is given. InputError, one sentence, for whatever is wrong with the value."""
    if kind not in CONSTRAINTS:
        raise InputError(f"there is no constraint {kind!r}; the constraints are {', '.join(CONSTRAINTS)}")
    return _SOURCES[kind](value)


def llguidance() -> Any:
    """The package, or an InputError that says how to get it."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise InputError("constraints need the package llguidance; pip install 'sfumato[constrain]'") from None


def _text(kind: str, value: Any, limit: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"the {kind} is of type {type(value).__name__}; give text")
    if len(value) > limit:
        raise InputError(f"the {kind} has {len(value)} characters, more than the {limit} allowed; shorten it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {kind} has a lone surrogate at character {error.start}; remove it") from None
    return value


def _regex(value: Any) -> Source:
    text = _text("regex", value, MAX_REGEX)
    return str(llguidance().LLMatcher.grammar_from_regex(text)), text[:1000]


def _lark(value: Any) -> Source:
    text = _text("grammar", value, MAX_CHARACTERS)
    uses = _uses(text)
    if len(uses) > MAX_NAMES:
        raise InputError(f"the grammar has {len(uses)} rules, more than the {MAX_NAMES} allowed; give fewer")
    if (chain := _longest_chain(uses)) > MAX_CHAIN:
        raise InputError(
            f"the grammar has a chain of {chain} rules that need one another, more than the {MAX_CHAIN} allowed; "
            "flatten it"
        )
    return json.dumps({"grammars": [{"lark_grammar": text}]}), text[:1000]


_LARK = re.compile(
    r""""(?:[^"\\\n]|\\.)*"|//[^\n]*|/(?![/*])(?:[^/\\\n]|\\.)+/|(?P<name>[A-Za-z_]\w*)(?P<colon>(?:\.-?\d+|\[[^\]\n]*\])*\s*:)?"""
)


def _uses(lark: str) -> dict[str, set[str]]:
    """Rule or terminal -> those that stand in its body."""
    uses: dict[str, set[str]] = {}
    body: set[str] = set()
    for match in _LARK.finditer(lark):
        if match["colon"]:
            body = uses.setdefault(match["name"], set())
        elif match["name"]:
            body.add(match["name"])
    return uses


def _longest_chain(uses: dict[str, set[str]]) -> int:
    """How deep rules are followed one from the other, by whoever goes in depth first."""
    depth: dict[str, int] = {}
    deepest = 0
    for first in uses:
        way = [] if first in depth else [(first, iter(uses[first]))]
        depth.setdefault(first, 1)
        while way:
            name, rest = way[-1]
            following = next((other for other in rest if other in uses and other not in depth), None)
            if following is not None:
                depth[following] = 1
                way.append((following, iter(uses[following])))
                deepest = max(deepest, len(way))
                continue
            way.pop()
            depth[name] = 1 + max((depth[other] for other in uses[name] if other in uses), default=0)
    return max(deepest, *depth.values(), 0)


def _choices(value: Any) -> Source:
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"choices are a list of at least one text; this is {repr(value)[:80]}")
    if len(value) > MAX_CHOICES:
        raise InputError(f"there are {len(value)} choices, more than the {MAX_CHOICES} allowed; give fewer")
    left = MAX_CHARACTERS
    seen: dict[str, int] = {}
    for number, choice in enumerate(value, 1):
        left -= len(_text(f"choice {number}", choice, left))
        if not choice:
            raise InputError(f"choice {number} is empty; give each at least one character")
        if choice in seen:
            raise InputError(f"choice {number}, {choice[:80]!r}, is choice {seen[choice]} again; give each once")
        seen[choice] = number
    words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
    return json.dumps({"grammars": [{"lark_grammar": f"start: CHOICE\nCHOICE: {words}"}]}), ""


def _schema(value: Any) -> Source:
    if isinstance(value, str):
        try:
            value = json.loads(_text("schema", value, MAX_CHARACTERS), parse_constant=_no_json)
        except RecursionError:
            raise InputError(f"the schema is nested deeper than the {MAX_DEPTH} levels allowed; flatten it") from None
        except ValueError as error:
            raise InputError(f"the schema is no JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise InputError(f"a schema is a JSON object, or true; this is {repr(value)[:80]}")
    try:
        _text("schema", json.dumps(value, ensure_ascii=False, allow_nan=False), MAX_CHARACTERS)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the schema is no JSON: {error}") from None
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"the schema is nested deeper than the {MAX_DEPTH} levels allowed; flatten it")
        level = [inner for x in level for inner in (x.values() if isinstance(x, dict) else x)]
    if value is False:
        raise InputError("the schema is false, which allows no text; give one that allows some")
    patterns: list[str] = []
    schema = _checked(value, "", patterns) if isinstance(value, dict) else {}
    schema["x-guidance"] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    return json.dumps({"grammars": [{"json_schema": schema}]}), " ".join(patterns)[:1000]


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _step(name: Any) -> str:
    """One step of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


def _checked(schema: Any, pointer: str, patterns: list[str]) -> Any:
    """The schema and all within, its `$schema` and `$id` left out where they would be looked up; InputError for what
    llguidance would ignore or fetch. `pointer` is where it stands, as a JSON pointer; `patterns`
    takes up the patterns met."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise InputError(f"a schema is an object, true or false; at {pointer} stands {repr(schema)[:80]}")
    for word, others in _NEAR.items():
        bound: Any = schema.get(word)
        for other in (schema.get(name) for name in others):
            if {type(bound), type(other)} <= {int, float} and bound == int(bound) and abs(other - bound) < 1:
                raise InputError(
                    f"{word} {bound} at {pointer}/{word} would not be kept: a whole number itself is allowed where the "
                    "other bound is less than 1 away (a fault of llguidance); give a minimum or maximum"
                )
    kept: dict[str, Any] = {}
    for word, value in schema.items():
        here = f"{pointer}/{_step(word)}"
        if word not in _KEYWORDS:
            raise InputError(f"the schema keyword {str(word)[:80]!r} at {here[:300]} is not supported; leave it out")
        if word in _SCHEMA_LISTS or (word == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise InputError(f"{word} at {here} is a list of schemas, not {repr(value)[:80]}")
            value = [_checked(inner, f"{here}/{number}", patterns) for number, inner in enumerate(value)]
        elif word in _SCHEMA_MAPS:
            if not isinstance(value, dict):
                raise InputError(f"{word} at {here} is an object of schemas, not {repr(value)[:80]}")
            value = {name: _checked(inner, f"{here}/{_step(name)}", patterns) for name, inner in value.items()}
        elif word in _SCHEMAS:
            value = _checked(value, here, patterns)
        elif word == "format" and value not in FORMATS:
            raise InputError(f"the format {value!r} at {here} is not supported; choose from {', '.join(FORMATS)}")
        elif word == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            raise InputError(
                f"the $ref {repr(value)[:80]} at {here} is not within the schema; copy what it names into $defs"
            )
        elif word in ("$schema", "$id", "id") and not str(value).startswith(_DRAFTS):
            continue
        if word in ("pattern", "format"):
            patterns.append(_FORMAT_MARKS if word == "format" else str(value))
        elif word == "patternProperties":
            patterns += value
        kept[word] = value
    return kept


_NEAR = {
    "exclusiveMinimum": ("maximum", "exclusiveMaximum"),
    "exclusiveMaximum": ("minimum", "exclusiveMinimum"),
}
_FORMAT_MARKS = "@ . : - / T Z P D"
_DRAFTS = ("http://json-schema.org/draft-0", "https://json-schema.org/draft/20")
_SOURCES: dict[str, Callable[[Any], Source]] = {
    "schema": _schema,
    "regex": _regex,
    "grammar": _lark,
    "choices": _choices,
}
