"""checkpoints/formats/gguf_blocks.py and gguf_codebooks.py: GGUF's blocks against the gguf package and against the
format's formulas.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import SCALES, put_scale, random_blocks
from torch import Tensor

from sfumato.checkpoints.formats import gguf_blocks as blocks
from sfumato.errors import InputError

QUANTISED = [kind.name for kind in blocks.KINDS.values() if kind.name not in blocks.PLAIN]
UNKNOWN = ("Q1_0", "Q2_0")
"""Kinds that the gguf package cannot unpack; they are younger than it."""


def library() -> Any:
    return pytest.importorskip("gguf", reason="needs the gguf package, the format's own library")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


# --- blocks ---


def formula(kind: str, block: bytes, i: int) -> np.float32:
    """Value i of a block, as ggml-common.h describes the layout; one number at a time."""

    def half(at: int) -> np.float32:
        return np.float32(np.frombuffer(block, np.float16, 1, at)[0])

    def nibble(start: int, run: int) -> int:
        return block[start + i // (2 * run) * run + i % run] >> 4 * (i // run % 2) & 15

    def small(start: int, group: int) -> tuple[np.float32, np.float32]:
        s = block[start : start + 12]
        if group < 4:
            return np.float32(s[group] & 63), np.float32(s[group + 4] & 63)
        scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
        return np.float32(scale), np.float32(s[group + 4] >> 4 | s[group] >> 6 << 4)

    f = np.float32
    if kind == "Q4_0":
        return half(0) * f(nibble(2, 16) - 8)
    if kind == "Q4_1":
        return half(0) * f(nibble(4, 16)) + half(2)
    if kind == "Q5_0":
        high = struct.unpack_from("<I", block, 2)[0] >> i & 1
        return half(0) * f((nibble(6, 16) | high << 4) - 16)
    if kind == "Q5_1":
        high = struct.unpack_from("<I", block, 4)[0] >> i & 1
        return half(0) * f(nibble(8, 16) | high << 4) + half(2)
    if kind == "Q8_0":
        return half(0) * f(struct.unpack_from("<b", block, 2 + i)[0])
    if kind in ("Q4_K", "Q5_K"):
        scale, least = small(4, i // 32)
        code = nibble(16 if kind == "Q4_K" else 48, 32)
        if kind == "Q5_K":
            code |= (block[16 + i % 32] >> i // 32 & 1) << 4
        return half(0) * scale * f(code) - half(2) * least
    if kind == "Q1_0":
        return half(0) * f(2 * (block[2 + i // 8] >> i % 8 & 1) - 1)
    if kind == "Q2_0":
        return half(0) * f((block[2 + i // 4] >> 2 * (i % 4) & 3) - 1)
    assert kind == "Q6_K"
    part, quarter, place = i // 128, i // 32 % 4, i % 32
    low = block[64 * part + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
    high = block[128 + 32 * part + place] >> 2 * quarter & 3
    return half(208) * f(struct.unpack_from("<b", block, 192 + i // 16)[0]) * f((low | high << 4) - 32)


FORMULAS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", *UNKNOWN)


@pytest.mark.parametrize("kind", FORMULAS)
def test_decode_is_the_formula(kind: str) -> None:
    raw = random_blocks(kind, 3, 4, seed=1)
    size = blocks.KINDS[blocks.NUMBERS[kind]]
    whole = raw.numpy().tobytes()
    expected = [
        formula(kind, whole[at : at + size.nbytes], i)
        for at in range(0, len(whole), size.nbytes)
        for i in range(size.values)
    ]
    assert same_bits(blocks.decode(kind, raw).reshape(-1), torch.from_numpy(np.array(expected, np.float32)))


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind not in UNKNOWN])
def test_decode_is_the_librarys_bit_for_bit(kind: str) -> None:
    """Enough blocks that every point of every codebook comes."""
    gguf = library()
    count = 64 if kind.startswith("IQ") else 8
    raws = [random_blocks(kind, 20, count, seed) for seed in range(4)]
    raws += [random_blocks(kind, 20, 8, 9, fill=fill) for fill in (0, 255, 0x80, 0x7F)]  # every field at an end
    number = blocks.NUMBERS[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (blocks.KINDS[number].values, blocks.KINDS[number].nbytes)
    for raw in raws:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an MXFP4 that is infinite, in numpy
            expected = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
        assert same_bits(blocks.decode(kind, raw), torch.from_numpy(expected))


PACKED = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), ("int4", 32)),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q8_0"), ("int8", 32)),
    **{"Q6_K": ("int8", 16), "Q2_K": ("int4", 16), "Q3_K": ("int4", 16), "Q2_0": ("int4", 64)},
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0"), ("int4", 128)),
    **{"IQ4_NL": ("iq4", 32), "IQ4_XS": ("iq4", 32), "IQ3_XXS": ("iq3", 32), "IQ3_S": ("iq3s", 32)},
    **{"IQ2_XXS": ("iq2", 32), "IQ2_XS": ("iq2", 16), "IQ2_S": ("iq2", 16), "IQ1_S": ("iq1", 32), "IQ1_M": ("iq1", 16)},
    **{"MXFP4": ("mxfp4", 32), "NVFP4": ("nvfp4", 16)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_packed_is_a_weight_of_ours(kind: str) -> None:
    raw = random_blocks(kind, 12, 4)
    packed, values = blocks.packed(kind, raw), blocks.decode(kind, raw)
    assert (packed.kind, packed.group) == PACKED[kind]
    is_byte = packed.kind == "int8"
    assert packed.shape == values.shape == (12, 4 * blocks.KINDS[blocks.NUMBERS[kind]].values)
    assert packed.data.dtype == (torch.int8 if is_byte and packed.bias is None else torch.uint8)
    assert packed.data.shape == (12, packed.shape[1] // (1 if is_byte else 2))
    assert packed.scale.shape == (12, packed.shape[1] // packed.group)
    assert all(part.is_contiguous() for part in packed.tensors)
    stack = blocks.packed(kind, raw.view(3, 4, -1))
    assert stack.shape == (3, *blocks.decode(kind, raw.view(3, 4, -1)).shape[1:])
    assert same_bits(stack[1].dense(), values[4:8])


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_may_lie_anywhere(kind: str) -> None:
    """A single block, and rows that begin at an odd byte."""
    raw = random_blocks(kind, 3, 2)
    expected = blocks.decode(kind, raw)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw.reshape(-1)])[1:].view(raw.shape)
    assert shifted.storage_offset() == 1 and same_bits(blocks.decode(kind, shifted), expected)
    for row in range(3):
        assert same_bits(
            blocks.decode(kind, shifted[row, raw.shape[1] // 2 :]), expected[row, expected.shape[1] // 2 :]
        )


@pytest.mark.parametrize("kind", [kind for kind in QUANTISED if kind in SCALES or kind == "IQ1_M"])
def test_scales_that_are_no_numbers_are_passed_on(kind: str) -> None:
    raw = random_blocks(kind, 6, 2, scale=1.0).view(6, 2, -1)
    for row, bits in enumerate((0x7C00, 0xFC00, 0x7E00)):
        for at in SCALES.get(kind, (None,)):
            put_scale(kind, raw[row, :1].numpy(), np.array([bits], np.uint16).view(np.float16), at)
    values = blocks.decode(kind, raw.flatten(1))
    half = values.shape[1] // 2
    assert not values[:3, :half].isfinite().any()
    assert values[3:].isfinite().all() and values[:3, half:].isfinite().all()


def test_scales_of_floats_that_are_no_numbers() -> None:
    """MXFP4's 255 is the specification's NaN (ggml makes 2^127 of it); NVFP4's 255 is e4m3's, its 127 ggml's zero."""
    raw = random_blocks("MXFP4", 1, 2, fill=0x11)
    raw[0, 0], raw[0, 17] = 255, 127
    values = blocks.decode("MXFP4", raw)
    assert values[0, :32].isnan().all() and (values[0, 32:] == 0.5).all()
    raw = random_blocks("NVFP4", 1, 1, fill=0x11)
    raw[0, :4] = torch.tensor([255, 127, 0x38, 0xB8], dtype=torch.uint8)
    values = blocks.decode("NVFP4", raw)[0].view(4, 16)
    assert values[0].isnan().all() and (values[1] == 0).all() and (values[2:] == 0.5).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_kinds_keep_their_dtype(kind: str) -> None:
    values = torch.tensor([[1.0, -2.5, 3e-5, 65504.0]])
    raw = blocks.encode(kind, values)
    assert raw.shape == (1, 4 * blocks.KINDS[blocks.NUMBERS[kind]].nbytes)
    assert torch.equal(blocks.decode(kind, raw), values.to(blocks.PLAIN[kind]))


