"""Weights in fewer bits: the record that carries them, and for each format what its codes stand for.

One neutral layout, row by row as the weight itself lies, so that it can be mapped from a file: operations take it as it
is, lay it out anew (`Ops.pack`), or unpack and multiply. Each format is one `Code`, in `CODES`; how a weight is rounded
to its codes is `quant.formats`. It lacks the layouts of implementations, and those of other programs' files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

BLOCK = 128
"""Rows and columns that share a scale in our own fp8 by blocks; other files' blocks have at most so many rows here."""
_BLOCK_ROWS = tuple(BLOCK >> n for n in range(8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float; bit 3 of a code is its sign."""
_IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_IQ3, _IQ3S = (4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0), (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
_IQ2, _IQ1 = (8.0, 25.0, 43.0), (0.125, 0.875, 1.125)
"""ggml's tables; those but `_IQ4` are magnitudes, with the sign in bit 3."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [O, I], or a stack [E, O, I], in fewer bits; `..` stands for E where there is one.

    kind   data                              scale
    int8   int8 [.., O, I]                   float32 [.., O]; or by groups [.., O, I / group]
    int4   uint8 [.., O, I / 2]              [.., O, I / group], float16, bfloat16 or float32
    fp8    float8_e4m3fn [.., O, I]          float32 [.., O]; or by blocks [.., ceil(O / rows), ceil(I / group)], where
                                             rows is a power of two (`block_rows`), and a last block may be smaller
    nvfp4  uint8 [.., O, I / 2], e2m1 codes  float8_e4m3fn [.., O, I / 16]; times `factor`, float32 [.., O]
    mxfp4  uint8 [.., O, I / 2], e2m1 codes  uint8 [.., O, I / 32], exponents of two, 127 is one
    mxfp8  float8_e4m3fn [.., O, I]          uint8 [.., O, I / 32], exponents of two, 127 is one
    iq4    uint8 [.., O, I / 2]              [.., O, I / group], as int4's; so iq3, iq3s, iq2, iq1, nf4 and fp4, whose
                                             codes stand for the 16 values of a table (`Code.table`)

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
    def code(self) -> Code:
        """What its codes stand for. KeyError for a kind that there is not."""
        return CODES[self.kind]

    @property
    def is_grouped(self) -> bool:
        """Whether an output has several scales along its inputs, or scales are by blocks; else it has one."""
        return self.scale.dim() == len(self.shape)

    @property
    def block_rows(self) -> int:
        """fp8 by blocks: the outputs that share a scale, 128 or a smaller power of two; the shapes say which.

        ValueError where scales are not by blocks."""
        outputs, rows = self.shape[-2], self.scale.shape[-2] if self.is_grouped else 0
        for size in _BLOCK_ROWS:
            if -(-outputs // size) == rows:
                return size
        raise ValueError(f"scales of shape {list(self.scale.shape)} are not by blocks of {list(self.shape)}")

    def in_blocks_of(self, rows: int) -> Packed:
        """fp8 by blocks: the same weight with a scale for every `rows` outputs, a power of two up to `block_rows`."""
        each = self.block_rows // rows
        scale = self.scale.repeat_interleave(each, -2)[..., : -(-self.shape[-2] // rows), :]
        return self if each == 1 else replace(self, scale=scale.contiguous())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors, by the name of their field."""
        fields = {"data": self.data, "scale": self.scale, "bias": self.bias, "factor": self.factor}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `contract.Weight`: those of `parts`."""
        return tuple(self.parts.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(part.nbytes for part in self.tensors)

    @property
    def stored(self) -> str:
        """See `contract.Weight`."""
        return self.kind

    @property
    def product(self) -> str | None:
        """See `contract.Weight`."""
        return self.code.product_of(self)

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.data.device

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that these codes stand for, computed in float32 and rounded once to `dtype`."""
        return self.code.unpack(self).to(dtype)

    def round_input(self, x: Tensor) -> Tensor:
        """The left side of a product with this weight as its format defines it."""
        return self.code.round_input(x)

    def each(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Packed:
        """This with every tensor changed."""
        tensors: dict[str, Any] = {name: change(part) for name, part in self.parts.items()}
        return replace(self, shape=shape or self.shape, **tensors)

    def to(self, device: torch.device | str) -> Packed:
        """This on another device."""
        return self.each(lambda part: part.to(device))

    def __getitem__(self, expert: int) -> Packed:
        """One matrix of a stack."""
        return self.each(lambda part: part[expert], self.shape[1:])


# ---- what the codes of a format stand for ----------------------------------------------------------------------------


class Grid(NamedTuple):
    """What a code can stand for before scale and bias."""

    values: Tensor
    """Finite and ascending, float32."""
    codes: Tensor
    """The code of each, uint8."""
    zero: int
    """A byte that holds nothing but zeros."""
    one: int
    """A byte that holds nothing but ones."""


class Code(ABC):
    """The definition of one format's codes.

    A new format is a subclass here, listed in `CODES`, and a packer in `quant.formats`; an implementation without
    kernels for it either unpacks it or refuses it."""

    name: str
    bits: ClassVar[int]
    least: ClassVar[int] = 1
    """Inputs that are packed together at least."""
    product: ClassVar[str | None] = None
    """The number format in which a weight with one scale an output is multiplied; None: it is unpacked to x's."""
    table: tuple[float, ...] | None = None
    """What each of 16 codes stands for before its scale, nan for one that does not occur; None: codes are numbers."""

    @abstractmethod
    def unpack(self, packed: Packed) -> Tensor:
        """The weight, in float32."""

    @abstractmethod
    def grid(self, packed: Packed) -> Grid:
        """The finite values that codes of this weight can stand for, on its device."""

    def round_input(self, x: Tensor) -> Tensor:
        """The left side of a product: x as it is."""
        return x

    def product_of(self, packed: Packed) -> str | None:
        """`product`, or None where this weight is unpacked all the same."""
        return self.product


class _Int8Code(Code):
    name, bits, product = "int8", 8, "int8"

    def unpack(self, packed: Packed) -> Tensor:
        if not packed.is_grouped:
            return packed.data.float() * packed.scale[..., None]
        return _scaled(packed, packed.data.reshape(_in_groups(packed)).float(), packed.scale)

    def grid(self, packed: Packed) -> Grid:
        whole = torch.arange(-127, 128, dtype=torch.int8)
        return _grid(packed, whole.float(), whole.view(torch.uint8), 0, 1)

    def product_of(self, packed: Packed) -> str | None:
        return None if packed.is_grouped else self.product


class _Int4Code(Code):
    name, bits, least = "int4", 4, 2

    def unpack(self, packed: Packed) -> Tensor:
        values = torch.arange(16, dtype=torch.float32, device=packed.device) - self._zero(packed)
        return _scaled(packed, _looked_up(packed, values), packed.scale)

    def grid(self, packed: Packed) -> Grid:
        zero, codes = self._zero(packed), torch.arange(16, dtype=torch.uint8)
        return _grid(packed, codes.float() - zero, codes, 0x11 * zero, 0x11 * (zero + 1))

    @staticmethod
    def _zero(packed: Packed) -> int:
        """The code that stands for zero, before the bias."""
        return 0 if packed.bias is not None else 8


class _FP8Code(Code):
    name, bits, product = "fp8", 8, "fp8"

    def unpack(self, packed: Packed) -> Tensor:
        scale = packed.scale
        if not packed.is_grouped:
            return packed.data.float() * scale[..., None]
        wide = scale.repeat_interleave(packed.group, -1)[..., : packed.shape[-1]]
        return packed.data.float() * wide.repeat_interleave(packed.block_rows, -2)[..., : packed.shape[-2], :]

    def grid(self, packed: Packed) -> Grid:
        codes = torch.arange(256, dtype=torch.uint8)
        return _grid(packed, codes.view(torch.float8_e4m3fn).float(), codes, 0, 0x38)

    def round_input(self, x: Tensor) -> Tensor:
        """Each row rounded to e4m3 with a scale of its own (W8A8, "dynamic activations")."""
        x32 = x.float()
        scale = x32.abs().amax(-1, keepdim=True) / 448.0
        scale = torch.where(scale > 0, scale, 1.0)
        return ((x32 / scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


class _TableCode(Code):
    """Codes of four bits that stand for the values of a table, times the scale of their group."""

    bits, least = 4, 2

    def __init__(self, name: str, table: tuple[float, ...]) -> None:
        self.name, self.table = name, table

    def unpack(self, packed: Packed) -> Tensor:
        return _scaled(packed, _looked_up(packed, self._values(packed.device)), self._scale(packed))

    def grid(self, packed: Packed) -> Grid:
        codes, values = torch.arange(16, dtype=torch.uint8), self._values("cpu")
        one = int(values.sub(1).abs().nan_to_num(torch.inf).argmin())
        zero = int(values.abs().nan_to_num(torch.inf).argmin())
        return _grid(packed, values, codes, 0x11 * zero, 0x11 * one)

    def _values(self, device: torch.device | str) -> Tensor:
        return torch.tensor(self.table, device=device)

    def _scale(self, packed: Packed) -> Tensor:
        return packed.scale


class _NVFP4Code(_TableCode):
    least = 16


class _MXFP4Code(_TableCode):
    least = 32

    def _scale(self, packed: Packed) -> Tensor:
        return power_of_two(packed.scale)


class _MXFP8Code(Code):
    name, bits, least = "mxfp8", 8, 32

    def unpack(self, packed: Packed) -> Tensor:
        return _scaled(packed, packed.data.float().reshape(_in_groups(packed)), power_of_two(packed.scale))

    def grid(self, packed: Packed) -> Grid:
        codes = torch.arange(256, dtype=torch.uint8)
        return _grid(packed, codes.view(torch.float8_e4m3fn).float(), codes, 0, 0x38)


def _signed(sizes: tuple[float, ...]) -> tuple[float, ...]:
    """The table of codes whose bit 3 is the sign of up to 8 sizes."""
    sizes = (*sizes, *[math.nan] * (8 - len(sizes)))
    return (*sizes, *(-size for size in sizes))


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The quantiles of a normal distribution that QLoRA takes (arXiv 2305.14314, appendix E)."""
_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""bitsandbytes' own 4-bit float; magnitudes."""
CODES: dict[str, Code] = {
    code.name: code
    for code in (
        *(_Int8Code(), _Int4Code(), _FP8Code(), _MXFP8Code()),
        *(_NVFP4Code("nvfp4", _signed(E2M1)), _MXFP4Code("mxfp4", _signed(E2M1))),
        *(_TableCode("iq4", _IQ4), _TableCode("iq3", _signed(_IQ3)), _TableCode("iq3s", _signed(_IQ3S))),
        *(_TableCode("iq2", _signed(_IQ2)), _TableCode("iq1", _signed(_IQ1))),
        *(_TableCode("nf4", _NF4), _TableCode("fp4", _signed(_FP4))),
    )
}
"""The formats there are, by `Packed.kind`."""


def e2m1_values(device: torch.device | str = "cpu") -> Tensor:
    """What the 16 codes of a 4-bit float stand for, [16] in float32."""
    return torch.tensor(_signed(E2M1), device=device)


def paired(codes: Tensor) -> Tensor:
    """Codes of four bits [.., I], two a byte [.., I / 2]: the low half is the even one."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpaired(data: Tensor) -> Tensor:
    """`paired` undone: the codes [.., I] of bytes [.., I / 2]."""
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def power_of_two(exponent: Tensor) -> Tensor:
    """What e8m0 codes stand for, in float32: 2^(code - 127); 255 is nan."""
    bits = torch.where(exponent == 0, 1 << 22, exponent.int() << 23)  # 2^-127 lies among the subnormal numbers
    return torch.where(exponent == 255, 0x7FC00000, bits).int().view(torch.float32)


def _in_groups(packed: Packed) -> tuple[int, ...]:
    return (*packed.shape[:-1], -1, packed.group)


def _looked_up(packed: Packed, values: Tensor) -> Tensor:
    """What the codes of bytes of two stand for, in their groups: one look-up a byte."""
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)
    return embedding(packed.data.int(), pairs).reshape(_in_groups(packed))


def _scaled(packed: Packed, value: Tensor, scale: Tensor) -> Tensor:
    """Values in groups times their scale, in their place, with bias and factor where there are any."""
    value.mul_(scale.float()[..., None])
    if packed.bias is not None:
        value += packed.bias.float()[..., None]
    if packed.factor is not None:
        value *= packed.factor[..., None, None]
    return value.reshape(packed.shape)


def _grid(packed: Packed, values: Tensor, codes: Tensor, zero: int, one: int) -> Grid:
    is_number = values.isfinite()
    values, order = values[is_number].sort()
    return Grid(values.to(packed.device), codes[is_number][order].to(packed.device), zero, one)
