"""Weights in fewer bits: the record that carries them, what it stands for, and how a product meets it.

One neutral layout, row by row as the weight itself lies, so that it can be mapped from a file: operations take it as it
is, lay it out anew (`Ops.pack`), or unpack and multiply. How a weight comes into it is `quant.formats`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

KINDS = ("int8", "int4", "fp8", "nvfp4", "mxfp4")
BLOCK = 128
"""Rows and columns that share a scale in fp8 by blocks."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float; bit 3 of a code is its sign."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [O, I], or a stack [E, O, I], in fewer bits; `..` stands for E where there is one.

    kind   data                              scale
    int8   int8 [.., O, I]                   float32 [.., O]; or by groups [.., O, I / group]
    int4   uint8 [.., O, I / 2]              [.., O, I / group], float16, bfloat16 or float32
    fp8    float8_e4m3fn [.., O, I]          float32 [.., O]; or by blocks [.., ceil(O / 128), ceil(I / 128)], group 128
    nvfp4  uint8 [.., O, I / 2], e2m1 codes  float8_e4m3fn [.., O, I / 16]; times `factor`, float32 [.., O]
    mxfp4  uint8 [.., O, I / 2], e2m1 codes  uint8 [.., O, I / 32], exponents of two, 127 is one

    In a byte of two codes the low half is the even input. Without `bias` an int4 code stands for code - 8, from 0 to
    15; with one, of scale's shape and dtype, value = code x scale + bias, and so for int8 by groups, whose data is then
    uint8."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor
    group: int
    """Inputs that share a scale; all of them, I, where there is one an output."""
    bias: Tensor | None = None
    factor: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors, by the name of their field."""
        found = {"data": self.data, "scale": self.scale, "bias": self.bias, "factor": self.factor}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        return self.data.device

    def each(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Packed:
        """This with every tensor changed."""
        tensors: dict[str, Any] = {name: change(part) for name, part in self.parts.items()}
        return replace(self, shape=shape or self.shape, **tensors)

    def to(self, device: torch.device | str) -> Packed:
        return self.each(lambda part: part.to(device))

    def __getitem__(self, expert: int) -> Packed:
        """One matrix of a stack."""
        return self.each(lambda part: part[expert], self.shape[1:])


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that these codes stand for, computed in float32 and rounded once to `dtype`."""
    rows = (*packed.shape[:-1], -1, packed.group)
    scale = packed.scale
    if packed.kind == "fp8" and packed.group == BLOCK and scale.shape != packed.shape[:-1]:
        wide = scale.repeat_interleave(BLOCK, -1)[..., : packed.shape[-1]]
        return (packed.data.float() * wide.repeat_interleave(BLOCK, -2)[..., : packed.shape[-2], :]).to(dtype)
    if packed.kind in ("int8", "fp8") and scale.dim() < len(packed.shape):
        return (packed.data.float() * scale[..., None]).to(dtype)
    if packed.kind == "int8":
        code = packed.data.reshape(rows).float()
    else:
        code = torch.stack([packed.data & 15, packed.data >> 4], dim=-1).reshape(rows)
    if packed.kind == "int4":
        code = code.float() if packed.bias is not None else code.float() - 8
    elif packed.kind in ("nvfp4", "mxfp4"):
        table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)
        code = table[code.int()]
        scale = power_of_two(scale) if packed.kind == "mxfp4" else scale
    value = code * scale.float()[..., None]
    if packed.bias is not None:
        value += packed.bias.float()[..., None]
    if packed.factor is not None:
        value *= packed.factor[..., None, None]
    return value.reshape(packed.shape).to(dtype)


def dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """A weight that may be packed, in this dtype."""
    return unpack(weight, dtype) if isinstance(weight, Packed) else weight


def met_by(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """The left side of a product as this weight meets it: fp8 rounds each row of it to e4m3 too (W8A8, "dynamic
    activations"); everything else leaves it alone."""
    if not isinstance(weight, Packed) or weight.kind != "fp8":
        return x
    x32 = x.float()
    scale = x32.abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale > 0, scale, 1.0)
    return ((x32 / scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """What e8m0 codes stand for, in float32: 2^(code - 127); 255 is nan."""
    bits = torch.where(exponent == 0, 1 << 22, exponent.int() << 23)  # 2^-127 lies among the subnormal numbers
    return torch.where(exponent == 255, 0x7FC00000, bits).int().view(torch.float32)
