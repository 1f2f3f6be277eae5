"""What the blocks of every kind of GGUF are taken apart with: bit fields, and float16 numbers.

A block is uint8 [.., bytes of a block], many at a time; what comes out lies as `Packed` wants it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class BlockParts(NamedTuple):
    """What rows of blocks say, as the fields of a `Packed`."""

    kind: str
    data: Tensor
    """[.., I], or [.., I / 2] for kinds of four bits."""
    scale: Tensor
    """[.., I / group]"""
    group: int
    bias: Tensor | None = None


def fields(data: Tensor, run: int, bits: int) -> Tensor:
    """The bit fields of bytes [.., n]: a run of bytes gives the lowest field of each, then the next of each, and on."""
    runs = data.unflatten(-1, (-1, run))
    return torch.stack([runs >> low & (1 << bits) - 1 for low in range(0, 8, bits)], dim=-2).flatten(-3)


def flags(data: Tensor) -> Tensor:
    """The bits of each byte, the lowest first."""
    return fields(data, 1, 1)


def paired_fields(data: Tensor, run: int, bits: int) -> Tensor:
    """The same, two codes a byte as `packed.paired` has them; fields of two neighbours move together. Runs are even."""
    pairs = words(data, torch.int16).unflatten(-1, (-1, run // 2))
    mask = 0x101 * ((1 << bits) - 1)
    apart = [pairs >> low & mask for low in range(0, 8, bits)]
    return torch.stack([(one | one >> 4).to(torch.uint8) for one in apart], dim=-2).flatten(-3)


def halves(block: Tensor, at: int) -> Tensor:
    """The float16 at this byte of every block, as the scale of all of a block: [.., blocks]."""
    return words(block[..., at : at + 2], torch.float16).flatten(-2)


def half(block: Tensor, at: int) -> Tensor:
    """The same in float32, to be multiplied by what each group has: [.., blocks, 1]."""
    return words(block[..., at : at + 2], torch.float16).float()


def words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers of this dtype, or back; a whole number with its highest bit set comes out negative.

    They are copied even where they lie together, since they may begin at a place where no such number can."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)
