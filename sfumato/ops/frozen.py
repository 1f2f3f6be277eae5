"""Products with weights in fewer bits that are not trained: gradients reach what is multiplied, through packed weights.

y = x Wᵀ, and so x's gradient is y's gradient times W. Left to itself, autograd would keep the unpacked W of every
product until the backward pass, and the memory that packing saved would be gone. Here nothing is kept but the packed
weight, which is there anyway: W is unpacked for the product, and once more for its gradient. x is not kept either,
since only W's gradient would need it. A format that rounds x (FP8) is taken as if it did not: the gradient passes
straight through the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfumato.ops.contract import Weight


def frozen_product(x: Tensor, weight: Weight) -> Tensor:
    """The product x Wᵀ [.., O] of x [.., I], in x's dtype or, under autocast, in that of autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor = _FrozenProduct.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _FrozenProduct(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        return _multiplied(weight.round_input(x), weight.dense(x.dtype).mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _multiplied(grad, ctx.weight.dense(grad.dtype)), None


def _multiplied(x: Tensor, plain: Tensor) -> Tensor:
    """The product x @ plain in the dtype of both: autocast has had its say."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ plain
