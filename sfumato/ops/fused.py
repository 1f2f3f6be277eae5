"""Torch's own fused calls where they exist, and fewer memory sweeps where they do not; on any device.

Differentiable, so that training uses them too. The contract is `reference.py`'s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.ops.contract import NEVER, JoinNorms, Matrix, Ops, ReadOut, tensors_of
from sfumato.ops.frozen import frozen_product
from sfumato.ops.lowrank import LowRank, plus_low_rank
from sfumato.ops.masks import Mask

FEW_EXPERTS = 8
"""Up to here, with enough tokens, all experts as one product beat gathering: no index, no scatter, wider products."""

SWEEP = 2**24
"""Elements of the float32 logits that exist at once: the read-out goes through positions in groups of this size."""


def pack(weight: Matrix) -> Matrix:
    """As `reference.pack`."""
    return weight


def linear(x: Tensor, *weights: Matrix) -> tuple[Tensor, ...]:
    """As `reference.linear`."""
    return tuple(_product(x, weight) for weight in weights)


def _product(x: Tensor, weight: Matrix, token_M: Tensor | None = None) -> Tensor:
    """The product x Wᵀ; `token_M` as `plus_low_rank` has it."""
    if isinstance(weight, LowRank):
        if _is_merged(x, weight, x.numel() // x.shape[-1]):
            return F.linear(x, weight.dense(x.dtype))
        return plus_low_rank(_product(x, weight.base), x, weight, token_M)
    return F.linear(x, weight) if isinstance(weight, Tensor) else frozen_product(x, weight)


def _is_merged(x: Tensor, weight: LowRank, tokens: int) -> bool:
    """Whether to add the factors to a small float32 weight before a product that is trained.

    Products of a few columns are slow for what they are, so there a step would take no less time than full training."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    *_, outputs, inputs = weight.shape
    rank, is_plain = weight.a.shape[-2], isinstance(weight.base, Tensor)
    is_cheaper = outputs * inputs <= 3 * rank * (outputs + inputs)  # forward, and both gradients
    are_many = tokens >= max(outputs, inputs)
    is_exact = is_plain and x.dtype == weight.a.dtype == tensors_of(weight.base)[0].dtype == torch.float32
    return is_cheaper and are_many and is_exact and weight.switch.lanes.common is not None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """As `reference.rms_norm`; where gradients are, nothing is said of squares that overflow."""
    x32, weight = x.float(), None if weight is None else weight.float()
    if torch.is_grad_enabled():
        if x.device.type == "cpu":
            normed: Tensor = _NormOnCPU.apply(x32, weight, eps)  # type: ignore[no-untyped-call]
            return normed.type_as(x)
        return F.rms_norm(x32, x.shape[-1:], weight, eps).type_as(x)
    mean = x32.square().mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(mean + eps).add_(mean, alpha=0)
    return (x32 if weight is None else x32.mul_(weight)).type_as(x)


class _NormOnCPU(torch.autograd.Function):
    """In float32, for a CPU: there torch's own call is a row of operations, and its gradients take twice the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        root = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, root)
        y: Tensor = x * root
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            scaled = grad if weight is None else grad * weight
            along = torch.linalg.vecdot(scaled, x)[..., None] * root.pow(3) / x.shape[-1]
            grad_x = torch.addcmul(scaled * root, x, along, value=-1)
        if needs_weight:
            grad_weight = (grad * x).mul_(root).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None


def norm_rope(x_BTHK: Tensor, weight_K: Tensor, eps: float, cos_BTK: Tensor, sin_BTK: Tensor) -> Tensor:
    """As `reference.norm_rope`."""
    x_BTHK = rms_norm(x_BTHK, weight_K, eps)
    one, two = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos_BTK[:, :, None] + torch.cat((-two, one), dim=-1) * sin_BTK[:, :, None]


def norm_add(residual: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference.norm_add`."""
    return residual + rms_norm(x, weight_D, eps)


def attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, k_XRGK: Tensor, v_XRGK: Tensor, mask: Mask) -> Tensor:
    """As `reference.attention`."""
    if mask.used:
        is_all = mask.rows == list(range(k_XRGK.shape[0]))
        cached = (x[:, : mask.used] if is_all else x[mask.rows_B, : mask.used] for x in (k_XRGK, v_XRGK))
        k_BTGK, v_BTGK = (torch.cat([old, new], dim=1) for old, new in zip(cached, (k_BTGK, v_BTGK), strict=True))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    is_grouped = q.shape[1] != k.shape[1]
    is_visible = mask.dense_BTS()[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible, scale=1.0, enable_gqa=is_grouped).transpose(
        1, 2
    )


def feed_forward(x: Tensor, gate_FD: Matrix, up_FD: Matrix, down_DF: Matrix) -> Tensor:
    """As `reference.feed_forward`."""
    gate, up = linear(x, gate_FD, up_FD)
    return linear(F.gelu(gate, approximate="tanh") * up, down_DF)[0]


