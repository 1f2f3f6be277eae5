"""What an adapter costs: a step of the half-billion model "mid" without one, with one of rank 16 on everything, merged.

    .venv/bin/python benchmarks/adapters.py -o benchmarks/results/adapters.json   # 3 minutes; nothing else may run

One row with the adapter beside the weights, with none, and with the adapter merged into them; sixteen rows without,
with one adapter for all, and with sixteen different ones. What is compared takes turns, round by round, and a cost is
the median over the rounds of the time beside that of the same round without; the fastest of each are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.step import Steps
from sfumato.measure.parts import quantize_some_, random_config
from sfumato.measure.work import duration
from sfumato.model.adapters import Adapter, Adapters, Factors, merge_, new_adapter, targeted
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.ops import load
from sfumato.quant.apply import samples
from sfumato.quant.recipes import named

WITHOUT = "without"
ONE, BATCH = ("one adapter", 0.10), {"one adapter": 0.25, "different adapters": 0.25}
"""How much longer a step may take."""
ROUNDS = {1: 40, 16: 12}
"""At most, by rows."""


# ---- models ---------------------------------------------------------------------------------------------------------


def model_of(
    config: ModelConfig, kind: str, arguments: argparse.Namespace, ops: str, merged: Adapter | None = None
) -> Model:
    """Random weights in this recipe or in bf16, with an adapter merged into the plain ones where there is one."""
    recipe = None if kind == "bf16" else named(kind)
    record = load(ops, arguments.device, torch.bfloat16, samples(recipe) if recipe else [])
    model = Model(config, record).init_().to(device=arguments.device, dtype=torch.bfloat16)
    model = common.without_eos(model.requires_grad_(False).eval())
    if merged is not None:
        merge_(model, merged)
    if recipe is not None:
        quantize_some_(model, recipe)
    return model.pack_()


def adapter_of(model: Model, rank: int) -> Adapter:
    """Random factors of everything that can have some."""
    generator = torch.Generator().manual_seed(1)
    fresh = new_adapter(model, rank, rank, tuple(targeted(model))).factors
    return Adapter(
        {
            name: Factors(a, torch.randn(b.shape, generator=generator) * 0.01, scale)
            for name, (a, b, scale) in fresh.items()
        }
    )


# ---- times ----------------------------------------------------------------------------------------------------------


def rounds_of(calls: dict[str, Callable[[], Any]], rows: int, seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of each call, round by round, the order turned about with each. One row is warmed up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if rows == 1 else ():
        call()
    until = time.perf_counter() + seconds
    for number in range(ROUNDS[rows]):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            common.wait(device)
            began = time.perf_counter()
            calls[name]()
            common.wait(device)
            times[name].append(time.perf_counter() - began)
        if time.perf_counter() > until:
            break
    return times


def rows_of(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Median and fastest of each, and what each costs beside the first."""
    first = times[WITHOUT]
    result = {}
    for name, some in times.items():
        result[name] = {
            "seconds": statistics.median(some),
            "fastest_seconds": min(some),
            "rounds": len(some),
            "cost": statistics.median(one / base for one, base in zip(some, first, strict=True)) - 1,
            "cost_of_fastest": min(some) / min(first) - 1,
        }
    return result


def measured(kind: str, ops: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, then sixteen, with weights of one kind."""
    config, prompt = random_config(arguments.size), arguments.prompt
    common.say(f"{kind}, {ops}: weights")
    model = model_of(config, kind, arguments, ops)
    adapter = adapter_of(model, arguments.rank)
    bank = Adapters(model)
    lanes = [bank.load(str(n), adapter) for n in range(16)]
    calls: dict[str, Callable[[], Any]] = {
        WITHOUT: Steps(model, prompt),
        "one adapter": Steps(model, prompt, 1, lanes[:1]),
        "merged": Steps(model_of(config, kind, arguments, ops, adapter), prompt),
    }
    common.say(f"{kind}, {ops}: one row")
    one = rows_of(rounds_of(calls, 1, arguments.seconds, arguments.device))
    calls.clear()
    common.release()
    common.say(f"{kind}, {ops}: sixteen rows")
    several = {
        WITHOUT: Steps(model, prompt, 16),
        "one adapter": Steps(model, prompt, 16, lanes[:1] * 16),
        "different adapters": Steps(model, prompt, 16, lanes),
    }
    many = rows_of(rounds_of({**several}, 16, 2 * arguments.seconds, arguments.device))
    result: dict[str, Any] = {"ops": model.ops.name, "one row": one, "sixteen rows": many}
    if model.ops.name == "cpu":
        name, most = ONE
        result["targets"] = {f"one row, {name}, more time": common.target(one[name]["cost"], most)}
        for name, most in BATCH.items():
            result["targets"][f"sixteen rows, {name}, more time"] = common.target(many[name]["cost"], most)
    return result


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = common.argument_parser(__doc__, 6.0)
    parser.add_argument("--size", default="mid", choices=["mid", "tiny"])
    parser.add_argument("--kinds", default="bf16,int4,fused", help="bf16, recipes, and fused for bf16 on torch's calls")
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=384)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"what": "adapters", "size": arguments.size, "rank": arguments.rank}
    record |= {"prompt": arguments.prompt, "kinds": {}}
    began = time.perf_counter()
    with torch.inference_mode():
        for kind in arguments.kinds.split(","):
            is_fused = kind == "fused"
            ops = "fused" if is_fused else arguments.ops
            record["kinds"][kind] = measured("bf16" if is_fused else kind, ops, arguments)
            common.release()
            record["seconds"] = round(time.perf_counter() - began, 1)
            common.finish(record, arguments)
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """One table."""
    lines = []
    for kind, one in record["kinds"].items():
        for rows in ("one row", "sixteen rows"):
            for name, row in one[rows].items():
                costs = [f"{row[cost]:+.1%}" for cost in ("cost", "cost_of_fastest")]
                times = [duration(row["seconds"]), duration(row["fastest_seconds"])]
                lines.append([f"{kind}, {one['ops']} operations, {rows}, {name}", *times, *costs])
    return common.table(["", "median", "fastest", "cost", "cost of the fastest"], lines)


if __name__ == "__main__":
    main()
