"""Weights as the compiled library takes them: in panels of its own order, or as they lie.

float32, bfloat16 and int8 with one scale an output are laid out once (`Panels`); all other weights in fewer bits stay
`Packed`. What these operations cannot take is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import Array, c_int, c_long, c_void_p
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import Matrix
from sfumato.ops.cpu import build
from sfumato.ops.cpu.calls import NUMBER_TYPES, FactorPlaces, Operand, pointer
from sfumato.ops.cpu.memory import empty_huge
from sfumato.ops.lowrank import Lanes, LowRank
from sfumato.ops.packed import BLOCK, CODES, Packed

_KINDS = (torch.float32, torch.bfloat16, torch.int8)
"""Dtypes of panels, as the library numbers them."""
_TILE_INPUTS = (16, 32, 64)
"""Inputs of a tile, by the same numbers."""
_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}
"""Dtypes of a group's scale and bias, as the library numbers them; uint8 are exponents of two."""
_FREE = tuple(_STORED)[:3]
_HALVES, _BYTES, _E4M3, _E4M3_BOTH = 4, 8, 9, 10
"""Codes of a weight that stays as it lies, as the library numbers them."""


class _CodeLimits(NamedTuple):
    """What the library takes of a kind of codes, apart from one scale an output."""

    groups: tuple[int, ...]
    data: tuple[torch.dtype, ...]
    scale: tuple[torch.dtype, ...]
    number: int


_FLOAT, _BYTE = torch.float8_e4m3fn, torch.uint8
_LIMITS = {
    "int8": _CodeLimits((16, 32, 64, 128), (torch.int8, _BYTE), _FREE, _BYTES),
    "fp8": _CodeLimits((BLOCK,), (_FLOAT,), _FREE[:1], _E4M3_BOTH),
    "mxfp8": _CodeLimits((32,), (_FLOAT,), (_BYTE,), _E4M3),
    "nvfp4": _CodeLimits((16,), (_BYTE,), (_FLOAT,), _HALVES),
    "mxfp4": _CodeLimits((32,), (_BYTE,), (_BYTE,), _HALVES),
    **{
        kind: _CodeLimits((16, 32, 64, 128), (_BYTE,), _FREE, _HALVES)
        for kind in ("int4", "iq4", "iq3", "iq3s", "iq2", "iq1", "nf4", "fp4")
    },
}
"""By their kind; what is not here is refused."""


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
        """This as an argument; built once, as its memory stays where it is."""
        return operand_of(self.shape, (self.data, self.scale, None, None), self.kind)

    def __reduce__(self) -> Any:  # a copy has memory of its own
        return Panels, (self.kind, self.shape, self.data, self.scale)


def operand(weight: Matrix, dtype: torch.dtype) -> Operand:
    """A weight as an argument beside x in this dtype. InputError for one that `pack` did not give."""
    if isinstance(weight, Panels):
        return weight.operand
    if isinstance(weight, LowRank):
        base = operand(weight.base, dtype)
        return with_lanes(base, weight, dtype) if weight.switch.lanes.runs else base
    if not isinstance(weight, Packed):
        raise InputError("the cpu operations take weights that they have packed; call Model.pack_ first")
    return _as_it_lies(weight)


def with_lanes(base: Operand, weight: LowRank, dtype: torch.dtype) -> Operand:
    """An argument with the factors beside it, and who has which in this pass."""
    known = _FACTORS.get(weight)
    if known is None:
        known = _FACTORS[weight] = _factors(weight)
    if weight.a.dtype is not dtype:
        raise InputError(
            f"factors beside a weight are {weight.a.dtype}, and what meets them {dtype}; load the adapter again"
        )
    lanes = weight.switch.lanes
    runs = _RUNS.get(lanes)
    if runs is None:
        flat = [number for run in lanes.runs for number in run]
        runs = _RUNS[lanes] = (c_long * len(flat))(*flat)
    return base.beside(known, runs, len(lanes.runs), len(lanes.lane_N))


_FACTORS: WeakKeyDictionary[LowRank, FactorPlaces] = WeakKeyDictionary()
"""Looked at once, as their memory stays where it is: lanes are filled in place."""
_RUNS: WeakKeyDictionary[Lanes, Array[c_long]] = WeakKeyDictionary()
"""Of a pass, which many calls share."""


