"""constraints/answers.py: thoughts before a grammar, calls beside one, free text; every part keeps to its own rules."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from tool_grammars import CLOSE, ENDS, NANO, OPEN, TEXT, record, tool

from sfumato.constraints.answers import AnswerGrammar, AnswerGuide, CallGrammar, ThoughtTokens
from sfumato.constraints.grammar import Grammar
from sfumato.constraints.tools import tool_grammar
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.text.replies import parse_ids

pytest.importorskip("llguidance")

OPENER, CLOSER = 7, 8  # nano's <|channel> and <channel|>
LABEL = tuple(NANO.encode("thought\n"))
ALLOWED, OPENED = ThoughtTokens(OPENER, LABEL, CLOSER), ThoughtTokens(OPENER, LABEL, CLOSER, is_open=True)
VOCABULARY = Vocabulary.of(NANO, NANO.vocab_size, ENDS)
PERSON = record("name age", name={"type": "string", "maxLength": 12}, age={"type": "integer", "minimum": 0})
LOOKUP = tool("lookup", record("key", key=TEXT | {"maxLength": 9}, count={"type": "integer", "minimum": 2}))
KINDS: dict[str, tuple[str, Any]] = {
    "schema": ("schema", PERSON),
    "regex": ("regex", "[a-f]{2,9}(-[0-9]+)?"),
    "choices": ("choices", ["yes", "no", "perhaps not"]),
    "grammar": ("grammar", 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]+/'),
}


def grammar_of(kind: str, value: Any) -> Grammar:
    return Grammar.compile(kind, value, NANO, NANO.vocab_size, ENDS)


@pytest.fixture(scope="module")
def grammars() -> dict[str, Grammar | None]:
    texts: dict[str, Grammar | None] = {name: grammar_of(*one) for name, one in KINDS.items()}
    return texts | {"calls": grammar_of("grammar", tool_grammar([LOOKUP], must_call=True)), "words": None}


def obeys(name: str, text: str) -> bool:
    kind, value = KINDS.get(name, ("words", ""))
    match kind:
        case "schema":
            jsonschema.validate(json.loads(text), value)
            return True
        case "regex":
            return bool(re.fullmatch(value, text))
        case "choices":
            return text in value
        case "grammar":
            return bool(re.fullmatch("<[a-z]+(,[a-z]+)*>", text))
    return True


class RandomModel:
    """Random words, among them the control tokens that matter, and random picks."""

    def __init__(self, seed: int, control: float = 0.02) -> None:
        self.rng, self.control = random.Random(seed), control
        self.picks = 0

    def words(self, count: int, before: list[int]) -> list[int]:
        rng, switches = self.rng, [OPENER, CLOSER, OPEN, CLOSE, *ENDS, 15, 4]
        new = [rng.choice(switches) if rng.random() < self.control else rng.randrange(NANO.vocab_size)
               for _ in range(count)]  # fmt: skip
        return [old if rng.random() < 0.8 else word for old, word in zip(before, new, strict=False)] + new[
            len(before) :
        ]

    def pick(self, at: int, mask: np.ndarray) -> tuple[int, float]:
        self.picks += 1
        likely = [token for token in (OPENER, CLOSER, OPEN, *ENDS) if mask[token]]
        token = (
            self.rng.choice(likely)
            if likely and self.rng.random() < 0.3
            else int(self.rng.choice(np.flatnonzero(mask).tolist()))
        )
        return token, self.rng.choice([0.0, 5.0])


def written(guide: AnswerGuide, model: RandomModel, canvas: int, steps: int = 3) -> list[int]:
    """The tokens of an answer that a model writes in canvases, each walk checked."""
    tokens: list[int] = []
    while not guide.is_over and guide.room:
        before: list[int] = []
        for step in range(steps):
            top = model.words(canvas, before)
            sure = [model.rng.random() < 0.6 for _ in top]
            walk = guide.walk(top, sure, model.pick, 1.0, is_last=step == steps - 1)
            assert len(walk.tokens) <= min(canvas, guide.room) and walk.end in (None, len(walk.tokens))
            assert set(walk.forced).isdisjoint(walk.overruled) and len(set(walk.forced)) == len(walk.forced)
            for at, token in enumerate(walk.tokens):
                assert token == top[at] or at in walk.forced or at in walk.overruled
            before = walk.tokens
        assert walk.end is not None or len(walk.tokens) == min(canvas, guide.room)
        tokens += walk.tokens
        guide.commit(len(walk.tokens))
        assert guide.is_over == (walk.end is not None)
    return tokens


def check(name: str, tokens: list[int], calls: bool, thought: ThoughtTokens | None) -> str:
    """That the answer obeys; which part it is."""
    if thought is not None and (thought.is_open or tokens[:1] == [OPENER]):
        if not thought.is_open:
            assert tuple(tokens[1 : 1 + len(LABEL)]) == LABEL
        end = tokens.index(CLOSER)
        inside = tokens[0 if thought.is_open else 1 : end]
        assert NANO.special_ids.isdisjoint(inside)
        tokens = tokens[end + 1 :]
    reply = parse_ids(NANO, tokens)
    assert reply.thought is None
    if reply.tool_calls:
        assert calls or name == "calls"
        assert name in ("words", "calls") or not reply.text
        for call in reply.tool_calls:
            assert call["name"] == "lookup"
            jsonschema.validate(call["arguments"], LOOKUP["function"]["parameters"])
        return "calls"
    assert name != "calls" and NANO.special_ids.isdisjoint(tokens) and tokens
    assert obeys(name, NANO.decode(tokens))
    return "text"


def run(grammars: dict[str, Grammar | None], seed: int) -> tuple[str, str, bool, bool]:
    rng = random.Random(seed)
    name = rng.choice(sorted(grammars))
    thought = rng.choice([None, ALLOWED, OPENED])
    own = grammars["calls"]
    assert own is not None
    calls = CallGrammar(own, OPEN) if name != "calls" and rng.random() < 0.5 else None
    grammar = AnswerGrammar(VOCABULARY, grammars[name], calls, thought)
    room = rng.choice([grammar.shortest(), grammar.shortest() + rng.randrange(30), 60, 200])
    guide = grammar.start(max(room, grammar.shortest()))
    tokens = written(
        guide, RandomModel(seed, rng.choice([0.0, 0.02, 0.2])), rng.choice([1, 5, 16, 64]), rng.choice([1, 3])
    )
    assert guide.is_over
    kind = check(name, tokens, calls is not None, thought)
    return name, kind, tokens[:1] == [OPENER], thought is not None and thought.is_open


def test_random_answers_obey(grammars: dict[str, Grammar | None]) -> None:
    kinds = {run(grammars, seed)[:2] for seed in range(120)}
    assert {(name, "text") for name in (*KINDS, "words")} | {("calls", "calls"), ("schema", "calls")} <= kinds


@pytest.mark.slow
def test_many_random_answers_obey(grammars: dict[str, Grammar | None]) -> None:
    kinds = [run(grammars, seed) for seed in range(1000, 4000)]
    for part in ("words", "schema", "regex", "choices", "grammar"):
        assert {"text", "calls"} <= {kind for name, kind, *_ in kinds if name == part}
        assert {True, False} == {thinks for name, _, thinks, is_open in kinds if name == part and not is_open}
