"""MLX checkpoints: read as ours in every width and mode that MLX has.

A quantised weight [O, I] lies as `X.weight`, uint32 words of codes from the lowest bit on, and `X.scales`. Affine has
1 to 6 or 8 bits and `X.biases`, value = scale x code + bias: up to 4 bits are our int4 with a bias, more our int8. The
modes mxfp4, mxfp8 and nvfp4 have a byte for a scale and no biases; they are our kinds of these names. So the values
are those of `mlx.core.dequantize`, to the bit. `quantization` in config.json has settings for all modules, and for
some their own. Names are the release's, but experts end in `.weight`. It lacks activations in fewer bits, which no file
asks for.

Sources: `mlx.core.quantize` (mlx/backend/cpu/quantized.cpp), `mlx_vlm/models/diffusion_gemma` (sanitize),
`mlx_vlm/utils.py` (load_model_weights), `mlx_vlm/quantization/nvfp4.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.bits import spread
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.shards import Stored, metadata, short, stored_tensors
from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig, read_json
from sfumato.ops.packed import Packed

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MULTIPLIED, _DIVIDED = "weight_scale_2", "weight_global_scale"
"""What mlx-vlm calls the second scale of nvfp4: by which the weight is multiplied, or divided."""
_COMPANIONS = ("scales", "biases", _MULTIPLIED, _DIVIDED)
_PREFIXES = re.compile(r"^(?:(?:language_model|model|decoder)\.)+")
_NUMBER = re.compile(r"(?<=\.experts\.)\d{1,6}\.", re.ASCII)


class Scheme(NamedTuple):
    """How a module is quantised."""

    mode: str
    bits: int
    group: int

    def __str__(self) -> str:
        return f"affine {self.bits}-bit, group {self.group}" if self.mode == "affine" else self.mode


MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""The bits and the groups of each mode, what MLX takes where nothing is said first."""


