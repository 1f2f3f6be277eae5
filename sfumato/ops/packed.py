"""Weights in fewer bits: quantise, unpack, and the record that carries them.

The layout of the Triton back end; `cpu` has its own. `int8` and `fp8` have one scale an output channel; `int4` has one
for each group of inputs, two weights a byte. All three are symmetric: value = code x scale. This is the arithmetic
alone: no calibration, no file format, no choice of what to quantise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.events import InputError

KINDS = ("int8", "fp8", "int4")
GROUPS = (32, 64, 128)
_CHUNK = 1 << 24
"""Weights that are in float32 at one time: a stack of experts would not fit beside itself."""
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""int4: parts of the largest weight at which the range of a group may end."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [O, I], or a stack [E, O, I], in fewer bits.

    kind   data                              scale
    int8   int8 [.., O, I]                   float32 [.., O]
    fp8    float8_e4m3fn [.., O, I]          float32 [.., O]
    int4   uint8 [.., O, I / 2], code + 8;   float16 or bfloat16 [.., O, I / group]
           low half of a byte: even input
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor
    group: int
    """Weights that share a scale: I for int8 and fp8."""

    @property
    def bytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> Packed:
        return replace(self, data=self.data.to(device), scale=self.scale.to(device))


def quantise(weight: Tensor, kind: str, group: int = 64) -> Packed:
    """A weight [O, I] or [E, O, I] in this kind. `group` (int4) is 32, 64 or 128, and is lowered to what divides I.

    InputError: an unknown kind or group, a shape that cannot be packed, weights that are not finite."""
    if kind not in KINDS:
        raise InputError(f"there is no kind of weight {kind!r}; choose one of {', '.join(KINDS)}")
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise InputError(
            f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be packed;"
            " give floats [O, I] or [E, O, I]"
        )
    inputs = weight.shape[-1]
    if kind == "int4":
        if group not in GROUPS:
            raise InputError(f"an int4 group of {group} weights is not supported; choose one of 32, 64, 128")
        if inputs % 2:
            raise InputError(f"int4 packs two inputs a byte and this weight has {inputs}; keep it in int8 or fp8")
        group = math.gcd(group, inputs)
    else:
        group = inputs
    rows = weight.reshape(-1, group)
    largest = torch.cat([part.abs().amax(-1).float() for part in _parts(rows)])
    if not bool(torch.isfinite(largest).all()):
        bad = sum(int((~torch.isfinite(part)).sum()) for part in _parts(rows))
        raise InputError(
            f"{bad} of the {weight.numel()} weights are not finite (nan or infinity); repair the checkpoint first"
        )
    shape = tuple(weight.shape)
    if kind == "int4":
        store = _scale_dtype(largest)
        pairs = [_nibbles(part.float(), store) for part in _parts(rows)]
        data = torch.cat([code for code, _ in pairs]).reshape(*shape[:-1], inputs // 2)
        return Packed(kind, shape, data, torch.cat([s for _, s in pairs]).reshape(*shape[:-1], inputs // group), group)
    top, store = (127.0, torch.int8) if kind == "int8" else (448.0, torch.float8_e4m3fn)
    scale = largest / top
    codes, at = [], 0
    for part in _parts(rows):
        divisor = _no_zero(scale[at : at + len(part)])[:, None]
        code = (part.float() / divisor).clamp_(-top, top)
        codes.append((code.round_() if kind == "int8" else code).to(store))
        at += len(part)
    return Packed(kind, shape, torch.cat(codes).reshape(shape), scale.reshape(shape[:-1]), group)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that these codes stand for, computed in float32 and rounded once to `dtype`."""
    if packed.kind == "int4":
        low, high = packed.data & 15, packed.data >> 4
        code = torch.stack([low, high], dim=-1).reshape(*packed.scale.shape, packed.group).float() - 8
        return (code * packed.scale.float()[..., None]).reshape(packed.shape).to(dtype)
    return (packed.data.float() * packed.scale[..., None]).to(dtype)


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _CHUNK // rows.shape[-1]))


def _no_zero(scale: Tensor) -> Tensor:
    """A row of zeros has scale 0; it is divided by 1."""
    return torch.where(scale > 0, scale, 1.0)


def _scale_dtype(largest: Tensor) -> torch.dtype:
    """float16 has three more bits; bfloat16 takes over where some scale would leave float16's normal numbers."""
    smallest = torch.where(largest > 0, largest, torch.inf).amin()
    fits = bool(largest.amax() / 7 < 65000) and bool(smallest * min(_CLIPS) / 7 >= 2**-14)
    return torch.float16 if fits else torch.bfloat16


def _nibbles(rows: Tensor, store: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and scales of these groups. Of a few ends of the range, each group takes the one with the
    least squared error: rounding loses less in a narrower range than clipping one weight costs."""
    largest = rows.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    codes, scales = torch.zeros_like(rows, dtype=torch.uint8), torch.zeros_like(largest, dtype=store)
    for clip in _CLIPS:
        # Codes are chosen for the scale as it will be stored, so that its rounding costs next to nothing.
        scale = (largest * (clip / 7)).to(store)
        divisor = _no_zero(scale.float())
        exact = rows / divisor[:, None]
        code = exact.round().clamp_(-8, 7)
        # Relative to the group's largest: the squares of weights near 1e30 or 1e-30 are no numbers.
        error = ((code - exact) * (divisor / _no_zero(largest))[:, None]).pow_(2).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better[:, None], (code + 8).to(torch.uint8), codes)
        scales = torch.where(better, scale, scales)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales
