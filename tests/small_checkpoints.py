"""Small checkpoints for tests: a model of a few layers, its folder, and ways to change either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sfumato import ops
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model

SLIDE = LayerConfig(head_dim=16, kv_heads=2, window=8, rope=Rope(10_000.0))


WHOLE = LayerConfig(head_dim=32, kv_heads=1, window=None, rope=Rope(1e6, partial=0.25, proportional=True))


REFERENCE = ops.load("reference")
TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_experts=4,
    top_k_experts=2,
    expert_size=16,
    layers=(SLIDE, SLIDE, WHOLE),
    canvas_length=8,
    max_position=4096,
    eos_ids=(1, 5),
)


ENCODER = "model.encoder.language_model."


NORM = "model.decoder.norm.weight"


def stir_(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Norms, router scales and layer scalars away from one, matrices away from what was drawn."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "scalar" in name:
            tensor.uniform_(0.5, 1.2, generator=generator)
        else:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3 if tensor.dim() < 2 else 0.15)


@torch.no_grad()
def make(config: ModelConfig = TINY, seed: int = 1) -> Model:
    model = Model(config, REFERENCE).init_(seed)
    stir_(model.state_dict(), seed)
    return model


def same(one: Model, two: Model) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage
