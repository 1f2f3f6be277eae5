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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.constraints.forms import source_of
from sfumato.constraints.search import EFFORT, EFFORT_IN_WALK, Search, Words, Work, finish, give_up
from sfumato.errors import CapacityError, InputError
from sfumato.system import confined
from sfumato.text.tokenizer import Tokenizer

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

_REPAIRS = 4  # times that a walk may go back for the room before it takes a completion to its end

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

    def __init__(self, words: Words, search: Search, source: str, shortest: list[int]) -> None:
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
        words = Words.of(tokenizer, vocab_size, ends)
        lark = value if kind == "grammar" else ""
        shortest = _probed(words, tokenizer, (kind, source, hints, lark))
        words = words.naming(tokenizer, lark)
        return cls(words, Search(words, tokenizer, hints, kind == "schema"), source, shortest)

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


def _probed(words: Words, tokenizer: Tokenizer, terms: Terms) -> list[int]:
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


_learnt: dict[str, tuple[Tokenizer, Words]] = {}  # of a child process


def _learn(key: str, tokenizer_json: str, vocab_size: int, ends: list[int]) -> None:
    while len(_learnt) >= TOKENIZERS_KEPT:
        _learnt.pop(next(iter(_learnt)))
    tokenizer = Tokenizer.from_json(tokenizer_json)
    _learnt[key] = tokenizer, Words.of(tokenizer, vocab_size, ends)


def _shortest_text(key: str, terms: Terms) -> list[int] | None:
    """The fewest tokens found that a grammar allows; None where the tokenizer is not known here. InputError for what is
    no grammar or has no text."""
    if key not in _learnt:
        return None
    kind, source, hints, lark = terms
    tokenizer, words = _learnt[key]
    words = words.naming(tokenizer, lark)
    matcher = words.matcher(source, f"the {kind}")
    search = Search(words, tokenizer, hints, kind == "schema")
    shortest = finish(search.completion(matcher, MAX_SHORTEST, 0, EFFORT))
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

    def __init__(self, words: Words, search: Search, matcher: LLMatcher, completion: list[int], room: int) -> None:
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
            give_up(self._matcher)
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
                give_up(self._matcher)
            if taken != 1:  # the lexer ran out of fuel on the way, which llguidance takes for a refusal
                give_up(self._matcher)
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
                place.completion = yield from self._search.completion(matcher, left, left, EFFORT_IN_WALK)
            place.is_stuck = place.completion is None
            self._known = place.completion or self._known
        return not place.is_stuck
