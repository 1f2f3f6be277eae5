"""ops/masks.py: what each position of a pass sees, drawn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
import torch

from sfumato.ops.masks import Mask


def mask_of(lengths: Sequence[int], counts: Sequence[int], encode: int, canvas: int, window: int, ring: int) -> Mask:
    rows, used = list(range(len(lengths))), min(ring, max(lengths))
    return Mask(
        rows, torch.tensor(rows), torch.tensor(lengths), torch.tensor(counts), encode, canvas, window, ring, used
    )


def drawn(mask: Mask, row: int, *names: str) -> str:
    """What a row's positions see, as `Mask` draws it; names are those of the slots, of the encoded and of the canvas,
    "-" for padding, which has no line of its own."""
    groups = [group for group in names if group]
    ends = torch.tensor([len(group) for group in groups]).cumsum(0)
    lines = ["    " + " | ".join(" ".join(group) for group in groups)]
    for name, is_visible in zip("".join(names[1:]), mask.dense_BTS()[row], strict=True):
        cells = [" ".join(".x"[flag] for flag in part) for part in is_visible.int().tensor_split(ends[:-1])]
        lines += [f"{name}   " + " | ".join(cells)] if name != "-" else []
    return "\n".join("    " + line for line in lines)


@pytest.mark.parametrize(("cached", "encoded", "canvas"), [("ab", "cde", ""), ("abc", "", "uvw"), ("ab", "cd", "uvw")])
def test_a_mask_is_what_its_docstring_draws(cached: str, encoded: str, canvas: str) -> None:
    mask = mask_of([len(cached)], [len(encoded)], len(encoded), len(canvas), window=3, ring=8)
    assert drawn(mask, 0, cached, encoded, canvas) in (inspect.getdoc(Mask) or "")


TURNED = """\
        e b c d | f - | u v
    f   x . . x | x . | . .
    u   x . . . | x . | x x
    v   x . . . | x . | x x"""

NOTHING_NEW = """\
        a b . . | - - | u v
    u   x x . . | . . | x x
    v   x x . . | . . | x x"""


def test_a_mask_follows_the_ring_and_skips_padding() -> None:
    """A row whose ring of four has turned and that brings one of two tokens, beside one that brings none."""
    mask = mask_of([5, 2], [1, 0], encode=2, canvas=2, window=3, ring=4)
    assert drawn(mask, 0, "ebcd", "f-", "uv") == TURNED
    assert drawn(mask, 1, "ab..", "--", "uv") == NOTHING_NEW
