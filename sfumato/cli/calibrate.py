"""`sfumato calibrate`: how sure decisions are against what is right, and a file that mends it.

The labelled questions are read by the model, or by that of a server, and kept beside the file to write as they come;
run again after an interruption, it goes on. The rest, the fit and its figures, takes a moment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.output import harmless, put
from sfumato.cli.settings import read_settings
from sfumato.cli.view import visible
from sfumato.errors import InputError
from sfumato.options import MOST_STEPS, LoadOptions, Options
from sfumato.templates.checks import MOST_SAMPLES

if TYPE_CHECKING:
    from sfumato.evals.calibration import KindReport, LabelledRead
    from sfumato.evals.labelled import LabelledState
    from sfumato.evals.labelled_reads import KeptReads, ReadingPlan
    from sfumato.templates.interface import LanguageModel

NAMED = 10
"""Lines that are wrong and named; more are counted."""


@dataclass(frozen=True)
class LabelFlags:
    """The labelled questions, and how they are read."""

    data: Annotated[
        str, typer.Option(metavar="FILE", help='JSON lines: {"state": …, "questions": {…}, "answers": {id: label}}.')
    ]
    held_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Judge on these. Default: each half by the other's fit.")
    ] = None
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps of each read.")] = 1
    samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Draws of noise that are averaged.")] = 1


@dataclass(frozen=True)
class CalibrationFlags:
    """What is written."""

    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write. Default: decisions.json of the model."),
    ] = None
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.svg", help="Draw the reliability diagram, before and after.")
    ] = None
    force: opt.Force = False
    as_json: opt.Json = False


@dataclass(frozen=True)
class Target:
    """Where the file goes, and whose reads it is fitted on."""

    path: Path
    is_beside: bool
    """Whether the model finds it by itself."""
    weights: str
    """What tells these weights from others."""
    name: str
    """What the model is called: a folder's own name, not its path, as the file may go elsewhere."""


@flags.takes(
    labels=flags.group_of(LabelFlags),
    api=loading.positional(loading.API),
    options=opt.flags_of("seed", is_template=True, usual=(), preset_of=("seed",)),
    load=opt.load_flags_of(),
    output=flags.group_of(CalibrationFlags),
)
def command(
    *,
    labels: LabelFlags,
    api: loading.ApiFlags,
    options: Options,
    load: LoadOptions,
    output: CalibrationFlags,
) -> None:
    """Fit how sure decisions are to labelled answers: a temperature for each kind of question, in a file.

    Labels are true or false, an option, a level's number or text, a passage, or a System One answer. The file lies
    beside the model, where `decide` and the server find it, or where -o says. Shows accuracy, log loss, Brier score and
    calibration error before and after. After an interruption, run it again and it goes on.

    Example: sfumato calibrate diffusiongemma --data labels.jsonl --plot reliability.svg

    Example: sfumato calibrate nano --data labels.jsonl --samples 4 -o mine.json
    """
    target = target_of(api, load, output)
    files.check_not_read((target.path, output.plot), (labels.data, labels.held_out))
    plot = files.new_path(output.plot, output.force, "--plot")
    states, wrong = read_labels(labels.data)
    held_out, more_wrong = (None, []) if labels.held_out is None else read_labels(labels.held_out)
    console = Console(stderr=True, highlight=False)
    _name_lines(console, [*wrong, *more_wrong], "were left out")
    llm = loading.connect_or_load(api, load)

    from sfumato.checkpoints.calibration import Calibration  # only now: these cost the import of torch
    from sfumato.cli.calibrate_screen import show
    from sfumato.evals.calibration import FEW, calibration_of_reports, judge
    from sfumato.evals.labelled_reads import KeptReads, ReadingPlan
    from sfumato.evals.reliability import draw

    plan = ReadingPlan(labels.steps, labels.samples, options, target.weights)
    kept = KeptReads(target.path.with_name(f".{target.path.name}.reads"))
    reading = StateReading(llm, plan, kept, console)
    reads = reading.reads_of(states)
    reports = judge(reads, None if held_out is None else reading.reads_of(held_out))
    _name_lines(console, reading.problems, "could not be read")
    if reading.skipped:
        console.print(f"{reading.skipped} labels are of questions that other answers did not call for", style="dim")
    name = llm.name if llm.is_remote else target.name
    base = Calibration(model=name, steps=labels.steps, samples=labels.samples)
    calibration = calibration_of_reports(reports, base)
    if plot is not None:
        plot.write(draw(reports, f"{name}: how sure decisions are"))
    if output.as_json:
        problems = [*wrong, *more_wrong, *reading.problems]
        put(json.dumps(_record(reports, calibration.to_dict(), target, problems, reading.skipped)) + "\n")
    else:
        show(reports)
    if not calibration.temperatures:
        most = max((one.labels for one in reports), default=0)
        few = f"{labels.data} has at most {most} label{'' if most == 1 else 's'} of one kind"
        raise InputError(f"{few}, and a temperature needs {FEW}; nothing was written")
    calibration.write(target.path)
    kept.remove()
    if not output.as_json:
        use = "decisions of this model use it from now on" if target.is_beside else "load it with --calibration"
        print(harmless(f"{target.path}: {use}"))


