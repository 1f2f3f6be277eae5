"""constraints/guide.py: whatever a model says, every text that ends is valid, and every text ends within its room.

The model here is a fake that errs at random: random tokens, random certainty, uniform picks under the mask.
"""

from __future__ import annotations

import random
import re

import gemma_vocab
import numpy as np
import pytest
from grammars import BOUND, FakeModel, compiled, ends, gemma, nano, written
from random_schemas import generated, valid

from sfumato.constraints.grammar import Grammar
from sfumato.constraints.guide import Walk
from sfumato.errors import CapacityError

pytest.importorskip("llguidance")


@pytest.mark.parametrize("part", range(8))
def test_a_model_that_errs_at_random_writes_valid_texts_that_end(part: int) -> None:
    rng = random.Random(part)
    for value in generated(24, seed=part):
        grammar = compiled("regex" if isinstance(value, str) else "schema", value)
        shortest = grammar.shortest()
        for room, canvas in ((shortest, 64), (2 * shortest, 64), (2 * shortest + 40, 16), (400, 256)):
            room = max(room, shortest)
            tokens, is_complete = written(grammar.start(room), FakeModel(rng, nano()), canvas)
            assert is_complete, (value, room)
            assert len(tokens) <= room
            assert valid(value, nano().decode(tokens)), (value, nano().decode(tokens))


def test_the_same_with_the_words_of_gemma() -> None:
    gemma_vocab.needs_file()
    rng = random.Random(7)
    for value in generated(8, seed=99):
        grammar = compiled("regex" if isinstance(value, str) else "schema", value, gemma())
        for room in (grammar.shortest(), 2 * grammar.shortest(), 200):
            room = max(room, grammar.shortest())
            tokens, is_complete = written(grammar.start(room), FakeModel(rng, gemma()), 64)
            assert is_complete and len(tokens) <= room
            assert valid(value, gemma().decode(tokens)), (value, gemma().decode(tokens))


@pytest.mark.parametrize("name", ["nano", "gemma"])
def test_choices_and_grammars_are_written_as_they_stand(name: str) -> None:
    if name == "gemma":
        gemma_vocab.needs_file()
    tokenizer = {"nano": nano, "gemma": gemma}[name]()
    choices = [" leading", "<eos>", "<turn|>", 'tab\t"quote"', "日本語", "\\u0041", "ab", "abc", "👩‍👩‍👧", "line\nline"]
    grammar = compiled("choices", choices, tokenizer)
    texts = set()
    for seed in range(60):
        tokens, is_complete = written(grammar.start(20), FakeModel(random.Random(seed), tokenizer), 32)
        assert is_complete
        texts.add(tokenizer.decode(tokens))
    assert texts <= set(choices) and len(texts) > 4

    lark = 'start: "(" start ")" | WORD (", " WORD)*\nWORD: /[a-zé]{1,5}/'
    grammar = compiled("grammar", lark, tokenizer)
    for seed in range(20):
        tokens, is_complete = written(grammar.start(30), FakeModel(random.Random(seed), tokenizer), 32)
        text = tokenizer.decode(tokens)
        inner = text.strip("()")
        assert is_complete and text.count("(") == text.count(")")
        assert re.fullmatch(r"[a-zé]{1,5}(, [a-zé]{1,5})*", inner), text


# ---- one walk -------------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


BOS = 2
"""A token that no constraint allows."""


def never(position: int, mask: np.ndarray) -> tuple[int, float]:
    raise AssertionError("nothing was to be picked")


def spelled(grammar: Grammar, text: str) -> list[int]:
    """The tokens of a text as a model that knows it would write them, one canvas of one position after the other."""
    guide = grammar.start(300)
    tokens: list[int] = []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        left = text[len(nano().decode(tokens)) :]
        fits = [int(t) for t in np.flatnonzero(mask) if left.startswith(nano().decode([int(t)]) or "?")]
        return (max(fits, key=lambda t: len(nano().decode([t]))) if fits else ends(nano())[0]), 0.0

    while not guide.is_over:
        walk = guide.walk([BOS], [True], pick, 1.0, is_last=True)
        tokens += walk.tokens
        guide.commit(len(walk.tokens))
    assert nano().decode(tokens) == text
    return tokens


ADA = '{"name": "Ada Lovelace", "age": 36}'


def test_a_model_that_errs_nowhere_costs_no_mask() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    guide = grammar.start(100)
    walk = guide.walk([*right, *[1] * 50], [False] * 90, never, BOUND)
    assert (walk.tokens, walk.end, walk.overruled, guide.masks) == (right, len(right), {}, 0)
    assert 0 in walk.forced and len(walk.forced) > len(right) // 2  # the scaffold


