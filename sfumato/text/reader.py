"""The tokens of one row as text while they come: stop strings, split characters, thoughts and tool calls.

Text is passed on as soon as it is certain. What may be the beginning of a stop string, of a character or of a tool call
is held back until the next tokens decide it. All pieces, joined, are the text of the finished answer.

Two ways lead to the text: a plain completion is detokenised as it comes; a chat answer goes through the parser of
`replies`, which tells thoughts and tool calls from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sfumato.events import Commit, Done, Draft, Event
from sfumato.text.replies import ReplyParser
from sfumato.text.tokenizer import Detokeniser, Tokenizer

_CLOSERS = {"<|channel>": "<channel|>", "<|tool_call>": "<tool_call|>"}


class Reader:
    """Reads one row: `push` finds stop strings in its tokens, `with_text` puts text into its events.

    `push` is a request's `watch`: the engine calls it with tokens before it commits them. `stops` are the stop strings,
    `ends` the token ids that end a text. `parser`: the text is a model's turn with thoughts and tool calls; stop
    strings are looked for in neither.

    After the last commit, `text` is the text of the answer and `stop` the stop string that ended it, or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...], ends: Sequence[int], parser: ReplyParser | None = None
    ) -> None:
        self._tokenizer, self._detokeniser = tokenizer, Detokeniser(tokenizer)
        self._stops, self._ends, self._parser = stops, frozenset(ends), parser
        self._hidden = {"<channel|>"} if parser is not None and parser.is_thinking else set[str]()
        """What closes the thought and the call that are open."""
        self._longest_stop = max((len(stop) for stop in stops), default=0)
        self._raw = ""
        """The detokenised text, up to the stop string."""
        self._sent = 0
        """Characters of a plain text that events already carry."""
        self._tail = ""
        """Text of the stop string, and behind it, that belongs to tokens which are kept."""
        self._held = ""
        """The end of the text that a parser has given, which may be the beginning of a stop string."""
        self._least = 0
        """Where in the raw text the present stretch of text begins."""
        self._pieces: dict[str, list[str]] = {"text": [], "thought": []}
        self._calls: list[dict[str, Any]] = []
        self.stop: str | None = None

    @property
    def text(self) -> str:
        """The text that events carry so far."""
        return self._raw[: self._sent] if self._parser is None else "".join(self._pieces["text"])

    def push(self, tokens: list[int]) -> int | None:
        """Take new tokens; returns how many of them stand before a stop string, None where there is none."""
        if not self._stops:
            if self._parser is not None:  # its text comes from the reply
                return None
            self._raw += self._detokeniser.push(tokens)
            return None
        for n, token in enumerate(tokens):
            if self._parser is not None and self._is_hidden(token):
                continue
            start = len(self._raw)
            self._raw += self._detokeniser.push([token])
            first = max(self._least, start - self._longest_stop + 1)
            hits = [(at, stop) for stop in self._stops if (at := self._raw.find(stop, first)) >= 0]
            if hits:
                at, self.stop = min(hits)
                keep = n if at <= start else n + 1
                self._tail = self._raw[at:start] if keep == n else self._raw[at:]
                self._raw = self._raw[:at]
                return keep
        return None

    def _is_hidden(self, token: int) -> bool:
        """Whether a token of a turn stands in a thought or a call, or opens or closes one."""
        name = self._tokenizer.token(token) if token in self._tokenizer.special_ids else None
        if name in _CLOSERS:
            self._hidden.add(_CLOSERS[name])
        elif name in self._hidden:
            self._hidden.discard(name)
        else:
            return bool(self._hidden)
        self._raw += self._detokeniser.flush()
        self._least = len(self._raw)
        return True

    def with_text(self, event: Event) -> Event:
        """The event with its text; a commit's is what it adds to the answer."""
        if isinstance(event, Draft):
            pieces = [self._piece(token) for token in event.tokens]
            end = next((n for n, token in enumerate(event.tokens) if token in self._ends), len(pieces))
            return replace(event, text=self._tokenizer.decode(event.tokens[:end]), pieces=pieces, end=end)
        if isinstance(event, Done):
            if self._parser is None:
                return replace(event, text=self.text, stop=self.stop)
            thought = "".join(self._pieces["thought"]) or None
            usage = replace(event.usage, thought_tokens=self._parser.thought_tokens)
            more: dict[str, Any] = {"thought": thought, "tool_calls": self._calls, "usage": usage}
            return replace(event, text=self.text, stop=self.stop, **more)
        if event.logprobs is not None:
            top = event.top_logprobs
            event = replace(
                event,
                pieces=[self._tokenizer.piece(token) for token in event.tokens],
                top_logprobs=None if top is None else [self._tokenizer.by_piece(log_p) for log_p in top],
            )
        if self._parser is not None:
            return self._with_reply(event, self._parser)
        if event.is_last and self.stop is None:
            self._raw += self._detokeniser.flush()
        end = len(self._raw) - (0 if event.is_last else self._open_stop(self._raw))
        piece, self._sent = self._raw[self._sent : end], max(end, self._sent)
        return replace(event, text=piece)

    def _with_reply(self, event: Commit, parser: ReplyParser) -> Commit:
        parser.push(event.tokens)
        reply = parser.finish() if event.is_last else parser.take()
        text, thought = self._passed(reply.text, event), reply.thought or ""
        self._pieces["thought"].append(thought)
        self._calls += reply.tool_calls
        return replace(event, text=text, thought=thought, tool_calls=reply.tool_calls)

    def _passed(self, new: str, event: Commit) -> str:
        """What of new text is certain not to belong to a stop string, with what was held back before."""
        text = self._held + new
        if event.is_last:
            piece = text.removesuffix(self._tail.rstrip("\n")) if self.stop is not None else text
        else:
            piece = text[: len(text) - self._open_stop(text)]
        self._held = text[len(piece) :]
        self._pieces["text"].append(piece)
        return piece

    def _open_stop(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop string."""
        sizes = range(min(self._longest_stop - 1, len(text)), 0, -1)
        ends = (size for size in sizes if any(stop.startswith(text[len(text) - size :]) for stop in self._stops))
        return next(ends, 0)

    def _piece(self, token: int) -> str:
        return "" if token in self._tokenizer.special_ids else self._tokenizer.decode([token])
