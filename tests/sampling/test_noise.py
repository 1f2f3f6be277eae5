"""sampling/noise.py: numbers that are uniform, that belong to their place, and that never change."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    examples,
)
from torch import Tensor

from sfumato.sampling.noise import CountedNoise, HostNoise, first_uniform


def counted(
    seeds: Sequence[int] = (0,), requests: Sequence[int] | None = None, length: int = 64, v: int = 61
) -> CountedNoise:
    return CountedNoise(seeds, requests or [0] * len(seeds), length, v)


def chi_square(counts: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies from its mean: beyond 5 never happens by chance."""
    expected = counts.sum() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return abs(statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [2, 61, 262_144])
def test_tokens_are_uniform(vocabulary: int) -> None:
    d = counted(v=vocabulary)
    steps = list(range(400))
    for tokens in (
        d.renoise([0] * 400, [0] * 400, steps),
        d.canvas([0] * 400, steps),
        d.renoise([0] * 400, steps, steps),
    ):
        assert tokens.dtype == torch.int64
        assert tokens.shape == (400, 64)
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) < vocabulary
        bins = torch.bincount((tokens.flatten() * min(vocabulary, 61)) // vocabulary, minlength=min(vocabulary, 61))
        assert chi_square(bins.float()) < 5
        for position in (0, 63):  # and at each position by itself, over the steps
            bins = torch.bincount(tokens[:, position] * 2 // vocabulary, minlength=2)
            assert chi_square(bins.float()) < 5


def test_uniforms_are_uniform() -> None:
    uniform = counted().sample([0] * 400, [1] * 400, list(range(400)))["uniform_BL"]
    assert uniform.dtype == torch.float32
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert chi_square(torch.histc(uniform, 100, 0, 1)) < 5
    pairs = (uniform[:, :-1] * 10).long() * 10 + (uniform[:, 1:] * 10).long()
    assert chi_square(torch.bincount(pairs.flatten(), minlength=100).float()) < 5
    pairs = (uniform[:-1] * 10).long() * 10 + (uniform[1:] * 10).long()
    assert chi_square(torch.bincount(pairs.flatten(), minlength=100).float()) < 5


def test_every_place_has_its_own_noise() -> None:
    """Seeds (beyond 32 bits too), requests, canvases, steps and the three streams: no two share their noise."""
    seeds = [0, 1, 2, 1 << 32, (1 << 32) + 1, 1 << 61, 1 << 62]
    vocabulary = 1 << 20
    drawn: dict[tuple[Any, ...], Tensor] = {}
    for seed in seeds:
        for request in (0, 1, 7):
            d = counted([seed], [request], v=vocabulary)
            for canvas in (0, 1, 2, 30):
                drawn["canvas", seed, request, canvas] = d.canvas([0], [canvas])[0]
                for step in (0, 1, 2, 47):
                    drawn["renoise", seed, request, canvas, step] = d.renoise([0], [canvas], [step])[0]
                    uniform = d.sample([0], [canvas], [step])["uniform_BL"][0]
                    drawn["sample", seed, request, canvas, step] = (uniform * vocabulary).long()
    every = torch.stack(list(drawn.values()))
    assert len(every.unique(dim=0)) == len(drawn) == len(seeds) * 3 * 4 * 9
    # 48,384 numbers of 20 bits: about 1,100 coincidences by chance; shared noise would make whole rows of them.
    coincidences = every.numel() - every.unique().numel()
    assert coincidences < 1400
    shifted = every[:, :-1].unsqueeze(1) == every[:60, 1:].unsqueeze(0)  # nor is one place another's neighbour
    assert int(shifted.all(-1).sum()) == 0


@examples(30)
@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=8), canvas=st.integers(0, 9), step=st.integers(0, 47))
def test_noise_does_not_depend_on_the_batch(rows: list[int], canvas: int, step: int) -> None:
    seeds, requests = [5, 9, 1 << 40, 5, 0], [0, 0, 3, 1, 2]
    d = counted(seeds, requests)
    places = [canvas + n for n in range(len(rows))], [step + 2 * n for n in range(len(rows))]
    together = (d.canvas(rows, places[0]), d.renoise(rows, *places), d.sample(rows, *places)["uniform_BL"])
    for n, row in enumerate(rows):
        one = counted([seeds[row]], [requests[row]])
        c, s = [places[0][n]], [places[1][n]]
        assert torch.equal(together[0][n], one.canvas([0], c)[0])
        assert torch.equal(together[1][n], one.renoise([0], c, s)[0])
        assert torch.equal(together[2][n], one.sample([0], c, s)["uniform_BL"][0])


def test_noise_is_what_it_was() -> None:
    """A seed is a promise across versions and machines: these numbers never change."""
    d = counted([1234567890123], [2], length=6)
    assert d.canvas([0], [0])[0].tolist() == FROZEN["canvas"]
    assert d.renoise([0], [3], [7])[0].tolist() == FROZEN["renoise"]
    assert (d.sample([0], [3], [7])["uniform_BL"][0] * 2**24).long().tolist() == FROZEN["sample"]


FROZEN = {
    "canvas": [12, 36, 21, 57, 50, 49],
    "renoise": [42, 15, 57, 48, 59, 30],
    "sample": [2969677, 12074727, 2159499, 6509112, 1036879, 11069452],
}


def test_noise_on_the_host_is_the_counted_one() -> None:
    """Whoever is asked for when, beside whom, and on which seat; also where a seat changes hands."""
    draw, host = random.Random(3), HostNoise(7, 262144)
    seeds = {seat: draw.randrange(1 << 62) for seat in range(12)}
    for _ in range(60):
        seats = draw.sample(range(12), draw.randrange(1, 9))
        if draw.random() < 0.3:
            seeds[seats[0]] = draw.randrange(1 << 62)
        own = [seeds[seat] for seat in seats]
        counted = CountedNoise(own, [0] * len(own), 7, 262144)
        rows, canvases = list(range(len(own))), [draw.choice([0, 1, 1 << 33]) for _ in own]
        assert torch.equal(host.canvas(seats, own, canvases, draw.random() < 0.5), counted.canvas(rows, canvases))
        for _ in range(3):
            steps = [draw.choice([0, 1, 7, 8, 9, 4095]) for _ in own]
            uniform, noise = host.step(seats, own, canvases, steps)
            assert torch.equal(uniform, counted.sample(rows, canvases, steps)["uniform_BL"])
            assert torch.equal(noise, counted.renoise(rows, canvases, steps))
            assert uniform.dtype == torch.float32 and noise.dtype == torch.int64
        first = counted.sample(rows, canvases, [0] * len(own))["uniform_BL"][:, 0]
        assert torch.equal(first_uniform(own, canvases), first)
