"""Quantised Linear modules as safetensors folders keep them: codes, and their scales beside them.

Both stand under the module's name, and every expert has modules of its own. A module's own tensors (names, dtypes,
shapes) say what it holds, so that one reader serves every tool that writes them; the tool's config is checked in the
tool's own file. Everything is decided from headers; scales are checked when they are read. It lacks stacks of experts
that are quantised while fused: no tool writes these for this model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.names import VISION
from sfumato.checkpoints.shards import Stored, short, stored_tensors
from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import ModelConfig, read_json
from sfumato.ops.packed import BLOCK, Packed

FLOATS = ("BF16", "F16", "F32", "F64")
_SCALES = ("BF16", "F16", "F32")
_EIGHT_BITS = {"F8_E4M3": "fp8", "I8": "int8"}
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point")
_ASIDE = re.compile(
    r"(input|output)_(scale|global_scale|zero_point)|[kqv]_(scale|global_scale|zero_point)|weight_shape"
)
_LONGEST = 200
"""Characters of a name, which sentences then may quote."""


def open_linears(folder: Path, config: dict[str, Any], label: str, notices: Sequence[str] = ()) -> Checkpoint:
    """A folder of plain and quantised modules, as a Checkpoint; `label` is its format. Errors: those of `linears`."""
    count = ModelConfig.from_dict(config, str(folder / "config.json")).num_experts
    entries, aside = linears(stored_tensors(folder))
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        format=label,
        config={name: value for name, value in config.items() if name != "quantization_config"},
        entries=fused(entries, count),
        generation=read_json(generation) if generation.exists() else {},
        notices=(*notices, *aside),
    )


def linears(stored_by_name: Mapping[str, Stored]) -> tuple[dict[str, Entry], list[str]]:
    """Every weight by its released name, a module's codes and scales made one; and what is left aside, a sentence each.

    CheckpointError names codes without scales, scales without codes, shapes and dtypes that do not go together."""
    entries: dict[str, Entry] = {}
    aside: Counter[str] = Counter()
    paired: set[str] = set()
    for name, stored in stored_by_name.items():
        module, _, part = name.rpartition(".")
        if len(name) > _LONGEST or not name.isprintable():
            raise CheckpointError(
                f"{stored.file} has a tensor {short(repr(name))}; no tensor of this model is called so"
            )
        if part in _COMPANIONS:
            continue
        if _ASIDE.fullmatch(part):
            aside[part] += 1
            continue
        parts = {key: stored_by_name[f"{module}.{key}"] for key in _COMPANIONS if f"{module}.{key}" in stored_by_name}
        if part == "weight_packed" or (part == "weight" and parts):
            if f"{module}.weight" in entries or (part == "weight_packed" and f"{module}.weight" in stored_by_name):
                raise CheckpointError(f"{module} has both weight and weight_packed in {stored.file}; one must go")
            paired.update(one.name for one in parts.values())
            entries[f"{module}.weight"] = _coded(f"{module}.weight", stored, parts)
        else:
            entries[name] = _plain(stored)
    for name, stored in stored_by_name.items():
        if name.rpartition(".")[2] in _COMPANIONS and name not in paired:
            raise CheckpointError(f"{stored.file} has the scales {name} without the weight that they belong to")
    sentences = [f"{part}, in {count} places, is left aside: nothing here needs it" for part, count in aside.items()]
    return entries, sorted(sentences)


def _plain(stored: Stored) -> Entry:
    vision = stored.name.startswith(VISION)  # passed on as it is: no text is read with it
    if not stored.is_whole or (stored.dtype not in FLOATS and not vision):
        raise CheckpointError(
            f"{stored.name} in {stored.file} is stored as {short(stored.dtype)} and has no scales beside it; "
            f"a plain weight must be {', '.join(FLOATS)}"
        )
    return Entry(stored.name, stored.shape, stored.nbytes, stored.dtype, stored.read)


def _coded(name: str, codes: Stored, parts: Mapping[str, Stored]) -> Entry:
    """The entry of a module's codes and scales, whichever of the layouts they are."""
    for part in (codes, *parts.values()):
        if not part.is_whole:
            raise CheckpointError(
                f"{part.name} in {part.file} is {short(part.dtype)} of shape {short(list(part.shape))}, which this "
                f"engine cannot read from {part.nbytes} bytes"
            )
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.name} in {codes.file} has the shape {short(list(codes.shape))}; codes lie in [O, I]"
        )
    outer = parts.get("weight_global_scale") or parts.get("weight_scale_2")
    zero = parts.get("weight_zero_point")
    scale = parts.get("weight_scale") or parts.get("weight_scale_inv")
    if scale is None:
        raise CheckpointError(f"{codes.file} lacks the weight_scale of {codes.name}")
    for one, other in (("weight_scale", "weight_scale_inv"), ("weight_global_scale", "weight_scale_2")):
        if one in parts and other in parts:
            raise CheckpointError(f"{codes.name} in {codes.file} has both {one} and {other}; one must go")
    build: Callable[[int, int], Packed]
    exact: Callable[[int, int], Tensor] | None = None
    rows, columns = codes.shape
    if codes.dtype in _EIGHT_BITS and outer is None and zero is None:
        build, stored = _eight_bits(codes, scale)
        if "blocks" in stored:
            exact = _from_any_row(build)
    elif codes.dtype == "I32" and outer is None:
        build, stored = _int4(codes, scale, zero)
        columns *= 8
    elif codes.dtype == "U8" and zero is None and len(parts) == 1 + bool(outer):
        build, stored = _fp4(codes, scale, outer)
        columns *= 2
        if outer and outer.name.endswith("weight_global_scale"):
            exact = _divided(codes, scale, outer)
    else:
        raise CheckpointError(
            f"{codes.name} in {codes.file} is {codes.dtype} with {', '.join(parts)}; this is none of the layouts that "
            "are read: fp8, int8, int4, nvfp4, mxfp4"
        )
    nbytes = codes.nbytes + sum(part.nbytes for part in parts.values())
    return Entry(
        name, (rows, columns), nbytes, stored, exact or (lambda first, last: build(first, last).dense()), build
    )


