"""The search for short texts that a grammar allows.

Where a text must end within its tokens, its walk asks for a completion of what is there. An automaton of the grammar
would know the shortest one; llguidance has none, so the search tries a greedy path first, then others, within a number
of tries. Inside a terminal the way out is known (`trails`). All of it is `Interruptible` between two calls of the
library.

Deliberately absent: proof. A search that ends without a text does not show that there is none, and the shortest text
that it finds need not be the shortest there is.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sfumato.constraints.interruptible import Interruptible
from sfumato.constraints.trails import Trail, Trails
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import InputError
from sfumato.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

EFFORT, EFFORT_IN_WALK = 100_000, 1_000
"""Tries of a token, about 2 µs each, beyond a search's first path: for a grammar, and within a walk."""
_EFFORT_TO_SHORTEN = 10_000
"""Tries for a shorter text than the first, which is short where the ends of terminals are known."""

_CAPS = (32, 256)
"""Tokens: the depths at which the search tries before it goes to its limit. Most endless loops cost no more."""
_MASK_TRIES = 50
"""The cost of a mask, in tries."""
_WAY_OUT = 400
"""Hints that are tried to find a way out of free text."""
_PIECES = 200
"""Words and marks of a pattern that become hints."""
_HINTS = 16
_SHORT_END, _LONG_END = 64, 1_000_000
"""Characters of a terminal's end that is taken at first, and later: instead of a long one, greed often finds fewer
tokens."""
_ENDS_KEPT = 200
_LONGEST_TOKEN = 32
"""Characters of a token, at most, for an estimate."""
_ALTERNATIVES = 8
"""Other tokens that are tried at one position of a path, beside the hints."""


Accepts = Callable[[list[int]], bool]
"""Whether tokens are right as a completion, beyond what the grammar says."""


@dataclass
class _Effort:
    """Tries that are left; below 0 the search ends."""

    left: int
    enough: int = 0
    """Tokens of a completion with which it ends."""
    is_right: Accepts | None = None
    """What is asked of a completion beside the grammar."""
    best: list[int] | None = None
    """The shortest completion so far."""

    def takes(self, path: list[int]) -> bool:
        """Whether these tokens, which the grammar allows as a completion, are one."""
        return self.is_right is None or self.is_right(path)


@dataclass(frozen=True)
class _Round:
    """One way to search."""

    longest: int
    """Characters of the ends of terminals that are taken."""
    must_lead_out: bool
    """Only such ends are taken behind which the text, or its string, may end."""
    cap: int
    """Tokens within which it searches."""
    is_greedy: bool = False
    """Where its first path ends without a text, no other is tried."""


_Branch = tuple[int, int, int, list[int], list[int]]


