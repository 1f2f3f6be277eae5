"""Sets of characters: ranges of code points, and what the classes of regular expressions mean in several dialects.

JSON Schema's patterns are read by ECMA's engines, Python's `re` and Rust's `regex`, which differ in what `\\d`, `\\w`,
`\\s`, a dot and a case mean. So every class has two sets: the *narrow* one is what all of them allow, the *wide* one
what any of them allows. A class that excludes takes the complement of the wide set, and so on: a text that our meaning
allows is one that each of them allows.

Deliberately absent: surrogates, which no text has, and scripts beyond the names of their letters.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import lru_cache

Ranges = tuple[tuple[int, int], ...]
"""First and last code points, in order, neither overlapping nor adjacent."""

MAX_PIECES = 24
"""Ranges of a class that excludes by a property of Unicode: beyond the largest, it allows less than it might."""

ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
NONE: Ranges = ()


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """These ranges in order, those that touch joined, without surrogates."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    if all(last < 0xD800 or first > 0xDFFF for first, last in joined):
        return tuple(joined)
    return both(tuple(joined), ALL)


def of(text: str) -> Ranges:
    """The characters of a text."""
    return ranges((ord(character), ord(character)) for character in text)


def union(*sets: Ranges) -> Ranges:
    """What is in any of them."""
    return sets[0] if len(sets) == 1 else ranges(pair for one in sets for pair in one)


def complement(one: Ranges) -> Ranges:
    """All other characters."""
    starts = [0, *(last + 1 for _, last in one)]
    ends = [*(first - 1 for first, _ in one), 0x10FFFF]
    return both(tuple(pair for pair in zip(starts, ends, strict=True) if pair[0] <= pair[1]), ALL)


def both(one: Ranges, other: Ranges) -> Ranges:
    """What is in both."""
    shared, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        first, last = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if first <= last:
            shared.append((first, last))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(shared)


def contains(one: Ranges, code: int) -> bool:
    """Whether a code point is in the set."""
    at = bisect_right(one, (code, 0x110000)) - 1
    return at >= 0 and one[at][1] >= code


def _where(is_in: Callable[[str], bool]) -> Ranges:
    return ranges((code, code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and is_in(chr(code)))


@lru_cache(1)
def _categories() -> dict[str, Ranges]:
    """Unicode's general categories, of one letter and of two."""
    pairs: dict[str, list[tuple[int, int]]] = {}
    start, name = 0, unicodedata.category("\0")
    for code in range(1, 0x110001):
        new = unicodedata.category(chr(code)) if code < 0x110000 else ""
        if new != name:
            pairs.setdefault(name, []).append((start, code - 1))
            start, name = code, new
    sets = {name: ranges(some) for name, some in pairs.items()}
    for letter in "LMNPSZC":
        sets[letter] = union(*(one for name, one in sets.items() if name[0] == letter))
    return sets


def coarse(one: Ranges) -> Ranges:
    """Most of a set: of one in many pieces the largest beyond ASCII, since every piece is work at each step."""
    if len(one) <= MAX_PIECES:
        return one
    largest = sorted(one, key=lambda pair: pair[0] - pair[1] if pair[0] > 0x7F else -0x110000)
    return tuple(sorted(largest[:MAX_PIECES]))


# ---- the classes that have a letter ----------------------------------------------------------------------------------

_WORD = ranges([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = of(" \t\n\r\x0b\x0c")


def named_class(letter: str, is_wide: bool) -> Ranges:
    """The characters of `\\d`, `\\w`, `\\s` or their complements, narrow or wide."""
    if letter.isupper():
        others = complement(named_class(letter.lower(), not is_wide))
        return others if is_wide else coarse(others)
    if letter == "d":
        return _categories()["Nd"] if is_wide else ((0x30, 0x39),)
    if letter == "w":
        return _wide_word() if is_wide else _WORD
    return union(_SPACE, of("\x1c\x1d\x1e\x1f\x85\ufeff"), _categories()["Z"]) if is_wide else _SPACE


@lru_cache(1)
def _wide_word() -> Ranges:
    """Letters, marks, numbers, joiners, circled letters (Rust's), and what a later Unicode may make one of these."""
    sets = _categories()
    circled = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
    return union(*(sets[name] for name in ("L", "M", "N", "Pc", "Cn")), of("\u200c\u200d"), circled)


def dot(is_wide: bool, has_newlines: bool) -> Ranges:
    """The characters of a dot; with `has_newlines` it is any."""
    if has_newlines:
        return ALL
    return complement(of("\n") if is_wide else of("\n\r\u2028\u2029"))


_SCRIPTS = (
    "Latin Greek Cyrillic Armenian Hebrew Arabic Devanagari Bengali Thai Georgian Hangul Hiragana Katakana".split()
)
_LONG = {
    "Letter": "L", "Mark": "M", "Number": "N", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Other": "C",
    "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Decimal_Number": "Nd", "Space_Separator": "Zs",
    "Alphabetic": "L", "Uppercase": "Lu", "Lowercase": "Ll", "Alpha": "L", "punct": "P", "digit": "Nd",
}  # fmt: skip
_ALMOST = ("Alphabetic", "Uppercase", "Lowercase", "Alpha")
"""Properties of which the category is only a part."""


@lru_cache(64)
def unicode_property(name: str, is_wide: bool) -> Ranges | None:
    """The characters of `\\p{name}`; None where the name is not known, or only a part of its characters is (wide)."""
    name = name.rpartition("=")[2]
    if name in ("Any", "ASCII"):
        return ALL if name == "Any" else ((0, 0x7F),)
    if (short := _LONG.get(name, name)) in _categories():
        return None if is_wide and name in _ALMOST else _categories()[short]
    if is_wide or name not in (*_SCRIPTS, "Han"):
        return None
    if name == "Han":
        return ((0x4E00, 0x9FA5), (0x3400, 0x4DB5), (0x20000, 0x2A6D6))
    start = name.upper() + " "
    return both(_categories()["L"], _where(lambda character: unicodedata.name(character, "").startswith(start)))


# ---- upper and lower case --------------------------------------------------------------------------------------------

_ASCII = str.maketrans({chr(i): chr(i ^ 32) for i in (*range(65, 91), *range(97, 123))})


def any_case(one: Ranges, is_wide: bool) -> Ranges:
    """The set with the other cases of its letters: those of ASCII, or (wide) of all of Unicode."""
    if is_wide:
        kin = [family for family in _families() if any(contains(one, code) for code in family)]
        return union(one, ranges((code, code) for family in kin for code in family))
    letters = [chr(code) for code in range(65, 123) if chr(code).isalpha() and contains(one, code)]
    return union(one, of("".join(letters).translate(_ASCII)))


@lru_cache(1)
def _families() -> list[frozenset[int]]:
    """Characters that some dialect takes for one another without regard to case."""
    members: dict[int, set[int]] = {}
    for code in range(0x20000):
        character = chr(code)
        others = {character.lower(), character.upper(), character.casefold(), character.title()} - {character}
        for other in others:
            if len(other) != 1:
                continue
            family = members.setdefault(code, {code}) | members.setdefault(ord(other), {ord(other)})
            for member in family:
                members[member] = family
    return list({id(family): frozenset(family) for family in members.values()}.values())
