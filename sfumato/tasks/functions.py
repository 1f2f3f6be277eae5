"""Small Python functions, made at random with the words that say what they return.

They come from pairs of a phrase and its code, both with slots in braces for names, numbers, letters and smaller pairs:
"{u} plus {v}" and "{u} + {v}", where {u} may be "twice a" and "2 * a". What a phrase means is the same wherever it
stands, so that the words decide the code; other code may do the same.

    a b c n         numbers; n is a count from 1        k l     two digits from 2 to 9, k the smaller
    s t             texts                               q r     two letters
    z y             lists of numbers                    i o     names for an item and for a result
    u v             numbers worked out (`NUMBERS`)      p       a condition (`CONDITIONS`)
    e f             texts worked out (`STRINGS`, `TAILS`)       w   lists worked out (`RUNS`)
    g h             which items of a list (`ITEMS`), and what becomes of one (`IMAGES`)
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

import numpy as np

Pair = tuple[str, str]
"""Words, and the code that they stand for. Code of several lines is a whole body."""

NUMBERS: Sequence[Pair] = (
    ("{a}", "{a}"),
    ("twice {a}", "2 * {a}"),
    ("{k} times {a}", "{k} * {a}"),
    ("{a} times {b}", "{a} * {b}"),
    ("{a} squared", "{a} * {a}"),
    ("half of {a}", "{a} // 2"),
    ("{a} modulo {k}", "{a} % {k}"),
    ("the size of {a}", "abs({a})"),
)
"""What a sum is made of."""
CONDITIONS: Sequence[Pair] = (
    ("{u} is larger than {v}", "{u} > {v}"),
    ("{u} is less than {v}", "{u} < {v}"),
    ("{u} is at least {v}", "{u} >= {v}"),
    ("{u} is at most {v}", "{u} <= {v}"),
    ("{u} equals {v}", "{u} == {v}"),
    ("{u} is not {v}", "{u} != {v}"),
    ("{u} is above {k}", "{u} > {k}"),
    ("{u} is below {k}", "{u} < {k}"),
    ("{u} is above {v} plus {k}", "{u} > {v} + {k}"),
    ("{u} is at most {v} minus {k}", "{u} <= {v} - {k}"),
    ("{u} plus {v} is below {k}", "{u} + {v} < {k}"),
    ("{u} minus {v} is at least {k}", "{u} - {v} >= {k}"),
    ("the larger of {u} and {v} is {k}", "max({u}, {v}) == {k}"),
    ("{a} is even", "{a} % 2 == 0"),
    ("{a} is odd", "{a} % 2 == 1"),
    ("{k} divides {a}", "{a} % {k} == 0"),
    ("{a} lies from {b} to {c}", "{b} <= {a} <= {c}"),
    ("{a} lies from {k} to {l}", "{k} <= {a} <= {l}"),
    ("{a} and {b} are above {k}", "{a} > {k} and {b} > {k}"),
    ("{a} or {b} is below {k}", "{a} < {k} or {b} < {k}"),
    ("{a} is even and above {k}", "{a} % 2 == 0 and {a} > {k}"),
    ("{a} is below {k} or above {l}", "{a} < {k} or {a} > {l}"),
)
ARITHMETIC: Sequence[Pair] = (
    ("{u} plus {v}", "{u} + {v}"),
    ("{u} minus {v}", "{u} - {v}"),
    ("{v} subtracted from {u}", "{u} - {v}"),
    ("{u} plus {v} minus {k}", "{u} + {v} - {k}"),
    ("{u} minus {v} plus {k}", "{u} - {v} + {k}"),
    ("{k} plus {u}", "{k} + {u}"),
    ("{u} minus {k}", "{u} - {k}"),
    ("the larger of {u} and {v}", "max({u}, {v})"),
    ("the smaller of {u} and {v}", "min({u}, {v})"),
    ("the distance of {u} and {v}", "abs({u} - {v})"),
    ("the sum of {u} and {v}, times {k}", "({u} + {v}) * {k}"),
    ("the sum of {a} and {k}, squared", "({a} + {k}) ** 2"),
    ("half the sum of {u} and {v}", "({u} + {v}) // 2"),
    ("{a} kept from {k} to {l}", "max({k}, min({a}, {l}))"),
    ("the sum of {a}, {b} and {c}", "{a} + {b} + {c}"),
    ("the middle of {a}, {b} and {c}", "sorted([{a}, {b}, {c}])[1]"),
    ("the larger of {u} and {v}, plus {k}", "max({u}, {v}) + {k}"),
)
BRANCHES: Sequence[Pair] = (
    ("{u} if {p}, else {v}", "if {p}:\n  return {u}\nreturn {v}"),
    ("{u}, but {v} if {p}", "{o} = {u}\nif {p}:\n  {o} = {v}\nreturn {o}"),
    ("{u} if {p}, else {k}", "return {u} if {p} else {k}"),
    ("{k} if {p}, else {l}", "if {p}:\n  return {k}\nreturn {l}"),
    ("{u}, {k} more if {p}", "{o} = {u}\nif {p}:\n  {o} += {k}\nreturn {o}"),
    ("'{q}' if {p}, else '{r}'", "if {p}:\n  return '{q}'\nreturn '{r}'"),
)
STRINGS: Sequence[Pair] = (
    ("{s} in upper case", "{s}.upper()"),
    ("{s} in lower case", "{s}.lower()"),
    ("{s} without its first letter", "{s}[1:]"),
    ("{s} without its last letter", "{s}[:-1]"),
    ("the first {k} letters of {s}", "{s}[:{k}]"),
    ("the last {k} letters of {s}", "{s}[-{k}:]"),
    ("{s} without its first {k} letters", "{s}[{k}:]"),
    ("{s} without its last {k} letters", "{s}[:-{k}]"),
    ("the first {n} letters of {s}", "{s}[:{n}]"),
    ("{s} from letter {n} on", "{s}[{n}:]"),
    ("every second letter of {s}", "{s}[::2]"),
    ("{s} backwards", "{s}[::-1]"),
    ("{s} with '{q}' for '{r}'", "{s}.replace('{r}', '{q}')"),
)
"""Strings made of one string, each an operand that a dot or a bracket may follow."""
TAILS: Sequence[Pair] = (
    ("{e}", "{e}"),
    ("{e}, backwards", "{e}[::-1]"),
    ("{e}, in upper case", "{e}.upper()"),
    ("{e}, in lower case", "{e}.lower()"),
    ("{e}, without its last letter", "{e}[:-1]"),
    ("{e}, without its first {k}", "{e}[{k}:]"),
    ("{e}, its first {k} letters", "{e}[:{k}]"),
    ("{e}, its last {k} letters", "{e}[-{k}:]"),
    ("{e}, every second letter", "{e}[::2]"),
    ("{e}, '{q}' for '{r}'", "{e}.replace('{r}', '{q}')"),
)
"""What is done to those, after a comma."""
TEXTS: Sequence[Pair] = (
    ("{f}", "{f}"),
    ("{f}, {k} times", "{f} * {k}"),
    ("{f}, then {t}", "{f} + {t}"),
    ("{t}, then {f}", "{t} + {f}"),
    ("{e} and {t} with '{q}' between", "{e} + '{q}' + {t}"),
    ("'{q}' around {e}", "'{q}' + {e} + '{q}'"),
    ("how often '{q}' is in {e}", "{e}.count('{q}')"),
    ("the length of {s} plus {u}", "len({s}) + {u}"),
    ("the lengths of {s} and {t} plus {u}", "len({s}) + len({t}) + {u}"),
    ("whether {e} begins with {t}", "{e}.startswith({t})"),
    ("whether {e} ends with '{q}'", "{e}.endswith('{q}')"),
    ("whether '{q}' is in {f}", "'{q}' in {f}"),
    ("whether {e} is {t} backwards", "{e} == {t}[::-1]"),
    ("the words of {e}", "{e}.split()"),
    ("the number of words of {s} plus {u}", "len({s}.split()) + {u}"),
    ("the words of {e} with '{q}' between", "'{q}'.join({e}.split())"),
    ("the letters of {e}, in order", "''.join(sorted({e}))"),
    ("{e} if '{q}' is in {t}, else {s}", "{e} if '{q}' in {t} else {s}"),
)
ITEMS: Sequence[Pair] = (
    ("even", "{i} % 2 == 0"),
    ("odd", "{i} % 2 == 1"),
    ("above {k}", "{i} > {k}"),
    ("below {k}", "{i} < {k}"),
    ("at least {k}", "{i} >= {k}"),
    ("at most {k}", "{i} <= {k}"),
    ("other than {k}", "{i} != {k}"),
    ("above {a}", "{i} > {a}"),
    ("below {a}", "{i} < {a}"),
)
"""Which items of a list."""
IMAGES: Sequence[Pair] = (
    ("twice {i}", "2 * {i}"),
    ("{k} times {i}", "{k} * {i}"),
    ("{i} squared", "{i} * {i}"),
    ("{i} plus {k}", "{i} + {k}"),
    ("{i} minus {k}", "{i} - {k}"),
    ("{i} plus {a}", "{i} + {a}"),
    ("{i} minus {a}", "{i} - {a}"),
    ("{a} minus {i}", "{a} - {i}"),
    ("the size of {i}", "abs({i})"),
)
"""What becomes of an item."""
RUNS: Sequence[Pair] = (
    ("{z}", "{z}"),
    ("{z} in order", "sorted({z})"),
    ("{z} backwards", "{z}[::-1]"),
    ("the first {k} of {z}", "{z}[:{k}]"),
    ("the last {k} of {z}", "{z}[-{k}:]"),
    ("the first {n} of {z}", "{z}[:{n}]"),
    ("every second of {z}", "{z}[::2]"),
    ("{z} without its first", "{z}[1:]"),
    ("{z} without its last", "{z}[:-1]"),
    ("the smallest {k} of {z}", "sorted({z})[:{k}]"),
    ("the largest {k} of {z}", "sorted({z})[-{k}:]"),
)
"""Lists made of one list."""
LISTS: Sequence[Pair] = (
    ("the sum of {w} plus {u}", "sum({w}) + {u}"),
    ("the largest of {w} minus {u}", "max({w}) - {u}"),
    ("the smallest of {w} plus {u}", "min({w}) + {u}"),
    ("{u} times the largest less the smallest of {z}", "{u} * (max({z}) - min({z}))"),
    ("{w}, then {y}", "{w} + {y}"),
    ("{y}, then {w}", "{y} + {w}"),
    ("the first of {z} plus {u}", "{z}[0] + {u}"),
    ("the last of {z} minus {u}", "{z}[-1] - {u}"),
    ("how often {u} is in {w}", "{w}.count({u})"),
    ("whether {u} is in {w}", "{u} in {w}"),
    ("{w} with {u} at its end", "{w} + [{u}]"),
    ("{w} with {u} in front", "[{u}] + {w}"),
    ("{h} for all {i} of {w}", "[{h} for {i} in {w}]"),
    ("the sum of {h} for all {i} of {w}", "sum({h} for {i} in {w})"),
    ("all {g} in {w}", "[{i} for {i} in {w} if {g}]"),
    ("{h} for all {i} {g} in {z}", "[{h} for {i} in {z} if {g}]"),
    ("the sum of all {g} in {w}", "sum({i} for {i} in {w} if {g})"),
    ("the number of all {g} in {w}", "len([{i} for {i} in {w} if {g}])"),
)
LOOPS: Sequence[Pair] = (
    ("the sum of all {g} in {z}", "{o} = 0\nfor {i} in {z}:\n  if {g}:\n    {o} += {i}\nreturn {o}"),
    ("the number of all {g} in {z}", "{o} = 0\nfor {i} in {z}:\n  if {g}:\n    {o} += 1\nreturn {o}"),
    ("all {g} in {z}", "{o} = []\nfor {i} in {z}:\n  if {g}:\n    {o}.append({i})\nreturn {o}"),
    ("the first {g} in {z}, else {l}", "for {i} in {z}:\n  if {g}:\n    return {i}\nreturn {l}"),
    ("the sum of {h} for all {i} of {z}", "{o} = 0\nfor {i} in {z}:\n  {o} += {h}\nreturn {o}"),
    ("{h} for all {i} of {z}", "{o} = []\nfor {i} in {z}:\n  {o}.append({h})\nreturn {o}"),
    ("the sum of {h} for all {i} below {n}", "{o} = 0\nfor {i} in range({n}):\n  {o} += {h}\nreturn {o}"),
    ("{k} times all of {z}, multiplied", "{o} = {k}\nfor {i} in {z}:\n  {o} *= {i}\nreturn {o}"),
    ("{a} less all of {z}", "for {i} in {z}:\n  {a} -= {i}\nreturn {a}"),
    ("{s} with each letter {k} times", "{o} = ''\nfor {i} in {s}:\n  {o} += {i} * {k}\nreturn {o}"),
    ("{s} with '{q}' after each letter", "{o} = ''\nfor {i} in {s}:\n  {o} += {i} + '{q}'\nreturn {o}"),
    ("{s} without '{q}'", "{o} = ''\nfor {i} in {s}:\n  if {i} != '{q}':\n    {o} += {i}\nreturn {o}"),
    ("{a} with {u} added {n} times", "for {i} in range({n}):\n  {a} += {u}\nreturn {a}"),
)
KINDS: Mapping[str, Sequence[Pair]] = {
    "arithmetic": ARITHMETIC,
    "comparison": [(f"whether {words}", code) for words, code in CONDITIONS],
    "branch": BRANCHES,
    "text": TEXTS,
    "list": LISTS,
    "loop": LOOPS,
}
"""The kinds of items by name."""

_PARTS: Mapping[str, Sequence[Pair]] = {
    "u": NUMBERS, "v": NUMBERS, "p": CONDITIONS, "e": (("{s}", "{s}"), *STRINGS), "f": TAILS,
    "w": RUNS, "g": ITEMS, "h": IMAGES,
}  # fmt: skip
NAMES = {"abc": "abcxy", "st": "stw", "n": "nmk", "zy": ("xs", "ys", "zs"), "i": "xiev", "o": "rtz"}
"""Slots, and the names that they take."""
_SLOT = re.compile(r"\{(\w)\}")
_LETTERS = "abcdefgh"
_ALPHABET = "abcdABC  "
"""What texts of arguments are made of."""


# ---- making ----------------------------------------------------------------------------------------------------------


def one_of(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One of them, each equally likely."""
    return values[int(rng.integers(len(values)))]


