"""linear and feed_forward: x Wᵀ for weights in bfloat16, float16, float32, int8, FP8 and int4.

With the 256 rows of a canvas these are bound by the bytes of the weights, so each weight is read from memory once:
all tiles of rows of one tile of outputs stand side by side in the launch, and the later ones find the weights in L2.
The product is computed transposed, [outputs, rows]: the weights are the left operand of the tensor cores, which can
come from registers, so that int8 and int4 go from memory to registers to product without a detour; and few rows (an
expert's sixteen) are the short side, where the tensor cores allow 8 steps. `product`, the one loop over K, serves the
experts too.

    int8   unpacked to x's dtype in registers (W8A16): streaming bound either way, and x's outliers keep their bits
    fp8    x is quantised token by token (W8A8). Where the hardware has no FP8 (sm_80) the weights are widened to x's
           dtype instead and x stays as it is
    int4   unpacked in registers (W4A16); codes are exact in bfloat16, each group's scale multiplies its part of the
           sum in float32. x is laid out beforehand as even inputs, then odd ones: what the halves of a byte meet

One order of summation along K whatever the number of rows. What this lacks: split K (a single row, as in
autoregressive mode, leaves most of a large GPU idle), tensor memory descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.packed import Packed, quantise
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.tuning import Config, config

Weight = Tensor | Packed

# A weight in 16 bits: 128 x 128 tiles, because with 256 rows the traffic between L2 and the multiprocessors,
# (rows / BLOCK_M) x weights + (outputs / BLOCK_N) x activations, is what binds next. FP8: the same bytes a step.
# Float32 has no tensor cores here (no TF32), so its tile is what registers hold.
_PLAIN = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
_FLOAT32 = {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
_FP8 = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
_INT8 = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
_INT4 = {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5}
_LINEAR = {"plain": _PLAIN, "float32": _FLOAT32, "fp8": _FP8, "fp8_wide": _INT8, "int8": _INT8, "int4": _INT4}
DEFAULTS: dict[str, dict[str, Config]] = {"linear": _LINEAR, "gate_up": _LINEAR}
CHOICES = {
    "BLOCK_N": (64, 128),
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_K": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5),
}
AT_ONCE = 3
"""Weights that one launch takes: queries, keys, values."""


def pack(weight: Tensor, kind: str = "") -> Weight:
    """A weight [O, I] or a stack [E, O, I] in the form that these operations take: as it is, or int8, fp8, int4."""
    return quantise(weight, kind) if kind else weight.contiguous()


def linear(x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
    """x Wᵀ for each of these weights [O, I]: several products of one input are one operation."""
    x_MK = x.reshape(-1, x.shape[-1])
    forms = [form(weight, x) for weight in weights]
    outs = [torch.empty(len(x_MK), weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    if x.numel() and weights:
        is_one = len({(f.kind, f.group) for f in forms}) == 1
        count = AT_ONCE if is_one else 1
        prepared: dict[str, tuple[Tensor, Tensor | None]] = {}
        for at in range(0, len(weights), count):
            kind = forms[at].kind
            if kind not in prepared:
                prepared[kind] = prepare(x_MK, kind)
            _launch_linear(*prepared[kind], forms[at : at + count], outs[at : at + count], x.dtype)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def feed_forward(x: Tensor, gate_FD: Weight, up_FD: Weight, down_DF: Weight) -> Tensor:
    """down(gated(gate(x), up(x))). gate and up are of one kind."""
    x_MK = x.reshape(-1, x.shape[-1])
    gate, up = form(gate_FD, x), form(up_FD, x)
    if (gate.kind, gate.group, gate.outputs) != (up.kind, up.group, up.outputs):
        raise ValueError(
            f"gate and up differ: {gate.kind} x {gate.outputs} and {up.kind} x {up.outputs}; pack both alike"
        )
    hidden_MF = torch.empty(len(x_MK), gate.outputs, dtype=x.dtype, device=x.device)
    down = form(down_DF, hidden_MF)
    out_MD = torch.empty(len(x_MK), down.outputs, dtype=x.dtype, device=x.device)
    if x.numel():
        tiles, launch = blocks("gate_up", (gate.outputs, gate.inputs), gate, x.dtype, x.device)
        grid = (triton.cdiv(len(x_MK), tiles["BLOCK_M"]) * triton.cdiv(2 * gate.outputs, tiles["BLOCK_N"]),)
        _gate_up[grid](
            *prepare(x_MK, gate.kind),
            gate.data,
            gate.scale,
            up.data,
            up.scale,
            hidden_MF,
            len(x_MK),
            F=gate.outputs,
            K=gate.inputs,
            GROUP=gate.group,
            KIND=gate.kind,
            SPLIT=down.kind == "int4",
            **tiles,
            **launch,
        )
        ready = (hidden_MF, None) if down.kind == "int4" else prepare(hidden_MF, down.kind)
        _launch_linear(*ready, [down], [out_MD], x.dtype)
    return out_MD.view(*x.shape[:-1], down.outputs)


@dataclass(frozen=True, eq=False)
class Form:
    """A weight as the kernels take it: which way it is multiplied, its sizes, its codes and their scales."""

    kind: str
    outputs: int
    inputs: int
    group: int = 1
    data: Tensor | None = None
    scale: Tensor | None = None


def form(weight: Weight, x: Tensor) -> Form:
    """How this weight is multiplied on x's device. ValueError where x does not fit."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]} and the weight takes {weight.shape[-1]}")
    outputs, inputs = weight.shape[-2:]
    if not isinstance(weight, Packed):
        if weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; give both one dtype")
        return Form("plain", outputs, inputs, 1, weight.contiguous())
    if weight.kind == "fp8" and not has_fp8(str(x.device)):
        # Bytes: the compiler does not know the type on such a device.
        return Form("fp8_wide", outputs, inputs, 1, weight.data.view(torch.uint8), weight.scale)
    return Form(weight.kind, outputs, inputs, weight.group if weight.kind == "int4" else 1, weight.data, weight.scale)


