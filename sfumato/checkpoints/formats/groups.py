"""Codes of 2 to 8 bits in groups of inputs, as GPTQ, AWQ and compressed-tensors have them: their values, and as ours.

A value is (code - zero) x scale, with one zero and one scale a group. Codes of up to 4 bits are our int4, of more our
int8 by groups. Where an index says which group each input belongs to, and it is not the order of the inputs ("act
order"), no format of ours says the same: such weights are rounded once more when they are loaded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.checkpoints.shards import Stored, short
from sfumato.errors import CheckpointError
from sfumato.ops.packed import Packed, paired

LEAST, LARGEST = 16, 128
"""Inputs of a group that every implementation takes."""


def values(codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None, group_of: Tensor) -> Tensor:
    """(code - zero) x scale in float32, [O, I]; scales and zeros are [O, G], `group_of` [I] says which an input has."""
    middle = 1 << bits - 1
    less = codes.float() - (middle if zero is None else zero.float()[:, group_of])
    product: Tensor = less * scale.float()[:, group_of]
    return product


def grouped(codes: Tensor, bits: int, scale: Tensor, zero: Tensor | None, group: int) -> Packed:
    """Codes [O, I] with scales and zeros [O, ceil(I / group)] as int4 or int8; zero None: the middle of the codes.

    Where the group does not divide the inputs, or is more than kernels take, scales are repeated for smaller ones.
    What it unpacks to is the same to the bit as `values`, unless scales are float32 and there are zeros: code x scale +
    bias rounds twice."""
    inputs, middle = codes.shape[1], 1 << bits - 1
    small = math.gcd(group, inputs)
    if bits > 4 and zero is None and small == inputs:  # one scale an output
        data = (codes.to(torch.int16) - middle).to(torch.int8)
        return Packed("int8", tuple(codes.shape), data, scale[:, 0].float(), inputs)
    scale, small = narrowed(scale, group, inputs)
    bias = None
    if zero is not None:
        scale = scale.float()
        bias = narrowed(zero, group, inputs)[0].float() * -scale
    if bits > 4:
        data = codes if zero is not None else (codes.to(torch.int16) - middle).to(torch.int8)
        return Packed("int8", tuple(codes.shape), data.contiguous(), scale.float().contiguous(), small, bias)
    data = codes if zero is not None else codes + (8 - middle)
    data = paired(data)
    return Packed("int4", tuple(codes.shape), data, scale.contiguous(), small, bias)


def narrowed(scale: Tensor, group: int, inputs: int) -> tuple[Tensor, int]:
    """Scales [.., ceil(I / group)] for groups that divide the inputs and that kernels take, and how large these are.

    Scales of larger groups are repeated."""
    small = math.gcd(group, inputs)
    if small > LARGEST and math.gcd(small, LARGEST) >= LEAST:
        small = math.gcd(small, LARGEST)
    if small == group:
        return scale, group
    return scale.repeat_interleave(group // small, -1)[..., : inputs // small].contiguous(), small


def group_index(index: Stored | None, inputs: int, groups: int, group: int) -> Tensor | None:
    """Which group each input belongs to, int64 [I], read from the file; None where that is their order.

    CheckpointError for an index of another size, or one that names groups that there are not."""
    if index is None:
        return None
    if index.dtype not in ("I32", "I64") or index.shape != (inputs,) or not index.is_whole:
        raise CheckpointError(
            f"{short(index.name)} in {index.file} is {short(index.dtype)} of shape {short(list(index.shape))}; it must "
            f"be I32 of shape [{inputs}], a group for each input"
        )
    group_of = index.read().long()
    in_order = torch.arange(inputs) // group
    if torch.equal(group_of, in_order) or bool((group_of == -1).all()):  # -1: nobody has filled it in
        return None
    if bool((group_of < 0).any()) or bool((group_of >= groups).any()):
        raise CheckpointError(
            f"{short(index.name)} in {index.file} names groups from {int(group_of.min())} to {int(group_of.max())}; "
            f"there are {groups}, counted from 0"
        )
    return group_of
