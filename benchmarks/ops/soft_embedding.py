"""The soft embedding, softmax(logits) @ E: of a first step, where all words count, and of a late one, where few do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main
from benchmarks.ops.read_out import SIZES


def cases(size: str, device: str) -> Iterator[Case]:
    length, width, words = SIZES[size]
    batch = 2 if size == "odd" else 1
    embed = exactly(words, width, seed=1, scale=0.05, device=device)
    generator = torch.Generator(device).manual_seed(6)
    chosen = torch.randint(words, (batch, length), generator=generator, device=device)
    settled = (embed[chosen] * (30.0 / (0.05**2 * width))).bfloat16().float()
    scale = torch.tensor(width**0.5, device=device)
    for name, hidden in (("early", exactly(batch, length, width, device=device)), ("settled", settled)):
        yield Case(
            f"{name}, {length} positions, {words} words",
            {"hidden": hidden, "temperature": torch.full((batch,), 0.8, device=device), "scale": scale},
            {},
            prepare,
            2.0 * batch * length * width * words,
            kept=("temperature",),
            quantised=False,
            moved=batch * length * (width + words),
            rows=lambda x: {**x, **{name: x[name][:1] for name in ("hidden", "temperature")}},
            dense={"embed": embed},
        )


def prepare(ops, x, _):  # type: ignore[no-untyped-def]
    """The read-out before it is not timed; what it learned of the tiles is used."""
    read = ops.read_out(x["hidden"], x["embed"], 30.0, x["temperature"])
    return lambda: ops.soft_embedding(read.logits_BLV, x["embed"], x["scale"], read.tiles)


if __name__ == "__main__":
    main("soft_embedding", cases, __doc__)
