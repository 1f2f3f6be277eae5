"""Tools to a grammar: an answer in free text, or tool calls whose arguments obey the tools' schemas.

What is allowed is what `chat.parse_ids` reads back, in Gemma's own notation and without white space: keys bare, or
between two `<|"|>` where they hold marks of the notation; strings between two `<|"|>`. **Narrower than the schema,
never wider**: keys come sorted, as the templates write those of declarations and past calls; keys that it does not name
only where `additionalProperties` asks for them, or where it names none; numbers have so few digits that reading them as
floats cannot carry them past a bound; `pattern` means the texts that ECMA's regular expressions and Python's both
accept. Values of any type are nested four levels deep at most.

Control tokens are in the grammar by name: only the real ones open and close calls and strings. Deliberately absent:
thoughts, text behind calls, schemas that refer to themselves, and keywords that cannot be guaranteed: each is refused
by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from sfumato.errors import InputError
from sfumato.text.messages import MAX_DEPTH, check_tools

MAX_LENGTH = 100_000
"""What minLength, minItems and maxItems may be."""
MAX_VALUES = 10_000
"""Values of one enum."""

_ANNOTATIONS = {
    *("$anchor", "$comment", "$id", "$schema", "id", "title", "description", "default", "example", "examples"),
    *("readOnly", "writeOnly", "deprecated", "contentMediaType", "contentEncoding", "$defs", "definitions"),
}
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
_ALONE = ("$ref", "anyOf", "allOf", "const", "enum")
_KEYWORDS = {*_ANNOTATIONS, *_ALONE, *(word for words in _OF_TYPE.values() for word in words), "type", "nullable"}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_ALL = frozenset(_TYPES)

_ANY_LEVELS = 4
_QUOTE = '<|"|>'
_CONTROL = re.compile(r"<\|[^<>]*>|<[^<>]*\|>|<(?:bos|eos|pad|unk)>")
"""What the checkpoints' control tokens look like: the library would take such text for the token itself."""

_INTEGER = "0|[1-9][0-9]{0,18}"
_DECIMAL = r"0(\.[0-9]{1,15})?|[1-9][0-9]{0,8}(\.[0-9]{1,6})?|[1-9][0-9]{9,18}"
"""At most 15 digits where there is a fraction: two such numbers are never the same float."""
_ANY_NUMBER = rf"/-?({_DECIMAL})([eE][+-]?[0-9]{{1,2}})?/"

