"""compressed-tensors, what llm-compressor writes and vLLM serves: read in its dense formats, written as FP8-dynamic.

Each quantised Linear, every expert one of its own, keeps its codes and scales under its own name (`linears`).
quantization_config in config.json says how activations are to be quantised too; that is left aside: what multiplies FP8
is rounded to it a row at a time, as FP8-dynamic has it, and all else is taken as it is. It lacks what changes a weight
beyond codes, scales and the order of inputs (sparsity, rotations), 6-bit floats, and Marlin's layout: each is refused
by name. Source: the library compressed-tensors, 0.20.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.eight_bits import BlockSize
from sfumato.checkpoints.formats.linears import open_linears
from sfumato.checkpoints.formats.released import FLOATS
from sfumato.checkpoints.shards import DTYPES, PART, Planned, Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import BLOCK

FORMATS: dict[str, tuple[str, tuple[int, ...]]] = {  # each with the type and the bits of its weights
    "float-quantized": ("float", (8,)),
    "naive-quantized": ("float", (8,)),
    "int-quantized": ("int", (8,)),
    "pack-quantized": ("int", (4, 8, 2, 3, 5, 6, 7)),
    "nvfp4-pack-quantized": ("float", (4,)),
    "mxfp4-pack-quantized": ("float", (4,)),
    "mxfp8-quantized": ("float", (8,)),
}
_FP8 = ("float-quantized", "naive-quantized")
"""Formats of e4m3 weights."""
LARGEST = 1 << 16
"""Outputs and inputs of a block."""
_REORDERED = ("group", "dynamic", True)
"""What `actorder` says where inputs are not in the order of their groups."""

# ---- reading --------------------------------------------------------------------------------------------------------


def open_compressed(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose quant_method is "compressed-tensors"; headers alone are read.

    `config` is what config.json says. CheckpointError names a format that is not read, or the tensor that is not as its
    layout has it."""
    quantization, source = config.get("quantization_config"), folder / "config.json"
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{source} has no quantization_config, an object that says how the weights are stored")
    label = quantization.get("format")
    schemes = _schemes(label if label == "mixed-precision" else _one_of(label, source), quantization, source)
    blocks = {one["block_structure"] for one in schemes if one["block_structure"] is not None}
    if len(blocks) > 1:
        raise CheckpointError(f"{source}: config_groups has several values of block_structure; one alone is read")
    is_reordered = any(one.get("actorder") in _REORDERED for one in schemes)

    def own(stored: dict[str, Stored]) -> dict[str, Entry]:
        if is_reordered and not any(name.endswith(".weight_g_idx") for name in stored):
            raise CheckpointError(f"{source} says that inputs are reordered (actorder); {folder} lacks weight_g_idx")
        return {}

    notices = []
    if any(one["is_fp8"] and not one["has_activations"] for one in schemes):
        notices.append(
            f"{source} has FP8 weights and activations in full (W8A16); a product with FP8 rounds both of its sides"
        )
    if quantization.get("kv_cache_scheme"):
        notices.append(f"{source} asks for a quantised cache (kv_cache_scheme); it is left aside")
    block = blocks.pop() if blocks else (BLOCK, BLOCK)
    return open_linears(folder, config, f"compressed-tensors {label}", notices, block, own)


