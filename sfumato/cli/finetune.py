"""`sfumato finetune`: train on the engine's own model, from a checkpoint or from scratch, resumable at any moment."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sfumato.cli import files, flags
from sfumato.cli import options as opt
from sfumato.cli.view import visible
from sfumato.errors import InputError
from sfumato.options import LOAD_OPTIONS, LoadOptions
from sfumato.system.files import locked

if TYPE_CHECKING:
    from sfumato.llm import LLM
    from sfumato.model.network import Model
    from sfumato.training.data import SudokuSource
    from sfumato.training.train import StepReport, TrainingRecipe


@dataclass(frozen=True)
class RunFlags:
    """What to train, on what, and for how long."""

    out: Annotated[str, typer.Argument(help="Folder of the run: state, log, plot, and the finished checkpoint.")]
    model: Annotated[
        str, typer.Option("--model", "-m", help="Checkpoint to begin from; nano:new begins from random weights.")
    ] = "nano"
    task: Annotated[str, typer.Option(help="What to train on: sudoku.")] = "sudoku"
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A number of the recipe as NAME=VALUE, e.g. -s steps=3000.")
    ] = None
    minutes: Annotated[float | None, typer.Option(help="Stop (and save) after so many minutes.")] = None
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between solve-rate checks; 0: none.")] = 500
    pool: Annotated[int, typer.Option(min=60, help="Puzzles to dig before training; symmetries make the rest.")] = 6000
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the step: minutes to start, faster.")] = (
        False
    )
    device: Annotated[str, typer.Option(help=LOAD_OPTIONS["device"].about.sentence)] = LoadOptions.device
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew in a folder that holds something; an earlier run there is lost.")
    ] = False


@flags.takes(run=flags.group_of(RunFlags))
def command(run: RunFlags) -> None:
    """Train; run the same command again to go on where it stopped. Ctrl-C and SIGTERM end the step and save first.

    Example: sfumato finetune runs/nano -m nano:new -s steps=3000 -s optimizer=muon --minutes 60
    """
    if run.task != "sudoku":
        raise InputError(f"there is no task {run.task!r}; the tasks are: sudoku")
    folder = files.out_path(run.out, "OUT")
    with locked(folder):
        _prepare_folder(folder, run.force)
        with Stop() as stop:
            _train(folder, run, stop)
    if stop.number:
        raise typer.Exit(128 + stop.number)


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


def _prepare_folder(folder: Path, force: bool) -> None:
    """Make the run's folder, empty or as a run has left it; InputError where it holds other files."""
    from sfumato.training.train import LOGS, STATE

    ours = (STATE, *LOGS, "loss.png", *(f".{name}.part" for name in (STATE, *LOGS)))
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(file.name for file in folder.iterdir())
    if force:
        for name in ours:
            (folder / name).unlink(missing_ok=True)
    elif STATE not in names and (others := [name for name in names if name not in ours]):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"{folder} holds {others[0]}{more} and no run to go on with; give another folder, or --force to train there"
        )


def _train(out: Path, run: RunFlags, stop: Stop) -> None:
    """Train from where the run stands until its last step, its time or a signal; write plot and checkpoint."""
    import torch

    from sfumato.checkpoints.locate import resolve
    from sfumato.checkpoints.save import save
    from sfumato.llm import LLM
    from sfumato.model.config import read_generation_config
    from sfumato.text.template import ChatTemplate
    from sfumato.text.tokenizer import Tokenizer
    from sfumato.training.data import SudokuSource
    from sfumato.training.plot import plot
    from sfumato.training.train import Trainer

    if run.threads:
        torch.set_num_threads(run.threads)
    folder = resolve(run.model.removesuffix(":new"))
    if folder.is_file():
        raise InputError(
            f"{folder} is a GGUF, and training begins from a folder; write one: sfumato convert {folder} --to bf16 "
            "-o FOLDER"
        )
    recipe = _recipe(out, run.set_ or [])
    model = _model(run, folder, recipe)
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer.special)
    console = Console(stderr=True, highlight=False)
    source = SudokuSource(tokenizer, template, pool=run.pool, progress=_counter(console))
    trainer = Trainer(model, source, recipe, out, run.compile)
    llm = LLM(model, tokenizer, template, read_generation_config(folder)[0], str(out))
    held_out = SudokuSource(tokenizer, template, seed=source.stream.seed + 1, pool=60, clues=(30, 39))
    if trainer.step:
        console.print(f"going on from step {trainer.step} of {recipe.steps}", style="dim")
    until = time.monotonic() + 60 * run.minutes if run.minutes else float("inf")
    until = 0.0 if stop.number else until
    try:
        # The run saves as it ends.
        with closing(trainer.run(until)) as steps, closing(_with_bar(steps, recipe.steps, console)) as shown:
            for progress in shown:
                if run.eval_every and progress.step % run.eval_every == 0:
                    _check(llm, held_out, out, progress.step, console)
                if stop.number:
                    break
    except KeyboardInterrupt:  # the second one
        console.print("ended at once; the same command goes on from what was saved", style="dim")
        return
    if stop.number:
        console.print("saved; the same command goes on from here", style="dim")
    picture = plot(out)
    save(model, out / "checkpoint", tokenizer_from=folder)
    console.print(visible(f"{out / 'checkpoint'} holds the model after step {trainer.step}; {picture}"))


