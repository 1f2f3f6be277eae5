"""low_rank: what adapters add to a product, (x Aᵀ) B, for tokens of several lanes in one launch.

A launch before the product, `shrink`, leaves x Aᵀ of each token's own lane, R numbers in float32, in parts along K that
have a fixed order. The product adds the rest to its sum before anything is made of it (`added`), so that this takes no
launch of its own and gelu gets whole sums. Which lane a token has is read on the device, so a recorded step serves
whoever has whatever adapter; a tile in which nobody has one does nothing.

A tile of tokens goes through the lanes that it holds, one after the other, and each token takes what its own has given:
no number of another adapter reaches it, not even one that is not finite, and its sum does not depend on its neighbours.

What this lacks: adapters in fewer bits than x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.forms import Form, LaneFactors, has_tensor_memory
from sfumato.ops.triton.product import Prepared, special, spread
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # Bound by latency: the 256 tokens of a canvas are eight tiles, so the inputs are shared by four programs each.
    "shrink": {"BLOCK_M": 32, "BLOCK_K": 128, "SPLITS": 4, "num_warps": 4, "num_stages": 4},
    "shrink float32": {"BLOCK_M": 32, "BLOCK_K": 32, "SPLITS": 4, "num_warps": 4, "num_stages": 3},
}
CHOICES = {"shrink": {"BLOCK_M": (16, 32, 64), "BLOCK_K": (64, 128, 256), "SPLITS": (1, 2, 4, 8)}}
AT_ONCE = 3
"""Weights that one launch takes."""


class Addition(NamedTuple):
    """What a product needs to add the rest, as its kernel takes it."""

    lane_N: Tensor | None
    inner: Tensor | None
    """[count, P, N, R]: x Aᵀ in parts, of those weights that have factors."""
    b: tuple[Tensor | None, ...]
    """Of each weight that the launch takes; of one without factors another's, which is not read; None of no weight."""
    sizes: dict[str, int]
    """ADAPTED: a bit for each weight that has factors. RANK, PARTS and BLOCK_R: R, P, and how much of R at a time."""

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """In the order in which kernels take them."""
        return self.lane_N, self.inner, *self.b


def nothing(count: int) -> Addition:
    """For a launch that takes so many weights, none of which has factors."""
    return Addition(None, None, (None,) * count, {"ADAPTED": 0, "RANK": 0, "PARTS": 1, "BLOCK_R": 16})


def addition(x: Prepared, forms: Sequence[Form], count: int) -> Addition:
    """Of the weights of one launch, which takes `count`; the first part is launched here.

    ValueError where the lanes are those of another pass."""
    besides = [one.beside for one in forms]
    having = [each for each in besides if each is not None]
    if not having:
        return nothing(count)
    assert x.source_MK is not None
    first = having[0]
    if len(first.lane_N) != len(x.source_MK):
        raise ValueError(f"x has {len(x.source_MK)} tokens, and lanes were given for {len(first.lane_N)}")
    b = (*(first.b if each is None else each.b for each in besides), *[None] * (count - len(forms)))
    sizes = {"ADAPTED": sum(1 << i for i, each in enumerate(besides) if each is not None), **sizes_of(first)}
    return Addition(first.lane_N, _shrink_all(x.source_MK, x.is_split, having, sizes), b, sizes)


def sizes_of(beside: LaneFactors) -> dict[str, int]:
    """What both halves of a product must agree on: they follow from the shape alone."""
    width, rank = beside.a.shape[-1], beside.rank
    chosen = tiles(width, rank, beside.a.dtype, beside.a.device)
    return {"RANK": rank, "PARTS": chosen["SPLITS"], "BLOCK_R": block_of(rank)}


def for_special(
    names: Sequence[str], width: int, rank: int, dtype: str, device: str
) -> tuple[dict[str, str | None], dict[str, int]]:
    """Pointers and sizes of a kernel that is compiled ahead, whose B have these names; rank 0: none has factors."""
    pointers: dict[str, str | None] = dict.fromkeys(("lane_ptr", "inner_ptr", *names), None)
    if not rank:
        return pointers, nothing(len(names)).sizes
    pointers |= {"lane_ptr": "*i64", "inner_ptr": "*fp32"} | dict.fromkeys(names, POINTERS[dtype])
    sizes = {"RANK": rank, "PARTS": tiles(width, rank, dtype, device)["SPLITS"], "BLOCK_R": block_of(rank)}
    return pointers, {"ADAPTED": (1 << len(names)) - 1, **sizes}


def roomy(launch: dict[str, int], weight: Form, is_adapted: bool, device: torch.device | str) -> dict[str, int]:
    """A launch with registers for a second sum, which telling lanes apart takes.

    Four warps have too few of them where the first comes from tensor memory."""
    is_wide = is_adapted and weight.is_halved and has_tensor_memory(device)
    return {**launch, "num_warps": 8} if is_wide else launch


def block_of(rank: int) -> int:
    """How much of the rank is multiplied at a time."""
    return min(64, max(16, 1 << (rank - 1).bit_length()))