class _Scope:
    """What the slots of one pair stand for; a smaller pair has its own numbers, and the names of the whole."""

    def __init__(self, rng: np.random.Generator, names: Mapping[str, str]) -> None:
        self.rng, self.names = rng, names
        numbers = [names[slot] for slot in "abc"]
        least, most = sorted(int(number) for number in rng.choice(np.arange(2, 10), 2, replace=False))
        letters = rng.permutation(len(_LETTERS))
        self.pairs = {slot: (name, name) for slot, name in names.items()}
        for slot, place in zip("abc", rng.permutation(3), strict=True):
            self.pairs[slot] = (numbers[place], numbers[place])
        for slot, text in {
            "k": str(least),
            "l": str(most),
            "q": _LETTERS[letters[0]],
            "r": _LETTERS[letters[1]],
        }.items():
            self.pairs[slot] = (text, text)

    def fill(self, pair: Pair) -> Pair:
        """The words and the code with all their slots filled."""
        words, code = pair
        return _SLOT.sub(lambda slot: self._of(slot[1])[0], words), _SLOT.sub(lambda slot: self._of(slot[1])[1], code)

    def _of(self, slot: str) -> Pair:
        while slot not in self.pairs:
            parts = _PARTS[slot]
            part = _Scope(self.rng, self.names).fill(parts[int(self.rng.integers(len(parts)))])
            if part not in (self.pairs.get("u"), self.pairs.get("v")):  # no a minus a
                self.pairs[slot] = part
        return self.pairs[slot]