_DATE = (
    r"(?:[1-9]\d{3}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"|(?:[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_IN_URI = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
_FORMATS = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL})+",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,3}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "time": _TIME,
    "uri": rf"[a-z][a-z0-9+.-]*://{_LABEL}(?:\.{_LABEL})*(?::\d{{1,4}})?(?:/{_IN_URI})?(?:\?{_IN_URI})?(?:#{_IN_URI})?",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
FORMATS = tuple(_FORMATS)
"""Values of `format` that are enforced; others are refused."""


def grammar(tools: Sequence[Mapping[str, Any]], must_call: bool = False) -> str:
    """The Lark grammar of an answer to a prompt with these tools (as `chat.check_tools` takes them): free text without
    control tokens, at least a character of it, or free text, possibly none, and calls behind it. `must_call`: calls
    alone.

    An InputError names the tool and the place in its schema that cannot be guaranteed.
    """
    checked = check_tools(tools)
    if not checked:
        raise InputError("a grammar of calls needs at least one tool; give tools, or leave strict out")
    writer = _Writer()
    heads: dict[str, str] = {}
    for tool in checked:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters")
        if name in heads:
            raise InputError(f"two tools are called {name!r}; give each a name of its own")
        if not _is_bare(name) or name.split() != [name] or _CONTROL.search(name):
            raise InputError(f"the tool name {name!r} cannot be called; use letters, digits and underscores")
        heads[name] = f"{_literal('call:' + name)} {writer.arguments(name, parameters)}"
    call = writer.rule(f"<|tool_call> ({' | '.join(heads.values())}) <tool_call|>")
    start = [f"start: {call}+"] if must_call else [f"start: FREE | FREE? {call}+", "FREE: /(?s:.+)/"]
    return "\n".join([*writer.lines(), *start, ""])


class _Writer:
    """Rules and terminals, each written once; a value of a schema is a rule."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # body -> name
        self._heights: dict[str, int] = {}  # of a value's rule: the lists and records within each other
        self._made: dict[tuple[str, frozenset[str]], str] = {}  # (pointer, types) -> rule
        self._under_way: list[str] = []
        self._hints: dict[str, None] = {}
        self._tool = ""
        self._root: Any = None

    def lines(self) -> list[str]:
        """Before the rules, in a comment, what patterns are made of: a search for short texts learns it from there."""
        return [f"// {' '.join(self._hints)[:900]}", *(f"{name}: {body}" for body, name in self._names.items())]

    def rule(self, body: str, height: int = 0) -> str:
        name = self._names.setdefault(body, f"v{len(self._names)}")
        self._heights[name] = max(height, self._heights.get(name, 0))
        return name

    def terminal(self, body: str) -> str:
        return self._names.setdefault(body, f"T{len(self._names)}")

    def arguments(self, tool: str, schema: Any) -> str:
        """The rule of all arguments of one tool."""
        self._tool, self._root, self._made, self._under_way = tool, schema, {}, []
        if not schema or schema == {"type": "object"}:
            schema = {"type": "object", "properties": {}}
        rule = self.value(schema, "", frozenset(["object"]))
        if self._heights[rule] > MAX_DEPTH:
            raise InputError(f"the arguments of tool {tool!r} nest deeper than the {MAX_DEPTH} levels allowed")
        return rule

    def refuse(self, at: str, what: str) -> NoReturn:
        raise InputError(f"{what}, at {at[:300] or 'the top'} of the parameters of tool {self._tool!r}")

    # ---- schemas --------------------------------------------------------------------------------------------------

    def value(self, schema: Any, at: str, types: frozenset[str] = _ALL) -> str:
        """The rule of the values that a schema allows, of these types only."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            self.refuse(at, "a schema that allows nothing" if schema is False else f"no schema but {_short(schema)}")
        for word in schema:
            if word not in _KEYWORDS:
                self.refuse(
                    f"{at}/{_escaped(word)}", f"the schema keyword {word[:80]!r} is not supported; leave it out"
                )
        types = self._types(schema, at, types)
        alone = [word for word in _ALONE if word in schema]
        if alone:
            beside = sorted({*schema} - _ANNOTATIONS - {alone[0], "type", "nullable"})
            if beside:
                self.refuse(at, f"{alone[0]} together with {beside[0]} is not supported; write it as one of them")
            options = self._whole(alone[0], schema[alone[0]], f"{at}/{alone[0]}", types)
        else:
            options = self._by_type(schema, at, types)
        if schema.get("nullable") is True:
            options = [*options, '"null"']
        if not options:
            self.refuse(at, "no value is allowed")
        options = list(dict.fromkeys(options))
        height = max(self._heights.get(option, 0) for option in options)
        return (
            options[0] if options[0] in self._heights and len(options) == 1 else self.rule(" | ".join(options), height)
        )

    def _types(self, schema: dict[str, Any], at: str, types: frozenset[str]) -> frozenset[str]:
        given = schema.get("type", [])
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or any(one not in _TYPES for one in given):
            self.refuse(f"{at}/type", f"the type {_short(schema['type'])} is unknown; choose from {', '.join(_TYPES)}")
        if not isinstance(schema.get("nullable", False), bool):
            self.refuse(f"{at}/nullable", "nullable is true or false")
        if "type" in schema:
            return types & (frozenset(given) | {"integer" if "number" in given else ""})
        if not any(word in schema for word in _ALONE):  # what the keywords speak of; others stay unwritten
            given = [kind for kind, words in _OF_TYPE.items() if any(word in schema for word in words)]
            return types & frozenset([*given, *(["integer"] if "number" in given else [])] or _ALL)
        return types

    def _whole(self, word: str, value: Any, at: str, types: frozenset[str]) -> list[str]:
        """Keywords that stand alone."""
        if word == "$ref":
            return [self._reference(value, at, types)]
        if word == "const":
            return self._constants([value], at, types)
        if not isinstance(value, list) or not value:
            self.refuse(at, f"{word} is a list of at least one")
        if word == "enum":
            return self._constants(value, at, types)
        if word == "allOf" and len(value) > 1:
            self.refuse(at, "allOf of more than one schema is not supported; join them")
        found = []
        for number, schema in enumerate(value):
            inner = self._types(schema, f"{at}/{number}", types) if isinstance(schema, dict) else types
            if inner or len(value) == 1:  # a branch of other types than those allowed beside it can never hold
                found.append(self.value(schema, f"{at}/{number}", types))
        return found

    def _reference(self, value: Any, at: str, types: frozenset[str]) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            self.refuse(at, f"the $ref {_short(value)} is not within the schema; copy what it names into $defs")
        schema = self._root
        for part in value.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and part.isdecimal() and int(part) < len(schema):
                schema = schema[int(part)]
            elif isinstance(schema, dict) and part in schema:
                schema = schema[part]
            else:
                self.refuse(at, f"the $ref {_short(value)} leads nowhere; give a place within the schema")
        if value in self._under_way:
            self.refuse(
                at, f"the $ref {_short(value)} leads back to itself, which is not supported; nest what is needed"
            )
        if (value, types) not in self._made:
            self._under_way.append(value)
            self._made[value, types] = self.value(schema, value[1:], types)
            self._under_way.pop()
        return self._made[value, types]

    def _by_type(self, schema: dict[str, Any], at: str, types: frozenset[str]) -> list[str]:
        if types == _ALL and not any(word in schema for words in _OF_TYPE.values() for word in words):
            return [self._any(_ANY_LEVELS)]
        options = []
        if "null" in types:
            options.append('"null"')
        if "boolean" in types:
            options += ['"true"', '"false"']
        if "integer" in types:
            options.append(self._number(schema, at, is_whole="number" not in types))
        if "string" in types:
            options.append(self._string(schema, at))
        if "array" in types:
            options.append(self._array(schema, at))
        if "object" in types:
            options.append(self._object(schema, at))
        return options

    def _any(self, levels: int) -> str:
        """The rule of a value of any type, so many lists and records deep at most."""
        text, number = self.terminal("/(?s:.*)/"), self.terminal(_ANY_NUMBER)
        options = f'"null" | "true" | "false" | {number} | {_QUOTE} {text} {_QUOTE}'
        if not levels:
            return self.rule(options)
        inner = self._any(levels - 1)
        key = self._extra_key([])
        return self.rule(
            f'{options} | "[" ({inner} ("," {inner})*)? "]" | "{{" ({key} {inner} ("," {key} {inner})*)? "}}"', levels
        )

    def _array(self, schema: dict[str, Any], at: str) -> str:
        low = self._count(schema, "minItems", at, MAX_LENGTH) or 0
        high = self._count(schema, "maxItems", at, MAX_LENGTH)
        if high is not None and high < low:
            self.refuse(at, f"minItems {low} is above maxItems {high}")
        if high == 0:
            return self.rule('"[" "]"', 1)
        items = schema.get("items", True)
        inner = self.value(items, f"{at}/items") if items is not True and items != {} else self._any(_ANY_LEVELS - 1)
        more = f'("," {inner}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}' if high != 1 else ""
        body = f"{inner} {more}" if low else f"({inner} {more})?"
        return self.rule(f'"[" {body} "]"', 1 + self._heights[inner])

    def _object(self, schema: dict[str, Any], at: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            self.refuse(f"{at}/properties", "properties is an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            self.refuse(f"{at}/required", "required is a list of keys")
        others = schema.get("additionalProperties", not properties and "properties" not in schema and not required)
        pairs: list[tuple[str, str, bool]] = []  # (key, its value's rule, whether it is required), in order
        for name in sorted(dict.fromkeys([*properties, *required]), key=str.lower):  # as the template's `dictsort`
            if name in properties:
                inner, there = properties[name], f"{at}/properties/{_escaped(name)}"
            else:
                inner, there = schema.get("additionalProperties", True), f"{at}/required"
                if inner is False:
                    self.refuse(there, f"the key {name[:80]!r} is required and not allowed")
            if inner is not False or name in required:
                pairs.append((self._key(name, there), self.value(inner, there), name in required))
        rules = [rule for _, rule, _ in pairs]
        tail, first_other = "", ""
        if others is not False:
            key = self._extra_key([name for name in properties if _is_bare(name)])
            there = f"{at}/additionalProperties"
            rule = self._any(_ANY_LEVELS - 1) if others is True or others == {} else self.value(others, there)
            tail, first_other = f'("," {key} {rule})*', f'{key} {rule} ("," {key} {rule})*'
            rules.append(rule)
        heads: list[str] = []  # from the last: the ways to begin with each key, as long as none before it is required
        for key, rule, is_required in reversed(pairs):
            head = f"{key} {rule} {tail}".strip()
            heads = [head] if is_required else [head, *heads]
            tail = self.rule(f'"," {head}' if is_required else f'"," {head} | {tail}' if tail else f'("," {head})?')
        if first_other and not any(is_required for *_, is_required in pairs):
            heads.append(first_other)
        if not heads:
            body = ""
        elif any(is_required for *_, is_required in pairs):
            body = f"({' | '.join(heads)}) "
        else:
            body = f"({' | '.join(heads)})? "
        return self.rule(f'"{{" {body}"}}"', 1 + max((self._heights[rule] for rule in rules), default=0))

    def _key(self, name: str, at: str) -> str:
        """A key and its colon."""
        if _CONTROL.search(name):
            self.refuse(at, f"the key {name[:80]!r} spells a control token; rename it")
        if _is_bare(name):
            return _literal(f"{name}:")
        return f'{_QUOTE} {_literal(name)} {_QUOTE} ":"' if name else f'{_QUOTE} {_QUOTE} ":"'

    def _extra_key(self, taken: Iterable[str]) -> str:
        """A key that the schema does not name, and its colon."""
        names = " | ".join(_literal(name) for name in taken)
        key = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
        return f'{self.terminal(f"{key} & ~({names})" if names else key)} ":"'

    # ---- what is not nested ---------------------------------------------------------------------------------------

    def _constants(self, values: list[Any], at: str, types: frozenset[str]) -> list[str]:
        if len(values) > MAX_VALUES:
            self.refuse(at, f"an enum of {len(values)} values, more than the {MAX_VALUES} allowed")
        values = [value for value in values if not types.isdisjoint(_types_of(value))]
        texts = [value for value in values if isinstance(value, str) and value]
        found = [self._constant(value, at) for value in values if not (isinstance(value, str) and value)]
        for text in texts:
            self._check_text(text, at)
        if texts:
            words = self.terminal(" | ".join(dict.fromkeys(map(_literal, texts))))
            found.append(self.rule(f"{_QUOTE} {words} {_QUOTE}"))
        return found

    def _constant(self, value: Any, at: str) -> str:
        if isinstance(value, str):
            self._check_text(value, at)
            return self.rule(f"{_QUOTE} {_literal(value) if value else ''} {_QUOTE}")
        if isinstance(value, dict):
            pairs = [(self._key(key, at), self._constant(one, at)) for key, one in value.items()]
            body = ' "," '.join(f"{key} {rule}" for key, rule in pairs)
            return self.rule(f'"{{" {body} "}}"', 1 + max((self._heights[rule] for _, rule in pairs), default=0))
        if isinstance(value, list):
            rules = [self._constant(one, at) for one in value]
            body = ' "," '.join(rules)
            return self.rule(f'"[" {body} "]"', 1 + max((self._heights[rule] for rule in rules), default=0))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if abs(value) > _MOST or value != value or len(str(value)) > 300:
                self.refuse(at, f"the number {_short(value)} cannot be written")
            return self.rule(_literal(str(value)))
        return self.rule(_literal(json.dumps(value)))

    def _check_text(self, text: str, at: str) -> None:
        if _CONTROL.search(text):
            self.refuse(at, f"the text {text[:80]!r} spells a control token; change it")
        if re.search("[\ud800-\udfff]", text):
            self.refuse(at, f"the text {text[:80]!r} has a lone surrogate; remove it")

    def _count(self, schema: dict[str, Any], word: str, at: str, most: int) -> int | None:
        value = schema.get(word)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            self.refuse(f"{at}/{word}", f"{word} is {_short(value)}; give a whole number from 0 to {most}")
        return value

    def _string(self, schema: dict[str, Any], at: str) -> str:
        low = self._count(schema, "minLength", at, MAX_LENGTH) or 0
        high = self._count(schema, "maxLength", at, 1 << 60)
        if high is not None and high < low:
            self.refuse(at, f"minLength {low} is above maxLength {high}")
        high = high if high is None or high < 10 * MAX_LENGTH else 10 * MAX_LENGTH
        parts = []
        if "pattern" in schema:
            parts.append(f"/{self._pattern(schema['pattern'], f'{at}/pattern')}/")
        if "format" in schema:
            form = schema["format"]
            if not isinstance(form, str) or form not in _FORMATS:
                self.refuse(
                    f"{at}/format", f"the format {_short(form)} is not supported; choose from {', '.join(FORMATS)}"
                )
            parts.append(f"/{self._pattern(f'^(?:{_FORMATS[form]})$', at)}/")
        if low or high is not None or not parts:
            length = "*" if not low and high is None else f"{{{low},{'' if high is None else high}}}"
            parts.append(f"/(?s:.{length})/")
        if high == 0:
            return self.rule(f"{_QUOTE} {_QUOTE}")
        return self.rule(f"{_QUOTE} {self.terminal(' & '.join(parts))} {_QUOTE}")

    def _pattern(self, pattern: Any, at: str) -> str:
        if not isinstance(pattern, str):
            self.refuse(at, f"a pattern is text, not {_short(pattern)}")
        self._hints |= dict.fromkeys(re.findall(r"[^\W_]+|[^\w\s\\^$()\[\]{}|*+?]|_", pattern))
        try:
            return _Pattern(pattern).whole()
        except _NotSupported as error:
            self.refuse(at, f"the pattern {pattern[:80]!r} has {error}, which is not supported; write it without")

    def _number(self, schema: dict[str, Any], at: str, is_whole: bool) -> str:
        """Digits between the bounds, without an exponent; with one where there are no bounds and fractions may be."""
        low, high = self._bound(schema, "inimum", at), self._bound(schema, "aximum", at)
        form = _INTEGER if is_whole else _DECIMAL
        if low is None and high is None:
            return self.rule(self.terminal(f"/-?({form})/" if is_whole else _ANY_NUMBER))
        if is_whole:  # the whole number that is the first, or the last, within
            low = low and _whole_bound(low, upwards=True)
            high = high and _whole_bound(high, upwards=False)
        options = []
        above = _between(low, high)
        below = _between(_minus(high), _minus(low)) if low is None or low[0] < 0 else None
        if above is not None:
            options.append(f"{self.terminal(f'/{form}/ & {above}' if above else f'/{form}/')}")
        if below is not None:
            positive = f"/{form}/ & {below}" if below else f"/{form}/"
            options.append(self.terminal(f'"-" ({positive})'))
        if (low and high and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1])))) or not options:
            self.refuse(at, "no number lies between the bounds")
        return self.rule(" | ".join(options))

    def _bound(self, schema: dict[str, Any], word: str, at: str) -> _Bound:
        """The narrower of the inclusive and the exclusive bound."""
        found: _Bound = None
        for name, is_strict in ((f"m{word}", False), (f"exclusiveM{word}", True)):
            value = schema.get(name)
            if value is None:
                continue
            is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            if isinstance(value, bool) or not is_number or abs(value) > _MOST:
                self.refuse(f"{at}/{name}", f"{name} is {_short(value)}; give a number")
            new = (Decimal(str(value)), is_strict)
            if found is None or (new[0] > found[0]) == (word == "inimum") or new[0] == found[0]:
                found = new
        if found is not None and abs(found[0]) >= Decimal(10) ** 19:
            if (found[0] > 0) == (word == "inimum"):
                self.refuse(at, f"a m{word} of {found[0]:.3e} is beyond the 19 digits that are written")
            return None
        return found


