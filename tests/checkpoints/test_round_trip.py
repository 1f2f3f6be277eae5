"""checkpoints/convert.py: a model of the release's pattern, saved by transformers, as every target and back.

As many layers, experts and chosen experts as the release has, and a tower, all of them thin. What is written is read
by what it was written for: transformers, the gguf package, mlx, compressed-tensors.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from reference_passes import CLOSE, Passes, furthest, load_theirs, passes_of
from safetensors.torch import load_file
from torch import Tensor

from sfumato.checkpoints.contents import entries_of
from sfumato.checkpoints.convert import convert
from sfumato.checkpoints.detect import open_checkpoint
from sfumato.checkpoints.load import PLAIN, load
from sfumato.checkpoints.locate import NANO
from sfumato.checkpoints.names import VISION, released_name
from sfumato.checkpoints.targets import TARGETS
from sfumato.model.config import LayerConfig, ModelConfig, Rope

SLIDE, FULL = LayerConfig(16, 2, 8, Rope(1e4)), LayerConfig(32, 1, None, Rope(1e6, 0.25, 1.0, True))
THIN: ModelConfig = tiny.tiny_config(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    num_experts=128,
    top_k_experts=8,
    expert_size=16,
    layers=(*[SLIDE] * 5, FULL) * 5,
    vision={**tiny.VISION, "image_token_id": 511},
)
ROUNDING = {  # by how much a value may move, as a part of the largest in its row
    **{"int8": 2**-7, "fp8": 2**-4, "int4": 2**-2, "int4-fp8": 2**-2, "nvfp4": 2**-2, "int4-small": 2**-2},
    **{"bf16": 0.0, "gguf-bf16": 0.0, "gguf-q8_0": 2**-7},
    **{"compressed-fp8": 2**-4, "mlx-mxfp4": 2**-2},
    **{f"mlx-{bits}bit": 2.0 ** (2 - bits) for bits in (3, 4, 5, 6, 8)},
}


@dataclass(frozen=True)
class Thin:
    folder: Path
    theirs: Any
    expected: Passes
    values: dict[str, Tensor]
    """By our names."""


def values_of(path: Path) -> dict[str, Tensor]:
    entries = entries_of(open_checkpoint(path), lambda sentence: None)
    return {name: entry.read(0, entry.shape[0]).float() for name, entry in entries.items()}


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Thin]:
    """In bfloat16, with nano's tokenizer."""
    folder = tmp_path_factory.mktemp("thin")
    with tiny.one_thread():
        theirs = tiny.oracle(THIN, 4, mix=0.3)
        for name, scalar in theirs.named_buffers():
            if name.endswith("layer_scalar"):  # thirty of them multiply: nearer to one, rounding stays rounding
                scalar.pow_(0.1)
        theirs.bfloat16().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(NANO / name, folder / name)
        theirs = load_theirs(folder)
        yield Thin(folder, theirs, passes_of(theirs), values_of(folder))


def test_the_thin_model_is_the_release_in_small(thin: Thin) -> None:
    raw = json.loads((thin.folder / "config.json").read_text())["text_config"]
    assert list(raw["per_layer_config"]) == ["05", "11", "17", "23", "29"] and "global_head_dim" not in raw
    assert (raw["num_hidden_layers"], raw["num_experts"], raw["top_k_experts"]) == (30, 128, 8)
    assert any(name.startswith("model.encoder.vision_tower.") for name in open_checkpoint(thin.folder).entries)


@pytest.mark.parametrize("name", tiny.OPS)
def test_it_runs_as_there(thin: Thin, name: str) -> None:
    """Encode, denoise, and with soft embeddings of one step and of two."""
    ours = load(thin.folder, replace(PLAIN, dtype="float32", ops=name))
    assert furthest(ours, thin.theirs, thin.expected) < CLOSE


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_and_back(thin: Thin, to: str, tmp_path: Path) -> None:
    """Values within the format's rounding, the same in bf16 again; of what is exact the same logits in transformers."""
    target = tmp_path / ("thin.gguf" if to.startswith("gguf") else to)
    convert(thin.folder, to, target)
    values = values_of(target)
    assert values.keys() == thin.values.keys()
    for name, value in values.items():
        moved = (value - thin.values[name]).abs()
        allowed = ROUNDING[to] * thin.values[name].abs().amax(-1, keepdim=True)
        assert bool((moved <= allowed + 1e-12).all()), f"{name} by {float(moved.max())}"
    convert(target, "bf16", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name for name in back if not name.startswith(VISION)} == {released_name(name) for name in values}
    for name, value in values.items():
        assert torch.equal(back[released_name(name)], value.bfloat16()), name
    raw = json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]
    assert (raw["global_head_dim"], raw["num_global_key_value_heads"]) == (32, 1)
    if ROUNDING[to] == 0:  # of the others the names and values above say all that there is to say
        again = passes_of(load_theirs(tmp_path / "back"))
        assert max(float((again[name] - thin.expected[name]).abs().max()) for name in again) < CLOSE
    if reader := READERS.get(to.split("-")[0]):
        reader(target, values)


def read_by_gguf(path: Path, ours: dict[str, Tensor]) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(theirs) == len(ours) + 1  # rope_freqs
    for name in ("ffn_gate_up_exps", "attn_q"):
        tensor = theirs[f"blk.29.{name}.weight"]
        own = "experts.gate_up_proj" if "exps" in name else "self_attn.q_proj.weight"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, ours[f"layers.29.{own}"].numpy())


def read_by_mlx(path: Path, ours: dict[str, Tensor]) -> None:
    """As mlx-vlm does: sizes of full layers from config.json, and mlx's own unpacking."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    raw = json.loads((path / "config.json").read_text())
    assert (raw["text_config"]["global_head_dim"], raw["text_config"]["num_global_key_value_heads"]) == (32, 1)
    tensors = mx.load(str(path / "model.safetensors"))
    for module, own in (
        ("model.decoder.embed_tokens", "embed_tokens.weight"),
        ("model.decoder.layers.29.self_attn.q_proj", "layers.29.self_attn.q_proj.weight"),
    ):
        how = raw["quantization"].get(module, raw["quantization"])
        mode = {"mode": "affine"} | {name: how[name] for name in ("group_size", "bits", "mode") if name in how}
        parts = [tensors[f"{module}.{part}"] for part in ("scales", "biases") if f"{module}.{part}" in tensors]
        if mode["mode"] == "affine":
            parts = [part.astype(mx.float32) for part in parts]
        values = mx.dequantize(tensors[f"{module}.weight"], *parts, **mode).astype(mx.float32)
        assert np.array_equal(np.array(values), ours[own].numpy())


def read_by_compressed_tensors(path: Path, ours: dict[str, Tensor]) -> None:
    """The library's own unpacking, with the scheme that config.json names."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.quantization.lifecycle.forward import dequantize
    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    tensors = load_file(path / "model.safetensors")
    module = "model.decoder.layers.29.self_attn.q_proj.weight"
    values = dequantize(tensors[module], tensors[f"{module}_scale"].float(), args=scheme.weights)
    assert torch.equal(values.float(), ours["layers.29.self_attn.q_proj.weight"])


READERS = {"gguf": read_by_gguf, "mlx": read_by_mlx, "compressed": read_by_compressed_tensors}
