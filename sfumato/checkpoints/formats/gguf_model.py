"""DiffusionGemma in GGUF (architecture `diffusion-gemma`): its names, numbers and vocabulary, read and written.

One table gives every tensor's name in GGUF, its released name and its shape, for the reader and the writer alike. Norms
are stored as they are (Gemma 3's converter added one, Gemma 4's does not), queries and keys are not permuted, and the
output matrix is the embedding. The partial turning of the full layers is a tensor of divisors, `rope_freqs`: 1 where an
angle turns and 1e30 where it stands still. Source: llama.cpp's converter and loader of this architecture.

It lacks the vision tower, which these files do not have, experts whose gate and up are two tensors (the converter never
writes them), and the K kinds when writing: llama-quantize makes these well, from what is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, Vocabulary
from sfumato.checkpoints.formats.gguf import Header, Planned, Stored, read_header, show, write_file
from sfumato.checkpoints.formats.gguf_blocks import KINDS, NUMBERS, PLAIN, decode, encode, packed
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import FULL, SLIDING, ModelConfig, generation_values, read_generation_config
from sfumato.ops.packed import Packed
from sfumato.text.tokenizer import Tokenizer

NAME = "diffusion-gemma"
FILE_TYPES = {"Q8_0": 7, "BF16": 32}
"""What `write_gguf` writes, and llama.cpp's number of it."""
PART, CACHED = 16 << 20, 1 << 19
"""Values that are read at once, 64 MB in float32, and those that are converted at once, while they are in the cache."""
STILL = 1e30
"""The divisor of an angle that does not turn."""
ROPE = "rope_freqs.weight"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


def tensor_table(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """GGUF's name, the released name and the shape of every tensor but `rope_freqs`."""
    width, inner, expert, count = config.hidden_size, config.intermediate_size, config.expert_size, config.num_experts
    yield "token_embd.weight", "model.decoder.embed_tokens.weight", (config.vocab_size, width)
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


# ---- read -----------------------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a .gguf file, every number and shape checked; CheckpointError says what is wrong.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, F16, BF16 and F32 are read, in any mixture."""
    header = read_header(path)
    keys = _Keys(header)
    architecture = keys.text("general.architecture")
    if architecture != NAME:
        raise keys.wrong(f"its architecture is {show(architecture)}; only {NAME!r} is read")
    vocabulary = _vocabulary(keys)
    ends = _ends(keys, vocabulary)
    config = ModelConfig.from_dict(_config(keys, ends), str(path))
    entries: dict[str, Entry] = {}
    for theirs, ours, shape in tensor_table(config):
        stored = keys.tensor(theirs)
        if stored.shape != shape:
            raise keys.wrong(f"{theirs} has the shape {list(stored.shape)}; its metadata asks for {list(shape)}")
        codes = partial(_packed, stored) if stored.kind not in PLAIN else None
        entries[ours] = Entry(ours, shape, stored.nbytes, stored.kind, partial(_values, stored), codes)
        del keys.unread[theirs]
    notices: tuple[str, ...] = ()
    if keys.unread.pop(OUTPUT, None):
        notices = (f"{path} has an output matrix of its own; it is left aside, the embedding is used for both",)
    keys.unread.pop(ROPE)
    if keys.unread:
        raise keys.wrong(f"it has an unexpected tensor {show(next(iter(keys.unread)))}")
    if vocabulary and len(vocabulary.tokens) > config.vocab_size:
        raise keys.wrong(f"it has {len(vocabulary.tokens)} tokens, but {config.vocab_size} rows of {EMBEDDING}")
    return Checkpoint(path, "GGUF", config.to_dict(), entries, _generation(keys, config), vocabulary, notices)


def _values(stored: Stored, first: int, last: int) -> Tensor:
    return decode(stored.kind, stored.read(first, last))


def _packed(stored: Stored, first: int, last: int) -> Packed:
    return packed(stored.kind, stored.read(first, last))


class _Keys:
    """The metadata by the names of this architecture, each value checked as it is taken."""

    def __init__(self, header: Header) -> None:
        self.path, self.metadata = header.path, header.metadata
        self.unread = dict(header.tensors)

    def wrong(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def tensor(self, name: str) -> Stored:
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

    def only(self, key: str, found: list[int]) -> int:
        """The number that all of some layers share."""
        if len(set(found)) != 1:
            raise self.wrong(f"{self.full(key)} differs between layers of one kind, which is not supported")
        return found[0]

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
    embedding = keys.tensor(EMBEDDING)
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.only("feed_forward_length", keys.each("feed_forward_length", count)),
        "num_hidden_layers": count,
        "num_attention_heads": keys.only("attention.head_count", keys.each("attention.head_count", count)),
        "num_key_value_heads": shared.get(SLIDING, shared[FULL]),
        "head_dim": head.get(SLIDING, head[FULL]),
        "global_head_dim": head[FULL],
        "num_global_key_value_heads": shared[FULL],
        "sliding_window": keys.whole("attention.sliding_window", 0 if any(slides) else 1),
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": keys.number("rope.freq_base"),
                **_turning(keys, head[FULL]),
            },
        },
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


