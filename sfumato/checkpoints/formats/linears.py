"""Quantised Linear modules as safetensors folders keep them: codes, and their scales beside them.

Both stand under the module's name, and every expert has modules of its own. A module's own tensors (names, dtypes,
shapes) say what it holds, so that one reader serves every tool that writes them; the tool's config is checked in the
tool's own file, and names that only one tool has are read there (`Own`). Everything is decided from headers, and where
a tool needs it from a few bytes beside the codes; scales are checked when they are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import FALLBACK, Checkpoint, Entry
from sfumato.checkpoints.formats.bits import unpacked
from sfumato.checkpoints.formats.eight_bits import KINDS, BlockSize, eight_bits
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.formats.groups import group_index, grouped, values
from sfumato.checkpoints.formats.released import FLOATS
from sfumato.checkpoints.formats.scales import EXPONENTS, SCALES, Codes, finite, need
from sfumato.checkpoints.names import VISION
from sfumato.checkpoints.shards import Stored, short, stored_tensors
from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig, read_json
from sfumato.ops.packed import BLOCK, Packed

Own = Callable[[dict[str, Stored]], dict[str, Entry]]
"""Takes the tensors that only one tool names so out of all that there are, and gives their entries."""
_COMPANIONS = ("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point")
_BESIDE = ("weight_shape", "weight_g_idx", "pre_quant_scale")
"""What codes may have beside their scales."""
_ASIDE = re.compile(
    r"(input|output)_(scale|global_scale|zero_point)|[kqv]_(scale|global_scale|zero_point)|activation_scale"
)
_LONGEST = 200
"""Characters of a name, which sentences then may quote."""


def open_linears(
    folder: Path,
    config: dict[str, Any],
    label: str,
    notices: Sequence[str] = (),
    block: BlockSize = (BLOCK, BLOCK),
    own: Own | None = None,
) -> Checkpoint:
    """A folder of plain and quantised modules, as a Checkpoint; `label` is its format, `block` what fp8 by blocks has.

    `own` reads what the tool alone names so. Errors: its, and those of `linears`."""
    count = ModelConfig.from_dict(config, str(folder / "config.json")).num_experts
    stored = stored_tensors(folder)
    entries = own(stored) if own else {}
    rest, aside = linears(stored, block)
    if twice := entries.keys() & rest.keys():
        raise CheckpointError(f"{folder} has {short(min(twice))} twice: quantised, and as it is")
    generation = folder / "generation_config.json"
    return Checkpoint(
        path=folder,
        format=label,
        config={name: value for name, value in config.items() if name != "quantization_config"},
        entries=fused(entries | rest, count),
        generation=read_json(generation) if generation.exists() else {},
        notices=(*notices, *aside),
    )


def check_name(stored: Stored) -> None:
    """CheckpointError for a name that no tensor of this model has, and that no sentence should quote."""
    if len(stored.name) > _LONGEST or not stored.name.isprintable():
        raise CheckpointError(
            f"{stored.file} has a tensor {short(repr(stored.name))}; no tensor of this model is called so"
        )


def check_whole(*parts: Stored) -> None:
    """CheckpointError where dtype and shape do not account for the bytes."""
    for part in parts:
        if not part.is_whole:
            raise CheckpointError(
                f"{part.name} in {part.file} is {short(part.dtype)} of shape {short(list(part.shape))}, which this "
                f"engine cannot read from {part.nbytes} bytes"
            )


def entry_of(name: str, parts: Sequence[Stored], codes: Codes) -> Entry:
    """The entry of what these tensors of a file are together."""
    nbytes = sum(part.nbytes for part in parts)
    return Entry(name, codes.shape, nbytes, codes.stored, codes.values, codes.packed, codes.fallback)


def linears(
    stored_by_name: Mapping[str, Stored], block: BlockSize = (BLOCK, BLOCK)
) -> tuple[dict[str, Entry], list[str]]:
    """Every weight by its released name, a module's codes and scales made one; and what is left aside, a sentence each.

    CheckpointError names codes without scales, scales without codes, shapes and dtypes that do not go together."""
    entries: dict[str, Entry] = {}
    aside: Counter[str] = Counter()
    paired: set[str] = set()
    beside = (*_COMPANIONS, *_BESIDE)
    for name, stored in stored_by_name.items():
        module, _, part = name.rpartition(".")
        check_name(stored)
        if part in beside:
            continue
        if _ASIDE.fullmatch(part):
            aside[part] += 1
            continue
        parts = {key: stored_by_name[f"{module}.{key}"] for key in beside if f"{module}.{key}" in stored_by_name}
        if part == "weight_packed" or (part == "weight" and parts):
            if f"{module}.weight" in entries or (part == "weight_packed" and f"{module}.weight" in stored_by_name):
                raise CheckpointError(f"{module} has both weight and weight_packed in {stored.file}; one must go")
            paired.update(one.name for one in parts.values())
            entries[f"{module}.weight"] = _coded(f"{module}.weight", stored, parts, block)
        else:
            entries[name] = _plain(stored)
    for name, stored in stored_by_name.items():
        if name.rpartition(".")[2] in beside and name not in paired:
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


def _coded(name: str, codes: Stored, parts: Mapping[str, Stored], block: BlockSize) -> Entry:
    """The entry of a module's codes and scales, whichever of the layouts they are."""
    check_whole(codes, *parts.values())
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise CheckpointError(
            f"{codes.name} in {codes.file} has the shape {short(list(codes.shape))}; codes lie in [O, I]"
        )
    scale = parts.get("weight_scale") or parts.get("weight_scale_inv")
    if scale is None:
        raise CheckpointError(f"{codes.file} lacks the weight_scale of {codes.name}")
    for one, other in (("weight_scale", "weight_scale_inv"), ("weight_global_scale", "weight_scale_2")):
        if one in parts and other in parts:
            raise CheckpointError(f"{codes.name} in {codes.file} has both {one} and {other}; one must go")
    together = _together(codes, scale, parts, block)
    if smooth := parts.get("pre_quant_scale"):
        together = _smoothed(codes, smooth, together)
    return entry_of(name, (codes, *parts.values()), together)


