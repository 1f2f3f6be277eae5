"""What is read behind a prompt: canvases that are looked at and not written. Values, which `reading` runs; no torch.

What is asked is read one word at a time: a canvas begins with words that are pinned, the rest of it is noise, and of
the first free position the logits of a few words are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Glance(NamedTuple):
    """One canvas of a read: what it begins with, and the words whose logits are taken behind that."""

    pins: tuple[int, ...]
    words: tuple[int, ...]
    draw: int = 0
    """Which noise the rest of the canvas is."""


@dataclass(frozen=True, eq=False)
class Read:
    """Tokens that follow a prompt, and canvases behind them."""

    tokens: tuple[int, ...]
    glances: tuple[Glance, ...]


@dataclass(frozen=True, eq=False)
class Reads:
    """All that is read behind one prompt, on canvases of `length` positions, in `steps` denoise passes each."""

    each: tuple[Read, ...]
    length: int
    steps: int = 1

    @property
    def longest(self) -> int:
        """Positions behind the prompt."""
        return max(len(read.tokens) for read in self.each) + self.length


@dataclass(eq=False)
class Readings:
    """Collects what was read: of every read and its glances the logits of the words, in the order of `Reads`."""

    values: list[list[list[float]]] = field(default_factory=list)

    def begin(self, reads: Reads) -> None:
        """Make room for what will be read."""
        self.values = [[[] for _ in read.glances] for read in reads.each]
