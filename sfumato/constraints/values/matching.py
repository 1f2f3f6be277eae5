"""Whether a text is one of a pattern's, by an automaton: the pattern may come from anybody."""

from __future__ import annotations

from functools import lru_cache

from sfumato.constraints.patterns import parse
from sfumato.constraints.shortest import Automaton


@lru_cache(1000)
def has_match(pattern: str, text: str) -> bool:
    """Whether the pattern is somewhere in the text; `patterns.NotSupported` where it cannot be read."""
    return _automaton(pattern).behind(text).is_nullable


@lru_cache(100)
def _automaton(pattern: str) -> Automaton:
    return Automaton(parse(pattern))