def _together(codes: Stored, scale: Stored, parts: Mapping[str, Stored], block: BlockSize) -> Codes:
    outer = parts.get("weight_global_scale") or parts.get("weight_scale_2")
    zero = parts.get("weight_zero_point")
    is_indexed = "weight_g_idx" in parts
    if codes.dtype in KINDS and outer is None and zero is None and not is_indexed:
        return eight_bits(codes, scale, block)
    if codes.dtype == "I32" and outer is None:
        return _integers(codes, scale, zero, parts.get("weight_shape"), parts.get("weight_g_idx"))
    if codes.dtype == "U8" and zero is None and not is_indexed:
        if scale.dtype in SCALES and outer is None:
            return _int4_by_outputs(codes, scale)
        return _fp4(codes, scale, outer)
    raise CheckpointError(
        f"{codes.name} in {codes.file} is {codes.dtype} with {', '.join(parts)}; this is none of the layouts that "
        "are read: fp8, mxfp8, int8, int4, nvfp4, mxfp4"
    )


def _fp4(codes: Stored, scale: Stored, outer: Stored | None) -> Codes:
    """nvfp4, with a scale of the whole module (`outer`), or mxfp4, without one."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    kind, group, dtypes = ("nvfp4", 16, ("F8_E4M3",)) if outer else ("mxfp4", 32, EXPONENTS)
    need(scale, codes, dtypes, {(rows, columns // group)} if columns % group == 0 else set())
    if outer:
        need(outer, codes, ("F32",), {(), (1,)})

    def packed(first: int, last: int) -> Packed:
        factor = _outer(outer).expand(last - first).contiguous() if outer else None
        return Packed(
            kind, (last - first, columns), codes.read(first, last), finite(scale, first, last), group, factor=factor
        )

    def divided(first: int, last: int) -> Tensor:
        """As compressed-tensors computes it: each scale divided by the global one, rounded, times the code.

        A factor can only multiply by the inverse, which may differ in the last bits."""
        assert outer is not None
        scales = finite(scale, first, last).float() / _whole(outer)
        return Packed("nvfp4", (last - first, columns), codes.read(first, last), scales, 16).dense()

    is_divided = outer is not None and outer.name.endswith("weight_global_scale")
    return Codes(kind, (rows, columns), packed, divided if is_divided else None)


def _whole(outer: Stored) -> Tensor:
    value = finite(outer).reshape(())
    if outer.name.endswith("weight_global_scale") and not (value > 0 and torch.isfinite(1 / value)):
        raise CheckpointError(
            f"{outer.name} in {outer.file} is {float(value)}; scales are divided by it, so that it must be above 0"
        )
    return value


def _outer(outer: Stored) -> Tensor:
    """What the scales are multiplied by: modelopt's second scale, or one over compressed-tensors' global scale."""
    return 1 / _whole(outer) if outer.name.endswith("weight_global_scale") else _whole(outer)


def _integers(codes: Stored, scale: Stored, zero: Stored | None, shape: Stored | None, index: Stored | None) -> Codes:
    """Codes of 2 to 8 bits in words along the inputs, zero points so too but along the outputs, and perhaps an index.

    Without zero points the middle code stands for zero."""
    rows = codes.shape[0]
    bits, columns = _width(codes, shape)
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[1] else 0
    fits = groups and columns % groups == 0 and (columns // groups) % 2 == 0
    need(scale, codes, SCALES, {(rows, groups)} if fits else set())
    if zero:
        need(zero, codes, ("I32",), {(-(-rows * bits // 32), groups)})
    group = columns // groups
    group_of = group_index(index, columns, groups, group)

    def parts(first: int, last: int) -> tuple[Tensor, Tensor, Tensor | None]:
        points = unpacked(zero.read().T, bits, rows).T[first:last] if zero else None
        return unpacked(codes.read(first, last), bits, columns), finite(scale, first, last), points

    def packed(first: int, last: int) -> Packed:
        code, scales, points = parts(first, last)
        return grouped(code, bits, scales, points, group)

    def read(first: int, last: int) -> Tensor:
        code, scales, points = parts(first, last)
        in_order = torch.arange(columns) // group
        return values(code, bits, scales, points, in_order if group_of is None else group_of)

    label = f"int{bits} in groups of {group}"
    if group_of is None:
        return Codes(label, (rows, columns), packed, read)
    return Codes(f"{label}, act order", (rows, columns), None, read, FALLBACK)


def _width(codes: Stored, shape: Stored | None) -> tuple[int, int]:
    """Bits of a code, and inputs: from the shape that stands beside the codes, or 4 bits where there is none."""
    rows, words = codes.shape
    if shape is None:
        return 4, words * 8
    need(shape, codes, ("I64", "I32"), {(2,)})
    outputs, inputs = shape.read().tolist()
    for bits in range(2, 9):
        if outputs == rows and inputs > 0 and -(-inputs * bits // 32) == words:
            return bits, inputs
    raise CheckpointError(
        f"{shape.name} in {shape.file} says [{outputs}, {inputs}]; {codes.name} of shape {list(codes.shape)} holds "
        "that in no width from 2 to 8 bits"
    )


def _int4_by_outputs(codes: Stored, scale: Stored) -> Codes:
    """modelopt's: signed codes of two neighbouring outputs in a byte, the even one low."""
    rows, columns = 2 * codes.shape[0], codes.shape[1]
    groups = scale.shape[1] if len(scale.shape) == 2 and scale.shape[1] else 0
    fits = groups and columns % groups == 0 and (columns // groups) % 2 == 0
    need(scale, codes, SCALES, {(rows, groups)} if fits else set())

    def packed(first: int, last: int) -> Packed:
        data = codes.read(first // 2, -(-last // 2))
        code = torch.stack([data & 15, data >> 4], 1).flatten(0, 1)[first % 2 :][: last - first]
        return grouped(code ^ 8, 4, finite(scale, first, last), None, columns // groups)

    return Codes(f"int4 in groups of {columns // groups}", (rows, columns), packed)


def _smoothed(codes: Stored, smooth: Stored, together: Codes) -> Codes:
    """A weight, and a scale for each of its inputs: both are made one, for which there are no codes."""
    need(smooth, codes, SCALES, {together.shape[-1:]})

    def read(first: int, last: int) -> Tensor:
        return together.values(first, last) * finite(smooth).float()

    return Codes(f"{together.stored}, inputs scaled", together.shape, None, read, FALLBACK)
