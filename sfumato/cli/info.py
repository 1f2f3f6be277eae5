"""`sfumato info`: what a model holds, what it needs, and what hardware could reach at best; from config.json alone.

Arithmetic over the config, no weights: parameters, bytes by recipe and context, the GPUs that have room for them, and
the floor that a GPU's memory bandwidth and arithmetic set under the time of one step. `bench` measures against the same
figures. A floor lacks activations, kernels and everything else that only makes a step slower: it is no forecast.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.errors import InputError
from sfumato.measure.work import (
    GPUS,
    PRECISIONS,
    Gpu,
    Parameters,
    Precision,
    cache_bytes,
    detected_gpu,
    distinct_experts,
    logits_bytes,
    most_context,
    named_gpu,
    needs,
    new_tokens,
    number,
    size,
    step_work,
    three,
    tokens,
    vocabulary_work,
)
from sfumato.model.config import ModelConfig
from sfumato.quant.recipes import RECIPES

CONTEXTS = (8192, 32_768, 262_144)
"""Tokens of context that memory is told for, as far as the model goes."""
SUMMARIES = {"float32": "exact, slow", "bf16": "as released"} | {name: one.summary for name, one in RECIPES.items()}

# ---- the report -----------------------------------------------------------------------------------------------------


def report(config: ModelConfig, context: int, gpu: Gpu | None = None, name: str = "") -> dict[str, Any]:
    """Everything `sfumato info` says, as plain numbers: bytes, operations, milliseconds, tokens."""
    if not 1 <= context <= config.max_position:
        raise InputError(f"a context of {context} tokens is outside the model's 1 to {config.max_position}")
    weights = Parameters.of(config)
    growth, at_context = cache_bytes(config, context)
    contexts = sorted({min(usual, config.max_position) for usual in CONTEXTS} | {context})
    full, new = Precision.of(config, "bf16"), new_tokens(config)
    step, vocabulary = step_work(config, full, context), vocabulary_work(config, full, new)
    return {
        "model": name,
        "parameters": {**asdict(weights), "total": weights.total, "active": weights.active},
        "config": {
            "layers": len(config.layers),
            "sliding_layers": sum(layer.is_sliding for layer in config.layers),
            "window": config.window,
            "experts": config.num_experts,
            "experts_per_token": config.top_k_experts,
            "vocabulary": config.vocab_size,
            "canvas_length": config.canvas_length if config.is_diffusion else None,
            "max_context": config.max_position,
        },
        "cache_bf16": {
            "bytes_per_token": growth,
            "fixed_bytes": cache_bytes(config, config.max_position)[1] - growth * (config.max_position + 1),
            "bytes_at_context": at_context,
            "bytes_at_max_context": cache_bytes(config, config.max_position)[1],
        },
        "logits_bf16_bytes": logits_bytes(config),
        "context": context,
        "contexts": contexts,
        "step": {
            "flops": step.all_flops,
            "vocabulary_flops": vocabulary.all_flops * (2 if config.is_diffusion else 1),
            "distinct_experts": distinct_experts(config, new),
            "second_embedding_read_bytes": round(vocabulary.bytes) if config.is_diffusion else 0,
        },
        "gpu": None if gpu is None else _as_json(gpu),
        "gpus": [_as_json(one) for one in GPUS],
        "recipes": [_row(config, recipe, context, contexts, gpu) for recipe in PRECISIONS],
    }


def _as_json(gpu: Gpu) -> dict[str, Any]:
    return {key: value for key, value in asdict(gpu).items() if key != "reported"}


def _row(config: ModelConfig, name: str, context: int, contexts: list[int], gpu: Gpu | None) -> dict[str, Any]:
    """What one recipe needs; only "impossible", a sentence, where the model's sizes do not fit its formats."""
    row: dict[str, Any] = {"recipe": name, "summary": SUMMARIES[name]}
    try:
        precision, found = Precision.of(config, name), {at: needs(config, name, at) for at in contexts}
    except InputError as error:
        return {**row, "impossible": str(error)}
    work = step_work(config, precision, context)
    row |= {
        "file_bytes": found[context]["file_bytes"],
        "weight_bytes": found[context]["weight_bytes"],
        "bits": {part: getattr(precision, part).bits for part in ("experts", "dense", "conditioning", "plain")},
        "step_bytes": round(work.bytes),
        "needs": [
            {"context": at, **one, "fits": [card.name for card in GPUS if one["total_bytes"] <= card.room]}
            for at, one in found.items()
        ],
        "longest_context": {card.name: most_context(config, name, card.room) for card in GPUS},
    }
    if gpu is not None:
        row["fits"] = found[context]["total_bytes"] <= gpu.room
        row["longest_context_here"] = most_context(config, name, gpu.room)
        memory, arithmetic = gpu.seconds(work)
        if memory is not None:
            row["memory_ms"], row["arithmetic_ms"] = 1e3 * memory, None if arithmetic is None else 1e3 * arithmetic
            row["floor_ms"] = max(row["memory_ms"], row["arithmetic_ms"] or 0.0)
    return row