def tiles(width: int, rank: int, dtype: torch.dtype | str, device: torch.device | str) -> Config:
    """Tile sizes of `shrink`, and how it is launched."""
    default = DEFAULTS["shrink float32" if "float32" in str(dtype) else "shrink"]
    small = {**default, "num_stages": min(3, default["num_stages"])}
    chosen = config("shrink", (width, rank), dtype, device, default, small)
    step = min(chosen["BLOCK_K"], max(32, triton.next_power_of_2(width)))
    return {**chosen, "BLOCK_K": step, "SPLITS": min(chosen["SPLITS"], max(1, width // (2 * step)))}


def _shrink_all(source_MK: Tensor, is_split: bool, having: list[LaneFactors], sizes: dict[str, int]) -> Tensor:
    (rows, width), rank, parts = source_MK.shape, sizes["RANK"], sizes["PARTS"]
    inner = torch.empty(len(having), parts, rows, rank, dtype=torch.float32, device=source_MK.device)
    chosen = tiles(width, rank, source_MK.dtype, source_MK.device)
    grid = triton.cdiv(rows, chosen["BLOCK_M"]), len(having) * triton.cdiv(rank, sizes["BLOCK_R"]), parts
    _shrink[grid](
        source_MK,
        *[having[min(i, len(having) - 1)].a for i in range(AT_ONCE)],
        inner,
        having[0].lane_N,
        rows,
        K=width,
        RANK=rank,
        IS_SPLIT=is_split,
        BLOCK_R=sizes["BLOCK_R"],
        **chosen,
        **overlap(source_MK.device),
    )
    return inner


@triton.jit
def next_lane(lane_M, lane):
    """The largest lane of a tile below this one; below 0 where there is none."""
    return tl.max(tl.where(lane_M < lane, lane_M, -1), 0)


@triton.jit
def shrunk(
    x_M,
    a_ptr,
    lane_M,
    lane_stride,
    first,
    begin,
    K: tl.constexpr,
    RANK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum of a share of the inputs for some of the rank, [BLOCK_R, BLOCK_M] in float32, each token with its lane.

    It takes pointers to the beginning of each row of x, and to the factors of lane 0."""
    r = first + tl.arange(0, BLOCK_R)
    inner = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    lane = tl.max(lane_M, 0)
    while lane >= 0:
        a_R = a_ptr + lane * lane_stride + tl.minimum(r, RANK - 1) * K
        one = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for start in range(begin, tl.minimum(begin + SHARE, K), BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            at = spread(i, K) if IS_SPLIT else i
            x = tl.load(x_M[None, :] + at[:, None], (i < K)[:, None], 0.0)
            a = tl.load(a_R[:, None] + i[None, :], (r < RANK)[:, None] & (i < K)[None, :], 0.0)
            one = tl.dot(a, x, one, input_precision="ieee")
        inner = tl.where((lane_M == lane)[None, :], one, inner)
        lane = next_lane(lane_M, lane)
    return inner


@triton.jit
def added(
    acc,
    lane_M,
    inner_M,
    part,
    b_N,
    is_own_N,
    width,
    lane_stride,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A sum [BLOCK_N, BLOCK_M] with the rest of what each token's lane adds to the outputs that are `is_own_N`.

    It takes pointers to the first part of x Aᵀ of each token, `part` numbers before the next, and to each output's
    first number in B of lane 0, whose rows are `width` wide."""
    TYPE: tl.constexpr = b_N.dtype.scalar.element_ty
    lane = tl.max(lane_M, 0)
    while lane >= 0:
        is_own_M = lane_M == lane
        whole = acc
        for first in tl.static_range(0, RANK, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            live = (r < RANK)[:, None] & is_own_M[None, :]
            inner = tl.load(inner_M[None, :] + r[:, None], live, 0.0)
            for nth in tl.static_range(1, PARTS):
                inner += tl.load(inner_M[None, :] + nth * part + r[:, None], live, 0.0)
            b_at = b_N[:, None] + lane * lane_stride + r[None, :] * width
            b = tl.load(b_at, is_own_N[:, None] & (r < RANK)[None, :], 0.0)
            whole = tl.dot(b, inner.to(TYPE), whole, input_precision="ieee")
        acc = tl.where(is_own_M[None, :], whole, acc)
        lane = next_lane(lane_M, lane)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _shrink(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    inner_ptr,
    lane_ptr,
    rows,
    K: tl.constexpr,
    RANK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    SHARE: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    CHUNKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    which, first, part = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS * BLOCK_R, tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    lane_M = tl.load(lane_ptr + m, m < rows, -1)
    a_ptr = tl.where(which == 0, a0_ptr, tl.where(which == 1, a1_ptr, a2_ptr))
    x_M = x_ptr + tl.minimum(m, rows - 1) * K
    inner = shrunk(
        x_M, a_ptr, lane_M, RANK * K, first, part * SHARE, K, RANK, IS_SPLIT, SHARE, BLOCK_R, BLOCK_M, BLOCK_K
    )
    r = first + tl.arange(0, BLOCK_R)
    at = ((which * SPLITS + part) * rows.to(tl.int64) + m)[None, :] * RANK + r[:, None]
    tl.store(inner_ptr + at, inner, (lane_M >= 0)[None, :] & (r < RANK)[:, None])


def ahead(arch: int) -> list[Special]:
    """At rank 16 and the released model's width, x as weights in four bits meet it."""
    chosen = tiles(2816, 16, "bfloat16", f"sm_{arch}")
    launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    pointers: dict[str, str | None] = dict.fromkeys(_shrink.arg_names[:4], POINTERS["bfloat16"])
    pointers |= {"inner_ptr": "*fp32", "lane_ptr": "*i64"}
    sizes: dict[str, Any] = {"K": 2816, "RANK": 16, "IS_SPLIT": True, "BLOCK_R": 16, **chosen}
    return [special("shrink in classes", _shrink, pointers, ["rows"], sizes, launch)]
