"""The checkpoint's chat template: messages, tools and thinking to the text and token ids of a prompt.

The template is the checkpoint's own jinja, rendered in a sandbox in a child process (`rendering`). **A message cannot
inject control tokens**: `ChatTemplate.encode` marks the places in the caller's strings where a control token could
begin or end, looks for control tokens in the marked rendering, and removes the marks from the ordinary text between
them. So every control token in a prompt was put there by the template.

Deliberately absent: images (this engine reads text), and templates of our own for checkpoints that have none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.errors import CheckpointError, InputError
from sfumato.model.config import read_json
from sfumato.system import confined
from sfumato.text import rendering
from sfumato.text.messages import check_messages, check_tools
from sfumato.text.replies import ENDS
from sfumato.text.tokenizer import Tokenizer
from sfumato.text.tokenizer_file import read_text

MAX_TEMPLATE = 256 << 10
"""Characters of template source; Gemma 4's has 17 thousand."""
CHILDREN = confined.ChildPool()
"""The child processes that render."""

_WHAT = "the chat template"
_TURNS = ("<|turn>", "<turn|>")
"""The control tokens around a turn, in Gemma's format."""
_CHANNEL = ("<|channel>", "<channel|>")
"""The control tokens around a thought, in Gemma's format."""
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class AnsweredTurn(NamedTuple):
    """An answer of a conversation as token ids: the prompt that asks for it, and what the model writes."""

    message: int
    """Its number in the conversation."""
    prompt: list[int]
    tokens: list[int]
    """Up to the control token that ends the turn, that one included where the template writes one."""


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
        guard = _Guard(_TURNS, [self.source, messages, tools, self.special])
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
        guard = _Guard({*tokenizer.control_tokens, *_TURNS}, [self.source, messages, tools, self.special])
        try:
            text = self._render(guard.mark(messages), guard.mark(tools), thinking, add_generation_prompt)
        except InputError as error:
            raise InputError(guard.unmark(str(error))) from None
        return guard.ids(tokenizer, text)

    def answers(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        numbers: Iterable[int],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
    ) -> Iterator[AnsweredTurn]:
        """The answers of a conversation, those of the assistant's messages with these numbers, one after the other.

        The prompt of each is what `encode` gives for the messages before it. The answer is what the template adds for
        the message, without the header of its turn, up to the token at which generation ends: `<turn|>`, or
        `<|tool_response>` where results follow its calls. A message with a thought is asked for with thinking on, and
        its thought stands before the answer even where the template leaves it out of a history.
        """
        messages, tools = check_messages(messages), check_tools(tools)
        guard = _Guard({*tokenizer.control_tokens, *_TURNS}, [self.source, messages, tools, self.special])
        marked, marked_tools = guard.mark(messages), guard.mark(tools)
        for number in numbers:
            thought = marked[number].get("reasoning_content", "").strip()
            behind = number + 1
            while behind < len(marked) and marked[behind]["role"] == "tool":
                behind += 1
            parts = ((number, True), (number, False), (behind, False))  # the prompt, the same unasked, with the answer
            variables = [
                self._variables(marked[:end], marked_tools, thinking or bool(thought), is_asked)
                for end, is_asked in parts
            ]
            try:
                prompt, before, whole = CHILDREN.run(rendering.render_all, self.source, variables, what=_WHAT)
                prompt = _with_open_turn(prompt)
                text = _addition(prompt, before, whole)
            except InputError as error:
                raise InputError(f"message {number}: {guard.unmark(str(error))}") from None
            if thought and _CHANNEL[0] not in text and all(tokenizer.id(token) is not None for token in _CHANNEL):
                text = f"{_CHANNEL[0]}thought\n{thought}\n{_CHANNEL[1]}{text}"
            yield AnsweredTurn(number, guard.ids(tokenizer, prompt), guard.ids(tokenizer, _until_end(tokenizer, text)))

    def _render(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> str:
        variables = self._variables(messages, tools, thinking, add_generation_prompt)
        text: str = CHILDREN.run(rendering.render, self.source, variables, what=_WHAT)
        return _with_open_turn(text) if add_generation_prompt else text

    def _variables(self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool) -> dict[str, Any]:
        variables = {"messages": messages, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        return variables | {**self.special, "enable_thinking": thinking}


def _with_open_turn(text: str) -> str:
    """The rendering of a prompt, with an open turn of the model where the template has closed the last one.

    Gemma 4's own does so behind an assistant's message with content, calls and results, although it is asked for an
    answer. What it writes behind the turn belongs into the model's."""
    start, end = (text.rfind(token) for token in _TURNS)
    if end <= start:
        return text
    behind = end + len(_TURNS[1])
    behind += text.startswith("\n", behind)
    return f"{text[:behind]}{_TURNS[0]}model\n{text[behind:]}"


def _addition(prompt: str, before: str, whole: str) -> str:
    """What the template writes for an answer: `whole` has it, `before` ends before it, `prompt` asks for it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    if whole.startswith(before):  # the prompt says more than the history will, such as a thought that is left empty
        return whole[len(before) :].removeprefix(f"{_TURNS[0]}model\n")
    raise InputError(
        "the chat template writes what stands before this answer in another way once the answer is there, so that its "
        "tokens cannot be told from the prompt's; end the conversation with an answer before it"
    )


def _until_end(tokenizer: Tokenizer, text: str) -> str:
    """A turn up to the first control token at which generation ends, that one included; all of it without one."""
    end = 0
    for piece, control in tokenizer.pieces(text):
        end += len(piece)
        if control is not None and piece in ENDS:
            return text[:end]
    return text.rstrip("\n")


class _Guard:
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
        self._mark = next(free, "")
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
