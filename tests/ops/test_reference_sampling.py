"""ops/reference.py: a token from a uniform number."""

from __future__ import annotations

import torch

from sfumato.ops.reference import inverse_cdf


def test_the_inverse_of_the_distribution() -> None:
    """Over a fine grid each token comes with its probability; impossible tokens never, at either end."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.45, 0.25, 0.0])
    grid = torch.cat([torch.tensor([0.0]), (torch.arange(4000) + 0.5) / 4000, torch.tensor([1 - 2**-24])])
    got = inverse_cdf(p.expand(1, len(grid), -1), grid[None])[0]
    assert torch.bincount(got, minlength=6).tolist() == [0, 1201, 0, 1800, 1001, 0]
    assert bool((got.diff() >= 0).all())
