"""What `sfumato bench` measures, as a value. Without torch: the command's help shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchPlan:
    """What to measure: prompt and answer in tokens, denoising steps a canvas, and about how long to take for each."""

    prompt: int = 384
    tokens: int = 512
    steps: int = 12
    seconds: float = 20.0
    seed: int = 0
    streamed: int = 2**30
    """Bytes of the buffer that memory bandwidth is measured with."""
