"""Grammars under nano's and Gemma's vocabularies, and a fake model that errs at random, for tests of constraints."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import gemma_vocab
import numpy as np

from sfumato.constraints.grammar import Grammar
from sfumato.constraints.guide import Guide, Walk
from sfumato.text.tokenizer import Tokenizer

NANO = Path(__file__).parents[1] / "sfumato" / "nano" / "tokenizer.json"
BOUND = 0.5
"""Nats, for an entropy under a mask."""


@functools.cache
def nano() -> Tokenizer:
    return Tokenizer.from_file(NANO)


@functools.cache
def gemma() -> Tokenizer:
    return Tokenizer(gemma_vocab.build())


def ends(tokenizer: Tokenizer) -> list[int]:
    names = ("<eos>", "<turn|>", "<pad>")
    return [token for name in names if (token := tokenizer.id(name)) is not None]


def compiled(kind: str, value: Any, tokenizer: Tokenizer | None = None) -> Grammar:
    tokenizer = tokenizer or nano()
    return Grammar.compile(kind, value, tokenizer, tokenizer.vocab_size, ends(tokenizer))


class FakeModel:
    """A model that knows nothing: random words at each step, some of them kept from the step before."""

    def __init__(self, rng: random.Random, tokenizer: Tokenizer) -> None:
        self.rng, self.vocab_size, self.ends = rng, tokenizer.vocab_size, set(ends(tokenizer))
        self.control = tokenizer.special_ids - self.ends
        self.picks = 0

    def pick(self, position: int, mask: np.ndarray) -> tuple[int, float]:
        assert mask.dtype == np.bool_ and mask.shape == (self.vocab_size,)
        allowed = np.flatnonzero(mask)
        assert len(allowed) and self.control.isdisjoint(allowed.tolist())
        self.picks += 1
        return int(allowed[self.rng.randrange(len(allowed))]), self.rng.random()

    def words(self, count: int, before: list[int]) -> list[int]:
        words = [self.rng.randrange(self.vocab_size) for _ in range(count)]
        return [old if self.rng.random() < 0.7 else new for old, new in zip(before, words, strict=False)] + words[
            len(before) :
        ]


def written(guide: Guide, fake: FakeModel, canvas: int, steps: int = 3) -> tuple[list[int], bool]:
    """The tokens of one text, and whether it is complete; every walk is checked on the way."""
    text: list[int] = []
    room = guide.room
    while not guide.is_over:
        before: list[int] = []
        for step in range(steps):
            top = fake.words(canvas, before)
            is_sure = [fake.rng.random() < 0.5 for _ in top]
            walk = guide.walk(top, is_sure, fake.pick, BOUND, is_last=step == steps - 1)
            check_walk(walk, top, guide.room, fake)
            before = walk.tokens
        if walk.end is None:
            assert len(walk.tokens) == min(canvas, guide.room)
        text += walk.tokens
        assert walk.tokens or walk.end == 0
        guide.commit(len(walk.tokens))
        assert guide.room == room - len(text)
        assert guide.is_over == (walk.end is not None)
    return text, guide.is_over


def check_walk(walk: Walk, top: list[int], room: int, fake: FakeModel) -> None:
    assert len(walk.tokens) <= min(len(top), room)
    assert walk.end in (None, len(walk.tokens))
    assert fake.control.isdisjoint(walk.tokens) and fake.ends.isdisjoint(walk.tokens)
    assert set(walk.forced).isdisjoint(walk.overruled)
    assert len(set(walk.forced)) == len(walk.forced)
    for position, token in enumerate(walk.tokens):
        assert token == top[position] or position in walk.forced or position in walk.overruled
