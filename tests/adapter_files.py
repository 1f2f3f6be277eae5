"""Adapter folders for tests: random factors for a model, tensors in peft's layout, and ways to spell or damage them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.model.adapters import TARGETS, Adapter, Factors, targeted

OPTIONS: dict[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "auto_mapping": None,
    "base_model_name_or_path": "google/some-model",
    "r": 2,
    "lora_alpha": 4,
    "bias": "none",
}
"""What peft says of a plain adapter of rank 2."""


def random_adapter(
    model: nn.Module,
    targets: tuple[str, ...] = tuple(TARGETS),
    rank: int = 2,
    alpha: float = 4.0,
    seed: int = 0,
    size: float = 0.1,
) -> Adapter:
    """An adapter that changes much: both factors are normal."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (owner, leaf) in targeted(model, targets).items():
        *stack, outputs, inputs = getattr(owner, leaf).shape
        a = torch.randn(*stack, rank, inputs, generator=generator) * inputs**-0.5
        b = torch.randn(*stack, rank, outputs, generator=generator) * size
        factors[name] = Factors(a, b, alpha / rank)
    return Adapter(factors)


def write(folder: Path, tensors: Mapping[str, Tensor], options: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """A folder with these tensors; `more` are options beside `OPTIONS`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({**(OPTIONS if options is None else options), **more}))
    return folder


def are_same(one: Adapter, other: Adapter) -> bool:
    """The same numbers under the same names."""
    parts = [(one.factors, other.factors), (one.denoise or {}, other.denoise or {})]
    return (one.denoise is None) == (other.denoise is None) and all(
        a.keys() == b.keys()
        and all(torch.equal(a[name].a, b[name].a) and torch.equal(a[name].b, b[name].b) for name in a)
        and all(a[name].scale == b[name].scale for name in a)
        for a, b in parts
    )
