"""sampling/rules.py: rows with rules beyond the reference's, through the engine, beside rows without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from sfumato import LLM, Options
from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.evals.sudoku import request
from sfumato.events import Done, Draft
from sfumato.options import MOST_REPEATS
from sfumato.tasks import sudoku

BASE = Options(seed=3, max_tokens=82, max_steps=14)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano", ops="fused")


def runs(llm: LLM, count: int, each: Sequence[Options], record: bool = False) -> list[tuple[Done, list[Draft]]]:
    """Hard puzzles, one for each of these options (the first again where there are more puzzles), in one batch."""
    rng = np.random.default_rng(5)
    some = [request(llm, sudoku.generate(28, rng)) for _ in range(count)]
    options = [one.with_defaults(llm.defaults) for one in each]
    settings = EngineSettings(record=record)
    run = Run(llm.model, [ids for ids, _ in some], options, pins=[pins for _, pins in some], settings=settings)
    events = list(run)
    done = {event.row: event for event in events if isinstance(event, Done)}
    return [
        (done[row], [event for event in events if isinstance(event, Draft) and event.row == row])
        for row in range(count)
    ]


def first_repeat(drafts: list[Draft], repeats: int) -> int | None:
    """The step, counted from 1, at which every position has its token for so many times among the last ones."""
    for step in range(1, len(drafts) + 1):
        last = np.array([draft.tokens for draft in drafts[max(0, step - MOST_REPEATS) : step]])
        if (last == last[-1]).sum(0).min() >= repeats:
            return step
    return None


def test_a_canvas_stops_at_its_repeats_and_its_neighbours_do_not(llm: LLM) -> None:
    """As the plain rule says of the drafts of a run to the cap: answers are cut off, not changed."""
    repeats = [3, 0, 5, 2]
    whole = runs(llm, 4, [replace(BASE, confidence=0.0, drafts=True)] * 4)
    expected = [first_repeat(drafts, n) if n else None for (_, drafts), n in zip(whole, repeats, strict=True)]
    assert sum(step is not None and step < 14 for step in expected) >= 2
    for record in (False, True):
        cut = runs(llm, 4, [replace(BASE, confidence=0.0, repeats=n) for n in repeats], record)
        assert [done.usage.steps for done, _ in cut] == [step or 14 for step in expected]
        for (done, _), (_, drafts), step in zip(cut, whole, expected, strict=True):
            assert done.tokens == drafts[(step or 14) - 1].tokens[: len(done.tokens)]


def test_early_rows_repeat_by_what_can_become_their_answer(llm: LLM) -> None:
    """A row whose answer is cut after ten tokens does not wait for the other positions."""
    repeats, most = 4, 10
    options = replace(BASE, early=True, max_tokens=most, confidence=0.0)
    whole = runs(llm, 4, [replace(options, drafts=True)] * 4)
    cut = runs(llm, 4, [replace(options, repeats=repeats)] * 4)
    for (done, _), (_, drafts) in zip(cut, whole, strict=True):
        leading = [replace(draft, tokens=draft.tokens[:most]) for draft in drafts]
        assert done.usage.steps == first_repeat(leading, repeats)
    assert any(
        done.usage.steps != first_repeat(drafts, repeats) for (done, _), (_, drafts) in zip(cut, whole, strict=True)
    )
