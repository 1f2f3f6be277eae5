"""Grouped attention over the ring of cached keys, read in place, and the new ones: one pass, softmax in float32.

One program takes a tile of queries of one key-value head: BLOCK_M pairs (position, query head of the group), so that
the heads of a group share what is read. Its keys come in tiles from up to three sources in turn: the ring, from the
first position inside the window to the row's length; the positions encoded in this pass; the canvas. Lengths and counts
are read on the device, so bounds are dynamic and the grid is not.

A canvas alone has too few tiles for a large GPU (64 for one row of 256 positions), so its keys are dealt in turn to
SPLITS programs, whose parts are joined in their order: by the program of a tile that comes last, or by a kernel that
takes whole positions and may quantise them for what comes next. Which tile of keys goes to whom depends on the
row's own length and count alone: a row's answer does not depend on its batch. Encoded positions are not split.

What this lacks: gradients, dropout, a scale other than 1, copies through the tensor copy engine (the ring may wrap
inside a tile), float32 at any speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.masks import Mask
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.product import in_fp8, is_last, special
from sfumato.ops.triton.tuning import Config, chip, config

# By the architecture from which on they hold, and the padded head size. Shared memory holds the queries and, for each
# stage, a tile of keys and one of values; the sum over values, BLOCK_M x K in float32, lives in registers, 128 a thread
# at most. What bounds a large GPU is its second-level cache: each tile of queries reads all its keys from there, so
# BLOCK_M is the largest that fits, and SPLITS makes about one program for each multiprocessor out of one canvas.
DEFAULTS: dict[int, dict[int, Config]] = {
    80: {
        256: {"BLOCK_M": 64, "BLOCK_N": 64, "SPLITS": 2, "num_warps": 8, "num_stages": 2},
        512: {"BLOCK_M": 64, "BLOCK_N": 16, "SPLITS": 2, "num_warps": 8, "num_stages": 2},
    },
    90: {
        256: {"BLOCK_M": 128, "BLOCK_N": 64, "SPLITS": 4, "num_warps": 8, "num_stages": 2},
        # Of 64 queries both groups of four warps would compute all scores, 16 keys an instruction, which shared memory
        # holds up. So 128 queries, and values' columns over two programs: each computes the scores once, 32 keys an
        # instruction, and reads all keys but half the values. 224 KiB.
        512: {"BLOCK_M": 128, "BLOCK_N": 32, "SPLITS": 2, "COLUMNS": 2, "num_warps": 8, "num_stages": 2},
    },
    100: {
        256: {"BLOCK_M": 128, "BLOCK_N": 32, "SPLITS": 4, "num_warps": 8, "num_stages": 2},
        512: {"BLOCK_M": 64, "BLOCK_N": 32, "SPLITS": 2, "num_warps": 8, "num_stages": 2},
    },
}
# With 99 KiB of shared memory.
SMALL: dict[int, Config] = {
    256: {"BLOCK_M": 64, "BLOCK_N": 32, "SPLITS": 2, "num_warps": 8, "num_stages": 2},
    512: {"BLOCK_M": 32, "BLOCK_N": 16, "SPLITS": 1, "num_warps": 8, "num_stages": 2},
}
CHOICES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (16, 32, 64), "SPLITS": (1, 2, 4), "num_warps": (4, 8)}
# Products of float32 are exact ones, without tensor cores: small tiles, and no hurry.
EXACT: Config = {"BLOCK_M": 16, "BLOCK_N": 16, "SPLITS": 1, "num_warps": 4, "num_stages": 1}

# LAST: parts are joined by the program of a tile that comes last, or else (0) by a kernel of its own.
COMBINE: Config = {"LAST": 1, "num_warps": 8, "num_stages": 1}


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> Tensor:
    """As `reference.attention`."""
    counters = torch.zeros(zeros_for(q_BTHK, k_BTGK, mask), dtype=torch.int32, device=q_BTHK.device)
    return joined(Inputs(q_BTHK, k_BTGK, v_BTGK, k_XRGK, v_XRGK, mask), counters)


class Inputs(NamedTuple):
    """What `attention` takes."""

    q_BTHK: Tensor
    k_BTGK: Tensor
    v_BTGK: Tensor
    k_XRGK: Tensor
    v_XRGK: Tensor
    mask: Mask


def joined(inputs: Inputs, counters: Tensor) -> Tensor:
    """`attention`, where `counters`, `zeros_for` it, are zeros already."""
    q_BTHK, mask = inputs.q_BTHK, inputs.mask
    out_BTHK = torch.empty(q_BTHK.shape, dtype=q_BTHK.dtype, device=q_BTHK.device)
    if out_BTHK.numel():
        is_last = config("attention_combine", q_BTHK.shape[-1:], q_BTHK.dtype, q_BTHK.device, COMBINE)["LAST"]
        parts, stats = _launch(inputs, out_BTHK, counters if is_last else None)
        if parts is not out_BTHK and not is_last and mask.canvas:
            _launch_combine(parts, stats, out_BTHK, mask, None, None)
    return out_BTHK


def quantised(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`attention` laid out for weights in FP8: all heads of a position in FP8, [N, H x K], and their scale, [N]."""
    q_BTHK = inputs.q_BTHK
    rows, width = q_BTHK.shape[:2].numel(), q_BTHK.shape[2:].numel()
    out_BTHK = torch.empty_like(q_BTHK)
    parts, stats = _launch(inputs, out_BTHK, None)
    code_NK = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=q_BTHK.device)
    scale_N = torch.empty(rows, dtype=torch.float32, device=q_BTHK.device)
    _launch_combine(parts, stats, out_BTHK, inputs.mask, code_NK, scale_N)
    return code_NK, scale_N


