"""What is asked of a model: a small family of frozen records, the same in Python, over HTTP and between processes.

Each is plain data that can be pickled. Whoever carries one out matches by its type: `plans` for a loaded model,
`Remote` for a server. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.options import Options
from sfumato.templates.slots import Slot

Messages = Sequence[Mapping[str, Any]]
"""A conversation: records with "role", "content" and what a model's turn brings besides."""


@dataclass(frozen=True)
class Complete:
    """Continue a text (or token ids), without a chat template."""

    prompt: str | Sequence[int]
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Chat:
    """Answer a conversation."""

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Infill:
    """Write what stands between two texts, in `length` tokens; None: the length is found, up to `at_most` (64)."""

    prefix: str
    suffix: str
    length: int | None = None
    at_most: int | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Edit:
    """Rewrite a text where it stands: its `spans` (from character, to character), or wherever the `instruction` says.
    `strength` (0.5): the share of it that starts as noise."""

    text: str
    instruction: str | None = None
    spans: Sequence[tuple[int, int]] | None = None
    strength: float | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Fill:
    """Fill the slots of a template. `prompt` is what it answers: a conversation, a text, or nothing."""

    template: Sequence[str | Slot]
    prompt: str | Messages | None = None
    options: Options = Options()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Decide:
    """Answer questions with given choices: field -> choices. All fields are read in one denoise pass (`steps` of
    them)."""

    prompt: str | Messages
    fields: Mapping[str, Sequence[str]]
    steps: int = 1
    options: Options = Options()  # noqa: RUF009 - frozen


Query = Complete | Chat | Infill | Edit | Fill | Decide
"""Anything that can be asked."""

Answer = Complete | Chat
"""What is answered by events, whose last is the whole; the others end with a result of their own."""
