"""The bodies of our own routes: /v1/infill, /v1/edit, /v1/fill, /v1/decisions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sfumato.errors import InputError
from sfumato.options import BIG, MOST_STEPS, Use
from sfumato.server.http.bodies import Body, Choices, Count, Most
from sfumato.server.http.options import OptionsBody, option_field
from sfumato.server.openai.bodies import MessageList

CANVAS: tuple[Use, ...] = ("canvas", "templates")
"""The options of these routes apply to a canvas, and to templates."""
WITHOUT = ("early", "short")
"""Options that apply, and that these routes have never taken. `remote.bodies` refuses them before it sends."""


class InfillRequest(OptionsBody, uses=CANVAS, without=WITHOUT):
    """The body of /v1/infill."""

    prefix: str
    suffix: str
    length: Count | None = Field(None, description="Tokens to write; null: the length is found.")
    at_most: Count | None = Field(None, description="Tokens at most, where the length is found.")


SpanBody = Annotated[list[Annotated[int, Field(ge=0, le=BIG)]], Field(min_length=2, max_length=2)]


class EditRequest(OptionsBody, uses=CANVAS, without=WITHOUT):
    """The body of /v1/edit."""

    text: str
    instruction: str | None = None
    spans: Annotated[list[SpanBody], Most("max_spans", "spans")] | None = Field(
        None, description="What may change: from character, to character."
    )
    strength: float | None = Field(None, ge=0, le=1, description="The share of the text that is noise at first.")


class SlotBody(Body):
    """A place to be written, and at most one thing that it obeys."""

    name: str | None = None
    length: Count | None = None
    at_most: Count | None = None
    text: str | None = None
    strength: float | None = Field(None, ge=0, le=1)
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    regex: str | None = None
    grammar: str | None = None
    choices: Choices | None = None


class Prompted(Body):
    """What stands before what is written: messages, a text, or nothing."""

    messages: MessageList | None = None
    prompt: str | None = None

    def before(self) -> str | list[dict[str, Any]] | None:
        """The text or the conversation; None where there is neither."""
        if self.messages is not None and self.prompt is not None:
            raise InputError("prompt and messages are given; give one of them", option="prompt")
        return self.prompt if self.messages is None else [message.plain() for message in self.messages]


class FillRequest(Prompted, OptionsBody, uses=CANVAS, without=WITHOUT):
    """The body of /v1/fill."""

    template: Annotated[list[str | SlotBody], Field(min_length=1), Most("max_pieces", "pieces")]


class DecisionsRequest(Prompted):
    """The body of /v1/decisions."""

    model: str | None = None
    fields_: Annotated[
        dict[str, Annotated[Choices, Field(min_length=2)]], Field(min_length=1), Most("max_fields", "fields")
    ] = Field(alias="fields", description="Field -> its choices.")
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    seed: int | None = option_field("seed")
    user: str | None = None
