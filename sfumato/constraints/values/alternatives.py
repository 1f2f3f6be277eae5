"""A schema as a disjunction: the ways to obey it, each a conjunction that has no combining keyword left.

References and `allOf` add to a conjunction; `anyOf`, `oneOf`, `if`, `not` and dependencies branch. Branches that no
value can obey are dropped: a property that may not be there and must, bounds that cross, constants of another type.
`oneOf` becomes `anyOf` where no value obeys two branches, and otherwise each branch excludes the others, where that can
be written. What cannot be written is noted as inexact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sfumato.constraints.values.document import Place, short
from sfumato.constraints.values.facets import Conjunction, Facets
from sfumato.constraints.values.keywords import ANNOTATIONS, MAX_VALUES, READERS, has_name
from sfumato.constraints.values.negation import negations
from sfumato.constraints.values.validity import is_valid

MAX_WORK = 50_000
"""Schemas that are read for one document, each time that it is reached."""
MAX_PRODUCT = 128
"""Alternatives of one schema where several keywords branch: their numbers multiply."""
_WHY = 20
"""Values within each other that are searched for a reason."""

_Branches = list[list[Place]]
"""A keyword that branches: of each branch, the schemas that hold together."""
_Pending = tuple[_Branches, tuple[str, ...], tuple[str, ...]]
"""Branches to choose from, the pointers of the schemas around them that speak of what is not evaluated, and of all."""


class Alternatives:
    """The alternatives of the schemas of one document, each read once."""

    def __init__(self) -> None:
        self._work = MAX_WORK
        self._known: dict[Conjunction, list[Facets]] = {}
        self._open: set[Conjunction] = set()
        self._possible: dict[Conjunction, bool] = {}
        self._is_provisional = False
        self._reasons: dict[Conjunction, str] = {}
        self._noted = ""

    def of(self, places: Conjunction) -> list[Facets]:
        """The ways to obey all of these schemas; [] where there is none."""
        if places not in self._known:
            start = Facets(sources=list(places))
            pending: list[_Pending] = []
            reading = _Reading(self, start, pending, ())
            for place in places:
                reading.add(place, ())
            self._noted = ""
            self._known[places] = self._branched(start, pending)
            if not self._known[places]:
                self._reasons[places] = self._noted
        return self._known[places]

    def _branched(self, facets: Facets, pending: list[_Pending]) -> list[Facets]:
        """The alternatives of a conjunction with these keywords to branch at."""
        if not facets.kinds:
            return []
        if not pending:
            return [facets] if self._settle(facets) else []
        (branches, scopes, path), rest = pending[0], pending[1:]
        if len(branches) > 1 and rest and math.prod(len(other) for other, *_ in pending) > MAX_PRODUCT:
            facets.inexact += [place for branch in branches[:1] for place in branch[:1]]
            return self._branched(facets, rest)
        alternatives = []
        for branch in branches:
            new, further = facets.copy(), rest.copy()
            new.sources += branch
            reading = _Reading(self, new, further, path)
            for place in branch:
                reading.add(place, scopes)
            alternatives += self._branched(new, further)
        return alternatives

    def spend(self, place: Place) -> None:
        """Count one more schema read; InputError where there are too many."""
        self._work -= 1
        if self._work < 0:
            place.refuse(f"the schema takes more than {MAX_WORK} steps to read; make it smaller or refer less")

    # ---- what no value obeys ----------------------------------------------------------------------------------------

    def is_possible(self, places: Conjunction) -> bool:
        """Whether some value obeys all of these schemas, as far as can be told without looking into patterns."""
        if places in self._possible:
            return self._possible[places]
        if places in self._open:  # a value within itself: not by this way
            self._is_provisional = True
            return False
        before, self._is_provisional = self._is_provisional, False
        self._open.add(places)
        try:
            answer = any(self._can_be(facets) for facets in self.of(places))
        finally:
            self._open.discard(places)
        if answer or not self._is_provisional or not self._open:
            self._possible[places] = answer
        self._is_provisional = (self._is_provisional or before) and bool(self._open)
        return answer

    def _settle(self, facets: Facets) -> bool:
        """Drop the kinds that are impossible for reasons of their own; whether any is left."""
        if facets.constants is not None:
            listed = facets.constants
            facets.constants = [value for value in listed if all(is_valid(value, place) for place in facets.sources)]
            if not facets.constants:
                self._noted = f"none of the {len(listed)} values listed is allowed"
            return bool(facets.constants)
        if facets.low and facets.high:
            (low, is_above), (high, is_below) = facets.low, facets.high
            if low > high or (low == high and (is_above or is_below)):
                self._drop(facets, ("whole", "fraction"), f"no number lies between the bounds {low} and {high}")
        for kind, word, fewest, most in (
            ("string", "Length", facets.shortest, facets.longest),
            ("array", "Items", facets.fewest_items, facets.most_items),
            ("object", "Properties", facets.fewest_fields, facets.most_fields),
        ):
            if most is not None and most < fewest:
                self._drop(facets, (kind,), f"min{word} {fewest} is above max{word} {most}")
        if facets.most_fields is not None and facets.most_fields < len(facets.required):
            count = len(facets.required)
            self._drop(facets, ("object",), f"{count} keys are required, more than maxProperties {facets.most_fields}")
        return bool(facets.kinds)

    def _drop(self, facets: Facets, kinds: tuple[str, ...], reason: str) -> None:
        facets.restrict(facets.kinds - set(kinds))
        self._noted = reason

    def reason(self, places: Conjunction) -> tuple[Place, str]:
        """Where it begins that no value obeys all of these schemas, and why."""
        for _ in range(_WHY):
            inner, name = self._impossible_within(places)
            if name and any(place.value is False for place in inner):
                return places[0], f"the key {name[:80]!r} is required and not allowed"
            if not inner:
                break
            places = inner
        return places[0], self._reasons.get(places) or "no value is allowed; see what contradicts"

    def _impossible_within(self, places: Conjunction) -> tuple[Conjunction, str]:
        """What must be within a value and cannot be, and its key."""
        for facets in self.of(places):
            for name in facets.required:
                if not self.is_possible(self.field(facets, name)):
                    return self.field(facets, name), name
            if facets.fewest_items and not self.is_possible(facets.item(0)):
                return facets.item(0), ""
        return (), ""

    def _can_be(self, facets: Facets) -> bool:
        """Whether some value obeys the facets, what lies within included."""
        if facets.constants is not None:
            return True
        if facets.kinds - {"array", "object"}:
            return True
        if "array" in facets.kinds and all(
            self.is_possible(facets.item(index))
            for index in range(min(facets.fewest_items, facets.prefix_length() + 1))
        ):
            return True
        return "object" in facets.kinds and all(self.is_possible(self.field(facets, name)) for name in facets.required)

    def field(self, facets: Facets, name: str) -> Conjunction:
        """The schemas of the value of a named key."""
        return facets.value(name, frozenset(p for p in facets.field_patterns() if has_name(facets, p, name)))


class _Reading:
    """One conjunction being read: what its schemas say is added to its facets, what branches to `pending`."""

    def __init__(
        self, alternatives: Alternatives, facets: Facets, pending: list[_Pending], path: tuple[str, ...]
    ) -> None:
        self._alternatives, self._facets, self._pending = alternatives, facets, pending
        self._path = list(path)
        self._done: set[tuple[str, tuple[str, ...]]] = set()

    def add(self, place: Place, scopes: tuple[str, ...]) -> None:
        """Add a schema; `scopes` are the pointers of those around it that speak of what is not evaluated."""
        self._alternatives.spend(place)
        value = place.value
        if isinstance(value, bool):
            if not value:
                self._facets.kinds = frozenset()
            return
        if not isinstance(value, dict):
            place.refuse(f"a schema is an object, true or false, not {short(value)}")
        if place.pointer in self._path:
            place.refuse("the schema refers to itself without anything between; put it into a property or an item")
        if (place.pointer, scopes) in self._done:
            return
        self._done.add((place.pointer, scopes))
        if "unevaluatedItems" in value or "unevaluatedProperties" in value:
            scopes = (*scopes, place.pointer)
        self._path.append(place.pointer)
        if value.get("nullable") is True:
            plain = {word: operand for word, operand in value.items() if word != "nullable"}
            self._branch([[place.with_value({"type": "null"}, "null")], [place.with_value(plain, "plain")]], scopes)
        else:
            for word in value:
                if word not in ANNOTATIONS:
                    self._read(word, place, scopes)
        self._path.pop()

    def _branch(self, branches: Iterable[Iterable[Place]], scopes: tuple[str, ...]) -> None:
        self._pending.append(([list(branch) for branch in branches], scopes, tuple(self._path)))

    def _read(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        combine = _COMBINE.get(word)
        if combine is not None:
            combine(self, word, place, scopes)
        elif word in READERS:
            READERS[word](self._facets, place, word, scopes)

    # ---- keywords that combine schemas ------------------------------------------------------------------------------

    def _refer(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        self.add(place.document.target(place, word), scopes)

    def _all_of(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        for inner in place.places(word):
            self.add(inner, scopes)

    def _any_of(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        branches = _checked_branches(place, word)
        if len(branches) == 1:
            self.add(branches[0], scopes)
        else:
            self._branch(([branch] for branch in branches), scopes)

    def _one_of(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        branches = _checked_branches(place, word)
        label = place.value.get("discriminator")
        label = label.get("propertyName") if isinstance(label, dict) else None
        beside: list[Place] = []
        if isinstance(label, str):
            beside = [place.with_value({"type": "object", "required": [label]}, "label")]
        shares = {}
        for i, one in enumerate(branches):
            for j in range(i):
                shares[i, j] = shares[j, i] = self._alternatives.is_possible((branches[j], one, *beside))
        chosen: list[list[Place]] = []
        for i, one in enumerate(branches):
            holding = [one, *beside]
            for j, other in enumerate(branches):
                if i == j or not shares[i, j]:
                    continue
                if negations(other) is None:
                    self._facets.inexact.append(place)
                else:
                    holding.append(other.with_value({"not": other.value}, "excluded"))
            chosen.append(holding)
        self._branch(chosen, scopes)

    def _not(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        forbidden = negations(place.at(word))
        if forbidden is None:
            self._facets.inexact.append(place)
        else:
            self._branch(([term] for term in forbidden), ())

    def _if(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        if "then" not in place.value and "else" not in place.value:
            return
        condition = place.at(word)
        then = [condition, *([place.at("then")] if "then" in place.value else [])]
        otherwise = [place.at("else")] if "else" in place.value else []
        if negations(condition) is None:
            self._facets.inexact.append(place)
        else:
            otherwise = [condition.with_value({"not": condition.value}, "otherwise"), *otherwise]
        self._branch([then, otherwise], scopes)

    def _depend(self, word: str, place: Place, scopes: tuple[str, ...]) -> None:
        for name, inner in place.named_places(word).items():
            absent = inner.with_value({"properties": {name: False}}, "absent")
            if isinstance(inner.value, list):
                if not all(isinstance(other, str) for other in inner.value):
                    inner.refuse("a dependency is a schema or a list of keys")
                if not inner.value:
                    continue
                present = [inner.with_value({"required": [name, *inner.value]}, "present")]
            else:
                present = [inner.with_value({"required": [name]}, "present"), inner]
            self._branch([[absent], present], scopes)


def _checked_branches(place: Place, word: str) -> list[Place]:
    branches = place.places(word)
    if len(branches) > MAX_VALUES:
        place.refuse(f"{word} has {len(branches)} schemas, more than the {MAX_VALUES} allowed", word)
    return branches


_COMBINE: dict[str, Callable[[_Reading, str, Place, tuple[str, ...]], None]] = {
    "$ref": _Reading._refer,
    "$dynamicRef": _Reading._refer,
    "$recursiveRef": _Reading._refer,
    "allOf": _Reading._all_of,
    "anyOf": _Reading._any_of,
    "oneOf": _Reading._one_of,
    "not": _Reading._not,
    "if": _Reading._if,
    "dependentRequired": _Reading._depend,
    "dependentSchemas": _Reading._depend,
    "dependencies": _Reading._depend,
}
