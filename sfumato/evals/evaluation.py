"""A run of exercises on a model, answer by answer, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from sfumato.errors import InputError
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.tasks import Exercise, TaskAnswer, answers
from sfumato.options import Options
from sfumato.templates.interface import LanguageModel

BATCH = 32
"""Items that a model answers at once."""


def evaluate(
    llm: LanguageModel,
    exercise: Exercise,
    options: Options,
    *,
    batch: int = BATCH,
    kept: KeptAnswers | None = None,
    run: str = "first",
) -> Iterator[TaskAnswer]:
    """The answers to all items in order: those that are kept under the name of this run, then the model's.

    Give options a seed, so that a second run, or another model's, sees the same noise."""
    name = exercise.task.name
    there = [] if kept is None else [*kept.of(run, name)]
    if [one.item for one in there] != [*exercise.items[: len(there)]]:
        raise InputError(f"the kept answers of {name} are to other items; begin anew")
    yield from there
    for answer in answers(llm, exercise.task, exercise.items[len(there) :], options, batch):
        if kept is not None:
            kept.add(run, name, answer)
        yield answer


def digest_of(exercise: Exercise) -> str:
    """What tells these items from others."""
    return hashlib.sha256(json.dumps([exercise.task.name, *exercise.items]).encode()).hexdigest()[:16]
