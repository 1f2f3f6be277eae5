"""The soft embedding: softmax(logits) @ E, over those tiles of the vocabulary that hold something.

It is attention over the vocabulary: the same E that the read-out multiplied by, and probabilities that are taken from
the logits on the fly. A program owns a block of positions of one row, a block of E's columns and every SPLITS-th tile
of words; the sums of the splits are added in order by a second kernel.

Late in a canvas nearly every position is sure, and nearly every tile of words holds nothing. The read-out knows what
each tile holds (`tiles`), so a tile whose mass is below a threshold at every position of the block is not read at all:
neither its logits nor its part of E. The threshold is eps / 4 / (number of tiles), with the eps of E's dtype, hence

    what all left-out tiles hold at one position  <  eps / 4
    |error|  <  eps / 4 x max|E| x scale

next to which rounding E itself moves the result by up to eps / 2 x max|E| x scale. Without `tiles` nothing is left
out. The list of tiles depends on the positions of its own block alone, so that a row's answer is its own.

What it lacks: probabilities are computed once for every block of columns, 11 times at the released sizes on Hopper and
22 on others; gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.read_out import Tiles, sizes
from sfumato.ops.triton.tuning import Config, chip, config

DEFAULTS = {
    # 2 blocks of a canvas's positions x 11 of columns x 6 splits: one program for each of an H200's 132 processors,
    # which walk the words side by side, so that E and the logits come from memory once. From L2 come E twice and the
    # logits 11 times, 4.4 GB; 128 columns a program would make that 5.9, and probabilities twice the work. The sums of
    # 6 splits take 13 % of what bfloat16 logits take. Three stages of (128 + 256) x 64 values are 144 KiB at most.
    "soft_embedding": {"BLOCK_N": 128, "BLOCK_D": 256, "BLOCK_K": 64, "SPLITS": 6, "num_warps": 8, "num_stages": 3},
}
SMALL = {
    "soft_embedding": {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 32, "SPLITS": 3, "num_warps": 8, "num_stages": 4},
}
FLOAT32 = {
    "soft_embedding": {"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 32, "SPLITS": 3, "num_warps": 8, "num_stages": 2},
}
CHOICES = {
    "soft_embedding": {"BLOCK_D": (128, 256), "BLOCK_K": (32, 64), "SPLITS": (3, 4, 6), "num_stages": (2, 3, 4)},
}

_LOG2E = tl.constexpr(1.4426950408889634)
_CHUNK = 64
"""Tiles whose masses one program of `_mark` looks at: 256 bytes of each position."""
_SCAN = 4096
"""Words that one program of `_normalise` has in registers at a time."""
_ADD = 1024
"""Values that one program of `_add` writes."""


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Tiles | None = None) -> Tensor:
    """As `reference.soft_embedding`. Leaving tiles out moves no value by more than eps / 4 x max|E| x scale."""
    (batch, length, words), width = logits_BLV.shape, embed_VD.shape[1]
    rows, device = batch * length, logits_BLV.device
    logits_BLV, embed_VD = logits_BLV.contiguous(), embed_VD.contiguous()
    chosen = _config(embed_VD.shape, embed_VD.dtype, device)
    warps = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    if tiles is not None:
        chosen["BLOCK_K"] = min(chosen["BLOCK_K"], tiles.size)
    splits, blocks = chosen["SPLITS"], triton.cdiv(length, chosen["BLOCK_N"])
    out_BLD = torch.empty(batch, length, width, dtype=embed_VD.dtype, device=device)

    if tiles is None:
        size, listed, counts = chosen["BLOCK_K"], None, None
        peak_BL, log_sum_BL = (torch.empty(batch, length, dtype=torch.float32, device=device) for _ in range(2))
        _normalise[(rows,)](logits_BLV, peak_BL, log_sum_BL, V=words, BLOCK=_SCAN, num_warps=8, **overlap(device))
    else:
        size, peak_BL, log_sum_BL = tiles.size, tiles.peak_BL, tiles.log_sum_BL
        listed, counts = _list(tiles, blocks, chosen["BLOCK_N"], threshold(embed_VD.dtype, tiles.mass_BLC.shape[-1]))
    partial_SBLD = torch.empty(splits, batch, length, width, dtype=torch.float32, device=device)
    _multiply[(triton.cdiv(width, chosen["BLOCK_D"]) * blocks * batch, splits)](
        logits_BLV,
        embed_VD,
        peak_BL,
        log_sum_BL,
        listed,
        counts,
        partial_SBLD,
        length,
        rows,
        V=words,
        D=width,
        TILES=triton.cdiv(words, size),
        TILE=size,
        **chosen,
        **warps,
        **overlap(device),
    )
    _add[(triton.cdiv(rows * width, _ADD),)](
        partial_SBLD, scale, out_BLD, rows * width, SPLITS=splits, BLOCK=_ADD, num_warps=4, **overlap(device)
    )
    return out_BLD


def threshold(dtype: torch.dtype, tiles: int) -> float:
    """Below this mass a tile may be left out: all of them together hold less than eps / 4."""
    return torch.finfo(dtype).eps / 4 / tiles


def _list(tiles: Tiles, blocks: int, block_n: int, threshold: float) -> tuple[Tensor, Tensor]:
    """The tiles that hold something for each block of positions, ascending: [B x blocks, C] and how many they are."""
    batch, length, count = tiles.mass_BLC.shape
    device = tiles.mass_BLC.device
    holds = torch.empty(batch * blocks, count, dtype=torch.uint8, device=device)
    listed = torch.empty(batch * blocks, count, dtype=torch.int32, device=device)
    counts = torch.empty(batch * blocks, dtype=torch.int32, device=device)
    _mark[(triton.cdiv(count, _CHUNK), batch * blocks)](
        tiles.mass_BLC,
        holds,
        threshold,
        length,
        TILES=count,
        BLOCK_N=block_n,
        CHUNK=_CHUNK,
        num_warps=4,
        **overlap(device),
    )
    _compact[(batch * blocks,)](
        holds, listed, counts, TILES=count, BLOCK=triton.next_power_of_2(count), num_warps=4, **overlap(device)
    )
    return listed, counts


def _config(shape: torch.Size | tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    large = DEFAULTS if 90 <= chip(str(device))[1] < 110 else SMALL
    default = (FLOAT32 if dtype == torch.float32 else large)["soft_embedding"]
    return config("soft_embedding", shape, dtype, device, default)


# Row counts are not specialised on: what a compiler makes of a divisible one must not change a row's answer.
_COUNTS = ["length", "rows", "values"]


@triton.jit
def _normalise(logits_ptr, peak_ptr, log_sum_ptr, V: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One position: the largest logit and the logarithm of the sum of exp(logit - largest)."""
    enter(PDL)
    n = tl.program_id(0)
    v_K = tl.arange(0, BLOCK)
    at = logits_ptr + n.to(tl.int64) * V + v_K
    peak_K = tl.full((BLOCK,), -1e38, tl.float32)
    sum_K = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x_K = tl.load(at + start, start + v_K < V, -float("inf")).to(tl.float32)
        new_K = tl.maximum(peak_K, x_K)
        sum_K = sum_K * tl.exp2((peak_K - new_K) * _LOG2E) + tl.exp2((x_K - new_K) * _LOG2E)
        peak_K = new_K
    peak = tl.max(peak_K, 0)
    tl.store(peak_ptr + n, peak)
    tl.store(log_sum_ptr + n, tl.log(tl.sum(sum_K * tl.exp2((peak_K - peak) * _LOG2E), 0)))


