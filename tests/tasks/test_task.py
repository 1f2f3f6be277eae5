"""tasks/task.py: every task makes items, and its check takes its own answers and no others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import sudoku
from sfumato.tasks.task import TASKS, named


@pytest.mark.parametrize("name", TASKS)
def test_a_task_makes_the_same_items_for_the_same_state(name: str) -> None:
    task = named(name)
    items = [task.generate(np.random.default_rng(seed)) for seed in range(4)]
    assert items == [task.generate(np.random.default_rng(seed)) for seed in range(4)] and len(set(items)) == 4


@pytest.mark.parametrize("name", [name for name in TASKS if name != "decisions"])  # whose answers are drawn
def test_a_task_takes_its_own_answers(name: str) -> None:
    task = named(name)
    items = [task.generate(np.random.default_rng(seed)) for seed in range(4)]
    for item, other in itertools.pairwise(items):
        answer = task.answer(item)
        assert item in task.prompt(item) or task.earlier is not None or item.startswith(("{", "["))  # a record
        assert task.is_right(answer, item) and task.is_right(f" {answer}\n", item)
        assert not task.is_right("", item) and not task.is_right(answer[:-1], item)
        assert not task.is_right(answer, other) or task.earlier is not None
        changed = ("1" if answer[0] != "1" else "2") + answer[1:]
        assert not task.is_right(changed, item)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=f"there is no task 'chess'; the tasks are: {', '.join(TASKS)}"):
        named("chess")
    with pytest.raises(InputError, match="no solution"):
        named("sudoku").answer("11" + "0" * 79)
    assert sudoku.band(named("sudoku").generate(np.random.default_rng(5))) in sudoku.BANDS
