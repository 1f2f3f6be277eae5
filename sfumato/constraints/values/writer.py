"""From the alternatives of a schema to the rules of a grammar, in any notation.

Each conjunction of schemas is one rule, so that schemas may refer to themselves. Whatever the grammar allows obeys the
schema; where a schema says more than a grammar can, its place is noted in `inexact`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from sfumato.constraints.expressions import (
    ANYTHING,
    NEVER,
    NOTHING,
    Expression,
    both,
    either,
    literal,
    other_than,
)
from sfumato.constraints.values.alternatives import Alternatives
from sfumato.constraints.values.document import Place, short
from sfumato.constraints.values.equality import canonical, kinds_of
from sfumato.constraints.values.examples import NoShortValue, ShortValues
from sfumato.constraints.values.facets import KINDS, Conjunction, Facets
from sfumato.constraints.values.formats import WHOLE_FORMATS
from sfumato.constraints.values.keywords import MAX_PREFIX
from sfumato.constraints.values.notation import Notation
from sfumato.constraints.values.numbers import NoNumber, number_rule
from sfumato.constraints.values.rules import RuleWriter
from sfumato.constraints.values.sequences import ListElement, NotWritten, counted_body, list_body, subset_body
from sfumato.constraints.values.strings import has_text, pattern_node, text_node
from sfumato.constraints.values.validity import is_valid

MAX_NESTING = 64
"""Values within each other, each with a rule of its own."""
_BITS = 64
"""Values of a set that may come in any order."""
_PATTERNS_TOGETHER = 3
"""Patterns of keys that one key may have together."""
_STRUCTURED = {"array", "object"}


class ValueWriter:
    """Writes the rules of the values of one document's schemas.

    `inexact` are the places of keywords that the rules do not keep in full.
    """

    def __init__(self, rules: RuleWriter, notation: Notation) -> None:
        self.inexact: list[Place] = []
        self._rules, self._notation = rules, notation
        self._alternatives = Alternatives()
        self._names: dict[Conjunction, str] = {}
        self._open: dict[Conjunction, str] = {}  # those being written, and the rule that refers to them from within

    @property
    def is_inexact(self) -> bool:
        """Whether the rules allow more than the schemas do: a check of the whole text says what they do not."""
        return bool(self.inexact)

    def rule(self, places: Conjunction) -> str:
        """The rule of the values that obey all of these schemas; an InputError where there is none."""
        if places in self._names:
            return self._names[places]
        if places in self._open:
            self._open[places] = self._open[places] or self._rules.new_name()
            return self._open[places]
        if len(self._open) > MAX_NESTING:
            places[0].refuse(f"values nest deeper than the {MAX_NESTING} levels allowed; flatten the schema")
        self._open[places] = ""
        options = self._options(places)
        name = self._open.pop(places)
        if name:
            if self._notation.is_narrow:  # calls are read back to a depth that a rule within itself does not keep
                self.inexact += places[:1]
            self._rules.define(name, " | ".join(dict.fromkeys(options)))
        else:
            name = self._rules.choice(options)
        self._names[places] = name
        return name

    def example(self, places: Conjunction) -> str | None:
        """A short value that obeys all of these schemas, written out; None where none is known."""
        try:
            return self._notation.written(ShortValues(self._alternatives, self._notation.is_narrow).of(places))
        except NoShortValue:
            return None

    def is_possible(self, places: Conjunction) -> bool:
        """Whether some value obeys all of these schemas."""
        return self._alternatives.is_possible(places)

    def _options(self, places: Conjunction) -> list[str]:
        """The alternatives of a conjunction, in Lark."""
        options: list[str] = []
        constants: list[Any] = []
        reasons: list[str] = []
        for facets in self._alternatives.of(places) if self.is_possible(places) else ():
            if facets.constants is not None:
                constants += facets.constants
                continue
            before = len(options)
            options += self._by_kind(facets, places, reasons)
            if facets.inexact and len(options) > before:
                self.inexact += facets.inexact
        options = self._constants(constants, places) + options
        if not options:
            place, reason = self._alternatives.reason(places)
            place.refuse(reasons[0] if reasons else reason)
        return options

    def _by_kind(self, facets: Facets, places: Conjunction, reasons: list[str]) -> list[str]:
        """The alternatives of each kind that facets allow; why there is none is added to `reasons`."""
        kinds = facets.kinds
        if self._notation.is_narrow and facets.spoken and not facets.spoken.issuperset(KINDS):
            kinds = kinds & facets.spoken or kinds
        if kinds.issuperset(KINDS) and not facets.spoken and not facets.excluded:
            return [self._notation.anything(self._rules)]
        excluded = {canonical(value) for value in facets.excluded}
        words: list[tuple[str, bool | None]] = [("null", None)] if "null" in kinds else []
        words += [("true", True), ("false", False)] if "boolean" in kinds else []
        options = [f'"{word}"' for word, value in words if canonical(value) not in excluded]
        if any(kinds_of(value) in kinds & _STRUCTURED for value in facets.excluded):
            self.inexact.append(places[0])
        for kind, write in (
            ("number", self._number),
            ("string", self._text),
            ("array", self._array),
            ("object", self._object),
        ):
            if kind in kinds or (kind == "number" and not kinds.isdisjoint({"whole", "fraction"})):
                try:
                    options.append(write(facets))
                except (NoNumber, NotWritten) as error:
                    reasons.append(str(error))
        return options

    # ---- constants, numbers, strings --------------------------------------------------------------------------------

    def _constants(self, values: list[Any], places: Conjunction) -> list[str]:
        """The alternatives of constants, each there once."""
        values = list({canonical(value): value for value in values}.values())
        options: list[str] = []
        texts: list[str] = []
        for value in values:
            self._check_texts(value, places)
            if isinstance(value, str):
                texts.append(value)
            else:
                options.append(self._notation.constant(value))
        return options + ([self._notation.constants(self._rules, texts)] if texts else [])

    def _check_texts(self, value: Any, places: Conjunction) -> None:
        if isinstance(value, str):
            if not self._notation.can_write(value):
                places[0].refuse(f"the text {value[:80]!r} has a lone surrogate or spells a control token; change it")
        elif isinstance(value, list):
            for inner in value:
                self._check_texts(inner, places)
        elif isinstance(value, dict):
            for name, inner in value.items():
                self._check_texts(name, places)
                self._check_texts(inner, places)
        elif isinstance(value, int) and abs(value) >= 10**300:
            places[0].refuse(f"the number {short(value)[:40]}… has more than 300 digits")

    def _number(self, facets: Facets) -> str:
        if not facets.formats:
            return number_rule(self._rules, facets)
        narrowed = facets.copy()
        for form in facets.formats:
            for bound in WHOLE_FORMATS.get(form, ()):
                narrowed.add_bound(Decimal(bound), is_low=bound <= 0)
        return number_rule(self._rules, narrowed)

    def _text(self, facets: Facets) -> str:
        if facets.contents:
            inner = ValueWriter(self._rules, self._notation.inner)
            rule = inner.rule(tuple(facets.contents))
            self.inexact += inner.inexact
            return self._notation.json_text(self._rules, rule)
        node = text_node(self._rules, facets)
        place = facets.patterns[0][2] if facets.patterns else facets.sources[0]
        if not has_text(node, place):
            raise NotWritten("no text has the length, the pattern and the format together")
        return self._notation.text(self._rules, node)

    # ---- arrays -----------------------------------------------------------------------------------------------------

    def _array(self, facets: Facets) -> str:
        low, high = facets.fewest_items, facets.most_items
        count = facets.prefix_length()
        if count > MAX_PREFIX:
            facets.sources[0].refuse(f"{count} items have schemas of their own, more than the {MAX_PREFIX} allowed")
        for index in range(count + 1):
            if (high is None or index < high) and not self.is_possible(facets.item(index)):
                high = index
        if high is not None and high < low:
            raise NotWritten(f"at least {low} items are asked for and at most {high} possible")
        if facets.is_unique and (high is None or high > 1):
            body = self._set(facets, low, high) if not count else None
            if body is not None:
                return self._rules.rule(f'"[" {body} "]"')
            self.inexact.append(facets.sources[0])
        prefix = [self._item(facets, index) for index in range(count if high is None else min(count, high))]
        rest = self._item(facets, count) if high is None or high > count else ""
        return self._rules.rule(f'"[" {self._items(prefix, rest, low, high)} "]"')

    def _item(self, facets: Facets, index: int) -> str:
        places = facets.item(index)
        return self.rule(places) if places else self._notation.anything(self._rules)

    def _items(self, prefix: list[str], rest: str, low: int, high: int | None) -> str:
        """The body of a list that begins with the items of a prefix and goes on with the rest."""
        comma, count = self._notation.comma, len(prefix)
        tail = ""
        if rest and not count:
            more = f"({comma} {rest}){{{max(low - 1, 0)},{'' if high is None else high - 1}}}" if high != 1 else ""
            return f"{rest} {more}" if low else f"({rest} {more})?"
        if rest:
            tail = f"({comma} {rest}){{{max(low - count, 0)},{'' if high is None else high - count}}}"
        for index in range(count - 1, -1, -1):
            body = f"{prefix[index]} {tail}" if index == 0 else f"{comma} {prefix[index]} {tail}"
            if index >= low:
                tail = f"({body})?"
            elif index:
                tail = self._rules.rule(body)
            else:
                tail = body
            if index % 16 == 15 and index >= low:
                tail = self._rules.rule(tail)
        return tail

    def _set(self, facets: Facets, low: int, high: int | None) -> str | None:
        """The body of a list of different values, where there are finitely many; else None."""
        values = self._finite(facets.item(0))
        if values is None:
            return None
        rules = [option for value in values for option in self._constants([value], facets.item(0))]
        names = [self._rules.rule(rule) for rule in rules]
        if len(names) <= _BITS:
            return subset_body(self._rules, self._notation.comma, names, (low, high))
        elements = [ListElement(name) for name in names]
        if low <= 1 and (high is None or high >= len(names)):
            body, _ = list_body(self._rules, self._notation.comma, elements)
            return body if low else f"({body})?"
        return counted_body(self._rules, self._notation.comma, elements, "", (low, high))

    def _finite(self, places: Conjunction) -> list[Any] | None:
        """The values of a conjunction, where they are constants."""
        if not places:
            return None
        values: list[Any] = []
        for facets in self._alternatives.of(places):
            if facets.constants is not None:
                values += facets.constants
            elif facets.kinds <= {"null", "boolean"} and not facets.excluded:
                values += [None] if "null" in facets.kinds else []
                values += [True, False] if "boolean" in facets.kinds else []
            else:
                return None
        return list({canonical(value): value for value in values}.values())

    # ---- objects ----------------------------------------------------------------------------------------------------

    def _object(self, facets: Facets) -> str:
        names, key_node = self._keys(facets)
        elements: list[ListElement] = []
        for name in names:
            places = self._alternatives.field(facets, name)
            is_required = name in facets.required
            is_allowed = self.is_possible(places) and all(is_valid(name, place) for place in facets.names)
            if not is_allowed and is_required:
                raise NotWritten(f"the key {name[:80]!r} is required and not allowed")
            if is_allowed:
                self._check_texts(name, tuple(facets.sources))
                value = self.rule(places) if places else self._notation.anything(self._rules)
                elements.append(ListElement(self._rules.rule(f"{self._notation.key(name)} {value}"), is_required))
        low, high = facets.fewest_fields, facets.most_fields
        others = self._others(facets, names, key_node, low) if key_node.least < NEVER else ""
        body = self._fields(elements, others, low, high)
        return self._rules.rule(f'"{{" {body} "}}"')

    def _fields(self, elements: list[ListElement], others: str, low: int, high: int | None) -> str:
        """The body of an object: the fields that are named, and others behind them."""
        comma = self._notation.comma
        required = sum(element.is_required for element in elements)
        is_counted = low > max(1, required) or (high is not None and (bool(others) or high < len(elements)))
        if is_counted:
            return counted_body(self._rules, comma, elements, others, (low, high))
        body, may_be_none = list_body(self._rules, comma, elements, others)
        if not body:
            if low:
                raise NotWritten(f"at least {low} fields are asked for and none possible")
            return ""
        return f"({body})?" if may_be_none and not low else body

    def _keys(self, facets: Facets) -> tuple[list[str], Expression]:
        """The keys that are named, in their order, and the expression of the others."""
        names = facets.field_names()
        node = ANYTHING if not self._notation.is_narrow or facets.is_open() or not names else NOTHING
        for place in facets.names:
            listed = self._finite((place,))
            if listed is not None:
                names += [name for name in listed if isinstance(name, str) and name not in names]
                node = NOTHING
            else:
                node = both([node, self._names_node(place)])
        if self._notation.is_narrow:
            names.sort(key=str.lower)  # as the template's `dictsort`
        return names, node

    def _names_node(self, place: Place) -> Expression:
        """The keys that a schema of keys allows."""
        nodes = []
        for facets in self._alternatives.of((place,)):
            self.inexact += facets.inexact
            if facets.constants is not None:
                nodes += [literal(value) for value in facets.constants if isinstance(value, str)]
            elif "string" in facets.kinds:
                nodes.append(text_node(self._rules, facets))
        return either(nodes)

    def _others(self, facets: Facets, names: list[str], key_node: Expression, low: int) -> str:
        """A field that may come behind those that are named, in Lark; "" where none may."""
        classes: list[tuple[Expression, str]] = []
        for patterns, node in self._classes(facets):
            node = both([key_node, node])
            places = facets.value(None, patterns)
            if not self.is_possible(places) or not has_text(node, facets.sources[0]):
                continue
            classes.append((node, self.rule(places) if places else self._notation.anything(self._rules)))
        if not classes:
            return ""
        if low > 1:  # one key may be counted twice
            self.inexact.append(facets.sources[0])
        keys = ((key, value) for node, value in classes for key in self._notation.other_key(self._rules, node, names))
        return self._rules.choice(f"{key} {value}" for key, value in keys)

    def _classes(self, facets: Facets) -> list[tuple[frozenset[str], Expression]]:
        """The sets of patterns that one key may have together, and the keys of each set."""
        patterns = facets.field_patterns()
        owner = {pattern: place for layer in facets.fields for pattern, place in layer.patterned}
        nodes = {pattern: pattern_node(self._rules, pattern, owner[pattern]) for pattern in patterns}
        sets = [frozenset[str]()]
        if len(patterns) <= _PATTERNS_TOGETHER:
            for pattern in patterns:
                sets += [others | {pattern} for others in sets]
        else:  # narrower: no key has two
            sets += [frozenset({pattern}) for pattern in patterns]
        return [
            (chosen, both([node if pattern in chosen else other_than(node) for pattern, node in nodes.items()]))
            for chosen in sets
        ]
