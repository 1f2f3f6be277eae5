"""Who may see whom, as data: an attention operation reads the numbers, the reference draws the dense table.

One pass brings T new positions a row beside S cached slots. A cached slot holds a position (see `cache.py`); slots that
hold nothing carry -1. Trap kept out here (FACTS 2.1): in denoise every canvas query of a sliding layer sees the *same*
last W - 1 cached tokens and the whole canvas, never a window of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """What the new positions of one pass see in one kind of layer.

    encode, window 3, two cached tokens (a b), three new ones (c d e):

            a b | c d e
        c   x x | x . .
        d   . x | x x .
        e   . . | x x x

    denoise, window 3, three cached tokens (a b c), a canvas of three (u v w):

            a b c | u v w
        u   . x x | x x x
        v   . x x | x x x
        w   . x x | x x x

    Full layers (window None): the same without the lower bound.
    """

    slots_BS: Tensor
    """The position that each cached slot holds, -1 where it holds none."""
    starts_B: Tensor
    """The position of the first new token: the number of cached tokens of the row."""
    counts_B: Tensor
    """How many of the T new positions are real; the rest is padding on the right."""
    width: int
    """T."""
    is_causal: bool
    """True in encode, False in denoise."""
    window: int | None

    def dense_BTS(self) -> Tensor:
        """The table as booleans [B, T, S + T], cached slots first. Rows of padding see themselves alone."""
        new_T = torch.arange(self.width, device=self.slots_BS.device)
        slots = self.slots_BS[:, None, :]
        starts = self.starts_B[:, None, None]
        cached = (slots >= 0).expand(-1, self.width, -1)
        is_real_B1T = new_T[None, None, :] < self.counts_B[:, None, None]
        if self.is_causal:
            fresh = is_real_B1T & (new_T[None, :, None] >= new_T[None, None, :])
            if self.window is not None:
                cached = cached & (starts + new_T[None, :, None] - slots < self.window)
                fresh = fresh & (new_T[None, :, None] - new_T[None, None, :] < self.window)
        else:
            fresh = is_real_B1T.expand(-1, self.width, -1)
            if self.window is not None:
                cached = cached & (starts - slots < self.window)
        fresh = fresh | torch.eye(self.width, dtype=torch.bool, device=fresh.device)[None]
        return torch.cat([cached, fresh], dim=-1)
