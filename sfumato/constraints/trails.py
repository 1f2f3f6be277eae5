"""How far a text has come along the terminals of its grammar, and the shortest ways to their ends.

llguidance says which tokens may come next, not how far the end is. Where a text is inside a terminal, such as a string
with a pattern, the terminal's own automaton knows. A text is followed along all terminals of its grammar at once. Which
of them it is in, and where that began, is not known: each way to an end is a proposal, which the matcher takes or
refuses.

Deliberately absent: terminals of literals alone, whose ends are never far.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from sfumato.constraints.expressions import NEVER, Expression
from sfumato.constraints.interruptible import Interruptible
from sfumato.constraints.lark import has_choice, terminals
from sfumato.constraints.patterns import NotSupported
from sfumato.constraints.shortest import Automaton

MAX_TERMINALS = 100
"""Terminals of one grammar that are followed."""
MAX_SIZE = 2_000
"""Nodes of one of them: others are left out."""
MAX_PARTS = 15_000
"""Parts of the states of all automata of a grammar: beyond its share, no end of a terminal is known."""
_STATES = 30
"""States of one terminal that are followed at once."""
_EFFORT = 2_000
"""Derivatives for one end."""


@dataclass(frozen=True, slots=True)
class Trail:
    """For each terminal, the states that a text may be in; and the bytes of its last character that is not complete."""

    states: tuple[frozenset[Expression], ...] = ()
    rest: bytes = b""


class Trails:
    """The terminals of one grammar, in llguidance's form, that are more than literals."""

    def __init__(self, source: str) -> None:
        kept = [one for one in terminals(source) if one.least < NEVER and one.size <= MAX_SIZE and has_choice(one)]
        share = MAX_PARTS // max(2, min(len(kept), MAX_TERMINALS))
        self._automata = [Automaton(one, share) for one in kept[:MAX_TERMINALS]]
        self.begin = Trail(tuple(frozenset([automaton.start]) for automaton in self._automata))
        """That of the empty text."""

    def __len__(self) -> int:
        return len(self._automata)

    def after(self, trail: Trail, data: bytes) -> Interruptible[Trail]:
        """The trail behind these bytes. A terminal may begin behind any character but a letter or a digit."""
        data = trail.rest + data
        text = data.decode(errors="ignore")
        states = []
        for automaton, here in zip(self._automata, trail.states, strict=True):
            for character in text:
                yield
                here = self._step(automaton, here, character)
            states.append(here)
        return Trail(tuple(states), data[len(text.encode()) :])

    @staticmethod
    def _step(automaton: Automaton, here: frozenset[Expression], character: str) -> frozenset[Expression]:
        new = set() if character.isalnum() else {automaton.start}
        with suppress(NotSupported):  # too large: what is known of it is still right
            for state in here:
                if (state := automaton.behind(character, state)).least < NEVER:
                    new.add(state)
        if len(new) > _STATES:
            new = set(sorted(new, key=lambda state: (state.least, hash(state)))[:_STATES])
        return frozenset(new)

    def ends(self, trail: Trail) -> Interruptible[list[str]]:
        """Texts that bring a terminal to its end, one that begins here too; the shortest first, and none is empty."""
        texts = set[str]()
        if trail.rest:
            return []
        for automaton, states in zip(self._automata, trail.states, strict=True):
            for state in states | {automaton.start}:
                with suppress(NotSupported):
                    texts.add((yield from automaton.ending(state, _EFFORT)) or "")
        return sorted(texts - {""}, key=lambda text: (len(text), text))
