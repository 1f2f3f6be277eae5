"""The released checkpoint's config.json, as it is published, for what is computed without a download."""

from __future__ import annotations

from typing import Any

from sfumato.model.config import ModelConfig

RELEASED: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "text_config": {
        "vocab_size": 262_144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "sliding_window": 1024,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "max_position_embeddings": 262_144,
    },
}
"""What the text model has of google/diffusiongemma-26B-A4B-it, in the release's spelling."""


def released() -> ModelConfig:
    """The released model's shape."""
    return ModelConfig.from_dict(RELEASED, "the released config")
