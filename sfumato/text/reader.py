"""The tokens of one row as text while they come: stop strings, characters in several tokens, thoughts and calls.

Text is given as soon as it is certain: what may be the beginning of a stop string, of a character or of a tool call is
held back until more of it is there. The pieces that are given, joined, are the text of the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sfumato.events import Commit, Done, Draft, Event
from sfumato.text import chat
from sfumato.text.tokenizer import Detokeniser, Tokenizer

_HALF = "\ufffd"
"""What stands for the bytes of a character that is not whole yet."""


class Reader:
    """Give `push` to the engine as a request's `watch`, then let `tell` put text into its events. `is_chat`: the text
    is a model's turn, whose thoughts and tool calls are told apart from its answer."""

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], ends: Sequence[int], is_chat: bool = False
    ) -> None:
        self._tokenizer, self._detokeniser = tokenizer, Detokeniser(tokenizer)
        self._stops, self._ends, self.is_chat = stops, frozenset(ends), is_chat
        self._longest = max((len(stop) for stop in stops), default=0)
        self._tokens: list[int] = []
        self._given, self._thought, self._calls = 0, 0, 0
        self._raw, self._tail = "", ""
        self._parsed: tuple[tuple[int, bool], chat.Reply] | None = None
        self.text = ""
        self.found: str | None = None

    def push(self, tokens: list[int]) -> int | None:
        """Take new tokens; the number of them that stand before a stop string, None where there is none."""
        if not self._stops:
            if self.is_chat:  # its text is read from the reply
                return None
            self._raw += self._detokeniser.push(tokens)
            return None
        for n, token in enumerate(tokens):
            start = len(self._raw)
            self._raw += self._detokeniser.push([token])
            first = max(0, start - self._longest + 1)
            hits = [(at, s) for s in self._stops if (at := self._raw.find(s, first)) >= 0]
            if hits:
                at, self.found = min(hits)
                keep = n if at <= start else n + 1
                self._tail = self._raw[at:start] if keep == n else self._raw[at:]  # of what is kept, behind the text
                self._raw = self._raw[:at]
                return keep
        return None

    def tell(self, event: Event) -> Event:
        """The event with its text."""
        if isinstance(event, Draft):
            pieces = [self._piece(token) for token in event.tokens]
            end = next((n for n, token in enumerate(event.tokens) if token in self._ends), len(pieces))
            return replace(event, text=self._tokenizer.decode(event.tokens[:end]), pieces=pieces, end=end)
        if isinstance(event, Done):
            more: dict[str, Any] = {}
            if self.is_chat:
                reply = self._reply(True)
                more = {"thought": reply.thought, "tool_calls": reply.tool_calls}
            return replace(event, text=self.text, stop=self.found, **more)
        self._tokens += event.tokens
        if event.logprobs is not None:
            top = event.top_logprobs
            event = replace(
                event,
                pieces=[self._tokenizer.decode([token], skip_special=False) for token in event.tokens],
                top_logprobs=None if top is None else [self._named(words) for words in top],
            )
        return self._tell_reply(event) if self.is_chat else replace(event, text=self._take(event.is_last))

    def _tell_reply(self, event: Commit) -> Commit:
        reply = self._reply(event.is_last)
        self.text = reply.text
        thought = (reply.thought or "")[self._thought :]
        calls = reply.tool_calls[self._calls :]
        self._thought, self._calls = self._thought + len(thought), len(reply.tool_calls)
        return replace(event, text=self._certain(event.is_last), thought=thought, tool_calls=calls)

    def _reply(self, is_over: bool) -> chat.Reply:
        """What is said so far; of what is not over, as much as is certain. The end of an answer is asked for twice."""
        key = len(self._tokens), is_over
        if self._parsed is None or self._parsed[0] != key:
            self._parsed = key, self._parse(is_over)
        return self._parsed[1]

    def _parse(self, is_over: bool) -> chat.Reply:
        tokens = self._tokens
        if not is_over:
            opened = [n for n, token in enumerate(tokens) if token == self._tokenizer.id("<|tool_call>")]
            closed = self._tokenizer.id("<tool_call|>")
            if opened and closed not in tokens[opened[-1] :]:
                tokens = tokens[: opened[-1]]
        reply = chat.parse_ids(self._tokenizer, tokens)
        text, thought = reply.text, reply.thought or ""
        if self.found is not None:
            text, thought = text.removesuffix(self._tail), thought.removesuffix(self._tail)
        if not is_over:
            text, thought = text.rstrip(_HALF), thought.rstrip(_HALF)
            thought = "" if "thought".startswith(thought) else thought  # its label, on its way
        return replace(reply, text=text, thought=thought or None)

    def _take(self, is_over: bool) -> str:
        if is_over and self.found is None:
            self._raw += self._detokeniser.flush()
        self.text = self._raw
        return self._certain(is_over)

    def _certain(self, is_over: bool) -> str:
        """The text that is certain and was not given yet."""
        end = len(self.text)
        if not is_over:
            held = (
                size
                for size in range(min(self._longest - 1, end), 0, -1)
                if any(stop.startswith(self.text[end - size :]) for stop in self._stops)
            )
            end -= next(held, 0)
        piece, self._given = self.text[self._given : end], max(end, self._given)
        return piece

    def _named(self, words: dict[Any, float]) -> dict[str, float]:
        """By piece; of two tokens that look the same the likelier counts."""
        found: dict[str, float] = {}
        for token, value in words.items():
            found.setdefault(self._tokenizer.decode([token], skip_special=False), value)
        return found

    def _piece(self, token: int) -> str:
        return "" if token in self._tokenizer.special_ids else self._tokenizer.decode([token])
