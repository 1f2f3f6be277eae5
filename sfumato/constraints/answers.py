"""What a whole answer may be: a thought first, then a text of one grammar, free text, or calls of tools.

The parts are told apart by control tokens alone: one opens and one closes a thought, one opens a call. So each part
keeps the grammar it has alone, and a `Guide` of its own, and this module only decides where one ends and the next
begins. Free text needs no grammar at all: there the model's own tokens stand as they would without a constraint, in any
order, and only control tokens are checked.

**Nothing is built on a guess.** Where a part begins behind free text, its guide walks only once the control token
between them is sure, or stands at one place for a few steps: what the guide forces would else hold it there.

**Room.** A thought may take all the room but what the shortest text behind it needs, twice over where there is so much.

Deliberately absent: text between a thought and a call, and a second thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from sfumato.constraints.grammar import Grammar
from sfumato.constraints.guide import Guide, Pick, Walk
from sfumato.constraints.interruptible import Interruptible, finish
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import CapacityError

_AnswerPart = Literal["thought", "words", "grammar"]

_STILL = 2
"""Walks for which a control token must stand where it stood before, to count as sure."""
_PICKS = 8
"""Control tokens of one walk that words replace in free text that is not settled yet. Each costs a pass over a row of
logits, and more of them mean that the model wants something else."""


@dataclass(frozen=True)
class ThoughtTokens:
    """The tokens of a thought: what opens it, its first line, and what closes it."""

    opener: int
    label: tuple[int, ...]
    closer: int
    is_open: bool = False
    """The prompt ends inside the thought: opener and label stand there."""


@dataclass(frozen=True)
class CallGrammar:
    """The grammar of one call or more, and the token that opens each."""

    grammar: Grammar
    opener: int


@dataclass(frozen=True)
class AnswerGrammar:
    """The parts of an answer. `text` None: free text, at least one token of it."""

    vocabulary: Vocabulary
    text: Grammar | None
    calls: CallGrammar | None = None
    """What may come instead of the text; behind it, where it is free."""
    thought: ThoughtTokens | None = None
    """What may come before; what must come first where it is open."""

    def shortest(self) -> int:
        """Tokens of the shortest known answer, the end not counted."""
        text = 1 if self.text is None else self.text.shortest()
        return text + (self.thought is not None and self.thought.is_open)

    def start(self, room: int) -> AnswerGuide:
        """A guide for one answer of at most `room` tokens, the end not counted; CapacityError if that is too few."""
        if room < self.shortest():
            raise CapacityError(
                f"the constraint needs at least {self.shortest()} tokens and has room for {room}; "
                "raise max_tokens or ask for less"
            )
        return AnswerGuide(self, room)


@dataclass
class _AnswerPath:
    """The state of one walk: its arguments (see `Guide.walking`), and what it has done so far."""

    top: list[int]
    is_sure: list[bool]
    pick: Pick
    bound: float
    is_last: bool
    length: int
    """Positions that the walk may fill."""
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    overruled: dict[int, float] = field(default_factory=dict)
    free: range = range(0)
    guide: Guide | None = None
    """Of the part under a grammar, which begins at `begins`."""
    begins: int = 0
    has_choice: bool = False
    """Another part could begin there."""
    end: int | None = None

    def pick_(self, mask: np.ndarray) -> int:
        """The token that comes next instead of the model's; it is not written yet."""
        j = len(self.tokens)
        token, entropy = self.pick(j, mask)
        self.top[j], self.is_sure[j], self.overruled[j] = token, entropy <= self.bound, entropy
        return token

    def force(self, token: int) -> None:
        """Nothing but this token may come next."""
        self.forced.append(len(self.tokens))
        self.tokens.append(token)


