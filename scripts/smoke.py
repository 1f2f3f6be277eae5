"""The colours of the pictures: from ivory (certain) to smoke (undecided), on paper and on dark ground alike."""

from __future__ import annotations

SMOKE = ("#ffffff", "#e4e0d4", "#c9b58c", "#a9854f", "#7d6a6a", "#5f5a73", "#474457")
"""From certain to undecided: ivory, ochre, smoke."""
CLUE = "#6fb3a7"
"""A clue, which stays: no shade of the scale above."""
LEVELS = (0.005, 0.05, 0.2, 0.6, 1.2, 2.4)
"""The entropies, in nats, at which the next shade begins."""


def colour(entropy: float) -> str:
    """The colour of a token whose distribution has this entropy, in nats."""
    return SMOKE[sum(entropy >= level for level in LEVELS)]
