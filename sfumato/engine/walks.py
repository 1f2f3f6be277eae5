"""Grammars over a read-out: what a guide's walk makes of the tokens, entropies and logits of a canvas.

Where the model's own tokens are allowed, nothing changes. Where one is not, the word that is most likely among the
allowed ones takes its place, and the logits lose all others, so that the soft embedding agrees. What the grammar alone
determines is pinned. A grammar is walked on the host, so steps that have one are not recorded as graphs.

A walk takes microseconds, or with an unkind grammar minutes. So it has a share of each turn (`Walks`), and the rest of
it waits for the next: its result does not depend on when.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfumato.constraints.guide import Walk
from sfumato.constraints.interruptible import Interruptible
from sfumato.engine.request import RowSpan
from sfumato.errors import InputError, contained
from sfumato.model.config import ModelConfig
from sfumato.sampling.step import Look, Projection

SLICE = 0.005
"""Seconds that a walk has at a time."""
ALONE = 0.05
"""Seconds that walks have in a turn with nothing else in it."""
LONGEST, A_STEP = 10.0, 0.02
"""Seconds that all the walks of one request may take: so many, and as many more for each of its steps. Most walks take
a few thousandths."""


class SpanStep(NamedTuple):
    """A span's part of one step: positions `first` to `last` of a canvas."""

    first: int
    last: int
    span: RowSpan
    bound: float
    """Nats under which a word counts as decided."""
    is_last: bool
    """No step comes after this one: the path must be whole."""


class RowReadOut(NamedTuple):
    """The read-out of one canvas."""

    logits_LV: Tensor
    argmax_L: Tensor
    entropy_L: Tensor
    is_sure_L: Tensor
    """Positions that would be accepted."""


def projecting(spans: Sequence[SpanStep], config: ModelConfig, read_out: RowReadOut) -> Interruptible[Projection]:
    """Walk every span of a canvas over its positions; the result has one row.

    Logits of words that are not allowed become -inf in place, where a pick needs it. InputError where a grammar cannot
    be followed any further."""
    logits_LV, argmax_L, entropy_L, is_sure_L = read_out
    sure, tokens, entropies = is_sure_L.tolist(), argmax_L.tolist(), entropy_L.tolist()
    length = len(tokens)
    is_guided, is_open, is_forced = [False] * length, [True] * length, [False] * length
    is_whole, has_masked = True, False
    plain: dict[int, Tensor] = {}  # the model's own logits where they were masked: a pick may be withdrawn
    for first, last, span, bound, is_last in spans:

        def pick(at: int, mask: npt.NDArray[np.bool_], first: int = first) -> tuple[int, float]:
            place = first + at
            if place in plain:
                logits_LV[place] = plain[place]
            else:
                plain[place] = logits_LV[place].clone()
            return _pick_(logits_LV[place], torch.from_numpy(mask))

        if span.guide.is_over:
            walk = Walk([], [], {}, 0)
        else:
            walk = yield from span.guide.walking(tokens[first:last], sure[first:last], pick, bound, is_last)
        has_masked |= bool(walk.overruled)
        span.path_length = len(walk.tokens)
        path, until = walk.tokens, first + len(walk.tokens)
        forced = {first + at for at in walk.forced}
        if walk.end is not None:  # the answer's end, or padding that disappears
            rest = [config.pad_id] * (last - until)
            if walk.end in walk.free:
                rest = tokens[until:last]  # as it would be without a grammar
            else:
                forced |= set(range(until, last))
            if rest and span.width is None:
                rest[0] = config.eos_ids[0]
            path, until = path + rest, last
        tokens[first:until] = path
        for at, entropy in walk.overruled.items():
            entropies[first + at] = entropy
        own = {first + at for at in walk.free if at != walk.end}.difference(
            forced, (first + at for at in walk.overruled)
        )
        for at in range(first, last):
            is_guided[at], is_open[at], is_forced[at] = at not in own, at < until, at in forced
        is_whole &= until == last
    lists = ([tokens], [entropies], [is_guided], [is_open], [is_forced], [is_whole])
    return Projection._make([*(torch.tensor(x, device=argmax_L.device) for x in lists), has_masked])


