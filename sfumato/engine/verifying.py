"""What the causal direction says of a canvas that the denoise passes have settled (`Options.verify`).

The encode pass of a canvas gives the log-probability of each of its tokens from those before it alone, by the same
weights. The gap of a token is by how much that of the likeliest token in its place is above its own. A canvas one of
whose gaps is above the threshold is refused, and denoised again from other noise; where no try is left, the likeliest
of them all is committed.

Only tokens that can become part of the answer count, and that were free: not what is pinned, and nothing behind the
first end or the budget. It lacks a verdict on text that only what stands behind it explains, so templates refuse it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CommitLikelihoods(NamedTuple):
    """What a commit says of its tokens, where that is asked for."""

    logprobs: list[float]
    top: list[dict[Any, float]] | None
    """The log-probabilities of the likeliest tokens in each place, by id; None: not requested."""

    @classmethod
    def of(cls, tokens: Sequence[int], log_p_TV: Tensor, top: int) -> CommitLikelihoods:
        """Of these tokens, from the log-probabilities of all tokens in their places, [T, V], and in others behind."""
        log_p_TV = log_p_TV[: len(tokens)]
        ids_T = torch.tensor(tokens, device=log_p_TV.device, dtype=torch.long)
        logprobs: list[float] = log_p_TV.gather(1, ids_T[:, None])[:, 0].tolist()
        if not top:
            return cls(logprobs, None)
        values, words = (x.tolist() for x in log_p_TV.topk(min(top, log_p_TV.shape[1])))
        return cls(logprobs, [dict(zip(*pair, strict=True)) for pair in zip(words, values, strict=True)])

    def first(self, count: int) -> CommitLikelihoods:
        """Those of the first tokens alone."""
        return CommitLikelihoods(self.logprobs[:count], None if self.top is None else self.top[:count])


@dataclass(frozen=True)
class Verdict:
    """What the causal direction says of one try of a canvas."""

    tokens: list[int]
    """What would be committed."""
    steps: int
    """The steps that the try took."""
    likelihoods: CommitLikelihoods
    gap: float
    """The largest gap of a token that was free, in nats; 0 where none was."""
    mean: float
    """The mean log-probability of the tokens that were free; 0 where none was."""

    @classmethod
    def of(
        cls,
        tokens: list[int],
        steps: int,
        likelihoods: CommitLikelihoods,
        best: Sequence[float],
        pinned: Collection[int],
    ) -> Verdict:
        """`best` are the largest log-probabilities in the places of these tokens; those in `pinned` were not free."""
        pairs = zip(best, likelihoods.logprobs, strict=True)
        free = [pair for place, pair in enumerate(pairs) if place not in pinned]
        gap = max((top - own for top, own in free), default=0.0)
        return cls(tokens, steps, likelihoods, gap, sum(own for _, own in free) / max(1, len(free)))


def likeliest(log_p_TV: Tensor, ends: Sequence[int], lacking: int) -> list[float]:
    """The largest log-probability in each place; ends do not count in the first `lacking`, where they cannot be."""
    if lacking > 0:
        log_p_TV = log_p_TV.clone()
        log_p_TV[:lacking, list(ends)] = -torch.inf
    largest: list[float] = log_p_TV.amax(-1).tolist()
    return largest