def open_mlx(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder that MLX wrote; headers alone are read.

    `config` is what config.json says; without `quantization` nothing is quantised. CheckpointError names the tensor or
    the setting that is wrong."""
    source = str(folder / "config.json")
    model = ModelConfig.from_dict(config, source)
    settings = _ModuleSchemes(config, source)
    stored = stored_tensors(folder)
    entries: dict[str, Entry] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        parts = {key: stored[f"{module}.{key}"] for key in _COMPANIONS if f"{module}.{key}" in stored}
        if part == "weight" and "scales" in parts:
            entries[name] = _quantised(tensor, parts, settings.of(module))
        elif part not in _COMPANIONS or f"{module}.weight" not in stored or "scales" not in parts:
            entries[name] = _plain(tensor)
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        format=settings.label,
        config={name: value for name, value in config.items() if name not in ("quantization", "quantization_config")},
        entries=fused(entries, model.num_experts),
        generation=read_json(generation) if generation.exists() else {},
    )


def _is_mlx(folder: Path, quantization: dict[str, Any]) -> bool:
    if quantization:
        return quantization.get("quant_method") is None and "bits" in quantization
    try:
        return metadata(folder).get("format") == "mlx"
    except CheckpointError:  # whoever opens it says what is wrong
        return False


READER = FormatReader("mlx", _is_mlx, open_mlx)


# ---- settings -------------------------------------------------------------------------------------------------------


class _ModuleSchemes:
    """`quantization` of config.json: the scheme of every module."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        raw = config.get("quantization") or config.get("quantization_config")
        if raw is not None and not isinstance(raw, dict):
            raise CheckpointError(f"{source} has no quantization with bits and group_size; this is no MLX checkpoint")
        self.source = source
        self.common: dict[str, Any] = raw or {}
        self.own: dict[str, Any] = {}
        for key, value in self.common.items():
            if not isinstance(value, dict | bool):
                continue
            for spelling in {key, _bare(key)}:
                if self.own.setdefault(spelling, value) != value:
                    raise CheckpointError(
                        f"{source}: quantization says {short(self.own[spelling])} and {short(value)} for {short(key)}; "
                        "there must be one"
                    )

    @property
    def label(self) -> str:
        """The format, as a person calls it: of what has no settings of its own."""
        if not self.common:
            return "MLX, not quantised"
        mode, bits = short(self.common.get("mode", "affine")), self.common.get("bits")
        return f"MLX affine {short(bits)}-bit" if mode == "affine" and bits is not None else f"MLX {mode}"

    def of(self, module: str) -> Scheme:
        """Of a module that has scales: its own scheme where it has one, as mlx-vlm looks it up.

        Names may differ in what they begin with, and an expert's is that of its stack."""
        own = next((self.own[name] for name in _spellings(module) if name in self.own), True)
        if isinstance(own, dict):
            return self._scheme(module, own)
        if own is False or not self.common:
            raise CheckpointError(
                f"{self.source}: quantization says {False if self.common else 'nothing'} for {short(module)}, which "
                "has scales; it must say with how many bits, in which groups and which mode"
            )
        return self._scheme(module, self.common)

    def _scheme(self, module: str, own: Mapping[str, Any]) -> Scheme:
        mode = own.get("mode", "affine")
        self._check("mode", mode, tuple(MODES), module)
        bits, group = (own.get(name) for name in ("bits", "group_size"))
        scheme = Scheme(
            mode, *(known[0] if x is None else x for x, known in zip((bits, group), MODES[mode], strict=True))
        )
        self._check("bits", scheme.bits, MODES[mode][0], module, mode)
        self._check("group_size", scheme.group, MODES[mode][1], module, mode)
        return scheme

    def _check(self, name: str, value: Any, known: tuple[Any, ...], module: str, mode: str = "") -> None:
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in known:
            choices = [str(one) for one in sorted(known)]
            listed = f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
            raise CheckpointError(
                f"{self.source}: quantization says {name} {short(value)} for {short(module)}; of MLX's formats, "
                f"{mode + ' with ' if mode else ''}{name} {listed} is read"
            )


def _spellings(module: str) -> Iterator[str]:
    """The names under which settings of a module may stand, the most likely first."""
    yield module
    bare = _bare(module)
    yield bare
    stack = _NUMBER.sub("", bare)
    yield stack
    if ".experts." in stack:
        yield re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", stack)


def _bare(module: str) -> str:
    """Without what tools put before it, and without the module that only some have around experts."""
    return _PREFIXES.sub("", module, count=1).replace(".experts.switch_glu.", ".experts.")


# ---- tensors --------------------------------------------------------------------------------------------------------


def _quantised(weight: Stored, parts: Mapping[str, Stored], scheme: Scheme) -> Entry:
    name, scales = short(weight.name), parts["scales"]
    if weight.dtype != "U32":
        raise CheckpointError(f"{name} has scales but is stored as {weight.dtype}; codes must be U32")
    _check_parts(weight, parts, scheme)
    inputs = scales.shape[-1] * scheme.group
    if weight.shape[-1] * 32 != inputs * scheme.bits:
        raise CheckpointError(
            f"{name} has {weight.shape[-1]} words a row and {scales.shape[-1]} scales; with {scheme.bits} bits in "
            f"groups of {scheme.group} there must be {inputs * scheme.bits // 32} words"
        )
    packed: Callable[[int, int], Packed]
    if scheme.mode == "affine":

        def packed(first: int, last: int) -> Packed:
            return _affine(weight.read(first, last), _finite(scales, first, last), _finite(biases, first, last), scheme)

        biases, stored = parts["biases"], f"{scheme}, {scales.dtype}"
    else:

        def packed(first: int, last: int) -> Packed:
            return _floats(weight, scales, outer, scheme, (first, last))

        outer, stored = parts.get(_MULTIPLIED) or parts.get(_DIVIDED), str(scheme)

    def read(first: int, last: int) -> Tensor:
        if _DIVIDED in parts:  # a factor can only multiply by the inverse, which may differ in the last bit
            by = _outer(parts[_DIVIDED], weight.shape[:-1])[first:last]
            return _floats(weight, scales, None, scheme, (first, last)).dense() / by[..., None]
        return packed(first, last).dense()

    return Entry(
        name=weight.name,
        shape=(*weight.shape[:-1], inputs),
        nbytes=weight.nbytes + sum(part.nbytes for part in parts.values()),
        stored=stored,
        read=read,
        packed=packed,
    )


def _check_parts(weight: Stored, parts: Mapping[str, Stored], scheme: Scheme) -> None:
    """CheckpointError where a mode's tensors are not all there, not of its types, or there is one too many."""
    scales, module = parts["scales"], weight.name.removesuffix(".weight")
    needed = ("scales", "biases") if scheme.mode == "affine" else ("scales",)
    for key in needed:
        if key not in parts:
            raise CheckpointError(f"{short(module)}.{key} is missing in {weight.file}; it belongs to the scales")
    outer = [key for key in (_MULTIPLIED, _DIVIDED) if key in parts and scheme.mode == "nvfp4"]
    for key, part in parts.items():
        if key not in needed and key not in outer[:1]:
            raise CheckpointError(f"{short(part.name)} is there in {part.file}, and {scheme} has no place for it")
    is_affine = scheme.mode == "affine"
    whose = "scales and biases must both be" if is_affine else f"scales of {scheme} must be"
    for key in needed:
        part = parts[key]
        if part.dtype not in (FLOATS if is_affine else ("U8",)) or part.dtype != scales.dtype:
            kinds = "BF16, F16 or F32" if is_affine else "U8"
            raise CheckpointError(f"{short(part.name)} is stored as {part.dtype}; {whose} {kinds}")
        if part.shape != scales.shape or part.shape[:-1] != weight.shape[:-1] or len(part.shape) not in (2, 3):
            raise CheckpointError(
                f"{short(part.name)} has the shape {list(part.shape)}, which does not go with {list(weight.shape)} of "
                f"{short(weight.name)}; there must be one for each group of {scheme.group} codes"
            )
    for key in outer:
        part, rows = parts[key], weight.shape[:-1]
        if part.dtype != "F32" or math.prod(part.shape) not in (1, math.prod(rows[:-1]), math.prod(rows)):
            raise CheckpointError(
                f"{short(part.name)} is {part.dtype} of shape {list(part.shape)}; it must be F32, one number, or one "
                f"for each of {' x '.join(map(str, rows))}"
            )


def _affine(words: Tensor, scale: Tensor, bias: Tensor, scheme: Scheme) -> Packed:
    """int4 with a bias up to 4 bits, else int8 with a bias."""
    codes = words.view(torch.uint8)
    shape = (*codes.shape[:-1], scale.shape[-1] * scheme.group)
    width = 4 if scheme.bits <= 4 else 8
    codes = spread(codes, scheme.bits, width)
    if width == 8:
        return Packed("int8", shape, codes, scale.float(), scheme.group, bias.float())
    return Packed("int4", shape, codes, scale, scheme.group, bias)


def _floats(weight: Stored, scales: Stored, outer: Stored | None, scheme: Scheme, rows: tuple[int, int]) -> Packed:
    """mxfp4, mxfp8 and nvfp4, which are ours."""
    first, last = rows
    data, scale = weight.read(first, last).view(torch.uint8), scales.read(first, last)
    factor = None
    if scheme.mode == "nvfp4":
        scale, factor = scale.view(torch.float8_e4m3fn), torch.ones(data.shape[:-1])
        if outer:
            by = _outer(outer, weight.shape[:-1])[first:last]
            factor = (1 / by if outer.name.endswith(_DIVIDED) else by).contiguous()
    # In exponents, 255 stands for nan.
    fine = scale.float().isfinite() if scheme.mode == "nvfp4" else scale != 255
    if not fine.all():
        raise _damaged(scales)
    if scheme.mode == "mxfp8":
        if (data & 127 == 127).any():
            raise _damaged(weight)
        data = data.view(torch.float8_e4m3fn)
    shape = (*data.shape[:-1], scales.shape[-1] * scheme.group)
    return Packed(scheme.mode, shape, data, scale, scheme.group, factor=factor)


def _outer(outer: Stored, rows: tuple[int, ...]) -> Tensor:
    """The second scale of nvfp4, for each output: [O] or [E, O]."""
    values = outer.read()
    is_scale = values.isfinite()
    if outer.name.endswith(_DIVIDED):
        is_scale &= (1 / values).isfinite()
    if not is_scale.all():
        raise CheckpointError(f"{short(outer.name)} in {outer.file} has values that are no scales; it is damaged")
    values = values.reshape(()) if values.numel() == 1 else values.reshape(*rows[:-1], -1)
    return values.expand(rows)


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
        raise _damaged(tensor)
    return values


def _damaged(tensor: Stored) -> CheckpointError:
    return CheckpointError(f"{short(tensor.name)} in {tensor.file} has values that are not finite; it is damaged")
