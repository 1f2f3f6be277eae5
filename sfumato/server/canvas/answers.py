"""The answers of our own routes, as types for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

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


class DecisionsBody(TypedDict):
    """The answer of /v1/decisions."""

    id: str
    object: Literal["decisions"]
    model: str
    decisions: dict[str, DecisionBody]
    seed: int
