"""Regular expressions, Lark grammars and choices, checked and brought into llguidance's form.

Requests come from outside and are hostile until checked: here their kinds and sizes are bounded, before the library
reads them. Errors are InputErrors of one sentence. JSON schemas are `schema`'s.

The grammars are llguidance's, an optional package; `llguidance` imports it when the first one is needed.
"""

from __future__ import annotations

import importlib
import json
import re
from typing import Any, NamedTuple

from sfumato.constraints.checks import Check
from sfumato.constraints.expressions import written
from sfumato.constraints.patterns import NotSupported, parse
from sfumato.errors import InputError, missing_extra

MAX_CHARACTERS = 1_000_000
"""Characters of a schema as JSON, of a Lark grammar, and of all choices together."""
MAX_REGEX = 100_000
"""Characters of a regular expression."""
MAX_NAMES = 10_000
"""Rules and terminals of a Lark grammar."""
MAX_CHAIN = 500
"""Rules of a Lark grammar that need one another in a chain: the library follows them on its stack."""
MAX_CHOICES = 10_000


class GrammarSource(NamedTuple):
    """A grammar in llguidance's form."""

    text: str
    hints: str
    """The text of its patterns, from which the search for short texts takes hints."""
    check: Check | None = None
    """What the grammar allows and this does not pass is no text of the constraint."""
    example: str | None = None
    """A short text that the grammar should allow, its control tokens spelled out."""


def llguidance() -> Any:
    """The module llguidance; an InputError that says how to install it where it is missing."""
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise missing_extra("llguidance", "constrain") from None


def checked_text(kind: str, value: Any, limit: int) -> str:
    """The value if it is text of at most `limit` characters without lone surrogates, else an InputError."""
    if not isinstance(value, str):
        raise InputError(f"the {kind} is of type {type(value).__name__}; give text")
    if len(value) > limit:
        raise InputError(f"the {kind} has {len(value)} characters, more than the {limit} allowed; shorten it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {kind} has a lone surrogate at character {error.start}; remove it") from None
    return value


def source_of_regex(value: Any) -> GrammarSource:
    """The grammar of the texts that a regular expression matches as a whole, in every dialect: see `patterns`."""
    text = checked_text("regex", value, MAX_REGEX)
    try:
        terminal = written(parse(text, is_whole=True))
    except NotSupported as error:
        raise InputError(f"the regex has {error}, which is not supported; write it without") from None
    return GrammarSource(json.dumps({"grammars": [{"lark_grammar": f"start: TEXT\nTEXT: {terminal}"}]}), text[:1000])


def source_of_lark(value: Any) -> GrammarSource:
    """A Lark grammar, its number of rules and their chains bounded."""
    text = checked_text("grammar", value, MAX_CHARACTERS)
    check_rules(text, "grammar", MAX_NAMES)
    return GrammarSource(json.dumps({"grammars": [{"lark_grammar": text}]}), text[:1000])


def lark_of(source: str) -> str:
    """The Lark grammar of a `GrammarSource.text`."""
    return str(json.loads(source)["grammars"][0]["lark_grammar"])


def check_rules(lark: str, what: str, most: int | None = None) -> None:
    """InputError where a Lark grammar has more rules than `most`, or chains of them that are too long."""
    uses = _uses(lark)
    if most is not None and len(uses) > most:
        raise InputError(f"the {what} has {len(uses)} rules, more than the {most} allowed; give fewer")
    if (chain := _longest_chain(uses)) > MAX_CHAIN:
        raise InputError(
            f"the {what} has a chain of {chain} rules that need one another, more than the {MAX_CHAIN} allowed; "
            "flatten it"
        )


_LARK_TOKEN = re.compile(
    r""""(?:[^"\\\n]|\\.)*"|//[^\n]*|/(?![/*])(?:[^/\\\n]|\\.)+/|(?P<name>[A-Za-z_]\w*)(?P<colon>(?:\.-?\d+|\[[^\]\n]*\]|::_)*\s*:(?!:))?"""
)


def _uses(lark: str) -> dict[str, set[str]]:
    """Rule or terminal -> those that stand in its body."""
    uses: dict[str, set[str]] = {}
    body: set[str] = set()
    for match in _LARK_TOKEN.finditer(lark):
        if match["colon"]:
            body = uses.setdefault(match["name"], set())
        elif match["name"]:
            body.add(match["name"])
    return uses


def _longest_chain(uses: dict[str, set[str]]) -> int:
    """The greatest number of rules on the stack of a depth-first search through their bodies."""
    depth: dict[str, int] = {}
    deepest = 0
    for first in uses:
        stack = [] if first in depth else [(first, iter(uses[first]))]
        depth.setdefault(first, 1)
        while stack:
            name, rest = stack[-1]
            following = next((other for other in rest if other in uses and other not in depth), None)
            if following is not None:
                depth[following] = 1
                stack.append((following, iter(uses[following])))
                deepest = max(deepest, len(stack))
                continue
            stack.pop()
            depth[name] = 1 + max((depth[other] for other in uses[name] if other in uses), default=0)
    return max(deepest, *depth.values(), 0)


def source_of_choices(value: Any) -> GrammarSource:
    """The grammar of a list of texts, each of them there once."""
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"choices are a list of at least one text; this is {repr(value)[:80]}")
    if len(value) > MAX_CHOICES:
        raise InputError(f"there are {len(value)} choices, more than the {MAX_CHOICES} allowed; give fewer")
    left = MAX_CHARACTERS
    numbers: dict[str, int] = {}
    for number, choice in enumerate(value, 1):
        left -= len(checked_text(f"choice {number}", choice, left))
        if not choice:
            raise InputError(f"choice {number} is empty; give each at least one character")
        if choice in numbers:
            raise InputError(f"choice {number}, {choice[:80]!r}, is choice {numbers[choice]} again; give each once")
        numbers[choice] = number
    words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
    return GrammarSource(json.dumps({"grammars": [{"lark_grammar": f"start: CHOICE\nCHOICE: {words}"}]}), "")
