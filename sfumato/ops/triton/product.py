"""The one loop over K, for every kind of weight; and how a weight and its x are laid out for it.

The product is computed transposed, [outputs, rows]: the weights are the left operand of the tensor cores, which can
come from registers, so that few bits go from memory to registers to product without a detour; and few rows (an
expert's sixteen) are the short side, where the tensor cores allow 8 steps.

    int8   unpacked to x's dtype in registers (W8A16): streaming bound either way, and x's outliers keep their bits
    fp8    x is quantised token by token (W8A8). Where the hardware has no FP8 (sm_80) the weights are widened to x's
           dtype instead and x stays as it is. Scales of an output, or of blocks of 128 x 128
    int4   unpacked in registers (W4A16); codes are exact in bfloat16, each group's scale multiplies its part of the
           sum in float32, and its bias, if there is one, the sum of its x
    nvfp4, mxfp4   unpacked in registers too, with the scale of their few inputs: 2 bits times 4 are exact in bfloat16

x of four bits is laid out beforehand as even inputs, then odd ones: what the halves of a byte meet. One order of
summation along K whatever the number of rows. What this lacks: int8 by groups, x in four bits, the tensor cores'
own block scales (sm_100).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.events import InputError
from sfumato.ops.packed import BLOCK, KINDS, Packed
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.tuning import Config, chip, config

Weight = Tensor | Packed

HALVES = ("int4", "int4_bias", "nvfp4", "mxfp4")
"""Kinds of two weights a byte."""
_INPUTS = {"int8": 1, "fp8": 1, "int4": 2, "nvfp4": 16, "mxfp4": 32}
"""What each kind packs together."""


def pack(weight: Weight) -> Weight:
    """A weight [O, I] or a stack [E, O, I], plain or `Packed`, as these operations take it.

    InputError: codes that no kernel here unpacks."""
    if not isinstance(weight, Packed):
        return weight.contiguous()
    if why := refusal(weight):
        raise InputError(
            f"the triton operations cannot take this {weight.kind} weight: they take {why};"
            ' choose ops="fused" or quantize="int4"'
        )
    if weight.kind == "nvfp4" and weight.factor is None:
        weight = replace(weight, factor=torch.ones(weight.shape[:-1], device=weight.device))
    return weight.each(Tensor.contiguous)


def refusal(weight: Packed) -> str | None:
    """What the kernels take in place of such a weight; None where they take it."""
    stacked, (outputs, inputs) = len(weight.shape) == 3, weight.shape[-2:]
    is_grouped = weight.scale.dim() == len(weight.shape)
    if weight.kind not in KINDS:
        return f"only {', '.join(KINDS)}"
    elif weight.kind == "int8" and (is_grouped or weight.bias is not None):
        return f"one scale an output, not one every {weight.group} inputs"
    elif weight.kind == "fp8" and is_grouped and weight.group != BLOCK:
        return f"blocks of {BLOCK}, not of {weight.group}"
    elif weight.kind == "fp8" and is_grouped and stacked and outputs % BLOCK:
        return f"stacks whose outputs fill blocks of {BLOCK}, not {outputs}"
    elif weight.kind != "fp8" and inputs % weight.group:
        return f"groups that divide the {inputs} inputs, not groups of {weight.group}"
    elif weight.group % _INPUTS[weight.kind]:
        return f"groups of a multiple of {_INPUTS[weight.kind]} inputs, not of {weight.group}"
    return None


@dataclass(frozen=True, eq=False)
class Form:
    """A weight as the kernels take it: which way it is multiplied, its sizes, its codes and what they are worth."""

    kind: str
    """One of Packed's, "plain", "fp8_wide" (FP8 where the hardware has none) or "int4_bias"."""
    outputs: int
    inputs: int
    group: int = 1
    """Inputs that share a scale; 1 where there is one an output."""
    data: Tensor | None = None
    scale: Tensor | None = None
    extra: Tensor | None = None
    """int4_bias: the bias of each group. nvfp4: the factor of each output."""

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.data, self.scale, self.extra

    @property
    def launch(self) -> tuple[Any, ...]:
        """Weights for which this is equal may be multiplied by one launch."""
        return self.kind, self.group, self.scale is not None and self.scale.dtype


