"""Counted random numbers: a function of their place, so that a seed gives the same text alone or in a batch.

`CountedNoise` is the definition: it hashes (seed, request, canvas, step, position) with splitmix64. `HostNoise` makes
the same numbers on the host, some steps at a time. `SeatNoise` gives an engine's rows their noise: from `HostNoise`, or
from a `NoiseSource` of the caller's, so that a test can give two engines the same numbers. A recorded step counts its
own noise on the device (see `step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfumato.sampling.canvases import to_device

AHEAD = 8
"""Steps whose noise the host counts together."""

_CANVAS, _SAMPLE, _RENOISE = 0, 1, 2
"""The streams: what the numbers of one place are for."""

_LOW = (1 << 32) - 1
_STRIDE = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits (splitmix64)

_HOST_LOW = np.uint64(0xFFFFFFFF)
_HOST_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

_Bits = npt.NDArray[np.uint64]
_NoisePlace = tuple[int, int, int, int]
"""Seed, canvas, step and stream."""
_NoiseBlock = tuple[int, int, int, int]
"""Seat, seed, canvas and first step of `AHEAD` steps."""


class NoiseSource(Protocol):
    """Where randomness comes from. Rows are requests; `canvas` and `step` are counted from 0, one a row."""

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        """A fresh canvas of uniformly random tokens, [B, L]."""
        ...

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        """What the read-out samples with: {"uniform_BL": …} or {"gumbel_BLV": …}."""
        ...

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        """Uniformly random tokens for the positions that were not accepted, [B, L]."""
        ...


class StepNoise(NamedTuple):
    """The noise of one step of some rows."""

    sample: dict[str, Tensor]
    """What the read-out samples with: see `NoiseSource.sample`."""
    tokens_BL: Tensor
    """What takes the place of tokens that are not accepted."""


@dataclass(frozen=True)
class CountedNoise:
    """Noise as a hash of its place. `seeds` and `requests` are one a row."""

    seeds: Sequence[int]
    requests: Sequence[int]
    length: int
    vocab_size: int
    device: torch.device | str = "cpu"

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        """See `NoiseSource`."""
        return self._tokens(rows, canvas, [0] * len(rows), _CANVAS)

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        """See `NoiseSource`."""
        return {"uniform_BL": self.uniform(self._counter_B5(rows, canvas, step), self.length, _SAMPLE)}

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        """See `NoiseSource`."""
        return self._tokens(rows, canvas, step, _RENOISE)

    def _tokens(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int], stream: int) -> Tensor:
        return self.tokens(self._counter_B5(rows, canvas, step), self.length, self.vocab_size, stream)

    def _counter_B5(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        words = [
            [self.seeds[r] & _LOW, self.seeds[r] >> 32, self.requests[r], c, s]
            for r, c, s in zip(rows, canvas, step, strict=True)
        ]
        return torch.tensor(words, dtype=torch.int64, device=self.device)

    @staticmethod
    def uniform(counter_B5: Tensor, length: int, stream: int) -> Tensor:
        """Numbers in [0, 1), [B, length], counted from (seed low, seed high, request, canvas, step)."""
        return (_bits(counter_B5, length, stream) >> 8).float() * 2.0**-24

    @staticmethod
    def tokens(counter_B5: Tensor, length: int, vocab_size: int, stream: int) -> Tensor:
        """Tokens, [B, length], counted the same way."""
        return (_bits(counter_B5, length, stream) * vocab_size) >> 32

    @classmethod
    def step(cls, counter_B5: Tensor, length: int, vocab_size: int) -> StepNoise:
        """The noise of one step, counted the same way."""
        uniform_BL = cls.uniform(counter_B5, length, _SAMPLE)
        return StepNoise({"uniform_BL": uniform_BL}, cls.tokens(counter_B5, length, vocab_size, _RENOISE))


def _bits(counter_B5: Tensor, length: int, stream: int) -> Tensor:
    """32 random bits a position, as int64 [B, length]."""
    state_B1 = torch.zeros_like(counter_B5[:, :1])
    for word in range(counter_B5.shape[1]):
        state_B1 = _mix(state_B1 * 31 + counter_B5[:, word : word + 1])
    state_B1 = _mix(state_B1 * 31 + stream)
    return _mix(state_B1 + torch.arange(length, device=counter_B5.device) * _STRIDE) & _LOW


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, where products wrap and shifts must be made logical by hand."""
    x = x + _STRIDE
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


