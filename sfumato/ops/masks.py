"""Who may see whom, as data: a kernel reads the numbers, the reference draws the dense table.

One pass brings, in every row, `encode` new positions that are encoded and then `canvas` positions that are denoised;
either may be 0. Beside them stand the cached tokens, in a ring (see `cache.py`): the token at position p lies in slot
p mod ring. In denoise every canvas query of a sliding layer sees the *same* last W - 1 tokens before the canvas and the
whole canvas, never a window of its own, as in transformers' `modeling_diffusion_gemma.py`.
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

    both at once, window 3, two cached tokens (a b), two that are committed (c d) and the next canvas (u v w):

            a b | c d | u v w
        c   x x | x . | . . .
        d   . x | x x | . . .
        u   . . | x x | x x x
        v   . . | x x | x x x
        w   . . | x x | x x x

    Full layers (window None): the same without the lower bound.
    """

    rows: list[int]
    """The cache row of each row of the pass."""
    rows_B: Tensor
    lengths_B: Tensor
    """Cached tokens of each row: the position of its first new token."""
    counts_B: Tensor
    """How many of the `encode` new tokens are real; the rest is padding on their right, and the canvas begins at
    position length + count."""
    encode: int
    canvas: int
    window: int | None
    ring: int
    """Slots of the ring, without the one behind it that takes padding."""
    used: int
    """Leading slots that may hold something for any of these rows."""
    is_kept: bool = True
    """Whether what is encoded goes into the ring."""

    def slots_BS(self) -> Tensor:
        """The position that each used slot holds, -1 for none."""
        slot_S = torch.arange(self.used, device=self.lengths_B.device)
        last_B1 = self.lengths_B[:, None] - 1
        position_BS = last_B1 - (last_B1 - slot_S) % max(self.ring, 1)
        return torch.where((position_BS >= 0) & (last_B1 >= 0), position_BS, -1)

    def new_slots_BT(self) -> Tensor:
        """The slot that each token to be encoded goes to, [B, encode].

        Padding goes behind the ring, and so do the first ones of a row that brings more than the ring holds."""
        new_T, count_B1 = torch.arange(self.encode, device=self.lengths_B.device), self.counts_B[:, None]
        is_kept = (new_T < count_B1) & (new_T >= count_B1 - self.ring)
        return torch.where(is_kept, (self.lengths_B[:, None] + new_T) % max(self.ring, 1), self.ring)

    def positions_BT(self) -> Tensor:
        """The position of each new token, [B, encode + canvas]."""
        new_T = torch.arange(self.encode + self.canvas, device=self.lengths_B.device)
        padding_B1 = (self.encode - self.counts_B)[:, None]
        return self.lengths_B[:, None] + torch.where(new_T < self.encode, new_T, new_T - padding_B1)

    def dense_BTS(self) -> Tensor:
        """The table as booleans [B, T, S + T], cached slots first, T = encode + canvas. Padding sees itself alone."""
        new_T = torch.arange(self.encode + self.canvas, device=self.lengths_B.device)
        slots_B1S, at_BT = self.slots_BS()[:, None, :], self.positions_BT()
        starts_B1 = (self.lengths_B + self.counts_B)[:, None]
        is_canvas_T = new_T >= self.encode
        is_real_BT = is_canvas_T | (new_T < self.counts_B[:, None])
        # The position whose window counts: a query's own in encode, that of the canvas's first cell in denoise.
        origin_BT1 = torch.where(is_canvas_T, starts_B1, at_BT)[..., None]
        before_B1T = torch.where(is_canvas_T, starts_B1, at_BT)[:, None, :]
        cached = (slots_B1S >= 0).expand(-1, len(new_T), -1)
        fresh = is_real_BT[:, None, :] & (before_B1T <= origin_BT1)
        fresh = fresh & ~(is_canvas_T[None, None, :] & ~is_canvas_T[None, :, None])
        if self.window is not None:
            cached = cached & (origin_BT1 - slots_B1S < self.window)
            fresh = fresh & (origin_BT1 - before_B1T < self.window)
        fresh = fresh & is_real_BT[:, :, None] | torch.eye(len(new_T), dtype=torch.bool, device=fresh.device)[None]
        return torch.cat([cached, fresh], dim=-1)
