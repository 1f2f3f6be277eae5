"""GGUF files for tests: random blocks of every kind, and what a file holds, ready to be written again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.checkpoints.formats.gguf import PlannedBlocks, read_header

SCALES = {  # where a block's float16 numbers lie
    **dict.fromkeys(["Q4_0", "Q5_0", "Q8_0"], (0,)),
    **dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], (0, 2)),
    "Q6_K": (208,),
}
HALVES = [0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 2.0**-14, 6.1e-5, 0.0123, -3.7]
"""What a scale may be: zeros, the largest, the least subnormal, the least normal, a negative one."""


def random_blocks(kind: str, rows: int, count: int, seed: int = 0, scale: float | None = None) -> Tensor:
    """Rows of blocks: random bytes, and in every float16 place one of HALVES (or `scale`, varied, where given)."""
    rng = np.random.default_rng(seed)
    size = blocks.KINDS[blocks.NUMBERS[kind]].nbytes
    raw = rng.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for at in SCALES[kind]:
        values = rng.choice(HALVES, (rows, count)) if scale is None else scale * rng.uniform(0.5, 1, (rows, count))
        raw[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


def whole(raw: Tensor) -> Iterator[Tensor]:
    """A tensor's only part."""
    yield raw


def copied(path: Path) -> tuple[dict[str, Any], list[PlannedBlocks]]:
    """What it takes to write a file again."""
    header = read_header(path)
    stored = header.tensors.values()
    return header.metadata, [PlannedBlocks(one.name, one.kind, one.shape, partial(whole, one.read())) for one in stored]
