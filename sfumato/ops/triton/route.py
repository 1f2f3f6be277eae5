"""route: norm, scale, product with the router, softmax, top k and renormalisation in one kernel.

A program holds BLOCK_M tokens against all experts, along a share of the width: the 256 tokens of a canvas alone would
be sixteen programs. It leaves its part of the logits in memory; whichever program of a tile comes last adds the parts
in their order and goes on to the experts. The input is rounded after each factor as the reference rounds it; the logits
stay in float32, where the reference rounds them to the weights' dtype once more. Of equal probabilities the lowest
index comes first. Within a block the norm is known already, and each assignment goes into its expert's list at once
(`listed`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.contract import Matrix
from sfumato.ops.lowrank import LowRank
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.experts import append
from sfumato.ops.triton.forms import LaneFactors, beside
from sfumato.ops.triton.low_rank import added, block_of, next_lane
from sfumato.ops.triton.norm import inverse_root
from sfumato.ops.triton.product import is_last, special
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # 16 tokens are the short side of the tensor cores' tile, 128 experts the long one. The loop is bound by what one
    # multiprocessor draws from L2 (128 experts x 128 inputs x 2 bytes a step), so loads run three steps ahead.
    "route": {"BLOCK_M": 16, "BLOCK_K": 128, "SPLITS": 4, "num_warps": 4, "num_stages": 4},
    "route float32": {"BLOCK_M": 16, "BLOCK_K": 32, "SPLITS": 4, "num_warps": 8, "num_stages": 3},
}
CHOICES = {
    "route": {
        "BLOCK_M": (16, 32),
        "BLOCK_K": (64, 128, 256),
        "SPLITS": (2, 4, 8),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
}


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.route`."""
    tokens = len(residual_ND)
    index_NJ = torch.empty(tokens, top_k, dtype=torch.int64, device=residual_ND.device)
    weight_NJ = torch.empty(tokens, top_k, dtype=torch.float32, device=residual_ND.device)
    if tokens:
        counters = torch.zeros(tokens, dtype=torch.int32, device=residual_ND.device)
        router = RouterWeights.of(scale_D, proj_ED, per_expert_E, residual_ND.dtype)
        results = _Results(weight_NJ, counters, index_NJ)
        _launch(residual_ND.contiguous(), router, eps, None, results)
    return index_NJ, weight_NJ


class RouterWeights(NamedTuple):
    """The weights of a router."""

    scale_D: Tensor
    proj_ED: Tensor
    per_expert_E: Tensor
    beside: LaneFactors | None = None

    @classmethod
    def of(cls, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, dtype: torch.dtype) -> RouterWeights:
        """With the factors that adapters have beside the projection. InputError where that is packed."""
        factors = None
        if isinstance(proj_ED, LowRank):
            factors = beside(proj_ED, dtype)
            proj_ED = proj_ED.base
        if not isinstance(proj_ED, Tensor):
            raise InputError("a router is never packed; the triton operations take it in plain numbers")
        return cls(scale_D, proj_ED, per_expert_E, factors)


class _Results(NamedTuple):
    """Where a launch writes: weights, counters of programs, and indices or the lists of experts."""

    weight_NJ: Tensor
    counters: Tensor
    index_NJ: Tensor | None = None
    count_E: Tensor | None = None
    list_EN: Tensor | None = None


