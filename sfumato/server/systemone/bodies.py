"""The body of /v1/systemone: TypeSafe's fields, and ours behind x_."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationInfo, WithJsonSchema, model_validator

from sfumato.options import MOST_STEPS, Options
from sfumato.questions import OWN, TYPES, Question, state_text
from sfumato.server.backend import ModelCard
from sfumato.server.http.bodies import Body, Count, Most, reading_of
from sfumato.server.http.options import adapter_of, option_field
from sfumato.server.systemone.assets import AssetBody, check_assets, refuse_images
from sfumato.server.systemone.multipart import FormPart
from sfumato.server.systemone.questions import BOX, QuestionReader
from sfumato.templates.checks import MOST_SAMPLES
from sfumato.templates.requests import Decide
from sfumato.templates.systemone import DEFAULT_SEED, READING, query_about

_CONTENT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "array"}]}
_OPEN: dict[str, Any] = {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]}
_BELOW: dict[str, Any] = {
    "description": "Asked only if the question of that id has this answer",
    "anyOf": [
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": {"type": ["string", "boolean", "integer"]},
        },
        {"type": "null"},
    ],
}


def _question(kind: str, needed: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    own = {} if kind == BOX else {f"{OWN}depends_on": _BELOW}
    properties = {"type": {"const": kind}, "instructions": _OPEN} | fields | own
    return {"type": "object", "properties": properties, "required": ["type", *needed]}


QUESTIONS: dict[str, Any] = {
    "type": "object",
    "description": "Id -> question",
    "minProperties": 1,
    "propertyNames": {"minLength": 1},
    "additionalProperties": {
        "anyOf": [
            _question(
                "noul",
                criteria={
                    "type": ["object", "null"],
                    "properties": {"true": _OPEN, "false": _OPEN},
                    "additionalProperties": False,
                },
            ),
            _question(
                "choice", ("criteria",), criteria={"type": "object", "minProperties": 1, "additionalProperties": _OPEN}
            ),
            _question("score", ("criteria",), criteria={"type": "array", "minItems": 1, "items": _CONTENT}),
            _question(
                TYPES["span"],
                ("instructions",),
                instructions=_CONTENT,
                unit={"enum": ["sentence", "line", "paragraph"]},
            ),
            _question(BOX),
        ]
    },
}
"""The schema of questions, for the document; `QuestionReader` reads them."""

State = Annotated[
    str | dict[str, Any] | Annotated[list[Any], Most("max_values", "values")],
    Field(description="What the questions are about."),
]
Records = Annotated[dict[str, Any], Field(min_length=1), Most("max_questions", "questions"), WithJsonSchema(QUESTIONS)]


class SystemOneRequest(Body):
    """The body of /v1/systemone. Fields that it does not know are left out, as TypeSafe's own API has it."""

    is_open: ClassVar[bool] = True

    model: str | None = None
    state: State
    questions: Records
    assets: Annotated[dict[str, AssetBody] | None, Most("max_parts", "assets")] = Field(
        None, min_length=1, description="Images by their placeholders; checked, and refused: no image is read yet."
    )
    x_chat: bool | None = Field(
        None, description="Whether the state is a conversation, read as its turns and not as data."
    )
    x_samples: int | None = Field(None, ge=1, le=MOST_SAMPLES, description="Draws of noise, averaged; 1.")
    x_steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="Denoise passes of each read; 1.")
    x_canvas: Count | None = Field(None, description="Positions of the canvas; null: as few as are needed.")
    x_think: Literal["never", "auto", "always"] | None = Field(
        None, description="Whether the model thinks first: auto where a read is not sure enough; never."
    )
    x_threshold: float | None = Field(None, ge=0, le=1, description="The confidence under which auto thinks; 0.5.")
    x_calibrated: bool | None = Field(None, description="Whether the checkpoint's calibration applies; true.")
    x_seed: int | None = option_field("seed")
    x_adapter: str | None = Field(None, description="The adapter to use; naming it as the model does the same.")

    _questions: dict[str, Question] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _reads_questions(self, info: ValidationInfo) -> SystemOneRequest:
        text = Decide(self.state if self.x_chat else state_text(self.state), {}).text
        self._questions = QuestionReader(reading_of(info), text).read(self.questions)
        return self

    def check_images(self, parts: Mapping[str, FormPart] | None) -> None:
        """Refusal for assets that are wrong, and then for any image, which no model reads yet.

        `parts`: of a multipart body, by name; None for plain JSON."""
        check_assets(self.assets, parts)
        boxes = [id for id, record in self.questions.items() if record["type"] == BOX]
        if self.assets or boxes:
            refuse_images(("questions", boxes[0]) if boxes else ("assets",))

    def query(self, card: ModelCard) -> Decide:
        """The query."""
        values = {name: getattr(self, f"{OWN}{name}") for name in READING}
        chosen = {name: value for name, value in values.items() if value is not None}
        options = Options(seed=DEFAULT_SEED if self.x_seed is None else self.x_seed, **adapter_of(card))
        return query_about(self.state, bool(self.x_chat), self._questions, **chosen, options=options)
