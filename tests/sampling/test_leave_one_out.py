"""sampling/distribution.py, step.py, rules.py: what sampling adds to the read-outs of a leave-one-out model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from tiny_runs import LENGTH, cache_of, canvases, model
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.ops.reference import inverse_cdf
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.rules import leave_one_out_bonus
from sfumato.sampling.step import StepInput, read_canvases, step_

BOTH = torch.arange(2)
V = tiny.tiny_config().vocab_size


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def left_out(plain: Model) -> Model:
    """The same weights, said to be those of a leave-one-out model."""
    other = copy.copy(plain)
    other.config = dataclasses.replace(plain.config, is_leave_one_out=True)
    return other


def middle(ours: Model, accepted: int) -> tuple[Any, Canvases, StepInput]:
    """Two canvases behind their first step, which has accepted so many positions of row 0 and none of row 1."""
    cache, state = cache_of(ours, [5, 9]), canvases(ours, 2)
    state.step_X[:2] = 1
    state.accepted_XL[0, :accepted] = True
    state.accepted_XL[1] = False
    return cache, state, StepInput(BOTH, Pass(ours, cache, [0, 1], [0, 0], 0, LENGTH))


def test_the_bonus_is_bayes_rule() -> None:
    """A token is kept with a share a and else uniform: the posterior of what stood there, by enumeration."""
    words = 5
    others = torch.softmax(torch.randn(words, generator=torch.Generator().manual_seed(0)), 0)
    for kept in (0.0, 0.3, 0.9):
        for token in range(words):
            likelihood = torch.full((words,), (1 - kept) / words)
            likelihood[token] += kept
            expected = others * likelihood / (others * likelihood).sum()
            logits = others.log()
            logits[token] += leave_one_out_bonus(torch.tensor(kept), words)
            torch.testing.assert_close(torch.softmax(logits, 0), expected)
    assert leave_one_out_bonus(torch.tensor(1.0), words).isfinite()


@pytest.mark.parametrize("name", tiny.OPS)
@pytest.mark.parametrize("accepted", [0, 3, LENGTH])
@torch.no_grad()
def test_a_read_out_sees_the_tokens_that_its_canvas_holds(name: str, accepted: int) -> None:
    plain = model(name)
    cache, state, inputs = middle(plain, accepted)
    before = read_canvases(plain, cache, state, inputs)
    raw: Tensor = before.read.logits_BLV.clone()
    actual = read_canvases(left_out(plain), cache, state, inputs)
    temperature = state.temperature_XS[0, 1]
    expected = raw.clone()
    bonus = leave_one_out_bonus(torch.tensor(accepted / LENGTH), V) / temperature
    expected[0].scatter_add_(1, state.canvas_XL[0][:, None], bonus.expand(LENGTH, 1))
    torch.testing.assert_close(actual.read.logits_BLV, expected, rtol=1e-5, atol=1e-5)
    p = torch.softmax(expected, -1)
    torch.testing.assert_close(actual.read.entropy_BL, torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5)
    assert actual.read.argmax_BL.equal(expected.argmax(-1))
    assert inputs.noise is None
    if accepted:
        assert not actual.read.entropy_BL[0].allclose(before.read.entropy_BL[0], atol=1e-3)
    assert actual.read.argmax_BL[1].equal(before.read.argmax_BL[1])


@pytest.mark.parametrize("name", tiny.OPS)
@torch.no_grad()
def test_the_soft_embedding_is_that_of_the_model_s_own_logits(name: str) -> None:
    plain = model(name)
    cache, state, inputs = middle(plain, 5)
    canvas = state.canvas_XL.clone()
    raw: Tensor = read_canvases(plain, cache, state, inputs).read.logits_BLV.clone()
    step_(left_out(plain), cache, state, inputs)
    expected = plain.ops.soft_embedding(raw, plain.embed_tokens.weight, plain.embed_scale)
    torch.testing.assert_close(state.soft_XLD[:2], expected, rtol=1e-4, atol=1e-4)
    assert not state.canvas_XL[:2].equal(canvas[:2])


@torch.no_grad()
def test_a_first_step_adds_nothing_but_for_pins() -> None:
    plain = model("fused")
    cache, state, inputs = middle(plain, LENGTH)
    state.step_X[:2] = 0  # what an earlier canvas has accepted counts for nothing
    before, actual = (read_canvases(one, cache, state, inputs).read for one in (plain, left_out(plain)))
    torch.testing.assert_close(actual.logits_BLV, before.logits_BLV)
    assert actual.sample_BL.equal(before.sample_BL)
    state.pin_XL[0, :2] = 7
    pinned = read_canvases(left_out(plain), cache, state, inputs).read
    assert not pinned.logits_BLV[0].allclose(before.logits_BLV[0])
    assert pinned.logits_BLV[1].equal(actual.logits_BLV[1])


@torch.no_grad()
def test_its_samples_are_drawn_from_what_it_then_says() -> None:
    plain = model("fused")
    cache, state, inputs = middle(plain, 4)
    uniform = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1))
    gumbel = -torch.empty(2, LENGTH, V).exponential_(generator=torch.Generator().manual_seed(2)).log()
    for noise in ({"uniform_BL": uniform}, {"gumbel_BLV": gumbel}):
        step_noise: Any = type("Noise", (), {"sample": noise, "tokens_BL": state.canvas_XL[:2]})()
        read = read_canvases(left_out(plain), cache, state, inputs._replace(noise=step_noise)).read
        log_p = torch.log_softmax(read.logits_BLV, -1)
        expected = inverse_cdf(log_p.exp(), uniform) if "uniform_BL" in noise else (log_p + gumbel).argmax(-1)
        assert read.sample_BL.equal(expected)


def test_a_checkpoint_says_so() -> None:
    config = tiny.tiny_config(is_leave_one_out=True)
    raw = config.to_dict()
    assert ModelConfig.from_dict(raw) == config
    assert not ModelConfig.from_dict(tiny.tiny_config().to_dict()).is_leave_one_out
    with pytest.raises(CheckpointError, match="sfumato_leave_one_out is 'yes'; it must be true or false"):
        ModelConfig.from_dict({**raw, "sfumato_leave_one_out": "yes"})
