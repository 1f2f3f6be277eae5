"""KVCache: the keys and values of everything that is committed, one row a request.

Every layer is a ring of R slots; the token at position p lies in slot p mod R. A full layer's ring is as long as the
capacity, a sliding layer's only as long as its window needs, plus `slack` so that the newest tokens can be truncated
without loss. One slot more takes the padding of ragged batches and is never seen. The newest position of a slot follows
from the row's length alone (`masks.Mask.slots_BS`), so no table of positions is kept. Encode writes; denoise reads and
leaves all as it is.
It lacks paging on purpose: capacity is asked for up front, and `fork` copies into a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.events import CapacityError
from sfumato.masks import Mask


@dataclass
class KVCache:
    """k and v, one tensor a layer, [B, R + 1, G, K]; the number of tokens each row holds, on host and device."""

    config: ModelConfig
    k: list[Tensor]
    v: list[Tensor]
    lengths: list[int]
    peaks: list[int]
    """The most tokens each row has held: what lies a whole ring further back is overwritten, truncated or not."""
    capacity: int
    slack: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        slack: int | None = None,
    ) -> KVCache:
        """Room for `capacity` tokens a row. `slack` (tokens, default one canvas) bounds how far sliding layers can be
        truncated once they are full. CapacityError beyond the model's context."""
        if capacity > config.max_position:
            raise CapacityError(
                f"{capacity} tokens of context are asked for, the model's limit is {config.max_position}; shorten the "
                "prompt or lower max_tokens"
            )
        slack = config.canvas_length if slack is None else slack
        cache = cls(config, [], [], [0] * batch, [0] * batch, capacity, slack)
        for layer in config.layers:
            shape = (batch, cache.ring(layer.window) + 1, layer.kv_heads, layer.head_dim)
            cache.k.append(torch.zeros(shape, device=device, dtype=dtype))
            cache.v.append(torch.zeros(shape, device=device, dtype=dtype))
        return cache

    def ring(self, window: int | None) -> int:
        """Slots of a layer with this window."""
        return self.capacity if window is None else min(self.capacity, max(1, window - 1 + self.slack))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    def lengths_B(self, rows: list[int]) -> Tensor:
        return torch.tensor([self.lengths[row] for row in rows], device=self.device)

    def used(self, window: int | None, rows: list[int]) -> int:
        """Leading slots that may hold something for any of these rows: a view needs no more."""
        return min(self.ring(window), max([0, *(self.lengths[row] for row in rows)]))

    def ring_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as they lie: all rows [X, R + 1, G, K]."""
        return self.k[layer], self.v[layer]

    def check_room(self, rows: list[int], counts: list[int]) -> None:
        """CapacityError where a row has no room for so many new tokens."""
        for row, count in zip(rows, counts, strict=True):
            if self.lengths[row] + count > self.capacity:
                raise CapacityError(
                    f"row {row} would hold {self.lengths[row] + count} tokens, the cache has room for {self.capacity}; "
                    "allocate more or generate fewer"
                )

    def append(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, mask: Mask, is_fresh: bool = False) -> None:
        """Write the real ones of each row's new tokens behind what it holds. `advance` then makes them count.
        `is_fresh`: all rows, all empty, without padding."""
        width = k_BTGK.shape[1]
        if is_fresh and width <= mask.ring:
            self.k[layer][:, :width] = k_BTGK
            self.v[layer][:, :width] = v_BTGK
            return
        new_T, count_B1 = torch.arange(width, device=self.device), mask.counts_B[:, None]
        is_kept = (new_T < count_B1) & (new_T >= count_B1 - mask.ring)
        slot_BT = torch.where(is_kept, (mask.lengths_B[:, None] + new_T) % max(mask.ring, 1), mask.ring)
        self.k[layer][mask.rows_B[:, None], slot_BT] = k_BTGK
        self.v[layer][mask.rows_B[:, None], slot_BT] = v_BTGK

    def advance(self, rows: list[int], counts: list[int]) -> None:
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
            self.peaks[row] = max(self.peaks[row], self.lengths[row])

    def can_truncate(self, row: int, length: int) -> bool:
        """True when the sliding layers still hold the whole window before `length`."""
        window, first_held = self.config.window, self.peaks[row] - self.ring(self.config.window)
        is_held = not window or length == 0 or max(0, length - window + 1) >= first_held
        return 0 <= length <= self.lengths[row] and is_held

    def truncate_(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on. CapacityError when the sliding layers cannot go back so far."""
        if not self.can_truncate(row, length):
            raise CapacityError(
                f"row {row} holds {self.lengths[row]} tokens and cannot go back to {length}: its sliding layers keep "
                f"{self.slack} tokens beyond the window; encode again or allocate with more slack"
            )
        self.lengths[row] = length
        if length == 0:
            self.peaks[row] = 0

    def fork(self, rows: list[int], capacity: int | None = None) -> KVCache:
        """An independent copy of these rows, in this order, repeats allowed; `capacity` may grow."""
        capacity = max(capacity or self.capacity, self.capacity)
        if capacity == self.capacity:
            index = torch.tensor(rows, device=self.device)
            keys, values = ([t.index_select(0, index) for t in side] for side in (self.k, self.v))
            lengths, peaks = ([of[row] for row in rows] for of in (self.lengths, self.peaks))
            return KVCache(self.config, keys, values, lengths, peaks, capacity, self.slack)
        other = KVCache.allocate(self.config, len(rows), capacity, self.device, self.k[0].dtype, self.slack)
        for layer, layer_config in enumerate(self.config.layers):
            window, index = layer_config.window, torch.tensor(rows, device=self.device)
            ring, used = self.ring(window), self.used(window, rows)
            held = Mask(rows, index, self.lengths_B(rows), self.lengths_B(rows), 0, 0, window, ring, used)
            slots_BS = held.slots_BS()
            target = torch.where(slots_BS >= 0, slots_BS % other.ring(window), -1)
            row_B1 = torch.arange(len(rows), device=self.device)[:, None]
            other.k[layer][row_B1, target] = self.k[layer][index, :used]  # slot -1 is the unseen one
            other.v[layer][row_B1, target] = self.v[layer][index, :used]
        other.lengths, other.peaks = ([of[row] for row in rows] for of in (self.lengths, self.peaks))
        return other
