"""NVIDIA Model Optimizer's checkpoints (quant_method "modelopt"): NVFP4, as NVIDIA publishes this model, and FP8.

Each quantised Linear, every expert one of its own, keeps `weight` (two e2m1 codes a byte, the even input low),
`weight_scale` (e4m3, 16 inputs each) and `weight_scale_2` (float32, the whole module): a weight is the product of the
three; FP8 has `weight` and `weight_scale` alone. The scales of activations and caches (`input_scale`, `k_scale`) are
left aside: what multiplies FP8 is rounded to it with a scale of each row, and all else is taken as it is. The other
algorithms differ in codes and scales (`linears`); where one scales a layer's inputs too (`pre_quant_scale`: AWQ), that
is made part of the weight, which is then rounded once more. It lacks SVDQuant: refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfumato.checkpoints.checkpoint import Checkpoint, FormatReader
from sfumato.checkpoints.formats.linears import open_linears
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.model.config import read_json

HF_CONFIG = "hf_quant_config.json"
"""Where modelopt says how weights are quantised, if config.json does not."""
ALGORITHMS = (
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ"),
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8"),
    *("W4A16_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL", "MIXED_PRECISION"),
)
"""Those that are read; modelopt spells some of them small."""


def open_modelopt(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """A modelopt folder, its headers checked; `config` is what config.json says.

    How it is quantised stands in config.json's quantization_config, or else in hf_quant_config.json. CheckpointError
    names an algorithm that is not read, or the tensor that is not as its layout has it."""
    quantization, source = config.get("quantization_config"), folder / "config.json"
    if quantization is None:
        source = folder / HF_CONFIG
        quantization = read_json(source).get("quantization")
    if isinstance(quantization, dict):
        # Older releases repeat the other file's content in config.json, a level down.
        quantization = quantization.get("quantization", quantization)
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{source} does not say how the weights are quantised; modelopt writes quant_algo there")
    layers = quantization.get("quantized_layers", {})
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise CheckpointError(f"{source}: quantized_layers must map names of layers to objects")
    for part in (quantization, *layers.values()):
        algorithm, group = part.get("quant_algo"), part.get("group_size")
        if not isinstance(algorithm, str) or algorithm.upper() not in ALGORITHMS:
            raise CheckpointError(
                f"{source}: quant_algo is {short(algorithm)}; of modelopt's this engine reads {', '.join(ALGORITHMS)}"
            )
        if group not in (None, 16) and "NVFP4" in algorithm:
            raise CheckpointError(f"{source}: group_size is {short(group)}; NVFP4 has groups of 16")
    return open_linears(folder, config, f"modelopt {quantization['quant_algo']}")


def _is_modelopt(folder: Path, quantization: dict[str, Any]) -> bool:
    if not quantization:
        return (folder / HF_CONFIG).exists()
    return quantization.get("quant_method") == "modelopt"


READER = FormatReader("modelopt", _is_modelopt, open_modelopt)
