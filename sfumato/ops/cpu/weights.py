"""Weights as the compiled library takes them: in panels of its own order, or in groups as they lie.

float32, bfloat16 and int8 with one scale an output are laid out once (`Panels`); weights in groups, in 4 bits or 8,
stay `Packed`. What these operations cannot take is refused by name.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_long, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import Matrix
from sfumato.ops.cpu import build
from sfumato.ops.cpu.calls import NUMBER_TYPES, call, pointer
from sfumato.ops.cpu.memory import empty_huge
from sfumato.ops.packed import Packed

_KINDS = (torch.float32, torch.bfloat16, torch.int8)
"""Dtypes of panels, as the library numbers them."""
_TILE_INPUTS = (16, 32, 64)
"""Inputs of a tile, by the same numbers."""
_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of a group's scale and bias, as the library numbers them."""
_GROUPS = {"int8": (16, 32, 64, 128), "int4": (32, 64, 128)}
"""The kinds of codes that the library takes, and the groups it takes of each."""


@dataclass(frozen=True)
class Panels:
    """A weight [O, I] or a stack [E, O, I] in panels of 32 outputs, as the library reads it."""

    kind: int
    """0 float32, 1 bfloat16, 2 int8."""
    shape: tuple[int, ...]
    data: Tensor
    """Bytes."""
    scale: Tensor | None
    """int8: float32, one an output."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Panels, and scales where there are any."""
        return (self.data,) if self.scale is None else (self.data, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of panels and scales."""
        return sum(part.nbytes for part in self.tensors)

    @property
    def stored(self) -> str | None:
        """See `contract.Weight`."""
        return None if self.scale is None else "int8"

    @property
    def product(self) -> str | None:
        """See `contract.Weight`."""
        return self.stored

    def each(self, change: Callable[[Tensor], Tensor]) -> Panels:
        """This with every tensor changed."""
        return Panels(self.kind, self.shape, change(self.data), None if self.scale is None else change(self.scale))

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its own order: what the products multiply with, rounded once to `dtype`."""
        outputs, inputs = self.shape[-2:]
        width, group = _TILE_INPUTS[self.kind], _TILE_INPUTS[self.kind] // 16
        panels, tiles = -(-outputs // 32), -(-inputs // width)
        # panel, k tile, half, word, output, part
        laid = self.data.view(_KINDS[self.kind]).view(-1, panels, tiles, 2, 16, 16, group)
        plain = laid.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, panels * 32, tiles * width)[:, :outputs, :inputs].float()
        plain = plain.reshape(self.shape)
        return (plain if self.scale is None else plain * self.scale[..., None]).to(dtype)

    def round_input(self, x: Tensor) -> Tensor:
        """See `contract.Weight`; that int8 rounds the rows of its input is this implementation's own."""
        return x

    def __getitem__(self, expert: int) -> Panels:
        """One matrix of a stack."""
        scale = None if self.scale is None else self.scale[expert]
        return Panels(self.kind, self.shape[1:], self.data.view(self.shape[0], -1)[expert], scale)

    @functools.cached_property
    def operand(self) -> Operand:
        """This as an argument; made once, as its memory stays where it is."""
        return Operand(self.data.data_ptr(), pointer(self.scale), None, self.kind, 0, 0)

    def __reduce__(self) -> Any:  # a copy has memory of its own
        return Panels, (self.kind, self.shape, self.data, self.scale)


class Operand(ctypes.Structure):
    """A weight as an argument: `Operand` of packing.h."""

    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        *((name, c_long) for name in ("kind", "group", "store")),
    ]


def operands(*weights: Matrix | None) -> ctypes.Array[Operand]:
    """These weights as one argument; None is an operand of nulls."""
    return (Operand * len(weights))(*map(_operand, weights))


def _operand(weight: Matrix | None) -> Operand:
    if weight is None:
        return Operand()
    if isinstance(weight, Panels):
        return weight.operand
    if not isinstance(weight, Packed):
        raise InputError("the cpu operations take weights that they have packed; call Model.pack_ first")
    where = weight.data.data_ptr(), weight.scale.data_ptr(), pointer(weight.bias)
    return Operand(*where, weight.code.bits, weight.group, _STORED[weight.scale.dtype])


def check_alike(gate: Matrix, up: Matrix) -> None:
    """InputError where gate and up are packed in two ways: one product takes both."""
    kinds = [(getattr(one, "kind", None), one.group if isinstance(one, Packed) else 0) for one in (gate, up)]
    if kinds[0] != kinds[1]:
        raise InputError(f"gate and up are packed as {kinds[0]} and {kinds[1]}; pack both alike, or choose ops='fused'")


def pack(weight: Matrix) -> Panels | Packed:
    """A weight as these operations take it; InputError for one that they cannot.

    int8 with a scale an output rounds what it multiplies the same way, a scale a row; weights in groups multiply
    bfloat16."""
    if isinstance(weight, Panels):
        return weight
    if isinstance(weight, Packed):
        if reason := refusal(weight):
            raise InputError(
                f"the cpu operations cannot take {reason}; choose ops='fused', or quantize='int8' or 'int4'"
            )
        if weight.is_grouped:
            return weight if all(t.is_contiguous() for t in weight.tensors) else weight.each(Tensor.contiguous)
        return _in_panels(weight.data, weight.scale.contiguous())
    if not isinstance(weight, Tensor):
        raise InputError(f"the cpu operations cannot take a {type(weight).__name__}; choose ops='fused'")
    if weight.dtype not in NUMBER_TYPES:
        raise InputError(f"the cpu operations take float32 and bfloat16 weights, not {weight.dtype}")
    return _in_panels(weight.detach(), None)


def refusal(weight: Packed) -> str | None:
    """What these operations cannot take about a weight, as the object of a sentence; None where they take it."""
    if weight.kind not in _GROUPS:
        return f"{weight.kind} weights"
    if not weight.is_grouped:
        return None
    if weight.group not in _GROUPS[weight.kind] or weight.shape[-1] % weight.group:
        return f"{weight.kind} weights in groups of {weight.group} along {weight.shape[-1]} inputs"
    is_known = weight.scale.dtype in _STORED and (weight.bias is None or weight.bias.dtype == weight.scale.dtype)
    return None if is_known else f"scales and biases of {weight.scale.dtype}"


def _in_panels(weight: Tensor, scale: Tensor | None) -> Panels:
    kind, (outputs, inputs) = _KINDS.index(weight.dtype), weight.shape[-2:]
    count = weight.numel() // (outputs * inputs)
    size = build.library().sf_packed_bytes(kind, c_long(outputs), c_long(inputs))
    data = empty_huge(count * size)
    source = weight.contiguous()
    for n in range(count):
        start = source.data_ptr() + n * outputs * inputs * source.element_size()
        call("sf_pack", kind, c_void_p(start), outputs, inputs, c_void_p(data.data_ptr() + n * size))
    return Panels(kind, tuple(weight.shape), data, scale)
