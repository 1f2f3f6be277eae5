"""`sfumato info`: what a model holds, what it needs, and what hardware could reach at best; from config.json alone.

Arithmetic over the config, no weights and no torch: parameters, bytes, floating-point operations, and the floor that a
GPU's memory bandwidth and arithmetic set under the time of one step. `bench` measures against the same figures.
It lacks activations, kernels and everything else that only makes a step slower: a floor is no forecast.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.config import ModelConfig
from sfumato.events import InputError
from sfumato.measure.work import (
    GPUS,
    PRECISIONS,
    RESERVE,
    Gpu,
    Parameters,
    cache_bytes,
    detected_gpu,
    distinct_experts,
    logits_bytes,
    named_gpu,
    number,
    size,
    step_work,
    three,
    vocabulary_work,
)

# ---- the report -----------------------------------------------------------------------------------------------------


def report(config: ModelConfig, context: int, gpu: Gpu | None = None, name: str = "") -> dict[str, Any]:
    """Everything `sfumato info` says, as plain numbers: bytes, operations, milliseconds."""
    if not 1 <= context <= config.max_position:
        raise InputError(f"a context of {context} tokens is outside the model's 1 to {config.max_position}")
    weights = Parameters.of(config)
    growth, at_context = cache_bytes(config, context)
    rows = []
    for precision in PRECISIONS:
        cache = cache_bytes(config, context, precision.cache_bytes)[1]
        work = step_work(config, precision, context)
        row: dict[str, Any] = {
            "precision": precision.name,
            "weight_bytes": round(precision.weight_bytes(weights)),
            "cache_bytes": cache,
            "logits_bytes": logits_bytes(config),
            "step_bytes": round(work.bytes),
            "second_embedding_read_bytes": round(vocabulary_work(config, precision, 1).bytes),
        }
        row["total_bytes"] = row["weight_bytes"] + cache + row["logits_bytes"]
        if gpu is not None:
            row["fits"] = row["total_bytes"] + RESERVE <= gpu.memory * 1e9
            if gpu.bandwidth:
                rate = gpu.rate(precision.arithmetic)
                row["memory_ms"] = work.bytes / gpu.bandwidth / 1e6
                row["arithmetic_ms"] = work.flops / rate * 1e3 if rate else None
                row["floor_ms"] = max(row["memory_ms"], row["arithmetic_ms"] or 0.0)
        rows.append(row)
    step = step_work(config, PRECISIONS[1], context)
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
            "canvas_length": config.canvas_length,
            "max_context": config.max_position,
        },
        "cache_bf16": {
            "bytes_per_token": growth,
            "fixed_bytes": cache_bytes(config, config.max_position)[1] - growth * (config.max_position + 1),
            "bytes_at_context": at_context,
            "bytes_at_max_context": cache_bytes(config, config.max_position)[1],
        },
        "context": context,
        "step": {
            "flops": step.flops,
            "vocabulary_flops": 2 * vocabulary_work(config, PRECISIONS[1], config.canvas_length).flops,
            "distinct_experts": distinct_experts(config, config.canvas_length),
        },
        "gpu": None if gpu is None else {k: v for k, v in asdict(gpu).items() if k != "reported"},
        "precisions": rows,
    }


def read_config(model: str) -> tuple[ModelConfig, str]:
    """The config of a config.json, a folder, "nano" or a hub id (of which no weights are fetched), and its name."""
    path = Path(model)
    if path.is_file():
        return ModelConfig.from_file(path), str(path)
    if not path.is_dir():
        from sfumato import weights  # only now: this costs the import of torch

        return ModelConfig.from_file(weights.resolve(model, weights=False) / "config.json"), model
    return ModelConfig.from_file(path / "config.json"), path.resolve().name


# ---- the command ----------------------------------------------------------------------------------------------------


def command(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a config.json, a hub id, or nano.")],
    gpu: Annotated[str | None, typer.Option(help="A GPU by name, like H200 or 'RTX 4090'. Default: this one.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of context to reckon with. Default: 8192.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same figures as JSON.")] = False,
) -> None:
    """Parameters, memory by precision, and the floor in milliseconds that a GPU sets under one denoising step.

    Works from config.json alone: no weights are read, or fetched from the hub.

    Example: sfumato info google/diffusiongemma-26B-A4B-it --gpu H200

    Example: sfumato info path/to/config.json --gpu "RTX 4090" --context 32768 --json
    """
    config, name = read_config(model)
    chosen = named_gpu(gpu) if gpu is not None else detected_gpu()
    found = report(config, context or min(8192, config.max_position), chosen, name)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def show(found: dict[str, Any]) -> None:
    """The report for a person."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    parameters, config, cache, step = found["parameters"], found["config"], found["cache_bf16"], found["step"]
    full, context, gpu = config["layers"] - config["sliding_layers"], found["context"], found["gpu"]

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
    facts.add_row("layers", f"{config['sliding_layers']} sliding (window {config['window']:,}), {full} full")
    facts.add_row(
        "canvas",
        f"{config['canvas_length']} tokens of {config['vocabulary']:,} ({size(found['precisions'][0]['logits_bytes'])} "
        f"of logits); context to {config['max_context']:,}",
    )
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
    console.print(f"\n[bold]{found['model']}[/]\n")
    console.print(facts)

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), header_style="dim")
    table.add_column("precision", no_wrap=True)
    for column in ("weights", "KV cache", "together"):
        table.add_column(column, justify="right", no_wrap=True)
    if gpu is not None:
        table.add_column("fits", no_wrap=True)
        if gpu["bandwidth"]:
            table.add_column("step floor", justify="right", no_wrap=True)
            table.add_column("set by", no_wrap=True)
    for row in found["precisions"]:
        cells = [row["precision"], *(size(row[f"{key}_bytes"]) for key in ("weight", "cache", "total"))]
        if gpu is not None:
            cells.append("[green]yes[/]" if row["fits"] else "[red]no[/]")
            if gpu["bandwidth"]:
                is_memory = row["memory_ms"] >= (row["arithmetic_ms"] or 0)
                cells += [f"{three(row['floor_ms'])} ms", "memory" if is_memory else "arithmetic"]
        table.add_row(*cells)
    console.print(f"\nWith {context:,} tokens of context" + (f" on {_described(gpu)}" if gpu else ""))
    console.print(table)
    notes = ["Together with a canvas of logits. int4 experts: 4.25 bits a weight, scales included; the rest at 8 bits."]
    if gpu is None:
        notes.append(f"For a fit and a floor, name a GPU: --gpu NAME, one of {', '.join(gpu.name for gpu in GPUS)}.")
    elif gpu["bandwidth"]:
        again = found["precisions"][1]["second_embedding_read_bytes"] / gpu["bandwidth"] / 1e6
        notes.append(
            "A step reads the KV cache in view and every weight it needs once, at the maker's published bandwidth, of "
            "which machines reach about nine tenths. The embedding counts once too; read for the logits and again for "
            f"the soft embedding, it adds {again:.2f} ms in bf16."
        )
    else:
        notes.append(f"No published figures for {gpu['name']}: sfumato bench measures its ceiling.")
    console.print(" ".join(notes) + "\n", style="dim")


def _described(gpu: dict[str, Any]) -> str:
    if not gpu["bandwidth"]:
        return f"{gpu['name']} ({gpu['memory']:.0f} GB)"
    return f"{gpu['name']} ({gpu['memory']:.0f} GB, {gpu['bandwidth'] / 1e3:.3g} TB/s, {gpu['bf16']:.0f} TFLOP/s bf16)"
