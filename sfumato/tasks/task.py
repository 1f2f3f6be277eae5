"""What a task is: items made at random, each with a prompt, a right answer, and an exact check of any answer.

Training, evaluation and the command line take a task by its name, and know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks import decisions, recall, sorting, sudoku


@dataclass(frozen=True)
class Task:
    """A task as four functions. An item is a short text: a puzzle, a list."""

    name: str
    generate: Callable[[np.random.Generator], str]
    """A random item: the same one for the same state of the generator."""
    prompt: Callable[[str], str]
    """The user's message for an item; the last one, where `earlier` has turns before it."""
    answer: Callable[[str], str]
    """The right answer to that message, or one of several; of a task with noisy labels, the label that was drawn."""
    is_right: Callable[[str, str], bool]
    """(what the model wrote, item) -> whether it is right. White space around it does not count; it never raises."""
    known: Callable[[str], Mapping[int, str]] | None = None
    """Characters of the answer that an item says, by their places: an evaluation pins them. None: it says none."""
    earlier: Callable[[str], Sequence[tuple[str, str]]] | None = None
    """Turns before the last one, each the user's message and its answer. None: there are none."""
    is_prompt_learned: bool = True
    """Whether the next-token loss covers what the user says. Where that is random, it is noise in the gradient."""
    filled: float = 1.0
    """Share of examples in which the rest of the canvas, after the answer's end, is learned too. Where answers are a
    word, that rest is most of the canvas, easy, and would be most of the loss."""


def _puzzle(rng: np.random.Generator) -> str:
    return sudoku.generate(int(rng.integers(30, 56)), rng)


def _solution(puzzle: str) -> str:
    solution = sudoku.solve(puzzle)
    if solution is None:
        raise InputError(f"the puzzle {puzzle} has no solution; take its clues from a full board")
    return sudoku.answer_text(solution)


_RECALL = Task(
    "recall",
    recall.generate,
    recall.prompt,
    recall.answer_text,
    lambda text, item: text.strip() == recall.answer_text(item),
    earlier=recall.earlier,
    is_prompt_learned=False,
    filled=0.1,
)

TASKS = {
    task.name: task
    for task in (
        Task(
            "sudoku",
            _puzzle,
            sudoku.prompt,
            _solution,
            lambda text, item: sudoku.is_solved(text.strip(), item),
            lambda item: {cell: digit for cell, digit in enumerate(item) if digit != "0"},
        ),
        Task(
            "sorting",
            sorting.generate,
            sorting.prompt,
            sorting.answer_text,
            lambda text, item: sorting.is_sorted(text.strip(), item),
        ),
        Task(
            "decisions",
            decisions.generate,
            decisions.prompt,
            decisions.answer,
            lambda text, item: decisions.is_right(text.strip(), item),
            is_prompt_learned=False,
            filled=0.1,
        ),
        _RECALL,
        replace(_RECALL, name="recall-noisy", generate=recall.generate_noisy),
    )
}
"""The tasks there are, by name."""


def named(name: str) -> Task:
    """InputError for a name that there is not."""
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; the tasks are: {', '.join(TASKS)}")
    return TASKS[name]