def _names(rng: np.random.Generator) -> dict[str, str]:
    """Slot -> name, all different."""
    names: dict[str, str] = {}
    for slots, values in NAMES.items():
        free = [name for name in values if name not in names.values()]
        names |= {slot: free[place] for slot, place in zip(slots, rng.permutation(len(free)), strict=False)}
    return names


def random_function(rng: np.random.Generator, kind: str) -> str:
    """The source of a random function of a kind of `KINDS`: a line of words, and up to five of code."""
    names = _names(rng)
    scope = _Scope(rng, names)
    pairs = KINDS[kind]
    words, code = scope.fill(pairs[int(rng.integers(len(pairs)))])
    lines = code.split("\n") if "return" in code else [f"return {code}"]
    parameters = [name for slot, name in names.items() if slot not in "io" and _names_in(words, name)]
    order = ", ".join(parameters[place] for place in rng.permutation(len(parameters)))
    return "\n  ".join([f"def {one_of(rng, 'fgh')}({order}):", f'"{words}"', *lines])


def _names_in(words: str, name: str) -> bool:
    """Is this name one of the words, and no letter in quotes?"""
    return re.search(rf"(?<!['\w]){name}(?!['\w])", words) is not None


# ---- arguments -------------------------------------------------------------------------------------------------------


