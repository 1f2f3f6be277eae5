"""Experts that a file keeps apart, as the stacks that the release has: gate over up, all experts in one tensor.

The result is put together when it is read, and as codes where all its parts are codes of one form. Where they are
codes of several, the stack is rounded once more when it is loaded (`Entry.fallback`).
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
from sfumato.checkpoints.shards import short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed

_ONE = re.compile(r"(.*\.experts)\.(\d{1,6})\.((?:gate|up|gate_up|down)_proj)\.weight", re.ASCII | re.DOTALL)
_ALL = re.compile(r"(.*\.experts\.(?:gate|up|gate_up|down)_proj)\.weight", re.ASCII | re.DOTALL)


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
            _add(whole, match[1] if match else name, entry)
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
        forms = [part.packed(0, shape[0]) for part in parts[first:last] if part.packed]
        return _combined(forms, (len(forms), *shape), torch.stack)

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
        forms = [_up_to_the_seam(part.packed(first, last)) for part in (gate, up) if part.packed]
        return _combined(forms, (last - first, 2 * outputs, inputs), lambda tensors: torch.cat(tensors, 1))

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
    """The entry that these parts make: with codes where they are alike, and else rounded once more, never widened."""
    stored, are_codes = parts[0].stored, _alike(parts)
    fallback = next((part.fallback or FALLBACK for part in parts if part.packed or part.fallback), None)
    if fallback and not are_codes:
        stored = " and ".join(dict.fromkeys(part.stored for part in parts))
    nbytes = sum(part.nbytes for part in parts)
    return Entry(name, shape, nbytes, stored, read, packed if are_codes else None, None if are_codes else fallback)


def _alike(parts: Sequence[Entry]) -> bool:
    """Whether all have codes, of what the file calls the same form."""
    return all(part.packed is not None and part.stored == parts[0].stored for part in parts)


def _combined(forms: Sequence[Packed], shape: tuple[int, ...], join: Callable[[list[Tensor]], Tensor]) -> Packed:
    def form_of(form: Packed) -> tuple[Any, ...]:
        return form.kind, form.group, [(name, part.dtype) for name, part in form.parts.items()]

    if len({form.bias is None for form in forms}) == 2:
        forms = [_with_bias(form) for form in forms]
    if any(form_of(form) != form_of(forms[0]) for form in forms):
        raise CheckpointError("the experts of one layer are quantised in different ways; they must be alike")
    whole: dict[str, Any] = {name: join([form.parts[name] for form in forms]) for name in forms[0].parts}
    return replace(forms[0], shape=shape, **whole)


def _with_bias(form: Packed) -> Packed:
    """int4, or int8 by groups, with its zero as a bias in float32: what a form with zero points can stand beside."""
    if form.bias is not None or form.kind not in ("int4", "int8") or not form.is_grouped:
        return form
    scale = form.scale.float()
    if form.kind == "int4":
        return replace(form, scale=scale, bias=-8 * scale)
    return replace(form, data=(form.data.int() + 128).to(torch.uint8), scale=scale, bias=-128 * scale)


def _add(entries: dict[str, Entry], name: str, entry: Entry) -> None:
    if name in entries:
        raise CheckpointError(f"{short(name)} is there twice: whole, and in parts")
    entries[name] = entry
