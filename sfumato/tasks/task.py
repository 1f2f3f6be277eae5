"""What a task is: items made at random, each with a prompt, a right answer, and an exact check of any answer.

Training, evaluation and the command line take a task by its name, and know nothing else of it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sfumato.errors import InputError
from sfumato.tasks import decisions, edits, functions, graphs, infill, molecules, moses, recall, sorting, sudoku


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
    kind: Callable[[str], str] | None = None
    """The kind of an item, a row of its own in an evaluation: a puzzle's difficulty. None: all are of one kind."""
    kinds: tuple[str, ...] = ()
    """All the kinds there are. `named` takes each as a task of its own: edits/sort."""
    measures: Callable[[str, str], Mapping[str, float]] | None = None
    """(what the model wrote, item) -> what else can be said of it, each from 0 to 1: the share of a plot's cells. Its
    names are the same for all items of a kind; it never raises."""
    draft: Callable[[str], str] | None = None
    """The text that an answer begins from, in place, instead of from noise; the prompt ends with it. None: noise."""
    strength: float = 0.0
    """The share of that text that starts as noise."""
    system: Callable[[str], str] | None = None
    """The system message before everything, "" for an item without one. None: there is none."""
    variant: Callable[[str, np.random.Generator], str] | None = None
    """Another item, as likely as the one that it is made of, where that is much quicker than to make one. Items that
    are held out are searched for among these."""


def _puzzle(rng: np.random.Generator) -> str:
    clues = rng.choice([_one_of(rng, 40, 56), _one_of(rng, 30, 40), _one_of(rng, 24, 30)])  # each band alike
    return sudoku.generate(int(clues), rng)


def _with_other_digits(puzzle: str, rng: np.random.Generator) -> str:
    """The same puzzle with its digits exchanged, as likely as any: a board is drawn from all there are."""
    return puzzle.translate(str.maketrans("123456789", "".join(map(str, rng.permutation(9) + 1))))


def _one_of(rng: np.random.Generator, least: int, end: int) -> int:
    return int(rng.integers(least, end))


def _solution(puzzle: str) -> str:
    solution = sudoku.solve(puzzle)
    if solution is None:
        raise InputError(f"the puzzle {puzzle} has no solution; take its clues from a full board")
    return sudoku.answer_text(solution)


FILLED = 0.1
"""Of tasks whose answers are shorter than a canvas."""

_RECALL = Task(
    "recall",
    recall.generate,
    recall.prompt,
    recall.answer_text,
    lambda text, item: text.strip() == recall.answer_text(item),
    earlier=recall.earlier,
    is_prompt_learned=False,
    filled=FILLED,
)

_EDITS = Task(
    "edits",
    edits.generate,
    edits.prompt,
    edits.answer,
    lambda text, item: edits.is_right(text.strip(), item),
    is_prompt_learned=False,
    filled=FILLED,
    kind=lambda item: edits.read(item).kind,
    kinds=tuple(edits.KINDS),
    measures=lambda text, item: {"untouched": float(edits.is_untouched(text.strip(), item))},
    draft=edits.document,
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
            kind=sudoku.band,
            kinds=tuple(sudoku.BANDS),
            variant=_with_other_digits,
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
            filled=FILLED,
            kind=lambda item: decisions.read(item).kind,
            kinds=tuple(decisions.KINDS),
        ),
        _RECALL,
        replace(_RECALL, name="recall-noisy", generate=recall.generate_noisy),
        _EDITS,
        replace(_EDITS, name="edits-from-noise", draft=None),
        Task(
            "graphs",
            graphs.generate,
            graphs.prompt,
            graphs.answer,
            lambda text, item: text.strip() == graphs.answer(item),
            is_prompt_learned=False,
            filled=FILLED,
            kind=graphs.family_of,
            kinds=tuple(graphs.FAMILIES),
            measures=lambda text, item: {
                "cells": graphs.right_cells(text, item),
                "marks": graphs.right_marks(text, item),
            },
        ),
        Task(
            "families",
            graphs.generate_family,
            graphs.family_prompt,
            graphs.family_answer,
            lambda text, item: graphs.is_family(text.strip(), item),
            is_prompt_learned=False,
            filled=FILLED,
        ),
        Task(
            "infill",
            infill.generate,
            infill.prompt,
            infill.answer,
            lambda text, item: infill.is_right(text.strip(), item),
            is_prompt_learned=False,
            filled=FILLED,
            kind=infill.kind,
            kinds=tuple(functions.KINDS),
            measures=lambda text, item: {"parses": float(infill.parses(text.strip(), item))},
        ),
        Task(
            "molecules",
            molecules.generate,
            molecules.prompt,
            molecules.answer,
            molecules.is_right,
            is_prompt_learned=False,
            filled=FILLED,
            kind=molecules.kind,
            kinds=molecules.KINDS,
            measures=molecules.measures,
        ),
    )
}
"""The tasks that are always there, by name."""

