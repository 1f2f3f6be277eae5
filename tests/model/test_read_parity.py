"""model/network.py: a read is what transformers' encoder and denoiser show, on random checkpoints.

Prompt and question are one causal text there. Here the prompt lies in the cache, and the question goes along with the
canvases, several of which stand behind one row."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sfumato.engine.reading import soft_embedding
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model

LENGTH = 16
"""Positions of a canvas, fewer than the model's own."""
CLOSE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


THIN = dataclasses.replace(tiny.THIN, vocab_size=256, hidden_size=64, intermediate_size=48, expert_size=16)


@functools.cache
def thin_oracle() -> Any:
    """As many layers, experts and chosen experts as the release has.

    Blocks add little to what they pass on and attend softly, or 30 random ones amplify float32's rounding beyond any
    tolerance."""
    theirs = tiny.oracle(THIN, 3, 1.5, 0.1)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        if "q_norm" in name or "k_norm" in name:
            tensor.data.mul_(0.5)
        if name.endswith("layer_scalar"):
            tensor.data.mul_(0.2).add_(0.8)
    return theirs


def tokens(config: ModelConfig, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()


def canvases_of(config: ModelConfig, pins: Sequence[int], steps: int) -> list[Tensor]:
    """A canvas for each step: pins, then noise."""
    rest = [tokens(config, LENGTH - len(pins), 70 + step) for step in range(steps)]
    return [torch.tensor([[*pins, *own]]) for own in rest]


@torch.no_grad()
def oracle_logits(theirs: Any, text: Sequence[int], canvases: Sequence[Tensor], pins: int) -> list[Tensor]:
    """The logits of the first free position, [V] of each step. Pinned positions are conditioned on their own token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.text_config)
    out = theirs(input_ids=torch.tensor([text]), past_key_values=cache, decoder_input_ids=canvases[0])
    logits = [out.logits[0, pins]]
    for before, canvas in itertools.pairwise(canvases):
        conditioning = out.logits.clone()
        conditioning[:, :pins] = -1e9
        conditioning[:, :pins].scatter_(2, before[:, :pins, None], 1e9)
        out = theirs(past_key_values=cache, decoder_input_ids=canvas, self_conditioning_logits=conditioning)
        logits.append(out.logits[0, pins])
    return logits


@torch.no_grad()
def read_logits(
    ours: Model,
    prompt: Sequence[int],
    questions: Sequence[Sequence[int]],
    all_pins: Sequence[Sequence[int]],
    steps: int,
) -> list[list[Tensor]]:
    """The same of several reads behind one prompt, in one pass each step."""
    cache = KVCache.allocate(ours.config, 1, len(prompt))
    ours.encode(torch.tensor([prompt]), cache)
    kept = [k.clone() for k in cache.k]
    width, counts, rows = max(map(len, questions)), [*map(len, questions)], [0] * len(questions)
    padded = torch.tensor([[*one, *[7] * (width - len(one))] for one in questions]) if width else None
    each = [canvases_of(ours.config, pins, steps) for pins in all_pins]
    pin_BL = torch.tensor([[*pins, *[-1] * (LENGTH - len(pins))] for pins in all_pins])
    soft, logits = None, []
    for step in range(steps):
        canvas = torch.cat([canvases[step] for canvases in each])
        hidden = ours.read(padded, counts, canvas, cache, rows, soft)
        at = torch.arange(len(rows)), torch.tensor([*map(len, all_pins)])
        logits.append([*ours.logits_of(hidden[at], torch.arange(ours.config.vocab_size))])
        soft = soft_embedding(ours, hidden, pin_BL)
    assert cache.lengths == [len(prompt)]
    assert all(torch.equal(one, two) for one, two in zip(cache.k, kept, strict=True))
    return [list(steps_of) for steps_of in zip(*logits, strict=True)]


@pytest.mark.parametrize(("length", "name"), [(62, "reference"), (64, "fused"), (130, tiny.OPS[-1])])
def test_a_read_is_what_the_oracle_shows_behind_one_text(length: int, name: str) -> None:
    """Prompts and questions across the edge of the window of 64; steps with the soft embedding."""
    theirs = thin_oracle()
    ours = tiny.twin(theirs, name)
    config, steps = ours.config, 2 if length == 64 else 1
    prompt = tokens(config, length, length)
    questions = [tokens(config, count, count) for count in (0, 3, 40)]
    pins = [[], tokens(config, 1, 1), tokens(config, 9, 9)]
    own = read_logits(ours, prompt, questions, pins, steps)
    for question, pinned, logits in zip(questions, pins, own, strict=True):
        expected = oracle_logits(theirs, [*prompt, *question], canvases_of(config, pinned, steps), len(pinned))
        assert float(expected[0].std()) > 0.5
        assert steps == 1 or float((expected[0] - expected[-1]).abs().max()) > 0.1
        for one, two in zip(logits, expected, strict=True):
            assert float((one - two).abs().max()) < CLOSE


def test_the_words_that_are_asked_are_those_of_all_logits() -> None:
    model = tiny.tiny_model(seed=2)
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([5, 60, 5, 0])
    torch.testing.assert_close(model.logits_of(hidden, words), model.logits(hidden)[:, words], rtol=1e-6, atol=1e-6)
