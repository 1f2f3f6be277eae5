"""The rules of strings, and of values that a schema lists: `const` and `enum`."""

from __future__ import annotations

import json
import re
from typing import Any

from sfumato.constraints.expressions import written
from sfumato.constraints.numbers import GREATEST
from sfumato.constraints.patterns import FORMAT_PATTERNS, FORMATS, NotSupported, parse
from sfumato.constraints.rules import CONTROL_TOKEN, QUOTE, Place, RuleWriter, key_of, literal, short
from sfumato.constraints.shortest import shortest

MAX_LENGTH = 100_000
"""What minLength, minItems and maxItems may be."""
MAX_VALUES = 10_000
"""Values of one enum."""


def string_rule(rules: RuleWriter, schema: dict[str, Any], place: Place) -> str:
    """The rule of the strings that length, pattern and format of a schema allow."""
    low = count_of(schema, "minLength", place, MAX_LENGTH) or 0
    high = count_of(schema, "maxLength", place, 1 << 60)
    if high is not None and high < low:
        place.refuse(f"minLength {low} is above maxLength {high}")
    high = high if high is None or high < 10 * MAX_LENGTH else 10 * MAX_LENGTH
    parts = []
    if "pattern" in schema:
        parts.append(_pattern(rules, schema["pattern"], place.at("pattern")))
    if "format" in schema:
        form = schema["format"]
        if not isinstance(form, str) or form not in FORMAT_PATTERNS:
            place.at("format").refuse(f"the format {short(form)} is not supported; choose from {', '.join(FORMATS)}")
        parts.append(written(parse(FORMAT_PATTERNS[form], is_whole=True), "gemma"))
    if low or high is not None or not parts:
        length = "*" if not low and high is None else f"{{{low},{'' if high is None else high}}}"
        parts.append(f"/(?s:.{length})/")
    if high == 0:
        return rules.rule(f"{QUOTE} {QUOTE}")
    return rules.rule(f"{QUOTE} {rules.terminal(' & '.join(parts))} {QUOTE}")


def _pattern(rules: RuleWriter, pattern: Any, place: Place) -> str:
    if not isinstance(pattern, str):
        place.refuse(f"a pattern is text, not {short(pattern)}")
    rules.add_hints(re.findall(r"[^\W_]+|[^\w\s\\^$()\[\]{}|*+?]|_", pattern))
    try:
        expression = parse(pattern)
        text = shortest(expression)
    except NotSupported as error:
        place.refuse(f"the pattern {pattern[:80]!r} has {error}, which is not supported; write it without")
    if text is None:
        place.refuse(f"the pattern {pattern[:80]!r} allows no text")
    return written(expression, "gemma")


def count_of(schema: dict[str, Any], word: str, place: Place, most: int) -> int | None:
    """A keyword that counts, such as `minLength`; None where the schema does not have it."""
    value = schema.get(word)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        place.at(word).refuse(f"{word} is {short(value)}; give a whole number from 0 to {most}")
    return value


def constant_rules(rules: RuleWriter, values: list[Any], place: Place, types: frozenset[str]) -> list[str]:
    """The alternatives of the values of an enum that are of these types."""
    if len(values) > MAX_VALUES:
        place.refuse(f"an enum of {len(values)} values, more than the {MAX_VALUES} allowed")
    values = [value for value in values if not types.isdisjoint(_types_of(value))]
    texts = [value for value in values if isinstance(value, str) and value]
    options = [_constant(rules, value, place) for value in values if not (isinstance(value, str) and value)]
    for text in texts:
        _check_text(text, place)
    if texts:
        words = rules.terminal(" | ".join(dict.fromkeys(map(literal, texts))))
        options.append(rules.rule(f"{QUOTE} {words} {QUOTE}"))
    return options


def _constant(rules: RuleWriter, value: Any, place: Place) -> str:
    """The rule of one value, written out."""
    if isinstance(value, str):
        _check_text(value, place)
        return rules.rule(f"{QUOTE} {literal(value) if value else ''} {QUOTE}")
    if isinstance(value, dict):
        pairs = [(key_of(key, place), _constant(rules, inner, place)) for key, inner in value.items()]
        body = ' "," '.join(f"{key} {rule}" for key, rule in pairs)
        return rules.rule(f'"{{" {body} "}}"', 1 + rules.height(rule for _, rule in pairs))
    if isinstance(value, list):
        items = [_constant(rules, inner, place) for inner in value]
        body = ' "," '.join(items)
        return rules.rule(f'"[" {body} "]"', 1 + rules.height(items))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) > GREATEST or value != value or len(str(value)) > 300:
            place.refuse(f"the number {short(value)} cannot be written")
        return rules.rule(literal(str(value)))
    return rules.rule(literal(json.dumps(value)))


def _check_text(text: str, place: Place) -> None:
    if CONTROL_TOKEN.search(text):
        place.refuse(f"the text {text[:80]!r} spells a control token; change it")
    if re.search("[\ud800-\udfff]", text):
        place.refuse(f"the text {text[:80]!r} has a lone surrogate; remove it")


def _types_of(value: Any) -> set[str]:
    """The names that JSON Schema has for a value's type."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        is_whole = isinstance(value, int) or value.is_integer()
        return {"integer", "number"} if is_whole else {"number"}
    return {{str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]}