OF_MOSES = "molecules-moses"
"""The task whose molecules are those of the MOSES set; it is there where the data are (see `moses`)."""
NAMES = (*TASKS, OF_MOSES)
"""All that `named` knows."""


SPLIT = 16
"""One item of so many is held out, by a hash of it: a run of training never sees those."""
_TRIES = 1000
_DRAWS = 4
"""Draws for each item that is to differ from the others."""


def is_held_out(item: str) -> bool:
    """Whether an item is one of those that are never trained on."""
    return zlib.crc32(json.dumps(item).encode()) % SPLIT == 0


def drawn(task: Task, count: int, rng: np.random.Generator, held_out: bool) -> list[str]:
    """So many random items, of those that are held out or of the others. InputError where a task has none."""
    kept: list[str] = []
    for _ in range(count * _TRIES):
        item = task.generate(rng)
        if held_out and task.variant is not None:
            item = _held_out_variant(task.variant, item, rng)
        if is_held_out(item) == held_out:
            kept.append(item)
        if len(kept) == count:
            return kept
    raise InputError(f"the task {task.name} has no items to hold out; it is too small")


def _held_out_variant(variant: Callable[[str, np.random.Generator], str], item: str, rng: np.random.Generator) -> str:
    """A variant of an item that is held out, or after some tries one that is not."""
    for _ in range(8 * SPLIT):
        if is_held_out(item):
            break
        item = variant(item, rng)
    return item


def held_out_items(task: Task, count: int, seed: int) -> list[str]:
    """So many different items that no run trains on, the same ones for the same seed."""
    rng = np.random.default_rng([seed, SPLIT])
    kept: dict[str, None] = {}
    draws = 0
    while len(kept) < count and draws < _DRAWS * count + _TRIES:  # a small task runs out of new ones
        some = drawn(task, count - len(kept), rng, held_out=True)
        kept |= dict.fromkeys(some)
        draws += len(some)
    if len(kept) < count:
        raise InputError(f"the task {task.name} has {len(kept)} items that are held out, not {count}; ask for fewer")
    return [*kept]


def messages(task: Task, item: str) -> list[dict[str, str]]:
    """The conversation that an item is, up to its answer."""
    turns = [] if task.earlier is None else task.earlier(item)
    pairs = [({"role": "user", "content": text}, {"role": "assistant", "content": reply}) for text, reply in turns]
    system = "" if task.system is None else task.system(item)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *(message for pair in pairs for message in pair), {"role": "user", "content": task.prompt(item)}]


def names(incomplete: str = "") -> list[str]:
    """The names that begin like this; those of kinds where a task's name and its bar stand there."""
    whole, bar, _ = incomplete.partition("/")
    kinds = [f"{whole}/{kind}" for kind in _known(whole).kinds] if bar and whole in NAMES else []
    return [name for name in (*NAMES, *kinds) if name.startswith(incomplete)]


def is_named(name: str) -> bool:
    """Whether `named` knows this name."""
    whole, bar, kind = name.partition("/")
    return whole in NAMES and (not bar or kind in _known(whole).kinds)


def named(name: str) -> Task:
    """A task by its name, or the items of one kind of it: edits/sort.

    InputError for a name or a kind that there is not, and for `OF_MOSES` without its data."""
    whole, bar, kind = name.partition("/")
    if whole not in NAMES:
        raise InputError(f"there is no task {name!r}; the tasks are: {', '.join(NAMES)}")
    if bar and kind not in _known(whole).kinds:
        kinds = ", ".join(f"{whole}/{one}" for one in _known(whole).kinds)
        raise InputError(f"there is no task {name!r}; {f'the kinds are: {kinds}' if kinds else f'take {whole}'}")
    task = replace(_known(whole), name=name)
    if whole == OF_MOSES:
        task = replace(task, generate=moses.generator())
    return replace(task, generate=_of_kind(task, kind)) if bar else task


def _known(name: str) -> Task:
    return TASKS["molecules" if name == OF_MOSES else name]


def _of_kind(task: Task, kind: str) -> Callable[[np.random.Generator], str]:
    """Items of a task until one is of this kind: kinds are about as likely as each other."""

    def generate(rng: np.random.Generator) -> str:
        while True:
            item = task.generate(rng)
            if task.kind is not None and task.kind(item) == kind:
                return item

    return generate
