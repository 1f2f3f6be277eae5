"""Regular expressions as values: what a pattern means, without the dialect that it was written in.

An expression is a tree of characters, sequences, alternatives, repetitions, intersections and complements. The
functions that make one (`sequence`, `either`, `repeat`, `both`, `other_than`) bring it into a simple form on the way:
`(a{0,100}){0,100}` is `a{0,10000}`, `\\d{1,5}|\\d{2,9}` is `\\d{1,9}`. So an expression is often far smaller than its
pattern, and equal expressions are mostly equal trees.

`written` gives llguidance's form of one, the body of a terminal of Lark: a regular expression between slashes, with `&`
and `~` between several where there are intersections.

Deliberately absent: groups that capture, and anchors and look-around, which `patterns` resolves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from sfumato.constraints import characters
from sfumato.constraints.characters import Ranges

ENDLESS = -1
"""As the upper bound of a repetition: there is none."""
NEVER = 1 << 60
"""Characters of the shortest text where there is none."""
MOST = 50_000_000
"""Repetitions: no answer has more characters, so that a higher bound is none, and what needs more has no text."""

ExpressionKind = Literal["characters", "sequence", "either", "repeat", "both", "not"]
_KINDS: tuple[ExpressionKind, ...] = get_args(ExpressionKind)
TextForm = Literal["plain", "json", "gemma"]
"""How a text stands in an answer: as it is, inside a string of JSON, or inside a string of Gemma's call notation."""


class Expression:
    """An expression; a value that does not change.

    `characters` has `ranges`, the others have `parts` (one of them in `repeat` and `not`), and `repeat` has `low` and
    `high`, which may be `ENDLESS`. A sequence without parts is the empty text, and a set without ranges has no text.
    """

    _hash: int
    is_plain: bool
    size: int

    __slots__ = ("_hash", "high", "is_nullable", "is_plain", "kind", "least", "low", "parts", "ranges", "size")

    def __init__(
        self, kind: ExpressionKind, parts: tuple[Expression, ...] = (), ranges: Ranges = (), low: int = 0, high: int = 0
    ) -> None:
        self.kind, self.parts, self.ranges, self.low, self.high = kind, parts, ranges, low, high
        self.is_nullable = _is_nullable(self)
        """Whether it allows the empty text."""
        self.least = min(_least(self), NEVER)
        """No text of it has fewer characters; `NEVER` where it has no text."""
        self.is_plain = kind not in ("both", "not") and all(part.is_plain for part in parts)
        """Without intersections and complements: `least` is exact."""
        self.size = 1 + sum(part.size for part in parts)
        """Nodes of the tree."""
        self._hash = hash(
            (_KINDS.index(kind), low, high, ranges, *(part._hash for part in parts))
        )  # the same in each process

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expression) or self._hash != other._hash:
            return False
        mine = self.kind, self.low, self.high, self.ranges, self.parts
        return mine == (other.kind, other.low, other.high, other.ranges, other.parts)

    def __reduce__(self) -> tuple[object, ...]:
        return Expression, (self.kind, self.parts, self.ranges, self.low, self.high)

    def __repr__(self) -> str:
        return f"<{written(self)[:200]}>"


def _is_nullable(node: Expression) -> bool:
    match node.kind:
        case "characters":
            return False
        case "either":
            return any(part.is_nullable for part in node.parts)
        case "repeat":
            return node.low == 0 or node.parts[0].is_nullable
        case "not":
            return not node.parts[0].is_nullable
        case _:
            return all(part.is_nullable for part in node.parts)


def _least(node: Expression) -> int:
    match node.kind:
        case "characters":
            return 1 if node.ranges else NEVER
        case "sequence":
            return sum(part.least for part in node.parts)
        case "either":
            return min(part.least for part in node.parts)
        case "repeat":
            return node.low * node.parts[0].least
        case "both":
            return max(part.least for part in node.parts)
        case "not":
            return 0


EMPTY = Expression("sequence")
"""The empty text alone."""
NOTHING = Expression("characters")
"""No text."""
ANY = Expression("characters", ranges=characters.ALL)
"""Any one character."""
ANYTHING = Expression("repeat", (ANY,), high=ENDLESS)
"""Any text."""


# ---- expressions of expressions --------------------------------------------------------------------------------------


def chars(ranges: Ranges) -> Expression:
    """One character of a set."""
    return Expression("characters", ranges=ranges) if ranges else NOTHING


def literal(text: str) -> Expression:
    """This text alone."""
    return sequence(chars(characters.of(character)) for character in text)


