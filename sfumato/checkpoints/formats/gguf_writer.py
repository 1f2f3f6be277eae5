"""DiffusionGemma to a GGUF file that llama.cpp reads.

It lacks the K kinds: llama-quantize makes these well, from what is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, StoredVocabulary
from sfumato.checkpoints.formats.gguf import PlannedBlocks, write_file
from sfumato.checkpoints.formats.gguf_blocks import KINDS, NUMBERS, encode
from sfumato.checkpoints.formats.gguf_names import NAME, ROPE, SAMPLER, SPECIAL, STILL, tensor_table
from sfumato.errors import InputError
from sfumato.model.config import ModelConfig, generation_values, read_generation_config
from sfumato.text.tokenizer import Tokenizer

FILE_TYPES = {"Q8_0": 7, "BF16": 32}
"""What `write_gguf` writes, and llama.cpp's number of it."""
PART, CACHED = 16 << 20, 1 << 19
"""Values that are read at once, 64 MB in float32, and those that are converted at once, while they are in the cache."""
_SHOWN = frozenset('<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'.split())
"""Control tokens that llama.cpp wants as user defined: its own parser of answers has to see them."""


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    kind: str = "Q8_0",
    vocabulary: StoredVocabulary | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint as one GGUF file that llama.cpp's DiffusionGemma reads; what it replaces is there to the last.

    Matrices become `kind`, "Q8_0" or "BF16" (rows of no multiple of 32 always BF16); vectors and the router float32.
    Without `vocabulary` the checkpoint's own is written, if it has one; a folder's has none, see `vocabulary_of`.
    The sampler's numbers are the checkpoint's, or its folder's generation_config.json. `progress(done, all)` counts
    bytes. InputError: another kind, a checkpoint that lacks a tensor, or one that this format cannot describe."""
    if kind not in FILE_TYPES:
        raise InputError(f"kind is {kind!r}; a GGUF is written as {' or '.join(FILE_TYPES)}")
    config = ModelConfig.from_dict(checkpoint.config, str(checkpoint.path))
    if not config.is_diffusion:
        raise InputError(f"{checkpoint.path} is no DiffusionGemma; llama.cpp's own converter writes a Gemma 4 as GGUF")
    if checkpoint.generation:
        sampler, ends = generation_values(checkpoint.generation, str(checkpoint.path))
    else:
        sampler, ends = read_generation_config(checkpoint.path)
    if ends is not None:
        config = replace(config, eos_ids=ends)
    vocabulary = vocabulary or checkpoint.vocabulary
    if vocabulary and len(vocabulary.tokens) > config.vocab_size:
        raise InputError(f"the vocabulary has {len(vocabulary.tokens)} tokens, the model {config.vocab_size}")
    metadata = {
        **metadata_of(config, path.stem),
        "general.file_type": FILE_TYPES[kind],
        **{f"diffusion.{theirs}": sampler[ours] for theirs, (_, ours) in SAMPLER.items() if ours in sampler},
        **tokenizer_of(config, vocabulary),
    }
    divisors = divisors_of(config)
    tensors = [PlannedBlocks(ROPE, "F32", tuple(divisors.shape), lambda: iter([encode("F32", divisors)]))]
    for theirs, ours, shape in tensor_table(config):
        entry = checkpoint.entries.get(ours)
        if entry is None or entry.shape != shape:
            there = "lacks it" if entry is None else f"has it as {list(entry.shape)}"
            raise InputError(f"{ours} of the shape {list(shape)} is needed; {checkpoint.path} {there}")
        stored = kind if not shape[-1] % KINDS[NUMBERS[kind]].values else "BF16"
        stored = "F32" if len(shape) == 1 or ours.endswith("router.proj.weight") else stored
        tensors.append(PlannedBlocks(theirs, stored, shape, partial(_parts, entry, stored)))
    write_file(path, metadata, tensors, progress)


def vocabulary_of(tokenizer: Tokenizer, template: str | None = None) -> StoredVocabulary:
    """A tokenizer as GGUF carries it, with the chat template that goes with it. InputError: none of Gemma's kind."""
    described = json.loads(tokenizer.to_json())
    model, added = described["model"], {token["content"]: token["id"] for token in described["added_tokens"]}
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise InputError(f"the tokenizer's model is {model['type']}; GGUF takes Gemma's, BPE with byte fallback")
    ids = {**model["vocab"], **added}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise InputError("the tokenizer's ids have gaps; GGUF takes them without")
    kinds_of = {f"<0x{value:02X}>": 6 for value in range(256)} | dict.fromkeys(added, 4)
    kinds_of |= {token: 3 for token in tokenizer.control_tokens if token not in _SHOWN}
    kinds = [kinds_of.get(token, 1) for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    named = {name: tokenizer.id(tokenizer.special.get(f"{name}_token", "")) for name in SPECIAL}
    return StoredVocabulary(tokens, kinds, merges, {name: at for name, at in named.items() if at is not None}, template)


def _parts(entry: Entry, kind: str) -> Iterator[Tensor]:
    step = max(1, PART // math.prod(entry.shape[1:]))
    for first in range(0, entry.shape[0], step):
        rows = entry.read(first, min(first + step, entry.shape[0])).reshape(-1, entry.shape[-1])
        for few in rows.split(max(1, CACHED // entry.shape[-1])):
            yield encode(kind, few)


def metadata_of(config: ModelConfig, name: str) -> dict[str, Any]:
    """What a file of this name says of the model itself."""
    full = next(layer for layer in config.layers if not layer.is_sliding)
    sliding = next((layer for layer in config.layers if layer.is_sliding), full)
    if sliding is not full and (sliding.rope.partial != 1 or sliding.rope.factor != 1):
        raise InputError("its sliding layers turn only a part of their angles, or by a factor; GGUF cannot say that")
    if config.is_leave_one_out:
        raise InputError(
            "it is a leave-one-out model, whose logits need a correction that no reader of GGUF applies; convert it to "
            "safetensors or MLX for use here"
        )
    numbers = {
        "block_count": len(config.layers),
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": [layer.kv_heads for layer in config.layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": [layer.is_sliding for layer in config.layers],
        "attention.shared_kv_layers": 0,
        "attention.layer_norm_rms_epsilon": config.eps,
        "attention.causal": False,
        "embedding_length_per_layer_input": 0,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k_experts,
        "expert_feed_forward_length": config.expert_size,
        "rope.freq_base": full.rope.theta,
        "rope.freq_base_swa": sliding.rope.theta,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "final_logit_softcapping": config.softcap,
    }
    general = {"architecture": NAME, "type": "model", "name": name, "quantization_version": 2}
    return {
        **{f"general.{key}": value for key, value in general.items()},
        **{f"{NAME}.{key}": value for key, value in numbers.items()},
        "diffusion.canvas_length": config.canvas_length,
    }


def divisors_of(config: ModelConfig) -> Tensor:
    """The tensor `rope_freqs`, [K / 2]: what divides each angle of a full layer."""
    full = next(layer for layer in config.layers if not layer.is_sliding)
    divisors = torch.full((full.head_dim // 2,), STILL)
    divisors[: int(full.rope.partial * full.head_dim // 2)] = full.rope.factor
    return divisors


def tokenizer_of(config: ModelConfig, vocabulary: StoredVocabulary | None) -> dict[str, Any]:
    """What a file says of the tokenizer.

    The ids that end an answer are written three times: all of them, and the two that llama.cpp has names for."""
    ids = {"padding_token_id": config.pad_id, "bos_token_id": config.bos_id}
    if config.eos_ids:
        ids["eos_token_id"] = config.eos_ids[0]
    values: dict[str, Any] = {"eos_token_ids": list(config.eos_ids)}
    if vocabulary:
        at = {token: vocabulary.tokens.index(token) for token in ("<turn|>", "<mask>") if token in vocabulary.tokens}
        ids |= {f"{SPECIAL[name]}_token_id": index for name, index in vocabulary.special.items()}
        if at.get("<turn|>") in config.eos_ids:
            ids["eot_token_id"] = at["<turn|>"]
        if "<mask>" in at:  # this model has no use for it, but some engines ask for it
            ids["mask_token_id"] = at["<mask>"]
        values |= {"model": "gemma4", "tokens": vocabulary.tokens, "token_type": vocabulary.kinds}
        values |= {"merges": vocabulary.merges, "add_bos_token": True, "add_space_prefix": False}
    values = {f"tokenizer.ggml.{key}": value for key, value in {**values, **ids}.items()}
    if vocabulary and vocabulary.template:
        values["tokenizer.chat_template"] = vocabulary.template
    return values
