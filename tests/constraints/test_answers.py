"""constraints/answers.py: thoughts before a grammar, calls beside one, free text; every part keeps to its own rules."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammars import ends, gemma
from tool_grammars import CLOSE, ENDS, NANO, OPEN, TEXT, record, tool

from sfumato.constraints.answers import AnswerGrammar, AnswerGuide, CallGrammar, ThoughtTokens
from sfumato.constraints.grammar import Grammar
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import CapacityError
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
    return texts | {"calls": grammar_of("calls", [LOOKUP]), "words": None}


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

    def words(self, count: int, before: list[int]) -> list[int]:
        rng, switches = self.rng, [OPENER, CLOSER, OPEN, CLOSE, *ENDS, 15, 4]
        draws = (rng.choice(switches) if rng.random() < self.control else None for _ in range(count))
        new = [rng.randrange(NANO.vocab_size) if token is None else token for token in draws]
        if rng.random() < 0.2:
            new[0] = rng.choice([OPENER, OPEN])
        kept = [old if rng.random() < 0.8 else word for old, word in zip(before, new, strict=False)]
        return kept + new[len(kept) :]

    def pick(self, at: int, mask: np.ndarray) -> tuple[int, float]:
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
    kinds = {run(grammars, seed)[:2] for seed in range(100)}
    assert {(name, "text") for name in (*KINDS, "words")} | {("calls", "calls"), ("schema", "calls")} <= kinds


@pytest.mark.slow
def test_many_random_answers_obey(grammars: dict[str, Grammar | None]) -> None:
    kinds = [run(grammars, seed) for seed in range(1000, 2200)]
    for part in ("words", "schema", "regex", "choices", "grammar"):
        assert {"text", "calls"} <= {kind for name, kind, *_ in kinds if name == part}
        assert {True, False} == {thinks for name, _, thinks, is_open in kinds if name == part and not is_open}


def test_the_least_room_is_named(grammars: dict[str, Grammar | None]) -> None:
    text = grammars["choices"]
    assert text is not None
    for thought, least in ((None, text.shortest()), (ALLOWED, text.shortest()), (OPENED, text.shortest() + 1)):
        grammar = AnswerGrammar(VOCABULARY, text, None, thought)
        assert grammar.shortest() == least
        with pytest.raises(CapacityError, match=f"needs at least {least} tokens and has room for {least - 1}"):
            grammar.start(least - 1)
        tokens = written(grammar.start(least), RandomModel(3), 16)
        assert len(tokens) <= least and check("choices", tokens, False, thought) == "text"


def test_nothing_is_forced_behind_a_closer_that_is_not_sure(grammars: dict[str, Grammar | None]) -> None:
    guide = AnswerGrammar(VOCABULARY, grammars["schema"], None, OPENED).start(200)
    top = [100] * 10 + [CLOSER] + [100] * 21

    def pick(at: int, mask: np.ndarray) -> tuple[int, float]:
        return int(np.flatnonzero(mask)[-1]), 9.0

    unsure = guide.walk(top, [False] * 32, pick, 1.0)
    assert unsure.tokens == top[:11] and not unsure.forced and unsure.free == range(10)
    assert len(guide.walk(top, [False] * 32, pick, 1.0).tokens) == 11  # where it stood before, once
    assert len(guide.walk(top, [False] * 32, pick, 1.0).forced) > 3  # and for two walks
    moved = [100] * 5 + [CLOSER] + [100] * 26
    assert len(guide.walk(moved, [False] * 32, pick, 1.0).tokens) == 6
    sure = guide.walk(top, [at == 10 for at in range(32)], pick, 1.0)
    assert sure.tokens[:11] == top[:11] and sure.forced[0] == 11
    ended = guide.walk(moved, [False] * 32, pick, 1.0, is_last=True)
    assert len(ended.tokens) == 32 or ended.end


def test_control_tokens_in_a_thought_are_replaced_within_bounds(grammars: dict[str, Grammar | None]) -> None:
    guide = AnswerGrammar(VOCABULARY, grammars["schema"], None, OPENED).start(200)
    calls: list[int] = []

    def pick(at: int, mask: np.ndarray) -> tuple[int, float]:
        calls.append(at)
        assert mask[CLOSER] and mask[100] and mask.sum() == VOCABULARY.words().sum() + 1
        return 100, 0.5

    end = ENDS[1]
    assert len(guide.walk([100, end, 100, end] * 2, [False] * 8, pick, 1.0).tokens) == 8 and calls == [1, 3, 5, 7]
    many = guide.walk([end] * 32, [False] * 32, pick, 1.0)
    assert 0 < len(many.tokens) < 32 and many.end is None
    assert guide.walk([end] * 32, [False] * 32, pick, 1.0, is_last=True).tokens == [100] * 32


def test_where_free_text_ends_the_model_says_what_follows() -> None:
    guide = AnswerGrammar(VOCABULARY, None).start(200)
    top = [100] * 6 + [ENDS[1]] * 10
    walk = guide.walk(top, [False] * 16, lambda at, mask: (0, 0.0), 1.0)
    assert walk.tokens == [100] * 6 and walk.end == 6 and walk.free == range(16) and not walk.forced
    guide.commit(6)
    assert guide.is_over and guide.room == 194
    assert guide.walk(top, [True] * 16, lambda at, mask: (0, 0.0), 1.0).end == 0
    with pytest.raises(ValueError, match="cannot"):
        AnswerGrammar(VOCABULARY, None).start(9).commit(1)


@pytest.mark.slow
def test_a_thought_costs_a_step_next_to_nothing() -> None:
    vocabulary = Vocabulary.of(gemma(), gemma().vocab_size, ends(gemma()))
    text = Grammar.compile("schema", PERSON, gemma(), gemma().vocab_size, ends(gemma()))
    closer = gemma().id("<channel|>") or 0
    guide = AnswerGrammar(vocabulary, text, None, ThoughtTokens(0, (), closer, is_open=True)).start(4096)
    words, rng = np.flatnonzero(vocabulary.words()).tolist(), random.Random(1)
    top, seconds = [rng.choice(words) for _ in range(256)], list[float]()
    for _ in range(40):
        top = [rng.choice(words) if rng.random() < 0.1 else token for token in top]
        began = time.perf_counter()
        walk = guide.walk(top, [False] * 256, lambda at, mask: (closer, 0.0), 0.1)
        seconds.append(time.perf_counter() - began)
        assert walk.tokens == top
    assert sorted(seconds)[20] < 1e-3
