"""What a pass of the released model should take on an H200, from counted bytes and operations, beside each target.

    .venv/bin/python benchmarks/predict.py

Two figures for each cell. The floor: every weight read once, perfectly overlapped with all arithmetic. The prediction:
operation by operation, each bound by its own bytes or its own arithmetic, with everything that really moves: the
embedding twice, logits written and read, activations between the operations. Measured bandwidth and rates of an H200
(FACTS section 5); kernels are taken to reach them, so that a measured pass will be slower. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato.config import ModelConfig
from sfumato.measure.machine import environment
from sfumato.measure.work import Cost, Parameters, distinct_experts

H200 = {
    "bytes_per_second": {"best": 4.3e12},
    "flops_per_second": {"bf16": {"best": 790e12}, "fp8": {"best": 1580e12}},
}
BITS = {"bf16": 16.0, "fp8": 8.0, "int4": 4.25}
RATE = {"bf16": "bf16", "fp8": "fp8", "int4": "bf16"}
MILLISECONDS = {"bf16": 15.0, "fp8": 8.5, "int4": 6.0}
"""The issue's limits for a pass at batch 1 and 1K context."""
STEPS = 16
OUTPUT = Path(__file__).parent / "results" / "predicted.json"


def operations(config: ModelConfig, kind: str, batch: int, context: int) -> dict[str, Cost]:
    """The operations of one step, with their bytes and floating-point operations."""
    weights, tokens, width = Parameters.of(config), config.canvas_length * batch, config.hidden_size
    byte, rate, layers = BITS[kind] / 8, RATE[kind], len(config.layers)
    vocabulary, logits = config.vocab_size * width, 2.0 * tokens * config.vocab_size
    top, inner = config.top_k_experts, config.expert_size
    seen = flops = 0.0
    for layer in config.layers:
        held = context if layer.window is None else min(context, layer.window - 1)
        seen += batch * 2.0 * held * layer.kv_heads * layer.head_dim * 2
        flops += 4.0 * config.num_heads * layer.head_dim * tokens * (held + config.canvas_length)
    dense = weights.dense + weights.self_conditioning
    woken = weights.experts * distinct_experts(config, tokens)
    between = layers * tokens * 2.0 * (8 * width + 2 * config.num_heads * config.layers[0].head_dim)
    routed = layers * tokens * top * 2.0 * (2 * inner + 2 * width)
    return {
        "attention projections": Cost(weights.attention * byte, {rate: 2.0 * tokens * weights.attention}),
        "attention": Cost(seen, {"bf16": flops}),
        "dense and self-conditioning": Cost(dense * byte, {rate: 2.0 * tokens * dense}),
        "experts": Cost(woken * byte + routed, {rate: 2.0 * tokens * weights.experts * weights.chosen}),
        "norms, router, residual": Cost(between + weights.rest * 2.0, {"bf16": 2.0 * tokens * weights.rest}),
        "read-out": Cost(2.0 * vocabulary + logits, {"bf16": 2.0 * tokens * vocabulary}),
        "soft embedding": Cost(2.0 * vocabulary + logits, {"bf16": 2.0 * tokens * vocabulary}),
    }


def floor_of(config: ModelConfig, kind: str, batch: int, context: int) -> Cost:
    """One step under one roof: every weight read once, and the cache, with nothing between the operations. All but the
    embedding are of this kind."""
    weights, tokens = Parameters.of(config), config.canvas_length * batch
    read = (weights.other + weights.experts * distinct_experts(config, tokens)) * BITS[kind] / 8
    products = 2.0 * tokens * (weights.other + weights.experts * weights.chosen)
    vocabulary = config.vocab_size * config.hidden_size
    seen = flops = 0.0
    for layer in config.layers:
        held = context if layer.window is None else min(context, layer.window - 1)
        seen += batch * 2.0 * held * layer.kv_heads * layer.head_dim * 2
        flops += 4.0 * config.num_heads * layer.head_dim * tokens * (held + config.canvas_length)
    other = Cost(2.0 * vocabulary, {"bf16": flops + 4.0 * tokens * vocabulary})
    return Cost(read + seen, {RATE[kind]: products}) + other


def predict(config: ModelConfig) -> dict[str, Any]:
    rows, milliseconds = [], {}
    for kind in BITS:
        for batch in (1, 16):
            each = {name: 1e3 * cost.seconds(H200) for name, cost in operations(config, kind, batch, 1024).items()}
            floor = floor_of(config, kind, batch, 1024)
            whole = milliseconds[kind, batch] = sum(each.values())
            row = {
                "kind": kind,
                "batch": batch,
                "context": 1024,
                "floor_ms": 1e3 * floor.seconds(H200),
                "predicted_ms": whole,
                "tokens_per_second": 1e3 * batch * config.canvas_length / (STEPS * whole),
                "operations_ms": each,
            }
            if batch == 1:
                row["targets"] = {"ms a pass": common.target(whole, MILLISECONDS[kind])}
            rows.append(row)
    fast = 1e3 * config.canvas_length / (STEPS * milliseconds["int4", 1])
    gains = {kind: 16 * milliseconds[kind, 1] / milliseconds[kind, 16] for kind in BITS}
    targets = {
        f"{kind}, batch 1, 1K context: ms a pass": common.target(milliseconds[kind, 1], MILLISECONDS[kind])
        for kind in BITS
    }
    targets |= {f"int4, {STEPS} steps a canvas: tokens a second": common.target(fast, 2500.0, at_most=False)}
    targets |= {
        f"{kind}, batch 16: times the tokens of batch 1": common.target(gain, 4.0, at_most=False)
        for kind, gain in gains.items()
    }
    targets |= {"first step after a 1K prompt: ms": common.target(first_step(config), 60.0)}
    hardware = "H200: 4.3 TB/s, 790 TFLOP/s bf16, 1580 fp8"
    return {"what": "predicted", "hardware": hardware, "rows": rows, "targets": targets}


def first_step(config: ModelConfig) -> float:
    """bf16: prompt and canvas in one pass of 1,280 positions, then a read-out. Milliseconds."""
    whole = 0.0
    for name, cost in operations(config, "bf16", 1, 0).items():
        times = 1 if name in ("read-out", "soft embedding") else 5
        whole += Cost(cost.bytes, {kind: times * flops for kind, flops in cost.flops.items()}).seconds(H200)
    return 1e3 * whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    found = predict(common.released_config())
    common.write(given.output, {**found, "environment": environment()})
    print(show(found))


def show(found: dict[str, Any]) -> str:
    lines = [
        [
            row["kind"],
            str(row["batch"]),
            f"{row['floor_ms']:.2f}",
            f"{row['predicted_ms']:.2f}",
            f"{row['targets']['ms a pass']['target']:g}" if "targets" in row else "–",
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in found["rows"]
    ]
    text = common.table(["weights", "batch", "floor, ms", "predicted, ms", "target, ms", "tokens/s"], lines)
    for name, target in found["targets"].items():
        sign = "at most" if target["is_at_most"] else "at least"
        text += f"\n{name}: {target['value']:.1f} ({sign} {target['target']:g})"
    return text


if __name__ == "__main__":
    main()
