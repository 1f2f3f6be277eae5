"""tasks/task.py: every task makes items, and its check takes its own answers and no others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import sudoku
from sfumato.tasks.task import NAMES, TASKS, drawn, held_out_items, is_held_out, is_named, messages, named, names


@pytest.mark.parametrize("name", TASKS)
def test_a_task_makes_the_same_items_for_the_same_state(name: str) -> None:
    task = named(name)
    items = [task.generate(np.random.default_rng(seed)) for seed in range(4)]
    assert items == [task.generate(np.random.default_rng(seed)) for seed in range(4)] and len(set(items)) == 4


# Answers of decisions are drawn; an item of molecules says the answer's facts in another form than the prompt.
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("decisions", "molecules")])
def test_a_task_takes_its_own_answers(name: str) -> None:
    task = named(name)
    items = [task.generate(np.random.default_rng(seed)) for seed in range(4)]
    for item, other in itertools.pairwise(items):
        answer = task.answer(item)
        assert item in task.prompt(item) or item[0] in "[{"
        assert task.is_right(answer, item) and task.is_right(f" {answer}\n", item)
        assert not task.is_right("", item) and not task.is_right(answer[:-1], item)
        assert not task.is_right(answer, other) or answer == task.answer(other)
        changed = ("1" if answer[0] != "1" else "2") + answer[1:]
        assert not task.is_right(changed, item)


@pytest.mark.parametrize("name", [name for name in TASKS if named(name).variant is not None])
def test_a_variant_is_another_item_of_its_kind(name: str) -> None:
    task = named(name)
    assert task.variant is not None and task.kind is not None
    rng = np.random.default_rng(3)
    items = [task.generate(rng) for _ in range(3)]
    for item in items:
        variants = [task.variant(item, rng) for _ in range(4)]
        assert len({item, *variants}) == 5 and {task.kind(one) for one in variants} == {task.kind(item)}
        assert all(
            task.is_right(task.answer(one), one) and not task.is_right(task.answer(item), one) for one in variants
        )
    held_out = held_out_items(task, 12, 1)
    assert all(map(is_held_out, held_out)) and held_out == held_out_items(task, 12, 1) != held_out_items(task, 12, 2)
    assert not any(map(is_held_out, drawn(task, 3, rng, held_out=False)))


def test_a_system_message_comes_first() -> None:
    task = replace(named("sorting"), system=lambda item: "Be brief." if item != "21" else "")
    assert [message["role"] for message in messages(task, "12")] == ["system", "user"]
    assert [message["role"] for message in messages(task, "21")] == ["user"]


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=f"there is no task 'chess'; the tasks are: {', '.join(TASKS)}"):
        named("chess")
    with pytest.raises(InputError, match="no solution"):
        named("sudoku").answer("11" + "0" * 79)


KINDS = [f"{name}/{kind}" for name, task in TASKS.items() for kind in task.kinds]


def test_kinds_are_those_that_items_have() -> None:
    for name, task in TASKS.items():
        rng = np.random.default_rng(6)
        kinds = set() if task.kind is None else {task.kind(task.generate(rng)) for _ in range(80)}
        assert kinds == set(task.kinds), name


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_a_task_of_its_own(name: str) -> None:
    task, (whole, kind) = named(name), name.split("/")
    rng = np.random.default_rng(7)
    items = drawn(task, 5, rng, held_out=False)
    assert task.name == name and is_named(name) and task.kind is not None and len(set(items)) == 5
    assert {task.kind(item) for item in items} == {kind}
    assert replace(task, name=whole, generate=TASKS[whole].generate) == TASKS[whole]


def test_a_kind_that_is_not_there_is_refused_and_known_ones_are_offered() -> None:
    with pytest.raises(InputError, match="no task 'edits/sorting'; the kinds are: edits/rename, edits/change"):
        named("edits/sorting")
    with pytest.raises(InputError, match="no task 'recall/any'; take recall"):
        named("recall/any")
    with pytest.raises(InputError, match="no task 'chess/sort'; the tasks are: sudoku"):
        named("chess/sort")
    assert not any(map(is_named, ("edits/", "edits/sorting", "recall/", "chess/sort", "", "/")))
    assert names("edi") == ["edits", "edits-from-noise"] and names("edits/s") == ["edits/sort"]
    assert names() == [*NAMES] and names("chess/") == []


def test_puzzles_are_of_all_bands() -> None:
    rng = np.random.default_rng(5)
    assert {sudoku.band(named("sudoku").generate(rng)) for _ in range(20)} == set(sudoku.BANDS)


def test_a_task_that_has_no_more_items_says_so() -> None:
    few = replace(named("sorting"), generate=lambda rng: f"{rng.integers(1, 10)}{rng.integers(1, 10)}")
    with pytest.raises(InputError, match=r"the task sorting has \d items that are held out, not 50; ask for fewer"):
        held_out_items(few, 50, seed=1)
