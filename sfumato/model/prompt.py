"""A prompt as a value: tokens, and what stands at some of their places instead.

Two prompts with equal tokens and different content are different everywhere, caches included: whoever keeps what was
encoded compares prompts, never tokens alone. Today a prompt carries only tokens; images will bring embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    def of(cls, tokens: Sequence[int] | Prompt) -> Prompt:
        """A prompt of tokens alone; a prompt stays what it is."""
        return tokens if isinstance(tokens, Prompt) else cls(tuple(tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[int]:
        """Its tokens."""
        return iter(self.tokens)

    def __eq__(self, other: object) -> bool:
        """Whether tokens and content are equal, and with them whatever follows from the prompt."""
        return isinstance(other, Prompt) and self.tokens == other.tokens and self.content == other.content

    def __hash__(self) -> int:
        return hash((self.tokens, tuple(sorted(self.content.items()))))

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The same with these tokens behind it."""
        return Prompt((*self.tokens, *tokens), self.embeddings, self.blocks, self.content)

    def first(self, count: int) -> Prompt:
        """Its first `count` positions, or all where it has fewer. A block that goes on behind them is cut there."""
        content = {position: digest for position, digest in self.content.items() if position < count}
        embeddings = None if self.embeddings is None else self.embeddings[: len(content)]
        blocks = tuple((start, min(end, count)) for start, end in self.blocks if start < count)
        return Prompt(self.tokens[:count], embeddings, blocks, content)

    def shared(self, other: Prompt) -> int:
        """How many leading positions are alike in both, in tokens and content."""
        size = min(len(self), len(other))
        pairs = enumerate(zip(self.tokens, other.tokens, strict=False))
        count = next((position for position, (own, theirs) in pairs if own != theirs), size)
        return min(count, self.first_difference(other.content))

    def first_difference(self, content: Mapping[int, bytes]) -> int:
        """The first position whose content is not this one; the length of the prompt where there is none."""
        if not self.content and not content:
            return len(self)
        positions = (at for at in self.content.keys() | content.keys() if self.content.get(at) != content.get(at))
        return min(positions, default=len(self))