KINDS = ("bf16", "int8", "fp8", "int4")
"""Weights that operations are told for: in bfloat16, and by recipe."""


def operations(device: str | None = None) -> dict[str, Any]:
    """Which operations can run on this machine (its GPU, if it has one), for weights of each kind: `obstacles`, a
    sentence or None by implementation and kind, and what `auto` takes."""
    import torch

    from sfumato.ops import survey
    from sfumato.quant.apply import samples

    if device is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver too old for torch is no GPU, not an error
            device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {kind: survey(device, torch.bfloat16, samples(kind) if kind != "bf16" else []) for kind in KINDS}
    names = [one.name for one in found["bf16"]]
    return {
        "device": device,
        "obstacles": {name: {kind: found[kind][n].obstacle for kind in KINDS} for n, name in enumerate(names)},
        "auto": {kind: next(one.name for one in found[kind] if one.is_auto) for kind in KINDS},
    }


def read_config(model: str) -> tuple[ModelConfig, str]:
    """The config of a config.json, a folder, "nano" or a hub id (of which no weights are fetched), and its name."""
    path = Path(model)
    if path.is_file():
        return ModelConfig.from_file(path), str(path)
    if not path.is_dir():
        from sfumato.checkpoints.locate import resolve  # only now: this costs the import of torch

        return ModelConfig.from_file(resolve(model, weights=False) / "config.json"), model
    return ModelConfig.from_file(path / "config.json"), path.resolve().name


# ---- the command ----------------------------------------------------------------------------------------------------


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a config.json, a hub id, or nano.")],
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, like H200 or 'RTX 4090'. Default: this one.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context to reckon with. Default: 8192.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same figures as JSON.")] = False,
) -> None:
    """Parameters, what each recipe needs and where it fits, the floor that a GPU sets under one denoising step, and
    which operations can run on this machine.

    Works from config.json alone: no weights are read, or fetched from the hub.

    Example: sfumato info google/diffusiongemma-26B-A4B-it

    Example: sfumato info path/to/config.json --gpu "RTX 4090" --context 32768 --json
    """
    config, name = read_config(model)
    chosen = named_gpu(gpu) if gpu is not None else detected_gpu()
    found = report(config, context or min(8192, config.max_position), chosen, name)
    found["operations"] = operations()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    """The report for a person, in a hundred columns."""
    from rich.console import Console
    from rich.text import Text

    from sfumato.cli.view import visible

    console = Console(highlight=False)
    console.print(Text.assemble("\n", visible(found["model"], "bold"), "\n"))
    console.print(_facts(found))
    console.print("\nMemory in use, with so many tokens of context")
    console.print(_memory(found))
    possible = [row for row in found["recipes"][1:] if "impossible" not in row]
    notes = [
        "Weights take as much in the file as in memory. In use: weights, KV cache, one canvas of logits, a prompt's"
    ]
    notes.append("activations; beside them comes what a process or a GPU's driver takes without a model.")
    if found["gpu"] is None:
        groups = _groups(possible)
        console.print("Longest context that fits, by the memory of a GPU")
        console.print(_fits(possible, groups))
        for memory, names in groups.items():
            console.print(f"  {_memory_name(memory, groups)}: {', '.join(names)}", style="dim")
        notes.append("For the floor under a step, name a GPU: --gpu NAME.")
    else:
        console.print(f"On {_described(found['gpu'])}, a step behind {found['context']:,} tokens")
        console.print(_on_gpu(possible, found))
        if found["gpu"]["bandwidth"]:
            notes.append(_floor_note(found))
        else:
            notes.append(f"No published figures for {found['gpu']['name']}: sfumato bench measures its ceiling.")
    if "operations" in found:
        console.print(f"\nOperations on this machine, device {found['operations']['device']}")
        console.print(_operations(found["operations"]))
    console.print(("" if "operations" in found else "\n") + " ".join(notes) + "\n", style="dim")


def _facts(found: dict[str, Any]) -> Any:
    from rich.table import Table

    parameters, config, cache, step = found["parameters"], found["config"], found["cache_bf16"], found["step"]
    facts = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row(
        "parameters", f"[bold]{number(parameters['total'])}[/], {number(parameters['active'])} active for each token"
    )
    facts.add_row(
        "experts",
        f"{config['layers']} × {config['experts']}, {config['experts_per_token']} for each token; "
        f"together {number(parameters['experts'])} of the parameters",
    )
    full = config["layers"] - config["sliding_layers"]
    facts.add_row("layers", f"{config['sliding_layers']} sliding (window {config['window']:,}), {full} full")
    if config["canvas_length"]:
        facts.add_row(
            "canvas",
            f"{config['canvas_length']} tokens of {config['vocabulary']:,} ({size(found['logits_bf16_bytes'])} of "
            f"logits in bf16); context to {config['max_context']:,}",
        )
    else:
        facts.add_row("canvas", f"none: one token after another; context to {config['max_context']:,}")
    facts.add_row(
        "KV cache",
        f"{cache['bytes_per_token'] / 1024:.4g} KiB a token and {size(cache['fixed_bytes'])} fixed; "
        f"{size(cache['bytes_at_max_context'])} at {config['max_context']:,} (bf16)",
    )
    facts.add_row(
        "a step",
        f"{number(step['flops'], 'FLOP')}, {step['vocabulary_flops'] / step['flops']:.0%} with the vocabulary; "
        f"wakes {step['distinct_experts']:.0%} of the experts",
    )
    return facts


