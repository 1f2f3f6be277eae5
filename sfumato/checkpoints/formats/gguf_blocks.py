"""How GGUF stores numbers: blocks of codes along a row, to float32, to our packed weights, and back.

A row is cut into blocks of 32 or 256 values; a block holds codes, a scale in float16, in the K kinds also small integer
scales a group, and in some an offset. All of these say code x scale (+ offset), group by group, and so does `Packed`:
what is decoded here and what `Packed.dense` makes of `packed` are the same bits. Sources: ggml's block layouts
(ggml-common.h) and the order of operations of its reference (the gguf package's quants.py).

It lacks the 1- to 3-bit kinds and the IQ kinds. The encoders of Q4_K and Q6_K round to nearest, with no search for
better scales and no importance matrix: enough for tests and experiments, not for releases. Little-endian machines only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.ops.packed import Packed


@dataclass(frozen=True)
class BlockKind:
    """How a tensor is stored: blocks of `values` numbers in `nbytes` bytes."""

    name: str
    values: int
    nbytes: int


KINDS = {
    0: BlockKind("F32", 1, 4),
    1: BlockKind("F16", 1, 2),
    2: BlockKind("Q4_0", 32, 18),
    3: BlockKind("Q4_1", 32, 20),
    6: BlockKind("Q5_0", 32, 22),
    7: BlockKind("Q5_1", 32, 24),
    8: BlockKind("Q8_0", 32, 34),
    12: BlockKind("Q4_K", 256, 144),
    13: BlockKind("Q5_K", 256, 176),
    14: BlockKind("Q6_K", 256, 210),
    30: BlockKind("BF16", 1, 2),
}
"""What is read here, by ggml's number."""
_LATER = "Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M".split()
OTHERS = dict(enumerate("Q8_1 Q2_K Q3_K".split(), 9)) | dict(enumerate(_LATER, 15))
OTHERS |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
"""The names of ggml's other kinds, for a sentence that refuses them."""
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds that are one of torch's own dtypes."""


class BlockParts(NamedTuple):
    """What blocks say: code x scale (+ offset), group by group."""

    code: Tensor
    """[.., I]; signed where there is no offset."""
    scale: Tensor
    """[.., I / group]"""
    bias: Tensor | None
    group: int
    is_four_bit: bool = False
    """Codes from 0 to 15; without an offset they stand for code - 8."""


def decode(kind: str, raw: Tensor) -> Tensor:
    """The numbers of rows of blocks: uint8 [.., bytes] to [.., I], float32, or the kind's own dtype if it is plain.

    A scale that is infinite or no number comes out as it does in ggml's reference: nothing is replaced."""
    if kind in PLAIN:
        return raw.contiguous().view(PLAIN[kind])
    code, scale, bias, group, is_four_bit = _parts(kind, raw)
    value = code.float() - 8 if is_four_bit and bias is None else code.float()
    value.unflatten(-1, (-1, group)).mul_(scale.float()[..., None])
    if bias is not None:
        value.unflatten(-1, (-1, group)).add_(bias.float()[..., None])
    return value


def packed(kind: str, raw: Tensor) -> Packed:
    """The same blocks as a weight of ours, bit for bit what `decode` says; quantised kinds only.

    Q4_0, Q4_1 and Q4_K become int4; Q5_0, Q5_1, Q5_K, Q6_K and Q8_0 int8 by groups. The K kinds' two levels of scales
    become one in float32, so that Q4_K takes 6 bits a weight here instead of 4.5."""
    code, scale, bias, group, is_four_bit = _parts(kind, raw)
    shape = tuple(code.shape)
    if is_four_bit:
        return Packed("int4", shape, code[..., ::2] | code[..., 1::2] << 4, scale, group, bias)
    return Packed("int8", shape, code, scale.float(), group, bias if bias is None else bias.float())


def _parts(kind: str, raw: Tensor) -> BlockParts:
    return _DECODERS[kind](raw.contiguous().unflatten(-1, (-1, KINDS[NUMBERS[kind]].nbytes)))


def _parts_q8_0(block: Tensor) -> BlockParts:
    return BlockParts(block[..., 2:].flatten(-2).view(torch.int8), _half(block, 0), None, 32)


def _parts_q6_k(block: Tensor) -> BlockParts:
    code = (_fields(block[..., :128], 64, 4) | _fields(block[..., 128:192], 32, 2) << 4).view(torch.int8) - 32
    small = block[..., 192:208].contiguous().view(torch.int8)
    return BlockParts(code.flatten(-2), (_half(block, 208)[..., None] * small.float()).flatten(-2), None, 16)


def _parts_q4_k(block: Tensor) -> BlockParts:
    return BlockParts(_fields(block[..., 16:], 32, 4).flatten(-2), *_small(block), 32, is_four_bit=True)


def _parts_q5_k(block: Tensor) -> BlockParts:
    code = _fields(block[..., 48:], 32, 4) | _fields(block[..., 16:48], 32, 1) << 4
    return BlockParts(code.flatten(-2), *_small(block), 32)


def _parts_q4_0(block: Tensor) -> BlockParts:
    return BlockParts(_fields(block[..., 2:], 16, 4).flatten(-2), _halves(block, 0), None, 32, is_four_bit=True)


def _parts_q4_1(block: Tensor) -> BlockParts:
    return BlockParts(
        _fields(block[..., 4:], 16, 4).flatten(-2), _halves(block, 0), _halves(block, 2), 32, is_four_bit=True
    )


