"""bitsandbytes checkpoints (quant_method "bitsandbytes"): NF4 and FP4, and LLM.int8, read as ours.

A weight `X` in 4 bits lies as one column of bytes (or of a wider dtype that holds them), two codes each, the first one
high, over all its values one after another; beside it `X.absmax`, a scale for each block of values, `X.quant_map`, what
the 16 codes stand for, and `X.quant_state.bitsandbytes__nf4` (or fp4), bytes of JSON with type, block and shape. Scales
may be 8-bit codes themselves, with `X.nested_absmax`, `X.nested_quant_map` and an offset in the JSON. These are our nf4
and fp4: where blocks do not end with the rows, scales are repeated for what divides both.

LLM.int8 keeps int8 codes as `X.weight` and the largest magnitude of each output as `X.SCB`.

Source: bitsandbytes 0.50, functional.py (`QuantState`, `dequantize_4bit`), backends/default/ops.py, nn/modules.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import Checkpoint, Entry, FormatReader
from sfumato.checkpoints.formats.groups import LARGEST
from sfumato.checkpoints.formats.linears import check_name, check_whole, entry_of, open_linears
from sfumato.checkpoints.formats.scales import Codes, finite
from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import CODES, Packed

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_LONGEST = 4096
"""Bytes of a JSON that says how one weight is stored; bitsandbytes writes about 200."""
_PART_OF_127 = 7.874015718698502e-3
"""By which LLM.int8 multiplies in the place of a division by 127."""


@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a weight says."""

    kind: str
    """nf4 or fp4."""
    shape: tuple[int, ...]
    block: int
    """Values that share a scale."""
    nested_block: int
    """Scales that share a scale of their own."""
    offset: float
    """Added to scales that are codes."""


