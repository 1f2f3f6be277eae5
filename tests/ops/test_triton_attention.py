"""ops/triton/attention.py: under the interpreter, against the reference and its masks."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton_interpreter

from sfumato.ops import reference
from sfumato.ops.masks import Mask
from sfumato.ops.triton import tuning
from sfumato.ops.triton.attention import attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = {"BLOCK_M": 16, "BLOCK_N": 16}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def mask_of(
    lengths: list[int], counts: list[int], encode: int, canvas: int, window: int | None, ring: int, rows: list[int]
) -> Mask:
    return Mask(
        rows=rows,
        rows_B=torch.tensor(rows),
        lengths_B=torch.tensor(lengths),
        counts_B=torch.tensor(counts),
        encode=encode,
        canvas=canvas,
        window=window,
        ring=ring,
        used=min(ring, max(lengths)),
    )


def tensors_for(mask: Mask, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> Tensors:
    """Queries, new keys and values, and a ring for them, small enough for a softmax that is not one key's alone."""
    generator = torch.Generator().manual_seed(len(mask.rows) + mask.encode + size)
    batch, new = len(mask.rows), mask.encode + mask.canvas
    shapes = [(batch, new, heads), (batch, new, kv_heads), (batch, new, kv_heads)]
    shapes += [(max(mask.rows) + 2, mask.ring + 1, kv_heads)] * 2
    scales = (2 * size**-0.5, 1, 1, 1, 1)
    q, k, v, k_ring, v_ring = (
        (torch.randn(*shape, size, generator=generator) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    return q, k, v, k_ring, v_ring


def spoiled(ring: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The ring with nan wherever nothing is stored for these rows."""
    spoiled = torch.full_like(ring, float("nan"))
    for row, length in zip(mask.rows, mask.lengths_B.tolist(), strict=True):
        for position in range(max(0, length - mask.ring), length):
            spoiled[row, position % mask.ring] = ring[row, position % mask.ring]
    return spoiled


def check(mask: Mask, heads: int = 4, kv_heads: int = 2, size: int = 16, dtype: torch.dtype = torch.float32) -> None:
    q, k, v, k_ring, v_ring = tensors_for(mask, heads, kv_heads, size, dtype)
    fast = attention(q, k, v, spoiled(k_ring, mask), spoiled(v_ring, mask), mask)
    plain = reference.attention(q, k, v, k_ring, v_ring, mask)
    exact = reference.attention(q.float(), k.float(), v.float(), k_ring.float(), v_ring.float(), mask)
    assert fast.shape == plain.shape and fast.dtype == plain.dtype
    assert fast.isfinite().all()
    new_T = torch.arange(mask.encode + mask.canvas)
    real_BT = (new_T >= mask.encode) | (new_T < mask.counts_B[:, None])
    allowed = 2 * (plain.float() - exact)[real_BT].abs().max() + 2e-6 * exact.abs().max()
    assert (fast.float() - exact)[real_BT].abs().max() <= allowed


CASES: dict[str, tuple[list[int], list[int], int, int, int | None, int]] = {
    "one token, nothing cached": ([0], [1], 1, 0, None, 64),
    "one token": ([37], [1], 1, 0, None, 64),
    "encode, padded": ([0, 5, 33], [19, 7, 0], 19, 0, None, 64),
    "encode, window": ([0, 5, 40], [21, 21, 3], 21, 0, 6, 24),
    "encode, window longer than the text": ([3, 9], [9, 4], 9, 0, 40, 64),
    "encode, the ring wrapped": ([70, 41], [20, 20], 20, 0, 20, 24),
    "canvas, nothing cached": ([0, 0], [0, 0], 0, 17, None, 64),
    "canvas, nothing cached, window": ([0], [0], 0, 17, 4, 8),
    "canvas": ([50, 1], [0, 0], 0, 17, None, 64),
    "canvas, window": ([50, 3, 0], [0, 0, 0], 0, 17, 8, 8),
    "canvas, the ring wrapped and full": ([64, 31, 95], [0, 0, 0], 0, 33, 33, 32),
    "both": ([30, 4], [9, 9], 9, 17, None, 64),
    "both, window": ([30, 4], [9, 9], 9, 17, 6, 16),
    "both, window, padded": ([40, 4, 9, 0], [9, 2, 0, 0], 9, 17, 6, 16),
    "both, all inside the window": ([3, 40], [20, 11], 20, 5, 64, 64),
    "no ring at all": ([0, 0], [13, 7], 13, 9, None, 0),
}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("splits", "columns"), [pytest.param(1, 2, marks=SLOW), pytest.param(3, 1, marks=SLOW), (3, 2)]
)
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case: str, splits: int, columns: int) -> None:
    lengths, counts, encode, canvas, window, ring = CASES[case]
    with tuning.using("attention", **TILES, SPLITS=splits, COLUMNS=columns):
        check(mask_of(lengths, counts, encode, canvas, window, ring, rows=[2, 0, 3, 1][: len(lengths)]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [
        *((*sizes, dtype) for sizes in ((3, 1, 24), (2, 2, 8)) for dtype in DTYPES),
        *((*sizes, torch.bfloat16) for sizes in ((16, 8, 256), (8, 1, 512))),
        *(
            pytest.param(*sizes, dtype, marks=SLOW)
            for sizes in ((16, 8, 256), (8, 1, 512))
            for dtype in DTYPES
            if dtype != torch.bfloat16
        ),
    ],
    ids=str,
)
def test_sizes_and_dtypes(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    with tuning.using("attention", SPLITS=2):
        check(mask_of([45, 8], [3, 1], 3, 18, 24, 32, rows=[1, 0]), heads, kv_heads, size, dtype)


@pytest.mark.parametrize("window", [1024, None])
def test_a_full_window_with_the_released_tiles(window: int | None) -> None:
    ring = 1023 if window else 1500
    check(mask_of([1400], [0], 0, 40, window, ring, rows=[0]), 2, 1, 256, torch.bfloat16)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_does_not_depend_on_its_batch(splits: int) -> None:
    """Not on the other rows, not on how far they pad its encoded tokens, not on what they have cached."""
    whole = mask_of([40, 4, 9], [3, 17, 0], 17, 20, 12, 16, rows=[2, 0, 1])
    q, k, v, k_ring, v_ring = tensors_for(whole, 4, 2, 16, torch.bfloat16)
    with tuning.using("attention", **TILES, SPLITS=splits):
        together = attention(q, k, v, k_ring, v_ring, whole)
        for b, (length, count) in enumerate(zip([40, 4, 9], [3, 17, 0], strict=True)):
            for encode in {count, 17}:
                alone = mask_of([length], [count], encode, 20, 12, 16, rows=[whole.rows[b]])
                new_T = list(itertools.chain(range(encode), range(17, 37)))
                q_T, k_T, v_T = (tensor[b : b + 1, new_T] for tensor in (q, k, v))
                out = attention(q_T, k_T, v_T, k_ring, v_ring, alone)
                assert torch.equal(out[0, :count], together[b, :count])
                assert torch.equal(out[0, encode:], together[b, 17:])


def test_slices_are_read_in_place() -> None:
    mask = mask_of([20, 7], [0, 0], 0, 9, 8, 8, rows=[0, 1])
    q, k, v, ring_k, ring_v = tensors_for(mask, 4, 2, 16, torch.float32)
    joined = torch.cat([q, k, v], dim=2)
    exact = reference.attention(q, k, v, ring_k, ring_v, mask)
    q, k, v = joined[:, :, :4], joined[:, :, 4:6], joined[:, :, 6:]
    assert torch.allclose(attention(q, k, v, ring_k, ring_v, mask), exact, atol=2e-6)
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v))
    assert torch.allclose(attention(q, k, v, ring_k, ring_v, mask), exact, atol=2e-6)


def test_a_ring_that_would_have_to_be_copied_is_an_error() -> None:
    mask = mask_of([4], [0], 0, 3, None, 8, rows=[0])
    q, k, v, ring_k, ring_v = tensors_for(mask, 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="must lie alike"):
        attention(q, k, v, ring_k, ring_v.transpose(0, 1).contiguous().transpose(0, 1), mask)


triton_interpreter.in_a_child(globals())
