"""What a schema says of the values that it allows, sorted by their kind.

A `Facets` is a conjunction: everything in it holds. A schema is a disjunction of such (`alternatives`). Schemas of what
lies within, items and properties, stay places: they are read when needed, so that a schema may refer to itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sfumato.constraints.values.document import Place

KINDS = ("null", "boolean", "whole", "fraction", "string", "array", "object")
"""Kinds of values; "whole" and "fraction" are numbers, and 1.0 is whole."""
NAMES: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in ("null", "boolean", "string", "array", "object")} | {
    "integer": ("whole",),
    "number": ("whole", "fraction"),
}
"""The kinds of each name that the keyword `type` may have."""

Bound = tuple[Decimal, bool] | None
"""A bound, and whether it is itself excluded; None where there is none."""
Conjunction = tuple[Place, ...]
"""Schemas that hold together."""


@dataclass(frozen=True)
class Items:
    """What one schema says of the items of arrays: of the first few, and of the rest."""

    prefix: Conjunction
    rest: Place | None
    scopes: tuple[str, ...]
    """The pointers of the schemas around it that speak of what is not evaluated."""


@dataclass(frozen=True)
class Fields:
    """What one schema says of the values of objects: of named ones, of keys with a pattern, and of all others."""

    named: dict[str, Place]
    patterned: tuple[tuple[str, Place], ...]
    others: Place | None
    scopes: tuple[str, ...]


@dataclass
class Facets:
    """Everything that a conjunction of schemas says. Lists are not shared, what they hold is."""

    kinds: frozenset[str] = frozenset(KINDS)
    spoken: frozenset[str] = frozenset()
    """Kinds of which a keyword speaks."""
    sources: list[Place] = field(default_factory=list)
    """The schemas that a constant must obey."""
    constants: list[Any] | None = None
    excluded: list[Any] = field(default_factory=list)
    low: Bound = None
    high: Bound = None
    multiples: list[Decimal] = field(default_factory=list)
    shortest: int = 0
    longest: int | None = None
    patterns: list[tuple[str, bool, Place]] = field(default_factory=list)
    """(pattern, whether it must be there, its schema)"""
    formats: list[str] = field(default_factory=list)
    contents: list[Place] = field(default_factory=list)
    """Schemas of the JSON that is a text."""
    items: list[Items] = field(default_factory=list)
    fewest_items: int = 0
    most_items: int | None = None
    is_unique: bool = False
    fields: list[Fields] = field(default_factory=list)
    names: list[Place] = field(default_factory=list)
    """Schemas of the keys."""
    required: dict[str, None] = field(default_factory=dict)
    fewest_fields: int = 0
    most_fields: int | None = None
    unevaluated_items: list[Place] = field(default_factory=list)
    unevaluated_fields: list[Place] = field(default_factory=list)
    inexact: list[Place] = field(default_factory=list)
    """Keywords that are not kept in full: the values are checked as a whole."""

    def copy(self) -> Facets:
        """The same, whose lists can be added to."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict)):
                setattr(new, name, value.copy())
        return new

    def restrict(self, kinds: frozenset[str] | set[str]) -> None:
        """Allow only these kinds."""
        self.kinds &= kinds

    def speak(self, *kinds: str) -> None:
        """Note that a keyword speaks of these kinds."""
        self.spoken |= set(kinds)

    def add_bound(self, value: Decimal, is_low: bool, is_strict: bool = False) -> None:
        """Allow no number below a value, or above it."""
        bound = self.low if is_low else self.high
        if bound is not None:
            if bound[0] == value:
                is_strict = is_strict or bound[1]
            elif (bound[0] > value) == is_low:
                return
        if is_low:
            self.low = value, is_strict
        else:
            self.high = value, is_strict

    # ---- what lies within -------------------------------------------------------------------------------------------

    def item(self, index: int) -> Conjunction:
        """The schemas of the item at an index."""
        places: dict[Place, None] = {}
        for items in self.items:
            place = items.prefix[index] if index < len(items.prefix) else items.rest
            places |= {place: None} if place is not None else {}
        for place in self.unevaluated_items:
            inner = [items for items in self.items if place.pointer in items.scopes]
            if not any(index < len(items.prefix) or items.rest is not None for items in inner):
                places[place.at("unevaluatedItems")] = None
        return tuple(places)

    def prefix_length(self) -> int:
        """The number of items that have schemas of their own."""
        return max((len(items.prefix) for items in self.items), default=0)

    def value(self, name: str | None, patterns: frozenset[str]) -> Conjunction:
        """The schemas of the value of a key: one with this name, or one of no name that is in these patterns."""
        places: dict[Place, None] = {}
        evaluators: set[str] = set()
        for layer in self.fields:
            own = [place for pattern, place in layer.patterned if pattern in patterns]
            own += [layer.named[name]] if name is not None and name in layer.named else []
            own = own or ([layer.others] if layer.others is not None else [])
            places |= dict.fromkeys(own)
            evaluators |= set(layer.scopes) if own else set()
        for place in self.unevaluated_fields:
            if place.pointer not in evaluators:
                places[place.at("unevaluatedProperties")] = None
        return tuple(places)

    def field_names(self) -> list[str]:
        """The keys that are named, in their order."""
        names = dict.fromkeys(name for layer in self.fields for name in layer.named)
        return list(names | self.required)

    def field_patterns(self) -> list[str]:
        """The patterns of keys."""
        return list(dict.fromkeys(pattern for layer in self.fields for pattern, _ in layer.patterned))

    def is_open(self) -> bool:
        """Whether any schema speaks of keys that it does not name."""
        return any(layer.patterned or layer.others is not None for layer in self.fields) or bool(
            self.unevaluated_fields
        )