def _launch_combine(
    parts: Tensor, stats: Tensor, out_BTHK: Tensor, mask: Mask, code_NK: Tensor | None, scale_N: Tensor | None
) -> None:
    """Into codes and scales, or where there are none into `out_BTHK`."""
    batch, tokens, heads, size = out_BTHK.shape
    chosen = config("attention_combine", (size,), out_BTHK.dtype, out_BTHK.device, COMBINE)
    _combine[(batch * tokens,)](
        parts,
        stats,
        out_BTHK,
        code_NK,
        scale_N,
        batch * mask.canvas * heads,
        mask.encode,
        mask.canvas,
        HEADS=heads,
        SIZE=size,
        SPLITS=1 if parts is out_BTHK else len(parts),
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_K=triton.next_power_of_2(size),
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        **overlap(out_BTHK.device),
    )


def zeros_for(q_BTHK: Tensor, k_BTGK: Tensor, mask: Mask) -> int:
    """Integers in which the programs of each tile of a canvas are counted."""
    batch, _, heads, size = q_BTHK.shape
    chosen, kv_heads = tiles(size, q_BTHK.dtype, q_BTHK.device), k_BTGK.shape[2]
    rows: int = triton.cdiv(mask.canvas * (heads // kv_heads), chosen["BLOCK_M"])
    return batch * kv_heads * chosen["COLUMNS"] * rows


def _launch(inputs: Inputs, out_BTHK: Tensor, counters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Into `out_BTHK`; without `counters`, the parts of canvases into tensors of their own.

    Returned are the parts, and the highest score and the sum of each."""
    q_BTHK, k_BTGK, v_BTGK, k_XRGK, v_XRGK, mask = inputs
    batch, _, heads, size = q_BTHK.shape
    kv_heads = k_BTGK.shape[2]
    group = heads // kv_heads
    q_BTHK = q_BTHK if q_BTHK.stride(-1) == 1 else q_BTHK.contiguous()
    if k_BTGK.stride() != v_BTGK.stride() or k_BTGK.stride(-1) != 1:
        k_BTGK, v_BTGK = k_BTGK.contiguous(), v_BTGK.contiguous()
    if k_XRGK.stride() != v_XRGK.stride() or k_XRGK.stride(-1) != 1:
        raise ValueError(f"the ring's keys and values must lie alike: strides {k_XRGK.stride()}, {v_XRGK.stride()}")
    chosen = tiles(size, q_BTHK.dtype, q_BTHK.device)
    splits = chosen["SPLITS"]
    parts, stats = out_BTHK, out_BTHK
    if splits > 1:
        cells = batch * mask.canvas * heads
        parts = torch.empty((splits, cells, size), dtype=torch.float32, device=q_BTHK.device)
        stats = torch.empty((splits, 2, cells), dtype=torch.float32, device=q_BTHK.device)
    encode_tiles = triton.cdiv(mask.encode * group, chosen["BLOCK_M"])
    canvas_tiles = triton.cdiv(mask.canvas * group, chosen["BLOCK_M"])
    _attention[(encode_tiles + canvas_tiles * splits, kv_heads * chosen["COLUMNS"], batch)](
        q_BTHK,
        k_BTGK,
        v_BTGK,
        k_XRGK,
        v_XRGK,
        mask.rows_B,
        mask.lengths_B,
        mask.counts_B,
        out_BTHK,
        parts,
        stats,
        counters if splits > 1 else None,
        mask.encode,
        mask.canvas,
        mask.ring,
        *q_BTHK.stride()[:3],
        *k_BTGK.stride()[:3],
        *k_XRGK.stride()[:3],
        HEADS=heads,
        GROUP=group,
        SIZE=size,
        WINDOW=mask.window or 0,
        BLOCK_K=max(16, triton.next_power_of_2(size)),
        **chosen,
        **overlap(q_BTHK.device),
    )
    return parts, stats


def tiles(size: int, dtype: torch.dtype | str, device: torch.device | str) -> Config:
    """The configuration for heads of this size; COLUMNS programs share those of its values."""
    if str(dtype).removeprefix("torch.") == "float32":
        return {"COLUMNS": 1, **config("attention", (size,), dtype, device, EXACT)}
    padded = 256 if size <= 256 else 512
    arch = max(known for known in DEFAULTS if known <= max(chip(str(device))[1], 80))
    return {"COLUMNS": 1, **config("attention", (size,), dtype, device, DEFAULTS[arch][padded], SMALL[padded])}


@triton.jit(do_not_specialize=["encode", "canvas", "ring"])
def _attention(
    q_ptr,
    k_ptr,
    v_ptr,
    ring_k_ptr,
    ring_v_ptr,
    rows_ptr,
    lengths_ptr,
    counts_ptr,
    out_ptr,
    parts_ptr,
    stats_ptr,
    come_ptr,
    encode,
    canvas,
    ring,
    q_b,
    q_t,
    q_h,
    new_b,
    new_t,
    new_g,
    ring_x,
    ring_r,
    ring_g,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    g, b = tl.program_id(1) // COLUMNS, tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_ptr + b).to(tl.int32)
    count = tl.load(counts_ptr + b).to(tl.int32)
    x = tl.load(rows_ptr + b).to(tl.int64)

    # Encoded tiles first, the last of them, which see most, before the others; then the canvas's.
    encode_tiles = tl.cdiv(encode * GROUP, BLOCK_M)
    is_canvas = tl.program_id(0) >= encode_tiles
    of_canvas = tl.program_id(0) - encode_tiles
    tile = tl.where(is_canvas, of_canvas // SPLITS, encode_tiles - 1 - tl.program_id(0))
    split = tl.where(is_canvas, of_canvas % SPLITS, 0)
    step = tl.where(is_canvas, SPLITS, 1)

    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = pair // GROUP, g * GROUP + pair % GROUP
    is_query = t < tl.where(is_canvas, canvas, encode)
    col = tl.arange(0, BLOCK_K)
    is_col = col < SIZE
    BLOCK_V: tl.constexpr = BLOCK_K // COLUMNS
    v_col = tl.program_id(1) % COLUMNS * BLOCK_V + tl.arange(0, BLOCK_V)
    is_v_col = v_col < SIZE
    at = t + tl.where(is_canvas, encode, 0)
    q_at = q_ptr + b * q_b + at.to(tl.int64)[:, None] * q_t + head[:, None] * q_h + col[None, :]
    q = tl.load(q_at, is_query[:, None] & is_col[None, :], 0.0)

    # Positions count from the row's first new token. A query sees keys from its origin back to the window's end: its
    # own position in encode, that of the canvas's first cell in denoise (masks.py).
    origin = tl.where(is_canvas, count, t)
    first = tl.where(is_canvas, count, tile * BLOCK_M // GROUP)
    encode_end = tl.where(is_canvas, count, tl.minimum(count, (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1))
    cached_from, encode_from = tl.maximum(-length, -ring), 0
    if WINDOW > 0:
        cached_from = tl.maximum(cached_from, first - WINDOW + 1)
        encode_from = tl.maximum(first - WINDOW + 1, 0)
    cached_tiles = tl.cdiv(tl.maximum(-cached_from, 0), BLOCK_N)
    fresh_tiles = tl.cdiv(tl.maximum(encode_end - encode_from, 0), BLOCK_N)
    total = cached_tiles + fresh_tiles + tl.where(is_canvas, tl.cdiv(canvas, BLOCK_N), 0)
    is_padding = (first >= count) & (is_canvas == 0)
    mine = tl.where(is_padding, 0, tl.cdiv(tl.maximum(total - split, 0), step))

    first_slot = (length + cached_from) % tl.maximum(ring, 1)
    ring_k_ptr += x * ring_x + g * ring_g
    ring_v_ptr += x * ring_x + g * ring_g
    k_ptr += b * new_b + g * new_g
    v_ptr += b * new_b + g * new_g

    LOG2E: tl.constexpr = 1.4426950408889634
    highest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total_p = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for i in range(0, mine):
        n = split + i * step
        is_cached = n < cached_tiles
        is_canvas_key = n >= cached_tiles + fresh_tiles
        begin = tl.where(is_cached, cached_from + n * BLOCK_N, encode_from + (n - cached_tiles) * BLOCK_N)
        begin = tl.where(is_canvas_key, encode + (n - cached_tiles - fresh_tiles) * BLOCK_N, begin)
        end = tl.where(is_cached, 0, tl.where(is_canvas_key, encode + canvas, encode_end))
        key = begin + tl.arange(0, BLOCK_N)
        is_key = key < end
        slot = first_slot + key - cached_from
        slot = tl.where(slot >= ring, slot - ring, slot)
        index = tl.where(is_cached, slot, key) * tl.where(is_cached, ring_r, new_t)
        position = tl.where(is_canvas_key, count, key)
        offset = index[:, None] + col[None, :]
        is_loaded = is_key[:, None] & is_col[None, :]

        k = tl.load(tl.where(is_cached, ring_k_ptr, k_ptr) + offset, is_loaded, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * LOG2E
        is_seen = is_key[None, :] & (position[None, :] <= origin[:, None])
        if WINDOW > 0:
            is_seen = is_seen & (origin[:, None] - position[None, :] < WINDOW)
        s = tl.where(is_seen, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(highest - higher)
        total_p = total_p * decay + tl.sum(p, 1)
        offset, is_loaded = index[:, None] + v_col[None, :], is_key[:, None] & is_v_col[None, :]
        v = tl.load(tl.where(is_cached, ring_v_ptr, v_ptr) + offset, is_loaded, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        highest = higher

    # Padding may have seen nothing: its sum is 0, and so is its answer.
    out = acc / tl.maximum(total_p, 1e-30)[:, None]
    is_out = is_query[:, None] & is_v_col[None, :]
    row = (b * (encode + canvas) + at) * HEADS + head
    if SPLITS == 1 or not is_canvas:
        tl.store(out_ptr + row[:, None] * SIZE + v_col[None, :], out.to(out_ptr.dtype.element_ty), is_out)
    else:
        cells = tl.num_programs(2).to(tl.int64) * canvas * HEADS
        cell = (b * canvas + t) * HEADS + head
        tl.store(parts_ptr + (split * cells + cell)[:, None] * SIZE + v_col[None, :], out, is_out)
        # All programs of these queries store the same numbers.
        tl.store(stats_ptr + split * 2 * cells + cell, highest, is_query)
        tl.store(stats_ptr + (split * 2 + 1) * cells + cell, total_p, is_query)
        if come_ptr is not None:
            nth = (b * tl.num_programs(1) + tl.program_id(1)) * tl.cdiv(canvas * GROUP, BLOCK_M) + tile
            if is_last(come_ptr + nth, SPLITS):
                # Some columns at a time, because registers hold the tile once and not twice.
                CHUNK: tl.constexpr = BLOCK_V if BLOCK_V < 32 else 32
                for start in range(0, BLOCK_V, CHUNK):
                    few = tl.program_id(1) % COLUMNS * BLOCK_V + start + tl.arange(0, CHUNK)
                    is_few = is_query[:, None] & (few < SIZE)[None, :]
                    whole = _whole(parts_ptr, stats_ptr, cell, cells, few, is_few, is_query, SIZE, SPLITS)
                    tl.store(out_ptr + row[:, None] * SIZE + few[None, :], whole.to(out_ptr.dtype.element_ty), is_few)


@triton.jit
def _whole(
    parts_ptr,
    stats_ptr,
    cell,
    cells,
    col,
    live,
    is_cell,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """These columns of these cells from their parts, in float32.

    Each part's average counts by its share of the softmax's denominator."""
    ROWS: tl.constexpr = cell.shape[0]
    highest = tl.full((ROWS,), -1e30, tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(stats_ptr + split * 2 * cells + cell, is_cell, -1e30))
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, col.shape[0]), tl.float32)
    for split in tl.static_range(SPLITS):
        high = tl.load(stats_ptr + split * 2 * cells + cell, is_cell, -1e30)
        share = tl.load(stats_ptr + (split * 2 + 1) * cells + cell, is_cell, 0.0) * tl.exp2(high - highest)
        part = tl.load(parts_ptr + (split * cells + cell)[:, None] * SIZE + col[None, :], live, 0.0)
        total += share
        acc += part * share[:, None]
    return acc / tl.maximum(total, 1e-30)[:, None]


@triton.jit(do_not_specialize=["cells", "encode", "canvas"])
def _combine(
    parts_ptr,
    stats_ptr,
    out_ptr,
    code_ptr,
    scale_ptr,
    cells,
    encode,
    canvas,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """All heads of a position: what was encoded, or not split, is whole already."""
    enter(PDL)
    n = tl.program_id(0)
    t = n % (encode + canvas)
    head = tl.arange(0, BLOCK_H)
    col = tl.arange(0, BLOCK_K)
    is_head = head < HEADS
    live = is_head[:, None] & (col < SIZE)[None, :]
    at = (n.to(tl.int64) * HEADS + head)[:, None] * SIZE + col[None, :]
    if SPLITS > 1 and t >= encode:
        cell = ((n // (encode + canvas)).to(tl.int64) * canvas + t - encode) * HEADS + head
        out = _whole(parts_ptr, stats_ptr, cell, cells.to(tl.int64), col, live, is_head, SIZE, SPLITS)
        out = out.to(out_ptr.dtype.element_ty)
    else:
        out = tl.load(out_ptr + at, live, 0.0)
    if code_ptr is None:
        tl.store(out_ptr + at, out, live)
    else:
        code, scale = in_fp8(tl.where(live, out.to(tl.float32), 0.0).reshape(1, BLOCK_H * BLOCK_K))
        tl.store(code_ptr + at, code.reshape(BLOCK_H, BLOCK_K), live)
        tl.store(scale_ptr + n + tl.arange(0, 1), scale)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: sliding layers with 8 KV heads of 256, full ones with 2 of 512."""
    specials = []
    device = f"sm_{arch}"
    for dtype in ("bfloat16", "float16", "float32") if arch == 90 else ("bfloat16",):
        p = POINTERS[dtype]
        for name, size, group, window in (("sliding", 256, 2, 1024), ("full", 512, 8, 0)):
            chosen = tiles(size, dtype, device)
            tensors = "q_ptr k_ptr v_ptr ring_k_ptr ring_v_ptr out_ptr".split()
            strides = "q_b q_t q_h new_b new_t new_g ring_x ring_r ring_g".split()
            signature: dict[str, str | None] = {
                **dict.fromkeys(tensors, p),
                **dict.fromkeys(("rows_ptr", "lengths_ptr", "counts_ptr"), "*i64"),
                **dict.fromkeys(("parts_ptr", "stats_ptr"), "*fp32" if chosen["SPLITS"] > 1 else p),
                **dict.fromkeys(("encode", "canvas", "ring"), "i32"),
                **dict.fromkeys(strides, "i32:16"),
            }
            values = {"HEADS": 16, "GROUP": group, "SIZE": size, "WINDOW": window, "BLOCK_K": size}
            values |= {key: chosen[key] for key in ("BLOCK_M", "BLOCK_N", "SPLITS", "COLUMNS")}
            warps = {key: chosen[key] for key in ("num_warps", "num_stages")}
            for what, come in (("attention", "*i32"), ("attention in parts", None)):
                pointer = {"come_ptr": come}
                specials.append(special(f"{what} {name} {dtype}", _attention, signature | pointer, [], values, warps))
            for code in ("*fp8e4nv", None):
                if (code and (arch < 89 or dtype != "bfloat16")) or (not code and chosen["SPLITS"] == 1):
                    continue
                joint = config("attention_combine", (size,), dtype, device, COMBINE)
                joint = {key: joint[key] for key in ("num_warps", "num_stages")}
                parts = "*fp32" if chosen["SPLITS"] > 1 else p
                pointers: dict[str, str | None] = {"parts_ptr": parts, "stats_ptr": parts, "out_ptr": p}
                pointers |= {"code_ptr": code, "scale_ptr": "*fp32" if code else None}
                numbers = ["cells", "encode", "canvas"]
                values = {"HEADS": 16, "SIZE": size, "SPLITS": chosen["SPLITS"], "BLOCK_H": 16, "BLOCK_K": size}
                what = f"combine {name} {'fp8' if code else dtype}"
                specials.append(special(what, _combine, pointers, numbers, values, joint))
    return specials
