"""What is asked of a model: a small family of frozen records, the same in Python, over HTTP and between processes.

Each is plain data that can be pickled, and says by its type what it ends with. Two places match them by type: the plans
of a loaded model (`plans.Planner`) and the bodies of HTTP requests (`remote.bodies`). It deliberately lacks checks: the
place that plans a request checks it. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sfumato.events import Completion, Decision, Edited, Filled
from sfumato.model.prompt import Prompt
from sfumato.options import Options
from sfumato.templates.slots import Slot

Messages = Sequence[Mapping[str, Any]]
"""A conversation: records with "role", "content" and what a model's turn brings besides."""

Tools = Sequence[Mapping[str, Any]]
"""Tools that an answer may call, each a record as OpenAI's API has it."""

Result = TypeVar("Result")


class Returns(Generic[Result]):
    """The base of all requests; the parameter is the type of the result that the request ends with."""


@dataclass(frozen=True)
class Complete(Returns[Completion]):
    """Continue a text (or token ids, or a prompt that is encoded already), without a chat template."""

    prompt: str | Sequence[int] | Prompt
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Chat(Returns[Completion]):
    """Answer a conversation."""

    messages: Messages
    tools: Tools | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Infill(Returns[Filled]):
    """Write the text between two texts, in `length` tokens; None: the length is searched for, up to `at_most` (64)."""

    prefix: str
    suffix: str
    length: int | None = None
    at_most: int | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Edit(Returns[Edited]):
    """Rewrite a text where it stands: its `spans` (from character, to character), or wherever the `instruction` says.

    `strength` is the share of it that starts as noise; None: 0.5."""

    text: str
    instruction: str | None = None
    spans: Sequence[tuple[int, int]] | None = None
    strength: float | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Fill(Returns[Filled]):
    """Fill the slots of a template. `prompt` is what it answers: a conversation, a text, or nothing."""

    template: Sequence[str | Slot]
    prompt: str | Messages | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Decide(Returns[dict[str, Decision]]):
    """Answer questions with given choices: field -> choices.

    All fields are read in one denoise pass (`steps` of them)."""

    prompt: str | Messages
    fields: Mapping[str, Sequence[str]]
    steps: int = 1
    options: Options = Options()  # noqa: RUF009 - frozen


Query = Complete | Chat | Infill | Edit | Fill | Decide
"""Any request."""

Answer = Complete | Chat
"""A request that its events answer: the last one holds the whole. The others end with a result of their own."""
