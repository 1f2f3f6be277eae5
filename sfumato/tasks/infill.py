"""Code infilling: a small Python function with a gap, and the piece of code that belongs there.

An item is a function of one to five lines, its docstring in words, and the place of its gap: an expression or a line,
written `___`. The words say what the function returns, so that the words and the rest of the code decide what is right,
not the code's shape alone. An answer is right where the whole function then gives what the generator's own gives, on
`INPUTS` lists of arguments that the item fixes: any code that computes the same is right. It runs in `evaluate`, which
knows a small part of Python and has a budget; nothing here is handed to Python itself. `functions` makes the functions.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks.evaluate import EvaluationError, Value, function_of, is_same, run
from sfumato.tasks.functions import KINDS, one_of, random_arguments, random_function

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
_CANDIDATES = 128
_DRAWS = 24
"""Results that must not all be the same, or the item is not taken."""
_TRIES = 1000


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
        parts = json.loads(item)
        kind, code, piece = parts
        if not (type(parts) is list and kind in KINDS and isinstance(code, str) and isinstance(piece, str)):
            raise ValueError("a kind, code and a piece")
        if code.count(GAP) != 1:
            raise ValueError("one gap")
        return GapFunction(kind, code, piece)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{item[:60]!r} is no item of infill; take one that `generate` made") from error


def generate(rng: np.random.Generator, kind: str | None = None) -> str:
    """A random item, of a random kind unless one is named. InputError for a kind that there is not."""
    if kind is not None and kind not in KINDS:
        raise InputError(f"there is no kind {kind!r}; the kinds are: {', '.join(KINDS)}")
    name = one_of(rng, [*KINDS]) if kind is None else kind
    for _ in range(_TRIES):
        source = random_function(rng, name)
        item = _with_gap(rng, name, source)
        if item is not None and not _is_constant(source):
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


def _with_gap(rng: np.random.Generator, kind: str, source: str) -> tuple[str, str, str] | None:
    """The item of a function, with a random expression or line of it missing; None where nothing fits."""
    pieces = _pieces(source)
    if not pieces:
        return None
    start, end = pieces[int(rng.integers(len(pieces)))]
    code = source[:start] + GAP + source[end:]
    return (kind, code, source[start:end]) if len(_HEAD + code) <= LONGEST_PROMPT else None


def _is_constant(source: str) -> bool:
    """Does the function seem to give the same for all arguments? A constant would do for it, or nearly."""
    rng = random.Random(zlib.crc32(source.encode()))
    results = (_result(source, random_arguments(rng, source)) for _ in range(_DRAWS))
    first = next(results)
    return all(is_same(result, first) for result in results)


def _result(source: str, arguments: Sequence[Value]) -> Value:
    """What the function gives; None where it fails."""
    try:
        return run(source, arguments, BUDGET)
    except EvaluationError:
        return None


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
    return all(_gives(one.filled(text), trial) for trial in _trials(item))


def parses(text: str, item: str) -> bool:
    """Is the function with this piece code that `evaluate` knows? A piece is one line."""
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


_Case = tuple[list[Value], Value]
"""Arguments, and what the generator's function gives for them."""


@lru_cache(maxsize=4096)
def _trials(item: str) -> tuple[_Case, ...]:
    """What an item's function is run on: arguments that tell it from near misses, and different results."""
    one = read(item)
    candidates = _candidates(item)
    trials: list[_Case] = []
    for piece in _near_misses(one.piece):
        source = one.filled(piece)
        if len(trials) < INPUTS and all(_gives(source, trial) for trial in trials):
            trials += itertools.islice((trial for trial in candidates if not _gives(source, trial)), 1)
    by_result: dict[str, list[_Case]] = {}
    for trial in candidates:
        if trial not in trials:
            by_result.setdefault(repr(trial[1]), []).append(trial)
    rest = (trial for row in itertools.zip_longest(*by_result.values()) for trial in row if trial is not None)
    trials += itertools.islice(rest, INPUTS - len(trials))
    if not trials:
        raise InputError(f"{item[:60]!r} is no item of infill: its function never returns; take one of `generate`")
    return tuple(trials)


def _gives(source: str, trial: _Case) -> bool:
    """Does the function give that result?"""
    return is_same(_result(source, trial[0]), trial[1])


def _candidates(item: str) -> list[_Case]:
    """Random arguments, and what the item's function gives for them; without those for which it fails."""
    one = read(item)
    source = one.filled(one.piece)
    rng = random.Random(zlib.crc32(item.encode()))
    rows = [random_arguments(rng, source) for _ in range(_CANDIDATES)]
    trials = ((arguments, _result(source, arguments)) for arguments in rows)
    return [trial for trial in trials if trial[1] is not None]


_SWAPS = [
    ("<=", "<"), ("<", "<="), ("<", ">"), (">=", ">"), (">", ">="), (">", "<"), ("==", "!="), ("!=", "=="), ("+", "-"),
    ("-", "+"), ("*", "+"), ("//", "/"), ("//", "%"), ("%", "//"), ("max", "min"), ("min", "max"), ("and", "or"),
    ("or", "and"), ("upper", "lower"), ("lower", "upper"), ("starts", "ends"), ("ends", "starts"), ("1:", ":-1"),
    (":-1", "1:"), ("[:", "["), (":]", "]"), ("::2", "::3"), ("::-1", "::1"), ("sorted", "list"), ("abs", "int"),
]  # fmt: skip


def _near_misses(piece: str) -> list[str]:
    """The piece with one operator, name, number or letter changed: what a model takes it for."""
    edits = [(place, len(old), new) for old, new in _SWAPS for place in _places(re.escape(old), piece)]
    edits += [
        (place.start(), len(place[0]), str(int(place[0]) + step))
        for place in re.finditer(r"\d+", piece)
        for step in (-1, 1)
    ]
    names = [*re.finditer(r"\b[a-z]s?\b", piece)]
    others = sorted({place[0] for place in names})
    edits += [(place.start(), len(place[0]), name) for place in names for name in others if name != place[0]]
    return [piece[:place] + new + piece[place + length :] for place, length, new in edits]


def _places(pattern: str, text: str) -> list[int]:
    return [place.start() for place in re.finditer(pattern, text)]
