"""What a step of the released model should take on an H200, kernel by kernel, from counts. Nothing is run: ± 25 %.

    .venv/bin/python benchmarks/predict.py [-o benchmarks/results/predicted.json]

A step is traced as it would be recorded (`benchmarks/kernels.py`): which kernels, how many programs each, in which
tiles, with which weights. For a kernel the longest of four times counts, of as many waves of programs as the processors
need:

    memory        what lies in memory and not in L2 (weights, cache, embedding, logits), read once
    L2            what each program draws from there: tiles of weights, and of what they are multiplied with
    tensor cores  multiplications
    issue         the instructions of the innermost loop, as compiled (`benchmarks/results/kernels.json`)

and beside it each node's own cost: the gap behind the node before it, and filling and draining a program. What stands
on a second stream costs what is left of it. Routing is taken as uniform.

Beside the prediction stands the floor: every weight read once, all arithmetic behind it. Constants are public
measurements, named where they stand; kernels of ours were never measured on a GPU, so each is taken to do as well as
its kind does elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato.measure.capture import Node
from sfumato.measure.machine import environment
from sfumato.measure.work import Parameters, Work, distinct_experts
from sfumato.model.config import ModelConfig

H200 = {
    "bytes_per_second": {"best": 4.3e12},
    "flops_per_second": {"bf16": {"best": 790e12}, "fp8": {"best": 1580e12}},
}
"""Measured on an H200, of 4.8 TB/s and 989 TFLOP/s published."""
PROCESSORS, CLOCK = 132, 1.755e9
MEMORY = 0.88 * 4.3e12
"""Bytes a second. Of the measured peak, what streaming kernels with three or more stages keep."""
L2 = 7.0e12
"""Bytes a second to all processors: 5.5 to 7 measured on H100 (Chips and Cheese, "Nvidia's H100: Funny L2")."""
L2_OF_ONE = 64
"""Bytes a clock that one processor draws at most (CUDA programming guide)."""
NEAR = 3.0e12
"""Bytes a second of small kernels whose values lie in L2."""
TENSOR = {"bf16": 4096, "fp8": 8192}
"""Dense operations a clock and processor (NVIDIA, Hopper architecture)."""
GAP = 1.0e-6
"""Between two dependent nodes of a graph (NVIDIA, "Constant time launch for straight-line CUDA graphs")."""
FILL = 1.5e-6
"""Prologue and epilogue of a product's program: latency of memory twice, and the writing."""
SMALL, TINY = 1.6e-6, 0.7e-6
"""The shortest kernel that reads rows, and the shortest at all."""
ISSUE = 0.8
"""Of the issue slots, what a loop with copies under way uses."""
BARRIER = 100
"""Clocks that a turn waits for copies and neighbours, shared by the programs on a processor."""
BESIDE = 0.15
"""Of the shorter of two streams, what the longer one loses to it where no resource is short."""
SHARED = 227 * 1024
REGISTERS = 65536

BITS = {"bf16": 16.0, "fp8": 8.0, "int4": 4.25, "int4-fp8": 4.25}
RATE = {"bf16": "bf16", "fp8": "fp8", "int4": "bf16", "int4-fp8": "bf16"}
MILLISECONDS = {"bf16": 15.5, "fp8": 8.5, "int4": 6.5, "int4-fp8": 6.5}
"""The issue's limits for a step at batch 1 and 1K context, by this count."""
GAIN = {"fp8": 3.0}
STEPS = 16
"""Steps a canvas in tokens a second."""
HERE = Path(__file__).parent / "results"
OUTPUT, KERNELS = HERE / "predicted.json", HERE / "kernels.json"


@dataclass(frozen=True)
class Time:
    """Of one launch, in seconds: how long; how long each resource would take by itself, were all processors at it; and
    which one binds."""

    seconds: float
    bound: str
    uses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What of a step's shape is not in its nodes."""

    config: ModelConfig
    kind: str
    batch: int
    context: int
    compiled: list[dict[str, Any]]

    @property
    def rows(self) -> int:
        return self.batch * self.config.canvas_length

    def facts_of(self, node: Node) -> dict[str, Any]:
        """What the compiler made of this kernel: at these tiles, or else at others of these weights."""
        tiles = _tiles(node)
        mine = [row for row in self.compiled if row["kernel"] == node.name]
        if not mine:
            raise SystemExit(f"{node.name} is not in {KERNELS.name}; run benchmarks/kernels.py -o {KERNELS} first")
        near = [row for row in mine if row["kind"] == self.kind] or mine
        return next((row for row in near if row["tiles"] == tiles), near[0])


def _tiles(node: Node) -> str:
    from benchmarks.kernels import tiles

    return tiles(node)