def _vocabulary(keys: _Keys) -> Vocabulary | None:
    if keys.any("tokenizer.ggml.tokens") is None:
        return None
    model = keys.text("tokenizer.ggml.model")
    if model != "gemma4":
        raise keys.wrong(f"its tokenizer is {show(model)}; only 'gemma4' is read")
    tokens, merges = keys.strings("tokenizer.ggml.tokens"), keys.strings("tokenizer.ggml.merges")
    kinds = keys.each("tokenizer.ggml.token_type", len(tokens))
    special = {}
    for name, theirs in _SPECIAL.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        if keys.any(key) is not None:
            special[name] = keys.whole(key)
            if special[name] >= len(tokens):
                raise keys.wrong(f"{key} is {special[name]}, but there are {len(tokens)} tokens")
    return Vocabulary(tokens, kinds, merges, special, keys.text("tokenizer.chat_template"))


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_SHOWN = frozenset('<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'.split())
"""Control tokens that llama.cpp wants as user defined: its own parser of answers has to see them."""
_ENDINGS = ("<turn|>", "<|tool_response>")
"""Tokens that end an answer whether or not the metadata says so, as in llama.cpp."""


def _ends(keys: _Keys, vocabulary: Vocabulary | None) -> list[int]:
    """The ids that end an answer. Their array is what some engines write beside the one id that llama.cpp reads."""
    given = keys.any("tokenizer.ggml.eos_token_ids")
    if given is not None:
        if np.size(given) > 100:
            raise keys.wrong(f"tokenizer.ggml.eos_token_ids has {np.size(given)} entries; at most 100 are allowed")
        return list(dict.fromkeys(keys.each("tokenizer.ggml.eos_token_ids", np.size(given))))
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    found = [keys.whole(name) for name in names if keys.any(name) is not None]
    if vocabulary:
        found += [vocabulary.tokens.index(token) for token in _ENDINGS if token in vocabulary.tokens]
    return list(dict.fromkeys(found))


_SAMPLER = {
    "eb_max_steps": ("max_denoising_steps", "max_steps"),
    "eb_t_min": ("t_min", "t_min"),
    "eb_t_max": ("t_max", "t_max"),
    "eb_entropy_bound": ("entropy_bound", "entropy_bound"),
    "eb_stability_threshold": ("stability_threshold", "stability"),
    "eb_confidence_threshold": ("confidence_threshold", "confidence"),
}
"""GGUF's names of the sampler's numbers, generation_config's, and those of Options."""


