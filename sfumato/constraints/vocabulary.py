"""A tokenizer's vocabulary as llguidance sees it: matchers, masks, and what the search needs to know of each token.

It is made once for a tokenizer and a model, because a large vocabulary takes seconds. A mask never allows a control
token, unless a Lark grammar names it, and never the end of a text, which the caller adds where the text may end.

Deliberately absent: any state of a text, which is the matcher's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, NoReturn
from weakref import WeakKeyDictionary

import numpy as np

from sfumato.constraints.forms import llguidance
from sfumato.errors import InputError
from sfumato.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

STEP_FUEL = 500_000
"""What the library may build of its automaton for one mask: about 14,000 of it take a thousandth of a second."""


class Vocabulary:
    """The tokens of one tokenizer, for grammars.

    `vocab_size` is the model's, the length of masks. `ends` are the token ids that end a text, `control` those and the
    control tokens that may not come. `named` are the control tokens that may come, where the grammar has them.
    For the search: `worth` int16 [vocab_size] is how much it prefers a token, `first` uint8 [vocab_size] the first byte
    of its text, `quotes` and `brackets` are tokens that close a string, or a list or record, the longest first.
    `key` identifies tokenizer, size and ends.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._library = llguidance()
        source = tokenizer.to_json()
        self.key = sha256(f"{vocab_size} {sorted(ends)} {source}".encode()).hexdigest()
        self._inner = self._library.LLTokenizer(source, vocab_size, next(iter(ends), None))
        self._limits = self._library.LLParserLimits(verbose_errors=False, step_lexer_fuel=STEP_FUEL)
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
        self.named: list[int] = []
        """Highest id first: in Gemma's vocabulary a closing token comes behind its opening one."""
        self._probe = tokenizer.encode("q")[:1]

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Vocabulary:
        """The vocabulary of a tokenizer and a model, made at the first call; seconds for a large one."""
        by_model = _VOCABULARIES.setdefault(tokenizer, {})
        key = (vocab_size, *ends)
        if key not in by_model:
            by_model[key] = cls(tokenizer, vocab_size, ends)
        return by_model[key]

    def with_named_tokens(self, tokenizer: Tokenizer, lark: str) -> Vocabulary:
        """The vocabulary for a Lark grammar: the control tokens that it names by their text may come, ends excepted."""
        named = {i for i in self.control - self.ends if (tokenizer.token(i) or "<>") in lark}
        if not named:
            return self
        changed = copy.copy(self)
        changed.named = sorted(named, reverse=True)
        changed.control = self.control - named
        changed._is_plain = self._is_plain.copy()
        changed._is_plain[changed.named] = True
        return changed

    def data(self, tokens: list[int]) -> bytes:
        """The text of tokens; a character at its end may be incomplete."""
        data: bytes = self._inner.decode_bytes(tokens) if tokens else b""
        return data

    def allows(self, matcher: LLMatcher, forced: list[int]) -> bool:
        """Whether forced tokens hold only control tokens that the grammar names, and where it names them.

        Where the grammar's text merely spells a control token, llguidance forces the token itself, and would then not
        accept it.
        """
        if not self.control.isdisjoint(forced):
            return False
        return set(self.named).isdisjoint(forced) or bool(matcher.validate_tokens(forced) == len(forced))

    def matcher(self, source: str, what: str = "the constraint") -> LLMatcher:
        """A matcher at the beginning of a text; InputError where the source is not a grammar."""
        matcher: LLMatcher = self._library.LLMatcher(self._inner, source, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InputError(f"{what} cannot be used: {_sentence(matcher.get_error())}")
        return matcher

    def bits(self, matcher: LLMatcher) -> bytes:
        """The tokens that may come next, one bit each, the end not among them.

        No bit is set where no token may come; that breaks the matcher. InputError where the grammar is too complex.
        """
        bits: bytes = matcher.compute_bitmask()
        if matcher.is_error():
            if not matcher.get_error().startswith("NoExtension"):
                give_up(matcher)
            return bytes(len(bits))
        return bits

    def words(self) -> np.ndarray:
        """The tokens of free text, bool [vocab_size]: all that are text."""
        return self._is_plain & (self.worth > 0)

    def is_free(self, matcher: LLMatcher) -> bool:
        """Whether text may go on in words: a q may come, which no JSON outside strings has."""
        return bool(matcher.validate_tokens(self._probe) == 1)

    def mask(self, bits: bytes) -> np.ndarray:
        """Bits as a mask, bool [vocab_size]; ends, and control tokens that are not named, are cleared."""
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self.vocab_size, bitorder="little").view(np.bool_)
        mask &= self._is_plain
        return mask


_VOCABULARIES: WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], Vocabulary]] = WeakKeyDictionary()


def give_up(matcher: LLMatcher) -> NoReturn:
    """Raise the InputError of a grammar that llguidance cannot follow any further."""
    why = _sentence(matcher.get_error()) if matcher.is_error() else "its automaton grows too fast"
    raise InputError(f"the constraint is too complex to follow: {why}; make it simpler")


def _worth(text: bytes) -> int:
    """How much the search prefers a token: a long one, but nothing that opens, no blanks, and rather 1 than 0."""
    if not text:
        return 0
    if any(mark in text for mark in b"{[(") or not text.strip():
        return 1
    return 2 * len(text) + (2 if text.strip(b"0") else 0)


def _sentence(error: str) -> str:
    """The line of llguidance's report that says what is wrong."""
    lines = [line.strip() for line in error.splitlines()] or [""]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    if line.startswith("oneOf"):
        return "the schemas of a oneOf may overlap, and only disjoint ones are supported; use anyOf"
    return line[:300] or "llguidance gives no reason"
