"""Counted random numbers: a function of their place, so that a seed gives the same text alone or in a batch.

`CountedNoise` hashes (seed, request, canvas, step, position) with splitmix64. `host_noise` makes the same numbers on
the host, some steps at a time. A `NoiseSource` from outside can take their place, so that a test can give two engines
the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class CountedNoise:
    """Noise as a hash of its place. `seeds` and `requests` are one a row."""

    seeds: Sequence[int]
    requests: Sequence[int]
    length: int
    vocab_size: int
    device: torch.device | str = "cpu"

    def canvas(self, rows: Sequence[int], canvas: Sequence[int]) -> Tensor:
        return self._tokens(rows, canvas, [0] * len(rows), stream=0)

    def sample(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> dict[str, Tensor]:
        return {"uniform_BL": self._uniform(rows, canvas, step, stream=1)}

    def renoise(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int]) -> Tensor:
        return self._tokens(rows, canvas, step, stream=2)

    def _uniform(self, rows: Sequence[int], canvas: Sequence[int], step: Sequence[int], stream: int) -> Tensor:
        return self.uniform(self._counter_B5(rows, canvas, step), self.length, stream)

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


def _bits(counter_B5: Tensor, length: int, stream: int) -> Tensor:
    """32 random bits a position, as int64 [B, length]."""
    state_B1 = torch.zeros_like(counter_B5[:, :1])
    for word in range(counter_B5.shape[1]):
        state_B1 = _mix(state_B1 * 31 + counter_B5[:, word : word + 1])
    state_B1 = _mix(state_B1 * 31 + stream)
    return _mix(state_B1 + torch.arange(length, device=counter_B5.device) * _STRIDE) & _LOW


_LOW = (1 << 32) - 1
_STRIDE = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio in 64 bits (splitmix64)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, where products wrap and shifts must be made logical by hand."""
    x = x + _STRIDE
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))
