"""A short value that a schema allows: what a text ends with where its room is short.

Values are made from the alternatives, the shortest of each as JSON; the shortest number and text of facets are known.
Deliberately absent: proof. Who takes an example holds it against the grammar first.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from sfumato.constraints.patterns import NotSupported
from sfumato.constraints.shortest import shortest
from sfumato.constraints.values.alternatives import Alternatives
from sfumato.constraints.values.facets import Conjunction, Facets
from sfumato.constraints.values.rules import RuleWriter
from sfumato.constraints.values.strings import pattern_node, text_node
from sfumato.constraints.values.validity import is_valid
from sfumato.errors import InputError

_MOST_ITEMS = 1000
"""Items of an example: longer ones are not made."""
_DIGITS = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class NoShortValue(Exception):
    """There is none, or it is not known."""


class ShortValues:
    """Short values of one document's schemas. `is_sorted`: keys come in alphabetical order."""

    def __init__(self, alternatives: Alternatives, is_sorted: bool) -> None:
        self._alternatives = alternatives
        self._is_sorted = is_sorted
        self._rules = RuleWriter()
        self._known: dict[Conjunction, Any] = {}
        self._open: set[Conjunction] = set()

    def of(self, places: Conjunction) -> Any:
        """A short value that obeys all of these schemas; `NoShortValue` where none is known."""
        if not places:
            return 0
        if places in self._known:
            return self._known[places]
        if places in self._open:
            raise NoShortValue
        self._open.add(places)
        candidates: list[Any] = []
        for facets in self._alternatives.of(places):
            candidates += facets.constants if facets.constants is not None else self._by_kind(facets)
        self._open.discard(places)
        candidates.sort(key=lambda value: len(json.dumps(value, ensure_ascii=False)))
        for value in candidates:
            if all(is_valid(value, place) for place in places):
                self._known[places] = value
                return value
        raise NoShortValue

    def _by_kind(self, facets: Facets) -> list[Any]:
        """A value of each kind that the facets allow."""
        kinds = facets.kinds
        values: list[Any] = [None] if "null" in kinds else []
        values += [True, False] if "boolean" in kinds else []
        for kind, make in (("string", self._text), ("array", self._array), ("object", self._object)):
            if kind in kinds:
                try:
                    values.append(make(facets))
                except (NoShortValue, NotSupported, InputError):
                    continue
        if kinds & {"whole", "fraction"}:
            values += _numbers(facets)
        return values

    def _text(self, facets: Facets) -> str:
        if facets.contents:
            return json.dumps(self.of(tuple(facets.contents)), ensure_ascii=False)
        text = shortest(text_node(self._rules, facets))
        if text is None:
            raise NoShortValue
        return text

    def _array(self, facets: Facets) -> list[Any]:
        if facets.fewest_items > _MOST_ITEMS:
            raise NoShortValue
        return [self.of(facets.item(index)) for index in range(facets.fewest_items)]

    def _object(self, facets: Facets) -> dict[str, Any]:
        names = facets.field_names()
        if self._is_sorted:
            names.sort(key=str.lower)
        values = {name: self.of(self._alternatives.field(facets, name)) for name in names if name in facets.required}
        names += [name for name in self._other_names(facets) if name not in names]
        for name in names:
            if len(values) >= facets.fewest_fields:
                break
            if name not in values and self._alternatives.is_possible(self._alternatives.field(facets, name)):
                values[name] = self.of(self._alternatives.field(facets, name))
        return {name: values[name] for name in names if name in values}

    def _other_names(self, facets: Facets) -> list[str]:
        """Keys that no schema names, as many as there must be fields."""
        if not facets.fewest_fields:
            return []
        nodes = [pattern_node(self._rules, pattern, facets.sources[0]) for pattern in facets.field_patterns()]
        nodes += [text_node(self._rules, inner) for place in facets.names for inner in self._alternatives.of((place,))]
        names = [shortest(node) or "" for node in nodes]
        return [*names, *(letter * (1 + number // 26) for number, letter in enumerate(_LETTERS * 4))]


def _numbers(facets: Facets) -> list[Any]:
    """Numbers between the bounds with as few digits as there can be."""
    steps = [Fraction(step) for step in facets.multiples]
    if "fraction" not in facets.kinds:
        steps.append(Fraction(1))
    numbers: list[Any] = []
    for bound, upwards in ((facets.low, True), (facets.high, False)):
        if bound is None:
            continue
        value, is_strict = Fraction(bound[0]), bound[1]
        for step in steps or [Fraction(1, 10**digits) for digits in range(_DIGITS)]:
            times = math.ceil(value / step) if upwards else math.floor(value / step)
            if is_strict and times * step == value:
                times += 1 if upwards else -1
            numbers.append(_as_number(times * step))
    return [number for number in (0, 0.5, *numbers) if _is_within(number, facets)][:2]


def _as_number(value: Fraction) -> Any:
    return int(value) if value.denominator == 1 else float(value)


def _is_within(number: Any, facets: Facets) -> bool:
    if isinstance(number, float) and "fraction" not in facets.kinds:
        return False
    value, low, high = Decimal(str(number)), facets.low, facets.high
    if low is not None and (value < low[0] or (low[1] and value == low[0])):
        return False
    return high is None or not (value > high[0] or (high[1] and value == high[0]))