class Search:
    """Looks for short texts of one grammar.

    `source` is the grammar, `text` the text of its patterns. Its tokens, and a few that stand for whole classes, are
    the hints: where nearly everything is allowed, and no terminal is understood, the next tokens are likely to be among
    them. In JSON (`is_json`) a quote ends a string; elsewhere the control tokens that the grammar names do.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Tokenizer, source: str, text: str, is_json: bool) -> None:
        self.trails = Trails(source)
        self._to_shorten = _EFFORT_TO_SHORTEN if len(self.trails) else EFFORT
        self._encode = tokenizer.encode
        self._ends: dict[str, list[int]] = {}  # of terminals, and their tokens
        pieces = re.findall(r"[^\W_]+|[\W_]", text)[:_PIECES]
        texts = ["a", "1", "A", *pieces] if pieces else []
        hints = dict.fromkeys(token for piece in dict.fromkeys(texts) for token in tokenizer.encode(piece)[:4])
        self._vocabulary = vocabulary
        self._source = [tokenizer.encode(piece) for piece in pieces]
        self._hints = [token for token in hints if token not in vocabulary.control][:_HINTS]
        self._quotes = vocabulary.quotes if is_json else vocabulary.named

    def is_completion(self, matcher: LLMatcher, tokens: list[int]) -> bool:
        """Whether these tokens complete the text behind the matcher's state."""
        if matcher.validate_tokens(tokens) < len(tokens):
            return False
        matcher = matcher.deep_copy()
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    def completion(
        self,
        matcher: LLMatcher,
        limit: int,
        enough: int,
        effort: int,
        trail: Trail | None = None,
        is_right: Accepts | None = None,
    ) -> Interruptible[list[int] | None]:
        """At most `limit` tokens that complete the text, which has come along this trail, and that are right.

        The search ends with the first completion of at most `enough` tokens, else it returns its shortest. None where
        it finds nothing, which does not prove that there is nothing. `effort` is about the number of tries of a token
        that it may take beyond the first path, which may take ten times as many.
        """
        trail = trail or self.trails.begin
        caps = sorted({min(limit, first) for first in (*_CAPS, limit)})
        ways = [(_SHORT_END, True), (_LONG_END, True), (_LONG_END, False)]
        if not len(self.trails):
            rounds = [_Round(*ways[-1], cap) for cap in caps]
        elif enough < limit:  # in each way greed first: where it finds a text, others are tried only to shorten that
            rounds = [_Round(*way, cap, is_greedy) for cap in caps for is_greedy in (True, False) for way in ways]
        else:  # any will do: the ends of terminals first, then greed, and all of it within one effort
            rounds = [_Round(_LONG_END, True, limit, True), _Round(0, True, limit, True)]
            rounds += [_Round(*ways[-1], cap) for cap in caps]
        whole = _Effort(2 * effort, enough, is_right)
        for one in rounds:
            left = _Effort(effort, enough, is_right) if enough < limit else whole
            if (path := (yield from self._search(matcher, left, one, trail))) is not None:
                return path
        return None

    def _search(
        self, matcher: LLMatcher, effort: _Effort, way: _Round, trail: Trail
    ) -> Interruptible[list[int] | None]:
        """A greedy path; then other choices along it, the earliest first, and then along the paths that these lead to.

        Only shorter paths than the best so far count. An InputError that is thrown in, as that a caller's time is up,
        ends the search with the best so far.
        """
        first = effort if effort.enough >= way.cap else _Effort(10 * effort.left)
        path, choices, is_complete = yield from self._descend(matcher.deep_copy(), [], way.cap, first, way, trail)
        if is_complete and effort.takes(path):
            effort.best, effort.left = path, min(effort.left, self._to_shorten)
        elif way.is_greedy:
            return None
        # A heap of (number of other choices so far, position of the next one, order of entry, path, its choices).
        branches: list[_Branch] = [(0, at, 0, path, choices) for at in choices]
        try:
            yield from self._try_others(matcher, branches, effort, way, trail)
        except InputError:  # the library cannot follow so many ways
            if effort.best is None:
                raise
        return effort.best

    def _try_others(
        self, matcher: LLMatcher, branches: list[_Branch], effort: _Effort, way: _Round, trail: Trail
    ) -> Interruptible[None]:
        """Other choices along the paths of these branches."""
        tried: set[tuple[int, ...]] = set()
        while branches and effort.left > 0 and (effort.best is None or len(effort.best) > effort.enough):
            depth, at, _, path, choices = heapq.heappop(branches)
            most = way.cap if effort.best is None else len(effort.best) - 1
            if at >= most:
                continue
            before = path[:at]
            state = matcher.deep_copy()
            state.try_consume_tokens(before)
            effort.left -= _MASK_TRIES
            for token in self._alternatives(state):
                yield
                key = (*before, token)
                branch = state.deep_copy()
                if effort.left < 0 or key in tried or branch.try_consume_tokens([token]) != 1:
                    continue
                tried.add(key)
                new, new_choices, is_complete = yield from self._descend(branch, list(key), most, effort, way, trail)
                if is_complete and effort.takes(new):
                    effort.best, effort.left = new, min(effort.left, self._to_shorten)
                    choices = [other for other in choices if other <= at] + new_choices
                    for other in choices:
                        heapq.heappush(branches, (0, other, len(tried), new, choices))
                    break
                for other in new_choices:
                    heapq.heappush(branches, (depth + 1, other, len(tried), new, new_choices))

    def _descend(
        self, matcher: LLMatcher, before: list[int], cap: int, effort: _Effort, way: _Round, trail: Trail
    ) -> Interruptible[tuple[list[int], list[int], bool]]:
        """A greedy path from the matcher's state, which is the one behind `before`, which is behind the trail.

        It ends where the text may end. Else it takes what is forced, else what closes, else the end of a terminal, else
        the way out of free text, else the same token again or the one of most worth. Returns all tokens, the positions
        with a choice, and whether the text is complete.
        """
        vocabulary = self._vocabulary
        tokens = before[:]
        choices: list[int] = []
        again: list[int] = []
        count = 0  # tokens that the trail has
        used: Counter[int] = Counter()  # of worth so far: the way out of a loop is a token that is not in it
        while not matcher.is_accepting():
            yield
            if len(tokens) >= cap or effort.left < 0:
                return tokens, choices, False
            if forced := matcher.compute_ff_tokens():
                if not vocabulary.allows(matcher, forced) or matcher.try_consume_tokens(forced) < len(forced):
                    return tokens, choices, False
                tokens += forced
                continue
            choices.append(len(tokens))
            effort.left -= 10
            is_free = vocabulary.is_free(matcher)
            closers = self._quotes if is_free else self._quotes + vocabulary.brackets
            token = next((t for t in (*closers, *again) if matcher.try_consume_tokens([t])), None)
            if token is not None:
                tokens.append(token)
                again = again if [token] == again else []
                continue
            trail, count = (yield from self.trails.after(trail, vocabulary.data(tokens[count:]))), len(tokens)
            effort.left -= 10 + len(self.trails)
            out: list[int] = []
            if is_free and not again and not (len(self.trails) and way.must_lead_out):
                out = yield from self._way_out(matcher, effort)
            if not out:
                out = yield from self._end_of_terminal(matcher, cap - len(tokens), effort, way, trail)
            if out:
                matcher.try_consume_tokens(out)
                tokens += out
            else:
                effort.left -= _MASK_TRIES
                mask = vocabulary.mask(vocabulary.bits(matcher.deep_copy()))
                worth = (vocabulary.worth * mask).astype(np.float32)
                if used and not is_free:
                    worth[list(used)] /= 1.0 + np.array(list(used.values()))
                token = int(worth.argmax())
                used[token] += 1
                if not worth[token] or not matcher.try_consume_tokens([token]):
                    return tokens, choices, False
                tokens.append(token)
                again = [token] if is_free else []
        return tokens, choices, len(tokens) <= cap

    def _end_of_terminal(
        self, matcher: LLMatcher, room: int, effort: _Effort, way: _Round, trail: Trail
    ) -> Interruptible[list[int]]:
        """The tokens of the shortest end of a terminal behind which the text may leave it; [] where there is none."""
        for text in (yield from self.trails.ends(trail)) if way.longest else []:
            if len(text) > min(way.longest, _LONGEST_TOKEN * room):
                break
            yield
            if (tokens := self._ends.get(text)) is None:
                if len(self._ends) >= _ENDS_KEPT:
                    self._ends.clear()
                tokens = self._ends[text] = self._encode(text)
            effort.left -= 5 + len(tokens)
            if len(tokens) > room or matcher.validate_tokens(tokens) < len(tokens):
                continue
            new = matcher.deep_copy()
            new.try_consume_tokens(tokens)
            if not way.must_lead_out or new.is_accepting() or self._closes(new):
                return tokens
        return []

    def _way_out(self, matcher: LLMatcher, effort: _Effort) -> Interruptible[list[int]]:
        """Tokens that lead from free text to its end, its quote or text that is not free; [] where none are known.

        The fewest hints come first; else the pieces of the source in their order, with a letter, a digit or a capital
        before a piece that may not come alone.
        """
        level: list[tuple[LLMatcher, list[int]]] = [(matcher, [])]
        left = _WAY_OUT
        while level and left > 0:
            below = []
            for state, tokens in level:
                for hint in self._hints:
                    yield
                    left -= 1
                    effort.left -= 1
                    new = state.deep_copy()
                    if new.try_consume_tokens([hint]):
                        if self._is_out(new):
                            return [*tokens, hint]
                        below.append((new, [*tokens, hint]))
            level = below
        state, path = matcher.deep_copy(), list[int]()
        for piece in self._source:
            yield
            effort.left -= 2
            for tokens in (piece, *([hint, *piece] for hint in self._hints[:3])):
                if state.validate_tokens(tokens) == len(tokens):
                    state.try_consume_tokens(tokens)
                    path += tokens
                    if self._is_out(state):
                        return path
                    break
        return []

    def _is_out(self, matcher: LLMatcher) -> bool:
        return self._closes(matcher) or bool(matcher.is_accepting()) or not self._vocabulary.is_free(matcher)

    def _closes(self, matcher: LLMatcher) -> bool:
        return any(matcher.validate_tokens([token]) for token in self._quotes)

    def _alternatives(self, matcher: LLMatcher) -> list[int]:
        """Tokens to try next: the hints, and those of most worth, each with another first byte."""
        vocabulary = self._vocabulary
        allowed = np.flatnonzero(vocabulary.mask(vocabulary.bits(matcher.deep_copy())))
        allowed = allowed[np.argsort(-vocabulary.worth[allowed], kind="stable")]
        firsts = np.unique(vocabulary.first[allowed], return_index=True)[1]
        return [*self._hints, *(int(token) for token in allowed[np.sort(firsts)[:_ALTERNATIVES]])]
