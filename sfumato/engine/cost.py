"""What a turn costs, learned from the turns before."""

from __future__ import annotations

import numpy as np

from sfumato.engine.engine import PREFILL_CHUNK

FORGET = 0.95
"""What earlier turns weigh, at each new one, in what a turn costs."""


class Cost:
    """Seconds of a turn as a line over the positions it computes, by least squares over the last turns."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of 1, x, y, xx, xy

    def learn(self, positions: int, seconds: float) -> None:
        """Take note of a turn that computed so many positions."""
        x, y = float(positions), seconds
        self._sums = FORGET * self._sums + np.array([1.0, x, y, x * x, x * y])

    def line(self) -> tuple[float, float]:
        """Seconds of a turn and of each position in it; neither below 0."""
        n, x, y, xx, xy = self._sums.tolist()
        if not n or not x:
            return 0.0, 0.0
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else y / x
        slope = min(max(slope, 0.0), y / x)
        return (y - slope * x) / n, slope

    def of(self, positions: int) -> float:
        """Seconds that a turn of so many positions is expected to take."""
        start, slope = self.line()
        return start + slope * positions

    def within(self, seconds: float) -> int:
        """Tokens that can be encoded in so many seconds."""
        _, slope = self.line()
        return PREFILL_CHUNK if slope * PREFILL_CHUNK <= seconds else int(seconds / slope)
