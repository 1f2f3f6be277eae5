"""checkpoints/detect.py: files as other tools write them load and say what transformers says, or get one sentence.

The kinds of files are those that were found in the wild, or that a tool's own source says it writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reference_passes import CLOSE, Passes, furthest, load_theirs, passes_of
from safetensors.torch import save_file
from torch import Tensor

from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.save import save
from sfumato.errors import CheckpointError
from sfumato.model.config import LayerConfig, ModelConfig, Rope
from sfumato.model.network import Model

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
Tensors = dict[str, Tensor]
SLIDE, FULL = LayerConfig(16, 2, 6, Rope(1e4)), LayerConfig(32, 1, None, Rope(1e6, 0.25, 1.0, True))
CONFIG: ModelConfig = tiny.tiny_config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_heads=2,
    num_experts=4,
    expert_size=32,
    layers=(SLIDE, SLIDE, FULL, SLIDE, FULL),
    vision={**tiny.VISION, "image_token_id": 63},
)


@dataclass(frozen=True)
class Released:
    """A small model of transformers', and what the release would hold of it."""

    theirs: Any
    expected: Passes
    tensors: Tensors
    raw: dict[str, Any]

    def write(self, folder: Path, tensors: Tensors, raw: dict[str, Any] | None = None) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(raw or self.raw))
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder


@pytest.fixture(scope="module")
def one() -> Released:
    with tiny.one_thread():
        theirs = tiny.oracle(CONFIG, 1)
        expected = passes_of(theirs)
    tensors = {
        name: tensor
        for name, tensor in theirs.state_dict().items()
        if name != "lm_head.weight" and (not name.startswith(ENCODER) or name.endswith("layer_scalar"))
    }
    return Released(theirs, expected, tensors, CONFIG.to_dict())


def opened(folder: Path, notices: list[str] | None = None) -> Model:
    return load(folder, replace(PLAIN, dtype="float32", ops="reference"), notice=(notices or []).append)


def copies(tensors: Tensors) -> Tensors:
    """What the encoder shares, under its own names."""
    return {
        name.replace(DECODER, ENCODER): tensor
        for name, tensor in tensors.items()
        if name.startswith(DECODER) and "self_conditioning" not in name and not name.endswith("layer_scalar")
    }


def mlx_name(name: str) -> str:
    """Stacks of experts are modules there, with a weight."""
    return f"{name}.weight" if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else name


def moved(tensors: Tensors, fits: Callable[[str], bool]) -> Tensors:
    """Tied tensors, on the encoder's side alone."""
    shared = {name: tensor for name, tensor in copies(tensors).items() if fits(name)}
    gone = {name.replace(ENCODER, DECODER) for name in shared}
    return {name: tensor for name, tensor in tensors.items() if name not in gone} | shared


def of_each_expert(tensors: Tensors) -> Tensors:
    """A matrix an expert, as tools that quantise Linear modules make of the stacks."""
    apart: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            apart[name] = tensor
            continue
        prefix, _, stack = name.rpartition(".")
        kinds = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
        for expert, matrix in enumerate(tensor):
            for kind, part in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                apart[f"{prefix}.{expert}.{kind}.weight"] = part
    return apart


HEAD = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
SAME: dict[str, Callable[[Tensors], Tensors]] = {
    "as released": lambda t: t,
    "all copies": lambda t: t | copies(t) | {"lm_head.weight": t[DECODER + "embed_tokens.weight"]},
    "the encoder's side alone (GPTQModel)": lambda t: moved(t, lambda name: True),
    "the encoder's router scales (AutoRound)": lambda t: moved(
        t, lambda name: name.endswith(("router.scale", "per_expert_scale"))
    ),
    "lm_head for the embedding": lambda t: {
        ("lm_head.weight" if name == DECODER + "embed_tokens.weight" else name): tensor for name, tensor in t.items()
    },
    "names without model. (AutoModel)": lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()},
    "data parallel": lambda t: {"module." + name: tensor for name, tensor in t.items()},
    "compiled": lambda t: {"_orig_mod." + name: tensor for name, tensor in t.items()},
    "Gemma 4's prefix": lambda t: {name.replace(DECODER, "model.language_model."): x for name, x in t.items()},
    "mlx-vlm's prefix": lambda t: {name.replace(DECODER, "language_model.model."): x for name, x in t.items()},
    "mlx-vlm, unquantised": lambda t: {mlx_name(name): tensor for name, tensor in t.items()},
    "a matrix an expert": of_each_expert,
    "vision as Gemma 4 names it": lambda t: {name.replace("model.encoder.v", "model.v"): x for name, x in t.items()},
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_model_in_other_files(one: Released, kind: str, tmp_path: Path) -> None:
    folder = one.write(tmp_path, SAME[kind](one.tensors))
    assert furthest(opened(folder), one.theirs, one.expected) < CLOSE


def test_transformers_own_save_of_ten_layers_and_more(tmp_path: Path) -> None:
    """Its per_layer_config has keys of one width."""
    theirs = tiny.oracle(replace(CONFIG, layers=(*[SLIDE] * 5, FULL) * 2), 2)
    theirs.save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())["text_config"]["per_layer_config"]
    assert list(keys) == ["05", "11"]
    assert furthest(opened(tmp_path), theirs) < CLOSE


def test_transformers_own_config_of_a_hundred_layers(tmp_path: Path) -> None:
    from transformers import DiffusionGemmaConfig

    config = replace(CONFIG, layers=(*[SLIDE] * 5, FULL) * 17)
    DiffusionGemmaConfig(**config.to_dict()).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert list(raw["text_config"]["per_layer_config"])[:2] == ["005", "011"]
    assert ModelConfig.from_dict(raw) == config


