"""experts: each token through its J experts, each expert's weights read once.

One small kernel sorts the assignments (token, choice) by expert into tiles of BLOCK_M rows that belong to one expert
each. How many tiles there can be follows from the shapes alone, so that the launch does not wait for the routing; the
programs of surplus tiles leave at once. Then gate and up with the product in the epilogue, then down, each assignment
into a row of its own, then one sum over a token's J rows with their weights, j ascending: no atomics, and a token's
answer does not depend on who else is there. The loop over K is `product`.

Tiles of one expert lie side by side in the launch: the second finds the weights in L2. What this lacks: experts spread
over several devices.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor, empty, int32

from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.linear import gate_and_up, gated, placed
from sfumato.ops.triton.product import (
    HALVES,
    Weight,
    blocks,
    dense_specials,
    form,
    operand_types,
    prepare,
    product,
    row_at,
    special,
    x_at,
)
from sfumato.ops.triton.tuning import Config, config

# 256 tokens x 8 choices over 128 experts: sixteen rows an expert on average, thirty in a popular one. With 32 rows a
# tile nearly every expert is one tile, so its weights cross from L2 once and are unpacked once; the tensor cores spend
# twice the work and still wait for memory. Small tiles along N keep many programs, and many loads, in flight.
_PLAIN = {"BLOCK_N": 128, "BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
_FLOAT32 = {"BLOCK_N": 64, "BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
_FP8 = {"BLOCK_N": 128, "BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
# Four bits: a step brings 4 KiB of weights, so more steps are under way to cover the latency of memory.
_INT4 = {"BLOCK_N": 128, "BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6}
_EXPERTS = {"plain": _PLAIN, "float32": _FLOAT32, "fp8": _FP8, "fp8_wide": _PLAIN, "int8": _PLAIN, "int4": _INT4}
_EXPERTS |= {"nvfp4": _INT4, "mxfp4": _INT4}
DEFAULTS: dict[str, Config] = {
    # The tile of rows is shared by both products, so it stands apart from their sizes.
    "group": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
    "combine": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
}
KINDS: dict[str, dict[str, Config]] = {"experts_gate_up": _EXPERTS, "experts_down": _EXPERTS}
CHOICES = {
    "BLOCK_N": (64, 128),
    "BLOCK_M": (16, 32, 64),
    "BLOCK_K": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5, 6),
}


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Weight, down_EDF: Weight) -> Tensor:
    """Sum over the J chosen experts of weight x down(gated(gate_up(x))). gate_up is [E, 2F, D], gate first."""
    tokens, width = x_ND.shape
    choices, count = index_NJ.shape[1], gate_up_EFD.shape[0]
    rows = tokens * choices
    out_ND = empty(tokens, width, dtype=x_ND.dtype, device=x_ND.device)
    if not out_ND.numel():
        return out_ND
    gate_up = form(gate_up_EFD, x_ND)
    hidden_size = gate_up.outputs // 2
    # Tiles of rows are cut once for both products; gate and up, the larger, decide.
    tiles, launch = blocks("experts_gate_up", tuple(gate_up_EFD.shape), gate_up, x_ND.dtype, x_ND.device, KINDS)
    tile_T, slot_TM = group(index_NJ, count, tiles["BLOCK_M"])
    hidden_AF = empty(rows, hidden_size, dtype=x_ND.dtype, device=x_ND.device)
    down = form(down_EDF, hidden_AF)
    _experts_gate_up[(len(tile_T) * triton.cdiv(gate_up.outputs, tiles["BLOCK_N"]),)](
        *prepare(x_ND, gate_up),
        *gate_up.operands,
        hidden_AF,
        tile_T,
        slot_TM,
        len(tile_T),
        J=choices,
        F=hidden_size,
        K=width,
        GROUP=gate_up.group,
        KIND=gate_up.kind,
        SPLIT=down.kind in HALVES,
        **tiles,
        **launch,
    )
    part_AD = empty(rows, width, dtype=x_ND.dtype, device=x_ND.device)
    again, launch = blocks("experts_down", tuple(down_EDF.shape), down, x_ND.dtype, x_ND.device, KINDS)
    again["BLOCK_M"] = tiles["BLOCK_M"]
    _experts_down[(len(tile_T) * triton.cdiv(width, again["BLOCK_N"]),)](
        *prepare(hidden_AF, down, is_split=True),
        *down.operands,
        part_AD,
        tile_T,
        slot_TM,
        len(tile_T),
        N=width,
        K=hidden_size,
        GROUP=down.group,
        KIND=down.kind,
        **again,
        **launch,
    )
    chosen = config("combine", (width,), x_ND.dtype, x_ND.device, DEFAULTS["combine"])
    _combine[(tokens, triton.cdiv(width, chosen["BLOCK"]))](
        part_AD, weight_NJ.contiguous(), out_ND, D=width, J=choices, **chosen
    )
    return out_ND


def group(index_NJ: Tensor, count: int, block_m: int) -> tuple[Tensor, Tensor]:
    """The assignments n x J + j sorted by expert: the expert of each tile, [T] int32, -1 for a surplus tile, and the
    assignments of each tile, [T, block_m] int32, -1 where an expert's last tile is not full."""
    rows = index_NJ.numel()
    most = min(rows, (rows + count * (block_m - 1)) // block_m)
    tile_T = empty(most, dtype=int32, device=index_NJ.device)
    slot_TM = empty(most, block_m, dtype=int32, device=index_NJ.device)
    chosen = config("group", (count,), index_NJ.dtype, index_NJ.device, DEFAULTS["group"])
    _group[(count,)](
        index_NJ.contiguous(), tile_T, slot_TM, rows, most, E=triton.next_power_of_2(count), BLOCK_M=block_m, **chosen
    )
    return tile_T, slot_TM


@triton.jit
def _group(index_ptr, tile_ptr, slot_ptr, rows, tiles, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    # A program for each expert. Each counts all experts, rather than wait for another launch that counts them.
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    count_E = tl.zeros((E,), tl.int32)
    for start in range(0, rows, BLOCK):
        index = tl.load(index_ptr + start + lane, start + lane < rows, 0).to(tl.int32)
        count_E += tl.histogram(index, E, start + lane < rows)
    each = tl.arange(0, E)
    tiles_E = (count_E + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(each < expert, tiles_E, 0), 0)
    mine = tl.sum(tl.where(each == expert, tiles_E, 0), 0)
    used = tl.sum(tiles_E, 0)

    at = first * BLOCK_M
    for start in range(0, rows, BLOCK):
        index = tl.load(index_ptr + start + lane, start + lane < rows, -1).to(tl.int32)
        is_mine = (index == expert).to(tl.int32)
        place = at + tl.cumsum(is_mine, 0) - is_mine
        tl.store(slot_ptr + place, start + lane, is_mine == 1)
        at += tl.sum(is_mine, 0)
    end = (first + mine) * BLOCK_M
    rest = at + tl.arange(0, BLOCK_M)
    tl.store(slot_ptr + rest, tl.full((BLOCK_M,), -1, tl.int32), rest < end)
    for start in range(0, mine, BLOCK):
        tile = start + lane
        tl.store(tile_ptr + first + tile, tl.zeros((BLOCK,), tl.int32) + expert, tile < mine)
    if expert == 0:
        for start in range(used, tiles, BLOCK):
            tl.store(tile_ptr + start + lane, tl.full((BLOCK,), -1, tl.int32), start + lane < tiles)


@triton.jit
def _experts_gate_up(
    x_ptr,
    x_extra_ptr,
    w_ptr,
    scale_ptr,
    extra_ptr,
    out_ptr,
    tile_ptr,
    slot_ptr,
    tiles,
    J: tl.constexpr,
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
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles) * HALF
    expert = tl.load(tile_ptr + tile)
    if expert >= 0:
        slot_M = tl.load(slot_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        token_M = tl.maximum(slot_M, 0) // J
        x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, token_M, K, GROUP, KIND)
        within, is_up = gate_and_up(tl.arange(0, BLOCK_N))
        n = tl.minimum(first + within, F - 1) + tl.where(is_up, F, 0)
        w_N, scale_N, extra_N = row_at(w_ptr, scale_ptr, extra_ptr, expert * (2 * F) + n, K, GROUP, KIND)
        acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
        f = first + tl.arange(0, HALF)
        at = slot_M.to(tl.int64)[None, :] * F + placed(f, F, SPLIT)[:, None]
        hidden = gated(acc, BLOCK_N, BLOCK_M)
        tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), (slot_M >= 0)[None, :] & (f < F)[:, None])


