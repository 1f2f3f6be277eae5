"""The specification: every operation in plain PyTorch, for any device and dtype.

Rounding follows the oracle (transformers 5.23): norms, softmax and routing in float32, everything else in the dtype of
its input. Nothing here is fused; `[B, T, S]` scores and `[B, L, V]` logits really exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ops.contract import NEVER, JoinNorms, Matrix, Ops, ReadOut, dense, round_input
from sfumato.ops.lowrank import LowRank, plus_low_rank
from sfumato.ops.masks import Mask


def pack(weight: Matrix) -> Matrix:
    """A weight [O, I] or a stack [E, O, I], plain or in fewer bits, as `linear` and its like take it.

    Here: as it is, and what is packed is unpacked with every product."""
    return weight


def linear(x: Tensor, *weights: Matrix) -> tuple[Tensor, ...]:
    """The product x Wᵀ for each of these weights [O, I]: several products of one input are one operation."""
    return tuple(_product(x, weight) for weight in weights)


def _product(x: Tensor, weight: Matrix, token_M: Tensor | None = None) -> Tensor:
    """The product x Wᵀ; `token_M` as `plus_low_rank` has it."""
    if isinstance(weight, LowRank):
        return plus_low_rank(_product(x, weight.base), x, weight, token_M)
    return F.linear(round_input(x, weight), dense(weight, x.dtype))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm x / rms(x) x weight over the last axis, in float32, returned in x's dtype.

    Where the squares overflow it is NaN: x over infinity is zeros, which would pass for a state."""
    x32 = x.float()
    mean = x32.pow(2).mean(-1, keepdim=True)
    x32 = x32 * (torch.pow(mean + eps, -0.5) + 0 * mean)
    return (x32 if weight is None else x32 * weight.float()).type_as(x)


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """rms_norm of each head, then its pairs (i, i + K/2) rotated by the position's angles."""
    x_BTHK = rms_norm(x_BTHK, weight_K, eps)
    one, two = x_BTHK.chunk(2, dim=-1)
    turned = torch.cat((-two, one), dim=-1)
    return x_BTHK * cos_BTK[:, :, None] + turned * sin_BTK[:, :, None]


