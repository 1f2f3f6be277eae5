"""What is read behind a prompt: canvases that are looked at and not written. Values, which `reading` runs; no torch.

What is asked is read one word at a time: a canvas begins with words that are pinned, the rest of it is noise, and of
the first free position the logits of a few words are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

REPEATED = 256
"""Tokens that are rather encoded again, for each canvas, than once in a copy of the cache."""

CHUNK = 2048
"""Tokens of a read above which they are encoded in parts, in a copy of the cache."""


class Glance(NamedTuple):
    """One canvas of a read: what it begins with, and the words whose logits are taken behind that."""

    pins: tuple[int, ...]
    words: tuple[int, ...]
    draw: int = 0
    """Which noise the rest of the canvas is."""


@dataclass(frozen=True, eq=False)
class Read:
    """Tokens that follow a prompt, and canvases of `length` positions behind them.

    Nothing of it follows from other reads, so that its numbers do not either."""

    tokens: tuple[int, ...]
    glances: tuple[Glance, ...]
    length: int

    @property
    def is_copied(self) -> bool:
        """Whether its tokens are encoded once for all its canvases, in a copy of the cache."""
        return (len(self.glances) - 1) * len(self.tokens) > REPEATED or len(self.tokens) > CHUNK

    @property
    def width(self) -> int:
        """Positions that one of its canvases has in a pass."""
        return self.length + (0 if self.is_copied else len(self.tokens))


@dataclass(frozen=True, eq=False)
class Reads:
    """All that is read behind one prompt, in `steps` denoise passes each."""

    each: tuple[Read, ...]
    steps: int = 1

    @cached_property
    def longest(self) -> int:
        """Positions behind the prompt."""
        return max(len(read.tokens) + read.length for read in self.each)

    @cached_property
    def copied(self) -> int:
        """The most tokens of a read that are encoded in a copy of the cache; 0 where none are."""
        return max((len(read.tokens) for read in self.each if read.is_copied), default=0)

    @cached_property
    def positions(self) -> int:
        """Positions that all of it computes."""
        copied = sum(len(read.tokens) for read in self.each if read.is_copied)
        return copied + self.steps * sum(len(read.glances) * read.width for read in self.each)


@dataclass(eq=False)
class Readings:
    """Collects what was read: of every read and its glances the logits of the words, in the order of `Reads`."""

    values: list[list[list[float]]] = field(default_factory=list)

    def begin(self, reads: Reads) -> None:
        """Make room for what will be read."""
        self.values = [[[] for _ in read.glances] for read in reads.each]
