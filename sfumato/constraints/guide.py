"""The path of one text along its grammar: which of the model's tokens a canvas may keep, and what replaces the others.

A canvas is denoised as a whole, so a constraint cannot wait for one token after the other. At each step a `Guide` walks
the slot from left to right along the model's argmax tokens. What the grammar forces is free; the model's own token is
checked, which takes a few microseconds; and only where it is not allowed, behind positions that are settled, does the
walk compute a mask. The walk ends where more would be built on a guess. What is known of a position is kept for the
next step.

**Room.** A text must end within its tokens. Every path that a walk returns can be completed within the room: greedy
search finds a completion (`search`), and where none is short enough the walk goes back and takes the completion's
tokens instead.

A schema's JSON is written on one line with ", " and ": ", as `json.dumps` does it. No other white space may stand
between tokens, so nothing can repeat it without end, and nearly all of the scaffold is forced. Object keys come in the
schema's order.

A walk is `Interruptible`: it can stand still between two calls of the library, so that a slow one need not hold up
others.

Deliberately absent: the choice among allowed tokens, which is the caller's (`Pick`), and probabilities of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sfumato.constraints.interruptible import Interruptible, finish
from sfumato.constraints.search import EFFORT_IN_WALK, Accepts, Search
from sfumato.constraints.trails import Trail
from sfumato.constraints.vocabulary import Vocabulary, give_up

if TYPE_CHECKING:
    from llguidance import LLMatcher

_REPAIRS = 4
"""Times that a walk may go back for the room before it follows a completion to its end."""

Pick = Callable[[int, np.ndarray], tuple[int, float]]
"""(position, mask: bool [vocab_size]) -> (a token of the mask, entropy in nats under the mask)."""


@dataclass(frozen=True)
class Walk:
    """The path of a slot at one step; positions count from the slot's first in this canvas."""

    tokens: list[int]
    """A path that the grammar allows; each of its prefixes can be completed within the room."""
    forced: list[int]
    """Positions whose token follows from those before: from the grammar, or because the room is short."""
    overruled: dict[int, float]
    """Position -> entropy in nats under the mask, where the model's own token was not allowed. The position `end` is
    among them where it was the pick that ended the text."""
    end: int | None
    """The number of tokens at which the text is complete (`len(tokens)`); None while it is not."""
    free: range = range(0)
    """Positions of free text. Those that are neither forced nor overruled are as they would be without a grammar."""


@dataclass
class _PathPoint:
    """What is known of the state before one position: it follows from the tokens before, not from the model."""

    is_accepting: bool
    is_done: bool
    """Nothing but the end is possible."""
    forced: list[int]
    """Tokens that the grammar alone determines from here on; mostly none."""
    mask: bytes | None = None
    """Bits, as llguidance has them."""
    completion: list[int] | None = None
    """Tokens that complete the text from here within the room."""
    is_stuck: bool = False
    """The search for such a completion failed."""
    refused: set[int] = field(default_factory=set)
    """Tokens after which the text cannot be completed within the room; where there are any, `completion` is known."""


@dataclass
class _Path:
    """The state of one walk: its arguments (see `Guide.walking`), and what it has done so far."""

    top: Sequence[int]
    is_sure: Sequence[bool]
    pick: Pick
    bound: float
    is_last: bool
    length: int
    """Positions that the walk may fill."""
    forced: list[int] = field(default_factory=list)
    overruled: dict[int, float] = field(default_factory=dict)
    is_settled: list[bool] = field(default_factory=lambda: [True])
    """Before each position: whether all tokens up to it are sure, forced, or picked within the bound."""
    detour: list[int] = field(default_factory=list)
    """Tokens of a completion that come next, where the room is short."""
    repairs: int = 0

    def force(self, j: int, token: int) -> int:
        """The token follows at position j from what is before it."""
        self.forced.append(j)
        self.is_settled.append(self.is_settled[j])
        return token

    def trust(self, j: int, token: int, is_sure: bool) -> int:
        """The token is the model's at position j, or a pick; later positions are settled only if it is sure."""
        self.is_settled.append(self.is_settled[j] and is_sure)
        return token

    def cut(self, j: int) -> None:
        """Forget position j and all behind it."""
        self.forced = [i for i in self.forced if i < j]
        self.overruled = {i: entropy for i, entropy in self.overruled.items() if i < j}
        del self.is_settled[j + 1 :]


_END, _STOP = -1, -2
"""Instead of a token: the walk stops because the text is complete, or for another reason."""