def test_a_mask_is_asked_for_where_all_before_is_settled_and_nowhere_else() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    free = [j for j in range(len(right)) if j not in grammar.start(100).walk(right, [True] * 99, never, BOUND).forced]
    wrong, sure = right[:], [True] * len(right)
    first, second = free[3], free[6]
    wrong[first] = wrong[second] = BOS
    positions: list[int] = []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        positions.append(position)
        assert mask[right[position]] and not mask[BOS]
        return right[position], entropy

    for entropy, is_last, expected in (
        (0.1, False, [first, second]),
        (9.0, False, [first]),
        (9.0, True, [first, second]),
    ):
        positions.clear()
        guide = grammar.start(100)
        walk = guide.walk(wrong, sure, pick, BOUND, is_last=is_last)
        assert positions == expected and walk.overruled == dict.fromkeys(expected, entropy)
        assert walk.tokens == (right if len(expected) == 2 else right[:second])
        assert walk.end == (len(right) if len(expected) == 2 else None)
        assert guide.masks == len(expected)

    sure[free[1]] = False  # a guess: nothing is built on it
    walk = grammar.start(100).walk(wrong, sure, never, BOUND)
    assert walk.tokens == right[:first] and walk.end is None


def test_what_is_known_of_a_position_is_kept_for_the_next_step() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    free = [j for j in range(len(right)) if j not in grammar.start(100).walk(right, [True] * 99, never, BOUND).forced]
    wrong = right[:]
    for j in free[2:8]:
        wrong[j] = BOS
    positions: list[int] = []

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        positions.append(position)
        return right[position], 0.0

    guide = grammar.start(100)
    for _ in range(3):
        assert guide.walk(wrong, [True] * 99, pick, BOUND).tokens == right
    assert positions == 3 * free[2:8] and guide.masks == 6
    assert guide.walk(right, [True] * 99, never, BOUND).tokens == right  # the model agrees at last
    wrong[free[-1]] = BOS
    guide.walk(wrong, [True] * 99, pick, BOUND)
    assert guide.masks == 7

    other = [*wrong[: free[4]], right[free[1]], *wrong[free[4] + 1 :]]  # a new path from there on
    guide.walk(other, [True] * 99, lambda j, mask: (int(mask.argmax()), 0.0), BOUND)
    assert guide.masks > 7


def test_the_end_is_one_of_the_tokens_that_may_come() -> None:
    grammar = compiled("schema", {"type": "integer", "minimum": 1, "maximum": 5000})
    one = nano().id("1")
    assert one is not None

    def pick(position: int, mask: np.ndarray) -> tuple[int, float]:
        assert position == 1 and all(mask[end] for end in ends(nano())) and mask[one]
        return ends(nano())[0], 0.3

    guide = grammar.start(10)
    walk = guide.walk([one, BOS, BOS], [True] * 3, pick, BOUND)
    assert walk == Walk([one], [], {1: 0.3}, 1)
    walk = guide.walk([one, ends(nano())[1], BOS], [True] * 3, never, BOUND)
    assert walk == Walk([one], [], {}, 1)
    guide.commit(1)
    assert guide.is_over and guide.room == 9
    assert guide.walk([one], [True], never, BOUND) == Walk([], [], {}, 0)


def test_a_text_may_be_committed_piece_by_piece() -> None:
    grammar = compiled("schema", PERSON)
    right = spelled(grammar, ADA)
    guide, done = grammar.start(len(right)), 0
    for count in (3, 0, 5, 1):
        walk = guide.walk([*right[done : done + 9]], [True] * 9, never, BOUND)
        assert walk.tokens == right[done : done + 9] and walk.end is None
        with pytest.raises(ValueError, match="cannot be committed"):
            guide.commit(10)
        guide.commit(count)
        done += count
        assert guide.room == len(right) - done and not guide.is_over
    walk = guide.walk([*right[done:], 1], [True] * 99, never, BOUND)
    assert walk.tokens == right[done:] and walk.end == len(right) - done


def test_where_the_room_is_short_the_path_takes_the_way_that_fits() -> None:
    long = {"type": "object", "properties": {"why": {"type": "string", "minLength": 60}}, "required": ["why"]}
    grammar = compiled("schema", {"anyOf": [long, {"type": "null"}]})
    start = nano().id("{")
    assert start is not None and grammar.shortest() < 10
    guide = grammar.start(10)
    for _ in range(2):
        walk = guide.walk([start] * 10, [True] * 10, never, BOUND)
        assert nano().decode(walk.tokens) == "null" and walk.end == len(walk.tokens)
        assert walk.forced == list(range(len(walk.tokens)))
    assert grammar.start(200).walk([start], [True], never, BOUND).tokens == [start]
    with pytest.raises(
        CapacityError, match=f"at least {grammar.shortest()} tokens and has room for 1; raise max_tokens"
    ):
        grammar.start(1)
