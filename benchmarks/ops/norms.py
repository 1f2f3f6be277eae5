"""Norms, rope, residual joins and the router: what is bound by memory and by the number of calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main
from sfumato.ops.contract import JoinNorms

SIZES = {
    "mid": (256, 1024, 8, 128, 32, 4),
    "released": (256, 2816, 16, 256, 128, 8),
    "tiny": (8, 64, 4, 16, 8, 2),
    "odd": (37, 200, 3, 24, 20, 3),
}
"""Rows, width, heads, head size, experts, chosen."""
EPS = 1e-6


def cases(size: str, device: str) -> Iterator[Case]:
    rows, width, heads, head, count, top = SIZES[size]

    def of(name: str, inputs, dense, prepare, moved: float, flops: float = 0.0) -> Case:  # type: ignore[no-untyped-def]
        first = lambda x: {name: value[:1] for name, value in x.items()}  # noqa: E731
        return Case(name, inputs, {}, prepare, flops, quantised=False, moved=moved, rows=first, dense=dense)

    x, y, z = (exactly(rows, width, seed=i, device=device) for i in range(3))
    a, b, c = (exactly(width, seed=i, device=device) for i in (3, 4, 5))
    yield of(
        "rms_norm", {"x": x}, {"a": a}, lambda ops, x, _: lambda: ops.rms_norm(x["x"], x["a"], EPS), 2 * rows * width
    )
    yield of(
        "norm_add",
        {"x": x, "y": y},
        {"a": a},
        lambda ops, x, _: lambda: ops.norm_add(x["x"], x["y"], x["a"], EPS),
        3 * rows * width,
    )
    yield of(
        "join",
        {"x": x, "y": y, "z": z},
        {"a": a, "b": b, "c": c, "one": torch.ones(1, device=device)},
        lambda ops, x, _: lambda: ops.join(x["x"], x["y"], x["z"], JoinNorms(x["a"], x["b"], x["c"]), EPS, x["one"]),
        4 * rows * width,
    )
    turns = torch.arange(rows, device=device)[:, None] * torch.rand(head // 2, device=device)
    angles = torch.cat([turns, turns], dim=-1)[None]
    yield Case(
        "norm_rope",
        {"x": exactly(1, rows, heads, head, device=device), "cos": angles.cos(), "sin": angles.sin()},
        {},
        lambda ops, x, _: lambda: ops.norm_rope(x["x"], x["head"], EPS, x["cos"], x["sin"]),
        0.0,
        quantised=False,
        moved=2 * rows * heads * head,
        rows=lambda x: {name: value[:, :1] for name, value in x.items()},
        dense={"head": exactly(head, seed=6, device=device)},
    )
    yield of(
        "route",
        {"x": x},
        {
            "a": a,
            "router": exactly(count, width, seed=7, scale=0.05, device=device),
            "each": torch.ones(count, device=device),
        },
        lambda ops, x, _: lambda: ops.route(x["x"], x["a"], x["router"], x["each"], top, EPS)[1],
        rows * width,
        2.0 * rows * width * count,
    )


if __name__ == "__main__":
    main("norms", cases, __doc__)