class Guide:
    """One text in progress: what is committed of it, and the path of its present canvas.

    `room` is the number of tokens still allowed behind what is committed, `is_over` says that the committed text is
    complete, and `masks` counts the masks computed so far. `completion` is a shortest text of the grammar. `is_right`
    says whether a whole text is right beyond what the grammar says; `completion` is.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        search: Search,
        matcher: LLMatcher,
        completion: list[int],
        room: int,
        is_right: Accepts | None = None,
    ) -> None:
        self.room = room
        self.is_over = False
        self.masks = 0
        self._vocabulary = vocabulary
        self._search = search
        self._is_right = is_right
        self._committed: list[int] = []  # for is_right
        self._matcher = matcher  # in the state behind self._tokens
        self._tokens: list[int] = []  # the last path, and the rest of an earlier path behind it
        self._places = [self._look([])]  # one more than tokens
        self._places[0].completion = self._last_completion = self._shortest = completion
        self._trail = search.trails.begin
        self._unfollowed = b""  # committed, and not yet a part of the trail
        self._length = 0  # of the last path
        self._end: int | None = None

    def walk(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Walk:
        """`walking`, without interruption."""
        return finish(self.walking(top, is_sure, pick, bound, is_last))

    def walking(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Interruptible[Walk]:
        """The path for the model's argmax tokens `top`, one for each position of the slot in this canvas.

        `is_sure` says whose entropy is low enough to be accepted; `bound` is the same for an entropy under a mask, in
        nats. `pick` is called where the model's token is not allowed and all before it is settled: sure, forced, or
        picked within the bound. It is called a second time for one position only with another mask, where the room is
        short. With `is_last` it is called wherever a token is missing, and the path goes to the end of the text or of
        the positions. InputError where the grammar exceeds llguidance's limits; the guide is of no use from then on.
        """
        if self.is_over:
            return Walk([], [], {}, 0)
        path = _Path(top, is_sure, pick, bound, is_last, min(len(top), self.room))
        j = 0
        while True:
            yield
            token = self._choose(j, path)
            if token is None:
                token = yield from self._choose_under_mask(j, path)
            if token >= 0:
                self._take(j, token)
                j += 1
                continue
            is_whole = token == _END and self._is_right_from(j, [])
            back = j if is_whole else (yield from self._last_within_room(j))
            if back == j:
                break
            self._turn_back(back, path)
            j = back

        self._length, self._end = j, j if token == _END else None
        return Walk(self._tokens[:j], path.forced, path.overruled, self._end)

    def first_tokens(self) -> np.ndarray:
        """The tokens that may come next, bool [vocab_size]; ends are among them where the committed text may end."""
        mask = self._mask(0)
        if self._places[0].is_accepting:
            mask[self._vocabulary.end_ids] = True
        return mask

    def restart(self, room: int) -> None:
        """Forget the last walk, and begin with another room. Nothing is committed; `room` has a shortest text."""
        self._matcher.rollback(len(self._tokens))
        self.room, self._tokens, self._length, self._end = room, [], 0, None
        del self._places[1:]
        self._places[0].completion, self._places[0].refused = self._shortest, set()

    def commit(self, count: int) -> None:
        """The first `count` tokens of the last walk are final; the next walk begins behind them."""
        if not 0 <= count <= self._length:
            raise ValueError(f"the last walk has {self._length} tokens, of which {count} cannot be committed")
        rest = self._places[self._length].completion if self._end is None else []
        assert rest is not None
        completion = self._tokens[count : self._length] + rest
        if self._is_right is not None:
            self._committed += self._tokens[:count]
        self._unfollowed += self._vocabulary.data(self._tokens[:count])
        self._tokens, self._places = self._tokens[count:], self._places[count:]
        self._places[0].completion, self._places[0].is_stuck = completion, False
        self.is_over = self._end == count
        self.room -= count
        self._length, self._end = 0, None

    # ---- one position of a walk -------------------------------------------------------------------------------------

    def _choose(self, j: int, path: _Path) -> int | None:
        """The token that comes at position j, `_END` or `_STOP`; None where only a mask can tell."""
        place = self._places[j]
        if place.is_done or (place.is_accepting and j == self.room):
            return _END
        if j == path.length:
            return _STOP
        if path.detour:
            return path.force(j, path.detour.pop(0))
        if place.forced and place.forced[0] not in place.refused:
            return path.force(j, place.forced[0])
        top = path.top[j]
        if place.is_accepting and (top in self._vocabulary.ends or top in place.refused):
            return _END
        if top in place.refused and place.completion:
            return path.force(j, place.completion[0])
        if self._may(j, top):
            return path.trust(j, top, path.is_sure[j])
        return None if path.is_settled[j] or path.is_last else _STOP

    def _choose_under_mask(self, j: int, path: _Path) -> Interruptible[int]:
        """The token that comes at position j instead of the model's, `_END` or `_STOP`."""
        place, mask = self._places[j], self._mask(j)
        count = int(np.count_nonzero(mask))
        if count == 1 and not place.is_accepting:
            return path.force(j, int(mask.argmax()))
        if count:
            if place.is_accepting:
                mask[self._vocabulary.end_ids] = True
            token, path.overruled[j] = path.pick(j, mask)
            if not mask[token]:
                raise ValueError(f"pick gave token {token} at position {j}, which the mask does not allow")
            return _END if token in self._vocabulary.ends else path.trust(j, token, path.overruled[j] <= path.bound)
        if place.is_accepting:
            return _END
        if (yield from self._fits(j)) and place.completion:  # every other token leads beyond the room
            return path.force(j, place.completion[0])
        return _STOP

    def _turn_back(self, j: int, path: _Path) -> None:
        """Refuse the token at position j, where the room is short, and take the way of a completion instead."""
        place = self._places[j]
        assert place.completion is not None
        place.refused.add(self._tokens[j])
        path.repairs += 1
        path.detour = place.completion[:] if path.repairs > _REPAIRS else place.completion[:1]
        path.cut(j)

    # ---- the grammar's state ----------------------------------------------------------------------------------------

    def _look(self, forced: list[int]) -> _PathPoint:
        """The matcher's state; `forced` are tokens known to be forced from here on."""
        forced = forced or self._matcher.compute_ff_tokens()
        place = _PathPoint(self._matcher.is_accepting(), self._matcher.is_stopped(), forced)
        if self._matcher.is_error():
            give_up(self._matcher)
        if not self._vocabulary.allows(self._matcher, forced):
            place.forced, place.is_stuck = [], True
        return place

    def _state(self, j: int) -> LLMatcher:
        """A matcher of its own in the state before position j, because a mask without a bit breaks a matcher."""
        matcher = self._matcher.deep_copy()
        matcher.rollback(len(self._tokens) - j)
        return matcher

    def _may(self, j: int, token: int) -> bool:
        """Whether the token may come at position j."""
        if j < len(self._tokens) and self._tokens[j] == token:
            return True
        if token in self._vocabulary.control or not 0 <= token < self._vocabulary.vocab_size:
            return False
        bits = self._places[j].mask
        if bits is not None:
            return bool(bits[token >> 3] >> (token & 7) & 1)
        return bool(self._state(j).validate_tokens([token]) == 1)

    def _mask(self, j: int) -> np.ndarray:
        """The tokens that may come at position j, bool [vocab_size]; the end is none of them."""
        place = self._places[j]
        if place.mask is None:
            place.mask = self._vocabulary.bits(self._state(j))
            self.masks += 1
        mask = self._vocabulary.mask(place.mask)
        mask[list(place.refused)] = False
        return mask

    def _take(self, j: int, token: int) -> None:
        """Put the token at position j; if another one was there, that one and all behind it are forgotten."""
        place = self._places[j]
        if j < len(self._tokens) and self._tokens[j] != token:
            self._matcher.rollback(len(self._tokens) - j)
            del self._tokens[j:], self._places[j + 1 :]
        if j == len(self._tokens):
            count = self._matcher.try_consume_tokens([token])
            # Without an error and without the token, the lexer ran out of fuel: llguidance takes that for a refusal.
            if self._matcher.is_error() or count != 1:
                give_up(self._matcher)
            self._tokens.append(token)
            self._places.append(self._look(place.forced[1:] if place.forced[:1] == [token] else []))
        if place.completion and place.completion[0] == token and self._places[j + 1].completion is None:
            self._places[j + 1].completion, self._places[j + 1].is_stuck = place.completion[1:], False

    # ---- the room ---------------------------------------------------------------------------------------------------

    def _last_within_room(self, j: int) -> Interruptible[int]:
        """The last position up to j from which a completion fits into the room: j, or one that bisection finds."""
        low, high, step = j, j + 1, 1
        while low and not (yield from self._fits(low)):
            low, high, step = max(low - step, 0), low, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if (yield from self._fits(middle)) else (low, middle)
        return low

    def _fits(self, j: int) -> Interruptible[bool]:
        """Whether a completion from position j is known, or can be found, that fits into the room."""
        place, left = self._places[j], self.room - j
        if place.completion is None and not place.is_stuck:
            matcher = self._state(j)
            last = self._last_completion

            def is_right(completion: list[int]) -> bool:
                return self._is_right_from(j, completion)

            if len(last) <= left and self._search.is_completion(matcher, last) and is_right(last):
                place.completion = last
            else:
                trail = yield from self._trail_to(j)
                completing = self._search.completion(matcher, left, left, EFFORT_IN_WALK, trail, is_right)
                place.completion = yield from completing
            place.is_stuck = place.completion is None
            self._last_completion = place.completion or self._last_completion
        return not place.is_stuck

    def _is_right_from(self, j: int, completion: list[int]) -> bool:
        """Whether the text with this completion from position j is right as a whole."""
        return self._is_right is None or self._is_right([*self._committed, *self._tokens[:j], *completion])

    def _trail_to(self, j: int) -> Interruptible[Trail]:
        """How far the text has come along its terminals before position j."""
        if self._unfollowed:
            data, self._unfollowed = self._unfollowed, b""
            self._trail = yield from self._search.trails.after(self._trail, data)
        return (yield from self._search.trails.after(self._trail, self._vocabulary.data(self._tokens[:j])))