_Bound = tuple[Decimal, bool] | None
_MOST = 10**300
"""A bound may be: what a float holds."""
"""A bound and whether it is itself outside."""


def _whole_bound(bound: tuple[Decimal, bool], upwards: bool) -> tuple[Decimal, bool]:
    value, is_strict = bound
    whole = Decimal(math.ceil(value) if upwards else math.floor(value))
    if is_strict and whole == value:
        whole += 1 if upwards else -1
    return whole, False


def _minus(bound: _Bound) -> _Bound:
    return bound and (-bound[0], bound[1])


def _between(low: _Bound, high: _Bound) -> str | None:
    """Terminals for numbers without a sign between the bounds, joined by &; "" for all of them, None for none."""
    if high is not None and (high[0] < 0 or high == (0, True)):
        return None
    parts = []
    if low is not None and (low[0] > 0 or low == (0, True)):
        parts.append(f"/{_at_least(*low)}/")
    if high is not None:
        parts.append(f"/{_at_most(*high)}/")
    return " & ".join(parts)


def _digits(bound: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{bound:f}".partition(".")
    return whole.lstrip("0") or "0", fraction.rstrip("0")


_REST = r"(\.[0-9]+)?"


def _at_least(bound: Decimal, is_strict: bool) -> str:
    """A regex of the decimal numbers from `bound` (not negative) up: they have more digits than it, or a greater one
    at the first place where they differ, or nothing but its digits to begin with."""
    whole, fraction = _digits(bound)
    options = [f"[1-9][0-9]{{{len(whole)},}}{_REST}"]
    for at, digit in enumerate(whole):
        if digit < "9":
            options.append(f"{whole[:at]}[{int(digit) + 1}-9][0-9]{{{len(whole) - at - 1}}}{_REST}")
    for at, digit in enumerate(fraction):
        if digit < "9":
            options.append(rf"{whole}\.{fraction[:at]}[{int(digit) + 1}-9][0-9]*")
    if is_strict:
        options.append(rf"{whole}\.{fraction}[0-9]*[1-9][0-9]*")
    else:
        options.append(rf"{whole}\.{fraction}[0-9]*" if fraction else f"{whole}{_REST}")
    return "|".join(options)


def _at_most(bound: Decimal, is_strict: bool) -> str:
    """The same from 0 up to `bound`."""
    whole, fraction = _digits(bound)
    options = []
    if len(whole) > 1:
        options.append(f"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){_REST}")
    for at, digit in enumerate(whole):
        first = "1" if at == 0 and len(whole) > 1 else "0"
        if digit > first:
            options.append(f"{whole[:at]}[{first}-{int(digit) - 1}][0-9]{{{len(whole) - at - 1}}}{_REST}")
    for at, digit in enumerate(fraction):
        options.append(rf"{whole}\.{fraction[:at]}" if at else whole)
        if digit > "0":
            options.append(rf"{whole}\.{fraction[:at]}[0-{int(digit) - 1}][0-9]*")
    if not is_strict:
        options.append(rf"{whole}\.{fraction}0*" if fraction else rf"{whole}(\.0+)?")
    return "|".join(options)


def _is_bare(key: str) -> bool:
    """Whether the parser reads this text as one word."""
    return bool(key) and key == key.strip() and not any(mark in key for mark in "{}[]:,")


def _types_of(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, (int, float)):
        is_whole = isinstance(value, int) or value.is_integer()
        return {"integer", "number"} if is_whole else {"number"}
    return {{str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _short(value: Any) -> str:
    return repr(value)[:80]


# ---- regular expressions ---------------------------------------------------------------------------------------------


class _NotSupported(Exception):
    pass


class _Pattern:
    """A pattern of JSON Schema, which looks anywhere in a text, as a regex of llguidance's for whole texts.

    Classes mean what both ECMA and Python accept: ASCII where they allow, all of Unicode where they exclude.
    """

    _IN = {  # noqa: RUF012
        "d": "0-9", "D": r"\D", "w": "A-Za-z0-9_", "W": r"[^\w\p{N}]", "s": r" \t\n\r\x0b\x0c",
        "S": r"[^\s\x1c-\x1f\x{feff}]",
    }  # fmt: skip
    _OUT = {  # noqa: RUF012
        "d": r"\d", "D": "[^0-9]", "w": r"\w\p{N}", "W": "[^A-Za-z0-9_]", "s": r"\s\x1c-\x1f\x{feff}",
        "S": r"[^ \t\n\r\x0b\x0c]",
    }  # fmt: skip
    _CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}  # noqa: RUF012
    _QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")
    _CODE = re.compile(r"u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})")
    _PROPERTY = re.compile(r"[pP]\{[A-Za-z_=]+\}")
    _GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_]\w*>|(?!\?))")

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> str:
        branches: list[list[str]] = [[]]
        depth, is_repeated = 0, False
        while self._at < len(self._text):
            here = self._text[self._at]
            branch = branches[-1]
            if match := self._QUANTIFIER.match(self._text, self._at):
                if is_repeated or not branch or branch[-1] in ("(?:", "^", "$", "|"):
                    raise _NotSupported(f"the repetition {match.group()!r} of nothing")
                branch.append(match.group())
                self._at = match.end() + (self._text[match.end() : match.end() + 1] == "?")
                is_repeated = True
                continue
            is_repeated = False
            if here == "(":
                group = self._GROUP.match(self._text, self._at)
                if group is None:
                    raise _NotSupported(f"the group {self._text[self._at : self._at + 4]!r}…")
                branch.append("(?:")
                self._at, depth = group.end(), depth + 1
                continue
            self._at += 1
            if here == ")":
                depth -= 1
                branch.append(")")
            elif here == "|" and not depth:
                branches.append([])
            elif here in "|^$":
                branch.append(here)
            elif here == ".":
                branch.append(r"[^\n\r\x{2028}\x{2029}]")
            elif here == "[":
                branch.append(self._class())
            elif here == "\\":
                found = self._escape()
                branch.append(_character(found) if len(found) == 1 else f"[{self._set(found, self._IN)}]")
            else:
                branch.append(_character(here))
            if depth < 0:
                raise _NotSupported("a ) without its (")
        if depth:
            raise _NotSupported("a ( without its )")
        return "|".join(map(self._anchored, branches))

    @staticmethod
    def _anchored(branch: list[str]) -> str:
        before = after = "(?s:.*)"
        if branch[:1] == ["^"]:
            before, branch = "", branch[1:]
        if branch[-1:] == ["$"]:
            after, branch = "", branch[:-1]
        if "^" in branch or "$" in branch:
            raise _NotSupported("a ^ or $ elsewhere than at an end")
        return f"{before}(?:{''.join(branch)}){after}"

    def _escape(self) -> str:
        """What a backslash makes: a character, a letter of `_IN` behind a backslash, or a property of Unicode."""
        rest = self._text[self._at : self._at + 1]
        if match := self._CODE.match(self._text, self._at):
            self._at = match.end()
            code = int(next(filter(None, match.groups())), 16)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise _NotSupported(f"the surrogate {match.group()!r}")
            return chr(code)
        if match := self._PROPERTY.match(self._text, self._at):
            self._at = match.end()
            return "\\" + match.group()
        self._at += 1
        if rest == "0" and self._text[self._at : self._at + 1].isdigit():
            raise _NotSupported("an octal escape")
        if rest in self._CHARACTERS:
            return self._CHARACTERS[rest]
        if rest in self._IN:
            return "\\" + rest
        if not rest or rest.isalnum():
            raise _NotSupported(f"the escape {chr(92) + rest!r}")
        return rest

    @staticmethod
    def _set(found: str, sets: Mapping[str, str]) -> str:
        return sets.get(found[1:], found)

    def _class(self) -> str:
        is_not = self._text[self._at : self._at + 1] == "^"
        self._at += is_not
        sets = self._OUT if is_not else self._IN
        items: list[str] = []
        while True:
            if self._at >= len(self._text):
                raise _NotSupported("a [ without its ]")
            here = self._text[self._at]
            self._at += 1
            if here == "]":
                break
            first = self._escape_in_class() if here == "\\" else here
            if len(first) > 1:
                items.append(self._set(first, sets))
                continue
            last = first
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 2
                last = self._text[self._at - 1]
                last = self._escape_in_class() if last == "\\" else last
                if len(last) > 1 or last < first:
                    raise _NotSupported("a range without an end")
            items.append(f"\\x{{{ord(first):x}}}" + (f"-\\x{{{ord(last):x}}}" if last != first else ""))
        if not items:
            raise _NotSupported("an empty class")
        return f"[{'^' if is_not else ''}{''.join(items)}]"

    def _escape_in_class(self) -> str:
        if self._text[self._at : self._at + 1] == "b":
            self._at += 1
            return "\b"
        return self._escape()


def _character(character: str) -> str:
    if character.isalnum() and character.isascii():
        return character
    return f"\\x{{{ord(character):x}}}"
