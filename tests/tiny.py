"""Tiny real models for the tests: random configurations, our model on them, and transformers' own as the oracle.

Every feature is on: both kinds of layer, several full ones, grouped heads of two sizes, experts, norms and router
scales that are not one, and layer scalars that differ between encode and denoise. transformers is imported inside the
functions that need it, so that tests without the oracle start quickly.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sfumato import ops
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model
from sfumato.ops import cpu

VISION = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "image_token_id": 10**6,
}
"""A vision tower that the oracle can build in a moment; its image token lies outside every vocabulary here."""

# One entry a seed, so that eight consecutive seeds cover every value.
EXPERTS = (4, 32, 8, 5, 16, 6, 24, 12)
TOP_K = (1, 2, 3, 4)
CANVAS = (8, 4, 16, 7, 12, 5, 9, 6)


def random_config(seed: int, **changes: Any) -> ModelConfig:
    """A small configuration drawn from `seed`: head counts and sizes, layer pattern, window (4 to 12 tokens), experts,
    canvas, angles. `changes` replace fields of the result."""
    draw = random.Random(f"config {seed}")
    heads = draw.choice([2, 4, 8])
    shares = [n for n in (1, 2, 4, 8) if heads % n == 0]
    window = draw.randint(4, 12)
    turning = draw.choice([Rope(10_000.0), Rope(100.0), Rope(500.0, 0.5, 1.0, True)])
    sliding = LayerConfig(draw.choice([8, 16]), draw.choice(shares), window, turning)
    angles = Rope(draw.choice([1e3, 1e6]), draw.choice([0.25, 0.5, 0.75, 1.0]), draw.choice([1.0, 2.0]), True)
    full = LayerConfig(draw.choice([16, 24, 32]), draw.choice(shares), None, angles)
    # Windowed layers before and after a full one, so that what a full layer mixes passes through a window again.
    layers = [sliding] * draw.randint(1, 2) + [full] * draw.randint(1, 2) + [sliding] * draw.randint(0, 2) + [full]
    config = ModelConfig(
        vocab_size=draw.randint(40, 100),
        hidden_size=draw.choice([24, 32, 48]),
        intermediate_size=draw.choice([20, 32, 56]),
        num_heads=heads,
        num_experts=EXPERTS[seed % len(EXPERTS)],
        top_k_experts=TOP_K[(seed + seed // 4) % len(TOP_K)],
        expert_size=draw.choice([8, 12, 16]),
        layers=tuple(layers),
        canvas_length=CANVAS[seed % len(CANVAS)],
        max_position=512,
        softcap=draw.choice([30.0, 12.0]),
        vision=VISION,
    )
    return dataclasses.replace(config, **changes)


def tiny_config(**changes: Any) -> ModelConfig:
    """One fixed small configuration with every feature on: window 6, canvas 8, vocabulary 61, two full layers."""
    sliding = LayerConfig(8, 2, 6, Rope(10_000.0))
    full = LayerConfig(16, 1, None, Rope(1e6, 0.5, 1.0, True))
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=32,
        num_heads=4,
        num_experts=5,
        top_k_experts=2,
        expert_size=12,
        layers=(sliding, full, sliding, full),
        canvas_length=8,
        max_position=256,
        eos_ids=(1, 5),
        vision=VISION,
    )
    return dataclasses.replace(config, **changes)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: tensors this small gain nothing from a second, and lose much where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def randomise_(tensors: Iterable[tuple[str, Tensor]], seed: int, sharp: float, mix: float) -> None:
    """Fill named tensors in place, in the order of their names: matrices, norms, router scales, layer scalars.

    `sharp` is about the standard deviation of the logits; `mix` scales what each block adds to the residual: below 1
    a canvas settles within a few steps, at 1 it rarely does."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        kind = name.rsplit(".", 1)[-1]
        if kind.endswith("_scalar"):
            tensor.uniform_(0.5, 1.2, generator=generator)
        elif kind in ("scale", "per_expert_scale"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(1.0, 0.3, generator=generator)
            if "post_attention" in name or name.endswith("post_feedforward_layernorm.weight"):
                tensor.mul_(mix)
            if "q_norm" in name or "k_norm" in name:
                tensor.mul_(0.6)  # sharper attention than this amplifies float32's own rounding beyond any tolerance
        elif "embed_tokens" in name:
            tensor.normal_(0.0, sharp / math.sqrt(tensor.shape[-1]), generator=generator)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
            if name.endswith("self_conditioning.down_proj.weight"):
                tensor.mul_(mix)


OPS = ("reference", "fused", *([] if cpu.obstacle(torch.float32) else ["cpu"]))
"""The operations that every engine test runs with here."""


def tiny_model(
    config: ModelConfig | None = None, seed: int = 0, name: str = "reference", sharp: float = 1.5, mix: float = 1.0
) -> Model:
    """Our model with random weights; `name` is that of the operations."""
    model = Model(config or tiny_config(), ops.load(name))
    randomise_([*model.named_parameters(), *model.named_buffers()], seed, sharp, mix)
    return model.requires_grad_(False).eval().pack_()


def oracle(config: ModelConfig, seed: int, sharp: float = 1.5, mix: float = 1.0) -> Any:
    """transformers' DiffusionGemmaForBlockDiffusion of this config in float32, all its text tensors randomised."""
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**config.to_dict())).float()
    scalars = [pair for pair in model.named_buffers() if pair[0].endswith("layer_scalar")]
    text = [pair for pair in model.named_parameters() if "vision" not in pair[0]]
    randomise_(text + scalars, seed, sharp, mix)
    return model.requires_grad_(False).eval()


