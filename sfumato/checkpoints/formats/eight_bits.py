"""Weights of 8 bits a code, [O, I] or stacks of experts [E, O, I], and the scales that tools write beside them.

    int8   a scale an output, or for a group of inputs
    fp8    e4m3; a scale for the tensor, an output, or a block of outputs and inputs
    mxfp8  e4m3 with an exponent of two for 32 inputs

A scale for a block of any size becomes one for a power of two of outputs that divides it (`Packed.block_rows`), and for
128 inputs where these divide it, so that a weight stays packed whatever its sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.checkpoints.formats.groups import narrowed
from sfumato.checkpoints.formats.scales import EXPONENTS, SCALES, Codes, finite, in_float32, need
from sfumato.checkpoints.shards import Stored
from sfumato.errors import InputError
from sfumato.ops.packed import BLOCK, Packed

KINDS = {"F8_E4M3": "fp8", "I8": "int8"}
"""Codes' dtypes and what they stand for."""
BlockSize = tuple[int, int]
"""Outputs and inputs that share a scale."""


def eight_bits(codes: Stored, scale: Stored, block: BlockSize = (BLOCK, BLOCK)) -> Codes:
    """What codes of 8 bits and their scales are together. CheckpointError where the shapes do not go together."""
    kind, (*_, rows, columns) = KINDS[codes.dtype], codes.shape
    stack = codes.shape[:-2]
    grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if kind == "fp8" and scale.dtype in EXPONENTS:
        need(scale, codes, EXPONENTS, {grid, *([(*stack, rows, columns // 32)] if columns % 32 == 0 else [])})
        if columns % 32 == 0 and scale.shape == (*stack, rows, columns // 32):
            return _mxfp8(codes, scale)
        return _by_blocks(codes, scale, block)
    if kind == "int8" and not stack and len(scale.shape) == 2 and scale.shape[1] > 1 and columns % scale.shape[1] == 0:
        need(scale, codes, SCALES, {(rows, scale.shape[1])})
        return _int8_by_groups(codes, scale)
    if stack and block[0] >= rows and rows % 2 == 0 and scale.shape == (*stack, 2, grid[-1]):
        # transformers gives gate and up a scale each, however few their outputs are (`_alloc_expert_proj`).
        need(scale, codes, SCALES, {scale.shape})
        return _by_rows(codes, scale) if grid[-1] == 1 else _by_blocks(codes, scale, (rows // 2, block[1]))
    if stack:
        need(scale, codes, SCALES, {stack, (*stack, 1), (*stack, 1, 1), (*stack, rows), (*stack, rows, 1), grid})
    else:
        need(scale, codes, SCALES, {(rows, 1), (rows,), (), (1,), (1, 1), *([grid] if kind == "fp8" else [])})
    is_by_blocks = scale.shape == grid and grid[-2:] != (1, 1) and scale.shape != (*stack, rows, 1)
    return _by_blocks(codes, scale, block) if is_by_blocks else _by_rows(codes, scale)


def _by_rows(codes: Stored, scale: Stored) -> Codes:
    """A scale an output, or one for several or all of them."""
    kind, (*_, rows, columns) = KINDS[codes.dtype], codes.shape
    is_stack = len(codes.shape) == 3
    # A matrix is read some outputs at a time, and so are its scales where each has one.
    each = not is_stack and scale.shape[:1] == (rows,)

    def packed(first: int, last: int) -> Packed:
        shape = (last - first, *codes.shape[1:])
        if is_stack:
            scales = in_float32(scale, first, last).reshape(last - first, -1)
            scales = scales.repeat_interleave(rows // scales.shape[1], 1)
        else:
            scales = (in_float32(scale, first, last) if each else in_float32(scale)).reshape(-1)
            scales = scales.expand(last - first).contiguous()
        return Packed(kind, shape, codes.read(first, last), scales, columns)

    return Codes(kind, codes.shape, packed)


def _by_blocks(codes: Stored, scale: Stored, block: BlockSize) -> Codes:
    *stack, rows, columns = codes.shape
    height = 1 if stack else block[0]
    """Places of the first axis that share scales."""
    width = BLOCK if block[1] % BLOCK == 0 else block[1]

    def packed(first: int, last: int) -> Packed:
        if first % height:
            raise InputError(f"{codes.name} has scales by blocks of {height} rows; row {first} begins none")
        scales = in_float32(scale, first // height, -(-last // height))
        size = math.gcd(block[0], BLOCK)
        outputs = rows if stack else last - first
        scales = scales.repeat_interleave(block[0] // size, -2)[..., : -(-outputs // size), :]
        scales = scales.repeat_interleave(block[1] // width, -1)[..., : -(-columns // width)].contiguous()
        return Packed("fp8", (last - first, *codes.shape[1:]), codes.read(first, last), scales, width)

    def read(first: int, last: int) -> Tensor:
        """Values may be asked for from within a block, codes may not."""
        return packed(first - first % height, last).dense()[first % height :]

    return Codes("fp8 by blocks", codes.shape, packed, read)


def _mxfp8(codes: Stored, scale: Stored) -> Codes:
    def packed(first: int, last: int) -> Packed:
        shape = (last - first, *codes.shape[1:])
        return Packed("mxfp8", shape, codes.read(first, last), finite(scale, first, last), 32)

    return Codes("mxfp8", codes.shape, packed)


def _int8_by_groups(codes: Stored, scale: Stored) -> Codes:
    columns = codes.shape[1]
    group = columns // scale.shape[1]

    def packed(first: int, last: int) -> Packed:
        scales, small = narrowed(in_float32(scale, first, last), group, columns)
        return Packed("int8", (last - first, columns), codes.read(first, last), scales, small)

    return Codes(f"int8 in groups of {group}", codes.shape, packed)


def mxfp4_stack(codes: Stored, scale: Stored) -> Codes:
    """e2m1 codes in a stack [E, O, I / 2], two a byte, with an exponent of two for 32 inputs."""
    *outer, halved = codes.shape
    need(scale, codes, EXPONENTS, {(*outer, halved // 16)} if halved % 16 == 0 else set())

    def packed(first: int, last: int) -> Packed:
        shape = (last - first, *outer[1:], 2 * halved)
        return Packed("mxfp4", shape, codes.read(first, last).view(torch.uint8), finite(scale, first, last), 32)

    return Codes("mxfp4", (*outer, 2 * halved), packed)
