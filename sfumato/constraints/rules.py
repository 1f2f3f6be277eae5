"""A Lark grammar of tool calls in progress: its rules and terminals, the notation of its values, the place of an error.

The notation is Gemma's own: keys are bare, or between two `<|"|>` where they hold marks of the notation; strings are
between two `<|"|>`. That is a control token, and the grammar names it as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from sfumato.errors import InputError

QUOTE = '<|"|>'
"""The control token on both sides of a string."""
CONTROL_TOKEN = re.compile(r"<\|[^<>]*>|<[^<>]*\|>|<(?:bos|eos|pad|unk)>")
"""What the checkpoints' control tokens look like: the library would take such text for the token itself."""


class RuleWriter:
    """The rules and terminals of a grammar, each written once: equal bodies have one name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # body -> name
        self._heights: dict[str, int] = {}  # rule -> lists and records within each other
        self._hints: dict[str, None] = {}

    def rule(self, body: str, height: int = 0) -> str:
        """The name of the rule with this body; `height` counts the lists and records within each other."""
        name = self._names.setdefault(body, f"v{len(self._names)}")
        self._heights[name] = max(height, self._heights.get(name, 0))
        return name

    def terminal(self, body: str) -> str:
        """The name of the terminal with this body."""
        return self._names.setdefault(body, f"T{len(self._names)}")

    def choice(self, options: list[str]) -> str:
        """The rule of alternatives, of which there is at least one: a rule that stands alone is itself."""
        options = list(dict.fromkeys(options))
        if len(options) == 1 and options[0] in self._heights:
            return options[0]
        return self.rule(" | ".join(options), self.height(options))

    def height(self, names: Iterable[str]) -> int:
        """The greatest height of these; what is not a rule has none."""
        return max((self._heights.get(name, 0) for name in names), default=0)

    def add_hints(self, words: Iterable[str]) -> None:
        """Note what patterns are made of, for `lines`."""
        self._hints |= dict.fromkeys(words)

    def lines(self) -> list[str]:
        """The grammar's lines, behind a comment with the hints: the search for short texts reads them there."""
        return [f"// {' '.join(self._hints)[:900]}", *(f"{name}: {body}" for body, name in self._names.items())]


@dataclass(frozen=True)
class Place:
    """A place in the schema of one tool's parameters: what an error names."""

    tool: str
    pointer: str = ""

    def at(self, *steps: str | int) -> Place:
        """The place that many steps further down; a step is a key or an index."""
        escaped = (str(step).replace("~", "~0").replace("/", "~1") for step in steps)
        return Place(self.tool, "".join([self.pointer, *(f"/{step}" for step in escaped)]))

    def refuse(self, sentence: str) -> NoReturn:
        """Raise the InputError that says what cannot be guaranteed here."""
        raise InputError(f"{sentence}, at {self.pointer[:300] or 'the top'} of the parameters of tool {self.tool!r}")


def key_of(name: str, place: Place) -> str:
    """A key and its colon, in Lark."""
    if CONTROL_TOKEN.search(name):
        place.refuse(f"the key {name[:80]!r} spells a control token; rename it")
    if is_bare(name):
        return literal(f"{name}:")
    return f'{QUOTE} {literal(name)} {QUOTE} ":"' if name else f'{QUOTE} {QUOTE} ":"'


def is_bare(key: str) -> bool:
    """Whether the parser of replies reads this text as one word, without quotes."""
    return bool(key) and key == key.strip() and key[0] not in "\"'" and not any(mark in key for mark in "{}[]:,")


def literal(text: str) -> str:
    """Text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def short(value: Any) -> str:
    """The beginning of a value, for an error."""
    return repr(value)[:80]
