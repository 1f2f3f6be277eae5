"""A tokenizer as llguidance sees it, and the search for short texts that a grammar allows.

Where a text must end within its tokens, its walk asks for a completion from where it stands. An automaton of the
grammar would know the shortest; llguidance has none, so a greedy way down is tried, then others, within a number of
tries. All of it is `Work`, which can be left between two calls of the library.
"""

from __future__ import annotations

import copy
import heapq
import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from sfumato.constraints.forms import llguidance
from sfumato.errors import InputError
from sfumato.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

EFFORT, EFFORT_IN_WALK = 100_000, 1_000
"""Tries of a token, about 2 µs each, beyond a search's first way down: for a grammar, and within a walk."""

_CAPS = (32, 256)  # tokens that a search goes deep before it goes to its limit: most loops without an end cost no more
_MASK_TRIES = 50  # what a mask costs, in tries
_WAY_OUT = 400  # hints tried to find a way out of free text
_PIECES = 200  # words and marks taken from a pattern
_HINTS = 16
_ALTERNATIVES = 8  # other ways tried at one point of a way

T = TypeVar("T")

Work = Generator[None, None, T]
"""What can be left for a while wherever it yields, which is between any two calls of the library."""


def finish(work: Work[T]) -> T:
    """What it returns, at once."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


class Words:
    """A tokenizer as llguidance sees it, and what a search for the shortest text needs to know of its tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._library = llguidance()
        source = tokenizer.to_json()
        self.key = sha256(f"{vocab_size} {sorted(ends)} {source}".encode()).hexdigest()
        self._inner = self._library.LLTokenizer(source, vocab_size, next(iter(ends), None))
        self._limits = self._library.LLParserLimits(verbose_errors=False)
        self.vocab_size = vocab_size
        self.ends = frozenset(ends)
        self.end_ids = sorted(self.ends)
        self.control = tokenizer.special_ids | self.ends
        texts = [b"" if i in self.control else self._inner.decode_bytes([i]) for i in range(vocab_size)]
        self._is_plain = np.array([i not in self.control for i in range(vocab_size)])
        self.worth = np.array([_worth(text) for text in texts], np.int16)
        self.first = np.array([text[0] if text else 0 for text in texts], np.uint8)
        closers = [i for i, text in enumerate(texts) if text and not text.strip(b'"}])')]
        closers.sort(key=lambda i: -len(texts[i]))
        self.quotes = [i for i in closers if b'"' in texts[i]]
        self.brackets = [i for i in closers if b'"' not in texts[i]]
        self.named: list[int] = []  # control tokens that may come where the grammar has them, closing ones first
        self._probe = tokenizer.encode("q")[:1]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Words:
        """Made once for a tokenizer and a model; it takes seconds for a large vocabulary."""
        made = _MADE.setdefault(tokenizer, {})
        key = (vocab_size, *ends)
        if key not in made:
            made[key] = cls(tokenizer, vocab_size, ends)
        return made[key]

    def naming(self, tokenizer: Tokenizer, lark: str) -> Words:
        """The same for a grammar that names control tokens by their text: these may come, an end aside."""
        named = {i for i in self.control - self.ends if (tokenizer.token(i) or "<>") in lark}
        if not named:
            return self
        made = copy.copy(self)
        made.named = sorted(named, reverse=True)
        made.control = self.control - named
        made._is_plain = self._is_plain.copy()
        made._is_plain[made.named] = True
        return made

    def are_said(self, matcher: LLMatcher, forced: list[int]) -> bool:
        """Whether forced tokens hold no control token but those that the grammar names, and these where it does: where
        its text merely spells one, llguidance forces the token itself, and would not take it."""
        if not self.control.isdisjoint(forced):
            return False
        return set(self.named).isdisjoint(forced) or matcher.validate_tokens(forced) == len(forced)

    def matcher(self, source: str, what: str = "the constraint") -> LLMatcher:
        """At the beginning of a text; InputError where the source is no grammar."""
        matcher = self._library.LLMatcher(self._inner, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InputError(f"{what} cannot be used: {_sentence(matcher.get_error())}")
        return matcher

    def bits(self, matcher: LLMatcher) -> bytes:
        """What may come next, the end aside; no bit where nothing may, which breaks the matcher."""
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            if not matcher.get_error().startswith("NoExtension"):
                give_up(matcher)
            return bytes(len(bits))
        return bits

    def is_free(self, matcher: LLMatcher) -> bool:
        """Whether text may go on in words: a q may come, which no JSON outside strings has."""
        return matcher.validate_tokens(self._probe) == 1

    def mask(self, bits: bytes) -> np.ndarray:
        """Bits as bool [vocab_size], ends cleared, and control tokens but the named."""
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.vocab_size, bitorder="little").view(np.bool_)
        mask &= self._is_plain
        return mask


