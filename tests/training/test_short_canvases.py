"""training/loss.py, train.py, task_source.py: a batch whose rows have canvases of different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.llm import LLM
from sfumato.tasks.task import named
from sfumato.training.data.mixed import MixedSource
from sfumato.training.loss import Corruption, losses, problem
from sfumato.training.recipe import TrainingRecipe
from sfumato.training.task_source import TaskSource, answer_room
from sfumato.training.train import Trainer


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano", ops="fused", dtype="float32")


def source(llm: LLM, name: str, share: float) -> TaskSource:
    assert llm.template is not None
    return TaskSource(named(name), llm.tokenizer, llm.template, 3, canvases=(82, share))


def test_a_task_has_room_for_its_longest_answer(llm: LLM) -> None:
    assert answer_room(named("families"), llm.tokenizer) == 16
    assert answer_room(named("sorting"), llm.tokenizer) == 16
    assert answer_room(named("sudoku"), llm.tokenizer, items=2) == 96


def test_the_share_of_short_steps(llm: LLM) -> None:
    device = torch.device("cpu")
    half = source(llm, "sorting", 0.5)
    lengths = [half.batch(step, 2, device).canvases for step in range(40)]
    assert all(one in (None, [16, 16]) for one in lengths) and 10 <= lengths.count(None) <= 30
    assert lengths == [half.batch(step, 2, device).canvases for step in range(40)]
    assert {source(llm, "sorting", 0.0).batch(step, 1, device).canvases is None for step in range(9)} == {True}


def test_groups_are_what_their_rows_alone_would_be(llm: LLM, tmp_path: Path) -> None:
    """Two tasks of two canvases: the sums of the step are those of each task by itself with its own numbers."""
    parts = [(source(llm, "sorting", 1.0), 1.0), (source(llm, "decisions", 0.0), 1.0)]
    mixed = MixedSource(parts, seed=1)
    recipe = TrainingRecipe(steps=2, batch=6, repeats=2, conditioned=0.5, short_canvases=1.0, lr=0.0)
    trainer = Trainer(llm.model.requires_grad_(True), mixed, recipe, tmp_path)
    batch, dice, _ = trainer._drawn(mixed, 0)
    assert sorted(batch.canvases) == [0, 0, 0, 16, 16, 16]
    problems, targets = trainer._split(batch, dice, True)
    assert [one.canvas_BL.shape for one in problems] == [(6, 16), (6, 82)]
    assert sum(one.conditioned for one in problems) == dice.conditioned == 6
    assert targets[0] == sum(one.diffusion_count for one in problems)
    for one, rows in zip(
        problems,
        ([n for n in range(6) if batch.canvases[n]], [n for n in range(6) if not batch.canvases[n]]),
        strict=True,
    ):
        length = one.canvas_BL.shape[1]
        canvases = [*rows, *(row + 6 for row in rows)]
        assert torch.equal(one.level_B, dice.level_B[canvases])
        levels = one.level_B[:, None]
        clean = one.target_BL.clamp_min(0)
        expected = torch.where(dice.keep_BL[canvases, :length] < levels, dice.noise_BL[canvases, :length], clean)
        known = one.target_BL >= 0
        assert torch.equal(one.canvas_BL[known], expected[known])
    llm.model.requires_grad_(False)


def test_whole_canvases_are_unchanged(llm: LLM, tmp_path: Path) -> None:
    """With a share of 0 a step is the one problem that it always was."""
    own = source(llm, "sorting", 0.0)
    trainer = Trainer(llm.model.requires_grad_(True), own, TrainingRecipe(steps=1, batch=4), tmp_path)
    batch, dice, is_whole = trainer._drawn(own, 0)
    (one,), targets = trainer._split(batch, dice, is_whole)
    same = problem(batch, dice, 82, 1, is_whole)
    assert torch.equal(one.canvas_BL, same.canvas_BL) and targets == (same.diffusion_count, same.encode_count)
    with torch.no_grad():
        assert [x.item() for x in losses(llm.model, one)] == [x.item() for x in losses(llm.model, same)]
    llm.model.requires_grad_(False)


def test_a_part_of_the_numbers() -> None:
    dice = Corruption.draw(8, 5, 100, torch.Generator().manual_seed(0), 0.5)
    some = dice.of([1, 3, 4], 2)
    assert some.conditioned == 2 and some.keep_BL.shape == (3, 2)
    assert torch.equal(some.noise_BL, dice.noise_BL[[1, 3, 4], :2])


def test_a_draft_stands_where_noise_would(llm: LLM) -> None:
    """Of an edit in place, what is not clean is the document before it, its end, and fill."""
    assert llm.template is not None
    task = named("edits")
    own = TaskSource(task, llm.tokenizer, llm.template, 5, canvases=(82, 1.0), drafts=0.5)
    batch = own.batch(0, 12, torch.device("cpu"))
    assert batch.drafts is not None and 0 < sum(map(bool, batch.drafts)) < 12
    dice = Corruption.draw(24, 82, llm.model.config.vocab_size, torch.Generator().manual_seed(0), 0.0)
    length = batch.canvases[0] if batch.canvases else 82
    one = problem(batch, dice.of(range(24), length), length, 1)
    noise = torch.where(dice.keep_BL[:, :length] < one.level_B[:, None], 1, 0).bool()
    for number, row in enumerate(one.rows):
        draft, at = batch.drafts[row], noise[number]
        expected = (draft + [1] * length)[:length] if draft else dice.noise_BL[number, :length].tolist()
        assert torch.equal(one.canvas_BL[number][at], torch.tensor(expected)[at])
        if draft:
            assert llm.tokenizer.decode(draft[:-1]) in llm.tokenizer.decode(
                batch.tokens_BT[row, : batch.prompts[row]].tolist()
            )
    assert (
        TaskSource(named("sorting"), llm.tokenizer, llm.template, 5, drafts=0.5).batch(0, 2, torch.device("cpu")).drafts
        is None
    )
