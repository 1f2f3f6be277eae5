"""training/loss.py: losses and every gradient equal the published formula computed with transformers' modules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.model.adapters import Adapter, Factors, new_adapter
from sfumato.model.network import Model
from sfumato.model.trainable import trainable_
from sfumato.training.loss import IGNORE, Corruption, Examples, Problem, losses, problem
from sfumato.training.objective import Objective

CONFIG = tiny.tiny_config()
WINDOW, L, V = CONFIG.window, CONFIG.canvas_length, CONFIG.vocab_size
PROMPTS, ANSWERS = [3, 3 * WINDOW + 1, 2, 2 * WINDOW], [L - 3, 2 * L, 3 * L - 2, 3 * L + 5]
"""Shorter and longer than the window; one to four canvases."""
TARGETS = ("attention", "dense", "experts", "router", "self_conditioning")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@functools.cache
def oracle() -> Any:
    return tiny.oracle(CONFIG, seed=3)


def noisy(seed: int, repeats: int = 1, encode_response: bool = True) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    counts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    tokens = torch.randint(6, V, (len(counts), max(counts)), generator=generator)
    examples = Examples(tokens, counts, PROMPTS, [False, True, True, False])
    dice = Corruption.draw(len(counts) * repeats, L, V, generator)
    return problem(examples, dice, L, 1, encode_response)


def published(theirs: Any, batch: Problem, leave_one_out: bool) -> tuple[Tensor, Tensor]:
    """L_diff and L_enc, row by row, by transformers' encoder, cache, decoder and head alone."""
    from transformers import DynamicCache

    diffusion, encode, known, predicted = [], [], 0, 0
    for n, (row, start) in enumerate(zip(batch.rows, batch.starts, strict=True)):
        past = DynamicCache(config=theirs.config.text_config)
        canvas = batch.canvas_BL[n : n + 1]
        prefix = batch.tokens_BT[row : row + 1, :start]
        first = theirs(input_ids=prefix, past_key_values=past, decoder_input_ids=canvas).logits.detach()
        is_on = torch.tensor([n < batch.conditioned])
        out = theirs(
            past_key_values=past,
            decoder_input_ids=canvas,
            self_conditioning_logits=first,
            self_conditioning_mask=is_on,
        )
        logits = out.logits[0].float()
        if leave_one_out:
            kept = 1 - batch.level_B[n]
            logits = logits + torch.log(1 + V * kept / (1 - kept)) * F.one_hot(canvas[0], V)
        diffusion.append(F.cross_entropy(logits, batch.target_BL[n], ignore_index=IGNORE, reduction="sum"))
        known += int((batch.target_BL[n] != IGNORE).sum())
    cap = theirs.final_logit_softcapping
    for row, count in enumerate(batch.counts):
        ids = batch.tokens_BT[row : row + 1, :count]
        hidden = theirs.model.encoder(input_ids=ids).last_hidden_state[0, :-1]
        logits = torch.tanh(theirs.lm_head(hidden) / cap) * cap
        encode.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        predicted += count - 1
    return torch.stack(diffusion).sum() / known, torch.stack(encode).sum() / predicted


def gradients(theirs: Any, batch: Problem, leave_one_out: bool) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Of the published objective, by transformers' names."""
    theirs.requires_grad_(True)
    theirs.zero_grad()
    both = published(theirs, batch, leave_one_out)
    sum(both).backward()  # type: ignore[union-attr]
    theirs.requires_grad_(False)
    actual = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    return both, actual


def check(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        assert (grad - expected[name]).abs().max() < 1e-4 * max(1.0, float(expected[name].abs().max())), name
        assert (grad - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


@pytest.mark.parametrize(("name", "seed", "repeats"), [("fused", 0, 1), ("fused", 1, 2), ("reference", 2, 1)])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_all_weights(name: str, seed: int, repeats: int, leave_one_out: bool) -> None:
    theirs, batch = oracle(), noisy(seed, repeats, encode_response=name == "fused")
    ours = tiny.twin(theirs, name).requires_grad_(True)
    (diffusion, encode), theirs_by_name = gradients(theirs, batch, leave_one_out)
    own_diffusion, own_encode = losses(ours, batch, Objective(leave_one_out))
    assert abs(own_diffusion.item() - diffusion.item()) < 1e-5
    assert abs(own_encode.item() - encode.item()) < 1e-5
    (own_diffusion + own_encode).backward()
    named = dict(ours.named_parameters())
    actual = {name: p.grad for name, p in named.items() if p.grad is not None}
    assert actual.keys() == named.keys()
    check(actual, {name: theirs_by_name[tiny.oracle_name(name)] for name in actual})


def adapter_of(model: Model) -> Adapter:
    """Factors that change every kind of weight."""
    new = new_adapter(model, 3, 6.0, TARGETS, seed=4)
    draws = torch.Generator().manual_seed(5)
    factors = {
        name: Factors(own.a, torch.randn(own.b.shape, generator=draws) * 0.1, own.scale)
        for name, own in new.factors.items()
    }
    return Adapter(factors)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_low_rank_factors(leave_one_out: bool) -> None:
    """Against the chain rule from the gradients of weights into which transformers has them merged."""
    theirs = tiny.oracle(CONFIG, seed=3)
    batch, ours = noisy(0), tiny.twin(theirs, "fused")
    adapter = adapter_of(ours)
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    for name, own in adapter.factors.items():
        weights[tiny.oracle_name(name)].data += own.delta()
    (diffusion, encode), whole = gradients(theirs, batch, leave_one_out)
    trainable_(ours, adapter)
    own_diffusion, own_encode = losses(ours, batch, Objective(leave_one_out))
    assert abs(own_diffusion.item() - diffusion.item()) < 1e-5
    assert abs(own_encode.item() - encode.item()) < 1e-5
    (own_diffusion + own_encode).backward()
    actual, expected = dict[str, Tensor](), dict[str, Tensor]()
    for name, own in adapter.factors.items():
        owner, leaf = name.rsplit(".", 1)
        module: Any = ours.get_submodule(owner)
        weight = getattr(module, leaf)
        grad = own.scale * whole[tiny.oracle_name(name)]
        actual |= {f"{name} a": weight.a.grad[0], f"{name} b": weight.b.grad[0]}
        expected |= {f"{name} a": own.b @ grad, f"{name} b": own.a @ grad.mT}
    assert len(actual) == len([p for p in ours.parameters() if p.requires_grad])
    check(actual, expected)