# ---- kernels --------------------------------------------------------------------------------------------------------


def time_of(node: Node, step: Step) -> Time:
    """Of one node."""
    if not node.is_kernel:
        return Time(TINY, "launch")
    if "KIND" in node.sizes:
        return product_time(node, step)
    special = SPECIAL.get(node.name)
    return special(node, step) if special else small_time(node, step)


def small_time(node: Node, step: Step) -> Time:
    """A kernel that reads and writes once."""
    seconds = SMALL + node.passing / NEAR + node.standing / MEMORY
    return Time(seconds, "bytes" if seconds > 2 * SMALL else "launch", {"memory": node.standing / MEMORY})


def product_time(node: Node, step: Step) -> Time:
    """A product of weights: [BLOCK_N outputs, BLOCK_M rows] a program."""
    sizes, facts = node.sizes, step.facts_of(node)
    n, m, k = (sizes[f"BLOCK_{name}"] for name in "NMK")
    rate = "fp8" if sizes["KIND"] == "fp8" else "bf16"
    weight_bytes = {"plain": 2.0, "fp8": 1.0, "int8": 1.0}.get(sizes["KIND"], 0.53)
    x_bytes = 1.0 if sizes["KIND"] == "fp8" else 2.0
    ctas, filled = math.prod(node.grid), 1.0
    if node.name.startswith("_experts"):
        tiles, filled = expert_tiles(step.config, step.rows, m)
        columns = sizes["F"] * 2 if "F" in sizes else sizes["N"]
        ctas = round(tiles * math.ceil(columns / n))
    turns = math.ceil(sizes["K"] / k / sizes.get("SPLIT_K", 1))
    tensor = 2.0 * n * m * k / TENSOR[rate]
    return programs(ctas, turns, tensor, n * k * weight_bytes + m * k * x_bytes * filled, facts, node.standing)


def programs(
    ctas: float, turns: float, tensor: float, drawn: float, facts: dict[str, Any], standing: float, rest: float = 0.0
) -> Time:
    """So many programs, each with so many turns of a loop, with `tensor` clocks of the tensor cores and `drawn` bytes
    from L2 each, and `rest` clocks behind it."""
    each = L2 / CLOCK / min(PROCESSORS, ctas)
    a_processor = min(held_at_once(facts), math.ceil(ctas / PROCESSORS))
    issue = (facts["loop"] or facts["instructions"] / turns) * facts["warps"] / 4  # unrolled, it has no loop
    clocks = {
        "tensor cores": tensor,
        "issue": issue / ISSUE,
        "L2": drawn / min(L2_OF_ONE, each),
    }
    bound = max(clocks, key=lambda name: clocks[name])
    turn = clocks[bound] + BARRIER / a_processor
    waves = ctas / PROCESSORS if ctas > 3 * PROCESSORS else math.ceil(ctas / PROCESSORS / a_processor) * a_processor
    busy = waves * (turns * turn + rest) / CLOCK
    uses = {name: one * turns * ctas / PROCESSORS / CLOCK for name, one in clocks.items()}
    uses["memory"] = standing / MEMORY
    if uses["memory"] > busy:
        busy, bound = uses["memory"], "memory"
    return Time(busy + FILL, bound, uses)


