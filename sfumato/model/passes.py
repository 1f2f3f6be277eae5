"""What all layers of a pass share: whose rows it is, what each position sees, and the angles of rope."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig, Rope
from sfumato.ops.lowrank import NOBODY, LanePair, Lanes, LaneSwitch
from sfumato.ops.masks import Mask


class PassModel(Protocol):
    """What a pass asks of its model."""

    config: ModelConfig
    lane_switch: LaneSwitch
    usual_lanes: LanePair

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        ...


class Places(NamedTuple):
    """What may change under a recorded pass, for each of its rows on the device, int64 [B]."""

    rows_B: Tensor
    lengths_B: Tensor
    counts_B: Tensor
    encode_lanes_B: Tensor | None = None
    """The lanes of what they encode, and of their canvases; None where none of them has an adapter."""
    denoise_lanes_B: Tensor | None = None

    def lane_N(self, encode: int, canvas: int) -> Tensor:
        """The lane of every token, where rows bring so many to encode and then so many of a canvas."""
        assert self.encode_lanes_B is not None and self.denoise_lanes_B is not None
        parts = self.encode_lanes_B[:, None].expand(-1, encode), self.denoise_lanes_B[:, None].expand(-1, canvas)
        return torch.cat(parts, dim=1).reshape(-1)


class Pass:
    """What every layer of a pass shares: rows, counts, and per kind of layer the mask and the rope angles.

    Each row brings `encode` tokens (counts[i] of them real) and then `canvas` positions. As long as the cache's rows
    keep their lengths a pass may be run again: one serves all the steps of a canvas. Only `places` are read where a
    recorded step needs them to change under it, its rows' lanes among them. What it encodes the cache appends."""

    is_kept = True

    def __init__(
        self,
        model: PassModel,
        cache: KVCache,
        rows: list[int],
        counts: list[int],
        encode: int,
        canvas: int,
        places: Places | None = None,
    ) -> None:
        self.cache, self.rows, self.counts, self.encode, self.canvas = cache, rows, counts, encode, canvas
        self.config, self.dtype, device = model.config, model.dtype, model.device
        self.is_static, self._switch = places is not None, model.lane_switch
        self.lanes = self.canvas_lanes = NOBODY
        if places is None:
            own = (cache.lanes[row] for row in rows)
            self.take_lanes([model.usual_lanes if lanes == LanePair() else lanes for lanes in own])
            places = Places(
                torch.tensor(rows, device=device), cache.lengths_B(rows), torch.tensor(counts, device=device)
            )
        elif places.encode_lanes_B is not None:
            self.lanes = self.canvas_lanes = Lanes((), places.lane_N(encode, canvas), is_static=True)
            if encode and canvas:
                self.canvas_lanes = Lanes((), places.lane_N(0, canvas), is_static=True)
        self.places = places
        self.rows_B, lengths_B, counts_B = places[:3]
        self._new_slots: dict[int, Tensor] = {}
        self.is_canvas_N1: Tensor | None = None
        if encode and canvas:
            self.is_canvas_N1 = torch.arange(encode + canvas, device=device).ge(encode).repeat(len(rows))[:, None]
        # The common first prompt: one slice instead of a scatter.
        is_whole = not self.is_static and rows == list(range(cache.batch)) and set(counts) == {encode}
        self.is_fresh = is_whole and not any(cache.lengths)
        is_near = not self.is_static and max(cache.lengths[row] for row in rows) + encode + canvas <= NEAR
        self._scales: dict[int, Tensor] = {}
        self.kinds: dict[tuple[int | None, Rope, int], tuple[Mask, Tensor, Tensor]] = {}
        positions_BT: Tensor | None = None
        for layer in self.config.layers:
            window, key = layer.window, (layer.window, layer.rope, layer.head_dim)
            if key not in self.kinds:
                ring = cache.ring(window)
                used = ring if self.is_static else cache.used(window, rows)
                mask = Mask(rows, self.rows_B, lengths_B, counts_B, encode, canvas, window, ring, used, self.is_kept)
                positions_BT = mask.positions_BT() if positions_BT is None else positions_BT  # those of every kind
                angles = _near if is_near else _angles
                self.kinds[key] = (mask, *angles(positions_BT, layer.rope, layer.head_dim, self.dtype))
        self._each = [self.kinds[layer.window, layer.rope, layer.head_dim] for layer in self.config.layers]

    def take_lanes(self, lanes: list[LanePair]) -> None:
        """The adapters of its rows, where the host has a say at every step."""
        self.lanes = self.canvas_lanes = NOBODY
        if any(lane != LanePair() for lane in lanes):
            device = self.cache.device
            self.lanes = self.canvas_lanes = Lanes.of(lanes, self.encode, self.canvas, device)
            if self.encode and self.canvas:
                self.canvas_lanes = Lanes.of(lanes, 0, self.canvas, device)

    def refresh_(self) -> None:
        """Compute again, in place, what depends on `places`, after they have changed."""
        if self.lanes.is_static:
            self.lanes.lane_N.copy_(self.places.lane_N(self.encode, self.canvas))
            if self.canvas_lanes is not self.lanes:
                self.canvas_lanes.lane_N.copy_(self.places.lane_N(0, self.canvas))
        for (_, rope, head_dim), (mask, *old) in self.kinds.items():
            for kept, angles in zip(old, _angles(mask.positions_BT(), rope, head_dim, self.dtype), strict=True):
                kept.copy_(angles)

    def enter(self, is_canvas_alone: bool = False) -> None:
        """Say which adapter each token has, to all adapted weights: those of the pass, or those of its canvas alone."""
        self._switch.lanes = self.canvas_lanes if is_canvas_alone else self.lanes

    def of(self, index: int) -> tuple[Mask, Tensor, Tensor]:
        """The mask of a layer, and the cosines and sines of its positions, [B, T, K]."""
        return self._each[index]

    def append(self, index: int, k_BTGK: Tensor, v_BTGK: Tensor) -> None:
        """Append the encoded positions' keys and values to the cache; the canvas's never go there."""
        mask = self.of(index)[0]
        if self.encode and mask.is_kept:
            new = k_BTGK[:, : self.encode], v_BTGK[:, : self.encode]
            self.cache.append(index, *new, mask, self.is_fresh, self._slots(mask))

    def _slots(self, mask: Mask) -> Tensor | None:
        """Where new tokens go in the layers with this mask; they share it, unless places change under the pass."""
        if self.is_static or self.is_fresh:
            return None
        if mask.ring not in self._new_slots:
            self._new_slots[mask.ring] = mask.new_slots_BT()
        return self._new_slots[mask.ring]

    def scale(self, index: int, encode_1: Tensor, denoise_1: Tensor) -> Tensor:
        """The layer scalar of each position, or the one of all."""
        if self.is_canvas_N1 is None:
            return denoise_1 if self.canvas else encode_1
        if index not in self._scales:
            self._scales[index] = torch.where(self.is_canvas_N1, denoise_1, encode_1)
        return self._scales[index]


