"""Tools to a grammar: an answer in free text, or tool calls whose arguments obey the tools' schemas.

The grammar allows what `replies.parse_ids` reads back, in Gemma's own notation (`rules`) and without white space.
**Narrower than the schema, never wider**: keys come sorted, as the templates write those of declarations and past
calls. Keys that the schema does not name come only where `additionalProperties` asks for them, or where it names none.
Numbers have so few digits that reading them as floats cannot carry them past a bound (`numbers`). A `pattern` means the
texts that ECMA's regular expressions and Python's both accept (`patterns`). Values of any type are nested four levels
deep at most.

Control tokens are in the grammar by name: only the real ones open and close calls and strings.

Deliberately absent: thoughts, text behind calls, schemas that refer to themselves, and keywords that cannot be
guaranteed: each is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.constraints.numbers import ANY_NUMBER, number_rule
from sfumato.constraints.rules import CONTROL_TOKEN, QUOTE, Place, RuleWriter, is_bare, key_of, literal, short
from sfumato.constraints.scalars import MAX_LENGTH, constant_rules, count_of, string_rule
from sfumato.errors import InputError
from sfumato.text.messages import MAX_DEPTH, check_tools

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
"""Lists and records within each other, in a value of any type."""


def tool_grammar(tools: Sequence[Mapping[str, Any]], must_call: bool = False) -> str:
    """The Lark grammar of an answer to a prompt with these tools (as `messages.check_tools` takes them).

    It allows free text without control tokens, at least one character of it; or free text, possibly none, and calls
    behind it. With `must_call` it allows calls alone. An InputError names the tool and the place in its schema that
    cannot be guaranteed.
    """
    checked = check_tools(tools)
    if not checked:
        raise InputError("a grammar of calls needs at least one tool; give tools, or leave strict out")
    rules = RuleWriter()
    calls: dict[str, str] = {}
    for tool in checked:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters")
        if name in calls:
            raise InputError(f"two tools are called {name!r}; give each a name of its own")
        if not is_bare(name) or name.split() != [name] or CONTROL_TOKEN.search(name):
            raise InputError(f"the tool name {name!r} cannot be called; use letters, digits and underscores")
        calls[name] = f"{literal('call:' + name)} {_Arguments(rules, name, parameters).rule()}"
    call = rules.rule(f"<|tool_call> ({' | '.join(calls.values())}) <tool_call|>")
    start = [f"start: {call}+"] if must_call else [f"start: FREE | FREE? {call}+", "FREE: /(?s:.+)/"]
    return "\n".join([*rules.lines(), *start, ""])


class _Arguments:
    """Writes the rules of the arguments of one tool; each value of a schema is a rule."""

    def __init__(self, rules: RuleWriter, tool: str, schema: Any) -> None:
        if not schema or schema == {"type": "object"}:
            schema = {"type": "object", "properties": {}}
        self._rules, self._tool, self._schema = rules, tool, schema
        self._references: dict[tuple[str, frozenset[str]], str] = {}  # (pointer, types) -> rule
        self._open_references: list[str] = []  # those whose rule is being written

    def rule(self) -> str:
        """The rule of all arguments."""
        rule = self._value(self._schema, Place(self._tool), frozenset(["object"]))
        if self._rules.height([rule]) > MAX_DEPTH:
            raise InputError(f"the arguments of tool {self._tool!r} nest deeper than the {MAX_DEPTH} levels allowed")
        return rule

    # ---- a schema of any kind ---------------------------------------------------------------------------------------

    def _value(self, schema: Any, place: Place, types: frozenset[str] = _ALL) -> str:
        """The rule of the values that a schema allows, of these types only."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            place.refuse("a schema that allows nothing" if schema is False else f"no schema but {short(schema)}")
        for word in schema:
            if word not in _KEYWORDS:
                place.at(word).refuse(f"the schema keyword {word[:80]!r} is not supported; leave it out")
        types = _types_allowed(schema, place, types)
        alone = [word for word in _ALONE if word in schema]
        if alone:
            beside = sorted({*schema} - _ANNOTATIONS - {alone[0], "type", "nullable"})
            if beside:
                place.refuse(f"{alone[0]} together with {beside[0]} is not supported; write it as one of them")
            options = self._standing_alone(alone[0], schema[alone[0]], place.at(alone[0]), types)
        else:
            options = self._by_type(schema, place, types)
        if schema.get("nullable") is True:
            options = [*options, '"null"']
        if not options:
            place.refuse("no value is allowed")
        return self._rules.choice(options)

    def _standing_alone(self, word: str, value: Any, place: Place, types: frozenset[str]) -> list[str]:
        """The alternatives of a keyword that stands alone."""
        if word == "$ref":
            return [self._reference(value, place, types)]
        if word == "const":
            return constant_rules(self._rules, [value], place, types)
        if not isinstance(value, list) or not value:
            place.refuse(f"{word} is a list of at least one")
        if word == "enum":
            return constant_rules(self._rules, value, place, types)
        if word == "allOf" and len(value) > 1:
            place.refuse("allOf of more than one schema is not supported; join them")
        options = []
        for number, schema in enumerate(value):
            branch = place.at(number)
            inner = _types_allowed(schema, branch, types) if isinstance(schema, dict) else types
            if inner or len(value) == 1:  # a branch of other types than those allowed beside it can never hold
                options.append(self._value(schema, branch, types))
        return options

    def _reference(self, value: Any, place: Place, types: frozenset[str]) -> str:
        """The rule of the schema to which a `$ref` points."""
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            place.refuse(f"the $ref {short(value)} is not within the schema; copy what it names into $defs")
        schema = self._schema
        for part in value.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and part.isdecimal() and int(part) < len(schema):
                schema = schema[int(part)]
            elif isinstance(schema, dict) and part in schema:
                schema = schema[part]
            else:
                place.refuse(f"the $ref {short(value)} leads nowhere; give a place within the schema")
        if value in self._open_references:
            place.refuse(f"the $ref {short(value)} leads back to itself, which is not supported; nest what is needed")
        if (value, types) not in self._references:
            self._open_references.append(value)
            self._references[value, types] = self._value(schema, Place(self._tool, value[1:]), types)
            self._open_references.pop()
        return self._references[value, types]

    def _by_type(self, schema: dict[str, Any], place: Place, types: frozenset[str]) -> list[str]:
        """The alternatives of each type, as the keywords of that type allow it."""
        if types == _ALL and not any(word in schema for words in _OF_TYPE.values() for word in words):
            return [self._any(_ANY_LEVELS)]
        options = []
        if "null" in types:
            options.append('"null"')
        if "boolean" in types:
            options += ['"true"', '"false"']
        if "integer" in types:
            options.append(number_rule(self._rules, schema, place, is_whole="number" not in types))
        if "string" in types:
            options.append(string_rule(self._rules, schema, place))
        if "array" in types:
            options.append(self._array(schema, place))
        if "object" in types:
            options.append(self._object(schema, place))
        return options

    def _any(self, levels: int) -> str:
        """The rule of a value of any type, with at most so many lists and records within each other."""
        text, number = self._rules.terminal("/(?s:.*)/"), self._rules.terminal(ANY_NUMBER)
        options = f'"null" | "true" | "false" | {number} | {QUOTE} {text} {QUOTE}'
        if not levels:
            return self._rules.rule(options)
        inner = self._any(levels - 1)
        key = self._other_key([])
        return self._rules.rule(
            f'{options} | "[" ({inner} ("," {inner})*)? "]" | "{{" ({key} {inner} ("," {key} {inner})*)? "}}"', levels
        )

    # ---- lists and records ------------------------------------------------------------------------------------------

    def _array(self, schema: dict[str, Any], place: Place) -> str:
        low = count_of(schema, "minItems", place, MAX_LENGTH) or 0
        high = count_of(schema, "maxItems", place, MAX_LENGTH)
        if high is not None and high < low:
            place.refuse(f"minItems {low} is above maxItems {high}")
        if high == 0:
            return self._rules.rule('"[" "]"', 1)
        inner = self._inner(schema.get("items", True), place.at("items"))
        more = f'("," {inner}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}' if high != 1 else ""
        body = f"{inner} {more}" if low else f"({inner} {more})?"
        return self._rules.rule(f'"[" {body} "]"', 1 + self._rules.height([inner]))

    def _inner(self, schema: Any, place: Place) -> str:
        """The rule of an item, or of a value behind a key that the schema does not name."""
        return self._any(_ANY_LEVELS - 1) if schema is True or schema == {} else self._value(schema, place)

    def _object(self, schema: dict[str, Any], place: Place) -> str:
        pairs = self._pairs(schema, place)
        rules = [rule for _, rule, _ in pairs]
        is_any_required = any(is_required for *_, is_required in pairs)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", not properties and "properties" not in schema and not required)
        tail, first_other = "", ""
        if others is not False:
            key = self._other_key([name for name in properties if is_bare(name)])
            rule = self._inner(others, place.at("additionalProperties"))
            tail, first_other = f'("," {key} {rule})*', f'{key} {rule} ("," {key} {rule})*'
            rules.append(rule)
        heads: list[str] = []  # from the last: the ways to begin with each key, as long as none before it is required
        for key, rule, is_required in reversed(pairs):
            head = f"{key} {rule} {tail}".strip()
            heads = [head] if is_required else [head, *heads]
            tail = self._rules.rule(
                f'"," {head}' if is_required else f'"," {head} | {tail}' if tail else f'("," {head})?'
            )
        if first_other and not is_any_required:
            heads.append(first_other)
        body = f"({' | '.join(heads)}){'' if is_any_required else '?'} " if heads else ""
        return self._rules.rule(f'"{{" {body}"}}"', 1 + self._rules.height(rules))

    def _pairs(self, schema: dict[str, Any], place: Place) -> list[tuple[str, str, bool]]:
        """(key, the rule of its value, whether it is required) of each key that the schema names, in order."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            place.at("properties").refuse("properties is an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            place.at("required").refuse("required is a list of keys")
        pairs = []
        for name in sorted(dict.fromkeys([*properties, *required]), key=str.lower):  # as the template's `dictsort`
            if name in properties:
                inner, there = properties[name], place.at("properties", name)
            else:
                inner, there = schema.get("additionalProperties", True), place.at("required")
                if inner is False:
                    there.refuse(f"the key {name[:80]!r} is required and not allowed")
            if inner is not False or name in required:
                pairs.append((key_of(name, there), self._value(inner, there), name in required))
        return pairs

    def _other_key(self, names: Iterable[str]) -> str:
        """A key that is none of these names, and its colon."""
        excluded = " | ".join(literal(name) for name in names)
        key = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
        return f'{self._rules.terminal(f"{key} & ~({excluded})" if excluded else key)} ":"'


def _types_allowed(schema: dict[str, Any], place: Place, types: frozenset[str]) -> frozenset[str]:
    """Those of the types that a schema allows."""
    declared = schema.get("type", [])
    declared = [declared] if isinstance(declared, str) else declared
    if not isinstance(declared, list) or any(name not in _TYPES for name in declared):
        place.at("type").refuse(f"the type {short(schema['type'])} is unknown; choose from {', '.join(_TYPES)}")
    if not isinstance(schema.get("nullable", False), bool):
        place.at("nullable").refuse("nullable is true or false")
    if "type" in schema:
        return types & (frozenset(declared) | {"integer" if "number" in declared else ""})
    if not any(word in schema for word in _ALONE):  # those that the keywords speak of; others stay unwritten
        declared = [kind for kind, words in _OF_TYPE.items() if any(word in schema for word in words)]
        return types & frozenset([*declared, *(["integer"] if "number" in declared else [])] or _ALL)
    return types
