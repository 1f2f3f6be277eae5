"""What a model offers, wherever it runs: `LLM` loads one into this process, `Remote` speaks to a server.

The command line is written against this protocol alone. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, overload

from sfumato.events import Completion, Decision, Edited, Event, Filled
from sfumato.model.purpose import Purpose
from sfumato.options import Options
from sfumato.templates.requests import Messages, QueryFor, Result, Tools
from sfumato.templates.slots import Slot


class LanguageModel(Protocol):
    """A model that answers queries: by a method each, or any of them through `run`.

    Every method raises InputError for an argument that is wrong and CapacityError for one that is too large."""

    @property
    def name(self) -> str:
        """What the model is called."""
        ...

    @property
    def has_drafts(self) -> bool:
        """Whether answers on a canvas can come with a draft of every step."""
        ...

    @property
    def has_token_ids(self) -> bool:
        """Whether results carry token ids beside the text."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether the model runs in another process or machine.

        If so, it works on while the caller handles an event."""
        ...

    @property
    def purpose(self) -> Purpose | None:
        """What the model is for, where it is for one thing alone."""
        ...

    def check(self, options: Options, is_chat: bool = True) -> None:
        """Refuse options that this model can never take: InputError names the option."""
        ...

    def forget(self) -> None:
        """Free what is kept of the last conversation."""
        ...

    def run(self, query: QueryFor[Result]) -> Result:
        """Carry out any query and return its result."""
        ...

    def stream(
        self,
        prompt: str | Messages,
        options: Options = ...,
        tools: Tools | None = None,
    ) -> Iterator[Event]:
        """The events of one answer: Draft (if options.drafts), Commit, Done.

        A text is continued, a conversation is answered."""
        ...

    @overload
    def complete(self, prompt: str, options: Options = ...) -> Completion: ...
    @overload
    def complete(self, prompt: list[str], options: Options = ...) -> list[Completion]: ...
    def complete(self, prompt: str | list[str], options: Options = ...) -> Completion | list[Completion]:
        """Continue plain text; a list of texts is answered together."""
        ...

    def chat(self, messages: Messages, tools: Tools | None = None, options: Options = ...) -> Completion:
        """Answer a conversation."""
        ...

    def fill(
        self, template: Sequence[str | Slot], prompt: str | Messages | None = None, options: Options = ...
    ) -> Filled:
        """Fill the slots of a template."""
        ...

    def infill(
        self, prefix: str, suffix: str, length: int | None = None, options: Options = ..., at_most: int | None = None
    ) -> Filled:
        """Write the text between two texts."""
        ...

    def edit(
        self,
        text: str,
        instruction: str | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        strength: float | None = None,
        options: Options = ...,
    ) -> Edited:
        """Rewrite a text where it stands."""
        ...

    def decide(
        self, prompt: str | Messages, fields: Mapping[str, Sequence[str]], steps: int = 1, options: Options = ...
    ) -> dict[str, Decision]:
        """Answer questions with given choices."""
        ...
