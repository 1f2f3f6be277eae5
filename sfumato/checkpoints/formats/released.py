"""The released layout, and our own in fewer bits: plain safetensors under the released names.

A weight that is packed lies as `NAME.data`, `NAME.scale` and what else its format has; which format is in the header's
metadata under "sfumato.formats". Large parts are mapped, not read: pages of the file that the system fetches when they
are looked at, and that all processes share. Every writer here replaces such a file by renaming a new one over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.experts import fused
from sfumato.checkpoints.shards import NAMES, PART, Planned, Stored, metadata, short, stored_tensors
from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig
from sfumato.ops.packed import BLOCK, Packed
from sfumato.quant.calibrate import fitted
from sfumato.quant.formats import Format

METHOD = "sfumato"
"""What `quantization_config.quant_method` of config.json says of our own files."""
FLOATS = ("BF16", "F16", "F32", "F64")
_FORMATS = "sfumato.formats"
_MAPPED = 1 << 20
"""Bytes from which on a part is mapped."""


def open_released(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """A folder of plain safetensors, or of our own; experts may be apart, or named as mlx-vlm names them unquantised.

    CheckpointError names what is wrong with a file or a tensor."""
    stored = stored_tensors(folder)
    quantization = config.get("quantization_config") or {}
    if not quantization:
        count = ModelConfig.from_dict(config, str(folder / "config.json")).num_experts
        entries = fused({name: plain_entry(name, one) for name, one in stored.items()}, count)
        return Checkpoint(folder, "safetensors", config, entries)
    formats = _formats(folder, metadata(folder).get(_FORMATS, ""))
    entries = {}
    for name, (form, shape) in formats.items():
        entries[name] = _packed_entry(folder, name, form, shape, stored)
    entries |= {name: plain_entry(name, one) for name, one in stored.items()}
    return Checkpoint(folder, f"Sfumato {quantization.get('recipe', '')}".strip(), config, entries)


def _is_released(folder: Path, quantization: dict[str, Any]) -> bool:
    return not quantization or quantization.get("quant_method") == METHOD


READER = FormatReader(METHOD, _is_released, open_released)


def plain_entry(name: str, stored: Stored, at: str = "") -> Entry:
    """A tensor as it lies, of floats. CheckpointError where it is none."""
    if stored.dtype not in FLOATS or not stored.is_whole:
        raise CheckpointError(
            f"{at or name} in {stored.file} is stored as {short(stored.dtype)}; weights must be {', '.join(FLOATS)}"
        )
    return Entry(name, stored.shape, stored.nbytes, stored.dtype, stored.read)


def _formats(folder: Path, text: str) -> dict[str, tuple[Format, tuple[int, ...]]]:
    try:
        formats = {}
        for name, (form, shape) in dict(json.loads(text)).items():
            if not (isinstance(shape, list) and len(shape) in (2, 3) and all(type(n) is int and n > 0 for n in shape)):
                raise ValueError(f"{name} has the shape {shape}")
            formats[str(name)] = Format.named(form), tuple(shape)
        return formats
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} says that it is quantised, but its header's {_FORMATS} cannot be read: {short(error)}"
        ) from error


def _packed_entry(folder: Path, name: str, form: Format, shape: tuple[int, ...], stored: dict[str, Stored]) -> Entry:
    """Takes its parts out of `stored`."""
    parts = {}
    for part, (dtype, expected) in form.parts(shape).items():
        one = stored.pop(f"{name}.{part}", None)
        if one is None:
            raise CheckpointError(f"{folder} lacks {name}.{part}, which {form.name} needs")
        if one.shape != expected or one.dtype != NAMES[dtype] or not one.is_whole:
            raise CheckpointError(
                f"{one.name} in {one.file} is {short(one.dtype)} {short(list(one.shape))}; {form.name} needs "
                f"{NAMES[dtype]} {list(expected)}"
            )
        parts[part] = one
    group = form.group_of(shape[-1])
    block = BLOCK if form.is_in_blocks and len(shape) == 2 else 1  # rows of a matrix that share scales

    def packed(first: int, last: int) -> Packed:
        if first % block:
            raise ValueError(f"codes of a matrix with scales by blocks begin with a block, not at {first}")
        tensors = {}
        for part, one in parts.items():
            rows = (first, last) if part == "data" else (first // block, -(-last // block))
            tensors[part] = one.map() if one.nbytes >= _MAPPED and rows == (0, one.shape[0]) else one.read(*rows)
        return Packed(form.kind, (last - first, *shape[1:]), tensors.pop("data"), group=group, **tensors)

    nbytes = sum(one.nbytes for one in parts.values())

    def read(first: int, last: int) -> Tensor:
        return packed(first - first % block, last).dense()[first % block :]

    return Entry(name, shape, nbytes, form.name, read, packed)


# ---- writing --------------------------------------------------------------------------------------------------------


def plan_released(
    checkpoint: Checkpoint,
    format_of: Callable[[str], Format | None],
    calibration: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Planned], dict[str, str]]:
    """Every entry of a checkpoint under its released name, as a tensor to be written; and the header's metadata.

    Where `format_of(name)` names a format the weight is packed, or copied if the checkpoint holds it in that very
    format; elsewhere it is in `dtype` (None: bfloat16, or what it is stored in)."""
    planned: list[Planned] = []
    formats: dict[str, tuple[str, list[int]]] = {}
    for name, entry in checkpoint.entries.items():
        form = format_of(name) if len(entry.shape) in (2, 3) else None
        if form is None:
            planned.append(_plan_plain(entry, dtype))
            continue
        formats[name] = form.name, list(entry.shape)
        packing = _Packing(entry, form, (calibration or {}).get(name))
        for part, (kept, shape) in form.parts(entry.shape).items():
            take = packing.data if part == "data" else packing.rest(part)
            planned.append(Planned(f"{name}.{part}", NAMES[kept], shape, take, part != "data"))
    return planned, {_FORMATS: json.dumps(formats, separators=(",", ":"))} if formats else {}


def places(entry: Entry, itemsize: int = 4) -> Iterator[tuple[int, int]]:
    """Parts of the first axis of which each is at most `PART` bytes, at so many bytes an element, or a single place."""
    if not entry.shape:
        yield 0, 1
        return
    step = max(1, PART // max(1, math.prod(entry.shape[1:]) * itemsize))
    for first in range(0, entry.shape[0], step):
        yield first, min(first + step, entry.shape[0])


def _plan_plain(entry: Entry, dtype: torch.dtype | None) -> Planned:
    kept = dtype or {"F16": torch.float16, "F32": torch.float32}.get(entry.stored, torch.bfloat16)

    def parts() -> Iterator[Tensor]:
        for first, last in places(entry):
            yield entry.read(first, last).to(kept)

    return Planned(entry.name, NAMES[kept], entry.shape, parts)


class _Packing:
    """A weight being packed, a part at a time: its data go out as they come, the rest is kept until it is asked for."""

    def __init__(self, entry: Entry, form: Format, calibration: Tensor | None) -> None:
        self.entry, self.form, self.calibration = entry, form, calibration
        self.kept: dict[str, list[Tensor]] = {}

    def data(self) -> Iterator[Tensor]:
        self.kept.clear()
        for packed in packed_parts(self.entry, self.form, self.calibration):
            for part, tensor in packed.parts.items():
                if part != "data":
                    self.kept.setdefault(part, []).append(tensor)
            yield packed.data

    def rest(self, part: str) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter(self.kept.pop(part))


def packed_parts(entry: Entry, form: Format, calibration: Tensor | None = None) -> Iterator[Packed]:
    """An entry in this format, some places of its first axis at a time; copied where it is stored so."""
    is_whole = len(entry.shape) == 2 and not form.rows_are_apart
    for first, last in [(0, entry.shape[0])] if is_whole else places(entry):
        if entry.packed is not None and entry.stored == form.name:
            yield entry.packed(first, last)
            continue
        some = calibration if calibration is None or len(entry.shape) == 2 else calibration[first:last]
        yield fitted(entry.read(first, last), form, some)


def joined(parts: list[Packed]) -> Packed:
    """Parts of the first axis, together again."""
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    tensors = {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts}
    return Packed(parts[0].kind, shape, tensors.pop("data"), group=parts[0].group, **tensors)
