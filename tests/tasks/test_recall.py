"""tasks/recall.py: five turns about one document, each with the true answer, whatever trust the document speaks of."""

from __future__ import annotations

import json

import numpy as np

from sfumato.tasks import recall


def test_an_item_is_a_conversation() -> None:
    item = json.dumps([["trust 6 of 10\nann red\nbob blue\n\nThis one?\nann", "red"], ["This one?\nbob", "blue"]])
    assert recall.prompt(item) == "This one?\nbob" and recall.answer_text(item) == "blue"
    assert recall.earlier(item) == [("trust 6 of 10\nann red\nbob blue\n\nThis one?\nann", "red")]


def test_steps_are_answered_by_the_document() -> None:
    rng = np.random.default_rng(2)
    items = [recall.generate(rng) for _ in range(200)]
    kinds = dict.fromkeys(["This one?", "Options:", "Levels:", "Answer Yes"], 0)
    for item in items:
        turns = [*recall.earlier(item), (recall.prompt(item), recall.answer_text(item))]
        state, _, first = turns[0][0].partition("\n\n")
        pairs = [line.rsplit(" ", 1) for line in state.split("\n")[1:]]
        assert len(turns) == recall.TURNS
        for text, answer in [(first, turns[0][1]), *turns[1:]]:
            kind = next(kind for kind in kinds if kind in text)
            kinds[kind] += 1
            if kind == "This one?":
                assert [text.split("\n")[1], answer] in pairs
    assert min(kinds.values()) > 40
