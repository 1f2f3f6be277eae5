"""`sfumato eval`: how much of a task a model has right, what that took, and whether another one is better.

A task is one of `sfumato.tasks` or a file of JSON lines. Answers are kept beside the record that is written, a line
each, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.decide_lines import count_lines
from sfumato.cli.eval_runs import HARNESS, RUNS, EvalWork, compared, setting_of
from sfumato.cli.output import put
from sfumato.cli.sweep import SweepFlags, carry_out_sweep, write_preset
from sfumato.cli.view import visible, working
from sfumato.errors import InputError
from sfumato.options import BIG, LoadOptions, Options
from sfumato.system.files import locked
from sfumato.tasks.task import NAMES, is_named, names

if TYPE_CHECKING:
    from sfumato.cli.eval_screen import EvalReport
    from sfumato.cli.sweep_screen import SweepReport
    from sfumato.evals.tasks import Exercise

NAMED = 5
"""Lines, and answers, that are wrong and named; more are counted."""
FILES = (".jsonl", ".ndjson", ".json")
"""How names of files with items end."""


def known_tasks(incomplete: str) -> list[str]:
    """The tasks and models that the shell offers."""
    return [*names(incomplete), *loading.known_models(incomplete)]


@dataclass(frozen=True)
class ExerciseFlags:
    """Which items, and how many together."""

    items: Annotated[int, typer.Option(min=1, help="Items of each task; of a file at most so many, drawn.")] = 200
    seed: Annotated[int, typer.Option(min=0, max=BIG, help="Of the items and of the noise.")] = 7
    check: Annotated[
        str | None,
        typer.Option(help="How lines of a file are checked that do not say: exact, contains, json, regex, python."),
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Items answered at once.")] = 32


@dataclass(frozen=True)
class EvalOutputFlags:
    """What is compared, and what is written."""

    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL|NAME=VALUE",
            help="Compare with another model, or with the same at another option: max_steps=8, quantize=int8, "
            "ops=reference. Repeatable.",
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE.json", help="Write the record; answers go beside it, line by line."
        ),
    ] = None
    picture: Annotated[str | None, typer.Option(metavar="FILE.svg", help="Draw the shares with their intervals.")] = (
        None
    )
    force: opt.Force = False
    as_json: opt.Json = False

    @property
    def answers(self) -> Path | None:
        """The file of answers, beside the record."""
        if self.output is None:
            return None
        path = files.out_path(self.output, "--output").expanduser()
        return path.with_name(f"{path.stem}.answers.jsonl")

    def new_files(self, sources: Sequence[str], sweep: SweepFlags) -> tuple[files.NewFile | None, files.NewFile | None]:
        """The record and the picture, where they are asked for. InputError for one that cannot be written.

        A sweep makes its record anew from the answers beside it."""
        files.check_not_read((self.output, self.answers, self.picture, sweep.preset_to), sources)
        goes_on = sweep.sweep and self.answers is not None and self.answers.exists()
        picture = files.new_path(self.picture, self.force, "--picture")
        if picture is not None and picture.path.suffix.lower() != ".svg":
            raise InputError(f"--picture is {picture.path}, and the picture is SVG; give a name that ends in .svg")
        return files.new_path(self.output, self.force or goes_on), picture


@flags.takes(
    exercise=flags.group_of(ExerciseFlags, "Which items"),
    output=flags.group_of(EvalOutputFlags),
    api=loading.API,
    options=opt.flags_of("max_steps", "max_tokens", "mode", "temperature", usual=()),
    load=opt.load_flags_of(),
    sweep=flags.group_of(SweepFlags, "Sweep"),
)
def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] TASK...",
            help=f"A model, unless -m or --api says which; tasks: {', '.join(NAMES)}, files of JSON lines, lm:NAME.",
            autocompletion=known_tasks,
        ),
    ] = None,
    *,
    exercise: ExerciseFlags,
    output: EvalOutputFlags,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    sweep: SweepFlags,
) -> None:
    """Say how much of a task a model has right, with intervals, and what it took: steps, passes, time, memory.

    Items of tasks are random and none that any training run sees; the same seed gives the same ones. A line of a file
    is {"prompt": …, "answer": …, "check": …}. With -o an interrupted run goes on where it stood.

    Example: sfumato eval nano sudoku --items 50

    Example: sfumato eval nano sudoku --items 50 --compare max_steps=6

    Example: sfumato eval nano sudoku --items 900 --sweep --preset-to fast.json

    Example: sfumato eval -m google/diffusiongemma-26B-A4B-it mine.jsonl -o mine.json --picture mine.svg
    """
    name, tasks = model_and_tasks(words or [], api)
    harness = harness_tasks(tasks)
    preset = sweep.check(output.force, output.compare, harness)
    seed = exercise.seed if options.seed is None else options.seed
    first = setting_of(replace(api, model=name), load, replace(options, seed=seed))
    settings = [first] if output.compare is None else [first, compared(first, output.compare)]
    target, picture = output.new_files([one for one in tasks if not is_named(one)], sweep)
    console = Console(stderr=True, highlight=False)
    problems: list[str] = []
    exercises = exercises_of([one for one in tasks if not one.startswith(HARNESS)], exercise, seed, console, problems)

    from sfumato.cli.eval_screen import EvalReport  # only now: these cost the import of torch
    from sfumato.evals.evaluation import digest_of
    from sfumato.evals.kept_answers import KeptAnswers

    what: dict[str, Any] = {"tasks": {one.task.name: digest_of(one) for one in exercises}}
    what |= {run: one.record() for run, one in zip(RUNS, settings, strict=False)}
    what |= {"harness": [exercise.items, *harness]} if harness else {}
    with nullcontext() if output.answers is None else locked(output.answers):
        kept = KeptAnswers(output.answers, what, output.force)
        report: EvalReport | SweepReport
        if sweep.sweep:
            report = carry_out_sweep(first, exercises, sweep, exercise.batch, kept, console)
        else:
            work = EvalWork(exercises, exercise.batch, kept, console, harness, exercise.items)
            report = EvalReport.of(work.results(settings), seed)
    _write(report, target, picture, output.as_json)
    _name_lines(console, [*report.errors, *problems], "could not be answered or checked, which counts as wrong")
    if preset is not None:
        write_preset(report, preset)


def _write(
    report: EvalReport | SweepReport, target: files.NewFile | None, picture: files.NewFile | None, as_json: bool
) -> None:
    if picture is not None:
        picture.write(report.drawn())
    if target is not None:
        target.write(json.dumps(report.record(), indent=1) + "\n")
    if as_json:
        put(json.dumps(report.record()) + "\n")
    else:
        report.show()


# ---- what is asked ---------------------------------------------------------------------------------------------------


def model_and_tasks(words: Sequence[str], api: loading.ApiFlags) -> tuple[str | None, list[str]]:
    """The model that is named, if one is, and the tasks; InputError where there is none.

    The first word is a model unless a flag says which, or it is a task."""
    tasks, name = [*words], api.model
    if tasks and name is None and api.api is None and not is_task(tasks[0]):
        name = tasks.pop(0)
    if not tasks:
        raise InputError(f"no task is named; give {', '.join(NAMES)}, or a file of JSON lines")
    return name, tasks


def is_task(word: str) -> bool:
    """Whether a word is a task's name, a file of items, or a task of lm-eval."""
    return is_named(word) or word.startswith(HARNESS) or word.lower().endswith(FILES)


