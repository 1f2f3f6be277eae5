"""Steps that are about to end: states in the midst of a canvas, what a pass shows of them, and their end, by operations
or by the specification, `step.conclude_`."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.ops.contract import ReadOut
from sfumato.options import MOST_REPEATS, Options
from sfumato.sampling import step
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.rules import RowRules, Rules

LENGTH, WIDTH, WORDS, ROWS = 20, 24, 61, 5


def pass_result(
    at: list[int],
    seed: int,
    exact: bool,
    dtype: torch.dtype = torch.bfloat16,
    length: int = LENGTH,
    width: int = WIDTH,
) -> tuple[step.PassResult, Tensor]:
    """What a pass shows of these rows, and its soft embedding. `exact`: entropies whose sums are exact in any order,
    many of them equal."""
    draw, rows = torch.Generator().manual_seed(seed), len(at)
    entropy_BL = torch.rand(rows, length, generator=draw) ** 4
    if exact:
        entropy_BL = (entropy_BL * 16).floor() / 64
    sample_BL, argmax_BL, noise_BL = (torch.randint(0, WORDS, (rows, length), generator=draw) for _ in range(3))
    hidden_BLD, soft_BLD = (torch.randn(rows, length, width, generator=draw).to(dtype) for _ in range(2))
    read = ReadOut(sample_BL, argmax_BL, entropy_BL, torch.empty(0))
    return step.PassResult(None, hidden_BLD, read, noise_BL), soft_BLD


def canvases(
    seed: int,
    has_pins: bool,
    has_early: bool,
    dtype: torch.dtype = torch.bfloat16,
    length: int = LENGTH,
    width: int = WIDTH,
) -> Canvases:
    """Rows in the midst of a canvas: some with pins, some early, one that has stopped; and the scratch row."""
    draw, size, shape = torch.Generator().manual_seed(seed), ROWS + 1, (ROWS + 1, length)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    def flags(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=draw) < share

    return Canvases(
        canvas_XL=integers(0, WORDS, *shape),
        soft_XLD=torch.zeros(*shape, width, dtype=dtype),
        pin_XL=torch.where(flags(0.2 * has_pins, *shape), integers(0, WORDS, *shape), -1),
        argmax_XL=integers(0, WORDS, *shape),
        still_XL=integers(0, 3, *shape),
        recent_XWL=torch.zeros(size, MOST_REPEATS, length, dtype=torch.int32),
        entropy_XL=torch.zeros(shape),
        accepted_XL=flags(0.5, *shape),
        step_X=integers(0, 6, size),
        is_done_X=torch.arange(size) == 3,
        is_finite_X=torch.arange(size) != 2,
        banned_XL=flags(0.0, *shape),
        rng_counter_X4=torch.zeros(size, 4, dtype=torch.long),
        temperature_XS=torch.ones(size, 8),
        rules=dataclasses.replace(
            RowRules.of([Rules.of(Options())] * size),
            entropy_bound_X=torch.tensor([0.0, 0.125, 0.5, 2.0, 1e9, 0.1]),
            stability_X=integers(0, 2, size),
            confidence_X=torch.tensor([0.0, 0.1, 0.2, 1.0, 5.0, 1.0]),
            max_steps_X=integers(3, 9, size),
        ),
        room_X=integers(0, length + 1, size),
        early_X=flags(0.7 * has_early, size),
        settled_X=torch.zeros(size, dtype=torch.long),
        eos_E=torch.tensor([1, 7]),
        has_pins=has_pins,
        has_early=has_early,
    )


def concluded(
    monkeypatch: pytest.MonkeyPatch, by: Any, state: Canvases, at: list[int], result: Any, soft: Tensor
) -> None:
    """The end of a step by the kernels, or (None) by the specification, where such a pass came before it."""
    embed_VD = torch.randn(WORDS, soft.shape[-1], generator=torch.Generator().manual_seed(99)).to(soft.dtype)
    ops = SimpleNamespace(conclude_=by, soft_embedding=lambda *_: soft)
    weight = SimpleNamespace(weight=embed_VD)
    config, scale = SimpleNamespace(is_leave_one_out=False), torch.tensor(6.3).to(soft.dtype)
    model: Any = SimpleNamespace(config=config, ops=ops, embed_tokens=weight, embed_scale=scale)
    monkeypatch.setattr(step, "read_canvases", lambda *_: result)
    nothing: Any = None
    step.step_(model, nothing, state, step.StepInput(torch.tensor(at), nothing))


def differing(one: Canvases, two: Canvases) -> list[str]:
    """The parts of the state that are not equal to the bit, of all rows but scratch."""
    pairs = {f.name: (getattr(one, f.name), getattr(two, f.name)) for f in fields(one) if "_X" in f.name}
    return [name for name, (a, b) in pairs.items() if not torch.equal(a[:-1], b[:-1])]
