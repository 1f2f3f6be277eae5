"""Code infilling: a small Python function with a gap, and the piece of code that belongs there.

An item is a function of one to four lines, its docstring in words, and the place of its gap: an expression or a line,
written `___`. The words say what the function returns, so that the words and the rest of the code decide what is right,
not the code's shape alone. An answer is right where the whole function then gives what the generator's own gives, on
`INPUTS` lists of arguments that the item fixes: any code that computes the same is right. It runs in `evaluate`, which
knows a small part of Python and has a budget; nothing here is handed to Python itself.

A function is made from pairs of a phrase and its code with slots for names, numbers and smaller pairs: "{u} plus {v}"
and "{u} + {v}", where {u} may be "twice a" and "2 * a".
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks.evaluate import EvaluationError, Value, function_of, is_same, run

GAP = "___"
LONGEST_PROMPT = 120
"""Characters of the user's message."""
SHORTEST_PIECE, LONGEST_PIECE = 3, 30
"""Characters of what is missing."""
LONGEST_ANSWER = 200
"""Characters of an answer that is looked at."""
INPUTS = 8
"""Lists of arguments on which a function is run."""
BUDGET = 2000
"""Steps of the evaluator for one of them."""

_HEAD = "Fill the gap:\n"
_CANDIDATES = 40
_TRIES = 1000

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
TEXTS: Sequence[Pair] = (
    ("{e}", "{e}"),
    ("{e}, backwards", "{e}[::-1]"),
    ("{e}, {k} times", "{e} * {k}"),
    ("{e}, then {t}", "{e} + {t}"),
    ("{t}, then {e}", "{t} + {e}"),
    ("{s} and {t} with '{q}' between", "{s} + '{q}' + {t}"),
    ("'{q}' around {s}", "'{q}' + {s} + '{q}'"),
    ("how often '{q}' is in {e}", "{e}.count('{q}')"),
    ("the length of {s} plus {k}", "len({s}) + {k}"),
    ("the lengths of {s} and {t}, added", "len({s}) + len({t})"),
    ("whether {s} begins with {t}", "{s}.startswith({t})"),
    ("whether {s} ends with '{q}'", "{s}.endswith('{q}')"),
    ("whether '{q}' is in {e}", "'{q}' in {e}"),
    ("whether {s} is the same backwards", "{s} == {s}[::-1]"),
    ("the words of {s}", "{s}.split()"),
    ("the number of words of {s}", "len({s}.split())"),
    ("the words of {s} with '{q}' between", "'{q}'.join({s}.split())"),
    ("the letters of {e}, in order", "''.join(sorted({e}))"),
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
LISTS: Sequence[Pair] = (
    ("the sum of {z} plus {k}", "sum({z}) + {k}"),
    ("the largest of {z} minus {k}", "max({z}) - {k}"),
    ("the smallest of {z} plus {a}", "min({z}) + {a}"),
    ("the largest less the smallest of {z}", "max({z}) - min({z})"),
    ("{z} in order", "sorted({z})"),
    ("{z} backwards", "{z}[::-1]"),
    ("the first {k} of {z}", "{z}[:{k}]"),
    ("the last {k} of {z}", "{z}[-{k}:]"),
    ("the first {n} of {z}", "{z}[:{n}]"),
    ("the smallest {n} of {z}", "sorted({z})[:{n}]"),
    ("the largest {k} of {z}", "sorted({z})[-{k}:]"),
    ("the first of {z} plus {u}", "{z}[0] + {u}"),
    ("the last of {z} minus {u}", "{z}[-1] - {u}"),
    ("how often {a} is in {z}", "{z}.count({a})"),
    ("whether {u} is in {z}", "{u} in {z}"),
    ("{z} with {u} at its end", "{z} + [{u}]"),
    ("{z} with {u} in front", "[{u}] + {z}"),
    ("{h} for all {i} of {z}", "[{h} for {i} in {z}]"),
    ("the sum of {h} for all {i} of {z}", "sum({h} for {i} in {z})"),
    ("all {g} in {z}", "[{i} for {i} in {z} if {g}]"),
    ("the sum of all {g} in {z}", "sum({i} for {i} in {z} if {g})"),
    ("the number of all {g} in {z}", "len([{i} for {i} in {z} if {g}])"),
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
    "u": NUMBERS, "v": NUMBERS, "p": CONDITIONS, "e": (("{s}", "{s}"), *STRINGS), "g": ITEMS, "h": IMAGES
}  # fmt: skip
_NAMES = {"abc": "abcxy", "st": "stw", "n": "nmk", "z": ("xs", "ys", "zs"), "i": "xiev", "o": "rtz"}
"""Slots, and the names that they take."""
_SLOT = re.compile(r"\{(\w)\}")
_LETTERS = "abcdefgh"
_ALPHABET = "abcdeghABC  "
"""What strings of inputs are made of."""


@dataclass(frozen=True)
class GapFunction:
    """An item, taken apart."""

    kind: str
    code: str
    """The function, its gap written `___`."""
    piece: str
    """What the generator had in the gap."""

    def filled(self, piece: str) -> str:
        """The function with that in its gap."""
        return self.code.replace(GAP, piece)


def read(item: str) -> GapFunction:
    """The parts of an item; InputError for a text that is none."""
    try:
        kind, code, piece = json.loads(item)
        if not (kind in KINDS and code.count(GAP) == 1 and isinstance(piece, str)):
            raise ValueError("a kind, code with one gap, and a piece")
        return GapFunction(kind, code, piece)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{item[:60]!r} is no item of infill; take one that `generate` made") from error


def generate(rng: np.random.Generator, kind: str | None = None) -> str:
    """A random item, of a random kind unless one is named. InputError for a kind that there is not."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"there is no kind {kind!r}; the kinds are: {', '.join(KINDS)}")
    name = _one(rng, [*KINDS]) if kind is None else kind
    for _ in range(_TRIES):
        item = _with_gap(rng, name, _function(rng, name))
        if item is not None:
            return json.dumps(item, separators=(",", ":"))
    raise InputError(f"no item of {_TRIES} was short enough; allow prompts of more than {LONGEST_PROMPT} characters")


def prompt(item: str) -> str:
    """The user's message for an item: a line of words, and the function with its gap."""
    return _HEAD + read(item).code


def answer(item: str) -> str:
    """The missing piece, and nothing else."""
    return read(item).piece


def kind(item: str) -> str:
    """Which kind of code the item has."""
    return read(item).kind


# ---- making ----------------------------------------------------------------------------------------------------------


def _one(rng: np.random.Generator, values: Sequence[str]) -> str:
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
        if slot not in self.pairs:
            parts = _PARTS[slot]
            self.pairs[slot] = _Scope(self.rng, self.names).fill(parts[int(self.rng.integers(len(parts)))])
        return self.pairs[slot]


def _names(rng: np.random.Generator) -> dict[str, str]:
    """Slot -> name, all different."""
    names: dict[str, str] = {}
    for slots, values in _NAMES.items():
        free = [name for name in values if name not in names.values()]
        names |= {slot: free[place] for slot, place in zip(slots, rng.permutation(len(free)), strict=False)}
    return names


def _function(rng: np.random.Generator, kind: str) -> str | None:
    """The source of a random function; None where it would say nothing: a minus a."""
    names = _names(rng)
    scope = _Scope(rng, names)
    pairs = KINDS[kind]
    words, code = scope.fill(pairs[int(rng.integers(len(pairs)))])
    if "u" in scope.pairs and scope.pairs["u"] == scope.pairs.get("v"):
        return None
    lines = code.split("\n") if "return" in code else [f"return {code}"]
    parameters = [name for slot, name in names.items() if slot not in "io" and _names_in(words, name)]
    order = ", ".join(parameters[place] for place in rng.permutation(len(parameters)))
    return "\n  ".join([f"def {_one(rng, 'fgh')}({order}):", f'"{words}"', *lines])


def _names_in(words: str, name: str) -> bool:
    """Is this name one of the words, and no letter in quotes?"""
    return re.search(rf"(?<!['\w]){name}(?!['\w])", words) is not None


def _with_gap(rng: np.random.Generator, kind: str, source: str | None) -> tuple[str, str, str] | None:
    """The item of a function, with a random expression or line of it missing; None where nothing fits."""
    if source is None:
        return None
    pieces = _pieces(source)
    if not pieces:
        return None
    start, end = pieces[int(rng.integers(len(pieces)))]
    code = source[:start] + GAP + source[end:]
    return (kind, code, source[start:end]) if len(_HEAD + code) <= LONGEST_PROMPT else None


def _pieces(source: str) -> list[tuple[int, int]]:
    """Where a piece could be missing: from which character to which. Lines are there twice where there are several."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    lines = source.split("\n")
    starts = [0, *(place + 1 for place, letter in enumerate(source) if letter == "\n")]
    pieces = [
        (starts[node.lineno - 1] + node.col_offset, starts[node.lineno - 1] + node.end_col_offset)
        for statement in function.body[1:]
        for node in ast.walk(statement)
        if isinstance(node, ast.expr) and node.end_col_offset is not None
    ]
    for place, line in enumerate(lines[2:], 2):
        pieces += [(starts[place] + len(line) - len(line.lstrip()), starts[place] + len(line))] * min(2, len(lines) - 2)
    return [piece for piece in pieces if SHORTEST_PIECE <= piece[1] - piece[0] <= LONGEST_PIECE]


# ---- checking --------------------------------------------------------------------------------------------------------


def is_right(text: str, item: str) -> bool:
    """Does the function with this piece give what it should, on all inputs of the item? Never raises for an item."""
    one = read(item)
    if not parses(text, item):
        return False
    source = one.filled(text)
    for arguments, result in _trials(item):
        try:
            if not is_same(run(source, arguments, BUDGET), result):
                return False
        except EvaluationError:
            return False
    return True


def parses(text: str, item: str) -> bool:
    """Is the function with this piece Python at all? A piece is one line, and its gap's alone."""
    if len(text) > LONGEST_ANSWER or len(text.splitlines()) != 1:
        return False
    try:
        function_of(read(item).filled(text))
    except EvaluationError:
        return False
    return True


def inputs(item: str) -> list[list[Value]]:
    """The `INPUTS` lists of arguments that an item's function is run on: always the same ones."""
    return [arguments for arguments, _ in _trials(item)]


@lru_cache(maxsize=4096)
def _trials(item: str) -> tuple[tuple[list[Value], Value], ...]:
    """Arguments and what the generator's function gives for them, as many different results as there are."""
    one = read(item)
    source = one.filled(one.piece)
    rng = np.random.default_rng(zlib.crc32(item.encode()))
    names = re.findall(r"\w+", source.partition(")")[0].partition("(")[2])
    numbers = sorted({*map(int, re.findall(r"\d+", source))})
    by_result: dict[str, list[tuple[list[Value], Value]]] = {}
    for _ in range(_CANDIDATES):
        arguments = [_argument(rng, name, numbers) for name in names]
        try:
            result = run(source, arguments, BUDGET)
        except EvaluationError:
            continue
        by_result.setdefault(repr(result), []).append((arguments, result))
    trials = [trial for row in itertools.zip_longest(*by_result.values()) for trial in row if trial is not None]
    return tuple(trials[:INPUTS])


def _argument(rng: np.random.Generator, name: str, numbers: Sequence[int]) -> Value:
    """A random argument of the type that the name stands for; half of the numbers are near one of the code's."""
    if name in _NAMES["z"]:
        return [_number(rng, numbers) for _ in range(int(rng.integers(1, 7)))]
    if name in _NAMES["st"]:
        return "".join(_one(rng, _ALPHABET) for _ in range(int(rng.integers(1, 10))))
    return int(rng.integers(1, 7)) if name in _NAMES["n"] else _number(rng, numbers)


def _number(rng: np.random.Generator, numbers: Sequence[int]) -> int:
    if numbers and rng.random() < 0.5:
        return numbers[int(rng.integers(len(numbers)))] + int(rng.integers(-1, 2))
    return int(rng.integers(-9, 13))
