"""Small models as MLX checkpoints, and values on which a quantiser slips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import oracle_name, randomise_
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.bits import as_words
from sfumato.checkpoints.formats.mlx import open_mlx
from sfumato.checkpoints.formats.mlx_writer import plan_mlx, rounded
from sfumato.checkpoints.shards import PlannedFolder, write_shards
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.ops import load
from sfumato.ops.packed import Packed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def wide_config(expert_size: int = 64, hidden_size: int = 128) -> ModelConfig:
    """Small, but its inputs fill groups: 128 for most, 64 for what follows attention and the dense MLP."""
    return ModelConfig(
        vocab_size=96,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_heads=4,
        num_experts=5,
        top_k_experts=2,
        expert_size=expert_size,
        layers=(LayerConfig(16, 2, 6, Rope(10_000.0)), LayerConfig(16, 1, None, Rope(1e6, 0.5, 1.0, True))),
        canvas_length=8,
        max_position=256,
        eos_ids=(1, 5),
    )


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A released checkpoint's tensors."""
    from sfumato.model.network import Model

    model = Model(config, load("reference"))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    randomise_(tensors, 0, 1.5, 1.0)
    return {oracle_name(name): tensor.detach().to(dtype) for name, tensor in tensors}


def checkpoint_of(config: ModelConfig, tensors: dict[str, Tensor], stored: str = "F32") -> Checkpoint:
    def entry(name: str, tensor: Tensor) -> Entry:
        def read(first: int, last: int) -> Tensor:
            return tensor[first:last] if tensor.dim() else tensor

        return Entry(name, tuple(tensor.shape), tensor.nbytes, stored, read)

    entries = {name: entry(name, tensor) for name, tensor in tensors.items()}
    return Checkpoint(Path("somewhere"), "tensors", config.to_dict(), entries)


def write(folder: Path, checkpoint: Checkpoint, bits: int, group: int, mode: str = "affine") -> dict[str, Any]:
    """The checkpoint as MLX, into a folder; its config.json."""
    planned, changes = plan_mlx(checkpoint, bits, group, mode)
    config = checkpoint.config | changes
    write_shards(folder, PlannedFolder(planned))
    (folder / "config.json").write_text(json.dumps(config))
    return config


def groups_of_all_kinds(dtype: torch.dtype) -> Tensor:
    """Rows of 384: plain ones, and those on which a quantiser slips."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, 384, generator=generator)

    one_off = torch.full((2, 384), 1.5)
    one_off[:, ::32] = -7.0
    kinds = [
        rows(24),
        rows(8) * 0.02,
        rows(4).abs(),
        -rows(4).abs() - 0.5,
        torch.zeros(2, 384),
        torch.full((1, 384), 3.0),
        torch.full((1, 384), -0.3),
        rows(4) * 1e-8,
        rows(4) * (1e4 if dtype == torch.float16 else 1e30),
        rows(4) * 1e-3 + 5,
        one_off,
    ]
    return torch.cat(kinds).to(dtype)


def quantise(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """What the writer makes of a weight, as the reader has it."""
    codes, scale, bias = rounded(weight, bits, group, dtype)
    if bits > 4:
        return Packed("int8", tuple(weight.shape), codes, scale.float(), group, bias.float())
    return Packed("int4", tuple(weight.shape), as_words(codes, 4), scale, group, bias)


def put(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_mlx(folder, config)


def mlx_dtype(dtype: torch.dtype) -> Any:
    import mlx.core as mx

    return {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}[dtype]


def numbers(array: Any) -> Any:
    """An mlx array as numpy's, its own to keep."""
    import numpy as np

    return np.array(array)
