"""Writes nano's config.json and generation_config.json.

Run from the repository root: python scripts/make_nano_config.py. theta 314.6 makes the second angle of the full
layers' heads (size 32) turn once in nine positions, 2 pi / 314.6^(-2/32) = 9.0: cells of one column look alike to it.
Temperatures lie near 1 because training takes its soft embeddings at 1, and 24 steps solve what 48 do (docs/LOG.md).
"""

import json
from pathlib import Path

from sfumato.model.config import LayerConfig, ModelConfig, Rope

sliding = LayerConfig(head_dim=16, kv_heads=4, window=128, rope=Rope(314.6))
full = LayerConfig(head_dim=32, kv_heads=2, window=None, rope=Rope(314.6, partial=0.25, proportional=True))
config = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_heads=8,
    num_experts=4,
    top_k_experts=2,
    expert_size=32,
    layers=tuple(full if (i + 1) % 4 == 0 else sliding for i in range(8)),
    canvas_length=82,
    max_position=4096,
    eos_ids=(1,),
)
generation = {
    "max_new_tokens": 82,
    "max_denoising_steps": 24,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.8,
    "t_max": 1.2,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": [1, 5, 13],
}
folder = Path("sfumato/nano")
(folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
(folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
