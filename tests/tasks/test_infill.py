"""tasks/infill.py, tasks/functions.py: the words decide the code, and any code that does the same is right."""

from __future__ import annotations

import ast
import copy
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import infill
from sfumato.tasks.evaluate import EvaluationError, is_same, run
from sfumato.tasks.functions import (
    CONDITIONS,
    IMAGES,
    ITEMS,
    KINDS,
    NUMBERS,
    RUNS,
    STRINGS,
    TAILS,
    random_arguments,
    random_function,
)
from sfumato.tasks.task import named


def items(count: int, seed: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [infill.generate(rng) for _ in range(count)]


def python(source: str) -> Callable[..., Any]:
    """Python's own function. Only what the generator wrote comes here."""
    names: dict[str, Any] = {}
    exec(source, names)
    (function,) = (value for name, value in names.items() if name in ("f", "g", "h"))
    result: Callable[..., Any] = function
    return result


def item_of(kind: str, code: str, piece: str) -> str:
    return json.dumps([kind, code, piece])


def test_the_evaluator_gives_what_python_gives() -> None:
    rng, numbers = random.Random(7), np.random.default_rng(7)
    values = 0
    for kind in [*KINDS] * 84:
        source = random_function(numbers, kind)
        function = python(source)
        for arguments in (random_arguments(rng, source) for _ in range(4)):
            try:
                value = function(*copy.deepcopy(arguments))
            except ValueError:  # the largest of none
                with pytest.raises(EvaluationError, match="ValueError"):
                    run(source, arguments)
                continue
            assert is_same(run(source, arguments), value), source
            values += 1
    assert values > 1900


def test_inputs_are_the_items_own() -> None:
    for item in items(20):
        rows = infill.inputs(item)
        infill._trials.cache_clear()
        assert len(rows) == infill.INPUTS and rows == infill.inputs(item)


def test_items_are_short_and_of_all_kinds() -> None:
    some = items(1500)
    assert len(set(some)) > 1450
    kinds = defaultdict(list)
    for item in some:
        one = infill.read(item)
        prompt = infill.prompt(item)
        assert len(prompt) <= infill.LONGEST_PROMPT and prompt.isascii()
        assert prompt == f"Fill the gap:\n{one.code}" and prompt.count("___") == 1
        assert infill.SHORTEST_PIECE <= len(one.piece) <= infill.LONGEST_PIECE and len(one.piece.splitlines()) == 1
        assert infill.answer(item) == one.piece == one.piece.strip() and "___" not in one.piece
        kinds[infill.kind(item)].append(item)
    assert set(kinds) == set(KINDS) and len(KINDS) == 6 and min(map(len, kinds.values())) > 170
    lines = [infill.read(item).code.count("\n") - 1 for item in some]
    assert set(lines) == {1, 3, 4, 5}


TABLES = [*KINDS.values(), NUMBERS, CONDITIONS, STRINGS, TAILS, RUNS, ITEMS, IMAGES]


def test_words_and_code_have_the_same_slots() -> None:
    for words, code in (pair for table in TABLES for pair in table):
        assert set(re.findall(r"{(.)}", words)) ^ set(re.findall(r"{(.)}", code)) <= {"i", "o"}, words


def test_every_pair_is_used_and_every_function_is_python() -> None:
    rng = np.random.default_rng(2)
    sources = [random_function(rng, kind) for kind in KINDS for _ in range(350)]
    for source in sources:
        assert callable(python(source))
    words = "\n".join(source.split('"')[1] for source in sources)
    for pair in (pair for table in TABLES for pair in table):
        pattern = re.sub(r"\\{.\\}", ".+", re.escape(pair[0]))
        assert re.search(f"(^|\\b){pattern}", words, re.MULTILINE), pair


def test_the_words_decide_what_is_right() -> None:
    """Functions with the same words and parameters give the same, whatever their code."""
    rng = np.random.default_rng(4)
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for kind in KINDS:
        for _ in range(300):
            head, words, *lines = random_function(rng, kind).split("\n")
            groups[head[5:], words].add("\n".join([f"def f{head[5:]}", *lines]))
    several = [sorted(codes) for codes in groups.values() if len(codes) > 1]
    assert len(several) > 10
    for code, *others in several:
        rows = infill.inputs(item_of("list", code.replace("return", "___", 1), "return"))
        for other in others:
            assert all(is_same(run(code, arguments), run(other, arguments)) for arguments in rows), (code, other)


OTHER_WAYS = [
    ('def f(a, b):\n  "twice a minus b"\n  return ___',
     "2 * a - b", ["a + a - b", "-b + a * 2", "(a << 1) - b", "a*2-b"]),
    ('def f(xs):\n  "the sum of all odd in xs"\n  t = 0\n  for x in xs:\n    if ___:\n      t += x\n  return t',
     "x % 2 == 1", ["x % 2", "x & 1", "not x % 2 == 0", "x % 2 != 0"]),
    ('def f(a, b):\n  "the larger of a and b"\n  ___', "return max(a, b)",
     ["return a if a > b else b", "return max([b, a])", "return sorted([a, b])[1]"]),
    ('def f(s):\n  "s backwards"\n  return ___', "s[::-1]", ["''.join(reversed(s))", "''.join(list(s)[::-1])"]),
    ('def f(xs):\n  "the sum of all even in xs"\n  t = 0\n  for x in xs:\n    ___\n      t += x\n  return t',
     "if x % 2 == 0:", ["if not x % 2:", "if x in [y for y in xs if y % 2 == 0]:"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "piece", "others"), OTHER_WAYS)
def test_any_code_that_does_the_same_is_right(code: str, piece: str, others: list[str]) -> None:
    item = item_of("list", code, piece)
    for other in [piece, *others]:
        assert infill.is_right(other, item), other
    for wrong in (
        "",
        "0",
        "return 0",
        "return",
        "a",
        "x",
        "b - a",
        "x % 2 == 2",
        "pass",
        "if x % 2 == 1",
        piece + " +",
    ):
        assert not infill.is_right(wrong, item), wrong


def test_near_misses_are_wrong() -> None:
    """One operator, name or number changed: nearly none passes that is not the same function."""
    passed = tried = constant = 0
    for item in items(60, seed=6):
        one = infill.read(item)
        function = python(one.filled(one.piece))
        for number in re.finditer(r"(?<!')\b\d\b", one.piece):
            other = one.piece[: number.start()] + str(int(number[0]) + 1) + one.piece[number.end() :]
            tried += 1
            passed += infill.is_right(other, item)
        if one.kind == "comparison":
            results = {repr(function(*arguments)) for arguments in infill.inputs(item)}
            constant += len(results) == 1  # True alone would be right
    assert tried > 20 and passed <= 3 and constant == 0


HOSTILE = [
    *("", " ", "\n", "___", "return 1; import os", "0\n  import os", "0 or __import__('os')", "a.__class__", "'" * 300),
    *(
        "2 ** 99999999",
        "[0] * 10 ** 9",
        "(" * 199,
        "\x00",
        "\ud800",
        "\u2028",
        "lambda: 0",
        "f(a, b)",
        "#",
        '"""',
        "\\",
    ),
    *(
        "exec('1')",
        "*a",
        "a for a in b",
        "x := 1",
        "yield",
        "await a",
        "0 if",
        ")",
        "]",
        "a\x0b+ b",
        "a" * 100_000,
        "𝒂 + b",
    ),
]


def test_a_hostile_answer_is_wrong_and_raises_nothing() -> None:
    task = named("infill")
    assert task.measures is not None
    for item in items(12, seed=9):
        for text in HOSTILE:
            assert not task.is_right(text, item)
            assert task.measures(text, item)["parses"] in (0.0, 1.0)
        assert task.measures(f" {task.answer(item)}\n", item) == {"parses": 1.0}
        assert task.measures("(", item) == {"parses": 0.0}


def test_garbage_is_wrong_and_raises_nothing() -> None:
    rng = random.Random(5)
    item = item_of("arithmetic", 'def f(a, b):\n  "a plus b"\n  return ___', "a + b")
    for _ in range(1000):
        text = "".join(rng.choices("ab +-*/()[]{}:.,'\"\\=<>#09\t\x00é", k=rng.randint(1, 8)))
        if infill.is_right(text, item):
            assert sorted(re.sub(r"#.*|[ \t()]", "", text)) == sorted("a+b")


@pytest.mark.parametrize(
    "item",
    [
        *(
            "",
            "x",
            "[]",
            "{}",
            "5",
            "null",
            "[" * 9999,
            '["loop", "___", 5]',
            '["none", "___", ""]',
            '["loop", "", ""]',
        ),
        *('["loop", "______", ""]', '[["loop"], "___", ""]', '["loop", ["___"], ""]', '{"loop": 1, "___": 2, "": 3}'),
    ],
)
def test_what_is_no_item_is_refused(item: str) -> None:
    for function in (infill.prompt, infill.answer, infill.kind, lambda text: infill.is_right("a", text)):
        with pytest.raises(InputError, match="no item of infill"):
            function(item)


def test_an_item_whose_function_never_returns_is_refused() -> None:
    with pytest.raises(InputError, match="never returns"):
        infill.is_right("a", item_of("list", "def f(a):\n  return ___", "1 // 0"))
    with pytest.raises(InputError, match="there is no kind 'class'; the kinds are: arithmetic"):
        infill.generate(np.random.default_rng(1), "class")


def test_a_gap_is_a_line_or_an_expression() -> None:
    lines = 0
    for item in items(300, seed=3):
        one = infill.read(item)
        before, _, after = one.code.rpartition("___")
        is_line = before.endswith("  ") and (after[:1] in ("", "\n"))
        lines += is_line
        if not is_line:
            try:
                ast.parse(one.piece, mode="eval")
            except SyntaxError:  # a slice's
                assert ":" in one.piece and before.endswith("[") and after.startswith("]")
    assert 90 < lines < 210
