"""ops/triton/soft_embedding.py: under the interpreter: against the reference, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton_interpreter

from sfumato.ops import reference
from sfumato.ops.triton import soft_embedding as module
from sfumato.ops.triton import tuning
from sfumato.ops.triton.read_out import Tiles, read_out
from sfumato.ops.triton.soft_embedding import soft_embedding, threshold

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZE = 64
SMALL = {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "SPLITS": 3}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tuning.using("soft_embedding", **SMALL):
        yield


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, sharp: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, E and the scale; the larger `sharp`, the nearer to one-hot."""
    batch, length, words, width = shape
    generator = torch.Generator().manual_seed(seed)
    logits_BLV = torch.randn(batch, length, words, generator=generator) * sharp
    embed_VD = torch.randn(words, width, generator=generator)
    return logits_BLV.to(dtype), embed_VD.to(dtype), torch.tensor(width**0.5).to(dtype)


def tiles_of(logits_BLV: Tensor, size: int = SIZE) -> Tiles:
    """As the read-out gives them."""
    logits = logits_BLV.double()
    peak = logits.max(-1).values
    mass = torch.stack([part.sum(-1) for part in torch.split(logits.softmax(-1), size, dim=-1)], dim=-1)
    return Tiles(mass.float(), peak.float(), (logits.logsumexp(-1) - peak).float(), size)


def kept(tiles: Tiles, dtype: torch.dtype) -> list[int]:
    """How many tiles are read for each block of positions."""
    blocks = -(-tiles.mass_BLC.shape[1] // SMALL["BLOCK_N"])
    return module._list(tiles, blocks, SMALL["BLOCK_N"], threshold(dtype, tiles.mass_BLC.shape[-1]))[1].tolist()


def check(fast: Tensor, logits: Tensor, embed: Tensor, scale: Tensor) -> None:
    """The error is at most twice plain PyTorch's and a little of the last place."""
    exact = logits.double().softmax(-1) @ embed.double() * scale.double()
    plain = reference.soft_embedding(logits, embed, scale)
    assert fast.dtype == plain.dtype and fast.shape == plain.shape
    error, allowed = ((x.double() - exact).abs().max() for x in (fast, plain))
    assert error <= 2 * allowed + 2e-6 * embed.abs().max() * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64, 16), (2, 5, 1000, 40), (3, 17, 333, 24), (1, 18, 512, 64)])
