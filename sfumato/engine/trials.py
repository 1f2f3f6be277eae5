"""Tries of a canvas: which of them stands, and which is committed where none does (`Options.redos`, `Options.verify`).

Where canvases settle, one that reaches its cap on steps without being sure is seldom right, and other noise often is.
It begins again, which costs its steps and nothing else. With `verify` the causal direction judges in the cap's place:
the encode pass gives the log-probability of each token from those before it alone, by the same weights. The gap of a
token is by how much that of the likeliest token in its place is above its own. A canvas with a gap above the threshold
begins again.

Where no try is left the best of them commits: the surest, or with `verify` the likeliest. Only tokens that can become
part of the answer have a gap, and that were free: not what is pinned, and nothing behind the first end or the budget.
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
class Trial:
    """One try of a canvas."""

    tokens: list[int]
    """What would be committed."""
    steps: int
    entropy: float
    """The mean entropy of the canvas at its last step, in nats."""
    likelihoods: CommitLikelihoods | None = None
    """What the causal direction says of its tokens; None where it is not asked."""
    gap: float = 0.0
    """The largest gap of a token that was free, in nats; 0 where none was."""
    mean: float = 0.0
    """The mean log-probability of the tokens that were free; 0 where none was."""

    @property
    def rank(self) -> float:
        """The larger, the better it is beside other tries of the same canvas."""
        return -self.entropy if self.likelihoods is None else self.mean

    def judged(self, likelihoods: CommitLikelihoods, best: Sequence[float], pinned: Collection[int]) -> Trial:
        """With what the causal direction says of it.

        `best` are the largest log-probabilities in the places of its tokens; those in `pinned` were not free."""
        pairs = zip(best, likelihoods.logprobs, strict=True)
        free = [pair for place, pair in enumerate(pairs) if place not in pinned]
        gap = max((top - own for top, own in free), default=0.0)
        mean = sum(own for _, own in free) / max(1, len(free))
        return Trial(self.tokens, self.steps, self.entropy, likelihoods, gap, mean)


def likeliest(log_p_TV: Tensor, ends: Sequence[int], lacking: int) -> list[float]:
    """The largest log-probability in each place; ends do not count in the first `lacking`, where they cannot be."""
    largest_T = log_p_TV.amax(-1)
    if lacking > 0:
        guarded_TV = log_p_TV[:lacking].clone()
        guarded_TV[:, list(ends)] = -torch.inf
        largest_T[:lacking] = guarded_TV.amax(-1)
    largest: list[float] = largest_T.tolist()
    return largest
