"""templates/lengths.py: which lengths are tried, and that the right one is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato import LLM, Options, Slot
from sfumato.tasks import sudoku
from sfumato.templates.lengths import candidates
from sfumato.templates.requests import Fill


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


def test_candidate_lengths_are_dense_where_short_and_reach_the_bound() -> None:
    assert candidates(3) == [1, 2, 3]
    for most in (13, 40, 64, 256):
        lengths = candidates(most)
        assert lengths[0] == 1 and lengths[-1] == most and lengths == sorted(set(lengths)) and len(lengths) <= 12


def test_a_length_is_found_where_the_model_knows_the_text(llm: LLM) -> None:
    rng = np.random.default_rng(8)
    lengths = []
    for _ in range(5):
        grid = sudoku.random_grid(rng)
        puzzle = grid[:40] + "000" + grid[43:]
        slot = Slot("cells", at_most=6)
        lengths.append(
            llm.fill(
                [grid[:40], slot, grid[43:]],
                [{"role": "user", "content": sudoku.prompt(puzzle)}],
                options=Options(seed=1),
            ).lengths["cells"]
        )
    assert lengths.count(3) >= 4


def test_a_search_for_a_length_ends_with_the_canvas_that_the_slot_begins_on(llm: LLM) -> None:
    length = llm.model.config.canvas_length
    plan = llm.plan(Fill(["a", Slot("x"), "b" * 300, Slot(length=3)], options=Options(seed=1, max_steps=1)))
    asks = next(plan)
    assert len(asks) > 5 and all(ask.request.options.max_tokens == length for ask in asks)
    plan.close()
