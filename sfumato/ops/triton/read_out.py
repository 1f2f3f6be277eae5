"""The read-out: one sweep over the vocabulary, which writes the logits and what is needed of every tile of words.

A program of the sweep owns a block of positions and one tile of words. Softcap, temperature and banned words are
applied to the float32 sums in registers, where they stay until the tile's peak is known; the logits leave rounded,
once, and with them go five numbers a position and tile. A second kernel puts the tiles together in a fixed order:
argmax, entropy, the tile that the sample lies in. A third one computes that one tile's logits again, in float32, those
of words that weigh anything, and walks it. So E is read once, no [B, L, V] float32 exists, and the sample follows the
float32 distribution, not the rounded one.

Beside them, the sweep sums exp over the *rounded* logits: the soft embedding is softmax of those, and a rounding by
half a place of 75 is a factor of 1.28 in exp, which only the same sum takes out again.

What it lacks: products are not rounded to the weights' dtype before the softcap, as the reference's are, so that it is
closer to float32; a hidden state and a matrix of different dtypes; gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.contract import NEVER, ReadOut
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.product import IN_ASSEMBLY
from sfumato.ops.triton.tuning import Config, chip, config

DEFAULTS = {
    # All 256 positions of a canvas in one program: E comes from memory once, and the sums take 128 registers of each
    # thread. Three stages of (256 + 128) x 64 values are 144 KiB.
    "read_out": {"BLOCK_N": 256, "TILE": 128, "PART": 16, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    # Bound by memory: four stages of one tile of E are in flight, which one canvas's 256 programs need.
    "read_out_walk": {"BLOCK_K": 64, "STAGES": 4, "num_warps": 4},
}
BLACKWELL = {
    # The sums lie in tensor memory: wide tiles cost no registers, and 128 positions are one instruction's.
    "read_out": {"BLOCK_N": 128, "TILE": 256, "PART": 16, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3},
    "read_out_walk": {"BLOCK_K": 64, "STAGES": 3, "num_warps": 8},
}
SMALL = {
    # Without asynchronous matrix units the operands pass through registers too: 64 of each thread for the sums.
    "read_out": {"BLOCK_N": 128, "TILE": 128, "PART": 8, "BLOCK_K": 32, "GROUP": 16, "num_warps": 8, "num_stages": 4},
    "read_out_walk": {"BLOCK_K": 64, "STAGES": 4, "num_warps": 4},
}
FLOAT32 = {
    # No tensor cores: 32 sums a thread, and shared memory that every GPU has.
    "read_out": {"BLOCK_N": 64, "TILE": 128, "PART": 32, "BLOCK_K": 32, "GROUP": 32, "num_warps": 8, "num_stages": 2},
    "read_out_walk": {"BLOCK_K": 32, "STAGES": 3, "num_warps": 4},
}
CHOICES = {
    "read_out": {
        "BLOCK_N": (128, 256),
        "TILE": (128, 256),
        "PART": (8, 16, 32),
        "BLOCK_K": (32, 64),
        "num_stages": (3, 4),
    },
    "read_out_walk": {"BLOCK_K": (64, 128), "STAGES": (3, 4, 5), "num_warps": (4, 8)},
}

LOUD = 128
"""Positions in a program that adds a caller's noise to each word: beside more of them, the noise fits no register."""
FEW = 8
"""Up to so many banned words are compared with each word; more are marked in a table of all words first."""

_NEVER = tl.constexpr(NEVER)
_LOG2E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """What the soft embedding takes from the sweep: C tiles of the vocabulary, `size` words each.

    The last may be shorter. softmax(logits) = exp(logits - peak - log_sum), of the logits as they were rounded."""

    mass_BLC: Tensor
    """The probability of each tile, float32."""
    peak_BL: Tensor
    log_sum_BL: Tensor
    size: int


class _ReadOutInputs(NamedTuple):
    """What logits are computed from, as the kernels take it."""

    hidden_BLD: Tensor
    embed_VD: Tensor
    temperature_B: Tensor
    where_BL: Tensor | None
    """Where words are banned."""
    banned: Tensor | None
    """Their ids, or a flag for each word of the vocabulary."""
    softcap: float
    bans: int
    """How many ids; 0 for flags, and for none."""


