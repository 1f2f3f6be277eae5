"""DiffusionGemma from a GGUF file: its names, numbers and vocabulary, each checked as it is read.

Names are `gguf_names`', the file's own layout is `gguf`'s, blocks of codes are `gguf_blocks`'. Source: llama.cpp's
converter and loader of this architecture. It lacks other architectures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, StoredVocabulary
from sfumato.checkpoints.formats.experts import joined
from sfumato.checkpoints.formats.gguf import Header, StoredBlocks, show
from sfumato.checkpoints.formats.gguf_blocks import PLAIN, decode, packed
from sfumato.checkpoints.formats.gguf_names import (
    EMBEDDING,
    EMBEDDING_OURS,
    EXPERTS_APART,
    GATE_UP,
    HEAD,
    NAME,
    OUTPUT,
    ROPE,
    SAMPLER,
    SPECIAL,
    STILL,
    tensor_table,
)
from sfumato.checkpoints.formats.gguf_split import read_parts
from sfumato.errors import CheckpointError
from sfumato.model.config import FULL, SLIDING, ModelConfig, generation_values
from sfumato.ops.packed import Packed


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a .gguf file, or in all parts of the set that it is one of, every number and shape checked.

    All kinds of `gguf_blocks` are read, in any mixture. CheckpointError says what is wrong."""
    keys = _Keys(read_parts(path))
    _check_is_model(keys)
    vocabulary = _vocabulary(keys)
    ends = _ends(keys, vocabulary)
    config = ModelConfig.from_dict(_config(keys, ends), str(path))
    entries: dict[str, Entry] = {}
    for theirs, ours, shape in tensor_table(config):
        if theirs not in keys.unread and GATE_UP in theirs and theirs.replace(GATE_UP, "ffn_gate_exps") in keys.unread:
            halves = (shape[0], shape[1] // 2, shape[2])
            gate, up = (_entry(keys, theirs.replace(GATE_UP, name), ours, halves) for name in EXPERTS_APART)
            entries[ours] = joined(ours, gate, up)
        else:
            entries[ours] = _entry(keys, theirs, ours, shape)
    if OUTPUT in keys.unread:
        entries[HEAD] = _entry(keys, OUTPUT, HEAD, entries[EMBEDDING_OURS].shape)
    keys.unread.pop(ROPE)
    if keys.unread:
        raise keys.wrong(f"it has an unexpected tensor {show(next(iter(keys.unread)))}")
    if vocabulary and len(vocabulary.tokens) > config.vocab_size:
        raise keys.wrong(f"it has {len(vocabulary.tokens)} tokens, but {config.vocab_size} rows of {EMBEDDING}")
    return Checkpoint(path, "GGUF", config.to_dict(), entries, _generation(keys, config), vocabulary)


def _check_is_model(keys: _Keys) -> None:
    """CheckpointError for a file that is no DiffusionGemma."""
    architecture, kind = keys.text("general.architecture"), keys.text("general.type")
    if kind == "adapter":
        raise keys.wrong(
            "it is a LoRA adapter and no model; load the model, and the adapter from the folder that peft wrote"
        )
    if architecture == "clip" or kind == "mmproj":
        raise keys.wrong(
            "it is the part of a model that sees images (mmproj); give the model's own .gguf. GGUF files of this model "
            "are read without images; the safetensors folder has its vision tower"
        )
    if kind == "imatrix" or architecture == "imatrix":
        raise keys.wrong("it is an importance matrix and no model; give the model's own .gguf")
    if architecture != NAME:
        other = "a Gemma 4 loads from its safetensors folder" if architecture == "gemma4" else "get that model's .gguf"
        raise keys.wrong(f"its architecture is {show(architecture)}; only {NAME!r} is read, {other}")


def _entry(keys: _Keys, theirs: str, ours: str, shape: tuple[int, ...]) -> Entry:
    """A tensor of the file under its released name; NVFP4's is multiplied by the factors that may lie beside it."""
    stored = keys.tensor(theirs)
    if stored.shape != shape:
        raise keys.wrong(f"{theirs} has the shape {list(stored.shape)}; its metadata asks for {list(shape)}")
    del keys.unread[theirs]
    factors = None
    if stored.kind == "NVFP4":
        base = stored.name.removesuffix("weight")
        keys.unread.pop(f"{base}input_scale", None)  # of what is multiplied, where that is rounded too
        factors = keys.unread.pop(f"{base}scale", None) if not _is_own(base) else None
    if factors is not None and (factors.kind, factors.shape) not in (("F32", (1,)), ("F32", stored.shape[:-2])):
        raise keys.wrong(
            f"{factors.name} is {factors.kind} of the shape {list(factors.shape)}; it must be F32 of one factor, or of "
            "one a matrix"
        )
    codes = partial(_packed, stored, factors) if stored.kind not in PLAIN else None
    return Entry(ours, shape, stored.nbytes, stored.kind, partial(_values, stored, factors), codes)


def _is_own(base: str) -> bool:
    """Whether a scale of this name is a tensor of the model itself."""
    return base.endswith(("ffn_gate_inp.", "ffn_down_exps."))


def _values(stored: StoredBlocks, factors: StoredBlocks | None, first: int, last: int) -> Tensor:
    if factors is not None:
        return _packed(stored, factors, first, last).dense()
    return decode(stored.kind, stored.read(first, last))


def _packed(stored: StoredBlocks, factors: StoredBlocks | None, first: int, last: int) -> Packed:
    weight = packed(stored.kind, stored.read(first, last))
    if stored.kind != "NVFP4":
        return weight
    each = torch.ones(1) if factors is None else decode("F32", factors.read())
    if len(each) > 1:
        each = each[first:last, None]
    return replace(weight, factor=each.expand(weight.shape[:-1]).contiguous())


class _Keys:
    """The metadata by the names of this architecture, each value checked as it is taken."""

    def __init__(self, header: Header) -> None:
        self.path, self.metadata = header.path, header.metadata
        self.unread = dict(header.tensors)

    def wrong(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def tensor(self, name: str) -> StoredBlocks:
        if name not in self.unread:
            raise self.wrong(f"it lacks the tensor {name}")
        return self.unread[name]

    def full(self, key: str) -> str:
        return key if key.split(".")[0] in _FAMILIES else f"{NAME}.{key}"

    def any(self, key: str) -> Any:
        return self.metadata.get(self.full(key))

    def text(self, key: str) -> str | None:
        value = self.any(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(f"{self.full(key)} is {show(value)}; it must be text")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.any(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise self.wrong(f"{self.full(key)} is {show(value)}; it must be a whole number from 0 to 2^31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that means it: 1e-06, not 9.999999974752427e-07."""
        value = self.any(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(f"{self.full(key)} is {show(value)}; it must be a number")
        if isinstance(value, int):
            return value
        if abs(value) > np.finfo(np.float32).max:
            raise self.wrong(f"{self.full(key)} is {value}; it must be a float32")
        return float(str(np.float32(value)))

    def each(self, key: str, count: int) -> list[int]:
        """One whole number a layer: an array, or one for all."""
        value = self.any(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "bui":
            if len(value) != count:
                raise self.wrong(f"{self.full(key)} has {len(value)} entries; {count} are needed")
            return [int(one) for one in value]
        return [self.whole(key)] * count

    def only(self, key: str, numbers: list[int]) -> int:
        """The number that all of some layers share."""
        if len(set(numbers)) != 1:
            raise self.wrong(f"{self.full(key)} differs between layers of one kind, which is not supported")
        return numbers[0]

    def strings(self, key: str) -> list[str]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.wrong(f"{self.full(key)} is {show(value)}; it must be an array of strings")
        return value


_FAMILIES = ("general", "tokenizer", "diffusion")


def _config(keys: _Keys, ends: list[int]) -> dict[str, Any]:
    """What config.json would say."""
    for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input"):
        if keys.whole(key, 0):
            raise keys.wrong(f"{key} is {keys.whole(key)}; only 0 is supported")
    if keys.text("rope.scaling.type") not in (None, "none"):
        raise keys.wrong(f"rope.scaling.type is {show(keys.text('rope.scaling.type'))}; only 'none' is supported")
    count = keys.whole("block_count")
    if not 1 <= count <= 1000:
        raise keys.wrong(f"block_count is {count}; it must be a number from 1 to 1000")
    attention = _attention(keys, count)
    embedding = keys.tensor(EMBEDDING)
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.only("feed_forward_length", keys.each("feed_forward_length", count)),
        "num_hidden_layers": count,
        **attention,
        "num_experts": keys.whole("expert_count"),
        "top_k_experts": keys.whole("expert_used_count"),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": keys.number("final_logit_softcapping"),
        "pad_token_id": keys.whole("tokenizer.ggml.padding_token_id", 0),
        "bos_token_id": keys.whole("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": ends or None,
        "use_bidirectional_attention": "vision",
    }
    canvas = keys.whole("diffusion.canvas_length")
    return {"model_type": "diffusion_gemma", "canvas_length": canvas, "text_config": text}


def _attention(keys: _Keys, count: int) -> dict[str, Any]:
    """The part of config.json's text_config about attention, of so many layers."""
    slides = keys.each("attention.sliding_window_pattern", count)
    if slides[-1]:
        raise keys.wrong("its last layer is a sliding one; the last layer of this model is always full")
    heads_of = keys.each("attention.head_count_kv", count)
    head = {
        kind: _head_size(keys, suffix)
        for kind, suffix in ((FULL, ""), (SLIDING, "_swa"))
        if kind == FULL or any(slides)
    }
    shared = {
        kind: keys.only(
            "attention.head_count_kv", [n for n, slide in zip(heads_of, slides, strict=True) if slide == sliding]
        )
        for kind, sliding in ((FULL, 0), (SLIDING, 1))
        if kind in head
    }
    full_rope = {"rope_type": "proportional", "rope_theta": keys.number("rope.freq_base")}
    return {
        "num_attention_heads": keys.only("attention.head_count", keys.each("attention.head_count", count)),
        "num_key_value_heads": shared.get(SLIDING, shared[FULL]),
        "head_dim": head.get(SLIDING, head[FULL]),
        "global_head_dim": head[FULL],
        "num_global_key_value_heads": shared[FULL],
        "sliding_window": keys.whole("attention.sliding_window", 0 if any(slides) else 1),
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
            FULL: {**full_rope, **_turning(keys, head[FULL])},
        },
    }


def _head_size(keys: _Keys, suffix: str) -> int:
    """The size of a head, which keys, values and rope must agree on."""
    size = keys.whole(f"attention.key_length{suffix}")
    for key in (f"attention.value_length{suffix}", f"rope.dimension_count{suffix}"):
        if keys.whole(key, size) != size:
            raise keys.wrong(f"{key} is {keys.whole(key)}, but attention.key_length{suffix} is {size}")
    return size


def _turning(keys: _Keys, head: int) -> dict[str, float]:
    """Which angles of a full layer turn, out of their divisors: the first ones, all by one divisor."""
    stored = keys.tensor(ROPE)
    if stored.shape != (head // 2,) or stored.kind != "F32":
        raise keys.wrong(f"{ROPE} is {stored.kind} of the shape {list(stored.shape)}; it must be F32 of {[head // 2]}")
    divisors = decode("F32", stored.read())
    factor, still = divisors[0].item(), divisors >= STILL / 10
    count = len(divisors) - int(still.sum())
    if not count or not factor > 0 or not still[count:].all() or not (divisors[:count] == factor).all():
        raise keys.wrong(f"{ROPE} must hold one divisor for the angles that turn, then {STILL:g}")
    share = 2 * count / head
    if int(share * head // 2) != count:  # rounded down to the angle before
        share = math.nextafter(share, 2)
    return {"partial_rotary_factor": share, **({"factor": factor} if factor != 1 else {})}


def _vocabulary(keys: _Keys) -> StoredVocabulary | None:
    if keys.any("tokenizer.ggml.tokens") is None:
        return None
    model = keys.text("tokenizer.ggml.model")
    if model != "gemma4":
        raise keys.wrong(f"its tokenizer is {show(model)}; only 'gemma4' is read")
    tokens, merges = keys.strings("tokenizer.ggml.tokens"), keys.strings("tokenizer.ggml.merges")
    kinds = keys.each("tokenizer.ggml.token_type", len(tokens))
    special = {}
    for name, theirs in SPECIAL.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if keys.any(key) is not None:
            special[name] = keys.whole(key)
            if special[name] >= len(tokens):
                raise keys.wrong(f"{key} is {special[name]}, but there are {len(tokens)} tokens")
    return StoredVocabulary(tokens, kinds, merges, special, keys.text("tokenizer.chat_template"))


_ENDINGS = ("<turn|>", "<|tool_response>")
"""Tokens that end an answer whether or not the metadata says so, as in llama.cpp."""


def _ends(keys: _Keys, vocabulary: StoredVocabulary | None) -> list[int]:
    """The ids that end an answer. Their array is what some engines write beside the one id that llama.cpp reads."""
    array = keys.any("tokenizer.ggml.eos_token_ids")
    if array is not None:
        if np.size(array) > 100:
            raise keys.wrong(f"tokenizer.ggml.eos_token_ids has {np.size(array)} entries; at most 100 are allowed")
        return list(dict.fromkeys(keys.each("tokenizer.ggml.eos_token_ids", np.size(array))))
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [keys.whole(name) for name in names if keys.any(name) is not None]
    if vocabulary:
        ids += [vocabulary.tokens.index(token) for token in _ENDINGS if token in vocabulary.tokens]
    return list(dict.fromkeys(ids))


def _generation(keys: _Keys, config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json would say."""
    values: dict[str, Any] = {"pad_token_id": config.pad_id, "bos_token_id": config.bos_id}
    if config.eos_ids:
        values["eos_token_id"] = list(config.eos_ids)
    for theirs, (ours, _) in SAMPLER.items():
        if keys.any(f"diffusion.{theirs}") is not None:
            values[ours] = keys.number(f"diffusion.{theirs}")
    if "entropy_bound" in values:
        values["sampler_config"] = {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": values.pop("entropy_bound"),
        }
    generation_values(values, str(keys.path))  # refused now, if at all
    return values
