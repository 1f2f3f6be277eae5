"""`sfumato finetune --plan`: what training needs in memory, by part, before anything is loaded.

Named flags give one setup, with and without checkpointing, on one, two and eight GPUs; without any it is a table of
the usual ones. The figures are `measure.training`'s, computed from the config alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfumato.cli.info import describe
from sfumato.cli.tables import RULE, FittingTable
from sfumato.cli.view import visible

if TYPE_CHECKING:
    from sfumato.measure.training import TrainingSetup
    from sfumato.model.config import ModelConfig

SIZES = (24.0, 32.0, 48.0, 80.0)
"""GB of the GPUs that the table judges."""
RANKS = (1, 2, 8)
RELEASED = "released"
"""The name of the released model's config, which comes with the program."""


def plan_command(model: str, setup: TrainingSetup, gpu: float | None, is_chosen: bool, as_json: bool = False) -> None:
    """Print the plan of a model: a path, a config.json, a hub id, or "released".

    `is_chosen`: the flags name what is trained, so that this alone is shown; else the usual setups are, on as many
    tokens. `gpu` is a GPU's memory in GB, None: the usual sizes. InputError as `measure.training.memory`."""
    config, name = _config(model)
    setups = {"as asked": setup} if is_chosen else usual(setup)
    if is_chosen:
        setups["checkpointing" if not setup.is_checkpointed else "no checkpointing"] = replace(
            setup, is_checkpointed=not setup.is_checkpointed
        )
    sizes = SIZES if gpu is None else (gpu,)
    rows = [_row(label, config, one, sizes) for label, one in setups.items()]
    if as_json:
        print(json.dumps({"model": name, "tokens": setup.tokens, "examples": setup.examples, "setups": rows}, indent=2))
        return
    _show(name, config, setup, rows, sizes)


def usual(like: TrainingSetup) -> dict[str, TrainingSetup]:
    """The usual setups on as many tokens, by a name for each."""
    every = ("attention", "dense", "experts")
    checkpointed = replace(like, rank=16, is_checkpointed=True, quantize=None, optimizer="adamw")
    whole = replace(checkpointed, rank=0)
    setups = {
        "every weight": whole,
        "every weight, 8-bit AdamW": replace(whole, optimizer="adamw8bit"),
        "LoRA 16, no checkpointing": replace(checkpointed, is_checkpointed=False),
        "LoRA 16": checkpointed,
        "LoRA 16 with experts": replace(checkpointed, targets=every),
    }
    for form in ("fp8", "int8", "int4", "int4-small"):
        packed = replace(checkpointed, quantize=form)
        setups[f"{form}, LoRA 16"] = packed
        setups[f"{form}, LoRA 16 with experts"] = replace(packed, targets=every)
        setups[f"{form}, LoRA 16 with experts, 8-bit AdamW"] = replace(packed, targets=every, optimizer="adamw8bit")
    return setups


def _config(model: str) -> tuple[ModelConfig, str]:
    if model == RELEASED:
        from sfumato.measure.released import released

        return released(), "the released DiffusionGemma"
    config, name, _ = describe(model.removesuffix(":new"))
    return config, name


def _row(label: str, config: ModelConfig, setup: TrainingSetup, sizes: tuple[float, ...]) -> dict[str, Any]:
    """A setup, its bytes by part on one GPU, its total on several, and where it fits."""
    from sfumato.measure.training import memory

    by_ranks = {ranks: memory(config, replace(setup, ranks=ranks)) for ranks in RANKS}
    one = by_ranks[1]
    return {
        "name": label,
        "setup": asdict(setup),
        "bytes": asdict(one),
        "total": {str(ranks): needs.total for ranks, needs in by_ranks.items()},
        "fits": {f"{size:g}": [ranks for ranks, needs in by_ranks.items() if needs.fits(size)] for size in sizes},
    }


def _show(
    name: str, config: ModelConfig, setup: TrainingSetup, rows: list[dict[str, Any]], sizes: tuple[float, ...]
) -> None:
    from sfumato.measure.training import SLACK
    from sfumato.measure.work import RESERVE, Parameters, number, three

    console = Console(highlight=False)
    tokens = f"{setup.examples} x {setup.tokens:,} tokens and {setup.examples * setup.repeats} x {config.canvas_length}"
    about = f"{number(Parameters.of(config).total)} parameters; {tokens} of canvas at once; {setup.precision}"
    console.print(Text.assemble("\n", visible(name, "bold"), "  ", about, "\n"))
    parts = ("weights", "trained", "gradients", "optimizer", "keys_values", "kept", "working", "slack")
    table = Table(box=RULE, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("GB on one GPU")
    for part in (*parts, "total"):
        table.add_column(_HEADS.get(part, part), justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        cells = [three(row["bytes"][part] / 1e9) for part in parts]
        table.add_row(row["name"], *cells, three(row["total"]["1"] / 1e9), _fits(row, sizes))
    console.print(FittingTable(table))
    console.print(
        f"\n'fits' says how many GPUs of which size (GB, of 10^9 bytes, {RESERVE / 1e9:g} of them for the driver) hold "
        f"it: of 1, 2 and 8 that share it. Computed, not measured; slack is a guess, {SLACK:.0%} of what comes and "
        "goes within a step.\n",
        style="dim",
    )


_HEADS = {"keys_values": "K and V", "optimizer": "optim."}


def _fits(row: dict[str, Any], sizes: tuple[float, ...]) -> str:
    """The fewest GPUs of each size: 24 GB, 2 x 24 GB, none."""
    fitting = [(ranks[0], size) for size, ranks in row["fits"].items() if ranks]
    fewest: dict[int, str] = {}
    for ranks, size in fitting:  # the smallest size for each number of GPUs
        fewest.setdefault(ranks, size)
    texts = [f"{size}" if ranks == 1 else f"{ranks}x{size}" for ranks, size in sorted(fewest.items())]
    return ", ".join(texts) if texts else "none"
