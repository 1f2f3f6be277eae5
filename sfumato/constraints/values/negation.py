"""What a schema forbids, as schemas: `not` written without `not`.

Some keywords exist in these schemas alone (`KINDS_WORD` and others): no JSON text can have them, as their values are
tuples.

Deliberately absent: the negation of keywords that speak of all items or of all other keys, and of combinations that
would be long.
"""

from __future__ import annotations

from typing import Any

from sfumato.constraints.values.document import Place
from sfumato.constraints.values.facets import KINDS, NAMES

KINDS_WORD, EXCLUDED_WORD, UNLIKE_WORD = "\0kinds", "\0excluded", "\0unlike"
"""The kinds that are allowed, values that are not, and a pattern that may not be there."""
MAX_TERMS = 8
"""Alternatives of one negation."""

_COUNTS = {
    "Length": "string",
    "Items": "array",
    "Properties": "object",
}
_BOUNDS = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
_UNNAMED = {
    *("items", "prefixItems", "additionalItems", "additionalProperties", "patternProperties", "propertyNames"),
    *("contains", "if", "oneOf", "uniqueItems", "multipleOf", "unevaluatedItems", "unevaluatedProperties", "format"),
    *("dependentRequired", "dependentSchemas", "dependencies", "contentSchema", "$dynamicRef", "$recursiveRef"),
    *("nullable", EXCLUDED_WORD, UNLIKE_WORD),
}
"""Keywords whose negation is not written."""


def negations(place: Place, depth: int = 0) -> list[Place] | None:
    """Schemas of which at least one allows each value that the schema here does not; None where that is not known."""
    value = place.value
    if isinstance(value, bool):
        return [] if value else [place.with_value({}, "not")]
    if not isinstance(value, dict) or not _UNNAMED.isdisjoint(value) or depth > MAX_TERMS:
        return None
    terms: list[Any] = []
    for word, operand in value.items():
        new = _terms(word, operand)
        if new is None:
            return None
        terms += new
    places = [place.with_value(term, f"not{number}") for number, term in enumerate(terms)]
    if "$ref" in value:
        further = negations(place.document.target(place, "$ref"), depth + 1)
        if further is None:
            return None
        places += further
    return places if len(places) <= MAX_TERMS else None


def _terms(word: str, operand: Any) -> list[Any] | None:
    """The negation of one keyword; [] where it says nothing."""
    if word == "type":
        names = operand if isinstance(operand, list) else [operand]
        allowed = {kind for name in names if isinstance(name, str) for kind in NAMES.get(name, ())}
        return [{KINDS_WORD: tuple(kind for kind in KINDS if kind not in allowed)}]
    if word == KINDS_WORD:
        return [{KINDS_WORD: tuple(kind for kind in KINDS if kind not in operand)}]
    if word in ("const", "enum"):
        return [{EXCLUDED_WORD: tuple(operand) if word == "enum" and isinstance(operand, list) else (operand,)}]
    if word == "required" and isinstance(operand, list):
        return [{"type": "object", "properties": {name: False}} for name in operand]
    if word == "properties" and isinstance(operand, dict):
        return [
            {"type": "object", "required": [name], "properties": {name: {"not": schema}}}
            for name, schema in operand.items()
        ]
    if word == "not":
        return [operand]
    if word in ("anyOf", "allOf") and isinstance(operand, list):
        inner = [{"not": schema} for schema in operand]
        return [{"allOf": inner}] if word == "anyOf" else inner
    if word in _BOUNDS:
        return None if isinstance(operand, bool) else [{"type": "number", _BOUNDS[word]: operand}]
    if word == "pattern":
        return [{"type": "string", UNLIKE_WORD: (operand,)}]
    return _opposite_count(word, operand)


def _opposite_count(word: str, operand: Any) -> list[Any] | None:
    kind = _COUNTS.get(word[3:])
    if kind is None or word[:3] not in ("min", "max"):
        return []
    if isinstance(operand, bool) or not isinstance(operand, (int, float)):
        return None
    if word.startswith("max"):
        return [{"type": kind, f"min{word[3:]}": operand + 1}]
    return [{"type": kind, f"max{word[3:]}": operand - 1}] if operand > 0 else []
