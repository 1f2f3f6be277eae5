"""Patterns of JSON Schema and regular expressions of requests, read as expressions.

A pattern is written for ECMA's regular expressions, Python's or Rust's; here it means the texts that all of them accept
(`characters` has the two sets of each class). Anchors, word boundaries and look-around are resolved: what stands before
and behind them is restricted, with an intersection where nothing simpler will do.

Deliberately absent: back references, look-around within a repetition, the flags m and x, and whatever the dialects read
differently. Each is `NotSupported`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sfumato.constraints import characters
from sfumato.constraints.characters import Ranges
from sfumato.constraints.expressions import (
    ANYTHING,
    EMPTY,
    ENDLESS,
    NEVER,
    NOTHING,
    Expression,
    both,
    chars,
    either,
    other_than,
    repeat,
    sequence,
)

MAX_NESTING = 100
"""Groups within each other."""
MAX_WAYS = 200
"""Alternatives into which a pattern falls apart where it has anchors or look-around in its groups."""
MAX_SIZE = 200_000
"""Nodes of an expression."""

_SHORT = 500
"""Characters of patterns whose expressions are kept."""
_CHARACTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}")
_LEFT_OUT = re.compile(r"\{,\d+\}")
_CODE = re.compile(r"u([0-9a-fA-F]{4})|[ux]\{([0-9a-fA-F]{1,6})\}|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})")
_PROPERTY = re.compile(r"([pP])(?:\{(\^?)([A-Za-z_=]+)\}|([LMNPSZC]))")
_GROUP = re.compile(r"\(\?(?:P?<(?![=!])[^>\W]+>|(?P<flags>[a-zA-Z]*(?:-[a-zA-Z]+)?)(?P<end>[:)])|(?P<look><?[=!]))")
_DOUBTFUL = ("&&", "--", "~~", "[:", "[.", "[=")


class NotSupported(Exception):
    """A pattern has something that is not translated; the message says what."""


def parse(text: str, is_whole: bool = False) -> Expression:
    """The expression of the texts in which a pattern is, or (`is_whole`) which it matches as a whole.

    NotSupported for what has no place here.
    """
    return _parsed_short(text, is_whole) if len(text) <= _SHORT else _parsed(text, is_whole)


@lru_cache(200)
def _parsed_short(text: str, is_whole: bool) -> Expression:
    return _parsed(text, is_whole)


def _parsed(text: str, is_whole: bool) -> Expression:
    sides = [] if is_whole else [ANYTHING]
    ways = _Parser(text).whole()
    node = either(_resolved(EMPTY, True, [*sides, *way, *sides]) for way in ways)
    if node.size > MAX_SIZE:
        raise NotSupported(f"{node.size} parts, more than the {MAX_SIZE} allowed")
    return node


# ---- what stands at a place without being a part of the text ---------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """What the text on one side of a place must be: the next character is in a set, or it obeys an expression."""

    ranges: Ranges | None = None
    may_be_empty: bool = False
    node: Expression | None = None


@dataclass(frozen=True)
class _Assertion:
    """A condition on the text before a place, or behind it, or both; `what` is its name in an error."""

    what: str
    before: _Side | None = None
    behind: _Side | None = None


_Element = Expression | _Assertion
_Elements = list[_Element]
_AT_END = _Side(characters.NONE, may_be_empty=True)


def _resolved(left: Expression, is_known: bool, items: Sequence[_Element]) -> Expression:
    """The expression of a sequence behind `left`; `is_known` says that nothing stands before that.

    Assertions at one place are taken together: `left` is restricted by them, and so is all that follows, which is
    resolved first.
    """
    at = next((i for i, item in enumerate(items) if isinstance(item, _Assertion)), len(items))
    left = sequence([left, *(_nodes(items[:at]) or ())])
    here: list[_Assertion] = []
    for item in items[at:]:
        if not isinstance(item, _Assertion):
            break
        here.append(item)
    if not here or left.least == NEVER:
        return left
    rest = items[at + len(here) :]
    conditions = [assertion.behind for assertion in here if assertion.behind is not None]
    if conditions and (inner := _nullable_before_the_next(rest)):
        some = _edge(sequence(_nodes(rest[:inner]) or ()), characters.ALL, False)
        return either(_resolved(left, is_known, [*here, *way, *rest[inner:]]) for way in ([some], []))
    for assertion in here:
        if assertion.before is not None:
            left = _restricted_before(left, is_known, assertion.what, assertion.before)
    if not conditions or left.least == NEVER:
        return _resolved(left, is_known, rest) if left.least < NEVER else NOTHING
    right = _resolved(EMPTY, is_known and left == EMPTY, rest)
    for side in conditions:
        right = _restricted(right, side, is_before=False)
    return sequence([left, right])


def _nullable_before_the_next(items: Sequence[_Element]) -> int:
    """The number of items before the next condition on what stands before it, if all of them may be empty; else 0."""
    for at, item in enumerate(items):
        if isinstance(item, _Assertion):
            return at if item.before is not None else 0
        if not item.is_nullable:
            return 0
    return 0


def _restricted_before(left: Expression, is_known: bool, what: str, side: _Side) -> Expression:
    if not is_known and (side.node is not None or left.is_nullable):
        raise NotSupported(f"{what} behind look-around")
    return _restricted(left, side, is_before=True)


def _restricted(node: Expression, side: _Side, is_before: bool) -> Expression:
    """The texts of an expression that meet a condition on their last character (`is_before`), or on their first."""
    if side.node is not None:
        return both([node, side.node])
    assert side.ranges is not None
    ended = _edge(node, side.ranges, is_before)
    return either([ended, EMPTY]) if side.may_be_empty and node.is_nullable else ended


def _edge(node: Expression, ranges: Ranges, is_last: bool) -> Expression:
    """The texts of an expression whose last character, or first, is in a set."""
    if not ranges:
        return NOTHING
    match node.kind:
        case "characters":
            return chars(characters.both(node.ranges, ranges))
        case "either":
            return either(_edge(part, ranges, is_last) for part in node.parts)
        case "repeat" if not node.parts[0].is_nullable:
            one, high = node.parts[0], node.high if node.high == ENDLESS else node.high - 1
            return _ordered(repeat(one, max(node.low - 1, 0), high), _edge(one, ranges, is_last), is_last)
        case "sequence":
            if not node.parts:
                return NOTHING
            edge, rest = (node.parts[-1], node.parts[:-1]) if is_last else (node.parts[0], node.parts[1:])
            ended = _ordered(sequence(rest), _edge(edge, ranges, is_last), is_last)
            return either([ended, _edge(sequence(rest), ranges, is_last)]) if edge.is_nullable else ended
        case _:
            return both([node, _ordered(ANYTHING, chars(ranges), is_last)])


def _ordered(rest: Expression, edge: Expression, is_last: bool) -> Expression:
    return sequence([rest, edge] if is_last else [edge, rest])


def _nodes(way: Sequence[_Element]) -> list[Expression] | None:
    """The items of a way that has no assertion; None for others."""
    nodes = [item for item in way if isinstance(item, Expression)]
    return nodes if len(nodes) == len(way) else None


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flags:
    ignores_case: bool = False
    has_newlines: bool = False
    """In a dot."""
    is_wide: bool = False
    """Within what must not be: the sets are what any dialect allows."""


@lru_cache(10_000)
def _character(character: str, ignores_case: bool, is_wide: bool) -> Expression:
    ranges = characters.of(character)
    return chars(characters.any_case(ranges, is_wide) if ignores_case else ranges)


class _Parser:
    """A pattern being read: its text, the place that is reached, and the flags that hold there."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._flags = _Flags()

    def whole(self) -> list[_Elements]:
        """The ways of the whole text."""
        ways = self._alternatives()
        if self._at < len(self._text):
            raise NotSupported("a ) without its (")
        return ways

    def _next(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _alternatives(self) -> list[_Elements]:
        """The ways up to the end, or the end of a group; what has no assertion is one way."""
        ways = self._sequence()
        while self._next() == "|":
            self._at += 1
            ways += self._sequence()
        plain = [nodes for way in ways if (nodes := _nodes(way)) is not None]
        rest = [way for way in ways if _nodes(way) is None]
        return [*rest, [either(map(sequence, plain))]] if plain else rest

    def _sequence(self) -> list[_Elements]:
        ways: list[_Elements] = [[]]
        while self._at < len(self._text) and self._next() not in ("|", ")"):
            part = self._quantified(self._atom())
            if len(ways) * len(part) > MAX_WAYS:
                raise NotSupported(f"more than {MAX_WAYS} ways through its anchors and look-around")
            if len(part) == 1:
                for way in ways:
                    way += part[0]
            else:
                ways = [way + more for way in ways for more in part]
        return ways

    def _quantified(self, part: list[_Elements]) -> list[_Elements]:
        """What a quantifier makes of an atom; a lazy one allows the same texts."""
        match = _QUANTIFIER.match(self._text, self._at)
        if match is None:
            if _LEFT_OUT.match(self._text, self._at):
                raise NotSupported(f"the repetition {self._next(4)!r}…, which begins without a number")
            return part
        self._at = match.end()
        after = self._next()
        if after == "?":
            self._at += 1
        elif after == "+" or _QUANTIFIER.match(self._text, self._at):
            raise NotSupported(f"the repetition {(match.group() + after)!r} of a repetition")
        low, high = {"*": (0, ENDLESS), "+": (1, ENDLESS), "?": (0, 1)}.get(match.group(), (-1, -1))
        if low < 0:
            if max(len(match[1]), len(match[3] or "")) > 9:
                raise NotSupported(f"the repetition {match.group()[:20]!r}… of more than 999999999")
            low = int(match[1])
            high = low if match[2] is None else int(match[3]) if match[3] else ENDLESS
        if ENDLESS != high < low:
            raise NotSupported(f"the repetition {match.group()!r}, whose bounds are in the wrong order")
        if len(part) == 1 and (nodes := _nodes(part[0])) is not None:
            return [[repeat(sequence(nodes), low, high)]]
        if part == [[]]:
            return part
        if high != 1:
            raise NotSupported(f"the repetition {match.group()!r} of an anchor or look-around")
        return part if low else [[], *part]

    def _atom(self) -> list[_Elements]:
        """The next character, class, group or assertion."""
        if match := _QUANTIFIER.match(self._text, self._at):
            raise NotSupported(f"the repetition {match.group()!r} of nothing")
        here = self._next()
        if here == "(":
            return self._group()
        self._at += 1
        match here:
            case "^":
                return [[_Assertion("a ^", before=_AT_END)]]
            case "$":
                wide = _Side(node=either([EMPTY, chars(characters.of("\n"))]))
                return [[_Assertion("a $", behind=wide if self._flags.is_wide else _AT_END)]]
            case ".":
                return [[chars(characters.dot(self._flags.is_wide, self._flags.has_newlines))]]
            case "[":
                return [[chars(self._class())]]
            case "\\":
                return self._escape_or_boundary()
        return [[_character(self._checked(here), self._flags.ignores_case, self._flags.is_wide)]]

    def _group(self) -> list[_Elements]:
        """A group; none captures. Look-around is an assertion."""
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise NotSupported(f"groups nested deeper than {MAX_NESTING}")
        flags, match = self._flags, _GROUP.match(self._text, self._at)
        if match is None and self._next(2) == "(?":
            raise NotSupported(f"the group {self._next(4)!r}…")
        start, self._at = self._at, self._at + 1 if match is None else match.end()
        look = match["look"] if match else None
        if match and match["end"]:
            self._flags = self._changed_flags(match["flags"])
            if match["end"] == ")":
                if start:
                    raise NotSupported(f"flags elsewhere than at the beginning, {match.group()!r}")
                self._depth -= 1
                return [[]]
        if look in ("!", "<!"):
            self._flags = _Flags(flags.ignores_case, flags.has_newlines, not flags.is_wide)
        ways = self._alternatives()
        if self._next() != ")":
            raise NotSupported("a ( without its )")
        self._at += 1
        self._depth -= 1
        self._flags = flags
        return [[self._look(look, ways)]] if look else ways

    def _look(self, look: str, ways: list[_Elements]) -> _Assertion:
        """Look-ahead (`=`, `!`) or look-behind (`<=`, `<!`)."""
        what = f"the group '(?{look}'…"
        if "<" in look:
            if any(isinstance(item, _Assertion) for way in ways for item in way):
                raise NotSupported(f"{what} with an anchor or look-around in it")
            node = either(_resolved(ANYTHING, True, way) for way in ways)
        else:
            node = either(_resolved(EMPTY, False, [*way, ANYTHING]) for way in ways)
        side = _Side(node=node if "=" in look else other_than(node))
        return _Assertion(what, before=side) if "<" in look else _Assertion(what, behind=side)

    def _changed_flags(self, names: str) -> _Flags:
        on, _, off = names.partition("-")
        if wrong := set(on + off) - set("isuam" if "^" not in self._text and "$" not in self._text else "isua"):
            raise NotSupported(f"the flag {min(wrong)!r}")
        flags = self._flags
        ignores_case = ("i" in on or flags.ignores_case) and "i" not in off
        return _Flags(ignores_case, ("s" in on or flags.has_newlines) and "s" not in off, flags.is_wide)

    def _checked(self, character: str) -> str:
        if 0xD800 <= ord(character) < 0xE000:
            raise NotSupported(f"the surrogate {character!r}")
        return character

    def _cased(self, ranges: Ranges, is_wide: bool) -> Ranges:
        return characters.any_case(ranges, is_wide) if self._flags.ignores_case else ranges

    def _escape_or_boundary(self) -> list[_Elements]:
        """What follows a backslash outside a class."""
        here, is_wide = self._next(), self._flags.is_wide
        if here in ("A", "Z", "z") and here:
            self._at += 1
            side = _AT_END
            return [[_Assertion(f"a \\{here}", before=side) if here == "A" else _Assertion(f"a \\{here}", behind=side)]]
        if here in ("b", "B") and here:
            self._at += 1
            return self._boundary(here == "b", is_wide)
        if here.isdigit() and here != "0":
            raise NotSupported(f"the back reference '\\{here}'")
        return [[chars(self._cased(self._escape(is_wide), is_wide))]]

    @staticmethod
    def _boundary(is_boundary: bool, is_wide: bool) -> list[_Elements]:
        """The ways of a word boundary, or of a place that is none."""
        word = _Side(characters.named_class("w", is_wide))
        gap = _Side(characters.named_class("W", is_wide), may_be_empty=True)
        sides = [(word, gap), (gap, word)] if is_boundary else [(word, word), (gap, gap)]
        what = "a \\b" if is_boundary else "a \\B"
        return [[_Assertion(what, before, behind)] for before, behind in sides]

    def _escape(self, is_wide: bool) -> Ranges:
        """The characters of what follows a backslash."""
        if match := _CODE.match(self._text, self._at):
            self._at = match.end()
            code = int(next(filter(None, match.groups())), 16)
            if 0xD800 <= code < 0xDC00 and (low := re.match(r"\\u(d[c-f]\w\w)", self._text[self._at :], re.I)):
                self._at += 6
                code = 0x10000 + ((code & 0x3FF) << 10) + (int(low[1], 16) & 0x3FF)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise NotSupported(f"the surrogate {match.group()!r}")
            return ((code, code),)
        if match := _PROPERTY.match(self._text, self._at):
            self._at = match.end()
            return self._property(match, is_wide)
        here = self._next()
        self._at += 1
        if here == "0" and self._next().isdigit():
            raise NotSupported("an octal escape")
        if here == "c" and self._next().isascii() and self._next().isalpha():
            self._at += 1
            return characters.of(chr(ord(self._text[self._at - 1]) % 32))
        if here in _CHARACTERS:
            return characters.of(_CHARACTERS[here])
        if here and here in "dDwWsS":
            return characters.named_class(here, is_wide)
        if not here or here.isalnum():
            raise NotSupported(f"the escape {chr(92) + here!r}")
        return characters.of(self._checked(here))

    @staticmethod
    def _property(match: re.Match[str], is_wide: bool) -> Ranges:
        is_not = (match[1] == "P") != bool(match[2])
        ranges = characters.unicode_property(match[3] or match[4], is_wide != is_not)
        if ranges is None:
            raise NotSupported(f"the property {chr(92) + match.group()!r}")
        return characters.complement(ranges) if is_not else ranges

    def _class(self) -> Ranges:
        """A class in brackets, behind its first one."""
        is_not = self._next() == "^"
        self._at += is_not
        is_wide = self._flags.is_wide != is_not
        items: list[Ranges] = []
        while self._next() != "]":
            if self._at >= len(self._text):
                raise NotSupported("a [ without its ]")
            if self._next(2) in _DOUBTFUL:
                raise NotSupported(f"{self._next(2)!r} in a class, which the dialects read differently")
            first, is_one = self._item(is_wide)
            if is_one and self._next() == "-" and self._next(2)[1:] not in ("]", ""):
                self._at += 1
                last, is_one = self._item(is_wide)
                if not is_one or last[0][0] < first[0][0]:
                    raise NotSupported("a range without an end")
                first = characters.ranges([(first[0][0], last[0][0])])
            items.append(first)
        self._at += 1
        if not items:
            raise NotSupported("an empty class")
        ranges = self._cased(characters.union(*items), is_wide)
        if not is_not:
            return ranges
        others = characters.complement(ranges)
        return others if self._flags.is_wide else characters.coarse(others)

    def _item(self, is_wide: bool) -> tuple[Ranges, bool]:
        """An item of a class, where \\b is a backspace; and whether it is one character."""
        here = self._next()
        self._at += 1
        if here != "\\":
            return characters.of(self._checked(here)), True
        here = self._next()
        if here == "b":
            self._at += 1
            return characters.of("\b"), True
        return self._escape(is_wide), here not in tuple("dDwWsSpP")