def _parts_q5_0(block: Tensor) -> BlockParts:
    return BlockParts(_five_bits(block, 2).view(torch.int8) - 16, _halves(block, 0), None, 32)


def _parts_q5_1(block: Tensor) -> BlockParts:
    return BlockParts(_five_bits(block, 4), _halves(block, 0), _halves(block, 2), 32)


_DECODERS: dict[str, Callable[[Tensor], BlockParts]] = {
    "Q8_0": _parts_q8_0,
    "Q6_K": _parts_q6_k,
    "Q4_K": _parts_q4_k,
    "Q5_K": _parts_q5_k,
    "Q4_0": _parts_q4_0,
    "Q4_1": _parts_q4_1,
    "Q5_0": _parts_q5_0,
    "Q5_1": _parts_q5_1,
}


def _five_bits(block: Tensor, at: int) -> Tensor:
    """Codes from 0 to 31: the fifth bits of all stand at this byte, the others behind them."""
    return (_fields(block[..., at + 4 :], 16, 4) | _fields(block[..., at : at + 4], 1, 1) << 4).flatten(-2)


def _fields(data: Tensor, run: int, bits: int) -> Tensor:
    """The bit fields of bytes [.., n]: a run of bytes gives the lowest field of each, then the next of each, and on."""
    runs = data.unflatten(-1, (-1, run))
    return torch.stack([runs >> low & (1 << bits) - 1 for low in range(0, 8, bits)], dim=-2).flatten(-3)


def _halves(block: Tensor, at: int) -> Tensor:
    """The float16 at this byte of every block."""
    return block[..., at : at + 2].contiguous().view(torch.float16).flatten(-2)


def _half(block: Tensor, at: int) -> Tensor:
    """The float16 at this byte of every block, in float32."""
    return block[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _small(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's scale and offset of each group: eight pairs of six bits in twelve bytes, times two halves."""
    first, second, rest = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=-1)
    least = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=-1)
    d, dmin = _half(block, 0)[..., None], _half(block, 2)[..., None]
    return (d * scale.float()).flatten(-2), -(dmin * least.float()).flatten(-2)


# ---- to blocks ------------------------------------------------------------------------------------------------------


def encode(kind: str, values: Tensor) -> Tensor:
    """Rows of numbers [.., I] as blocks, uint8 [.., bytes]: Q8_0 as ggml's reference rounds, BF16 and F16 to nearest.

    InputError for a number that the kind cannot hold: infinite, none at all, or too large for a float16 scale."""
    values = values.float().contiguous()
    if kind in PLAIN:
        return values.to(PLAIN[kind]).view(torch.uint8)
    block = values.unflatten(-1, (-1, KINDS[NUMBERS[kind]].values))
    return _ENCODERS[kind](block).flatten(-2)


def _q8_0(block: Tensor) -> Tensor:
    d = block.abs().amax(-1, keepdim=True) / 127
    scaled = block * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    size.sub_(whole).mul_(2).floor_().add_(whole)  # halves away from zero
    code = size.copysign_(scaled)
    return torch.cat([_stored(d), code.to(torch.int8).view(torch.uint8)], dim=-1)


def _q6_k(block: Tensor) -> Tensor:
    groups = block.unflatten(-1, (16, 16))
    scales = groups.abs().amax(-1) / 31
    d = scales.amax(-1, keepdim=True) / 127
    half = d.half().float()
    small = (scales * _inverse(half)).round().clamp(0, 127)
    code = (groups * _inverse(half * small)[..., None]).round().clamp(-32, 31).add(32).to(torch.uint8).flatten(-2)
    low, high = (code & 15).unflatten(-1, (2, 2, 64)), (code >> 4).unflatten(-1, (2, 4, 32))
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    low = low[..., 0, :] | low[..., 1, :] << 4
    return torch.cat([low.flatten(-2), high.flatten(-2), small.to(torch.uint8), _stored(d)], dim=-1)


def _q4_k(block: Tensor) -> Tensor:
    groups = block.unflatten(-1, (8, 32))
    least = -groups.amin(-1).clamp(max=0)
    scales = (groups.amax(-1).clamp(min=0) + least) / 15
    d, dmin = (part.amax(-1, keepdim=True) / 63 for part in (scales, least))
    small = (scales * _inverse(d.half().float())).round().clamp(0, 63)
    lows = (least * _inverse(dmin.half().float())).round().clamp(0, 63)
    moved = groups + (dmin.half().float() * lows)[..., None]
    code = (moved * _inverse(d.half().float() * small)[..., None]).round().clamp(0, 15).to(torch.uint8)
    code = code.flatten(-2).unflatten(-1, (4, 2, 32))
    small, lows = small.to(torch.uint8), lows.to(torch.uint8)
    parts = [small[..., :4] | small[..., 4:] >> 4 << 6, lows[..., :4] | lows[..., 4:] >> 4 << 6]
    parts += [small[..., 4:] & 15 | lows[..., 4:] << 4, (code[..., 0, :] | code[..., 1, :] << 4).flatten(-2)]
    return torch.cat([_stored(d), _stored(dmin), *parts], dim=-1)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q6_K": _q6_k, "Q4_K": _q4_k}


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite: such a block is zero in float16 anyway."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0)


def _stored(scale: Tensor) -> Tensor:
    half = scale.half()
    if not half.isfinite().all():
        raise InputError("a weight is infinite, no number or above 8 million; a quantised GGUF cannot hold it")
    return half.contiguous().view(torch.uint8)
