"""What stands between the products of a block, in two kernels: `between` attention and the feed-forwards, and `end`.

Each holds whole rows, as the norms do, and goes as far as a row's own numbers reach: `between` from the attention's
output to the inputs of both feed-forwards, `end` from what the experts left to the input of the next block's queries,
keys and values. Inputs of products are stored as these meet them (`product.lay_out`), so that no other kernel turns
them over; products that were split along K (`linear.splits`) come as parts, summed here in their order. Values are
rounded wherever one operation after the other would round them.

What this lacks: rows too wide for the registers (above about 16,000).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.contract import JoinNorms
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.forms import Form, dense_specials
from sfumato.ops.triton.norm import inverse_root, joined, normed, shape
from sfumato.ops.triton.product import Ready, lay_out, special
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # A row of 2816 a program, 16 values a thread; several of them on each multiprocessor.
    "between": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
    "end": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
}
CHOICES = {op: {"VALUES": (4096, 8192), "num_warps": (4, 8, 16)} for op in DEFAULTS}


def between(
    parts_PND: Tensor,
    residual_ND: Tensor,
    norms: tuple[Tensor, Tensor, Tensor],
    eps: float,
    dense: Sequence[Form],
    sparse: Sequence[Form],
    zeros: Tensor,
) -> tuple[Tensor, Tensor, Ready, Ready]:
    """The residual with the attention's output behind its norm, [N, D], and what follows from it.

    That is the reciprocal of its root mean square, [N] in float32, for the router; and its two other norms, laid out
    for these weights. `norms` are those of the three, and `zeros`, integers, becomes zeros."""
    count, rows, width = parts_PND.shape
    out_ND, root_N = torch.empty_like(residual_ND), residual_ND.new_empty(rows, dtype=torch.float32)
    one, two = (Ready.room(rows, weights, width, residual_ND) for weights in (dense, sparse))
    tiles, warps = shape(width, config("between", (width,), residual_ND.dtype, residual_ND.device, DEFAULTS["between"]))
    _between[(triton.cdiv(rows, tiles["ROWS"]),)](
        parts_PND,
        residual_ND,
        *norms,
        out_ND,
        root_N,
        one.x_MK,
        one.extra,
        two.x_MK,
        two.extra,
        zeros,
        rows,
        zeros.numel(),
        eps,
        PARTS=count,
        WIDTH=width,
        DENSE=one.layout,
        DENSE_GROUP=one.group,
        SPARSE=two.layout,
        SPARSE_GROUP=two.group,
        **tiles,
        **warps,
        **overlap(residual_ND.device),
    )
    return out_ND, root_N, one, two


def end(
    sparse: tuple[Tensor, Tensor],
    dense_PND: Tensor,
    residual_ND: Tensor,
    norms: JoinNorms,
    scale_N1: Tensor,
    eps: float,
    behind: tuple[Tensor, Sequence[Form]] | None = None,
) -> tuple[Tensor, Ready | None]:
    """`norm.join` of the dense feed-forward and of the sum over a token's J experts; and the norm that comes next.

    `sparse` is what the experts gave, [N x J, D], and their weights, [N, J]. `behind` is the next norm and the products
    for which its result is laid out, where they are known."""
    (part_AD, weight_NJ), (next_norm_D, products) = sparse, (None, []) if behind is None else behind
    count, rows, width = dense_PND.shape
    out_ND = torch.empty_like(residual_ND)
    ready = None if next_norm_D is None else Ready.room(rows, products, width, residual_ND)
    tiles, warps = shape(width, config("end", (width,), residual_ND.dtype, residual_ND.device, DEFAULTS["end"]))
    _end[(triton.cdiv(rows, tiles["ROWS"]),)](
        part_AD,
        weight_NJ,
        dense_PND,
        residual_ND,
        *norms,
        scale_N1,
        next_norm_D,
        out_ND,
        None if ready is None else ready.x_MK,
        None if ready is None else ready.extra,
        rows,
        0 if scale_N1.numel() == 1 else scale_N1.stride(0),
        eps,
        J=weight_NJ.shape[1],
        PARTS=count,
        WIDTH=width,
        NEXT="" if ready is None else ready.layout,
        NEXT_GROUP=1 if ready is None else ready.group,
        **tiles,
        **warps,
        **overlap(residual_ND.device),
    )
    return out_ND, ready


@triton.jit
def summed(part_ptr, at, stride, live, PARTS: tl.constexpr, TYPE: tl.constexpr):
    """A product from its parts, rounded as it would have been whole."""
    total = tl.load(part_ptr + at, live, 0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(part_ptr + part * stride + at, live, 0.0).to(tl.float32)
    return total.to(TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "zeros"])
def _between(
    part_ptr,
    residual_ptr,
    norm_ptr,
    dense_norm_ptr,
    sparse_norm_ptr,
    out_ptr,
    root_ptr,
    dense_ptr,
    dense_extra_ptr,
    sparse_ptr,
    sparse_extra_ptr,
    zero_ptr,
    rows,
    zeros,
    eps,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    DENSE: tl.constexpr,
    DENSE_GROUP: tl.constexpr,
    SPARSE: tl.constexpr,
    SPARSE_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    for at in range(tl.program_id(0), zeros, tl.num_programs(0)):
        tl.store(zero_ptr + at, 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    is_row = row < rows
    live = is_row[:, None] & (col < WIDTH)[None, :]
    at = row[:, None] * WIDTH + col[None, :]
    x = summed(part_ptr, at, rows.to(tl.int64) * WIDTH, live, PARTS, kind)
    residual = tl.load(residual_ptr + at, live, 0.0).to(tl.float32)
    norm = tl.load(norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    x = (residual + normed(x, norm, eps, WIDTH).to(kind).to(tl.float32)).to(kind)
    tl.store(out_ptr + at, x, live)
    x = x.to(tl.float32)
    root = inverse_root(tl.sum(x * x, 1) / WIDTH, eps)
    tl.store(root_ptr + row, root, is_row)
    x *= root[:, None]
    weight = tl.load(dense_norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    dense = (x * weight[None, :]).to(kind).to(tl.float32)
    lay_out(dense, dense_ptr, dense_extra_ptr, row, is_row, WIDTH, DENSE_GROUP, DENSE, ROWS, BLOCK)
    weight = tl.load(sparse_norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    sparse = (x * weight[None, :]).to(kind).to(tl.float32)
    lay_out(sparse, sparse_ptr, sparse_extra_ptr, row, is_row, WIDTH, SPARSE_GROUP, SPARSE, ROWS, BLOCK)


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def _end(
    part_ptr,
    weight_ptr,
    dense_ptr,
    residual_ptr,
    dense_norm_ptr,
    sparse_norm_ptr,
    norm_ptr,
    scale_ptr,
    next_norm_ptr,
    out_ptr,
    next_ptr,
    next_extra_ptr,
    rows,
    scale_stride,
    eps,
    J: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEXT: tl.constexpr,
    NEXT_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    kind: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    is_row, is_col = row < rows, col < WIDTH
    live = is_row[:, None] & is_col[None, :]
    at = row[:, None] * WIDTH + col[None, :]
    sparse = tl.zeros((ROWS, BLOCK), tl.float32)
    for j in tl.static_range(J):
        share = tl.load(weight_ptr + row * J + j, is_row, 0.0).to(tl.float32)
        part = tl.load(part_ptr + (row * J + j)[:, None] * WIDTH + col[None, :], live, 0.0).to(tl.float32)
        sparse += part * share[:, None]
    sparse = sparse.to(kind).to(tl.float32)
    dense = summed(dense_ptr, at, rows.to(tl.int64) * WIDTH, live, PARTS, kind)
    residual = tl.load(residual_ptr + at, live, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * scale_stride, is_row, 0.0).to(tl.float32)[:, None]
    dense_norm = tl.load(dense_norm_ptr + col, is_col, 0.0).to(tl.float32)
    sparse_norm = tl.load(sparse_norm_ptr + col, is_col, 0.0).to(tl.float32)
    norm = tl.load(norm_ptr + col, is_col, 0.0).to(tl.float32)
    x = joined(residual, dense, sparse, dense_norm, sparse_norm, norm, scale, eps, WIDTH, kind).to(kind)
    tl.store(out_ptr + at, x, live)
    if NEXT != "":
        x = x.to(tl.float32)
        weight = tl.load(next_norm_ptr + col, is_col, 0.0).to(tl.float32)
        x = normed(x, weight, eps, WIDTH)
        x = tl.where(live, x.to(kind).to(tl.float32), 0.0)
        lay_out(x, next_ptr, next_extra_ptr, row, is_row, WIDTH, NEXT_GROUP, NEXT, ROWS, BLOCK)


def ahead(arch: int) -> list[Special]:
    """At the released model's width, products in every kind, the parts of weights in 8 or 16 bits."""
    specials = []
    width, choices, device = 2816, 8, f"sm_{arch}"
    for name, like, dtype in dense_specials(arch):
        p, (kind, group) = POINTERS[dtype], like.layout
        parts = 1 if like.is_halved else 4
        laid, extra = "*fp8e4nv" if kind == "fp8" else p, None if kind in ("plain", "classes") else "*fp32"
        tiles, launch = shape(width, config("between", (width,), dtype, device, DEFAULTS["between"]))
        pointers: dict[str, str | None] = dict.fromkeys(_between.arg_names[:6], p)
        pointers |= {"part_ptr": "*fp32" if parts > 1 else p, "root_ptr": "*fp32", "zero_ptr": "*i32", "eps": "fp32"}
        pointers |= {"dense_ptr": laid, "dense_extra_ptr": extra, "sparse_ptr": laid, "sparse_extra_ptr": extra}
        sizes: dict[str, Any] = {"PARTS": parts, "WIDTH": width, **tiles}
        layouts = {"DENSE": kind, "DENSE_GROUP": group, "SPARSE": kind, "SPARSE_GROUP": group}
        specials.append(special(f"between {name}", _between, pointers, ["rows", "zeros"], sizes | layouts, launch))
        tiles, launch = shape(width, config("end", (width,), dtype, device, DEFAULTS["end"]))
        pointers = dict.fromkeys(_end.arg_names[:10], p)
        pointers |= {"weight_ptr": "*fp32", "dense_ptr": "*fp32" if parts > 1 else p, "eps": "fp32"}
        pointers |= {"next_ptr": laid, "next_extra_ptr": extra}
        sizes |= {"J": choices, "NEXT": kind, "NEXT_GROUP": group, **tiles}
        specials.append(special(f"end {name}", _end, pointers, ["rows", "scale_stride"], sizes, launch))
    return specials
