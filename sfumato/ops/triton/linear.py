"""linear and feed_forward: x Wᵀ for weights in bfloat16, float16, float32, int8, FP8, int4, NVFP4 and MXFP4.

With the 256 rows of a canvas these are bound by the bytes of the weights, so each weight is read from memory once:
all tiles of rows of one tile of outputs stand side by side in the launch, and the later ones find the weights in L2.
How each kind is multiplied stands in `product`, the one loop over K, which serves the experts too.

A product with few outputs leaves half of a large GPU idle: `splits` says over how many programs its inputs are shared
where the kernel behind it sums the parts, in their order (`block`). What this lacks: that for weights of two a byte,
and where nobody is there to sum; tensor memory descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.contract import Matrix
from sfumato.ops.packed import BLOCK
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.forms import Form, are_alike, blocks, dense_specials, form, operand_types
from sfumato.ops.triton.low_rank import AT_ONCE, added, addition, for_special, roomy
from sfumato.ops.triton.product import Prepared, prepare, product, row_at, special, spread, x_at
from sfumato.ops.triton.tuning import SHARED_KIB, Config, chip, config, processors

# A weight in 16 bits: 128 x 128 tiles, because with 256 rows the traffic between L2 and the multiprocessors,
# (rows / BLOCK_M) x weights + (outputs / BLOCK_N) x activations, is what binds next. FP8: the same bytes a step.
# Float32 has no tensor cores here (no TF32), so its tile is what registers hold.
_PLAIN = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
_FLOAT32 = {"BLOCK_N": 64, "BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
_FP8 = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
_INT8 = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
_INT4 = {"BLOCK_N": 128, "BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 5}
_LINEAR = {"plain": _PLAIN, "float32": _FLOAT32, "fp8": _FP8, "fp8_wide": _INT8, "int8": _INT8, "int4": _INT4}
_LINEAR |= {"nvfp4": _INT4, "mxfp4": _INT4}
DEFAULTS: dict[str, dict[str, Config]] = {"linear": _LINEAR, "gate_up": _LINEAR}
CHOICES = {
    "BLOCK_N": (64, 128),
    "BLOCK_M": (32, 64, 128, 256),
    "BLOCK_K": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5),
}
RANK = 16
"""Of the adapters that are compiled for ahead."""
CANVAS = 256
"""Rows that the released model's canvas has."""


