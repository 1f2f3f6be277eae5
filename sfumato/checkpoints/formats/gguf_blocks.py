"""How GGUF stores numbers: blocks of codes along a row, to float32, to our packed weights, and back.

A row is cut into blocks of 32 to 256 values; a block holds codes, a scale in float16, in the K and IQ kinds also small
integer scales a group, and in some an offset. Each kind says code x scale (+ offset), group by group, or the value of a
table x scale, and so does `Packed`: a kind is one function that takes its blocks apart into the fields of a `Packed`.
Those with codebooks are `gguf_codebooks`'. Sources: ggml's block layouts (ggml-common.h) and the order of operations of
its reference (the gguf package's quants.py).

It lacks Q8_1 and Q8_K, which ggml computes with and files do not hold, and whole numbers. The encoders of Q4_K and Q6_K
round to nearest, with no search for better scales and no importance matrix: enough for tests and experiments, not for
releases. Little-endian machines only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.checkpoints.formats import gguf_codebooks
from sfumato.checkpoints.formats.gguf_bits import BlockParts, fields, flags, half, halves, paired_fields, words
from sfumato.errors import InputError
from sfumato.ops.packed import Packed, paired


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
    10: BlockKind("Q2_K", 256, 84),
    11: BlockKind("Q3_K", 256, 110),
    12: BlockKind("Q4_K", 256, 144),
    13: BlockKind("Q5_K", 256, 176),
    14: BlockKind("Q6_K", 256, 210),
    16: BlockKind("IQ2_XXS", 256, 66),
    17: BlockKind("IQ2_XS", 256, 74),
    18: BlockKind("IQ3_XXS", 256, 98),
    19: BlockKind("IQ1_S", 256, 50),
    20: BlockKind("IQ4_NL", 32, 18),
    21: BlockKind("IQ3_S", 256, 110),
    22: BlockKind("IQ2_S", 256, 82),
    23: BlockKind("IQ4_XS", 256, 136),
    29: BlockKind("IQ1_M", 256, 56),
    30: BlockKind("BF16", 1, 2),
    34: BlockKind("TQ1_0", 256, 54),
    35: BlockKind("TQ2_0", 256, 66),
    39: BlockKind("MXFP4", 32, 17),
    40: BlockKind("NVFP4", 64, 36),
    41: BlockKind("Q1_0", 128, 18),
    42: BlockKind("Q2_0", 64, 18),
}
"""What is read here, by ggml's number."""
_REMOVED = "which ggml has removed"
_ARM = f"Q4_0 or IQ4_NL laid out for one processor, {_REMOVED}"
_COMPUTED = "which ggml computes with and no file of a model holds"
OTHERS = {
    **{4: f"Q4_2, {_REMOVED}", 5: f"Q4_3, {_REMOVED}", 9: f"Q8_1, {_COMPUTED}", 15: f"Q8_K, {_COMPUTED}"},
    **dict(enumerate("I8 I16 I32 I64 F64".split(), 24)),
    **dict.fromkeys((31, 32, 33, 36, 37, 38), _ARM),
}
"""The names of ggml's other kinds, for a sentence that refuses them."""
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Kinds that are one of torch's own dtypes."""
CACHED = 1 << 20
"""Weights that are unpacked at one time, while they are in the cache: five times the speed of a whole stack at once."""


def decode(kind: str, raw: Tensor) -> Tensor:
    """The numbers of rows of blocks: uint8 [.., bytes] to [.., I], float32, or the kind's own dtype if it is plain.

    A scale that is infinite or no number comes out as it does in ggml's reference: nothing is replaced."""
    if kind in PLAIN:
        return raw.contiguous().view(PLAIN[kind])
    values = torch.empty(_shape(kind, raw))
    rows = values.view(-1, values.shape[-1])
    for first, part in _in_parts(kind, raw):
        rows[first : first + part.shape[0]] = part.dense()
    return values


def packed(kind: str, raw: Tensor) -> Packed:
    """The same blocks as a weight of ours, whose `dense` is bit for bit what `decode` gives; no plain kinds.

    Four bits and fewer become int4, or codes of the table that the kind has; five and more int8 by groups. Two levels
    of scales become one in float32, so that Q4_K takes 6 bits a weight here instead of 4.5."""
    shape = _shape(kind, raw)
    whole: Packed | None = None
    for first, part in _in_parts(kind, raw):
        if whole is None:
            whole = part.each(lambda tensor: tensor.new_empty(math.prod(shape[:-1]), *tensor.shape[1:]))
        for name, tensor in part.parts.items():
            whole.parts[name][first : first + part.shape[0]] = tensor
    assert whole is not None
    return whole.each(lambda tensor: tensor.view(*shape[:-1], -1), shape)


