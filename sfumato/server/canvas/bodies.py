"""The bodies of our own routes: /v1/infill, /v1/edit, /v1/fill, /v1/decisions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from sfumato.errors import InputError
from sfumato.options import BIG, MOST_STEPS, Options, Use
from sfumato.questions import Question, state_text
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Choices, Count, Most, only, reading_of
from sfumato.server.http.options import OptionsBody, adapter_of, option_field
from sfumato.server.openai.bodies import MessageList
from sfumato.server.systemone.bodies import Records, State
from sfumato.server.systemone.questions import QuestionForm, QuestionReader
from sfumato.templates.requests import Decide

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


MLX = QuestionForm({"bool": "noul", "noul": "noul", "choice": "choice", "score": "score"}, "choice", True, False)
"""Questions as mlx-vlm's /v1/decisions has them."""


class DecisionsRequest(Prompted):
    """The body of /v1/decisions: `fields` behind a prompt or messages, or mlx-vlm's `questions` about a `state`."""

    model: str | None = None
    fields_: Annotated[
        dict[str, Annotated[Choices, Field(min_length=2)]] | None,
        Field(min_length=1),
        Most("max_fields", "fields"),
    ] = Field(None, alias="fields", description="Field -> its choices.")
    state: State | None = None
    questions: Records | None = Field(None, description="Id -> question, as mlx-vlm has them.")
    images: Any = only([])
    audio: Any = only()
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    seed: int | None = option_field("seed")
    user: str | None = None

    _questions: dict[str, Question] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _reads_questions(self, info: ValidationInfo) -> DecisionsRequest:
        if self.questions is not None and self.state is not None:
            self._questions = QuestionReader(reading_of(info), state_text(self.state), MLX).read(self.questions)
        return self

    def query(self, card: ModelCard) -> Decide:
        """The query."""
        options = Options(seed=0 if self.seed is None else self.seed, **adapter_of(card))
        prompt, steps = self.before(), self.steps or 1
        if self.questions is None:
            if self.fields_ is None or self.state is not None:
                message = "fields is missing; give fields with a prompt, or questions with a state"
                raise InputError(message, option="fields")
            if prompt is None:
                raise InputError("prompt and messages are missing; give one of them", option="prompt")
            fields: Any = self.fields_
            return Decide(prompt, fields, steps, options=options)
        if self.fields_ is not None or prompt is not None:
            message = "questions is given with fields, prompt or messages; give questions and a state alone"
            raise InputError(message, option="questions")
        if self.state is None:
            raise InputError("state is missing; give what the questions are about", option="state")
        return Decide(state_text(self.state), self._questions, steps, options=options)