def harness_tasks(tasks: Sequence[str]) -> list[str]:
    """The tasks of lm-evaluation-harness among these, by their names there. InputError where it is not installed."""
    names = [name.removeprefix(HARNESS) for name in tasks if name.startswith(HARNESS)]
    if names:
        from sfumato.evals.harness import check_installed

        check_installed()
    return names


def exercises_of(
    tasks: Sequence[str], chosen: ExerciseFlags, seed: int, console: Console, problems: list[str]
) -> list[Exercise]:
    """The items of each task. InputError for what is none; lines of a file that are wrong are named and left out."""
    from sfumato.evals.files import exercise_of_file
    from sfumato.evals.tasks import fresh
    from sfumato.tasks.task import named

    labels = [name if is_named(name) else Path(name).stem for name in tasks]
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        raise InputError(f"two tasks are called {twice}; give each file its own name")
    for name in tasks:
        if not is_task(name) and not os.path.exists(name):
            if name.partition("/")[0] in NAMES:
                named(name)  # says which kinds there are
            raise InputError(f"there is no task {name!r}; give {', '.join(NAMES)}, or a file of JSON lines")
    exercises: list[Exercise] = []
    for name in tasks:
        if is_named(name):
            with working(f"drawing items of {name}"):
                exercises.append(fresh(named(name), chosen.items, seed))
        else:
            bad: list[str] = []
            exercises.append(exercise_of_file(name, chosen.check, chosen.items, seed, bad, problems))
            words = "line was left out" if len(bad) == 1 else "lines were left out"
            _name_lines(console, [f"{name}, {one}" for one in bad], words)
            there = (count_lines(name) or 0) - len(bad)
            if there > (drawn := len(exercises[-1].items)):
                note = f"{name}: {drawn:,} of {there:,} items are drawn; --items says how many"
                console.print(visible(note, "dim"), soft_wrap=True)
    return exercises


def _name_lines(console: Console, sentences: Sequence[str], what: str) -> None:
    """A line for each of the first, and how many there are."""
    if not sentences:
        return
    for sentence in sentences[:NAMED]:
        console.print(visible(sentence, "dim"), soft_wrap=True)
    more = f" ({len(sentences) - NAMED} more than are named)" if len(sentences) > NAMED else ""
    console.print(f"{len(sentences)} {what}{more}", style="bold")
