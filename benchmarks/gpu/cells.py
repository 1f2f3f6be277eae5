"""The released size with random weights, timed, each cell with a profile by kernel.

A cell is a kind of weights, a number of rows and a context: milliseconds a pass of canvases after the first, in which
everything is compiled and recorded; 16 steps each. The profile is of eight turns behind them: every kernel with its
count, its microseconds and its grid.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.setting import Row, Setting, ceilings_of, each_within, tried
from sfumato.engine.run import Run
from sfumato.events import Commit, Draft
from sfumato.measure.machine import forget_peak, peak_bytes
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.options import Options

BATCHES = {"int4": (1, 16), "fp8": (1, 16), "int4-fp8": (1,), "bf16": (1,)}
STEPS, CANVASES, PROFILED = 16, 3, 8
Kernel = dict[str, Any]


def run(
    setting: Setting, kind: str, contexts: tuple[int, ...] = (1024,), batches: tuple[int, ...] = ()
) -> Iterator[Row]:
    began = time.perf_counter()
    model = setting.model(kind)
    setting.wait()
    yield {"name": f"{kind} weights", "seconds": round(time.perf_counter() - began, 1)}

    def row(name: str) -> Row:
        batch, context = of[name]
        return tried(name, lambda: cell(setting, model, kind, batch, context), kind=kind, batch=batch, context=context)

    of = {
        f"{kind} batch {batch} context {context}": (batch, context)
        for context in contexts
        for batch in batches or BATCHES[kind]
    }
    yield from each_within(setting, list(of), row, 3.0)
    if not batches:
        yield tried(f"{kind} first step", lambda: first_step(setting, model))


@torch.inference_mode()
def cell(setting: Setting, model: Model, kind: str, batch: int, context: int) -> dict[str, Any]:
    steps, context = (2, 16) if setting.is_dry else (STEPS, context)
    config, length = model.config, model.config.canvas_length
    run_ = _behind(setting, model, batch, context, steps, CANVASES + 1)
    forget_peak(torch.device(setting.device))
    moments: list[float] = []
    while len(moments) < CANVASES:
        for event in run_.engine.turn():
            if isinstance(event, Commit) and event.row == 0:
                moments.append(time.perf_counter())
    peak = peak_bytes(torch.device(setting.device))
    seconds = median(after - before for before, after in itertools.pairwise(moments))
    ms = 1e3 * seconds / steps
    row: dict[str, Any] = {
        "ms_a_pass": ms,
        "tokens_per_second": batch * length / seconds,
        "steps_per_canvas": steps,
        "peak_bytes": peak,
        "ops": model.ops.name,
        "says": f"{kind} batch {batch} context {context}: {ms:.2f} ms a pass",
    }
    if most := ceilings_of(setting):
        floor = common.step_cost(config, kind, batch, context).seconds(most)
        row |= {"floor_ms": 1e3 * floor, "share_of_ceiling": floor * steps / seconds}
    turns = 2 if setting.is_dry else PROFILED
    profiled = tried("profile", lambda: {"kernels": profile(setting, run_, turns)})  # without it the times still count
    kernels = profiled.get("kernels", [])
    if not kernels:
        return row | {"profile": profiled.get("error", "the profiler saw no kernels")}
    row["kernels_a_step"] = round(sum(kernel["count"] for kernel in kernels) / turns, 1)
    row["busy_ms_a_step"] = sum(kernel["us"] for kernel in kernels) / 1e3 / turns
    return row | {"kernels": kernels}


def _behind(setting: Setting, model: Model, batch: int, context: int, steps: int, canvases: int) -> Run:
    """Rows whose context is made up, not encoded; none of them stops before its last step."""
    config = model.config
    cache = KVCache.allocate(config, batch, context + 1 + canvases * config.canvas_length, setting.device, model.dtype)
    for held in (*cache.k, *cache.v):
        held.normal_()
    cache.advance(list(range(batch)), [context] * batch)
    prompts = torch.randint(config.vocab_size, (batch, context + 1)).tolist()
    tokens = canvases * config.canvas_length
    return Run(model, prompts, Options(max_tokens=tokens, seed=1, max_steps=steps, confidence=0.0), cache=cache)


def profile(setting: Setting, run_: Run, turns: int) -> list[Kernel]:
    """Kernels of so many turns, the longest first: name, count, microseconds in all, grid, block. On a processor
    torch's own operations stand for them."""
    from torch.profiler import ProfilerActivity

    for _ in range(0 if setting.is_dry else 2):  # the one that encodes is behind them
        run_.engine.turn()
    activities = [ProfilerActivity.CPU] + ([] if setting.is_dry else [ProfilerActivity.CUDA])
    setting.wait()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(turns):
            run_.engine.turn()
        setting.wait()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kinds = ("cpu_op",) if setting.is_dry else ("kernel", "gpu_memcpy", "gpu_memset")
    return by_kernel(event for event in events if event.get("cat") in kinds)


def by_kernel(events: Iterator[dict[str, Any]]) -> list[Kernel]:
    """Events of a trace, gathered by name, grid and block."""
    kernels: dict[tuple[str, str, str], Kernel] = {}
    for event in events:
        more = event.get("args", {})
        name, grid, block = event["name"][:120], str(more.get("grid", "")), str(more.get("block", ""))
        one = kernels.setdefault(
            (name, grid, block), {"name": name, "count": 0, "us": 0.0, "grid": grid, "block": block}
        )
        one["count"] += 1
        one["us"] += float(event.get("dur", 0.0))
        for key in ("registers per thread", "shared memory"):
            if key in more:
                one[key] = more[key]
    return sorted(kernels.values(), key=lambda one: -one["us"])


@torch.inference_mode()
def first_step(setting: Setting, model: Model) -> dict[str, Any]:
    """From a prompt of 1024 tokens to the first draft; the second time on, when everything is compiled."""
    count = 16 if setting.is_dry else 1024
    ids = torch.randint(model.config.vocab_size, (count,)).tolist()
    options = Options(max_tokens=model.config.canvas_length, seed=1, max_steps=1, drafts=True)
    rows = []
    for _ in range(2 if setting.is_dry else 4):
        setting.wait()
        began = time.perf_counter()
        for event in Run(model, [ids], options):
            if isinstance(event, Draft):
                rows.append(time.perf_counter() - began)
                break
    ms = 1e3 * median(rows[1:])
    return {"prompt": count, "first_step_ms": ms, "says": f"first step behind {count} tokens {ms:.0f} ms"}
