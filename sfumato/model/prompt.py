"""A prompt as a value: tokens, and what stands at some of their places instead.

Two prompts with equal tokens and different content are different everywhere, caches included: whoever keeps what was
encoded compares prompts, never tokens alone. Today a prompt carries only tokens; images will bring embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """What stands before an answer.

    `content` names, by position, what stands there beside the token: two prompts are alike at a position where tokens
    and content are. `embeddings` [n, D] take the place of the token embeddings at the positions of `content`, in their
    order. `blocks` are ranges (from position, to position) whose positions see each other in both directions."""

    tokens: tuple[int, ...]
    embeddings: Tensor | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    content: Mapping[int, bytes] = field(default_factory=dict)
    """Position -> a digest of what stands there."""

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Prompt:
        """A prompt of tokens alone."""
        return cls(tuple(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def shared(self, other: Prompt) -> int:
        """How many leading positions are alike in both, in tokens and content."""
        count = 0
        for position, (own, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if own != theirs or self.content.get(position) != other.content.get(position):
                break
            count = position + 1
        return count