def random_arguments(rng: random.Random, source: str) -> list[int | str | list[int]]:
    """Arguments for a function, of the types that its names stand for: lists, texts, counts, numbers.

    Numbers are few, and some of them are near one of the code's, so that equal ones are there; a text may be an end of
    another one, or another one backwards.
    """
    near = [*map(int, re.findall(r"\d+", source))] or [0]
    few = [rng.choice(near) + rng.randint(-1, 1) for _ in range(2)]
    few += [rng.randint(*rng.choice([(-9, 12), (-3, 5)])) for _ in range(3)]
    letters = _ALPHABET + 3 * "".join(re.findall(r"'(\w)'", source))
    arguments: list[int | str | list[int]] = []
    text = ""
    for name in re.findall(r"\w+", source.partition(")")[0].partition("(")[2]):
        if name in NAMES["zy"]:
            arguments.append([_number(rng, few) for _ in range(rng.randint(1, 8))])
        elif name in NAMES["st"]:
            text = _text(rng, letters, text)
            arguments.append(text)
        else:
            arguments.append(rng.randint(1, 6) if name in NAMES["n"] else _number(rng, few))
    return arguments


def _number(rng: random.Random, few: Sequence[int]) -> int:
    return rng.choice(few) + rng.choice((-1, 0, 0, 1))


def _text(rng: random.Random, letters: str, earlier: str) -> str:
    if earlier and rng.random() < 0.6:
        place = rng.randrange(len(earlier))
        return rng.choice([earlier[place:], earlier[: place + 1], earlier[::-1]])
    return "".join(rng.choices(letters, k=rng.randint(1, 12)))
