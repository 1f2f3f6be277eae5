"""The names of DiffusionGemma in GGUF (architecture `diffusion-gemma`): tensors, special tokens, the sampler's numbers.

One table gives every tensor's name in GGUF, its released name and its shape, for the reader and the writer alike. Norms
are stored as they are (Gemma 3's converter added one, Gemma 4's does not), queries and keys are not permuted, and the
output matrix is the embedding unless there is one of its own. The partial turning of the full layers is a tensor of
divisors, `rope_freqs`: 1 where an angle turns and 1e30 where it stands still. Source: llama.cpp's converter and loader
of this architecture.

It lacks the vision tower, which these files do not have.
"""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.model.config import ModelConfig

NAME = "diffusion-gemma"
STILL = 1e30
"""The divisor of an angle that does not turn."""
ROPE = "rope_freqs.weight"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
EMBEDDING_OURS, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
"""The released names of these two; only files of models with two such matrices have the second."""
GATE_UP, EXPERTS_APART = "ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")
"""Experts' gate and up, in one tensor as the converter writes them, and in two."""
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Our names of special tokens, and GGUF's."""
SAMPLER = {
    "eb_max_steps": ("max_denoising_steps", "max_steps"),
    "eb_t_min": ("t_min", "t_min"),
    "eb_t_max": ("t_max", "t_max"),
    "eb_entropy_bound": ("entropy_bound", "entropy_bound"),
    "eb_stability_threshold": ("stability_threshold", "stability"),
    "eb_confidence_threshold": ("confidence_threshold", "confidence"),
}
"""GGUF's names of the sampler's numbers, generation_config's, and those of Options."""


def tensor_table(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """GGUF's name, the released name and the shape of every tensor but `rope_freqs`."""
    width, inner, expert, count = config.hidden_size, config.intermediate_size, config.expert_size, config.num_experts
    yield EMBEDDING, EMBEDDING_OURS, (config.vocab_size, width)
    yield "output_norm.weight", "model.decoder.norm.weight", (width,)
    own = "model.decoder.self_conditioning."
    yield "self_cond_pre_norm.weight", f"{own}pre_norm.weight", (width,)
    yield "self_cond_gate.weight", f"{own}gate_proj.weight", (inner, width)
    yield "self_cond_up.weight", f"{own}up_proj.weight", (inner, width)
    yield "self_cond_down.weight", f"{own}down_proj.weight", (width, inner)
    for index, layer in enumerate(config.layers):
        queries, keys = config.num_heads * layer.head_dim, layer.kv_heads * layer.head_dim
        for theirs, ours, shape in (
            ("attn_norm.weight", "input_layernorm.weight", (width,)),
            ("attn_q.weight", "self_attn.q_proj.weight", (queries, width)),
            ("attn_k.weight", "self_attn.k_proj.weight", (keys, width)),
            ("attn_v.weight", "self_attn.v_proj.weight", (keys, width)),
            ("attn_output.weight", "self_attn.o_proj.weight", (width, queries)),
            ("attn_q_norm.weight", "self_attn.q_norm.weight", (layer.head_dim,)),
            ("attn_k_norm.weight", "self_attn.k_norm.weight", (layer.head_dim,)),
            ("post_attention_norm.weight", "post_attention_layernorm.weight", (width,)),
            ("ffn_norm.weight", "pre_feedforward_layernorm.weight", (width,)),
            ("ffn_gate.weight", "mlp.gate_proj.weight", (inner, width)),
            ("ffn_up.weight", "mlp.up_proj.weight", (inner, width)),
            ("ffn_down.weight", "mlp.down_proj.weight", (width, inner)),
            ("post_ffw_norm.weight", "post_feedforward_layernorm.weight", (width,)),
            ("post_ffw_norm_1.weight", "post_feedforward_layernorm_1.weight", (width,)),
            ("post_ffw_norm_2.weight", "post_feedforward_layernorm_2.weight", (width,)),
            ("pre_ffw_norm_2.weight", "pre_feedforward_layernorm_2.weight", (width,)),
            ("ffn_gate_inp.weight", "router.proj.weight", (count, width)),
            ("ffn_gate_inp.scale", "router.scale", (width,)),
            ("ffn_gate_up_exps.weight", "experts.gate_up_proj", (count, 2 * expert, width)),
            ("ffn_down_exps.weight", "experts.down_proj", (count, width, expert)),
            ("ffn_down_exps.scale", "router.per_expert_scale", (count,)),
            ("layer_output_scale.weight", "layer_scalar", (1,)),
        ):
            if layer.is_sliding or theirs != "attn_v.weight":
                yield f"blk.{index}.{theirs}", f"model.decoder.layers.{index}.{ours}", shape
        yield (
            f"blk.{index}.enc_layer_output_scale.weight",
            f"model.encoder.language_model.layers.{index}.layer_scalar",
            (1,),
        )
