"""Parts of one weight that a file packs in different forms, as one form that holds what all of them say.

Tools give more bits to what is worth more: gate 4 bits and up 8, or some experts more than others; our stacks have one
form each. Codes with few bits are codes with many, a scale that many inputs share can stand for fewer, and the values
of most tables are whole numbers times a step. So the values stay what they are: to the bit, but where a scale has all
24 bits of float32 and only some of the parts have a bias, which costs a rounding. It lacks what no form of ours holds,
as floats of 8 bits beside whole numbers: nothing is rounded anew here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.ops.packed import CODES, Packed, power_of_two, unpaired

_STEPS = (1, 2, 8)
"""How many steps the one of a table may have, for all its values to be whole numbers of them."""


class CodeForm(NamedTuple):
    """How a weight is packed: what parts must have alike to lie in one."""

    kind: str
    group: int
    is_grouped: bool
    dtypes: tuple[tuple[str, torch.dtype], ...]
    """Of `Packed.parts` but the data, by name."""

    @property
    def has_bias(self) -> bool:
        """Whether a group has a bias."""
        return any(name == "bias" for name, _ in self.dtypes)


def form_of(packed: Packed) -> CodeForm:
    """The form of a weight."""
    dtypes = tuple((name, part.dtype) for name, part in packed.parts.items() if name != "data")
    return CodeForm(packed.kind, packed.group, packed.is_grouped, dtypes)


def common(forms: Sequence[CodeForm]) -> CodeForm | None:
    """The form with the fewest bits that holds all of these; None: there is none."""
    if len(set(forms)) == 1:
        return forms[0]
    kinds, group = {form.kind for form in forms}, math.gcd(*(form.group for form in forms))
    if kinds == {"mxfp4", "mxfp8"}:
        return CodeForm("mxfp8", group, True, (("scale", torch.uint8),))
    if not all(form.kind in ("int4", "int8") or _steps(form.kind) for form in forms):
        return None
    has_bias = any(form.has_bias for form in forms)
    dtypes, dtype = {dtype for form in forms for _, dtype in form.dtypes}, torch.float32
    if kinds == {"int4"} and len(dtypes) == 1:
        # A bias that is new is 8 scales, and float16 may have no room for it.
        is_new = has_bias and not all(form.has_bias for form in forms)
        dtype = torch.float32 if is_new and dtypes == {torch.float16} else dtypes.pop()
    names = ("scale", "bias") if has_bias else ("scale",)
    return CodeForm("int4" if kinds == {"int4"} else "int8", group, True, tuple((name, dtype) for name in names))


def brought(packed: Packed, form: CodeForm) -> Packed:
    """The weight in the form that `common` gave for it and others."""
    if form_of(packed) == form:
        return packed
    times, dtypes = packed.group // form.group, dict(form.dtypes)
    if form.kind == "mxfp8":
        values = torch.tensor(packed.code.table).to(torch.float8_e4m3fn).view(torch.uint8)
        data, scale, bias = values[unpaired(packed.data).int()].view(torch.float8_e4m3fn), packed.scale, None
    else:
        data, scale, bias, low = _whole(packed)
        if form.has_bias and bias is None:
            data, bias = data.view(torch.uint8) + low, scale * -low
        if form.kind == "int4":
            data = packed.data
    spread = {
        name: part.repeat_interleave(times, -1) for name, part in (("scale", scale), ("bias", bias)) if part is not None
    }
    return Packed(
        form.kind,
        packed.shape,
        data,
        group=form.group,
        **{name: part.to(dtypes[name]) for name, part in spread.items()},
    )


def _whole(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Whole numbers [.., I], scale and bias of their groups in float32, and what keeps the numbers from below zero.

    The numbers are uint8 where there is a bias, and int8 elsewhere; the last is to be added to them."""
    scale = packed.scale if packed.is_grouped else packed.scale[..., None]
    if packed.kind == "int8":
        return packed.data, scale, packed.bias, 128
    codes = unpaired(packed.data)
    if packed.kind == "int4":
        bias = None if packed.bias is None else packed.bias.float()
        return (codes if bias is not None else codes.view(torch.int8) - 8), scale.float(), bias, 8
    steps = _steps(packed.kind)
    table = (torch.tensor(packed.code.table) * steps).nan_to_num(0).to(torch.int8)
    scale = (power_of_two(scale) if packed.kind == "mxfp4" else scale.float()) / steps
    if packed.factor is not None:
        scale = scale * packed.factor[..., None]
    return table[codes.int()], scale, None, 1 << (int(table.abs().max()) - 1).bit_length()


def _steps(kind: str) -> int:
    """How many steps the one of a kind's table has, where all its values are whole numbers of them; 0: they are not."""
    table = [value for value in CODES[kind].table or () if not math.isnan(value)]
    return next((steps for steps in _STEPS if table and all((value * steps).is_integer() for value in table)), 0)
