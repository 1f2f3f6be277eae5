"""A prompt as a value: tokens, and what stands at some of their places instead.

Two prompts with equal tokens and different content are different everywhere, caches included: whoever keeps what was
encoded compares prompts, never tokens alone. What another adapter encoded is different content as well. Today a
prompt carries only tokens; images will bring embeddings. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.model.loaded import LoadedAdapter


@dataclass(frozen=True, eq=False)
class Prompt:
    """What stands before an answer.

    `content` names, by position, what stands there beside the token. `embeddings` [n, D] take the place of the token
    embeddings at the positions of `content`, in their order. `blocks` are ranges (start, end), without `end` itself,
    whose positions see each other in both directions; they are in order and do not overlap. Two prompts are alike at a
    position where tokens, content and blocks are, if they have the same adapter."""

    tokens: tuple[int, ...]
    embeddings: Tensor | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    content: Mapping[int, bytes] = field(default_factory=dict)
    """Position -> a digest of what stands there."""
    adapter: LoadedAdapter | None = None
    """What encodes it, and answers; None: the model as it is."""

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
        """Whether tokens, content, blocks and adapter are equal, and with them whatever follows from the prompt."""
        return isinstance(other, Prompt) and self._key == other._key

    def __hash__(self) -> int:
        tokens, content, blocks, adapter = self._key
        return hash((tokens, tuple(sorted(content.items())), blocks, adapter))

    @property
    def _key(self) -> tuple[tuple[int, ...], Mapping[int, bytes], tuple[tuple[int, int], ...], LoadedAdapter | None]:
        return self.tokens, self.content, self.blocks, self.adapter

    def adapted(self, adapter: LoadedAdapter | None) -> Prompt:
        """The same, encoded and answered by this adapter."""
        return self if adapter is self.adapter else replace(self, adapter=adapter)

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The same with these tokens behind it."""
        return replace(self, tokens=(*self.tokens, *tokens))

    def first(self, count: int) -> Prompt:
        """Its first `count` positions, or all where it has fewer.

        A block is never cut in two: where `count` lies inside one, the result ends where that block starts, and has
        fewer positions."""
        count = self._outside_blocks(count)
        content = {position: digest for position, digest in self.content.items() if position < count}
        embeddings = None if self.embeddings is None else self.embeddings[: len(content)]
        blocks = tuple(block for block in self.blocks if block[1] <= count)
        return Prompt(self.tokens[:count], embeddings, blocks, content, self.adapter)

    def shared(self, other: Prompt) -> int:
        """How many leading positions are alike in both, in tokens, content and blocks; none of another adapter's."""
        size = min(len(self), len(other))
        pairs = enumerate(zip(self.tokens, other.tokens, strict=False))
        return self.alike(other, next((position for position, (own, theirs) in pairs if own != theirs), size))

    def alike(self, other: Prompt, count: int) -> int:
        """How many of the first `count` positions, whose tokens are equal, are alike in content and blocks too.

        Prompts of different adapters have none in common. What is encoded at a position of a block follows from the
        whole block. So positions of a block are alike only where both prompts have that block and all of it is
        alike."""
        if self.adapter is not other.adapter:
            return 0
        if self.content or other.content:
            positions = self.content.keys() | other.content.keys()
            differing = (at for at in positions if self.content.get(at) != other.content.get(at))
            count = min(count, min(differing, default=count))
        if self.blocks or other.blocks:
            differing = (start for start, _ in set(self.blocks) ^ set(other.blocks))
            count = self._outside_blocks(min(count, min(differing, default=count)))
        return count

    def _outside_blocks(self, count: int) -> int:
        """So many positions, or as many as stand before the block that would be cut."""
        return min((start for start, end in self.blocks if start < count < end), default=count)
