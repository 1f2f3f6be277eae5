"""experts: each token through its J experts, each expert's weights read once.

Each assignment (token, choice) stands in the list of its expert, which the router writes itself (`route.listed`), or
one small kernel. Tiles of BLOCK_M rows belong to one expert each; which one, a program reads from the experts' counts.
How many tiles there can be follows from the shapes alone, so that the launch does not wait for the routing; the
programs of surplus tiles leave at once. Then gate and up with the product in the epilogue, then down, each assignment
into a row of its own, then one sum over a token's J rows with their weights, j ascending. The order of a list is that
in which programs came, and changes no number: every row is summed by itself. The loop over K is `product`.

Tiles of one expert lie side by side in the launch: the second finds the weights in L2. What this lacks: experts spread
over several devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32, zeros

from sfumato.ops.contract import Matrix
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.forms import Form, blocks, dense_specials, form, has_tensor_memory, operand_types
from sfumato.ops.triton.linear import gate_and_up, gated, placed
from sfumato.ops.triton.low_rank import Addition, added, for_special, nothing, roomy, shrunk, sizes_of
from sfumato.ops.triton.low_rank import tiles as shrink_tiles
from sfumato.ops.triton.product import Prepared, prepare, product, row_at, special, x_at
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
    "listed": {"BLOCK": 256, "num_warps": 4, "num_stages": 1},
    "combine": {"BLOCK": 1024, "num_warps": 4, "num_stages": 1},
}
# With more rows an expert, higher tiles: weights cross from L2 and are unpacked fewer times. A tile that is not full
# costs the tensor cores as much as a full one, so a tile is about as high as an expert has rows.
_HEIGHTS: dict[str, Config] = {"": {}, "_64": {"BLOCK_M": 64}, "_128": {"BLOCK_M": 128, "num_warps": 8}}
KINDS: dict[str, dict[str, Config]] = {
    op + height: {kind: {**sizes, **more} for kind, sizes in _EXPERTS.items()}
    for op in ("experts_gate_up", "experts_down")
    for height, more in _HEIGHTS.items()
}
TALL = ((128, "_128"), (48, "_64"))
"""The height of tiles, from so many rows an expert on average."""
CHOICES = {
    "BLOCK_N": (64, 128),
    "BLOCK_M": (16, 32, 64),
    "BLOCK_K": (64, 128),
    "num_warps": (4, 8),
    "num_stages": (3, 4, 5, 6),
}


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix) -> Tensor:
    """As `reference.experts`."""
    tokens, width = x_ND.shape
    choices, count = index_NJ.shape[1], gate_up_EFD.shape[0]
    rows = tokens * choices
    out_ND = empty(tokens, width, dtype=x_ND.dtype, device=x_ND.device)
    if not out_ND.numel():
        return out_ND
    gate_up = form(gate_up_EFD, x_ND)
    hidden_size = gate_up.outputs // 2
    lists = listed(index_NJ, count)
    hidden_AF = empty(rows, hidden_size, dtype=x_ND.dtype, device=x_ND.device)
    down = form(down_EDF, hidden_AF)
    part_AD = products(prepare(x_ND, gate_up), lists, choices, gate_up, down, hidden_AF)
    chosen = config("combine", (width,), x_ND.dtype, x_ND.device, DEFAULTS["combine"])
    _combine[(tokens, triton.cdiv(width, chosen["BLOCK"]))](
        part_AD, weight_NJ.contiguous(), out_ND, D=width, J=choices, **chosen, **overlap(x_ND.device)
    )
    return out_ND


def products(
    x: Prepared,
    lists: tuple[Tensor, Tensor],
    choices: int,
    gate_up: Form,
    down: Form,
    hidden_AF: Tensor,
) -> Tensor:
    """down(gated(gate_up(x))) of every assignment, [N x J, D].

    x is as `prepare` gives it, `lists` are `listed`; `hidden_AF` is where to keep the hidden layer."""
    count_E, list_EN = lists
    (rows, hidden_size), count, tokens = hidden_AF.shape, len(count_E), list_EN.shape[1]
    dtype, device = hidden_AF.dtype, hidden_AF.device
    # Tiles of rows are cut once for both products; gate and up, the larger, decide.
    height = _height(rows / count, (gate_up, down), dtype, device)
    tiles, launch = _tiles("experts_gate_up", height, (count, gate_up.outputs, gate_up.inputs), gate_up, dtype, device)
    most = min(rows, (rows + count * (tiles["BLOCK_M"] - 1)) // tiles["BLOCK_M"])
    rest = _addition(x, gate_up, lists, choices, is_by_token=True)
    _experts_gate_up[(most * triton.cdiv(gate_up.outputs, tiles["BLOCK_N"]),)](
        x.x_MK,
        x.extra,
        *gate_up.operands,
        *rest.operands,
        hidden_AF,
        count_E,
        list_EN,
        most,
        tokens,
        J=choices,
        F=hidden_size,
        K=gate_up.inputs,
        GROUP=gate_up.group,
        KIND=gate_up.kind,
        SPLIT=down.is_halved,
        E=count,
        BLOCK_E=triton.next_power_of_2(count),
        **rest.sizes,
        **tiles,
        **(roomy(launch, gate_up, rest.inner is not None, device) if height else launch),
        **overlap(device),
    )
    return _down(hidden_AF, lists, choices, down, (height, tiles["BLOCK_M"], most))


def _down(
    hidden_AF: Tensor, lists: tuple[Tensor, Tensor], choices: int, down: Form, cut: tuple[str, int, int]
) -> Tensor:
    """The second product of every assignment; `cut` are the tiles of rows: name, height, and how many there can be."""
    (rows, hidden_size), (count_E, list_EN), (height, block_m, most) = hidden_AF.shape, lists, cut
    count, dtype, device = len(count_E), hidden_AF.dtype, hidden_AF.device
    tiles, launch = _tiles("experts_down", height, (count, down.outputs, hidden_size), down, dtype, device)
    tiles["BLOCK_M"] = block_m
    hidden = prepare(hidden_AF, down, is_split=True)
    rest = _addition(hidden, down, lists, choices, is_by_token=False)
    part_AD = empty(rows, down.outputs, dtype=dtype, device=device)
    _experts_down[(most * triton.cdiv(down.outputs, tiles["BLOCK_N"]),)](
        hidden.x_MK,
        hidden.extra,
        *down.operands,
        *rest.operands,
        part_AD,
        count_E,
        list_EN,
        most,
        list_EN.shape[1],
        J=choices,
        N=down.outputs,
        K=hidden_size,
        GROUP=down.group,
        KIND=down.kind,
        E=count,
        BLOCK_E=triton.next_power_of_2(count),
        **rest.sizes,
        **tiles,
        **(roomy(launch, down, rest.inner is not None, device) if height else launch),
        **overlap(device),
    )
    return part_AD


def _addition(x: Prepared, weight: Form, lists: tuple[Tensor, Tensor], choices: int, is_by_token: bool) -> Addition:
    """As `low_rank.addition`, for every assignment: x is that of its token, or its own."""
    beside, (count_E, list_EN) = weight.beside, lists
    if beside is None:
        return nothing(1)
    assert x.source_MK is not None
    tokens, (rows, width), count = list_EN.shape[1], x.source_MK.shape, len(count_E)
    rows = rows * choices if is_by_token else rows
    if len(beside.lane_N) != tokens:
        raise ValueError(f"x has {tokens} tokens, and lanes were given for {len(beside.lane_N)}")
    sizes, chosen = sizes_of(beside), shrink_tiles(width, beside.rank, beside.a.dtype, x.source_MK.device)
    rank, parts, block = sizes["RANK"], sizes["PARTS"], chosen["BLOCK_M"]
    inner = empty(1, parts, rows, rank, dtype=float32, device=x.source_MK.device)
    most = min(rows, (rows + count * (block - 1)) // block)
    _experts_shrink[(most, triton.cdiv(rank, sizes["BLOCK_R"]), parts)](
        x.source_MK,
        beside.a,
        inner,
        beside.lane_N,
        count_E,
        list_EN,
        rows,
        tokens,
        J=choices,
        K=width,
        RANK=rank,
        IS_SPLIT=x.is_split,
        IS_BY_TOKEN=is_by_token,
        BLOCK_R=sizes["BLOCK_R"],
        E=count,
        BLOCK_E=triton.next_power_of_2(count),
        **chosen,
        **overlap(x.source_MK.device),
    )
    return Addition(beside.lane_N, inner, (beside.b,), {"ADAPTED": 1, **sizes})


def _height(rows: float, weights: tuple[Form, Form], dtype: torch.dtype, device: torch.device) -> str:
    """How high tiles are for so many rows an expert. In float32 always low: its sums lie in registers one by one."""
    name = "" if dtype == float32 else next((name for least, name in TALL if rows >= least), "")
    is_halved = any(weight.is_halved for weight in weights)
    # Four classes of inputs in 128 rows do not fit it; the compiler makes a trap of such a kernel.
    return "_64" if name == "_128" and is_halved and has_tensor_memory(device) else name


def _tiles(
    op: str, height: str, shape: tuple[int, ...], weight: Form, dtype: torch.dtype | str, device: torch.device | str
) -> tuple[dict[str, int], dict[str, int]]:
    """`blocks` for tiles of this height.

    Inputs are cut as they are in tiles of any other height: a row's sum is then the same to the bit, however many rows
    are beside it."""
    tiles, launch = blocks(op, shape, weight, dtype, device, KINDS)
    if height:
        tall, launch = blocks(op + height, shape, weight, dtype, device, KINDS)
        tiles = {**tall, "BLOCK_K": tiles["BLOCK_K"]}
    return tiles, launch


def listed(index_NJ: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The assignments n x J + j of each expert: how many, [E] int32, and which, [E, N] int32, in no order.

    The experts of a token differ."""
    tokens, choices = index_NJ.shape
    count_E = zeros(count, dtype=int32, device=index_NJ.device)
    list_EN = empty(count, tokens, dtype=int32, device=index_NJ.device)
    chosen = config("listed", (count,), index_NJ.dtype, index_NJ.device, DEFAULTS["listed"])
    rows = tokens * choices
    _listed[(triton.cdiv(rows, chosen["BLOCK"]),)](
        index_NJ.contiguous(), count_E, list_EN, rows, tokens, **chosen, **overlap(index_NJ.device)
    )
    return count_E, list_EN


