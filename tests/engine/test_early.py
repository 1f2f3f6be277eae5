"""engine/commits.py: answers that arrive early: settled prefixes are committed and stay, a canvas stops at its first
end, short ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sfumato import LLM, Options
from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.evals.sudoku import request, solve
from sfumato.events import Commit, Done
from sfumato.tasks import sudoku

EARLY = Options(seed=2, early=True, max_tokens=82)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano", ops="fused")


def puzzles(count: int, clues: int, seed: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sudoku.generate(clues, rng) for _ in range(count)]


def events_of(
    llm: LLM,
    ids: list[list[int]],
    options: Options | list[Options],
    pins: list[Mapping[int, int]] | None = None,
    settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
) -> list[Any]:
    """The events, without their seconds."""
    each = [options] * len(ids) if isinstance(options, Options) else options
    run = Run(llm.model, ids, [o.with_defaults(llm.defaults) for o in each], pins=pins, settings=settings)
    return [
        replace(e, usage=replace(e.usage, seconds=0.0, first_commit_seconds=None)) if isinstance(e, Done) else e
        for e in run
    ]


def test_prefixes_are_committed_before_the_end_and_join_to_the_answer(llm: LLM) -> None:
    parted = 0
    for puzzle in puzzles(12, 34):
        ids, pins = request(llm, puzzle)
        events = list(llm.events([ids], options=EARLY, pins=[pins]))
        commits = [e for e in events if isinstance(e, Commit)]
        done = events[-1]
        assert isinstance(done, Done) and [t for c in commits for t in c.tokens] == done.tokens
        assert "".join(c.text for c in commits) == done.text and all(c.canvas == 0 for c in commits)
        assert [c.steps for c in commits] == sorted(c.steps for c in commits)
        parted += len(commits) > 1
        assert done.usage.first_commit_seconds is not None and done.usage.passes == done.usage.steps
    assert parted >= 8


def test_the_default_is_untouched_and_easy_answers_are_the_same(llm: LLM) -> None:
    some = puzzles(40, 46)
    plain, early = (list(solve(llm, some, replace(EARLY, early=flag), True, 20)) for flag in (False, True))
    assert sum(a.answer == b.answer for a, b in zip(plain, early, strict=True)) >= 38
    assert sum(s.solved for s in early) >= sum(s.solved for s in plain) - 1
    assert sum(s.steps for s in early) <= sum(s.steps for s in plain)


def test_a_short_budget_takes_a_short_canvas(llm: LLM) -> None:
    ids, short = list(llm.encode("Solve")), Options(seed=2, short=True)
    run = Run(llm.model, [ids], [replace(short, max_tokens=10)])
    assert run.rows[0].length == 16
    done = list(run)[-1]
    assert isinstance(done, Done) and len(done.tokens) <= 10 and done.usage.steps <= 16
    several = [replace(short, max_tokens=most) for most in (10, 70, 100)] + [replace(EARLY, max_tokens=10)]
    together = Run(llm.model, [ids] * 4, several)
    assert [row.length for row in together.rows] == [16, 80, 82, 82]
    by_row = {e.row: e.tokens for e in together if isinstance(e, Done)}
    for row, options in enumerate(several):
        assert [by_row[row]] == [e.tokens for e in Run(llm.model, [ids], options) if isinstance(e, Done)]


def test_a_canvas_stops_where_all_up_to_its_first_end_is_settled(llm: LLM) -> None:
    """Pins stand for an answer that is sure: eleven tokens and an end; what stands behind is nobody's business."""
    puzzle = puzzles(1, 40)[0]
    ids, _ = request(llm, puzzle)
    pins = dict(enumerate([*llm.tokenizer.encode("12345678912"), llm.model.config.eos_ids[0]]))
    slow, fast = (
        events_of(llm, [ids], replace(EARLY, early=flag, confidence=0.001, max_tokens=None), pins=[pins])[-1]
        for flag in (False, True)
    )
    assert slow.tokens == fast.tokens == list(pins.values()) and fast.finish_reason == "stop"
    assert fast.usage.steps <= 2 < slow.usage.steps


def test_a_row_is_the_same_alone_in_a_batch_and_with_static_buffers(llm: LLM) -> None:
    prompts = [request(llm, p)[0] for p in puzzles(4, 38)]
    together = events_of(llm, prompts, [replace(EARLY, seed=n) for n in range(4)])
    for n, ids in enumerate(prompts):
        alone = events_of(llm, [ids], replace(EARLY, seed=n))
        mine = [replace(e, row=0, request="") for e in together if e.row == n]
        assert [e.tokens for e in mine] == [e.tokens for e in alone] and mine[-1].usage == alone[-1].usage
        assert events_of(llm, [ids], replace(EARLY, seed=n), settings=EngineSettings(record=True)) == alone


def test_a_stop_string_in_a_settled_prefix_ends_the_answer(llm: LLM) -> None:
    puzzle = puzzles(1, 44)[0]
    answer = llm.chat([{"role": "user", "content": sudoku.prompt(puzzle)}], options=EARLY).text
    stop = answer[5:8]
    cut = llm.chat([{"role": "user", "content": sudoku.prompt(puzzle)}], options=replace(EARLY, stop=(stop,)))
    assert cut.text == answer[: answer.find(stop)] and cut.stop == stop and cut.finish_reason == "stop"


def test_with_log_probabilities_nothing_is_committed_ahead(llm: LLM) -> None:
    ids, pins = request(llm, puzzles(1, 34)[0])
    commits = [e for e in events_of(llm, [ids], replace(EARLY, logprobs=True), pins=[pins]) if isinstance(e, Commit)]
    assert len(commits) == 1 and len(commits[0].logprobs or []) == len(commits[0].tokens)
