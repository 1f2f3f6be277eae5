"""The read-out: vocabulary product, softcap, temperature, entropy, sample, argmax. The error is the entropies'."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main

SIZES = {"mid": (256, 1024, 32768), "released": (256, 2816, 262144), "tiny": (8, 64, 512), "odd": (37, 72, 1001)}
"""Positions, width, words."""


def cases(size: str, device: str) -> Iterator[Case]:
    length, width, words = SIZES[size]
    batch = 2 if size == "odd" else 1
    uniform = torch.rand(batch, length, generator=torch.Generator(device).manual_seed(5), device=device)
    yield Case(
        f"{length} positions, {words} words",
        {
            "hidden": exactly(batch, length, width, device=device),
            "uniform": uniform,
            "temperature": torch.full((batch,), 0.8, device=device),
        },
        {},
        lambda ops, x, _: (
            lambda: ops.read_out(x["hidden"], x["embed"], 30.0, x["temperature"], uniform_BL=x["uniform"]).entropy_BL
        ),
        2.0 * batch * length * width * words,
        kept=("uniform", "temperature"),
        quantised=False,
        moved=batch * length * (width + words),
        rows=lambda x: {**x, **{name: x[name][:1] for name in ("hidden", "uniform", "temperature")}},
        dense={"embed": exactly(words, width, seed=1, scale=0.05, device=device)},
    )


if __name__ == "__main__":
    main("read_out", cases, __doc__)