@triton.jit(do_not_specialize=["rows", "tokens"])
def _listed(index_ptr, count_ptr, list_ptr, rows, tokens, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    assignment = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_live = assignment < rows
    append(tl.load(index_ptr + assignment, is_live, 0).to(tl.int32), assignment, is_live, count_ptr, list_ptr, tokens)


@triton.jit
def append(expert, assignment, is_live, count_ptr, list_ptr, tokens):
    """Each of these assignments into its expert's list."""
    at = tl.atomic_add(count_ptr + expert, 1, is_live, sem="relaxed")
    tl.store(list_ptr + expert * tokens + at, assignment, is_live)


@triton.jit
def rows_of(tile, count_ptr, list_ptr, tokens, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile: whether there is one, its expert, and its assignments, -1 where it is not full."""
    e = tl.arange(0, BLOCK_E)
    count_E = tl.load(count_ptr + e, e < E, 0)
    tiles_E = (count_E + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
    mine = tl.sum(tl.where(e == expert, count_E, 0), 0)
    place = (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    slot_M = tl.load(list_ptr + expert * tokens + place, place < mine, -1)
    return expert < E, expert, slot_M


@triton.jit(do_not_specialize=["rows", "tokens"])
def _experts_shrink(
    x_ptr,
    a_ptr,
    inner_ptr,
    lane_ptr,
    count_ptr,
    list_ptr,
    rows,
    tokens,
    J: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    IS_BY_TOKEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """What `low_rank._shrink` does, for assignments."""
    enter(PDL)
    SHARE: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    first, part = tl.program_id(1) * BLOCK_R, tl.program_id(2)
    is_tile, expert, slot_M = rows_of(tl.program_id(0), count_ptr, list_ptr, tokens, E, BLOCK_E, BLOCK_M)
    if is_tile:
        lane_M = tl.load(lane_ptr + tl.maximum(slot_M, 0) // J, slot_M >= 0, -1)
        row_M = tl.maximum(slot_M, 0).to(tl.int64)
        x_M = x_ptr + (row_M // J if IS_BY_TOKEN else row_M) * K
        own_ptr = a_ptr + expert.to(tl.int64) * (RANK * K)
        stride = E * RANK * K
        inner = shrunk(
            x_M, own_ptr, lane_M, stride, first, part * SHARE, K, RANK, IS_SPLIT, SHARE, BLOCK_R, BLOCK_M, BLOCK_K
        )
        r = first + tl.arange(0, BLOCK_R)
        at = (part * rows.to(tl.int64) + row_M)[None, :] * RANK + r[:, None]
        tl.store(inner_ptr + at, inner, (lane_M >= 0)[None, :] & (r < RANK)[:, None])


@triton.jit
def experts_added(
    acc,
    slot_M,
    lane_ptr,
    inner_ptr,
    b_N,
    is_own_N,
    assignments,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`low_rank.added` for assignments, from each output's first number in B of their expert in lane 0."""
    row_M = tl.maximum(slot_M, 0)
    lane_M = tl.load(lane_ptr + row_M // J, slot_M >= 0, -1)
    part = assignments.to(tl.int64) * RANK
    inner_M = inner_ptr + row_M.to(tl.int64) * RANK
    return added(acc, lane_M, inner_M, part, b_N, is_own_N, WIDTH, E * RANK * WIDTH, RANK, PARTS, BLOCK_R)


@triton.jit(do_not_specialize=["tiles", "tokens"])
def _experts_gate_up(
    x_ptr,
    x_extra_ptr,
    w_ptr,
    scale_ptr,
    extra_ptr,
    lane_ptr,
    inner_ptr,
    b_ptr,
    out_ptr,
    count_ptr,
    list_ptr,
    tiles,
    tokens,
    J: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    ADAPTED: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    HALF: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles) * HALF
    is_tile, expert, slot_M = rows_of(tile, count_ptr, list_ptr, tokens, E, BLOCK_E, BLOCK_M)
    if is_tile:
        token_M = tl.maximum(slot_M, 0) // J
        x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, token_M, K, GROUP, KIND)
        within, is_up = gate_and_up(tl.arange(0, BLOCK_N))
        n = tl.minimum(first + within, F - 1) + tl.where(is_up, F, 0)
        w_N, scale_N, extra_N = row_at(w_ptr, scale_ptr, extra_ptr, expert * (2 * F) + n, K, GROUP, KIND)
        acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
        if ADAPTED:
            b_N = b_ptr + expert.to(tl.int64) * (RANK * 2 * F) + n
            acc = experts_added(
                acc, slot_M, lane_ptr, inner_ptr, b_N, n >= 0, tokens * J, J, 2 * F, E, RANK, PARTS, BLOCK_R
            )
        f = first + tl.arange(0, HALF)
        at = slot_M.to(tl.int64)[None, :] * F + placed(f, F, SPLIT)[:, None]
        hidden = gated(acc, BLOCK_N, BLOCK_M)
        tl.store(out_ptr + at, hidden.to(out_ptr.dtype.element_ty), (slot_M >= 0)[None, :] & (f < F)[:, None])


@triton.jit(do_not_specialize=["tiles", "tokens"])
def _experts_down(
    x_ptr,
    x_extra_ptr,
    w_ptr,
    scale_ptr,
    extra_ptr,
    lane_ptr,
    inner_ptr,
    b_ptr,
    out_ptr,
    count_ptr,
    list_ptr,
    tiles,
    tokens,
    J: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    ADAPTED: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_tile, expert, slot_M = rows_of(tile, count_ptr, list_ptr, tokens, E, BLOCK_E, BLOCK_M)
    if is_tile:
        x_M, x_extra_M = x_at(x_ptr, x_extra_ptr, tl.maximum(slot_M, 0), K, GROUP, KIND)
        row_N = expert * N + tl.minimum(n, N - 1)
        w_N, scale_N, extra_N = row_at(w_ptr, scale_ptr, extra_ptr, row_N, K, GROUP, KIND)
        acc = product(x_M, x_extra_M, w_N, scale_N, extra_N, K, GROUP, KIND, BLOCK_N, BLOCK_M, BLOCK_K)
        if ADAPTED:
            b_N = b_ptr + expert.to(tl.int64) * (RANK * N) + tl.minimum(n, N - 1)
            acc = experts_added(acc, slot_M, lane_ptr, inner_ptr, b_N, n < N, tokens * J, J, N, E, RANK, PARTS, BLOCK_R)
        at = slot_M.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), (slot_M >= 0)[None, :] & (n < N)[:, None])


@triton.jit
def _combine(part_ptr, weight_ptr, out_ptr, D: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(J):
        part = tl.load(part_ptr + (token * J + j) * D + d, d < D, 0.0).to(tl.float32)
        total += part * tl.load(weight_ptr + token * J + j).to(tl.float32)
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), d < D)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 128 experts of 704, 8 of them a token, width 2816."""
    specials = []
    device, count, choices, width, hidden = f"sm_{arch}", 128, 8, 2816, 704
    for name, like, dtype in dense_specials(arch):
        types, p = operand_types(like.kind, dtype), POINTERS[dtype]
        pointers = {f"{k}_ptr": v for k, v in types.items()} | {"out_ptr": p, "count_ptr": "*i32", "list_ptr": "*i32"}
        same: dict[str, Any] = {"GROUP": like.group, "KIND": like.kind, "E": count, "BLOCK_E": count}
        first, last = replace(like, outputs=2 * hidden, inputs=width), replace(like, outputs=width, inputs=hidden)
        heights = list(_HEIGHTS) if name in ("bfloat16", "fp8", "int4", "nvfp4") else [""]
        for height in heights[:2] if like.is_halved and has_tensor_memory(device) else heights:
            tiles, launch = _tiles("experts_gate_up", height, (count, 2 * hidden, width), first, dtype, device)
            constexprs = {"J": choices, "F": hidden, "K": width, **same, "SPLIT": like.is_halved, **tiles}
            for rank in (0, 16) if (name, height) == ("int4", "") else (0,):
                what = f"experts gate_up{height} {name}{' adapted' if rank else ''}"
                more, beside = for_special(["b_ptr"], width, rank, dtype, device)
                numbers = ["tiles", "tokens"]
                specials.append(special(what, _experts_gate_up, pointers | more, numbers, constexprs | beside, launch))
            block_m = tiles["BLOCK_M"]
            tiles, launch = _tiles("experts_down", height, (count, width, hidden), last, dtype, device)
            constexprs = {"J": choices, "N": width, "K": hidden, **same, **tiles, "BLOCK_M": block_m}
            more, beside = for_special(["b_ptr"], hidden, 0, dtype, device)
            specials.append(
                special(
                    f"experts down{height} {name}",
                    _experts_down,
                    pointers | more,
                    ["tiles", "tokens"],
                    constexprs | beside,
                    launch,
                )
            )
    specials.append(_shrink_special(width, choices, count, device))
    chosen = config("listed", (count,), "int64", device, DEFAULTS["listed"])
    launch = {k: chosen[k] for k in ("num_warps", "num_stages")}
    three: dict[str, str | None] = {"index_ptr": "*i64", "count_ptr": "*i32", "list_ptr": "*i32"}
    sizes = {"BLOCK": chosen["BLOCK"]}
    specials.append(special("experts listed", _listed, three, ["rows", "tokens"], sizes, launch))
    chosen = config("combine", (width,), "bfloat16", device, DEFAULTS["combine"])
    launch = {k: chosen[k] for k in ("num_warps", "num_stages")}
    three = {"part_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
    constexprs = {"D": width, "J": choices, "BLOCK": chosen["BLOCK"]}
    specials.append(special("experts combine", _combine, three, [], constexprs, launch))
    return specials


def _shrink_special(width: int, choices: int, count: int, device: str) -> Special:
    """The inputs of gate and up for rank 16, as weights in four bits meet them."""
    chosen = shrink_tiles(width, 16, "bfloat16", device)
    launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    pointers: dict[str, str | None] = {"x_ptr": "*bf16", "a_ptr": "*bf16", "inner_ptr": "*fp32", "lane_ptr": "*i64"}
    pointers |= {"count_ptr": "*i32", "list_ptr": "*i32"}
    sizes: dict[str, Any] = {"J": choices, "K": width, "RANK": 16, "IS_SPLIT": True, "IS_BY_TOKEN": True, **chosen}
    sizes |= {"BLOCK_R": 16, "E": count, "BLOCK_E": count}
    return special("experts shrink in classes", _experts_shrink, pointers, ["rows", "tokens"], sizes, launch)
