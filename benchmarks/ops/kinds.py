"""Every kind of codes in one product, in turns: what each costs beside 4-bit integers in groups of 32, and beside
unpacking it with torch (`fused`), for the rows of an expert and of a canvas.

    python benchmarks/ops/kinds.py --rows 16 256

Time is that of the thread, so that other processes change ratios little; sizes are those of an expert of the release.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sfumato import ops
from sfumato.ops.packed import BLOCK, CODES, Packed
from sfumato.quant import formats

OUTPUTS, INPUTS = 1408, 2816
FLOAT8 = torch.float8_e4m3fn
GROUPS = {"int4": (16, 32, 64, 128), "iq4": (32,), "iq2": (16,), "nf4": (64,), "int8": (16, 32), "nvfp4": (16,)}
GROUPS |= {"mxfp4": (32,), "mxfp8": (32,), "fp8": (BLOCK,)}
SCALES = {"nvfp4": FLOAT8, "mxfp4": torch.uint8, "mxfp8": torch.uint8}


def weights() -> dict[str, Packed | Tensor]:
    """One of each kind by its name and group; what its codes are changes no time."""
    every: dict[str, Packed | Tensor] = {"bf16": torch.randn(OUTPUTS, INPUTS).bfloat16()}
    every |= {name: formats.pack(torch.randn(OUTPUTS, INPUTS), name) for name in ("int8", "fp8")}
    for kind, groups in GROUPS.items():
        width, dtype = INPUTS * CODES[kind].bits // 8, torch.int8 if kind == "int8" else torch.uint8
        codes = torch.zeros(OUTPUTS, width, dtype=dtype)
        for group in groups:
            rows = OUTPUTS // BLOCK if kind == "fp8" else OUTPUTS
            scale = torch.ones(rows, INPUTS // group).to(SCALES.get(kind, torch.float32))
            data = codes.view(FLOAT8) if kind in ("fp8", "mxfp8") else codes
            every[f"{kind} by {group}"] = Packed(kind, (OUTPUTS, INPUTS), data, scale, group)
    return every


def measure(rows: int, turns: int) -> None:
    x, every = torch.randn(rows, INPUTS).bfloat16(), weights()
    cpu, fused = ops.load("cpu"), ops.load("fused")
    packed = {name: cpu.pack(weight) for name, weight in every.items()}
    best: dict[tuple[str, str], float] = {}
    for turn in range(turns):
        for name, weight in every.items():
            for which, one, form in (("cpu", cpu, packed[name]), ("fused", fused, weight)):
                if which == "fused" and turn > 1:
                    continue
                start = time.thread_time()
                one.linear(x, form)
                seconds = time.thread_time() - start
                best[which, name] = min(seconds, best.get((which, name), seconds))
    print(f"\n| {rows} rows | stored, MB | time, int4 by 32 is 1 | bytes a second, int4 by 32 is 1 | fused / cpu |")
    print("| --- | ---: | ---: | ---: | ---: |")
    base, size = best["cpu", "int4 by 32"], every["int4 by 32"].nbytes
    for name, weight in every.items():
        own = best["cpu", name]
        ratios = own / base, weight.nbytes / size * base / own, best["fused", name] / own
        print(f"| {name} | {weight.nbytes / 1e6:.2f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the time of one thread is what is read
    for count in arguments.rows:
        measure(count, arguments.turns)
