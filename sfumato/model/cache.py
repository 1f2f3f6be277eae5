"""KVCache: the keys and values of everything that is committed, one row a request.

Every layer is a ring of R slots; the token at position p lies in slot p mod R. A full layer's ring is as long as the
capacity, a sliding layer's only as long as its window needs, plus `slack` so that the newest tokens can be truncated
without loss. One slot more takes the padding of ragged batches and is never seen. The newest position of a slot follows
from the row's length alone (`masks.Mask.slots_BS`), so no table of positions is kept. Encode writes; denoise reads and
leaves all as it is.
It lacks paging on purpose: capacity is asked for up front, and `fork` copies into a larger one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato.errors import CapacityError
from sfumato.model.config import ModelConfig
from sfumato.ops.lowrank import LanePair
from sfumato.ops.masks import Mask


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
    """Tokens that a row has room for."""
    slack: int
    """Tokens that a sliding layer holds beyond its window, once it is full: so many can be truncated."""
    lanes: list[LanePair] = field(default_factory=list)
    """The adapter that each row is encoded with, and its canvas denoised, as the lanes of the model's weights."""
    stacks: list[tuple[int | None, Tensor]] = field(default_factory=list, repr=False)
    """The window of each kind of layer, and its keys and values in one tensor [2, layers, B, R + 1, G, K], of which `k`
    and `v` are parts. Rows are copied a kind at a time; layer by layer where gradients flow."""

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
        """Room for `capacity` tokens a row.

        `slack` (tokens, default one canvas) bounds how far sliding layers can be truncated once they are full.
        CapacityError beyond the model's context."""
        if capacity > config.max_position:
            raise CapacityError(
                f"{capacity} tokens of context are asked for, the model's limit is {config.max_position}; shorten the "
                "prompt or lower max_tokens"
            )
        slack = config.canvas_length if slack is None else slack
        cache = cls(config, [], [], [0] * batch, [0] * batch, capacity, slack, [LanePair()] * batch)
        shapes = [(layer.window, layer.kv_heads, layer.head_dim) for layer in config.layers]
        parts: dict[tuple[int | None, int, int], Iterator[tuple[Tensor, Tensor]]] = {}
        for kind in dict.fromkeys(shapes):
            window, *heads = kind
            shape = 2, shapes.count(kind), batch, cache.ring(window) + 1, *heads
            whole = torch.zeros(shape, device=device, dtype=dtype)
            cache.stacks.append((window, whole))
            parts[kind] = zip(*(map(_apart, side.unbind()) for side in whole.unbind()), strict=True)
        pairs = [next(parts[kind]) for kind in shapes]
        cache.k, cache.v = [k for k, _ in pairs], [v for _, v in pairs]
        return cache

    def ring(self, window: int | None) -> int:
        """Slots of a layer with this window."""
        return self.capacity if window is None else min(self.capacity, max(1, window - 1 + self.slack))

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self.k[0].device

    @property
    def bytes(self) -> int:
        """What keys and values take."""
        return sum(t.nbytes for t in ([whole for _, whole in self.stacks] or (*self.k, *self.v)))

    @classmethod
    def bytes_of(cls, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> int:
        """What a cache of this shape takes."""
        shape = cls(config, [], [], [], [], capacity, config.canvas_length)
        slots = (2 * (shape.ring(layer.window) + 1) * layer.kv_heads * layer.head_dim for layer in config.layers)
        return batch * sum(slots) * dtype.itemsize

    def lengths_B(self, rows: list[int]) -> Tensor:
        """Tokens that these rows hold, on the device."""
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

    def append(
        self,
        layer: int,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        mask: Mask,
        is_fresh: bool = False,
        slot_BT: Tensor | None = None,
    ) -> None:
        """Write each row's new tokens, but not padding, behind what the row holds; `advance` then makes them count.

        `is_fresh`: all rows, all empty, without padding. `slot_BT`: `mask.new_slots_BT()`, where layers share it."""
        width = k_BTGK.shape[1]
        k_BTGK, v_BTGK = k_BTGK.to(self.k[layer].dtype), v_BTGK.to(self.v[layer].dtype)  # autocast's are others
        if is_fresh and width <= mask.ring:
            self.k[layer][:, :width] = k_BTGK
            self.v[layer][:, :width] = v_BTGK
            return
        slot_BT = mask.new_slots_BT() if slot_BT is None else slot_BT
        self.k[layer][mask.rows_B[:, None], slot_BT] = k_BTGK
        self.v[layer][mask.rows_B[:, None], slot_BT] = v_BTGK

    def advance(self, rows: list[int], counts: list[int]) -> None:
        """Make the tokens count that every layer has appended: so many of each row."""
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

    def clear_(self, row: int) -> None:
        """Forget all that a row holds."""
        self.lengths[row] = self.peaks[row] = 0
        self.lanes[row] = LanePair()

    def fork(self, rows: Sequence[int | None], capacity: int | None = None) -> KVCache:
        """An independent copy of these rows, in this order, repeats allowed, None for an empty one.

        `capacity` may be more or less than now; CapacityError where a row holds more."""
        capacity = self.capacity if capacity is None else capacity
        like = self.device, self.k[0].dtype, self.slack
        other = KVCache.allocate(self.config, len(rows), capacity, *like)
        other.lanes = [LanePair() if row is None else self.lanes[row] for row in rows]
        held = [(to, row) for to, row in enumerate(rows) if row is not None]
        if held:
            sources = [row for _, row in held]
            other._copy([to for to, _ in held], self, sources, [self.lengths[row] for row in sources])
        return other

    def take_(self, row: int, other: KVCache, length: int) -> None:
        """Copy the first `length` tokens of the one row of another cache over this row.

        `other.can_truncate` says whether they can be. CapacityError where they are more than fit."""
        self._copy([row], other, [0], [length])
        self.lanes[row] = other.lanes[0]

    def _by_kind(self, other: KVCache) -> Iterable[tuple[int | None, Tensor]]:
        """Windows, and tensors [..., B, R + 1, G, K] that hold all there is: as few as both caches have."""
        if self.stacks and other.stacks and not (self.k[0].requires_grad or other.k[0].requires_grad):
            return self.stacks
        windows = [layer.window for layer in self.config.layers]
        return zip([*windows, *windows], [*self.k, *self.v], strict=True)

    def _copy(self, rows: list[int], other: KVCache, others: list[int], lengths: list[int]) -> None:
        """The beginnings of rows of another cache, as far as a ring here holds them, over rows of this one."""
        peaks = [other.peaks[row] for row in others]
        if max(lengths) > self.capacity:
            raise CapacityError(f"a row of {max(lengths)} tokens does not fit a cache for {self.capacity}")
        index, source_index = torch.tensor(rows, device=self.device), torch.tensor(others, device=other.device)
        for (window, to_all), (_, from_all) in zip(self._by_kind(other), other._by_kind(self), strict=True):
            own, theirs = self.ring(window), other.ring(window)
            if own == theirs or max(peaks) <= min(own, theirs):
                # A token has the same slot in both: one copy of all rows, since gradients take each copy apart.
                to = slice(0, other.used(window, others))
                some = from_all[..., to, :, :].index_select(-4, source_index)
                to_all[..., to, :, :].index_copy_(-4, index, some.to(to_all))
                continue
            for row, source, length in zip(rows, others, lengths, strict=True):
                positions = torch.arange(max(0, length - min(own, theirs)), length, device=self.device)
                held = from_all[..., source, :, :, :][..., positions % theirs, :, :]
                to_all[..., row, :, :, :][..., positions % own, :, :] = held
        own, theirs = self.ring(self.config.window), other.ring(self.config.window)
        for row, length, peak in zip(rows, lengths, peaks, strict=True):
            first = max(0, length - own, peak - theirs)  # the first position that both rings hold
            self.lengths[row], self.peaks[row] = length, max(length, first + own if first else 0)


def _apart(part: Tensor) -> Tensor:
    """The same memory as a tensor of its own.

    Views of one tensor share a count of changes, which stops gradients, and those made without gradients refuse
    changes with them."""
    own = torch.empty(0, dtype=part.dtype, device=part.device)
    return own.set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())