def _factors(weight: LowRank) -> FactorPlaces:
    a, b = weight.a, weight.b
    if a.dtype not in NUMBER_TYPES or b.dtype is not a.dtype:
        raise InputError(f"the cpu operations take factors in float32 or bfloat16, not {a.dtype} and {b.dtype}")
    *stack, outputs, inputs = weight.shape
    lanes, rank = a.shape[0], a.shape[-2]
    if list(a.shape) != [lanes, *stack, rank, inputs] or list(b.shape) != [lanes, *stack, rank, outputs]:
        raise InputError(
            f"factors {list(a.shape)} and {list(b.shape)} lie beside a weight {list(weight.shape)}; they must be "
            f"{['lanes', *stack, 'rank', inputs]} and {['lanes', *stack, 'rank', outputs]}"
        )
    if not all(part.is_cpu and part.is_contiguous() for part in (a, b)):
        raise InputError(f"factors of a weight {list(weight.shape)} lie on {a.device} or with gaps; pack it again")
    return FactorPlaces(a.data_ptr(), b.data_ptr(), lanes, rank, weight.scale)


def operand_of(
    shape: tuple[int, ...],
    parts: tuple[Tensor | None, ...],
    kind: int,
    group: int = 0,
    store: int = 0,
    spread: int = 1,
    table: int | None = None,
) -> Operand:
    """Of the tensors data, scale, bias and factor, which lie on the CPU without gaps."""
    for part in parts:
        if part is not None and not (part.is_cpu and part.is_contiguous()):
            raise InputError(f"a weight {list(shape)} lies on {part.device} or with gaps; pack it again on the CPU")
    return Operand.of(shape, (*map(pointer, parts), table), (kind, group, store, spread))


_OPERANDS: WeakKeyDictionary[Packed, Operand] = WeakKeyDictionary()
"""Of weights that stay as they lie: looked at once, as their memory stays where it is."""


def _as_it_lies(weight: Packed) -> Operand:
    known = _OPERANDS.get(weight)
    if known is None:
        known = _OPERANDS[weight] = _checked(weight)
    return known


def _checked(weight: Packed) -> Operand:
    if (not weight.is_grouped and weight.kind != "fp8") or (reason := refusal(weight)):
        raise InputError(f"the cpu operations cannot take {reason or 'this weight'}; call Model.pack_ first")
    limits = _LIMITS[weight.kind]
    if weight.is_grouped and weight.group not in limits.groups:
        raise InputError(
            f"a weight is in groups of {weight.group}, which {limits.groups} divide; call Model.pack_ first"
        )
    if not weight.is_grouped:  # one scale an output: the factor of its products
        return operand_of(weight.shape, (weight.data, None, None, weight.scale), limits.number)
    parts = weight.data, weight.scale, weight.bias, weight.factor
    store, spread = _STORED[weight.scale.dtype], _spread(weight)
    table = _table(weight.kind, weight.bias is not None).data_ptr() if limits.number == _HALVES else None
    return operand_of(weight.shape, parts, limits.number, weight.group, store, spread, table)


@functools.cache
def _table(kind: str, has_bias: bool) -> Tensor:
    """What 16 codes stand for, twice, in bfloat16."""
    values = CODES[kind].table or tuple(range(16) if has_bias else range(-8, 8))
    return torch.tensor([*values, *values]).bfloat16()


@overload
def pack(weight: LowRank) -> LowRank: ...
@overload
def pack(weight: Tensor | Panels | Packed) -> Panels | Packed: ...
@overload
def pack(weight: Matrix) -> Panels | Packed | LowRank: ...
def pack(weight: Matrix) -> Panels | Packed | LowRank:
    """A weight as these operations take it; InputError for one that they cannot.

    int8 with a scale an output rounds what it multiplies the same way, a scale a row; weights in groups multiply
    bfloat16. Low-rank factors stay as they lie, so that lanes can be filled in place, and meet what is multiplied
    as it is."""
    if isinstance(weight, Panels):
        return weight
    if isinstance(weight, LowRank):
        base, a, b = pack(weight.base), weight.a.contiguous(), weight.b.contiguous()
        is_same = base is weight.base and a is weight.a and b is weight.b
        packed = weight if is_same else replace(weight, base=base, a=a, b=b)
        _factors(packed)
        return packed
    if isinstance(weight, Packed):
        if reason := refusal(weight):
            raise InputError(
                f"the cpu operations cannot take {reason}; choose ops='fused', or quantize='int8' or 'int4'"
            )
        if weight.is_grouped or weight.kind == "fp8":
            weight = _regrouped(weight) if weight.is_grouped else weight
            return weight if all(t.is_contiguous() for t in weight.tensors) else weight.each(Tensor.contiguous)
        return _in_panels(weight.data, weight.scale.contiguous())
    if not isinstance(weight, Tensor):
        raise InputError(f"the cpu operations cannot take a {type(weight).__name__}; choose ops='fused'")
    if weight.dtype not in NUMBER_TYPES:
        raise InputError(f"the cpu operations take float32 and bfloat16 weights, not {weight.dtype}")
    return _in_panels(weight.detach(), None)


