"""How routes say in the OpenAPI document what they take and answer, and the document itself.

The types of answers (`TypedDict`) are for the document and for mypy; an answer is built as a plain dict and sent as it
is. FastAPI sees none of them: it would build a validator for each type at each route, which no request ever needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
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


_TYPES: dict[str, Any] = {}
"""What requests and answers are made of, by name."""


def _content(kind: Any) -> dict[str, Any]:
    """JSON of this type as the content of a request or answer; the type's schema comes into the document."""
    _TYPES[kind.__name__] = kind
    return {"application/json": {"schema": {"$ref": _PLACE.format(model=kind.__name__)}}}


_PLACE = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": _content(ErrorBody)}
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
    return {
        overloaded if status == 503 else status: {**one, "content": _content(body)} for status, one in ERRORS.items()
    }


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


def takes(
    body: type[BaseModel],
    answer: Any,
    stream: Mapping[str, Any] = EVENTS,
    errors: Mapping[int | str, dict[str, Any]] = ERRORS,
) -> dict[str, Any]:
    """What a POST route says of itself: its body, its answer (also as a stream, by media type), and its errors."""
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": _content(body)}},
        "responses": {200: {"content": _content(answer) | dict(stream)}, **errors},
    }


def gives(answer: Any, errors: Mapping[int | str, dict[str, Any]] = ERRORS) -> dict[str, Any]:
    """What a GET route says of itself: its answer, and its errors."""
    return {
        "responses": {
            200: {"content": _content(answer)},
            **{status: errors[status] for status in (401, 403, 404, 500, 503)},
        }
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the routes read by themselves."""
    whole = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = whole.setdefault("components", {}).setdefault("schemas", {})
    for name, kind in _TYPES.items():
        schema = TypeAdapter(kind).json_schema(ref_template=_PLACE)
        schemas |= schema.pop("$defs", {}) | {name: schema}
    for operation in [operation for path in whole["paths"].values() for operation in path.values()]:
        if "HTTPValidationError" in str(operation["responses"].get("422")):  # FastAPI's own word for what is a 400 here
            del operation["responses"]["422"]
    _allow_several(schemas)
    return whole


def _allow_several(schema: Any) -> None:
    """Say `anyOf` where a union is told apart by a function: a value may fit several of its shapes.

    A message with an id has all that a reference needs; `oneOf` would forbid it."""
    if isinstance(schema, dict):
        if "oneOf" in schema and "discriminator" not in schema:
            schema["anyOf"] = schema.pop("oneOf")
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            _allow_several(inner)