def _memory(found: dict[str, Any]) -> Any:
    table = _table("recipe", "weights", *(f"{at:,}" if at % 1024 else tokens(at) for at in found["contexts"]))
    table.add_column("", style="dim")
    for row in found["recipes"][1:]:
        if "impossible" in row:
            table.add_row(row["recipe"], *["–"] * (1 + len(found["contexts"])), row["impossible"])
            continue
        sizes = [size(one["total_bytes"]) for one in row["needs"]]
        table.add_row(row["recipe"], size(row["weight_bytes"]), *sizes, row["summary"])
    return table


def _operations(found: dict[str, Any]) -> Any:
    """A row for each implementation, with what is in its way."""
    table = _table("operations", *KINDS)
    table.add_column("", style="dim")
    for name, obstacles in found["obstacles"].items():
        table.add_row(
            name,
            *("–" if obstacles[kind] else "auto" if found["auto"][kind] == name else "yes" for kind in KINDS),
            _reasons(obstacles),
        )
    return table


def _reasons(obstacles: dict[str, str | None]) -> str:
    """Each reason once, behind the kinds that it is for unless it is for all."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in obstacles.items():
        if reason:
            kinds.setdefault(reason, []).append(kind)
    return "; ".join(
        reason if len(some) == len(obstacles) else f"{', '.join(some)}: {reason}" for reason, some in kinds.items()
    )


def _groups(rows: list[dict[str, Any]]) -> dict[float, list[str]]:
    """The names of GPUs by memory; a size is left out where no more fits than in the next smaller one."""
    groups: dict[float, list[str]] = {}
    last: list[int] | None = None
    for gpu in sorted(GPUS, key=lambda gpu: gpu.memory):
        longest = [row["longest_context"][gpu.name] for row in rows]
        memory = gpu.memory if longest != last else max(groups)
        groups.setdefault(memory, []).append(gpu.name)
        last = longest
    return groups


def _memory_name(memory: float, groups: dict[float, list[str]]) -> str:
    return f"{memory:g} GB" + (" and more" if memory == max(groups) else "")


def _fits(rows: list[dict[str, Any]], groups: dict[float, list[str]]) -> Any:
    table = _table("recipe", *(_memory_name(memory, groups) for memory in groups))
    for row in rows:
        table.add_row(row["recipe"], *(_longest(row["longest_context"][names[0]]) for names in groups.values()))
    return table


def _longest(count: int) -> str:
    return f"[green]{tokens(count)}[/]" if count else "[red]–[/]"


def _on_gpu(rows: list[dict[str, Any]], found: dict[str, Any]) -> Any:
    has_floor = found["gpu"]["bandwidth"] is not None
    table = _table("recipe", "fits", "longest context", *(["step floor"] if has_floor else []))
    if has_floor:
        table.add_column("set by", no_wrap=True)
    for row in rows:
        cells = [row["recipe"], "[green]yes[/]" if row["fits"] else "[red]no[/]", _longest(row["longest_context_here"])]
        if has_floor:
            is_memory = row["memory_ms"] >= (row["arithmetic_ms"] or 0)
            cells += [f"{three(row['floor_ms'])} ms", "memory" if is_memory else "arithmetic"]
        table.add_row(*cells)
    return table


def _floor_note(found: dict[str, Any]) -> str:
    gpu, step = found["gpu"], found["step"]
    text = (
        "The floor: a step reads the KV cache in view and every weight it needs once, at the maker's published "
        "bandwidth, of which machines reach about nine tenths."
    )
    if step["second_embedding_read_bytes"]:
        again = step["second_embedding_read_bytes"] / gpu["bandwidth"] / 1e6
        text += (
            " The embedding counts once too; read for the logits and again for the soft embedding, it adds "
            f"{again:.2f} ms."
        )
    return text + ("" if gpu["bf16"] else " Arithmetic is left out: no published figures.")


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _described(gpu: dict[str, Any]) -> str:
    figures = [f"{gpu['memory']:.0f} GB"]
    figures += [f"{gpu['bandwidth'] / 1e3:.3g} TB/s"] if gpu["bandwidth"] else []
    figures += [f"{gpu['bf16']:.0f} TFLOP/s bf16"] if gpu["bf16"] else []
    return f"{gpu['name']} ({', '.join(figures)})"
