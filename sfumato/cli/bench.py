"""`sfumato bench`: how long each part of the work takes here, beside what this machine can do at all.

Every figure is the median of repeats after a warm-up, bounded in seconds, and stands beside its floor: the bytes and
operations of `info` at the memory bandwidth and the rates of matrix products that are measured in the same run. Without
a checkpoint it makes random weights, and the number of steps is fixed: nothing here depends on what the model says. It
lacks quality and text on purpose (`benchmarks/nano.py`), and other engines (`benchmarks/peers.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sfumato.cli import files, flags, loading
from sfumato.cli import options as opt
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import spinner, visible
from sfumato.errors import InputError
from sfumato.measure.plan import BenchPlan
from sfumato.options import MOST_STEPS, LoadOptions

if TYPE_CHECKING:
    from sfumato.measure.parts import Announce
    from sfumato.model.network import Model


@dataclass(frozen=True)
class ModelFlags:
    """Which weights to time: a checkpoint's, or random ones."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A checkpoint folder, .gguf file, hub id, or nano. Default: random weights.",
            autocompletion=loading.known_models,
        ),
    ] = None
    size: Annotated[str, typer.Option(help="Of the random weights: mid (half a billion) or tiny.")] = "mid"

    @property
    def name(self) -> str:
        """What the record calls the model."""
        return self.model or f"{self.size} (random weights)"

    def model_on(self, device: str, load: LoadOptions) -> Model:
        """The model on this device, random weights in bfloat16 unless another dtype is named."""
        import torch

        from sfumato.checkpoints.load import load as load_checkpoint
        from sfumato.measure.parts import random_config, random_model

        if self.model is None:
            dtype = getattr(torch, load.dtype or "bfloat16")
            return random_model(random_config(self.size), dtype, device, load.ops, quantize=load.quantize)
        return load_checkpoint(self.model, replace(load, device=device)).eval()


@dataclass(frozen=True)
class WorkFlags:
    """How much work to time, and for how long."""

    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = BenchPlan.prompt
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = BenchPlan.tokens
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Denoising steps for each canvas.")] = (
        BenchPlan.steps
    )
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long each measurement may take.")] = (
        BenchPlan.seconds
    )


@flags.takes(
    source=loading.positional(flags.group_of(ModelFlags, loading.WHICH)),
    load=opt.load_flags_of(without=("memory_limit", "adapters", "preset")),
    amount=flags.group_of(WorkFlags),
)
def command(
    *,
    source: ModelFlags,
    load: LoadOptions,
    amount: WorkFlags,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the record to this new file too.")] = None,
    force: opt.Force = False,
) -> None:
    """Time prefill, step, read-out, commit and whole answers, beside what this machine can do at all.

    A few minutes. "of ceiling": the least time that measured bandwidth and matrix products allow, over the time taken.

    Example: sfumato bench --quantize int8

    Example: sfumato bench nano --steps 8 --json -o bench.json
    """
    if load.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype is {load.dtype!r}; bench times bfloat16 and float32", option="dtype")
    target = files.new_path(output, force)

    from sfumato.measure.parts import record
    from sfumato.ops import survey
    from sfumato.quant.apply import samples

    device = _device(load.device)
    plan = BenchPlan(amount.prompt, amount.tokens, amount.steps, amount.seconds)
    with progress() as report:
        report("weights")
        model = source.model_on(device, load)
        results = record(model, plan, source.name, report)
    standings = survey(device, model.dtype, samples(load.quantize) if load.quantize else [])
    results["implementations"] = [one._asdict() for one in standings]
    text = json.dumps(results, indent=2)
    if target is not None:
        target.write(text + "\n")
    if as_json:
        print(text)
    else:
        show(results)


def _device(name: str) -> str:
    """The device to time; InputError for one that this machine lacks."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


@contextmanager
def progress() -> Iterator[Announce]:
    """Names the part that is measured: a spinner with a clock on a terminal, else a line each on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: print(f"bench: {name}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(spinner()), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name: bar.update(task, description=name)


def show(results: dict[str, Any]) -> None:
    """The record for a person."""
    from sfumato.measure.work import number, size

    console, hardware, model = Console(highlight=False), results["environment"]["hardware"], results["model"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    described = (
        f": {number(model['parameters'])} parameters, {number(model['active'])} active, "
        f"{results['dtype']}, {results['ops']} operations, on {where}\n"
    )
    console.print(Text.assemble("\n", visible(model["name"], "bold"), visible(described)))
    if "implementations" in results:
        console.print(visible(standing(results), "dim"), "\n", sep="")
    console.print(FittingTable(_parts_table(results)))
    console.print(FittingTable(_answers_table(results)))
    bandwidth, products = results["ceilings"]["bytes_per_second"], results["ceilings"]["flops_per_second"]
    console.print(
        f"Measured ceiling: {size(bandwidth['read'])}/s read, {size(bandwidth['copy'])}/s copied; "
        + ", ".join(f"{number(rate['best'], 'FLOP')}/s {kind}" for kind, rate in products.items())
        + "."
        + (f" Peak memory {size(results['peak_bytes'])}." if results["peak_bytes"] else "")
        + "\n",
        style="dim",
    )


def _parts_table(results: dict[str, Any]) -> Table:
    from sfumato.measure.work import duration

    columns = ("time", "fastest", "slowest", "floor", "of ceiling")
    table = _table(f"part, after {results['prompt']} tokens", columns)
    for name, row in results["parts"].items():
        times = [duration(row[key]) for key in ("seconds", "fastest", "slowest", "floor_seconds")]
        table.add_row(name, *times, _share(row["share_of_ceiling"]))
    return table


def _answers_table(results: dict[str, Any]) -> Table:
    from sfumato.measure.work import duration

    table = _table("whole answer", ("tokens", "time", "first", "per pass", "per second"))
    for name, row in results["requests"].items():
        steps = f", {row['steps_per_canvas']} steps" if "steps_per_canvas" in row else ""
        cells = [str(row["tokens"]), duration(row["seconds"]), duration(row["first_tokens_seconds"])]
        table.add_row(name + steps, *cells, f"{row['tokens_per_pass']:.1f}", f"{row['tokens_per_second']:.3g}")
    return table


def _table(first: str, others: Iterable[str]) -> Table:
    table = Table(box=RULE, padding=(0, 1), header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def standing(results: dict[str, Any]) -> str:
    """The operations that ran, beside those that auto takes and the obstacles of the others."""
    used, each = results["ops"], results["implementations"]
    auto = next(one["name"] for one in each if one["is_auto"])
    text = f"Ran: {used}, " + ("as auto does here." if used == auto else f"where auto takes {auto}.")
    others = ", ".join(f"{one['name']} ({one['obstacle']})" for one in each if one["obstacle"])
    return f"{text} Not for these weights here: {others}." if others else text


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