def _shape(kind: str, raw: Tensor) -> tuple[int, ...]:
    stored = KINDS[NUMBERS[kind]]
    return (*raw.shape[:-1], raw.shape[-1] // stored.nbytes * stored.values)


def _in_parts(kind: str, raw: Tensor) -> Iterator[tuple[int, Packed]]:
    """Some rows of blocks after others, each as a weight of ours, with the place of its first row."""
    rows = raw.contiguous().view(-1, raw.shape[-1])
    inputs = _shape(kind, raw)[-1]
    first = 0
    for some in rows.split(max(1, CACHED // inputs)):
        parts = _DECODERS[kind](some.unflatten(-1, (-1, KINDS[NUMBERS[kind]].nbytes)))
        yield first, Packed(parts.kind, (len(some), inputs), parts.data, parts.scale, parts.group, parts.bias)
        first += len(some)


def _int8(code: Tensor, scale: Tensor, group: int, bias: Tensor | None = None) -> BlockParts:
    """Codes of a byte, signed where there is no offset."""
    return BlockParts("int8", code.flatten(-2), scale.float(), group, None if bias is None else bias.float())


def _four(kind: str, pairs: Tensor, scale: Tensor, group: int, bias: Tensor | None = None) -> BlockParts:
    """Codes of four bits, two a byte; as int4 they stand for code - 8 where there is no offset."""
    return BlockParts(kind, pairs.flatten(-2), scale, group, bias)


def _q8_0_parts(block: Tensor) -> BlockParts:
    return _int8(block[..., 2:].view(torch.int8), halves(block, 0), 32)


def _q6_k_parts(block: Tensor) -> BlockParts:
    code = (fields(block[..., :128], 64, 4) | fields(block[..., 128:192], 32, 2) << 4).view(torch.int8) - 32
    return _int8(code, (half(block, 208) * words(block[..., 192:208], torch.int8)).flatten(-2), 16)


def _q5_k_parts(block: Tensor) -> BlockParts:
    code = fields(block[..., 48:], 32, 4) | fields(block[..., 16:48], 32, 1) << 4
    scale, bias = _small(block)
    return _int8(code, scale, 32, bias)


def _q5_0_parts(block: Tensor) -> BlockParts:
    return _int8(_five_bits(block, 2).view(torch.int8) - 16, halves(block, 0), 32)


def _q5_1_parts(block: Tensor) -> BlockParts:
    return _int8(_five_bits(block, 4), halves(block, 0), 32, halves(block, 2))


def _q4_k_parts(block: Tensor) -> BlockParts:
    scale, bias = _small(block)
    return _four("int4", paired_fields(block[..., 16:], 32, 4), scale, 32, bias)


def _q4_0_parts(block: Tensor) -> BlockParts:
    return _four("int4", paired_fields(block[..., 2:], 16, 4), halves(block, 0), 32)


def _q4_1_parts(block: Tensor) -> BlockParts:
    return _four("int4", paired_fields(block[..., 4:], 16, 4), halves(block, 0), 32, halves(block, 2))


def _q3_k_parts(block: Tensor) -> BlockParts:
    """The code's third bit says that four is not taken away."""
    pairs = (paired_fields(block[..., 32:96], 32, 2) | paired_fields(block[..., :32], 32, 1) << 2) + 0x44
    small = (fields(block[..., 96:104], 8, 4) | fields(block[..., 104:108], 4, 2) << 4).view(torch.int8) - 32
    return _four("int4", pairs, (half(block, 108) * small).flatten(-2), 16)


def _q2_k_parts(block: Tensor) -> BlockParts:
    scale, least = half(block, 80) * (block[..., :16] & 15), half(block, 82) * (block[..., :16] >> 4)
    return _four("int4", paired_fields(block[..., 16:80], 32, 2), scale.flatten(-2), 16, -least.flatten(-2))


def _q2_0_parts(block: Tensor) -> BlockParts:
    return _four("int4", paired(fields(block[..., 2:], 1, 2)) + 0x77, halves(block, 0), 64)


def _q1_0_parts(block: Tensor) -> BlockParts:
    """One bit: minus or plus the scale."""
    return _four("int4", paired(flags(block[..., 2:])) * 2 + 0x77, halves(block, 0), 128)


def _tq2_0_parts(block: Tensor) -> BlockParts:
    return _ternary(paired_fields(block[..., :64], 32, 2), halves(block, 64))


def _tq1_0_parts(block: Tensor) -> BlockParts:
    """Five ternary digits a byte, as a fraction of 256: multiplied by 3, the next one comes out at the top."""
    runs = [block[..., :32], block[..., 32:48]]
    bytes_ = [run[..., None, :] * torch.tensor([[1], [3], [9], [27], [81]], dtype=torch.uint8) for run in runs]
    bytes_.append(block[..., 48:52, None].transpose(-1, -2) * torch.tensor([[1], [3], [9], [27]], dtype=torch.uint8))
    code = torch.cat([part.flatten(-2) for part in bytes_], dim=-1)
    return _ternary(paired((code.to(torch.int16) * 3 >> 8).to(torch.uint8)), halves(block, 52))


def _ternary(pairs: Tensor, scale: Tensor) -> BlockParts:
    """Codes that stand for code - 1, with one scale for all 256; it is given twice, as groups have at most 128."""
    return _four("int4", pairs + 0x77, scale.repeat_interleave(2, -1), 128)


def _iq4_nl_parts(block: Tensor) -> BlockParts:
    return _four("iq4", paired_fields(block[..., 2:], 16, 4), halves(block, 0), 32)


def _iq4_xs_parts(block: Tensor) -> BlockParts:
    small = (fields(block[..., 4:8], 1, 4) | fields(block[..., 2:4], 1, 2) << 4).view(torch.int8) - 32
    return _four("iq4", paired_fields(block[..., 8:], 16, 4), (half(block, 0) * small).flatten(-2), 32)


def _mxfp4_parts(block: Tensor) -> BlockParts:
    """The table is ours doubled, the scale ours halved; a scale of 255 is no number, as in the MX specification."""
    return _floats("mxfp4", block[..., 1:], 16, block[..., 0], 32)


def _nvfp4_parts(block: Tensor) -> BlockParts:
    """Scales are e4m3 without a sign, and 127 stands for zero."""
    scale = torch.where(block[..., :4] == 127, 0, block[..., :4] & 127).flatten(-2)
    return _floats("nvfp4", block[..., 4:], 8, scale.view(torch.float8_e4m3fn), 16)


def _floats(kind: str, data: Tensor, run: int, scale: Tensor, group: int) -> BlockParts:
    """Codes of 4-bit floats, of which ggml has no negative zero."""
    pairs = paired_fields(data, run, 4)
    return _four(kind, pairs & ((pairs & 0x77) + 0x77 | 0x77), scale, group)


_DECODERS: dict[str, Callable[[Tensor], BlockParts]] = {
    "Q8_0": _q8_0_parts,
    "Q6_K": _q6_k_parts,
    "Q5_K": _q5_k_parts,
    "Q5_0": _q5_0_parts,
    "Q5_1": _q5_1_parts,
    "Q4_K": _q4_k_parts,
    "Q4_0": _q4_0_parts,
    "Q4_1": _q4_1_parts,
    "Q3_K": _q3_k_parts,
    "Q2_K": _q2_k_parts,
    "Q2_0": _q2_0_parts,
    "Q1_0": _q1_0_parts,
    "TQ1_0": _tq1_0_parts,
    "TQ2_0": _tq2_0_parts,
    "IQ4_NL": _iq4_nl_parts,
    "IQ4_XS": _iq4_xs_parts,
    "MXFP4": _mxfp4_parts,
    "NVFP4": _nvfp4_parts,
    **gguf_codebooks.DECODERS,
}


def _five_bits(block: Tensor, at: int) -> Tensor:
    """Codes from 0 to 31: the fifth bits of all stand at this byte, the others behind them."""
    return fields(block[..., at + 4 :], 16, 4) | flags(block[..., at : at + 4]) << 4


def _small(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's scale and offset of each group: eight pairs of six bits in twelve bytes, times two halves."""
    first, second, rest = block[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=-1)
    least = torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=-1)
    return (half(block, 0) * scale).flatten(-2), -(half(block, 2) * least).flatten(-2)


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
