"""ops/triton/read_out.py: under the interpreter, against the reference and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton_interpreter

from sfumato.ops import reference
from sfumato.ops.contract import NEVER, ReadOut
from sfumato.ops.triton import tuning
from sfumato.ops.triton.read_out import FEW, read_out

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 64, 16), (2, 5, 1000, 40), (3, 7, 333, 24), (1, 18, 512, 32)]
SOFTCAP = 30.0
LAST = 1 - 2.0**-24
SMALL = {"BLOCK_N": 16, "TILE": 64, "PART": 32, "BLOCK_K": 16, "GROUP": 1}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tuning.using("read_out", **SMALL), tuning.using("read_out_walk", BLOCK_K=16):
        yield


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0, sharp: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, E and temperatures; `sharp` scales the logits."""
    batch, length, words, width = shape
    generator = torch.Generator().manual_seed(seed)
    hidden_BLD = torch.randn(batch, length, width, generator=generator) * sharp
    embed_VD = torch.randn(words, width, generator=generator)
    return hidden_BLD.to(dtype), embed_VD.to(dtype), torch.linspace(0.4, 0.8, batch)


def uniform(batch: int, length: int, seed: int = 1) -> Tensor:
    """Random, with both ends of [0, 1) where there is room."""
    uniform_BL = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    uniform_BL.view(-1)[1:2], uniform_BL.view(-1)[2:3] = 0.0, LAST
    return uniform_BL


