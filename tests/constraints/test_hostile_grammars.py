"""constraints/grammar.py: a grammar that asks for too much is refused by a sentence, or written as far as room is."""

from __future__ import annotations

import random
import time

import hostile_grammars
import pytest
from grammars import BOUND, FakeModel, compiled, nano

from sfumato.errors import InputError

pytest.importorskip("llguidance")

ATTACKS = hostile_grammars.attacks()
QUICK = [
    number
    for number, (family, _, value) in enumerate(ATTACKS)
    if family in ("nested repeats", "contradictions") and "1000" not in str(value)
]
"""Those that take a few thousandths of a second."""


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(len(ATTACKS))]
)
def test_an_attack_ends_with_a_text_or_a_sentence(number: int) -> None:
    _, kind, value = ATTACKS[number]
    began = time.process_time()
    try:
        grammar = compiled(kind, value)
        assert time.process_time() - began < 3  # the work is the child's
        guide = grammar.start(max(400, grammar.shortest()))
        fake, rng = FakeModel(random.Random(number), nano()), random.Random(number)
        for _ in range(8):
            if not guide.is_over:
                top = fake.words(64, [])
                walk = guide.walk(top, [rng.random() < 0.5 for _ in top], fake.pick, BOUND, is_last=True)
                guide.commit(len(walk.tokens))
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


def test_there_are_a_hundred() -> None:
    assert len(ATTACKS) >= 100 and len({family for family, *_ in ATTACKS}) == 7