def _is_compressed(folder: Path, quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") == "compressed-tensors"


READER = FormatReader("compressed-tensors", _is_compressed, open_compressed)


def _one_of(label: Any, source: Path) -> str:
    if not isinstance(label, str) or label not in FORMATS:
        raise CheckpointError(
            f"{source}: the compressed-tensors format {short(label)} is not read; {', '.join(FORMATS)} are"
        )
    return str(label)


def _schemes(label: str, quantization: dict[str, Any], source: Path) -> list[dict[str, Any]]:
    """How the groups of weights are stored, each with block_structure as two numbers, or None; and of activations.

    Refuses what would make codes and scales mean something else than `linears` takes them for."""
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise CheckpointError(f"{source}: quantization_status is {short(status)}; only 'compressed' weights are read")
    for part in ("transform_config", "sparsity_config"):
        value = quantization.get(part) or {}
        if not isinstance(value, dict) or (value and value.get("format") != "dense"):
            raise CheckpointError(f"{source}: {part} is {short(value)}; weights that need it cannot be read")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError(f"{source}: config_groups is {short(groups)}; it must map names to schemes")
    schemes = []
    for name, group in groups.items():
        if isinstance(group, list):  # a scheme by the library's own name; the tensors say which
            continue
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{source}: the group {short(name)} of config_groups does not say how weights are")
        own = group.get("format") or label
        kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
        known = [FORMATS[_one_of(own, source)]] if own != "mixed-precision" else FORMATS.values()
        if not any(kind == one and bits in widths for one, widths in known):
            raise CheckpointError(
                f"{source}: the group {short(name)} has weights of type {short(kind)} with {short(bits)} bits, in the "
                f"format {own}; read are " + ", ".join(f"{key} of {b[0]} bits ({t})" for key, (t, b) in FORMATS.items())
            )
        schemes.append({
            **weights,
            "block_structure": block_of(weights.get("block_structure"), source),
            "is_fp8": own in _FP8,
            "has_activations": group.get("input_activations") is not None,
        })  # fmt: skip
    return schemes


def block_of(value: Any, source: Path, key: str = "block_structure") -> BlockSize | None:
    """The block that a config names, [outputs, inputs] or "128x128"; None for none. CheckpointError for another."""
    if value is None:
        return None
    sizes = value.split("x") if isinstance(value, str) else value
    if isinstance(sizes, list) and len(sizes) == 2 and all(re.fullmatch("[0-9]{1,5}", str(size)) for size in sizes):
        outputs, inputs = (int(size) for size in sizes)
        if 0 < outputs <= LARGEST and 0 < inputs <= LARGEST:
            return outputs, inputs
    raise CheckpointError(f"{source}: {key} is {short(value)}; it must be two numbers from 1 to {LARGEST}")


# ---- writing --------------------------------------------------------------------------------------------------------

_LAYER = r"model\.(?:decoder|encoder\.language_model)\.layers\.\d+\."
_LINEAR = re.compile(_LAYER + r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight", re.ASCII)
_EXPERTS = re.compile(rf"({_LAYER}experts)\.(gate_up|down)_proj", re.ASCII)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def plan_compressed(checkpoint: Checkpoint) -> tuple[list[Planned], dict[str, Any]]:
    """The tensors of an FP8-dynamic checkpoint, and the entries that config.json needs for them.

    These are `quantization_config`, and `dtype` where it is not there yet. Every Linear of the layers, each expert's
    too, has e4m3 codes and a bfloat16 scale an output; what vLLM and the library leave as it is (embeddings, router,
    self-conditioning, norms, vision) keeps its dtype, bfloat16 where it had none of its own. One matrix is in float32
    at a time. CheckpointError, while writing: a weight that is not finite."""
    entries = checkpoint.entries

    @lru_cache(maxsize=1)  # a matrix's codes and scales are asked for one after the other
    def quantised(name: str, expert: int | None) -> dict[str, Tensor]:
        entry = entries[name]
        if expert is None:
            return _quantised(name.removesuffix("weight"), entry.read(0, entry.shape[0]))
        weight = entry.read(expert, expert + 1)[0]
        prefix, _, stack = name.rpartition(".")
        kinds = ("gate", "up") if stack == "gate_up_proj" else ("down",)
        parts: dict[str, Tensor] = {}
        for kind, part in zip(kinds, weight.chunk(len(kinds)), strict=True):
            parts |= _quantised(f"{prefix}.{expert}.{kind}_proj.", part)
        return parts

    planned: list[Planned] = []
    for name, entry in entries.items():
        if (match := _EXPERTS.fullmatch(name)) and len(entry.shape) == 3:
            count, rows, columns = entry.shape
            kinds = ("gate", "up") if match[2] == "gate_up" else ("down",)
            for expert in range(count):
                for kind in kinds:
                    prefix = f"{match[1]}.{expert}.{kind}_proj."
                    planned += _module(prefix, rows // len(kinds), columns, partial(quantised, name, expert))
        elif _LINEAR.fullmatch(name) and len(entry.shape) == 2:
            planned += _module(name.removesuffix("weight"), *entry.shape, partial(quantised, name, None))
        else:
            planned.append(_same(entry))
    changes: dict[str, Any] = {"quantization_config": _quantization_config()}
    if not checkpoint.config.get("dtype") and not checkpoint.config.get("torch_dtype"):
        changes["dtype"] = "bfloat16"
    return planned, changes


def _module(prefix: str, rows: int, columns: int, tensors: Callable[[], dict[str, Tensor]]) -> list[Planned]:
    def part(name: str) -> Iterator[Tensor]:
        yield tensors()[name]

    codes, scale = f"{prefix}weight", f"{prefix}weight_scale"
    return [
        Planned(codes, "F8_E4M3", (rows, columns), partial(part, codes)),
        Planned(scale, "BF16", (rows, 1), partial(part, scale)),
    ]


def _quantised(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    """Codes and scales [O, 1] of a weight [O, I].

    The scale is rounded to bfloat16, as readers in that dtype will, before the codes are made for it."""
    weight = weight.float()
    peak = weight.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(peak).all()):
        raise CheckpointError(f"{prefix}weight has weights that are not finite numbers; FP8 cannot hold it")
    scale = (peak / _LARGEST).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, 1)
    codes = (weight / scale.float()).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return {f"{prefix}weight": codes, f"{prefix}weight_scale": scale}


def _same(entry: Entry) -> Planned:
    dtype = entry.stored if entry.stored in FLOATS else "BF16"
    rows = max(1, PART // max(4, 4 * math.prod(entry.shape[1:])))

    def parts() -> Iterator[Tensor]:
        count = entry.shape[0] if entry.shape else 1
        for first in range(0, count, rows):
            yield entry.read(first, min(first + rows, count)).to(DTYPES[dtype])

    return Planned(entry.name, dtype, entry.shape, parts)


def _quantization_config() -> dict[str, Any]:
    """As llm-compressor writes it for its scheme FP8_DYNAMIC."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    scheme = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**common, "strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    kept = ["router", "self_conditioning", "vision_tower", "embed_vision"]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *(f"re:.*{name}.*" for name in kept)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