def sequence(parts: Iterable[Expression]) -> Expression:
    """One after the other."""
    flat: list[Expression] = []
    for part in parts:
        for one in part.parts if part.kind == "sequence" else (part,):
            last = _repetition(flat[-1]) if flat else None
            base, low, high = _repetition(one)
            if last is not None and last[0] == base and "repeat" in (one.kind, flat[-1].kind):
                flat[-1] = repeat(base, last[1] + low, ENDLESS if ENDLESS in (last[2], high) else last[2] + high)
            else:
                flat.append(one)
    if any(part.least == NEVER for part in flat):
        return NOTHING
    return flat[0] if len(flat) == 1 else Expression("sequence", tuple(flat)) if flat else EMPTY


def _repetition(node: Expression) -> tuple[Expression, int, int]:
    """An expression as a repetition: of what, how often at least and at most."""
    return (node.parts[0], node.low, node.high) if node.kind == "repeat" else (node, 1, 1)


def either(parts: Iterable[Expression]) -> Expression:
    """One of several."""
    kept: dict[Expression, None] = {}
    single: list[Ranges] = []
    for part in parts:
        for one in part.parts if part.kind == "either" else (part,):
            if one.kind == "characters":
                single.append(one.ranges)
            else:
                kept[one] = None
    if ANYTHING in kept:
        return ANYTHING
    if single and (ranges := characters.union(*single)):
        kept[chars(ranges)] = None
    if len(kept) > 1:
        kept = dict.fromkeys(_joined(list(kept)))
    if len(kept) < 2:
        return next(iter(kept), NOTHING)
    return Expression("either", tuple(sorted(kept, key=hash)))


def _joined(parts: list[Expression]) -> list[Expression]:
    """Repetitions of the same whose counts overlap or touch become one; so does the empty text beside them."""
    counts: dict[Expression, list[tuple[int, int]]] = {}
    has_empty = False
    for part in parts:
        if part == EMPTY:
            has_empty = True
            continue
        base, low, high = _repetition(part)
        counts.setdefault(base, []).append((low, high))
    joined: list[Expression] = []
    for base, pairs in counts.items():
        pairs.sort()
        if has_empty and pairs[0][0] == 1:
            pairs[0] = 0, pairs[0][1]
        low, high = pairs[0]
        for next_low, next_high in pairs[1:]:
            if high != ENDLESS and next_low > high + 1:
                joined.append(repeat(base, low, high))
                low, high = next_low, next_high
            else:
                high = ENDLESS if ENDLESS in (high, next_high) else max(high, next_high)
        joined.append(repeat(base, low, high))
    if has_empty and not any(part.is_nullable for part in joined):
        joined.append(EMPTY)
    return joined


def repeat(node: Expression, low: int, high: int) -> Expression:
    """An expression `low` to `high` times, `high` included; `ENDLESS` is no bound."""
    if high == 0 or node == EMPTY:
        return EMPTY
    if node.least == NEVER:
        return EMPTY if low == 0 else NOTHING
    if node.is_nullable:
        low = 0
    if node.kind == "repeat" and _leaves_no_gap(node, low, high):
        base, inner_low, inner_high = _repetition(node)
        return repeat(base, low * inner_low, ENDLESS if ENDLESS in (inner_high, high) else high * inner_high)
    if low > MOST:
        return NOTHING
    high = ENDLESS if high > MOST else high
    return node if low == high == 1 else Expression("repeat", (node,), low=low, high=high)


def _leaves_no_gap(node: Expression, low: int, high: int) -> bool:
    """Whether `low` to `high` copies of a repetition are one: the counts of k copies touch those of k + 1."""
    if low == high:
        return True
    if node.high == ENDLESS:
        return low >= 1 or node.low <= 1
    return (low + 1) * node.low <= low * node.high + 1


def both(parts: Iterable[Expression]) -> Expression:
    """What all of several allow."""
    kept: dict[Expression, None] = {}
    for part in parts:
        kept |= dict.fromkeys(part.parts if part.kind == "both" else (part,))
    kept.pop(ANYTHING, None)
    if any(part.least == NEVER for part in kept):
        return NOTHING
    if EMPTY in kept:
        return EMPTY if all(part.is_nullable for part in kept) else NOTHING
    counted = [part for part in kept if _repetition(part)[0].kind == "characters"]
    if len(counted) > 1:
        first = counted[0]
        for part in counted[1:]:
            first = _both_counted(first, part)
        return both([first, *(part for part in kept if part not in counted)])
    if len(kept) < 2:
        return next(iter(kept), ANYTHING)
    return Expression("both", tuple(sorted(kept, key=hash)))


