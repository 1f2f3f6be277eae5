"""ops/triton/noise.py and conclude.py: a step's noise, and its end against `step.conclude_`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from endings import ROWS, canvases, concluded, differing, pass_result

from sfumato.ops.triton.conclude import conclude_
from sfumato.ops.triton.noise import noise
from sfumato.sampling.noise import CountedNoise
from sfumato.sampling.rules import accept


@pytest.mark.parametrize("length", [1, 6, 256])
@pytest.mark.parametrize("vocab_size", [61, 262_144])
def test_the_noise_has_the_bits_of_counted_noise(length: int, vocab_size: int) -> None:
    """Seeds and requests at the ends of what they may be, rows in any order and twice."""
    seeds, requests = [0, 1, 2**32 - 1, 2**32, 2**63 - 1], [0, 7, 1 << 31, 3, 2**32 - 1]
    canvases, steps = [0, 3, 1023, 1, 70_000], [0, 1, 47, 4095, 2]
    counted = CountedNoise(seeds, requests, length, vocab_size)
    rng_counter_X4 = torch.tensor(
        [[s & 0xFFFFFFFF, s >> 32, r, c] for s, r, c in zip(seeds, requests, canvases, strict=True)]
    )
    at = [4, 0, 2, 2, 1, 3]
    temperature_XS = torch.rand(5, 4096)
    uniform_BL, tokens_BL, temperature_B = noise(
        rng_counter_X4, torch.tensor(steps), temperature_XS, torch.tensor(at), length, vocab_size
    )
    assert torch.equal(temperature_B, temperature_XS[at, [steps[i] for i in at]])
    places = at, [canvases[i] for i in at], [steps[i] for i in at]
    assert torch.equal(uniform_BL, counted.sample(*places)["uniform_BL"])
    assert torch.equal(tokens_BL, counted.renoise(*places))


def test_no_rows_no_noise() -> None:
    rng_counter_X4, nothing = torch.zeros(2, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    result = noise(rng_counter_X4, rng_counter_X4[:, 0], torch.ones(2, 3), nothing, 8, 61)
    assert [x.shape for x in result] == [(0, 8), (0, 8), (0,)]


@pytest.mark.parametrize("has_early", [False, True])
@pytest.mark.parametrize("has_pins", [False, True])
def test_a_step_ends_as_the_specification_says(
    has_pins: bool, has_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are exact here, so all is equal to the bit, positions of equal entropy among them. Three steps each, argmax
    tokens that stay, rows in any order, scratch among them."""
    reasons = Counter[str]()
    for seed in range(6):
        plain, fused = (canvases(seed, has_pins or has_early, has_early) for _ in range(2))
        at = [[0, 1, 2, 3, 4], [4, 2, 0, 5, 5], [3]][seed % 3]
        result, soft = pass_result(at, 100 + seed, exact=True)
        for turn in range(3):
            if turn < 2:
                result, soft = pass_result(at, 100 * turn + seed, exact=True)
            before = plain.is_done_X.clone()
            concluded(monkeypatch, None, plain, at, result, soft)
            concluded(monkeypatch, conclude_, fused, at, result, soft)
            assert differing(plain, fused) == []
            reasons["stopped"] += int((plain.is_done_X & ~before)[:-1].sum())
            reasons["before the cap"] += int(
                (plain.is_done_X & ~before & (plain.step_X < plain.rules.max_steps_X))[:-1].sum()
            )
            reasons["settled"] += int((plain.settled_X > 0)[:-1].sum())
    assert reasons["stopped"] > reasons["before the cap"] > 2
    assert (reasons["settled"] > 5) is has_early


def test_scratch_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state, before = (canvases(1, True, True) for _ in range(2))
    concluded(monkeypatch, conclude_, state, [5, 5, 0], *pass_result([5, 5, 0], 1, exact=False))
    assert all(
        torch.equal(getattr(state, f.name)[-1], getattr(before, f.name)[-1]) for f in fields(state) if "_X" in f.name
    )
    assert not torch.equal(state.canvas_XL[0], before.canvas_XL[0])


@pytest.mark.parametrize("where", ["hidden", "soft", "entropy", "a pinned entropy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stops(where: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the number stands, even where a pin hides it; but not what a pin puts in place of a soft embedding."""
    plain, fused = (canvases(4, True, False) for _ in range(2))
    at, (result, soft) = [0, 1, 4], pass_result([0, 1, 4], 7, exact=True)
    plain.pin_XL[1, 3:5] = fused.pin_XL[1, 3:5] = torch.tensor([9, -1])
    soft[1, 3, 2] = value
    {
        "hidden": result.hidden_BLD[1, 3],
        "soft": soft[1, 4],
        "entropy": result.read.entropy_BL[1, 4:5],
        "a pinned entropy": result.read.entropy_BL[1, 3:4],
    }[where][-1] = value
    concluded(monkeypatch, None, plain, at, result, soft)
    concluded(monkeypatch, conclude_, fused, at, result, soft)
    assert fused.is_finite_X[:-1].tolist() == plain.is_finite_X[:-1].tolist() == [True, False, False, True, True]
    assert fused.is_done_X[1] and plain.is_done_X[1]


def test_a_position_is_accepted_by_what_stands_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entropies as they come, against sums in float64: only within their rounding of the bound may it be otherwise."""
    near = 0
    for seed in range(8):
        state, at = canvases(seed, False, False), [0, 1, 2, 4]
        state.rules.entropy_bound_X[:] = torch.rand(ROWS + 1, generator=torch.Generator().manual_seed(seed)) * 2
        result, soft = pass_result(at, seed, exact=False)
        concluded(monkeypatch, conclude_, state, at, result, soft)
        ordered_BL, order_BL = result.read.entropy_BL.double().sort(dim=-1, stable=True)
        before_BL = torch.zeros_like(ordered_BL).scatter(-1, order_BL, ordered_BL.cumsum(-1) - ordered_BL)
        bound_B1 = state.rules.entropy_bound_X[at, None].double()
        is_clear_BL = (before_BL - bound_B1).abs() > 1e-6 * bound_B1
        assert torch.equal(state.accepted_XL[at] & is_clear_BL, (before_BL <= bound_B1) & is_clear_BL)
        assert torch.equal(
            state.accepted_XL[at] & is_clear_BL,
            accept(result.read.entropy_BL, state.rules.entropy_bound_X[at]) & is_clear_BL,
        )
        near += int((~is_clear_BL).sum())
    assert near < 5


triton_interpreter.in_a_child(globals())
