"""Codes of 1 to 8 bits in bytes, one after another from the lowest bit on, as MLX, GPTQ and others pack them.

Words are little-endian, so that what is said of bytes holds for words of any width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CACHED = 1 << 16
"""Times eight codes that are spread at a time: their working copies stay in the processor's cache."""


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes [N, count] uint8 of words [N, W]; ValueError where the words hold fewer."""
    data = words.contiguous().view(torch.uint8)
    if data.shape[-1] * 8 < count * bits:
        raise ValueError(f"{data.shape[-1]} bytes hold fewer than {count} codes of {bits} bits")
    size = -(-count // 8) * bits
    data = torch.nn.functional.pad(data, (0, max(0, size - data.shape[-1])))
    return spread(data[..., :size], bits, 8)[..., :count]


def spread(data: Tensor, bits: int, width: int) -> Tensor:
    """[.., bits x n] bytes of codes, one after another from the lowest bit on -> the same, each in `width` bits.

    `width` is 4 or 8. Eight codes lie in one whole number: its halves move apart, then theirs, then the codes."""
    if bits == width:
        return data
    units = data.reshape(-1, bits)
    wide = torch.empty(len(units), width, dtype=torch.uint8)
    for some, to in zip(units.split(_CACHED), wide.split(_CACHED), strict=True):
        eight = some[:, 0].long()
        for place in range(1, bits):
            eight |= some[:, place].long() << 8 * place
        for half in (4, 2, 1):
            ones, pitch = (1 << half * bits) - 1, 2 * half * width
            low = sum(ones << at for at in range(0, 8 * width, pitch))
            eight = (eight & low) | (eight & ~low) << half * (width - bits)
        to.copy_((eight if width == 8 else eight.int()).view(torch.uint8).view(-1, width))
    return wide.view(*data.shape[:-1], data.shape[-1] // bits * width)


def as_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., I] in uint8 -> bytes [.., bits x I / 8] that hold them one after another, from the lowest bit on."""
    if bits == 8:
        return codes
    units = codes.unflatten(-1, (-1, 8))
    data = torch.zeros(*units.shape[:-1], bits, dtype=torch.uint8)
    for number in range(8):
        at, shift = divmod(number * bits, 8)
        data[..., at] |= units[..., number] << shift
        if shift + bits > 8:
            data[..., at + 1] |= units[..., number] >> (8 - shift)
    return data.flatten(-2)
