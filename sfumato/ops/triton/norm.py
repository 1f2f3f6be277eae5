"""rms_norm, norm_rope, norm_add and join: each reads its inputs once, keeps whole rows in registers, writes once.

These are bound by memory and by launch latency, so the idea is only to make one kernel of what would be ten passes.
Sums are in float32; values are rounded between the steps as the reference rounds them. A row is one reduction whose
order depends on its width alone. What this lacks: rows too wide for the registers (above about 16,000).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.contract import JoinNorms
from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.dependent import enter, overlap
from sfumato.ops.triton.tuning import Config, config

DEFAULTS = {
    # About 16 values a thread: 4096 values over 8 warps. A wide row is one program, narrow rows share one.
    "rms_norm": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
    "norm_add": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
    "join": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
    # Two halves of each head, and the angles beside them.
    "norm_rope": {"VALUES": 4096, "num_warps": 8, "num_stages": 1},
}
CHOICES = {op: {"VALUES": (2048, 4096, 8192), "num_warps": (4, 8, 16)} for op in DEFAULTS}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`. The input may be a slice of wider rows."""
    x_NHD = _rows(x)
    rows, heads, width = x_NHD.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tiles, warps = _tiles("rms_norm", width, x)
        _rms_norm[(triton.cdiv(rows * heads, tiles["ROWS"]),)](
            x_NHD,
            weight,
            out,
            rows * heads,
            x_NHD.stride(0),
            x_NHD.stride(1),
            eps,
            HEADS=heads,
            WIDTH=width,
            WEIGHTED=weight is not None,
            **tiles,
            **warps,
            **overlap(x.device),
        )
    return out


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """rms_norm of each head, then its pairs (i, i + K/2) rotated by the position's angles."""
    batch, tokens, heads, size = x_BTHK.shape
    x_BTHK = x_BTHK if x_BTHK.stride(-1) == 1 else x_BTHK.contiguous()
    cos_BTK, sin_BTK = (
        angle.expand(batch, tokens, size) if angle.stride(-1) == 1 else angle.expand(batch, tokens, size).contiguous()
        for angle in (cos_BTK, sin_BTK)
    )
    if cos_BTK.stride() != sin_BTK.stride():
        cos_BTK, sin_BTK = cos_BTK.contiguous(), sin_BTK.contiguous()
    out = torch.empty(x_BTHK.shape, dtype=torch.promote_types(x_BTHK.dtype, cos_BTK.dtype), device=x_BTHK.device)
    if out.numel():
        chosen = config("norm_rope", (size,), x_BTHK.dtype, x_BTHK.device, DEFAULTS["norm_rope"])
        rows = heads_a_program(heads, size, chosen)
        _norm_rope[(batch * tokens, triton.cdiv(heads, rows))](
            x_BTHK,
            weight_K,
            cos_BTK,
            sin_BTK,
            out,
            tokens,
            x_BTHK.stride(0),
            x_BTHK.stride(1),
            x_BTHK.stride(2),
            cos_BTK.stride(0),
            cos_BTK.stride(1),
            eps,
            HEADS=heads,
            HALF=size // 2,
            ROWS=rows,
            BLOCK=triton.next_power_of_2(size // 2),
            num_warps=chosen["num_warps"],
            num_stages=chosen["num_stages"],
            **overlap(x_BTHK.device),
        )
    return out


def norm_add(residual: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference.norm_add`."""
    residual, x = residual.contiguous(), x.contiguous()
    out = torch.empty(x.shape, dtype=torch.promote_types(residual.dtype, x.dtype), device=x.device)
    if out.numel():
        width = x.shape[-1]
        rows = x.numel() // width
        tiles, warps = _tiles("norm_add", width, x)
        _norm_add[(triton.cdiv(rows, tiles["ROWS"]),)](
            residual, x, weight_D, out, rows, eps, width, **tiles, **warps, **overlap(x.device)
        )
    return out


def join(
    residual_ND: Tensor,
    dense_ND: Tensor,
    sparse_ND: Tensor,
    norms: JoinNorms,
    eps: float,
    scale_N1: Tensor,
) -> Tensor:
    """As `reference.join`."""
    residual_ND, dense_ND, sparse_ND = residual_ND.contiguous(), dense_ND.contiguous(), sparse_ND.contiguous()
    dtype = torch.promote_types(residual_ND.dtype, scale_N1.dtype)
    out_ND = torch.empty(residual_ND.shape, dtype=dtype, device=residual_ND.device)
    if out_ND.numel():
        width = residual_ND.shape[-1]
        rows = residual_ND.numel() // width
        tiles, warps = _tiles("join", width, residual_ND)
        _join[(triton.cdiv(rows, tiles["ROWS"]),)](
            residual_ND,
            dense_ND,
            sparse_ND,
            *norms,
            scale_N1,
            out_ND,
            rows,
            0 if scale_N1.numel() == 1 else scale_N1.stride(0),
            eps,
            width,
            **tiles,
            **warps,
            **overlap(residual_ND.device),
        )
    return out_ND


def _rows(x: Tensor) -> Tensor:
    """This as [N, H, D] without a copy, if its strides allow: a projection's output is often a slice of a wider one."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x.view(-1, 1, width)
    if x.stride(-1) == 1 and x.dim() >= 3:
        try:
            return x.view(-1, x.shape[-2], width)
        except RuntimeError:
            pass
    elif x.stride(-1) == 1 and x.dim() == 2:
        return x[:, None]
    return x.contiguous().view(-1, 1, width)


def _tiles(op: str, width: int, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    return shape(width, config(op, (width,), x.dtype, x.device, DEFAULTS[op]))


def shape(width: int, chosen: Config) -> tuple[dict[str, int], dict[str, int]]:
    """The block of a program, and how it is launched."""
    block = triton.next_power_of_2(width)
    warps = {name: chosen[name] for name in ("num_warps", "num_stages")}
    return {"ROWS": max(1, chosen["VALUES"] // block), "BLOCK": block}, warps


def heads_a_program(heads: int, size: int, chosen: Config) -> int:
    """How many heads of this size one program norms."""
    block: int = triton.next_power_of_2(size)
    return min(int(triton.next_power_of_2(heads)), max(1, chosen["VALUES"] // block))


@triton.jit
def inverse_root(mean, eps):
    """What a norm scales by, from the mean square: NaN where that overflows, as zeros would pass for a state."""
    return tl.rsqrt(mean + eps) + 0.0 * mean


@triton.jit
def normed(x, weight, eps, WIDTH: tl.constexpr):
    """rms_norm of [ROWS, BLOCK] in float32; masked values are 0 and add nothing to the mean."""
    return x * inverse_root(tl.sum(x * x, 1) / WIDTH, eps)[:, None] * weight[None, :]


@triton.jit
def joined(
    residual,
    dense,
    sparse,
    dense_norm,
    sparse_norm,
    norm,
    scale,
    eps,
    WIDTH: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The end of a block, [ROWS, BLOCK] in float32, rounded to TYPE where the reference rounds but for the last."""
    dense = normed(dense, dense_norm, eps, WIDTH).to(TYPE).to(tl.float32)
    sparse = normed(sparse, sparse_norm, eps, WIDTH).to(TYPE).to(tl.float32)
    both = (dense + sparse).to(TYPE).to(tl.float32)
    out = residual + normed(both, norm, eps, WIDTH).to(TYPE).to(tl.float32)
    return out.to(TYPE).to(tl.float32) * scale


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    stride_n,
    stride_h,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (col < WIDTH)[None, :]
    start = (row // HEADS) * stride_n + (row % HEADS) * stride_h
    x = tl.load(x_ptr + start[:, None] + col[None, :], live, 0.0).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    else:
        weight = tl.full((BLOCK,), 1.0, tl.float32)
    out = normed(x, weight, eps, WIDTH)
    tl.store(out_ptr + row[:, None] * WIDTH + col[None, :], out.to(out_ptr.dtype.element_ty), live)


@triton.jit
def turned(x_at, live, weight_ptr, cos_ptr, sin_ptr, eps, HALF: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """Heads of one position, each normed and its pairs turned: both halves, [ROWS, BLOCK] of TYPE.

    They lie in the same lanes, so that turning a pair needs no exchange between threads."""
    col = tl.arange(0, BLOCK)
    is_col = col < HALF
    one = tl.load(x_at, live, 0.0)
    FROM: tl.constexpr = one.dtype
    one = one.to(tl.float32)
    two = tl.load(x_at + HALF, live, 0.0).to(tl.float32)
    scale = inverse_root((tl.sum(one * one, 1) + tl.sum(two * two, 1)) / (2 * HALF), eps)[:, None]
    weight_one = tl.load(weight_ptr + col, is_col, 0.0).to(tl.float32)
    weight_two = tl.load(weight_ptr + HALF + col, is_col, 0.0).to(tl.float32)
    one = (one * scale * weight_one[None, :]).to(FROM).to(tl.float32)
    two = (two * scale * weight_two[None, :]).to(FROM).to(tl.float32)
    cos_one = tl.load(cos_ptr + col, is_col, 0.0).to(tl.float32)[None, :]
    cos_two = tl.load(cos_ptr + col + HALF, is_col, 0.0).to(tl.float32)[None, :]
    sin_one = tl.load(sin_ptr + col, is_col, 0.0).to(tl.float32)[None, :]
    sin_two = tl.load(sin_ptr + col + HALF, is_col, 0.0).to(tl.float32)[None, :]
    new_one = (one * cos_one).to(TYPE).to(tl.float32) - (two * sin_one).to(TYPE).to(tl.float32)
    new_two = (two * cos_two).to(TYPE).to(tl.float32) + (one * sin_two).to(TYPE).to(tl.float32)
    return new_one.to(TYPE), new_two.to(TYPE)


@triton.jit(do_not_specialize=["tokens"])
def _norm_rope(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    stride_b,
    stride_t,
    stride_h,
    angle_b,
    angle_t,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    token = tl.program_id(0)
    b, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    live = (head < HEADS)[:, None] & (col < HALF)[None, :]
    x_at = x_ptr + b * stride_b + t * stride_t + head[:, None].to(tl.int64) * stride_h + col[None, :]
    angle = b * angle_b + t * angle_t
    kind: tl.constexpr = out_ptr.dtype.element_ty
    one, two = turned(x_at, live, weight_ptr, cos_ptr + angle, sin_ptr + angle, eps, HALF, BLOCK, kind)
    out_at = out_ptr + token.to(tl.int64) * (HEADS * 2 * HALF) + head[:, None] * (2 * HALF) + col[None, :]
    tl.store(out_at, one, live)
    tl.store(out_at + HALF, two, live)


@triton.jit(do_not_specialize=["rows"])
def _norm_add(
    residual_ptr,
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (col < WIDTH)[None, :]
    at = row[:, None] * WIDTH + col[None, :]
    x = tl.load(x_ptr + at, live, 0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, live, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    x = normed(x, weight, eps, WIDTH).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, (residual + x).to(out_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows"])
def _join(
    residual_ptr,
    dense_ptr,
    sparse_ptr,
    dense_norm_ptr,
    sparse_norm_ptr,
    norm_ptr,
    scale_ptr,
    out_ptr,
    rows,
    scale_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    enter(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    col = tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (col < WIDTH)[None, :]
    at = row[:, None] * WIDTH + col[None, :]
    kind: tl.constexpr = residual_ptr.dtype.element_ty
    dense = tl.load(dense_ptr + at, live, 0.0).to(tl.float32)
    sparse = tl.load(sparse_ptr + at, live, 0.0).to(tl.float32)
    residual = tl.load(residual_ptr + at, live, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * scale_stride, row < rows, 0.0).to(tl.float32)[:, None]
    dense_norm = tl.load(dense_norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    sparse_norm = tl.load(sparse_norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)
    norm = tl.load(norm_ptr + col, col < WIDTH, 0.0).to(tl.float32)

    out = joined(residual, dense, sparse, dense_norm, sparse_norm, norm, scale, eps, WIDTH, kind)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), live)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: rows of 2816, heads of 256 and 512."""
    specials = []
    width, device = 2816, f"sm_{arch}"
    for dtype in ("bfloat16", "float32") if arch == 90 else ("bfloat16",):
        p = POINTERS[dtype]
        for size, heads, weighted in ((width, 1, True), (256, 8, False), (512, 2, False)):
            tiles, warps = shape(size, config("rms_norm", (size,), dtype, device, DEFAULTS["rms_norm"]))
            signature = {"x_ptr": p, "out_ptr": p, "rows": "i32", "stride_n": "i32:16", "stride_h": "i32:16"}
            constexprs: dict[str, int | None] = {"HEADS": heads, "WIDTH": size, "WEIGHTED": weighted, **tiles}
            if weighted:
                signature["weight_ptr"] = p
            else:
                constexprs["weight_ptr"] = None
            specials.append(
                Special(f"rms_norm {size} {dtype}", _rms_norm, signature | {"eps": "fp32"}, constexprs, **warps)
            )
        for size, heads in ((256, 16), (512, 16)):
            chosen = config("norm_rope", (size,), dtype, device, DEFAULTS["norm_rope"])
            pointers = dict.fromkeys(("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "out_ptr"), p)
            strides = dict.fromkeys(("stride_b", "stride_t", "stride_h", "angle_b", "angle_t"), "i32:16")
            specials.append(
                Special(
                    f"norm_rope {heads}x{size} {dtype}",
                    _norm_rope,
                    {**pointers, "tokens": "i32", **strides, "eps": "fp32"},
                    {
                        "HEADS": heads,
                        "HALF": size // 2,
                        "ROWS": heads_a_program(heads, size, chosen),
                        "BLOCK": size // 2,
                    },
                    chosen["num_warps"],
                    chosen["num_stages"],
                )
            )
        tiles, warps = shape(width, config("norm_add", (width,), dtype, device, DEFAULTS["norm_add"]))
        pointers = dict.fromkeys(("residual_ptr", "x_ptr", "weight_ptr", "out_ptr"), p)
        specials.append(
            Special(
                f"norm_add {width} {dtype}",
                _norm_add,
                {**pointers, "rows": "i32", "eps": "fp32"},
                {"WIDTH": width, **tiles},
                **warps,
            )
        )
        tiles, warps = shape(width, config("join", (width,), dtype, device, DEFAULTS["join"]))
        names = "residual_ptr dense_ptr sparse_ptr dense_norm_ptr sparse_norm_ptr norm_ptr scale_ptr out_ptr".split()
        specials.append(
            Special(
                f"join {width} {dtype}",
                _join,
                {**dict.fromkeys(names, p), "rows": "i32", "scale_stride": "i32", "eps": "fp32"},
                {"WIDTH": width, **tiles},
                **warps,
            )
        )
    return specials
