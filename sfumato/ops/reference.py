"""The specification: every operation in plain PyTorch, for any device and dtype.

Rounding follows the oracle (transformers 5.23): norms, softmax and routing in float32, everything else in the dtype of
its input. Nothing here is fused; `[B, T, S]` scores and `[B, L, V]` logits really exist.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ops import Ops


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) x weight over the last axis, in float32, returned in x's dtype."""
    x32 = x.float()
    x32 = x32 * torch.pow(x32.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    return (x32 if weight is None else x32 * weight.float()).type_as(x)


def rope(x_BTHK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """Rotate pairs (i, i + K/2) of each head by the position's angles."""
    one, two = x_BTHK.chunk(2, dim=-1)
    turned = torch.cat((-two, one), dim=-1)
    return x_BTHK * cos_BTK[:, :, None] + turned * sin_BTK[:, :, None]


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, seen_BTS: Tensor) -> Tensor:
    """softmax(q kT) v with grouped key-value heads and scale 1; `seen_BTS` is True where a query may look."""
    groups = q_BTHK.shape[2] // k_BSGK.shape[2]
    k = k_BSGK.repeat_interleave(groups, dim=2)
    v = v_BSGK.repeat_interleave(groups, dim=2)
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k)
    scores_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], torch.finfo(scores_BHTS.dtype).min)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(q_BTHK.dtype)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS, v)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) x up."""
    return F.gelu(gate, approximate="tanh") * up


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Sum over the J chosen experts of weight x down(gated(gate_up(x))). gate_up is [E, 2F, D], gate first."""
    out_ND = torch.zeros_like(x_ND)
    for expert in index_NJ.unique().tolist():
        token, choice = torch.where(index_NJ == expert)
        gate, up = F.linear(x_ND[token], gate_up_EFD[expert]).chunk(2, dim=-1)
        part = F.linear(gated(gate, up), down_EDF[expert]) * weight_NJ[token, choice, None]
        out_ND = out_ND.index_add(0, token, part.to(out_ND.dtype))
    return out_ND


NEVER = -1e30
"""A logit that stands for "impossible": finite, so that 0 x log 0 stays 0."""


class ReadOut(NamedTuple):
    """What one step reads from the canvas. Entropies in nats, of the temperature-scaled distribution."""

    sample_BL: Tensor
    argmax_BL: Tensor
    entropy_BL: Tensor
    logits_BLV: Tensor
    """Temperature-scaled, in the weights' dtype: what the soft embedding is taken from."""


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
    oracle's dice, the argmax of logits + `gumbel_BLV`. `banned` is (positions [B, L] as booleans, token ids): these
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
    """softcap x tanh(logits / softcap), in float32."""
    return torch.tanh(logits.float() / softcap) * softcap


def inverse_cdf(p_BLV: Tensor, uniform_BL: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform_BL` in [0, 1)."""
    cdf = p_BLV.cumsum(-1)
    target = uniform_BL[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_(max=p_BLV.shape[-1] - 1)


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor) -> Tensor:
    """softmax(logits) @ E x embedding scale: [B, L, D], what the next step is conditioned on."""
    p_BLV = torch.softmax(logits_BLV, dim=-1, dtype=torch.float32).to(embed_VD.dtype)
    return torch.matmul(p_BLV, embed_VD) * scale


OPS = Ops("reference", rms_norm, rope, attention, gated, experts, read_out, soft_embedding)
