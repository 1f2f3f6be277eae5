"""sampling/canvases.py: rows of the state as they begin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import (
    LENGTH,
    SETTLES,
    cache_of,
    canvases,
)

from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.rules import Rules
from sfumato.sampling.step import StepInput, step_


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def talker(name: str = "fused") -> Model:
    """A model whose canvases settle after a few steps, and that ends some answers by itself."""
    return tiny_runs.talker((38, 45), name)


def test_rows_begin_as_they_are_allocated() -> None:
    """A seat that another request had: nothing of that is left, and its neighbour's state stays as it was."""
    ours, rules = talker(), [Rules.of(o) for o in (SETTLES, Options(max_steps=3, stability=2, entropy_bound=0.3))]
    seeds, early, length = [2**40 + 5, 3], [True, False], LENGTH
    expected = Canvases.allocate(ours, rules, seeds, [0, 0], early=early)
    reused = canvases(ours, 3)
    cache = cache_of(ours, [5, 9, 2])
    step_(ours, cache, reused, StepInput(torch.arange(3), Pass(ours, cache, [0, 1, 2], [0] * 3, 0, LENGTH)))
    before = {f.name: getattr(reused, f.name)[1].clone() for f in dataclasses.fields(Canvases) if "_X" in f.name}
    fresh, pins = torch.arange(2 * length).view(2, length), torch.full((2, length), -1)
    pins[1, 2] = 7
    reused.seat_([2, 0], rules, seeds, early)
    for state, rows in (expected, [0, 1]), (reused, [2, 0]):
        state.begin_(rows, fresh, pins, [4, 5], pins == 7, [3, length])
    for name, neighbour in before.items():
        whole = getattr(reused, name)
        assert torch.equal(whole[1], neighbour), name
        if name not in ("still_XL", "entropy_XL", "accepted_XL"):  # these are read only after a step has written them
            assert torch.equal(whole[[2, 0]], getattr(expected, name)[:2]), name
    reused.begin_([0], fresh[:1], None, [0])  # it had a pin and a ban
    assert torch.equal(reused.canvas_XL[0], fresh[0]) and bool((reused.pin_XL[0] == -1).all())
    assert not reused.banned_XL[0].any()
