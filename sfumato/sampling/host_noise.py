"""Counted dice on the host, some steps at a time: the numbers of `noise.CountedNoise` for rows that come and go.

A count is about fifty small operations, however many numbers it makes. So a row's fresh canvas and the dice of its next
steps are counted together, for all rows that need some, and kept in tables with a place for every seat, from which a
step gathers. NumPy does in place what takes torch three times as long. A recorded step counts its own, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

AHEAD = 8
"""Steps whose dice are counted together."""

_LOW = np.uint64(0xFFFFFFFF)
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CANVAS, _SAMPLE, _RENOISE = 0, 1, 2  # the streams of `CountedNoise`


class HostNoise:
    """What rows at their seats draw. Each is named by its seat, its seed and where it is: canvas and step, from 0."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size
        self._uniform_XTL = np.zeros((0, AHEAD, length), np.float32)
        self._noise_XTL = np.zeros((0, AHEAD, length), np.int64)
        self._held: dict[int, tuple[int, int, int]] = {}
        """What each seat's place in the tables is for: seed, canvas, and the first step."""

    def canvas(self, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], ahead: bool) -> Tensor:
        """A fresh canvas for each row, [B, L]; `ahead`: the dice of its first steps are wanted soon."""
        places = [(seed, canvas, 0, _CANVAS) for seed, canvas in zip(seeds, canvases, strict=True)]
        blocks = [(*row, 0) for row in zip(seats, seeds, canvases, strict=True)] if ahead else []
        return torch.from_numpy(self._count(places, blocks))

    def step(
        self, seats: Sequence[int], seeds: Sequence[int], canvases: Sequence[int], steps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What a step of these rows samples with, and what takes the place of unaccepted tokens, both [B, L]."""
        rows = zip(seats, seeds, canvases, (step - step % AHEAD for step in steps), strict=True)
        if due := [row for row in rows if self._held.get(row[0]) != row[1:]]:
            self._count([], due)
        at: Any = list(seats), [step % AHEAD for step in steps]
        return torch.from_numpy(self._uniform_XTL[at]), torch.from_numpy(self._noise_XTL[at])

    def _count(
        self, places: Sequence[tuple[int, int, int, int]], blocks: Sequence[tuple[int, int, int, int]]
    ) -> np.ndarray:
        """Tokens at these places (seed, canvas, step, stream), and into the tables those of blocks of steps (seat,
        seed, canvas, first step), in one count."""
        steps = range(AHEAD)
        uniform = [(seed, canvas, first + n, _SAMPLE) for _, seed, canvas, first in blocks for n in steps]
        noise = [(seed, canvas, first + n, _RENOISE) for _, seed, canvas, first in blocks for n in steps]
        bits_NL = bits([*uniform, *noise, *places], self.length)
        tokens_NL = ((bits_NL[len(uniform) :] * np.uint64(self.vocab_size)) >> np.uint64(32)).view(np.int64)
        if blocks:
            seats, shape = [seat for seat, *_ in blocks], (len(blocks), AHEAD, self.length)
            self._make_room(max(seats) + 1)
            self._uniform_XTL[seats] = _uniform(bits_NL[: len(uniform)]).reshape(shape)
            self._noise_XTL[seats] = tokens_NL[: len(noise)].reshape(shape)
            self._held |= {seat: (seed, canvas, first) for seat, seed, canvas, first in blocks}
        return tokens_NL[len(noise) :]

    def _make_room(self, seats: int) -> None:
        if (more := seats - len(self._uniform_XTL)) > 0:
            wider = ((0, more), (0, 0), (0, 0))
            self._uniform_XTL, self._noise_XTL = np.pad(self._uniform_XTL, wider), np.pad(self._noise_XTL, wider)


def first_uniform(seeds: Sequence[int], canvases: Sequence[int]) -> Tensor:
    """What the first position of each canvas's first step samples with, [B]."""
    places = [(seed, canvas, 0, _SAMPLE) for seed, canvas in zip(seeds, canvases, strict=True)]
    return torch.from_numpy(_uniform(bits(places, 1))[:, 0])


def bits(places: Sequence[tuple[int, int, int, int]], length: int) -> np.ndarray:
    """32 random bits for each position of these places (seed, canvas, step, stream), as uint64 [N, length]."""
    state_N = np.zeros(len(places), np.uint64)
    words = [(seed & 0xFFFFFFFF, seed >> 32, 0, canvas, step, stream) for seed, canvas, step, stream in places]
    for word_N in np.array(words, np.uint64).T:
        state_N *= np.uint64(31)
        state_N += word_N
        _mix_(state_N)
    bits_NL = state_N[:, None] + np.arange(length, dtype=np.uint64) * _STRIDE
    _mix_(bits_NL)
    bits_NL &= _LOW
    return bits_NL


def _mix_(x: np.ndarray) -> None:
    """splitmix64's finaliser."""
    x += _STRIDE
    x ^= x >> np.uint64(30)
    x *= _FIRST
    x ^= x >> np.uint64(27)
    x *= _SECOND
    x ^= x >> np.uint64(31)


def _uniform(bits_NL: np.ndarray) -> np.ndarray:
    """As float32 in [0, 1)."""
    return (bits_NL >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