def _generation(keys: _Keys, config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json would say."""
    found: dict[str, Any] = {"pad_token_id": config.pad_id, "bos_token_id": config.bos_id}
    if config.eos_ids:
        found["eos_token_id"] = list(config.eos_ids)
    for theirs, (ours, _) in _SAMPLER.items():
        if keys.any(f"diffusion.{theirs}") is not None:
            found[ours] = keys.number(f"diffusion.{theirs}")
    if "entropy_bound" in found:
        found["sampler_config"] = {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": found.pop("entropy_bound"),
        }
    generation_values(found, str(keys.path))  # refused now, if at all
    return found


# ---- write ----------------------------------------------------------------------------------------------------------


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    kind: str = "Q8_0",
    vocabulary: Vocabulary | None = None,
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
        **_metadata(config, path.stem),
        "general.file_type": FILE_TYPES[kind],
        **{f"diffusion.{theirs}": sampler[ours] for theirs, (_, ours) in _SAMPLER.items() if ours in sampler},
        **_tokenizer(config, vocabulary),
    }
    divisors = _divisors(config)
    tensors = [Planned(ROPE, "F32", tuple(divisors.shape), lambda: iter([encode("F32", divisors)]))]
    for theirs, ours, shape in tensor_table(config):
        entry = checkpoint.entries.get(ours)
        if entry is None or entry.shape != shape:
            there = "lacks it" if entry is None else f"has it as {list(entry.shape)}"
            raise InputError(f"{ours} of the shape {list(shape)} is needed; {checkpoint.path} {there}")
        stored = kind if not shape[-1] % KINDS[NUMBERS[kind]].values else "BF16"
        stored = "F32" if len(shape) == 1 or ours.endswith("router.proj.weight") else stored
        tensors.append(Planned(theirs, stored, shape, partial(_parts, entry, stored)))
    write_file(path, metadata, tensors, progress)


def vocabulary_of(tokenizer: Tokenizer, template: str | None = None) -> Vocabulary:
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
    named = {name: tokenizer.id(tokenizer.special.get(f"{name}_token", "")) for name in _SPECIAL}
    return Vocabulary(tokens, kinds, merges, {name: at for name, at in named.items() if at is not None}, template)


def _parts(entry: Entry, kind: str) -> Iterator[Tensor]:
    step = max(1, PART // math.prod(entry.shape[1:]))
    for first in range(0, entry.shape[0], step):
        rows = entry.read(first, min(first + step, entry.shape[0])).reshape(-1, entry.shape[-1])
        for few in rows.split(max(1, CACHED // entry.shape[-1])):
            yield encode(kind, few)


def _metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    full = next(layer for layer in config.layers if not layer.is_sliding)
    sliding = next((layer for layer in config.layers if layer.is_sliding), full)
    if sliding is not full and (sliding.rope.partial != 1 or sliding.rope.factor != 1):
        raise InputError("its sliding layers turn only a part of their angles, or by a factor; GGUF cannot say that")
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


def _divisors(config: ModelConfig) -> Tensor:
    full = next(layer for layer in config.layers if not layer.is_sliding)
    divisors = torch.full((full.head_dim // 2,), STILL)
    divisors[: int(full.rope.partial * full.head_dim // 2)] = full.rope.factor
    return divisors


def _tokenizer(config: ModelConfig, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The ids that end an answer are written three times: all of them, and the two that llama.cpp has names for."""
    ids = {"padding_token_id": config.pad_id, "bos_token_id": config.bos_id}
    if config.eos_ids:
        ids["eos_token_id"] = config.eos_ids[0]
    found: dict[str, Any] = {"eos_token_ids": list(config.eos_ids)}
    if vocabulary:
        at = {token: vocabulary.tokens.index(token) for token in ("<turn|>", "<mask>") if token in vocabulary.tokens}
        ids |= {f"{_SPECIAL[name]}_token_id": index for name, index in vocabulary.special.items()}
        if at.get("<turn|>") in config.eos_ids:
            ids["eot_token_id"] = at["<turn|>"]
        if "<mask>" in at:  # this model has no use for it, but some engines ask for it
            ids["mask_token_id"] = at["<mask>"]
        found |= {"model": "gemma4", "tokens": vocabulary.tokens, "token_type": vocabulary.kinds}
        found |= {"merges": vocabulary.merges, "add_bos_token": True, "add_space_prefix": False}
    found = {f"tokenizer.ggml.{key}": value for key, value in {**found, **ids}.items()}
    if vocabulary and vocabulary.template:
        found["tokenizer.chat_template"] = vocabulary.template
    return found
