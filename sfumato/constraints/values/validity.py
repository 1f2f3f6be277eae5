"""Whether a JSON value obeys a schema: the whole of JSON Schema's keywords, for values that a schema lists.

What a grammar cannot say, such as that all items differ, is checked here as well. Formats are annotations.

Deliberately absent: reasons. The answer is yes or no.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sfumato.constraints.patterns import NotSupported
from sfumato.constraints.values.document import Place
from sfumato.constraints.values.equality import canonical, kinds_of
from sfumato.constraints.values.facets import NAMES
from sfumato.constraints.values.matching import has_match
from sfumato.constraints.values.negation import EXCLUDED_WORD, KINDS_WORD, UNLIKE_WORD

MAX_DEPTH = 200
"""Schemas within each other that one value is held against."""


@dataclass
class _Evaluated:
    """The keys and the number of items of a value that schemas have spoken of."""

    names: set[str] = field(default_factory=set)
    items: set[int] = field(default_factory=set)

    def add(self, other: _Evaluated) -> None:
        self.names |= other.names
        self.items |= other.items


@dataclass
class _Checking:
    """One value being checked: how deep, and what is known of each part of it and each schema."""

    depth: int = 0
    known: dict[tuple[int, str], _Evaluated | None] = field(default_factory=dict)


def is_valid(value: Any, place: Place) -> bool:
    """Whether the value obeys the schema at a place."""
    return _check(value, place, _Checking()) is not None


def _check(value: Any, place: Place, run: _Checking) -> _Evaluated | None:
    """What of the value the schema has spoken of; None where the value is not valid."""
    schema = place.value
    if isinstance(schema, bool):
        return _Evaluated() if schema else None
    key = id(value), place.pointer
    if key not in run.known:
        if run.depth > MAX_DEPTH or not isinstance(schema, dict):
            return None
        run.depth += 1
        run.known[key] = _check_all(value, place, run)
        run.depth -= 1
    return run.known[key]


def _check_all(value: Any, place: Place, run: _Checking) -> _Evaluated | None:
    """`_check` of a schema that is an object."""
    schema = place.value
    if schema.get("nullable") is True and value is None:
        return _Evaluated()
    if "enum" in schema and canonical(value) not in place.document.listed(place):
        return None
    if not _is_scalar_valid(value, schema):
        return None
    evaluated = _Evaluated()
    if not _combine(value, place, evaluated, run):
        return None
    if isinstance(value, dict) and not _check_object(value, place, evaluated, run):
        return None
    if isinstance(value, list) and not _check_array(value, place, evaluated, run):
        return None
    return evaluated


def _is_scalar_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value obeys the keywords that hold no schemas."""
    kind = kinds_of(value)
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(isinstance(name, str) and kind in NAMES.get(name, ()) for name in names):
            return False
    if kind not in schema.get(KINDS_WORD, (kind,)):
        return False
    if "const" in schema and canonical(schema["const"]) != canonical(value):
        return False
    if any(canonical(value) == canonical(other) for other in schema.get(EXCLUDED_WORD, ())):
        return False
    if kind in ("whole", "fraction"):
        return _is_number_valid(Decimal(str(value)), schema)
    if kind == "string":
        return _is_text_valid(value, schema)
    return True


def _is_number_valid(value: Decimal, schema: dict[str, Any]) -> bool:
    def bound(word: str) -> Decimal | None:
        limit = schema.get(word)
        return None if isinstance(limit, bool) or limit is None else Decimal(str(limit))

    low, high = bound("minimum"), bound("maximum")
    above, below = bound("exclusiveMinimum"), bound("exclusiveMaximum")
    above = low if schema.get("exclusiveMinimum") is True else above  # draft 4
    below = high if schema.get("exclusiveMaximum") is True else below
    step = bound("multipleOf")
    return (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
        and (not step or is_multiple(value, step))
    )


def is_multiple(value: Decimal, step: Decimal) -> bool:
    """Whether a number is a whole multiple of another, exactly."""
    top, bottom = value.as_integer_ratio()
    step_top, step_bottom = step.as_integer_ratio()
    return (top * step_bottom) % (bottom * step_top) == 0


