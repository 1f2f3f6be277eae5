"""Text that must have a form: JSON Schema, regular expression, Lark grammar, or one of a list of choices.

A canvas is denoised as a whole, so a constraint cannot wait for one token after the other. At each step a `Guide` walks
the slot from left to right along the model's argmax tokens: what the grammar forces is free, what the model wants is
checked (a few microseconds), and only where the model errs behind positions that are settled does the walk ask for a
mask. The walk ends where more would be built on a guess. What it knows of a position is kept for the next step.

**Room.** A text must end within its tokens. Every path that a walk returns can be completed within the room: a
completion is found by greedy search, and where none is short enough the walk goes back and takes the completion's way.

A schema's JSON is written on one line with ", " and ": ", as `json.dumps` does it: no other white space between tokens,
so nothing can write it endlessly and nearly all of the scaffold is forced. Object keys come in the schema's order.

**Hostile until checked.** A grammar is compiled first in a child process (`confined`), on a small stack, where its
shortest text is searched for: what crashes, takes too long or too much memory there is refused. What llguidance keeps
of a grammar is shared by all copies of a matcher, and one that exceeds its limits is of no use from then on; so every
guide compiles its own, and what becomes of one text says nothing of another's. A walk is `Work`: it can be left between
two calls of the library, so that a slow one need not hold up others.

The grammars are llguidance's, an optional package, imported when the first grammar is compiled. Deliberately absent:
control tokens inside a text, except those that a Lark grammar names by their text and where it does; remote `$ref`;
and schema keywords that llguidance would ignore.
"""

from __future__ import annotations

import copy
import heapq
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from sfumato import confined
from sfumato.events import CapacityError, InputError
from sfumato.forms import llguidance, source_of
from sfumato.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_SHORTEST = 8192
"""Tokens within which a grammar must have a text."""
STACK = 4 << 20
"""Bytes of stack on which a grammar must compile: less than any thread here has."""
CHILDREN = confined.Pool(nice=19)
"""Who tries grammars. They step aside for the engine's threads, of which one that has lost its core holds up all."""
TOKENIZERS_KEPT = 2
"""That a child process keeps."""
TOKENIZER_SECONDS, TOKENIZER_MEMORY = 30.0, 4 << 30
"""What a child may take for one: Gemma's, of a quarter of a million tokens, takes three seconds and half a gigabyte."""

_CAPS = (32, 256)  # tokens that a search goes deep before it goes to its limit: most loops without an end cost no more
_EFFORT, _EFFORT_IN_WALK = 100_000, 1_000  # tries of a token, about 2 µs each, beyond a search's first way down
_MASK_TRIES = 50  # what a mask costs, in tries
_WAY_OUT = 400  # hints tried to find a way out of free text
_PIECES = 200  # words and marks taken from a pattern
_HINTS = 16
_ALTERNATIVES = 8  # other ways tried at one point of a way
_REPAIRS = 4  # times that a walk may go back for the room before it takes a completion to its end

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


Pick = Callable[[int, np.ndarray], tuple[int, float]]
"""(position, mask: bool [vocab_size]) -> (a token of the mask, entropy in nats under the mask)."""


@dataclass(frozen=True)
class Walk:
    """The way that a slot takes at one step; positions count from the slot's first in this canvas."""

    tokens: list[int]
    """A path the grammar allows; each of its prefixes can be completed within the room."""
    forced: list[int]
    """Positions whose token follows from those before: from the grammar, or because the room is short."""
    overruled: dict[int, float]
    """Position -> entropy in nats under the mask, where the model's own token was not allowed. The position `end` is
    among them where it was the pick that ended the text."""
    end: int | None
    """The number of tokens at which the text is complete (`len(tokens)`); None while it is not."""


