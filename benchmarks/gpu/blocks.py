"""Whole passes of two layers of the released size, one sliding and one full, with the whole vocabulary.

Steps of the engine: recorded ones and eager ones give the same bits, and a row the same bits alone and among others.
Then passes against the reference in float32 on the same weights: what the model makes of the operations, blocks in one
call among them. There three times plain bfloat16's error is allowed: which of two nearly equal experts a router takes
is luck.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, ops
from benchmarks.gpu.alternatives import WITHOUT, standing
from benchmarks.gpu.setting import Row, Setting, each_within, tried
from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.events import Draft
from sfumato.measure.parts import quantize_some_
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.ops import load
from sfumato.options import Options
from sfumato.quant.apply import samples
from sfumato.quant.recipes import named

KINDS = ("int4", "fp8", "int4-fp8", "bf16")
ENOUGH = {"int4": 0.05, "fp8": 0.15, "int4-fp8": 0.15, "int8": 0.1, "bf16": 0.0}
"""Relative error of the hidden states where x too is rounded to 8 bits, once a product."""
STEPS = 3


def run(setting: Setting, _: str) -> Iterator[Row]:
    held: dict[str, Model] = {}

    def passes(kind: str) -> Row:
        return tried(f"passes {kind}", lambda: against_reference(setting, kind))

    def steps(kind: str) -> Row:
        if kind not in held:
            held.clear()
            common.release()
            held[kind] = setting.model(kind, 2)
        return tried(f"steps {kind}", lambda: recorded_as_eager(setting, held[kind]))

    for kind in ("int8", *KINDS) if setting.is_dry else KINDS:
        yield from each_within(setting, [kind], steps)
    held.clear()
    for kind in KINDS:
        common.release()
        yield from each_within(setting, [kind], passes, 2.0)


# ---- against the reference -------------------------------------------------------------------------------------------


@torch.inference_mode()
def against_reference(setting: Setting, kind: str) -> dict[str, Any]:
    """Hidden states of encode, of denoise behind it, and of both in one pass."""
    reference, dtype = load("reference"), torch.bfloat16
    plain = model_of(setting, kind)
    exact = outputs(copy.deepcopy(plain).float(), torch.float32)
    common.release()
    rough = outputs(plain, dtype)
    name = setting.ops(dtype, samples(kind) if kind != "bf16" else ())
    plain.use_(load(name, setting.device, dtype)).pack_()
    got = outputs(plain, dtype)
    errors: dict[str, Any] = {}
    for part, out in got.items():
        error, allowed = ops.relative(out, exact[part]), ops.relative(rough[part], exact[part])
        errors[part] = {"error": error, "bound": max(3 * allowed, ENOUGH[kind])}
    is_right = all(math.isfinite(one["error"]) and one["error"] <= one["bound"] for one in errors.values())
    worst = max(errors, key=lambda part: errors[part]["error"] / errors[part]["bound"])
    says = f"{kind} within {errors[worst]['error'] / errors[worst]['bound']:.0%} of the bound"
    return {"ok": is_right, "ops": name, "instead_of": reference.name, "errors": errors, "says": says}


def model_of(setting: Setting, kind: str) -> Model:
    """Random weights, some of them in fewer bits, for the reference: nothing is packed yet."""
    config = setting.config(2)
    with torch.device(setting.device):
        model = Model(config, load("reference")).to(torch.bfloat16).init_(0)
    model.requires_grad_(False).eval()
    if kind != "bf16":
        quantize_some_(model, named(kind))
    return model


def outputs(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of two rows of different length."""
    config, device = model.config, model.device
    length = config.canvas_length
    generator = torch.Generator().manual_seed(1)
    tokens_BT, canvas_BL = (
        torch.randint(config.vocab_size, (2, n), generator=generator).to(device) for n in (2 * length, length)
    )
    soft_BLD = torch.randn(2, length, config.hidden_size, generator=generator).bfloat16().to(device, dtype)
    cache = KVCache.allocate(config, 2, 4 * length, device, dtype)
    counts = [2 * length, length + 3]
    encoded_BTD = model.encode(tokens_BT, cache, counts=counts)
    results = {"encode, long row": encoded_BTD[0], "encode, short row": encoded_BTD[1, : counts[1]]}
    results["denoise"] = model.denoise(canvas_BL, cache, soft_BLD)
    again_BTD, first_BLD = model.encode_and_denoise(tokens_BT[:, :length], [length, 5], canvas_BL, cache)
    return results | {"encode behind it": again_BTD[0], "first step with it": first_BLD}


# ---- recorded, eager, alone ------------------------------------------------------------------------------------------


@torch.inference_mode()
def recorded_as_eager(setting: Setting, model: Model) -> dict[str, Any]:
    """Two canvases of three rows: what every step shows, entropies to the last bit."""
    length = model.config.canvas_length
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in (length // 2, 9, 40)]
    options = Options(max_tokens=2 * length, max_steps=STEPS, confidence=0.0, seed=1, drafts=True)

    def steps(rows: list[int], record: bool) -> dict[tuple[int, int, int], Draft]:
        events = Run(model, [prompts[i] for i in rows], options, settings=EngineSettings(record=record))
        drafts = [event for event in events if isinstance(event, Draft)]
        return {(rows[draft.row], draft.canvas, draft.step): draft for draft in drafts}

    def differ(one: dict[Any, Draft], other: dict[Any, Draft]) -> list[str]:
        return [
            f"row {key[0]}, canvas {key[1]}, step {key[2]}" for key in one if _shown(one[key]) != _shown(other[key])
        ]

    eager, recorded, alone = steps([0, 1, 2], False), steps([0, 1, 2], True), steps([1], True)
    wrong = {
        "recorded": differ(eager, recorded),
        "alone": differ(alone, {key: recorded[key] for key in alone if key in recorded}),
    }
    wrong = {name: some for name, some in wrong.items() if some}
    if model.ops.name == "fused":  # torch's own calls promise nothing of the kind
        return {"steps": len(eager), "differ": {name: len(some) for name, some in wrong.items()}}
    apart = {}
    for name in WITHOUT:  # what these operations stand for has another order of sums, so a few steps may differ
        with standing(name, model) as is_there:
            if is_there:
                apart[name] = len(differ(eager, steps([0, 1, 2], False)))
    is_right = not wrong and len(eager) == len(recorded) == 3 * 2 * STEPS
    is_right &= 3 * apart.get("the end of a step by torch", 0) <= len(eager)
    says = f"{model.ops.name} recorded as eager, {len(eager)} steps" if is_right else "steps differ"
    results = {"ok": is_right, "steps": len(eager), "says": says, "differ_from": apart}
    return results | ({"wrong": wrong} if wrong else {})


def _shown(draft: Draft) -> tuple[Any, ...]:
    return tuple(value for name, value in vars(draft).items() if name not in ("row", "request"))
