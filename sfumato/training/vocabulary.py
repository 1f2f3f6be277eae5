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
"""Elements of the float32 logits of a group, 128 MiB; two tensors of this size exist at once, three with a teacher."""


class ObservedTokens(NamedTuple):
    """What the leave-one-out objective adds to the logit of each position's observed token."""

    token_N: Tensor
    bonus_N: Tensor


class Teacher(NamedTuple):
    """Predictions towards which those of the same positions are drawn, beside their targets."""

    hidden_ND: Tensor
    """Hidden states that the model's own head reads out; no gradient flows into them."""
    weight: float


class LossTerms(NamedTuple):
    """What a cross-entropy may have beside its targets."""

    observed: ObservedTokens | None = None
    teacher: Teacher | None = None
    floor_N: Tensor | None = None
    """Nats that cost nothing: a position counts max(0, its cross-entropy - its floor). None: all of it."""

    def of(self, part: slice) -> LossTerms:
        """Those of some positions."""
        observed, teacher, floor_N = self
        return LossTerms(
            None if observed is None else ObservedTokens(observed.token_N[part], observed.bonus_N[part]),
            None if teacher is None else Teacher(teacher.hidden_ND[part], teacher.weight),
            None if floor_N is None else floor_N[part],
        )


NO_TERMS = LossTerms()


class CrossEntropies(NamedTuple):
    """Nats, float32. The objective alone has gradients."""

    objective: Tensor
    """The sum over targets, and that over teachers at their weight."""
    targets: Tensor
    """The sum over targets alone."""
    teachers: Tensor
    """The sum of the cross-entropies to the teacher's distributions, unweighted; 0 without one."""
    nats_N: Tensor
    """Of each position's target, its floor not taken off; 0 where there is none."""
    is_right_N: Tensor
    """No token has a higher logit than the target."""


