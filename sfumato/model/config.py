"""ModelConfig: the model's numbers, frozen, read from a checkpoint's config.json and written back.

Both spellings in circulation load: the release's `global_head_dim` / `num_global_key_value_heads`, and the
`per_layer_config` that transformers 5.23 writes. A Gemma 4 config reads as the same model without a canvas. What the
engine cannot run exactly is refused by name, never guessed.
It lacks defaults on purpose: transformers' class defaults are not the released model's values. The sampler's values
come from generation_config.json, in the names that Options uses.
"""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.options import OPTIONS, Options

DIFFUSION, GEMMA4 = "diffusion_gemma", "gemma4"
"""What config.json calls the models that load."""
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer. `partial` is the share of the head's angles that turn at all."""

    theta: float
    partial: float = 1.0
    factor: float = 1.0
    proportional: bool = False


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer. `window` is None in full layers."""

    head_dim: int
    kv_heads: int
    window: int | None
    rope: Rope

    @property
    def is_sliding(self) -> bool:
        """Whether its attention has a window."""
        return self.window is not None


@dataclass(frozen=True)
class ModelConfig:
    """A DiffusionGemma's shape, or a Gemma 4's.

    Names are the field's common short ones; `from_dict` has the table."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_experts: int
    top_k_experts: int
    expert_size: int
    layers: tuple[LayerConfig, ...]
    canvas_length: int
    max_position: int
    eps: float = 1e-6
    softcap: float = 30.0
    pad_id: int = 0
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)
    has_head: bool = False
    """Whether logits are read out with a matrix of its own (`lm_head`) and not with the embedding."""
    is_diffusion: bool = True
    """False for Gemma 4: the model has no canvas and no self-conditioning, and writes one token after another; its
    `canvas_length` is only the slack of caches."""
    is_leave_one_out: bool = False
    """Its denoise logits say what a position is, judged by all the others: sampling adds what its own token says."""
    vision: dict[str, Any] = field(default_factory=dict, compare=False)
    """The vision part of config.json, untouched: kept so that a checkpoint survives the round trip."""

    @property
    def window(self) -> int:
        """The sliding window in tokens, the query itself included (0: no sliding layers)."""
        return max(layer.window or 0 for layer in self.layers)

    def check_canvas(self, what: str) -> None:
        """InputError where `what` needs a canvas and this model has none."""
        if not self.is_diffusion:
            raise InputError(
                f"{what} needs a canvas, and Gemma 4 has none; go without it in mode 'autoregressive', or load a "
                "DiffusionGemma checkpoint",
                option=what if what in OPTIONS else None,
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """From the parsed config.json of a `diffusion_gemma` or `gemma4` checkpoint.

        Raises CheckpointError naming the field, its value and what is supported."""
        model_type = raw.get("model_type")
        if model_type not in (DIFFUSION, GEMMA4):
            raise CheckpointError(
                f"{source} has model_type {_show(model_type)}; Sfumato loads {DIFFUSION!r} and {GEMMA4!r} checkpoints "
                "only"
            )
        is_diffusion = model_type == DIFFUSION
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise CheckpointError(f"{source} has no text_config; it is needed to build the model")
        if not is_diffusion:
            _check_gemma4(raw, text, source)
            text = {"final_logit_softcapping": None, **text}  # there absent is none, which is not supported
        get = _ConfigReader(text, source)
        _check_fixed(raw, text, source)
        kinds = _layer_kinds(text, get.whole("num_hidden_layers", limit=1000), source)
        overrides = _overrides(text, source)
        vocab_size = get.whole("vocab_size")
        config = cls(
            vocab_size=vocab_size,
            hidden_size=get.whole("hidden_size"),
            intermediate_size=get.whole("intermediate_size"),
            num_heads=get.whole("num_attention_heads"),
            num_experts=get.whole("num_experts"),
            top_k_experts=get.whole("top_k_experts"),
            expert_size=get.whole("moe_intermediate_size"),
            layers=tuple(_layer(get, i, kind, overrides) for i, kind in enumerate(kinds)),
            canvas_length=_ConfigReader(raw, source).whole("canvas_length", 256),
            max_position=get.whole("max_position_embeddings", 131072),
            eps=get.positive("rms_norm_eps", 1e-6),
            softcap=get.positive("final_logit_softcapping", 30.0),
            pad_id=(*_ids(text, "pad_token_id", vocab_size, source), 0)[0],
            bos_id=(*_ids(text, "bos_token_id", vocab_size, source), 2)[0],
            eos_ids=_ids({"eos_token_id": 1, **text}, "eos_token_id", vocab_size, source),
            has_head=not _tie(raw, source),
            is_diffusion=is_diffusion,
            is_leave_one_out=_ConfigReader(raw, source).flag(_LEAVE_ONE_OUT),
            vision={k: raw[k] for k in (_VISION if is_diffusion else _MEDIA) if k in raw},
        )
        _check_shapes(config, kinds, source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model, in the release's spelling; it loads in transformers too.

        `tie_word_embeddings` is true even with a head of its own: false would tell transformers that the encoder has
        weights of its own too, and a head that differs is taken as it is."""
        full = next(layer for layer in self.layers if not layer.is_sliding)
        sliding = next((layer for layer in self.layers if layer.is_sliding), full)
        text = {
            "model_type": f"{DIFFUSION if self.is_diffusion else GEMMA4}_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": sliding.kv_heads,
            "head_dim": sliding.head_dim,
            "global_head_dim": full.head_dim,
            "num_global_key_value_heads": full.kv_heads,
            "sliding_window": self.window or 512,
            "layer_types": [SLIDING if layer.is_sliding else FULL for layer in self.layers],
            "rope_parameters": {SLIDING: _rope_dict(sliding.rope), FULL: _rope_dict(full.rope)},
            "num_experts": self.num_experts,
            "top_k_experts": self.top_k_experts,
            "moe_intermediate_size": self.expert_size,
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.eps,
            "final_logit_softcapping": self.softcap,
            "pad_token_id": self.pad_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "use_bidirectional_attention": "vision",
            _TIE: True,
            **_FIXED,
        }
        if not self.is_diffusion:
            return {
                "architectures": ["Gemma4ForConditionalGeneration"],
                "model_type": GEMMA4,
                _TIE: True,
                "text_config": text | {name: supported for name, (_, supported, _) in _GEMMA4.items()},
                "vision_config": None,
                "audio_config": None,
                **self.vision,
            }
        vision = self.vision if isinstance(self.vision.get("vision_config"), dict) else {**self.vision, **_NO_VISION}
        return {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": DIFFUSION,
            "canvas_length": self.canvas_length,
            _TIE: True,
            "text_config": text,
            **({_LEAVE_ONE_OUT: True} if self.is_leave_one_out else {}),
            **vision,
        }

    @classmethod
    def from_file(cls, path: Path | str) -> ModelConfig:
        """From a config.json on disk; CheckpointError when it is absent, no JSON, or of another model."""
        return cls.from_dict(read_json(path), str(path))


def read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"cannot read {path}: it is not a file")
        with path.open("rb") as file:
            content = file.read(_JSON_BYTES + 1)
        if len(content) > _JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_JSON_BYTES >> 20} MiB, too large for a configuration")
        value = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_generation_config(folder: Path | str) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """`generation_values` of a folder's generation_config.json."""
    path = Path(folder) / "generation_config.json"
    return generation_values(read_json(path), str(path)) if path.exists() else ({}, None)


def generation_values(raw: dict[str, Any], path: str) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """What a generation_config says: sampler values under the names of Options, and the ids that end an answer.

    What is null or absent is left out (None for the ids), so is the whole file. max_new_tokens is ignored on purpose:
    the release's 256 would cap every answer at one canvas. CheckpointError names the field and its value."""
    sampler = raw.get("sampler_config")
    if sampler is not None:
        if not isinstance(sampler, dict) or sampler.get("_cls_name", _SAMPLER) != _SAMPLER:
            raise CheckpointError(f"{path}: sampler_config is {_show(sampler)}; only {_SAMPLER} is supported")
        raw = {**raw, "entropy_bound": sampler.get("entropy_bound")}
    values: dict[str, Any] = {}
    for theirs, ours in _GENERATION.items():
        if (value := raw.get(theirs)) is not None:
            if not isinstance(value, (int, float)):
                raise CheckpointError(f"{path}: {theirs} is {_show(value)}; it must be a number")
            try:
                Options.from_dict({ours: value})
            except InputError as error:
                raise CheckpointError(f"{path}: {theirs}{str(error).removeprefix(ours)}") from error
            values[ours] = value
    try:
        Options.from_dict(values)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return values, _ids(raw, "eos_token_id", _LIMIT, path) or None


_GENERATION = {
    "max_denoising_steps": "max_steps",
    "t_min": "t_min",
    "t_max": "t_max",
    "entropy_bound": "entropy_bound",
    "stability_threshold": "stability",
    "confidence_threshold": "confidence",
}
_SAMPLER = "EntropyBoundSamplerConfig"
_JSON_BYTES = 64 << 20


_FIXED = {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh"}
_TIE = "tie_word_embeddings"
_LEAVE_ONE_OUT = "sfumato_leave_one_out"
"""Our own key: other programs read past it."""
_PER_LAYER = ("head_dim", "num_key_value_heads")
_VISION = ("vision_config", "image_token_id", "boi_token_id", "eoi_token_id", "initializer_range")
_MEDIA = (*_VISION, "video_token_id", "audio_token_id", "boa_token_id", "eoa_token_index")
_GEMMA4: dict[str, tuple[Any, Any, str]] = {
    "hidden_size_per_layer_input": (256, 0, "per-layer embeddings"),
    "num_kv_shared_layers": (0, 0, "layers that share keys and values"),
    "use_double_wide_mlp": (False, False, "a wider feed-forward in some layers"),
    "enable_moe_block": (False, True, "layers without experts"),
    "attention_k_eq_v": (False, True, "full layers with values of their own"),
}
"""Of Gemma 4's family: what transformers takes where config.json is silent, what runs here, and what the rest has."""
_NO_VISION = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "position_embedding_size": 16,
    }
}
"""The least vision tower that transformers builds; without one it makes a large one of its own."""
_LIMIT = 1 << 24  # larger sizes are damage or malice, and would only fail later with less to say


@dataclass
class _ConfigReader:
    text: dict[str, Any]
    source: str

    def whole(self, name: str, default: int | None = None, limit: int = _LIMIT) -> int:
        value = self.text.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise CheckpointError(
                f"{self.source}: {name} is {_show(value)}; it must be a whole number from 1 to {limit}"
            )
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.text.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise CheckpointError(f"{self.source}: {name} is {_show(value)}; it must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.text.get(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {name} is {_show(value)}; it must be true or false")
        return value


def _check_fixed(raw: dict[str, Any], text: dict[str, Any], source: str) -> None:
    """CheckpointError for a field that has only one value here, and another one there."""
    for name, value in _FIXED.items():
        for part in (text, raw):
            if part.get(name, value) != value:
                raise CheckpointError(f"{source}: {name} is {_show(part[name])}; only {value!r} is supported")
    if text.get("use_bidirectional_attention") not in (None, "vision"):
        raise CheckpointError(
            f"{source}: use_bidirectional_attention is {_show(text['use_bidirectional_attention'])}; "
            "only 'vision' and null are supported"
        )


def _tie(raw: dict[str, Any], source: str) -> bool:
    """Whether logits are read out with the embedding; transformers looks at the outer word alone."""
    tie = raw.get(_TIE, True)
    if not isinstance(tie, bool):
        raise CheckpointError(f"{source}: {_TIE} is {_show(tie)}; it must be true or false")
    return tie


def _layer_kinds(text: dict[str, Any], count: int, source: str) -> list[str]:
    kinds = text.get("layer_types") or [SLIDING if (i + 1) % 6 else FULL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise CheckpointError(
            f"{source}: layer_types must name {count} layers, each {SLIDING!r} or {FULL!r}; it is {_show(kinds)}"
        )
    return [*kinds[:-1], FULL]  # the reference forces the last layer to full attention


def _check_shapes(config: ModelConfig, kinds: list[str], source: str) -> None:
    """CheckpointError for numbers that do not go together."""
    if config.top_k_experts > config.num_experts:
        raise CheckpointError(
            f"{source}: top_k_experts is {config.top_k_experts}, more than num_experts {config.num_experts}"
        )
    if len(set(config.layers)) > len(set(kinds)):
        raise CheckpointError(f"{source}: per_layer_config differs between layers of one kind, which is not supported")
    for layer in config.layers:
        if config.num_heads % layer.kv_heads or layer.head_dim % 2:
            raise CheckpointError(
                f"{source}: {config.num_heads} heads of {layer.head_dim} with {layer.kv_heads} key-value heads; "
                "heads must be a multiple of key-value heads, and the head size even"
            )


def _layer(get: _ConfigReader, index: int, kind: str, overrides: dict[int, dict[str, Any]] | None) -> LayerConfig:
    text, source = get.text, get.source
    head_dim, kv_heads = get.whole("head_dim"), get.whole("num_key_value_heads")
    if overrides is not None:
        own = _ConfigReader(overrides.get(index, {}), source)
        head_dim, kv_heads = own.whole("head_dim", head_dim), own.whole("num_key_value_heads", kv_heads)
    elif kind == FULL:
        head_dim = get.whole("global_head_dim", 512)
        if text.get("num_global_key_value_heads") is not None:
            kv_heads = get.whole("num_global_key_value_heads")
    return LayerConfig(
        head_dim=head_dim,
        kv_heads=kv_heads,
        window=get.whole("sliding_window") if kind == SLIDING else None,
        rope=_rope(text, kind, source),
    )


def _overrides(text: dict[str, Any], source: str) -> dict[int, dict[str, Any]] | None:
    """per_layer_config by layer, None where there is none.

    Null is an empty one: transformers then gives full layers the sizes of the others. It writes keys of one width, so
    that layer 5 of thirty is "05"."""
    if "per_layer_config" not in text:
        return None
    overrides = {} if text["per_layer_config"] is None else text["per_layer_config"]
    if not isinstance(overrides, dict) or not all(isinstance(value, dict) for value in overrides.values()):
        raise CheckpointError(f"{source}: per_layer_config must map layer numbers to objects")
    by_layer: dict[int, dict[str, Any]] = {}
    for key, changes in overrides.items():
        index = int(key) if re.fullmatch(r"[0-9]{1,9}", str(key), re.ASCII) else -1
        if not 0 <= index < text["num_hidden_layers"]:
            raise CheckpointError(
                f"{source}: per_layer_config names the layer {_show(key)}; there are the layers 0 to "
                f"{text['num_hidden_layers'] - 1}"
            )
        if index in by_layer:
            raise CheckpointError(f"{source}: per_layer_config names the layer {index} twice; one must go")
        for name, value in changes.items():
            if name not in _PER_LAYER and value != ([] if name == "skip" else text.get(name)):
                raise CheckpointError(
                    f"{source}: per_layer_config changes {_show(name)} in layer {index}; only head_dim and "
                    "num_key_value_heads may differ from layer to layer"
                )
        by_layer[index] = changes
    return by_layer


def with_every_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a checkpoint, as whoever reads it next understands it, one that loads here.

    Beside per_layer_config stand the two sizes of full layers that other engines read, and older transformers; and the
    tie is true, see `to_dict`."""
    text = dict(raw["text_config"])
    if "per_layer_config" in text:
        full = ModelConfig.from_dict(raw).to_dict()["text_config"]
        text |= {name: full[name] for name in ("global_head_dim", "num_global_key_value_heads")}
    return {**raw, _TIE: True, "text_config": text | ({_TIE: True} if _TIE in text else {})}


def _check_gemma4(raw: dict[str, Any], text: dict[str, Any], source: str) -> None:
    """CheckpointError for what the family has and 26B-A4B, DiffusionGemma's twin, has not."""
    for name, (absent, supported, what) in _GEMMA4.items():
        value = text.get(name, absent)
        if (value or 0) != supported:
            raise CheckpointError(
                f"{source}: {name} is {_show(value)} ({what}); of Gemma 4 only models like 26B-A4B are supported, "
                f"which have {supported!r}"
            )
    if raw.get("audio_config") is not None:
        raise CheckpointError(
            f"{source}: audio_config is {_show(raw['audio_config'])}; of Gemma 4 only models without audio are "
            "supported, like 26B-A4B"
        )


def _rope(text: dict[str, Any], kind: str, source: str) -> Rope:
    if text.get("rope_scaling") is not None:  # transformers puts it in the place of rope_parameters
        raise CheckpointError(
            f"{source}: rope_scaling is {_show(text['rope_scaling'])}; this model has rope_parameters, by kind of layer"
        )
    table = text.get("rope_parameters")
    if table is None:
        table = {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        }
    raw = table.get(kind) if isinstance(table, dict) else None
    name = raw.get("rope_type", raw.get("type", "default")) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or name not in ("default", "proportional"):
        raise CheckpointError(
            f"{source}: rope_parameters[{kind!r}] is {_show(raw)}; rope_type must be 'default' or 'proportional'"
        )
    if raw.get("rope_theta") is None:  # transformers has no value for it either, and fails
        raise CheckpointError(
            f"{source}: rope_parameters[{kind!r}] has no rope_theta; add the one that the model was trained with, as "
            f"the release has {10_000 if kind == SLIDING else 1_000_000}"
        )
    if text.get("partial_rotary_factor") is not None:  # of every kind that has none of its own
        raw = {"partial_rotary_factor": text["partial_rotary_factor"], **raw}
    get = _ConfigReader(raw, source)
    proportional = name == "proportional"
    partial = get.positive("partial_rotary_factor", 1.0)
    if partial > 1 or (partial != 1 and not proportional):
        raise CheckpointError(f"{source}: partial_rotary_factor is {partial}; it is supported up to 1, if proportional")
    factor = get.positive("factor", 1.0) if proportional else 1.0  # as in the reference, "default" has none
    return Rope(get.positive("rope_theta", 0.0), partial, factor, proportional)


def _rope_dict(rope: Rope) -> dict[str, Any]:
    if not rope.proportional:
        return {"rope_type": "default", "rope_theta": rope.theta}
    extra = {"factor": rope.factor} if rope.factor != 1 else {}
    return {"rope_type": "proportional", "rope_theta": rope.theta, "partial_rotary_factor": rope.partial, **extra}


def _ids(raw: dict[str, Any], name: str, limit: int, source: str) -> tuple[int, ...]:
    """One id or a list of them, each below `limit`; null and absent are none."""
    value = raw.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < limit for i in ids):
        raise CheckpointError(
            f"{source}: {name} is {_show(value)}; token ids must be whole numbers from 0 to {limit - 1}"
        )
    return ids


def _show(value: Any) -> str:
    """A value as an error quotes it: short, whatever the file holds."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
