"""MLX checkpoints in affine 4-, 6- and 8-bit: read as ours, and written so that mlx-vlm loads them.

A weight [O, I] lies as `X.weight`, uint32 words of codes from the lowest bit on, `X.scales` and `X.biases`, both
[O, I / group]; value = scale x code + bias. These are our int4 and int8 with a bias, byte for byte. Names are the
release's, but experts end in `.weight`. The quantiser is the rule of `mlx.core.quantize`, to the bit; what gets how
many bits is mlx-vlm's rule for this model. It lacks MLX's other widths and its formats without a bias (mxfp4, nvfp4),
and writes no 6-bit.

Sources: `mlx.core.quantize` (mlx/backend/cpu/quantized.cpp), `mlx_vlm/models/diffusion_gemma` (sanitize,
quant_predicate), `mlx_vlm/utils.py` (load_model_weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.names import DECODER, ENCODER, VISION
from sfumato.checkpoints.shards import Planned, Stored, short, stored_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import ModelConfig, read_json
from sfumato.ops.packed import Packed

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
READS, WRITES, GROUPS = (4, 6, 8), (4, 8), (32, 64, 128)
PART_BYTES = 64 << 20
"""Of float32 that the writer reads of a weight at a time."""
CACHED = 1 << 18
"""Values that are quantised at a time: their working copies stay in the processor's cache."""

# ---- read -----------------------------------------------------------------------------------------------------------


