"""Torch's own fused calls where they exist, and fewer memory sweeps where they do not; on any device.

Differentiable, so that training uses them too. The contract is `reference.py`'s; what is not here is taken from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_EXPERTS = 8
"""Up to here, with enough tokens, all experts as one product beat gathering: no index, no scatter, wider products."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).type_as(x)


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, seen_BTS: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    is_grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BTS[:, None], scale=1.0, enable_gqa=is_grouped)
    return out.transpose(1, 2)


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    count, double, width = gate_up_EFD.shape
    tokens = x_ND.shape[0]
    if count <= FEW_EXPERTS and tokens >= 16 * count:
        weight_NE = torch.zeros(tokens, count, dtype=weight_NJ.dtype, device=x_ND.device)
        weight_NE = weight_NE.scatter(1, index_NJ, weight_NJ).to(x_ND.dtype)
        gate_up = F.linear(x_ND, gate_up_EFD.reshape(count * double, width)).view(tokens, count, 2, double // 2)
        inner = F.gelu(gate_up[:, :, 0], approximate="tanh") * gate_up[:, :, 1] * weight_NE[:, :, None]
        return F.linear(inner.flatten(1), down_EDF.transpose(0, 1).reshape(width, count * (double // 2)))
    order_M = index_NJ.flatten().argsort(stable=True)
    token_M = order_M // index_NJ.shape[1]
    gathered_MD = x_ND[token_M]
    parts = []
    start = 0
    for expert, size in enumerate(torch.bincount(index_NJ.flatten(), minlength=count).tolist()):
        if size:
            gate, up = F.linear(gathered_MD[start : start + size], gate_up_EFD[expert]).chunk(2, dim=-1)
            parts.append(F.linear(F.gelu(gate, approximate="tanh") * up, down_EDF[expert]))
            start += size
    part_MD = torch.cat(parts) * weight_NJ.flatten()[order_M, None].to(x_ND.dtype)
    return torch.zeros_like(x_ND).index_add(0, token_M, part_MD)