@triton.jit
def _experts_down(
    x_ptr,
    x_extra_ptr,
    w_ptr,
    scale_ptr,
    extra_ptr,
    out_ptr,
    tile_ptr,
    slot_ptr,
    tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(tile_ptr + tile)
    if expert >= 0:
        slot_M = tl.load(slot_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, tl.maximum(slot_M, 0), K, GROUP, KIND)
        row_N = expert * N + tl.minimum(n, N - 1)
        w_N, scale_N, extra_N = row_at(w_ptr, scale_ptr, extra_ptr, row_N, K, GROUP, KIND)
        acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
        at = slot_M.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), (slot_M >= 0)[None, :] & (n < N)[:, None])


@triton.jit
def _combine(part_ptr, weight_ptr, out_ptr, D: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(J):
        part = tl.load(part_ptr + (token * J + j) * D + d, d < D, 0.0).to(tl.float32)
        total += part * tl.load(weight_ptr + token * J + j).to(tl.float32)
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), d < D)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 128 experts of 704, 8 of them a token, width 2816."""
    found = []
    device, count, choices, width, hidden = f"sm_{arch}", 128, 8, 2816, 704
    for name, like, dtype in dense_specials(arch):
        types, p = operand_types(like.kind, dtype), POINTERS[dtype]
        pointers = {f"{k}_ptr": v for k, v in types.items()} | {"out_ptr": p, "tile_ptr": "*i32", "slot_ptr": "*i32"}
        same = {"GROUP": like.group, "KIND": like.kind}
        first = replace(like, outputs=2 * hidden, inputs=width)
        tiles, launch = blocks("experts_gate_up", (count, 2 * hidden, width), first, dtype, device, KINDS)
        constexprs = {"J": choices, "F": hidden, "K": width, **same, "SPLIT": like.kind in HALVES, **tiles}
        found.append(special(f"experts gate_up {name}", _experts_gate_up, pointers, ["tiles"], constexprs, launch))
        block_m, last = tiles["BLOCK_M"], replace(like, outputs=width, inputs=hidden)
        tiles, launch = blocks("experts_down", (count, width, hidden), last, dtype, device, KINDS)
        constexprs = {"N": width, "K": hidden, **same, **tiles, "BLOCK_M": block_m}
        found.append(special(f"experts down {name}", _experts_down, pointers, ["tiles"], constexprs, launch))
    chosen = config("group", (count,), "int64", device, DEFAULTS["group"])
    launch = {k: chosen[k] for k in ("num_warps", "num_stages")}
    three: dict[str, str | None] = {"index_ptr": "*i64", "tile_ptr": "*i32", "slot_ptr": "*i32"}
    constexprs = {"E": count, "BLOCK_M": 32, "BLOCK": chosen["BLOCK"]}
    found.append(special("experts group", _group, three, ["rows", "tiles"], constexprs, launch))
    chosen = config("combine", (width,), "bfloat16", device, DEFAULTS["combine"])
    launch = {k: chosen[k] for k in ("num_warps", "num_stages")}
    three = {"part_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
    constexprs = {"D": width, "J": choices, "BLOCK": chosen["BLOCK"]}
    found.append(special("experts combine", _combine, three, [], constexprs, launch))
    return found
