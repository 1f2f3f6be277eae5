"""`sfumato bench`: how long each part of the work takes here, beside what this machine can do at all.

Every figure is the median of repeats after a warm-up, bounded in seconds, and stands beside its floor: the bytes and
operations of `info` at the memory bandwidth and the rates of matrix products that are measured in the same run. Without
a checkpoint it makes random weights, and the number of steps is fixed: nothing here depends on what the model says. It
lacks quality and text on purpose (`benchmarks/nano.py`), and other engines (`benchmarks/peers.py`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer

from sfumato.checkpoints.load import load
from sfumato.cli import options as opt
from sfumato.errors import InputError
from sfumato.measure.parts import DTYPES, Announce, BenchPlan, random_config, random_model, record
from sfumato.measure.work import duration, number, size
from sfumato.ops import survey
from sfumato.options import LoadOptions
from sfumato.quant.apply import samples

# ---- the command ----------------------------------------------------------------------------------------------------


def command(
    model: Annotated[
        str | None, typer.Argument(help="A checkpoint folder, a hub id, or nano. Default: random weights.")
    ] = None,
    size: Annotated[str, typer.Option(help="Of the random weights: mid (half a billion) or tiny.")] = "mid",
    dtype: Annotated[str | None, typer.Option(help="bf16 or float32. Default: the checkpoint's; bf16.")] = None,
    ops: opt.Ops = "auto",
    quantize: opt.Quantize = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 384,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 512,
    steps: Annotated[int, typer.Option(min=1, max=4096, help="Denoising steps for each canvas.")] = 12,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long each measurement may take.")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the record to this file too.")] = None,
) -> None:
    """Time prefill, step, read-out, commit and whole answers, beside what this machine can do at all.

    A few minutes. "of ceiling": the least time that measured bandwidth and matrix products allow, over the time taken.

    Example: sfumato bench --quantize int8

    Example: sfumato bench nano --steps 8 --json -o bench.json
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose bf16 or float32")
    target = None if output is None else opt.out_path(output, "--output")
    if target is not None and target.is_dir():
        raise InputError(f"{target} is a folder; give a file to write the record to")
    if target is not None and not target.absolute().parent.is_dir():
        raise InputError(f"{target} cannot be written: there is no folder {target.parent}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    plan = BenchPlan(prompt, tokens, steps, seconds)
    with progress() as say:
        say("weights")
        if model is None:
            made = random_model(random_config(size), DTYPES[dtype or "bf16"], device, ops, quantize=quantize)
        else:
            kept = str(DTYPES[dtype]).removeprefix("torch.") if dtype else None
            made = load(model, LoadOptions(device=device, dtype=kept, ops=ops, quantize=quantize)).eval()
        found = record(made, plan, model or f"{size} (random weights)", say)
    standings = survey(device, made.dtype, samples(quantize) if quantize else [])
    found["implementations"] = [one._asdict() for one in standings]
    text = json.dumps(found, indent=2)
    if target is not None:
        target.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        show(found)


@contextmanager
def progress() -> Iterator[Announce]:
    """Names what is being measured: a spinner with a clock on a terminal, a line each where stderr is a file."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: print(f"bench: {name}", file=sys.stderr, flush=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name: bar.update(task, description=name)


def show(found: dict[str, Any]) -> None:
    """The record for a person."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sfumato.cli.view import visible

    console, hardware, model = Console(highlight=False), found["environment"]["hardware"], found["model"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    described = (
        f": {number(model['parameters'])} parameters, {number(model['active'])} active, "
        f"{found['dtype']}, {found['ops']} operations, on {where}\n"
    )
    console.print(Text.assemble("\n", visible(model["name"], "bold"), visible(described)))
    if "implementations" in found:
        console.print(visible(standing(found), "dim"), "\n", sep="")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="dim")
    table.add_column(f"part, after {found['prompt']} tokens", no_wrap=True)
    for column in ("time", "fastest", "slowest", "floor", "of ceiling"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["parts"].items():
        times = [duration(row[key]) for key in ("seconds", "fastest", "slowest", "floor_seconds")]
        table.add_row(name, *times, _share(row["share_of_ceiling"]))
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="dim")
    table.add_column("whole answer", no_wrap=True)
    for column in ("tokens", "time", "first", "per pass", "per second"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in found["requests"].items():
        steps = f", {row['steps_per_canvas']} steps" if "steps_per_canvas" in row else ""
        cells = [str(row["tokens"]), duration(row["seconds"]), duration(row["first_tokens_seconds"])]
        table.add_row(name + steps, *cells, f"{row['tokens_per_pass']:.1f}", f"{row['tokens_per_second']:.3g}")
    console.print(table)

    bandwidth, products = found["ceilings"]["bytes_per_second"], found["ceilings"]["flops_per_second"]
    console.print(
        f"Measured ceiling: {size(bandwidth['read'])}/s read, {size(bandwidth['copy'])}/s copied; "
        + ", ".join(f"{number(found['best'], 'FLOP')}/s {kind}" for kind, found in products.items())
        + "."
        + (f" Peak memory {size(found['peak_bytes'])}." if found["peak_bytes"] else "")
        + "\n",
        style="dim",
    )


def standing(found: dict[str, Any]) -> str:
    """What ran, beside what auto takes for such weights and what is in the way of the others."""
    ran, each = found["ops"], found["implementations"]
    auto = next(one["name"] for one in each if one["is_auto"])
    text = f"Ran: {ran}, " + ("as auto does here." if ran == auto else f"where auto takes {auto}.")
    left = ", ".join(f"{one['name']} ({one['obstacle']})" for one in each if one["obstacle"])
    return f"{text} Not for these weights here: {left}." if left else text


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
