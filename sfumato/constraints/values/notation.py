"""How values are written: as JSON, as JSON within a string of JSON, and as Gemma writes the arguments of calls.

JSON stands on one line with ", " and ": ", and its strings are escaped as `json.dumps(…, ensure_ascii=False)` does it:
each text has one form, so that a key cannot be another one in disguise. In Gemma's notation keys are bare, or between
two `<|"|>` where they hold marks of the notation, and strings are between two of them. That is a control token, and the
grammar names it as one.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from sfumato.constraints import characters
from sfumato.constraints.expressions import (
    ANYTHING,
    EMPTY,
    ENDLESS,
    Expression,
    both,
    chars,
    other_than,
    repeat,
    sequence,
    written,
)
from sfumato.constraints.expressions import either as any_of
from sfumato.constraints.expressions import literal as text_of
from sfumato.constraints.values.rules import RuleWriter, literal

QUOTE = '<|"|>'
"""The control token on both sides of a string in Gemma's notation."""
CONTROL_TOKEN = re.compile(r"<\|[^<>]*>|<[^<>]*\|>|<(?:bos|eos|pad|unk)>")
"""What the checkpoints' control tokens look like: the library would take such text for the token itself."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_FREE_LEVELS = 32
"""Lists and records within each other, in a value that no schema describes."""
ANY_NUMBER = r"/-?(0(\.[0-9]{1,15})?|[1-9][0-9]{0,8}(\.[0-9]{1,6})?|[1-9][0-9]{9,18})([eE][+-]?[0-9]{1,2})?/"


class Notation(ABC):
    """How lists, records, keys and strings are written."""

    comma: str
    """What stands between two items, in Lark."""
    is_narrow: bool
    """Whether keys come in alphabetical order, and others than those named only where the schema speaks of them."""

    free: str
    """The name of the rule of any value."""

    @abstractmethod
    def written(self, value: Any) -> str:
        """A value as it stands in an answer, its control tokens spelled out."""

    def can_write(self, text: str) -> bool:
        """Whether a text can stand in a constant or a key."""
        return not _SURROGATE.search(text)

    @abstractmethod
    def text(self, rules: RuleWriter, node: Expression) -> str:
        """The rule of the strings of an expression."""

    @abstractmethod
    def constants(self, rules: RuleWriter, texts: Sequence[str]) -> str:
        """The rule of some strings."""

    @abstractmethod
    def key(self, name: str) -> str:
        """A key and what stands between it and its value, in Lark."""

    @abstractmethod
    def other_key(self, rules: RuleWriter, node: Expression, names: Iterable[str]) -> list[str]:
        """The same for the keys of an expression that are none of these names; alternatives."""

    @abstractmethod
    def json_text(self, rules: RuleWriter, rule: str) -> str:
        """The rule of strings that hold JSON; `rule` is that of a value in the notation `inner`."""

    @property
    @abstractmethod
    def inner(self) -> Notation:
        """How JSON is written within a string."""

    def constant(self, value: Any) -> str:
        """A constant written out, in Lark."""
        if isinstance(value, list):
            return f'"[" {f" {self.comma} ".join(map(self.constant, value))} "]"'
        if isinstance(value, dict):
            pairs = (f"{self.key(name)} {self.constant(inner)}" for name, inner in value.items())
            return f'"{{" {f" {self.comma} ".join(pairs)} "}}"'
        return self.written_text(value) if isinstance(value, str) else literal(json.dumps(value))

    @abstractmethod
    def written_text(self, text: str) -> str:
        """A string, in Lark."""

    def anything(self, rules: RuleWriter) -> str:
        """The rule of a value of any kind, nested as deep as `_FREE_LEVELS`."""
        name = rules.rule(f"{self.free}::0")
        options = [*map(literal, ("null", "true", "false")), rules.terminal(ANY_NUMBER), self.text(rules, ANYTHING)]
        keys = self.other_key(rules, ANYTHING, ())
        item = f"{self.free}::incr(_)"
        pair = f"({' | '.join(keys)}) {item}"
        limit = f"%if lt(_, {_FREE_LEVELS})"
        rules.define(
            self.free,
            f'{" | ".join(options)} | "[" ({item} ({self.comma} {item})*)? "]" {limit} '
            f'| "{{" ({pair} ({self.comma} {pair})*)? "}}" {limit}',
            "::_",
        )
        return name


class JsonNotation(Notation):
    """JSON."""

    comma = '", "'
    free = "free_json"
    is_narrow = False

    def written(self, value: Any) -> str:
        """As `Notation.written` has it."""
        return _quoted(value)

    def text(self, rules: RuleWriter, node: Expression) -> str:
        """As `Notation.text` has it."""
        if node == EMPTY:
            return rules.rule(literal('""'))
        return rules.terminal(f'"\\"" {written(node, "json")} "\\""')

    def constants(self, rules: RuleWriter, texts: Sequence[str]) -> str:
        """As `Notation.constants` has it."""
        return rules.terminal(" | ".join(map(self.written_text, texts)))

    def key(self, name: str) -> str:
        """As `Notation.key` has it."""
        return literal(f"{_quoted(name)}: ")

    def other_key(self, rules: RuleWriter, node: Expression, names: Iterable[str]) -> list[str]:
        """As `Notation.other_key` has it."""
        return [rules.terminal(f'"\\"" {written(_without(node, names), "json")} "\\": "')]

    def json_text(self, rules: RuleWriter, rule: str) -> str:
        """As `Notation.json_text` has it."""
        return rules.rule(f'"\\"" {rule} "\\""')

    @property
    def inner(self) -> Notation:
        """As `Notation.inner` has it."""
        return JsonInText()

    def written_text(self, text: str) -> str:
        """As `Notation.written_text` has it."""
        return literal(_quoted(text))


class JsonInText(JsonNotation):
    """JSON within a string of JSON; what would be escaped twice does not come, except in constants."""

    free = "free_text"

    def text(self, rules: RuleWriter, node: Expression) -> str:
        """As `Notation.text` has it."""
        return rules.terminal(rf'"\\\"" {written(both([node, _PLAIN]))} "\\\""')

    def key(self, name: str) -> str:
        """As `Notation.key` has it."""
        return literal(f"{_quoted(_quoted(name))[1:-1]}: ")

    def other_key(self, rules: RuleWriter, node: Expression, names: Iterable[str]) -> list[str]:
        """As `Notation.other_key` has it."""
        return [rules.terminal(rf'"\\\"" {written(both([_without(node, names), _PLAIN]))} "\\\": "')]

    def json_text(self, rules: RuleWriter, rule: str) -> str:
        """As `Notation.json_text` has it."""
        return self.text(rules, ANYTHING)

    @property
    def inner(self) -> Notation:
        """As `Notation.inner` has it."""
        return self

    def written_text(self, text: str) -> str:
        """As `Notation.written_text` has it."""
        return literal(_quoted(_quoted(text))[1:-1])


class CallNotation(Notation):
    """Gemma's notation of calls."""

    comma = '","'
    free = "free_call"
    is_narrow = True

    def written(self, value: Any) -> str:
        """As `Notation.written` has it."""
        if isinstance(value, list):
            return f"[{','.join(map(self.written, value))}]"
        if isinstance(value, dict):
            keys = {name: name if is_bare(name) else f"{QUOTE}{name}{QUOTE}" for name in value}
            return f"{{{','.join(f'{keys[name]}:{self.written(inner)}' for name, inner in value.items())}}}"
        return f"{QUOTE}{value}{QUOTE}" if isinstance(value, str) else json.dumps(value)

    def can_write(self, text: str) -> bool:
        """As `Notation.can_write` has it."""
        return super().can_write(text) and not CONTROL_TOKEN.search(text)

    def text(self, rules: RuleWriter, node: Expression) -> str:
        """As `Notation.text` has it."""
        if node == EMPTY:
            return rules.rule(f"{QUOTE} {QUOTE}")
        return rules.rule(f"{QUOTE} {rules.terminal(written(node, 'gemma'))} {QUOTE}")

    def constants(self, rules: RuleWriter, texts: Sequence[str]) -> str:
        """As `Notation.constants` has it."""
        options = [f"{QUOTE} {QUOTE}"] if "" in texts else []
        if words := [literal(text) for text in texts if text]:
            options.append(f"{QUOTE} {rules.terminal(' | '.join(words))} {QUOTE}")
        return rules.rule(" | ".join(options))

    def key(self, name: str) -> str:
        """As `Notation.key` has it."""
        return literal(f"{name}:") if is_bare(name) else f'{self.written_text(name)} ":"'

    def other_key(self, rules: RuleWriter, node: Expression, names: Iterable[str]) -> list[str]:
        """As `Notation.other_key` has it."""
        names = list(names)
        bare = _without(both([node, _BARE]), names)
        keys = [f'{rules.terminal(written(bare, "gemma"))} ":"']
        if node != ANYTHING:
            quoted = _without(both([node, other_than(_BARE), other_than(EMPTY)]), names)
            keys.append(f'{QUOTE} {rules.terminal(written(quoted, "gemma"))} {QUOTE} ":"')
        return keys

    def json_text(self, rules: RuleWriter, rule: str) -> str:
        """As `Notation.json_text` has it."""
        return rules.rule(f"{QUOTE} {rule} {QUOTE}")

    @property
    def inner(self) -> Notation:
        """As `Notation.inner` has it."""
        return JsonNotation()

    def written_text(self, text: str) -> str:
        """As `Notation.written_text` has it."""
        return f"{QUOTE} {literal(text) if text else ''} {QUOTE}"


_PLAIN = repeat(chars(characters.complement(characters.ranges([(0, 31), (34, 34), (92, 92)]))), 0, ENDLESS)
"""Texts that JSON writes as they are."""
_LETTERS = characters.ranges([(0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_BARE = sequence([chars(_LETTERS), repeat(chars(characters.union(_LETTERS, characters.ranges([(0x30, 0x39)]))), 0, 63)])
"""Keys that no schema names and that come without quotes."""


def is_bare(key: str) -> bool:
    """Whether the parser of replies reads this text as one word, without quotes."""
    return bool(key) and key == key.strip() and key[0] not in "\"'" and not any(mark in key for mark in "{}[]:,")


def _without(node: Expression, names: Iterable[str]) -> Expression:
    """The texts of an expression that are none of these."""
    names = list(names)
    return both([node, other_than(any_of(map(text_of, names)))]) if names else node


def _quoted(text: Any) -> str:
    """Text, or another value, as JSON. What spells a control token has an escape in it, so that it is text."""
    return CONTROL_TOKEN.sub(lambda match: f"\\u003c{match.group()[1:]}", json.dumps(text, ensure_ascii=False))
