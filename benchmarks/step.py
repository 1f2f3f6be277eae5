"""A step, whole and in parts: of the half-billion model "mid", and of a slice of the released model at its true size.

    .venv/bin/python benchmarks/step.py --seconds 8 -o runs/bench/step.json

mid: denoise pass, read-out, soft embedding, accept/renoise/stop and the engine's whole step, in bf16 and int8, each
beside the ceiling. The slice: two layers of the released dimensions, one sliding and one full, with the full vocabulary
and random bf16 weights: time of a whole step; peak memory beyond weights and cache, beside one buffer of bf16 logits;
read-out and soft embedding, beside their two matrix products alone by the fastest means that this machine has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato.measure.machine import Make, forget_peak, peak_bytes, products, resident_bytes
from sfumato.measure.parts import Counted, part_row, random_config, random_model
from sfumato.measure.parts import parts as parts_of
from sfumato.measure.plan import BenchPlan
from sfumato.measure.work import Parameters, duration
from sfumato.measure.work import size as in_bytes
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.ops.lowrank import LanePair
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import StepInput, step_

CONFIDENCE = 0.0
"""Never reached: every canvas takes all its steps."""


# ---- mid ------------------------------------------------------------------------------------------------------------


def whole_steps(arguments: argparse.Namespace, most: dict[str, Any]) -> dict[str, Any]:
    """The parts of a step, by the kind of weights, a number format or a recipe. What fails is left out by name."""
    result: dict[str, Any] = {}
    for kind in arguments.kinds.split(","):
        config = random_config(arguments.size)
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        packed = kind if kind not in ("bf16", "float32") else None
        try:
            model = random_model(config, dtype, arguments.device, arguments.ops, quantize=packed)
        except Exception as error:
            result[kind] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        plan = BenchPlan(arguments.prompt, config.canvas_length, 2, arguments.seconds, streamed=arguments.streamed)
        common.without_eos(model)
        say = lambda part, kind=kind: common.say(f"{kind}: {part}")  # noqa: E731
        parts = {name: part_row(timing, cost, most) for name, timing, cost in parts_of(model, plan, say)}
        result[kind] = {
            "size": arguments.size,
            "parameters": Parameters.of(config).total,
            "dtype": str(model.dtype).removeprefix("torch."),
            "ops": model.ops.name,
            "prompt": arguments.prompt,
            "parts": parts,
        }
        reached = parts["whole step"]["share_of_ceiling"]
        if kind == "bf16":
            result[kind]["targets"] = {"whole step, share of ceiling": common.target(reached, 0.75, at_most=False)}
        del model
        common.release()
    return result


# ---- the slice ------------------------------------------------------------------------------------------------------


class Steps:
    """Steps of a canvas, or of several side by side, behind a cache that is filled, not encoded: no pass has run
    before the first. `lanes`: which adapter each row has."""

    def __init__(self, model: Model, prompt: int, batch: int = 1, lanes: Sequence[LanePair] = ()) -> None:
        config, device, rows = model.config, model.device, list(range(batch))
        self.model, self.prompt = model, prompt
        self.cache = KVCache.allocate(config, batch, prompt + config.canvas_length, device, model.dtype)
        for held in (*self.cache.k, *self.cache.v):
            held.normal_()
        self.cache.advance(rows, [prompt] * batch)
        self.cache.lanes[: len(lanes)] = lanes
        rules = [Rules.of(Options(max_steps=4096, confidence=CONFIDENCE))] * batch
        self.state = Canvases.allocate(model, rules, [0] * batch, rows)
        free = torch.full((batch, config.canvas_length), -1, device=device)
        fresh = torch.randint(config.vocab_size, free.shape, device=device)
        self.state.begin_(rows, fresh, free, [0] * batch)
        self.at_B = torch.arange(batch, device=device)
        self.run = Pass(model, self.cache, rows, [0] * batch, 0, config.canvas_length)

    def __call__(self) -> None:
        step_(self.model, self.cache, self.state, StepInput(self.at_B, self.run))


def true_size(config: ModelConfig, arguments: argparse.Namespace, most: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of whole steps, and the vocabulary beside its products."""
    device = torch.device(arguments.device)
    common.say("slice: warming up on a tiny model")  # what libraries load and threads take is no memory of a step
    tiny = Steps(random_model(random_config("tiny"), torch.bfloat16, arguments.device, arguments.ops), 16)
    for _ in range(2):
        tiny()
    common.say("slice: weights")
    model = common.random_packed(config, arguments.device, arguments.ops)
    steps = Steps(model, arguments.prompt)
    common.release()
    before = resident_bytes(device)
    forget_peak(device)
    common.say("slice: whole step")
    measured = common.alternate({"whole step": steps}, arguments.seconds, device)["whole step"]
    peak = peak_bytes(device)
    counted = Counted.of(model)
    buffer = config.canvas_length * config.vocab_size * 2
    beyond = peak - before if peak is not None and before is not None else None
    result: dict[str, Any] = {
        "parts": {"whole step": part_row(measured, counted.step(arguments.prompt), most)},
        "ops": model.ops.name,
        "layers": ["sliding" if layer.is_sliding else "full" for layer in config.layers],
        "prompt": arguments.prompt,
        "cache_bytes": steps.cache.bytes,
        "resident_before_bytes": before,
        "peak_beyond_bytes": beyond,
        "logits_buffer_bytes": buffer,
    }
    del tiny, steps
    common.release()
    read, parts = vocabulary(model, arguments)
    vocabulary_cost = counted.vocabulary(config.canvas_length)
    twice = vocabulary_cost + vocabulary_cost
    result["parts"]["read-out + soft embedding"] = part_row(read, twice, most)
    result["products"] = parts
    least = sum(min(means.values()) for means in parts.values())
    result["products_seconds"] = least
    result["targets"] = {
        "peak beyond weights and cache, in bf16 logits buffers": common.target(beyond and beyond / buffer, 1.1),
        "read-out and soft embedding, in times of their products": common.target(read.median / least, 1.15),
    }
    return result