@triton.jit(do_not_specialize=_COUNTS)
def _mark(
    mass_ptr,
    holds_ptr,
    threshold,
    length,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Which of CHUNK tiles hold something at one of the positions of one block."""
    enter(PDL)
    block = tl.program_id(1)
    blocks = tl.cdiv(length, BLOCK_N)
    l_N = tl.minimum(block % blocks * BLOCK_N + tl.arange(0, BLOCK_N), length - 1)
    n_N = (block // blocks).to(tl.int64) * length + l_N
    c_C = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mass = tl.load(mass_ptr + n_N[:, None] * TILES + c_C[None, :], (c_C < TILES)[None, :], 0.0)
    # Not "mass >= threshold": what is not a number is not small.
    holds_C = tl.max((~(mass < threshold)).to(tl.int32), 0)
    tl.store(holds_ptr + block.to(tl.int64) * TILES + c_C, holds_C.to(tl.uint8), c_C < TILES)


@triton.jit
def _compact(holds_ptr, list_ptr, count_ptr, TILES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The numbers of the tiles that hold something, ascending."""
    enter(PDL)
    block = tl.program_id(0)
    start = block.to(tl.int64) * TILES
    c_C = tl.arange(0, BLOCK)
    holds_C = tl.load(holds_ptr + start + c_C, c_C < TILES, 0).to(tl.int32)
    place_C = tl.cumsum(holds_C, 0) - 1
    tl.store(list_ptr + start + place_C, c_C, holds_C != 0)
    tl.store(count_ptr + block, tl.sum(holds_C, 0))


@triton.jit(do_not_specialize=_COUNTS)
def _multiply(
    logits_ptr,
    embed_ptr,
    peak_ptr,
    log_sum_ptr,
    list_ptr,
    count_ptr,
    partial_ptr,
    length,
    rows,
    V: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    split = tl.program_id(1)
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block = tl.program_id(0) // columns
    blocks = tl.cdiv(length, BLOCK_N)
    first_n = (block // blocks).to(tl.int64) * length
    l_N = block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    near_N = tl.minimum(l_N, length - 1)
    d_D = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    near_D = tl.minimum(d_D, D - 1) if D % BLOCK_D else d_D
    k_K = tl.arange(0, BLOCK_K)

    peak_N = tl.load(peak_ptr + first_n + near_N)
    log_sum_N = tl.load(log_sum_ptr + first_n + near_N)
    shift_N = -(peak_N + log_sum_N) * _LOG2E
    logits_at = logits_ptr + first_n * V + (near_N[:, None].to(tl.int64) * V + k_K[None, :])
    embed_at = embed_ptr + (k_K[:, None] * D + near_D[None, :])
    if list_ptr is None:
        count = TILES
    else:
        count = tl.load(count_ptr + block)
        list_ptr += block.to(tl.int64) * TILES + split
    # One flat loop over slices of BLOCK_K words, so that loads run ahead from one tile into the next. The number of the
    # next tile is read a step early: read where it is used, it would halve how far the other loads run ahead.
    slices: tl.constexpr = TILE // BLOCK_K
    sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tile = split if list_ptr is None else tl.load(list_ptr, split < count, 0)
    for step in range(tl.cdiv(count - split, SPLITS) * slices):
        v = tile * TILE + step % slices * BLOCK_K
        if V % TILE:
            logits = tl.load(logits_at + v, (v + k_K < V)[None, :], -float("inf"))
            embed = tl.load(embed_at + v.to(tl.int64) * D, (v + k_K < V)[:, None], 0.0)
        else:
            logits = tl.load(logits_at + v)
            embed = tl.load(embed_at + v.to(tl.int64) * D)
        if embed_ptr.dtype.element_ty == tl.float32:
            p = tl.exp2((logits - peak_N[:, None] - log_sum_N[:, None]) * _LOG2E)
        else:  # One operation, right to 1e-5: a hundredth of what p is rounded by.
            p = tl.exp2(logits.to(tl.float32) * _LOG2E + shift_N[:, None]).to(embed_ptr.dtype.element_ty)
        sums = tl.dot(p, embed, sums, input_precision="ieee")
        following = (step + 1) // slices * SPLITS
        if list_ptr is None:
            tile = split + following
        else:
            tile = tl.load(list_ptr + following, split + following < count, 0)

    at = (split * rows + first_n + near_N)[:, None] * D + near_D[None, :]
    tl.store(partial_ptr + at, sums, (l_N < length)[:, None] & (d_D < D)[None, :])


@triton.jit(do_not_specialize=_COUNTS)
def _add(partial_ptr, scale_ptr, out_ptr, values, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The splits in order, rounded and scaled as the reference does."""
    enter(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(partial_ptr + i, i < values, 0.0)
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(partial_ptr + split * values.to(tl.int64) + i, i < values, 0.0)
    rounded = sums.to(out_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + i, (rounded * scale).to(out_ptr.dtype.element_ty), i < values)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 262,144 words of 2816, in the read-out's tiles."""
    words, width, device = 262_144, 2816, f"sm_{arch}"
    specials = []
    for dtype in (torch.bfloat16, torch.float32) if arch == 90 else (torch.bfloat16,):
        name = str(dtype).removeprefix("torch.")
        p, f, i = POINTERS[name], "*fp32", "*i32"
        chosen = _config((words, width), dtype, device)
        block_n = chosen["BLOCK_N"]
        warps = {key: chosen.pop(key) for key in ("num_warps", "num_stages")}
        size = sizes("read_out", (words, width), dtype, device)["TILE"]
        count = triton.cdiv(words, size)
        both = {"logits_ptr": p, "embed_ptr": p, "peak_ptr": f, "log_sum_ptr": f, "partial_ptr": f}
        both |= {"length": "i32", "rows": "i32"}
        lists = {"list_ptr": i, "count_ptr": i}
        specials += [
            Special(
                f"multiply {name}",
                _multiply,
                both | lists,
                {"V": words, "D": width, "TILES": count, "TILE": size, **chosen},
                **warps,
            ),
            Special(
                f"multiply all {name}",
                _multiply,
                both,
                dict.fromkeys(lists)
                | {"V": words, "D": width, "TILES": words // chosen["BLOCK_K"], "TILE": chosen["BLOCK_K"], **chosen},
                **warps,
            ),
            Special(
                f"mark {name}",
                _mark,
                {"mass_ptr": f, "holds_ptr": "*u8", "threshold": "fp32", "length": "i32"},
                {"TILES": count, "BLOCK_N": block_n, "CHUNK": _CHUNK},
            ),
            Special(
                f"compact {name}",
                _compact,
                {"holds_ptr": "*u8", "list_ptr": i, "count_ptr": i},
                {"TILES": count, "BLOCK": triton.next_power_of_2(count)},
            ),
            Special(
                f"normalise {name}",
                _normalise,
                {"logits_ptr": p, "peak_ptr": f, "log_sum_ptr": f},
                {"V": words, "BLOCK": _SCAN},
                8,
            ),
            Special(
                f"add {name}",
                _add,
                {"partial_ptr": f, "scale_ptr": p, "out_ptr": p, "values": "i32"},
                {"SPLITS": chosen["SPLITS"], "BLOCK": _ADD},
            ),
        ]
    return specials
