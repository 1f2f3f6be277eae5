"""Prompts: plain text behind the begin-of-text token, or a conversation through the chat template.

It also makes the prompt that a template stands behind. It deliberately lacks the model, of which it knows the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import CapacityError, InputError
from sfumato.model.config import ModelConfig
from sfumato.model.prompt import Prompt
from sfumato.templates.layout import Sheet
from sfumato.templates.requests import Messages, Tools
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

MARKED = 64
"""Tokens of instructions from which on it pays to keep them encoded for others."""

_INSTRUCTIONS = ("system", "developer")
"""Roles of a first message that many conversations begin with."""


class PromptEncoder:
    """Makes prompts for one model, which messages call `name`. `template` None: it has no chat template."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, template: ChatTemplate | None, name: str) -> None:
        self.config, self.tokenizer, self.template, self.name = config, tokenizer, template, name

    def encode(
        self, prompt: str | Messages, tools: Tools | None = None, thinking: bool = False, is_continued: bool = False
    ) -> Prompt:
        """The prompt, which carries tokens alone today. `is_continued`: it ends within its last message.

        InputError for a conversation that the template refuses, CapacityError for text that no context holds."""
        if isinstance(prompt, str):
            self._check_length("the prompt", [prompt])
            return Prompt.of(self.tokenizer.encode(prompt, bos=True))
        if self.template is None:
            raise InputError(f"{self.name or 'this checkpoint'} has no chat template; give plain text instead")
        messages = prompt if isinstance(prompt, (list, tuple)) else []
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        self._check_length("the conversation", [text for text in contents if isinstance(text, str)])
        ids = self.template.encode(self.tokenizer, prompt, tools, thinking, add_generation_prompt=not is_continued)
        return Prompt.of(self._without_end(ids) if is_continued else ids)

    def encode_around(
        self, before: str | Messages, texts: Sequence[str], thinking: bool = False
    ) -> tuple[list[int], list[list[int]]]:
        """Prompts of one beginning that end in each of these texts, asking for an answer: what all share, and the rest.

        Errors as of `encode`."""
        whole = [before] if isinstance(before, str) else [one.get("content") for one in before]
        self._check_length("the state", [text for text in whole if isinstance(text, str)])
        longest = max(texts, key=len)
        self._check_length("a question", [longest])
        if self.template is None:
            if not isinstance(before, str):
                raise InputError(f"{self.name or 'this checkpoint'} has no chat template; give plain text instead")
            tails = [self.tokenizer.encode(f"{text}\nAnswer:") for text in texts]
            return self.tokenizer.encode(f"{before}\n\n", bos=True), tails
        messages: list[Any] = [{"role": "user", "content": before}] if isinstance(before, str) else [*before]
        content = messages[-1].get("content")
        if messages[-1].get("role") != "user" or not content:
            messages.append({"role": "user", "content": ""})
        elif isinstance(content, str):
            messages[-1] = {**messages[-1], "content": f"{content}\n\n"}
        else:
            messages[-1] = {**messages[-1], "content": [*content, {"type": "text", "text": "\n\n"}]}
        return self.template.encode_around(self.tokenizer, messages, texts, thinking)

    def _without_end(self, ids: list[int]) -> list[int]:
        """Token ids up to the end of the last turn, which the template wrote: no text holds such a token."""
        ends = set(self.config.eos_ids)
        last = next((place for place in reversed(range(len(ids))) if ids[place] in ends), None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            raise InputError(f"the chat template of {self.name} closes no turn, so that none can be continued")
        return ids[:last]

    def encode_before(self, prompt: str | Messages | None, sheet: Sheet) -> Prompt:
        """What the first canvas of a sheet stands behind: the prompt, then the sheet's lead.

        A conversation is also told the text that follows where no canvas can see it."""
        if sheet.beyond and self.template is not None and not isinstance(prompt, str):
            hint = f"The text goes on later with:\n\n{sheet.beyond}"
            messages: list[Mapping[str, Any]] = [*(prompt or [{"role": "user", "content": "Write the text."}])]
            content = messages[-1].get("content")
            if isinstance(content, str):  # content that is neither is refused below
                messages[-1] = {**messages[-1], "content": f"{content}\n\n{hint}"}
            elif isinstance(content, list):
                messages[-1] = {**messages[-1], "content": [*content, {"type": "text", "text": hint}]}
            prompt = messages
        return self.encode(prompt or "").extended(sheet.lead)

    def marks(self, prompt: Prompt, messages: Messages, tools: Tools | None) -> list[int]:
        """Where the instructions that open a conversation end: many conversations begin with the same."""
        if not tools and messages[0].get("role") not in _INSTRUCTIONS:
            return []
        end = next((n for n, token in enumerate(prompt) if token in self.config.eos_ids), 0) + 1
        return [end] if MARKED <= end < len(prompt) else []

    def _check_length(self, what: str, texts: Sequence[str]) -> None:
        """CapacityError for texts that are too long for the context, however they are encoded."""
        least, most = sum(map(self.tokenizer.least, texts)), self.config.max_position
        if least > most:
            raise CapacityError(
                f"{what} has {sum(map(len, texts))} characters, which are at least {least} tokens, beyond the context "
                f"of {most}; shorten it"
            )