def form(weight: Weight, x: Tensor) -> Form:
    """How this weight is multiplied on x's device. ValueError where x does not fit."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]} and the weight takes {weight.shape[-1]}")
    outputs, inputs = weight.shape[-2:]
    if not isinstance(weight, Packed):
        if weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; give both one dtype")
        return Form("plain", outputs, inputs, 1, weight.contiguous())
    kind, data, scale = weight.kind, weight.data, weight.scale
    group = weight.group if scale.dim() == len(weight.shape) else 1
    # Bytes, where the compiler does not know the type on every device.
    if kind == "fp8" and not has_fp8(str(x.device)):
        kind, data = "fp8_wide", data.view(torch.uint8)
    if kind == "nvfp4":
        return Form(kind, outputs, inputs, group, data, scale.view(torch.uint8), weight.factor)
    if weight.bias is not None:
        kind = f"{kind}_bias"
    return Form(kind, outputs, inputs, group, data, scale, weight.bias)


def has_fp8(device: str) -> bool:
    """Whether this device multiplies float8_e4m3fn: from sm_89 on; and the interpreter does."""
    return chip(device)[1] >= 89


def blocks(
    op: str,
    shape: Sequence[int],
    weight: Form,
    dtype: torch.dtype | str,
    device: torch.device | str,
    defaults: dict[str, dict[str, Config]],
) -> tuple[dict[str, Any], dict[str, int]]:
    """Tile sizes that fit this weight, and how the kernel is launched."""
    short = str(dtype).removeprefix("torch.")
    kind = weight.kind.removesuffix("_bias")  # the same bytes, the same tiles
    default = defaults[op]["float32" if short == "float32" and kind != "fp8" else kind]
    small = {**default, "num_stages": min(default["num_stages"], 3)}
    named = short if kind == "plain" else f"{kind} {short}"
    chosen = config(op, shape, named, device, default, small)
    tiles = {name: value for name, value in chosen.items() if name.startswith("BLOCK_")}
    tiles["BLOCK_K"] = min(tiles["BLOCK_K"], max(32, triton.next_power_of_2(weight.inputs)))
    share = weight.group & -weight.group  # the largest power of two in it
    if kind not in ("nvfp4", "mxfp4") and share >= 32:
        tiles["BLOCK_K"] = min(tiles["BLOCK_K"], share)  # one scale for the whole step
    return tiles, {name: chosen[name] for name in ("num_warps", "num_stages")}


def prepare(x_MK: Tensor, weight: Form, is_split: bool = False) -> tuple[Tensor, Tensor | None]:
    """x as this weight meets it, and what goes with it: the scale of a row (fp8), the sum of each group (int4_bias).
    `is_split`: evens come first already, if halves of bytes want that."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    block = triton.next_power_of_2(width)
    warps = max(1, min(8, block // 512))
    if weight.kind in HALVES:
        if not is_split:
            plain_MK, x_MK = x_MK, torch.empty_like(x_MK)
            _evens_first[(rows,)](plain_MK, x_MK, K=width, BLOCK=block, num_warps=warps)
        if weight.kind != "int4_bias":
            return x_MK, None
        sum_MG = torch.empty(rows, width // weight.group, dtype=torch.float32, device=x_MK.device)
        sizes = _sum_sizes(width, weight.group)
        _sum_groups[(rows,)](x_MK, sum_MG, K=width, GROUP=weight.group, **sizes, num_warps=warps)
        return x_MK, sum_MG
    if weight.kind != "fp8":
        return x_MK, None
    out_MK = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale_M = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    _quantise_rows[(rows,)](x_MK, out_MK, scale_M, K=width, BLOCK=block, num_warps=warps)
    return out_MK, scale_M


def layout(weight: Form) -> tuple[str, int]:
    """How this weight meets its x, and the group of which x's sums stand beside it."""
    if weight.kind == "int4_bias" and weight.group & (weight.group - 1) == 0:
        return "sums", weight.group
    return ("halves" if weight.kind in HALVES else "fp8" if weight.kind == "fp8" else "plain"), 1


@dataclass(frozen=True, eq=False)
class Ready:
    """x as one of the kernels before a product lays it out (`lay_out`), so that no kernel of its own does."""

    layout: str
    group: int
    x_MK: Tensor
    extra: Tensor | None

    @classmethod
    def room(cls, rows: int, weights: Sequence[Form], width: int, like: Tensor) -> Ready:
        """Uninitialised, for x of `like`'s dtype: as all of these weights meet it, or else plain."""
        wanted = {layout(weight) for weight in weights}
        name, group = wanted.pop() if len(wanted) == 1 else ("plain", 1)
        dtype = torch.float8_e4m3fn if name == "fp8" else like.dtype
        x_MK, extra = like.new_empty((rows, width), dtype=dtype), None
        if name == "fp8":
            extra = like.new_empty(rows, dtype=torch.float32)
        elif name == "sums":
            extra = like.new_empty((rows, width // group), dtype=torch.float32)
        return cls(name, group, x_MK, extra)

    def meet(self, weight: Form) -> tuple[Tensor, Tensor | None]:
        """`prepare`, where something is left to do."""
        if (layout(weight) == (self.layout, self.group) and weight.kind != "int4_bias") or self.layout == "sums":
            return self.x_MK, self.extra
        return prepare(self.x_MK, weight, is_split=self.layout == "halves")


def _sum_sizes(width: int, group: int) -> dict[str, int]:
    return {"GROUPS": triton.next_power_of_2(width // group), "PAIRS": triton.next_power_of_2(group // 2)}


IN_ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""The interpreter knows no assembly; it takes the plain way below, which gives the same numbers."""


@triton.jit
def _evens_first(x_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + col, col < K)
    tl.store(out_ptr + row + (col % 2) * (K // 2) + col // 2, x, col < K)


@triton.jit
def _sum_groups(x_ptr, sum_ptr, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """The sum of each group of a row that has its evens first."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    pair = tl.arange(0, PAIRS)[None, :]
    is_live = (group < K // GROUP)[:, None] & (pair < GROUP // 2)
    at = x_ptr + row * K + group[:, None] * (GROUP // 2) + pair
    even = tl.load(at, is_live, 0.0).to(tl.float32)
    odd = tl.load(at + K // 2, is_live, 0.0).to(tl.float32)
    tl.store(sum_ptr + row * (K // GROUP) + group, tl.sum(even + odd, 1), group < K // GROUP)


@triton.jit
def _quantise_rows(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row[:, None] * K + col, col < K, 0.0).to(tl.float32)
    lay_out(x, out_ptr, scale_ptr, row, row >= 0, K, 1, "fp8", 1, BLOCK)


@triton.jit
def in_fp8(x):
    """Rows of float32 in FP8, and the scale of each."""
    scale = tl.max(tl.abs(x), 1) / 448.0
    # A maximum and a clamp pass over NaN: the scale says it.
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    x = x / tl.where(scale > 0, scale, 1.0)[:, None]
    return tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv), scale


@triton.jit
def is_last(come_ptr, COUNT: tl.constexpr):
    """Whether this program is the last of so many to come here, which then sees what all of them have stored: every
    thread's stores stand before the barrier, and the barrier before the count. The count was zero."""
    tl.debug_barrier()
    return tl.atomic_add(come_ptr, 1, sem="acq_rel") == COUNT - 1


@triton.jit
def lay_out(
    x,
    out_ptr,
    extra_ptr,
    row,
    is_row,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store these rows, [ROWS, BLOCK] in float32 with zeros beyond K, as weights of this layout meet them."""
    col = tl.arange(0, BLOCK)[None, :]
    out_at = out_ptr + row[:, None] * K
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if LAYOUT == "fp8":
        code, scale = in_fp8(x)
        tl.store(out_at + col, code, is_row[:, None] & (col < K))
        tl.store(extra_ptr + row, scale, is_row)
    elif LAYOUT == "plain":
        tl.store(out_at + col, x.to(kind), is_row[:, None] & (col < K))
    else:
        even, odd = tl.split(x.reshape(ROWS, BLOCK // 2, 2))
        half = tl.arange(0, BLOCK // 2)[None, :]
        is_live = is_row[:, None] & (half < K // 2)
        tl.store(out_at + half, even.to(kind), is_live)
        tl.store(out_at + K // 2 + half, odd.to(kind), is_live)
        if LAYOUT == "sums":
            group = tl.arange(0, BLOCK // GROUP)[None, :]
            total = tl.sum(x.reshape(ROWS, BLOCK // GROUP, GROUP), 2)
            sum_at = extra_ptr + row[:, None] * (K // GROUP) + group
            tl.store(sum_at, total, is_row[:, None] & (group < K // GROUP))


@triton.jit
def _halves(packed, TYPE: tl.constexpr):
    """The codes of these bytes, low halves and high halves, less 8, in TYPE."""
    if IN_ASSEMBLY and tl.float32 != TYPE:
        # A half byte under the exponent of 128 (float16: 1024) is the number 128 + code: byte permutations build two
        # at a time, and one fused multiply-add takes 136 (1032) away. Four bytes, eight weights: eleven instructions.
        if tl.bfloat16 == TYPE:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 l, h, one, less;
                mov.b32 one, 0x3F803F80;
                mov.b32 less, 0xC308C308;
                and.b32 l, $4, 0x0F0F0F0F;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0F0F0F0F;
                prmt.b32 $0, l, 0x43434343, 0x4140;
                prmt.b32 $1, l, 0x43434343, 0x4342;
                prmt.b32 $2, h, 0x43434343, 0x4140;
                prmt.b32 $3, h, 0x43434343, 0x4342;
                fma.rn.bf16x2 $0, $0, one, less;
                fma.rn.bf16x2 $1, $1, one, less;
                fma.rn.bf16x2 $2, $2, one, less;
                fma.rn.bf16x2 $3, $3, one, less;
                }""",
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                """{
                .reg .b32 l, h, one, less;
                mov.b32 one, 0x3C003C00;
                mov.b32 less, 0xE408E408;
                and.b32 l, $4, 0x0F0F0F0F;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0F0F0F0F;
                prmt.b32 $0, l, 0x64646464, 0x4140;
                prmt.b32 $1, l, 0x64646464, 0x4342;
                prmt.b32 $2, h, 0x64646464, 0x4140;
                prmt.b32 $3, h, 0x64646464, 0x4342;
                fma.rn.f16x2 $0, $0, one, less;
                fma.rn.f16x2 $1, $1, one, less;
                fma.rn.f16x2 $2, $2, one, less;
                fma.rn.f16x2 $3, $3, one, less;
                }""",
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
    else:
        low = ((packed & 15).to(tl.float32) - 8).to(TYPE)
        high = ((packed >> 4).to(tl.float32) - 8).to(TYPE)
    return low, high


@triton.jit
def _widened(byte, TYPE: tl.constexpr):
    """float8_e4m3fn, as bytes, in TYPE: sign, exponent and mantissa moved to where float32 has them, then the
    difference of the two biases, 120, multiplied in; that is right for the smallest numbers too."""
    bits = byte.to(tl.uint32)
    return (((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120).to(TYPE)


@triton.jit
def _power_of_two(byte):
    """Scales e8m0, float32 without sign and mantissa."""
    return tl.where(byte == 0, 1 << 22, byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1(code):
    """4-bit floats in float32: three bits where exponent and mantissa meet, then 126, the difference of the biases."""
    bits = code.to(tl.uint32)
    return ((bits & 8) << 28 | (bits & 7) << 22).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def _e2m1_halves(byte, scale, TYPE: tl.constexpr):
    """The 4-bit floats of these bytes, low halves and high halves, times their scale, in TYPE."""
    if IN_ASSEMBLY and tl.bfloat16 == TYPE:
        # As in `_e2m1`, two at a time: a half byte at the top of each 16 bits, its sign left there, the rest moved
        # down by 6. The scale is bfloat16 and the product exact.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, m, up, nothing;
            mov.b32 up, 0x7E807E80;
            mov.b32 nothing, 0x80008000;
            prmt.b32 a, $4, 0, 0x1404;
            prmt.b32 b, $4, 0, 0x3424;
            shr.u32 m, a, 6;
            and.b32 m, m, 0x01C001C0;
            lop3.b32 $2, a, 0x80008000, m, 0xEA;
            shr.u32 m, b, 6;
            and.b32 m, m, 0x01C001C0;
            lop3.b32 $3, b, 0x80008000, m, 0xEA;
            shl.b32 a, a, 4;
            shl.b32 b, b, 4;
            shr.u32 m, a, 6;
            and.b32 m, m, 0x01C001C0;
            lop3.b32 $0, a, 0x80008000, m, 0xEA;
            shr.u32 m, b, 6;
            and.b32 m, m, 0x01C001C0;
            lop3.b32 $1, b, 0x80008000, m, 0xEA;
            fma.rn.bf16x2 $0, $0, up, nothing;
            fma.rn.bf16x2 $1, $1, up, nothing;
            fma.rn.bf16x2 $2, $2, up, nothing;
            fma.rn.bf16x2 $3, $3, up, nothing;
            fma.rn.bf16x2 $0, $0, $5, nothing;
            fma.rn.bf16x2 $1, $1, $6, nothing;
            fma.rn.bf16x2 $2, $2, $5, nothing;
            fma.rn.bf16x2 $3, $3, $6, nothing;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [byte, scale],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = (_e2m1(byte & 15) * scale.to(tl.float32)).to(TYPE)
        high = (_e2m1(byte >> 4) * scale.to(tl.float32)).to(TYPE)
    return low, high


@triton.jit
def product(
    x_M,
    x_extra_M,
    w_N,
    scale_N,
    extra_N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w xᵀ in float32, [BLOCK_N, BLOCK_M], from pointers to the beginning of each row of x and of w, to the first
    scale of each row, and to the first of what else it has. All rows must exist: what lies beyond the edge is a
    repetition that is not stored."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    TYPE: tl.constexpr = x_M.dtype.scalar.element_ty
    if KIND == "int4" or KIND == "int4_bias" or KIND == "nvfp4" or KIND == "mxfp4":
        HALF: tl.constexpr = K // 2
        STEP: tl.constexpr = BLOCK_K // 2
        k = tl.arange(0, STEP)
        # A row's few bytes do not suit an asynchronous copy: the scales of the next step are fetched during this one.
        if KIND == "nvfp4" or KIND == "mxfp4":
            MANY: tl.constexpr = BLOCK_K // GROUP
            nth = tl.arange(0, MANY)
            few = tl.load(scale_N[:, None] + tl.minimum(nth, K // GROUP - 1)[None, :])
        elif GROUP % BLOCK_K == 0:
            scale = tl.load(scale_N)
        for start in range(0, HALF, STEP):
            even_at = x_M[None, :] + start + k[:, None]
            if HALF % STEP == 0:
                byte = tl.load(w_N[:, None] + start + k[None, :])
                even = tl.load(even_at)
                odd = tl.load(even_at + HALF)
            else:
                byte = tl.load(w_N[:, None] + start + k[None, :], (start + k < HALF)[None, :], 0)
                even = tl.load(even_at, (start + k < HALF)[:, None], 0.0)
                odd = tl.load(even_at + HALF, (start + k < HALF)[:, None], 0.0)
            if KIND == "nvfp4" or KIND == "mxfp4":
                at = tl.minimum(2 * (start + STEP) // GROUP + nth, K // GROUP - 1)
                after = tl.load(scale_N[:, None] + at[None, :])
                each = _widened(few, tl.float32) if KIND == "nvfp4" else _power_of_two(few)
                each = each.to(tl.bfloat16) if tl.bfloat16 == TYPE else each
                each = tl.broadcast_to(each[:, :, None], (BLOCK_N, MANY, GROUP // 2)).reshape(BLOCK_N, STEP)
                low, high = _e2m1_halves(byte, each, TYPE)
                acc = tl.dot(low, even, acc, input_precision="ieee")
                acc = tl.dot(high, odd, acc, input_precision="ieee")
                few = after
            elif GROUP % BLOCK_K == 0:
                low, high = _halves(byte, TYPE)
                at = tl.minimum(2 * (start + STEP), K - 1) // GROUP
                after = tl.load(scale_N + at)
                part = tl.dot(low, even, input_precision="ieee")
                part = tl.dot(high, odd, part, input_precision="ieee")
                acc += part * scale.to(tl.float32)[:, None]
                scale = after
            else:  # groups shorter than a step: a scale for each weight
                low, high = _halves(byte, TYPE)
                group = tl.minimum(2 * (start + k), K - 1) // GROUP
                each = tl.load(scale_N[:, None] + group[None, :]).to(tl.float32)
                acc = tl.dot((low.to(tl.float32) * each).to(TYPE), even, acc, input_precision="ieee")
                acc = tl.dot((high.to(tl.float32) * each).to(TYPE), odd, acc, input_precision="ieee")
        if KIND == "int4_bias":
            # A product of its own along the groups: the bias of each times the sum of its x, in three parts of TF32,
            # which is float32 but for its last bits. Codes lack 8: what that leaves of the bias is small, the middle
            # of the group's range.
            nth = tl.arange(0, 16)
            for start in range(0, K // GROUP, 16):
                is_group = start + nth < K // GROUP
                at = tl.minimum(start + nth, K // GROUP - 1)
                bias = tl.load(extra_N[:, None] + at[None, :]).to(tl.float32)
                bias += 8 * tl.load(scale_N[:, None] + at[None, :]).to(tl.float32)
                total = tl.load(x_extra_M[None, :] + at[:, None], is_group[:, None], 0.0)
                acc = tl.dot(bias, total, acc, input_precision="tf32x3")
        if KIND == "nvfp4":
            acc *= tl.load(extra_N)[:, None]
    else:
        k = tl.arange(0, BLOCK_K)
        if GROUP > 1:  # FP8 by blocks
            scale = tl.load(scale_N)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                w = tl.load(w_N[:, None] + start + k[None, :])
                x = tl.load(x_M[None, :] + start + k[:, None])
            else:
                if KIND == "plain" or KIND == "fp8":
                    w = tl.load(w_N[:, None] + start + k[None, :], (start + k < K)[None, :], 0.0)
                else:
                    w = tl.load(w_N[:, None] + start + k[None, :], (start + k < K)[None, :], 0)
                x = tl.load(x_M[None, :] + start + k[:, None], (start + k < K)[:, None], 0.0)
            if KIND == "int8":
                w = w.to(TYPE)
            elif KIND == "fp8_wide":
                w = _widened(w, TYPE)
            if GROUP > 1:
                after = tl.load(scale_N + tl.minimum(start + BLOCK_K, K - 1) // GROUP)
                part = tl.dot(w, x, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
                acc += part * scale[:, None]
                scale = after
            elif KIND == "fp8":
                # Without a bound on imprecise sums, Hopper keeps about 14 bits of an FP8 sum along all of K.
                acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee")
        if KIND != "plain" and GROUP == 1:
            acc *= tl.load(scale_N)[:, None]
        if KIND == "fp8":
            acc *= tl.load(x_extra_M)[None, :]
    return acc


@triton.jit
def row_at(w_ptr, scale_ptr, extra_ptr, n, K: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr):
    """Where rows n of a weight begin, their scales, and what else they have."""
    n = n.to(tl.int64)
    extra_N = n
    if KIND == "plain":
        w_N, scale_N = w_ptr + n * K, n
    elif KIND == "int4" or KIND == "int4_bias" or KIND == "nvfp4" or KIND == "mxfp4":
        w_N, scale_N = w_ptr + n * (K // 2), scale_ptr + n * (K // GROUP)
        if KIND == "int4_bias":
            extra_N = extra_ptr + n * (K // GROUP)
        elif KIND == "nvfp4":
            extra_N = extra_ptr + n
    elif GROUP > 1:
        w_N, scale_N = w_ptr + n * K, scale_ptr + n // GROUP * ((K + GROUP - 1) // GROUP)
    else:
        w_N, scale_N = w_ptr + n * K, scale_ptr + n
    return w_N, scale_N, extra_N


@triton.jit
def x_at(x_ptr, x_extra_ptr, m, K: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr):
    """Where rows m of x begin, and what goes with them."""
    m = m.to(tl.int64)
    if KIND == "fp8":
        extra_M = x_extra_ptr + m
    elif KIND == "int4_bias":
        extra_M = x_extra_ptr + m * (K // GROUP)
    else:
        extra_M = m
    return x_ptr + m * K, extra_M


def dense_specials(arch: int) -> list[tuple[str, Form, str]]:
    """What is compiled ahead: (name, a form of no size, dtype of x)."""
    kinds = [("bfloat16", "plain", 1), ("fp8", "fp8" if arch >= 89 else "fp8_wide", 1), ("int8", "int8", 1)]
    kinds += [("int4", "int4", 64), ("int4 bias", "int4_bias", 64), ("nvfp4", "nvfp4", 16)]
    found = [(name, Form(kind, 0, 0, group), "bfloat16") for name, kind, group in kinds]
    if arch == 90:
        found += [("float32", Form("plain", 0, 0), "float32"), ("int4 float16", Form("int4", 0, 0, 64), "float16")]
        found += [("fp8 block", Form("fp8", 0, 0, BLOCK), "bfloat16"), ("mxfp4", Form("mxfp4", 0, 0, 32), "bfloat16")]
    return found


def operand_types(kind: str, dtype: str) -> dict[str, str | None]:
    """Pointers, as Special spells them, of x, what goes with it, a weight, its scale, and what else it has; None where
    there is none."""
    p = POINTERS[dtype]
    table: dict[str, tuple[str | None, ...]] = {
        "plain": (p, None, p, None, None),
        "int8": (p, None, "*i8", "*fp32", None),
        "fp8": ("*fp8e4nv", "*fp32", "*fp8e4nv", "*fp32", None),
        "fp8_wide": (p, None, "*u8", "*fp32", None),
        "int4": (p, None, "*u8", "*fp16", None),
        "int4_bias": (p, "*fp32", "*u8", "*bf16", "*bf16"),
        "nvfp4": (p, None, "*u8", "*u8", "*fp32"),
        "mxfp4": (p, None, "*u8", "*u8", None),
    }
    return dict(zip(("x", "x_extra", "w", "scale", "extra"), table[kind], strict=True))


def special(
    name: str,
    kernel: Any,
    pointers: dict[str, str | None],
    integers: Sequence[str],
    constexprs: dict[str, Any],
    launch: dict[str, int],
) -> Special:
    """A Special in which pointers that are None are constants, as a call makes them."""
    signature = {k: v for k, v in pointers.items() if v is not None} | dict.fromkeys(integers, "i32")
    nothing = {k: None for k, v in pointers.items() if v is None}
    return Special(name, kernel, signature, {**constexprs, **nothing}, **launch)


def ahead(arch: int) -> list[Special]:
    """What lays activations out, at the width of the released model."""
    found = []
    two: dict[str, str | None] = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = {"K": 2816, "BLOCK": 4096}
    found.append(special("evens_first", _evens_first, two, [], sizes, {"num_warps": 8}))
    sums: dict[str, str | None] = {"x_ptr": "*bf16", "sum_ptr": "*fp32"}
    sizes = {"K": 2816, "GROUP": 64, **_sum_sizes(2816, 64)}
    found.append(special("sum_groups", _sum_groups, sums, [], sizes, {"num_warps": 8}))
    if arch >= 89:
        three = {**two, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        sizes = {"K": 2816, "BLOCK": 4096}
        found.append(special("quantise_rows", _quantise_rows, three, [], sizes, {"num_warps": 8}))
    return found
