"""The search for a slot's length: all candidates are tried side by side, and the surest one wins.

Each candidate is laid out, and runs for a few steps as a row of one batch. Its score is how unsure the model is of the
slot's tokens, and how surprised at the fixed tokens behind it, in nats a token. It deliberately lacks the model: each
score is shown the read-outs of its row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.templates.layout import Sheet

LONGEST = 64
"""Tokens that a slot of open length may take, where it says nothing itself."""

CANDIDATES = 12
"""Lengths that are tried for a slot of unknown length."""

LENGTH_STEPS = 2
"""Steps after which a slot's length is decided."""

LENGTH_BEHIND = 16
"""Fixed tokens behind a slot that have a say in its length."""


def candidates(at_most: int) -> list[int]:
    """Lengths to try for a slot of up to `at_most` tokens: dense where short, then in even ratios."""
    if at_most <= CANDIDATES:
        return list(range(1, at_most + 1))
    ratio = at_most ** (1 / (CANDIDATES - 1))
    return sorted({max(1, min(at_most, round(ratio**n))) for n in range(CANDIDATES)})


class LengthScore:
    """How badly one candidate's length agrees with the text around the slot: the lower, the better.

    Call it with every read-out of the candidate's row. `place` is the slot's number in the sheet."""

    def __init__(self, sheet: Sheet, place: int, canvas_length: int) -> None:
        self.sheet, self.place, self.canvas_length = sheet, sheet.places[place], canvas_length
        self.value = math.inf
        self._steps = 0

    def __call__(self, logits_LV: Tensor) -> None:
        """Take the logits of one step; those of another canvas than the one that the slot begins on do not count."""
        pins, start, end = self.sheet.pins, self.place.start, self.place.start + self.place.width
        first = self._steps // LENGTH_STEPS * self.canvas_length
        self._steps += 1
        if not 0 <= start - first < self.canvas_length:
            return
        behind = [position for position in range(end, end + LENGTH_BEHIND) if position in pins]
        positions = [p - first for p in (*range(start, end), *behind) if 0 <= p - first < len(logits_LV)]
        log_p = torch.log_softmax(logits_LV[positions].float(), -1)
        split = sum(position + first < end for position in positions)
        unsure = -(log_p[:split].exp() * log_p[:split]).sum(-1).mean()
        tokens = torch.tensor([pins[position + first] for position in positions[split:]], device=log_p.device)
        surprise = -log_p[split:].gather(1, tokens[:, None]).mean() if len(tokens) else torch.tensor(0.0)
        self.value = float(unsure) + float(surprise)