def exactly(
    hidden: Tensor, embed: Tensor, temperature_B: Tensor, banned: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, probabilities and entropies in float64."""
    logits = SOFTCAP * torch.tanh(hidden.double() @ embed.double().T / SOFTCAP)
    if banned is not None:
        logits[..., banned[1]] = logits[..., banned[1]].masked_fill(banned[0][..., None], NEVER)
    logits = logits / temperature_B.double()[:, None, None]
    p = logits.softmax(-1)
    return logits, p, -(p * logits.log_softmax(-1)).sum(-1)


def follows(sample_BL: Tensor, p_BLV: Tensor, uniform_BL: Tensor) -> None:
    """The samples are the inverse of the cumulative distribution, but for 1e-5 at the borders."""
    cdf = p_BLV.cumsum(-1)
    after = cdf.gather(-1, sample_BL[..., None])[..., 0]
    before = after - p_BLV.gather(-1, sample_BL[..., None])[..., 0]
    assert (before <= uniform_BL + 1e-5).all() and (uniform_BL <= after + 1e-5).all()
    expected = reference.inverse_cdf(p_BLV, uniform_BL.double())
    is_border = ((cdf - uniform_BL[..., None]).abs() < 1e-5).any(-1)
    assert torch.equal(sample_BL[~is_border], expected[~is_border])


def check(
    fast: ReadOut, plain: ReadOut, logits: Tensor, p: Tensor, entropy: Tensor, uniform_BL: Tensor | None = None
) -> None:
    """Errors at most twice plain PyTorch's, and what float32's last place makes of softcap / temperature."""
    floor = 4e-7 * SOFTCAP / 0.4
    assert fast.logits_BLV.dtype == plain.logits_BLV.dtype and fast.entropy_BL.dtype == torch.float32
    assert fast.sample_BL.dtype == fast.argmax_BL.dtype == torch.int64
    live = logits > NEVER / 2
    error, allowed = ((x.logits_BLV.double() - logits)[live].abs().max() for x in (fast, plain))
    assert error <= 2 * allowed + floor
    error, allowed = ((x.entropy_BL.double() - entropy).abs().max() for x in (fast, plain))
    assert error <= 2 * allowed + floor
    assert (fast.entropy_BL >= 0).all()
    peak = logits.max(-1).values
    assert (logits.gather(-1, fast.argmax_BL[..., None])[..., 0] >= peak - floor).all()
    if uniform_BL is not None:
        follows(fast.sample_BL, p, uniform_BL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    hidden, embed, temperature = inputs(shape, dtype)
    draws = uniform(*shape[:2])
    fast = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    plain = reference.read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    check(fast, plain, *exactly(hidden, embed, temperature), draws)


@pytest.mark.parametrize("sharp", [0.01, 4.0, 50.0])
def test_flat_and_sure(sharp: float) -> None:
    """Sure positions settle without a walk; flat ones never do."""
    hidden, embed, temperature = inputs((2, 9, 500, 16), torch.float32, sharp=sharp)
    draws = uniform(2, 9)
    fast = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    plain = reference.read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    check(fast, plain, *exactly(hidden, embed, temperature), draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_vocabulary(dtype: torch.dtype) -> None:
    hidden, embed, temperature = inputs((2, 2, 262_144, 16), dtype)
    draws = torch.tensor([[0.0, LAST], [0.3, 0.99]])
    with tuning.using("read_out", TILE=4096, PART=2048):
        fast = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    plain = reference.read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    check(fast, plain, *exactly(hidden, embed, temperature), draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharp", [0.3, 3.0])
def test_samples_follow_the_distribution(sharp: float, dtype: torch.dtype) -> None:
    """One hidden state and evenly spaced targets: how often each word comes is its probability, to one count. In
    bfloat16 too: the logits that leave are rounded, those that are walked are not, where they weigh anything."""
    count = 96
    hidden, embed, temperature = inputs((1, 1, 200, 16), dtype, sharp=sharp)
    draws = ((torch.arange(count) + 0.5) / count)[None]
    fast = read_out(hidden.expand(1, count, -1), embed, SOFTCAP, temperature, uniform_BL=draws)
    _, p, _ = exactly(hidden.expand(1, count, -1), embed, temperature)
    follows(fast.sample_BL, p, draws)
    often = torch.bincount(fast.sample_BL[0], minlength=200)
    assert (often - p[0, 0] * count).abs().max() <= 1
    assert (fast.sample_BL[0].diff() >= 0).all()


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NEVER in float16 is -inf, as in the reference
def test_banned_words_never_come(dtype: torch.dtype, many: bool) -> None:
    hidden, embed, temperature = inputs((2, 6, 330, 24), dtype)
    ids = torch.cat([torch.arange(130), torch.arange(200, 207), torch.arange(300, 330)])  # two tiles, some, the end
    ids = ids if many else torch.cat([embed[:300].float() @ hidden[b, 2].float() for b in (0, 1)]).topk(3).indices % 300
    assert (len(ids) > FEW) is many
    where = torch.tensor([True, True, True, False, True, False])[None].repeat(2, 1)
    draws = torch.tensor([0.0, LAST, 0.5, 0.0, 0.9, LAST])[None].repeat(2, 1)
    fast = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws, banned=(where, ids))
    plain = reference.read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws, banned=(where, ids))
    check(fast, plain, *exactly(hidden, embed, temperature, (where, ids)), draws)
    for out in (fast.sample_BL, fast.argmax_BL):
        assert not torch.isin(out[where], ids).any()
    assert (fast.logits_BLV[where][:, ids] <= -6e4).all() and (fast.logits_BLV[~where] > -100).all()
    assert torch.equal(fast.tiles.mass_BLC[where][:, :2], torch.zeros(8, 2)) is many
    nothing = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws, banned=(where, ids[:0]))
    open_ = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    assert torch.equal(nothing.logits_BLV, open_.logits_BLV) and torch.equal(nothing.sample_BL, open_.sample_BL)


@pytest.mark.parametrize("places", [(3, 9), (40, 60), (70, 200), (250, 299), tuple(range(300))])
def test_the_lowest_of_equal_words_is_the_argmax(places: tuple[int, ...]) -> None:
    """In one part of a tile, in two, in two tiles, in the ragged one, and everywhere."""
    hidden, embed, temperature = inputs((1, 2, 300, 16))
    embed[list(places)] = hidden[0, 0]
    fast = read_out(hidden, embed, SOFTCAP, temperature)
    assert fast.argmax_BL[0, 0] == places[0]
    assert fast.sample_BL[0, 0] == places[0]


def test_without_noise_the_sample_is_the_argmax() -> None:
    hidden, embed, temperature = inputs((2, 3, 150, 16))
    fast = read_out(hidden, embed, SOFTCAP, temperature)
    assert torch.equal(fast.sample_BL, reference.read_out(hidden, embed, SOFTCAP, temperature).argmax_BL)


@pytest.mark.parametrize("words", [128, 333])
def test_the_oracles_noise(words: int) -> None:
    hidden, embed, temperature = inputs((2, 6, words, 16), sharp=0.5)
    gumbel = -torch.empty(2, 6, words).exponential_(generator=torch.Generator().manual_seed(3)).log()
    fast = read_out(hidden, embed, SOFTCAP, temperature, gumbel_BLV=gumbel)
    plain = reference.read_out(hidden, embed, SOFTCAP, temperature, gumbel_BLV=gumbel)
    assert torch.equal(fast.sample_BL, plain.sample_BL)
    assert not torch.equal(fast.sample_BL, fast.argmax_BL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_answer_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    hidden, embed, temperature = inputs((3, 7, 333, 40), dtype)
    draws = uniform(3, 7)
    together = read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws)
    for b in range(3):
        row = slice(b, b + 1)
        alone = read_out(hidden[row], embed, SOFTCAP, temperature[row], uniform_BL=draws[row])
        for one, other in zip(alone[:4] + alone.tiles[:3], together[:4] + together.tiles[:3], strict=True):
            assert torch.equal(one, other[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharp", [0.1, 20.0])
def test_tiles_are_of_the_rounded_logits(dtype: torch.dtype, sharp: float) -> None:
    """A sure bfloat16 logit is rounded by up to a quarter: exp of it would be off by 28 %, the tiles are not."""
    hidden, embed, temperature = inputs((2, 5, 333, 16), dtype, sharp=sharp)
    fast = read_out(hidden, embed, SOFTCAP, temperature)
    tiles = fast.tiles
    p = fast.logits_BLV.double().softmax(-1)
    again = (fast.logits_BLV.double() - tiles.peak_BL[..., None] - tiles.log_sum_BL[..., None]).exp()
    assert (again - p).abs().max() < 1e-5
    mass = torch.stack([part.sum(-1) for part in torch.split(p, tiles.size, dim=-1)], dim=-1)
    assert tiles.mass_BLC.shape == mass.shape
    assert (tiles.mass_BLC - mass).abs().max() < 2e-6


def test_groups_of_blocks_do_not_matter() -> None:
    hidden, embed, temperature = inputs((1, 70, 200, 16))
    draws = uniform(1, 70)
    outs = []
    for group in (1, 2, 8):
        with tuning.using("read_out", GROUP=group):
            outs.append(read_out(hidden, embed, SOFTCAP, temperature, uniform_BL=draws))
    for out in outs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(out[:4], outs[0][:4], strict=True))


triton_interpreter.in_a_child(globals())