class _TileSums(NamedTuple):
    """What the sweep leaves of every position and tile, [B, L, C]."""

    peak: Tensor
    best: Tensor
    """The word of the peak within its tile."""
    total: Tensor
    """The sum of exp(logit - peak)."""
    moment: Tensor
    mass: Tensor
    """The same sum of the rounded logits."""
    noisy: Tensor | None
    """Peak and word of logits with a caller's noise."""
    noisy_best: Tensor | None


def read_out(
    hidden_BLD: Tensor,
    embed_VD: Tensor,
    softcap: float,
    temperature_B: Tensor,
    uniform_BL: Tensor | None = None,
    gumbel_BLV: Tensor | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
) -> ReadOut:
    """As `reference.read_out`."""
    where_BL, words, bans = _bans(banned, len(embed_VD))
    temperature_B = temperature_B.to(torch.float32).contiguous()
    hidden_BLD, embed_VD = hidden_BLD.contiguous(), embed_VD.contiguous()
    inputs = _ReadOutInputs(hidden_BLD, embed_VD, temperature_B, where_BL, words, float(softcap), bans)
    logits_BLV, sums, tile = _launch_sweep(inputs, None if gumbel_BLV is None else gumbel_BLV.contiguous())

    shape, device = hidden_BLD.shape[:2], hidden_BLD.device
    count = sums.peak.shape[-1]
    argmax_BL, sample_BL = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
    entropy_BL, peak_BL, log_sum_BL = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    is_drawn = uniform_BL is not None and gumbel_BLV is None
    uniform_BL = uniform_BL.to(torch.float32).contiguous() if uniform_BL is not None and is_drawn else None
    inside_BL = torch.empty(shape, dtype=torch.int64, device=device) if is_drawn else None
    rest_BL = torch.empty(shape, dtype=torch.float32, device=device) if is_drawn else None
    _combine[(shape.numel(),)](
        *sums,
        uniform_BL,
        argmax_BL,
        sample_BL,
        entropy_BL,
        peak_BL,
        log_sum_BL,
        inside_BL,
        rest_BL,
        TILES=count,
        TILE=tile,
        BLOCK=triton.next_power_of_2(count),
        num_warps=_combine_warps(count),
        **overlap(device),
    )
    if inside_BL is not None and rest_BL is not None:
        _launch_walk(inputs, logits_BLV, tile, (peak_BL, inside_BL, rest_BL), sample_BL)
    return ReadOut(sample_BL, argmax_BL, entropy_BL, logits_BLV, Tiles(sums.mass, peak_BL, log_sum_BL, tile))