@pytest.mark.parametrize("sharp", [0.1, 3.0, 30.0])
def test_against_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, sharp: float) -> None:
    logits, embed, scale = inputs(shape, dtype, sharp)
    check(soft_embedding(logits, embed, scale), logits, embed, scale)
    check(soft_embedding(logits, embed, scale, tiles_of(logits)), logits, embed, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_vocabulary(dtype: torch.dtype) -> None:
    logits, embed, scale = inputs((2, 2, 262_144, 16), dtype, 2.0)
    with tuning.using("soft_embedding", BLOCK_K=1024):
        check(soft_embedding(logits, embed, scale, tiles_of(logits, 4096)), logits, embed, scale)
        check(soft_embedding(logits, embed, scale), logits, embed, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sharp", [0.1, 20.0])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NEVER in float16 is -inf, as in the reference
def test_after_the_read_out(dtype: torch.dtype, sharp: float) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = (torch.randn(2, 5, 24, generator=generator) * sharp).to(dtype)
    embed = torch.randn(333, 24, generator=generator).to(dtype)
    scale = torch.tensor(24**0.5).to(dtype)
    banned = (torch.tensor([[True, False, True, False, False]] * 2), torch.arange(60, 200))
    with tuning.using("read_out", BLOCK_N=16, TILE=SIZE, PART=32, BLOCK_K=16):
        out = read_out(hidden, embed, 30.0, torch.tensor([0.4, 0.8]), banned=banned)
    check(soft_embedding(out.logits_BLV, embed, scale, out.tiles), out.logits_BLV, embed, scale)


def test_nothing_is_left_out_of_flat_distributions() -> None:
    logits, embed, scale = inputs((2, 20, 1000, 16), torch.bfloat16, 0.5)
    tiles = tiles_of(logits)
    assert kept(tiles, torch.bfloat16) == [16] * 4
    # The same tiles, another way through the same loop: BLOCK_K words at a time where there are no tiles.
    every, none = soft_embedding(logits, embed, scale, tiles), soft_embedding(logits, embed, scale)
    assert (every.float() - none.float()).abs().max() <= torch.finfo(torch.bfloat16).eps * none.float().abs().max()


def sure(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As in late steps: each position sure of one word, the words of a row in two tiles."""
    logits, embed, scale = inputs(shape, dtype, 1.0)
    for b in range(shape[0]):
        for at in range(shape[1]):
            logits[b, at, (at * 7 + b * 150) % 128 + 64] = 60.0
    return logits, embed, scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sure_positions_read_few_tiles(dtype: torch.dtype) -> None:
    logits, embed, scale = sure((2, 20, 1000, 40), dtype)
    tiles = tiles_of(logits)
    assert max(kept(tiles, dtype)) <= 2
    check(soft_embedding(logits, embed, scale, tiles), logits, embed, scale)
    one_hot = embed[logits.argmax(-1)] * scale
    assert torch.equal(soft_embedding(logits, embed, scale, tiles), one_hot)


def test_what_is_left_out_is_never_read() -> None:
    logits, embed, scale = sure((2, 20, 1000, 40), torch.bfloat16)
    tiles = tiles_of(logits)
    before = soft_embedding(logits, embed, scale, tiles)
    listed, counts = module._list(tiles, 2, SMALL["BLOCK_N"], threshold(torch.bfloat16, 16))
    read = {tile for block, count in zip(listed.tolist(), counts.tolist(), strict=True) for tile in block[:count]}
    assert 0 < len(read) < 4
    for tile in set(range(16)) - read:
        embed[tile * SIZE : (tile + 1) * SIZE] = torch.nan
        logits[..., tile * SIZE : (tile + 1) * SIZE] = torch.nan
    assert torch.equal(soft_embedding(logits, embed, scale, tiles), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bound_where_it_is_tight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles but one hold just under the threshold, and pull the same way. In float32 with the narrow type's
    threshold, so that nothing else stands beside the error."""
    words, size = 1000, SIZE
    count = -(-words // size)
    limit = threshold(dtype, count)
    monkeypatch.setattr(module, "threshold", lambda *_: limit)
    logits = torch.full((1, 3, words), -1e30)
    for tile in range(count):
        logits[..., tile * size + 5] = torch.tensor(0.99 * limit).log()
    logits[..., 5] = 0.0
    embed = torch.full((words, 16), -0.5)
    embed[:size] = 1.0
    scale = torch.tensor(4.0)
    with_all = soft_embedding(logits, embed, scale)
    without = soft_embedding(logits, embed, scale, tiles_of(logits))
    bound = torch.finfo(dtype).eps / 4 * embed.abs().max() * scale
    error = (with_all - without).abs().max()
    assert 0.4 * bound < error <= bound


@pytest.mark.parametrize("sharp", [2.0, 6.0, 15.0])
def test_the_bound_on_random_distributions(sharp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "threshold", lambda _, tiles: threshold(torch.bfloat16, tiles))
    logits, embed, scale = inputs((2, 4, 2000, 40), torch.float32, sharp)
    without = soft_embedding(logits, embed, scale, tiles_of(logits))
    exact = logits.double().softmax(-1) @ embed.double() * scale
    bound = torch.finfo(torch.bfloat16).eps / 4 * embed.abs().max() * scale
    assert (without - exact).abs().max() <= bound + 2e-6 * embed.abs().max() * scale


def test_what_is_not_a_number_is_kept() -> None:
    logits, embed, scale = sure((1, 20, 1000, 16), torch.bfloat16)
    tiles = tiles_of(logits)
    tiles.mass_BLC[0, 18] = torch.nan
    assert kept(tiles, torch.bfloat16) == [2, 16]
    assert not soft_embedding(logits, embed, scale, tiles).isnan().any()


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_answer_does_not_depend_on_its_batch(dtype: torch.dtype, tiled: bool) -> None:
    """One flat row beside two sure ones: it reads all tiles, they still leave out their own."""
    logits, embed, scale = sure((3, 18, 333, 40), dtype)
    logits[1] = inputs((1, 18, 333, 40), dtype, 1.0, seed=4)[0]
    together = soft_embedding(logits, embed, scale, tiles_of(logits) if tiled else None)
    for b in range(3):
        row = logits[b : b + 1]
        alone = soft_embedding(row, embed, scale, tiles_of(row) if tiled else None)
        assert torch.equal(alone, together[b : b + 1])
    if tiled:
        assert kept(tiles_of(logits), dtype) == [2, 1, 6, 6, 2, 1]


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_any_number_of_splits(splits: int) -> None:
    """More splits than tiles too: what has nothing to add adds zeros."""
    logits, embed, scale = sure((1, 5, 200, 40), torch.bfloat16)
    with tuning.using("soft_embedding", SPLITS=splits):
        check(soft_embedding(logits, embed, scale, tiles_of(logits)), logits, embed, scale)
        check(soft_embedding(logits, embed, scale), logits, embed, scale)


triton_interpreter.in_a_child(globals())
