"""`sfumato finetune`: train on the engine's own model, factors or all weights, resumable at any moment."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, flags
from sfumato.cli import options as opt
from sfumato.errors import InputError, SfumatoError
from sfumato.options import LOAD_OPTIONS, LoadOptions
from sfumato.system.files import locked

if TYPE_CHECKING:
    from sfumato.training.recipe import TrainingRecipe
    from sfumato.training.spec import DataSpec, LoraSpec, RunSpec


@dataclass(frozen=True)
class RunFlags:
    """What to train, for how long, and where to."""

    out: Annotated[str | None, typer.Argument(help="Folder of the run, as --output.")] = None
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder of the run: state, logs, card, and the adapter or checkpoint."),
    ] = None
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint to begin from; nano:new begins from random weights.")
    ] = "nano"
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A number of the recipe as NAME=VALUE, e.g. -s steps=3000.")
    ] = None
    epochs: Annotated[float | None, typer.Option(help="How often each example of the files is seen; 3.")] = None
    minutes: Annotated[float | None, typer.Option(help="Stop (and save) after so many minutes.")] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the step: minutes to start, faster.")] = (
        False
    )
    device: Annotated[str, typer.Option(help=LOAD_OPTIONS["device"].about.sentence)] = LoadOptions.device
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew in a folder that holds something; an earlier run there is lost.")
    ] = False


@dataclass(frozen=True)
class DataFlags:
    """What to train on."""

    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A file or folder of examples: JSONL, JSON, text, parquet; may be repeated."),
    ] = None
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="What of the data is not trained on: a share (5%) or a file.")
    ] = None
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="The longest example, in tokens.")] = None
    long: Annotated[str, typer.Option(help="Longer examples: cut, drop or refuse.")] = "cut"
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show three examples as the model will see them, and train nothing.")
    ] = False
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="A task to train on: sudoku, sorting; sudoku where nothing else is named."),
    ] = None
    mix: Annotated[
        list[str] | None,
        typer.Option("--mix", help='The share of a task, or of "data", in every batch, as NAME=SHARE.'),
    ] = None
    pool: Annotated[int, typer.Option(min=60, help="Puzzles to dig before training; symmetries make the rest.")] = 6000


@dataclass(frozen=True)
class FactorFlags:
    """Train low-rank factors in the place of the weights."""

    lora: Annotated[int | None, typer.Option("--lora", help="Train factors of this rank; without, all weights.")] = None
    alpha: Annotated[float | None, typer.Option(help="Scale of the factors; twice the rank.")] = None
    targets: Annotated[
        str | None,
        typer.Option(
            help="What has factors: attention, dense, experts, router, self_conditioning, or names such as q_proj; "
            "attention,dense."
        ),
    ] = None
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by the root of the rank.")] = False
    quantize: Annotated[str | None, typer.Option(help="Pack the frozen weights: int8, fp8, int4, … (QLoRA).")] = None
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16: half the memory.")] = None
    accumulate: Annotated[int | None, typer.Option(help="Compute a batch in so many parts: less memory.")] = None
    optimizer: Annotated[str | None, typer.Option(help="adamw, muon, or bitsandbytes' adamw8bit and paged.")] = None
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False


@dataclass(frozen=True)
class LookFlags:
    """How the model is looked at while it learns."""

    eval_every: Annotated[
        int | None,
        typer.Option(min=0, help="Steps between looks at the model; a tenth of the run, 500 at most; 0: none."),
    ] = None
    eval_: Annotated[
        list[str] | None,
        typer.Option("--eval", help="A task whose checker runs on held-out items; those of --task."),
    ] = None
    eval_items: Annotated[int, typer.Option(min=1, help="Items of each task.")] = 60
    samples: Annotated[int, typer.Option(min=0, help="Held-out prompts whose answers are written down.")] = 2
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many looks without a lower held-out loss; 0: never.")
    ] = 0


@dataclass(frozen=True)
class PlanFlags:
    """What a run would need, without running."""

    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print the memory that training needs, by part, from the config alone; -m released is DiffusionGemma.",
        ),
    ] = False
    gpu: Annotated[float | None, typer.Option(min=1, help="Memory of a GPU in GB to plan for; 24, 32, 48, 80.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False


@flags.takes(
    run=flags.group_of(RunFlags),
    data=flags.group_of(DataFlags, "Data"),
    factors=flags.group_of(FactorFlags, "Adapters and memory"),
    looks=flags.group_of(LookFlags, "Looks at the model"),
    plan=flags.group_of(PlanFlags, "Plan"),
)
def command(run: RunFlags, data: DataFlags, factors: FactorFlags, looks: LookFlags, plan: PlanFlags) -> None:
    """Train; run the same command again to go on where it stopped. Ctrl-C and SIGTERM end the step and save first.

    Example: sfumato finetune -m nano --task sorting --lora 16 -o runs/sorting

    Example: sfumato finetune --plan -m released --gpu 24

    Several GPUs: torchrun --nproc-per-node 2 -m sfumato finetune …
    """
    if data.dry_run:
        _dry_run(run, data, factors)
        return
    if plan.plan:
        _plan(run, data, factors, plan)
        return
    spec = _spec(run, data, factors, looks)
    from sfumato.training.distributed import Ranks

    ranks, device = Ranks.join(run.device)
    with Stop() as stop:
        try:
            _carry_out(spec, run.force, ranks, device, stop)
        except SfumatoError:
            if not ranks.is_first:  # the first one says it
                raise typer.Exit(1) from None
            raise
        finally:
            ranks.leave()
    if stop.number:
        raise typer.Exit(128 + stop.number)


def _plan(run: RunFlags, data: DataFlags, factors: FactorFlags, plan: PlanFlags) -> None:
    """Print what the run would need, or the usual ones where no flag says what is trained."""
    from sfumato.cli.training_plan import plan_command
    from sfumato.measure.training import TrainingSetup

    lora, changes = _lora(factors), _changes(run, factors)
    is_chosen = lora is not None or factors.quantize is not None
    numbers = _recipe(run, factors)
    per_pass = numbers.batch // numbers.accumulate if is_chosen or "batch" in changes else 1
    setup = TrainingSetup(
        quantize=factors.quantize,
        precision=numbers.precision if is_chosen or "precision" in changes else "bfloat16",
        rank=0 if lora is None and is_chosen else 16 if lora is None else lora.rank,
        optimizer=numbers.optimizer,
        is_checkpointed=factors.checkpointing,
        tokens=data.max_tokens or 1024,
        examples=per_pass,
        repeats=numbers.repeats,
        is_accumulated=numbers.accumulate > 1,
        is_revised=numbers.revision_penalty > 0,
        is_distilled=numbers.self_distillation > 0,
    )
    setup = setup if lora is None else replace(setup, targets=lora.targets)
    plan_command(run.model, setup, plan.gpu, is_chosen, plan.as_json)


def _dry_run(run: RunFlags, data: DataFlags, factors: FactorFlags) -> None:
    """Show what the files of data become, for a model whose weights are not read."""
    from sfumato.cli.training_data import dry_run

    if not data.data:
        raise InputError("--dry-run shows files of data; name them with --data")
    dry_run(run.model, _data(data), _recipe(run, factors), Console(highlight=False))


def _carry_out(spec: RunSpec, force: bool, ranks: Any, device: str, stop: Stop) -> None:
    from sfumato.cli.training_view import TrainingView
    from sfumato.training.run import carry_out, prepare_folder

    with locked(spec.folder) if ranks.is_first else nullcontext():
        ranks.lead(lambda: prepare_folder(spec.folder, force))
        carry_out(spec, TrainingView(), lambda: bool(stop.number), ranks, device)


class Stop:
    """Ctrl-C and SIGTERM, kept: the step in progress ends and is saved. The second one ends the work at once."""

    number = 0
    """The signal that came; 0: none."""

    def __enter__(self) -> Stop:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other may set them
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
        print("\nsfumato: saved and ended after this step; a second Ctrl-C ends at once", file=sys.stderr)


# ---- flags → RunSpec -------------------------------------------------------------------------------------------------


def _spec(run: RunFlags, data: DataFlags, factors: FactorFlags, looks: LookFlags) -> RunSpec:
    """The run that these flags ask for. InputError names the flag."""
    from sfumato.training.spec import LookSpec, RunSpec

    if run.out is not None and run.output is not None:
        raise InputError(f"OUT is {run.out} and --output {run.output}; give one of them")
    name = "OUT" if run.output is None else "--output"
    folder = files.out_path(_required(run), name)
    trained = tuple(dict.fromkeys(data.task or ([] if data.data else ["sudoku"])))
    return RunSpec(
        folder=folder,
        model=run.model,
        data=replace(_data(data), tasks=_tasks(trained), mix=_shares(data.mix or [])),
        lora=_lora(factors),
        looks=LookSpec(
            looks.eval_every, _tasks(looks.eval_ or trained), looks.eval_items, looks.samples, looks.patience
        ),
        changes=_changes(run, factors),
        epochs=run.epochs,
        minutes=run.minutes,
        quantize=factors.quantize,
        checkpointing=factors.checkpointing,
        compile=run.compile,
        device=run.device,
        threads=run.threads,
    )


def _data(data: DataFlags) -> DataSpec:
    """The files that these flags name, without tasks."""
    from sfumato.training.spec import DataSpec

    return DataSpec(
        files=tuple(map(Path, data.data or ())),
        held_out=data.held_out,
        max_tokens=data.max_tokens,
        long=data.long,  # type: ignore[arg-type]
        pool=data.pool,
    )


def _recipe(run: RunFlags, factors: FactorFlags) -> TrainingRecipe:
    """The numbers of a new run that these flags ask for."""
    from sfumato.training.recipe import FULL, LORA, TrainingRecipe

    return TrainingRecipe(**{**(FULL if factors.lora is None else LORA), **_changes(run, factors)})


def _required(run: RunFlags) -> str:
    folder = run.out if run.output is None else run.output
    if folder is None:
        raise InputError("there is no folder for the run; give one: -o DIR")
    return folder


def _tasks(names: Any) -> tuple[str, ...]:
    from sfumato.tasks import task

    return tuple(task.named(name).name for name in names)


def _lora(factors: FactorFlags) -> LoraSpec | None:
    from sfumato.training.spec import LoraSpec

    if factors.lora is None:
        for name, value in (("alpha", factors.alpha), ("targets", factors.targets), ("rslora", factors.rslora)):
            if value:
                raise InputError(f"--{name} is of factors, and none are trained; give --lora RANK too")
        return None
    targets = {} if factors.targets is None else {"targets": tuple(filter(None, factors.targets.split(",")))}
    return LoraSpec(factors.lora, factors.alpha, is_rs=factors.rslora, **targets)


def _changes(run: RunFlags, factors: FactorFlags) -> dict[str, Any]:
    """The numbers of the recipe that the flags set."""
    from sfumato.training.recipe import TrainingRecipe

    changes = _numbers(run.set_ or [], {field.name for field in fields(TrainingRecipe)})
    for name in ("precision", "accumulate", "optimizer"):
        if (value := getattr(factors, name)) is not None:
            if name in changes:
                raise InputError(f"{name} is given twice, as --{name} and as -s {name}=; give one of them")
            changes[name] = value
    return changes


def _numbers(pairs: list[str], names: set[str]) -> dict[str, Any]:
    """The fields of a recipe that NAME=VALUE pairs set."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, is_pair, text = pair.partition("=")
        if name not in names or not is_pair:
            raise InputError(f"{pair!r} is no part of a recipe; give NAME=VALUE, names are {', '.join(sorted(names))}")
        values[name] = _pair(text) if name == "betas" else opt.read_value(text)
    return values


def _pair(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise InputError(f"betas is {text!r}; give two numbers from 0 to 1, such as 0.95,0.99") from None


def _shares(pairs: list[str]) -> dict[str, float]:
    """What --mix says, by name."""
    shares: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            shares[name] = float(text)
        except ValueError:
            raise InputError(f"--mix is {pair!r}; give NAME=SHARE, e.g. sudoku=0.3") from None
    return shares
