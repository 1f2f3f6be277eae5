"""Queries, which are what is asked of a model: frozen records, the same in Python, over HTTP and between processes.

Each is plain data that can be pickled, and says by its type what it ends with. A new kind is a class here and its plan
in `plans.Planner`, which matches queries by type; engine, batch and worker carry out any plan. HTTP has a route and a
body for each kind that it offers, so `remote.bodies`, `remote.results` and the server's routes match by type too. A
request is something else: what a plan asks of an engine (`engine.request`). This module deliberately lacks checks: the
plan of a query checks it. Nothing here imports torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sfumato.errors import InputError
from sfumato.events import Completion, Decisions, Edited, Filled, Scored, TokenCount
from sfumato.model.loaded import AdapterList
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.questions import Choice, Question, question_of, state_text
from sfumato.templates.slots import Template, slot_of

Messages = Sequence[Mapping[str, Any]]
"""A conversation: records with "role", "content" and what a model's turn brings besides."""

ChatPrompt = str | Mapping[str, Any] | Messages
"""A conversation as callers write it: a text, which is one user message; one message; or the messages."""

Tools = Sequence[Mapping[str, Any]]
"""Tools that an answer may call, each a record as OpenAI's API has it."""

Result = TypeVar("Result")


Think = Literal["never", "auto", "always"]
"""When a model thinks before it decides."""


ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of a conversation's messages, as the APIs name them."""


def _is_message(value: Any) -> bool:
    """Whether a value is meant as a message: a record with a role, and with what a message has or a role of its own."""
    if not isinstance(value, Mapping) or "role" not in value:
        return False
    return "content" in value or "tool_calls" in value or value["role"] in ROLES


def _question_named(id: Any, value: Any) -> Question:
    """A question as a value, however it is written. InputError names the question."""
    if isinstance(value, Question):
        return value
    item = id if isinstance(id, str) else None
    if not isinstance(value, Mapping | list | tuple):
        message = f"question {reprlib.repr(id)} is {reprlib.repr(value)}; give a Noul, Choice, Score or Span"
        raise InputError(f"{message}, its record, or a list of options", option="questions", item=item)
    try:
        return question_of(value) if isinstance(value, Mapping) else Choice(value, id)
    except InputError as error:
        raise InputError(f"question {reprlib.repr(id)}: {error}", option=error.option, item=item) from None


