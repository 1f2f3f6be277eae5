"""The tokens of one row as text while they come: stop strings, split characters, thoughts and tool calls.

Text is passed on as soon as it is certain. What may be the beginning of a stop string, of a character or of a tool call
is held back until the next tokens decide it. All pieces, joined, are the text of the finished answer.

Two ways lead to the text: a plain completion is detokenised as it comes; a chat answer is parsed again with each commit
(`replies`), which tells thoughts and tool calls from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sfumato.events import Commit, Done, Draft, Event
from sfumato.text.replies import Reply, parse_ids
from sfumato.text.tokenizer import Detokeniser, Tokenizer

_REPLACEMENT = "\ufffd"
"""What stands for the bytes of a character that is not complete yet."""


class Reader:
    """Reads one row: `push` finds stop strings in its tokens, `with_text` puts text into its events.

    `push` is a request's `watch`: the engine calls it with tokens before it commits them. `stops` are the stop strings,
    `ends` the token ids that end a text. `is_chat`: the text is a model's turn with thoughts and tool calls.

    After the last commit, `text` is the text of the answer and `stop` the stop string that ended it, or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], ends: Sequence[int], is_chat: bool = False
    ) -> None:
        self._tokenizer, self._detokeniser = tokenizer, Detokeniser(tokenizer)
        self._stops, self._ends, self.is_chat = stops, frozenset(ends), is_chat
        self._longest_stop = max((len(stop) for stop in stops), default=0)
        self._tokens: list[int] = []
        self._sent, self._thought_sent, self._calls_sent = 0, 0, 0
        """Characters of text and thought, and calls, that events already carry."""
        self._raw = ""
        """The detokenised text, up to the stop string."""
        self._tail = ""
        """Text of the stop string, and behind it, that belongs to tokens which are kept."""
        self._parsed: tuple[tuple[int, bool], Reply] | None = None
        self.text = ""
        self.stop: str | None = None

    def push(self, tokens: list[int]) -> int | None:
        """Take new tokens; returns how many of them stand before a stop string, None where there is none."""
        if not self._stops:
            if self.is_chat:  # its text comes from the reply
                return None
            self._raw += self._detokeniser.push(tokens)
            return None
        for n, token in enumerate(tokens):
            start = len(self._raw)
            self._raw += self._detokeniser.push([token])
            first = max(0, start - self._longest_stop + 1)
            hits = [(at, stop) for stop in self._stops if (at := self._raw.find(stop, first)) >= 0]
            if hits:
                at, self.stop = min(hits)
                keep = n if at <= start else n + 1
                self._tail = self._raw[at:start] if keep == n else self._raw[at:]
                self._raw = self._raw[:at]
                return keep
        return None

    def with_text(self, event: Event) -> Event:
        """The event with its text; a commit's is what it adds to the answer."""
        if isinstance(event, Draft):
            pieces = [self._piece(token) for token in event.tokens]
            end = next((n for n, token in enumerate(event.tokens) if token in self._ends), len(pieces))
            return replace(event, text=self._tokenizer.decode(event.tokens[:end]), pieces=pieces, end=end)
        if isinstance(event, Done):
            more: dict[str, Any] = {}
            if self.is_chat:
                reply = self._reply(True)
                more = {"thought": reply.thought, "tool_calls": reply.tool_calls}
                if reply.thought is not None:
                    more["usage"] = replace(event.usage, thought_tokens=thought_tokens(self._tokenizer, event.tokens))
            return replace(event, text=self.text, stop=self.stop, **more)
        self._tokens += event.tokens
        if event.logprobs is not None:
            top = event.top_logprobs
            event = replace(
                event,
                pieces=[self._tokenizer.decode([token], skip_special=False) for token in event.tokens],
                top_logprobs=None if top is None else [self._by_piece(log_p) for log_p in top],
            )
        if self.is_chat:
            return self._with_reply(event)
        self._finish_plain_text(event.is_last)
        return replace(event, text=self._new_text(event.is_last))

    def _with_reply(self, event: Commit) -> Commit:
        reply = self._reply(event.is_last)
        self.text = reply.text
        thought = (reply.thought or "")[self._thought_sent :]
        calls = reply.tool_calls[self._calls_sent :]
        self._thought_sent, self._calls_sent = self._thought_sent + len(thought), len(reply.tool_calls)
        return replace(event, text=self._new_text(event.is_last), thought=thought, tool_calls=calls)

    def _reply(self, is_over: bool) -> Reply:
        """The reply in the tokens so far; before the end, the certain part of it. The end asks twice: it is cached."""
        key = len(self._tokens), is_over
        if self._parsed is None or self._parsed[0] != key:
            self._parsed = key, self._parse(is_over)
        return self._parsed[1]

    def _parse(self, is_over: bool) -> Reply:
        tokens = self._tokens
        if not is_over:
            opened = [n for n, token in enumerate(tokens) if token == self._tokenizer.id("<|tool_call>")]
            closed = self._tokenizer.id("<tool_call|>")
            if opened and closed not in tokens[opened[-1] :]:
                tokens = tokens[: opened[-1]]
        reply = parse_ids(self._tokenizer, tokens)
        text, thought = reply.text, reply.thought or ""
        if self.stop is not None:
            text, thought = text.removesuffix(self._tail), thought.removesuffix(self._tail)
        if not is_over:
            text, thought = text.rstrip(_REPLACEMENT), thought.rstrip(_REPLACEMENT)
            thought = "" if "thought".startswith(thought) else thought  # the channel's label is not complete yet
        return replace(reply, text=text, thought=thought or None)

    def _finish_plain_text(self, is_over: bool) -> None:
        if is_over and self.stop is None:
            self._raw += self._detokeniser.flush()
        self.text = self._raw

    def _new_text(self, is_over: bool) -> str:
        """The text that is certain and that no event carries yet."""
        end = len(self.text)
        if not is_over:
            sizes = (
                size
                for size in range(min(self._longest_stop - 1, end), 0, -1)
                if any(stop.startswith(self.text[end - size :]) for stop in self._stops)
            )
            end -= next(sizes, 0)  # the end of the text may be the beginning of a stop string
        piece, self._sent = self.text[self._sent : end], max(end, self._sent)
        return piece

    def _by_piece(self, log_p: dict[Any, float]) -> dict[str, float]:
        """Log-probabilities by the tokens' text; of two tokens with the same text the likelier counts."""
        by_piece: dict[str, float] = {}
        for token, value in log_p.items():
            by_piece.setdefault(self._tokenizer.decode([token], skip_special=False), value)
        return by_piece

    def _piece(self, token: int) -> str:
        return "" if token in self._tokenizer.special_ids else self._tokenizer.decode([token])


def thought_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many tokens of a turn are thoughts, their markers left out; one that is not closed goes to the end."""
    opener, closer = tokenizer.id("<|channel>"), tokenizer.id("<channel|>")
    marks = [token for token in tokens if token in (opener, closer)]
    is_thought, count = marks[:1] == [closer], 0  # the prompt may end in an open thought
    for token in tokens:
        if token in (opener, closer):
            is_thought = token == opener
        elif is_thought:
            count += 1
    return count
