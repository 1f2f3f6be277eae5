"""The steps of both calls, in order, each with the second at which it must be over; by the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A child process: `name` is a module of this folder and, behind a space, what it is to be done with."""

    name: str
    until: float
    """Seconds after the start of the call: then it is killed, whatever it does."""
    least: float = 5.0
    """With fewer seconds left it is not begun."""
    is_gate: bool = False
    """Nothing after it makes sense where it fails."""


FIRST = (
    Step("prepare", 25),  # ceilings, while all cores compile
    Step("nano", 60, is_gate=True),  # recorded = eager = fused, in float32
    Step("kernels", 115),  # every operation at the released size against the reference
    Step("blocks", 140),  # whole steps of two layers against the reference; recorded = eager, exactly
    Step("cells int4", 180, 15),  # the released size, timed, with a profile by kernel
    Step("cells fp8", 218, 15),
    Step("cells int4-fp8", 242, 12),
    Step("cells bf16", 268, 12),
    Step("choices int4", 345, 10),  # prepared A/B choices; the faster go into tuned.json
    Step("choices fp8", 420, 10),
    Step("again int4", 446, 15),  # the released size with the winners
    Step("again fp8", 470, 15),
)
"""480 seconds at most, the rest is for writing."""

MORE = (
    Step("prepare", 25),
    Step("contexts int4", 80, 15),  # behind 8K and 32K tokens
    Step("adapters int4", 104, 15),  # no, one and sixteen adapters of rank 16 on everything
    Step("decisions int4", 119, 10),  # reads of 1, 8 and 64 questions
    Step("memcheck", 155, 10),  # a memory checker on one step of nano
    Step("counters", 187, 10),  # hardware counters of four kernels
    Step("offload", 203, 10),  # layers streamed from the host
    Step("peer", 234, 20),  # transformers on the same weights
)
"""240 seconds at most."""

SECONDS = {"first": 480.0, "more": 240.0}
PLANS = {"first": FIRST, "more": MORE}