def _text_of(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return "".join(text for text in parts if isinstance(text, str))


def messages_of(prompt: ChatPrompt) -> Messages:
    """The messages of a conversation, however it is written. What is neither is returned as it is, for the checks."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [prompt] if isinstance(prompt, Mapping) else prompt


class QueryFor(Generic[Result]):
    """The base of all queries; the parameter is the type of the result that a query ends with.

    A subclass is a frozen dataclass with a field `options`."""

    options: Options
    """How to generate."""

    def __post_init__(self) -> None:
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", Options.from_dict(self.options))

    @property
    def beginning(self) -> Sequence[Any]:
        """What the model reads first: a text, token ids, messages, or pieces of a template.

        Queries that begin alike may share what is encoded. Empty: nothing, or a kind that does not say."""
        return ()


@dataclass(frozen=True)
class Complete(QueryFor[Completion]):
    """Continue a text (or token ids, or a prompt that is encoded already), without a chat template."""

    prompt: str | Sequence[int] | Prompt
    options: Options = Options()  # noqa: RUF009 - frozen

    @property
    def beginning(self) -> Sequence[Any]:
        """The prompt's text, or its token ids."""
        return self.prompt if isinstance(self.prompt, str) else list(self.prompt)


@dataclass(frozen=True)
class Chat(QueryFor[Completion]):
    """Answer a conversation; a text alone is one user message."""

    messages: ChatPrompt
    tools: Tools | None = None
    options: Options = Options()  # noqa: RUF009 - frozen
    is_continued: bool = False
    """Whether the last message, which is the assistant's, is the beginning of the answer; the result is the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "messages", messages_of(self.messages))

    @property
    def conversation(self) -> Messages:
        """The messages, in a list."""
        return messages_of(self.messages)

    @property
    def beginning(self) -> Sequence[Any]:
        """The messages."""
        return self.conversation


@dataclass(frozen=True)
class Infill(QueryFor[Filled]):
    """Write the text between two texts, in `length` tokens; None: the length is searched for, up to `at_most` (64)."""

    prefix: str
    suffix: str
    length: int | None = None
    at_most: int | None = None
    options: Options = Options()  # noqa: RUF009 - frozen

    @property
    def beginning(self) -> Sequence[Any]:
        """The text before what is written."""
        return self.prefix


@dataclass(frozen=True)
class Edit(QueryFor[Edited]):
    """Rewrite a text where it stands: its `spans` (from character, to character), or wherever the `instruction` says.

    `strength` is the share of it that starts as noise; None: 0.5."""

    text: str
    instruction: str | None = None
    spans: Sequence[tuple[int, int]] | None = None
    strength: float | None = None
    options: Options = Options()  # noqa: RUF009 - frozen

    @property
    def beginning(self) -> Sequence[Any]:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Fill(QueryFor[Filled]):
    """Fill the slots of a template. `prompt` is what it answers: a conversation, a text, or nothing."""

    template: Template
    prompt: str | Messages | None = None
    options: Options = Options()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.template, (list, tuple)):
            pieces = enumerate(self.template, 1)
            slots = [slot_of(piece, number) if isinstance(piece, Mapping) else piece for number, piece in pieces]
            object.__setattr__(self, "template", slots)

    @property
    def beginning(self) -> Sequence[Any]:
        """What the template answers; without that, the template."""
        return self.prompt or self.template


@dataclass(frozen=True)
class Decide(QueryFor[Decisions]):
    """Answer questions with given answers about a state, each from a read of its own.

    The state is a text, a conversation, or plain data, which is read as JSON. Questions are values (`Noul`, `Choice`,
    `Score`, `Span`), their records, or lists of options, which are a `Choice` whose id is what is asked."""

    state: Any
    questions: Mapping[str, Question]
    steps: int = 1
    """Denoise passes of each read."""
    samples: int = 1
    """Draws of noise whose probabilities are averaged."""
    canvas: int | None = None
    """Positions of the canvas; None: as few as the options need, in sixteens."""
    think: Think = "never"
    """Whether the model thinks about a question before it is read: "auto" where a first read is not sure enough."""
    threshold: float = 0.5
    """The confidence under which that is so."""
    calibrated: bool = True
    """Whether the checkpoint's calibration applies, where it has one."""
    options: Options = Options()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.questions, Mapping):
            questions = {id: _question_named(id, value) for id, value in self.questions.items()}
            object.__setattr__(self, "questions", questions)

    @property
    def conversation(self) -> Messages | None:
        """The state, where it is a conversation: messages, each with a role. Other records with a "role" are data."""
        state = [self.state] if isinstance(self.state, Mapping) else self.state
        is_list = isinstance(state, (list, tuple)) and bool(state)
        return state if is_list and all(map(_is_message, state)) else None

    @property
    def text(self) -> str:
        """The text that a `Span` quotes: the state, or what the messages say, with a blank line between them."""
        messages = self.conversation
        return state_text(self.state) if messages is None else "\n\n".join(map(_text_of, messages))

    @property
    def beginning(self) -> str | Messages:
        """What the questions are about."""
        return self.conversation or state_text(self.state)


@dataclass(frozen=True)
class Likelihood(QueryFor[Scored]):
    """Say how likely a text is, token by token: a continuation behind a prompt, or without one the whole prompt.

    The numbers are those of the encode pass. `options.top_logprobs` asks for the likeliest tokens in each place; the
    other options are of the one token that the model would write behind the text."""

    prompt: str | Sequence[int] | Prompt
    continuation: str | Sequence[int] | None = None
    """Of the same kind as the prompt: a text, or token ids."""
    options: Options = Options()  # noqa: RUF009 - frozen

    @property
    def beginning(self) -> Sequence[Any]:
        """The prompt's text, or its token ids."""
        return self.prompt if isinstance(self.prompt, str) else list(self.prompt)


@dataclass(frozen=True)
class CountTokens(QueryFor[TokenCount]):
    """Count the tokens of the prompt that a query for an answer has. The model does not run."""

    query: AnswerQuery
    options: Options = Options()  # noqa: RUF009 - frozen

    @property
    def beginning(self) -> Sequence[Any]:
        """What that query begins with."""
        return self.query.beginning


Query = Chat | Complete | Infill | Fill | Edit | Decide | Likelihood | CountTokens
"""Any query that this package has."""


@dataclass(frozen=True)
class LoadAdapter(QueryFor[AdapterList]):
    """Load the adapter in a folder under a name, which `Options.adapter` may then have."""

    name: str
    folder: str
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class UnloadAdapter(QueryFor[AdapterList]):
    """Unload an adapter: what is asked of it from now on is refused, and what is under way ends with it."""

    name: str
    options: Options = Options()  # noqa: RUF009 - frozen


AdapterQuery = LoadAdapter | UnloadAdapter
"""A query that changes which adapters a model has; it asks nothing of the model."""

AnswerQuery = Chat | Complete
"""A query that its events answer: the last one holds the whole. The others end with a result of their own."""
