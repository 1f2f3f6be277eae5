"""Tries of a canvas: which of them stands, and what is committed where none does (`Options.redos`, `verify`, `finish`).

Where canvases settle, one that reaches its cap on steps without being sure is seldom right, and other noise often is.
It begins again, which costs its steps and nothing else. With `verify` the causal direction judges in the cap's place:
the encode pass gives the log-probability of each token from those before it alone, by the same weights. The gap of a
token is by how much that of the likeliest token in its place is above its own. A canvas with a gap above the threshold
begins again.

Where no try is left the best of them commits: the surest, or with `verify` the likeliest; with `finish` only what of it
stands before the first such gap, with the likeliest token there, and the rest is written one token after another. Only
tokens that can become part of the answer have a gap, and that were free: not what is pinned, and nothing behind the
first end or the budget.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
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


class Likeliest(NamedTuple):
    """The likeliest token of each place."""

    logprobs: list[float]
    tokens: list[int]

    @classmethod
    def of(cls, log_p_TV: Tensor, banned: Sequence[int], lacking: int) -> Likeliest:
        """From the log-probabilities of all tokens; banned ones do not count in the first `lacking` places."""
        if lacking > 0:
            log_p_TV = log_p_TV.clone()
            log_p_TV[:lacking, list(banned)] = -torch.inf
        return cls(*(x.tolist() for x in log_p_TV.max(-1)))


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
    gaps: Sequence[float] = ()
    """The gap of each token, in nats; 0 for those that were not free. Empty where it is not asked."""
    best: Likeliest | None = None
    """What the causal direction prefers in each place; None where it is not asked."""
    mean: float = 0.0
    """The mean log-probability of the tokens that were free; 0 where none was."""

    @property
    def gap(self) -> float:
        """The largest gap of a token, in nats."""
        return max(self.gaps, default=0.0)

    def corrected(self, bound: float) -> Trial:
        """What stands before the first gap above so many nats, and in its place the likeliest token."""
        place = next((place for place, gap in enumerate(self.gaps) if gap > bound), None)
        if place is None or self.best is None or self.likelihoods is None:
            return self
        logprobs, top = self.likelihoods.first(place + 1)
        likelihoods = CommitLikelihoods([*logprobs[:place], self.best.logprobs[place]], top)
        return replace(self, tokens=[*self.tokens[:place], self.best.tokens[place]], likelihoods=likelihoods)

    @property
    def rank(self) -> float:
        """The larger, the better it is beside other tries of the same canvas."""
        return -self.entropy if self.likelihoods is None else self.mean

    def judged(self, likelihoods: CommitLikelihoods, best: Likeliest, pinned: Collection[int]) -> Trial:
        """With what the causal direction says of it: `best` in its places, of which those in `pinned` were not free."""
        pairs = [*zip(best.logprobs, likelihoods.logprobs, strict=True)]
        gaps = [0.0 if place in pinned else top - own for place, (top, own) in enumerate(pairs)]
        free = [own for place, (_, own) in enumerate(pairs) if place not in pinned]
        mean = sum(free) / max(1, len(free))
        return Trial(self.tokens, self.steps, self.entropy, likelihoods, gaps, best, mean)
