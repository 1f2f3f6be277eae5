"""The answers of our own routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from sfumato.events import Decision, Decisions
from sfumato.server.http.answers import UsageBody


class InfillBody(TypedDict):
    """The answer of /v1/infill."""

    id: str
    object: Literal["infill"]
    model: str
    text: str
    middle: str
    length: int
    seed: int
    usage: UsageBody


class EditBody(TypedDict):
    """The answer of /v1/edit."""

    id: str
    object: Literal["edit"]
    model: str
    text: str
    diff: str
    seed: int
    usage: UsageBody


class FillBody(TypedDict):
    """The answer of /v1/fill."""

    id: str
    object: Literal["fill"]
    model: str
    text: str
    values: dict[str, str]
    lengths: dict[str, int]
    seed: int
    usage: UsageBody


class DecisionBody(TypedDict):
    """A choice, and the probability of each."""

    choice: str
    probabilities: dict[str, float]


class TypedAnswer(TypedDict):
    """An answer to a question, as mlx-vlm has it: "bool" with its probability, others with those of all."""

    type: Literal["bool", "choice", "score"]
    value: bool | str | float
    probability: NotRequired[float]
    probabilities: NotRequired[dict[str, float]]
    metadata: NotRequired[dict[str, Any]]


class DecisionsBody(TypedDict):
    """The answer of /v1/decisions: `decisions` to fields, `answers` to questions."""

    model: str
    id: NotRequired[str]
    object: NotRequired[Literal["decisions"]]
    decisions: NotRequired[dict[str, DecisionBody]]
    seed: NotRequired[int]
    answers: NotRequired[dict[str, TypedAnswer]]
    usage: NotRequired[dict[str, int]]


def typed_body(model: str, decisions: Decisions) -> dict[str, Any]:
    """The answers to questions, as mlx-vlm has them."""
    usage = {"input_tokens": decisions.usage.prompt_tokens, "output_tokens": decisions.usage.tokens}
    return {"model": model, "answers": {id: _typed(one) for id, one in decisions.items()}, "usage": usage}


def _typed(decision: Decision) -> dict[str, Any]:
    """An answer; its "confidence" is the likeliest option's probability there."""
    if decision.kind == "noul":
        return {"type": "bool", "value": decision.choice == "true", "probability": decision.probability}
    value = decision.score if decision.kind == "score" else decision.choice
    metadata: dict[str, Any] = {"confidence": decision.probability}
    if decision.kind == "score":
        metadata["legend"] = decision.legend
    return {"type": decision.kind, "value": value, "probabilities": decision.probabilities, "metadata": metadata}