def norm_add(residual: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The sum residual + rms_norm(x)."""
    return residual + rms_norm(x, weight_D, eps)


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> Tensor:
    """softmax(q kT) v with grouped key-value heads and scale 1, [B, T, H, K].

    Keys and values are those of the ring (`k_XRGK`: all cache rows X, R = mask.ring + 1 slots) and the new ones; `mask`
    says who sees whom. What padding attends to does not matter, but the result there is finite."""
    is_visible_BTS = mask.dense_BTS()
    if mask.used:
        k_BTGK = torch.cat([k_XRGK[mask.rows_B, : mask.used], k_BTGK], dim=1)
        v_BTGK = torch.cat([v_XRGK[mask.rows_B, : mask.used], v_BTGK], dim=1)
    groups = q_BTHK.shape[2] // k_BTGK.shape[2]
    k = k_BTGK.repeat_interleave(groups, dim=2)
    v = v_BTGK.repeat_interleave(groups, dim=2)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k)
    scores_BHTS = scores_BHTS.masked_fill(~is_visible_BTS[:, None], torch.finfo(scores_BHTS.dtype).min)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(q_BTHK.dtype)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS, v)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) x up."""
    return F.gelu(gate, approximate="tanh") * up


def feed_forward(x: Tensor, gate_FD: Matrix, up_FD: Matrix, down_DF: Matrix) -> Tensor:
    """down(gated(gate(x), up(x)))."""
    return linear(gated(*linear(x, gate_FD, up_FD)), down_DF)[0]


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The J = top_k experts of each token, [N, J] int64, and their weights, [N, J] float32.

    Weights are renormalised probabilities x the scale of each expert. The input is the raw residual, normed here
    without a learned scale."""
    x_ND = rms_norm(residual_ND, None, eps) * scale_D * residual_ND.shape[-1] ** -0.5
    p_NE = torch.softmax(_product(x_ND, proj_ED), dim=-1, dtype=torch.float32)
    weight_NJ, index_NJ = p_NE.topk(top_k, dim=-1)
    weight_NJ = weight_NJ / weight_NJ.sum(-1, keepdim=True)
    return index_NJ, weight_NJ * per_expert_E[index_NJ]


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix) -> Tensor:
    """Sum over the J chosen experts of weight x down(gated(gate_up(x))). gate_up is [E, 2F, D], gate first."""
    out_ND = torch.zeros_like(x_ND)
    for expert in torch.unique(index_NJ).tolist():
        token, choice = torch.where(index_NJ == expert)
        gate, up = _product(x_ND[token], gate_up_EFD[expert], token).chunk(2, dim=-1)
        part = _product(gated(gate, up), down_EDF[expert], token) * weight_NJ[token, choice, None]
        out_ND = out_ND.index_add(0, token, part.to(out_ND.dtype))
    return out_ND


def join(
    residual_ND: Tensor,
    dense_ND: Tensor,
    sparse_ND: Tensor,
    norms: JoinNorms,
    eps: float,
    scale_N1: Tensor,
) -> Tensor:
    """The end of a block: (residual + rms_norm(rms_norm(dense) + rms_norm(sparse))) x the layer's scalar.

    The scalar is one a token, or one for all as a tensor [1]."""
    both_ND = rms_norm(dense_ND, norms.dense_D, eps) + rms_norm(sparse_ND, norms.sparse_D, eps)
    return (residual_ND + rms_norm(both_ND, norms.joined_D, eps)) * scale_N1


def read_out(
    hidden_BLD: Tensor,
    embed_VD: Tensor,
    softcap: float,
    temperature_B: Tensor,
    uniform_BL: Tensor | None = None,
    gumbel_BLV: Tensor | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
) -> ReadOut:
    """Softcapped logits over the temperature; a sample, the argmax and the entropy of each position.

    The sample is the inverse of the cumulative distribution at `uniform_BL` in [0, 1); or, where a caller brings the
    oracle's noise, the argmax of logits + `gumbel_BLV`. `banned` is (positions [B, L] as booleans, token ids): these
    tokens can come out at none of these positions."""
    logits = softcapped(F.linear(hidden_BLD, embed_VD), softcap)
    if banned is not None:
        where_BL, ids = banned
        logits[..., ids] = logits[..., ids].masked_fill(where_BL[..., None], NEVER)
    logits = logits / temperature_B[:, None, None]
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    p = log_p.exp()
    entropy_BL = -(p * log_p).sum(-1)
    argmax_BL = logits.argmax(-1)
    if gumbel_BLV is not None:
        sample_BL = (log_p + gumbel_BLV).argmax(-1)
    elif uniform_BL is not None:
        sample_BL = inverse_cdf(p, uniform_BL)
    else:
        sample_BL = argmax_BL
    return ReadOut(sample_BL, argmax_BL, entropy_BL, logits.to(embed_VD.dtype))


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """Softcapped logits, softcap x tanh(logits / softcap), in float32."""
    return torch.tanh(logits.float() / softcap) * softcap


def inverse_cdf(p_BLV: Tensor, uniform_BL: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform_BL` in [0, 1)."""
    cdf = p_BLV.cumsum(-1)
    target = uniform_BL[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=p_BLV.shape[-1] - 1)


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Any = None) -> Tensor:
    """softmax(logits) @ E x embedding scale: [B, L, D], what the next step is conditioned on.

    `tiles` is the read-out's: tiles of the vocabulary that hold next to nothing may be left out where it is passed,
    never without it. Here nothing is."""
    p_BLV = torch.softmax(logits_BLV, dim=-1, dtype=torch.float32).to(embed_VD.dtype)
    return torch.matmul(p_BLV, embed_VD) * scale


OPS = Ops(
    name="reference",
    pack=pack,
    linear=linear,
    rms_norm=rms_norm,
    norm_rope=norm_rope,
    norm_add=norm_add,
    attention=attention,
    feed_forward=feed_forward,
    route=route,
    experts=experts,
    join=join,
    read_out=read_out,
    soft_embedding=soft_embedding,
)
