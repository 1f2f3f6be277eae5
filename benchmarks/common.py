"""What the benchmarks share: bounded measuring, alternating measuring, the ceiling of this machine, tables, records.

A record is JSON with what was measured and, under "environment", hardware, versions, commit, command and date. Ceilings
are measured once and can be kept in a file (`--ceilings`), so that the benchmarks of one run stand under one ceiling.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.measure.machine import Shape, Timing, ceilings, environment
from sfumato.measure.parts import quantize_some_
from sfumato.measure.released import released
from sfumato.measure.work import Precision, Work, duration, pass_work, step_work, vocabulary_work
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model, pack_
from sfumato.ops import load
from sfumato.quant.apply import samples
from sfumato.quant.recipes import named

SHAPES: dict[str, Shape] = {
    "mid vocabulary": (256, 1024, 32768),
    "mid queries": (256, 1024, 1024),
    "mid expert": (32, 1024, 768),
    "released queries": (256, 2816, 4096),
    "released dense": (256, 2816, 2112),
    "released expert": (16, 2816, 1408),
}
"""Products that the ceiling is measured with: rows, inputs, outputs."""


def say(text: str) -> None:
    print(f"{Path(sys.argv[0]).stem}: {text}", file=sys.stderr, flush=True)


# ---- models ---------------------------------------------------------------------------------------------------------


def released_config(layers: int = 30) -> ModelConfig:
    """The text stack of google/diffusiongemma-26B-A4B-it, as in its config.json; two layers: a sliding, a full one."""
    whole = released()
    return replace(whole, layers=whole.layers[4:6] if layers == 2 else whole.layers[:layers], eos_ids=())


def random_packed(
    config: ModelConfig, device: str, ops: str, recipe: str = "", dtype: torch.dtype = torch.bfloat16
) -> Model:
    """A model of random weights, made on the device layer by layer and packed at once: at no time does more than one
    layer exist unpacked. Large weights repeat a block of prime length, and packed ones some of their rows: nothing
    here depends on what they say."""
    chosen = named(recipe) if recipe else None
    record = load(ops, device, dtype, samples(chosen) if chosen else [])
    with torch.device("meta"):
        model = Model(config, record).to(dtype)
    names = {module: name for name, module in model.named_modules()}
    block = torch.randn(4_194_301, device=device, generator=torch.Generator(device).manual_seed(0)).mul_(0.02).to(dtype)
    for part in filter(None, (model.embed_tokens, model.norm, model.self_conditioning, *model.layers)):
        part.to_empty(device=device)
        with torch.no_grad():
            for parameter in part.parameters():
                _fill_(parameter, block)
            for buffer in part.buffers():
                buffer.fill_(1.0)
        if chosen is not None:
            quantize_some_(part, chosen, names[part])
        pack_(part, model.ops)
    return model.requires_grad_(False).eval()


def _fill_(tensor: torch.Tensor, block: torch.Tensor) -> None:
    if tensor.dim() < 2:
        tensor.fill_(1.0)
        return
    flat = tensor.view(-1)
    for start in range(0, len(flat), len(block)):
        flat[start : start + len(block)] = block[: len(flat) - start]


def step_cost(config: ModelConfig, kind: str, batch: int, context: int, is_encode: bool = False) -> Work:
    """The least work of one step of `batch` rows (in encode: of one token a row, logits included), with weights in this
    recipe, "bf16" or "float32". Every weight is read once, of the experts those that are chosen; the embedding once,
    though logits and soft embedding need it."""
    precision = Precision.of(config, kind)
    if not is_encode:
        return step_work(config, precision, context, batch)
    return pass_work(config, precision, 1, context, True, batch) + vocabulary_work(config, precision, batch)


# ---- measuring ------------------------------------------------------------------------------------------------------


def wait(device: torch.device | str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def alternate(
    calls: dict[str, Callable[[], Any]], seconds: float, device: torch.device | str, repeats: int = 30, warm: int = 1
) -> dict[str, Timing]:
    """Time several calls in turn, a, b, a, b, …: whatever else the machine does meets all of them alike. Stops after
    `repeats` rounds, or when `seconds` have passed in all, but after one round at least."""
    seconds_by_name: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm):
        for call in calls.values():
            call()
    until = time.perf_counter() + seconds
    for _ in range(repeats):
        for name, call in calls.items():
            wait(device)
            began = time.perf_counter()
            call()
            wait(device)
            seconds_by_name[name].append(time.perf_counter() - began)
        if time.perf_counter() > until:
            break
    return {name: Timing.of(times) for name, times in seconds_by_name.items()}


def target(value: float | None, limit: float, at_most: bool = True) -> dict[str, Any]:
    """A figure beside what the issue asks for."""
    reached = None if value is None else value <= limit if at_most else value >= limit
    return {"value": value, "target": limit, "is_at_most": at_most, "reached": reached}


def release() -> None:
    """Give back what was freed, so that the next figure of memory is not of this one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        pass


# ---- ceilings, records, tables --------------------------------------------------------------------------------------


def ceiling(arguments: argparse.Namespace, seconds: float = 1.0) -> dict[str, Any]:
    """What `--ceilings FILE` holds, if it was measured on this device; else measured now, and kept there."""
    kept: Path | None = arguments.ceilings
    device = torch.device(arguments.device)
    if kept is not None and kept.exists():
        known: dict[str, Any] = json.loads(kept.read_text())["ceilings"]
        return known
    say("ceilings")
    most = ceilings(SHAPES, min(seconds, arguments.seconds), device, arguments.streamed)
    if kept is not None:
        write(kept, {"what": "ceilings", "ceilings": most, "environment": environment(device)})
    return most


def argument_parser(about: str, seconds: float) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=seconds, help="about how long each measurement may take")
    parser.add_argument("--ceilings", type=Path, help="keep the machine's ceiling in this file, or take it from there")
    parser.add_argument("--streamed", type=int, default=2**30, help="bytes that memory bandwidth is measured with")
    parser.add_argument("-o", "--output", type=Path, help="write the record to this file")
    return parser


def write(path: Path, record: dict[str, Any]) -> None:
    """Beside, then renamed: what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def finish(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    record.setdefault("environment", environment(arguments.device))
    if arguments.output:
        write(arguments.output, record)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned text; the first column to the left, the others to the right."""
    rows = [list(head), *map(list, lines)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]

    def of(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(of, rows))


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def parts_table(parts: dict[str, dict[str, Any]]) -> str:
    """Time, floor and share of the ceiling of each part."""
    lines = [
        [name, duration(row["seconds"]), duration(row.get("floor_seconds")), share(row.get("share_of_ceiling"))]
        for name, row in parts.items()
    ]
    return table(["", "time", "floor", "of ceiling"], lines)


def without_eos(model: Model) -> Model:
    """Answers of a known length."""
    model.config = replace(model.config, eos_ids=())
    return model