def refusal(weight: Packed) -> str | None:
    """What these operations cannot take about a weight, as the object of a sentence; None where they take it."""
    limits = _LIMITS.get(weight.kind)
    if limits is None:
        return f"{weight.kind} weights"
    is_split = weight.kind != "fp8" and weight.shape[-1] % weight.group
    if weight.is_grouped and (is_split or _part_of_a_group(weight.group, limits) is None):
        return f"{weight.kind} weights in groups of {weight.group} along {weight.shape[-1]} inputs"
    if not weight.is_grouped and (weight.kind not in ("int8", "fp8") or weight.bias is not None):
        return f"{weight.kind} weights with one scale an output"
    return _odd_part(weight, limits)


def _spread(weight: Packed) -> int:
    """Outputs that share a scale; 128 where the shapes of fp8 by blocks say none, which `_odd_part` then names."""
    if weight.kind != "fp8" or not weight.is_grouped:
        return 1
    try:
        return weight.block_rows
    except ValueError:
        return BLOCK


def _part_of_a_group(group: int, limits: _CodeLimits) -> int | None:
    """The largest group that the library takes of which there is a whole number in this one."""
    return max((own for own in limits.groups if group % own == 0), default=None)


def _regrouped(weight: Packed) -> Packed:
    """A weight in groups that the library takes: a longer group's scale and bias, once for each part of it."""
    group = _part_of_a_group(weight.group, _LIMITS[weight.kind])
    if group is None or group == weight.group:
        return weight
    parts, bias = weight.group // group, weight.bias
    bias = None if bias is None else bias.repeat_interleave(parts, -1)
    return replace(weight, group=group, scale=weight.scale.repeat_interleave(parts, -1), bias=bias)


def _odd_part(weight: Packed, limits: _CodeLimits) -> str | None:
    """What is not as it must be about the tensors of a weight."""
    *stack, outputs, inputs = weight.shape
    spread = _spread(weight)
    scales = [*stack, -(-outputs // spread), -(-inputs // weight.group)] if weight.is_grouped else [*stack, outputs]
    types = limits.scale if weight.is_grouped else (torch.float32,)
    codes = [*stack, outputs, inputs // 2 if limits.number == _HALVES else inputs]
    data, scale, bias, factor = weight.data, weight.scale, weight.bias, weight.factor
    if scale.dtype not in types or (bias is not None and bias.dtype != scale.dtype):
        return f"scales and biases of {scale.dtype}"
    if data.dtype not in limits.data or (data.dtype == torch.int8) != (weight.kind == "int8" and bias is None):
        return f"codes in {data.dtype} of {weight.kind} weights"
    if list(data.shape) != codes or list(scale.shape) != scales:
        return f"codes {list(data.shape)} with scales {list(scale.shape)} of {weight.kind} weights {list(weight.shape)}"
    if bias is not None and (weight.kind not in ("int4", "int8") or bias.shape != scale.shape):
        return f"a bias {list(bias.shape)} of {weight.kind} weights"
    if factor is not None and (factor.dtype != torch.float32 or list(factor.shape) != [*stack, outputs]):
        return f"a factor {list(factor.shape)} in {factor.dtype}"
    return None


def _in_panels(weight: Tensor, scale: Tensor | None) -> Panels:
    kind, (outputs, inputs) = _KINDS.index(weight.dtype), weight.shape[-2:]
    count = weight.numel() // (outputs * inputs)
    size = build.library().sf_packed_bytes(kind, c_long(outputs), c_long(inputs))
    data = empty_huge(count * size)
    source = weight.contiguous()
    for n in range(count):
        start = source.data_ptr() + n * outputs * inputs * source.element_size()
        build.library().sf_pack(
            c_int(kind), c_void_p(start), c_long(outputs), c_long(inputs), c_void_p(data.data_ptr() + n * size),
            c_int(torch.get_num_threads()),
        )  # fmt: skip
    return Panels(kind, tuple(weight.shape), data, scale)
