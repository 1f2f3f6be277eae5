"""The keywords of JSON Schema that say something of one kind of value, read into facets.

A keyword's value comes from outside: one that is of the wrong type is refused at its place. Keywords that are not here
are annotations, or unknown, and say nothing, as JSON Schema has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sfumato.constraints.patterns import NotSupported
from sfumato.constraints.values.document import Place, short
from sfumato.constraints.values.facets import KINDS, NAMES, Facets, Fields, Items
from sfumato.constraints.values.matching import has_match
from sfumato.constraints.values.negation import EXCLUDED_WORD, KINDS_WORD, UNLIKE_WORD
from sfumato.constraints.values.validity import item_places

MAX_COUNT = 100_000
"""What minLength, minItems and the like may ask for."""
GREATEST = 10**300
"""The greatest size of a bound: what a float holds."""
MAX_VALUES = 10_000
"""Values of one enum, and branches of one keyword."""

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$defs", "definitions", "$schema", "$comment"})
"""Keywords that are common and say nothing."""

_Scopes = tuple[str, ...]


def count_of(place: Place, word: str, most: int | None = MAX_COUNT) -> int:
    """A keyword that counts, such as `minLength`; 2.0 is 2."""
    value = place.value[word]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (most is not None and value > most):
        end = f"from 0 to {most}" if most is not None else "from 0"
        place.refuse(f"{word} is {short(value)}; give a whole number {end}", word)
    return value


def has_name(facets: Facets, pattern: str, name: str) -> bool:
    """Whether a key has the pattern of one of the facets' schemas."""
    try:
        return has_match(pattern, name)
    except NotSupported as error:
        owner = next(place for layer in facets.fields for other, place in layer.patterned if other == pattern)
        owner.refuse(f"the pattern {pattern[:80]!r} has {error}, which is not supported; write it without")


