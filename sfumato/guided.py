"""Grammars over a read-out: what a guide's walk makes of the tokens, entropies and logits of a canvas.

Where the model's own tokens are allowed, nothing changes. Where one is not, the word that is most likely among the
allowed ones takes its place, and the logits lose all others, so that the soft embedding says the same. What the
grammar alone determines is pinned. A grammar is walked on the host, so steps that have one are not recorded as graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.config import ModelConfig
from sfumato.constrain import Guide, Walk
from sfumato.events import InputError
from sfumato.step import Projected


class GuideError(InputError):
    """A grammar cannot be followed any further. `row` is the row of the pass whose text it rules."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@dataclass
class Span:
    """Positions of an answer that are kept to a grammar: `width` of them from `start` on. None: to the answer's end,
    which then comes where the text is complete; else what the text leaves of the span is padding."""

    start: int
    width: int | None
    guide: Guide
    walked: int = 0
    """Tokens of its last walk, on the present canvas."""

    def commit(self) -> None:
        """What the last walk made of the canvas is final."""
        self.guide.commit(self.walked)
        self.walked = 0


@dataclass(frozen=True)
class Turn:
    """A span's part of one step: positions `first` to `last` of a row's canvas."""

    row: int
    first: int
    last: int
    span: Span
    bound: float
    """Nats under which a word counts as decided."""
    is_last: bool
    """No step comes after this one: the path must be whole."""


def project_(
    turns: Sequence[Turn],
    config: ModelConfig,
    logits_BLV: Tensor,
    argmax_BL: Tensor,
    entropy_BL: Tensor,
    is_sure_BL: Tensor,
) -> Projected:
    """Walk every span over its positions. Logits of words that are not allowed become -inf in place, where asked."""
    sure, tokens, entropies = is_sure_BL.tolist(), argmax_BL.tolist(), entropy_BL.tolist()
    count, length = argmax_BL.shape
    is_guided, is_open, is_forced = ([[start] * length for _ in range(count)] for start in (False, True, False))
    is_whole, has_masked = [True] * count, False
    said: dict[tuple[int, int], Tensor] = {}  # the model's own logits where they were masked: a pick may be taken back
    for turn in turns:
        n, first, last = turn.row, turn.first, turn.last

        def pick(at: int, mask: np.ndarray, n: int = n, first: int = first) -> tuple[int, float]:
            place = n, first + at
            if place in said:
                logits_BLV[place] = said[place]
            else:
                said[place] = logits_BLV[place].clone()
            return _pick_(logits_BLV[place], torch.from_numpy(mask))

        if turn.span.guide.is_over:
            walk = Walk([], [], {}, 0)
        else:
            try:
                walk = turn.span.guide.walk(tokens[n][first:last], sure[n][first:last], pick, turn.bound, turn.is_last)
            except InputError as error:
                raise GuideError(str(error), n) from error
        has_masked |= bool(walk.overruled)
        turn.span.walked = len(walk.tokens)
        path, until = walk.tokens, first + len(walk.tokens)
        forced = {first + at for at in walk.forced}
        if walk.end is not None:  # the answer's end, or padding that disappears
            rest = [config.pad_id] * (last - until)
            if rest and turn.span.width is None:
                rest[0] = config.eos_ids[0]
            forced |= set(range(until, last))
            path, until = path + rest, last
        tokens[n][first:until] = path
        for at, entropy in walk.overruled.items():
            entropies[n][first + at] = entropy
        for at in range(first, last):
            is_guided[n][at], is_open[n][at], is_forced[n][at] = True, at < until, at in forced
        is_whole[n] &= until == last
    lists = (tokens, entropies, is_guided, is_open, is_forced, is_whole)
    found: list[Tensor] = [torch.tensor(x, device=argmax_BL.device) for x in lists]
    return Projected(found[0], found[1], found[2], found[3], found[4], found[5], has_masked)


def _pick_(logits_V: Tensor, mask_V: Tensor) -> tuple[int, float]:
    """The most likely of the allowed tokens and the entropy among them, in nats; the others leave the logits."""
    is_banned_V = ~mask_V.to(logits_V.device)
    logits_V.masked_fill_(is_banned_V, -torch.inf)
    log_p_V = torch.log_softmax(logits_V.float(), -1)
    entropy = -(log_p_V.exp() * log_p_V.masked_fill(is_banned_V, 0.0)).sum()
    return int(logits_V.argmax()), max(float(entropy), 0.0)
