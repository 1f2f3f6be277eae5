"""Experts that a file keeps apart, as the stacks that the release has: gate over up, all experts in one tensor.

The result is put together when it is read, and as codes where one form holds all its parts (`mixtures`). Where none
does, the stack is rounded once more when it is loaded (`Entry.fallback`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.checkpoints.checkpoint import FALLBACK, Entry
from sfumato.checkpoints.formats.mixtures import brought, common, form_of
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed

_ONE = re.compile(r"(.*\.experts)\.(\d{1,6})\.((?:gate|up|gate_up|down)_proj)\.weight", re.ASCII | re.DOTALL)
_ALL = re.compile(r"(.*\.experts)\.(?:switch_glu\.)?((?:gate|up|gate_up|down)_proj)\.weight", re.ASCII | re.DOTALL)
"""The latter of a stack; MLX's Gemma 4 has a module more around it."""


def fused(entries: Mapping[str, Entry], count: int) -> dict[str, Entry]:
    """Entries with each layer's experts in two stacks, `gate_up_proj [E, 2F, D]` and `down_proj [E, D, F]`.

    The file may have in their place a matrix an expert (`experts.7.up_proj.weight`), gate and up in stacks of their
    own, or the stacks themselves with `.weight` after their name. All else is passed through. `count` is the number of
    experts. CheckpointError names an expert that is missing, twice there or of another shape."""
    whole: dict[str, Entry] = {}
    alone: dict[str, dict[int, Entry]] = {}
    for name, entry in entries.items():
        if match := _ONE.fullmatch(name):
            stack, number = f"{match[1]}.{match[3]}", int(match[2])
            if number in alone.setdefault(stack, {}) or number >= count:
                raise CheckpointError(f"{short(name)} is one expert too many; config.json asks for {count}")
            alone[stack][number] = entry
        else:
            match = _ALL.fullmatch(name)
            _add(whole, f"{match[1]}.{match[2]}" if match else name, entry)
    for stack, parts in alone.items():
        if len(parts) < count:
            missing = next(number for number in range(count) if number not in parts)
            raise CheckpointError(f"{short(stack)} lacks expert {missing} of {count}")
        _add(whole, stack, stacked(stack, [parts[number] for number in range(count)]))
    for name in [name for name in whole if name.endswith(".experts.gate_proj")]:
        prefix = name.removesuffix("gate_proj")
        if prefix + "up_proj" not in whole:
            raise CheckpointError(f"{short(name)} is there without its up_proj")
        together = prefix + "gate_up_proj"
        gate, up = replace(whole.pop(name), name=name), whole.pop(prefix + "up_proj")
        _add(whole, together, joined(together, gate, up))
    return {name: replace(entry, name=name) for name, entry in whole.items()}


def stacked(name: str, parts: Sequence[Entry]) -> Entry:
    """Matrices [O, I] of one shape, as [E, O, I]."""
    shape = parts[0].shape
    for part in parts:
        if part.shape != shape or len(shape) != 2:
            raise CheckpointError(
                f"{short(part.name)} has the shape {list(part.shape)}, expert 0 {list(shape)}; all experts of a "
                "layer must be matrices of one shape"
            )

    def read(first: int, last: int) -> Tensor:
        return torch.stack([part.read(0, shape[0]) for part in parts[first:last]])

    def packed(first: int, last: int) -> Packed:
        weights = [part.packed(0, shape[0]) for part in parts[first:last] if part.packed]
        return _combined(weights, (len(weights), *shape), torch.stack)

    return _whole(name, (len(parts), *shape), parts, read, packed)


def joined(name: str, gate: Entry, up: Entry) -> Entry:
    """Stacks [E, F, D], as one [E, 2F, D], the first above."""
    if gate.shape != up.shape or len(gate.shape) != 3:
        raise CheckpointError(
            f"{short(gate.name)} has the shape {list(gate.shape)}, and {short(up.name)} {list(up.shape)}; they must "
            "be stacks [experts, outputs, inputs] of one shape"
        )
    _, outputs, inputs = gate.shape

    def read(first: int, last: int) -> Tensor:
        return torch.cat([gate.read(first, last), up.read(first, last)], 1)

    def packed(first: int, last: int) -> Packed:
        weights = [_up_to_the_seam(part.packed(first, last)) for part in (gate, up) if part.packed]
        return _combined(weights, (last - first, 2 * outputs, inputs), lambda tensors: torch.cat(tensors, 1))

    return _whole(name, (gate.shape[0], 2 * outputs, inputs), [gate, up], read, packed)


def _up_to_the_seam(packed: Packed) -> Packed:
    """Blocks of rows do not go on over the seam: they are cut where one would."""
    if packed.kind != "fp8" or not packed.is_grouped:
        return packed
    return packed.in_blocks_of(math.gcd(packed.block_rows, packed.shape[-2]))


def _whole(
    name: str,
    shape: tuple[int, ...],
    parts: Sequence[Entry],
    read: Callable[[int, int], Tensor],
    packed: Callable[[int, int], Packed],
) -> Entry:
    """The entry that these parts make: codes where one form holds all; else rounded once more, never widened."""
    has_codes, nbytes = _have_codes(parts), sum(part.nbytes for part in parts)
    fallback = next((part.fallback or FALLBACK for part in parts if part.packed or part.fallback), None)
    form = packed if has_codes else None
    return Entry(name, shape, nbytes, _stored(parts), read, form, None if has_codes else fallback)


def _have_codes(parts: Sequence[Entry]) -> bool:
    """Whether all have codes, of what the file calls the same form or of forms that one holds; then a row is read."""
    packed = [part.packed for part in {part.stored: part for part in parts}.values() if part.packed]
    is_packed = all(part.packed for part in parts)
    return is_packed and (len(packed) == 1 or common([form_of(one(0, 1)) for one in packed]) is not None)


def _stored(parts: Sequence[Entry]) -> str:
    return " and ".join(dict.fromkeys(part.stored for part in parts))


def _combined(weights: Sequence[Packed], shape: tuple[int, ...], join: Callable[[list[Tensor]], Tensor]) -> Packed:
    form = common([form_of(weight) for weight in weights])
    if form is None:
        raise CheckpointError("the experts of one layer are quantised in different ways, which no form holds together")
    alike = [brought(weight, form) for weight in weights]
    whole: dict[str, Any] = {name: join([weight.parts[name] for weight in alike]) for name in alike[0].parts}
    return replace(alike[0], shape=shape, **whole)


def _add(entries: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in entries:
        raise CheckpointError(f"{short(name)} is there twice: whole, and in parts")
    entries[name] = entry