def _recipe(out: Path, changes: list[str]) -> TrainingRecipe:
    """The recipe of the run in the folder, or a new one, with changes as NAME=VALUE."""
    from sfumato.training.train import STATE, TrainingRecipe, recipe_of

    base = recipe_of(out) if (out / STATE).exists() else TrainingRecipe()
    return replace(base, **_numbers(changes, {field.name for field in fields(TrainingRecipe)}))


def _model(run: RunFlags, folder: Path, recipe: TrainingRecipe) -> Model:
    """The model to train, in float32: of a checkpoint, or with random weights where the name ends with ":new"."""
    import torch

    from sfumato import ops
    from sfumato.checkpoints.checkpoint import in_full
    from sfumato.checkpoints.detect import open_checkpoint
    from sfumato.checkpoints.load import load
    from sfumato.model.config import ModelConfig
    from sfumato.model.network import Model
    from sfumato.options import LoadOptions

    device = run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not run.model.endswith(":new"):
        return load(in_full(open_checkpoint(folder)), LoadOptions(device=device, dtype="float32", ops="fused"))
    model = Model(ModelConfig.from_file(folder / "config.json"), ops.load("fused")).to(device)
    model.init_(recipe.seed, std=0.05)
    return model


def _check(llm: LLM, held_out: SudokuSource, out: Path, step: int, console: Console) -> None:
    """Append the solve rate on puzzles that are not trained on to evals.jsonl."""
    from sfumato.evals.sudoku import solve
    from sfumato.options import Options

    puzzles, _ = held_out.stream.sample(60, 35, 0)
    texts = ["".join(map(str, row)) for row in puzzles]
    results = list(solve(llm, texts, Options(seed=0), batch=60))
    rate = sum(result.solved for result in results) / len(results)
    steps = sum(result.steps for result in results) / len(results)
    with (out / "evals.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "solve_rate": rate, "mean_steps": steps}) + "\n")
    console.print(f"step {step}: {rate:.0%} of 60 puzzles with 35 clues, {steps:.1f} steps")


def _numbers(pairs: list[str], names: set[str]) -> dict[str, Any]:
    """The fields of a recipe that NAME=VALUE pairs set."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, is_pair, text = pair.partition("=")
        if name not in names or not is_pair:
            raise InputError(f"{pair!r} is no part of a recipe; give NAME=VALUE, names are {', '.join(sorted(names))}")
        values[name] = tuple(map(float, text.split(","))) if name == "betas" else opt.read_value(text)
    return values


def _counter(console: Console) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if done % 1000 == 0:
            console.print(f"{done} of {total} puzzles made", style="dim")

    return show


def _with_bar(steps: Iterable[StepReport], total: int, console: Console) -> Generator[StepReport, None, None]:
    """The same steps, with a bar on the terminal that follows them."""
    from rich import progress as bars

    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        for progress in steps:
            line = f"denoise {progress.diffusion_loss:.3f} encode {progress.encode_loss:.3f} nats"
            bar.update(task, completed=progress.step, description=line)
            yield progress