def route(
    residual_ND: Tensor, scale_D: Tensor, proj_ED: Matrix, per_expert_E: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As `reference.route`."""
    x_ND = rms_norm(residual_ND, None, eps) * scale_D * residual_ND.shape[-1] ** -0.5
    p_NE = torch.softmax(_product(x_ND, proj_ED), dim=-1, dtype=torch.float32)
    weight_NJ, index_NJ = p_NE.topk(top_k, dim=-1)
    weight_NJ = weight_NJ / weight_NJ.sum(-1, keepdim=True)
    return index_NJ, weight_NJ * per_expert_E[index_NJ]


def experts(x_ND: Tensor, index_NJ: Tensor, weight_NJ: Tensor, gate_up_EFD: Matrix, down_EDF: Matrix) -> Tensor:
    """As `reference.experts`."""
    count, double, width = gate_up_EFD.shape
    tokens = x_ND.shape[0]
    are_few = count <= FEW_EXPERTS and tokens >= 16 * count
    if are_few:
        gate_up_EFD, down_EDF = _merged(x_ND, gate_up_EFD), _merged(x_ND, down_EDF)
    if are_few and isinstance(gate_up_EFD, Tensor) and isinstance(down_EDF, Tensor):
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
            own = slice(start, start + size)
            gate, up = _product(gathered_MD[own], gate_up_EFD[expert], token_M[own]).chunk(2, dim=-1)
            parts.append(_product(F.gelu(gate, approximate="tanh") * up, down_EDF[expert], token_M[own]))
            start += size
    part_MD = torch.cat(parts) * weight_NJ.flatten()[order_M, None].to(x_ND.dtype)
    return torch.zeros_like(x_ND).index_add(0, token_M, part_MD)


def _merged(x_ND: Tensor, stack: Matrix) -> Matrix:
    """Experts with their factors in them, where `_is_merged` says so; they all see all tokens."""
    if isinstance(stack, LowRank) and _is_merged(x_ND, stack, len(x_ND)):
        return stack.dense(x_ND.dtype)
    return stack


def join(
    residual_ND: Tensor,
    dense_ND: Tensor,
    sparse_ND: Tensor,
    norms: JoinNorms,
    eps: float,
    scale_N1: Tensor,
) -> Tensor:
    """As `reference.join`."""
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
    """Positions in groups, so that the float32 logits of a group alone exist; each sweep over them in place."""
    batch, length, width = hidden_BLD.shape
    vocabulary = embed_VD.shape[0]
    hidden_ND, count = hidden_BLD.reshape(-1, width), batch * length
    temperature_N1 = temperature_B[:, None].expand(batch, length).reshape(-1, 1)
    logits_NV = hidden_BLD.new_empty(count, vocabulary, dtype=embed_VD.dtype)
    sample_N, argmax_N = (torch.empty(count, dtype=torch.long, device=hidden_BLD.device) for _ in range(2))
    entropy_N = torch.empty(count, device=hidden_BLD.device)
    group = max(1, SWEEP // vocabulary)
    for start in range(0, count, group):
        part = slice(start, start + group)
        x = F.linear(hidden_ND[part], embed_VD).float()
        x = x.div_(softcap).tanh_().mul_(softcap)
        if banned is not None:
            where_BL, ids = banned
            x[:, ids] = x[:, ids].masked_fill(where_BL.reshape(-1, 1)[part], NEVER)
        x = x.div_(temperature_N1[part])
        logits_NV[part] = x
        lse_N1 = x.logsumexp(-1, keepdim=True)
        argmax_N[part] = x.argmax(-1)
        if gumbel_BLV is not None:
            noise = gumbel_BLV.reshape(-1, vocabulary)[part]
            sample_N[part] = ((x - lse_N1) + noise).argmax(-1)
        log_p = x.sub_(lse_N1)
        p = log_p.exp()
        entropy_N[part] = -torch.linalg.vecdot(p, log_p)
        if gumbel_BLV is None and uniform_BL is not None:
            cdf = p.cumsum_(-1)
            target = uniform_BL.reshape(-1, 1)[part] * cdf[:, -1:]
            sample_N[part] = torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=vocabulary - 1)
    if gumbel_BLV is None and uniform_BL is None:
        sample_N = argmax_N
    shape = (batch, length)
    return ReadOut(
        sample_N.view(shape), argmax_N.view(shape), entropy_N.view(shape), logits_NV.view(batch, length, vocabulary)
    )


def soft_embedding(logits_BLV: Tensor, embed_VD: Tensor, scale: Tensor, tiles: Any = None) -> Tensor:
    """As `reference.soft_embedding`."""
    p_BLV = torch.softmax(logits_BLV, dim=-1, dtype=torch.float32).to(embed_VD.dtype)
    return torch.matmul(p_BLV, embed_VD) * scale


OPS = Ops(
    name="fused",
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