def _pick_(logits_V: Tensor, mask_V: Tensor) -> tuple[int, float]:
    """The most likely of the allowed tokens and the entropy among them, in nats; the others leave the logits."""
    is_banned_V = ~mask_V.to(logits_V.device)
    logits_V.masked_fill_(is_banned_V, -torch.inf)
    log_p_V = torch.log_softmax(logits_V.float(), -1)
    entropy = -(log_p_V.exp() * log_p_V.masked_fill(is_banned_V, 0.0)).sum()
    return int(logits_V.argmax()), max(float(entropy), 0.0)


class EndedWalk(NamedTuple):
    """A walk that has ended."""

    seat: int
    look: Look
    place: int
    """Of its row in the look."""
    outcome: Projection | Exception


@dataclass(eq=False, slots=True)
class _Walking:
    look: Look
    place: int
    """Of its row in the look."""
    work: Interruptible[Projection]
    seconds: float = 0.0


class Walks:
    """Read-outs whose grammars are being walked, by seat."""

    def __init__(self) -> None:
        self._walking: dict[int, _Walking] = {}
        self._seconds_left: dict[int, float] = {}
        """Of each seat's row, for all its walks together."""
        self._credit = 0.0
        """Seconds that walks may still take in this turn; below 0 where they took more, since a single call of the
        library can be longer than a slice."""

    def __contains__(self, seat: int) -> bool:
        return seat in self._walking

    def __len__(self) -> int:
        return len(self._walking)

    def begin(self, seat: int, look: Look, place: int, work: Interruptible[Projection]) -> None:
        """Begin the walk over the read-out at this place of a look."""
        self._walking[seat] = _Walking(look, place, work)
        self._seconds_left[seat] = self._seconds_left.get(seat, LONGEST) + A_STEP

    def drop(self, seat: int) -> None:
        """Forget the walk of a row that has left."""
        self._seconds_left.pop(seat, None)
        if (one := self._walking.pop(seat, None)) is not None:
            one.work.close()

    def go_on(self, seats: Collection[int], seconds: float) -> Iterator[EndedWalk]:
        """Walk on for these seats: a slice for each that begins, then for so many seconds those that have walked least.

        Yields each that has ended."""
        self._credit = min(self._credit + seconds, seconds)
        walking = [seat for seat in seats if seat in self._walking]
        for seat in [seat for seat in walking if not self._walking[seat].seconds]:
            began = time.perf_counter()
            ended = self._advance(seat)
            self._credit -= max(0.0, time.perf_counter() - began - SLICE)
            if ended is not None:
                walking.remove(seat)
                yield ended
        while walking and self._credit > 0:
            seat = min(walking, key=lambda seat: self._walking[seat].seconds)
            began = time.perf_counter()
            ended = self._advance(seat)
            self._credit -= time.perf_counter() - began
            if ended is not None:
                walking.remove(seat)
                yield ended

    def _advance(self, seat: int) -> EndedWalk | None:
        """A slice of one walk; its end, if that is reached."""
        one = self._walking[seat]
        began = time.perf_counter()
        try:
            while time.perf_counter() < began + SLICE:
                next(one.work)
            if self._seconds_left[seat] > 0:
                return None
            text = f"the constraint takes longer than the {LONGEST:g} seconds allowed to follow; make it simpler"
            outcome: Projection | Exception = InputError(text)
        except StopIteration as stop:
            outcome = stop.value
        except BaseException as error:
            outcome = contained(error)
        finally:
            duration = time.perf_counter() - began
            one.seconds, self._seconds_left[seat] = one.seconds + duration, self._seconds_left[seat] - duration
        del self._walking[seat]
        return EndedWalk(seat, one.look, one.place, outcome)