_Built = tuple[Callable[[int, int], Packed], str]


def _eight_bits(codes: Stored, scale: Stored) -> _Built:
    """fp8 and int8: a scale for the tensor, an output, or (fp8) 128 x 128 weights."""
    kind, (rows, columns) = _EIGHT_BITS[codes.dtype], codes.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    _need(scale, codes, _SCALES, {(rows, 1), (rows,), (), (1,), (1, 1), *([blocks] if kind == "fp8" else [])})
    if scale.shape not in ((rows, 1), (rows,)) and math.prod(scale.shape) > 1:

        def by_blocks(first: int, last: int) -> Packed:
            if first % BLOCK:
                raise InputError(f"{codes.name} has scales by blocks of {BLOCK} rows; row {first} begins none")
            scales = _finite(scale, first // BLOCK, -(-last // BLOCK)).float()
            return Packed("fp8", (last - first, columns), codes.read(first, last), scales, BLOCK)

        return by_blocks, "fp8 by blocks"

    def build(first: int, last: int) -> Packed:
        each = scale.shape[:1] == (rows,)
        scales = (_finite(scale, first, last) if each else _finite(scale)).float().reshape(-1)
        return Packed(
            kind, (last - first, columns), codes.read(first, last), scales.expand(last - first).contiguous(), columns
        )

    return build, kind


def _from_any_row(build: Callable[[int, int], Packed]) -> Callable[[int, int], Tensor]:
    """Values may be asked for from within a block, codes may not."""
    return lambda first, last: build(first - first % BLOCK, last).dense()[first % BLOCK :]


def _fp4(codes: Stored, scale: Stored, outer: Stored | None) -> _Built:
    """nvfp4, with a scale of the whole module (`outer`), or mxfp4, without one."""
    kind, group, dtype = ("nvfp4", 16, "F8_E4M3") if outer else ("mxfp4", 32, "U8")
    rows, columns = codes.shape[0], codes.shape[1] * 2
    _need(scale, codes, (dtype,), {(rows, columns // group)} if columns % group == 0 else set())
    if outer:
        _need(outer, codes, ("F32",), {(), (1,)})

    def build(first: int, last: int) -> Packed:
        factor = _outer(outer).expand(last - first).contiguous() if outer else None
        return Packed(
            kind, (last - first, columns), codes.read(first, last), _finite(scale, first, last), group, factor=factor
        )

    return build, kind


def _divided(codes: Stored, scale: Stored, outer: Stored) -> Callable[[int, int], Tensor]:
    """Values as compressed-tensors computes them: each scale divided by the global one, rounded, times the code.

    A factor can only multiply by the inverse, which may differ in the last bits."""

    def read(first: int, last: int) -> Tensor:
        scales = _finite(scale, first, last).float() / _whole(outer)
        rows, columns = last - first, codes.shape[1] * 2
        return Packed("nvfp4", (rows, columns), codes.read(first, last), scales, 16).dense()

    return read


def _int4(codes: Stored, scale: Stored, zero: Stored | None) -> _Built:
    """Eight codes in each int32, the first lowest, 8 standing for zero; zero points so too, but along the outputs."""
    rows, columns = codes.shape[0], codes.shape[1] * 8
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[1] else 0
    fits = groups and columns % groups == 0 and (columns // groups) % 2 == 0
    _need(scale, codes, _SCALES, {(rows, groups)} if fits else set())
    if zero:
        _need(zero, codes, ("I32",), {(-(-rows // 8), groups)})

    def build(first: int, last: int) -> Packed:
        data = codes.read(first, last).contiguous().view(torch.uint8)
        scales, bias = _finite(scale, first, last), None
        if zero:
            words = zero.read(first // 8, -(-last // 8)).contiguous().view(torch.uint8).view(-1, groups, 4)
            points = torch.stack([words & 15, words >> 4], dim=-1).view(-1, groups, 8).transpose(1, 2)
            points = points.reshape(-1, groups)[first % 8 :][: last - first]
            scales = scales.float()
            bias = points.float() * -scales
        return Packed("int4", (last - first, columns), data, scales, columns // groups, bias)

    return build, f"int4 in groups of {columns // groups}"


def _need(scale: Stored, codes: Stored, dtypes: Sequence[str], shapes: set[tuple[int, ...]]) -> None:
    if scale.dtype not in dtypes or scale.shape not in shapes:
        raise CheckpointError(
            f"{scale.name} in {scale.file} is {short(scale.dtype)} of shape {short(list(scale.shape))}; beside "
            f"{codes.dtype} of shape {list(codes.shape)} it must be {' or '.join(dtypes)}"
            + (f" of shape {' or '.join(str(list(shape)) for shape in sorted(shapes))}" if shapes else "")
        )


def _finite(scale: Stored, first: int = 0, last: int | None = None) -> Tensor:
    values = scale.read(first, last)
    # In the exponents of mxfp4, 255 stands for nan.
    fine = values != 255 if scale.dtype == "U8" else torch.isfinite(values.float())
    if not bool(fine.all()):
        raise CheckpointError(f"{scale.name} in {scale.file} has scales that are not finite numbers; it is damaged")
    return values


def _whole(outer: Stored) -> Tensor:
    value = _finite(outer).reshape(())
    if outer.name.endswith("weight_global_scale") and not (value > 0 and torch.isfinite(1 / value)):
        raise CheckpointError(
            f"{outer.name} in {outer.file} is {float(value)}; scales are divided by it, so that it must be above 0"
        )
    return value


def _outer(outer: Stored) -> Tensor:
    """What the scales are multiplied by: modelopt's second scale, or one over compressed-tensors' global scale."""
    return 1 / _whole(outer) if outer.name.endswith("weight_global_scale") else _whole(outer)