def _type(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    declared = place.value[word]
    names = declared if isinstance(declared, list) else [declared]
    if not names or not all(isinstance(name, str) and name in NAMES for name in names):
        place.refuse(f"the type {short(declared)} is unknown; choose from {', '.join(NAMES)}", word)
    facets.speak(*KINDS)
    facets.restrict({kind for name in names for kind in NAMES[name]})


def _kinds(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.restrict(set(place.value[word]))


def _constants(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    values = [place.value[word]] if word == "const" else place.value[word]
    if not isinstance(values, list):
        place.refuse(f"enum is a list of values, not {short(values)}", word)
    if len(values) > MAX_VALUES:
        place.refuse(f"enum has {len(values)} values, more than the {MAX_VALUES} allowed; give fewer", word)
    if facets.constants is None or len(values) < len(facets.constants):
        facets.constants = values
    if place not in facets.sources:
        facets.sources.append(place)


def _excluded(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.excluded += place.value[word]


def _bound(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("whole", "fraction")
    value: Any = place.value[word]
    is_low = "inimum" in word
    is_strict = word.startswith("exclusive")
    if isinstance(value, bool) and is_strict:  # draft 4: it belongs to the bound beside it
        return
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not is_number or abs(value) > GREATEST:
        place.refuse(f"{word} is {short(value)}; give a number of at most 300 digits", word)
    if not is_strict:
        is_strict = place.value.get(f"exclusiveM{word[1:]}") is True
    facets.add_bound(Decimal(str(value)), is_low, is_strict)


def _multiple(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("whole", "fraction")
    value = place.value[word]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        place.refuse(f"multipleOf is {short(value)}; give a number above 0", word)
    facets.multiples.append(Decimal(str(value)))


def _shortest(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("string")
    facets.shortest = max(facets.shortest, count_of(place, word))


def _longest(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("string")
    facets.longest = _least(facets.longest, count_of(place, word, None))


def _least(old: int | None, new: int) -> int:
    return new if old is None else min(old, new)


def _pattern(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("string")
    pattern = place.value[word]
    if not isinstance(pattern, str):
        place.refuse(f"a pattern is text, not {short(pattern)}", word)
    facets.patterns.append((pattern, True, place))


def _unlike(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("string")
    facets.patterns += [(pattern, False, place) for pattern in place.value[word]]


def _format(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    form = place.value[word]
    if not isinstance(form, str):
        place.refuse(f"format is text, not {short(form)}", word)
    facets.formats.append(form)


def _content(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    if place.value[word] == "application/json":
        facets.contents.append(
            place.at("contentSchema") if "contentSchema" in place.value else place.with_value({}, "")
        )


def _encoding(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    if isinstance(place.value[word], str):
        facets.formats.append(place.value[word])


def _items(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    if ("prefixItems" in place.value and place.document.has_prefix_items) == (word == "items"):  # read with the other
        return
    facets.speak("array")
    prefix, rest = item_places(place)
    facets.items.append(Items(tuple(prefix), rest, scopes))


def _contains(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    """Of the arrays with such items, those that begin with them."""
    facets.speak("array")
    inside = place.at(word)
    fewest = count_of(place, "minContains") if "minContains" in place.value else 1
    most = count_of(place, "maxContains", None) if "maxContains" in place.value else None
    if most is not None and most < fewest:
        facets.restrict(facets.kinds - {"array"})
        return
    if fewest > MAX_PREFIX:
        place.refuse(f"minContains is {fewest}, more than the {MAX_PREFIX} allowed", "minContains")
    rest = inside.with_value({"not": inside.value}, "rest") if most is not None else None
    facets.items.append(Items((inside,) * fewest, rest, ()))
    facets.fewest_items = max(facets.fewest_items, fewest)


MAX_PREFIX = 200
"""Items with schemas of their own."""


def _fewest_items(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("array")
    facets.fewest_items = max(facets.fewest_items, count_of(place, word))


def _most_items(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("array")
    facets.most_items = _least(facets.most_items, count_of(place, word, None))


def _unique(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    if place.value[word] is True:
        facets.speak("array")
        facets.is_unique = True


def _unevaluated_items(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("array")
    facets.unevaluated_items.append(place)


def _fields(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    first = next(name for name in place.value if name in _FIELD_WORDS)
    if word != first:  # the three are read together
        return
    facets.speak("object")
    named, patterned = place.named_places("properties"), place.named_places("patternProperties")
    others = place.at("additionalProperties") if "additionalProperties" in place.value else None
    facets.fields.append(Fields(named, tuple(patterned.items()), others, scopes))


_FIELD_WORDS = ("properties", "patternProperties", "additionalProperties")


def _names(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("object")
    facets.names.append(place.at(word))


def _required(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    names = place.value[word]
    if isinstance(names, bool):  # draft 3
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        place.refuse(f"required is a list of keys, not {short(names)}", word)
    facets.speak("object")
    facets.required |= dict.fromkeys(names)


def _fewest_fields(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("object")
    facets.fewest_fields = max(facets.fewest_fields, count_of(place, word))


def _most_fields(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("object")
    facets.most_fields = _least(facets.most_fields, count_of(place, word, None))


def _unevaluated_fields(facets: Facets, place: Place, word: str, scopes: _Scopes) -> None:
    facets.speak("object")
    facets.unevaluated_fields.append(place)


KeywordReader = Callable[[Facets, Place, str, _Scopes], None]

READERS: dict[str, KeywordReader] = {
    "type": _type,
    KINDS_WORD: _kinds,
    "const": _constants,
    "enum": _constants,
    EXCLUDED_WORD: _excluded,
    "minimum": _bound,
    "maximum": _bound,
    "exclusiveMinimum": _bound,
    "exclusiveMaximum": _bound,
    "multipleOf": _multiple,
    "minLength": _shortest,
    "maxLength": _longest,
    "pattern": _pattern,
    UNLIKE_WORD: _unlike,
    "format": _format,
    "contentMediaType": _content,
    "contentEncoding": _encoding,
    "items": _items,
    "prefixItems": _items,
    "contains": _contains,
    "minItems": _fewest_items,
    "maxItems": _most_items,
    "uniqueItems": _unique,
    "unevaluatedItems": _unevaluated_items,
    "properties": _fields,
    "patternProperties": _fields,
    "additionalProperties": _fields,
    "propertyNames": _names,
    "required": _required,
    "minProperties": _fewest_fields,
    "maxProperties": _most_fields,
    "unevaluatedProperties": _unevaluated_fields,
}
"""Each keyword's reader; it adds what the keyword says at a place to the facets."""