def _both_counted(one: Expression, other: Expression) -> Expression:
    """The intersection of two sets of characters, or repetitions of sets."""
    (first, low, high), (second, other_low, other_high) = _repetition(one), _repetition(other)
    low = max(low, other_low)
    high = max(high, other_high) if ENDLESS in (high, other_high) else min(high, other_high)
    if high != ENDLESS and high < low:
        return NOTHING
    return repeat(chars(characters.both(first.ranges, second.ranges)), low, high)


def other_than(node: Expression) -> Expression:
    """Every text that the expression does not allow."""
    if node.kind == "not":
        return node.parts[0]
    return ANYTHING if node.least == NEVER else NOTHING if node == ANYTHING else Expression("not", (node,))


# ---- llguidance's form -----------------------------------------------------------------------------------------------

_SHORT_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_ESCAPED = characters.ranges([(0, 31), (34, 34), (92, 92)])
"""What JSON writes as an escape."""
_UNESCAPED = characters.complement(_ESCAPED)


def written(node: Expression, form: TextForm = "plain") -> str:
    """The body of a terminal, in llguidance's Lark, of the texts of an expression.

    In the form "json" it stands for the inside of a string as `json.dumps(…, ensure_ascii=False)` writes it: a class
    has a quote or a line break as its escape. The forms "plain" and "gemma" have them as they are.
    """
    is_json = form == "json"
    if node.is_plain:
        return f"/{_regex(node, is_json) or '(?:)'}/"
    parts = [written(part, form) for part in node.parts]
    match node.kind:
        case "sequence":
            return f"({' '.join(parts)})"
        case "either":
            return f"({' | '.join(parts)})"
        case "both":
            for at, part in enumerate(node.parts):
                if part.kind == "not" and not all(other.kind == "not" for other in node.parts):
                    parts[at] = f"~{written(part.parts[0], form)}"
            return f"({' & '.join(parts)})"
        case "not":
            return f"({written(ANYTHING, form)} & ~{parts[0]})"
        case _:
            return f"({parts[0]}){_times(node)}"


def _times(node: Expression) -> str:
    low, high = node.low, node.high
    if (low, high) in ((0, ENDLESS), (1, ENDLESS), (0, 1)):
        return "*" if (low, high) == (0, ENDLESS) else "+" if low else "?"
    return f"{{{low}}}" if low == high else f"{{{low},{'' if high == ENDLESS else high}}}"


def _regex(node: Expression, is_json: bool) -> str:
    match node.kind:
        case "characters":
            return _quoted_class(node.ranges) if is_json else _class(node.ranges)
        case "sequence":
            return "".join(_regex(part, is_json) for part in node.parts)
        case "either":
            return f"(?:{'|'.join(_regex(part, is_json) for part in node.parts)})"
        case _:
            inner = _regex(node.parts[0], is_json)
            is_single = node.parts[0].kind in ("characters", "either")
            return f"{inner if is_single else f'(?:{inner})'}{_times(node)}"


def _code(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\x{{{code:x}}}"


def _class(ranges: Ranges) -> str:
    """A class in brackets; one character stands alone."""
    if ranges == characters.ALL:
        return "(?s:.)"
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _code(ranges[0][0])
    if not ranges:
        return r"[^\s\S]"
    inside = (_code(first) if first == last else f"{_code(first)}-{_code(last)}" for first, last in ranges)
    return f"[{''.join(inside)}]"


def _quoted_class(ranges: Ranges) -> str:
    """The same inside a string of JSON, in brackets of its own."""
    if not ranges:
        return _class(ranges)
    options = []
    if plain := characters.both(ranges, _UNESCAPED):
        options.append(_class(plain))
    escapes = [code for first, last in characters.both(ranges, _ESCAPED) for code in range(first, last + 1)]
    if short := "".join(_code(ord(_SHORT_ESCAPES[code])) for code in escapes if code in _SHORT_ESCAPES):
        options.append(rf"\x{{5c}}[{short}]")
    for half in (0, 1):
        digits = "".join(f"{code % 16:x}" for code in escapes if code >> 4 == half and code not in _SHORT_ESCAPES)
        if digits:
            options.append(rf"\x{{5c}}u00{half}[{digits}]")
    return options[0] if len(options) == 1 and plain else f"(?:{'|'.join(options)})"
