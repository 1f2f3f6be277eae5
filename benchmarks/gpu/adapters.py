"""What adapters cost at the released size: rank 16 beside every weight that may have some, on rows of one batch.

Milliseconds of a recorded step at batch 1 and 16: where none are loaded, where all rows have one, and where each has
its own. Factors are random.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu.setting import Row, Setting, each_within, tried
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, adaptable, replace_
from sfumato.ops.contract import tensors_of
from sfumato.ops.lowrank import LanePair, LowRank
from sfumato.options import Options
from sfumato.quant.apply import samples
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import CudaCapture, Recorded, RecordedShape
from sfumato.sampling.rules import Rules

RANK, MOST, CONTEXT = 16, 16, 1024
BATCHES = {1: (0, 1), MOST: (0, 1, MOST)}
"""Rows -> how many different adapters they have."""


def run(setting: Setting, kind: str) -> Iterator[Row]:
    name = "fused" if setting.is_dry else setting.ops(torch.bfloat16, samples(kind))
    model = common.random_packed(setting.config(), setting.device, name, kind)
    cells = [(batch, count) for batch, counts in BATCHES.items() for count in counts]
    cells.sort(key=lambda cell: cell[1])
    of = {f"{kind} batch {batch} adapters {count}": (batch, count) for batch, count in cells}

    def row(cell: str) -> Row:
        batch, count = of[cell]
        if count and not any(isinstance(getattr(owner, leaf), LowRank) for owner, leaf in adaptable(model)):
            beside_(model, 2 if setting.is_dry else MOST)
        return tried(cell, lambda: timed(setting, model, batch, count), kind=kind, batch=batch, adapters=count)

    yield from each_within(setting, list(of), row, 2.0)


@torch.no_grad()
def beside_(model: Model, lanes: int) -> None:
    """Random factors on so many lanes, small enough that what the model says stays finite."""
    for owner, leaf in list(adaptable(model)):
        base = getattr(owner, leaf)
        base = base.data if isinstance(base, torch.nn.Parameter) else base
        *stack, outputs, inputs = base.shape
        place: dict[str, Any] = {"dtype": model.dtype, "device": tensors_of(base)[0].device}
        a = torch.randn(lanes, *stack, RANK, inputs, **place).mul_(inputs**-0.5)
        b = torch.randn(lanes, *stack, RANK, outputs, **place).mul_(0.1)
        replace_(owner, leaf, LowRank(base, a, b, model.lane_switch))


@torch.inference_mode()
def timed(setting: Setting, model: Model, batch: int, count: int) -> dict[str, Any]:
    """A step of so many rows that have so many different adapters."""
    context, length = 16 if setting.is_dry else CONTEXT, model.config.canvas_length
    rows, lanes = list(range(batch)), 2 if setting.is_dry else MOST
    cache = KVCache.allocate(model.config, batch, context + length, setting.device, model.dtype)
    for held in (*cache.k, *cache.v):
        held.normal_()
    cache.advance(rows, [context] * batch)
    if count:
        cache.lanes[:] = [LanePair(row % count % lanes, row % count % lanes) for row in rows]
    rules = [Rules.of(Options(max_steps=64, confidence=0.0))] * batch
    state = Canvases.allocate(model, rules, rows, rows, length)
    canvas_BL = torch.randint(model.config.vocab_size, (batch, length), device=setting.device)
    state.begin_(rows, canvas_BL, torch.full_like(canvas_BL, -1), [0] * batch)
    capture = None if setting.is_dry else CudaCapture(torch.device("cuda", 0))
    recording = Recorded(model, cache, state, RecordedShape(batch, has_lanes=count > 0), capture)
    ms = setting.milliseconds(lambda: recording(rows, [context] * batch, [0] * batch), 1.5)
    is_finite = bool(state.is_finite_X[:batch].all())
    beside = sum(
        weight.a.nbytes + weight.b.nbytes
        for owner, leaf in adaptable(model)
        if isinstance(weight := getattr(owner, leaf), LowRank)
    )
    return {
        "ok": is_finite,
        "step_ms": ms,
        "rank": RANK,
        "factor_bytes": beside,
        "ops": model.ops.name,
        "says": f"batch {batch}, {count} adapters: {ms:.2f} ms a step",
    }
