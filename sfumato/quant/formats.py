"""Formats of weights in fewer bits: how a weight is rounded to their codes, and how far off that is.

    int8    8 bits, one scale an output                     fp8    e4m3, one scale an output (-tensor, -block of 128²)
    int4    4 bits in groups of 64 inputs (-g32, -g128),    nvfp4  e2m1 in groups of 16, e4m3 scales, a factor a matrix
            symmetric, or with a bias a group (-asym)       mxfp4  e2m1 in groups of 32, scales powers of two

A format is one subclass of `Format`; what its codes stand for is in `ops.packed`. Every group's scale is searched, not
only its largest weight divided: a narrower range rounds the many better than it clips the one. `importance`, the mean
square of each input (`quant.calibrate`), weighs the errors in that search. It lacks a choice of what to pack
(`quant.recipes`) and files (`checkpoints`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.packed import BLOCK, CODES, Packed, e2m1_values, paired, power_of_two

__all__ = ["FORMATS", "Format", "Packed", "error", "pack"]

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a packed weight, by the name of its field in `Packed`."""

_CHUNK = 1 << 19
"""Weights that are in float32 at one time: they and what is made of them stay in a processor's cache."""
_ENDS = (7.0, 7.4, 7.9, 8.4, -8.0, -8.5, -9.0)
"""int4: the code, not yet rounded, that the largest weight of a group may get. Below zero the scale turns the group
over, so that the one code more on that side is used."""
_NARROW = (0.0, 0.02, 0.05, 0.09)
"""int4 with a bias: parts of the range that may be cut off, at both ends together."""
_STORE = torch.bfloat16
"""int4 scales: they have any weight's range, and as the codes are chosen for the scale as it is stored, its eight bits
cost a thousandth of the error."""
_PEAKS = (6.0, 4.0)
"""nvfp4: what the largest weight of a group may become."""
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Between neighbours of `E2M1`; a tie goes to the even code."""


@dataclass(frozen=True)
class Format(ABC):
    """How a weight is packed: one subclass for each kind of code, one instance for each name in `FORMATS`."""

    group: int = 0
    """Inputs that share a scale; 0: all inputs of an output."""

    kind: ClassVar[str]
    """The name of its codes, as `Packed.kind` has it."""

    @property
    def name(self) -> str:
        """As `named` takes it."""
        return self.kind

    @property
    def product(self) -> str | None:
        """The number format in which such weights are multiplied; None: they are unpacked to that of x."""
        return CODES[self.kind].product

    @property
    def rows_are_apart(self) -> bool:
        """Whether the outputs of a matrix can be packed some at a time: no scale is shared by several of them."""
        return True

    @property
    def is_in_blocks(self) -> bool:
        """Whether scales stand for blocks of outputs and inputs, so that a matrix is read as a whole."""
        return False

    def group_of(self, inputs: int) -> int:
        """The group in which a weight of so many inputs is packed: lowered to what divides them."""
        return math.gcd(self.group, inputs) if self.group else inputs

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> Parts:
        """Of a weight of this shape, what `Packed.parts` will be: dtypes and shapes."""

    @abstractmethod
    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:
        """A weight that `pack` has checked; `peaks` [.., O] are the largest magnitudes of its outputs in float32."""

    @staticmethod
    def named(name: str) -> Format:
        """By its name, as in the table above: "int4-g32-asym". InputError for one that there is not."""
        if name not in _BY_NAME:
            raise InputError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")
        return _BY_NAME[name]


def pack(weight: Tensor, form: str | Format, importance: Tensor | None = None) -> Packed:
    """A weight [O, I] or a stack [E, O, I] in this format. A group is lowered to what divides I.

    `importance`, [I] or [E, I], positive, weighs the squared error of each input. InputError: an unknown format, a
    shape that cannot be packed, weights that are not finite."""
    form = Format.named(form) if isinstance(form, str) else form
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise InputError(
            f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be packed;"
            " give floats [O, I] or [E, O, I]"
        )
    inputs, least = weight.shape[-1], CODES[form.kind].least
    if inputs % least:
        raise InputError(f"{form.kind} packs {least} inputs together and this weight has {inputs}; take int8 or fp8")
    peaks = torch.cat([part.abs().amax(-1).float() for part in _rows(weight)]).view(weight.shape[:-1])
    if not bool(torch.isfinite(peaks).all()):
        bad = sum(int((~torch.isfinite(part)).sum()) for part in _rows(weight))
        raise InputError(
            f"{bad} of the {weight.numel()} weights are not finite (nan or infinity); repair the checkpoint first"
        )
    return form.pack(weight, peaks, importance)


def error(weight: Tensor, packed: Packed) -> float:
    """How far the packed weight is from this one: the root mean square of the difference over that of the weight."""
    squares = total = 0.0
    stack = [(weight, packed)] if weight.dim() == 2 else [(weight[e], packed[e]) for e in range(len(weight))]
    for exact, codes in stack:
        squares += float((codes.dense().double() - exact.double()).square().sum())
        total += float(exact.double().square().sum())
    return math.sqrt(squares / total) if total else math.sqrt(squares)


# ---- the formats -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Int8(Format):
    """8 bits, one scale an output."""

    kind = "int8"

    def parts(self, shape: tuple[int, ...]) -> Parts:
        return {"data": (torch.int8, shape), "scale": (torch.float32, shape[:-1])}

    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:
        scale = peaks / 127.0
        codes = [(part.float() / s).round_().to(torch.int8) for part, s in _with(weight, _no_zero(scale))]
        return Packed("int8", tuple(weight.shape), torch.cat(codes).view(weight.shape), scale, weight.shape[-1])


@dataclass(frozen=True)
class _FP8(Format):
    """e4m3, one scale an output, a matrix ("tensor") or a block of 128 x 128 ("block")."""

    scales: str = "channel"

    kind = "fp8"

    @property
    def name(self) -> str:
        return self.kind if self.scales == "channel" else f"{self.kind}-{self.scales}"

    @property
    def rows_are_apart(self) -> bool:
        return self.scales == "channel"

    @property
    def is_in_blocks(self) -> bool:
        return self.scales == "block"

    def group_of(self, inputs: int) -> int:
        return BLOCK if self.is_in_blocks else inputs

    def parts(self, shape: tuple[int, ...]) -> Parts:
        *stack, outputs, inputs = shape
        rows = (*stack, -(-outputs // BLOCK), -(-inputs // BLOCK)) if self.scales == "block" else shape[:-1]
        return {"data": (torch.float8_e4m3fn, shape), "scale": (torch.float32, rows)}

    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:
        if self.scales == "block":
            return _in_blocks(weight)
        if self.scales == "tensor":
            peaks = peaks.amax(-1, keepdim=True).expand(peaks.shape).contiguous()
        scale = peaks / 448.0
        codes = [_e4m3(part.float() / s) for part, s in _with(weight, _no_zero(scale))]
        return Packed("fp8", tuple(weight.shape), torch.cat(codes).view(weight.shape), scale, weight.shape[-1])


def _in_blocks(weight: Tensor) -> Packed:
    blocks = -(-weight.shape[-2] // BLOCK), -(-weight.shape[-1] // BLOCK)
    scale = torch.empty(*weight.shape[:-2], *blocks)
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for e in range(len(scale) if scale.dim() == 3 else 1):
        one, to, into = (weight[e], scale[e], data[e]) if scale.dim() == 3 else (weight, scale, data)
        for r in range(blocks[0]):
            for c in range(blocks[1]):
                place = slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK)
                to[r, c] = one[place].abs().amax().float() / 448.0
                into[place] = _e4m3(one[place].float() / _no_zero(to[r, c]))
    return Packed("fp8", tuple(weight.shape), data, scale, BLOCK)


@dataclass(frozen=True)
class _Int4(Format):
    """4 bits in groups, symmetric about zero or with a bias a group."""

    is_symmetric: bool = True

    kind = "int4"

    @property
    def name(self) -> str:
        return "-".join(
            [self.kind, *([] if self.group == 64 else [f"g{self.group}"]), *([] if self.is_symmetric else ["asym"])]
        )

    def parts(self, shape: tuple[int, ...]) -> Parts:
        groups = (*shape[:-1], shape[-1] // self.group_of(shape[-1]))
        names = ("scale",) if self.is_symmetric else ("scale", "bias")
        return {"data": (torch.uint8, _halved(shape))} | dict.fromkeys(names, (_STORE, groups))

    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:
        low, high = (-8, 7) if self.is_symmetric else (0, 15)

        def code_of(rows: Tensor, wide: list[Tensor]) -> Tensor:
            exact = rows / _no_zero(wide[0]) if self.is_symmetric else (rows - wide[1]).div_(_no_zero(wide[0]))
            return exact.round_().clamp_(low, high)

        def value_of(code: Tensor, wide: list[Tensor]) -> Tensor:
            return code * wide[0] if self.is_symmetric else (code * wide[0]).add_(wide[1])

        def part(rows: Tensor, weigh: Tensor | None, first: int) -> list[Tensor]:
            ends = _ends(rows) if self.is_symmetric else _narrowed(rows)
            stored, wide = _best(rows, weigh, [(kept, [x.float() for x in kept]) for kept in ends], code_of, value_of)
            return [code_of(rows, wide).sub_(low).to(torch.uint8), *stored]

        shape, group = tuple(weight.shape), self.group_of(weight.shape[-1])
        codes, scale, *bias = _over(weight, group, importance, part)
        groups = (*shape[:-1], -1)
        data = paired(codes.view(shape))
        return Packed("int4", shape, data, scale.view(groups), group, *(b.view(groups) for b in bias))


@dataclass(frozen=True)
class _NVFP4(Format):
    """4-bit floats in groups of 16, e4m3 scales, a factor a matrix."""

    kind = "nvfp4"

    @property
    def rows_are_apart(self) -> bool:
        return False

    def parts(self, shape: tuple[int, ...]) -> Parts:
        groups = (*shape[:-1], shape[-1] // 16)
        scale, factor = (torch.float8_e4m3fn, groups), (torch.float32, shape[:-1])
        return {"data": (torch.uint8, _halved(shape)), "scale": scale, "factor": factor}

    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:
        shape = tuple(weight.shape)
        factor = (peaks.amax(-1, keepdim=True) / (448.0 * 6.0)).expand(peaks.shape).contiguous()
        factors = _no_zero(factor).reshape(-1)

        def part(rows: Tensor, weigh: Tensor | None, first: int) -> list[Tensor]:
            count = len(rows) * 16 // shape[-1]
            by = factors[first : first + count].repeat_interleave(shape[-1] // 16)[:, None]
            peak = rows.abs().amax(-1, keepdim=True)
            tried = [(peak / most / by).clamp_(max=448.0).to(torch.float8_e4m3fn) for most in _PEAKS]
            stored, wide = _best(rows, weigh, [([one], [one.float() * by]) for one in tried], _e2m1, _value)
            return [_e2m1(rows, wide), *stored]

        codes, scale = _over(weight, 16, importance, part)
        return Packed("nvfp4", shape, paired(codes.view(shape)), scale.view(*shape[:-1], -1), 16, None, factor)


@dataclass(frozen=True)
class _MXFP4(Format):
    """4-bit floats in groups of 32, scales that are powers of two."""

    kind = "mxfp4"

    def parts(self, shape: tuple[int, ...]) -> Parts:
        return {"data": (torch.uint8, _halved(shape)), "scale": (torch.uint8, (*shape[:-1], shape[-1] // 32))}

    def pack(self, weight: Tensor, peaks: Tensor, importance: Tensor | None) -> Packed:

        def part(rows: Tensor, weigh: Tensor | None, first: int) -> list[Tensor]:
            peak = rows.abs().amax(-1, keepdim=True)
            whole = torch.frexp(peak)[1] - 1 - 2 + 127  # so that the largest weight lies in [4, 8): clipped above 6
            tried = [torch.where(peak > 0, whole + more, 127).clamp_(0, 254).to(torch.uint8) for more in (0, 1)]
            stored, wide = _best(rows, weigh, [([one], [power_of_two(one)]) for one in tried], _e2m1, _value)
            return [_e2m1(rows, wide), *stored]

        shape = tuple(weight.shape)
        codes, scale = _over(weight, 32, importance, part)
        return Packed("mxfp4", shape, paired(codes.view(shape)), scale.view(*shape[:-1], -1), 32)


_BY_NAME: dict[str, Format] = {
    form.name: form
    for form in (
        _Int8(),
        *(_Int4(group, is_symmetric) for group in (32, 64, 128) for is_symmetric in (True, False)),
        *(_FP8(0, scales) for scales in ("channel", "tensor", "block")),
        _NVFP4(16),
        _MXFP4(32),
    )
}
FORMATS = tuple(_BY_NAME)
"""The names there are."""


# ---- what they share ------------------------------------------------------------------------------------------------

Scales = tuple[list[Tensor], list[Tensor]]
"""Scales, and perhaps biases, of groups [N, 1]: as they are stored, and what they are in float32."""


def _over(
    weight: Tensor,
    group: int,
    importance: Tensor | None,
    part: Callable[[Tensor, Tensor | None, int], list[Tensor]],
) -> list[Tensor]:
    """`part(groups [N, group] in float32, how much each weight counts, number of the first row)` over all rows.

    Rows are taken some at a time and the results joined. Each processor takes rows of its own: the tensors are too
    small to be shared."""
    inputs, places, rows = weight.shape[-1], [], weight.detach().reshape(-1, weight.shape[-1])
    counts = None if importance is None else importance.float().view(-1, inputs)
    each = len(rows) // len(counts) if counts is not None and len(counts) > 1 else len(rows)
    step = max(1, min(_CHUNK // inputs, each))
    for begin in range(0, len(rows), each):
        places += [(first, min(first + step, begin + each)) for first in range(begin, begin + each, step)]

    def one(place: tuple[int, int]) -> list[Tensor]:
        first, last = place
        weigh = None if counts is None else counts[first // each].view(-1, group).repeat(last - first, 1)
        return part(rows[first:last].reshape(-1, group).float(), weigh, first)

    threads = torch.get_num_threads()
    if threads == 1 or len(places) < 2 * threads:
        results = [one(place) for place in places]
    else:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = list(pool.map(one, places))
        torch.set_num_threads(threads)
    return [
        torch.cat([x.view(_plain(x)) for x in column]).view(column[0].dtype) for column in zip(*results, strict=True)
    ]


def _ends(rows: Tensor) -> Iterator[list[Tensor]]:
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    extreme = torch.where(high >= -low, high, low)
    for end in _ENDS:
        yield [(extreme.abs() / end if end > 0 else extreme / end).to(_STORE)]


def _narrowed(rows: Tensor) -> Iterator[list[Tensor]]:
    low, high = rows.amin(-1, keepdim=True).clamp_(max=0), rows.amax(-1, keepdim=True).clamp_(min=0)
    for cut in _NARROW:
        yield [((high - low) * ((1 - cut) / 15)).to(_STORE), (low * (1 - cut)).to(_STORE)]


def _best(
    rows: Tensor,
    weigh: Tensor | None,
    tried: list[Scales],
    code_of: Callable[[Tensor, list[Tensor]], Tensor],
    value_of: Callable[[Tensor, list[Tensor]], Tensor],
) -> Scales:
    """For each group the scales with the least squared error, as they are stored.

    So their own rounding costs next to nothing. Errors are relative to the group's largest weight: squares of weights
    near 1e30 or 1e-30 are no numbers."""
    largest = _no_zero(rows.abs().amax(-1, keepdim=True))
    unit = rows / largest
    best: Tensor | None = None
    for number, (_, wide) in enumerate(tried):
        relative = [x / largest for x in wide]
        square = value_of(code_of(unit, relative), relative).sub_(unit).square_()
        miss = (square if weigh is None else square.mul_(weigh)).sum(-1, keepdim=True)
        if best is None:
            best, which = miss, torch.zeros_like(miss, dtype=torch.long)
        else:
            which = torch.where(miss < best, number, which)
            best = torch.minimum(miss, best)

    def chosen(options: Sequence[Tensor]) -> Tensor:
        bits = torch.cat([x.view(_plain(x)) for x in options], -1)
        return bits.gather(-1, which).view(options[0].dtype)

    stored, wide = ([chosen(options) for options in zip(*side, strict=True)] for side in zip(*tried, strict=True))
    return stored, wide


def _plain(x: Tensor) -> torch.dtype:
    """float8 knows few functions; bytes do."""
    return torch.uint8 if x.element_size() == 1 else x.dtype


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)


def _e2m1(rows: Tensor, wide: list[Tensor]) -> Tensor:
    x = rows / _no_zero(wide[0])
    size, code = x.abs(), torch.zeros(x.shape, dtype=torch.uint8)
    for number, middle in enumerate(_MIDDLES):
        code += size > middle if number % 2 == 0 else size >= middle
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def _value(code: Tensor, wide: list[Tensor]) -> Tensor:
    return e2m1_values()[code.int()].mul_(wide[0])


def _halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2)


def _no_zero(scale: Tensor) -> Tensor:
    """What is all zeros has scale 0; it is divided by 1."""
    return torch.where(scale != 0, scale, 1.0)


def _rows(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight.reshape(-1, weight.shape[-1]), max(1, _CHUNK // weight.shape[-1]))


def _with(weight: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    parts = _rows(weight)
    return zip(parts, torch.split(scale.reshape(-1, 1), len(parts[0])), strict=True)