def _bans(banned: tuple[Tensor, Tensor] | None, words: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Where, which and how many, as `_ReadOutInputs` has them."""
    if banned is None or not len(banned[1]):
        return None, None, 0
    where_BL, ids = banned[0].contiguous().view(torch.uint8), banned[1].to(torch.int64).contiguous()
    if len(ids) <= FEW:
        return where_BL, ids, len(ids)
    return where_BL, torch.zeros(words, dtype=torch.uint8, device=ids.device).index_fill_(0, ids, 1), 0


def _launch_sweep(inputs: _ReadOutInputs, gumbel_BLV: Tensor | None) -> tuple[Tensor, _TileSums, int]:
    """Logits [B, L, V], what is kept of each tile, and the words of a tile."""
    (batch, length, width), (words, _) = inputs.hidden_BLD.shape, inputs.embed_VD.shape
    rows, dtype, device = batch * length, inputs.embed_VD.dtype, inputs.hidden_BLD.device
    sweep = sizes("read_out", inputs.embed_VD.shape, dtype, device)
    if gumbel_BLV is not None:
        sweep["BLOCK_N"] = min(sweep["BLOCK_N"], LOUD)
    warps = {name: sweep.pop(name) for name in ("num_warps", "num_stages")}
    count = triton.cdiv(words, sweep["TILE"])
    logits_BLV = torch.empty(batch, length, words, dtype=dtype, device=device)
    floats = [torch.empty(batch, length, count, dtype=torch.float32, device=device) for _ in range(4)]
    peak, total, moment, mass = floats
    best = torch.empty(batch, length, count, dtype=torch.int16, device=device)
    noisy, noisy_best = (None, None) if gumbel_BLV is None else (torch.empty_like(peak), torch.empty_like(best))
    sums = _TileSums(peak, best, total, moment, mass, noisy, noisy_best)
    _sweep[(triton.cdiv(rows, sweep["BLOCK_N"]) * count,)](
        inputs.hidden_BLD,
        inputs.embed_VD,
        inputs.temperature_B,
        inputs.where_BL,
        inputs.banned,
        gumbel_BLV,
        logits_BLV,
        *sums,
        rows,
        length,
        inputs.softcap,
        V=words,
        D=width,
        TILES=count,
        BANS=inputs.bans,
        **sweep,
        **warps,
        **overlap(device),
    )
    return logits_BLV, sums, sweep["TILE"]


def _launch_walk(
    inputs: _ReadOutInputs, logits_BLV: Tensor, tile: int, target: tuple[Tensor, Tensor, Tensor], sample_BL: Tensor
) -> None:
    """Samples into `sample_BL`; `target` is the peak, the tile of the sample, and what of the sum is to pass there."""
    (batch, length, width), device = inputs.hidden_BLD.shape, inputs.hidden_BLD.device
    _walk[(batch * length,)](
        inputs.hidden_BLD,
        inputs.embed_VD,
        inputs.temperature_B,
        inputs.where_BL,
        inputs.banned,
        logits_BLV,
        *target,
        sample_BL,
        length,
        inputs.softcap,
        V=len(inputs.embed_VD),
        D=width,
        TILE=tile,
        BANS=inputs.bans,
        **sizes("read_out_walk", inputs.embed_VD.shape, inputs.embed_VD.dtype, device),
        **overlap(device),
    )


def sizes(op: str, shape: torch.Size | tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Config:
    """Tile sizes of one of this file's kernels; the soft embedding works in the sweep's tiles."""
    arch = chip(str(device))[1]
    large = DEFAULTS if 90 <= arch < 100 else BLACKWELL if 100 <= arch < 110 else SMALL
    return config(op, shape, dtype, device, (FLOAT32 if dtype == torch.float32 else large)[op])


def _combine_warps(count: int) -> int:
    return 8 if count > 1024 else 4


# Row counts are not specialised on: what a compiler makes of a divisible one must not change a row's answer.
_COUNTS = ["rows", "length"]


@triton.jit
def _scaled(product, softcap, inverse):
    """Logits, softcap x tanh(product / softcap) / temperature; right at both ends, where exp is 0 or infinite.

    Its own error is up to 3e-7 x softcap / temperature: small beside the product's, but more than tanh's where logits
    are small."""
    whole = tl.exp2(product * (2.0 * _LOG2E / softcap)) + 1.0
    if IN_ASSEMBLY:  # A division would mind denominators above 2^126, whose inverses may as well be 0.
        part = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [whole], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        part = 1.0 / whole
    most = softcap * inverse
    return most - part * (2.0 * most)


@triton.jit
def _rounded(x, TYPE: tl.constexpr):
    """These in TYPE; to bfloat16 two at a time, which the compiler does not do of its own, and which is faster."""
    if IN_ASSEMBLY and tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(TYPE)


@triton.jit
def _are_banned(banned_ptr, v_P, BANS: tl.constexpr):
    """Which of these words are banned: by the few ids, or (BANS 0) by a flag for each word."""
    if BANS:
        is_banned_P = v_P == tl.load(banned_ptr)
        for i in tl.static_range(1, BANS):
            is_banned_P |= v_P == tl.load(banned_ptr + i)
    else:
        is_banned_P = tl.load(banned_ptr + v_P) != 0
    return is_banned_P


@triton.jit(do_not_specialize=_COUNTS)
def _sweep(
    hidden_ptr,
    embed_ptr,
    temperature_ptr,
    where_ptr,
    banned_ptr,
    gumbel_ptr,
    logits_ptr,
    peak_ptr,
    best_ptr,
    total_ptr,
    moment_ptr,
    mass_ptr,
    noisy_ptr,
    noisy_best_ptr,
    rows,
    length,
    softcap,
    V: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BANS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    # Programs that run at one time share GROUP blocks of positions and few tiles: E streams, the hidden states stay
    # in L2 however many rows there are.
    program = tl.program_id(0)
    first = program // (GROUP * TILES) * GROUP
    together = min(tl.cdiv(rows, BLOCK_N) - first, GROUP)
    within = program - first * TILES
    tile = within // together
    first_n = (first + within % together) * BLOCK_N
    first_v = tile * TILE
    local_N = tl.arange(0, BLOCK_N)
    word_C = tl.arange(0, TILE)
    k_K = tl.arange(0, BLOCK_K)

    # Rows and words past the end read the last one again, and are masked where it matters. The long part of an address
    # is the program's, the part of each thread is short.
    is_row_N = local_N < rows - first_n
    near_N = tl.minimum(local_N, rows - first_n - 1)
    near_C = tl.minimum(word_C, V - first_v - 1) if V % TILE else word_C
    hidden_at = hidden_ptr + first_n.to(tl.int64) * D + (near_N[:, None] * D + k_K[None, :])
    embed_at = embed_ptr + first_v.to(tl.int64) * D + (near_C[None, :] * D + k_K[:, None])
    product = tl.zeros((BLOCK_N, TILE), tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K:
            live_K = start + k_K < D
            hidden = tl.load(hidden_at, live_K[None, :], 0.0)
            embed = tl.load(embed_at, live_K[:, None], 0.0)
        else:
            hidden = tl.load(hidden_at)
            embed = tl.load(embed_at)
        product = tl.dot(hidden, embed, product, input_precision="ieee")
        hidden_at += BLOCK_K
        embed_at += BLOCK_K

    # The sums become logits in their place, PART columns at a time: all at once, what each needs beside it would not
    # fit the registers. What is taken of a row stays PART wide until the end, so that threads need not meet before.
    inverse_N = 1.0 / tl.load(temperature_ptr + (first_n + near_N) // length)
    corner = first_n.to(tl.int64) * V + first_v
    p_P = tl.arange(0, PART)
    if where_ptr is not None:
        is_where_N = tl.load(where_ptr + first_n + near_N) != 0
    most_NP = tl.full((BLOCK_N, PART), -float("inf"), tl.float32)
    nth_NP = tl.zeros((BLOCK_N, PART), tl.int32)
    parts = _columns(product, TILE // PART)
    logits = ()
    for i in tl.static_range(TILE // PART):
        x = _scaled(parts[i], softcap, inverse_N[:, None])
        if where_ptr is not None:
            is_banned_P = _are_banned(banned_ptr, tl.minimum(first_v + i * PART + p_P, V - 1), BANS)
            x = tl.where(is_where_N[:, None] & is_banned_P[None, :], _NEVER * inverse_N[:, None], x)
        if V % TILE:  # Words past the end: a peak of -1e38 would do, but 0 x it must stay 0.
            x = tl.where((i * PART + p_P < V - first_v)[None, :], x, -1e38)
        nth_NP = tl.where(x > most_NP, i, nth_NP)
        most_NP = tl.maximum(most_NP, x)
        logits += (x,)  # type: ignore[assignment]
    peak_N, best_N = _first(most_NP, nth_NP, TILE, PART)

    total_NP = tl.zeros((BLOCK_N, PART), tl.float32)
    moment_NP = total_NP
    mass_NP = total_NP
    for i in tl.static_range(TILE // PART):
        near_P = tl.minimum(i * PART + p_P, V - first_v - 1) if V % TILE else i * PART + p_P
        is_word_P = i * PART + p_P < V - first_v
        is_live = is_row_N[:, None] & is_word_P[None, :] if V % TILE else is_row_N[:, None]
        kept = tl.where(is_word_P[None, :], logits[i], 0.0) if V % TILE else logits[i]
        rounded = _rounded(kept, logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + corner + near_N[:, None] * V + near_P[None, :], rounded, is_live)
        below = logits[i] - peak_N[:, None]
        weight = tl.exp2(below * _LOG2E)
        total_NP += weight
        moment_NP += below * weight
        # Rounded, a logit passes the peak by a little; where all words are banned, NEVER passes itself by 1e28.
        weight = tl.exp2(tl.minimum((rounded.to(tl.float32) - peak_N[:, None]) * _LOG2E, 86.0))
        mass_NP += tl.where(is_word_P[None, :], weight, 0.0) if V % TILE else weight
    total_N, moment_N, mass_N = tl.sum(total_NP, 1), tl.sum(moment_NP, 1), tl.sum(mass_NP, 1)

    slot_N = (first_n + near_N).to(tl.int64) * TILES + tile
    tl.store(peak_ptr + slot_N, peak_N, is_row_N)
    tl.store(best_ptr + slot_N, best_N.to(tl.int16), is_row_N)
    tl.store(total_ptr + slot_N, total_N, is_row_N)
    tl.store(moment_ptr + slot_N, moment_N, is_row_N)
    tl.store(mass_ptr + slot_N, mass_N, is_row_N)
    if gumbel_ptr is not None:
        noisy_N = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        noisy_best_N = tl.zeros((BLOCK_N,), tl.int32)
        for i in tl.static_range(TILE // PART):
            near_P = tl.minimum(i * PART + p_P, V - first_v - 1) if V % TILE else i * PART + p_P
            loud = tl.load(gumbel_ptr + corner + near_N[:, None] * V + near_P[None, :]).to(tl.float32) + logits[i]
            higher_N = tl.max(loud, 1)
            best_P = tl.min(tl.where(loud == higher_N[:, None], (i * PART + p_P)[None, :], TILE), 1)
            noisy_best_N = tl.where(higher_N > noisy_N, best_P, noisy_best_N)
            noisy_N = tl.maximum(noisy_N, higher_N)
        tl.store(noisy_ptr + slot_N, noisy_N, is_row_N)
        tl.store(noisy_best_ptr + slot_N, noisy_best_N.to(tl.int16), is_row_N)


@triton.jit
def _first(most_NP, nth_NP, TILE: tl.constexpr, PART: tl.constexpr):
    """The largest of each row and the first word that has it, from what each of PART columns has, and in which part."""
    peak_N = tl.max(most_NP, 1)
    word_NP = nth_NP * PART + tl.arange(0, PART)[None, :]
    return peak_N, tl.min(tl.where(most_NP == peak_N[:, None], word_NP, TILE - 1), 1)


@triton.jit
def _columns(x, PARTS: tl.constexpr):
    """[N, C] as a tuple of PARTS blocks of neighbouring columns; a power of two."""
    if PARTS == 1:
        return (x,)
    else:
        half: tl.constexpr = x.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, half)), (0, 2, 1)))
        return _columns(left, PARTS // 2) + _columns(right, PARTS // 2)


@triton.jit
def _combine(
    peak_ptr,
    best_ptr,
    total_ptr,
    moment_ptr,
    mass_ptr,
    noisy_ptr,
    noisy_best_ptr,
    uniform_ptr,
    argmax_ptr,
    sample_ptr,
    entropy_ptr,
    peak_out_ptr,
    log_sum_ptr,
    inside_ptr,
    rest_ptr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One position: all its tiles.

    Sums are taken in units of exp(peak), so that the entropy, log(sum) - moment / sum, is a sum of two numbers that are
    never negative."""
    enter(PDL)
    n = tl.program_id(0)
    start = n.to(tl.int64) * TILES
    c_C = tl.arange(0, BLOCK)
    live_C = c_C < TILES
    peak_C = tl.load(peak_ptr + start + c_C, live_C, -float("inf"))
    total_C = tl.load(total_ptr + start + c_C, live_C, 0.0)
    moment_C = tl.load(moment_ptr + start + c_C, live_C, 0.0)
    mass_C = tl.load(mass_ptr + start + c_C, live_C, 0.0)

    peak = tl.max(peak_C, 0)
    winner = tl.min(tl.where(peak_C == peak, c_C, TILES - 1), 0)
    argmax = winner.to(tl.int64) * TILE + tl.load(best_ptr + start + winner)
    tl.store(argmax_ptr + n, argmax)

    below_C = tl.where(live_C, peak_C - peak, 0.0)
    weight_C = tl.where(live_C, tl.exp2(below_C * _LOG2E), 0.0)
    total = tl.sum(weight_C * total_C, 0)
    moment = tl.sum(weight_C * (moment_C + below_C * total_C), 0)
    tl.store(entropy_ptr + n, tl.log(total) - moment / total)
    rounded_total = tl.sum(weight_C * mass_C, 0)
    tl.store(mass_ptr + start + c_C, weight_C * mass_C / rounded_total, live_C)
    tl.store(peak_out_ptr + n, peak)
    tl.store(log_sum_ptr + n, tl.log(rounded_total))

    if noisy_ptr is not None:
        noisy_C = tl.load(noisy_ptr + start + c_C, live_C, -float("inf"))
        winner = tl.min(tl.where(noisy_C == tl.max(noisy_C, 0), c_C, TILES - 1), 0)
        tl.store(sample_ptr + n, winner.to(tl.int64) * TILE + tl.load(noisy_best_ptr + start + winner))
    elif uniform_ptr is not None:
        passed_C = tl.cumsum(weight_C * total_C, 0)
        target = tl.load(uniform_ptr + n) * tl.sum(tl.where(c_C == TILES - 1, passed_C, 0.0), 0)
        inside = tl.min(tl.where((passed_C > target) & live_C, c_C, TILES - 1), 0)
        rest = target - tl.sum(tl.where(c_C == inside - 1, passed_C, 0.0), 0)
        # A word that holds nearly all of its tile needs no walk: at most `others` comes before it, and it spans
        # `alone`. In late steps that is nearly every position.
        alone = tl.sum(tl.where(c_C == inside, weight_C, 0.0), 0)
        others = tl.sum(tl.where(c_C == inside, weight_C * (total_C - 1.0), 0.0), 0)
        is_settled = (rest >= others) & (rest < alone)
        tl.store(sample_ptr + n, inside.to(tl.int64) * TILE + tl.load(best_ptr + start + inside))
        tl.store(inside_ptr + n, tl.where(is_settled, -1, inside).to(tl.int64))
        tl.store(rest_ptr + n, rest)
    else:
        tl.store(sample_ptr + n, argmax)


@triton.jit(do_not_specialize=_COUNTS)
def _walk(
    hidden_ptr,
    embed_ptr,
    temperature_ptr,
    where_ptr,
    banned_ptr,
    logits_ptr,
    peak_ptr,
    inside_ptr,
    rest_ptr,
    sample_ptr,
    length,
    softcap,
    V: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BANS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One position, the one tile that its sample lies in: the first word at which the sum passes the target's rest.

    Its logits are as the sweep had them, in float32. What weighs less than 2^-24 of the tile, by the rounded logits, is
    taken as rounded, and its row of E not read: all of it is less than 2^-17, and less wrong than 2^-18."""
    enter(PDL)
    n = tl.program_id(0).to(tl.int64)
    inside = tl.load(inside_ptr + n)
    if inside >= 0:
        word_C = tl.arange(0, TILE)
        v_C = inside * TILE + word_C
        near_C = tl.minimum(v_C, V - 1)
        peak = tl.load(peak_ptr + n)
        rounded_C = tl.load(logits_ptr + n * V + near_C).to(tl.float32)
        weight_C = tl.exp2(tl.minimum((rounded_C - peak) * _LOG2E, 86.0))
        weighs_C = ~(weight_C < tl.max(weight_C, 0) * 2.0**-24)
        k_K = tl.arange(0, BLOCK_K)
        embed_at = embed_ptr + near_C[:, None] * D + k_K[None, :]
        hidden_at = hidden_ptr + n * D + k_K
        product = tl.zeros((TILE, BLOCK_K), tl.float32)
        for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):  # Stages, given here: loads without a tl.dot want it.
            live_K = start + k_K < D
            is_live = weighs_C[:, None] & live_K[None, :] if D % BLOCK_K else weighs_C[:, None]
            embed = tl.load(embed_at, is_live, 0.0)
            hidden_K = tl.load(hidden_at, live_K, 0.0) if D % BLOCK_K else tl.load(hidden_at)
            product += embed.to(tl.float32) * hidden_K.to(tl.float32)[None, :]
            embed_at += BLOCK_K
            hidden_at += BLOCK_K
        product_C = tl.sum(product, 1)

        inverse = 1.0 / tl.load(temperature_ptr + n // length)
        x_C = tl.where(weighs_C, _scaled(product_C, softcap, inverse), rounded_C)
        if where_ptr is not None:
            is_banned_C = _are_banned(banned_ptr, near_C, BANS) & (tl.load(where_ptr + n) != 0)
            x_C = tl.where(is_banned_C, _NEVER * inverse, x_C)
        weight_C = tl.where(v_C < V, tl.exp2((x_C - peak) * _LOG2E), 0.0)
        passed_C = tl.cumsum(weight_C, 0)
        specials = tl.min(tl.where(passed_C > tl.load(rest_ptr + n), word_C, TILE), 0)
        # Where rounding leaves the target a hair beyond the sum: the last word that can come out at all.
        last = tl.max(tl.where(weight_C > 0, word_C, 0), 0)
        tl.store(sample_ptr + n, inside * TILE + tl.minimum(specials, last))


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 262,144 words of 2816."""
    words, width, device = 262_144, 2816, f"sm_{arch}"
    specials = []
    for dtype in (torch.bfloat16, torch.float32) if arch == 90 else (torch.bfloat16,):
        name = str(dtype).removeprefix("torch.")
        p, f, i = POINTERS[name], "*fp32", "*i64"
        sweep, walk = (sizes(op, (words, width), dtype, device) for op in ("read_out", "read_out_walk"))
        warps = {key: sweep.pop(key) for key in ("num_warps", "num_stages")}
        walk_warps = walk.pop("num_warps")
        tiles = triton.cdiv(words, sweep["TILE"])
        bans: dict[str, str] = {"where_ptr": "*u8", "banned_ptr": i}
        noise: dict[str, str] = {"gumbel_ptr": f, "noisy_ptr": f, "noisy_best_ptr": "*i16"}
        for what, more in (("", {}), (" banned", bans), (" gumbel", noise)):
            loud = {"BLOCK_N": min(sweep["BLOCK_N"], LOUD)} if more is noise else {}
            specials.append(
                Special(
                    f"sweep{what} {name}",
                    _sweep,
                    {"hidden_ptr": p, "embed_ptr": p, "temperature_ptr": f, "logits_ptr": p, "best_ptr": "*i16"}
                    | dict.fromkeys(("peak_ptr", "total_ptr", "moment_ptr", "mass_ptr"), f)
                    | {"rows": "i32", "length": "i32", "softcap": "fp32", **more},
                    {key: None for key in (*bans, *noise) if key not in more}
                    | {"V": words, "D": width, "TILES": tiles, "BANS": 3 if more is bans else 0, **sweep, **loud},
                    **warps,
                )
            )
        outs = {"argmax_ptr": i, "sample_ptr": i, "entropy_ptr": f, "peak_out_ptr": f, "log_sum_ptr": f}
        specials.append(
            Special(
                f"combine {name}",
                _combine,
                {"best_ptr": "*i16", "uniform_ptr": f, "inside_ptr": i, "rest_ptr": f, **outs}
                | dict.fromkeys(("peak_ptr", "total_ptr", "moment_ptr", "mass_ptr"), f),
                {"noisy_ptr": None, "noisy_best_ptr": None, "TILES": tiles, "TILE": sweep["TILE"]}
                | {"BLOCK": triton.next_power_of_2(tiles)},
                _combine_warps(tiles),
            )
        )
        specials.append(
            Special(
                f"walk {name}",
                _walk,
                {"hidden_ptr": p, "embed_ptr": p, "temperature_ptr": f, "peak_ptr": f, "inside_ptr": i}
                | {"logits_ptr": p, "rest_ptr": f, "sample_ptr": i, "length": "i32", "softcap": "fp32"},
                {"where_ptr": None, "banned_ptr": None, "BANS": 0}
                | {"V": words, "D": width, "TILE": sweep["TILE"], **walk},
                walk_warps,
            )
        )
    return specials