def open_mlx(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose config.json (`config`) has MLX's `quantization`; headers alone are read.

    CheckpointError names the tensor or the setting that is wrong."""
    source = str(folder / "config.json")
    model = ModelConfig.from_dict(config, source)
    settings = config.get("quantization") or config.get("quantization_config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source} has no quantization with bits and group_size; this is no MLX checkpoint")
    bits, _ = _settings(settings, "all", source)
    stored = stored_tensors(folder)
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        scales, biases = stored.get(f"{module}.scales"), stored.get(f"{module}.biases")
        if part == "weight" and scales:
            if not biases:
                raise CheckpointError(f"{short(module)}.biases is missing in {tensor.file}; it belongs to the scales")
            entries[name] = _affine(tensor, scales, biases, *_settings(settings, module, source))
        elif part not in ("scales", "biases") or f"{module}.weight" not in stored:
            entries[name] = _plain(tensor)
    rest = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        format=f"MLX affine {bits}-bit",
        config=rest,
        entries=fused(entries, model.num_experts),
        generation=read_json(generation) if generation.exists() else {},
    )


def _is_mlx(folder: Path, quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") is None and "bits" in quantization


READER = FormatReader("mlx", _is_mlx, open_mlx)


def _settings(settings: dict[str, Any], module: str, source: str) -> tuple[int, int]:
    """Bits and group of a module: its own where it has some, as mlx-vlm looks them up."""
    own = settings.get(module)
    own = own if isinstance(own, dict) else settings
    bits, group, mode = own.get("bits", 4), own.get("group_size", 64), own.get("mode", "affine")
    for name, value, known in (("bits", bits, READS), ("group_size", group, GROUPS), ("mode", mode, ("affine",))):
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in known:
            raise CheckpointError(
                f"{source}: quantization says {name} {short(value)} for {short(module)}; of MLX's formats, "
                f"{name} {' or '.join(map(str, known))} is supported"
            )
    return bits, group


def _affine(weight: Stored, scales: Stored, biases: Stored, bits: int, group: int) -> Entry:
    name = short(weight.name)
    for part in (scales, biases):
        if part.dtype not in FLOATS or part.dtype != scales.dtype:
            raise CheckpointError(
                f"{short(part.name)} is stored as {part.dtype}; scales and biases must both be BF16, F16 or F32"
            )
        if part.shape != scales.shape or part.shape[:-1] != weight.shape[:-1] or len(part.shape) not in (2, 3):
            raise CheckpointError(
                f"{short(part.name)} has the shape {list(part.shape)}, which does not go with {list(weight.shape)} of "
                f"{name}; there must be one for each group of {group} codes"
            )
    if weight.dtype != "U32":
        raise CheckpointError(f"{name} has scales but is stored as {weight.dtype}; codes must be U32")
    inputs = scales.shape[-1] * group
    if weight.shape[-1] * 32 != inputs * bits:
        raise CheckpointError(
            f"{name} has {weight.shape[-1]} words a row and {scales.shape[-1]} scales; with {bits} bits in groups of "
            f"{group} there must be {inputs * bits // 32} words"
        )

    def packed(first: int, last: int) -> Packed:
        codes = weight.read(first, last).view(torch.uint8)
        scale, bias = _finite(scales, first, last), _finite(biases, first, last)
        shape = (*codes.shape[:-1], inputs)
        if bits == 4:
            return Packed("int4", shape, codes, scale, group, bias)
        return Packed("int8", shape, codes if bits == 8 else _of_6(codes), scale.float(), group, bias.float())

    return Entry(
        name=weight.name,
        shape=(*weight.shape[:-1], inputs),
        nbytes=weight.nbytes + scales.nbytes + biases.nbytes,
        stored=f"affine {bits}-bit, group {group}, {scales.dtype}",
        read=lambda first, last: packed(first, last).dense(),
        packed=packed,
    )


def _plain(tensor: Stored) -> Entry:
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{short(tensor.name)} in {tensor.file} is stored as {tensor.dtype} and has no scales; what is not "
            f"quantised must be {', '.join(FLOATS)}"
        )
    return Entry(tensor.name, tensor.shape, tensor.nbytes, tensor.dtype, tensor.read)


def _finite(tensor: Stored, first: int, last: int) -> Tensor:
    values = tensor.read(first, last)
    if not values.isfinite().all():
        raise CheckpointError(f"{short(tensor.name)} in {tensor.file} has values that are not finite; it is damaged")
    return values


def _of_6(codes: Tensor) -> Tensor:
    """[.., 3 n] bytes -> [.., 4 n] codes: three bytes hold four, from the lowest bit on."""
    low, middle, high = codes.unflatten(-1, (-1, 3)).unbind(-1)
    four = (low & 63, low >> 6 | (middle & 15) << 2, middle >> 4 | (high & 3) << 4, high >> 2)
    return torch.stack(four, -1).flatten(-2)


# ---- write ----------------------------------------------------------------------------------------------------------


def quantise(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """`mlx.core.quantize` of a weight [.., I] of `dtype`: our int4 or int8 with a bias, its scales being of `dtype`.

    The end of the range that lies further from zero is exact, and zero is as nearly as a whole number of steps allows;
    codes are chosen before scale and bias are rounded to `dtype`. InputError when a value or a scale is not finite."""
    rows = weight.to(dtype).float().unflatten(-1, (-1, group))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    is_low = low.abs() > high.abs()
    edge = torch.where(is_low, low, high)
    step = ((high - low) / (2**bits - 1)).clamp_(min=1e-7)
    step = torch.where(is_low, step, -step)
    steps = (edge / step).round()
    scale = torch.where(steps == 0, step, edge / steps)
    bias = torch.where(steps == 0, 0.0, edge)
    codes = ((rows - bias) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    scale, bias = scale[..., 0].to(dtype), bias[..., 0].to(dtype)
    if not (scale.isfinite().all() and bias.isfinite().all()):
        raise InputError(f"a weight has values that are not finite, or too far apart for scales in {dtype}")
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
        return Packed("int4", tuple(weight.shape), codes, scale, group, bias)
    return Packed("int8", tuple(weight.shape), codes, scale.float(), group, bias.float())


def plan_mlx(checkpoint: Checkpoint, bits: int = 4, group: int = 64) -> tuple[list[Planned], dict[str, Any]]:
    """What an MLX checkpoint of these weights holds: its tensors, and the entries of config.json that change.

    As mlx-vlm does it, experts and self-conditioning get `bits`, and what each token passes (embedding, attention,
    dense MLP, router) gets 8; norms, scalars and images stay plain. Where `group` does not divide the inputs, a
    smaller one is taken, or the weight stays plain. Everything is in the dtype of the embedding (bfloat16 where that is
    itself quantised), as activations in MLX follow it. InputError names what cannot be written."""
    for name, value, known in (("bits", bits, WRITES), ("group", group, GROUPS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; MLX checkpoints are written with {' or '.join(map(str, known))}")
    if checkpoint.config.get("model_type") != "diffusion_gemma":
        raise InputError(f"{checkpoint.path} is no DiffusionGemma; only that is written for MLX")
    embedding = checkpoint.entries.get("model.decoder.embed_tokens.weight")
    stored = embedding.stored if embedding and embedding.stored in FLOATS else "BF16"
    settings: dict[str, Any] = {"group_size": group, "bits": bits, "mode": "affine"}
    planned: list[Planned] = []
    has_images = False
    for name, entry in checkpoint.entries.items():
        if name == "lm_head.weight" or (name.startswith(ENCODER) and not name.endswith(".layer_scalar")):
            continue  # repeats what the decoder has
        has_images |= name.startswith(VISION)
        module = name.removesuffix(".weight")
        own_group = _group(entry.shape[-1], group) if len(entry.shape) > 1 and name.startswith(DECODER) else 0
        if not own_group:
            planned.append(_planned_plain(f"{module}.weight" if ".experts." in name else name, entry, stored))
            continue
        own_bits = 8 if _is_common(module) else bits
        planned += _planned_affine(module, entry, own_bits, own_group, stored)
        if (own_bits, own_group) != (bits, group) or math.prod(entry.shape) % 64:
            # The last: mlx-vlm leaves weights of such sizes out, unless they are named.
            settings[module] = {"group_size": own_group, "bits": own_bits}
    changes: dict[str, Any] = {"quantization": settings, "quantization_config": settings}
    changes["dtype"] = str(FLOATS[stored]).removeprefix("torch.")
    if not has_images:  # mlx-vlm would want the tower's weights
        changes["vision_config"] = None
    return planned, changes


def _is_common(module: str) -> bool:
    """What mlx-vlm gives 8 bits: all that each token passes, and that is small beside the experts."""
    ends = ("embed_tokens", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return module.endswith(ends) or ".self_attn." in module or "router" in module


def _group(inputs: int, most: int) -> int:
    """The largest group up to `most` that divides the inputs; 0: none does."""
    return next((size for size in sorted(GROUPS, reverse=True) if size <= most and inputs % size == 0), 0)


def _planned_plain(name: str, entry: Entry, stored: str) -> Planned:
    def parts() -> Iterator[Tensor]:
        return (values.to(FLOATS[stored]) for values in _parts(entry))

    return Planned(name, stored, entry.shape, parts)


def _planned_affine(module: str, entry: Entry, bits: int, group: int, stored: str) -> list[Planned]:
    """The weight's three tensors. Each can be asked for alone; in this order the weight is read once."""
    kept: dict[str, list[Tensor]] = {}

    def run() -> Iterator[Tensor]:
        scales: list[Tensor] = []
        biases: list[Tensor] = []
        rows = max(1, CACHED // entry.shape[-1])
        for values in (block for part in _parts(entry) for block in part.flatten(0, -2).split(rows)):
            try:
                form = quantise(values, bits, group, FLOATS[stored])
            except InputError as error:
                raise InputError(f"{module}: {error}") from error
            scales.append(form.scale.to(FLOATS[stored]))
            biases.append(form.parts["bias"].to(FLOATS[stored]))
            yield form.data
        kept.update(scales=scales, biases=biases)

    def small(name: str) -> Callable[[], Iterator[Tensor]]:
        def parts() -> Iterator[Tensor]:
            if name not in kept:
                for _ in run():
                    pass
            yield from kept.pop(name)

        return parts

    *outer, inputs = entry.shape
    groups = (*outer, inputs // group)
    return [
        Planned(f"{module}.weight", "U32", (*outer, inputs * bits // 32), run),
        Planned(f"{module}.scales", stored, groups, small("scales")),
        Planned(f"{module}.biases", stored, groups, small("biases")),
    ]


def _parts(entry: Entry) -> Iterator[Tensor]:
    count = entry.shape[0] if entry.shape else 1
    step = max(1, PART_BYTES // max(4 * math.prod(entry.shape[1:]), 1))
    for first in range(0, count, step):
        yield entry.read(first, min(first + step, count))