def _is_text_valid(value: str, schema: dict[str, Any]) -> bool:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return False
    try:
        return ("pattern" not in schema or has_match(schema["pattern"], value)) and not any(
            has_match(pattern, value) for pattern in schema.get(UNLIKE_WORD, ())
        )
    except NotSupported:
        return False


def _combine(value: Any, place: Place, evaluated: _Evaluated, run: _Checking) -> bool:
    """Whether the value obeys the keywords that combine schemas."""
    schema = place.value

    def holds(inner: Place) -> bool:
        result = _check(value, inner, run)
        if result is not None:
            evaluated.add(result)
        return result is not None

    for word in ("$ref", "$dynamicRef", "$recursiveRef"):
        if word in schema and not holds(place.document.target(place, word)):
            return False
    if "allOf" in schema and not all(map(holds, place.places("allOf"))):
        return False
    if "anyOf" in schema and not any([holds(inner) for inner in place.places("anyOf")]):
        return False
    if "oneOf" in schema and sum(holds(inner) for inner in place.places("oneOf")) != 1:
        return False
    if "not" in schema and _check(value, place.at("not"), run) is not None:
        return False
    if "if" in schema:
        word = "then" if holds(place.at("if")) else "else"
        if word in schema and not holds(place.at(word)):
            return False
    if isinstance(value, dict):
        for word in ("dependentSchemas", "dependencies"):
            for name, inner in place.named_places(word).items():
                if name not in value:
                    continue
                if isinstance(inner.value, list):
                    if not all(other in value for other in inner.value):
                        return False
                elif not holds(inner):
                    return False
    return True


def _check_object(value: dict[str, Any], place: Place, evaluated: _Evaluated, run: _Checking) -> bool:
    schema = place.value
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        return False
    required = schema.get("required", [])
    if isinstance(required, list) and not all(name in value for name in required):
        return False
    for name, others in schema.get("dependentRequired", {}).items():
        if name in value and not all(other in value for other in others):
            return False
    named, patterned = place.named_places("properties"), place.named_places("patternProperties")
    for name, inner in value.items():
        if "propertyNames" in schema and _check(name, place.at("propertyNames"), run) is None:
            return False
        own = [named[name]] if name in named else []
        own += [schema_of for pattern, schema_of in patterned.items() if _has_match(pattern, name)]
        if not own and "additionalProperties" in schema:
            own = [place.at("additionalProperties")]
        if any(_check(inner, one, run) is None for one in own):
            return False
        evaluated.names |= {name} if own else set()
    if "unevaluatedProperties" in schema:
        inner_place = place.at("unevaluatedProperties")
        for name in value.keys() - evaluated.names:
            if _check(value[name], inner_place, run) is None:
                return False
        evaluated.names |= value.keys()
    return True


def _has_match(pattern: str, text: str) -> bool:
    try:
        return has_match(pattern, text)
    except NotSupported:
        return False


def _check_array(value: list[Any], place: Place, evaluated: _Evaluated, run: _Checking) -> bool:
    schema = place.value
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return False
    if schema.get("uniqueItems") is True and len(set(map(canonical, value))) < len(value):
        return False
    prefix, rest = item_places(place)
    for index, inner in enumerate(value):
        own = prefix[index] if index < len(prefix) else rest
        if own is not None:
            if _check(inner, own, run) is None:
                return False
            evaluated.items.add(index)
    if "contains" in schema:
        inside = place.at("contains")
        matching = {i for i, inner in enumerate(value) if _check(inner, inside, run) is not None}
        evaluated.items |= matching
        if not schema.get("minContains", 1) <= len(matching) <= schema.get("maxContains", len(matching)):
            return False
    if "unevaluatedItems" in schema:
        inside = place.at("unevaluatedItems")
        for index in set(range(len(value))) - evaluated.items:
            if _check(value[index], inside, run) is None:
                return False
        evaluated.items |= set(range(len(value)))
    return True


def item_places(place: Place) -> tuple[list[Place], Place | None]:
    """The schemas of the first items and that of the rest, in any draft's words."""
    schema = place.value
    if "prefixItems" in schema and place.document.has_prefix_items:
        return place.places("prefixItems"), place.at("items") if "items" in schema else None
    if isinstance(schema.get("items"), list):
        rest = place.at("additionalItems") if "additionalItems" in schema else None
        return [place.at("items", number) for number in range(len(schema["items"]))], rest
    return [], place.at("items") if "items" in schema else None
