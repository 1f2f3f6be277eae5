"""What answers hold, as types, and how routes say in the OpenAPI document what they take and give.

The types are for the document and for mypy; an answer is built as a plain dict and sent as it is.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorDetail


class PromptTokens(TypedDict):
    cached_tokens: int


class UsageBody(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    steps: int
    passes: int
    canvases: int
    tokens_per_pass: float
    seconds: float
    first_commit_seconds: float | None


class CallFunction(TypedDict):
    name: str
    arguments: str


class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: CallFunction
    index: NotRequired[int]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    content: list[TokenLogprob]


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None
    logprobs: Logprobs | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: UsageBody


class LegacyLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | None
    logprobs: LegacyLogprobs | None


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    seed: int
    system_fingerprint: None
    choices: list[TextChoice]
    usage: UsageBody


class Infill(TypedDict):
    id: str
    object: Literal["infill"]
    model: str
    text: str
    middle: str
    length: int
    seed: int
    usage: UsageBody


class Edit(TypedDict):
    id: str
    object: Literal["edit"]
    model: str
    text: str
    diff: str
    seed: int
    usage: UsageBody


class Fill(TypedDict):
    id: str
    object: Literal["fill"]
    model: str
    text: str
    values: dict[str, str]
    lengths: dict[str, int]
    seed: int
    usage: UsageBody


class DecisionBody(TypedDict):
    choice: str
    probabilities: dict[str, float]


class Decisions(TypedDict):
    id: str
    object: Literal["decisions"]
    model: str
    decisions: dict[str, DecisionBody]
    seed: int


class ModelBody(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    canvas_length: int
    max_model_len: int
    is_diffusion: bool
    has_chat: bool
    parameters: int
    dtype: str
    ops: str
    quantised: str | None


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelBody]


class OptionBody(TypedDict):
    name: str
    type: Literal["integer", "number", "boolean", "string", "array", "object"]
    default: Any
    minimum: float | None
    maximum: float | None
    choices: list[str] | None
    doc: str


class OptionList(TypedDict):
    options: list[OptionBody]


class Status(TypedDict):
    status: str


class ResponseBody(TypedDict):
    """Of /v1/responses; OpenAI's object, of which these are the parts that vary."""

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    seed: int
    usage: dict[str, Any] | None


# --- the document --------------------------------------------------------------------------------------------------

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request says something wrong, and the error what",
        401: "No API key, or a wrong one",
        403: "This host or origin may not ask",
        404: "No such model or address",
        405: "Not this method",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is not application/json",
        500: "The server failed",
        503: "Too many wait, the worker is not there, or the server stops; try again",
        504: "The answer took too long",
    }.items()
}

EVENT: dict[str, Any] = {
    "type": "object",
    "description": "A server-sent event",
    "properties": {
        "data": {"type": "string", "description": "JSON; at a stream's end, but for /v1/responses, [DONE]"},
        "event": {"type": "string", "description": "What it tells; of /v1/responses alone"},
    },
    "required": ["data"],
}

_KINDS: dict[str, type[BaseModel]] = {}


def takes(kind: type[BaseModel], answer: Any, is_streamed: bool = True) -> dict[str, Any]:
    """What a POST route says of itself: its body, its answer, as a stream too, and its errors."""
    _KINDS[kind.__name__] = kind
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    stream = {"text/event-stream": {"itemSchema": EVENT}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: {"model": answer, "content": stream if is_streamed else {}}, **ERRORS},
    }


def gives(answer: Any) -> dict[str, Any]:
    """The same of a GET route, which takes nothing."""
    return {"responses": {200: {"model": answer}, **{status: ERRORS[status] for status in (401, 403, 404, 500, 503)}}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the requests that the routes read by themselves."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name, kind in _KINDS.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {name: schema}
    for operation in [operation for path in found["paths"].values() for operation in path.values()]:
        operation["responses"].pop("422", None)  # FastAPI's own word for what is a 400 here
    return found
