"""LLM: text in, text out. Joins a model, its tokenizer and its chat template; adds text to the engine's events.

Multi-turn chats reuse what is already encoded: the cache of the last single request is kept, and a new prompt that
begins the same way continues from there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

from sfumato import chat, weights
from sfumato.cache import KVCache
from sfumato.config import read_generation_config
from sfumato.engine import Run
from sfumato.events import Commit, Completion, Done, Draft, Event, InputError, Options
from sfumato.model import Model
from sfumato.tokenizer import Detokeniser, Tokenizer

Messages = list[dict[str, Any]]


@dataclass
class _Kept:
    """The encoded beginning of the last conversation: row 0 of the cache holds exactly these tokens."""

    tokens: list[int]
    cache: KVCache


class LLM:
    """A loaded model. `LLM.load` makes one; `defaults` are the checkpoint's own values for options left open."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: chat.ChatTemplate | None = None,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        self.model, self.tokenizer, self.template, self.name = model, tokenizer, template, name
        self.defaults = dict(defaults or {})
        self._kept: _Kept | None = None

    @classmethod
    def load(
        cls,
        path: str | Path = "nano",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        ops: str = "auto",
        quantize: str | None = None,
        notice: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> LLM:
        """From a checkpoint folder, a hub id ("owner/name"), or "nano", the model inside this package.

        `dtype` None keeps the checkpoint's own; `ops` "auto" takes the fastest operations for device and dtype;
        `quantize` keeps the weights of experts and other products in fewer bits: "int8", on a GPU also "fp8" and
        "int4". `notice` hears of what is left aside; `progress(done, all)` counts bytes. CheckpointError names what is
        wrong with a file, InputError what is wrong with an argument."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = weights.resolve(path)
        tokenizer = Tokenizer.from_folder(folder)
        has_template = any((folder / name).exists() for name in ("chat_template.jinja", "tokenizer_config.json"))
        template = chat.ChatTemplate.from_folder(folder, tokenizer.special) if has_template else None
        model = weights.load(
            folder, device=device, dtype=dtype, ops=ops, notice=notice, progress=progress, quantize=quantize
        )
        defaults, _ = read_generation_config(folder)
        return cls(model, tokenizer, template, defaults, str(path))

    @overload
    def complete(self, prompt: str, options: Options = ...) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], options: Options = ...) -> list[Completion]: ...
    def complete(
        self,
        prompt: str | list[str],
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion | list[Completion]:
        """Continue plain text, without a chat template; a list of texts runs as one batch."""
        texts = [prompt] if isinstance(prompt, str) else prompt
        found = self._complete([self.encode(text) for text in texts], options)
        return found[0] if isinstance(prompt, str) else found

    def chat(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        options: Options = Options(),  # noqa: B008 - frozen
    ) -> Completion:
        """Answer a conversation; thought and tool calls are parsed out of the answer's text."""
        completion = self._complete([self.encode(messages, tools, options.thinking)], options)[0]
        reply = chat.parse_ids(self.tokenizer, completion.tokens)
        text = completion.text if completion.stop is not None else reply.text
        return replace(completion, text=text, thought=reply.thought, tool_calls=reply.tool_calls)

    def stream(
        self,
        prompt: str | Messages,
        options: Options = Options(),  # noqa: B008 - frozen
        tools: list[dict[str, Any]] | None = None,
    ) -> Iterator[Event]:
        """The events of one request: Draft (if options.drafts), Commit, Done. A string is continued, messages are
        answered. The texts of the Commits joined are the text of Done."""
        return self.events([self.encode(prompt, tools, options.thinking)], options)

    def encode(
        self, prompt: str | Messages, tools: list[dict[str, Any]] | None = None, thinking: bool = False
    ) -> list[int]:
        """Prompt to token ids: plain text behind the begin-of-text token, or a conversation through the template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if self.template is None:
            raise InputError(f"{self.name or 'this checkpoint'} has no chat template; give plain text instead")
        return self.template.encode(self.tokenizer, prompt, tools, thinking)

    def events(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options] = Options(),  # noqa: B008 - frozen
        pins: Sequence[Mapping[int, int]] | None = None,
    ) -> Iterator[Event]:
        """Events with text for a batch of prompts (token ids). `pins`: see `engine.Run`."""
        each = [options] * len(prompts) if isinstance(options, Options) else list(options)
        each = [self._complete_options(o) for o in each]
        readers = [_Reader(self.tokenizer, o.stop) for o in each]
        run = Run(
            self.model,
            prompts,
            each,
            pins=pins,
            watch=lambda row, tokens: readers[row].push(tokens),
            cache=self._continue(prompts),
        )
        for event in run:
            if isinstance(event, Draft):
                yield replace(event, text=self.tokenizer.decode(self._before_eos(event.tokens)))
            elif isinstance(event, Commit):
                is_over = run.rows[event.row].finish_reason is not None
                yield replace(event, text=readers[event.row].take(is_over))
            else:
                reader = readers[event.row]
                yield replace(event, text=reader.text, stop=reader.found)
        if len(prompts) == 1:
            held = [*run.rows[0].prompt, *run.rows[0].tokens][: run.cache.lengths[0]]
            self._kept = _Kept(held, run.cache) if len(held) == run.cache.lengths[0] else None

    def forget(self) -> None:
        """Free the cache of the last conversation."""
        self._kept = None

    def _complete(self, prompts: list[list[int]], options: Options) -> list[Completion]:
        found: dict[int, Completion] = {}
        for event in self.events(prompts, replace(options, drafts=False)):
            if isinstance(event, Done):
                found[event.row] = Completion(
                    event.text,
                    event.tokens,
                    event.finish_reason,
                    event.usage,
                    event.seed,
                    event.logprobs,
                    stop=event.stop,
                )
        return [found[row] for row in range(len(prompts))]

    def _complete_options(self, options: Options) -> Options:
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return replace(options.with_defaults(self.defaults), seed=seed)

    def _continue(self, prompts: Sequence[Sequence[int]]) -> KVCache | None:
        """The kept cache, cut back to what it has in common with the prompt, if that is anything."""
        kept, self._kept = self._kept, None
        if kept is None or len(prompts) != 1:
            return None
        shared = 0
        for ours, theirs in zip(kept.tokens, prompts[0][:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if not shared or not kept.cache.can_truncate(0, shared):
            return None
        kept.cache.truncate_(0, shared)
        return kept.cache

    def _before_eos(self, tokens: list[int]) -> list[int]:
        ends = [n for n, token in enumerate(tokens) if token in self.model.config.eos_ids]
        return tokens[: ends[0]] if ends else tokens


class _Reader:
    """The text of one row as it grows: looks for stop strings, and holds back what may be the beginning of one."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokeniser = Detokeniser(tokenizer)
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._given = 0
        self.text = ""
        self.found: str | None = None

    def push(self, tokens: list[int]) -> int | None:
        """Take new tokens; the number of them that stand before a stop string, None where there is none."""
        for n, token in enumerate(tokens):
            start = len(self.text)
            self.text += self._detokeniser.push([token])
            hits = [(at, s) for s in self._stops if (at := self.text.find(s, max(0, start - self._longest + 1))) >= 0]
            if hits:
                at, self.found = min(hits)
                self.text = self.text[:at]
                return n if at <= start else n + 1
        return None

    def take(self, is_over: bool) -> str:
        """The text that is certain and was not given yet."""
        if is_over and self.found is None:
            self.text += self._detokeniser.flush()
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
