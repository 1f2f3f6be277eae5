"""The small kernels of a step under the interpreter: its noise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter

from sfumato.diffusion import CountedDice
from sfumato.ops.triton.noise import noise


@pytest.mark.parametrize("length", [1, 6, 256])
@pytest.mark.parametrize("vocab_size", [61, 262_144])
def test_the_noise_has_the_bits_of_counted_dice(length: int, vocab_size: int) -> None:
    """Seeds and requests at the ends of what they may be, rows in any order and twice."""
    seeds, requests = [0, 1, 2**32 - 1, 2**32, 2**63 - 1], [0, 7, 1 << 31, 3, 2**32 - 1]
    canvases, steps = [0, 3, 1023, 1, 70_000], [0, 1, 47, 4095, 2]
    dice = CountedDice(seeds, requests, length, vocab_size)
    words_X4 = torch.tensor(
        [[s & 0xFFFFFFFF, s >> 32, r, c] for s, r, c in zip(seeds, requests, canvases, strict=True)]
    )
    at = [4, 0, 2, 2, 1, 3]
    uniform_BL, tokens_BL = noise(words_X4, torch.tensor(steps), torch.tensor(at), length, vocab_size)
    places = at, [canvases[i] for i in at], [steps[i] for i in at]
    assert torch.equal(uniform_BL, dice.sample(*places)["uniform_BL"])
    assert torch.equal(tokens_BL, dice.renoise(*places))


def test_no_rows_no_noise() -> None:
    words_X4, nothing = torch.zeros(2, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    assert [x.shape for x in noise(words_X4, words_X4[:, 0], nothing, 8, 61)] == [(0, 8), (0, 8)]


triton_interpreter.in_a_child(globals())
