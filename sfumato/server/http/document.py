"""How routes say in the OpenAPI document what they take and answer, and the document itself.

The types of answers (`TypedDict`) are for the document and for mypy; an answer is built as a plain dict and sent as it
is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The answer of every request that fails."""

    error: ErrorDetail


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


def errors_in(body: Any, overloaded: int = 503) -> dict[int | str, dict[str, Any]]:
    """The errors of a dialect: its body for them, and its status where too many wait."""
    return {overloaded if status == 503 else status: {**one, "model": body} for status, one in ERRORS.items()}


EVENT: dict[str, Any] = {
    "type": "object",
    "description": "A server-sent event",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON; at a stream's end, in most of OpenAI's routes and ours, [DONE]",
        },
        "event": {"type": "string", "description": "What it tells; of /v1/responses and /v1/messages alone"},
    },
    "required": ["data"],
}

EVENTS: dict[str, Any] = {"text/event-stream": {"itemSchema": EVENT}}
"""A stream of server-sent events, as the content of an answer."""

_BODIES: dict[str, type[BaseModel]] = {}
"""The bodies of POST routes by name."""


def takes(
    body: type[BaseModel],
    answer: Any,
    stream: Mapping[str, Any] = EVENTS,
    errors: Mapping[int | str, dict[str, Any]] = ERRORS,
) -> dict[str, Any]:
    """What a POST route says of itself: its body, its answer (also as a stream, by media type), and its errors."""
    _BODIES[body.__name__] = body
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {200: {"model": answer, "content": dict(stream)}, **errors},
    }


def gives(answer: Any, errors: Mapping[int | str, dict[str, Any]] = ERRORS) -> dict[str, Any]:
    """What a GET route says of itself: its answer, and its errors."""
    return {"responses": {200: {"model": answer}, **{status: errors[status] for status in (401, 403, 404, 500, 503)}}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the routes read by themselves."""
    whole = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = whole.setdefault("components", {}).setdefault("schemas", {})
    for name, body in _BODIES.items():
        schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {name: schema}
    for operation in [operation for path in whole["paths"].values() for operation in path.values()]:
        operation["responses"].pop("422", None)  # FastAPI's own word for what is a 400 here
    return whole