def target_of(api: loading.ApiFlags, load: LoadOptions, output: CalibrationFlags) -> Target:
    """Where to write. InputError, better now than after the work, for a place that cannot be written."""
    from sfumato.checkpoints.calibration import beside  # only now: these cost the import of torch
    from sfumato.checkpoints.locate import resolve

    settings = read_settings()
    url = api.api or (settings.api if api.model is None else None)
    name = api.model or settings.model or ("" if url else "nano")
    named = files.new_path(output.output, output.force)
    if url is not None:
        if named is None:
            raise InputError(f"the model is at {url}, where no file can be written; give -o FILE")
        return Target(named.path, False, f"{url} {name}", name or url)
    if len(load.adapters or {}) > 1:
        raise InputError("several adapters are given, and each has its own calibration; give one", option="adapters")
    place = resolve(name)
    label = Path(name).expanduser().resolve().name if is_named(place, name) else name
    for adapter, folder in (load.adapters or {}).items():
        place, label = Path(folder).expanduser(), f"{label} with {adapter}"
    weights = f"{load!r} {weights_of(place)}"
    if named is not None:
        return Target(named.path, False, weights, label)
    path = beside(place)
    if not (load.adapters or is_named(place, name)) or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{name} is not in a folder of yours that can be written; give -o FILE, and load the model with "
            "--calibration FILE"
        )
    return Target(path, True, weights, label)


def is_named(place: Path, name: str) -> bool:
    """Whether a model is at the path that its name is: not in the package, nor in the hub's cache."""
    path, names = Path(os.path.abspath(place)), [one for one in (name, name.rpartition(":")[0]) if one]
    return any(path.is_relative_to(os.path.abspath(os.path.expanduser(one))) for one in names)


def weights_of(place: Path) -> str:
    """What changes when the weights of a checkpoint do: names, sizes and times of its files."""
    paths = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    facts = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    return f"{place.resolve()} {facts}"


def read_labels(file: str) -> tuple[list[LabelledState], list[str]]:
    """The labelled states of a file, and a sentence for each line that is wrong. InputError where no line is right."""
    from sfumato.evals.labelled import labelled_states

    wrong: list[str] = []
    try:
        if file == "-":
            states = list(labelled_states(sys.stdin.buffer, wrong))
        else:
            with open(file, "rb") as lines:
                states = list(labelled_states(lines, wrong))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; give JSON lines of labelled questions") from None
    wrong = [f"{file}, {sentence}" for sentence in wrong]
    if not states:
        first = f"; {wrong[0]}" if wrong else ""
        name = "standard input" if file == "-" else file
        raise InputError(f"{name} has no labelled question{first}")
    return states, wrong


class StateReading:
    """Reads of labelled states, with a bar of progress on a terminal."""

    def __init__(self, llm: LanguageModel, plan: ReadingPlan, kept: KeptReads, console: Console) -> None:
        self.llm, self.plan, self.kept, self.console = llm, plan, kept, console
        self.problems: list[str] = []
        self.skipped = 0

    def reads_of(self, states: Sequence[LabelledState]) -> list[LabelledRead]:
        """What the model says. InputError where it can read none of them."""
        try:
            return asyncio.run(self._reads_of(states))
        except KeyboardInterrupt:
            place = f"stopped; what is read is kept in {self.kept.path}: run it again and it goes on"
            self.console.print(visible(place), soft_wrap=True)
            raise

    async def _reads_of(self, states: Sequence[LabelledState]) -> list[LabelledRead]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        from sfumato.evals.labelled_reads import read_states

        columns = ("reading", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        reads: list[LabelledRead] = []
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=len(states))
            async with aclosing(read_states(self.llm, states, self.plan, self.kept, self.problems)) as results:
                async for result in results:
                    reads += result.reads
                    self.skipped += result.skipped
                    bar.advance(task)
        if not reads and self.problems:
            raise InputError(f"the model could read none of the states; {self.problems[0]}")
        return reads


def _name_lines(console: Console, sentences: Sequence[str], what: str) -> None:
    """A line for each of the first, and how many there are."""
    if not sentences:
        return
    for sentence in sentences[:NAMED]:
        console.print(visible(sentence, "dim"), soft_wrap=True)
    more = len(sentences) - NAMED
    lines = "1 line" if len(sentences) == 1 else f"{len(sentences)} lines"
    console.print(f"{lines} {what}{f' ({more} more than are named)' if more > 0 else ''}", style="bold")


def _record(
    reports: Sequence[KindReport], calibration: dict[str, Any], target: Target, problems: list[str], skipped: int
) -> dict[str, Any]:
    """What --json prints."""
    bins = {
        one.kind: {
            name: [[each.confidence, each.accuracy, each.count] for each in some]
            for name, some in (("before", one.before_bins), ("after", one.after_bins))
        }
        for one in reports
    }
    errors = {one.kind: one.fit.error for one in reports if one.fit is not None}
    more = {"file": str(target.path), "error": errors, "bins": bins, "left_out": problems, "skipped": skipped}
    return calibration | more