def test_a_model_saved_without_its_head(one: Released, tmp_path: Path) -> None:
    one.theirs.model.save_pretrained(tmp_path)
    assert furthest(opened(tmp_path), one.theirs, one.expected) < CLOSE


def test_two_files_and_an_index_over_both(one: Released, tmp_path: Path) -> None:
    """AutoRound's way: model.safetensors has what it touched."""
    folder = one.write(tmp_path, one.tensors)
    extra = {
        name: tensor for name, tensor in one.tensors.items() if name.endswith(("embed_tokens.weight", "norm.weight"))
    }
    rest = {name: tensor for name, tensor in one.tensors.items() if name not in extra}
    save_file(rest, folder / "model.safetensors")
    save_file(extra, folder / "model_extra_tensors.safetensors")
    files = {"model.safetensors": rest, "model_extra_tensors.safetensors": extra}
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert furthest(opened(folder), one.theirs, one.expected) < CLOSE
    # An index of an older save, which names other files, is not looked at.
    one.write(tmp_path, one.tensors)
    stale = {"weight_map": dict.fromkeys(one.tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    assert furthest(opened(folder), one.theirs, one.expected) < CLOSE


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_of_its_own(one: Released, tmp_path: Path, is_tied: bool) -> None:
    tensors = one.tensors | copies(one.tensors) | {"lm_head.weight": HEAD}
    folder = one.write(tmp_path, tensors, {**one.raw, "tie_word_embeddings": is_tied})
    theirs = load_theirs(folder)
    expected = passes_of(theirs)
    assert float((expected["first"] - one.expected["first"]).abs().max()) > 1
    ours = opened(folder)
    assert furthest(ours, theirs, expected) < CLOSE
    save(ours, tmp_path / "saved")
    convert(folder, "bf16", tmp_path / "bf16")
    assert furthest(ours, load_theirs(tmp_path / "saved")) < CLOSE
    assert furthest(opened(tmp_path / "bf16"), load_theirs(tmp_path / "bf16")) < CLOSE


def test_encoder_weights_of_their_own_are_refused(one: Released, tmp_path: Path) -> None:
    own = {name: tensor.flip(0) for name, tensor in copies(one.tensors).items() if name.endswith("o_proj.weight")}
    folder = one.write(tmp_path, one.tensors | own)
    theirs = load_theirs(folder)
    assert float((passes_of(theirs)["first"] - one.expected["first"]).abs().max()) > 1, "the reference runs them"
    with pytest.raises(CheckpointError, match=r"o_proj\.weight and .* differ: encoder and decoder were trained apart"):
        opened(folder)


def test_a_rope_without_theta_is_refused_as_there(one: Released) -> None:
    from transformers import DiffusionGemmaConfig

    raw = json.loads(json.dumps(one.raw))
    del raw["text_config"]["rope_parameters"]["full_attention"]["rope_theta"]
    with pytest.raises(KeyError, match="rope_theta"):
        DiffusionGemmaConfig(**raw)
    with pytest.raises(CheckpointError, match="has no rope_theta"):
        ModelConfig.from_dict(raw)


def test_gate_and_up_in_different_bits(one: Released, tmp_path: Path) -> None:
    """OptiQ's way with MLX: the gate in 4 bits, up in 8."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    settings: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
    stored: Tensors = {}
    dense = dict(one.theirs.state_dict())
    for name, tensor in one.tensors.items():
        if not name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")) or "vision" in name:
            stored[mlx_name(name)] = tensor
            continue
        module, bits = name.removesuffix(".weight"), 4 if "gate" in name else 8
        codes, *rest = mx.quantize(mx.array(tensor.numpy()), group_size=32, bits=bits)
        values = mx.dequantize(codes, *rest, group_size=32, bits=bits)
        for twin in (name, name.replace(DECODER, ENCODER)):
            dense[twin] = torch.from_numpy(array_of(values))
        stored[name] = torch.from_numpy(array_of(codes).view("int32")).view(torch.uint32)
        stored |= {
            f"{module}.{part}": torch.from_numpy(array_of(x))
            for part, x in zip(("scales", "biases"), rest, strict=True)
        }
        settings[module] = {"bits": bits, "group_size": 32}
    folder = one.write(tmp_path, stored, {**one.raw, "quantization": settings})
    theirs = tiny.oracle(CONFIG, 1)
    theirs.load_state_dict(dense)
    assert furthest(opened(folder), theirs) < CLOSE


@pytest.mark.parametrize("place", ["beside null", "in text_config"])
def test_where_a_quantisation_is_described(one: Released, tmp_path: Path, place: str) -> None:
    """quantization_config null says nothing; tools that quantise the text model alone say it in text_config."""
    name = "model.decoder.layers.0.mlp.gate_proj"
    codes, scale = torch.arange(64).repeat(64, 1).byte(), torch.full((64, 1), 0.5)
    if place == "in text_config":
        mode = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
        raw = {**one.raw, "text_config": {**one.raw["text_config"], "quantization_config": mode}}
        parts = {"weight": codes.view(torch.int8), "weight_scale": scale}
    else:
        raw = {**one.raw, "quantization_config": None, "quantization": {"bits": 8, "group_size": 64}}
        parts = {"weight": codes.view(torch.uint32), "scales": scale, "biases": torch.zeros(64, 1)}
    plain = {key: tensor for key, tensor in one.tensors.items() if not key.startswith(name)}
    folder = one.write(tmp_path, {**plain, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}, raw)
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.entries[f"{name}.weight"].read(0, 64), codes * 0.5)
    convert(checkpoint, "bf16", tmp_path / "bf16")
    assert "quantization" not in (tmp_path / "bf16" / "config.json").read_text()


def array_of(array: Any) -> Any:
    import numpy as np

    return np.array(array)
