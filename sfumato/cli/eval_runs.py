"""One model or two on the same items, for `sfumato eval`: what each is, its answers, and what they took.

Two settings that need the same weights share the model; else the first is freed before the second is loaded.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sfumato.cli import loading
from sfumato.cli import options as opt
from sfumato.cli.settings import read_settings
from sfumato.cli.view import visible
from sfumato.declarations import unknown_option
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, OPTIONS, LoadOptions, Options, differences

if TYPE_CHECKING:
    from sfumato.evals.kept_answers import KeptAnswers
    from sfumato.evals.tasks import Exercise, TaskAnswer
    from sfumato.llm import LLM
    from sfumato.templates.interface import LanguageModel

HARNESS = "lm:"
"""What stands before the name of a task of lm-evaluation-harness, or of its YAML file."""
RUNS = ("first", "second")
"""What the two are called where answers are kept."""


@dataclass(frozen=True)
class RunSetting:
    """A model, and how it answers."""

    api: loading.ApiFlags
    load: LoadOptions
    options: Options
    name: str
    """What it is called on the screen."""

    def is_loaded_like(self, other: RunSetting) -> bool:
        """Whether one model serves both."""
        return (self.api, self.load) == (other.api, other.load)

    def record(self) -> dict[str, Any]:
        """What tells its answers from others, as it goes into the file of answers."""
        from sfumato.checkpoints.locate import resolve
        from sfumato.cli.calibrate import weights_of

        settings = read_settings()
        url = self.api.api or (settings.api if self.api.model is None else None)
        name = self.api.model or settings.model or ("" if url else "nano")
        model = f"{url} {name}" if url else weights_of(resolve(name))
        values = {"options": differences(self.options), "load": differences(self.load)}
        return {"model": model} | {key: {name: str(one) for name, one in some.items()} for key, some in values.items()}


@dataclass
class RunResult:
    """What a run came to."""

    answers: dict[str, list[TaskAnswer]] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)
    """Bytes of memory at most, by task."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the model."""


def compared(first: RunSetting, changes: Sequence[str]) -> RunSetting:
    """The setting that the first is compared with: another model, or NAME=VALUE of any option. InputError for none."""
    api, load, options = first.api, first.load, first.options
    for change in changes:
        name, is_pair, value = change.partition("=")
        name = name.replace("-", "_")
        if is_pair and name in OPTIONS:
            options = opt.changed(options, f"{name}={value}")
        elif is_pair and name in LOAD_OPTIONS and name != "model":
            load = _changed_load(load, name, value)
        elif is_pair and name.isidentifier() and name != "model" and not os.path.exists(change):
            raise InputError(f"--compare: {unknown_option(name, {*OPTIONS, *LOAD_OPTIONS})}")
        elif change.strip():
            api = replace(api, model=value if is_pair and name == "model" else change)
        else:
            raise InputError("--compare is empty; give a model, or NAME=VALUE of an option")
    second = replace(setting_of(api, load, options), name=", ".join(changes))
    if second.is_loaded_like(first) and second.options == first.options:
        raise InputError(f"--compare {' '.join(changes)} changes nothing; give another model, or NAME=VALUE")
    return second


def _changed_load(load: LoadOptions, name: str, text: str) -> LoadOptions:
    value: Any = text
    if name == "memory_limit":
        number = opt.read_value(text)
        value = opt.in_bytes(number if isinstance(number, int | float) else float("nan"))
    elif name == "adapters":
        value = opt.adapter_folders([text])
    return replace(load, **{name: value})


def setting_of(api: loading.ApiFlags, load: LoadOptions, options: Options) -> RunSetting:
    """The setting under the name of its model."""
    return RunSetting(api, load, options, api.model or api.api or read_settings().model or "nano")


@dataclass(frozen=True)
class EvalWork:
    """The items, and how they are gone through."""

    exercises: Sequence[Exercise]
    batch: int
    kept: KeptAnswers
    console: Console
    harness: Sequence[str] = ()
    """Tasks of lm-evaluation-harness, by their names there."""
    count: int | None = None
    """Items of each of these at most."""

    def results(self, settings: Sequence[RunSetting]) -> list[RunResult]:
        """The results of one setting or two. After Ctrl-C a line says how to go on."""
        try:
            return [*self._results(settings)]
        except KeyboardInterrupt:
            if (path := self.kept.path) is not None:
                line = f"stopped; {self.kept.count} answers are kept in {path}: run it again and it goes on"
                self.console.print(visible(line), soft_wrap=True)
            raise

    def _results(self, settings: Sequence[RunSetting]) -> Iterator[RunResult]:
        llm: LanguageModel | None = None
        before: RunSetting | None = None
        for run, setting in zip(RUNS, settings, strict=False):
            if llm is not None and before is not None and not setting.is_loaded_like(before):
                llm = None
                gc.collect()  # what refers to itself in a circle would keep the weights
            if llm is None:
                llm = loading.connect_or_load(setting.api, setting.load)
            before = setting
            yield self._result(llm, setting, run)

    def _result(self, llm: LanguageModel, setting: RunSetting, run: str) -> RunResult:
        from sfumato.evals.evaluation import evaluate
        from sfumato.measure.machine import forget_peak, peak_bytes

        device = None if llm.is_remote else cast("LLM", llm).model.device
        result = RunResult(facts=facts_of(llm, setting))
        for exercise in self.exercises:
            name = exercise.task.name
            if device is not None:
                forget_peak(device)
            results = result.answers[name] = []
            words = name if run == RUNS[0] else f"{name}, {setting.name}"
            with self._bar(words, len(exercise.items)) as show:
                for answer in evaluate(llm, exercise, setting.options, batch=self.batch, kept=self.kept, run=run):
                    results.append(answer)
                    show(results)
            result.peaks[name] = None if device is None else peak_bytes(device)
        for name in self.harness:
            result.answers |= self._harness_answers(llm, setting, run, name)
        return result

    def _harness_answers(
        self, llm: LanguageModel, setting: RunSetting, run: str, name: str
    ) -> dict[str, list[TaskAnswer]]:
        """The answers to a task of lm-eval, or to each of a group, which are kept when all of them are there."""
        from sfumato.evals.harness import harness_answers

        key = f"{run} {name}"  # a group's tasks have names of their own
        if there := self.kept.tasks(key):
            return {task: self.kept.of(key, task) for task in there}
        results = harness_answers(llm, name, setting.options, self.count, self.batch)
        for task, answers in results.items():
            self.kept.add(key, f"{HARNESS}{task}", *answers)
        return {f"{HARNESS}{task}": answers for task, answers in results.items()}

    @contextmanager
    def _bar(self, words: str, total: int) -> Iterator[Callable[[Sequence[TaskAnswer]], None]]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        is_shown = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not is_shown) as bar:
            task = bar.add_task(visible(words).plain, total=total)

            def show(results: Sequence[TaskAnswer]) -> None:
                share = sum(result.is_right for result in results) / len(results)
                bar.update(task, completed=len(results), description=f"{visible(words).plain} {share:.0%}")

            yield show


def facts_of(llm: LanguageModel, setting: RunSetting) -> dict[str, Any]:
    """What a record says of a model and of how it answers."""
    options = {name: value for name, value in differences(setting.options).items() if name != "seed"}
    facts: dict[str, Any] = {"name": setting.name, "model": llm.name, "options": options}
    if llm.is_remote:
        return facts
    load = {name: str(value) for name, value in differences(setting.load).items() if name != "model"}
    model = cast("LLM", llm).model
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    return facts | {"load": load, "dtype": dtype, "device": device, "ops": model.ops.name}