def linear(x: Tensor, *weights: Matrix) -> tuple[Tensor, ...]:
    """As `reference.linear`."""
    x_MK = x.reshape(-1, x.shape[-1])
    forms = [form(weight, x) for weight in weights]
    outs = [torch.empty(len(x_MK), weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    if x.numel() and weights:
        count = AT_ONCE if are_alike(forms) else 1
        prepared: dict[tuple[str, int], Prepared] = {}
        for at in range(0, len(weights), count):
            first = forms[at]
            if (first.kind, first.group) not in prepared:
                prepared[first.kind, first.group] = prepare(x_MK, first)
            ready = prepared[first.kind, first.group]
            multiply(ready, forms[at : at + count], outs[at : at + count], x.dtype)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def feed_forward(x: Tensor, gate_FD: Matrix, up_FD: Matrix, down_DF: Matrix) -> Tensor:
    """As `reference.feed_forward`; gate and up of one kind are one product."""
    x_MK = x.reshape(-1, x.shape[-1])
    gate, up = pair(form(gate_FD, x), form(up_FD, x))
    hidden_MF = torch.empty(len(x_MK), gate.outputs, dtype=x.dtype, device=x.device)
    down = form(down_DF, hidden_MF)
    out_MD = torch.empty(len(x_MK), down.outputs, dtype=x.dtype, device=x.device)
    if x.numel():
        is_split = hide(lambda weight: prepare(x_MK, weight), gate, up, hidden_MF, down.is_halved)
        multiply(prepare(hidden_MF, down, is_split=is_split), [down], [out_MD], x.dtype)
    return out_MD.view(*x.shape[:-1], down.outputs)


def pair(gate: Form, up: Form) -> tuple[Form, Form]:
    """Both as one launch takes them, where it takes both. ValueError where their outputs differ."""
    if gate.outputs != up.outputs:
        raise ValueError(f"gate has {gate.outputs} outputs and up {up.outputs}; they must be as many")
    if (gate.kind, gate.group) != (up.kind, up.group) or gate.launch == up.launch:
        return gate, up
    return _in_float32(gate), _in_float32(up)  # scales of two dtypes


def hide(prepared: Callable[[Form], Prepared], gate: Form, up: Form, hidden_MF: Tensor, is_split: bool) -> bool:
    """gelu(gate(x)) x up(x) into `hidden_MF`; whether it lies in its four classes now, as `is_split` asks for.

    x is what `prepared` gives for a weight. Two kinds take a launch each, and their result lies plain."""
    if are_alike([gate, up]):
        gate_up(prepared(gate), gate, up, hidden_MF, is_split)
        return True
    both = [torch.empty_like(hidden_MF) for _ in range(2)]
    for weight, out in zip((gate, up), both, strict=True):
        multiply(prepared(weight), [weight], [out], hidden_MF.dtype)
    torch.mul(F.gelu(both[0], approximate="tanh"), both[1], out=hidden_MF)
    return False


def gate_up(x: Prepared, gate: Form, up: Form, hidden_MF: Tensor, is_split: bool) -> None:
    """gelu(gate(x)) x up(x) into `hidden_MF`, in its four classes if `is_split`."""
    x_MK, rest = x.x_MK, addition(x, [gate, up], 2)
    tiles, launch = blocks("gate_up", (gate.outputs, gate.inputs), gate, hidden_MF.dtype, x_MK.device, DEFAULTS)
    grid = (triton.cdiv(len(x_MK), tiles["BLOCK_M"]) * triton.cdiv(2 * gate.outputs, tiles["BLOCK_N"]),)
    _gate_up[grid](
        x_MK,
        x.extra,
        *gate.operands,
        *up.operands,
        *rest.operands,
        hidden_MF,
        len(x_MK),
        F=gate.outputs,
        K=gate.inputs,
        GROUP=gate.group,
        KIND=gate.kind,
        SPLIT=is_split,
        **rest.sizes,
        **tiles,
        **roomy(launch, gate, rest.inner is not None, x_MK.device),
        **overlap(x_MK.device),
    )


def _in_float32(weight: Form) -> Form:
    extra = None if weight.extra is None else weight.extra.float()
    return replace(weight, scale=None if weight.scale is None else weight.scale.float(), extra=extra)


def multiply(x: Prepared, forms: Sequence[Form], outs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """The products x Wᵀ of weights that one launch takes, into `outs`.

    x was of this dtype. One weight may have an output [P, M, N] in float32: a part of the sum each, over as many shares
    of the inputs."""
    x_MK, first, rest = x.x_MK, forms[0], addition(x, forms, AT_ONCE)
    rows, width = x_MK.shape
    tiles, launch = blocks("linear", (sum(f.outputs for f in forms), width), first, dtype, x_MK.device, DEFAULTS)
    counts = [f.outputs for f in forms] + [0] * (AT_ONCE - len(forms))
    operands: list[Tensor | None] = []
    for i in range(AT_ONCE):
        operands += [*forms[i].operands, outs[i]] if i < len(forms) else [None] * 4
    columns = sum(triton.cdiv(n, tiles["BLOCK_N"]) for n in counts)
    parts = len(outs[0]) if outs[0].dim() == 3 else 1
    if parts > 1:
        launch["num_stages"] = _stages(first, tiles, launch, dtype, x_MK.device) or launch["num_stages"]
    _linear[(triton.cdiv(rows, tiles["BLOCK_M"]) * columns, parts)](
        x_MK,
        x.extra,
        *operands,
        *rest.operands,
        rows,
        N0=counts[0],
        N1=counts[1],
        N2=counts[2],
        K=width,
        SPLIT_K=parts,
        GROUP=first.group,
        KIND=first.kind,
        **rest.sizes,
        **tiles,
        **roomy(launch, first, rest.inner is not None, x_MK.device),
        **overlap(x_MK.device),
    )


def splits(weight: Form, dtype: torch.dtype | str, device: torch.device | str) -> int:
    """Over how many programs to share the inputs of this product: as many as one canvas needs to fill the GPU.

    It follows from the shape alone, so that a row's sums do not depend on its batch."""
    if weight.is_halved:
        return 1
    shape = weight.outputs, weight.inputs
    tiles, launch = blocks("linear", shape, weight, dtype, device, DEFAULTS)
    programs = triton.cdiv(CANVAS, tiles["BLOCK_M"]) * triton.cdiv(weight.outputs, tiles["BLOCK_N"])
    # All of them at once, or a second wave would cost what the first has gained. Two on a multiprocessor hide each
    # other's waiting, but those that have one alone should not be many.
    many = processors(str(device))
    most = many if _stages(weight, tiles, launch, dtype, device) is None else 3 * many // 2
    fitting = [parts for parts in (4, 3, 2) if programs * parts <= most and _is_even(weight, parts, tiles["BLOCK_K"])]
    short = str(dtype).removeprefix("torch.")
    named = short if weight.kind == "plain" else f"{weight.kind} {short}"
    return config("parts", shape, named, device, {"PARTS": fitting[0] if fitting else 1})["PARTS"]


def _stages(
    weight: Form, tiles: Config, launch: Config, dtype: torch.dtype | str, device: torch.device | str
) -> int | None:
    """Stages with which two programs of a product in parts fit one multiprocessor; None where they do not.

    Those in FP8 hold their sum twice, and so fill the registers alone."""
    if weight.kind == "fp8":
        return None
    of_x = 4 if "float32" in str(dtype) else 2
    of_w = of_x if weight.kind == "plain" else 1
    step = tiles["BLOCK_K"] * (of_w * tiles["BLOCK_N"] + of_x * tiles["BLOCK_M"])
    most = SHARED_KIB.get(chip(str(device))[1], 99) * 1024 // 2 - 1024
    return next((n for n in (launch["num_stages"], launch["num_stages"] - 1) if n > 2 and n * step <= most), None)


def _is_even(weight: Form, parts: int, step: int) -> bool:
    """Whether a share of the inputs is worth a program.

    It has four steps or more, a whole number of them, or nearly so where the inputs have not either; and no group is
    cut."""
    share = weight.inputs // parts
    steps, whole = parts * triton.cdiv(share, step), triton.cdiv(weight.inputs, step)
    is_whole = share % step == 0 if weight.inputs % step == 0 else share % 16 == 0 and steps <= 1.1 * whole
    return weight.inputs % parts == 0 and is_whole and share >= 4 * step and share % weight.group == 0


@triton.jit
def gelu(x):
    """Tanh form: x (1 + tanh u) / 2 is x / (1 + exp(-2u))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def gate_and_up(i):
    """Rows of a tile that holds both: (row of the hidden layer within the tile, whether up).

    Eight gates, their eight ups, and so on: the tensor cores' layout has rows r and r + 8 in one thread, so that a gate
    and its up are together there."""
    return (i // 16) * 8 + i % 8, (i // 8) % 2 == 1


@triton.jit
def gated(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """gelu(gate) x up of a tile in the order of `gate_and_up`: [BLOCK_N / 2, BLOCK_M]."""
    pairs = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs)
    return (gelu(gate) * up).reshape(BLOCK_N // 2, BLOCK_M)


@triton.jit
def placed(f, F: tl.constexpr, SPLIT: tl.constexpr):
    """Where hidden value f is stored: in its class, if weights of two a byte come next."""
    return spread(f, F) if SPLIT else f


@triton.jit
def _linear(
    x_ptr,
    x_extra_ptr,
    w0_ptr,
    scale0_ptr,
    extra0_ptr,
    out0_ptr,
    w1_ptr,
    scale1_ptr,
    extra1_ptr,
    out1_ptr,
    w2_ptr,
    scale2_ptr,
    extra2_ptr,
    out2_ptr,
    lane_ptr,
    inner_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    rows,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ADAPTED: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, tl.minimum(m, rows - 1), K, GROUP, KIND)
    w_N, scale_N, extra_N = row_at(w0_ptr, scale0_ptr, extra0_ptr, tl.minimum(n, N0 - 1), K, GROUP, KIND)
    out_N, is_live, width = out0_ptr + n, n < N0, N0
    # Which weight this tile belongs to is settled here, so that there is one loop over K and not three.
    if N1 > 0:
        SKIP1: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
        n1 = n - SKIP1 * BLOCK_N
        row1 = tl.minimum(tl.maximum(n1, 0), N1 - 1)
        w1_N, scale1_N, extra1_N = row_at(w1_ptr, scale1_ptr, extra1_ptr, row1, K, GROUP, KIND)
        w_N, scale_N = tl.where(tile >= SKIP1, w1_N, w_N), tl.where(tile >= SKIP1, scale1_N, scale_N)
        extra_N = tl.where(tile >= SKIP1, extra1_N, extra_N)
        out_N, width = tl.where(tile >= SKIP1, out1_ptr + n1, out_N), tl.where(tile >= SKIP1, N1, width)
        is_live = tl.where(tile >= SKIP1, n1 < N1, is_live)
    if N2 > 0:
        SKIP2: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N + (N1 + BLOCK_N - 1) // BLOCK_N
        n2 = n - SKIP2 * BLOCK_N
        row2 = tl.minimum(tl.maximum(n2, 0), N2 - 1)
        w2_N, scale2_N, extra2_N = row_at(w2_ptr, scale2_ptr, extra2_ptr, row2, K, GROUP, KIND)
        w_N, scale_N = tl.where(tile >= SKIP2, w2_N, w_N), tl.where(tile >= SKIP2, scale2_N, scale_N)
        extra_N = tl.where(tile >= SKIP2, extra2_N, extra_N)
        out_N, width = tl.where(tile >= SKIP2, out2_ptr + n2, out_N), tl.where(tile >= SKIP2, N2, width)
        is_live = tl.where(tile >= SKIP2, n2 < N2, is_live)
    SHARE: tl.constexpr = K // SPLIT_K
    if SPLIT_K > 1:
        part = tl.program_id(1)
        x_M, w_N = x_M + part * SHARE, w_N + part * SHARE
        if GROUP > 1:
            scale_N += part * (SHARE // GROUP)
        out_N += part * (rows.to(tl.int64) * N0)
    acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, SHARE, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
    if ADAPTED:
        b_N, nth, is_adapted = b0_ptr + tl.minimum(n, N0 - 1), 0, ADAPTED % 2 == 1
        if N1 > 0:
            is_1 = tile >= SKIP1
            b_N, nth = tl.where(is_1, b1_ptr + row1, b_N), tl.where(is_1, ADAPTED % 2, nth)
            is_adapted = tl.where(is_1, ADAPTED // 2 % 2 == 1, is_adapted)
        if N2 > 0:
            is_2 = tile >= SKIP2
            b_N, nth = tl.where(is_2, b2_ptr + row2, b_N), tl.where(is_2, ADAPTED % 2 + ADAPTED // 2 % 2, nth)
            is_adapted = tl.where(is_2, ADAPTED // 4 == 1, is_adapted)
        # Of a product in parts the first has it all.
        has_lane = (m < rows) & is_adapted & (tl.program_id(1) == 0)
        lane_M = tl.load(lane_ptr + m, has_lane, -1)
        part = rows.to(tl.int64) * RANK
        inner_M = inner_ptr + nth * PARTS * part + m.to(tl.int64) * RANK
        acc = added(acc, lane_M, inner_M, part, b_N, is_live, width, RANK * width, RANK, PARTS, BLOCK_R)
    at = out_N[:, None] + (m.to(tl.int64) * width)[None, :]
    tl.store(at, acc.to(out0_ptr.dtype.element_ty), (m < rows)[None, :] & is_live[:, None])


@triton.jit
def _gate_up(
    x_ptr,
    x_extra_ptr,
    gate_ptr,
    gate_scale_ptr,
    gate_extra_ptr,
    up_ptr,
    up_scale_ptr,
    up_extra_ptr,
    lane_ptr,
    inner_ptr,
    gate_b_ptr,
    up_b_ptr,
    out_ptr,
    rows,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    ADAPTED: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) // tiles_m) * HALF
    x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, tl.minimum(m, rows - 1), K, GROUP, KIND)
    within, is_up = gate_and_up(tl.arange(0, BLOCK_N))
    n = tl.minimum(first + within, F - 1)
    gate_N, gate_scale_N, gate_extra_N = row_at(gate_ptr, gate_scale_ptr, gate_extra_ptr, n, K, GROUP, KIND)
    up_N, up_scale_N, up_extra_N = row_at(up_ptr, up_scale_ptr, up_extra_ptr, n, K, GROUP, KIND)
    w_N, scale_N = tl.where(is_up, up_N, gate_N), tl.where(is_up, up_scale_N, gate_scale_N)
    extra_N = tl.where(is_up, up_extra_N, gate_extra_N)
    acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
    if ADAPTED:
        lane_M = tl.load(lane_ptr + m, m < rows, -1)
        part = rows.to(tl.int64) * RANK
        inner_M = inner_ptr + m.to(tl.int64) * RANK
        if ADAPTED % 2 == 1:
            acc = added(acc, lane_M, inner_M, part, gate_b_ptr + n, ~is_up, F, RANK * F, RANK, PARTS, BLOCK_R)
        if ADAPTED // 2 == 1:
            inner_M += ADAPTED % 2 * PARTS * part
            acc = added(acc, lane_M, inner_M, part, up_b_ptr + n, is_up, F, RANK * F, RANK, PARTS, BLOCK_R)
    f = first + tl.arange(0, HALF)
    at = m.to(tl.int64)[None, :] * F + placed(f, F, SPLIT)[:, None]
    hidden = gated(acc, BLOCK_N, BLOCK_M)
    tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), (m < rows)[None, :] & (f < F)[:, None])


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: queries, keys and values of both kinds of layer, and the dense products.

    Of the rarer kinds one product stands for all."""
    specials = []
    products = (
        ("qkv sliding", (4096, 2048, 2048), 2816),
        ("qk full", (8192, 1024), 2816),
        ("output sliding", (2816,), 4096),
        ("output full", (2816,), 8192),
        ("down", (2816,), 2112),
    )
    device = f"sm_{arch}"
    for name, like, dtype in dense_specials(arch):
        types, p = operand_types(like.kind, dtype), POINTERS[dtype]
        same = {"GROUP": like.group, "KIND": like.kind}
        ranks = (0, RANK) if name == "int4" else (0,)
        is_common = like.kind in ("plain", "fp8", "fp8_wide", "int8", "int4") and like.group != BLOCK
        for what, outputs, inputs in products if is_common else products[:1]:
            blank = replace(like, outputs=sum(outputs), inputs=inputs)
            tiles, launch = blocks("linear", (sum(outputs), inputs), blank, dtype, device, DEFAULTS)
            counts = [*outputs, 0, 0][:AT_ONCE]
            pointers = {"x_ptr": types["x"], "x_extra_ptr": types["x_extra"]}
            for i, count in enumerate(counts):
                for part in ("w", "scale", "extra"):
                    pointers[f"{part}{i}_ptr"] = types[part] if count else None
                pointers[f"out{i}_ptr"] = p if count else None
            sizes = {"N0": counts[0], "N1": counts[1], "N2": counts[2], "K": inputs}
            parts = splits(blank, dtype, device) if len(outputs) == 1 else 1
            if parts > 1:
                pointers["out0_ptr"] = "*fp32"
                launch["num_stages"] = _stages(blank, tiles, launch, dtype, device) or launch["num_stages"]
            constexprs = {**sizes, "SPLIT_K": parts, **same, **tiles}
            for rank in ranks:
                b = [f"b{i}_ptr" for i, count in enumerate(counts) if count]
                more, beside = for_special(b, inputs, rank, dtype, device)
                none = dict.fromkeys([f"b{i}_ptr" for i in range(len(b), AT_ONCE)], None)
                specials.append(
                    special(
                        f"linear {what} {name}{' adapted' if rank else ''}",
                        _linear,
                        pointers | more | none,
                        ["rows"],
                        constexprs | beside,
                        roomy(launch, like, rank > 0, device),
                    )
                )
        blank = replace(like, outputs=2112, inputs=2816)
        tiles, launch = blocks("gate_up", (2112, 2816), blank, dtype, device, DEFAULTS)
        pointers = {"x_ptr": types["x"], "x_extra_ptr": types["x_extra"], "out_ptr": p}
        pointers |= {"gate_ptr": types["w"], "gate_scale_ptr": types["scale"], "gate_extra_ptr": types["extra"]}
        pointers |= {"up_ptr": types["w"], "up_scale_ptr": types["scale"], "up_extra_ptr": types["extra"]}
        constexprs = {"F": 2112, "K": 2816, **same, "SPLIT": like.is_halved, **tiles}
        for rank in ranks:
            more, beside = for_special(("gate_b_ptr", "up_b_ptr"), 2816, rank, dtype, device)
            what = f"gate_up {name}{' adapted' if rank else ''}"
            wide = roomy(launch, like, rank > 0, device)
            specials.append(special(what, _gate_up, pointers | more, ["rows"], constexprs | beside, wide))
    return specials
