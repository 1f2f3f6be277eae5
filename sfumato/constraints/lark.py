"""The terminals of a Lark grammar, read as expressions.

Deliberately absent: rules, and what llguidance adds to Lark (nested grammars, special tokens). A terminal that is not
understood is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from sfumato.constraints.expressions import (
    ENDLESS,
    NOTHING,
    Expression,
    both,
    either,
    literal,
    other_than,
    repeat,
    sequence,
)
from sfumato.constraints.patterns import NotSupported, parse

MAX_READ = 100_000
"""Characters of a grammar that are read."""
MAX_REGEX = 20_000
"""Characters of one regular expression."""
_DEPTH = 50
"""Groups and names within each other."""
_TIMES = {"*": (0, ENDLESS), "+": (1, ENDLESS), "?": (0, 1)}
_TOKEN = re.compile(
    r"""\s+|//[^\n]*|(?P<string>"(?:[^"\\\n]|\\.)*"i?)|(?P<regex>/(?![/*])(?:[^/\\\n]|\\.)+/[imslux]*)
    |(?P<definition>[A-Za-z_]\w*)(?:\.-?\d+|\[[^\]\n]*\])*\s*:|(?P<name>[A-Za-z_]\w*)
    |(?P<counts>\{\d+(?:,\d*)?\})|(?P<mark>%\w+|.)""",
    re.VERBOSE | re.DOTALL,
)

_Token = tuple[str, str]
"""Its kind, a group's name of `_TOKEN`, and its text."""


def terminals(source: str) -> list[Expression]:
    """The terminals of a grammar in llguidance's form (JSON): those with a name, and regular expressions in rules.

    Lists of literals are left out."""
    return [one for lark in _texts(source) for one in _Definitions(lark[:MAX_READ]).terminals()]


def _texts(source: str) -> list[str]:
    grammars = json.loads(source).get("grammars", []) if source.startswith("{") else []
    return [lark for grammar in grammars if isinstance(lark := grammar.get("lark_grammar"), str)]


class _Definitions:
    """The definitions of one grammar."""

    def __init__(self, lark: str) -> None:
        self._bodies: dict[str, list[_Token]] = {}
        self._known: dict[str, Expression] = {}
        self._open: set[str] = set()
        body: list[_Token] = []
        for match in _TOKEN.finditer(lark):
            kind = match.lastgroup
            if kind == "definition":
                body = self._bodies.setdefault(match["definition"], [])
            elif kind is not None:
                text = match[kind]
                body = [] if text.startswith("%") else body  # a directive is no part of the definition before it
                body.append((kind, text))

    def terminals(self) -> Iterator[Expression]:
        """Those of its terminals that can be read, each once, but for lists of literals."""
        sorts: dict[Expression, None] = {}
        for name, body in self._bodies.items():
            if all(token[0] == "string" or token[1] == "|" for token in body):
                continue
            pieces = [[token] for token in body if token[0] == "regex"] if not name.isupper() else [body]
            for piece in pieces:
                try:
                    sorts[_BodyParser(piece, self).whole()] = None
                except NotSupported:
                    continue
        yield from sorts

    def named(self, name: str) -> Expression:
        """The terminal of that name."""
        if name not in self._known:
            if name not in self._bodies or name in self._open or len(self._open) > _DEPTH:
                raise NotSupported(f"the name {name}")
            self._open.add(name)
            try:
                self._known[name] = _BodyParser(self._bodies[name], self).whole()
            finally:
                self._open.remove(name)
        return self._known[name]


class _BodyParser:
    """The body of one terminal being read."""

    def __init__(self, tokens: list[_Token], definitions: _Definitions) -> None:
        self._tokens = tokens
        self._definitions = definitions
        self._at = 0
        self._depth = 0

    def whole(self) -> Expression:
        """Its expression; NotSupported where it has what is not understood."""
        expression = self._alternatives()
        if self._at < len(self._tokens):
            raise NotSupported(f"the mark {self._tokens[self._at][1]!r}")
        return expression

    def _next(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _alternatives(self) -> Expression:
        options = [self._conjunction()]
        while self._next() == "|":
            self._at += 1
            options.append(self._conjunction())
        return either(options)

    def _conjunction(self) -> Expression:
        parts = [self._sequence()]
        while self._next() == "&":
            self._at += 1
            parts.append(self._sequence())
        return both(parts)

    def _sequence(self) -> Expression:
        parts = []
        while self._next() not in ("", "|", "&", ")", "]"):
            parts.append(self._repeated())
        return sequence(parts)

    def _repeated(self) -> Expression:
        expression = self._atom()
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        if kind == "counts":
            low, comma, high = text[1:-1].partition(",")
            times = int(low), int(high) if high else ENDLESS if comma else int(low)
        elif kind == "mark" and text in _TIMES:
            times = _TIMES[text]
        else:
            return expression
        self._at += 1
        return repeat(expression, *times)

    def _atom(self) -> Expression:
        kind, text = self._tokens[self._at]
        self._at += 1
        match kind, text:
            case "string", _:
                if text.endswith("i"):
                    return parse(f"(?i){re.escape(json.loads(text[:-1]))}", is_whole=True)
                return literal(_unquoted(text))
            case "regex", _ if len(text) <= MAX_REGEX:
                inside, _, flags = text[1:].rpartition("/")
                return parse(f"(?{flags}){inside}" if flags else inside, is_whole=True)
            case "name", _:
                return self._definitions.named(text)
            case "mark", "~":
                return other_than(self._atom())
            case "mark", "(" | "[":
                return self._group(text)
        raise NotSupported(f"the mark {text!r}")

    def _group(self, opening: str) -> Expression:
        self._depth += 1
        if self._depth > _DEPTH:
            raise NotSupported(f"groups nested deeper than {_DEPTH}")
        inside = self._alternatives()
        if self._next() != {"(": ")", "[": "]"}[opening]:
            raise NotSupported(f"a {opening} that is not closed")
        self._at += 1
        self._depth -= 1
        return inside if opening == "(" else repeat(inside, 0, 1)


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        raise NotSupported(f"the text {text[:20]}") from None


def has_choice(expression: Expression) -> bool:
    """Whether it is more than literals: it has a class, or a repetition."""
    match expression.kind:
        case "characters":
            return expression.ranges != NOTHING.ranges and expression.ranges[0][0] != expression.ranges[-1][1]
        case "repeat" | "not" | "both":
            return True
        case _:
            return any(map(has_choice, expression.parts))
