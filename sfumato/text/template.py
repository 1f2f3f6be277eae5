"""The checkpoint's chat template: messages, tools and thinking to the text and token ids of a prompt.

The template is the checkpoint's own jinja, rendered in a sandbox in a child process (`rendering`). **A message cannot
inject control tokens**: `ChatTemplate.encode` marks the places in the caller's strings where a control token could
begin or end, looks for control tokens in the marked rendering, and removes the marks from the ordinary text between
them. So every control token in a prompt was put there by the template.

Deliberately absent: images (this engine reads text), and templates of our own for checkpoints that have none.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import read_json
from sfumato.system import confined
from sfumato.text import rendering
from sfumato.text.messages import check_messages, check_tools
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.tokenizer_file import read_text

MAX_TEMPLATE = 256 << 10
"""Characters of template source; Gemma 4's has 17 thousand."""
CHILDREN = confined.ChildPool()
"""The child processes that render."""

MOST_KEPT, LONGEST_KEPT = 64, 1 << 18
"""Conversations whose rendering is kept for the next questions about them, of so many characters at most."""

_WHAT = "the chat template"
TURNS = ("<|turn>", "<turn|>")
"""The control tokens around a turn, in Gemma's format."""
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class ChatTemplate:
    """A checkpoint's chat template. `special` gives it `bos_token` and its like by name (`Tokenizer.special`).

    A source that is too long or is not jinja is a CheckpointError. Messages and tools that do not fit are InputErrors
    that say which one.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_TEMPLATE:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, more than the {MAX_TEMPLATE} allowed"
            )
        try:
            CHILDREN.run(rendering.check, source, what=_WHAT)
        except InputError as error:
            raise CheckpointError(str(error)) from None
        self.source = source
        self.special = dict(special or {})
        self._around: dict[tuple[Any, ...], _Around] = {}
        """The last renderings of `encode_around`, oldest first."""
        self._guard = threading.Lock()

    @classmethod
    def from_folder(cls, folder: str | Path, special: Mapping[str, str] | None = None) -> ChatTemplate:
        """The template of a checkpoint folder: chat_template.jinja, else the one in tokenizer_config.json.

        CheckpointError where the folder has none, or one that cannot be used.
        """
        folder = Path(folder)
        path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        if path.is_file():
            source: Any = read_text(path)
        else:
            source = read_json(config).get("chat_template") if config.is_file() else None
            if isinstance(source, list):  # several, by name
                sources = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
                source = sources.get("default")
        if not isinstance(source, str):
            raise CheckpointError(f"{folder} has no chat template; complete plain text instead, or add {path.name}")
        try:
            return cls(source, special)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, for reading.

        Do not tokenise it: what a user wrote may look like a control token.
        """
        messages, tools = check_messages(messages), check_tools(tools)
        guard = Guard(TURNS, [self.source, messages, tools, self.special])
        return guard.unmark(self._render(guard.mark(messages), guard.mark(tools), thinking, add_generation_prompt))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The prompt as token ids.

        Every control token in them was put there by the template, none by a message or tool.
        """
        messages, tools = check_messages(messages), check_tools(tools)
        guard = Guard({*tokenizer.control_tokens, *TURNS}, [self.source, messages, tools, self.special])
        try:
            text = self._render(guard.mark(messages), guard.mark(tools), thinking, add_generation_prompt)
        except InputError as error:
            raise InputError(guard.unmark(str(error))) from None
        return guard.ids(tokenizer, text)

    def encode_around(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], texts: Sequence[str], thinking: bool = False
    ) -> tuple[list[int], list[list[int]]]:
        """Prompts that differ only in how the last message, the user's, ends: with each of these texts.

        Returns the token ids that all have in common, and those that follow in each. InputError for a template that
        changes what a message says."""
        messages = check_messages(messages)
        key = (tokenizer, thinking, json.dumps(messages))
        with self._guard:
            around = self._around.pop(key, None)
        if around is None or any(mark in text for text in texts for mark in around.guard.marks):
            around = self._render_around(tokenizer, messages, texts, thinking)
        if len(key[-1]) <= LONGEST_KEPT:
            with self._guard:
                self._around[key] = around
                while len(self._around) > MOST_KEPT:
                    del self._around[next(iter(self._around))]
        guard = around.guard
        return list(around.head), [guard.ids(tokenizer, guard.mark(text) + around.tail) for text in texts]

    def _render_around(
        self, tokenizer: Tokenizer, messages: list[dict[str, Any]], texts: Sequence[str], thinking: bool
    ) -> _Around:
        guard = Guard({*tokenizer.control_tokens, *TURNS}, [self.source, messages, list(texts), self.special])
        if not guard.cut:
            raise InputError("the messages use every private-use character of Unicode but one; remove some")
        *before, last = guard.mark(messages)
        content = last.get("content")
        cut = [{"type": "text", "text": guard.cut}]
        content = content + guard.cut if isinstance(content, str) else [*(content or []), *cut]
        try:
            text = self._render([*before, {**last, "content": content}], None, thinking, True)
        except InputError as error:
            raise InputError(guard.unmark(str(error))) from None
        if text.count(guard.cut) != 1:
            raise InputError(
                "the chat template does not write a message as it is, so that nothing can be put behind it"
            )
        head, _, tail = text.partition(guard.cut)
        return _Around(guard, tuple(guard.ids(tokenizer, head)), tail)

    def renderings(self, variables: list[dict[str, Any]]) -> list[str]:
        """The texts of the template with each of these `variables`, from one call of the child process."""
        texts: list[str] = CHILDREN.run(rendering.render_all, self.source, variables, what=_WHAT)
        return texts

    def variables(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> dict[str, Any]:
        """What the template is rendered with."""
        variables = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        return variables | {**self.special, "enable_thinking": thinking}

    def _render(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> str:
        (text,) = self.renderings([self.variables(messages, tools, thinking, add_generation_prompt)])
        return with_open_turn(text) if add_generation_prompt else text


def with_open_turn(text: str) -> str:
    """The rendering of a prompt, with an open turn of the model where the template has closed the last one.

    Gemma 4's own does so behind an assistant's message with content, calls and results, although it is asked for an
    answer. What it writes behind the turn belongs into the model's."""
    start, end = (text.rfind(token) for token in TURNS)
    if end <= start:
        return text
    behind = end + len(TURNS[1])
    behind += text.startswith("\n", behind)
    return f"{text[:behind]}{TURNS[0]}model\n{text[behind:]}"


