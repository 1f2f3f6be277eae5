"""JSON schemas, checked and brought into llguidance's form.

A schema comes from outside and is hostile until checked: its size and nesting are bounded, and so is the work that it
may cause. Its keywords are enforced; those that JSON Schema calls annotations, or does not know, say nothing. What
cannot be kept is refused by its name and its place, a JSON pointer. Errors are InputErrors of one sentence.

Deliberately absent: documents elsewhere, to which a `$ref` may lead.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from sfumato.constraints.checks import SchemaCheck
from sfumato.constraints.forms import MAX_CHARACTERS, GrammarSource, check_rules, checked_text
from sfumato.constraints.values.document import Document
from sfumato.constraints.values.notation import JsonNotation
from sfumato.constraints.values.rules import RuleWriter
from sfumato.constraints.values.writer import ValueWriter
from sfumato.errors import InputError

MAX_DEPTH = 64
"""Nesting of a schema, its values included."""


def source_of_schema(value: Any) -> GrammarSource:
    """The grammar of the JSON that a schema allows; `value` is a dict, a bool, or JSON text of one."""
    schema = checked_schema(value)
    if not isinstance(schema, (dict, bool)):
        raise InputError(f"a schema is a JSON object, or true; this is {repr(schema)[:80]}")
    if schema is False:
        raise InputError("the schema is false, which allows no text; give one that allows some")
    rules = RuleWriter()
    writer = ValueWriter(rules, JsonNotation())
    places = (Document(schema, "the schema").root,)
    start = writer.rule(places)
    lark = "\n".join([f"start: {start}", *rules.lines(), ""])
    check_rules(lark, "schema")
    source = json.dumps({"grammars": [{"lark_grammar": lark}]})
    check = SchemaCheck(schema) if writer.is_inexact else None
    return GrammarSource(source, rules.hints(), check, writer.example(places))


def checked_schema(value: Any, what: str = "the schema") -> Any:
    """A schema as JSON, its size and nesting bounded; `what` is what errors call it."""
    if isinstance(value, str):
        value = _parsed(value, what)
    try:
        text = checked_text("schema", json.dumps(value, ensure_ascii=False, allow_nan=False), MAX_CHARACTERS)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} is no JSON: {error}") from None
    _check_depth(value, what)
    return _parsed(text, what)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(checked_text("schema", text, MAX_CHARACTERS), parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f"{what} is nested deeper than the {MAX_DEPTH} levels allowed; flatten it") from None
    except ValueError as error:
        raise InputError(f"{what} is no JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _check_depth(value: Any, what: str) -> None:
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"{what} is nested deeper than the {MAX_DEPTH} levels allowed; flatten it")
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