def held_at_once(facts: dict[str, Any]) -> int:
    """Programs that fit one processor."""
    by_registers = REGISTERS // (32 * int(facts["warps"]) * max(int(facts["registers"]), 1))
    return max(1, min(by_registers, SHARED // max(int(facts["shared"]), 1)))


def expert_tiles(config: ModelConfig, rows: int, block_m: int) -> tuple[float, float]:
    """Tiles of rows of all experts, and how full they are, where routing is uniform."""
    mean = rows * config.top_k_experts / config.num_experts
    chance, tiles = math.exp(-mean), 0.0
    for count in range(1, int(mean + 12 * math.sqrt(mean)) + 12):
        chance *= mean / count
        tiles += chance * math.ceil(count / block_m)
    tiles *= config.num_experts
    return tiles, min(1.0, rows * config.top_k_experts / (tiles * block_m))


def attention_time(node: Node, step: Step) -> Time:
    """Two products a tile of keys, with softmax between them that the tensor cores wait for."""
    sizes, config = node.sizes, step.config
    held = min(step.context, sizes["WINDOW"] - 1) if sizes["WINDOW"] else step.context
    turns = math.ceil((held + config.canvas_length) / sizes["BLOCK_N"] / sizes["SPLITS"])
    width = sizes["BLOCK_K"] // sizes["COLUMNS"]
    products = 2.0 * sizes["BLOCK_M"] * sizes["BLOCK_N"] * (sizes["BLOCK_K"] + width) / TENSOR["bf16"]
    facts = step.facts_of(node)
    drawn = 2.0 * sizes["BLOCK_N"] * (sizes["BLOCK_K"] + width)
    ctas = math.prod(node.grid)
    time = programs(ctas, turns, products + 0.5 * facts["loop"] * facts["warps"] / 4, drawn, facts, node.standing)
    joined = 2.0 * node.passing / NEAR if node.name == "_attention" and sizes["SPLITS"] > 1 else 0.0
    return replace(time, seconds=time.seconds + 2 * FILL + joined * 0.25)


def sweep_time(node: Node, step: Step) -> Time:
    """Every position with every word, then the logits: 8,500 clocks of exponentials a tile of 256 x 128."""
    sizes, facts = node.sizes, step.facts_of(node)
    n, words, k = sizes["BLOCK_N"], sizes["TILE"], sizes["BLOCK_K"]
    tensor = 2.0 * n * words * k / TENSOR["bf16"]
    rest = 8_500 * n * words / (256 * 128)
    logits = 2.0 * step.rows * step.config.vocab_size
    return programs(
        math.prod(node.grid), sizes["D"] / k, tensor, 2.0 * k * (n + words), facts, node.standing + logits, rest
    )


def walk_time(node: Node, step: Step) -> Time:
    """A position's own tile of words, in float32: a row of the embedding after the other."""
    drawn = 2.0 * step.rows * node.sizes["TILE"] * node.sizes["D"]
    return Time(SMALL + FILL + drawn / MEMORY, "memory", {"memory": drawn / MEMORY})


def multiply_time(node: Node, step: Step) -> Time:
    """Positions x columns, all words: no tile left out, as early in a canvas."""
    sizes, facts = node.sizes, step.facts_of(node)
    n, d, k = sizes["BLOCK_N"], sizes["BLOCK_D"], sizes["BLOCK_K"]
    turns = step.config.vocab_size / k / sizes["SPLITS"]
    tensor = 2.0 * n * d * k / TENSOR["bf16"] + 0.7 * facts["loop"] * facts["warps"] / 4
    return programs(math.prod(node.grid), turns, tensor, 2.0 * k * (n + d), facts, node.standing)


def route_time(node: Node, step: Step) -> Time:
    """Each program draws its share of the router's weights, and of its rows."""
    sizes, facts = node.sizes, step.facts_of(node)
    splits = sizes.get("SPLITS", sizes.get("SPLIT_K", 1))
    turns = math.ceil(step.config.hidden_size / sizes["BLOCK_K"] / splits)
    drawn = 2.0 * sizes["BLOCK_K"] * (step.config.num_experts + sizes["BLOCK_M"])
    time = programs(math.prod(node.grid), turns, 0.0, drawn, facts, node.standing)
    return replace(time, seconds=time.seconds + 2 * FILL)


def place_time(node: Node, step: Step) -> Time:
    """Rows of the embedding, one a position."""
    seconds = SMALL + 2.0 * 3 * step.rows * step.config.hidden_size / NEAR
    return Time(seconds, "launch")


SPECIAL: dict[str, Callable[[Node, Step], Time]] = {
    "_attention": attention_time,
    "_sweep": sweep_time,
    "_walk": walk_time,
    "_multiply": multiply_time,
    "_route": route_time,
    "_place": place_time,
}


# ---- a step ---------------------------------------------------------------------------------------------------------


def timed(nodes: list[Node], step: Step) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of all nodes, one after the other but for those of the second stream, and a row for each kernel."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    whole = 0.0
    for main, side in branches(nodes):
        times = [[time_of(node, step) for node in branch] for branch in (main, side)]
        lengths = [sum(time.seconds + GAP for time in each) for each in times]
        uses = Counter[str]()
        for each in times:
            for time in each:
                uses.update(time.uses)
        whole += max(*lengths, max(uses.values()) if side else 0.0) + BESIDE * min(lengths)
        for node, time in zip((*main, *side), (*times[0], *times[1]), strict=True):
            name = node.name.strip("_") if node.is_kernel else "operations of torch"
            row = rows.setdefault(
                (name, _tiles(node)), {"kernel": name, "tiles": _tiles(node), "launches": 0, "ms": 0.0}
            )
            row["launches"] += 1
            row["ms"] += 1e3 * (time.seconds + GAP)
            row |= {"ctas": math.prod(node.grid), "bound": time.bound}
    return whole, sorted(rows.values(), key=lambda row: -row["ms"])


def branches(nodes: list[Node]) -> Iterator[tuple[list[Node], list[Node]]]:
    """Groups of nodes: what runs in a row, and what a second stream runs beside it: in each block the dense
    feed-forward, which is traced first, beside router and experts."""
    main: list[Node] = []
    side: list[Node] = []
    place = "before"
    for node in nodes:
        if node.name == "_route" and place == "side":
            place = "beside"
        elif node.name == "_end" and place == "beside":
            yield main, side
            main, side, place = [], [], "before"
        (side if place == "side" else main).append(node)
        if node.name == "_between":
            yield main, []
            main, place = [], "side"
    yield main, side


def floor_of(config: ModelConfig, kind: str, batch: int, context: int) -> Work:
    """One step under one roof: every weight read once, and the cache, with nothing between the operations. All but the
    embedding are of this kind."""
    weights, tokens = Parameters.of(config), config.canvas_length * batch
    read = (weights.other + weights.experts * distinct_experts(config, tokens)) * BITS[kind] / 8
    products = 2.0 * tokens * (weights.other + weights.experts * weights.chosen)
    vocabulary = config.vocab_size * config.hidden_size
    in_view = flops = 0.0
    for layer in config.layers:
        held = context if layer.window is None else min(context, layer.window - 1)
        in_view += batch * 2.0 * held * layer.kv_heads * layer.head_dim * 2
        flops += 4.0 * config.num_heads * layer.head_dim * tokens * (held + config.canvas_length)
    other = Work(2.0 * vocabulary, {"bf16": flops + 4.0 * tokens * vocabulary})
    return Work(read + in_view, {RATE[kind]: products}) + other


def predict(context: int = 1024, kernels: Path = KERNELS) -> dict[str, Any]:
    """A row for each kind of weights at batch 1 and 16, and the targets."""
    from benchmarks.kernels import config as released
    from benchmarks.kernels import traced

    config, compiled = released(), [row for row in json.loads(kernels.read_text())["rows"] if row["arch"] == 90]
    rows, milliseconds = [], {}
    for kind in BITS:
        for batch in (1, 16):
            nodes = traced(kind, batch, context=context)
            seconds, each = timed(nodes, Step(config, kind, batch, context, compiled))
            whole = milliseconds[kind, batch] = 1e3 * seconds
            row: dict[str, Any] = {
                "kind": kind,
                "batch": batch,
                "context": context,
                "nodes": len(nodes),
                "floor_ms": 1e3 * floor_of(config, kind, batch, context).seconds(H200),
                "predicted_ms": whole,
                "tokens_per_second": 1e3 * batch * config.canvas_length / (STEPS * whole),
                "kernels": each,
            }
            if batch == 1:
                row["targets"] = {"ms a step": common.target(whole, MILLISECONDS[kind])}
            rows.append(row)
    targets = {
        f"{kind}, batch 1, 1K context: ms a step": common.target(milliseconds[kind, 1], most)
        for kind, most in MILLISECONDS.items()
    }
    for kind, least in GAIN.items():
        gain = 16 * milliseconds[kind, 1] / milliseconds[kind, 16]
        targets[f"{kind}, batch 16: times the tokens of batch 1"] = common.target(gain, least, at_most=False)
    hardware = "H200: 4.3 TB/s, 790 TFLOP/s bf16, 1580 fp8"
    return {"what": "predicted", "hardware": hardware, "within": 0.25, "rows": rows, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="what was compiled")
    parser.add_argument("--before", type=Path, help="a record of an older version, to stand beside this one")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    result = predict(kernels=arguments.kernels)
    if arguments.before:
        older = json.loads(arguments.before.read_text())["rows"]
        result["before_ms"] = {f"{row['kind']}, batch {row['batch']}": row["predicted_ms"] for row in older}
    if arguments.output:
        common.write(arguments.output, {**result, "environment": environment()})
    print(show(result))


def show(result: dict[str, Any]) -> str:
    before = result.get("before_ms", {})
    lines = [
        [
            f"{row['kind']}, batch {row['batch']}",
            f"{row['floor_ms']:.2f}",
            f"{before[name]:.2f}" if (name := f"{row['kind']}, batch {row['batch']}") in before else "–",
            f"{row['predicted_ms']:.2f}",
            f"{row['targets']['ms a step']['target']:g}" if "targets" in row else "–",
            str(row["nodes"]),
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in result["rows"]
    ]
    text = common.table(["predicted, ± 25 %", "floor, ms", "before", "ms", "target", "nodes", "tokens/s"], lines)
    for row in result["rows"]:
        text += f"\n\n{row['kind']}, batch {row['batch']}\n" + common.table(
            ["kernel", "times", "CTAs", "ms", "bound by"],
            [
                [f"{k['kernel']} {k['tiles']}", str(k["launches"]), str(k["ctas"]), f"{k['ms']:.3f}", k["bound"]]
                for k in row["kernels"][:20]
            ],
        )
    return text


if __name__ == "__main__":
    main()
