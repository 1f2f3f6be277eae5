"""Grammars over a read-out: what a guide's walk makes of the tokens, entropies and logits of a canvas.

Where the model's own tokens are allowed, nothing changes. Where one is not, the word that is most likely among the
allowed ones takes its place, and the logits lose all others, so that the soft embedding says the same. What the
grammar alone determines is pinned. A grammar is walked on the host, so steps that have one are not recorded as graphs.

A walk takes microseconds, or with an unkind grammar minutes. So it has a share of each turn (`Walks`), and the rest of
it waits for the next: what comes of it does not depend on when.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfumato.constraints.guide import Guide, Walk
from sfumato.constraints.search import Work
from sfumato.errors import InputError, contained
from sfumato.model.config import ModelConfig
from sfumato.sampling.step import Look, Projected

SLICE = 0.005
"""Seconds that a walk has at a time."""
ALONE = 0.05
"""Seconds that walks have in a turn with nothing else in it."""
LONGEST, A_STEP = 10.0, 0.02
"""Seconds that all the walks of one request may take: so many, and as many more for each of its steps. Most walks take
a few thousandths."""


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
    """A span's part of one step: positions `first` to `last` of a canvas."""

    first: int
    last: int
    span: Span
    bound: float
    """Nats under which a word counts as decided."""
    is_last: bool
    """No step comes after this one: the path must be whole."""


def projecting(
    turns: Sequence[Turn],
    config: ModelConfig,
    logits_LV: Tensor,
    argmax_L: Tensor,
    entropy_L: Tensor,
    is_sure_L: Tensor,
) -> Work[Projected]:
    """Walk every span of a canvas over its positions; the result has one row. Logits of words that are not allowed
    become -inf in place, where asked. InputError where a grammar cannot be followed any further."""
    sure, tokens, entropies = is_sure_L.tolist(), argmax_L.tolist(), entropy_L.tolist()
    length = len(tokens)
    is_guided, is_open, is_forced = [False] * length, [True] * length, [False] * length
    is_whole, has_masked = True, False
    plain: dict[int, Tensor] = {}  # the model's own logits where they were masked: a pick may be taken back
    for turn in turns:
        first, last = turn.first, turn.last

        def pick(at: int, mask: np.ndarray, first: int = first) -> tuple[int, float]:
            place = first + at
            if place in plain:
                logits_LV[place] = plain[place]
            else:
                plain[place] = logits_LV[place].clone()
            return _pick_(logits_LV[place], torch.from_numpy(mask))

        if turn.span.guide.is_over:
            walk = Walk([], [], {}, 0)
        else:
            walking = turn.span.guide.walking
            walk = yield from walking(tokens[first:last], sure[first:last], pick, turn.bound, turn.is_last)
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
        tokens[first:until] = path
        for at, entropy in walk.overruled.items():
            entropies[first + at] = entropy
        for at in range(first, last):
            is_guided[at], is_open[at], is_forced[at] = True, at < until, at in forced
        is_whole &= until == last
    lists = ([tokens], [entropies], [is_guided], [is_open], [is_forced], [is_whole])
    return Projected._make([*(torch.tensor(x, device=argmax_L.device) for x in lists), has_masked])


def _pick_(logits_V: Tensor, mask_V: Tensor) -> tuple[int, float]:
    """The most likely of the allowed tokens and the entropy among them, in nats; the others leave the logits."""
    is_banned_V = ~mask_V.to(logits_V.device)
    logits_V.masked_fill_(is_banned_V, -torch.inf)
    log_p_V = torch.log_softmax(logits_V.float(), -1)
    entropy = -(log_p_V.exp() * log_p_V.masked_fill(is_banned_V, 0.0)).sum()
    return int(logits_V.argmax()), max(float(entropy), 0.0)


@dataclass(eq=False)
class _Walking:
    look: Look
    place: int
    """Of its row in the look."""
    work: Work[Projected]
    seconds: float = 0.0


class Walks:
    """Read-outs whose grammars are being walked, by seat."""

    def __init__(self) -> None:
        self._of: dict[int, _Walking] = {}
        self._left: dict[int, float] = {}
        """Seconds that each seat's row has left."""
        self._credit = 0.0
        """Seconds that walks may still take in this turn; below 0 where they took more, since a single call of the
        library can be longer than a slice."""

    def __contains__(self, seat: int) -> bool:
        return seat in self._of

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, seat: int, look: Look, place: int, work: Work[Projected]) -> None:
        self._of[seat] = _Walking(look, place, work)
        self._left[seat] = self._left.get(seat, LONGEST) + A_STEP

    def drop(self, seat: int) -> None:
        """Its row has left."""
        self._left.pop(seat, None)
        if (one := self._of.pop(seat, None)) is not None:
            one.work.close()

    def go_on(self, seats: Collection[int], seconds: float) -> Iterator[tuple[int, Look, int, Projected | Exception]]:
        """Walk on for these seats: a slice for each that begins, then for so many seconds those that have walked least.
        Yields each that has ended: its seat, its look and the place in that, and what came of it."""
        self._credit = min(self._credit + seconds, seconds)
        left = [seat for seat in seats if seat in self._of]
        for seat in [seat for seat in left if not self._of[seat].seconds]:
            began = time.perf_counter()
            ended = self._advance(seat)
            self._credit -= max(0.0, time.perf_counter() - began - SLICE)
            if ended is not None:
                left.remove(seat)
                yield seat, *ended
        while left and self._credit > 0:
            seat = min(left, key=lambda seat: self._of[seat].seconds)
            began = time.perf_counter()
            ended = self._advance(seat)
            self._credit -= time.perf_counter() - began
            if ended is not None:
                left.remove(seat)
                yield seat, *ended

    def _advance(self, seat: int) -> tuple[Look, int, Projected | Exception] | None:
        """A slice of one walk; what came of it, if that was its end."""
        one = self._of[seat]
        began = time.perf_counter()
        try:
            while time.perf_counter() < began + SLICE:
                next(one.work)
            if self._left[seat] > 0:
                return None
            text = f"the constraint takes longer than the {LONGEST:g} seconds allowed to follow; make it simpler"
            outcome: Projected | Exception = InputError(text)
        except StopIteration as stop:
            outcome = stop.value
        except BaseException as error:
            outcome = contained(error)
        finally:
            took = time.perf_counter() - began
            one.seconds, self._left[seat] = one.seconds + took, self._left[seat] - took
        del self._of[seat]
        return one.look, one.place, outcome
