"""What a model offers, wherever it runs: `LLM` loads one into this process, `Remote` speaks to a server.

The command line is written against this protocol alone. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from sfumato.events import Event
from sfumato.options import Options

Messages = list[dict[str, Any]]


class LanguageModel(Protocol):
    """A model that answers requests: `LLM` and `Remote` are two."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def has_drafts(self) -> bool:
        """Whether answers on a canvas can come with drafts."""
        ...

    @property
    def has_token_ids(self) -> bool:
        """Whether results carry token ids beside the text."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether it runs elsewhere, so that it works on while the caller looks at an event."""
        ...

    def check(self, options: Options, is_chat: bool = True) -> None:
        """InputError for an option that this model can never take."""
        ...

    def forget(self) -> None:
        """Free what is kept of the last conversation."""
        ...

    def stream(
        self, prompt: str | Messages, options: Options = ..., tools: list[dict[str, Any]] | None = None
    ) -> Iterator[Event]:
        """The events of one answer."""
        ...