# ---- the same numbers on the host -----------------------------------------------------------------------------------


class HostNoise:
    """`CountedNoise` on the host, for rows that come and go.

    A row is named by its seat, its seed and where it is: canvas and step, from 0.

    A count is about fifty small operations, however many numbers it makes. So a row's fresh canvas and the noise of its
    next steps are counted together, for all rows that need some, and kept in tables with a place for every seat, from
    which a step gathers. NumPy does in place what takes torch three times as long."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size
        self._uniform_XTL = np.zeros((0, AHEAD, length), np.float32)
        self._tokens_XTL = np.zeros((0, AHEAD, length), np.int64)
        self._blocks: dict[int, tuple[int, int, int]] = {}
        """What each seat's place in the tables is for: seed, canvas, and the first step."""

    def canvas(self, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], ahead: bool) -> Tensor:
        """A fresh canvas for each row, [B, L]; `ahead`: the noise of its first steps is needed soon."""
        places = [(seed, canvas, 0, _CANVAS) for seed, canvas in zip(seeds, canvases, strict=True)]
        blocks = [(*row, 0) for row in zip(seats, seeds, canvases, strict=True)] if ahead else []
        return torch.from_numpy(self._count(places, blocks))

    def canvas_at(self, step: int, seeds: Sequence[int], canvases: Sequence[int]) -> Tensor:
        """Canvases that are noise throughout, [B, L]: fresh ones (step 0), or what replaces all of them at a step."""
        stream = _RENOISE if step else _CANVAS
        return torch.from_numpy(self._count([(*pair, step, stream) for pair in zip(seeds, canvases, strict=True)], []))

    def step(
        self, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], steps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What a step of these rows samples with, and what takes the place of unaccepted tokens, both [B, L]."""
        rows = zip(seats, seeds, canvases, (step - step % AHEAD for step in steps), strict=True)
        if due := [row for row in rows if self._blocks.get(row[0]) != row[1:]]:
            self._count([], due)
        at: Any = list(seats), [step % AHEAD for step in steps]
        return torch.from_numpy(self._uniform_XTL[at]), torch.from_numpy(self._tokens_XTL[at])

    def _count(self, places: Sequence[_NoisePlace], blocks: Sequence[_NoiseBlock]) -> npt.NDArray[np.int64]:
        """Tokens at these places, and into the tables those of these blocks of steps, in one count."""
        steps = range(AHEAD)
        uniform = [(seed, canvas, first + n, _SAMPLE) for _, seed, canvas, first in blocks for n in steps]
        renoise = [(seed, canvas, first + n, _RENOISE) for _, seed, canvas, first in blocks for n in steps]
        bits_NL = _host_bits([*uniform, *renoise, *places], self.length)
        tokens_NL = ((bits_NL[len(uniform) :] * np.uint64(self.vocab_size)) >> np.uint64(32)).view(np.int64)
        if blocks:
            seats, shape = [seat for seat, *_ in blocks], (len(blocks), AHEAD, self.length)
            self._make_room(max(seats) + 1)
            self._uniform_XTL[seats] = _host_uniform(bits_NL[: len(uniform)]).reshape(shape)
            self._tokens_XTL[seats] = tokens_NL[: len(renoise)].reshape(shape)
            self._blocks |= {seat: (seed, canvas, first) for seat, seed, canvas, first in blocks}
        return tokens_NL[len(renoise) :]

    def _make_room(self, seats: int) -> None:
        if (more := seats - len(self._uniform_XTL)) > 0:
            wider = ((0, more), (0, 0), (0, 0))
            self._uniform_XTL, self._tokens_XTL = np.pad(self._uniform_XTL, wider), np.pad(self._tokens_XTL, wider)


def first_uniform(seeds: Sequence[int], canvases: Sequence[int]) -> Tensor:
    """What the first position of each canvas's first step samples with, [B]."""
    places = [(seed, canvas, 0, _SAMPLE) for seed, canvas in zip(seeds, canvases, strict=True)]
    return torch.from_numpy(_host_uniform(_host_bits(places, 1))[:, 0])


