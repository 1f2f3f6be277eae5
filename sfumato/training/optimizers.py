"""The optimisers that a recipe may name, over the parameters that are trained."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.errors import InputError

OPTIMIZERS = ("adamw", "muon", "adamw8bit", "paged")


class Numbers(Protocol):
    """What an optimiser asks of a recipe."""

    @property
    def optimizer(self) -> str:
        """One of `OPTIMIZERS`."""
        ...

    @property
    def lr(self) -> float:
        """The highest rate."""
        ...

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of matrices."""
        ...


def optimizers_of(parameters: dict[str, nn.Parameter], numbers: Numbers) -> list[torch.optim.Optimizer]:
    """The optimisers of these parameters, none of them twice. Weight decay is of matrices alone.

    InputError where a library is missing, or cannot do it here."""
    by_muon = {name: p for name, p in parameters.items() if numbers.optimizer == "muon" and _is_block_matrix(name, p)}
    rest = [p for name, p in parameters.items() if name not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": numbers.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    optimizers = [_adam(numbers.optimizer)(kept, lr=numbers.lr, betas=numbers.betas)] if kept else []
    if by_muon:
        matrices, decay = list(by_muon.values()), numbers.weight_decay
        optimizers.append(torch.optim.Muon(matrices, lr=numbers.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and name.startswith("layers.") and "router" not in name


def _adam(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name in ("adamw", "muon"):

        def plain(groups: Any, **numbers: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(groups, fused=True, **numbers)

        return plain
    try:
        optim = import_module("bitsandbytes.optim")
    except ImportError:
        raise InputError(
            f"optimizer {name!r} is bitsandbytes', which is not installed; pip install '.[train]' in Sfumato's "
            "checkout, or choose 'adamw'"
        ) from None
    kind: Callable[..., torch.optim.Optimizer] = optim.AdamW8bit if name == "adamw8bit" else optim.PagedAdamW
    return kind
