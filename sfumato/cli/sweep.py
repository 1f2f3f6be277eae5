"""`sfumato eval --sweep`: what is tried, for how long, and the preset that comes of it.

The command `eval` names the model and the items; this carries out the sweep and gives the report in place of the usual
one. Answers are kept as the command keeps them, by setting.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, loading
from sfumato.cli import options as opt
from sfumato.cli.eval_runs import RunSetting
from sfumato.cli.output import harmless
from sfumato.cli.view import visible
from sfumato.errors import InputError, SfumatoError
from sfumato.evals.settings import COSTS, Axis, CostKind, Setting, axis_of, usual_axes
from sfumato.options import OPTIONS, LoadOptions, Options
from sfumato.presets import PRECISION

if TYPE_CHECKING:
    from sfumato.cli.sweep_screen import SweepReport
    from sfumato.evals.kept_answers import KeptAnswers
    from sfumato.evals.tasks import Exercise
    from sfumato.templates.interface import LanguageModel
USUAL = "usual"
"""What --axis calls the axes that are tried where none is named."""


@dataclass(frozen=True)
class SweepFlags:
    """Which settings are tried, for how long, and what one may lose."""

    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try settings: the curve of quality against steps and time, and a choice.")
    ] = False
    axis: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V,V,...",
            help="With --sweep: values of an option to try, of dtype, ops or quantize too; t_min+t_max=0.1:0.4,0.2:0.8 "
            "changes two together. Repeatable. Default: usual, which is steps, second tries, bound, stop, repeats, "
            "temperature, early.",
        ),
    ] = None
    lose: Annotated[
        float, typer.Option(min=0.0, max=100.0, metavar="POINTS", help="What the chosen setting may lose, at most.")
    ] = 1.0
    by: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(COSTS),
            help="What is to be little; default: passes, or milliseconds where an axis is of loading.",
            autocompletion=lambda: [*COSTS],
        ),
    ] = None
    budget: Annotated[float, typer.Option(metavar="MINUTES", help="Time of the sweep.")] = 10.0
    preset_to: Annotated[
        str | None, typer.Option("--preset-to", metavar="FILE", help="Write the chosen setting, for --preset.")
    ] = None

    def check(self, force: bool, compare: Sequence[str] | None, harness: Sequence[str]) -> files.NewFile | None:
        """The preset's file. InputError for a flag of the sweep without --sweep, and for one that is wrong."""
        usual = SweepFlags()
        for name in ("axis", "lose", "by", "budget", "preset_to"):
            if not self.sweep and getattr(self, name) not in (getattr(usual, name), []):
                raise InputError(f"--{name.replace('_', '-')} is of a sweep; give --sweep too")
        if self.sweep and compare is not None:
            raise InputError("--sweep and --compare are given together; give one of them")
        if self.sweep and harness:
            raise InputError(
                f"{harness[0]} is a task of lm-evaluation-harness, which --sweep does not run; leave it out"
            )
        if self.by not in (None, *COSTS):
            raise InputError(f"--by is {self.by!r}; give {', '.join(COSTS)}")
        if not 0 < self.lose <= 100:
            raise InputError(f"--lose is {self.lose:g}; give points above 0, at most 100: 0 can never be shown")
        if not 0 < self.budget <= 10_000:
            raise InputError(f"--budget is {self.budget:g}; give minutes above 0, at most 10000")
        self.axes()
        return files.new_path(self.preset_to, force, "--preset-to")

    def cost(self, axes: Sequence[Axis]) -> CostKind:
        """What is to be little."""
        is_loaded = any(name in PRECISION for axis in axes for name in axis.names)
        usual: CostKind = "milliseconds" if is_loaded else "passes"
        return next((cost for cost in COSTS if cost == self.by), usual)

    def axes(self) -> list[Axis]:
        """The axes that are named, without the usual ones. InputError for one that is wrong."""
        return [_axis(text) for text in self.axis or () if text != USUAL]


def _axis(text: str) -> Axis:
    """An axis, from NAME=VALUE,VALUE or NAME+NAME=VALUE:VALUE,VALUE:VALUE."""
    label, is_pair, values = text.partition("=")
    names = [name.strip().replace("-", "_") for name in label.split("+")]
    if not is_pair or not values:
        raise InputError(f"--axis is {text!r}; give NAME=VALUE,VALUE, as in max_steps=4,8,12")
    each = [[part.strip() for part in one.split(":", len(names) - 1)] for one in values.split(",")]
    return axis_of(names, [[_value(name, part) for name, part in zip(names, one, strict=False)] for one in each])


def _value(name: str, text: str) -> Any:
    """The text as the option's kind has it."""
    return text if name not in OPTIONS or OPTIONS[name].kind is str else opt.read_value(text)


@dataclass
class _Models:
    """The model as a setting loads it: one at a time, as the memory may hold no second."""

    first: RunSetting
    loaded: tuple[LoadOptions, LanguageModel] | None = None

    def of(self, setting: Setting) -> LanguageModel:
        """The model; the one before is freed where it was loaded in another way."""
        load = setting.loaded(self.first.load)
        if self.loaded is None or self.loaded[0] != load:
            self.loaded = None
            gc.collect()  # what refers to itself in a circle would keep the weights
            self.loaded = load, loading.connect_or_load(self.first.api, load)
        return self.loaded[1]


def carry_out_sweep(
    first: RunSetting, exercises: Sequence[Exercise], flags: SweepFlags, batch: int, kept: KeptAnswers, console: Console
) -> SweepReport:
    """Try settings of a model on these items. InputError for axes that it cannot have."""
    from sfumato.cli.sweep_screen import SweepReport
    from sfumato.evals.sweep import Sweep

    models, began = _Models(first), time.monotonic()
    axes = axes_of(models.of(Setting()), first.options, flags)

    def tell(line: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - began), 60)
        console.print(visible(f"{minutes}:{seconds:02d}  {line}", "dim"), soft_wrap=True)

    sweep = Sweep(
        exercises,
        axes,
        first.options,
        models.of,
        seconds=60 * flags.budget,
        cost=flags.cost(axes),
        lose=flags.lose,
        batch=batch,
        kept=kept,
        tell=tell,
    )
    try:
        result = sweep.run()
    except KeyboardInterrupt:
        if kept.path is not None:
            line = f"stopped; {kept.count} answers are kept in {kept.path}: run it again and it goes on"
            console.print(visible(line), soft_wrap=True)
        raise
    return SweepReport(result, first, models.of(Setting()), [axis.label for axis in axes])


def write_preset(report: object, target: files.NewFile) -> None:
    """Write the preset of a sweep's choice. Exit code 1 where there is none: the report has said why."""
    from sfumato.cli.sweep_screen import SweepReport

    assert isinstance(report, SweepReport)
    preset = report.preset()
    if preset is None:
        raise SfumatoError(f"{target.path} is not written, as no setting is confirmed")
    target.write(preset.text)
    print(harmless(f"{target.path}: give it to any command, or to sfumato serve, as --preset"))


def axes_of(llm: LanguageModel, options: Options, flags: SweepFlags) -> list[Axis]:
    """The axes that are named, else those around the reference. InputError for one that this model cannot have."""
    axes = flags.axes()
    for name in (name for axis in axes for name in axis.names if llm.is_remote and name in PRECISION):
        raise InputError(f"--axis {name} is of a model loaded here; leave it out with --api")
    if axes and USUAL not in (flags.axis or ()):
        return axes
    if not llm.has_drafts:
        raise InputError(f"{llm.name} has no canvas, so that there are no usual axes; name one with --axis")
    return [*usual_axes(options, getattr(llm, "defaults", {})), *axes]
