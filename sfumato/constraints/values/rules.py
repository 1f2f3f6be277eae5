"""A Lark grammar in progress: its rules and terminals, each written once.

Deliberately absent: what they mean. Several roots may be written into one grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from sfumato.errors import InputError

MAX_RULES = 30_000
"""Rules and terminals of one grammar."""


class RuleWriter:
    """The rules and terminals of a grammar: equal bodies have one name."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # body -> name
        self._bodies: dict[str, str] = {}  # name, with its parameter -> body
        self._hints: dict[str, None] = {}
        self._count = 0

    def rule(self, body: str) -> str:
        """The name of the rule with this body."""
        return self._named("v", body)

    def terminal(self, body: str) -> str:
        """The name of the terminal with this body."""
        return self._named("T", body)

    def _named(self, letter: str, body: str) -> str:
        if body not in self._names:
            self._names[body] = self.define(self.new_name(letter), body)
        return self._names[body]

    def new_name(self, letter: str = "r") -> str:
        """A name that is not in use, for a rule that is defined later."""
        self._count += 1
        if self._count > MAX_RULES:
            raise InputError(f"the schema needs more than the {MAX_RULES} rules allowed; make it smaller")
        return f"{letter}{self._count}"

    def define(self, name: str, body: str, parameter: str = "") -> str:
        """Give a rule its body; a `parameter` is Lark's `::_`. Returns the name."""
        self._bodies[name + parameter] = body
        return name

    def choice(self, options: Iterable[str]) -> str:
        """The rule of alternatives, of which there is at least one: one that stands alone is itself."""
        options = list(dict.fromkeys(options))
        if len(options) == 1 and options[0].isidentifier():
            return options[0]
        return self.rule(" | ".join(options))

    def add_hints(self, words: Iterable[str]) -> None:
        """Note what patterns are made of: the search for short texts tries it."""
        self._hints |= dict.fromkeys(words)

    def hints(self) -> str:
        """What patterns are made of, at most 1,000 characters."""
        return " ".join(self._hints)[:1000]

    def lines(self) -> list[str]:
        """The grammar's lines."""
        return [f"{name}: {body}" for name, body in self._bodies.items()]


def literal(text: str) -> str:
    """Text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)