def cross_entropy_sum(model: Model, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """The sum of the cross-entropies of these positions in nats, float32; a target below 0 counts for nothing."""
    return cross_entropies(model, hidden_ND, target_N).objective


def cross_entropies(model: Model, hidden_ND: Tensor, target_N: Tensor, terms: LossTerms = NO_TERMS) -> CrossEntropies:
    """The cross-entropies of these positions with further terms; a target below 0 counts for nothing in any of them."""
    return CrossEntropies(
        *_CrossEntropySum.apply(  # type: ignore[no-untyped-call]
            hidden_ND, model.head_VD, target_N, terms, model.config.softcap, _product_dtype(hidden_ND)
        )
    )


def soft_embedding(model: Model, hidden_BLD: Tensor) -> Tensor:
    """The soft embedding [B, L, D] of the logits of these hidden states.

    Nothing flows back to the logits, as the objective has it, but the embedding that they mix has its gradient."""
    hidden_ND = hidden_BLD.detach().flatten(0, 1)
    head_VD = None if model.lm_head is None else model.head_VD  # the compiler takes no tensor twice
    soft_ND: Tensor = _SoftEmbedding.apply(  # type: ignore[no-untyped-call]
        model.embed_tokens.weight, head_VD, hidden_ND, model.config.softcap, _product_dtype(hidden_ND)
    )
    return (soft_ND * model.embed_scale).view(hidden_BLD.shape)


class StepReadOut(NamedTuple):
    """What the rules of a step of sampling need of hidden states, and what the next pass sees."""

    soft_ND: Tensor
    """The soft embedding, scaled."""
    argmax_N: Tensor
    entropy_N: Tensor
    """Nats, float32, at a temperature of 1."""


@torch.no_grad()
def read_out(model: Model, hidden_ND: Tensor) -> StepReadOut:
    """The read-out of these hidden states, without gradients."""
    dtype, embed_VD = _product_dtype(hidden_ND), model.embed_tokens.weight
    soft, argmax, entropy = [], [], []
    with torch.autocast(hidden_ND.device.type, enabled=False):
        plain_VD = embed_VD.to(dtype)
        for _, p_NV in _probabilities(hidden_ND, model.head_VD, model.config.softcap, dtype):
            soft.append((p_NV.to(dtype) @ plain_VD).to(embed_VD.dtype))
            argmax.append(p_NV.argmax(-1))
            entropy.append(torch.special.entr(p_NV).sum(-1))
    return StepReadOut(torch.cat(soft) * model.embed_scale, torch.cat(argmax), torch.cat(entropy))


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: its own dtype, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _group(head_VD: Tensor) -> int:
    """Positions of a group."""
    return max(1, GROUP // head_VD.shape[0])


class _CrossEntropySum(torch.autograd.Function):
    """`cross_entropies` of tensors; products are in `dtype`, all else in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        terms: LossTerms,
        softcap: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_head else None
        nats_N = hidden_ND.new_zeros(len(target_N), dtype=torch.float32)
        targets, teachers, is_right_N = nats_N.new_zeros(()), nats_N.new_zeros(()), nats_N > 0
        with torch.autocast(hidden_ND.device.type, enabled=False):
            plain_VD, group = head_VD.to(dtype), _group(head_VD)
            for start in range(0, len(target_N), group):
                part = slice(start, start + group)
                x, own = hidden_ND[part].to(dtype), terms.of(part)
                tanh = (x @ plain_VD.mT).float().div_(softcap).tanh_()
                teacher_NV = None
                if own.teacher is not None:
                    teacher_NV = _logits(own.teacher.hidden_ND.to(dtype), plain_VD, softcap).softmax(-1)
                losses = _group_losses(tanh * softcap, target_N[part], own, teacher_NV)
                targets, teachers = targets + losses.targets, teachers + losses.teachers
                nats_N[part], is_right_N[part] = losses.nats_N, losses.is_right_N
                if not needs_hidden and not needs_head:
                    continue
                slope = losses.slope_NV.mul_(tanh.square_().neg_().add_(1.0)).to(dtype)
                if grad_ND is not None:
                    grad_ND[part] = slope @ plain_VD
                if grad_VD is not None:
                    grad_VD += slope.mT @ x
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        objective = targets if terms.teacher is None else targets + terms.teacher.weight * teachers
        results = targets.clone(), teachers, nats_N, is_right_N
        ctx.mark_non_differentiable(*results)
        return objective, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        both = (None if own is None else own * grad.to(own.dtype) for own in ctx.saved_tensors)
        return (*both, None, None, None, None)


class _GroupLosses(NamedTuple):
    """Of a group of positions; `slope_NV` is the gradient of its share of the objective with respect to the logits."""

    targets: Tensor
    teachers: Tensor
    nats_N: Tensor
    is_right_N: Tensor
    slope_NV: Tensor


def _group_losses(logits_NV: Tensor, target_N: Tensor, terms: LossTerms, teacher_NV: Tensor | None) -> _GroupLosses:
    """The losses of float32 logits, in whose memory the gradient is written; the teacher's is used up too."""
    if terms.observed is not None:
        logits_NV.scatter_add_(1, terms.observed.token_N[:, None], terms.observed.bonus_N[:, None])
    is_target_N1 = target_N[:, None] >= 0
    target_N1 = target_N[:, None].clamp_min(0)
    picked_N1 = logits_NV.gather(1, target_N1)
    most_N1 = logits_NV.amax(1, keepdim=True)
    is_right_N1 = is_target_N1 & (picked_N1 >= most_N1)
    teachers = logits_NV.new_zeros(())
    if teacher_NV is not None:  # as a product: no third tensor of this size
        expected_N1 = torch.bmm(teacher_NV[:, None], logits_NV[:, :, None])[:, 0]
    p_NV = logits_NV.sub_(most_N1).exp_()
    sum_N1 = p_NV.sum(1, keepdim=True)
    nats_N1 = (sum_N1.log() + most_N1 - picked_N1).masked_fill(~is_target_N1, 0.0)
    counted_N1, is_counted_N1 = nats_N1, is_target_N1
    if terms.floor_N is not None:
        is_counted_N1 = is_target_N1 & (nats_N1 > terms.floor_N[:, None])
        counted_N1 = (nats_N1 - terms.floor_N[:, None]).masked_fill(~is_counted_N1, 0.0)
    if teacher_NV is None or terms.teacher is None:
        p_NV.mul_(is_counted_N1 / sum_N1)
    else:
        weight_N1 = terms.teacher.weight * is_target_N1
        teachers = (sum_N1.log() + most_N1 - expected_N1).masked_fill(~is_target_N1, 0.0).sum()
        p_NV.mul_((is_counted_N1 + weight_N1) / sum_N1).sub_(teacher_NV.mul_(weight_N1))
    p_NV.scatter_add_(1, target_N1, -is_counted_N1.float())
    return _GroupLosses(counted_N1.sum(), teachers, nats_N1[:, 0], is_right_N1[:, 0], p_NV)


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
            parts = [p_NV.to(dtype) @ plain_VD for _, p_NV in _probabilities(hidden_ND, head_VD, softcap, dtype)]
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
                    grad_VD += p_NV.to(ctx.dtype).mT @ grad_ND[part].to(ctx.dtype)
            grad_VD = grad_VD.to(ctx.embed_dtype)
        return grad_VD, None, None, None, None


def _probabilities(
    hidden_ND: Tensor, head_VD: Tensor, softcap: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The distributions of each group of positions, in float32; products are in `dtype`."""
    plain_VD, group = head_VD.to(dtype), _group(head_VD)
    for start in range(0, len(hidden_ND), group):
        part = slice(start, start + group)
        yield part, _logits(hidden_ND[part].to(dtype), plain_VD, softcap).softmax(-1)


def _logits(x: Tensor, plain_VD: Tensor, softcap: float) -> Tensor:
    """float32, softcapped."""
    return (x @ plain_VD.mT).float().div_(softcap).tanh_().mul_(softcap)