class Grammar:
    """A compiled constraint; it holds no state of a text, and many guides may use it."""

    def __init__(self, words: _Words, search: _Search, source: str, shortest: list[int]) -> None:
        self._words = words
        self._search = search
        self._source = source
        self._shortest = shortest

    @classmethod
    def compile(cls, kind: str, value: Any, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Grammar:
        """The grammar of a schema (a dict, a bool, or JSON text of one), a regex (text, to match as a whole), a Lark
        grammar (text) or choices (list of texts).

        `vocab_size` is the model's, the length of masks; `ends` are the token ids that end a text. Whatever is wrong
        with the value is an InputError of one sentence. The first grammar of a tokenizer takes a second or two.
        """
        source, hints = source_of(kind, value)
        words = _Words.of(tokenizer, vocab_size, ends)
        lark = value if kind == "grammar" else ""
        shortest = _probed(words, tokenizer, (kind, source, hints, lark))
        words = words.naming(tokenizer, lark)
        return cls(words, _Search(words, tokenizer, hints, kind == "schema"), source, shortest)

    def shortest(self) -> int:
        """Tokens of the shortest valid text that was found, the end not counted."""
        return len(self._shortest)

    def start(self, room: int) -> Guide:
        """A guide for one text of at most `room` tokens, the end not counted; CapacityError if that is too few."""
        if room < len(self._shortest):
            raise CapacityError(
                f"the constraint needs at least {len(self._shortest)} tokens and has room for {room}; "
                "raise max_tokens or ask for less"
            )
        return Guide(self._words, self._search, self._words.matcher(self._source), self._shortest, room)


Terms = tuple[str, str, str, str]
"""Of a grammar: its kind, source and hints, and its text where that is Lark's."""


def _probed(words: _Words, tokenizer: Tokenizer, terms: Terms) -> list[int]:
    """The shortest text of a grammar, found in a child process."""
    size, ends = words.vocab_size, sorted(words.ends)
    with CHILDREN.child(f"the {terms[0]}") as child:
        shortest = child.run(_shortest_text, words.key, terms, stack=STACK)
        if shortest is None:  # it does not have this tokenizer
            child.run(
                _learn, words.key, tokenizer.to_json(), size, ends, seconds=TOKENIZER_SECONDS, memory=TOKENIZER_MEMORY
            )
            shortest = child.run(_shortest_text, words.key, terms, stack=STACK)
    if not isinstance(shortest, list):
        raise InputError(f"the {terms[0]} could not be read; send the request again")
    return shortest


_learnt: dict[str, tuple[Tokenizer, _Words]] = {}  # of a child process


def _learn(key: str, tokenizer_json: str, vocab_size: int, ends: list[int]) -> None:
    while len(_learnt) >= TOKENIZERS_KEPT:
        _learnt.pop(next(iter(_learnt)))
    tokenizer = Tokenizer.from_json(tokenizer_json)
    _learnt[key] = tokenizer, _Words.of(tokenizer, vocab_size, ends)


def _shortest_text(key: str, terms: Terms) -> list[int] | None:
    """The fewest tokens found that a grammar allows; None where the tokenizer is not known here. InputError for what is
    no grammar or has no text."""
    if key not in _learnt:
        return None
    kind, source, hints, lark = terms
    tokenizer, words = _learnt[key]
    words = words.naming(tokenizer, lark)
    matcher = words.matcher(source)
    search = _Search(words, tokenizer, hints, kind == "schema")
    shortest = finish(search.completion(matcher, MAX_SHORTEST, 0, _EFFORT))
    if shortest is None:
        raise InputError(
            f"no text of at most {MAX_SHORTEST} tokens was found that the {kind} allows; "
            "see that it is satisfiable and asks for less"
        )
    return shortest


@dataclass
class _Place:
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
    """No such completion was found."""
    refused: set[int] = field(default_factory=set)
    """Tokens behind which the text would not be completed within the room; from here it is, if any is refused."""


class Guide:
    """One text under way: what is committed of it, and the path that its canvas takes now.

    `room` is the number of tokens still allowed behind what is committed, `is_over` says that the committed text is
    complete, and `masks` counts the masks computed so far.
    """

    def __init__(self, words: _Words, search: _Search, matcher: LLMatcher, completion: list[int], room: int) -> None:
        self.room = room
        self.is_over = False
        self.masks = 0
        self._words = words
        self._search = search
        self._matcher = matcher  # in the state behind self._tokens
        self._tokens: list[int] = []  # the last path, and what an earlier path had behind it
        self._places = [self._look([])]  # one more than tokens
        self._places[0].completion = self._known = completion
        self._length = 0  # of the last path
        self._end: int | None = None

    def walk(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Walk:
        """`walking`, at once."""
        return finish(self.walking(top, is_sure, pick, bound, is_last))

    def walking(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Work[Walk]:
        """The path for the model's argmax tokens `top`, one for each position of the slot in this canvas.

        `is_sure` says whose entropy is low enough to be accepted; `bound` is the same for an entropy under a mask, in
        nats. `pick` is asked where the model's token is not allowed and all before it is settled: sure, forced, or
        picked within the bound; a second time for one position only with another mask, where the room is short. With
        `is_last` it is asked wherever it must be, and the path goes to the end of the text or of the positions.
        InputError where the grammar exceeds llguidance's limits; the guide is of no use from then on.
        """
        if self.is_over:
            return Walk([], [], {}, 0)
        ends, length = self._words.ends, min(len(top), self.room)
        forced: list[int] = []
        overruled: dict[int, float] = {}
        is_settled = [True]  # before each position
        detour: list[int] = []  # tokens of a completion that are taken next, where the room is short
        j, repairs = 0, 0
        while True:
            yield
            place = self._places[j]
            token, end, is_sure_here = None, None, True
            if place.is_done or (place.is_accepting and j == self.room):
                end = j
            elif j == length:
                pass
            elif detour:
                token = detour.pop(0)
                forced.append(j)
            elif place.forced and place.forced[0] not in place.refused:
                token = place.forced[0]
                forced.append(j)
            elif place.is_accepting and (top[j] in ends or top[j] in place.refused):
                end = j
            elif top[j] in place.refused and place.completion:
                token = place.completion[0]
                forced.append(j)
            elif self._may(j, top[j]):
                token, is_sure_here = top[j], is_sure[j]
            elif is_settled[j] or is_last:
                mask = self._mask(j)
                count = int(np.count_nonzero(mask))
                if count == 1 and not place.is_accepting:
                    token = int(mask.argmax())
                    forced.append(j)
                elif count:
                    if place.is_accepting:
                        mask[self._words.end_ids] = True
                    token, overruled[j] = pick(j, mask)
                    if not mask[token]:
                        raise ValueError(f"pick gave token {token} at position {j}, which the mask does not allow")
                    is_sure_here = overruled[j] <= bound
                    if token in ends:
                        token, end = None, j
                elif place.is_accepting:
                    end = j
                elif (yield from self._fits(j)) and place.completion:  # every other token leads too far
                    token = place.completion[0]
                    forced.append(j)
            if token is not None:
                self._take(j, token)
                is_settled.append(is_settled[j] and is_sure_here)
                j += 1
                continue

            back = j if end is not None else (yield from self._last_within_room(j))
            if back == j:
                break
            place = self._places[back]
            assert place.completion is not None
            place.refused.add(self._tokens[back])
            repairs += 1
            detour = place.completion[:] if repairs > _REPAIRS else place.completion[:1]
            forced = [i for i in forced if i < back]
            overruled = {i: entropy for i, entropy in overruled.items() if i < back}
            del is_settled[back + 1 :]
            j = back

        self._length, self._end = j, end
        return Walk(self._tokens[:j], forced, overruled, end)

    def commit(self, count: int) -> None:
        """The first `count` tokens of the last walk are final; the next walk begins behind them."""
        if not 0 <= count <= self._length:
            raise ValueError(f"the last walk has {self._length} tokens, of which {count} cannot be committed")
        rest = self._places[self._length].completion if self._end is None else []
        assert rest is not None
        completion = self._tokens[count : self._length] + rest
        self._tokens, self._places = self._tokens[count:], self._places[count:]
        self._places[0].completion, self._places[0].is_stuck = completion, False
        self.is_over = self._end == count
        self.room -= count
        self._length, self._end = 0, None

    def _look(self, forced: list[int]) -> _Place:
        """The matcher's state; `forced` are tokens known to be forced from here on."""
        forced = forced or self._matcher.compute_ff_tokens()
        place = _Place(self._matcher.is_accepting(), self._matcher.is_stopped(), forced)
        if self._matcher.is_error():
            _give_up(self._matcher)
        if not self._words.are_said(self._matcher, forced):
            place.forced, place.is_stuck = [], True
        return place

    def _state(self, j: int) -> LLMatcher:
        """A matcher in the state before position j, to do with as one likes: a mask without a bit breaks it."""
        matcher = self._matcher.deep_copy()
        matcher.rollback(len(self._tokens) - j)
        return matcher

    def _may(self, j: int, token: int) -> bool:
        """Whether the token may come at position j."""
        if j < len(self._tokens) and self._tokens[j] == token:
            return True
        if token in self._words.control or not 0 <= token < self._words.vocab_size:
            return False
        bits = self._places[j].mask
        if bits is not None:
            return bool(bits[token >> 3] >> (token & 7) & 1)
        return self._state(j).validate_tokens([token]) == 1

    def _mask(self, j: int) -> np.ndarray:
        """The tokens that may come at position j, bool [vocab_size]; the end is none of them."""
        place = self._places[j]
        if place.mask is None:
            place.mask = self._words.bits(self._state(j))
            self.masks += 1
        mask = self._words.mask(place.mask)
        mask[list(place.refused)] = False
        return mask

    def _take(self, j: int, token: int) -> None:
        """The token comes at position j: what was there and behind it is forgotten if it was another."""
        place = self._places[j]
        if j < len(self._tokens) and self._tokens[j] != token:
            self._matcher.rollback(len(self._tokens) - j)
            del self._tokens[j:], self._places[j + 1 :]
        if j == len(self._tokens):
            taken = self._matcher.try_consume_tokens([token])
            if self._matcher.is_error():
                _give_up(self._matcher)
            if taken != 1:  # the lexer ran out of fuel on the way, which llguidance takes for a refusal
                _give_up(self._matcher)
            self._tokens.append(token)
            self._places.append(self._look(place.forced[1:] if place.forced[:1] == [token] else []))
        if place.completion and place.completion[0] == token and self._places[j + 1].completion is None:
            self._places[j + 1].completion, self._places[j + 1].is_stuck = place.completion[1:], False

    def _last_within_room(self, j: int) -> Work[int]:
        """The last position up to j from which a completion fits into the room: j, or found by halving."""
        low, high, step = j, j + 1, 1
        while low and not (yield from self._fits(low)):
            low, high, step = max(low - step, 0), low, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if (yield from self._fits(middle)) else (low, middle)
        return low

    def _fits(self, j: int) -> Work[bool]:
        """Whether a completion from position j that fits into the room is known or found."""
        place, left = self._places[j], self.room - j
        if place.completion is None and not place.is_stuck:
            matcher = self._state(j)
            if len(self._known) <= left and self._search.is_completion(matcher, self._known):
                place.completion = self._known
            else:
                place.completion = yield from self._search.completion(matcher, left, left, _EFFORT_IN_WALK)
            place.is_stuck = place.completion is None
            self._known = place.completion or self._known
        return not place.is_stuck


class _Words:
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
    def of(cls, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> _Words:
        """Made once for a tokenizer and a model; it takes seconds for a large vocabulary."""
        made = _MADE.setdefault(tokenizer, {})
        key = (vocab_size, *ends)
        if key not in made:
            made[key] = cls(tokenizer, vocab_size, ends)
        return made[key]

    def naming(self, tokenizer: Tokenizer, lark: str) -> _Words:
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

    def matcher(self, source: str) -> LLMatcher:
        """At the beginning of a text; InputError where the source is no grammar."""
        matcher = self._library.LLMatcher(self._inner, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InputError(f"the constraint cannot be used: {_sentence(matcher.get_error())}")
        return matcher

    def bits(self, matcher: LLMatcher) -> bytes:
        """What may come next, the end aside; no bit where nothing may, which breaks the matcher."""
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            if not matcher.get_error().startswith("NoExtension"):
                _give_up(matcher)
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


_MADE: WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], _Words]] = WeakKeyDictionary()


@dataclass
class _Effort:
    left: int


class _Search:
    """Looks for short texts of one grammar. `hints` are tokens that its source speaks of, and a few for whole classes:
    where nearly everything is allowed, the way on is likely to be made of them. In JSON a quote ends a string."""

    def __init__(self, words: _Words, tokenizer: Tokenizer, text: str, is_json: bool) -> None:
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


def _give_up(matcher: LLMatcher) -> NoReturn:
    why = _sentence(matcher.get_error()) if matcher.is_error() else "its automaton grows too fast"
    raise InputError(f"the constraint is too complex to follow: {why}; make it simpler")


def _sentence(error: str) -> str:
    """The line of llguidance's report that says what is wrong."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if line.startswith("oneOf"):
        return "the schemas of a oneOf may overlap, and only disjoint ones are supported; use anyOf"
    return line[:300] or "llguidance gives no reason"
