"""The shortest text of an expression, and the shortest end of one that has begun.

An expression has derivatives: the one by a character is what may come behind it. They are the states of an automaton
that is made as it is needed, and a search for the nearest state that allows the empty text (A*, with the number of
characters that each state needs at least as its guide) finds a shortest text where there is one.

Deliberately absent: proof where the automaton has too many states. Such a search ends with `NotSupported`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable

from sfumato.constraints import characters
from sfumato.constraints.characters import Ranges
from sfumato.constraints.expressions import (
    EMPTY,
    ENDLESS,
    NEVER,
    NOTHING,
    Expression,
    both,
    either,
    other_than,
    repeat,
    sequence,
)
from sfumato.constraints.interruptible import Interruptible, finish
from sfumato.constraints.patterns import NotSupported

EFFORT = 50_000
"""Derivatives of one search, about 20 µs each: see `Automaton.ending`."""
MAX_SIZE = 1_000_000
"""Nodes of the states of one automaton together."""
_LIKED = "a1A0_- .,:/@x"
"""Characters that a text is made of where there is a choice: the earlier the better."""


def shortest(node: Expression) -> str | None:
    """A shortest text of the expression; None where it has none. NotSupported where the search is too long."""
    return Automaton(node).shortest()


class Automaton:
    """The states of one expression, made as they are needed; NotSupported where they have more than `most` parts."""

    def __init__(self, node: Expression, most: int = MAX_SIZE) -> None:
        self._most = most
        self._nodes: dict[Expression, Expression] = {}  # equal nodes become the same: they are compared often
        self.start = self._kept(node)
        self._derivatives: dict[tuple[Expression, str], Expression] = {}
        self._choices: dict[Expression, list[str]] = {}
        self._first_sets: dict[Expression, frozenset[Ranges]] = {}
        self._ends: dict[Expression, str | None] = {}
        self._size = 0

    def behind(self, text: str, state: Expression | None = None) -> Expression:
        """The state behind a text, from the start or another state; where it may not come, one without a text."""
        state = state or self.start
        for character in text:
            if state.least == NEVER:
                break
            state = self._after(state, character)
        return state

    def shortest(self, begin: str = "") -> str | None:
        """A shortest text that completes this one; None where none does. NotSupported where the search is too long."""
        return finish(self.ending(self.behind(begin)))

    def ending(self, state: Expression, effort: int = EFFORT) -> Interruptible[str | None]:
        """A shortest text of a state, as `shortest`; `effort` is the number of derivatives that it may need."""
        if state not in self._ends:
            self._ends[state] = _plain_text(state) if state.is_plain else (yield from self._search(state, effort))
        return self._ends[state]

    def _search(self, start: Expression, effort: int) -> Interruptible[str | None]:
        count = 0
        most = len(self._derivatives) + effort
        heap = [(start.least, 0, count, start)]  # the text's length at least, what that is without its beginning, …
        ways: dict[Expression, tuple[int, Expression | None, str]] = {start: (0, None, "")}
        while heap:
            yield
            bound, _, _, state = heapq.heappop(heap)
            length = ways[state][0]
            if state.is_nullable:
                return _way_to(state, ways)
            if length + state.least < bound:  # a shorter way to it is known by now
                continue
            for character in self._choices_of(state):
                new = self._after(state, character)
                if new.least >= NEVER or ways.get(new, (NEVER,))[0] <= length + 1:
                    continue
                ways[new] = length + 1, state, character
                count += 1
                heapq.heappush(heap, (length + 1 + new.least, -length, count, new))
            if len(self._derivatives) > most:
                raise NotSupported(f"an automaton that needs more than {effort} steps")
        return None

    def _kept(self, node: Expression) -> Expression:
        """The node that stands for all that are equal to this one."""
        if (known := self._nodes.get(node)) is not None:
            return known
        parts = tuple(map(self._kept, node.parts))
        if any(new is not old for new, old in zip(parts, node.parts, strict=True)):
            node = Expression(node.kind, parts, node.ranges, node.low, node.high)
        return self._nodes.setdefault(node, node)

    def _after(self, state: Expression, character: str) -> Expression:
        new = self._derivatives.get((state, character))
        return self._derivative(state, character) if new is None else new

    def _derivative(self, node: Expression, character: str) -> Expression:
        """What may come behind a character; kept, because states share most of their parts."""
        if node.kind == "characters":
            return EMPTY if characters.contains(node.ranges, ord(character)) else NOTHING
        key = node, character
        if (new := self._derivatives.get(key)) is None:
            new = self._kept(self._derivative_of_parts(node, character))
            self._size += 1 + len(new.parts)
            if self._size > self._most:
                raise NotSupported(f"an automaton with more than {self._most} parts")
            self._derivatives[key] = new
        return new

    def _derivative_of_parts(self, node: Expression, character: str) -> Expression:
        match node.kind:
            case "sequence":
                options = []
                for at, part in enumerate(node.parts):
                    if (new := self._derivative(part, character)).least < NEVER:
                        options.append(sequence([new, *node.parts[at + 1 :]]))
                    if not part.is_nullable:
                        break
                return either(options)
            case "repeat":
                part = node.parts[0]
                high = node.high if node.high == ENDLESS else node.high - 1
                rest = self._kept(repeat(part, max(node.low - 1, 0), high))
                return sequence([self._derivative(part, character), rest])
            case "not":
                return other_than(self._derivative(node.parts[0], character))
            case kind:
                parts = [self._derivative(part, character) for part in node.parts]
                return both(parts) if kind == "both" else either(parts)

    def _choices_of(self, state: Expression) -> list[str]:
        """A character of each class that the state tells apart."""
        if state not in self._choices:
            self._choices[state] = _representatives(self._firsts(state))
        return self._choices[state]

    def _firsts(self, node: Expression) -> frozenset[Ranges]:
        """The sets of characters that the first character of a text is looked for in."""
        if node.kind == "characters":
            return frozenset([node.ranges])
        if (sets := self._first_sets.get(node)) is None:
            parts = node.parts
            if node.kind == "sequence":
                until = next((at for at, part in enumerate(parts) if not part.is_nullable), len(parts))
                parts = parts[: until + 1]
            sets = self._first_sets[node] = frozenset().union(*map(self._firsts, parts))
        return sets


def _way_to(state: Expression, ways: dict[Expression, tuple[int, Expression | None, str]]) -> str:
    text: list[str] = []
    while True:
        _, before, character = ways[state]
        if before is None:
            return "".join(reversed(text))
        text.append(character)
        state = before


def _plain_text(node: Expression) -> str | None:
    """A shortest text of an expression without intersections and complements."""
    if node.least == NEVER:
        return None
    if node.is_nullable:
        return ""
    if node.least > 100_000:
        raise NotSupported(f"no text of fewer than {node.least} characters")
    match node.kind:
        case "characters":
            return _representative(node.ranges)
        case "either":
            return _plain_text(min(node.parts, key=lambda part: part.least))
        case "repeat":
            return (_plain_text(node.parts[0]) or "") * node.low
        case _:
            return "".join(_plain_text(part) or "" for part in node.parts)


def _rank(code: int) -> int:
    """How far down a character is among those that a text is made of where there is a choice."""
    liked = _LIKED.find(chr(code))
    return liked if liked >= 0 else code + (100 if 32 < code < 127 and code not in (34, 92) else 1000)


def _representative(one: Ranges) -> str:
    """The character of a set that is most common in texts."""
    liked = next((character for character in _LIKED if characters.contains(one, ord(character))), None)
    return liked or chr(min((first for first, _ in one), key=_rank))


def _representatives(sets: Iterable[Ranges]) -> list[str]:
    """A character of each class of those that lie in the same of these sets, preferably one that is common in texts."""
    kept = [one for one in sets if one != characters.ALL]
    starts = [[first for first, _ in one] for one in kept]
    edges = {code for one in kept for first, last in one for code in (first, last + 1)} | {32}
    best: dict[tuple[bool, ...], tuple[int, int]] = {}
    for code in edges | set(map(ord, _LIKED)):
        if not code < 0x110000 or 0xD800 <= code < 0xE000:
            continue
        kind = []
        for one, first in zip(kept, starts, strict=True):
            at = bisect_right(first, code) - 1
            kind.append(at >= 0 and one[at][1] >= code)
        best[tuple(kind)] = min(best.get(tuple(kind), (NEVER, 0)), (_rank(code), code))
    return [chr(code) for _, code in sorted(best.values())]