class Guard:
    """Marks, in the caller's strings, every place where a control token could begin or end.

    The mark is one private-use character that nothing else in the rendering contains. It goes after each character that
    begins some control token and before each that ends one. So no control token starts or stops in a caller's string,
    however the template joins them.
    """

    def __init__(self, control: Iterable[str], inputs: Any) -> None:
        """`control` are the texts of the control tokens; `inputs` is everything that goes into the rendering."""
        control = [token for token in control if token]
        for token in control:
            if len(token) == 1:
                raise CheckpointError(f"the control token {token!r} is one character long: text cannot avoid it")
        used: set[str] = set()
        for text in _strings([*control, inputs]):
            used.update(text)
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        self._mark, self.cut = next(free, ""), next(free, "")
        """`cut`: another such character, to find a place again; "" where there is none left."""
        self.marks = self._mark, self.cut
        if not self._mark:
            raise InputError("the messages use every private-use character of Unicode; remove some")
        first = "".join(re.escape(character) for character in sorted({token[0] for token in control}))
        last = "".join(re.escape(character) for character in sorted({token[-1] for token in control}))
        self._places = re.compile(f"(?<=[{first}])|(?=[{last}])" if control else "(?!)")

    def mark(self, value: Any) -> Any:
        """A copy of plain data, marked."""
        if isinstance(value, str):
            return self._places.sub(self._mark, value)
        if isinstance(value, dict):
            # A role is one of `messages.ROLES`, never the caller's own words, and the template compares it.
            return {self.mark(key): inner if key == "role" else self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.mark(inner) for inner in value]
        return value

    def unmark(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self._mark, "")

    def ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """The token ids of a marked rendering."""
        ids: list[int] = []
        for piece, control in tokenizer.pieces(text):
            ids += tokenizer.encode(self.unmark(piece)) if control is None else [control]
        return ids


class _Around(NamedTuple):
    """The rendering of a conversation to whose end texts are put."""

    guard: Guard
    head: tuple[int, ...]
    """Token ids up to there."""
    tail: str
    """The marked rendering from there on."""


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