def hard_values(columns: int) -> Tensor:
    """Rows of every size (below these the library itself overflows), with halves, zeros and single large values."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(columns, generator=generator) * 10.0**power for power in range(-30, 7)]
    rows += [torch.zeros(columns), torch.full((columns,), -0.0), torch.full((columns,), 3.5)]
    rows.append(torch.arange(columns).float() - columns / 2 + 0.5)  # with 127 the largest of 32: halves
    rows.append(torch.cat([torch.tensor([127.0]), torch.arange(columns - 1) % 100 + 0.5]))
    rows.append(torch.cat([torch.tensor([-1e6]), torch.full((columns - 1,), 1e-3)]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_encode_is_the_librarys_bit_for_bit(kind: str) -> None:
    gguf = library()
    values = hard_values(256)
    expected = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(blocks.encode(kind, values), torch.from_numpy(expected))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    row = torch.tensor([[127.0, 0.5, -0.5, 1.5, 2.49, -126.5, *[0.0] * 26]])
    raw = blocks.encode("Q8_0", row)
    assert raw.shape == (1, 34)
    assert raw[0, 2:].view(torch.int8).tolist() == [127, 1, -1, 2, 2, -127, *[0] * 26]
    assert blocks.decode("Q8_0", blocks.encode("Q8_0", torch.zeros(2, 64))).eq(0).all()


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 0.006), ("Q6_K", 0.022), ("Q4_K", 0.09)])
def test_encoders_come_close(kind: str, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 512, generator=generator) * torch.logspace(-1, 2, 64)[:, None]
    error = (blocks.decode(kind, blocks.encode(kind, values)) - values).norm(dim=1) / values.norm(dim=1)
    assert error.max() < bound
    assert blocks.decode(kind, blocks.encode(kind, torch.zeros(2, 512))).eq(0).all()
    with pytest.raises(InputError, match="cannot hold it"):
        blocks.encode(kind, torch.full((1, 256), 1e12))
    with pytest.raises(InputError, match="cannot hold it"):
        blocks.encode(kind, torch.full((1, 256), torch.nan))
