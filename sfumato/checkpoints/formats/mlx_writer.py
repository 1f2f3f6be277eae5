"""MLX checkpoints, written so that mlx-vlm loads them: affine in 3 to 6 or 8 bits, and mxfp4.

The affine quantiser is the rule of `mlx.core.quantize`, to the bit; mxfp4 scales are searched (`quant.formats`), and
copied where the checkpoint has them. What gets how many bits is mlx-vlm's rule for this model. It lacks mlx-vlm's mixed
recipes, nvfp4 and mxfp8.

Sources: `mlx.core.quantize` (mlx/backend/cpu/quantized.cpp), `mlx_vlm/models/diffusion_gemma` (quant_predicate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.bits import as_words
from sfumato.checkpoints.formats.mlx import FLOATS, MODES, Scheme
from sfumato.checkpoints.names import DECODER, ENCODER, VISION
from sfumato.checkpoints.shards import Planned
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import ModelConfig
from sfumato.quant.formats import pack

BITS, GROUPS = (3, 4, 5, 6, 8), (32, 64, 128)
COMMON_BITS = 8
"""What mlx-vlm gives all that each token passes, and that is small beside the experts."""
PART_BYTES = 64 << 20
"""Of float32 that the writer reads of a weight at a time."""
CACHED = 1 << 18
"""Values that are quantised at a time: their working copies stay in the processor's cache."""


