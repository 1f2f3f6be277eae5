"""Constraints of answers: which parts an answer has, and compiled grammars, kept for the next query that has the same.

Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sfumato.constraints.answers import AnswerGrammar, CallGrammar, ThoughtTokens
from sfumato.constraints.grammar import Grammar, read_source
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import InputError
from sfumato.options import Options
from sfumato.templates.requests import Tools
from sfumato.text.tokenizer import Tokenizer

GRAMMARS_KEPT = 16
"""Compiled constraints that are kept; the oldest goes first."""


Constraint = tuple[str, Any]
"""A kind of `options.CONSTRAINTS`, and its value."""


@dataclass(frozen=True)
class AnswerParts:
    """What an answer must obey, part by part: see `AnswerGrammar`."""

    text: Constraint | None
    calls: Constraint | None = None
    """The grammar of calls that may come beside the text."""
    thought: Literal["open", "allowed"] | None = None
    """Whether the prompt ends within a thought, or one may come first."""


def parts_of(options: Options, tools: Tools | None) -> AnswerParts | None:
    """What an answer to a chat with these tools must obey, its thought not counted; None: nothing.

    A constraint is of the answer's text. Beside tools the answer may be a call instead, and with `must_call` it is one.
    InputError, also for a tool whose calls cannot be guaranteed."""
    if not tools:
        if options.must_call:
            raise InputError("must_call asks for a call and there are no tools; give at least one")
        return None if options.constraint is None else AnswerParts(options.constraint)
    name = "must_call" if options.must_call else "strict" if options.strict else ""
    if name and (options.mode not in (None, "diffusion") or options.min_tokens > 1):
        message = f"{name} goes neither with mode 'autoregressive' nor with min_tokens above 1; drop one of them"
        raise InputError(message, option=name)
    if not name and options.constraint is None:
        return None
    calls = "calls", list(tools) if name else [_loosened(tool) for tool in tools]
    return AnswerParts(calls) if options.must_call else AnswerParts(options.constraint, calls)


def _loosened(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool, with parameters of any kind where calls cannot be guaranteed to obey its own: nobody asked for that."""
    try:
        read_source("calls", [tool])
    except InputError:
        function = dict(tool["function"], parameters={"type": "object", "additionalProperties": True})
        return {**tool, "function": function}
    return tool


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
            if (grammar := self._grammars.pop(key, None)) is not None:
                self._grammars[key] = grammar  # the last to go
        if grammar is None:  # not under the lock: others need not wait for it
            grammar = Grammar.compile(kind, value, self.tokenizer, self.vocab_size, self.ends)
            with self._lock:
                while len(self._grammars) >= GRAMMARS_KEPT:
                    self._grammars.pop(next(iter(self._grammars)))
                self._grammars[key] = grammar
        return grammar

    def compose(self, parts: AnswerParts) -> Grammar | AnswerGrammar:
        """The grammar of an answer, from those of its parts. InputError as for `compile`."""
        text = None if parts.text is None else self.compile(*parts.text)
        call, opener, closer = (self.tokenizer.id(name) for name in ("<|tool_call>", "<|channel>", "<channel|>"))
        calls = None
        if parts.calls is not None:
            if call is None:
                raise InputError("this model has no tokens for calls of tools; leave tools out, or strict")
            calls = CallGrammar(self.compile(*parts.calls), call)
        thought = None
        if parts.thought is not None and opener is not None and closer is not None:  # else the model cannot think
            label = tuple(self.tokenizer.encode("thought\n"))
            thought = ThoughtTokens(opener, label, closer, parts.thought == "open")
        if text is not None and calls is None and thought is None:
            return text
        vocabulary = Vocabulary.of(self.tokenizer, self.vocab_size, self.ends)
        return AnswerGrammar(vocabulary, text, calls, thought)
