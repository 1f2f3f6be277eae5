"""checkpoints/adapter_names.py: every spelling of the table, as its tools write it, is one of the model's own names."""

from __future__ import annotations

import pytest

from sfumato.checkpoints.adapter_names import spot
from sfumato.errors import CheckpointError

Q = "layers.3.self_attn.q_proj"
PEFT = "base_model.model."
FACTORS = {
    # peft, TRL and Unsloth's FastDiffusionModel: transformers' modules
    f"{PEFT}model.decoder.{Q}.lora_A.weight": ("denoise", Q, "A"),
    f"{PEFT}model.encoder.language_model.{Q}.lora_B.weight": ("encode", Q, "B"),
    f"{PEFT}model.decoder.self_conditioning.up_proj.lora_A.weight": (
        "denoise",
        "self_conditioning.up_proj",
        "A",
    ),
    f"{PEFT}model.decoder.layers.3.router.proj.lora_A.weight": ("denoise", "layers.3.router.proj", "A"),
    f"{PEFT}model.decoder.layers.3.experts.base_layer.lora_A.weight": ("denoise", "layers.3.experts.base_layer", "A"),
    f"{PEFT}model.encoder.language_model.layers.3.experts.lora_B.weight": ("encode", "layers.3.experts", "B"),
    # a state dict that was saved with the adapter's name, by hand or by a trainer
    f"{PEFT}model.decoder.{Q}.lora_A.default.weight": ("denoise", Q, "A"),
    f"{PEFT}model.decoder.{Q}.lora_B.my-adapter.weight": ("denoise", Q, "B"),
    # torch.compile, DDP, FSDP, activation checkpointing around or within
    f"_orig_mod.{PEFT}model.decoder.{Q}.lora_A.weight": ("denoise", Q, "A"),
    f"module.{PEFT}model.decoder.layers.3._orig_mod.self_attn.q_proj.lora_A.weight": ("denoise", Q, "A"),
    f"{PEFT}model.decoder.layers.3._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight": ("denoise", Q, "A"),
    f"_fsdp_wrapped_module.{PEFT}model.decoder.{Q}.lora_A.weight": ("denoise", Q, "A"),
    # adapters of the model without its head, and without peft around it
    f"{PEFT}decoder.{Q}.lora_A.weight": ("denoise", Q, "A"),
    f"{PEFT}encoder.language_model.{Q}.lora_A.weight": ("encode", Q, "A"),
    f"model.decoder.{Q}.lora_A.weight": ("denoise", Q, "A"),
    # one stack: NeMo AutoModel's own names, and Gemma 4's of Unsloth's FastModel, Megatron-Bridge and mlx-vlm
    f"{PEFT}model.{Q}.lora_A.weight": ("both", Q, "A"),
    f"{PEFT}model.layers.3.moe.gate.proj.lora_A.weight": ("both", "layers.3.router.proj", "A"),
    f"{PEFT}model.layers.3.moe.experts.7.gate_proj.lora_A.weight": ("both", "layers.3.experts.7.gate_proj", "A"),
    f"{PEFT}model.layers.3.mlp.experts.7.up_proj.lora_B.weight": ("both", "layers.3.experts.7.up_proj", "B"),
    f"{PEFT}model.decoder.layers.3.experts.gate_up_proj.lora_A": ("denoise", "layers.3.experts.gate_up_proj", "A"),
    f"{PEFT}model.language_model.{Q}.lora_A.weight": ("both", Q, "A"),
    f"{PEFT}model.language_model.model.{Q}.lora_A.weight": ("both", Q, "A"),
    f"{PEFT}language_model.model.{Q}.lora_A.weight": ("both", Q, "A"),
    f"{PEFT}language_model.{Q}.lora_A.weight": ("both", Q, "A"),
    f"{Q}.lora_B.weight": ("both", Q, "B"),
    # of an embedding, which is then refused by its name
    f"{PEFT}model.decoder.embed_tokens.lora_embedding_A": ("denoise", "embed_tokens", "A"),
}
WHOLE = {
    f"{PEFT}model.decoder.norm.weight": ("denoise", "norm.weight", "whole"),
    f"{PEFT}model.encoder.language_model.layers.0.input_layernorm.weight": (
        "encode",
        "layers.0.input_layernorm.weight",
        "whole",
    ),
    f"{PEFT}model.decoder.layers.0.router.per_expert_scale": ("denoise", "layers.0.router.per_expert_scale", "whole"),
    f"{PEFT}model.decoder.norm.modules_to_save.default.weight": ("denoise", "norm.weight", "whole"),
    f"{PEFT}model.decoder.norm.modules_to_save.weight": ("denoise", "norm.weight", "whole"),
    f"{PEFT}lm_head.weight": ("both", "lm_head.weight", "whole"),
    f"{PEFT}model.decoder.embed_tokens.weight": ("denoise", "embed_tokens.weight", "whole"),
    f"{PEFT}model.encoder.language_model.layers.0.layer_scalar": ("both", "layers.0.encode_scalar", "whole"),
    f"{PEFT}model.decoder.layers.0.layer_scalar": ("both", "layers.0.denoise_scalar", "whole"),
}


@pytest.mark.parametrize("name", [*FACTORS, *WHOLE])
def test_a_spelling_is_one_name_of_ours(name: str) -> None:
    place = spot(name, "x")
    assert place is not None and place[:3] == {**FACTORS, **WHOLE}[name]


def test_what_sees_images_is_left_aside() -> None:
    for part in ("vision_tower.encoder.layers.0.mlp.up_proj.linear", "embed_vision.embedding_projection"):
        assert spot(f"{PEFT}model.encoder.{part}.lora_A.weight", "x") is None


@pytest.mark.parametrize(
    ("end", "what"),
    [
        ("lora_magnitude_vector.weight", "DoRA"),
        ("lora_B.bias", "bias of its own"),
        ("lora_gate_and_up_A", "NeMo's own layout"),
        ("lora_E", "AdaLoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("ia3_l", "IA3"),
        ("oft_R.weight", "OFT"),
        ("bias", "a bias"),
        ("lora_A.weight.absmax", "no factor of LoRA"),
    ],
)
def test_what_is_no_lora_is_named(end: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=rf"file has .*{end.split('.')[0]}.*{what}"):
        spot(f"{PEFT}model.decoder.{Q}.{end}", "file")
