"""Log-probabilities of tokens that are there already: a prompt's, from the pass that encodes it.

encode is causal, so the hidden state of a token gives the distribution of the one behind it, whatever comes later. The
logits of a long text have no place in memory at once (262,144 words x 2,048 tokens are 2 GB), so they are made and
dropped a slice at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.model.network import Model

SLICE = 1 << 24
"""Logits that exist at one time, unless a single position has more: 64 MB."""


class Likelihoods(NamedTuple):
    """What a model says of tokens, in their order."""

    logprobs: list[float]
    """In nats."""
    top: list[dict[int, float]]
    """Of each place, the likeliest tokens -> their log-probabilities."""
    is_finite: bool


def likelihoods(model: Model, hidden_TD: Tensor, tokens: Sequence[int], top: int) -> Likelihoods:
    """The log-probabilities of tokens from the hidden states before each, [T, D], with those of the `top` likeliest."""
    logprobs: list[float] = []
    likeliest: list[dict[int, float]] = []
    is_finite = bool(torch.isfinite(hidden_TD.float().sum()))
    size, top = max(1, SLICE // model.config.vocab_size), min(top, model.config.vocab_size)
    for first in range(0, len(tokens), size):
        some = slice(first, first + size)
        logits_TV = model.logits(hidden_TD[some])
        ids = torch.tensor(tokens[some], device=logits_TV.device, dtype=torch.long)
        total_T1 = logits_TV.logsumexp(-1, keepdim=True)
        is_finite &= bool(torch.isfinite(total_T1.sum()))
        logprobs += (logits_TV.gather(1, ids[:, None]) - total_T1)[:, 0].tolist()
        if top:
            values_TK, words_TK = logits_TV.topk(top)
            pairs = zip(words_TK.tolist(), (values_TK - total_T1).tolist(), strict=True)
            likeliest += [dict(zip(*pair, strict=True)) for pair in pairs]
    return Likelihoods(logprobs, likeliest, is_finite)


@dataclass(eq=False)
class PromptScores:
    """Collects what a model says of a prompt's tokens from `first` on (1 at least), while they are encoded."""

    first: int
    top: int
    """How many of the likeliest tokens of each place are wanted, too."""
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[dict[int, float]] = field(default_factory=list)
    following: dict[int, float] = field(default_factory=dict)
    """The likeliest tokens behind the whole prompt -> their log-probabilities."""

    def add(self, model: Model, at: int, tokens: Sequence[int], hidden_TD: Tensor, before_D: Tensor) -> bool:
        """Take tokens of the prompt from place `at` on, their hidden states, and the one before them.

        Returns whether all numbers are finite."""
        skipped = max(0, self.first - at)
        before_TD = torch.cat([before_D[None], hidden_TD[:-1]])[skipped:]
        scores = likelihoods(model, before_TD, tokens[skipped:], self.top)
        self.logprobs += scores.logprobs
        self.likeliest += scores.top
        return scores.is_finite

    def end(self, model: Model, last_D: Tensor) -> None:
        """Take the hidden state of the prompt's last token."""
        (self.following,) = likelihoods(model, last_D[None], [0], self.top).top or [{}]