class AnswerGuide:
    """One answer in progress, with the methods of a `Guide`. `room` and `is_over` are as there.

    `is_cut`: it is over because free text has filled the room, and might have gone on."""

    def __init__(self, grammar: AnswerGrammar, room: int) -> None:
        self.room = room
        self.is_over = self.is_cut = False
        self._thought, self._calls = grammar.thought, grammar.calls
        if self._calls is not None and self._calls.grammar.shortest() > room:
            self._calls = None
        self._text_guide = None if grammar.text is None else grammar.text.start(room)
        self._calls_guide = None if self._calls is None else self._calls.grammar.start(room)
        self._is_word = grammar.vocabulary.words()
        self._ends = grammar.vocabulary.ends
        shortest = 1 if grammar.text is None else grammar.text.shortest()
        self._reserve = min(2 * shortest + 8, max(shortest, room // 2))
        """Tokens that a thought leaves for what comes behind it."""
        self._is_thinking = self._thought is not None and self._thought.is_open
        self._may_think = self._thought is not None and not self._thought.is_open
        self._label: list[int] = []  # of the open thought, still to come
        self._has_words = False  # of the answer
        self._guide: Guide | None = None  # of what is committed last
        self._path: _AnswerPath | None = None  # of the last walk
        self._switch, self._still = -1, 0  # room at the last walk's control token; walks since when it stands there

    def walk(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Walk:
        """`walking`, without interruption."""
        return finish(self.walking(top, is_sure, pick, bound, is_last))

    def walking(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Interruptible[Walk]:
        """The path for the model's argmax tokens, as `Guide.walking` has it."""
        if self.is_over:
            return Walk([], [], {}, 0)
        length = min(len(top), self.room)
        path = self._path = _AnswerPath(list(top), list(is_sure), pick, bound, is_last, length, guide=self._guide)
        yield
        if self._guide is None:
            self._write_words(path)
        if path.guide is not None:
            yield from self._follow(path, path.guide)
        return Walk(path.tokens, path.forced, path.overruled, path.end, path.free)

    def commit(self, count: int) -> None:
        """The first `count` tokens of the last walk are final; the next walk begins behind them."""
        path = self._path
        if path is None or not 0 <= count <= len(path.tokens):
            raise ValueError(f"the last walk has fewer than {count} tokens, so that they cannot be committed")
        own = count if path.guide is None else min(count, path.begins)
        for token in path.tokens[:own]:
            self._note(token)
        self.room -= count
        self.is_over = path.end == count
        self.is_cut = self.is_over and self.room == 0 and path.guide is None
        if path.guide is not None and (count > own or self.is_over):
            path.guide.commit(count - own)
            self._guide = path.guide
        self._path = None

    def _note(self, token: int) -> None:
        """A token before any grammar is final."""
        if self._label:
            self._label.pop(0)
        elif self._thought is not None and self._is_thinking:
            self._is_thinking = token != self._thought.closer
        elif self._thought is not None and self._may_think and token == self._thought.opener:
            self._is_thinking, self._label = True, list(self._thought.label)
            self._may_think = False
        else:
            self._has_words, self._may_think = True, False

    # ---- what stands before a grammar ------------------------------------------------------------------------------

    def _write_words(self, path: _AnswerPath) -> None:
        """The thought and the free text of the path, and the guide of what comes behind them."""
        label, part = self._label, _part_of(self._is_thinking, self._has_words)
        if part is None:
            part = self._choose_part(path, self._may_think)
            label = list(self._thought.label) if self._thought is not None and part == "thought" else []
        if part == "thought":
            part = self._choose_part(path, may_think=False) if self._write_thought(path, label) else None
        if part == "words":
            self._write_text(path)

    def _choose_part(self, path: _AnswerPath, may_think: bool) -> _AnswerPart | None:
        """Which part begins at the next position, all before it being settled; a thought's opener is written."""
        j = len(path.tokens)
        left = self.room - j
        if j == path.length:
            return None
        text, thought, calls, allowed = self._text_guide, self._thought, self._calls, set[int]()
        if may_think and thought is not None and 2 + len(thought.label) + self._reserve <= left:
            allowed.add(thought.opener)
        if calls is not None and calls.grammar.shortest() <= left:
            allowed.add(calls.opener)
        path.begins, path.has_choice = j, bool(allowed)
        if text is not None and text.room != left:
            text.restart(left)
        mask = self._is_word.copy() if text is None else text.first_tokens() if allowed else None
        token = path.top[j]
        if mask is not None:
            mask[list(allowed)] = True
            token = token if mask[token] else path.pick_(mask)
        if token in allowed and thought is not None and token == thought.opener:
            path.tokens.append(token)
            return "thought"
        path.guide = self._calls_guide if token in allowed else text
        return "grammar" if path.guide is not None else "words"

    def _write_thought(self, path: _AnswerPath, label: list[int]) -> bool:
        """The thought, and its end where that comes; whether what follows can begin."""
        assert self._thought is not None
        for word in label[: path.length - len(path.tokens)]:
            path.force(word)
        first, latest = len(path.tokens), self.room - 1 - self._reserve
        token = self._write_run(path, frozenset([self._thought.closer]), min(path.length, latest))
        j = len(path.tokens)
        path.free = range(first, j)
        if token is not None:
            path.tokens.append(token)
            return self._is_settled(path, j)
        if j == latest and j < path.length:
            path.force(self._thought.closer)
        return j == latest and j < path.length

    def _write_text(self, path: _AnswerPath) -> None:
        """Free text, and its end or the calls behind it."""
        first, calls = len(path.tokens), self._calls
        until = first
        token = None
        if calls is not None:  # as long as there is room for one
            until = max(first, min(path.length, self.room - calls.grammar.shortest() + 1))
            token = self._write_run(path, self._ends | {calls.opener}, until)
        if token is None and len(path.tokens) == until:
            token = self._write_run(path, self._ends, path.length)
        j = len(path.tokens)
        first = path.free.start if path.free else first
        path.free = range(first, j)
        if calls is not None and token == calls.opener:
            if self._is_settled(path, j):
                path.guide, path.begins, path.has_choice = self._calls_guide, j, True
        elif token is not None:
            path.end, path.free = j, range(first, len(path.top))
        elif j == self.room:
            path.end = j

    def _write_run(self, path: _AnswerPath, stops: frozenset[int], until: int) -> int | None:
        """Words up to one of these control tokens, which is returned and not written, or up to a position.

        None where neither came: too many other control tokens stand in what is not settled."""
        first, picks = len(path.tokens), _PICKS
        for j in (np.flatnonzero(~self._is_word[path.top[first:until]]) + first).tolist():
            path.tokens += path.top[len(path.tokens) : j]
            token = path.top[j]
            if token not in stops:
                if not picks and not path.is_last:
                    return None
                mask = self._is_word.copy()
                mask[list(stops)] = True
                token, picks = path.pick_(mask), picks - 1
            if token in stops:
                return token
            path.tokens.append(token)
        path.tokens += path.top[len(path.tokens) : until]
        return None

    def _is_settled(self, path: _AnswerPath, j: int) -> bool:
        """Whether the control token at position j can be built on."""
        left = self.room - j
        self._switch, self._still = left, self._still + 1 if left == self._switch else 0
        return path.is_sure[j] or path.is_last or self._still >= _STILL

    # ---- where a grammar rules -------------------------------------------------------------------------------------

    def _follow(self, path: _AnswerPath, guide: Guide) -> Interruptible[None]:
        """The walk of a guide from where its part begins, joined to the path."""
        j = path.begins
        if guide is not self._guide and guide.room != self.room - j:
            guide.restart(self.room - j)

        def pick(at: int, mask: np.ndarray) -> tuple[int, float]:
            return path.pick(j + at, mask)

        walk = yield from guide.walking(path.top[j:], path.is_sure[j:], pick, path.bound, path.is_last)
        path.tokens += walk.tokens
        # Where there was a choice of parts the first token does not follow from the grammar.
        path.forced += [j + at for at in walk.forced if at or not path.has_choice]
        path.overruled |= {j + at: entropy for at, entropy in walk.overruled.items()}
        path.end = None if walk.end is None else j + walk.end


def _part_of(is_thinking: bool, has_words: bool) -> _AnswerPart | None:
    """The part that goes on; None: one begins."""
    return "thought" if is_thinking else "words" if has_words else None