@cache
def has_fp8(device: str) -> bool:
    """Whether this device multiplies float8_e4m3fn: from sm_89 on; and the interpreter does."""
    return not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (8, 9)


def blocks(
    op: str,
    shape: Sequence[int],
    weight: Form,
    dtype: torch.dtype | str,
    device: torch.device | str,
    defaults: dict[str, dict[str, Config]] | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Tile sizes that fit this weight, and how the kernel is launched."""
    short = str(dtype).removeprefix("torch.")
    table = (defaults or DEFAULTS)[op]
    default = table["float32" if short == "float32" and weight.kind != "fp8" else weight.kind]
    small = {**default, "num_stages": min(default["num_stages"], 3)}
    named = short if weight.kind == "plain" else f"{weight.kind} {short}"
    chosen = config(op, shape, named, device, default, small)
    tiles = {name: value for name, value in chosen.items() if name.startswith("BLOCK_")}
    tiles["BLOCK_K"] = min(tiles["BLOCK_K"], max(32, triton.next_power_of_2(weight.inputs)))
    if weight.kind == "int4" and weight.group >= 32:
        tiles["BLOCK_K"] = min(tiles["BLOCK_K"], weight.group)  # one scale for the whole step
    return tiles, {name: chosen[name] for name in ("num_warps", "num_stages")}


def prepare(x_MK: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """x as weights of this kind meet it, and its scale a row (fp8)."""
    x_MK = x_MK.contiguous()
    rows, width = x_MK.shape
    if kind not in ("fp8", "int4"):
        return x_MK, None
    block = triton.next_power_of_2(width)
    warps = max(1, min(8, block // 512))
    if kind == "int4":
        out_MK = torch.empty_like(x_MK)
        _evens_first[(rows,)](x_MK, out_MK, K=width, BLOCK=block, num_warps=warps)
        return out_MK, None
    out_MK = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x_MK.device)
    scale_M = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    _quantise_rows[(rows,)](x_MK, out_MK, scale_M, K=width, BLOCK=block, num_warps=warps)
    return out_MK, scale_M


def _launch_linear(
    x_MK: Tensor, x_scale: Tensor | None, forms: Sequence[Form], outs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    first = forms[0]
    rows, width = x_MK.shape
    tiles, launch = blocks("linear", (sum(f.outputs for f in forms), width), first, dtype, x_MK.device)
    counts = [f.outputs for f in forms] + [0] * (AT_ONCE - len(forms))
    operands: list[Tensor | None] = []
    for i in range(AT_ONCE):
        operands += [forms[i].data, forms[i].scale, outs[i]] if i < len(forms) else [None, None, None]
    columns = sum(triton.cdiv(n, tiles["BLOCK_N"]) for n in counts)
    _linear[(triton.cdiv(rows, tiles["BLOCK_M"]) * columns,)](
        x_MK,
        x_scale,
        *operands,
        rows,
        N0=counts[0],
        N1=counts[1],
        N2=counts[2],
        K=width,
        GROUP=first.group,
        KIND=first.kind,
        **tiles,
        **launch,
    )


IN_ASSEMBLY = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""The interpreter knows no assembly; it takes the plain way below, which gives the same numbers."""


@triton.jit
def _evens_first(x_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * K
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + col, col < K)
    tl.store(out_ptr + row + (col % 2) * (K // 2) + col // 2, x, col < K)


@triton.jit
def _quantise_rows(x_ptr, out_ptr, scale_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * K + col, col < K, 0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / 448.0
    x = x / tl.where(scale > 0, scale, 1.0)
    tl.store(out_ptr + row * K + col, tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv), col < K)
    tl.store(scale_ptr + row, scale)


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
def product(
    x_M,
    x_scale_M,
    w_N,
    scale_N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """w xᵀ in float32, [BLOCK_N, BLOCK_M], from pointers to the beginning of each row of x and of w and to the first
    scale of each row. All rows must exist: what lies beyond the edge is a repetition that is not stored."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    TYPE: tl.constexpr = x_M.dtype.scalar.element_ty
    if KIND == "int4":
        HALF: tl.constexpr = K // 2
        STEP: tl.constexpr = BLOCK_K // 2
        k = tl.arange(0, STEP)
        # Two bytes a row are too few for an asynchronous copy: the scale of the next step is fetched during this one.
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
            low, high = _halves(byte, TYPE)
            if GROUP % BLOCK_K == 0:
                after = tl.load(scale_N + tl.minimum(2 * (start + STEP), K - 1) // GROUP)
                part = tl.dot(low, even, input_precision="ieee")
                part = tl.dot(high, odd, part, input_precision="ieee")
                acc += part * scale.to(tl.float32)[:, None]
                scale = after
            else:  # groups shorter than a step: a scale for each weight
                group = tl.minimum(2 * (start + k), K - 1) // GROUP
                each = tl.load(scale_N[:, None] + group[None, :]).to(tl.float32)
                acc = tl.dot((low.to(tl.float32) * each).to(TYPE), even, acc, input_precision="ieee")
                acc = tl.dot((high.to(tl.float32) * each).to(TYPE), odd, acc, input_precision="ieee")
    else:
        k = tl.arange(0, BLOCK_K)
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
            if KIND == "fp8":
                # Without a bound on imprecise sums, Hopper keeps about 14 bits of an FP8 sum along all of K.
                acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
            else:
                if KIND == "int8":
                    w = w.to(TYPE)
                elif KIND == "fp8_wide":
                    w = _widened(w, TYPE)
                acc = tl.dot(w, x, acc, input_precision="ieee")
        if KIND != "plain":
            acc *= tl.load(scale_N)[:, None]
        if KIND == "fp8":
            acc *= tl.load(x_scale_M)[None, :]
    return acc


@triton.jit
def row_at(w_ptr, scale_ptr, n, K: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr):
    """Where rows n of a weight begin, and their scales."""
    n = n.to(tl.int64)
    if KIND == "plain":
        w_N, scale_N = w_ptr + n * K, n
    elif KIND == "int4":
        w_N, scale_N = w_ptr + n * (K // 2), scale_ptr + n * (K // GROUP)
    else:
        w_N, scale_N = w_ptr + n * K, scale_ptr + n
    return w_N, scale_N


@triton.jit
def x_at(x_ptr, x_scale_ptr, m, K: tl.constexpr, KIND: tl.constexpr):
    """Where rows m of x begin, and their scales."""
    m = m.to(tl.int64)
    if KIND == "fp8":
        x_M, scale_M = x_ptr + m * K, x_scale_ptr + m
    else:
        x_M, scale_M = x_ptr + m * K, m
    return x_M, scale_M


@triton.jit
def gelu(x):
    """Tanh form: x (1 + tanh u) / 2 is x / (1 + exp(-2u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def gate_and_up(i):
    """Rows of a tile that holds both: (row of the hidden layer within the tile, whether up). Eight gates, their eight
    ups, and so on: the tensor cores' layout has rows r and r + 8 in one thread, so that a gate meets its up there."""
    return (i // 16) * 8 + i % 8, (i // 8) % 2 == 1


@triton.jit
def gated(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """gelu(gate) x up of a tile in the order of `gate_and_up`: [BLOCK_N / 2, BLOCK_M]."""
    pairs = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs)
    return (gelu(gate) * up).reshape(BLOCK_N // 2, BLOCK_M)


@triton.jit
def placed(f, F: tl.constexpr, SPLIT: tl.constexpr):
    """Where hidden value f is stored: evens first, then odd ones, if int4 weights come next."""
    return (f % 2) * (F // 2) + f // 2 if SPLIT else f


@triton.jit
def _linear(
    x_ptr,
    x_scale_ptr,
    w0_ptr,
    scale0_ptr,
    out0_ptr,
    w1_ptr,
    scale1_ptr,
    out1_ptr,
    w2_ptr,
    scale2_ptr,
    out2_ptr,
    rows,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_M, x_scale_M = x_at(x_ptr, x_scale_ptr, tl.minimum(m, rows - 1), K, KIND)
    w_N, scale_N = row_at(w0_ptr, scale0_ptr, tl.minimum(n, N0 - 1), K, GROUP, KIND)
    out_N, is_live, width = out0_ptr + n, n < N0, N0
    # Which weight this tile belongs to is settled here, so that there is one loop over K and not three.
    if N1 > 0:
        SKIP1: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
        n1 = n - SKIP1 * BLOCK_N
        w1_N, scale1_N = row_at(w1_ptr, scale1_ptr, tl.minimum(tl.maximum(n1, 0), N1 - 1), K, GROUP, KIND)
        w_N, scale_N = tl.where(tile >= SKIP1, w1_N, w_N), tl.where(tile >= SKIP1, scale1_N, scale_N)
        out_N, width = tl.where(tile >= SKIP1, out1_ptr + n1, out_N), tl.where(tile >= SKIP1, N1, width)
        is_live = tl.where(tile >= SKIP1, n1 < N1, is_live)
    if N2 > 0:
        SKIP2: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N + (N1 + BLOCK_N - 1) // BLOCK_N
        n2 = n - SKIP2 * BLOCK_N
        w2_N, scale2_N = row_at(w2_ptr, scale2_ptr, tl.minimum(tl.maximum(n2, 0), N2 - 1), K, GROUP, KIND)
        w_N, scale_N = tl.where(tile >= SKIP2, w2_N, w_N), tl.where(tile >= SKIP2, scale2_N, scale_N)
        out_N, width = tl.where(tile >= SKIP2, out2_ptr + n2, out_N), tl.where(tile >= SKIP2, N2, width)
        is_live = tl.where(tile >= SKIP2, n2 < N2, is_live)
    acc = product(x_M, x_scale_M, w_N, scale_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
    at = out_N[:, None] + (m.to(tl.int64) * width)[None, :]
    tl.store(at, acc.to(out0_ptr.dtype.element_ty), (m < rows)[None, :] & is_live[:, None])


@triton.jit
def _gate_up(
    x_ptr,
    x_scale_ptr,
    gate_ptr,
    gate_scale_ptr,
    up_ptr,
    up_scale_ptr,
    out_ptr,
    rows,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // tiles_m) * HALF
    x_M, x_scale_M = x_at(x_ptr, x_scale_ptr, tl.minimum(m, rows - 1), K, KIND)
    within, is_up = gate_and_up(tl.arange(0, BLOCK_N))
    n = tl.minimum(first + within, F - 1)
    gate_N, gate_scale_N = row_at(gate_ptr, gate_scale_ptr, n, K, GROUP, KIND)
    up_N, up_scale_N = row_at(up_ptr, up_scale_ptr, n, K, GROUP, KIND)
    w_N, scale_N = tl.where(is_up, up_N, gate_N), tl.where(is_up, up_scale_N, gate_scale_N)
    acc = product(x_M, x_scale_M, w_N, scale_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
    f = first + tl.arange(0, HALF)
    at = m.to(tl.int64)[None, :] * F + placed(f, F, SPLIT)[:, None]
    hidden = gated(acc, BLOCK_N, BLOCK_M)
    tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), (m < rows)[None, :] & (f < F)[:, None])


def dense_specials(arch: int) -> list[tuple[str, str, str]]:
    """What is compiled ahead: (name, kind, dtype of x)."""
    kinds = [("bfloat16", "plain", "bfloat16"), ("fp8", "fp8" if arch >= 89 else "fp8_wide", "bfloat16")]
    kinds += [("int8", "int8", "bfloat16"), ("int4", "int4", "bfloat16")]
    if arch == 90:
        kinds += [("float32", "plain", "float32"), ("int4 float16", "int4", "float16")]
    return kinds


def operand_types(kind: str, dtype: str) -> dict[str, str | None]:
    """Pointers, as Special spells them, of x, its scale, a weight and its scale; None where there is none."""
    p = POINTERS[dtype]
    table: dict[str, dict[str, str | None]] = {
        "plain": {"x": p, "x_scale": None, "w": p, "scale": None},
        "int8": {"x": p, "x_scale": None, "w": "*i8", "scale": "*fp32"},
        "fp8": {"x": "*fp8e4nv", "x_scale": "*fp32", "w": "*fp8e4nv", "scale": "*fp32"},
        "fp8_wide": {"x": p, "x_scale": None, "w": "*u8", "scale": "*fp32"},
        "int4": {"x": p, "x_scale": None, "w": "*u8", "scale": "*fp16"},
    }
    return table[kind]


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
    """At the released model's sizes: queries, keys and values of a sliding layer, and of a full one; the attention's
    output; the dense layer; and what lays activations out for them."""
    found = []
    device = f"sm_{arch}"
    for name, kind, dtype in dense_specials(arch):
        types, p = operand_types(kind, dtype), POINTERS[dtype]
        for what, outputs, inputs in (
            ("qkv sliding", (4096, 2048, 2048), 2816),
            ("qk full", (8192, 1024), 2816),
            ("output sliding", (2816,), 4096),
            ("output full", (2816,), 8192),
            ("down", (2816,), 2112),
        ):
            blank = Form(kind, sum(outputs), inputs, 64 if kind == "int4" else 1)
            tiles, launch = blocks("linear", (sum(outputs), inputs), blank, dtype, device)
            counts = [*outputs, 0, 0][:AT_ONCE]
            pointers = {"x_ptr": types["x"], "x_scale_ptr": types["x_scale"]}
            for i, count in enumerate(counts):
                pointers[f"w{i}_ptr"] = types["w"] if count else None
                pointers[f"scale{i}_ptr"] = types["scale"] if count else None
                pointers[f"out{i}_ptr"] = p if count else None
            sizes = {"N0": counts[0], "N1": counts[1], "N2": counts[2], "K": inputs}
            constexprs = {**sizes, "GROUP": blank.group, "KIND": kind, **tiles}
            found.append(special(f"linear {what} {name}", _linear, pointers, ["rows"], constexprs, launch))
        blank = Form(kind, 2112, 2816, 64 if kind == "int4" else 1)
        tiles, launch = blocks("gate_up", (2112, 2816), blank, dtype, device)
        pointers = {"x_ptr": types["x"], "x_scale_ptr": types["x_scale"], "out_ptr": p}
        pointers |= {"gate_ptr": types["w"], "up_ptr": types["w"]}
        pointers |= {"gate_scale_ptr": types["scale"], "up_scale_ptr": types["scale"]}
        constexprs = {"F": 2112, "K": 2816, "GROUP": blank.group, "KIND": kind, "SPLIT": kind == "int4", **tiles}
        found.append(special(f"gate_up {name}", _gate_up, pointers, ["rows"], constexprs, launch))
    two: dict[str, str | None] = {"x_ptr": "*bf16", "out_ptr": "*bf16"}
    sizes = {"K": 2816, "BLOCK": 4096}
    found.append(special("evens_first", _evens_first, two, [], sizes, {"num_warps": 8}))
    if arch >= 89:
        three = {**two, "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        found.append(special("quantise_rows", _quantise_rows, three, [], sizes, {"num_warps": 8}))
    return found
