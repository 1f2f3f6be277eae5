"""training/loss.py: parts of a batch, whose sums and counts add up to those of the whole."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from sfumato.training.loss import Corruption, Examples, loss_sums, losses, problem

L, EOS, SIZE = 8, 1, 6


def batch(learned: float = 1.0) -> Examples:
    counts, prompts = [14, 21, 9, 30, 12, 17], [5, 6, 9, 3, 11, 2]
    tokens = torch.randint(6, 61, (SIZE, 30), generator=torch.Generator().manual_seed(3))
    is_learned = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < learned
    is_cut = [False, True, False, True, False, False]
    return Examples(tokens, counts, prompts, is_cut, None if learned == 1.0 else is_learned)


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize(("repeats", "share", "learned"), [(1, 0.5, 1.0), (2, 0.25, 0.4), (1, 0.2, 1.0), (1, 0.0, 0.4)])
def test_the_parts_of_a_batch_add_up_to_it_and_take_the_same_passes(
    ranks: int, repeats: int, share: float, learned: float
) -> None:
    model, examples = tiny_model(), batch(learned)
    dice = Corruption.draw(SIZE * repeats, L, 61, torch.Generator().manual_seed(1), share)
    whole = loss_sums(model, problem(examples, dice, L, EOS))
    parts = [
        problem(examples.part(rank, ranks), dice.part(rank, ranks), L, EOS, encode_response=True)
        for rank in range(ranks)
    ]
    assert len({part.has_first_pass for part in parts}) == 1
    assert sum(part.conditioned for part in parts) == dice.conditioned
    sums = [loss_sums(model, part) for part in parts]
    for name in ("diffusion_count", "encode_count"):
        assert sum(getattr(one, name) for one in sums) == getattr(whole, name)
    for name in ("diffusion", "encode"):
        total = torch.stack([getattr(one, name) for one in sums]).sum()
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses(model, problem(examples, dice, L, EOS)), whole.means())


def test_the_next_token_loss_covers_what_is_learned() -> None:
    model, examples = tiny_model(), batch(0.4)
    dice = Corruption.draw(SIZE, L, 61, torch.Generator().manual_seed(1), 0.0)
    some, every = problem(examples, dice, L, EOS), problem(batch(), dice, L, EOS)
    assert examples.is_learned_BT is not None
    kept = examples.is_learned_BT[:, 1:] & (every.next_BT >= 0)
    assert torch.equal(some.next_BT >= 0, kept) and some.encode_count == int(kept.sum()) < every.encode_count
    assert torch.equal(some.next_BT[kept], every.next_BT[kept])
    changed = Examples(examples.tokens_BT, examples.counts, examples.prompts, examples.is_cut)
    assert losses(model, some)[1] != losses(model, problem(changed, dice, L, EOS))[1]


def test_a_batch_without_a_target_has_a_loss_of_zero() -> None:
    one = Examples(torch.tensor([[7]]), [1], [1], [True])
    dice = Corruption.draw(1, L, 61, torch.Generator().manual_seed(1))
    sums = loss_sums(tiny_model(), problem(one, dice, L, EOS))
    assert (sums.diffusion_count, sums.encode_count) == (0, 0)
    assert [loss.item() for loss in sums.means()] == [0.0, 0.0]


def test_a_share_that_is_no_whole_number_of_canvases_is_right_on_average() -> None:
    def counts(batch: int, share: float) -> list[int]:
        generator = torch.Generator().manual_seed(3)
        return [Corruption.draw(batch, L, 61, generator, share).conditioned for _ in range(400)]

    alone = counts(1, 0.5)  # a batch of one canvas: what fits the smallest GPU
    assert set(alone) == {0, 1}
    assert 160 < sum(alone) < 240
    assert set(counts(3, 0.5)) == {1, 2}
    assert set(counts(4, 0.5)) == {2}
    assert set(counts(1, 1.0)) == {1}
    assert set(counts(1, 0.0)) == {0}