def _ready(make: Make, x: torch.Tensor, weight: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    return make(x, weight())


def vocabulary(model: Model, arguments: argparse.Namespace) -> tuple[Any, dict[str, dict[str, float]]]:
    """Read-out and soft embedding together; and seconds of each of their products by every means. Each means takes
    turns with the read-out; packed copies of E are made one after the other, for memory's sake."""
    config, device = model.config, model.device
    embed_VD, length = model.embed_tokens.weight, config.canvas_length
    hidden_BLD = torch.randn(1, length, config.hidden_size, device=device).to(model.dtype)
    uniform_BL, temperature_B = torch.rand(1, length, device=device), torch.full((1,), 0.8, device=device)

    def ours() -> None:
        read = model.ops.read_out(hidden_BLD, embed_VD, config.softcap, temperature_B, uniform_BL)
        model.ops.soft_embedding(read.logits_BLV, embed_VD, model.embed_scale, read.tiles)

    read = model.ops.read_out(hidden_BLD, embed_VD, config.softcap, temperature_B, uniform_BL)
    p_NV = torch.softmax(read.logits_BLV[0], -1, dtype=torch.float32).to(model.dtype)
    del read
    kind = "float32" if model.dtype == torch.float32 else "bf16"
    result: dict[str, dict[str, float]] = {"hidden x E^T": {}, "p x E": {}}
    timed = []
    sides: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {
        "hidden x E^T": (hidden_BLD[0], lambda: embed_VD),
        "p x E": (p_NV, lambda: embed_VD.t().contiguous()),
    }
    each = arguments.seconds / 4
    for side, (x, weight) in sides.items():
        plain = {"hidden x E^T": lambda: torch.matmul(hidden_BLD[0], embed_VD.t()), "p x E": lambda: p_NV @ embed_VD}
        ways: dict[str, Callable[[], Any]] = {"torch.matmul": partial(plain.__getitem__, side)}
        for means, make in products(kind, device).items():
            if means != "F.linear":
                ways[means] = partial(_ready, make, x, weight)
        for means, ready in ways.items():
            common.say(f"slice: {side}, {means}")
            try:
                times = common.alternate({"ours": ours, means: ready()}, each, device)
            except (RuntimeError, NotImplementedError) as error:
                common.say(f"slice: {means} cannot: {str(error)[:80]}")
                continue
            result[side][means] = times[means].median
            timed.append(times["ours"])
            common.release()
    best = sorted(timed, key=lambda timing: timing.median)[len(timed) // 2]
    return best, result


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = common.argument_parser(__doc__, 8.0)
    parser.add_argument("--size", default="mid", choices=["mid", "tiny"])
    parser.add_argument("--kinds", default="bf16,int8", help="of weights: bf16, float32, or recipes")
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--slice", default="true", choices=["true", "tiny", "none"], help="its size")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"what": "step", "ceilings": common.ceiling(arguments)}
    began = time.perf_counter()
    with torch.inference_mode():
        result["mid"] = whole_steps(arguments, result["ceilings"])
        common.finish(result, arguments)
        if arguments.slice != "none":
            config = (
                common.released_config(2) if arguments.slice == "true" else replace(random_config("tiny"), eos_ids=())
            )
            result["slice"] = true_size(config, arguments, result["ceilings"])
    result["seconds"] = round(time.perf_counter() - began, 1)
    common.finish(result, arguments)
    print(show(result))


def show(result: dict[str, Any]) -> str:
    texts = []
    for kind, one in result["mid"].items():
        texts.append(f"{one.get('size', '')}, {kind}\n" + (one.get("failed") or common.parts_table(one["parts"])))
    if "slice" in result:
        one = result["slice"]
        texts.append("true-size slice, bf16\n" + common.parts_table(one["parts"]))
        for side, means in one["products"].items():
            texts[-1] += f"\n{side}: " + ", ".join(f"{name} {duration(value)}" for name, value in means.items())
        if one["peak_beyond_bytes"] is not None:
            held = in_bytes(one["peak_beyond_bytes"]), in_bytes(one["logits_buffer_bytes"])
            texts[-1] += f"\npeak beyond weights and cache: {held[0]}; one bf16 logits buffer: {held[1]}"
        for name, target in one["targets"].items():
            texts[-1] += f"\n{name}: {target['value']} (target {target['target']})"
    return "\n\n".join(texts)


if __name__ == "__main__":
    main()
