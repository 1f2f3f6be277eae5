"""constraints/search.py, trails.py, lark.py and interruptible.py: every satisfiable pattern is written to its end."""

from __future__ import annotations

import json
import random
import re

import gemma_vocab
import pytest
from grammars import FakeModel, compiled, ends, gemma, nano, written
from random_patterns import random_pattern

from sfumato.constraints.expressions import written as terminal_of
from sfumato.constraints.forms import lark_of
from sfumato.constraints.grammar import read_source
from sfumato.constraints.interruptible import finish
from sfumato.constraints.lark import has_choice, terminals
from sfumato.constraints.patterns import parse
from sfumato.constraints.search import EFFORT, Search
from sfumato.constraints.shortest import shortest
from sfumato.constraints.trails import Trails
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import InputError

pytest.importorskip("llguidance")


def source(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def in_json(pattern: str) -> str:
    """A grammar of records with such a text in them, as the schemas' grammars are written."""
    return f'start: "{{\\"a\\": \\"" TEXT "\\"}}"\nTEXT: {terminal_of(parse(pattern), "json")}'


SATISFIABLE = [
    "[0-9]{5}",
    r"\d{4}-\d{2}-\d{2}",
    "[A-Z]{5}",
    r"\.(jpg|png)$",
    r"^.*\.json$",
    "https?://[^/]+/",
    r"\S+@\S+\.\S+",
    r"(?i)^[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}$",
    r"^(?=.*\d)(?=.*[a-z])(?=.*[A-Z])(?=.*[^\w\s]).{12,64}$",
    r"\bfoo\b.*\bbar\b",
    r"^((a{0,100}){0,100}){0,100}$",
    r"^(\d{1,5}|\d{2,9}|\d{3,7}){1,100}$",
    r"^(?:[0-9]+,){5}[0-9]+;$",
    r"^(?=(aa)*$)(?=(aaa)*$)a{7,}$",
]


@pytest.mark.parametrize("pattern", SATISFIABLE)
def test_a_satisfiable_pattern_is_written_to_its_end(pattern: str) -> None:
    check(pattern, random.Random(1), ["nano"])


QUICK = ("[0-9]{5}", r"^.*\.json$", r"(?i)^[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}$")
"""Those whose test with Gemma's words is not slow."""


@pytest.mark.parametrize(
    "pattern", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in SATISFIABLE]
)
def test_the_same_with_the_words_of_gemma(pattern: str) -> None:
    gemma_vocab.needs_file()
    check(pattern, random.Random(1), ["gemma"])


@pytest.mark.parametrize("pattern", [r"^.*\.json$", r"\S+@\S+\.\S+", "[0-9]{5}"])
def test_a_search_whose_time_is_up_gives_the_best_that_it_has(pattern: str) -> None:
    """Greed finds a text within a few hundred calls of the library; what comes later only shortens it."""
    tokenizer = nano()
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, ends(tokenizer))
    text = lark_of(grammar := read_source("grammar", in_json(pattern)).text)
    lengths = []
    for calls in (0, 1000, 1 << 30):
        search = Search(vocabulary, tokenizer, grammar, text, False)
        matcher = vocabulary.matcher(grammar)
        work = search.completion(matcher, 8192, 0, EFFORT)
        try:
            for _ in range(calls):
                next(work)
            work.throw(InputError("time is up"))
        except StopIteration as stop:
            assert search.is_completion(matcher, stop.value)
            lengths.append(len(stop.value))
        except InputError as error:
            assert str(error) == "time is up" and not calls
    assert len(lengths) == 2 and lengths[1] <= lengths[0] < 40


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_random_patterns_are_written_to_their_ends(part: int) -> None:
    rng = random.Random(part)
    for _ in range(8 if part == 0 else 20):
        check(random_pattern(rng)[0], rng, ["nano"])


def check(pattern: str, rng: random.Random, names: list[str]) -> None:
    """Random picks, with little room and with much, never get stuck, and all that they write matches."""
    bounds = "" if pattern.startswith("^") or "|" in pattern else "(?s:.*)"
    kinds = [("regex", pattern), ("grammar", in_json(pattern))]
    if (shortest(parse(pattern, is_whole=True)) if bounds else shortest(parse(pattern))) is None:
        with pytest.raises(InputError, match="the regex allows no text"):  # as a whole; within another it has one
            compiled(*kinds.pop(0))
    for tokenizer in ({"nano": nano, "gemma": gemma}[name]() for name in names):
        for kind, value in kinds:
            grammar = compiled(kind, value, tokenizer)
            for room in (grammar.shortest(), grammar.shortest() + 3, 2 * grammar.shortest() + 20):
                tokens, is_complete = written(grammar.start(room), FakeModel(rng, tokenizer), 32)
                text = tokenizer.decode(tokens)
                assert is_complete and len(tokens) <= room, (pattern, text)
                if kind == "regex":
                    assert re.fullmatch(pattern, text), (pattern, text)
                else:
                    assert re.search(pattern, json.loads(text)["a"]), (pattern, text)


# ---- terminals and trails -------------------------------------------------------------------------------------------


def test_the_terminals_of_a_grammar_are_read() -> None:
    lark = r"""
        // a comment with "text"
        start: "x" TEXT | other
        other: /[0-9]{3}/ "y"{2,3} NUMBER?
        TEXT: ("a" | B+) & ~/a{5}/  // another
            | "c"i [ "d" ]
        B.2: /b\/[x-z]/i
        NUMBER: /-?[0-9]+/
        NESTED: (((/(?s:.{2,3})/)))
        %ignore /\s+/
        ODD: "a".."z"
        LOOP: "a" LOOP
        WORDS: "one" | "two"
    """
    texts = {shortest(one) for one in terminals(source(lark)) if has_choice(one)}
    assert texts == {"111", "a", "B/x", "1", "aa"}


def test_a_trail_knows_the_shortest_end_of_what_has_begun() -> None:
    trails = Trails(source(in_json(r"^\d{4}-\d{2}$")))
    assert len(trails) == 1
    for text, end in (("", "1111-11"), ('{"a": "', "1111-11"), ('{"a": "12', "11-11"), ('{"a": "1234-5', "1")):
        trail = finish(trails.after(trails.begin, text.encode()))
        assert end in finish(trails.ends(trail)), text
    half = "é".encode()[:1]
    trail = finish(trails.after(trails.begin, half))
    assert trail.rest == half and finish(trails.ends(trail)) == []
    assert finish(trails.after(trail, "é1".encode()[1:])).rest == b""


def test_a_grammar_that_is_no_lark_has_no_trails() -> None:
    assert len(Trails("start: TEXT")) == len(Trails(json.dumps({"grammars": [{"json_schema": {}}]}))) == 0
