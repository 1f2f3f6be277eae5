"""templates/decisions.py: probabilities of choices, and that each is read at its own positions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sfumato import LLM, Options
from sfumato.errors import InputError
from sfumato.tasks import sudoku
from sfumato.templates.decisions import share_out


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def test_shares_follow_the_tree_of_tokens_and_not_the_length() -> None:
    even = {1: 0.0, 2: 0.0, 3: 0.0, 9: 0.0}
    assert share_out([[1], [2, 3, 3]], [even] * 4, 9) == [0.5, 0.5]
    fork = [
        {1: math.log(0.6), 2: math.log(0.2), 3: 0.0, 9: 0.0},
        {1: 0.0, 2: math.log(3.0), 3: 0.0, 9: 0.0},
        even,
        even,
    ]
    assert share_out([[1, 1], [1, 2], [2, 3]], fork, 9) == pytest.approx([0.75 / 4, 0.75 * 3 / 4, 0.25])
    prefix = [{1: 0.0, 9: 0.0}, {2: math.log(0.3), 9: math.log(0.1)}, {}]
    assert share_out([[1], [1, 2]], prefix, 9) == pytest.approx([0.25, 0.75])


def test_a_decision_reads_its_own_positions(llm: LLM) -> None:
    """nano reads cell n at position n, whatever stands around it: a question's digit is that of the cell it lies on."""
    rng, right = np.random.default_rng(11), {"x": 0, "y": 0}
    places = {"x": len(llm.tokenizer.encode("x:")) + 1}
    places["y"] = places["x"] + 1 + len(llm.tokenizer.encode("\n")) + len(llm.tokenizer.encode("y:")) + 1
    assert len(llm.tokenizer.encode(" 7")) == 2  # a blank, which all choices share, and the digit
    for _ in range(10):
        grid = sudoku.random_grid(rng)
        read = llm.decide(
            [{"role": "user", "content": sudoku.prompt(grid)}],
            {name: list("123456789") for name in places},
            options=Options(seed=1),
        )
        for name, decision in read.items():
            assert sum(decision.probabilities.values()) == pytest.approx(1.0)
            right[name] += decision.choice == grid[places[name]]
            assert decision.probabilities[decision.choice] == max(decision.probabilities.values())
    assert right["x"] >= 9 and right["y"] >= 9


def test_choices_that_are_the_same_tokens_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **more: [7, 8])
    with pytest.raises(InputError, match="field 'a' has two choices that are the same tokens"):
        llm.decide("x", {"a": ["b", "c"]})
