"""model/config.py: config.json in every spelling and generation_config.json; hostile values; the released size."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released_config import RELEASED

from sfumato import ops
from sfumato.checkpoints.names import released_name
from sfumato.errors import CheckpointError
from sfumato.model.config import (
    FULL,
    SLIDING,
    LayerConfig,
    ModelConfig,
    Rope,
    read_generation_config,
    read_json,
    with_every_spelling,
)
from sfumato.model.network import Model
from sfumato.options import FALLBACK_DEFAULTS

GENERATION: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
}


def released(**changes: Any) -> dict[str, Any]:
    """The released config with changes to its text_config; a value of ... takes the field away."""
    raw: dict[str, Any] = json.loads(json.dumps(RELEASED))
    text = raw["text_config"] | changes
    raw["text_config"] = {name: value for name, value in text.items() if value is not ...}
    return raw


def without_global(**changes: Any) -> dict[str, Any]:
    return released(global_head_dim=..., num_global_key_value_heads=..., **changes)


# ---- config.json ----------------------------------------------------------------------------------------------------


def test_released() -> None:
    config = ModelConfig.from_dict(RELEASED)
    sliding = LayerConfig(256, 8, 1024, Rope(1e4))
    full = LayerConfig(512, 2, None, Rope(1e6, partial=0.25, proportional=True))
    assert config.layers == ((sliding,) * 5 + (full,)) * 5
    assert [i for i, layer in enumerate(config.layers) if not layer.is_sliding] == [5, 11, 17, 23, 29]
    assert (config.hidden_size, config.intermediate_size, config.expert_size) == (2816, 2112, 704)
    assert (config.num_heads, config.num_experts, config.top_k_experts) == (16, 128, 8)
    assert (config.vocab_size, config.canvas_length, config.max_position) == (262144, 256, 262144)
    assert (config.pad_id, config.bos_id, config.eos_ids) == (0, 2, (1,))
    assert (config.softcap, config.eps, config.window) == (30.0, 1e-6, 1024)
    assert config.vision["vision_config"] == RELEASED["vision_config"]


def test_spellings_agree() -> None:
    config = ModelConfig.from_dict(RELEASED)
    own = {"head_dim": 512, "num_key_value_heads": 2}
    for index in (str, int, "{:02}".format, "{:03}".format):  # the third is what transformers writes of thirty layers
        per_layer: dict[Any, Any] = {index(i): own for i in (5, 11, 17, 23, 29)}
        raw = without_global(per_layer_config=per_layer)
        assert ModelConfig.from_dict(raw) == config
        again = with_every_spelling(raw)["text_config"]
        assert (again["global_head_dim"], again["num_global_key_value_heads"]) == (512, 2)
        assert again["per_layer_config"] == per_layer and ModelConfig.from_dict(with_every_spelling(raw)) == config
    # Where both are given, per_layer_config is what transformers goes by.
    both = released(per_layer_config={str(i): {"head_dim": 64} for i in (5, 11, 17, 23, 29)})
    assert ModelConfig.from_dict(both).layers[5] == replace(config.layers[5], head_dim=64, kv_heads=8)
    assert ModelConfig.from_dict(released(per_layer_config={})).layers[5].head_dim == 256
    assert ModelConfig.from_dict(released(per_layer_config=None)).layers[5].head_dim == 256
    same = {str(i): {**own, "sliding_window": 1024, "skip": []} for i in (5, 11, 17, 23, 29)}
    assert ModelConfig.from_dict(without_global(per_layer_config=same)) == config  # what repeats the rest says nothing
    # Where neither is, transformers' own values hold.
    assert ModelConfig.from_dict(without_global()).layers[5] == replace(config.layers[5], kv_heads=8)
    assert ModelConfig.from_dict(released(layer_types=None)) == config
    assert (
        ModelConfig.from_dict(released(layer_types=[*RELEASED["text_config"]["layer_types"][:-1], SLIDING])) == config
    )


def test_round_trip() -> None:
    config = ModelConfig.from_dict(RELEASED)
    again = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(again) == config
    dropped = {"dtype"}
    assert {name: value for name, value in RELEASED.items() if name not in dropped} == again
    for eos_ids in ((1,), (1, 106), ()):
        assert ModelConfig.from_dict(replace(config, eos_ids=eos_ids).to_dict()).eos_ids == eos_ids
    scaled = replace(config.layers[5], rope=Rope(500.0, partial=0.5, factor=2.0, proportional=True))
    only_full = replace(config, layers=(scaled, scaled))
    assert ModelConfig.from_dict(only_full.to_dict()) == only_full


@pytest.mark.parametrize("vision", [{}, {"vision_config": None}, {"image_token_id": 5}])
def test_a_small_vision_tower_where_there_is_none(vision: dict[str, Any]) -> None:
    """transformers would build a large one of its own."""
    raw = replace(ModelConfig.from_dict(RELEASED), vision=vision).to_dict()
    assert raw["vision_config"]["num_hidden_layers"] == 1
    assert raw.get("image_token_id") == vision.get("image_token_id")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": ...}, "vocab_size is None"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"hidden_size": 2816.0}, r"hidden_size is 2816\.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": "x" * 10_000}, "hidden_size is 'xxx.*'"),
        ({"num_hidden_layers": 1001, "layer_types": None}, "num_hidden_layers is 1001; .* from 1 to 1000"),
        ({"num_hidden_layers": 31}, "layer_types must name 31 layers"),
        ({"layer_types": 30}, "layer_types must name 30 layers"),
        ({"layer_types": {"a": 1}}, "layer_types must name 30 layers"),
        ({"layer_types": [["x"]] * 30}, "layer_types must name 30 layers"),
        ({"layer_types": "x" * 30}, "layer_types must name 30 layers"),
        ({"num_key_value_heads": 3}, "heads must be a multiple"),
        ({"head_dim": 255}, "head size even"),
        ({"top_k_experts": 129}, "top_k_experts is 129, more than num_experts 128"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping is None"),
        ({"final_logit_softcapping": 10**400}, "final_logit_softcapping is 1000"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'; only 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"rope_parameters": []}, r"rope_parameters\['sliding_attention'\] is None"),
        ({"rope_parameters": {}}, r"rope_parameters\['sliding_attention'\] is None"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, r"rope_parameters\['full_attention'\] is None"),
        ({"rope_parameters": {SLIDING: {"rope_type": "yarn"}, FULL: {}}}, "rope_type must be"),
        ({"rope_parameters": {SLIDING: {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            "rope_scaling is .*; this model has rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; it is supported up to 1, if proportional"),
        ({"rope_parameters": {SLIDING: {}, FULL: {"rope_theta": 1e6}}}, r"\['sliding_attention'\] has no rope_theta"),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": 1e4}, FULL: {"rope_type": "proportional"}}},
            r"\['full_attention'\] has no rope_theta; add the one .* 1000000",
        ),
        ({"rope_parameters": {SLIDING: {"rope_theta": "1"}, FULL: {}}}, "rope_theta is '1'"),
        ({"per_layer_config": [1]}, "per_layer_config must map"),
        ({"per_layer_config": {"5": 1}}, "per_layer_config must map"),
        ({"per_layer_config": {"5": {"head_dim": -1}}}, "head_dim is -1"),
        ({"per_layer_config": {"5": {"sliding_window": 1}}}, "changes 'sliding_window' in layer 5"),
        ({"per_layer_config": {"5": {"skip": ["mlp"]}}}, "changes 'skip' in layer 5"),
        ({"per_layer_config": {"5": {}, "05": {}}}, "names the layer 5 twice"),
        ({"per_layer_config": {"30": {}}}, "names the layer '30'; there are the layers 0 to 29"),
        ({"per_layer_config": {"-1": {}}}, "names the layer '-1'"),
        ({"per_layer_config": {"5.0": {}}}, r"names the layer '5\.0'"),
        ({"per_layer_config": {"٥": {}}}, "names the layer '٥'"),
        ({"per_layer_config": {"0" * 10_000: {}}}, "names the layer '000"),
        ({"per_layer_config": {"5": {"head_dim": 64}}}, "differs between layers of one kind"),
        ({"pad_token_id": -1}, "pad_token_id is -1; token ids must be whole numbers from 0 to 262143"),
        ({"pad_token_id": "0"}, "pad_token_id is '0'"),
        ({"bos_token_id": 262144}, "bos_token_id is 262144"),
        ({"bos_token_id": 2.0}, r"bos_token_id is 2\.0"),
        ({"eos_token_id": [1, 262144]}, r"eos_token_id is \[1, 262144\]"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}"),
        ({"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\]"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        ModelConfig.from_dict(released(**changes), "folder/config.json")
    assert str(caught.value).startswith("folder/config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_the_reference_takes_for_rope() -> None:
    """Absent and null are its defaults; a partial factor that is absent is 1; `type` is an older word for rope_type."""
    config = ModelConfig.from_dict(RELEASED)
    assert ModelConfig.from_dict(released(rope_parameters=...)) == config
    assert ModelConfig.from_dict(released(rope_parameters=None)) == config
    full = {"type": "proportional", "rope_theta": 5e5}
    both = {SLIDING: {"rope_theta": 7.0, "partial_rotary_factor": 1.0}, FULL: full}
    other = ModelConfig.from_dict(released(rope_parameters=both))
    assert other.layers[5].rope == Rope(5e5, proportional=True) and other.layers[0].rope == Rope(7.0)
    outer = ModelConfig.from_dict(released(rope_parameters=both, partial_rotary_factor=0.5, rope_scaling=None))
    assert outer.layers[5].rope == Rope(5e5, 0.5, proportional=True) and outer.layers[0].rope == Rope(7.0)


def test_a_head_of_its_own() -> None:
    """The outer word counts, as in transformers; what is written says tied, since false would untie the encoder too."""
    config = ModelConfig.from_dict({**RELEASED, "tie_word_embeddings": False})
    assert config.has_head and not ModelConfig.from_dict(released(tie_word_embeddings=False)).has_head
    raw = config.to_dict()
    assert raw["tie_word_embeddings"] is raw["text_config"]["tie_word_embeddings"] is True
    untied = {**released(tie_word_embeddings=False), "tie_word_embeddings": False}
    again = with_every_spelling(untied)
    assert again["tie_word_embeddings"] is again["text_config"]["tie_word_embeddings"] is True


def test_null_ids() -> None:
    config = ModelConfig.from_dict(released(pad_token_id=None, bos_token_id=None, eos_token_id=None))
    assert (config.pad_id, config.bos_id, config.eos_ids) == (0, 2, ())
    assert ModelConfig.from_dict(released(eos_token_id=...)).eos_ids == (1,)
    assert ModelConfig.from_dict(released(pad_token_id=7, eos_token_id=[262143, 0])).eos_ids == (262143, 0)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, "has model_type None; Sfumato loads 'diffusion_gemma'"),
        ({"model_type": ["x" * 999] * 999}, r"has model_type \["),
        ({"model_type": "diffusion_gemma"}, "has no text_config"),
        ({"model_type": "diffusion_gemma", "text_config": []}, "has no text_config"),
        ({**RELEASED, "canvas_length": 0}, "canvas_length is 0"),
        ({**RELEASED, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
    ],
)
def test_refused_outside_of_text_config(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        ModelConfig.from_dict(raw)
    assert len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*RELEASED["text_config"], "per_layer_config"]), JSON, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_value_is_understood_or_refused(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict(released(**changes))
    except CheckpointError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a":' * 200_000, "is nested too deeply"),
        (b" " * (64 << 20) + b"{}", "is larger than 64 MiB"),
    ],
)
def test_hostile_json(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {sentence}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    path.unlink()


def test_json_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.json: No such file"):
        read_json(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(CheckpointError, match=r"cannot read .*: it is not a file"):
            read_json(path)
    (tmp_path / "a.json").write_text('{"ü": 1}', encoding="utf-8")
    assert read_json(str(tmp_path / "a.json")) == {"ü": 1}


# ---- generation_config.json -----------------------------------------------------------------------------------------


def generation(folder: Path, value: Any) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    (folder / "generation_config.json").write_text(json.dumps(value))
    return read_generation_config(folder)


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == ({}, None)
    values, eos_ids = generation(tmp_path, GENERATION)
    assert values == FALLBACK_DEFAULTS  # which has the release's values; max_new_tokens is no part of them
    assert eos_ids == (1, 106, 50)
    assert generation(tmp_path, dict.fromkeys(GENERATION)) == ({}, None)  # as transformers writes what is not set
    assert generation(tmp_path, {"entropy_bound": 0.3, "eos_token_id": 7}) == ({"entropy_bound": 0.3}, (7,))
    nested = {"entropy_bound": 0.3, "sampler_config": {"entropy_bound": 0.2}}
    assert generation(tmp_path, nested)[0] == {"entropy_bound": 0.2}
    assert generation(tmp_path, {"eos_token_id": [], "unknown": [1]}) == ({}, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_denoising_steps": 0}, "max_denoising_steps is 0; give a number from 1 to 4096"),
        ({"max_denoising_steps": 4.5}, r"max_denoising_steps is 4\.5; give a whole number"),
        ({"max_denoising_steps": True}, "max_denoising_steps is True"),
        ({"max_denoising_steps": "x" * 9999}, "max_denoising_steps is 'xx"),
        ({"t_min": -1}, "t_min is -1"),
        ({"t_max": float("nan")}, "t_max is nan"),
        ({"t_max": [0.5]}, r"t_max is \[0\.5\]; it must be a number"),
        ({"t_min": 0.9}, r"t_min is 0\.9, above t_max 0\.8"),
        ({"stability_threshold": 1.5}, r"stability_threshold is 1\.5"),
        ({"confidence_threshold": float("inf")}, "confidence_threshold is inf"),
        ({"sampler_config": 3}, "sampler_config is 3"),
        ({"sampler_config": {"_cls_name": "Other"}}, "sampler_config is {'_cls_name': 'Other'}; only EntropyBound"),
        ({"sampler_config": {"entropy_bound": -0.1}}, r"entropy_bound is -0\.1"),
        ({"sampler_config": {"entropy_bound": {}}}, "entropy_bound is {}"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id is \[1, -1\]"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\]"),
    ],
)
def test_hostile_generation_config(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {sentence}") as caught:
        generation(tmp_path, {**GENERATION, **changes})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_generation_config_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json must hold a JSON object"):
        generation(tmp_path, [1])


# ---- the true size --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_meta() -> dict[str, tuple[int, ...]]:
    """Name -> shape of what transformers would save of the released model: no tied copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    vision = {
        **RELEASED["vision_config"],
        **{"intermediate_size": 4304, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72},
        "standardize": True,
    }
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(DiffusionGemmaConfig(**{**RELEASED, "vision_config": vision}))
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_true_size(on_meta: dict[str, tuple[int, ...]]) -> None:
    """Exactly the released names and shapes, and 25.2 B parameters (25.25, of which self-conditioning is 0.018)."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(RELEASED), ops.load("reference"))
    ours = {released_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    is_vision = {name: ".vision_tower." in name or ".embed_vision." in name for name in on_meta}
    theirs = {name: shape for name, shape in on_meta.items() if not is_vision[name]}
    assert ours == theirs
    assert len(ours) == 691
    assert sum(p.numel() for p in model.parameters()) == count(theirs) - 60  # 60 layer scalars are buffers
    assert count(theirs) - 60 == 25_250_986_752
    assert len(on_meta) == 1047  # the release's number, vision included