def twin(theirs: Any, name: str = "reference", config: ModelConfig | None = None) -> Model:
    """Our model with the oracle's weights. `config` (default: read from the oracle's own) may differ in token ids."""
    config = config or ModelConfig.from_dict(theirs.config.to_dict())
    model = Model(config, ops.load(name))
    source = theirs.state_dict()
    for ours, tensor in [*model.named_parameters(), *model.named_buffers()]:
        expected = source[oracle_name(ours)]
        assert expected.shape == tensor.shape, ours
        tensor.data.copy_(expected)
    return model.requires_grad_(False).eval().pack_()


def oracle_name(ours: str) -> str:
    """The oracle's name of one of our tensors."""
    if ours.endswith(".encode_scalar"):
        return "model.encoder.language_model." + ours.replace("encode_scalar", "layer_scalar")
    return "model.decoder." + ours.replace("denoise_scalar", "layer_scalar")


class TorchNoise:
    """Noise drawn from torch's generator as the oracle draws them: the canvas, then a step's sample and renoise tokens.

    torch.multinomial takes the argmax of p / q with q exponential: -log q is the Gumbel noise of that race."""

    def __init__(self, config: ModelConfig) -> None:
        self.vocab_size, self.length = config.vocab_size, config.canvas_length

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        return torch.randint(0, self.vocab_size, (len(rows), self.length))

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        race = torch.empty(len(rows) * self.length, self.vocab_size).exponential_()
        return {"gumbel_BLV": -race.log().view(len(rows), self.length, self.vocab_size)}

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        return torch.randint(0, self.vocab_size, (len(rows), self.length))


THIN_SLIDING, THIN_FULL = LayerConfig(32, 2, 64, Rope(10_000.0)), LayerConfig(64, 1, None, Rope(1e6, 0.25, 1.0, True))
THIN: ModelConfig = tiny_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=192,
    num_heads=4,
    num_experts=128,
    top_k_experts=8,
    expert_size=128,
    canvas_length=64,
    max_position=4096,
    eos_ids=(1, 106),
    layers=(*[THIN_SLIDING] * 5, THIN_FULL) * 5,
)
"""As many layers, experts and chosen experts as the released model has, all of them small."""