_MADE: WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], Words]] = WeakKeyDictionary()


@dataclass
class _Effort:
    left: int


class Search:
    """Looks for short texts of one grammar. `hints` are tokens that its source speaks of, and a few for whole classes:
    where nearly everything is allowed, the way on is likely to be made of them. In JSON a quote ends a string."""

    def __init__(self, words: Words, tokenizer: Tokenizer, text: str, is_json: bool) -> None:
        pieces = re.findall(r"[^\W_]+|[\W_]", text)[:_PIECES]
        known = ["a", "1", "A", *pieces] if pieces else []
        hints = dict.fromkeys(token for piece in dict.fromkeys(known) for token in tokenizer.encode(piece)[:4])
        self._words = words
        self._source = [tokenizer.encode(piece) for piece in pieces]
        self._hints = [token for token in hints if token not in words.control][:_HINTS]
        self._quotes = words.quotes if is_json else words.named

    def is_completion(self, matcher: LLMatcher, tokens: list[int]) -> bool:
        """Whether these tokens complete the text."""
        if matcher.validate_tokens(tokens) < len(tokens):
            return False
        matcher = matcher.deep_copy()
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def completion(self, matcher: LLMatcher, limit: int, wanted: int, effort: int) -> Work[list[int] | None]:
        """At most `limit` tokens that complete the text: the first found of at most `wanted`, else the shortest found.

        None where nothing was found, which does not prove that there is nothing. `effort` is the number of tries of a
        token, about, that it may take beyond the first way down, which may take ten times as many.
        """
        for cap in sorted({min(limit, first) for first in (*_CAPS, limit)}):
            if (way := (yield from self._search(matcher, cap, wanted, _Effort(effort)))) is not None:
                return way
        return None

    def _search(self, matcher: LLMatcher, cap: int, wanted: int, effort: _Effort) -> Work[list[int] | None]:
        """A greedy way down; then other choices on it, the first first, and then on the ways these led to. A shorter
        way takes the place of the best."""
        best: list[int] | None = None
        way, choices, is_complete = yield from self._descend(matcher.deep_copy(), [], cap, _Effort(10 * effort.left))
        if is_complete:
            best = way
        open_ = [(0, at, 0, way, choices) for at in choices]  # (other choices made, where to make the next, …): a heap
        tried: set[tuple[int, ...]] = set()
        while open_ and effort.left > 0 and (best is None or len(best) > wanted):
            turns, at, _, way, choices = heapq.heappop(open_)
            most = cap if best is None else len(best) - 1
            if at >= most:
                continue
            before = way[:at]
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
                new, new_choices, is_complete = yield from self._descend(branch, list(key), most, effort)
                if is_complete:
                    best = new
                    choices = [other for other in choices if other <= at] + new_choices
                    for other in choices:
                        heapq.heappush(open_, (0, other, len(tried), new, choices))
                    break
                for other in new_choices:
                    heapq.heappush(open_, (turns + 1, other, len(tried), new, new_choices))
        return best

    def _descend(
        self, matcher: LLMatcher, before: list[int], cap: int, effort: _Effort
    ) -> Work[tuple[list[int], list[int], bool]]:
        """From the state behind `before`: end where the text may end; else what is forced, else what closes, else the
        way out of free text, else the same word again or the worthiest. Returns all tokens, the positions with a
        choice, and whether the text is complete."""
        words = self._words
        tokens = before[:]
        choices: list[int] = []
        again: list[int] = []
        used: Counter[int] = Counter()  # a loop is left by what it is not made of
        while not matcher.is_accepting():
            yield
            if len(tokens) >= cap or effort.left < 0:
                return tokens, choices, False
            if forced := matcher.compute_ff_tokens():
                if not words.are_said(matcher, forced) or matcher.try_consume_tokens(forced) < len(forced):
                    return tokens, choices, False
                tokens += forced
                continue
            choices.append(len(tokens))
            effort.left -= 10
            is_free = words.is_free(matcher)
            closers = self._quotes if is_free else self._quotes + words.brackets
            token = next((t for t in (*closers, *again) if matcher.try_consume_tokens([t])), None)
            if token is not None:
                tokens.append(token)
                again = again if [token] == again else []
            elif is_free and not again and (out := (yield from self._way_out(matcher, effort))):
                matcher.try_consume_tokens(out)
                tokens += out
            else:
                effort.left -= _MASK_TRIES
                worth = (words.worth * words.mask(words.bits(matcher.deep_copy()))).astype(np.float32)
                if used and not is_free:
                    worth[list(used)] /= 1.0 + np.array(list(used.values()))
                token = int(worth.argmax())
                used[token] += 1
                if not worth[token] or not matcher.try_consume_tokens([token]):
                    return tokens, choices, False
                tokens.append(token)
                again = [token] if is_free else []
        return tokens, choices, len(tokens) <= cap

    def _way_out(self, matcher: LLMatcher, effort: _Effort) -> Work[list[int]]:
        """Tokens that lead from free text to its end, its quote or what is not free: the fewest hints, else along the
        source, with a letter, a digit or a capital where its next piece may not come. [] if neither leads there."""
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
        state, way = matcher.deep_copy(), []
        for piece in self._source:
            yield
            effort.left -= 2
            for tokens in (piece, *([hint, *piece] for hint in self._hints[:3])):
                if state.validate_tokens(tokens) == len(tokens):
                    state.try_consume_tokens(tokens)
                    way += tokens
                    if self._is_out(state):
                        return way
                    break
        return []

    def _is_out(self, matcher: LLMatcher) -> bool:
        closes = any(matcher.validate_tokens([token]) for token in self._quotes)
        return closes or matcher.is_accepting() or not self._words.is_free(matcher)

    def _alternatives(self, matcher: LLMatcher) -> list[int]:
        """Tokens that may come next: the hints, and the worthiest, each of those with another first byte."""
        words = self._words
        allowed = np.flatnonzero(words.mask(words.bits(matcher.deep_copy())))
        allowed = allowed[np.argsort(-words.worth[allowed], kind="stable")]
        firsts = np.unique(words.first[allowed], return_index=True)[1]
        return [*self._hints, *(int(token) for token in allowed[np.sort(firsts)[:_ALTERNATIVES]])]


def _worth(text: bytes) -> int:
    """How gladly the search takes a token: a long one, but nothing that opens, no blanks, and rather 1 than 0."""
    if not text:
        return 0
    if any(mark in text for mark in b"{[(") or not text.strip():
        return 1
    return 2 * len(text) + (2 if text.strip(b"0") else 0)


def give_up(matcher: LLMatcher) -> NoReturn:
    why = _sentence(matcher.get_error()) if matcher.is_error() else "its automaton grows too fast"
    raise InputError(f"the constraint is too complex to follow: {why}; make it simpler")


def _sentence(error: str) -> str:
    """The line of llguidance's report that says what is wrong."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if line.startswith("oneOf"):
        return "the schemas of a oneOf may overlap, and only disjoint ones are supported; use anyOf"
    return line[:300] or "llguidance gives no reason"
