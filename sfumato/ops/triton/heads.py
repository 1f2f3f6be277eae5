"""heads: queries, keys and values on their way from the projection to attention; and into the cache.

One kernel norms and turns queries and keys and norms values: a program takes some heads of one of the three at one
position. A second, only where something is encoded, copies keys and values into the ring, once attention has read what
they replace. What this lacks: heads too wide for the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.masks import Mask
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.norm import heads_a_program, inverse_root, turned
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # Sixteen heads of 256, or eight of 512.
    "heads": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
    "append": {"num_warps": 4, "num_stages": 1},
}
CHOICES = {"heads": {"VALUES": (2048, 4096, 8192), "num_warps": (4, 8, 16)}}


def heads(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor | None,
    norms: tuple[Tensor, Tensor],
    eps: float,
    angles: tuple[Tensor, Tensor],
    zeros: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm_rope of contiguous queries and keys, the rms_norm of the values, which without any are the raw keys.

    `norms` are those of queries and keys, [K]; `angles` cosines and sines, [B, T, K]; `zeros`, integers, becomes
    zeros."""
    batch, tokens, count, size = q_BTHK.shape
    groups = k_BTGK.shape[2]
    cos_BTK, sin_BTK = (angle.contiguous() for angle in angles)
    outs = torch.empty_like(q_BTHK), torch.empty_like(k_BTGK), torch.empty_like(k_BTGK)
    chosen = config("heads", (size,), q_BTHK.dtype, q_BTHK.device, DEFAULTS["heads"])
    rows = heads_a_program(max(count, groups), size, chosen)
    _heads[(batch * tokens, triton.cdiv(count, rows) + 2 * triton.cdiv(groups, rows))](
        q_BTHK,
        k_BTGK,
        k_BTGK if v_BTGK is None else v_BTGK,
        *norms,
        cos_BTK,
        sin_BTK,
        *outs,
        zeros,
        zeros.numel(),
        tokens,
        cos_BTK.stride(0),
        eps,
        HEADS=count,
        GROUPS=groups,
        HALF=size // 2,
        ROWS=rows,
        BLOCK=triton.next_power_of_2(size // 2),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        **overlap(q_BTHK.device),
    )
    return outs


def append_(k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> None:
    """What `cache.KVCache.append` does: each row's encoded positions, but not padding, go into its ring.

    Keys and values are contiguous."""
    batch, tokens, groups, size = k_BTGK.shape
    chosen = config("append", (size,), k_BTGK.dtype, k_BTGK.device, DEFAULTS["append"])
    _append[(mask.encode, batch)](
        k_BTGK,
        v_BTGK,
        k_XRGK,
        v_XRGK,
        mask.rows_B,
        mask.lengths_B,
        mask.counts_B,
        tokens,
        mask.ring,
        k_XRGK.stride(0),
        k_XRGK.stride(1),
        WIDTH=groups * size,
        BLOCK=triton.next_power_of_2(groups * size),
        **chosen,
        **overlap(k_BTGK.device),
    )


@triton.jit(do_not_specialize=["zeros", "tokens"])
def _heads(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    zero_ptr,
    zeros,
    tokens,
    angle_b,
    eps,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    SIZE: tl.constexpr = 2 * HALF
    OF_Q: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    OF_K: tl.constexpr = (GROUPS + ROWS - 1) // ROWS
    if tl.program_id(1) == 0:
        for at in range(tl.program_id(0), zeros, tl.num_programs(0)):
            tl.store(zero_ptr + at, 0)
    token, part = tl.program_id(0), tl.program_id(1)
    is_q, is_v = part < OF_Q, part >= OF_Q + OF_K
    tile = tl.where(is_q, part, tl.where(is_v, part - OF_Q - OF_K, part - OF_Q))
    count = tl.where(is_q, HEADS, GROUPS)
    x_ptr = tl.where(is_q, q_ptr, tl.where(is_v, v_ptr, k_ptr))
    out_ptr = tl.where(is_q, q_out_ptr, tl.where(is_v, v_out_ptr, k_out_ptr))
    weight_ptr = tl.where(is_q, q_norm_ptr, k_norm_ptr)
    kind: tl.constexpr = q_out_ptr.dtype.element_ty

    head = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    live = (head < count)[:, None] & (col < HALF)[None, :]
    at = (token.to(tl.int64) * count + head)[:, None] * SIZE + col[None, :]
    if is_v:
        one = tl.load(x_ptr + at, live, 0.0).to(tl.float32)
        two = tl.load(x_ptr + at + HALF, live, 0.0).to(tl.float32)
        scale = inverse_root((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / SIZE, eps)[:, None]
        one, two = (one * scale).to(kind), (two * scale).to(kind)
    else:
        angle = (token // tokens).to(tl.int64) * angle_b + (token % tokens).to(tl.int64) * SIZE
        one, two = turned(x_ptr + at, live, weight_ptr, cos_ptr + angle, sin_ptr + angle, eps, HALF, BLOCK, kind)
    tl.store(out_ptr + at, one, live)
    tl.store(out_ptr + at + HALF, two, live)


@triton.jit(do_not_specialize=["tokens", "ring"])
def _append(
    k_ptr,
    v_ptr,
    ring_k_ptr,
    ring_v_ptr,
    rows_ptr,
    lengths_ptr,
    counts_ptr,
    tokens,
    ring,
    ring_x,
    ring_r,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    t, b = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts_ptr + b).to(tl.int32)
    # Padding goes nowhere, nor does what a later one of these positions would replace.
    if (t < count) & (t >= count - ring):
        slot = (tl.load(lengths_ptr + b).to(tl.int32) + t) % tl.maximum(ring, 1)
        to = tl.load(rows_ptr + b).to(tl.int64) * ring_x + slot.to(tl.int64) * ring_r
        col = tl.arange(0, BLOCK)
        at = (b.to(tl.int64) * tokens + t) * WIDTH + col
        tl.store(ring_k_ptr + to + col, tl.load(k_ptr + at, col < WIDTH), col < WIDTH)
        tl.store(ring_v_ptr + to + col, tl.load(v_ptr + at, col < WIDTH), col < WIDTH)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: sliding layers with 8 KV heads of 256, full ones with 2 of 512."""
    specials = []
    device = f"sm_{arch}"
    for dtype in ("bfloat16", "float32") if arch == 90 else ("bfloat16",):
        p = POINTERS[dtype]
        for name, size, groups in (("sliding", 256, 8), ("full", 512, 2)):
            chosen = config("heads", (size,), dtype, device, DEFAULTS["heads"])
            warps = {key: chosen[key] for key in ("num_warps", "num_stages")}
            signature = dict.fromkeys(_heads.arg_names[:10], p) | {"zero_ptr": "*i32", "zeros": "i32"}
            signature |= {"tokens": "i32", "angle_b": "i32:16", "eps": "fp32"}
            sizes = {"HEADS": 16, "GROUPS": groups, "HALF": size // 2, "BLOCK": size // 2}
            sizes["ROWS"] = heads_a_program(16, size, chosen)
            specials.append(Special(f"heads {name} {dtype}", _heads, signature, sizes, **warps))
            warps = config("append", (size,), dtype, device, DEFAULTS["append"])
            signature = dict.fromkeys(_append.arg_names[:4], p) | dict.fromkeys(_append.arg_names[4:7], "*i64")
            signature |= {"tokens": "i32", "ring": "i32", "ring_x": "i32:16", "ring_r": "i32:16"}
            sizes = {"WIDTH": groups * size, "BLOCK": groups * size}
            specials.append(Special(f"append {name} {dtype}", _append, signature, sizes, **warps))
    return specials
