"""evals/kept_answers.py and evaluation.py: a run goes on where it was stopped, with its own settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from sfumato import LLM, Options
from sfumato.errors import InputError
from sfumato.evals import tasks
from sfumato.evals.evaluation import digest_of, evaluate
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.tasks import Exercise, TaskAnswer, fresh
from sfumato.tasks.task import Task, named

SETTINGS = {"tasks": {"sorting": "ab"}, "first": {"options": {"max_steps": "2"}}}
ANSWER = TaskAnswer("1 2", "é\ud800\n", True, 3, kind="k", measures={"cells": 0.5}, seconds=0.25)


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.answers.jsonl"
    kept = KeptAnswers(path, SETTINGS)
    kept.add("first", "sorting", ANSWER)
    kept.add("second", "sorting", replace(ANSWER, is_right=False))
    again = KeptAnswers(path, SETTINGS)
    assert again.tasks("first") == ["sorting"] and again.tasks("third") == []
    assert again.of("first", "sorting") == [ANSWER] and again.of("first", "sudoku") == []
    assert again.of("second", "sorting") == [replace(ANSWER, is_right=False)] and again.count == 2
    assert KeptAnswers(path, SETTINGS, force=True).count == 0 and KeptAnswers(path, SETTINGS).count == 0


def test_half_a_line_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "a"
    kept = KeptAnswers(path, SETTINGS)
    for _ in range(2):
        kept.add("first", "sorting", ANSWER)
    path.write_bytes(path.read_bytes()[:-9])
    again = KeptAnswers(path, SETTINGS)
    assert again.of("first", "sorting") == [ANSWER]
    again.add("first", "sorting", ANSWER)
    assert KeptAnswers(path, SETTINGS).count == 2


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("anything\n", "line 1 of .*a is no answer of an evaluation; give another -o, or --force"),
        ('{"prompt": "x"}\n', "a holds no answers of an evaluation; give another -o, or --force"),
        ("[]\n", "a holds no answers of an evaluation"),
        ('{"format": "sfumato answers", "settings": {"tasks": {"sorting": "cd"}}}\n', r"\(first, tasks changed\)"),
    ],
)
def test_another_file_is_not_gone_on_with(content: str, sentence: str, tmp_path: Path) -> None:
    (path := tmp_path / "a").write_text(content)
    with pytest.raises(InputError, match=sentence):
        KeptAnswers(path, SETTINGS)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "line", ["{", "7", '{"run": "first"}', '{"run": "first", "task": "a", "item": "b"}', "[" * 99_999]
)
def test_a_line_that_is_no_answer_is_named(line: str, tmp_path: Path) -> None:
    KeptAnswers(path := tmp_path / "a", SETTINGS)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=r"line 2 of .*a is no answer of an evaluation"):
        KeptAnswers(path, SETTINGS)


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, options = LLM.load("nano"), Options(seed=1, max_steps=2)
    exercise = fresh(named("sorting"), 4, 1)
    whole = [answer.text for answer in evaluate(llm, exercise, options)]
    first = [*islice(evaluate(llm, exercise, options, batch=1, kept=KeptAnswers(tmp_path / "a", {})), 3)]
    kept = KeptAnswers(tmp_path / "a", {})
    assert kept.of("first", "sorting") == first
    rest: list[int] = []
    original = tasks._here

    def here(llm: LLM, task: Task, items: Sequence[str], options: Options) -> list[TaskAnswer]:
        rest.append(len(items))
        return original(llm, task, items, options)

    monkeypatch.setattr(tasks, "_here", here)
    assert [answer.text for answer in evaluate(llm, exercise, options, kept=kept)] == whole and rest == [1]
    assert KeptAnswers(tmp_path / "a", {}).count == 4
    with pytest.raises(InputError, match="the kept answers of sorting are to other items"):
        list(evaluate(llm, Exercise(exercise.task, exercise.items[::-1]), options, kept=kept))


def test_items_have_a_digest() -> None:
    exercise = fresh(named("sorting"), 3, 1)
    assert digest_of(exercise) == digest_of(fresh(named("sorting"), 3, 1)) != digest_of(fresh(named("sorting"), 3, 2))
    assert digest_of(exercise) != digest_of(Exercise(exercise.task, exercise.items[:2]))
