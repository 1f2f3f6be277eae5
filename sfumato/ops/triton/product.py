"""The one loop over K, for every kind of weight; and how x is laid out for it.

The product is computed transposed, [outputs, rows]: the weights are the left operand of the tensor cores, which can
come from registers, so that few bits go from memory to registers to product without a detour; and few rows (an
expert's sixteen) are the short side, where the tensor cores allow 8 steps.

    int8   unpacked to x's dtype in registers (W8A16): streaming bound either way, and x's outliers keep their bits
    fp8    x is quantised token by token (W8A8). Where the hardware has no FP8 (sm_80) the weights are widened to x's
           dtype instead and x stays as it is. Scales of an output, or of blocks of 64 outputs and 32 inputs or more
    int4   unpacked in registers (W4A16); codes are exact in bfloat16, each group's scale multiplies its part of the
           sum in float32, and its bias, if there is one, the sum of its x
    nvfp4, mxfp4   unpacked in registers too, with the scale of their few inputs: 2 bits times 4 are exact in bfloat16

Weights of four bits are read as 16-bit words, four weights each, which come from shared memory as the tensor cores'
registers want them. So their x is laid out beforehand in four classes (`spread`): inputs 0, 4, 8 and so on, which the
first quarters of the words meet, then 1, 5, 9 for the second quarters. One order of summation along K whatever the
number of rows. How a weight lies is in `forms`. What this lacks: x in four bits, the tensor cores' own block scales
(sm_100).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.forms import BLOCK_ROWS, Form


class Prepared(NamedTuple):
    """The left side of a product as a weight meets it."""

    x_MK: Tensor
    extra: Tensor | None
    """What goes with it: the scale of a row (fp8), or the sum of each group (int4_bias)."""
    source_MK: Tensor | None
    """What low-rank factors meet: x with all its digits. None where nobody has kept it."""
    is_split: bool = False
    """The source lies in its four classes."""


def prepare(x_MK: Tensor, weight: Form, is_split: bool = False) -> Prepared:
    """The left side of a product laid out for this weight.

    `is_split`: it lies in its four classes already, if words of four weights need that."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    block = triton.next_power_of_2(width)
    warps = max(1, min(8, block // 512))
    if weight.is_halved:
        if not is_split:
            plain_MK, x_MK = x_MK, torch.empty_like(x_MK)
            _in_classes[(rows,)](plain_MK, x_MK, K=width, BLOCK=block, num_warps=warps, **overlap(x_MK.device))
        if weight.kind != "int4_bias":
            return Prepared(x_MK, None, x_MK, True)
        sum_MG = torch.empty(rows, width // weight.group, dtype=torch.float32, device=x_MK.device)
        sizes = _sum_sizes(width, weight.group)
        _sum_groups[(rows,)](
            x_MK, sum_MG, K=width, GROUP=weight.group, **sizes, num_warps=warps, **overlap(x_MK.device)
        )
        return Prepared(x_MK, sum_MG, x_MK, True)
    if weight.kind != "fp8":
        return Prepared(x_MK, None, x_MK)
    out_MK = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale_M = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    _quantise_rows[(rows,)](x_MK, out_MK, scale_M, K=width, BLOCK=block, num_warps=warps, **overlap(x_MK.device))
    return Prepared(out_MK, scale_M, x_MK)


@dataclass(frozen=True, eq=False)
class Ready:
    """The left side of a product, laid out by the kernel before it (`lay_out`), so that no kernel of its own does."""

    layout: str
    group: int
    x_MK: Tensor
    extra: Tensor | None

    @classmethod
    def room(cls, rows: int, weights: Sequence[Form], width: int, like: Tensor) -> Ready:
        """Uninitialised, for x of `like`'s dtype: in the layout of all of these weights, or else plain.

        Plain too where it would be rounded and low-rank factors meet it as well."""
        layouts = {weight.layout for weight in weights}
        name, group = layouts.pop() if len(layouts) == 1 else ("plain", 1)
        if name == "fp8" and any(weight.beside is not None for weight in weights):
            name = "plain"
        dtype = torch.float8_e4m3fn if name == "fp8" else like.dtype
        x_MK, extra = like.new_empty((rows, width), dtype=dtype), None
        if name == "fp8":
            extra = like.new_empty(rows, dtype=torch.float32)
        elif name == "sums":
            extra = like.new_empty((rows, width // group), dtype=torch.float32)
        return cls(name, group, x_MK, extra)

    def prepared_for(self, weight: Form) -> Prepared:
        """`prepare`, where this layout is not yet that of the weight."""
        if (weight.layout == (self.layout, self.group) and weight.kind != "int4_bias") or self.layout == "sums":
            source_MK = None if self.layout == "fp8" else self.x_MK
            return Prepared(self.x_MK, self.extra, source_MK, self.layout in ("classes", "sums"))
        return prepare(self.x_MK, weight, is_split=self.layout == "classes")


def _sum_sizes(width: int, group: int) -> dict[str, int]:
    return {"GROUPS": triton.next_power_of_2(width // group), "WORDS": triton.next_power_of_2(group // 4)}


ROWS = tl.constexpr(BLOCK_ROWS)
IN_ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""The interpreter knows no assembly; it takes the plain way below, which gives the same numbers."""


@triton.jit
def spread(i, K: tl.constexpr):
    """Where input i of K is stored for weights of two a byte: by its place in a word of four weights, then by the word.

    Every kernel that writes such an x calls this, but for `lay_out`, which has its own way to the same places."""
    return (i % 4) * (K // 4) + i // 4


@triton.jit
def _in_classes(x_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    row = tl.program_id(0).to(tl.int64) * K
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + col, col < K)
    tl.store(out_ptr + row + spread(col, K), x, col < K)


@triton.jit
def _sum_groups(
    x_ptr, sum_ptr, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr
):
    """The sum of each group of a row that lies in its four classes."""
    enter(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    word = tl.arange(0, WORDS)[None, :]
    is_live = (group < K // GROUP)[:, None] & (word < GROUP // 4)
    at = x_ptr + row * K + group[:, None] * (GROUP // 4) + word
    total = tl.zeros((GROUPS, WORDS), tl.float32)
    for place in tl.static_range(4):
        total += tl.load(at + place * (K // 4), is_live, 0.0).to(tl.float32)
    tl.store(sum_ptr + row * (K // GROUP) + group, tl.sum(total, 1), group < K // GROUP)


@triton.jit
def _quantise_rows(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
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
    """Whether this program is the last of so many to come here, which then sees what all of them have stored.

    Every thread's stores stand before the barrier, and the barrier before the count. The count was zero."""
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
        # As `spread` says, in four stores of neighbours each.
        even, odd = tl.split(x.reshape(ROWS, BLOCK // 4, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        word = tl.arange(0, BLOCK // 4)[None, :]
        is_live = is_row[:, None] & (word < K // 4)
        tl.store(out_at + word, x0.to(kind), is_live)
        tl.store(out_at + K // 4 + word, x1.to(kind), is_live)
        tl.store(out_at + 2 * (K // 4) + word, x2.to(kind), is_live)
        tl.store(out_at + 3 * (K // 4) + word, x3.to(kind), is_live)
        if LAYOUT == "sums":
            group = tl.arange(0, BLOCK // GROUP)[None, :]
            total = tl.sum(x.reshape(ROWS, BLOCK // GROUP, GROUP), 2)
            sum_at = extra_ptr + row[:, None] * (K // GROUP) + group
            tl.store(sum_at, total, is_row[:, None] & (group < K // GROUP))


@triton.jit
def _quarters(word, TYPE: tl.constexpr):
    """The four codes of each of these words, less 8, in TYPE."""
    if IN_ASSEMBLY and tl.float32 != TYPE:
        # Four bits under the exponent of 128 (float16: 1024) are the number 128 + code: one operation puts two there,
        # and one fused multiply-add takes 136 (1032) away. Two words, eight weights: eleven instructions.
        if tl.bfloat16 == TYPE:
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, one, less;
                mov.b32 one, 0x3F803F80;
                mov.b32 less, 0xC308C308;
                lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 s, $4, 4;
                lop3.b32 $1, s, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 s, $4, 8;
                lop3.b32 $2, s, 0x000F000F, 0x43004300, 0xEA;
                shr.u32 s, $4, 12;
                lop3.b32 $3, s, 0x000F000F, 0x43004300, 0xEA;
                fma.rn.bf16x2 $0, $0, one, less;
                fma.rn.bf16x2 $1, $1, one, less;
                fma.rn.bf16x2 $2, $2, one, less;
                fma.rn.bf16x2 $3, $3, one, less;
                }""",
                "=&r,=&r,=&r,=&r,r",
                [word],
                dtype=(tl.bfloat16,) * 4,
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                """{
                .reg .b32 s, one, less;
                mov.b32 one, 0x3C003C00;
                mov.b32 less, 0xE408E408;
                lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 s, $4, 4;
                lop3.b32 $1, s, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 s, $4, 8;
                lop3.b32 $2, s, 0x000F000F, 0x64006400, 0xEA;
                shr.u32 s, $4, 12;
                lop3.b32 $3, s, 0x000F000F, 0x64006400, 0xEA;
                fma.rn.f16x2 $0, $0, one, less;
                fma.rn.f16x2 $1, $1, one, less;
                fma.rn.f16x2 $2, $2, one, less;
                fma.rn.f16x2 $3, $3, one, less;
                }""",
                "=&r,=&r,=&r,=&r,r",
                [word],
                dtype=(tl.float16,) * 4,
                is_pure=True,
                pack=2,
            )
    else:
        a = ((word & 15).to(tl.float32) - 8).to(TYPE)
        b = ((word >> 4 & 15).to(tl.float32) - 8).to(TYPE)
        c = ((word >> 8 & 15).to(tl.float32) - 8).to(TYPE)
        d = ((word >> 12 & 15).to(tl.float32) - 8).to(TYPE)
    return a, b, c, d


@triton.jit
def _widened(byte, TYPE: tl.constexpr):
    """Bytes of float8_e4m3fn in TYPE.

    Sign, exponent and mantissa are moved to where float32 has them, then the difference of the two biases, 120, is
    multiplied in; that is right for the smallest numbers too."""
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
def _e2m1_quarters(word, scale, TYPE: tl.constexpr):
    """The four 4-bit floats of each of these words times their scale, in TYPE."""
    if IN_ASSEMBLY and tl.bfloat16 == TYPE:
        # As in `_e2m1`, two at a time: sign, and three bits where exponent and mantissa meet, moved to their places in
        # 16 bits. The scale is bfloat16 and the product exact.
        a, b, c, d = tl.inline_asm_elementwise(
            """{
            .reg .b32 m, s, up, nothing;
            mov.b32 up, 0x7E807E80;
            mov.b32 nothing, 0x80008000;
            shl.b32 m, $4, 6;
            and.b32 m, m, 0x01C001C0;
            shl.b32 s, $4, 12;
            lop3.b32 $0, s, 0x80008000, m, 0xEA;
            shl.b32 m, $4, 2;
            and.b32 m, m, 0x01C001C0;
            shl.b32 s, $4, 8;
            lop3.b32 $1, s, 0x80008000, m, 0xEA;
            shr.u32 m, $4, 2;
            and.b32 m, m, 0x01C001C0;
            shl.b32 s, $4, 4;
            lop3.b32 $2, s, 0x80008000, m, 0xEA;
            shr.u32 m, $4, 6;
            and.b32 m, m, 0x01C001C0;
            lop3.b32 $3, $4, 0x80008000, m, 0xEA;
            fma.rn.bf16x2 $0, $0, up, nothing;
            fma.rn.bf16x2 $1, $1, up, nothing;
            fma.rn.bf16x2 $2, $2, up, nothing;
            fma.rn.bf16x2 $3, $3, up, nothing;
            fma.rn.bf16x2 $0, $0, $5, nothing;
            fma.rn.bf16x2 $1, $1, $5, nothing;
            fma.rn.bf16x2 $2, $2, $5, nothing;
            fma.rn.bf16x2 $3, $3, $5, nothing;
            }""",
            "=&r,=&r,=&r,=&r,r,r",
            [word, scale],
            dtype=(tl.bfloat16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        each = scale.to(tl.float32)
        a = (_e2m1(word & 15) * each).to(TYPE)
        b = (_e2m1(word >> 4 & 15) * each).to(TYPE)
        c = (_e2m1(word >> 8 & 15) * each).to(TYPE)
        d = (_e2m1(word >> 12 & 15) * each).to(TYPE)
    return a, b, c, d


@triton.jit
def _four(a, b, c, d, x0, x1, x2, x3, acc):
    """Four products, one a class of inputs, onto acc; always in this order."""
    acc = tl.dot(a, x0, acc, input_precision="ieee")
    acc = tl.dot(b, x1, acc, input_precision="ieee")
    acc = tl.dot(c, x2, acc, input_precision="ieee")
    return tl.dot(d, x3, acc, input_precision="ieee")


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
    """The product w xᵀ in float32, [BLOCK_N, BLOCK_M].

    It takes pointers to the beginning of each row of x and of w, to the first scale of each row, and to the first of
    what else it has. All rows must exist: what lies beyond the edge is a repetition that is not stored."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    TYPE: tl.constexpr = x_M.dtype.scalar.element_ty
    if KIND == "int4" or KIND == "int4_bias" or KIND == "nvfp4" or KIND == "mxfp4":
        WORDS: tl.constexpr = K // 4
        STEP: tl.constexpr = BLOCK_K // 4
        k = tl.arange(0, STEP)
        # A row's few bytes do not suit an asynchronous copy: the scales of the next step are fetched during this one.
        if KIND == "nvfp4" or KIND == "mxfp4":
            MANY: tl.constexpr = BLOCK_K // GROUP
            nth = tl.arange(0, MANY)
            few = tl.load(scale_N[:, None] + tl.minimum(nth, K // GROUP - 1)[None, :])
        elif GROUP % BLOCK_K == 0:
            scale = tl.load(scale_N)
        for start in range(0, WORDS, STEP):
            at = x_M[None, :] + start + k[:, None]
            if WORDS % STEP == 0:
                word = tl.load(w_N[:, None] + start + k[None, :])
                x0, x1 = tl.load(at), tl.load(at + WORDS)
                x2, x3 = tl.load(at + 2 * WORDS), tl.load(at + 3 * WORDS)
            else:
                is_live = (start + k < WORDS)[:, None]
                word = tl.load(w_N[:, None] + start + k[None, :], (start + k < WORDS)[None, :], 0)
                x0, x1 = tl.load(at, is_live, 0.0), tl.load(at + WORDS, is_live, 0.0)
                x2, x3 = tl.load(at + 2 * WORDS, is_live, 0.0), tl.load(at + 3 * WORDS, is_live, 0.0)
            if KIND == "nvfp4" or KIND == "mxfp4":
                nearest = tl.minimum(4 * (start + STEP) // GROUP + nth, K // GROUP - 1)
                after = tl.load(scale_N[:, None] + nearest[None, :])
                each = _widened(few, tl.float32) if KIND == "nvfp4" else _power_of_two(few)
                each = each.to(tl.bfloat16) if tl.bfloat16 == TYPE else each
                each = tl.broadcast_to(each[:, :, None], (BLOCK_N, MANY, GROUP // 4)).reshape(BLOCK_N, STEP)
                a, b, c, d = _e2m1_quarters(word, each, TYPE)
                acc = _four(a, b, c, d, x0, x1, x2, x3, acc)
                few = after
            elif GROUP % BLOCK_K == 0:
                a, b, c, d = _quarters(word, TYPE)
                after = tl.load(scale_N + tl.minimum(4 * (start + STEP), K - 1) // GROUP)
                part = _four(a, b, c, d, x0, x1, x2, x3, None)
                acc += part * scale.to(tl.float32)[:, None]
                scale = after
            else:  # groups shorter than a step: a scale for each weight
                a, b, c, d = _quarters(word, TYPE)
                group = tl.minimum(4 * (start + k), K - 1) // GROUP
                each = tl.load(scale_N[:, None] + group[None, :]).to(tl.float32)
                a, b = (a.to(tl.float32) * each).to(TYPE), (b.to(tl.float32) * each).to(TYPE)
                c, d = (c.to(tl.float32) * each).to(TYPE), (d.to(tl.float32) * each).to(TYPE)
                acc = _four(a, b, c, d, x0, x1, x2, x3, acc)
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
        w_N, scale_N = w_ptr + n * (K // 4), scale_ptr + n * (K // GROUP)
        if KIND == "int4_bias":
            extra_N = extra_ptr + n * (K // GROUP)
        elif KIND == "nvfp4":
            extra_N = extra_ptr + n
    elif GROUP > 1:
        w_N, scale_N = w_ptr + n * K, scale_ptr + n // ROWS * ((K + GROUP - 1) // GROUP)
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
    specials = []
    two: dict[str, str | None] = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = {"K": 2816, "BLOCK": 4096}
    specials.append(special("in_classes", _in_classes, two, [], sizes, {"num_warps": 8}))
    sums: dict[str, str | None] = {"x_ptr": "*bf16", "sum_ptr": "*fp32"}
    sizes = {"K": 2816, "GROUP": 64, **_sum_sizes(2816, 64)}
    specials.append(special("sum_groups", _sum_groups, sums, [], sizes, {"num_warps": 8}))
    if arch >= 89:
        three = {**two, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        sizes = {"K": 2816, "BLOCK": 4096}
        specials.append(special("quantise_rows", _quantise_rows, three, [], sizes, {"num_warps": 8}))
    return specials
