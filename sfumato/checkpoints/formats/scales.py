"""What scales beside codes must be, whichever tool wrote them: shapes and dtypes from headers, finite when read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed, power_of_two

SCALES = ("BF16", "F16", "F32")
EXPONENTS = ("U8", "F8_E8M0")
"""Scales that are powers of two: bytes of exponents, 127 is one and 255 is nan."""


@dataclass(frozen=True)
class Codes:
    """What codes and scales of a file are together, as an entry has them."""

    stored: str
    """What the format calls itself, as `Entry.stored`."""
    shape: tuple[int, ...]
    """Of the weight, [O, I] or [E, O, I]."""
    packed: Callable[[int, int], Packed] | None
    read: Callable[[int, int], Tensor] | None = None
    """Where it is not just what `packed` unpacks to."""
    fallback: str | None = None
    """See `Entry`."""

    def values(self, first: int, last: int) -> Tensor:
        """See `Entry.read`."""
        if self.read is not None:
            return self.read(first, last)
        assert self.packed is not None
        return self.packed(first, last).dense()


def need(scale: Stored, codes: Stored, dtypes: Sequence[str], shapes: set[tuple[int, ...]]) -> None:
    """CheckpointError where scales have none of these dtypes and shapes."""
    if scale.dtype not in dtypes or scale.shape not in shapes:
        raise CheckpointError(
            f"{scale.name} in {scale.file} is {short(scale.dtype)} of shape {short(list(scale.shape))}; beside "
            f"{codes.dtype} of shape {list(codes.shape)} it must be {' or '.join(dtypes)}"
            + (f" of shape {' or '.join(str(list(shape)) for shape in sorted(shapes))}" if shapes else "")
        )


def finite(scale: Stored, first: int = 0, last: int | None = None) -> Tensor:
    """Scales as they are stored; exponents as bytes. CheckpointError where one is no finite number."""
    values = scale.read(first, last)
    if scale.dtype in EXPONENTS:
        values = values.view(torch.uint8)
        is_fine = values != 255
    else:
        is_fine = torch.isfinite(values.float())
    if not bool(is_fine.all()):
        raise CheckpointError(f"{scale.name} in {scale.file} has scales that are not finite numbers; it is damaged")
    return values


def in_float32(scale: Stored, first: int = 0, last: int | None = None) -> Tensor:
    """Finite scales in float32, exponents as the powers of two that they stand for."""
    values = finite(scale, first, last)
    return power_of_two(values) if scale.dtype in EXPONENTS else values.float()