def listed(
    residual_ND: Tensor, root_N: Tensor, router: RouterWeights, top_k: int, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`route` for a block: assignments by expert.

    How many assignments n x J + j each expert has, [E] int32, which they are, [E, N] int32 in no order, and their
    weights, [N, J]. `root_N` is the reciprocal of the residual's root mean square, and `zeros` are `zeros_for` so many
    tokens."""
    tokens, count = len(residual_ND), router.proj_ED.shape[0]
    weight_NJ = torch.empty(tokens, top_k, dtype=torch.float32, device=residual_ND.device)
    list_EN = torch.empty(count, tokens, dtype=torch.int32, device=residual_ND.device)
    count_E = zeros[:count]
    _launch(residual_ND, router, 0.0, root_N, _Results(weight_NJ, zeros[count:], None, count_E, list_EN))
    return count_E, list_EN, weight_NJ


def zeros_for(tokens: int, count: int) -> int:
    """Integers that `listed` counts in: assignments of each expert, and programs of each tile of tokens."""
    return count + tokens


def _launch(residual_ND: Tensor, router: RouterWeights, eps: float, root_N: Tensor | None, results: _Results) -> None:
    (tokens, width), count, top_k = residual_ND.shape, router.proj_ED.shape[0], results.weight_NJ.shape[1]
    chosen = _blocks(count, width, residual_ND.dtype, residual_ND.device)
    splits, block = chosen["SPLITS"], max(16, triton.next_power_of_2(count))
    part_SNE = torch.empty(splits, tokens, block, dtype=torch.float32, device=residual_ND.device)
    factors = router.beside
    rank = 0 if factors is None else factors.rank
    inner_SNR = residual_ND.new_empty((splits, tokens, rank), dtype=torch.float32) if rank else None
    if factors is not None and len(factors.lane_N) != tokens:
        raise ValueError(f"x has {tokens} tokens, and lanes were given for {len(factors.lane_N)}")
    _route[(triton.cdiv(tokens, chosen["BLOCK_M"]), splits)](
        residual_ND,
        root_N,
        *(weight.contiguous() for weight in router[:3]),
        *((None,) * 3 if factors is None else (factors.a, factors.b, factors.lane_N)),
        inner_SNR,
        part_SNE,
        results.counters,
        results.index_NJ,
        results.weight_NJ,
        results.count_E,
        results.list_EN,
        tokens,
        eps,
        D=width,
        E=count,
        FACTOR=width**-0.5,
        J=top_k,
        RANK=rank,
        BLOCK_E=block,
        BLOCK_J=triton.next_power_of_2(top_k),
        BLOCK_R=block_of(rank) if rank else 16,
        **chosen,
        **overlap(residual_ND.device),
    )


def _blocks(count: int, width: int, dtype: torch.dtype | str, device: torch.device | str) -> Config:
    default = DEFAULTS["route float32" if "float32" in str(dtype) else "route"]
    small = {**default, "num_stages": min(2, default["num_stages"])}
    chosen = config("route", (count, width), dtype, device, default, small)
    step = min(chosen["BLOCK_K"], max(32, triton.next_power_of_2(width)))
    return {**chosen, "BLOCK_K": step, "SPLITS": min(chosen["SPLITS"], triton.cdiv(width, step))}


@triton.jit(do_not_specialize=["tokens"])
def _route(
    residual_ptr,
    root_ptr,
    scale_ptr,
    proj_ptr,
    per_expert_ptr,
    a_ptr,
    b_ptr,
    lane_ptr,
    inner_ptr,
    part_ptr,
    come_ptr,
    index_ptr,
    weight_ptr,
    count_ptr,
    list_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    J: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    TYPE: tl.constexpr = residual_ptr.dtype.element_ty
    # Steps are dealt in runs, the last of which may be shorter.
    SHARE: tl.constexpr = ((D + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_M = residual_ptr + tl.minimum(m, tokens - 1).to(tl.int64) * D
    k = tl.arange(0, BLOCK_K)
    if root_ptr is None:
        squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in range(0, D, BLOCK_K):
            x = tl.load(x_M[None, :] + start + k[:, None], (start + k < D)[:, None], 0.0).to(tl.float32)
            squares += x * x
        norm_M = inverse_root(tl.sum(squares, 0) / D, eps)
    else:
        norm_M = tl.load(root_ptr + tl.minimum(m, tokens - 1))

    e = tl.arange(0, BLOCK_E)
    w_E = proj_ptr + tl.minimum(e, E - 1) * D
    logits = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    begin = tl.program_id(1) * SHARE
    for start in range(begin, tl.minimum(begin + SHARE, D), BLOCK_K):
        x = _input(x_M, scale_ptr, norm_M, start + k, D, FACTOR, TYPE)
        w = tl.load(w_E[:, None] + start + k[None, :], (start + k < D)[None, :], 0.0)
        logits = tl.dot(w, x, logits, input_precision="ieee")

    stride = tokens.to(tl.int64) * BLOCK_E
    if RANK > 0:
        lane_M = tl.load(lane_ptr + m, m < tokens, -1)
        inner_M = inner_ptr + m.to(tl.int64) * RANK
        low_stride = tokens.to(tl.int64) * RANK
        for first in tl.static_range(0, RANK, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            inner = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            lane = tl.max(lane_M, 0)
            while lane >= 0:
                a_R = a_ptr + lane * (RANK * D) + tl.minimum(r, RANK - 1) * D
                one = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
                for start in range(begin, tl.minimum(begin + SHARE, D), BLOCK_K):
                    x = _input(x_M, scale_ptr, norm_M, start + k, D, FACTOR, TYPE)
                    live = (r < RANK)[:, None] & (start + k < D)[None, :]
                    one = tl.dot(tl.load(a_R[:, None] + start + k[None, :], live, 0.0), x, one, input_precision="ieee")
                inner = tl.where((lane_M == lane)[None, :], one, inner)
                lane = next_lane(lane_M, lane)
            inner_at = inner_M[None, :] + tl.program_id(1) * low_stride + r[:, None]
            tl.store(inner_at, inner, (lane_M >= 0)[None, :] & (r < RANK)[:, None])

    if SPLITS == 1 and RANK == 0:
        _choose(logits, m, per_expert_ptr, index_ptr, weight_ptr, count_ptr, list_ptr, tokens, E, J, BLOCK_E, BLOCK_J)
    else:
        part_at = part_ptr + m.to(tl.int64)[None, :] * BLOCK_E + e[:, None]
        live = (m < tokens)[None, :]
        tl.store(part_at + tl.program_id(1) * stride, logits, live)
        if is_last(come_ptr + tl.program_id(0), SPLITS):
            logits = tl.load(part_at, live, 0.0)
            for part in tl.static_range(1, SPLITS):
                logits += tl.load(part_at + part * stride, live, 0.0)
            if RANK > 0:
                b_E = b_ptr + tl.minimum(e, E - 1)
                logits = added(logits, lane_M, inner_M, low_stride, b_E, e < E, E, RANK * E, RANK, SPLITS, BLOCK_R)
            _choose(
                logits, m, per_expert_ptr, index_ptr, weight_ptr, count_ptr, list_ptr, tokens, E, J, BLOCK_E, BLOCK_J
            )


@triton.jit
def _input(x_M, scale_ptr, norm_M, i, D: tl.constexpr, FACTOR: tl.constexpr, TYPE: tl.constexpr):
    """What the router multiplies, [BLOCK_K, BLOCK_M]: inputs i, rounded after each factor."""
    x = tl.load(x_M[None, :] + i[:, None], (i < D)[:, None], 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + i, i < D, 0.0).to(tl.float32)
    x = (x * norm_M[None, :]).to(TYPE).to(tl.float32)
    x = (x * scale[:, None]).to(TYPE).to(tl.float32)
    return (x * FACTOR).to(TYPE)


@triton.jit
def _choose(
    logits,
    m,
    per_expert_ptr,
    index_ptr,
    weight_ptr,
    count_ptr,
    list_ptr,
    tokens,
    E: tl.constexpr,
    J: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """From logits [BLOCK_E, BLOCK_M] to the experts of tokens m."""
    BLOCK_M: tl.constexpr = logits.shape[1]
    e = tl.arange(0, BLOCK_E)
    logits = tl.where((e < E)[:, None], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 0)[None, :])
    p = p / tl.sum(p, 0)[None, :]
    # What is no number is 0: some experts, but such that exist, and all different. Its weights, 0 / 0, say it.
    p = tl.where(p == p, p, 0.0)
    p = tl.where((e < E)[:, None], p, -1.0)
    j = tl.arange(0, BLOCK_J)
    index = tl.zeros((BLOCK_M, BLOCK_J), tl.int32)
    weight = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(J):
        best = tl.max(p, 0)
        which = tl.min(tl.where(p == best[None, :], e[:, None], E - 1), 0)
        index = tl.where((j == i)[None, :], which[:, None], index)
        weight = tl.where((j == i)[None, :], best[:, None], weight)
        total += best
        p = tl.where(e[:, None] == which[None, :], -1.0, p)
    weight = weight / total[:, None] * tl.load(per_expert_ptr + index).to(tl.float32)
    at = m.to(tl.int64)[:, None] * J + j[None, :]
    live = (m < tokens)[:, None] & (j < J)[None, :]
    tl.store(weight_ptr + at, weight, live)
    if index_ptr is not None:
        tl.store(index_ptr + at, index.to(tl.int64), live)
    if list_ptr is not None:
        append(index, at.to(tl.int32), live, count_ptr, list_ptr, tokens)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 128 experts, 8 a token, width 2816."""
    specials = []
    for dtype in ("bfloat16", "float32") if arch == 90 else ("bfloat16",):
        chosen = _blocks(128, 2816, dtype, f"sm_{arch}")
        launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
        pointers: dict[str, str | None] = dict.fromkeys(_route.arg_names[:15], None)
        pointers |= dict.fromkeys(("residual_ptr", "scale_ptr", "proj_ptr", "per_expert_ptr"), POINTERS[dtype])
        pointers |= {"part_ptr": "*fp32", "come_ptr": "*i32", "weight_ptr": "*fp32"}
        sizes = {"D": 2816, "E": 128, "FACTOR": 2816**-0.5, "J": 8, "BLOCK_E": 128, "BLOCK_J": 8, **chosen}
        sizes |= {"RANK": 0, "BLOCK_R": 16}
        alone = {**pointers, "index_ptr": "*i64"}
        within = {**pointers, "root_ptr": "*fp32", "count_ptr": "*i32", "list_ptr": "*i32"}
        for name, each in (("route", alone), ("route listed", within)):
            one = special(f"{name} {dtype}", _route, each, ["tokens"], sizes, launch)
            specials.append(replace(one, signature={**one.signature, "eps": "fp32"}))
        if dtype == "bfloat16":
            within |= {"a_ptr": "*bf16", "b_ptr": "*bf16", "lane_ptr": "*i64", "inner_ptr": "*fp32"}
            one = special(f"route listed {dtype} adapted", _route, within, ["tokens"], sizes | {"RANK": 16}, launch)
            specials.append(replace(one, signature={**one.signature, "eps": "fp32"}))
    return specials
