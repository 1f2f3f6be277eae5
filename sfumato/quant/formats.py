"""Formats of weights in fewer bits: pack, unpack, error. Pure functions of tensors; the record is `ops.packed.Packed`.

    int8    8 bits, one scale an output                     fp8    e4m3, one scale an output (-tensor, -block of 128²)
    int4    4 bits in groups of 64 inputs (-g32, -g128),    nvfp4  e2m1 in groups of 16, e4m3 scales, a factor a matrix
            symmetric, or with a bias a group (-asym)       mxfp4  e2m1 in groups of 32, scales powers of two

Every group's scale is searched, not only its largest weight divided: a narrower range rounds the many better than it
clips the one. `importance`, what the inputs' squares are on average (`quant.calibrate`), weighs the errors in that
search. It lacks a choice of what to pack (`quant.recipes`) and files (`interop`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.packed import BLOCK, E2M1, KINDS, Packed, power_of_two, unpack

__all__ = ["FORMATS", "KINDS", "Format", "Packed", "error", "pack", "unpack"]

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
class Format:
    """How a weight is packed. `group` 0 stands for all inputs; fp8 has "channel", "tensor" or "block" scales."""

    kind: str
    group: int = 0
    is_symmetric: bool = True
    scales: str = "channel"

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of a weight of this shape, what `Packed.parts` will be: dtypes and shapes."""
        *lead, inputs = shape
        group = math.gcd(self.group, inputs) if self.group else inputs
        rows, groups = tuple(lead), (*lead, inputs // group)
        if self.kind in ("int8", "fp8"):
            if self.scales == "block":
                rows = (*lead[:-1], -(-lead[-1] // BLOCK), -(-inputs // BLOCK))
            return {
                "data": (torch.int8 if self.kind == "int8" else torch.float8_e4m3fn, shape),
                "scale": (torch.float32, rows),
            }
        found = {"data": (torch.uint8, (*lead, inputs // 2))}
        if self.kind == "int4":
            found |= dict.fromkeys(("scale",) if self.is_symmetric else ("scale", "bias"), (_STORE, groups))
        else:
            found["scale"] = (torch.float8_e4m3fn if self.kind == "nvfp4" else torch.uint8, groups)
        return found | ({"factor": (torch.float32, rows)} if self.kind == "nvfp4" else {})

    @classmethod
    def named(cls, name: str) -> Format:
        """By its name, as in the table above: "int4-g32-asym". InputError for one that there is not."""
        if name not in FORMATS:
            raise InputError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")
        kind, *flags = name.split("-")
        if kind == "int4":
            groups = [int(flag[1:]) for flag in flags if flag.startswith("g")]
            return cls(kind, groups[0] if groups else 64, "asym" not in flags)
        return cls(kind, {"nvfp4": 16, "mxfp4": 32}.get(kind, 0), scales=flags[0] if flags else "channel")

    @property
    def name(self) -> str:
        parts = [self.kind, *([f"g{self.group}"] if self.kind == "int4" and self.group != 64 else [])]
        parts += [] if self.is_symmetric else ["asym"]
        return "-".join(parts + ([] if self.scales == "channel" else [self.scales]))


FORMATS = (
    "int8",
    *(f"int4{group}{bias}" for group in ("-g32", "", "-g128") for bias in ("", "-asym")),
    "fp8",
    "fp8-tensor",
    "fp8-block",
    "nvfp4",
    "mxfp4",
)
"""The names there are."""


def pack(weight: Tensor, form: str | Format, importance: Tensor | None = None) -> Packed:
    """A weight [O, I] or a stack [E, O, I] in this format. An int4 group is lowered to what divides I.

    `importance`, [I] or [E, I], positive, weighs the squared error of each input. InputError: an unknown format, a
    shape that cannot be packed, weights that are not finite."""
    form = Format.named(form) if isinstance(form, str) else form
    if weight.dim() not in (2, 3) or not weight.is_floating_point() or weight.numel() == 0:
        raise InputError(
            f"a weight of shape {list(weight.shape)} and {weight.dtype} cannot be packed;"
            " give floats [O, I] or [E, O, I]"
        )
    inputs = weight.shape[-1]
    least = {"int4": 2, "nvfp4": 16, "mxfp4": 32}.get(form.kind, 1)
    if inputs % least:
        raise InputError(f"{form.kind} packs {least} inputs together and this weight has {inputs}; take int8 or fp8")
    group = math.gcd(form.group, inputs) if form.group else inputs
    peaks = torch.cat([part.abs().amax(-1).float() for part in _rows(weight)]).view(weight.shape[:-1])
    if not bool(torch.isfinite(peaks).all()):
        bad = sum(int((~torch.isfinite(part)).sum()) for part in _rows(weight))
        raise InputError(
            f"{bad} of the {weight.numel()} weights are not finite (nan or infinity); repair the checkpoint first"
        )
    packer: dict[str, Callable[..., Packed]] = {"int8": _int8, "int4": _int4, "fp8": _fp8, "nvfp4": _nvfp4}
    return packer.get(form.kind, _mxfp4)(weight, form, group, peaks, importance)


def error(weight: Tensor, packed: Packed) -> float:
    """How far the packed weight is from this one: the root mean square of the difference over that of the weight."""
    lost = total = 0.0
    stack = [(weight, packed)] if weight.dim() == 2 else [(weight[e], packed[e]) for e in range(len(weight))]
    for exact, codes in stack:
        lost += float((unpack(codes).double() - exact.double()).square().sum())
        total += float(exact.double().square().sum())
    return math.sqrt(lost / total) if total else math.sqrt(lost)


# ---- one function a kind --------------------------------------------------------------------------------------------


def _int8(weight: Tensor, form: Format, group: int, peaks: Tensor, importance: Tensor | None) -> Packed:
    scale = peaks / 127.0
    codes = [(part.float() / s).round_().to(torch.int8) for part, s in _with(weight, _no_zero(scale))]
    return Packed("int8", tuple(weight.shape), torch.cat(codes).view(weight.shape), scale, group)


def _fp8(weight: Tensor, form: Format, group: int, peaks: Tensor, importance: Tensor | None) -> Packed:
    if form.scales == "block":
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
    if form.scales == "tensor":
        peaks = peaks.amax(-1, keepdim=True).expand(peaks.shape).contiguous()
    scale = peaks / 448.0
    codes = [_e4m3(part.float() / s) for part, s in _with(weight, _no_zero(scale))]
    return Packed("fp8", tuple(weight.shape), torch.cat(codes).view(weight.shape), scale, group)


def _int4(weight: Tensor, form: Format, group: int, peaks: Tensor, importance: Tensor | None) -> Packed:
    low, high = (-8, 7) if form.is_symmetric else (0, 15)

    def code_of(rows: Tensor, wide: list[Tensor]) -> Tensor:
        exact = rows / _no_zero(wide[0]) if form.is_symmetric else (rows - wide[1]).div_(_no_zero(wide[0]))
        return exact.round_().clamp_(low, high)

    def value_of(code: Tensor, wide: list[Tensor]) -> Tensor:
        return code * wide[0] if form.is_symmetric else (code * wide[0]).add_(wide[1])

    def part(rows: Tensor, weigh: Tensor | None, first: int) -> list[Tensor]:
        ends = _ends(rows) if form.is_symmetric else _narrowed(rows)
        stored, wide = _best(rows, weigh, [(kept, [x.float() for x in kept]) for kept in ends], code_of, value_of)
        return [code_of(rows, wide).sub_(low).to(torch.uint8), *stored]

    shape = tuple(weight.shape)
    codes, scale, *bias = _over(weight, group, importance, part)
    groups = (*shape[:-1], -1)
    return Packed("int4", shape, _pairs(codes.view(shape)), scale.view(groups), group, *(b.view(groups) for b in bias))


def _nvfp4(weight: Tensor, form: Format, group: int, peaks: Tensor, importance: Tensor | None) -> Packed:
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
    return Packed("nvfp4", shape, _pairs(codes.view(shape)), scale.view(*shape[:-1], -1), 16, None, factor)


def _mxfp4(weight: Tensor, form: Format, group: int, peaks: Tensor, importance: Tensor | None) -> Packed:
    def part(rows: Tensor, weigh: Tensor | None, first: int) -> list[Tensor]:
        peak = rows.abs().amax(-1, keepdim=True)
        whole = torch.frexp(peak)[1] - 1 - 2 + 127  # so that the largest weight lies in [4, 8): clipped above 6
        tried = [torch.where(peak > 0, whole + more, 127).clamp_(0, 254).to(torch.uint8) for more in (0, 1)]
        stored, wide = _best(rows, weigh, [([one], [power_of_two(one)]) for one in tried], _e2m1, _value)
        return [_e2m1(rows, wide), *stored]

    shape = tuple(weight.shape)
    codes, scale = _over(weight, 32, importance, part)
    return Packed("mxfp4", shape, _pairs(codes.view(shape)), scale.view(*shape[:-1], -1), 32)


# ---- what they share ------------------------------------------------------------------------------------------------

Scales = tuple[list[Tensor], list[Tensor]]
"""Scales, and perhaps biases, of groups [N, 1]: as they are stored, and what they are in float32."""


def _over(
    weight: Tensor,
    group: int,
    importance: Tensor | None,
    part: Callable[[Tensor, Tensor | None, int], list[Tensor]],
) -> list[Tensor]:
    """`part(groups [N, group] in float32, how much each weight counts, number of the first row)` over all rows, some at
    a time, its results joined. Each processor takes rows of its own: the tensors are too small to be shared."""
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
        found = [one(place) for place in places]
    else:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(one, places))
        torch.set_num_threads(threads)
    return [torch.cat([x.view(_plain(x)) for x in column]).view(column[0].dtype) for column in zip(*found, strict=True)]


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
    """For each group the scales with the least squared error, as they are stored: so their own rounding costs next to
    nothing. Errors are relative to the group's largest weight: squares of weights near 1e30 or 1e-30 are no numbers."""
    largest = _no_zero(rows.abs().amax(-1, keepdim=True))
    unit = rows / largest
    best: Tensor | None = None
    for number, (_, wide) in enumerate(tried):
        relative = [x / largest for x in wide]
        lost = value_of(code_of(unit, relative), relative).sub_(unit).square_()
        miss = (lost if weigh is None else lost.mul_(weigh)).sum(-1, keepdim=True)
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
    return torch.tensor([*E2M1, *(-value for value in E2M1)])[code.int()].mul_(wide[0])


def _pairs(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _no_zero(scale: Tensor) -> Tensor:
    """What is all zeros has scale 0; it is divided by 1."""
    return torch.where(scale != 0, scale, 1.0)


def _rows(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.reshape(-1, weight.shape[-1]).split(max(1, _CHUNK // weight.shape[-1]))


def _with(weight: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    parts = _rows(weight)
    return zip(parts, scale.reshape(-1, 1).split(len(parts[0])), strict=True)
