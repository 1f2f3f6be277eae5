"""The kernels of a recorded step of the released size: how many nodes, and what the compiler makes of each.

    .venv/bin/python benchmarks/kernels.py [--arch 90 --kind int4 ...] [-o benchmarks/results/kernels.json]

Nothing runs. A step is traced on tensors of which nothing exists but shapes, exactly as it would be recorded on a GPU
of that architecture, and each kernel is compiled as that GPU would have it compiled. A row is one kernel at one size:
how often a step launches it, programs (CTAs) a launch, registers and spills of a thread, shared memory, and the
instructions that a warp executes in one turn of the innermost loop. Nodes are kernels and torch's operations together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import common
from sfumato.measure.capture import Node, Variant, meta_step
from sfumato.measure.machine import environment
from sfumato.model.config import ModelConfig
from sfumato.ops import triton
from sfumato.ops.triton import ahead
from sfumato.ops.triton.launches import as_if

OUTPUT = Path(__file__).parent / "results" / "kernels.json"
KINDS = {"int4": "int4", "int4-fp8": "int4-fp8", "fp8": "fp8", "bf16": "", "int8": "int8", "nvfp4": "nvfp4"}
"""Weights -> recipe."""
SHOWN = ("int4", "int4-fp8", "fp8", "bf16")


def config() -> ModelConfig:
    """The released model's, with its ends."""
    return dataclasses.replace(common.released_config(), eos_ids=(1, 106, 50))


def traced(kind: str, rows: int = 1, arch: int = 90, context: int = 1024, is_encoding: bool = False) -> list[Node]:
    """The nodes of one step; as they would be on this architecture, within `as_if`."""
    variant = Variant(KINDS[kind], rows, is_encoding, context=context)
    stepped, _ = meta_step(config(), triton.record(), variant)
    assert not stepped.refusals, stepped.refusals
    return stepped.nodes


def rows_of(kind: str, arch: int) -> list[dict[str, Any]]:
    """A row for each kernel at each of its sizes, in the order of their first launch."""
    rows_by_kernel: dict[tuple[Any, ...], dict[str, Any]] = {}
    with as_if(arch):
        for node in traced(kind, arch=arch):
            if not node.is_kernel:
                continue
            key = node.name, tuple(sorted((k, str(v)) for k, v in node.sizes.items())), node.grid
            if key not in rows_by_kernel:
                facts = ahead.read(node.launch.compiled())
                rows_by_kernel[key] = {"kernel": node.name, "arch": arch, "kind": kind, "launches": 0}
                rows_by_kernel[key] |= {"ctas": math.prod(node.grid), "tiles": tiles(node), **facts}
            rows_by_kernel[key]["launches"] += 1
    return list(rows_by_kernel.values())


def tiles(node: Node) -> str:
    """The sizes of a program's tile, shortly."""
    sizes = ("BLOCK_N", "BLOCK_M", "BLOCK_K", "BLOCK_D", "TILE", "SPLITS", "SPLIT_K", "K", "SIZE")
    return " ".join(f"{name.removeprefix('BLOCK_')}{node.sizes[name]}" for name in sizes if name in node.sizes)


def counts(kinds: list[str]) -> list[dict[str, Any]]:
    """Nodes a step by weights, rows, and whether something is encoded in the same pass."""
    nodes_by_kind = []
    for kind in kinds:
        for rows, is_encoding in ((1, False), (1, True), (16, False)):
            with as_if(90):
                nodes = traced(kind, rows, is_encoding=is_encoding)
            kernels = Counter(node.name for node in nodes if node.is_kernel)
            rest = Counter(node.name for node in nodes if not node.is_kernel)
            nodes_by_kind.append({"kind": kind, "rows": rows, "encodes": is_encoding, "nodes": len(nodes)})
            nodes_by_kind[-1] |= {"kernels": dict(kernels), "torch": dict(rest)}
    return nodes_by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=ahead.ARCHS)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--nodes", action="store_true", help="count nodes alone, compile nothing")
    parser.add_argument("--before", type=Path, help="a record of an older version, to stand beside this one")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = arguments.kind or list(SHOWN)
    record: dict[str, Any] = {"what": "kernels", "steps": counts(kinds), "rows": []}
    for arch in [] if arguments.nodes else arguments.arch or ahead.ARCHS:
        for kind in kinds:
            common.say(f"sm_{arch} {kind}")
            record["rows"] += rows_of(kind, arch)
    if arguments.before:
        older = json.loads(arguments.before.read_text())
        record |= {"steps_before": older["steps"], "rows_before": older["rows"]}
    if arguments.output:
        common.write(arguments.output, {**record, "environment": environment()})
    print(show(record))


def show(record: dict[str, Any]) -> str:
    head = ["step", "nodes", "kernels", "torch"]
    lines = [
        [
            f"{row['kind']}, {row['rows']} rows" + (", encoding" if row["encodes"] else ""),
            *map(str, (row["nodes"], sum(row["kernels"].values()), sum(row["torch"].values()))),
        ]
        for row in record["steps"]
    ]
    text = common.table(head, lines)
    head = ["kernel", "arch", "weights", "times", "CTAs", "tile", "regs", "spills", "shared", "loop"]
    names = ("kernel", "arch", "kind", "launches", "ctas", "tiles", "registers", "spills", "shared", "loop")
    return text + "\n\n" + common.table(head, [[str(row[name]) for name in names] for row in record["rows"]])


if __name__ == "__main__":
    main()