def open_bitsandbytes(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a folder whose config.json (`config`) says quant_method "bitsandbytes".

    Headers are read, and the few bytes that say how each weight is stored. CheckpointError names what is wrong."""
    settings = config.get("quantization_config")
    bits = 8 if isinstance(settings, dict) and settings.get("load_in_8bit") else 4
    return open_linears(folder, config, f"bitsandbytes {bits}-bit", own=_own)


def _own(stored: dict[str, Stored]) -> dict[str, Entry]:
    entries = {}
    for name in list(stored):
        if _STATE in name:
            state = stored.pop(name)
            check_name(state)
            weight_name, _, kind = name.partition(_STATE)
            parts = {part: stored.pop(f"{weight_name}.{part}", None) for part in _PARTS}
            weight = stored.pop(weight_name, None)
            if weight is None:
                raise CheckpointError(f"{state.file} has {name} without the weight that it belongs to")
            present = {part: one for part, one in parts.items() if one is not None}
            entries[weight_name] = _four_bits(weight, state, present, kind)
    for name in [name for name in stored if name.endswith(".SCB")]:
        scale, module = stored.pop(name), name.removesuffix(".SCB")
        check_name(scale)
        weight, row = stored.pop(f"{module}.weight", None), stored.pop(f"{module}.weight_format", None)
        if weight is None:
            raise CheckpointError(f"{scale.file} has the scales {name} without the weight that they belong to")
        entries[f"{module}.weight"] = _eight_bits(weight, scale, row)
    return entries


def _eight_bits(weight: Stored, scale: Stored, layout: Stored | None) -> Entry:
    check_whole(weight, scale)
    if weight.dtype != "I8" or len(weight.shape) != 2 or scale.dtype != "F32" or scale.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{weight.name} in {weight.file} is {short(weight.dtype)} of shape {short(list(weight.shape))} and its SCB "
            f"{short(scale.dtype)} of shape {short(list(scale.shape))}; they must be I8 [O, I] and F32 [O]"
        )
    if layout is not None:
        check_whole(layout)
        if layout.nbytes > 8 or bool(layout.read().any()):
            raise CheckpointError(f"{layout.name} in {layout.file} says that codes do not lie in rows; not read")

    def packed(first: int, last: int) -> Packed:
        scales = finite(scale, first, last) * _PART_OF_127
        return Packed("int8", (last - first, weight.shape[1]), weight.read(first, last), scales, weight.shape[1])

    def read(first: int, last: int) -> Tensor:
        """In the order in which bitsandbytes multiplies; `packed` may differ in the last bit."""
        values: Tensor = weight.read(first, last) * finite(scale, first, last)[:, None] * _PART_OF_127
        return values

    return entry_of(weight.name, (weight, scale), Codes("LLM.int8", weight.shape, packed, read))


def _four_bits(weight: Stored, state: Stored, parts: dict[str, Stored], kind: str) -> Entry:
    check_whole(weight, state, *parts.values())
    says = _state(state, kind)
    count = math.prod(says.shape)
    blocks = -(-count // says.block)
    nested = "nested_absmax" in parts
    expected = {
        "quant_map": ("F32", (16,)),
        "absmax": ("U8" if nested else "F32", (blocks,)),
        **({"nested_absmax": ("F32", (-(-blocks // says.nested_block),))} if nested else {}),
        **({"nested_quant_map": ("F32", (256,))} if nested or "nested_quant_map" in parts else {}),
    }
    if 2 * weight.nbytes != count:
        raise CheckpointError(
            f"{weight.name} in {weight.file} has {weight.nbytes} bytes; its quant_state says {list(says.shape)}, two "
            "values a byte"
        )
    for part, (dtype, shape) in expected.items():
        one = parts.get(part)
        if one is None or (one.dtype, one.shape) != (dtype, shape):
            there = "is missing" if one is None else f"is {short(one.dtype)} of shape {short(list(one.shape))}"
            raise CheckpointError(
                f"{weight.name}.{part} in {weight.file} {there}; it must be {dtype} of shape {list(shape)}"
            )
    inputs, each = says.shape[-1], count // says.shape[0]
    group = math.gcd(inputs, says.block)
    group = math.gcd(group, LARGEST) if group > LARGEST else group  # a power of two

    def packed(first: int, last: int) -> Packed:
        _check_map(parts["quant_map"], kind)
        data = _bytes(weight, first * each // 2, last * each // 2)
        of = torch.arange(first * each // group, last * each // group) * group // says.block
        scale = _absmax(parts, says)[of].view(last - first, *says.shape[1:-1], inputs // group)
        data = (data << 4 | data >> 4).view(last - first, *says.shape[1:-1], inputs // 2)
        return Packed(kind, (last - first, *says.shape[1:]), data, scale, group)

    return entry_of(weight.name, (weight, state, *parts.values()), Codes(f"bitsandbytes {kind}", says.shape, packed))


def _bytes(weight: Stored, first: int, last: int) -> Tensor:
    if weight.dtype == "U8" and weight.shape == (weight.nbytes, 1):
        return weight.read(first, last).flatten()
    return weight.read().reshape(-1).view(torch.uint8)[first:last]


def _absmax(parts: dict[str, Stored], says: QuantState) -> Tensor:
    if "nested_absmax" not in parts:
        return finite(parts["absmax"])
    of = torch.arange(parts["absmax"].shape[0]) // says.nested_block
    codes = parts["absmax"].read().int()
    return finite(parts["nested_quant_map"])[codes] * finite(parts["nested_absmax"])[of] + says.offset


def _check_map(stored: Stored, kind: str) -> None:
    table = torch.tensor(CODES[kind].table)
    if not torch.equal(stored.read() + 0.0, table + 0.0):
        raise CheckpointError(f"{stored.name} in {stored.file} is not the table of {kind}; other tables are not read")


def _state(state: Stored, kind: str) -> QuantState:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{state.name} in {state.file} {what}")

    if kind not in ("nf4", "fp4"):
        raise wrong(f"is of the type {short(kind)}; nf4 and fp4 are read")
    if state.dtype != "U8" or len(state.shape) != 1 or not 0 < state.nbytes <= _LONGEST:
        raise wrong(f"is {short(state.dtype)} of {state.nbytes} bytes; it must be U8, at most {_LONGEST} of them")
    try:
        says = json.loads(bytes(state.read().tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise wrong("holds no JSON") from error
    if not isinstance(says, dict) or says.get("quant_type", kind) != kind:
        raise wrong(f"says {short(says)}; it must be an object, of the type {kind}")
    shape, offset = says.get("shape"), says.get("nested_offset", 0.0)
    block, nested_block = says.get("blocksize", 0), says.get("nested_blocksize", 256)
    if not (
        isinstance(shape, list) and len(shape) in (2, 3) and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    ):
        raise wrong(f"says the shape {short(shape)}; it must be [O, I] or [E, O, I]")
    if shape[-1] % 2:
        raise wrong(f"says the shape {short(shape)}; rows of an odd number of values are not read")
    if not (_is_power_of_two(block) and _is_power_of_two(nested_block)):
        raise wrong(f"says blocksize {short(block)}, nested_blocksize {short(nested_block)}; both are powers of two")
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise wrong(f"says nested_offset {short(offset)}; it must be a finite number")
    return QuantState(kind, tuple(shape), block, nested_block, float(offset))


def _is_power_of_two(value: Any) -> bool:
    return type(value) is int and 2 <= value <= 1 << 20 and value & value - 1 == 0


def _is_bitsandbytes(folder: Path, quantization: dict[str, Any]) -> bool:
    return quantization.get("quant_method") == METHOD


READER = FormatReader(METHOD, _is_bitsandbytes, open_bitsandbytes)