def _host_bits(places: Sequence[_NoisePlace], length: int) -> _Bits:
    """32 random bits for each position of these places, as uint64 [N, length]."""
    state_N = np.zeros(len(places), np.uint64)
    words = [(seed & 0xFFFFFFFF, seed >> 32, 0, canvas, step, stream) for seed, canvas, step, stream in places]
    for word_N in np.array(words, np.uint64).T:
        state_N *= np.uint64(31)
        state_N += word_N
        _host_mix_(state_N)
    bits_NL = state_N[:, None] + np.arange(length, dtype=np.uint64) * _HOST_STRIDE
    _host_mix_(bits_NL)
    bits_NL &= _HOST_LOW
    return bits_NL


def _host_mix_(x: _Bits) -> None:
    """splitmix64's finaliser."""
    x += _HOST_STRIDE
    x ^= x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)


def _host_uniform(bits_NL: _Bits) -> npt.NDArray[np.float32]:
    """As float32 in [0, 1)."""
    return (bits_NL >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


# ---- the noise of an engine's rows ----------------------------------------------------------------------------------


class SeatNoise:
    """The noise of rows at their seats. `source` None: counted on the host from each row's seed."""

    def __init__(self, vocab_size: int, device: torch.device, source: NoiseSource | None = None) -> None:
        self.vocab_size, self.device, self.source = vocab_size, device, source
        self._counted: dict[int, HostNoise] = {}
        """By the length of canvases."""

    def canvas(
        self, length: int, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], ahead: bool
    ) -> Tensor:
        """Fresh canvases, [B, L]; `ahead`: see `HostNoise.canvas`."""
        if self.source is not None:
            return self.source.canvas(seats, canvases)
        return self._of(length).canvas(seats, seeds, canvases, ahead)

    def canvas_at(
        self, step: int, length: int, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int]
    ) -> Tensor:
        """Canvases that are noise throughout, [B, L], as rows at this step have them: see `HostNoise.canvas_at`."""
        if self.source is None:
            return self._of(length).canvas_at(step, seeds, canvases)
        if not step:
            return self.source.canvas(seats, canvases)[:, :length]
        return self.source.renoise(seats, canvases, [step] * len(seats))[:, :length]

    def step(
        self, length: int, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], steps: Sequence[int]
    ) -> StepNoise:
        """The noise of a step, on the device."""
        if self.source is not None:
            sample = self.source.sample(seats, canvases, steps)
            return StepNoise(sample, self.source.renoise(seats, canvases, steps))
        uniform_BL, tokens_BL = self._of(length).step(seats, seeds, canvases, steps)
        return StepNoise({"uniform_BL": to_device(uniform_BL, self.device)}, to_device(tokens_BL, self.device))

    def token(self, seats: Sequence[int], seeds: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """What an autoregressive token is sampled with, [B]: the first position of the canvas of its number."""
        if self.source is not None:
            return self.source.sample(seats, tokens, [0] * len(seats))["uniform_BL"][:, 0]
        return to_device(first_uniform(seeds, tokens), self.device)

    def _of(self, length: int) -> HostNoise:
        if length not in self._counted:
            self._counted[length] = HostNoise(length, self.vocab_size)
        return self._counted[length]
