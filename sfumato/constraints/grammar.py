"""A compiled constraint: the grammar that a text must obey, tried in a child process before anything else.

**Hostile until checked.** A grammar comes from outside. It is compiled first in a child process (`confined`), on a
small stack, and its shortest text is searched for there: a grammar that crashes, or takes too long or too much memory,
is refused. What llguidance keeps of a grammar is shared by all copies of a matcher, and one that exceeds its limits is
of no use from then on; so every guide compiles its own, and what happens to one text does not affect another's.

Deliberately absent: control tokens inside a text, except those that a Lark grammar names by their text, and only where
it does.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from sfumato.constraints.checks import Check, SchemaCheck
from sfumato.constraints.forms import GrammarSource, lark_of, source_of_choices, source_of_lark, source_of_regex
from sfumato.constraints.guide import Guide
from sfumato.constraints.interruptible import Interruptible, T
from sfumato.constraints.lark import terminals
from sfumato.constraints.patterns import NotSupported
from sfumato.constraints.schema import checked_schema, source_of_schema
from sfumato.constraints.search import EFFORT, Accepts, Search
from sfumato.constraints.shortest import Automaton
from sfumato.constraints.tools import call_check, source_of_calls
from sfumato.constraints.vocabulary import Vocabulary
from sfumato.errors import CapacityError, InputError
from sfumato.options import CONSTRAINTS
from sfumato.system import confined
from sfumato.text.messages import check_tools
from sfumato.text.tokenizer import Tokenizer

MAX_SHORTEST = 8192
"""Tokens within which a grammar must have a text."""
_SHORT_ENOUGH = 256
"""Tokens of an example that is not searched for a shorter one."""
STACK = 4 << 20
"""Bytes of stack on which a grammar must compile: less than any thread here has."""
CHILDREN = confined.ChildPool(nice=19)
"""The child processes that try grammars. Their priority is low: the engine's threads wait for each other, so that one
that loses its core holds up all."""
READING_SECONDS, SEARCH_SECONDS = 1.0, 3.0
"""Of the processor that a child may take to read a grammar, which is done once more for each text, and to find its
shortest text."""
PROOF_EFFORT = 5_000
"""Derivatives that it may take to show that a regex has no text."""
TOKENIZERS_KEPT = 2
"""Tokenizers that a child process keeps."""
TOKENIZER_SECONDS, TOKENIZER_MEMORY = 30.0, 4 << 30
"""Seconds and bytes that a child may take for a tokenizer. Gemma's, of a quarter of a million tokens, takes three
seconds and half a gigabyte."""

_SOURCES: dict[str, Callable[[Any], GrammarSource]] = {
    "schema": source_of_schema,
    "regex": source_of_regex,
    "grammar": source_of_lark,
    "choices": source_of_choices,
    "calls": source_of_calls,
}


class Grammar:
    """A compiled constraint; it holds no state of a text, and many guides may use it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        search: Search,
        source: str,
        shortest: list[int],
        is_right: Accepts | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._search = search
        self._source = source
        self._shortest = shortest
        self._is_right = is_right

    @classmethod
    def compile(cls, kind: str, value: Any, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Grammar:
        """The grammar of a constraint of one of the kinds in `options.CONSTRAINTS`, or of "calls".

        `value` is a schema (a dict, a bool, or JSON text of one), a regex (text, to match as a whole), a Lark grammar
        (text), choices (list of texts) or, for calls, tools. `vocab_size` is the model's, the length of masks; `ends`
        are the token ids that end a text. Whatever is wrong with the value is an InputError of one sentence. The first
        grammar of a tokenizer takes a second or two.
        """
        source, hints, check, example = read_source(kind, value)
        vocabulary = Vocabulary.of(tokenizer, vocab_size, ends)
        lark = lark_of(source) if kind in ("grammar", "calls") else ""
        shortest = _tried(vocabulary, tokenizer, Terms(kind, source, hints, lark, check, example))
        vocabulary = vocabulary.with_named_tokens(tokenizer, lark)
        return cls(
            vocabulary,
            Search(vocabulary, tokenizer, source if kind != "choices" else "", hints, kind == "schema"),
            source,
            shortest,
            _accepting(check, tokenizer),
        )

    def shortest(self) -> int:
        """Tokens of the shortest known text that the grammar allows, the end not counted."""
        return len(self._shortest)

    def start(self, room: int) -> Guide:
        """A guide for one text of at most `room` tokens, the end not counted; CapacityError if that is too few."""
        if room < len(self._shortest):
            raise CapacityError(
                f"the constraint needs at least {len(self._shortest)} tokens and has room for {room}; "
                "raise max_tokens or ask for less"
            )
        matcher = self._vocabulary.matcher(self._source)
        return Guide(self._vocabulary, self._search, matcher, self._shortest, room, self._is_right)


def source_of(kind: str, value: Any) -> GrammarSource:
    """The grammar in llguidance's form; InputError, one sentence, for whatever is wrong with the value."""
    if kind not in _SOURCES:
        raise InputError(f"there is no constraint {kind!r}; the constraints are {', '.join(CONSTRAINTS)}")
    return _SOURCES[kind](value)


def read_source(kind: str, value: Any) -> GrammarSource:
    """`source_of`, in a child process where much may have to be read: a schema may make any work."""
    if kind not in ("schema", "calls"):
        return source_of(kind, value)
    value = checked_schema(value) if kind == "schema" else check_tools(value)
    with CHILDREN.child("the schema" if kind == "schema" else "the grammar of the tools") as child:
        text, hints, is_inexact, example = child.run(_parts_of_source, kind, value)
    check = SchemaCheck(value) if kind == "schema" else call_check(value)
    return GrammarSource(text, hints, check if is_inexact else None, example)


class Terms(NamedTuple):
    """A grammar's kind, source and hints, its own text where it is Lark's (else ""), its check, and an example."""

    kind: str
    source: str
    hints: str
    lark: str
    check: Check | None
    example: str | None


def _accepting(check: Check | None, tokenizer: Tokenizer) -> Accepts | None:
    return None if check is None else partial(check.is_passed, tokenizer)


def _tried(vocabulary: Vocabulary, tokenizer: Tokenizer, terms: Terms) -> list[int]:
    """The shortest text of a grammar, searched for in a child process."""
    size, ends = vocabulary.vocab_size, sorted(vocabulary.ends)
    with CHILDREN.child(f"the {terms.kind}") as child:
        shortest = child.run(_shortest_text, vocabulary.key, terms, stack=STACK)
        if shortest is None:  # the child does not have this tokenizer
            child.run(
                _keep_tokenizer,
                *(vocabulary.key, tokenizer.to_json(), size, ends),
                seconds=TOKENIZER_SECONDS,
                memory=TOKENIZER_MEMORY,
            )
            shortest = child.run(_shortest_text, vocabulary.key, terms, stack=STACK)
    if not isinstance(shortest, list):
        raise InputError(f"the {terms.kind} could not be read; send the request again")
    return shortest


# ---- in the child process -------------------------------------------------------------------------------------------

_tokenizers: dict[str, tuple[Tokenizer, Vocabulary]] = {}


def _keep_tokenizer(key: str, tokenizer_json: str, vocab_size: int, ends: list[int]) -> None:
    while len(_tokenizers) >= TOKENIZERS_KEPT:
        _tokenizers.pop(next(iter(_tokenizers)))
    tokenizer = Tokenizer.from_json(tokenizer_json)
    _tokenizers[key] = tokenizer, Vocabulary.of(tokenizer, vocab_size, ends)


def _parts_of_source(kind: str, value: Any) -> tuple[str, str, bool, str | None]:
    """A source as JSON can say it: whether it has a check instead of the check."""
    try:
        text, hints, check, example = source_of(kind, value)
    except RecursionError:
        raise InputError("references lead on from one to the next too often; let them name the schema itself") from None
    return text, hints, check is not None, example


def _shortest_text(key: str, terms: Terms) -> list[int] | None:
    """The shortest token list that the search finds for a grammar; None where the child does not have the tokenizer.

    InputError for a source that is not a grammar, or has no text.
    """
    if key not in _tokenizers:
        return None
    kind, source, hints, lark, check, example = terms
    tokenizer, vocabulary = _tokenizers[key]
    vocabulary = vocabulary.with_named_tokens(tokenizer, lark)
    began = time.process_time()
    matcher = vocabulary.matcher(source, f"the {kind}")
    matcher.deep_copy().compute_ff_tokens()
    vocabulary.bits(matcher.deep_copy())
    if (seconds := time.process_time() - began) > READING_SECONDS:
        raise InputError(
            f"the {kind} takes {seconds:.1f} seconds to read, more than the {READING_SECONDS:g} allowed; "
            "make it smaller"
        )
    if kind == "regex":
        example = _example(source)
    search = Search(vocabulary, tokenizer, source if kind != "choices" else "", hints, kind == "schema")
    is_right = _accepting(check, tokenizer)
    known = _known(example, kind, tokenizer, MAX_SHORTEST)
    if known is not None and not (search.is_completion(matcher, known) and (is_right is None or is_right(known))):
        known = None
    if known is not None and len(known) <= _SHORT_ENOUGH:
        return known
    try:
        work = search.completion(matcher, MAX_SHORTEST, 0, EFFORT, is_right=is_right)
        path = _finished(work, f"the {kind}", began + READING_SECONDS + SEARCH_SECONDS)
    except InputError:  # it takes too long, or the library cannot follow it
        if known is None:
            raise
        return known
    path = min((one for one in (path, known) if one is not None), key=len, default=None)
    if path is None:
        raise InputError(
            f"no text of at most {MAX_SHORTEST} tokens was found that the {kind} allows; "
            "see that it is satisfiable and asks for less"
        )
    return path


def _known(example: str | None, kind: str, tokenizer: Tokenizer, most: int) -> list[int] | None:
    """The tokens of an example, where they are at most so many."""
    tokens = None if example is None else tokenizer.encode(example, parse_special=kind == "calls")
    return tokens if tokens is not None and len(tokens) <= most else None


def _finished(work: Interruptible[T], what: str, until: float = math.inf) -> T:
    """The result of the work, or what it has found when its time is up; InputError where that is nothing.

    `until` bounds it too, as `time.process_time` counts. The child stays as it is, unlike behind a limit.
    """
    until = min(until, time.process_time() + SEARCH_SECONDS)
    try:
        for number in itertools.count():
            if number % 4 or time.process_time() <= until:
                next(work)
            else:
                work.throw(
                    InputError(
                        f"{what} takes longer than the {SEARCH_SECONDS:g} seconds allowed to find its shortest text; "
                        "make it simpler"
                    )
                )
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError


def _example(source: str) -> str | None:
    """A shortest text of a regex; InputError where it has none, None where its automaton is too large to know one."""
    text: str | None = None
    with suppress(NotSupported):
        for one in terminals(source):
            text = _finished(Automaton(one).ending(one, PROOF_EFFORT), "the regex")
            if text is None:
                raise InputError(
                    "the regex allows no text; see that what it asks for in one place is allowed in the others"
                )
    return text