def rounded(weight: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`mlx.core.quantize` of a weight [.., I] of `dtype`: codes [.., I] in uint8, scales and biases [.., I / group].

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
    return codes, scale, bias


def plan_mlx(
    checkpoint: Checkpoint, bits: int = 4, group: int = 64, mode: str = "affine"
) -> tuple[list[Planned], dict[str, Any]]:
    """What an MLX checkpoint of these weights holds: its tensors, and the entries of config.json that change.

    `mode` is "affine", or "mxfp4", which has 4 bits in groups of 32. As mlx-vlm does it, experts and self-conditioning
    are quantised so, and what each token passes (embedding, attention, dense MLP, router) gets affine codes of 8 bits;
    norms, scalars and images stay plain. Where `group` does not divide the inputs, a smaller one is taken, or the
    weight stays plain. Everything is in the dtype of the embedding (bfloat16 where that is itself quantised), as
    activations in MLX follow it. InputError names what cannot be written."""
    chosen = _scheme(mode, bits, group)
    if checkpoint.config.get("model_type") != "diffusion_gemma":
        raise InputError(f"{checkpoint.path} is no DiffusionGemma; only that is written for MLX")
    embedding = checkpoint.entries.get("model.decoder.embed_tokens.weight")
    stored = embedding.stored if embedding and embedding.stored in FLOATS else "BF16"
    settings: dict[str, Any] = {"group_size": chosen.group, "bits": chosen.bits, "mode": mode}
    planned: list[Planned] = []
    has_images = False
    for name, entry in checkpoint.entries.items():
        if name == "lm_head.weight" or (name.startswith(ENCODER) and not name.endswith(".layer_scalar")):
            continue  # repeats what the decoder has
        has_images |= name.startswith(VISION)
        module = name.removesuffix(".weight")
        is_matrix = len(entry.shape) > 1 and name.startswith(DECODER)
        own = _fitting(Scheme("affine", COMMON_BITS, group) if _is_common(module) else chosen, entry.shape[-1:])
        if not is_matrix or own is None:
            planned.append(_planned_plain(f"{module}.weight" if ".experts." in name else name, entry, stored))
            continue
        planned += _planned_codes(module, entry, own, stored)
        if own != chosen or math.prod(entry.shape) % 64:
            # The last: mlx-vlm leaves weights of such sizes out, unless they are named.
            settings[module] = {"group_size": own.group, "bits": own.bits}
            if own.mode != "affine":
                settings[module]["mode"] = own.mode
    changes: dict[str, Any] = {"quantization": settings, "quantization_config": settings}
    changes["dtype"] = str(FLOATS[stored]).removeprefix("torch.")
    changes["text_config"] = _text_config(checkpoint)
    if not has_images:  # mlx-vlm would want the tower's weights
        changes["vision_config"] = None
    return planned, changes


def _scheme(mode: str, bits: int, group: int) -> Scheme:
    if mode == "mxfp4":
        return Scheme(mode, MODES[mode][0][0], MODES[mode][1][0])
    for name, value, known in (("mode", mode, ("affine", "mxfp4")), ("bits", bits, BITS), ("group", group, GROUPS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}; MLX checkpoints are written with {' or '.join(map(str, known))}")
    return Scheme(mode, bits, group)


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """text_config with the sizes of attention where mlx-vlm looks for them.

    It knows no `per_layer_config`, and takes the release's for what is not there."""
    config = ModelConfig.from_dict(checkpoint.config, str(checkpoint.path / "config.json"))
    full = next(layer for layer in config.layers if not layer.is_sliding)
    sliding = next((layer for layer in config.layers if layer.is_sliding), full)
    text = {key: value for key, value in checkpoint.config["text_config"].items() if key != "per_layer_config"}
    return text | {
        "head_dim": sliding.head_dim,
        "num_key_value_heads": sliding.kv_heads,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.kv_heads,
    }


def _is_common(module: str) -> bool:
    """What mlx-vlm gives 8 bits."""
    ends = ("embed_tokens", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return module.endswith(ends) or ".self_attn." in module or "router" in module


def _fitting(scheme: Scheme, inputs: tuple[int, ...]) -> Scheme | None:
    """The scheme with the largest group, up to its own, that divides the inputs; None: none does."""
    sizes = [scheme.group] if scheme.mode != "affine" else [size for size in GROUPS if size <= scheme.group]
    group = max((size for size in sizes if inputs and inputs[0] % size == 0), default=0)
    return scheme._replace(group=group) if group else None


def _planned_plain(name: str, entry: Entry, stored: str) -> Planned:
    def parts() -> Iterator[Tensor]:
        return (values.to(FLOATS[stored]) for values in _parts(entry))

    return Planned(name, stored, entry.shape, parts)


def _planned_codes(module: str, entry: Entry, scheme: Scheme, stored: str) -> list[Planned]:
    """The weight's tensors. Each can be asked for alone; in this order the weight is read once."""
    affine = scheme.mode == "affine"
    kept: dict[str, list[Tensor]] = {}

    def run() -> Iterator[Tensor]:
        rest: dict[str, list[Tensor]] = {"scales": [], "biases": []}
        for words, *small in (_affine if affine else _mxfp4)(entry, scheme, FLOATS[stored]):
            for name, tensor in zip(rest, small, strict=False):
                rest[name].append(tensor)
            yield words
        kept.update(rest)

    def named() -> Iterator[Tensor]:
        try:
            yield from run()
        except CheckpointError:  # of the source, which it names
            raise
        except InputError as error:
            raise InputError(f"{module}: {error}") from error

    def small(name: str) -> Callable[[], Iterator[Tensor]]:
        def parts() -> Iterator[Tensor]:
            if name not in kept:
                for _ in named():
                    pass
            yield from kept.pop(name)

        return parts

    *outer, inputs = entry.shape
    groups = (*outer, inputs // scheme.group)
    planned = [
        Planned(f"{module}.weight", "U32", (*outer, inputs * scheme.bits // 32), named),
        Planned(f"{module}.scales", stored if affine else "U8", groups, small("scales")),
    ]
    return [*planned, Planned(f"{module}.biases", stored, groups, small("biases"))] if affine else planned


def _affine(entry: Entry, scheme: Scheme, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, CACHED // entry.shape[-1])
    for values in (block for part in _parts(entry) for block in part.flatten(0, -2).split(rows)):
        codes, scale, bias = rounded(values, scheme.bits, scheme.group, dtype)
        yield as_words(codes, scheme.bits), scale, bias


def _mxfp4(entry: Entry, scheme: Scheme, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    has_codes = entry.packed is not None and entry.packed(0, 1).kind == "mxfp4"
    for first, last in _places(entry):
        packed = entry.packed(first, last) if has_codes and entry.packed else pack(entry.read(first, last), "mxfp4")
        yield packed.data, packed.scale


def _parts(entry: Entry) -> Iterator[Tensor]:
    return (entry.read(first, last) for first, last in _places(entry))


def _places(entry: Entry) -> Iterator[tuple[int, int]]:
    count = entry.shape[0] if entry.shape else 1
    step = max(1, PART_BYTES // max(4 * math.prod(entry.shape[1:]), 1))
    for first in range(0, count, step):
        yield first, min(first + step, count)
