"""linear (several products of one input) and the dense feed-forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main

SIZES = {
    "mid": (256, 1024, (1024, 512, 512), 768),
    "released": (256, 2816, (4096, 2048, 2048), 2112),
    "tiny": (8, 64, (64, 32, 32), 96),
    "odd": (37, 200, (72, 17, 40), 104),
}
"""Rows, width, outputs of queries, keys and values, width inside the feed-forward."""


def cases(size: str, device: str) -> Iterator[Case]:
    rows, width, outputs, inner = SIZES[size]
    x = {"x": exactly(rows, width, device=device)}
    weights = {f"w{i}": exactly(n, width, seed=i, scale=0.05, device=device) for i, n in enumerate(outputs, 1)}
    yield Case(
        f"queries, keys, values, {rows} rows",
        x,
        weights,
        lambda ops, x, w: lambda: _joined(ops.linear(x["x"], *w.values())),
        2.0 * rows * width * sum(outputs),
        moved=rows * (width + sum(outputs)),
        rows=lambda x: {"x": x["x"][:1]},
    )
    three = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    weights = {
        name: exactly(*shape, seed=i, scale=0.05, device=device) for i, (name, shape) in enumerate(three.items())
    }
    yield Case(
        f"feed-forward, {rows} rows",
        x,
        weights,
        lambda ops, x, w: lambda: ops.feed_forward(x["x"], w["gate"], w["up"], w["down"]),
        6.0 * rows * width * inner,
        moved=2 * rows * width,
        rows=lambda x: {"x": x["x"][:1]},
    )


def _joined(outs: Sequence[Tensor]) -> Tensor:
    """The last of them; all were computed."""
    return outs[-1]


if __name__ == "__main__":
    main("linear", cases, __doc__)
