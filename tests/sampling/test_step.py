"""sampling/step.py: one step of some rows, by itself and recorded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import (
    CONFIG,
    LENGTH,
    SAME,
    cache_of,
    canvases,
    keys_and_values,
    padded,
    same,
    text,
)
from torch import Tensor

from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.sampling import step
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.recorded import Recorded, RecordedShape
from sfumato.sampling.step import StepInput, step_


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def talker(name: str = "fused") -> Model:
    """A model whose canvases settle after a few steps, and that ends some answers by itself."""
    return tiny_runs.talker((38, 45), name)


def read_state(state: Canvases, rows: list[int]) -> list[Tensor]:
    """All that a row's answer is read from."""
    fields = state.canvas_XL, state.argmax_XL, state.entropy_XL, state.accepted_XL, state.step_X, state.is_done_X
    return [field[rows].clone().float() for field in fields]


def test_a_row_that_has_stopped_is_frozen() -> None:
    """Whatever further steps it takes part in; its neighbour goes on."""
    ours = talker()
    cache, state = cache_of(ours, [5, 9]), canvases(talker(), 2)
    for turn in range(3):
        before = read_state(state, [0])
        step_(ours, cache, state, StepInput(torch.arange(2), Pass(ours, cache, [0, 1], [0, 0], 0, LENGTH)))
        assert same(read_state(state, [0]), before) is (turn > 0)
        state.is_done_X[0] = True
    assert state.step_X.tolist() == [1, 3, 0]


@pytest.mark.parametrize("encode", [0, 3])
def test_a_recorded_step_for_four_serves_one(encode: int) -> None:
    """The fillers change no other row's canvas and no token of the cache; the one row's step is the plain one."""
    ours, tokens = talker(), padded([text(encode)], LENGTH)
    plain, recorded = ((cache_of(ours, [20, 9, 3]), canvases(ours, 3)) for _ in range(2))
    cache, state = plain
    more = tokens[:, :encode] if encode else None
    run = Pass(ours, cache, [1], [encode], encode, LENGTH)
    hidden = step_(ours, cache, state, StepInput(torch.tensor([1]), run, more))
    cache, state = recorded
    others = read_state(state, [0, 2]), keys_and_values(cache, [0, 2])
    step = Recorded(ours, cache, state, RecordedShape(4, LENGTH if encode else 0))
    encoded = step([1], [9], [encode], tokens if encode else None)
    assert same(read_state(state, [0, 2]), others[0])
    assert same(keys_and_values(cache, [0, 2]), others[1])
    assert same(read_state(state, [1]), read_state(plain[1], [1]), SAME)
    assert same(keys_and_values(cache, [1]), keys_and_values(plain[0], [1]), SAME)
    assert (encoded is None) is (hidden is None) is (encode == 0)
    if encoded is not None and hidden is not None:
        assert encoded.shape == (1, LENGTH, CONFIG.hidden_size)
        assert same([encoded[:, :encode]], [hidden], SAME)


@pytest.mark.parametrize("has_early", [False, True])
def test_a_further_rule_takes_the_plain_end(has_early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation that ends a step in one call knows the reference's rules alone; early rows change nothing."""
    ours = tiny_runs.talker((38, 45), "fused")
    ended: list[str] = []
    compiled = dataclasses.replace(ours.ops, conclude_=lambda *_: ended.append("compiled"))
    monkeypatch.setattr(ours, "ops", compiled)  # other tests have the same model
    cache, state = cache_of(ours, [5, 9]), canvases(ours, 2)
    inputs = StepInput(torch.arange(2), Pass(ours, cache, [0, 1], [0, 0], 0, LENGTH))
    step_(ours, cache, state, inputs)
    assert ended == ["compiled"] and state.step_X.tolist() == [0, 0, 0]
    state.has_further_rules, state.has_early = True, has_early
    state.early_X[1] = has_early
    monkeypatch.setattr(step, "stops", lambda is_settled_B, view, own: torch.ones_like(is_settled_B))
    step_(ours, cache, state, inputs)
    assert ended == ["compiled"] and state.step_X.tolist() == [1, 1, 0] and state.is_done_X.tolist()[:2] == [True, True]
