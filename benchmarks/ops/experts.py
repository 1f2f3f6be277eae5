"""The routed experts: group tokens, gate and up, gelu, down, weighted sum."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main

SIZES = {
    "mid": (256, 1024, 32, 4, 384),
    "released": (256, 2816, 128, 8, 704),
    "tiny": (8, 64, 8, 2, 32),
    "odd": (37, 136, 20, 3, 72),
}
"""Tokens, width, experts, chosen, width inside."""


def cases(size: str, device: str) -> Iterator[Case]:
    tokens, width, count, top, inner = SIZES[size]
    score = torch.rand(tokens, count, generator=torch.Generator(device).manual_seed(1), device=device)
    weight, index = score.topk(top, dim=-1)
    if size == "odd":  # half of the experts stay empty
        index = index % (count // 2)
    woken = len(torch.unique(index)) / count
    yield Case(
        f"{tokens} tokens, {top} of {count} experts",
        {"x": exactly(tokens, width, device=device), "index": index, "weight": weight},
        {
            "gate_up": exactly(count, 2 * inner, width, seed=2, scale=0.05, device=device),
            "down": exactly(count, width, inner, seed=3, scale=0.05, device=device),
        },
        lambda ops, x, w: lambda: ops.experts(x["x"], x["index"], x["weight"], w["gate_up"], w["down"]),
        6.0 * tokens * top * width * inner,
        kept=("weight",),
        moved=2 * tokens * width,
        read=woken,
        rows=lambda x: {name: value[:1] for name, value in x.items()},
    )


if __name__ == "__main__":
    main("experts", cases, __doc__)
