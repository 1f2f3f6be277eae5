"""Attention of a denoise pass: a canvas beside the cache, in both kinds of layer; and of an encode pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ops import Case, exactly, main
from sfumato.ops.contract import Ops
from sfumato.ops.masks import Mask

SIZES = {
    "mid": (256, 384, 8, {"sliding": (128, 4, 512), "full": (256, 2, None)}),
    "released": (256, 1024, 16, {"sliding": (256, 8, 1024), "full": (512, 2, None)}),
    "tiny": (8, 12, 4, {"sliding": (16, 2, 6), "full": (32, 1, None)}),
    "odd": (37, 75, 6, {"sliding": (24, 3, 20), "full": (40, 2, None)}),
}
"""New positions, cached tokens, query heads; by kind of layer: head size, key-value heads, window."""


def cases(size: str, device: str) -> Iterator[Case]:
    new, context, heads, kinds = SIZES[size]
    for kind, (head, groups, window) in kinds.items():
        for direction in ("denoise", "encode"):
            yield case(direction, kind, new, context, heads, head, groups, window, device)


def case(
    direction: str,
    kind: str,
    new: int,
    context: int,
    heads: int,
    head: int,
    groups: int,
    window: int | None,
    device: str,
) -> Case:
    ring = context if window is None else min(context, window - 1 + new)
    encode, canvas = (new, 0) if direction == "encode" else (0, new)

    def mask(rows: int) -> Mask:
        at = torch.arange(rows, device=device)
        lengths, counts = torch.full_like(at, context), torch.full_like(at, encode)
        return Mask(list(range(rows)), at, lengths, counts, encode, canvas, window, ring, min(ring, context))

    def prepare(ops: Ops, x: dict[str, Tensor], _: dict[str, Tensor]) -> Callable[[], Tensor]:
        one = mask(x["q"].shape[0])
        return lambda: ops.attention(x["q"], x["k"], x["v"], x["old_k"], x["old_v"], one)

    q = exactly(2, new, heads, head, scale=head**-0.5, device=device)
    k, v = (exactly(2, new, groups, head, seed=i, device=device) for i in (1, 2))
    old_k, old_v = (exactly(2, ring + 1, groups, head, seed=i, device=device) for i in (3, 4))
    inputs = {"q": q, "k": k, "v": v, "old_k": old_k, "old_v": old_v}

    def one_row(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[:1] for name, value in x.items()}

    held, batch = context if window is None else min(context, window - 1), 1 if new == 256 else 2
    if direction == "encode":
        in_view = sum(min(context + n, window or context + n) for n in range(1, new + 1))
    else:
        in_view = new * (held + new)
    return Case(
        f"{direction}, {kind}, {new} after {context}",
        one_row(inputs) if batch == 1 else inputs,
        {},
        prepare,
        4.0 * heads * head * in_view * batch,
        quantised=False,
        moved=batch * (2 * new * heads * head + 2 * (held + new) * groups * head),
        rows=one_row,
    )


if __name__ == "__main__":
    main("attention", cases, __doc__)
