"""The answers of /v1/systemone, as types for the OpenAPI document, and the form of its errors."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from sfumato.server.http.document import errors_in
from sfumato.server.http.errors import Refusal


class AnswerBody(TypedDict):
    """The answer to a question; which fields it has follows from its type."""

    type: Literal["noul", "choice", "score", "x_span"]
    noul: NotRequired[float]
    choice: NotRequired[str]
    score: NotRequired[float]
    legend: NotRequired[dict[str, Any]]
    passage: NotRequired[str]
    start: NotRequired[int]
    end: NotRequired[int]
    probabilities: NotRequired[dict[str, float]]
    confidence: NotRequired[float]
    x_confidence: NotRequired[float]
    x_thought: NotRequired[str]


class DecisionUsage(TypedDict):
    """Tokens of a request."""

    input_tokens: int
    output_tokens: int


class DecisionCost(TypedDict):
    """What else a request took."""

    cached_tokens: int
    canvases: int
    steps: int
    passes: int
    seconds: float


class SystemOneBody(TypedDict):
    """The answer of /v1/systemone."""

    model: str
    answers: dict[str, AnswerBody]
    usage: DecisionUsage
    x_usage: DecisionCost
    x_seed: int
    x_skipped: NotRequired[list[str]]


class FaultBody(TypedDict):
    """What is wrong with a body, and where."""

    loc: list[str | int]
    msg: str
    type: str


class FaultList(TypedDict):
    """The answer of a request whose body says something wrong."""

    detail: list[FaultBody]


class SystemOneDetail(TypedDict):
    """What an error is."""

    error_type: str
    message: str


class SystemOneError(TypedDict):
    """The answer of a request that fails otherwise."""

    detail: SystemOneDetail


_BODIES = errors_in(SystemOneError)
ERRORS = {status: one for status, one in _BODIES.items() if status != 400} | {422: errors_in(FaultList)[400]}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "internal_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Types of errors by their status."""

_CODES = {
    "missing_required_parameter": "missing",
    "invalid_json": "json_invalid",
    "array_above_max_length": "too_long",
    "empty_array": "too_short",
    "integer_below_min_value": "greater_than_equal",
    "integer_above_max_value": "less_than_equal",
    "decimal_below_min_value": "greater_than_equal",
    "decimal_above_max_value": "less_than_equal",
    "unknown_parameter": "extra_forbidden",
}
"""Codes of OpenAI's as the names of faults here."""


def error_form(error: Refusal) -> tuple[dict[str, Any], int]:
    """An error in System One's form: what is wrong with a body as a list of one fault, anything else as an object."""
    if error.status in (400, 422):
        place = error.place if error.place is not None else (error.option,) if error.option else ()
        code = error.error["code"] or "value_error"
        fault = {"loc": ["body", *place], "msg": str(error), "type": _CODES.get(code, code)}
        return {"detail": [fault]}, 422
    kind = _TYPES.get(error.status, "invalid_request_error")
    kind = "numeric_error" if error.error["code"] == "numeric_error" else kind
    return {"detail": {"error_type": kind, "message": str(error)}}, error.status