class ReadPass(Pass):
    """A pass of which the cache keeps nothing, so that several of its rows may stand behind one row of the cache."""

    is_kept = False


def frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position of the K/2 angles. "Proportional": only the first share turns, spaced as if all did."""
    turning = int(rope.partial * head_dim // 2)
    exponent = torch.arange(0, 2 * turning, 2, device=device, dtype=torch.float32) / head_dim
    turns = 1.0 / (rope.theta**exponent) / rope.factor
    return torch.cat([turns, turns.new_zeros(head_dim // 2 - turning)])


NEAR = 4096
"""Positions whose angles are kept; those beyond are computed by every pass."""


def _angles(positions: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [..., K]."""
    angles = positions[..., None].float() * frequencies(rope, head_dim, positions.device)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _near(positions_BT: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same of positions below NEAR, looked up."""
    flat_N, shape = positions_BT.reshape(-1), (*positions_BT.shape, head_dim)
    cos_PK, sin_PK = _table(rope, head_dim, dtype, positions_BT.device)
    return cos_PK.index_select(0, flat_N).view(shape), sin_PK.index_select(0, flat_N).view(shape)


@functools.lru_cache(8)
def _table(rope: Rope, head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # training reads it too
        return _angles(torch.arange(NEAR, device=device), rope, head_dim, dtype)
