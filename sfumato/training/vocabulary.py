"""Whatever has the size of the vocabulary, a group of positions at a time: cross-entropy, and the soft embedding.

The float32 logits [N, V] of a batch are its largest tensor by far (1 GiB for 1,024 tokens of the released model), and
training would hold several of them. Here a group's logits become its losses and, on the spot, the gradients of its
hidden states and of the matrix that reads them out; the backward pass only scales those. So nothing of that size is
kept. It lacks second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.model.network import Model

GROUP = 2**25
"""Elements of the float32 logits of a group, 128 MiB; two tensors of this size exist at once."""


class ObservedTokens(NamedTuple):
    """What the leave-one-out objective adds to the logit of each position's observed token."""

    token_N: Tensor
    bonus_N: Tensor


def cross_entropy_sum(
    model: Model, hidden_ND: Tensor, target_N: Tensor, observed: ObservedTokens | None = None
) -> Tensor:
    """The sum of the cross-entropies of these positions in nats, float32; a target below 0 counts for nothing."""
    total: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        hidden_ND, model.head_VD, target_N, observed, model.config.softcap, _product_dtype(hidden_ND)
    )
    return total


def soft_embedding(model: Model, hidden_BLD: Tensor) -> Tensor:
    """The soft embedding [B, L, D] of the logits of these hidden states.

    Nothing flows back to the logits, as the objective has it, but the embedding that they mix has its gradient."""
    hidden_ND = hidden_BLD.detach().flatten(0, 1)
    head_VD = None if model.lm_head is None else model.head_VD  # the compiler takes no tensor twice
    soft_ND: Tensor = _SoftEmbedding.apply(  # type: ignore[no-untyped-call]
        model.embed_tokens.weight, head_VD, hidden_ND, model.config.softcap, _product_dtype(hidden_ND)
    )
    return (soft_ND * model.embed_scale).view(hidden_BLD.shape)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: its own dtype, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _group(head_VD: Tensor) -> int:
    """Positions of a group."""
    return max(1, GROUP // head_VD.shape[0])


class _CrossEntropySum(torch.autograd.Function):
    """`cross_entropy_sum` of tensors; products are in `dtype`, all else in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        observed: ObservedTokens | None,
        softcap: float,
        dtype: torch.dtype,
    ) -> Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            plain_VD, group = head_VD.to(dtype), _group(head_VD)
            for start in range(0, len(target_N), group):
                part = slice(start, start + group)
                x = hidden_ND[part].to(dtype)
                tanh = (x @ plain_VD.mT).float().div_(softcap).tanh_()
                logits = tanh * softcap
                if observed is not None:
                    logits.scatter_add_(1, observed.token_N[part, None], observed.bonus_N[part, None])
                is_target_N1 = target_N[part, None] >= 0
                target_N1 = target_N[part, None].clamp_min(0)
                picked_N1 = logits.gather(1, target_N1)
                most_N1 = logits.amax(1, keepdim=True)
                p = logits.sub_(most_N1).exp_()
                sum_N1 = p.sum(1, keepdim=True)
                total = total + (sum_N1.log() + most_N1 - picked_N1).masked_fill(~is_target_N1, 0.0).sum()
                if not needs_hidden and not needs_head:
                    continue
                p.mul_(is_target_N1 / sum_N1).scatter_add_(1, target_N1, -is_target_N1.float())
                slope = p.mul_(tanh.square_().neg_().add_(1.0)).to(dtype)
                if grad_ND is not None:
                    grad_ND[part] = slope @ plain_VD
                if grad_VD is not None:
                    grad_VD += slope.mT @ x
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = (None if own is None else own * grad.to(own.dtype) for own in ctx.saved_tensors)
        return (*both, None, None, None, None)


class _SoftEmbedding(torch.autograd.Function):
    """softmax(logits) @ E, unscaled; the backward pass computes the probabilities once more."""

    @staticmethod
    def forward(
        ctx: Any, embed_VD: Tensor, head_VD: Tensor | None, hidden_ND: Tensor, softcap: float, dtype: torch.dtype
    ) -> Tensor:
        head_VD = embed_VD if head_VD is None else head_VD
        ctx.save_for_backward(head_VD, hidden_ND)
        ctx.softcap, ctx.dtype, ctx.embed_dtype = softcap, dtype, embed_VD.dtype
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            plain_VD = embed_VD.to(dtype)
            parts = [p_NV @ plain_VD for _, p_NV in _probabilities(hidden_ND, head_VD, softcap, dtype)]
        return torch.cat(parts).to(embed_VD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor | None) -> tuple[Tensor | None, ...]:
        head_VD, hidden_ND = ctx.saved_tensors
        grad_VD = None
        if grad_ND is not None:
            grad_VD = torch.zeros_like(head_VD, dtype=torch.float32)
            with torch.autocast(hidden_ND.device.type, enabled=False):
                for part, p_NV in _probabilities(hidden_ND, head_VD, ctx.softcap, ctx.dtype):
                    grad_VD += p_NV.mT @ grad_ND[part].to(ctx.dtype)
            grad_VD = grad_VD.to(ctx.embed_dtype)
        return grad_VD, None, None, None, None


def _probabilities(
    hidden_ND: Tensor, head_VD: Tensor, softcap: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The distributions of each group of positions, in `dtype`."""
    plain_VD, group = head_VD.to(dtype), _group(head_VD)
    for start in range(0, len(hidden_ND), group):
        part = slice(start, start + group)
        logits = (hidden_ND[part].to(dtype) @ plain_VD.mT).float().div_(softcap).tanh_().mul_(softcap)
        yield part, torch.softmax(logits, -1).to(dtype)
