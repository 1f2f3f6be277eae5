"""checkpoints/formats/mixtures.py: weights in different forms, brought into one that says the same of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sfumato.checkpoints.formats.mixtures import CodeForm, brought, common, form_of
from sfumato.ops.packed import CODES, Packed

SHAPE = (3, 8, 64)


def scales(dtype: torch.dtype, group: int) -> Tensor:
    return (torch.rand(*SHAPE[:-1], SHAPE[-1] // group, generator=torch.Generator().manual_seed(group)) + 0.5).to(dtype)


def weight(kind: str, group: int, scale: torch.dtype = torch.bfloat16, has_bias: bool = False) -> Packed:
    dice = torch.Generator().manual_seed(3)
    table = CODES[kind].table
    codes = torch.randint(0, 256, SHAPE, generator=dice, dtype=torch.uint8)
    if table is not None:
        numbers = torch.tensor([code for code, value in enumerate(table) if value == value], dtype=torch.uint8)
        codes = numbers[(codes % len(numbers)).int()]
    if table is not None or kind == "int4":
        codes = codes & 15
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    by, bias, factor = scales(scale, group), None, None
    if has_bias:
        bias = -3 * by
    elif kind == "int8":
        codes = codes.view(torch.int8)
    if kind.startswith("mxfp"):
        by = torch.randint(100, 140, by.shape, generator=dice, dtype=torch.uint8)
    if kind == "mxfp8":
        codes = (codes & 0xF7).view(torch.float8_e4m3fn)
    if kind == "nvfp4":
        by, factor = by.to(torch.float8_e4m3fn), torch.full(SHAPE[:-1], 0.25)
    return Packed(kind, SHAPE, codes, by, group, bias, factor)


BIASED = [
    weight("int4", 32, has_bias=True),
    weight("int4", 64, torch.float16, has_bias=True),
    weight("int8", 32, torch.float32, has_bias=True),
]
EVEN = [
    weight("int4", 64),
    weight("int4", 16, torch.float16),
    weight("int8", 64),
    weight("int8", 16),
    weight("mxfp4", 32),
    weight("nvfp4", 16),
    *(weight(kind, 32) for kind in ("iq4", "iq3", "iq3s", "iq2", "iq1")),
    Packed("int8", SHAPE, weight("int8", 64).data, scales(torch.bfloat16, 64)[..., 0].float(), 64),
]


def label(packed: Packed) -> str:
    return f"{packed.kind}-{packed.group}"


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations([*BIASED, *EVEN], 2)), ids=label)
def test_two_forms_in_one_keep_every_value(one: Packed, other: Packed) -> None:
    if one.kind == "int8" and one.bias is not None and other.bias is None:  # its float32 scale takes no further bits
        one = Packed(
            "int8", SHAPE, one.data, one.scale.bfloat16().float(), one.group, one.scale.bfloat16().float() * -3
        )
    form = common([form_of(one), form_of(other)])
    assert form is not None and form == common([form_of(other), form_of(one)])
    assert form.kind == ("int4" if {one.kind, other.kind} == {"int4"} else "int8")
    assert form.group == min(one.group, other.group)
    for packed in (one, other):
        same = brought(packed, form)
        assert form_of(same) == form and torch.equal(same.dense(), packed.dense())
        assert torch.equal(brought(packed[1], form).dense(), packed.dense()[1])


def test_floats_of_4_bits_are_floats_of_8() -> None:
    four, eight = weight("mxfp4", 32), weight("mxfp8", 32)
    form = common([form_of(four), form_of(eight)])
    assert form is not None and form.kind == "mxfp8"
    assert torch.equal(brought(four, form).dense(), four.dense()) and brought(eight, form) is eight


def test_what_is_alike_stays_as_it_is() -> None:
    for packed in (*BIASED, *EVEN, weight("nf4", 64)):
        form = common([form_of(packed)] * 3)
        assert form == form_of(packed) and brought(packed, form) is packed


@pytest.mark.parametrize("kind", ["mxfp8", "nf4", "fp4"])
def test_what_no_form_holds(kind: str) -> None:
    group = 32 if kind == "mxfp8" else 64
    assert common([form_of(weight(kind, group)), form_of(BIASED[0])]) is None


def test_float16_has_room_for_no_new_bias() -> None:
    """8 scales of 10 000 are past its largest number."""
    even = Packed("int4", SHAPE, weight("int4", 64).data, torch.full((3, 8, 1), 1e4).half(), 64)
    form = common([form_of(even), form_of(weight("int4", 64, torch.float16, has_bias=True))])
    assert form == CodeForm("int4", 64, True, (("scale", torch.float32), ("bias", torch.float32)))
    assert torch.equal(brought(even, form).dense(), even.dense())
