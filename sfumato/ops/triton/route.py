"""route: norm, scale, product with the router, softmax, top k and renormalisation in one kernel.

A program holds BLOCK_M tokens against all experts: one pass over the residual for its mean square, one for the
product. The input is rounded after each factor as the reference rounds it; the logits stay in float32, where the
reference rounds them to the weights' dtype once more. Of equal probabilities the lowest index comes first. What this
lacks: a split along D; with the 256 tokens of a canvas only sixteen programs stream the router's weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfumato.ops.triton.ahead import POINTERS, Special
from sfumato.ops.triton.tuning import Config, config

DEFAULTS: dict[str, Config] = {
    # 16 tokens are the short side of the tensor cores' tile, 128 experts the long one. The loop is bound by what one
    # multiprocessor draws from L2 (128 experts x 128 inputs x 2 bytes a step), so loads run three steps ahead.
    "route": {"BLOCK_M": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    "route float32": {"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
CHOICES = {"route": {"BLOCK_M": (16, 32), "BLOCK_K": (64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4)}}


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Tensor, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The J = top_k experts of each token, [N, J] int64, and their weights, [N, J] float32: renormalised
    probabilities x the scale of each expert. The input is the raw residual, normed here without a learned scale."""
    residual_ND = residual_ND.contiguous()
    tokens, width = residual_ND.shape
    count = proj_ED.shape[0]
    index_NJ = torch.empty(tokens, top_k, dtype=torch.int64, device=residual_ND.device)
    weight_NJ = torch.empty(tokens, top_k, dtype=torch.float32, device=residual_ND.device)
    if tokens:
        chosen = _blocks(count, width, residual_ND.dtype, residual_ND.device)
        _route[(triton.cdiv(tokens, chosen["BLOCK_M"]),)](
            residual_ND,
            scale_D.contiguous(),
            proj_ED.contiguous(),
            per_expert_E.contiguous(),
            index_NJ,
            weight_NJ,
            tokens,
            eps,
            D=width,
            E=count,
            FACTOR=width**-0.5,
            J=top_k,
            BLOCK_E=max(16, triton.next_power_of_2(count)),
            BLOCK_J=triton.next_power_of_2(top_k),
            **chosen,
        )
    return index_NJ, weight_NJ


def _blocks(count: int, width: int, dtype: torch.dtype | str, device: torch.device | str) -> Config:
    default = DEFAULTS["route float32" if "float32" in str(dtype) else "route"]
    small = {**default, "num_stages": min(2, default["num_stages"])}
    chosen = config("route", (count, width), dtype, device, default, small)
    return {**chosen, "BLOCK_K": min(chosen["BLOCK_K"], max(32, triton.next_power_of_2(width)))}


@triton.jit
def _route(
    residual_ptr,
    scale_ptr,
    proj_ptr,
    per_expert_ptr,
    index_ptr,
    weight_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    FACTOR: tl.constexpr,
    J: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TYPE: tl.constexpr = residual_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_M = residual_ptr + tl.minimum(m, tokens - 1).to(tl.int64) * D
    k = tl.arange(0, BLOCK_K)
    squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        x = tl.load(x_M[None, :] + start + k[:, None], (start + k < D)[:, None], 0.0).to(tl.float32)
        squares += x * x
    norm_M = tl.rsqrt(tl.sum(squares, 0) / D + eps)

    e = tl.arange(0, BLOCK_E)
    w_E = proj_ptr + tl.minimum(e, E - 1) * D
    logits = tl.zeros((BLOCK_E, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        x = tl.load(x_M[None, :] + start + k[:, None], (start + k < D)[:, None], 0.0).to(tl.float32)
        scale = tl.load(scale_ptr + start + k, start + k < D, 0.0).to(tl.float32)
        x = (x * norm_M[None, :]).to(TYPE).to(tl.float32)
        x = (x * scale[:, None]).to(TYPE).to(tl.float32)
        x = (x * FACTOR).to(TYPE)
        w = tl.load(w_E[:, None] + start + k[None, :], (start + k < D)[None, :], 0.0)
        logits = tl.dot(w, x, logits, input_precision="ieee")

    logits = tl.where((e < E)[:, None], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 0)[None, :])
    p = p / tl.sum(p, 0)[None, :]
    p = tl.where((e < E)[:, None], p, -1.0)
    j = tl.arange(0, BLOCK_J)
    index = tl.zeros((BLOCK_M, BLOCK_J), tl.int32)
    weight = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(J):
        best = tl.max(p, 0)
        # Where nothing equals the largest, it is no number: some expert that exists, rather than memory that does not.
        which = tl.min(tl.where(p == best[None, :], e[:, None], E - 1), 0)
        index = tl.where((j == i)[None, :], which[:, None], index)
        weight = tl.where((j == i)[None, :], best[:, None], weight)
        total += best
        p = tl.where(e[:, None] == which[None, :], -1.0, p)
    weight = weight / total[:, None] * tl.load(per_expert_ptr + index).to(tl.float32)
    at = m.to(tl.int64)[:, None] * J + j[None, :]
    live = (m < tokens)[:, None] & (j < J)[None, :]
    tl.store(index_ptr + at, index.to(tl.int64), live)
    tl.store(weight_ptr + at, weight, live)


def ahead(arch: int) -> list[Special]:
    """At the released model's sizes: 128 experts, 8 a token, width 2816."""
    found = []
    for dtype in ("bfloat16", "float32") if arch == 90 else ("bfloat16",):
        chosen = _blocks(128, 2816, dtype, f"sm_{arch}")
        launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
        pointers = dict.fromkeys(("residual_ptr", "scale_ptr", "proj_ptr", "per_expert_ptr"), POINTERS[dtype])
        signature = {**pointers, "index_ptr": "*i64", "weight_ptr": "*fp32", "tokens": "i32", "eps": "fp32"}
        sizes = {"D": 2816, "E": 128, "FACTOR": 2816**-0.5, "J": 8, "BLOCK_E": 128, "BLOCK_J": 8}
        found.append(Special(f"route {dtype}", _route, signature, {**sizes, **chosen}, **launch))
    return found
