"""Compiled constraints, kept for the next query that has the same. Safe to use from several threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from sfumato.constraints.grammar import Grammar
from sfumato.text.tokenizer import Tokenizer

GRAMMARS_KEPT = 16
"""Compiled constraints that are kept; the oldest goes first."""


class GrammarCache:
    """Compiles constraints for one tokenizer. `vocab_size` is the model's; `ends` are the ids that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.ends = tokenizer, vocab_size, ends
        self._grammars: dict[tuple[str, str], Grammar] = {}
        self._lock = threading.Lock()

    def has(self, kind: str, value: Any) -> bool:
        """Whether this constraint is compiled; to compile it may take seconds."""
        return (kind, repr(value)) in self._grammars

    def compile(self, kind: str, value: Any) -> Grammar:
        """The compiled constraint: see `Grammar.compile`, which says what is refused."""
        key = kind, repr(value)
        with self._lock:
            grammar = self._grammars.get(key)
        if grammar is None:  # not under the lock: others need not wait for it
            grammar = Grammar.compile(kind, value, self.tokenizer, self.vocab_size, self.ends)
            with self._lock:
                while len(self._grammars) >= GRAMMARS_KEPT:
                    self._grammars.pop(next(iter(self._grammars)))
                self._grammars[key] = grammar
        return grammar
